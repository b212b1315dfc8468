"""A source: one split of one dataset, with random access to its encoded frames."""

import difflib
import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import frame_index
from data_pipelines.contract import UserError

_SETTINGS = ('sampler', 'stride', 'crop_scale', 'crop_ratio', 'flip')


@dataclass(frozen=True, eq=False)
class Source:
  """One dataset split of N examples: what they are, where they are, how clips are drawn from them.

  Attributes:
    name: as in the config.
    modality: 'video' or 'image'.
    class_names: in the order of the labels; empty if unlabelled.
    label: int32 [N]; -1 where unlabelled.
    num_frames, height, width: int64 [N]; an image has one frame.
    frames: the byte index of TFRecord files, or uint8 arrays [num_frames, height, width, 3] in memory.
    rows: int64 [N], the row of `frames` that holds each example.
    sampler: frames of a training or test clip: 'dense' (`stride` apart) or 'segments' (one of each part).
    stride: of the dense sampler.
    crop_scale, crop_ratio: of the random resized crop; (1, 1) and (1, 1) keep square frames whole.
    flip: mirror half of the training clips. Wrong where left and right are part of the label.
  """

  name: str
  modality: str
  class_names: tuple[str, ...]
  label: np.ndarray
  num_frames: np.ndarray
  height: np.ndarray
  width: np.ndarray
  frames: frame_index.FrameIndex | Sequence[np.ndarray] = field(repr=False)
  rows: np.ndarray = field(repr=False)
  sampler: str = 'dense'
  stride: int = 1
  crop_scale: tuple[float, float] = (0.3, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: bool = False

  def __post_init__(self):
    where = f'source {self.name!r}'
    if self.sampler not in ('dense', 'segments'):
      raise UserError(f"sampler of {where} is {self.sampler!r}; expected 'dense' or 'segments'.")
    if not (isinstance(self.stride, int) and self.stride >= 1):
      raise UserError(f'stride of {where} is {self.stride!r}; expected a whole number of frames, at least 1.')
    low, high = self.crop_scale
    if not 0 < low <= high <= 1:
      raise UserError(f'crop_scale of {where} is {self.crop_scale}; expected 0 < low <= high <= 1.')
    low, high = self.crop_ratio
    if not 0 < low <= high:
      raise UserError(f'crop_ratio of {where} is {self.crop_ratio}; expected 0 < low <= high.')

  @property
  def num_examples(self) -> int:
    return len(self.rows)


def open_source(name: str, config: Mapping[str, Any], split_key: str) -> Source:
  """Opens a TFDS dataset that lies in TFRecord files; the embedded ones are built on first use.

  Args:
    name: of the source, for messages and metrics.
    config: 'dataset' (as `tfds.builder` takes it: name/config:version), the split under `split_key`, and
      optionally 'data_dir', 'frames_key' and 'label_key' (the features to use where the dataset leaves a choice;
      label_key None: use it unlabelled) and the clip settings of `Source`.
    split_key: key of `config` that holds a TFDS split: 'train', 'train[:80%]', 'train+validation', ...

  Raises:
    UserError: the dataset or split does not exist, is not prepared, is stored in a format without byte access,
      or its frames or labels are ambiguous.
  """
  for key in ('dataset', split_key):
    if key not in config:
      raise UserError(f'Source {name!r} lacks the key {key!r} in the config; it has {", ".join(sorted(config))}.')
  builder = _prepared_builder(name, config['dataset'], config.get('data_dir'))
  dataset = f'dataset {config["dataset"]!r} (source {name!r})'
  if builder.info.file_format is None or builder.info.file_format.value != 'tfrecord':
    form = builder.info.file_format and builder.info.file_format.value
    raise UserError(
      f'The {dataset} is stored as {form}; expected tfrecord, whose frames can be read one by one: '
      f'build it again with --file_format=tfrecord.'
    )
  frames_key, modality = _frames_feature(dataset, builder.info.features, config.get('frames_key'))
  label_key, class_names = _label_feature(dataset, builder.info.features, config)
  index, rows = _select(dataset, builder, config[split_key], frames_key)
  num_frames = np.diff(index.pointer)[rows]
  if not num_frames.all():
    row = rows[np.argmin(num_frames)]
    raise UserError(
      f'The {dataset} has {np.sum(num_frames == 0)} examples without frames, the first in '
      f'{index.files[index.shard[row]]}: leave them out when the dataset is built.'
    )
  label = np.full(len(rows), -1, np.int32)
  if label_key is not None:
    if label_key not in index.columns:
      raise UserError(f'The {dataset} has examples without {label_key!r}: build it again, or set label_key=None.')
    label = index.columns[label_key][rows].astype(np.int32)
    if len(label) and not -1 <= label.min() <= label.max() < len(class_names):
      raise UserError(
        f'The {dataset} has labels from {label.min()} to {label.max()}, but its info names {len(class_names)} '
        f'classes: build it again.'
      )
  settings = {k: config[k] for k in _SETTINGS if k in config}
  for k in {'crop_scale', 'crop_ratio'} & settings.keys():
    settings[k] = tuple(settings[k])
  return Source(
    name, modality, class_names, label, num_frames, index.height[rows].astype(np.int64),
    index.width[rows].astype(np.int64), index, rows, **settings,
  )  # fmt: skip


def read(source: Source, example: int, frame_numbers: np.ndarray) -> list[bytes]:
  """The encoded frames of one example, in the order asked for; each distinct frame is read once.

  The file is opened anew each time: measured cheap, and no table of open files has to be kept.

  Raises:
    UserError: the file has become shorter since the dataset was opened.
  """
  index, row = source.frames, source.rows[example]
  offset, length = index.frames(row)
  file = index.files[index.shard[row]]
  handle = os.open(file, os.O_RDONLY)
  try:
    found = {n: os.pread(handle, int(length[n]), int(offset[n])) for n in sorted({int(n) for n in frame_numbers})}
  finally:
    os.close(handle)
  if any(len(found[n]) != length[n] for n in found):
    raise UserError(f'{file} has changed while it was in use (source {source.name!r}): start the run again.')
  return [found[int(n)] for n in frame_numbers]


def _prepared_builder(name: str, dataset: str, data_dir: str | None):
  import tensorflow_datasets as tfds

  import data_pipelines.builders  # noqa: F401  registers the embedded datasets

  if '://' in str(data_dir or ''):
    raise UserError(
      f'data_dir of source {name!r} is {data_dir}; expected a local or mounted directory, from which single '
      f'frames can be read: copy the dataset there.'
    )
  try:
    builder = tfds.builder(dataset, data_dir=data_dir)
  except Exception as e:  # TFDS raises ValueError, AssertionError, ... for unknown names, configs and versions
    close = difflib.get_close_matches(re.split('[/:]', dataset)[0], tfds.list_builders())
    hint = f'; close matches: {", ".join(close)}' if isinstance(e, tfds.core.DatasetNotFoundError) and close else ''
    reason = str(e).strip().splitlines()[0]
    raise UserError(f'Cannot open dataset {dataset!r} of source {name!r}{hint} ({reason}).') from None
  if builder.is_prepared():
    return builder
  if not type(builder).__module__.startswith('data_pipelines.builders'):
    where = f' --data_dir={data_dir}' if data_dir else ''
    raise UserError(
      f'Dataset {dataset!r} of source {name!r} is not prepared in {builder.data_dir}: run '
      f'`tfds build {dataset}{where}` first, or correct data_dir.'
    )
  version = Path(builder.data_dir)
  try:
    version.parent.mkdir(parents=True, exist_ok=True)
    with open(version.parent / f'.{version.name}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together: one builds, the others wait
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


def _label_feature(dataset: str, features: Mapping[str, Any], config: Mapping[str, Any]):
  """(feature, class names) of the label; (None, ()) if unlabelled."""
  import tensorflow_datasets as tfds

  found = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  key = config.get('label_key', 'label' if 'label' in found or not found else '')
  if key is None or not (found or 'label_key' in config):
    return None, ()
  if key not in found:
    raise UserError(
      f'The {dataset} has the ClassLabel features {", ".join(found) or "(none)"}; label_key is {key!r}, expected '
      f'one of them, or None to use the source unlabelled.'
    )
  return key, tuple(features[key].int2str(i) for i in range(features[key].num_classes))


def _select(dataset: str, builder, split: str, frames_key: str) -> tuple[frame_index.FrameIndex, np.ndarray]:
  """The index of the whole base splits, so that all subsplits share it, and the rows that `split` selects."""
  splits = builder.info.splits
  try:
    instructions = splits[split].file_instructions
  except Exception as e:  # TFDS raises ValueError, KeyError, AssertionError, ... for what it cannot parse
    close = [c for part in re.findall(r'[A-Za-z_]\w*', str(split)) for c in difflib.get_close_matches(part, splits)]
    hint = f'; close matches: {", ".join(close)}' if close else ''
    raise UserError(
      f'Split {split!r} of the {dataset} cannot be used ({str(e).strip().splitlines()[0]}); it has '
      f'{", ".join(splits)}{hint}.'
    ) from None
  if not instructions:
    raise UserError(f'Split {split!r} of the {dataset} has no examples: choose another one of {", ".join(splits)}.')
  wanted = {os.path.basename(i.filename) for i in instructions}
  files, lengths = [], []
  for base in splits.values():
    paths = [os.fspath(p) for p in base.filepaths]
    if wanted & {os.path.basename(p) for p in paths}:
      files += paths
      lengths += base.shard_lengths
  index = frame_index.load_or_build(files, frames_key)
  first = np.searchsorted(index.shard, np.arange(len(files) + 1))
  for file, found, expected in zip(files, np.diff(first), lengths, strict=True):
    if found != expected:
      raise UserError(f'{file} holds {found} examples, its dataset_info.json says {expected}: build it again.')
  shard = {os.path.basename(f): i for i, f in enumerate(files)}
  starts = [(first[shard[os.path.basename(i.filename)]] + i.skip, i.take) for i in instructions]
  return index, np.concatenate([np.arange(s, s + take) for s, take in starts])
