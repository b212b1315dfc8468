"""Opens a split of a TFDS dataset as a source."""

import difflib
import fcntl
import functools
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from data_pipelines import paths
from data_pipelines.clips import settings
from data_pipelines.contract import UserError
from data_pipelines.media import compact
from data_pipelines.sources import Source, label_sets, mirroring
from data_pipelines.storage import frame_index
from data_pipelines.storage.layout import FrameIndex

# Fields of a Source and the features that our builders write for them.
_COLUMNS = {'ids': 'id', 'video_names': 'video_id', 'file_sha256': 'file_sha256', 'fps': 'fps'}


def left_right_labels(class_names: Sequence[str]) -> tuple[int, ...]:
  """The label of a mirrored clip, per class: of the class in whose name 'left' and 'right' are exchanged.

  A class that names a side and has no such counterpart gives -1: its clips are never mirrored. 'right out', as in
  'pulling it right out', is no side. For the classes of Something-Something v2 this is its authors' own mapping.
  """
  other = {'left': 'right', 'right': 'left', 'Left': 'Right', 'Right': 'Left'}
  label = {name: i for i, name in enumerate(class_names)}
  swap = lambda name: re.sub(r'(?<![A-Za-z])([Ll]eft|[Rr]ight)(?![A-Za-z])(?! out\b)', lambda m: other[m[0]], name)
  return tuple(label.get(swap(name), -1) for name in class_names)


def open_source(name: str, config: Mapping[str, Any], split_key: str) -> Source:
  """Opens a prepared TFDS dataset, on a disk or in object storage; the embedded ones are built on first use.

  Args:
    name: of the source, for messages and metrics.
    config: 'dataset' (as `tfds.builder` takes it: name/config:version), the split under `split_key`, and
      optionally 'data_dir', 'frames_key' and 'label_key' (the features to use where the dataset leaves a choice: a
      ClassLabel, or a Sequence of them for several labels an example; label_key None: use it unlabelled) and the clip
      settings of `Source`.
    split_key: key of `config` that holds a TFDS split: 'train', 'train[:80%]', 'train+validation', ...

  Raises:
    UserError: the dataset or split does not exist, is not prepared, is stored in a format that cannot be read, or
      its frames or labels are ambiguous.
  """
  for key in ('dataset', split_key):
    if key not in config:
      raise UserError(f'Source {name!r} lacks the key {key!r} in the config; it has {", ".join(sorted(config))}.')
  builder = prepared_builder(name, config['dataset'], config.get('data_dir'))
  dataset = f'dataset {config["dataset"]!r} (source {name!r})'
  form = builder.info.file_format and builder.info.file_format.value
  if form not in ('tfrecord', 'array_record'):
    raise UserError(
      f'The {dataset} is stored as {form}; expected tfrecord, whose frames can be read one by one, or array_record: '
      f'build it again with --file_format=tfrecord.'
    )
  frames_key, modality = _frames_feature(dataset, builder.info.features, config.get('frames_key'))
  label_key, class_names, several = _label_feature(dataset, builder.info.features, config)
  index, rows = _select(dataset, builder, config[split_key], frames_key, label_key if several else None)
  if index.storage.cost:
    _say_once('The %s is read from %s', dataset, index.storage.cost)
  stored = _is_stored_video(builder.info.features, frames_key)
  num_frames = index.columns[compact.NUM_FRAMES][rows] if stored else np.diff(index.pointer)[rows]
  if not num_frames.all():
    row = rows[np.argmin(num_frames)]
    raise UserError(
      f'The {dataset} has {np.sum(num_frames == 0)} examples without frames, the first in '
      f'{index.files[index.shard[row]]}: leave them out when the dataset is built.'
    )
  label = np.full(len(rows), -1, np.int32)
  labels = _label_sets(dataset, label_key, index, rows, class_names) if several else None
  if label_key is not None and not several:
    if label_key not in index.columns:
      raise UserError(f'The {dataset} has examples without {label_key!r}: build it again, or set label_key=None.')
    label = index.columns[label_key][rows].astype(np.int32)
    if len(label) and not -1 <= label.min() <= label.max() < len(class_names):
      raise UserError(
        f'The {dataset} has labels from {label.min()} to {label.max()}, but its info names {len(class_names)} '
        f'classes: build it again.'
      )
  known = {k: index.columns[c][rows] for k, c in _COLUMNS.items() if c in index.columns}
  cut = settings.fields({k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in settings.CLIPS})
  if cut.get('flip') == 'labels':
    cut |= {'flip': True, 'flip_labels': left_right_labels(class_names)}
  elif cut.get('flip') == 'auto':
    labels, why = mirroring.by_names(class_names)
    _say_once('Source %s, flip=auto: %s', name, why)
    cut |= {'flip': True, 'flip_labels': labels}
  height, width = index.height, index.width
  if stored:
    height, width, known['decode'] = index.columns[compact.HEIGHT], index.columns[compact.WIDTH], compact.decoders()
  return Source(
    name, modality, class_names, label, num_frames, height[rows].astype(np.int64), width[rows].astype(np.int64),
    index, rows, labels=labels, expected=_expected(dataset, builder, config[split_key]), dataset=config['dataset'],
    **known, **cut,
  )  # fmt: skip


