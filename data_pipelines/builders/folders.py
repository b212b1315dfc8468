"""The clips of a folder of one's own: a folder for each class, or list files with a path and a label a line."""

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from data_pipelines.builders import lists
from data_pipelines.builders.listing import Clip, Listing, bad_line, composed, shown
from data_pipelines.contract import UserError

_MOST_CLASSES = 100_000  # of numbers alone: every number below the largest is a class


def list_folder(manual_dir: Path, extensions: Collection[str], kind: str, labels: str = 'one') -> Listing:
  """Lists a folder in whichever of these layouts it is:

      train.txt, val.csv, ...         a list for each split, of `path label` lines
      <split>/<class>/x.mp4           a folder for each split, one of them called train, and in it one for each class
      <class>/x.mp4                   everything is in the split 'train'; use train[:90%] and train[90%:]
      <split>/x.mp4, or x.mp4 alone   unlabelled

  A list is a file at the top with one of the words of `lists.SPLITS` in its name: this word is the split's name. Paths
  are relative to the folder, in which they stay, or absolute; a line with a path alone is unlabelled. Labels are
  numbers from 0 or class names; `classes.txt` (or labels, label_map, class_names) names the classes in order. Without
  it classes are in alphabetical order, and numbers have themselves as names. Names that differ in how Unicode spells
  their accents are one class. docs/datasets.md has the rules.

  The original video of a clip is its file: lines and links that lead to one file have one `video_id`.

  Args:
    manual_dir: the folder.
    extensions: of the files that count, in lower case: {'.mp4', ...}.
    kind: 'video' or 'image', for messages.
    labels: of a file: 'one'; or 'several', which lists alone can say, in `path label label ...` lines. A path alone has
      none of the classes then, and the label -1 stands for an unlabelled file.

  Returns:
    The listing; `left_over` has the other files of class folders, `unlisted` what no list names.

  Raises:
    UserError: it is in none of these layouts, a line cannot be understood, or a file looks like annotations and would
      not be read.
  """
  if not manual_dir.is_dir():
    raise UserError(f'{manual_dir} is not a directory; expected a folder of {kind} files: correct --manual_dir.')
  paths = lists.find(manual_dir)
  known = {*paths.values(), lists.class_names_file(manual_dir)} - {None}
  files = sorted(_walk(manual_dir))
  lists.refuse_others(manual_dir, files, known, extensions)
  if labels == 'several' and not paths:
    raise UserError(
      f'{manual_dir} has no list (train.txt, val.csv, ...), and folders cannot say several labels of a file: write '
      'lists of `path label label ...` lines, or leave out --labels=several.'
    )
  if paths:
    listing = _of_lists(manual_dir, paths, extensions, labels)
    listing = listing._replace(unlisted=_unlisted(manual_dir, files, listing, extensions))
  else:
    found = [parts for parts in files if lists.has_extension(parts[-1], extensions)]
    if not found:
      endings = Counter(os.path.splitext(parts[-1])[1].lower() or 'no ending' for parts in files).most_common(3)
      instead = f'; it has {", ".join(f"{count:,} x {ending}" for ending, count in endings)}' if endings else ''
      raise UserError(
        f'{manual_dir} has no {kind} file ({lists.some_of(extensions)}) and no list (train.txt, val.csv, '
        f'...){instead}: correct --manual_dir.'
      )
    # Beside folders of classes lie a README and the like; where there are none, a file that is not read may be meant.
    least = min(2, max(map(len, found)))
    left_over = sorted({parts for parts in files if len(parts) >= least} - set(found))
    listing = _of_folders(manual_dir, found, _class_names(manual_dir, extensions))
    others = tuple(os.path.join(manual_dir, *parts) for parts in left_over)
    listing = listing._replace(left_over=others, empty=_empty(manual_dir))
  copies = set(lists.copies(manual_dir, files, known)) - set(listing.left_over)
  listing = listing._replace(left_over=tuple(sorted({*listing.left_over, *copies})))
  _check_labels_of_files(listing)
  return listing


