"""How records are found and read: one `Storage` for each kind of file that TFDS data can lie in.

| files | the index is built from | a clip reads |
| --- | --- | --- |
| TFRecord on a disk | headers, over a memory map | its frames, one `pread` each |
| TFRecord in object storage | every byte, once | one span, from its first frame to its last |
| TFRecord, gzipped | every byte, once | its file in order, up to its record |
| ArrayRecord | every byte, once | its record |

The index (`frame_index`) is the same for all, so sources of every kind know their labels, ids and frame counts; only
`Storage.read` differs. Files that can only be read in order also change the order in which examples are drawn:
`mixture` merges a few files at a time in place of a full shuffle.
"""

import functools
import gzip
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_pipelines.mixture import MERGED

if TYPE_CHECKING:
  from data_pipelines.frame_index import FrameIndex

Buffer = bytes | mmap.mmap


class Malformed(Exception):
  """(byte, what is wrong there)."""


class Storage(NamedTuple):
  """How the records of one kind of file are found and read.

  Attributes:
    records: file -> (bytes, first byte, end, base) of each record's payload in these bytes. `base` is added to places
      in them to give places that `read` understands.
    read: (index, record, ascending frame numbers) -> encoded frames. Frames of a wrong length tell of changed files;
      what cannot be read is an OSError.
    in_order: a record is reached only through those before it in its file.
    waits: reading waits for a network, so that several clips should be asked for at a time.
    cost: what the log says of it, once; None where it is what one expects.
  """

  records: Callable[[str], Iterator[tuple[Buffer, int, int, int]]]
  read: Callable[['FrameIndex', int, Sequence[int]], list[bytes]]
  in_order: bool = False
  waits: bool = False
  cost: str | None = None


def is_remote(path: str) -> bool:
  return '://' in path


def storage_of(files: Sequence[str]) -> Storage:
  """Looks at the first file that is not empty; the files of a dataset are of one kind."""
  for file in files:
    with open_binary(file) as f:
      head = f.read(2)
    if not head:  # TFDS writes empty shards
      continue
    if '.array_record' in os.path.basename(file):
      cost = 'ArrayRecord files: a clip reads its whole video. From TFRecord files it would read its own frames.'
      return Storage(_array_records, _read_array_record, cost=cost)
    if head == b'\x1f\x8b':
      cost = (
        f'gzipped files: every process unpacks all of them from their start, {MERGED} at a time, and again up to its '
        f'place when it restarts; shuffling merges {MERGED} files. From unpacked files a clip would read its own '
        f'frames, in any order.'
      )
      return Storage(_gzip_records, _InOrder().read, in_order=True, waits=is_remote(file), cost=cost)
    if is_remote(file):
      cost = 'object storage: a clip reads one span, from its first frame to its last.'
      return Storage(_stream_records, _read_span, waits=True, cost=cost)
    break
  return Storage(_mapped_records, _read_frames)


def open_binary(path: str):
  """A file for reading; a path with '://' goes through TensorFlow's file systems."""
  if not is_remote(path):
    return open(path, 'rb')
  import tensorflow as tf

  return tf.io.gfile.GFile(path, 'rb')


# TFRecord framing.


def _crc32c_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
  return table


_CRC32C = _crc32c_table()


def _payload_size(header: bytes, at: int) -> int:
  if len(header) < 12:
    raise Malformed(at, 'the file ends within the header of a record')
  crc = 0xFFFFFFFF
  for byte in header[:8]:
    crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # the mask of the TFRecord format
  if masked != int.from_bytes(header[8:12], 'little'):
    raise Malformed(at, 'the checksum of a record header does not match')
  return int.from_bytes(header[:8], 'little')


