"""Where each encoded frame lies in TFDS's TFRecord files, so that a clip reads its own frames and no others.

The index walks the TFRecord framing and the `tf.train.Example` protos over a memory map: no TensorFlow, no copy
of the frames, and only the pages with headers are looked at. It is built once and cached beside the data.

A TFRecord is: uint64 length, masked CRC32C of the length, payload, CRC32C of the payload. The length's CRC is
checked, since it tells TFRecords from anything else; the payload's is not, since that would read every byte of
every video, and a damaged frame shows when it is decoded.

An Example is `{1: {1: {1: key, 2: feature} ...}}`; a feature is one of `{1: bytes list}`, `{2: float list}` or
`{3: int64 list}`, and the frames of a video are the values of one bytes list, one behind the other.
"""

import hashlib
import io
import json
import mmap
import os
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from data_pipelines.contract import UserError

_VERSION = 1  # of what is cached: raise it when the arrays below change
_LONGEST_TEXT = 1024  # bytes features beyond this are payloads, not annotations, and get no column


def _crc32c_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
  return table


_CRC32C = _crc32c_table()


@dataclass(frozen=True, eq=False)
class FrameIndex:
  """Byte positions of the frames of R records, F frames in all.

  Attributes:
    files: the TFRecord files.
    shard: int32 [R], the record's index into files; ascending.
    start: int64 [R], byte at which the record's list of frames begins in its file.
    pointer: int64 [R + 1], the record's frames are `length[pointer[r]:pointer[r + 1]]`.
    length: uint32 [F], bytes of each encoded frame. Frames follow each other, so this and `start` say all: a third
      of the memory of explicit offsets, which counts at 70 million frames of Kinetics.
    height, width: int32 [R], of the record's first frame; 0 for a record without frames.
    columns: the other features that have exactly one value in every record, [R] each: int64, float32 or bytes
      ('S', at most 1,024).
  """

  files: tuple[str, ...]
  shard: np.ndarray
  start: np.ndarray
  pointer: np.ndarray
  length: np.ndarray
  height: np.ndarray
  width: np.ndarray
  columns: Mapping[str, np.ndarray]

  def frames(self, record: int) -> tuple[np.ndarray, np.ndarray]:
    """(offset, length), int64 [n] each: where in its file each encoded frame of a record lies."""
    length = self.length[self.pointer[record] : self.pointer[record + 1]].astype(np.int64)
    # Before each frame stand a tag of one byte and its length as a varint, 7 bits a byte.
    header = 2 + np.searchsorted([1 << 7, 1 << 14, 1 << 21, 1 << 28], length, side='right')
    return self.start[record] + np.cumsum(header + length) - length, length


def load_or_build(files: Sequence[str], frames_key: str, cache_dir: str | None = None) -> FrameIndex:
  """The index of TFRecord files, from the cache where that is up to date.

  Args:
    files: uncompressed TFRecord files of tf.train.Example, in the order of their records.
    frames_key: the feature that holds the encoded frames: a video's list or one image.
    cache_dir: where the index is kept; the directory of the files if None. If it cannot be written, the user's
      cache directory ($XDG_CACHE_HOME or ~/.cache) is used; if that cannot either, nothing is kept.

  Raises:
    UserError: a file is missing, truncated, compressed or no TFRecord file, or lacks the feature.
  """
  files = tuple(os.fspath(f) for f in files)
  try:
    stats = [os.stat(f) for f in files]
  except OSError as e:
    raise UserError(f'Cannot read {e.filename}: {e.strerror}; build the dataset again or correct data_dir.') from None
  names = [os.path.basename(f) for f in files]
  key = json.dumps([_VERSION, frames_key, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]])
  digest = hashlib.sha256(json.dumps([frames_key, names]).encode()).hexdigest()[:12]
  beside = Path(cache_dir or os.path.dirname(os.path.abspath(files[0])))
  home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'cover_jax'
  # The user's cache serves many datasets, whose files may have equal names.
  caches = [
    beside / f'frame_index-{digest}.npz',
    home / hashlib.sha256(str(beside).encode()).hexdigest()[:12] / f'frame_index-{digest}.npz',
  ]
  for cache in caches:
    if (index := _load(cache, key, files)) is not None:
      return index
  logging.info('Indexing the frames of %d files in %s, once', len(files), beside)
  arrays = _build(files, frames_key)
  for cache in caches:
    try:
      _save(cache, key, arrays)
      break
    except OSError as e:
      logging.warning('The frame index cannot be kept in %s: %s', cache.parent, e)
  return _from_arrays(files, arrays)


def _from_arrays(files: tuple[str, ...], arrays: Mapping[str, np.ndarray]) -> FrameIndex:
  fields = {k: v for k, v in arrays.items() if not k.startswith('column/')}
  columns = {k.removeprefix('column/'): v for k, v in arrays.items() if k.startswith('column/')}
  return FrameIndex(files, columns=columns, **fields)


def _load(path: Path, key: str, files: tuple[str, ...]) -> FrameIndex | None:
  try:
    with np.load(path, allow_pickle=False) as stored:
      if str(stored['key']) != key:
        return None
      return _from_arrays(files, {k: stored[k] for k in stored.files if k != 'key'})
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
    logging.warning('The frame index %s is unreadable and is built again: %s', path, e)
    return None


def _save(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix='.tmp')
  try:
    with os.fdopen(handle, 'wb') as f:
      np.savez(f, key=np.array(key), **arrays)
    os.chmod(temporary, 0o644)  # mkstemp's own mode would lock out the other users of a shared dataset
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