@functools.cache
def _say_once(text: str, *args: str) -> None:
  # A data set is opened once for each of its splits.
  logging.info(text, *args)


def _expected(dataset: str, builder, split: str) -> int | None:
  """Examples that the annotations of whole splits list ('train+validation'); None if that is not known."""
  listed = (builder.info.metadata or {}).get('expected', {})  # of the builders of local files
  parts = list(listed) if split == 'all' else [part.strip() for part in str(split).split('+')]
  if not listed:
    return None
  if set(parts) <= listed.keys():
    return sum(listed[p] for p in parts)
  _say_once('The %s is used in part, as %s: how many of its examples are missing there is not known', dataset, split)
  return None


def prepared_builder(name: str, dataset: str, data_dir: str | None):
  """The TFDS builder of a prepared dataset; an embedded one is built first. UserError: there is no such dataset."""
  import tensorflow_datasets as tfds

  import data_pipelines.builders  # registers the embedded datasets

  if paths.is_remote(str(data_dir or '')):
    # TensorFlow reads this much ahead in every file it opens, 64 MB if nobody says otherwise, and a clip opens one.
    os.environ.setdefault('GCS_READ_CACHE_BLOCK_SIZE_MB', '4')
  try:
    builder = tfds.builder(dataset, data_dir=data_dir)
  except Exception as e:  # TFDS raises ValueError, AssertionError, ... for unknown names, configs and versions
    close = difflib.get_close_matches(re.split('[/:]', dataset)[0], tfds.list_builders())
    hint = f'; close matches: {", ".join(close)}' if isinstance(e, tfds.core.DatasetNotFoundError) and close else ''
    reason = str(e).strip().splitlines()[0]
    base, _, config = dataset.partition('/')
    if 'BuilderConfig' in reason and (configs := tfds.builder_cls(base).builder_configs):
      folder = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
      there = [n for n in sorted(paths.names(os.path.join(folder, base))) if not n.startswith('.')]
      there = [n for n in there if paths.is_folder(os.path.join(folder, base, n))]
      near = difflib.get_close_matches(config, [*there, *configs])
      meant = f' (did you mean {", ".join(near)}?)' if near else ''
      raise UserError(
        f'Dataset {dataset!r} of source {name!r} is not in {folder}, which has of {base}: '
        f'{", ".join(there) or "nothing"}{meant}: correct the name or data_dir '
        f'(--config.sources.{name}.data_dir), or build it with `python -m data_pipelines.build`.'
      ) from None
    raise UserError(f'Cannot open dataset {dataset!r} of source {name!r}{hint} ({reason}).') from None
  if builder.is_prepared():
    return builder
  where = f' --data_dir={data_dir}' if data_dir else ''
  command = f'tfds build {dataset}{where}'
  if isinstance(builder, data_pipelines.builders.media.MediaBuilder):
    dataset = f'{builder.name}/{builder.builder_config_name}'
    command = f'python -m data_pipelines.build {dataset}{where} --manual_dir=<folder of its files>'
  elif type(builder).__module__.startswith('data_pipelines.builders'):
    command = None
  if command:
    raise UserError(
      f'Dataset {dataset!r} of source {name!r} is not prepared in {builder.data_dir}: run `{command}` first, or '
      f'correct data_dir.'
    )
  if paths.is_remote(str(builder.data_dir)):
    raise UserError(
      f'The embedded dataset {dataset!r} of source {name!r} is not in {builder.data_dir}, and it is built on a disk '
      'only: build it there (leave out data_dir) and copy its folder.'
    )
  version = Path(builder.data_dir)
  try:
    version.parent.mkdir(parents=True, exist_ok=True)
    with open(version.parent / f'.{version.name}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together: one builds, the others wait
      for left in version.parent.glob(f'incomplete.*_{version.name}'):  # of a killed build, as TFDS names it
        shutil.rmtree(left, ignore_errors=True)
      tfds.builder(dataset, data_dir=data_dir).download_and_prepare()
  except OSError as e:
    raise UserError(
      f'Cannot build the embedded dataset {dataset!r} in {version.parent} ({e.strerror}): set data_dir of source '
      f'{name!r} to a directory that can be written.'
    ) from None
  return tfds.builder(dataset, data_dir=data_dir)


def _frames_feature(dataset: str, features: Mapping[str, Any], key: str | None) -> tuple[str, str]:
  """(feature, modality) of the encoded frames."""
  import tensorflow_datasets as tfds

  modality = {tfds.features.Video: 'video', tfds.features.Image: 'image'}
  found = {k: modality[type(f)] for k, f in features.items() if type(f) in modality}
  if _is_stored_video(features, key or 'video'):
    return key or 'video', 'video'
  if key is None and len(found) == 1:
    (key,) = found
  if key not in found:
    raise UserError(
      f'The {dataset} has {len(found)} Video and Image features ({", ".join(found) or "none"}); frames_key is '
      f'{key!r}, expected the name of one of them.'
    )
  if np.dtype(features[key].np_dtype) != np.uint8:
    raise UserError(f'Feature {key!r} of the {dataset} is {features[key].np_dtype}; expected uint8 frames.')
  return key, found[key]


def _is_stored_video(features: Mapping[str, Any], key: str) -> bool:
  """Whether examples hold one video file each (`compact`) in place of frames."""
  return key in features and compact.NUM_FRAMES in features and np.dtype(features[key].np_dtype) == object


def _label_feature(
  dataset: str, features: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str | None, tuple[str, ...], bool]:
  """(feature, class names, whether an example has several) of the labels; (None, (), False) if unlabelled."""
  import tensorflow_datasets as tfds

  of_one = {k: f for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)}
  of_several = {k: f.feature for k, f in features.items() if _is_sequence_of_labels(f)}
  found = of_one | of_several
  # One label an example goes first, as it did before there were several.
  default = (
    'label' if 'label' in found or not found else '' if of_one or len(of_several) > 1 else next(iter(of_several))
  )
  key = config.get('label_key', default)
  if key is None or not (found or 'label_key' in config):
    return None, (), False
  if key not in found:
    raise UserError(
      f'The {dataset} has the ClassLabel features {", ".join(found) or "(none)"}; label_key is {key!r}, expected '
      f'one of them, or None to use the source unlabelled.'
    )
  names = tuple(found[key].int2str(i) for i in range(found[key].num_classes or 0))
  # Without a class, as of a folder without labels, nothing can be known of an example.
  return key, names, key in of_several and bool(names)


