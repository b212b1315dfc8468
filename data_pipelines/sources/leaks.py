"""No training on what is tested: what is trained on and what is tested is compared, example by example.

Kinetics-700 holds 13.9k of the 19.9k validation videos of Kinetics-400 in its training split (MAE-ST, table 3), so a
model co-trained on the one and tested on the other has seen the answers. Two examples are of one original video if

  they are one record: the same place in the same file of a dataset, or of a copy of it. So are two splits of one
    dataset compared, and two names of it, whatever the dataset says of its examples;
  they were made of files with the same bytes (`Source.file_sha256`), wherever these lie and whatever they are called;
  the dataset gives the original video the same name: the YouTube id in Kinetics, the group in UCF101. Names count
    within a family of data sets (kinetics/400, kinetics/700), and YouTube ids between any two. The names of one's own
    folders are paths, which mean something within one dataset only.

A video that was encoded anew or cut differently, and has no such name, is not noticed.
"""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_pipelines import paths
from data_pipelines.contract import UserError
from data_pipelines.sources import Source, select
from data_pipelines.storage.layout import FrameIndex

# What a YouTube id looks like. Other names (a number, a file name) mean something within their own dataset only.
_YOUTUBE_ID = re.compile(rb'[\w-]{11}')
_FOLDERS = ('video_folder', 'image_folder')  # the builders whose names of videos are paths
# A split as TFDS writes it, behind a dataset: the colons of a slice are no end of the dataset's name.
_DATASET_SPLIT = re.compile(r'(?P<dataset>.+):(?P<split>(?:[\w+ ]|\[[^\]]*\])+)')


class Overlap(NamedTuple):
  """Original videos that a training source and a test split share.

  Attributes:
    train, test: names of the sources.
    run: '' for this run's training; else the path of the run before it, whose source `train` is.
    videos: how many original videos of the test split they share.
    train_examples: how many examples of `train` were cut from these.
    tested_M: int64, the numbers of the examples of `test` that were.
    some: up to three names of the videos.
  """

  train: str
  test: str
  run: str
  videos: int
  train_examples: int
  tested_M: np.ndarray
  some: tuple[str, ...]


