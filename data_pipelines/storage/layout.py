"""Where the frames of a source lie in its files, and what it takes to read them.

`frame_index.py` makes a `FrameIndex`, `reading.py` the `Storage` of a kind of files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Runs of a source that are merged at a time, and so open at a time: enough to shuffle, few enough to hold.
MERGED = 8


class Malformed(Exception):
  """(byte, what is wrong there)."""


Records = Iterator[tuple[bytes, int] | Malformed]


class Storage(NamedTuple):
  """How the records of one kind of file are found and read.

  Attributes:
    records: file -> (bytes, base) of each record, or what is wrong with it where those behind can still be found; else
      that is raised. `base` is added to places in these bytes to give places that `read` understands.
    read: (index, record, ascending frame numbers) -> encoded frames, as they are now: of other bytes or another length
      if the file has changed. What cannot be read is an OSError.
    in_order: a record is reached only through those before it in its file.
    waits: reading waits for a network, so that several clips should be asked for at a time.
    cost: what the log says of it, once; None where it is what one expects.
  """

  records: Callable[[str], Records]
  read: Callable[['FrameIndex', int, Sequence[int]], list[bytes]]
  in_order: bool = False
  waits: bool = False
  cost: str | None = None


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
    checksum: uint32 [F], the CRC-32 (zlib's) of each encoded frame.
    height, width: int32 [R], of the record's first frame; 0 for a record without frames.
    columns: the other features that have exactly one value in every record, [R] each: int64, float32 or bytes
      ('S', at most 1,024).
    storage: how the files are read.
    lists: of the feature that was asked for, any number of integers a record: {name: (int64 [R + 1], int64)}; record
      r has `values[pointer[r]:pointer[r + 1]]`.
  """

  files: tuple[str, ...]
  shard: np.ndarray
  start: np.ndarray
  pointer: np.ndarray
  length: np.ndarray
  checksum: np.ndarray
  height: np.ndarray
  width: np.ndarray
  columns: Mapping[str, np.ndarray]
  storage: Storage
  lists: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

  def frames(self, record: int) -> tuple[np.ndarray, np.ndarray]:
    """(offset, length), int64 [n] each: where in its file each encoded frame of a record lies."""
    length = self.length[self.pointer[record] : self.pointer[record + 1]].astype(np.int64)
    # Before each frame stand a tag of one byte and its length as a varint, 7 bits a byte.
    header = 2 + np.searchsorted([1 << 7, 1 << 14, 1 << 21, 1 << 28], length, side='right')
    return self.start[record] + np.cumsum(header + length) - length, length