class _Malformed(Exception):
  """(byte, what is wrong there)."""


def _build(files: tuple[str, ...], frames_key: str) -> dict[str, np.ndarray]:
  shard, start, height, width = array('i'), array('q'), array('i'), array('i')
  count, length = array('q', [0]), array('I')
  columns: dict[str, list] = {}
  for number, file in enumerate(files):
    if os.path.getsize(file) == 0:  # TFDS writes empty shards; an empty file cannot be mapped
      continue
    with open(file, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      try:
        for begin, end in _records(data):
          shard.append(number)
          frames_start, lengths = None, array('I')
          for name, kind, a, b in _features(data, begin, end):
            if name == frames_key and kind == 1:
              frames_start, lengths = a, _frame_lengths(data, a, b)
            elif (value := _scalar(data, kind, a, b)) is not None:
              columns.setdefault(name, []).append(value)
          if frames_start is None:
            raise _Malformed(begin, f'a record without the feature {frames_key!r}')
          start.append(frames_start)
          length.extend(lengths)
          count.append(len(lengths))
          h, w = _image_size(data, frames_start, lengths) if lengths else (0, 0)
          height.append(h)
          width.append(w)
      except (_Malformed, IndexError, OverflowError) as e:  # the latter two from lengths that are none
        byte, what = e.args if isinstance(e, _Malformed) else (begin, 'the record is no tf.train.Example')
        raise UserError(
          f'{file}, byte {byte}: {what}; expected an uncompressed TFRecord file of tf.train.Example as TFDS '
          f'writes them: build the dataset again.'
        ) from None
  kinds = {int: np.int64, float: np.float32, bytes: np.bytes_}
  return {
    'shard': np.array(shard, np.int32),
    'start': np.array(start, np.int64),
    'pointer': np.cumsum(count, dtype=np.int64),
    'length': np.array(length, np.uint32),
    'height': np.array(height, np.int32),
    'width': np.array(width, np.int32),
  } | {
    f'column/{name}': np.array(values, kinds[type(values[0])])
    for name, values in columns.items()
    if len(values) == len(shard) and len({type(v) for v in values}) == 1
  }


def _records(data: mmap.mmap) -> Iterator[tuple[int, int]]:
  """Yields (first byte, end) of the payload of each record of a file."""
  at = 0
  while at < len(data):
    if at + 12 > len(data):
      raise _Malformed(at, 'the file ends within the header of a record')
    crc = 0xFFFFFFFF
    for byte in data[at : at + 8]:
      crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # the mask of the TFRecord format
    if masked != int.from_bytes(data[at + 8 : at + 12], 'little'):
      raise _Malformed(at, 'the checksum of a record header does not match')
    end = at + 12 + int.from_bytes(data[at : at + 8], 'little')
    if end + 4 > len(data):
      raise _Malformed(at, f'the file is truncated: the record ends at byte {end + 4}, the file at {len(data)}')
    yield at + 12, end
    at = end + 4


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
  """(value, byte behind it)."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 0x7F) << shift
    at += 1
    if byte < 0x80:
      return value, at
    shift += 7


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
  """Yields (field number, first byte, end) of each field's value in a proto message."""
  while at < end:
    tag, value = _varint(data, at)
    wire = tag & 7
    if wire == 2:
      size, value = _varint(data, value)
      stop = value + size
    elif wire == 0:
      stop = _varint(data, value)[1]
    elif wire in (1, 5):
      stop = value + (8 if wire == 1 else 4)
    else:
      stop = end + 1
    if stop > end:
      raise _Malformed(at, 'the record is no tf.train.Example')
    yield tag >> 3, value, stop
    at = stop


def _features(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, kind, first byte, end) of each feature's list; kind 1: bytes, 2: float, 3: int64."""
  for _, a, b in _fields(data, at, end):
    for _, entry, entry_end in _fields(data, a, b):
      parts = {number: (x, y) for number, x, y in _fields(data, entry, entry_end)}
      if 1 in parts and 2 in parts:
        for kind, x, y in _fields(data, *parts[2]):
          yield data[slice(*parts[1])].decode(errors='replace'), kind, x, y


def _frame_lengths(data: mmap.mmap, at: int, end: int) -> array:
  # The hot loop: it runs once for every frame of a dataset.
  lengths = array('I')
  while at < end:
    if data[at] != 0x0A:
      raise _Malformed(at, 'the list of frames is no list of bytes')
    size, at = _varint(data, at + 1)
    lengths.append(size)
    at += size
  if at != end:
    raise _Malformed(end, 'a frame is longer than its record')
  return lengths


def _scalar(data: mmap.mmap, kind: int, at: int, end: int) -> int | float | bytes | None:
  """The value of a feature that has exactly one; None for lists, empty features and long payloads."""
  field = next(_fields(data, at, end), None)
  if field is None or field[2] != end:
    return None
  _, a, b = field
  if kind == 1:
    return data[a:b] if b - a <= _LONGEST_TEXT else None
  if kind == 2:
    return float(np.frombuffer(data[a:b], '<f4')[0]) if b - a == 4 else None
  value, stop = _varint(data, a)
  return (value - (1 << 64) if value >= 1 << 63 else value) if stop == b else None


def _image_size(data: mmap.mmap, at: int, lengths: array) -> tuple[int, int]:
  first = _varint(data, at + 1)[1]
  try:
    with Image.open(io.BytesIO(data[first : first + lengths[0]])) as image:  # reads the header only
      return image.height, image.width
  except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged headers
    raise _Malformed(first, f'the first frame of a record is no image ({e})') from None