class Findings(NamedTuple):
  """What a comparison found.

  Attributes:
    overlaps: of all pairs that share something.
    not_compared: sources that say too little of their examples to be compared with some of the others, by name;
      'k700 of before' for one of a run before.
  """

  overlaps: list[Overlap]
  not_compared: list[str]


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
    UserError: the source and the excluded one cannot be compared, the file cannot be read, or nothing is left.
  """
  for entry in excluded:
    drop = _listed(source, entry) if paths.is_file(entry) else _shared_with(source, entry, open_split)
    logging.info(
      'Source %s: left out %d of %d training examples, whose original videos are in %s',
      source.name, drop.sum(), len(drop), entry,
    )  # fmt: skip
    if drop.all():
      raise UserError(
        f'config.sources.{source.name}.exclude leaves no training example: {entry} has all its videos. Exclude '
        f'another split.'
      )
    source = select(source, np.flatnonzero(~drop))
  return source


def _listed(source: Source, path: str) -> np.ndarray:
  """Which examples, bool [N], a file of video names lists."""
  if source.video_names is None:
    raise UserError(
      f'config.sources.{source.name}.exclude names the file {path}, but the dataset of the source does not name '
      f'original videos (feature video_id): build it with a builder of data_pipelines, or remove exclude.'
    )
  return np.isin(source.video_names, _read_names(path))


def _shared_with(source: Source, entry: str, open_split: Callable[[str, str], Source]) -> np.ndarray:
  """Which examples, bool [N], are of original videos that 'dataset:split' has."""
  parts = _DATASET_SPLIT.fullmatch(entry)
  if not parts:
    raise UserError(
      f'config.sources.{source.name}.exclude has {entry!r}; expected an existing file or dataset:split, such as '
      f'kinetics/400:validation.'
    )
  other = open_split(parts['dataset'], parts['split'])
  common = _common_keys(source, other)
  if not common:
    raise UserError(
      f'config.sources.{source.name}.exclude names {entry!r}, which cannot be compared with {source.dataset!r}: one of '
      f'them names neither original videos nor files. Build both with a builder of data_pipelines, or give a file of '
      f'video names instead.'
    )
  return _shared(source, other, common)[0]


def _read_names(path: str) -> np.ndarray:
  try:
    lines = paths.read(path).decode().splitlines()
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


def compare(trained: Mapping[str, Sequence[Source]], tests: Sequence[Source]) -> Findings:
  """Compares all that is trained on with all that is tested.

  Args:
    trained: {'': the sources of this run, path of a run before it: the sources of that one}.
    tests: the test splits, named as their sources.
  """
  overlaps, not_compared = [], set()
  for run, sources in trained.items():
    for train in sources:
      for test in tests:
        common = _common_keys(train, test)
        of_train, of_test = _shared(train, test, common)
        if of_test.any():
          overlaps.append(_overlap(train, test, run, of_train, of_test))
        if not common or _names_are_all(train) or _names_are_all(test):
          not_compared |= {_of(train.name, run)} if train.file_sha256 is None else set()
          not_compared |= {test.name} if test.file_sha256 is None else set()
  return Findings(overlaps, sorted(not_compared))


def check(found: Findings, allowed: bool) -> None:
  """Reports what was found; refuses overlaps unless they are allowed.

  Raises:
    UserError: there is one and it is not allowed.
  """
  if found.not_compared:
    logging.info(
      'Leak check: not compared with all others, since they name neither the files that they were made of nor original '
      'videos that others know (data sets of TFDS, and those of builders before they kept file_sha256): %s',
      ', '.join(found.not_compared),
    )
  for o in found.overlaps:
    logging.warning(
      'Leak: %d examples that %s%s trains on and %d that %s tests on come from the same %d original videos (%s ...)',
      o.train_examples, o.train, o.run and f' of {o.run}', len(o.tested_M), o.test, o.videos, ', '.join(o.some),
    )  # fmt: skip
  if found.overlaps and not allowed:
    o = found.overlaps[0]
    whose = f'The run {o.run}, whose weights are used here, has a source {o.train!r} that'
    raise UserError(
      f'{whose if o.run else f"Source {o.train!r}"} trains on {o.train_examples} examples from {o.videos} original '
      f'videos that the test split of {o.test!r} has too ({", ".join(o.some)}'
      f'{", ..." if o.videos > len(o.some) else ""}): name that split in config.sources.{o.train}.exclude'
      f"{' of that run and train it again' if o.run else ''} (['dataset:split']), or set config.allow_overlap=True and "
      f'say so with the results.'
    )


def report(found: Findings, weights: str) -> dict[str, Any]:
  """What a report of results says about leaks, as JSON without paths.

  Args:
    found: of `compare`.
    weights: whether what the weights were trained on before this run was compared: 'none' (there was nothing),
      'compared' or 'unknown'.

  Returns:
    {'trained_on': {test: {'examples': tested ones that were trained on, too, 'by': the sources that did}},
    'not_compared': sources, 'weights': as given}.
  """
  trained_on = {}
  for test in sorted({o.test for o in found.overlaps}):
    of_test = [o for o in found.overlaps if o.test == test]
    examples = len(np.unique(np.concatenate([o.tested_M for o in of_test])))
    trained_on[test] = {'examples': examples, 'by': sorted(_of(o.train, o.run) for o in of_test)}
  return {'trained_on': trained_on, 'not_compared': found.not_compared, 'weights': weights}


def sentence(leaks: Mapping[str, Any]) -> str:
  """A report of `report` in words, for the end of a table."""
  parts = [
    f'trained on {of["examples"]:,} of the tested examples of {test} (by {", ".join(of["by"])})'
    for test, of in leaks['trained_on'].items()
  ]
  words = f'Leaks: {"; ".join(parts) or "no tested example was found in training"}.'
  if leaks['not_compared']:
    words += f' Not compared with all others: {", ".join(leaks["not_compared"])}.'
  return words + (' Not all that the weights were trained on before is known.' if leaks['weights'] == 'unknown' else '')


def _of(name: str, run: str) -> str:
  return f'{name} of {os.path.basename(os.path.normpath(run))}' if run else name


def _overlap(train: Source, test: Source, run: str, of_train: np.ndarray, of_test: np.ndarray) -> Overlap:
  tested_M = np.flatnonzero(of_test)
  first_of_video = tested_M[np.unique(test.video_id[tested_M], return_index=True)[1]]
  names = test.ids if test.video_names is None else test.video_names
  some = (f'example {i}' if names is None else names[i].decode('utf-8', 'replace') for i in first_of_video[:3])
  return Overlap(train.name, test.name, run, len(first_of_video), int(of_train.sum()), tested_M, tuple(some))


class _Keys(NamedTuple):
  """One way of telling the original videos of two sources: equal keys, of those in `shared`, are of the same."""

  of_a: np.ndarray  # [N_a]
  of_b: np.ndarray  # [N_b]
  shared: np.ndarray


def _shared(a: Source, b: Source, common: Sequence[_Keys]) -> tuple[np.ndarray, np.ndarray]:
  """Which examples of two sources are of the same original videos: bool [N_a], bool [N_b]."""
  in_a, in_b = np.zeros(a.num_examples, bool), np.zeros(b.num_examples, bool)
  for keys in common:
    if not len(keys.shared):
      continue
    in_a |= np.isin(keys.of_a, keys.shared)
    in_b |= np.isin(keys.of_b, keys.shared)
  return in_a, in_b


def _common_keys(a: Source, b: Source) -> list[_Keys]:
  """All ways of comparing two sources; none where nothing tells whether they share a video."""
  return [keys for keys in (_by_name(a, b), _by_file(a, b), _by_record(a, b)) if keys is not None]


def _in_both(keys_a: np.ndarray, keys_b: np.ndarray) -> np.ndarray:
  """The keys that are in both, sorted. By hashing: numpy would sort half a million texts for each pair."""
  return np.array(sorted(set(keys_a.tolist()) & set(keys_b.tolist())), keys_a.dtype)


def _family(source: Source) -> str:
  return re.split('[/:]', source.dataset)[0]


def _names_are_all(source: Source) -> bool:
  """Whether a source of one's own files tells their names alone: a copy of another name would not be noticed."""
  return _family(source) in _FOLDERS and source.file_sha256 is None