def _unlisted(
  root: Path, files: Collection[lists.Parts], listing: Listing, extensions: Collection[str]
) -> tuple[str, ...]:
  """Files of the folder that could be examples and are named by no list."""
  named = {os.path.normpath(c.path) for clips in listing.splits.values() for c in clips if c.path}
  lying = (os.path.join(root, *parts) for parts in files if lists.has_extension(parts[-1], extensions))
  return tuple(sorted(path for path in lying if os.path.normpath(path) not in named))


def _empty(root: Path) -> tuple[str, ...]:
  """Folders that hold nothing that is seen, and links to folders that are read under their own names."""
  found = []
  for where, folders, names in os.walk(root):
    shown_folders = [os.path.join(where, f) for f in folders if not f.startswith('.')]
    folders[:] = [f for f in folders if not f.startswith('.')]
    top = os.path.join(os.path.realpath(root), '')
    found += [f for f in shown_folders if os.path.islink(f) and os.path.realpath(f).startswith(top)]
    if not shown_folders and all(n.startswith('.') for n in names) and where != str(root):
      found.append(where)
  return tuple(sorted(found))


def _walk(root: Path) -> Iterator[lists.Parts]:
  """The path below `root`, in parts, of each file; hidden ones are left out, and links are followed."""
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
    yield from ((*parts, n) for n in names if not n.startswith('.'))


def _of_folders(root: Path, found: list[tuple[str, ...]], names: tuple[str, ...] | None) -> Listing:
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
  labelled = depth == 3 or (depth == 2 and not all(t.lower() in lists.SPLITS for t in tops))
  class_names = tuple(sorted({_class(parts) for parts in found})) if labelled else ()
  if names is not None:
    if unknown := sorted(set(class_names) - set(names)):
      raise UserError(
        f'{lists.class_names_file(root)} does not name the class of the folder {unknown[0]!r} in {root}: correct it, '
        f'or take it away.'
      )
    class_names = names
  number = {name: i for i, name in enumerate(class_names)}
  splits: dict[str, list[Clip]] = {}
  video_id = _names_of_files(root)
  for parts in found:
    in_split = depth == 3 or (depth == 2 and not labelled)
    split = parts[0] if in_split else 'train'
    name = _text('/'.join(parts[in_split:]))
    label = number[_class(parts)] if labelled else -1
    file = os.path.join(root, *parts)
    splits.setdefault(split, []).append(Clip(name, video_id(file), file, label, ''))
  spelt: dict[str, str] = {}
  for split in splits:
    if (other := spelt.setdefault(split.casefold(), split)) != split:
      raise UserError(
        f'{root} has the splits {other!r} and {split!r}: give both folders one name, or put one elsewhere.'
      )
    if not re.fullmatch(r'\w+', split) or split == 'all':
      raise UserError(f"{root / split}: a split cannot be called {split!r}; expected letters and digits, not 'all'.")
  return Listing(class_names, splits)


def _of_lists(root: Path, paths: dict[str, Path], extensions: Collection[str], how_many: str) -> Listing:
  if how_many == 'several':
    rows = {split: lists.read_several(path, extensions) for split, path in paths.items()}
  else:
    read = {split: lists.read(path, extensions) for split, path in paths.items()}
    labels_of = lambda row: () if row.label is None else (row.label,)
    rows = {split: [lists.SeveralRow(r.line, r.path, labels_of(r)) for r in parsed] for split, parsed in read.items()}
  names = _class_names(root, extensions)
  # Among names of several labels, -1 stands for an unlabelled file all the same.
  none = {'-1'} if how_many == 'several' else set()
  each = {
    s: [lists.Row(r.line, r.path, label) for r in parsed for label in r.labels if label not in none]
    for s, parsed in rows.items()
  }
  lists.check_labels(paths, each, names)
  labels = {row.label for parsed in each.values() for row in parsed}
  if numbered := all(re.fullmatch(r'-1|\d{1,9}', label) for label in labels):
    if names is None:
      largest = max((int(label) for label in labels), default=-1)
      if largest >= _MOST_CLASSES:
        raise UserError(
          f'A list in {root} has the label {largest}, which would make as many classes; at most {_MOST_CLASSES:,} are '
          'taken: number them from 0, or use names.'
        )
      names = tuple(str(i) for i in range(largest + 1))
  elif names is None:
    names = tuple(sorted(labels))
  index = {name: i for i, name in enumerate(names)}
  splits = {}
  video_id = _names_of_files(root)
  for split, path in paths.items():
    clips = []
    for line, name, of_file in rows[split]:
      numbers = [-1 if label == '-1' else int(label) if numbered else index.get(label, len(names)) for label in of_file]
      if unknown := [label for label, number in zip(of_file, numbers, strict=True) if number >= len(names)]:
        raise bad_line(
          path, line, f'label {unknown[0]!r} is none of the {len(names)} classes', 'Correct it, or the list of classes.'
        )
      number = tuple(sorted(numbers)) if how_many == 'several' else (*numbers, -1)[0]
      if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise bad_line(
          path, line, f'{shown(name)} leads out of --manual_dir', 'Write the path of such a file from / on.'
        )
      file = os.path.join(root, name)
      # A list that was written on macOS, or for files that came from there, may spell accents the other way.
      spellings = (file, *(unicodedata.normalize(form, file) for form in ('NFC', 'NFD')))
      found = next((f for f in spellings if os.path.isfile(f)), None)
      clips.append(Clip(_text(name), video_id(found or file), found, number, f'{path.name}:{line}'))
    splits[split] = clips
  return Listing(names, splits, notes=_notes(splits) if how_many == 'several' else ())


