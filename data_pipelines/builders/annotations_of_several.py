"""The official annotation files of datasets whose clips have several labels, read as they are. No TensorFlow.

As in `annotations.py`; a clip's labels are those of the whole clip, each once. What comes twice is counted in
`Listing.notes`.
"""

import os
import re
from pathlib import Path

from data_pipelines.builders.annotations import categories, moments_video
from data_pipelines.builders.listing import (
  Clip,
  Folder,
  Listing,
  bad_line,
  check_clips,
  official_names,
  read_lines,
  read_rows,
  scan,
  shown,
  some,
)
from data_pipelines.contract import UserError

_CHARADES_CLASSES = 157
_MULTI_MOMENTS_CLASSES = {'v1': 313, 'v2': 292}


def charades(manual_dir: str | os.PathLike) -> Listing:
  """Charades: Charades_v1_classes.txt, Charades_v1_train.csv, Charades_v1_test.csv, videos `<id>.mp4`.

  A table's column `actions` has intervals, `c092 11.90 21.20;c147 0.00 12.60`: of the whole clip their classes are the
  labels. It may be empty: the clip has none of the classes. (The official evaluation leaves such clips out; here they
  are clips like others.)
  """
  folder = scan(manual_dir, lambda _, stem: stem)
  path = folder.text('Charades_v1_classes[.]txt')
  if path is None:
    raise UserError(
      f'{folder.root} has no Charades_v1_classes.txt; expected it beside the tables, whose classes it names: unpack '
      'Charades.zip there.'
    )
  names = _charades_classes(path)
  splits, notes = {}, []
  for split in ('train', 'test'):
    if path := folder.text(f'Charades_v1_{split}[.]csv'):
      splits[split], twice = _charades_split(path, folder)
      empty = sum(clip.label == () for clip in splits[split])
      notes.append(
        f'{path.name}: {empty:,} clips have none of the classes; {twice:,} actions are of a class that their clip has '
        'already'
      )
  return Listing(names, some(splits, folder, 'Charades_v1_train.csv or Charades_v1_test.csv'), notes=tuple(notes))


def _charades_classes(path: Path) -> tuple[str, ...]:
  names = []
  for line, text in read_lines(path):
    code, _, name = text.partition(' ')
    if code != f'c{len(names):03d}' or not name.strip().isprintable() or not name.strip():
      raise bad_line(path, line, f'{shown(text)} is not class {len(names)}; expected c{len(names):03d} and a name')
    names.append(name.strip())
  if len(names) != _CHARADES_CLASSES or len(set(names)) != _CHARADES_CLASSES:
    raise UserError(
      f'{path} names {len(set(names))} classes; expected {_CHARADES_CLASSES}, c000 to c156, as Charades v1 has: fetch '
      'the official file.'
    )
  return tuple(names)


def _charades_split(path: Path, folder: Folder) -> tuple[list[Clip], int]:
  """(its clips, how many actions are of a class that their clip has already)."""
  rows = read_rows(path)
  first, header = next(rows, (1, []))
  if missing := [c for c in ('id', 'actions') if header.count(c) != 1]:
    raise bad_line(path, first, f'the columns are {shown(",".join(header))}; expected {missing[0]} among them, once')
  clips, twice = [], 0
  for line, cells in rows:
    if len(cells) != len(header):
      raise bad_line(path, line, f'{len(cells)} columns; expected the {len(header)} of line {first}')
    row = dict(zip(header, cells, strict=True))
    if not re.fullmatch(r'\w{1,64}', row['id'], re.ASCII):
      raise bad_line(path, line, f'id is {shown(row["id"])}; expected the name of a video')
    actions = [action for action in row['actions'].split(';') if action.strip()]
    found = [_charades_action(action, path, line) for action in actions]
    labels = tuple(sorted(set(found)))
    twice += len(found) - len(labels)
    clips.append(Clip(row['id'], row['id'], folder.video(row['id']), labels, f'{path.name}:{line}'))
  check_clips(clips, path)
  return clips, twice


def _charades_action(text: str, path: Path, line: int) -> int:
  match = re.fullmatch(r'\s*c([0-9]{3})((?:\s+[0-9]{1,6}(?:[.][0-9]*)?){2})\s*', text)
  if not match or int(match[1]) >= _CHARADES_CLASSES:
    raise bad_line(path, line, f'{shown(text)} is not an action; expected c000 to c156, its start and end in seconds')
  start, end = map(float, match[2].split())
  if end < start:
    raise bad_line(path, line, f'{shown(text)} ends before it starts')
  return int(match[1])


def multi_moments_in_time(manual_dir: str | os.PathLike, version: str) -> Listing:
  """Multi-Moments in Time: moments_categories.txt, trainingSet.csv, validationSet.csv; rows `file.mp4,12,250,...`.

  Labels are numbers of classes, as the category file (`name,index`) has them. Version 1 is read without that file, by
  the names of this package. Videos may lie anywhere; of two of one name that in the row's own folder is taken.

  Args:
    manual_dir: the directory.
    version: 'v1' (313 classes) or 'v2' (292).
  """
  folder, expected = scan(manual_dir, lambda _, stem: stem), _MULTI_MOMENTS_CLASSES[version]
  if path := folder.text('moments_categories[.]txt'):
    names = categories(path, expected, f'{version} of several labels').names
  elif version == 'v1':
    names = official_names('multi_moments_in_time_v1')
  else:
    raise UserError(
      f'{folder.root} has no moments_categories.txt; expected it beside the tables, whose numbers it names: unpack the '
      'official download there.'
    )
  splits, notes = {}, []
  for split, file in (('train', 'trainingSet[.]csv'), ('validation', 'validationSet[.]csv')):
    if path := folder.text(file):
      clips, twice = [], 0
      for line, cells in read_rows(path):
        clip, repeated = _multi_moments_clip(path, line, cells, folder, len(names))
        clips.append(clip)
        twice += repeated
      check_clips(clips, path)
      splits[split] = clips
      notes += [f'{path.name}: {twice:,} labels come twice in a row, and count once'] * (twice > 0)
  return Listing(names, some(splits, folder, 'trainingSet.csv or validationSet.csv'), notes=tuple(notes))


def _multi_moments_clip(path: Path, line: int, cells: list[str], folder: Folder, classes: int) -> tuple[Clip, int]:
  """(the clip, how many of its labels come twice)."""
  match = re.fullmatch(r'((?:[^/]{1,250}/)*([^/]{1,250}))[.]\w+', cells[0])
  if not match or not cells[0].isprintable() or len(cells) < 2:
    raise bad_line(path, line, f'{shown(",".join(cells))} is not a clip; expected file.mp4 and the numbers of classes')
  for cell in cells[1:]:
    if not re.fullmatch(r'[0-9]{1,6}', cell) or int(cell) >= classes:
      raise bad_line(path, line, f'label {shown(cell)} is no class; expected 0 to {classes - 1}, as this version has')
  labels = tuple(sorted({int(cell) for cell in cells[1:]}))
  stem = match[2]
  video = folder.video(stem, *reversed(match[1].split('/')[:-1]))
  return Clip(match[1], moments_video(stem), video, labels, f'{path.name}:{line}'), len(cells) - 1 - len(labels)
