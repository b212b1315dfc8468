"""How records are found and read: one `Storage` for each kind of file that TFDS data can lie in.

| files | the index is built from | a clip reads |
| --- | --- | --- |
| TFRecord on a disk | every byte, once | its frames, one `pread` each |
| TFRecord in object storage | every byte, once | one span, from its first frame to its last |
| TFRecord, gzipped | every byte, once | its file in order, up to its record |
| ArrayRecord | every byte, once | its record |

The index (`frame_index`) is the same for all, so sources of every kind know their labels, ids and frame counts; only
`Storage.read` differs. Files that can only be read in order also change the order in which examples are drawn:
`mixture` merges a few files at a time in place of a full shuffle.

While the index is built every record is compared with the checksum that its file has for it: TFRecord's CRC-32C,
ArrayRecord's own. What a clip reads is compared with the index's checksums of the frames (`sources.read`).
"""

import functools
import gzip
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from data_pipelines import paths
from data_pipelines.paths import is_remote, open_binary
from data_pipelines.storage import crc32c
from data_pipelines.storage.layout import MERGED, FrameIndex, Malformed, Records, Storage

READERS = 8  # files that are read at a time where all of them are


def storage_of(files: Sequence[str]) -> Storage:
  """Looks at the first file that is not empty; the files of a dataset are of one kind."""
  for file in files:
    head = start_of(file, 2)
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
      return Storage(_records, _read_span, waits=True, cost=cost)
    break
  return Storage(_records, _read_frames)


def start_of(file: str, length: int) -> bytes:
  """The first bytes of a file."""
  if is_remote(file):
    return paths.read_span(file, 0, length)
  with open(file, 'rb') as f:
    return f.read(length)


# TFRecord framing.


def _framed(f: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
  """(first byte, payload, its masked CRC-32C in the file) of the records of an open file, one in memory at a time."""
  at = 0
  while header := f.read(12):
    if len(header) < 12:
      raise Malformed(at, 'the file ends within the header of a record')
    if crc32c.masked(header[:8]) != int.from_bytes(header[8:], 'little'):
      raise Malformed(at, 'the checksum of a record header does not match')
    size = int.from_bytes(header[:8], 'little')
    payload, checksum = f.read(size), f.read(4)
    if len(checksum) < 4:
      raise Malformed(at, f'the file is truncated within the record that ends at byte {at + size + 16}')
    yield at + 12, payload, int.from_bytes(checksum, 'little')
    at += size + 16


def _checked(framed: Iterator[tuple[int, bytes, int]]) -> Records:
  for begin, payload, checksum in framed:
    whole = crc32c.masked(payload) == checksum
    yield (payload, begin) if whole else Malformed(begin - 12, 'the checksum of the record does not match')


def _records(file: str) -> Records:
  with open_binary(file) as f:
    yield from _checked(_framed(f))


def _unpacked(file: str) -> Iterator[tuple[int, bytes, int]]:
  with open_binary(file) as packed, gzip.GzipFile(fileobj=packed) as f:
    try:
      yield from _framed(f)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise Malformed(packed.tell(), f'the gzipped file is damaged ({e})') from None


def _gzip_records(file: str) -> Records:
  return _checked(_unpacked(file))


def _array_records(file: str) -> Records:
  reader = _array_reader(file)
  for number in range(reader.num_records()):
    try:
      (record,) = reader.read([number])
    except (RuntimeError, ValueError, IndexError) as e:
      yield Malformed(0, f'the record cannot be read ({(str(e) or type(e).__name__).splitlines()[0]})')
    else:
      yield record, 0


@functools.lru_cache(maxsize=256)
def _array_reader(file: str):
  from array_record.python import array_record_module

  # Without read-ahead: a clip wants one record.
  return array_record_module.ArrayRecordReader(file, 'readahead_buffer_size:0,max_parallelism:0')


# Reading the frames of one record.


def _read_frames(index: FrameIndex, record: int, numbers: Sequence[int]) -> list[bytes]:
  # The file is opened anew each time: measured cheap, and no table of open files has to be kept.
  offset, length = index.frames(record)
  handle = os.open(index.files[index.shard[record]], os.O_RDONLY)
  try:
    return [os.pread(handle, int(length[n]), int(offset[n])) for n in numbers]
  finally:
    os.close(handle)


def _slices(data: bytes, offset: np.ndarray, length: np.ndarray) -> list[bytes]:
  return [data[o : o + n] for o, n in zip(offset.tolist(), length.tolist(), strict=True)]


def _read_span(index: FrameIndex, record: int, numbers: Sequence[int]) -> list[bytes]:
  # A request to object storage takes tens of milliseconds, about what a few megabytes take: so one for a clip.
  offset, length = (x[list(numbers)] for x in index.frames(record))
  span = paths.read_span(index.files[index.shard[record]], int(offset[0]), int(offset[-1] + length[-1] - offset[0]))
  return _slices(span, offset - offset[0], length)


def _read_array_record(index: FrameIndex, record: int, numbers: Sequence[int]) -> list[bytes]:
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
    # file -> [first byte in the unpacked file and payload of the last record, records still to come]
    self._open: OrderedDict[str, list] = OrderedDict()

  def read(self, index: FrameIndex, record: int, numbers: Sequence[int]) -> list[bytes]:
    file = index.files[index.shard[record]]
    offset, length = (x[list(numbers)] for x in index.frames(record))
    if file not in self._open or offset[0] < self._open[file][0]:
      self._open[file] = [0, b'', _unpacked(file)]
    self._open.move_to_end(file)
    if len(self._open) > MERGED:
      self._open.popitem(last=False)
    state = self._open[file]
    while offset[0] >= state[0] + len(state[1]):
      try:
        state[0], state[1], _ = next(state[2], (0, b'', 0))
      except (Malformed, OSError):
        state[1] = b''
      if not state[1]:
        self._open.pop(file)
        return [b''] * len(numbers)  # not the file that was indexed
    return _slices(state[1], offset - state[0], length)