def _notes(splits: dict[str, list[Clip]]) -> tuple[str, ...]:
  count = lambda clips, label: f'{sum(c.label == label for c in clips):,}'
  of = lambda clips: f'of {len(clips):,} files {count(clips, ())} have none of the classes'
  return tuple(f'{split}: {of(clips)}, {count(clips, (-1,))} are unlabelled' for split, clips in splits.items())


def _class_names(root: Path, extensions: Collection[str]) -> tuple[str, ...] | None:
  path = lists.class_names_file(root)
  return None if path is None else lists.class_names(path, extensions)


def _check_labels_of_files(listing: Listing) -> None:
  """Raises a UserError if a split has one file under two labels, by whatever spelling or link."""
  for split, clips in listing.splits.items():
    first: dict[str, Clip] = {}
    for clip in clips:
      other = first.setdefault(clip.video_id, clip)
      if other.label != clip.label:
        places = [f'{c.id} ({c.line})' if c.line else c.id for c in (other, clip)]
        raise UserError(
          f'The file {clip.video_id} of split {split!r} has two labels, as {places[0]} and as '
          f'{places[1]}; expected one: remove the other.'
        )


def _names_of_files(root: Path) -> Callable[[str], str]:
  """file -> the name of its video: the path of the file itself, whatever link or spelling led to it, from `root`.

  Of several names of one file on the disk (hard links) it is the first that is asked for.
  """

  @functools.cache  # there are few folders
  def resolved(folder: str) -> str:
    # What a list names may be no path at all.
    return os.path.realpath(folder) if os.path.isdir(folder) else os.path.normpath(folder)

  @functools.cache
  def numbers(folder: str) -> dict[str, int]:
    # A folder knows the numbers of its files; to ask for each would take long on a network disk.
    return {entry.name: entry.inode() for entry in os.scandir(folder)} if os.path.isdir(folder) else {}

  top = os.path.join(resolved(str(root)), '')
  first: dict[int, list[str]] = {}

  def name(file: str) -> str:
    path = os.path.join(resolved(os.path.dirname(file)), os.path.basename(file))
    path = os.path.realpath(path) if os.path.islink(path) else path
    if number := numbers(os.path.dirname(path)).get(os.path.basename(path)):
      same = first.setdefault(number, [])
      if path not in same:
        # Two disks, and some that number nothing, have one number twice.
        path = next((other for other in same if os.path.samefile(other, path)), path)
        same += [] if path in same else [path]
    return _text(path.removeprefix(top))

  return name


def _class(parts: tuple[str, ...]) -> str:
  """The class of a file in a class folder."""
  return composed(_text(parts[-2]))


def _text(name: str) -> str:
  # A file name may be any bytes; a text in a dataset may not.
  return name.encode('utf-8', 'backslashreplace').decode()