def _is_sequence_of_labels(feature: Any) -> bool:
  import tensorflow_datasets as tfds

  return isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel)


def _label_sets(
  dataset: str, key: str, index: FrameIndex, rows: np.ndarray, class_names: Sequence[str]
) -> label_sets.LabelSets:
  """The labels of some records; what an example names twice it has once, and the log says how many."""
  pointer, values = index.lists[key]
  sets = label_sets.select(label_sets.LabelSets(pointer, values), rows)
  if len(sets.classes) and not -1 <= sets.classes.min() <= sets.classes.max() < len(class_names):
    raise UserError(
      f'The {dataset} has labels from {sets.classes.min()} to {sets.classes.max()}, but its info names '
      f'{len(class_names)} classes: build it again.'
    )
  if mixed := np.flatnonzero(~sets.known_N & (np.diff(sets.pointer) > 1)).tolist():
    raise UserError(
      f'The {dataset} has {len(mixed)} examples whose {key!r} hold -1, for unlabelled, beside other labels, the first '
      f'is example {mixed[0]}: build it again.'
    )
  once = label_sets.unique(sets)
  if twice := len(sets.classes) - len(once.classes):
    _say_once('The %s names %s labels twice for one example: each counts once', dataset, f'{twice:,}')
  return once


def _select(dataset: str, builder, split: str, frames_key: str, list_key: str | None) -> tuple[FrameIndex, np.ndarray]:
  """The index of the whole base splits, so that all subsplits share it, and the rows that `split` selects."""
  splits = builder.info.splits
  try:
    instructions = splits[split].file_instructions
  except Exception as e:  # TFDS raises ValueError, KeyError, AssertionError, ... for what it cannot parse
    close = [c for part in re.findall(r'[A-Za-z_]\w*', str(split)) for c in difflib.get_close_matches(part, splits)]
    hint = f'; close matches: {", ".join(close)}' if close else ''
    raise UserError(
      f'Split {split!r} of the {dataset} cannot be used ({str(e).strip().splitlines()[0]}); it has '
      f'{", ".join(splits)}{hint}: name one of these, build the data set again with that split, or, if it is for '
      f"testing, name it (--config.sources.NAME.test=SPLIT) or set test='' to train without."
    ) from None
  if not instructions:
    raise UserError(f'Split {split!r} of the {dataset} has no examples: choose another one of {", ".join(splits)}.')
  wanted = {os.path.basename(i.filename) for i in instructions}
  files, lengths = [], []
  for base in splits.values():
    of_split = [os.fspath(p) for p in base.filepaths]
    if wanted & {os.path.basename(p) for p in of_split}:
      files += of_split
      lengths += base.shard_lengths
  pictures = not _is_stored_video(builder.info.features, frames_key)
  index = frame_index.load_or_build(files, frames_key, pictures=pictures, list_key=list_key)
  first = np.searchsorted(index.shard, np.arange(len(files) + 1))
  for file, found, expected in zip(files, np.diff(first), lengths, strict=True):
    if found != expected:
      raise UserError(f'{file} holds {found} examples, its dataset_info.json says {expected}: build it again.')
  shard = {os.path.basename(f): i for i, f in enumerate(files)}
  starts = [(first[shard[os.path.basename(i.filename)]] + i.skip, i.take) for i in instructions]
  return index, np.concatenate([np.arange(s, s + take) for s, take in starts])