def _by_name(a: Source, b: Source) -> _Keys | None:
  if a.video_names is None or b.video_names is None:
    return None
  shared = _in_both(a.video_names, b.video_names)
  if _family(a) != _family(b):
    if not all(any(map(_YOUTUBE_ID.fullmatch, s.video_names)) for s in (a, b)):
      return None
    shared = np.array([n for n in shared if _YOUTUBE_ID.fullmatch(n)], np.bytes_)
  elif _family(a) in _FOLDERS and not _one_folder(a, b):
    return None
  return _Keys(a.video_names, b.video_names, shared)


def _by_file(a: Source, b: Source) -> _Keys | None:
  if a.file_sha256 is not None and b.file_sha256 is not None:
    return _Keys(a.file_sha256, b.file_sha256, _in_both(a.file_sha256, b.file_sha256))
  if any(isinstance(s.frames, FrameIndex) for s in (a, b)):
    return None
  of_a, of_b = (np.array([_pixels_sha256(s.frames[row]) for row in s.rows]) for s in (a, b))
  return _Keys(of_a, of_b, _in_both(of_a, of_b))


def _pixels_sha256(video_TxHxWx3: np.ndarray) -> str:
  return hashlib.sha256(repr(video_TxHxWx3.shape).encode() + video_TxHxWx3.tobytes()).hexdigest()


def _by_record(a: Source, b: Source) -> _Keys | None:
  if not all(isinstance(s.frames, FrameIndex) for s in (a, b)):
    return None
  pairs = _same_files(a.frames, b.frames)
  if not pairs and _without_version(a) != _without_version(b):
    return None
  of_a, of_b = (_records(s, [pair[i] for pair in pairs]) for i, s in enumerate((a, b)))
  shared = _in_both(of_a, of_b)
  return _Keys(of_a, of_b, shared[shared >= 0])


def _records(source: Source, files: Sequence[int]) -> np.ndarray:
  """int64 [N], a number for each record of certain files of the index, given in an order that counts; -1 in others."""
  index = source.frames
  number = np.full(len(index.files), -1, np.int64)
  number[files] = np.arange(len(files))
  shard = index.shard[source.rows]
  place = source.rows - np.searchsorted(index.shard, np.arange(len(index.files)))[shard]
  return np.where(number[shard] < 0, -1, (number[shard] << 32) + place)


def _same_files(a: FrameIndex, b: FrameIndex) -> list[tuple[int, int]]:
  """(number in a, number in b) of the files that are one file, or one a copy of the other."""
  number = {os.path.basename(file): i for i, file in enumerate(a.files)}
  named_alike = [(number[name], j) for j, file in enumerate(b.files) if (name := os.path.basename(file)) in number]
  return [(i, j) for i, j in named_alike if _resolved(a.files[i]) == _resolved(b.files[j]) or _is_copy(a, i, b, j)]


def _resolved(file: str) -> str:
  return file if paths.is_remote(file) else os.path.realpath(file)


def _is_copy(a: FrameIndex, i: int, b: FrameIndex, j: int) -> bool:
  """Whether two files hold the same records: places, sizes of all frames, annotations."""
  parts = []
  for index, file in ((a, i), (b, j)):
    records = slice(*np.searchsorted(index.shard, [file, file + 1]))
    frames = slice(index.pointer[records.start], index.pointer[records.stop])
    columns = [index.columns[name][records] for name in sorted(a.columns.keys() & b.columns.keys())]
    parts.append([index.start[records], index.length[frames], *columns])
  return all(np.array_equal(x, y) for x, y in zip(*parts, strict=True))


def _without_version(source: Source) -> str:
  return source.dataset.partition(':')[0]


def _one_folder(a: Source, b: Source) -> bool:
  """Whether two sources are of one dataset in one place."""
  places = [_resolved(os.path.dirname(s.frames.files[0])) if isinstance(s.frames, FrameIndex) else '' for s in (a, b)]
  return places[0] == places[1] and _without_version(a) == _without_version(b)
