"""The clips of a folder of one's own: a folder for each class, or list files with a path and a label a line."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from data_pipelines.builders.listing import Clip, Listing, bad_line, read_lines
from data_pipelines.contract import UserError

_SPLITS = frozenset({'train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'eval'})
_LISTS = ('.txt', '.csv', '.tsv')
_NAMES = ('classes', 'labels', 'label_map', 'class_names')
_SEPARATORS = ('\t', ',', ' ')


def list_folder(manual_dir: Path, extensions: Collection[str], kind: str) -> Listing:
  """Lists a folder in whichever of these layouts it is:

      train.txt, val.csv, ...         a list for each split; each line `path label`, with a tab, comma or space between
      <split>/<class>/x.mp4           a folder for each split, one of them called train, and in it one for each class
      <class>/x.mp4                   everything is in the split 'train'; use train[:90%] and train[90%:]
      <split>/x.mp4, or x.mp4 alone   unlabelled

  A list is a file at the top with one of the words train, val, valid, validation, test in its name: this word is the
  split's name. Paths are relative to the folder, or absolute; a line with a path alone is unlabelled. Labels are
  numbers from 0 or class names; `classes.txt` (or labels, label_map, class_names) names the classes in order, one a
  line. Without it classes are in alphabetical order, and numbers have themselves as names.

  The original video of a clip is its file: lines and links that lead to one file have one `video_id`.

  Args:
    manual_dir: the folder.
    extensions: of the files that count, in lower case: {'.mp4', ...}. Others are left alone.
    kind: 'video' or 'image', for messages.

  Raises:
    UserError: it is in none of these layouts, or a line cannot be understood.
  """
  if not manual_dir.is_dir():
    raise UserError(f'{manual_dir} is not a directory; expected a folder of {kind} files: correct --manual_dir.')
  lists = _lists(manual_dir)
  if lists:
    return _of_lists(manual_dir, lists, extensions)
  found = sorted(_walk(manual_dir, extensions))
  if not found:
    raise UserError(
      f'{manual_dir} has no {kind} file ({", ".join(sorted(extensions))}) and no list (train.txt, val.csv, ...): '
      f'correct --manual_dir.'
    )
  return _of_folders(manual_dir, found)


def _walk(root: Path, extensions: Collection[str]) -> Iterator[tuple[str, ...]]:
  """The path below `root`, in parts, of each file that counts; hidden ones do not, and links are followed."""
  seen = set()

  def refuse(error: OSError):
    raise UserError(f'{error.filename} below --manual_dir cannot be read ({error.strerror}): correct its permissions.')

  for where, folders, names in os.walk(root, followlinks=True, onerror=refuse):
    place = os.stat(where)
    if (place.st_dev, place.st_ino) in seen:  # a link back up
      folders.clear()
      continue
    seen.add((place.st_dev, place.st_ino))
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    parts = Path(where).relative_to(root).parts
    yield from ((*parts, n) for n in names if not n.startswith('.') and _has_extension(n, extensions))


def _of_folders(root: Path, found: list[tuple[str, ...]]) -> Listing:
  depths = Counter(len(parts) for parts in found)
  depth = depths.most_common(1)[0][0]
  odd = next((parts for parts in found if len(parts) != depth), None)
  tops = {parts[0] for parts in found}
  if odd is not None or depth > 3 or (depth == 3 and not any(t.lower() in ('train', 'training') for t in tops)):
    example = os.path.join(*(odd or found[0]))
    raise UserError(
      f'{root} has files at different depths, or folders that are neither splits nor classes (such as {example}); '
      f'expected <split>/<class>/file with a split called train, or <class>/file: rearrange it or write lists '
      f'(train.txt with `path label` lines).'
    )
  labelled = depth == 3 or (depth == 2 and not all(t.lower() in _SPLITS for t in tops))
  class_names = tuple(sorted({_text(parts[-2]) for parts in found})) if labelled else ()
  number = {name: i for i, name in enumerate(class_names)}
  splits: dict[str, list[Clip]] = {}
  video_id = _names_of_files(root)
  for parts in found:
    in_split = depth == 3 or (depth == 2 and not labelled)
    split = parts[0] if in_split else 'train'
    name = _text('/'.join(parts[in_split:]))
    label = number[_text(parts[-2])] if labelled else -1
    file = os.path.join(root, *parts)
    splits.setdefault(split, []).append(Clip(name, video_id(file), file, label, ''))
  for split in splits:
    if not re.fullmatch(r'\w+', split) or split == 'all':
      raise UserError(f"{root / split}: a split cannot be called {split!r}; expected letters and digits, not 'all'.")
  return Listing(class_names, splits)


def _lists(root: Path) -> dict[str, Path]:
  """{split: its list}."""
  lists: dict[str, Path] = {}
  for path in sorted(root.iterdir()):
    words = re.split(r'[\W_\d]+', path.stem.lower())
    found = [w for w in words if w in ('train', 'val', 'valid', 'validation', 'test')]
    if path.suffix.lower() not in _LISTS or not path.is_file() or len(found) != 1:
      continue
    other = lists.setdefault(found[0], path)
    if other != path:
      raise UserError(f'Both {other} and {path} could be the list of split {found[0]!r}: take one of them away.')
  return lists


def _of_lists(root: Path, lists: dict[str, Path], extensions: Collection[str]) -> Listing:
  rows = {split: _read_list(path, extensions) for split, path in lists.items()}
  _check_labels(lists, rows, _class_names(root))
  labels = {label for parsed in rows.values() for _, _, label in parsed if label is not None}
  names = _class_names(root)
  if numbered := all(re.fullmatch(r'-1|\d{1,9}', label) for label in labels):
    if names is None:
      names = tuple(str(i) for i in range(max((int(label) for label in labels), default=-1) + 1))
  elif names is None:
    names = tuple(sorted(labels))
  index = {name: i for i, name in enumerate(names)}
  splits = {}
  video_id = _names_of_files(root)
  for split, path in lists.items():
    clips = []
    for line, name, label in rows[split]:
      number = -1 if label is None else int(label) if numbered else index.get(label, len(names))
      if number >= len(names):
        raise bad_line(
          path, line, f'label {label!r} is none of the {len(names)} classes', 'Correct it, or the list of classes.'
        )
      file = os.path.join(root, name)
      clips.append(
        Clip(_text(name), video_id(file), file if os.path.isfile(file) else None, number, f'{path.name}:{line}')
      )
    splits[split] = clips
  return Listing(names, splits)


def _names_of_files(root: Path) -> Callable[[str], str]:
  """file -> the name of its video: the path of the file itself, whatever link or spelling led to it, from `root`."""

  @functools.cache  # there are few folders
  def resolved(folder: str) -> str:
    # What a list names may be no path at all.
    return os.path.realpath(folder) if os.path.isdir(folder) else os.path.normpath(folder)

  top = os.path.join(resolved(str(root)), '')

  def name(file: str) -> str:
    path = os.path.join(resolved(os.path.dirname(file)), os.path.basename(file))
    path = os.path.realpath(path) if os.path.islink(path) else path
    return _text(path.removeprefix(top))

  return name


def _check_labels(lists: dict[str, Path], rows: dict[str, list], names: tuple[str, ...] | None) -> None:
  """Without a list of classes, labels are all numbers from 0 (-1: none) or all names."""
  labels = [(lists[split], line, label) for split in rows for line, _, label in rows[split] if label is not None]
  numbers = [re.fullmatch(r'-?\d+', label) is not None for _, _, label in labels]
  if names is None and any(numbers) and not all(numbers):
    odd = min((True, False), key=numbers.count)
    path, line, label = labels[numbers.index(odd)]
    raise bad_line(
      path,
      line,
      f'label {label!r} is a {"number" if odd else "name"}, most are not',
      'Use numbers or names throughout.',
    )
  for path, line, label in labels:
    if re.fullmatch(r'-\d+', label) and label != '-1' and label not in (names or ()):
      raise bad_line(path, line, f'label {label!r} is no class', 'Expected a number from 0, or -1 for none.')


def _read_list(path: Path, extensions: Collection[str]) -> list[tuple[int, str, str | None]]:
  """(line number, path, label or None) of a list."""
  lines = read_lines(path)
  if len(lines) > 1 and re.fullmatch(r'"?(path|file|filename|video|video_path|image|name)"?([\t, ].*)?', lines[0][1]):
    del lines[0]  # a heading
  if all(_has_extension(_unquoted(text), extensions) for _, text in lines):
    return [(n, _unquoted(text), None) for n, text in lines]
  best: list[tuple[int, str, str | None]] = []
  for separator in _SEPARATORS:
    rows = []
    for n, text in lines:
      name, _, label = text.rpartition(separator)
      if not _has_extension(_unquoted(name), extensions):
        break
      rows.append((n, _unquoted(name), _unquoted(label)))
    if len(rows) == len(lines):
      return rows
    best = max(best, rows, key=len)
  n, text = lines[len(best)]
  raise bad_line(
    path,
    n,
    f'{text[:80]!r} is not `path label`, with a tab, a comma or a space between, as the lines before',
    f'Expected one path ({", ".join(sorted(extensions))}) and one label.',
  )


def _class_names(root: Path) -> tuple[str, ...] | None:
  found = [root / f'{name}{ending}' for name in _NAMES for ending in _LISTS]
  found = [path for path in found if path.is_file()]
  if not found:
    return None
  if len(found) > 1:
    raise UserError(f'Both {found[0]} and {found[1]} could name the classes: take one of them away.')
  lines = read_lines(found[0])
  names = [text for _, text in lines]
  for n, text in lines:
    if names.count(text) > 1:
      raise bad_line(found[0], n, f'class {text!r} comes twice', 'Expected one class a line, each once.')
  return tuple(names)


def _has_extension(name: str, extensions: Collection[str]) -> bool:
  return os.path.splitext(name)[1].lower() in extensions


def _unquoted(text: str) -> str:
  text = text.strip()
  return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _text(name: str) -> str:
  # A file name may be any bytes; a text in a dataset may not.
  return name.encode('utf-8', 'backslashreplace').decode()