def _mapped_records(file: str) -> Iterator[tuple[Buffer, int, int, int]]:
  if os.path.getsize(file) == 0:  # an empty file cannot be mapped
    return
  with open(file, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
    at = 0
    while at < len(data):
      end = at + 12 + _payload_size(data[at : at + 12], at)
      if end + 4 > len(data):
        raise Malformed(at, f'the file is truncated: the record ends at byte {end + 4}, the file at {len(data)}')
      yield data, at + 12, end, 0
      at = end + 4


def _records_of(f) -> Iterator[tuple[Buffer, int, int, int]]:
  """The records of an open TFRecord file, one in memory at a time."""
  at = 0
  while header := f.read(12):
    size = _payload_size(header, at)
    payload = f.read(size)
    if len(payload) < size or len(f.read(4)) < 4:
      raise Malformed(at, f'the file is truncated within the record that ends at byte {at + size + 16}')
    yield payload, 0, size, at + 12
    at += size + 16


def _stream_records(file: str) -> Iterator[tuple[Buffer, int, int, int]]:
  with open_binary(file) as f:
    yield from _records_of(f)


def _gzip_records(file: str) -> Iterator[tuple[Buffer, int, int, int]]:
  with open_binary(file) as packed, gzip.GzipFile(fileobj=packed) as f:
    try:
      yield from _records_of(f)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise Malformed(packed.tell(), f'the gzipped file is damaged ({e})') from None


def _array_records(file: str) -> Iterator[tuple[Buffer, int, int, int]]:
  reader = _array_reader(file)
  for number in range(reader.num_records()):
    (record,) = reader.read([number])
    yield record, 0, len(record), 0


@functools.lru_cache(maxsize=256)
def _array_reader(file: str):
  from array_record.python import array_record_module

  # Without read-ahead: a clip wants one record.
  return array_record_module.ArrayRecordReader(file, 'readahead_buffer_size:0,max_parallelism:0')


# Reading the frames of one record.


def _read_frames(index: 'FrameIndex', record: int, numbers: Sequence[int]) -> list[bytes]:
  # The file is opened anew each time: measured cheap, and no table of open files has to be kept.
  offset, length = index.frames(record)
  handle = os.open(index.files[index.shard[record]], os.O_RDONLY)
  try:
    return [os.pread(handle, int(length[n]), int(offset[n])) for n in numbers]
  finally:
    os.close(handle)


def _slices(data: bytes, offset: np.ndarray, length: np.ndarray) -> list[bytes]:
  return [data[o : o + n] for o, n in zip(offset.tolist(), length.tolist(), strict=True)]


def _read_span(index: 'FrameIndex', record: int, numbers: Sequence[int]) -> list[bytes]:
  # A request to object storage takes tens of milliseconds, about what a few megabytes take: so one for a clip.
  import tensorflow as tf

  offset, length = (x[list(numbers)] for x in index.frames(record))
  try:
    with open_binary(index.files[index.shard[record]]) as f:
      f.seek(int(offset[0]))
      span = f.read(int(offset[-1] + length[-1] - offset[0]))
  except tf.errors.OutOfRangeError:  # of seek, behind the end
    span = b''
  except tf.errors.OpError as e:
    raise OSError(e.message) from None
  return _slices(span, offset - offset[0], length)


def _read_array_record(index: 'FrameIndex', record: int, numbers: Sequence[int]) -> list[bytes]:
  shard = index.shard[record]
  try:
    (data,) = _array_reader(index.files[shard]).read([record - int(np.searchsorted(index.shard, shard))])
  except (RuntimeError, ValueError, IndexError) as e:
    raise OSError(str(e)) from None
  offset, length = (x[list(numbers)] for x in index.frames(record))
  return _slices(data, offset, length)


class _InOrder:
  """Reads packed files forwards, a few at a time. What lies behind is reached by starting its file again."""

  def __init__(self):
    # file -> [records still to come, payload of the last one, its first byte in the unpacked file]
    self._open: OrderedDict[str, list] = OrderedDict()

  def read(self, index: 'FrameIndex', record: int, numbers: Sequence[int]) -> list[bytes]:
    file = index.files[index.shard[record]]
    offset, length = (x[list(numbers)] for x in index.frames(record))
    if file not in self._open or offset[0] < self._open[file][2]:
      self._open[file] = [_gzip_records(file), b'', 0]
    self._open.move_to_end(file)
    if len(self._open) > MERGED:
      self._open.popitem(last=False)
    state = self._open[file]
    while offset[0] >= state[2] + len(state[1]):
      try:
        state[1], _, _, state[2] = next(state[0], (b'', 0, 0, 0))
      except (Malformed, OSError):
        state[1] = b''
      if not state[1]:
        self._open.pop(file)
        return [b''] * len(numbers)  # not the file that was indexed
    return _slices(state[1], offset - state[2], length)
