"""The official annotation files of the usual action datasets, read as they are. No TensorFlow.

Each reader takes the directory where a user put annotations and videos, and gives all that is listed: a clip whose
file is absent has no path, and the builder reports it. A split whose annotation file is absent is not in the listing.
All raise `UserError` with file and line for what they cannot make sense of: wrong columns, unknown classes, a clip
listed twice, text that is not UTF-8. None of them guesses.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_pipelines.builders.listing import (
  Clip,
  Folder,
  Listing,
  bad_line,
  check_clips,
  official_names,
  plain,
  read_json,
  read_lines,
  read_rows,
  scan,
  shown,
  some,
)
from data_pipelines.contract import UserError

# How splits are called in the names of files and folders.
_TRAIN = ('train', 'training')
_VALIDATION = ('val', 'validation', 'validate')
_SPLITS = {'train': _TRAIN, 'validation': _VALIDATION, 'test': ('test', 'testing')}

_YOUTUBE_ID = re.compile(r'[A-Za-z0-9_-]{11}')


class _Classes:
  """Class names by what annotations call them: exactly, or else but for case and underscores."""

  def __init__(self, names: Iterable[str]):
    self.names = tuple(names)
    self._exact = {name: i for i, name in enumerate(self.names)}
    self._plain = {plain(name): i for i, name in enumerate(self.names)}

  def find(self, name: str) -> int | None:
    label = self._exact.get(name)
    return self._plain.get(plain(name)) if label is None else label

  def label(self, name: str, path: Path, line: int | str) -> int:
    label = self.find(name)
    if label is None:
      raise bad_line(
        path, line, f'{shown(name)} is none of the {len(self.names)} classes ({self.names[0]}, {self.names[1]}, ...)',
        'Check that the file belongs to this dataset and variant, or correct the line.',
      )  # fmt: skip
    return label


def kinetics(manual_dir: str | os.PathLike, variant: str) -> Listing:
  """Kinetics: CSV tables `label,youtube_id,time_start,time_end,split[,is_cc]`, files `<id>_%06d_%06d.<any>`.

  The tables are called train, val (validate, validation) and test, with or without 'kinetics-400_' or the like in
  front. A test table may lack the column `label`; its clips are unlabelled. Videos may lie anywhere below the
  directory: in class folders, in split folders or flat. One video may be cut twice and a clip may have two labels
  (Kinetics-600 and 700); the second example of the same clip then has the class in its id.

  Args:
    manual_dir: the directory.
    variant: '400', '600', '700' or '700_2020'.
  """

  def key(_: str, stem: str) -> str:
    match = re.fullmatch(r'(.{11})_([0-9]{1,9})_([0-9]{1,9})', stem)
    return _clip_name(match[1], int(match[2]), int(match[3])) if match else stem

  folder = scan(manual_dir, key)
  classes = _Classes(official_names(f'kinetics_{variant[:3]}'))
  own = '(?:kinetics|k)[-_]?' + variant.replace('_', '[-_]?') + '[-_]'
  splits = {}
  for split, spellings in _SPLITS.items():
    patterns = [f'{o}({"|".join(spellings)})[.]{e}' for o in (own, '(?:kinetics[-_])?') for e in ('csv', 'txt')]
    path = folder.text(*patterns)
    if path is not None:
      splits[split] = _kinetics_split(path, split, folder, classes)
  names = f'train.csv, val.csv or test.csv (also with kinetics-{variant}_ in front)'
  return Listing(classes.names, some(splits, folder, names))


def _clip_name(youtube_id: str, start: int, end: int) -> str:
  return f'{youtube_id}_{start:06d}_{end:06d}'


def _kinetics_split(path: Path, split: str, folder: Folder, classes: _Classes) -> list[Clip]:
  rows = read_rows(path)
  first, header = next(rows, (1, []))
  labelled = 'label' in header
  needed = ['youtube_id', 'time_start', 'time_end'] + ['label'] * (split != 'test')
  if missing := [c for c in needed if header.count(c) != 1]:
    raise bad_line(path, first, f'the columns are {shown(",".join(header))}; expected {missing[0]} among them, once')
  clips: list[Clip] = []
  label_of: dict[str, int] = {}
  for line, cells in rows:
    if len(cells) != len(header):
      raise bad_line(path, line, f'{len(cells)} columns; expected the {len(header)} of line {first}')
    row = dict(zip(header, cells, strict=True))
    if row.get('split') not in (None, *_SPLITS[split]) and any(row['split'] in s for s in _SPLITS.values()):
      raise bad_line(path, line, f'a clip of split {shown(row["split"])}; expected {split}', 'Rename the file.')
    if not _YOUTUBE_ID.fullmatch(row['youtube_id']):
      raise bad_line(path, line, f'youtube_id is {shown(row["youtube_id"])}; expected 11 letters, digits, - or _')
    start, end = (_seconds(row[c], path, line, c) for c in ('time_start', 'time_end'))
    label = classes.label(row['label'], path, line) if labelled and (row['label'] or split != 'test') else -1
    name = _clip_name(row['youtube_id'], start, end)
    where = (*_SPLITS[split], row['label']) if labelled else _SPLITS[split]
    unique = name if label_of.setdefault(name, label) == label else f'{name}:{classes.names[label]}'
    clips.append(Clip(unique, row['youtube_id'], folder.video(name, *where), label, f'{path.name}:{line}'))
  check_clips(clips, path)
  return clips


def _seconds(text: str, path: Path, line: int, column: str) -> int:
  if not re.fullmatch(r'[0-9]{1,6}([.][0-9]*)?', text):
    raise bad_line(path, line, f'{column} is {shown(text)}; expected seconds')
  return int(float(text))


def something_something_v2(manual_dir: str | os.PathLike) -> Listing:
  """Something-Something v2: labels.json, train.json, validation.json, test.json, videos `<id>.webm`.

  Also under the names of the first release (something-something-v2-train.json). A clip's class is its template
  without the brackets. The test split is labelled if test-answers.csv (`id;class`) is there, unlabelled otherwise.
  labels.json must be the official one where it is there: files with the same names in another order exist, and
  classes would not be those of published weights.
  """
  folder = scan(manual_dir, lambda _, stem: stem)
  prefix = '(?:something-something-v2-)?'
  classes = _Classes(official_names('something_something_v2'))
  if path := folder.text(f'{prefix}labels[.]json'):
    _check_labels(path, classes.names)
  splits = {}
  for split, spellings in _SPLITS.items():
    if path := folder.text(f'{prefix}(?:{"|".join(spellings)})[.]json'):
      answers = folder.text(f'{prefix}test-answers[.]csv') if split == 'test' else None
      splits[split] = _something_split(path, split, folder, classes, answers and _answers(answers, classes))
  return Listing(classes.names, some(splits, folder, 'train.json, validation.json or test.json'))


def _check_labels(path: Path, names: tuple[str, ...]) -> None:
  value = read_json(path)
  found = {n: str(i) for n, i in value.items()} if isinstance(value, dict) else {}
  if found != {n: str(i) for i, n in enumerate(names)}:
    differs = next((n for i, n in enumerate(names) if found.get(n) != str(i)), 'one that is not official')
    raise UserError(
      f'{path} is not the official labels file (class {shown(differs)} differs; {len(found)} classes, expected '
      f'{len(names)}): fetch the official one, or use the builder video_folder for classes of your own.'
    )


def _answers(path: Path, classes: _Classes) -> dict[str, int]:
  found = {}
  for line, text in read_lines(path):
    name, separator, answer = text.partition(';')
    if not separator or name.strip() in found:
      what = 'answered twice' if separator else 'no semicolon'
      raise bad_line(path, line, f'{what} in {shown(text)}; expected id;class, each id once')
    found[name.strip()] = classes.label(answer.strip(), path, line)
  return found


def _something_split(
  path: Path, split: str, folder: Folder, classes: _Classes, answers: Mapping[str, int] | None
) -> list[Clip]:
  entries = read_json(path)
  if not isinstance(entries, list) or not entries:
    raise UserError(f'{path} holds no list of clips; expected [{{"id": ...}}, ...]. Correct it, or fetch it again.')
  clips = []
  for number, entry in enumerate(entries):
    line = f'entry {number}'
    name = entry.get('id') if isinstance(entry, dict) else None
    if not re.fullmatch(
      r'[A-Za-z0-9_-]{1,64}', name if isinstance(name, str) else str(name) if type(name) is int else ''
    ):
      raise bad_line(path, line, f'id is {shown(name)}; expected the name of a video')
    template = entry.get('template')
    label = -1
    if isinstance(template, str):
      label = classes.label(template.replace('[', '').replace(']', ''), path, line)
    elif split != 'test' or template is not None:
      raise bad_line(path, line, f'template is {shown(template)}; expected text')
    elif answers is not None:
      if str(name) not in answers:
        raise bad_line(path, line, f'test-answers.csv has no answer for {name}')
      label = answers[str(name)]
    clips.append(Clip(str(name), str(name), folder.video(str(name), *_SPLITS[split]), label, f'{path.name}:{line}'))
  check_clips(clips, path)
  return clips


def moments_in_time(manual_dir: str | os.PathLike, version: str) -> Listing:
  """Moments in Time: moments_categories.txt, trainingSet.csv, validationSet.csv, videos training/<class>/<file>.

  The category file has `name,index` or one name a line; without it the names are those of this package. A row of a
  table is `class/file.mp4,class` and anything after. Several clips may come from one video: a trailing clip number
  and the 'yt-' before a YouTube id are not part of the video's name.

  Args:
    manual_dir: the directory.
    version: 'v1' (339 classes) or 'v2' (305).
  """
  folder = scan(manual_dir, lambda parent, stem: f'{parent}/{stem}')
  classes = _Classes(official_names(f'moments_in_time_{version}'))
  if path := folder.text('moments_categories[.]txt', 'category_momentsv[12][.]txt'):
    classes = categories(path, len(classes.names), version)
  splits = {}
  for split, file in (('train', 'trainingSet[.]csv'), ('validation', 'validationSet[.]csv')):
    if path := folder.text(file):
      clips = []
      for line, cells in read_rows(path):
        match = re.fullmatch(r'(?:(?:training|validation)/)?([^/]{1,64})/([^/]{1,250})[.]\w+', cells[0])
        if not match or len(cells) < 2 or not cells[0].isprintable():
          raise bad_line(path, line, f'{shown(",".join(cells))} is not a clip; expected class/file.mp4,class')
        label = classes.label(cells[1], path, line)
        if classes.find(match[1]) not in (label, None):
          raise bad_line(path, line, f'the folder {shown(match[1])} is one class and {shown(cells[1])} another')
        name = f'{match[1]}/{match[2]}'
        video = folder.video(name, *_SPLITS[split])
        clips.append(Clip(name, moments_video(match[2]), video, label, f'{path.name}:{line}'))
      check_clips(clips, path)
      splits[split] = clips
  return Listing(classes.names, some(splits, folder, 'trainingSet.csv or validationSet.csv'))


def categories(path: Path, expected: int, version: str) -> _Classes:
  names: dict[int, str] = {}
  for line, text in read_lines(path):
    name, comma, index = text.rpartition(',')
    if not comma:
      name, index = text, str(len(names))
    if not name.strip().isprintable() or not re.fullmatch(r'\s*[0-9]{1,6}', index) or int(index) in names:
      raise bad_line(path, line, f'{shown(text)} is not a class; expected name,index, each index once')
    names[int(index)] = name.strip()
  if sorted(names) != list(range(expected)) or len({plain(n) for n in names.values()}) != expected:
    raise UserError(
      f'{path} names {len({plain(n) for n in names.values()})} classes; expected {expected} for Moments in Time '
      f'{version}, numbered from 0: choose the version that your copy has.'
    )
  return _Classes(names[i] for i in range(expected))


def moments_video(stem: str) -> str:
  video = re.sub(r'_[0-9]+$', '', stem)
  return video[3:] if video.startswith('yt-') and _YOUTUBE_ID.fullmatch(video[3:]) else video


def ucf101(manual_dir: str | os.PathLike, split: int) -> Listing:
  """UCF101: classInd.txt, trainlist0N.txt (`Class/v_Class_g01_c01.avi 1`), testlist0N.txt, videos anywhere below.

  Clips of one group were cut from the same video: v_ApplyEyeMakeup_g08. Split N never has one in both its parts.

  Args:
    manual_dir: the directory.
    split: 1, 2 or 3, the official split.
  """
  folder = scan(manual_dir, lambda _, stem: stem.casefold())
  classes = _Classes(official_names('ucf101'))
  if path := folder.text('classInd[.]txt'):
    for line, text in read_lines(path):
      index, _, name = text.partition(' ')
      known = re.fullmatch('[0-9]{1,3}', index) and 1 <= int(index) <= len(classes.names)
      if not known or classes.names[int(index) - 1] != name.strip():
        raise bad_line(path, line, f'{shown(text)} is not the official number and name of a class')
  splits = {}
  for part, file in (('train', f'trainlist0{split}'), ('test', f'testlist0{split}')):
    if path := folder.text(f'{file}[.]txt'):
      splits[part] = [_ucf_clip(path, line, text, folder, classes) for line, text in read_lines(path)]
      check_clips(splits[part], path)
  return Listing(classes.names, some(splits, folder, f'trainlist0{split}.txt or testlist0{split}.txt'))


def _ucf_clip(path: Path, line: int, text: str, folder: Folder, classes: _Classes) -> Clip:
  match = re.fullmatch(
    r'([A-Za-z]{1,32})/((v_[A-Za-z]{1,32}_g[0-9]{1,4})_c[0-9]{1,4})[.]\w{1,5}(?:\s+([0-9]{1,3}))?', text
  )
  if not match:
    raise bad_line(path, line, f'{shown(text)} is not a clip; expected Class/v_Class_g01_c01.avi and a label')
  label = classes.label(match[1], path, line)
  if match[4] and int(match[4]) != label + 1:
    raise bad_line(path, line, f'label {match[4]} for class {match[1]}; expected {label + 1}, as in classInd.txt')
  return Clip(match[2], match[3], folder.video(match[2].casefold(), match[1]), label, f'{path.name}:{line}')


def hmdb51(manual_dir: str | os.PathLike, split: int) -> Listing:
  """HMDB51: 51 files `<class>_test_split<n>.txt` of lines `file.avi 1`, videos in class folders.

  1 is training, 2 is test; a clip marked 0 is in neither part of this split, and is not listed. Clips that differ
  in their trailing number alone are taken to be of one video.

  Args:
    manual_dir: the directory.
    split: 1, 2 or 3, the official split.
  """
  folder = scan(manual_dir, lambda _, stem: stem)
  classes = _Classes(official_names('hmdb51'))
  paths = {c: folder.text(f'{c}_test_split{split}[.]txt') for c in classes.names}
  missing = [c for c, path in paths.items() if path is None]
  if missing:
    raise UserError(
      f'{folder.root} has {len(paths) - len(missing)} of the 51 files of split {split}; expected one for each class, '
      f'and {missing[0]}_test_split{split}.txt is not there: unpack test_train_splits.rar into it.'
    )
  parts = {'1': [], '2': [], '0': []}
  for label, (action, path) in enumerate(paths.items()):
    listed = [_hmdb_clip(path, line, text, folder, action, label) for line, text in read_lines(path)]
    check_clips([clip for _, clip in listed], path)
    for part, clip in listed:
      parts[part].append(clip)
  for part in '12':
    check_clips(parts[part], folder.root)  # a name that comes in two classes
  return Listing(classes.names, {'train': parts['1'], 'test': parts['2']})


def _hmdb_clip(path: Path, line: int, text: str, folder: Folder, action: str, label: int) -> tuple[str, Clip]:
  match = re.fullmatch(r'([^/]{1,250})[.]\w{1,5}\s+([012])', text)
  if not match or not text.isprintable():
    raise bad_line(path, line, f'{shown(text)} is not a clip; expected file.avi and 0, 1 or 2')
  stem = match[1]
  clip = Clip(stem, re.sub(r'_[0-9]+$', '', stem), folder.video(stem, action), label, f'{path.name}:{line}')
  return match[2], clip
