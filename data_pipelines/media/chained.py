"""Files that are several, one behind the other (`cat a.mp4 b.mp4`), of which readers show the first and say nothing.

Streams that are made to be joined (MPEG-TS, MPEG-PS, raw ones) and AVI are read on; see `clock`. Pictures that do not
move are left alone: cameras put a video or a smaller picture behind them.
"""

import mmap
import os
from collections.abc import Callable
from typing import BinaryIO

from data_pipelines.media import container_streams, containers
from data_pipelines.media.container_bytes import CHUNK, Damage, bytes_at, element, integer

_ASF_HEADER = bytes.fromhex('3026B2758E66CF11A6D900AA0062CE6C')
_MXF_HEADER = bytes.fromhex('060E2B34020501010D0102010102')  # of the first partition
_WTV = bytes.fromhex('B7D800203749DA11A64E0007E95EAD8D')
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_REAL_MEDIA = b'.RMF\0\0\0'
_TIME_OF_FRAGMENT = b'tfdt'


def kind(path: str) -> str:
  """What a file is several of ('MP4'), or '' if it is one, or one of a kind that readers go on in.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb') as f:
    start = f.read(16)
    for mark, at, shown, several in _KINDS:
      if start[at : at + len(mark)] == mark:
        try:
          return shown if several(f) else ''
        except (Damage, IndexError):  # a place that no file has; `containers` says so
          return ''
  return ''


def _mp4(f: BinaryIO) -> bool:
  """Whether a second head and index follow, and what comes then does not go on in time, as fragments do."""
  at, heads, indexes, latest = 0, 0, 0, -1
  while len(head := bytes_at(f, at, 16)) >= 8:
    size, name = int.from_bytes(head[:4]), head[4:8]
    size = int.from_bytes(head[8:]) if size == 1 else size
    if size < 8:
      return False
    if name == b'moof':
      box = bytes_at(f, at, min(size, CHUNK))
      found = box.find(_TIME_OF_FRAGMENT) + 4
      time = int.from_bytes(box[found + 4 : found + (12 if box[found : found + 1] == b'\1' else 8)]) if found > 3 else 0
      if indexes > 1 and heads and time <= latest:
        return True
      latest = max(latest, time)
    heads += name == b'ftyp' and indexes > 0
    indexes += name == b'moov'
    if indexes > 1 and heads and latest < 0:  # no fragments
      return True
    at += size
  return False


def _asf(f: BinaryIO) -> bool:
  at = integer(f, 16, 8, 'little')  # behind the header, which holds objects itself
  while len(head := bytes_at(f, at, 24)) == 24:  # an object's kind and length
    if head.startswith(_ASF_HEADER):
      return True
    size = int.from_bytes(head[16:], 'little')
    if size < len(head):
      return False
    at += size
  return False


def _ogg(f: BinaryIO) -> bool:
  """Whether a stream begins after pages that do not begin one."""
  at, began = 0, False
  while len(head := bytes_at(f, at, 27)) == 27 and head[:4] == b'OggS':
    if began and head[5] & container_streams.OGG_FIRST:
      return True
    began = began or not head[5] & container_streams.OGG_FIRST
    at += 27 + head[26] + sum(f.read(head[26]))
  return False


def _matroska(f: BinaryIO) -> bool:
  """Readers go on in the second one, and get the times of reordered frames wrong."""
  at, segments = 0, 0
  while True:
    name, size, start = element(f, at)
    if name is None or (name == _EBML and segments):
      return name is not None
    segments += name == _SEGMENT
    at = start if size is None else start + size  # what does not say how long it is, is walked through


def _mxf(f: BinaryIO) -> bool:
  at = 0
  while len(head := bytes_at(f, at, 25)) > 16 and head[:4] == _MXF_HEADER[:4]:
    if at and head.startswith(_MXF_HEADER):
      return True
    width = max(head[16] - 0x80, 0)
    at += 17 + width + (int.from_bytes(head[17 : 17 + width]) if width else head[16])
  return False


def _behind(end: Callable[[BinaryIO], int], *marks: bytes) -> Callable[[BinaryIO], bool]:
  return lambda f: bytes_at(f, end(f), 16).startswith(marks)


def _again(mark: bytes) -> Callable[[BinaryIO], bool]:
  """For files whose pieces do not say how long they are, or not rightly."""

  def several(f: BinaryIO) -> bool:
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return data.find(mark, len(mark)) > 0

  return several


# What a file begins with, the byte at which this stands, how it is called, whether there are several.
_KINDS = (
  (b'OggS', 0, 'Ogg', _ogg),
  (_ASF_HEADER, 0, 'WMV', _asf),
  (_EBML.to_bytes(4), 0, 'Matroska', _matroska),
  (_MXF_HEADER, 0, 'MXF', _mxf),
  (_REAL_MEDIA, 0, 'RealMedia', _again(_REAL_MEDIA)),
  (_WTV, 0, 'WTV', _again(_WTV)),
  (b'FWS', 0, 'SWF', _behind(lambda f: integer(f, 4, 4, 'little'), b'FWS', b'CWS')),
  (b'GIF8', 0, 'GIF', _behind(lambda f: containers.gif_end(f, os.fstat(f.fileno()).st_size), b'GIF8')),
  (b'WEBP', 8, 'WebP', _behind(lambda f: 8 + integer(f, 4, 4, 'little'), b'RIFF')),
  *((box, 4, 'MP4', _mp4) for box in containers.BOXES),
)
