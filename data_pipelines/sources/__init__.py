"""A source: one split of one dataset, with random access to its encoded frames."""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.clips import settings
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.declared import check_value
from data_pipelines.media import compact
from data_pipelines.sources import label_sets
from data_pipelines.storage import reading
from data_pipelines.storage.layout import FrameIndex


@dataclass(frozen=True, eq=False)
class Source(settings.ClipSettings):
  """One dataset split of N examples: what they are, where they are, how clips are drawn from them.

  Attributes:
    name: as in the config.
    modality: 'video' or 'image'.
    class_names: in the order of the labels; empty if unlabelled.
    label: int32 [N]; -1 where unlabelled, and where labels are several.
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
    flip_labels: int per class, the label of a mirrored clip; -1 for a class whose clips are never mirrored. None: the
      label stays.
    labels: of a dataset whose examples have several; None where they have one.

  How clips are drawn are the keyword arguments `sampler`, `stride`, ...: `clips.settings.CLIPS` explains them.
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
  flip_labels: tuple[int, ...] | None = None
  labels: label_sets.LabelSets | None = field(default=None, repr=False)

  def __post_init__(self):
    where = f'source {self.name!r}'
    for key, value in settings.of(self).items():
      check_value(value, settings.CLIPS[key].kind, f'{key} of {where}')
    if isinstance(self.flip, str):
      set_it = 'set it in the config of `open_source`, which makes flip_labels.'
      raise UserError(f'flip of {where} is {self.flip!r}: {set_it}')
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
  def labelled_N(self) -> np.ndarray:
    """Bool [N]: which examples are labelled."""
    return self.label >= 0 if self.labels is None else self.labels.known_N

  @property
  def info(self) -> SourceInfo:
    """What the model side knows of it."""
    rates = np.zeros(1) if self.fps is None else self.fps
    alike = len(rates) and np.ptp(rates) <= 0.01 * rates.max()  # measured ones differ in their last digits
    fps = float(np.median(rates)) if alike else 0.0
    labels = 'one' if self.labels is None else 'several'
    return SourceInfo(self.name, self.modality, self.num_examples, self.class_names, fps, labels)

  @property
  def in_memory(self) -> bool:
    """Whether its frames are arrays, not encoded in files."""
    return not isinstance(self.frames, FrameIndex)

  @property
  def waits(self) -> bool:
    """Whether a clip waits for something else than this thread, so that several should be asked for at a time."""
    return self.decode is not None or self.from_afar

  @property
  def from_afar(self) -> bool:
    """Whether its files lie in a bucket."""
    return isinstance(self.frames, FrameIndex) and self.frames.storage.waits

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
  labels = None if source.labels is None else label_sets.select(source.labels, examples)
  return dataclasses.replace(source, **arrays, labels=labels, expected=None)


def fingerprint(source: Source) -> str:
  """SHA-256 (hex) of the examples: sorted ids (numbers where the dataset gives none) with their labels."""
  ids = range(source.num_examples) if source.ids is None else [i.decode('utf-8', 'replace') for i in source.ids]
  labels = source.label.tolist()
  if source.labels is not None:
    labels = [','.join(map(str, label_sets.of(source.labels, i))) for i in range(source.num_examples)]
  lines = sorted(f'{i}\t{label}\n' for i, label in zip(ids, labels, strict=True))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def content(source: Source) -> str:
  """SHA-256 (hex) of what is stored of the examples, in their order: frames, labels, original videos.

  Of files it takes the index's word, which knows place and size of each frame and what is noted of it; of arrays their
  pixels.
  """
  digest, index = hashlib.sha256(), source.frames
  arrays = {'label': source.label, 'video_id': source.video_id}
  arrays |= {} if source.labels is None else {f'labels {k}': v for k, v in source.labels._asdict().items()}
  if isinstance(index, FrameIndex):
    arrays |= {k: v for k, v in vars(index).items() if isinstance(v, np.ndarray)} | {'rows': source.rows}
    digest.update(json.dumps([os.path.basename(file) for file in index.files]).encode())
  else:
    arrays |= {f'frames {i}': index[row] for i, row in enumerate(source.rows)}
  for name, array in sorted(arrays.items()):
    digest.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


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
