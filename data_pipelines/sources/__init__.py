"""A source: one split of one dataset, with random access to its encoded frames."""

import dataclasses
import difflib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.clips import settings
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.declared import check_value
from data_pipelines.media import compact
from data_pipelines.storage import frame_index, reading
from data_pipelines.storage.layout import FrameIndex

# Fields of a Source and the features that our builders write for them.
_COLUMNS = {'ids': 'id', 'video_names': 'video_id', 'file_sha256': 'file_sha256', 'fps': 'fps'}
# Fields of a Source whose setting has another name: its `fps` are those of the stored frames.
FIELDS = {'fps': 'target_fps'}


@dataclass(frozen=True, eq=False)
class Source:
  """One dataset split of N examples: what they are, where they are, how clips are drawn from them.

  Attributes:
    name: as in the config.
    modality: 'video' or 'image'.
    class_names: in the order of the labels; empty if unlabelled.
    label: int32 [N]; -1 where unlabelled.
    num_frames, height, width: int64 [N]; an image has one frame.
    frames: the byte index of TFDS's files, or uint8 arrays [num_frames, height, width, 3] in memory.
    rows: int64 [N], the row of `frames` that holds each example.
    decode: where an example is one stored video: (video, ascending frame numbers) -> pictures; None for frames.
    ids: bytes [N], each example's own name; None where the dataset gives none.
    video_names: bytes [N], the original video that each example was cut from: the YouTube id, the group of UCF101;
      None where the dataset does not say.
    file_sha256: bytes [N], in hex, of the file that each example was made of; None where the dataset does not say.
    video_id: int32 [N], `video_names` as numbers from 0; without names each example is a video of its own.
    fps: float32 [N], of the stored frames; None where the dataset does not say.
    expected: examples that the split's annotations list, found or not; None where the dataset does not say.
    dataset: as TFDS names it, 'kinetics/400'; '' for arrays.
    sampler: frames of a training or test clip: 'dense' (`stride` apart) or 'segments' (one of each part).
    stride: of the dense sampler, in frames at `target_fps`.
    target_fps: the config's 'fps': rate in Hz at which `stride` counts, whatever a video's own; 0: stored frames.
    loop: a video too short for a dense clip begins again; else its last frame stands still.
    crop_scale, crop_ratio: of the random resized crop; (1, 1) and (1, 1) keep square frames whole.
    short_side: (low, high) pixels, for `clips.short_side_crop` in place of the random resized crop; None: not.
    rotation: training clips are turned by an angle uniform in +-this many degrees.
    flip: mirror half of the training clips. Wrong where left and right are part of the label, unless:
    flip_labels: int per class, the label of a mirrored clip; -1 for a class whose clips are never mirrored. None: the
      label stays.
    test_clips: clips an evaluated video, evenly over its length; the probabilities are averaged.
    test_crops: boxes a test clip: 1, 3, 5 or 10 (`clips.protocol_crops`).
    test_crop_fraction: of the short side that a test crop shows; 224 / 256 is ImageNet's classical one.
  """

  name: str
  modality: str
  class_names: tuple[str, ...]
  label: np.ndarray
  num_frames: np.ndarray
  height: np.ndarray
  width: np.ndarray
  frames: FrameIndex | Sequence[np.ndarray] = field(repr=False)
  rows: np.ndarray = field(repr=False)
  decode: Callable[[bytes, np.ndarray], list[bytes]] | None = field(default=None, repr=False)
  ids: np.ndarray | None = field(default=None, repr=False)
  video_names: np.ndarray | None = field(default=None, repr=False)
  file_sha256: np.ndarray | None = field(default=None, repr=False)
  fps: np.ndarray | None = field(default=None, repr=False)
  expected: int | None = None
  dataset: str = ''
  sampler: str = 'dense'
  stride: int = 1
  target_fps: float = 0.0
  loop: bool = False
  crop_scale: tuple[float, float] = (0.3, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  short_side: tuple[int, int] | None = None
  rotation: float = 0.0
  flip: bool = False
  flip_labels: tuple[int, ...] | None = None
  test_clips: int = 1
  test_crops: int = 1
  test_crop_fraction: float = 1.0

  def __post_init__(self):
    where = f'source {self.name!r}'
    for key, declared in settings.CLIPS.items():
      check_value(getattr(self, FIELDS.get(key, key)), declared.kind, f'{key} of {where}')
    if self.flip == 'labels':
      raise UserError(f"flip of {where} is 'labels': set it in the config of `open_source`, which makes flip_labels.")
    if self.target_fps and (self.fps is None or not np.all(self.fps > 0)):
      raise UserError(
        f'fps of {where} is {self.target_fps:g}, but the dataset does not say at what rate its frames were stored '
        f'(feature fps): set it to 0, so that stride counts stored frames, or build it with the rate.'
      )
    if self.flip_labels is not None and len(self.flip_labels) != len(self.class_names):
      count = len(self.class_names)
      raise UserError(f'flip_labels of {where} has {len(self.flip_labels)} entries; expected {count}, one a class.')
    if self.modality == 'image' and self.test_clips != 1:
      raise UserError(f'test_clips of {where} is {self.test_clips}; an image has one frame, so expected 1.')
    if self.test_crops == 10 and self.flip_labels is not None:
      raise UserError(f'test_crops of {where} is 10, half of them mirrored, but mirroring changes labels: expected 5.')

  @functools.cached_property
  def video_id(self) -> np.ndarray:
    if self.video_names is None:
      return np.arange(self.num_examples, dtype=np.int32)
    return np.unique(self.video_names, return_inverse=True)[1].astype(np.int32)

  @property
  def num_examples(self) -> int:
    return len(self.rows)

  @property
  def info(self) -> SourceInfo:
    """What the model side knows of it."""
    rates = np.zeros(1) if self.fps is None else self.fps
    alike = len(rates) and np.ptp(rates) <= 0.01 * rates.max()  # measured ones differ in their last digits
    fps = float(np.median(rates)) if alike else 0.0
    return SourceInfo(self.name, self.modality, self.num_examples, self.class_names, fps)

  @property
  def in_memory(self) -> bool:
    """Whether its frames are arrays, not encoded in files."""
    return not isinstance(self.frames, FrameIndex)

  @property
  def waits(self) -> bool:
    """Whether a clip waits for something else than this thread, so that several should be asked for at a time."""
    return self.decode is not None or (isinstance(self.frames, FrameIndex) and self.frames.storage.waits)

  @property
  def runs(self) -> tuple[int, ...] | None:
    """Examples in each file, where files can only be read in order (`reading`); None where examples can."""
    if not (isinstance(self.frames, FrameIndex) and self.frames.storage.in_order):
      return None
    shard = self.frames.shard[self.rows]
    ends = np.flatnonzero(np.diff(shard, append=-1)) + 1
    return tuple(np.diff(ends, prepend=0).tolist())


def select(source: Source, examples: np.ndarray) -> Source:
  """The source with only some of its examples, int64 [n], in that order; what the split lacks is not known then."""
  names = ('label', 'num_frames', 'height', 'width', 'rows', 'ids', 'video_names', 'file_sha256', 'fps')
  arrays = {k: v if (v := getattr(source, k)) is None else v[examples] for k in names}
  return dataclasses.replace(source, **arrays, expected=None)


def fingerprint(source: Source) -> str:
  """SHA-256 (hex) of the examples: sorted ids (numbers where the dataset gives none) with their labels."""
  ids = range(source.num_examples) if source.ids is None else [i.decode('utf-8', 'replace') for i in source.ids]
  lines = sorted(f'{i}\t{label}\n' for i, label in zip(ids, source.label.tolist(), strict=True))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def content(source: Source) -> str:
  """SHA-256 (hex) of what is stored of the examples, in their order: frames, labels, original videos.

  Of files it takes the index's word, which knows place and size of each frame and what is noted of it; of arrays their
  pixels.
  """
  digest, index = hashlib.sha256(), source.frames
  arrays = {'label': source.label, 'video_id': source.video_id}
  if isinstance(index, FrameIndex):
    arrays |= {k: v for k, v in vars(index).items() if isinstance(v, np.ndarray)} | {'rows': source.rows}
    digest.update(json.dumps([os.path.basename(file) for file in index.files]).encode())
  else:
    arrays |= {f'frames {i}': index[row] for i, row in enumerate(source.rows)}
  for name, array in sorted(arrays.items()):
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


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
      optionally 'data_dir', 'frames_key' and 'label_key' (the features to use where the dataset leaves a choice;
      label_key None: use it unlabelled) and the clip settings of `Source`.
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
  label_key, class_names = _label_feature(dataset, builder.info.features, config)
  index, rows = _select(dataset, builder, config[split_key], frames_key)
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
  if label_key is not None:
    if label_key not in index.columns:
      raise UserError(f'The {dataset} has examples without {label_key!r}: build it again, or set label_key=None.')
    label = index.columns[label_key][rows].astype(np.int32)
    if len(label) and not -1 <= label.min() <= label.max() < len(class_names):
      raise UserError(
        f'The {dataset} has labels from {label.min()} to {label.max()}, but its info names {len(class_names)} '
        f'classes: build it again.'
      )
  known = {k: index.columns[c][rows] for k, c in _COLUMNS.items() if c in index.columns}
  cut = {FIELDS.get(k, k): tuple(v) if isinstance(v := config[k], list) else v for k in settings.CLIPS if k in config}
  if cut.get('flip') == 'labels':
    cut |= {'flip': True, 'flip_labels': left_right_labels(class_names)}
  height, width = index.height, index.width
  if stored:
    height, width, known['decode'] = index.columns[compact.HEIGHT], index.columns[compact.WIDTH], compact.decoders()
  return Source(
    name, modality, class_names, label, num_frames, height[rows].astype(np.int64), width[rows].astype(np.int64),
    index, rows, expected=_expected(dataset, builder, config[split_key]), dataset=config['dataset'],
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


def unshared(source: Source) -> Source:
  """The source with a reader of its own, where readers remember their place: two streams would pull it to and fro."""
  if source.runs is None:
    return source
  index = dataclasses.replace(source.frames, storage=reading.storage_of(source.frames.files))
  return dataclasses.replace(source, frames=index)


def read(source: Source, example: int, frame_numbers: np.ndarray) -> list[bytes]:
  """The encoded frames of one example, in the order asked for; each distinct frame is read once.

  Raises:
    UserError: the file has been damaged or changed since it was indexed, or a stored video cannot be decoded.
  """
  index, row = source.frames, source.rows[example]
  numbers, places = np.unique(frame_numbers, return_inverse=True)
  stored = numbers if source.decode is None else np.zeros(1, np.int64)
  try:
    found = index.storage.read(index, row, stored)
  except OSError as e:
    raise UserError(_damaged(source, example, f'it cannot be read ({e.strerror or e})')) from None
  expected = index.checksum[index.pointer[row] + stored].tolist()
  for number, frame, checksum in zip(stored.tolist(), found, expected, strict=True):
    if zlib.crc32(frame) != checksum:
      what = f'frame {number}, byte {index.frames(row)[0][number]}, is not what was indexed'
      raise UserError(_damaged(source, example, what))
  if source.decode is not None:
    try:
      found = source.decode(found[0], numbers)
    except compact.BrokenVideo as e:
      raise UserError(
        f'The video of example {example} of source {source.name!r} cannot be decoded ({e}; in '
        f'{index.files[index.shard[row]]}): build the dataset again.'
      ) from None
  return [found[place] for place in places]


def _damaged(source: Source, example: int, what: str) -> str:
  name = '' if source.ids is None else f' ({source.ids[example].decode("utf-8", "replace")})'
  return (
    f'{source.frames.files[source.frames.shard[source.rows[example]]]} has been damaged or changed: of example '
    f'{example}{name} of source {source.name!r}, {what}. Start the run again if the dataset has just been built anew; '
    f'else fetch the file or build the dataset again (`python -m data_pipelines.inspect '
    f'{source.dataset or "DATASET"} --verify` lists all that is damaged).'
  )


def prepared_builder(name: str, dataset: str, data_dir: str | None):
  """The TFDS builder of a prepared dataset; an embedded one is built first. UserError: there is no such dataset."""
  import tensorflow_datasets as tfds

  import data_pipelines.builders  # registers the embedded datasets

  if reading.is_remote(str(data_dir or '')):
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
      folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
      there = sorted(p.name for p in (folder / base).glob('[!.]*') if p.is_dir())
      some = difflib.get_close_matches(config, [*there, *configs]) or there or list(configs)[:5]
      raise UserError(
        f'Dataset {dataset!r} of source {name!r} is not in {folder}, which has of {base}: '
        f'{", ".join(there) or "nothing"} (did you mean {", ".join(some)}?): correct the name or data_dir '
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


def _select(dataset: str, builder, split: str, frames_key: str) -> tuple[FrameIndex, np.ndarray]:
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
      f"testing, set test='' to train without."
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
  pictures = not _is_stored_video(builder.info.features, frames_key)
  index = frame_index.load_or_build(files, frames_key, pictures=pictures)
  first = np.searchsorted(index.shard, np.arange(len(files) + 1))
  for file, found, expected in zip(files, np.diff(first), lengths, strict=True):
    if found != expected:
      raise UserError(f'{file} holds {found} examples, its dataset_info.json says {expected}: build it again.')
  shard = {os.path.basename(f): i for i, f in enumerate(files)}
  starts = [(first[shard[os.path.basename(i.filename)]] + i.skip, i.take) for i in instructions]
  return index, np.concatenate([np.arange(s, s + take) for s, take in starts])
