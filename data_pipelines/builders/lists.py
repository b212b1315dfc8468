"""The lists of a folder of one's own: which files they are, and what their lines say."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipelines.builders.listing import bad_line, composed, read_lines, read_rows, read_text, shown
from data_pipelines.contract import UserError

SPLITS = frozenset(
  ['train', 'training', 'val', 'valid', 'validate', 'validation', 'test', 'testing', 'eval', 'evaluation', 'dev']
)
_LISTS = ('.txt', '.csv', '.tsv')
_NAMES = ('classes', 'labels', 'label_map', 'class_names')
# Words and endings of files that annotate others, read here or not.
_ABOUT = frozenset([
  'annotation', 'annotations', 'label', 'labels', 'class', 'classes', 'classind', 'metadata', 'split', 'splits',
  'list', 'lists', 'filelist', 'groundtruth', 'truth', 'gt', 'annot', 'anno', 'trainval', 'targets', 'categories',
  'holdout',
])  # fmt: skip
_TABLES = frozenset([
  '.txt', '.csv', '.tsv', '.json', '.jsonl', '.xml', '.yaml', '.yml', '.parquet', '.feather', '.xls', '.xlsx', '.pkl',
  '.pickle', '.npy', '.npz', '.mat', '.lst', '.list', '.pbtxt', '.h5', '.hdf5', '.sqlite', '.db', '.ndjson', '.psv',
  '.arrow', '.ods', '.dat', '.toml', '',
])  # fmt: skip
# Endings behind another one: of packed files and of copies that are kept or were not finished.
_PACKED = frozenset(['.gz', '.bz2', '.xz', '.zip', '.zst', '.lz4', '.7z', '.tgz', '.rar'])
_COPIES = frozenset(['.bak', '.backup', '.old', '.orig', '.save', '.copy', '.tmp', '.swp', '.part', '.crdownload'])
_COPIES |= frozenset(f'.{i}' for i in range(10))
_LOOK = 1 << 16  # bytes of a file that are looked at to see whether it is a list
_SEPARATORS = ('\t', ',', ';', ' ')
_PATH_HEADING = re.compile(r'(path|file ?name|file ?path|file|video|video path|video name|image|image path|name)')
_LABEL_MAP = re.compile(r'\s*(#[^\n]*\s*)*(item|label|node|entry|entries)\s*:?\s*\{')  # protocol buffers as text
_NAME_HEADING = re.compile(r'((class|label|action|activity|category)( name)?|name|classe|activitie|categorie)s?')

_NO_LABEL_MAP = (
  'it is a label map (items with an id and a name): write a classes.txt with one name a line, in the order of the '
  'numbers that the lists have from 0'
)


Parts = tuple[str, ...]  # of a path


class Row(NamedTuple):
  """A line of a list: its number, the path that it has, and the label; None where it has none."""

  line: int
  path: str
  label: str | None


def find(root: Path) -> dict[str, Path]:
  """{split: its list}: the files at the top with the name of one split among the words of theirs.

  Raises:
    UserError: two could be the list of one split.
  """
  lists: dict[str, Path] = {}
  for path in sorted(root.iterdir()):
    splits = _splits(path.stem)
    if path.suffix.lower() not in _LISTS or path.name.startswith('.') or path.is_dir() or len(splits) != 1:
      continue
    other = lists.setdefault(splits[0], path)
    if other != path:
      raise UserError(f'Both {other} and {path} could be the list of split {splits[0]!r}: take one of them away.')
  return lists


def refuse_others(root: Path, files: Collection[Parts], known: Collection[Path], extensions: Collection[str]) -> None:
  """Raises a UserError for a file that looks like annotations and is not of `known`.

  It looks so by its name, or since most of its first lines begin with a file that has one of `extensions`, or with the
  name of one that is there, without its ending. A copy of a known one, such as train.csv.bak, is none. Below the
  folders at the top only those are looked at that have no examples: a text beside a clip is about the clip.

  Args:
    root: the folder.
    files: the path below `root`, in parts, of each file in it.
    known: the lists and the names of the classes.
    extensions: of examples, in lower case.
  """
  examples = [parts for parts in files if has_extension(parts[-1], extensions)]
  of_examples = {parts[0] for parts in examples}
  stems = {os.path.splitext(parts[-1])[0] for parts in examples}
  looked_at = [root.joinpath(*parts) for parts in files if len(parts) <= 2 or parts[0] not in of_examples]
  for path in looked_at:
    plain, extra = _without_extra(path)
    words = _words(plain.stem)
    splits = _splits(plain.stem)
    if path in known or plain.suffix.lower() not in _TABLES or (extra and extra not in _PACKED and plain in known):
      continue
    if not (splits or _ABOUT & set(words) or _lists_files(path, extensions, stems)):
      continue
    if extra in _PACKED:
      why = 'it is packed'
    elif extra:
      why = f'it is called a copy, and {plain.name} is not there'
    elif path.suffix.lower() == '.pbtxt':
      why = _NO_LABEL_MAP
    elif path.suffix.lower() not in _LISTS:
      why = f'a list is a {", ".join(_LISTS)} file of `path label` lines'
    elif path.parent != root:
      why = f'lists are read in {root} itself'
    elif len(splits) > 1:
      why = f'its name has the splits {" and ".join(splits)}, and a list is of one'
    else:
      why = 'a list has the name of its split, such as train.csv'
    raise UserError(
      f'{path} looks like annotations and is not read, since {why}: make it such a list, take it away, or put a dot '
      f'before its name.'
    )


def copies(root: Path, files: Collection[Parts], known: Collection[Path]) -> list[str]:
  """Paths of copies of known lists, such as train.csv.bak: they are not read."""
  paths = (root.joinpath(*parts) for parts in files if len(parts) <= 2)
  return [str(path) for path in paths if path not in known and _without_extra(path)[0] in known]


def _without_extra(path: Path) -> tuple[Path, str]:
  """A path without an ending of packed files or of copies, and this ending: train.csv and .gz of train.csv.gz."""
  if path.name.endswith('~'):
    return path.with_name(path.name[:-1]), '~'
  ending = path.suffix.lower()
  if ending == '.tgz' or (ending in _PACKED and not os.path.splitext(path.stem)[1]):  # train.zip
    return path.with_suffix('.txt'), ending
  return (path.with_suffix(''), ending) if ending in _PACKED | _COPIES else (path, '')


def _lists_files(path: Path, extensions: Collection[str], stems: Collection[str]) -> bool:
  """Whether most of the first lines of a text file begin with a file with one of some endings, or with one of stems."""
  if path.suffix.lower() not in _LISTS or not path.is_file():
    return False
  try:
    with open(path, 'rb') as f:
      lines = f.read(_LOOK).decode('utf-8-sig', 'replace').splitlines()[:20]
  except OSError:
    return False  # `read` says why, where it is a list
  cells = [unquoted(re.split(r'[\t,;]', line.strip())[0]) for line in lines if line.strip()]
  cells = cells[1:] if len(cells) > 1 and _is_heading(cells[0]) else cells
  cells = [(cell, cell.rpartition(' ')[0]) for cell in cells]
  named = [any(has_extension(c, extensions) or c.rpartition('/')[2] in stems for c in either) for either in cells]
  return bool(named) and sum(named) > len(named) / 2


def _words(stem: str) -> list[str]:
  return re.split(r'[\W_\d]+', stem.lower())


def _splits(stem: str) -> list[str]:
  """The splits that the name of a file has: train of 'trainlist01' and 'kinetics_train_list_videos'."""
  words = (re.sub(r'(?<=.)(lists?|sets?|splits?|files?|data)$', '', word) for word in _words(stem))
  return list(dict.fromkeys(word for word in words if word in SPLITS))


def class_names_file(root: Path) -> Path | None:
  """The file that names the classes, if there is one."""
  found = [root / f'{name}{ending}' for name in _NAMES for ending in _LISTS]
  found = [path for path in found if os.path.lexists(path)]
  if len(found) > 1:
    raise UserError(f'Both {found[0]} and {found[1]} could name the classes: take one of them away.')
  return found[0] if found else None


def class_names(path: Path, extensions: Collection[str]) -> tuple[str, ...]:
  """The classes that a file names, in order: one a line, or a number from 0 and a name, with or without a heading.

  Raises:
    UserError: a class comes twice, or the lines are of another kind.
  """
  if _LABEL_MAP.match(read_text(path)):
    raise UserError(f'{path} names no classes that are read, since {_NO_LABEL_MAP}.')
  rows = _numbered(path) or _one_a_line(path)
  names: dict[str, int] = {}
  for line, name in rows:
    if has_extension(name.rpartition(',')[0], extensions) or has_extension(name, extensions):
      raise bad_line(
        path, line, f'{shown(name)} is a file, and no class', 'Call a list by its split (train.csv), or remove it.'
      )
    if not name:
      raise bad_line(path, line, 'the class has no name', 'Give it one.')
    if name in names:
      raise bad_line(path, line, f'class {name!r} comes twice', 'Expected one class a line, each once.')
    names[name] = line
  return tuple(names)


def _numbered(path: Path) -> list[tuple[int, str]]:
  """(line, name) of a table of a number and a name, by number; empty if it is none."""
  for separator in _SEPARATORS if path.suffix.lower() == '.txt' else _SEPARATORS[:3]:
    rows = _table(path, separator)
    if separator == ' ':  # names have spaces
      rows = [(n, text.split(maxsplit=1)) for n, text in read_lines(path)]
    if len(rows) < 1 + (separator == ' ') or any(len(cells) != 2 for _, cells in rows):
      continue
    for number, name in ((0, 1), (1, 0)):
      is_number = [re.fullmatch(r'\d{1,9}', cells[number]) is not None for _, cells in rows]
      if not all(is_number[1:]):
        continue
      body = rows if is_number[0] else rows[1:]
      if not body or all(re.fullmatch(r'\d{1,9}', cells[name]) for _, cells in body):
        continue  # two numbers: it is not known which is which
      numbers = sorted(int(cells[number]) for _, cells in body)
      if numbers != list(range(len(body))):
        raise bad_line(
          path, body[0][0], f'the {len(body)} classes have the numbers {numbers[0]} to {numbers[-1]}',
          'Number them from 0, each once.',
        )  # fmt: skip
      return [(n, composed(cells[name])) for n, cells in sorted(body, key=lambda row: int(row[1][number]))]
  return []


def _one_a_line(path: Path) -> list[tuple[int, str]]:
  """(line, name) of names."""
  if path.suffix.lower() == '.txt':
    rows = [(n, composed(text)) for n, text in read_lines(path)]
    return rows[1:] if len(rows) > 1 and _is_name_heading(rows[0][1]) else rows
  separator = '\t' if path.suffix.lower() == '.tsv' else ','
  rows = _table(path, separator) or [(n, [unquoted(text)]) for n, text in read_lines(path)]
  if len(rows) > 1 and _is_name_heading(' '.join(rows[0][1])):
    del rows[0]
  if odd := next(((n, cells) for n, cells in rows if len(cells) != 1), None):
    raise bad_line(
      path, odd[0], f'{shown(separator.join(odd[1]))} is not one class',
      'Expected a name a line, or a number from 0 and a name; a name with a comma stands in "double quotes".',
    )  # fmt: skip
  return [(n, composed(cells[0])) for n, cells in rows]


def _is_name_heading(text: str) -> bool:
  text = text.replace('_', ' ').casefold().strip('#: ')
  return _NAME_HEADING.fullmatch(text) is not None


def check_labels(paths: Mapping[str, Path], rows: Mapping[str, list[Row]], names: Collection[str] | None) -> None:
  """Without a list of classes, labels are all numbers from 0 (-1: none) or all names.

  Args:
    paths: {split: its list}.
    rows: {split: what it says}.
    names: of the classes, if there is a list of them.
  """
  labels = [(paths[split], row.line, row.label) for split in rows for row in rows[split] if row.label is not None]
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


def read(path: Path, extensions: Collection[str]) -> list[Row]:
  """What a list says: a table in CSV's rules where it has quotes; else lines that end in a separator and a label.

  Args:
    path: of the list.
    extensions: of the files that it may name.

  Raises:
    UserError: a line is neither a path nor a path and a label.
  """
  lines = read_lines(path)
  if any('"' in text for _, text in lines):
    for separator in _SEPARATORS:
      rows = _without_heading(_table(path, separator))
      if rows and all(len(c) <= 2 and has_extension(c[0], extensions) for _, c in rows):
        return [Row(n, cells[0], composed(cells[1]) if cells[1:] else None) for n, cells in rows]
  if len(lines) > 1 and _is_heading(re.split('[\t,; ]', lines[0][1])[0]):
    del lines[0]
  if all(has_extension(unquoted(text), extensions) for _, text in lines):
    return [Row(n, unquoted(text), None) for n, text in lines]
  best: list[Row] = []
  for separator in _SEPARATORS:
    rows = []
    for n, text in lines:
      name, _, label = text.rpartition(separator)
      if not has_extension(unquoted(name), extensions):
        break
      rows.append(Row(n, unquoted(name), composed(unquoted(label))))
    if len(rows) == len(lines):
      return rows
    best = max(best, rows, key=len)
  n, text = _culprit(path, extensions) or lines[len(best)]
  ending = os.path.splitext(unquoted(re.split(r'[\t,;]', text)[0]))[1].lower()
  other = (
    f' ({ending[:20]} is no ending that is read here)' if ending[1:].isalnum() and ending not in extensions else ''
  )
  raise bad_line(
    path,
    n,
    f'{text[:80]!r} is not `path label`, with a tab, a comma, a semicolon or a space between, as the lines before'
    f'{other}',
    f'Expected one path ({some_of(extensions)}) and one label, and no third column.',
  )


class SeveralRow(NamedTuple):
  """A line of a list of several labels: its number, the path that it has, and the labels; there may be none."""

  line: int
  path: str
  labels: tuple[str, ...]


def read_several(path: Path, extensions: Collection[str]) -> list[SeveralRow]:
  """What a list of `path label label ...` lines says; a path alone has none of the classes.

  Args:
    path: of the list.
    extensions: of the files that it may name.

  Raises:
    UserError: a line does not begin with a path, or has a label twice.
  """
  for separator in _SEPARATORS:
    rows = _without_heading(_table(path, separator)) if separator != ' ' else _words_of_lines(path, extensions)
    if rows and all(has_extension(cells[0], extensions) for _, cells in rows):
      break
  else:
    lines = read_lines(path)
    n, text = next((row for row in lines[1:] if not _begins_with_path(row[1], extensions)), lines[0])
    raise bad_line(
      path,
      n,
      f'{text[:80]!r} is not `path label label ...`, with tabs, commas, semicolons or spaces between throughout',
      f'Expected one path ({some_of(extensions)}) and any number of labels.',
    )
  found = []
  for n, cells in rows:
    labels = tuple(composed(label) for label in cells[1:] if label)
    if twice := next((label for label in labels if labels.count(label) > 1), None):
      raise bad_line(path, n, f'label {twice!r} comes twice', 'Expected each label of a clip once.')
    if '-1' in labels and len(labels) > 1:
      raise bad_line(path, n, 'label -1, for an unlabelled clip, stands beside others', 'Remove it, or the others.')
    found.append(SeveralRow(n, cells[0], labels))
  return found


def _words_of_lines(path: Path, extensions: Collection[str]) -> list[tuple[int, list[str]]]:
  """(line, [path, label, ...]) of lines with spaces, which a path may have, too: it ends with the first ending."""
  rows = []
  for n, text in read_lines(path):
    words = text.split()
    end = next((i for i, word in enumerate(words, 1) if has_extension(word, extensions)), 0)
    rows.append((n, [text if not end else ' '.join(words[:end]), *words[end:]]))
  return _without_heading(rows)


def _begins_with_path(text: str, extensions: Collection[str]) -> bool:
  return any(has_extension(unquoted(text.split(s)[0]), extensions) for s in _SEPARATORS)


def _culprit(path: Path, extensions: Collection[str]) -> tuple[int, str] | None:
  """The first row, of a table whose other rows are all a path or a path and a label, that is neither."""
  for separator in _SEPARATORS[:3]:
    rows = _without_heading(_table(path, separator))
    odd = [(n, separator.join(c)) for n, c in rows if len(c) > 2 or not has_extension(c[0], extensions)]
    if len(odd) == 1 and len(rows) > 1 and any(len(c) == 2 for _, c in rows):
      return odd[0]
  return None


def _table(path: Path, separator: str) -> list[tuple[int, list[str]]]:
  """(line, cells) of a file by CSV's rules; empty if it breaks them."""
  try:
    return list(read_rows(path, separator))
  except UserError:
    return []


def _without_heading(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
  return rows[1:] if len(rows) > 1 and _is_heading(rows[0][1][0]) else rows


def _is_heading(cell: str) -> bool:
  return _PATH_HEADING.fullmatch(unquoted(cell).replace('_', ' ').casefold()) is not None


def has_extension(name: str, extensions: Collection[str]) -> bool:
  """Whether a file name has one of some endings, which are in lower case."""
  return os.path.splitext(name)[1].lower() in extensions


def some_of(extensions: Collection[str], most: int = 8) -> str:
  """Some endings, for a message."""
  usual = [e for e in ('.mp4', '.webm', '.mkv', '.avi', '.mov', '.jpg', '.png', '.webp', '.tif') if e in extensions]
  rest = sorted(set(extensions) - set(usual))
  shown_ones = (usual + rest)[:most]
  return ', '.join(shown_ones) + ', ...' * (len(extensions) > len(shown_ones))


def unquoted(text: str) -> str:
  """A cell without the quotes around it."""
  text = text.strip()
  return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text
