"""No training on what is tested: original videos are matched by name across datasets.

Kinetics-700 holds 13.9k of the 19.9k validation videos of Kinetics-400 in its training split (MAE-ST, table 3), so a
model co-trained on the one and tested on the other has seen the answers. Videos are matched by the name that the
dataset gives to the original video: the YouTube id in Kinetics, the group in UCF101.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from data_pipelines.contract import UserError
from data_pipelines.sources import Source, select

# What a YouTube id looks like. Other names (a number, a file name) mean something within their own dataset only.
_YOUTUBE_ID = re.compile(rb'[\w-]{11}')


class Overlap(NamedTuple):
  """Original videos that a training source and a test split share.

  Attributes:
    train, test: names of the sources.
    run: '' for this run's training; else what `init_from` names of the run before it, whose source `train` is.
    videos: how many original videos they share.
    train_examples, test_examples: how many examples were cut from these.
    some: up to three of their names.
  """

  train: str
  test: str
  run: str
  videos: int
  train_examples: int
  test_examples: int
  some: tuple[str, ...]


def leave_out(source: Source, excluded: Iterable[str], open_split: Callable[[str, str], Source]) -> Source:
  """The source without the examples of certain original videos.

  Args:
    source: of training.
    excluded: 'dataset:split' as TFDS names them ('kinetics/400:validation'), or the path of a file: a CSV with a
      column `youtube_id`, as Kinetics' annotations are, or one video name a line.
    open_split: (dataset, split) -> the source whose videos are left out.

  Returns:
    What is left; a log line says how many examples each entry took away.

  Raises:
    UserError: the source or the excluded one does not name original videos, the file cannot be read, or nothing is
      left.
  """
  for entry in excluded:
    if source.video_names is None:
      raise UserError(
        f'config.sources.{source.name}.exclude is set, but its dataset does not name original videos (feature '
        f'video_id): build it with a builder of data_pipelines, or remove exclude.'
      )
    names = _names_of(source.name, entry, open_split)
    drop = np.isin(source.video_names, names)
    logging.info(
      'Source %s: left out %d of %d training examples, whose original videos are in %s (%d videos)',
      source.name, drop.sum(), len(drop), entry, len(names),
    )  # fmt: skip
    if drop.all():
      raise UserError(
        f'config.sources.{source.name}.exclude leaves no training example: {entry} has all its videos. Exclude '
        f'another split.'
      )
    source = select(source, np.flatnonzero(~drop))
  return source


def _names_of(where: str, entry: str, open_split: Callable[[str, str], Source]) -> np.ndarray:
  if os.path.isfile(entry):
    return _read_names(entry)
  dataset, colon, split = entry.rpartition(':')
  if not colon or not dataset or not split:
    raise UserError(
      f'config.sources.{where}.exclude has {entry!r}; expected an existing file or dataset:split, such as '
      f'kinetics/400:validation.'
    )
  other = open_split(dataset, split)
  if other.video_names is None:
    raise UserError(
      f'config.sources.{where}.exclude names {entry!r}, whose dataset does not name original videos (feature '
      f'video_id): give a file of video names instead.'
    )
  return np.unique(other.video_names)


def _read_names(path: str) -> np.ndarray:
  try:
    with open(path, encoding='utf-8', newline='') as f:
      lines = f.read().splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f'{path} (an exclude list) cannot be read ({e}); expected UTF-8 text.') from None
  header = next(csv.reader(lines[:1]), [])
  if 'youtube_id' in header:
    column = header.index('youtube_id')
    names = [row[column] for row in csv.reader(lines[1:]) if len(row) > column]
  else:
    names = [line.strip() for line in lines]
  names = sorted({n.encode() for n in names if n})
  if not names:
    raise UserError(f'{path} (an exclude list) names no video; expected a column youtube_id or one name a line.')
  return np.array(names, np.bytes_)


def overlaps(train: Sequence[Source], tests: Sequence[Source], run: str = '') -> list[Overlap]:
  """Original videos that are both trained on and tested.

  Names are compared within a dataset, and between datasets where they look like YouTube ids; test splits of sources
  that do not name their videos cannot be compared.

  Args:
    train: the training sources.
    tests: the test splits, named as their sources.
    run: for `Overlap.run`.
  """
  family = lambda source: re.split('[/:]', source.dataset)[0]
  found = []
  for a in train:
    for b in tests:
      if a.video_names is None or b.video_names is None:
        logging.info('Leak check: %s and the test split of %s do not both name original videos', a.name, b.name)
        continue
      shared = np.intersect1d(a.video_names, b.video_names)
      if family(a) != family(b):
        shared = np.array([n for n in shared if _YOUTUBE_ID.fullmatch(n)], np.bytes_)
      if len(shared):
        counts = (int(np.isin(s.video_names, shared).sum()) for s in (a, b))
        found.append(Overlap(a.name, b.name, run, len(shared), *counts, tuple(n.decode() for n in shared[:3])))
  return found


def check(found: Sequence[Overlap], allowed: bool) -> None:
  """Reports overlaps; refuses them unless they are allowed.

  Raises:
    UserError: there is one and it is not allowed.
  """
  for o in found:
    logging.warning(
      'Leak: %d examples that %s%s trains on and %d that %s tests on come from the same %d original videos (%s ...)',
      o.train_examples, o.train, o.run and f' of {o.run}', o.test_examples, o.test, o.videos, ', '.join(o.some),
    )  # fmt: skip
  if found and not allowed:
    o = found[0]
    whose = (
      f'The run {o.run}, whose weights this one starts from (config.init_from.path), has a source {o.train!r} that'
    )
    raise UserError(
      f'{whose if o.run else f"Source {o.train!r}"} trains on {o.train_examples} examples from {o.videos} original '
      f'videos that the test split of {o.test!r} has too ({", ".join(o.some)}'
      f'{", ..." if o.videos > len(o.some) else ""}): name that split in config.sources.{o.train}.exclude'
      f"{' of that run and train it again' if o.run else ''} (['dataset:split']), or set config.allow_overlap=True and "
      f'say so with the results.'
    )
