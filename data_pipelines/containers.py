"""Is a video file all there? The outermost length that its container states is held against the length of the file.

Decoders do not tell: FFmpeg reads a file that was cut short as if it ended there, and AVI and Matroska keep the frames'
count at the end or nowhere, so half a clip would pass for a short one.
"""

import os
from typing import BinaryIO

_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
# What stands at the top level of MP4 and QuickTime files; other bytes there are junk, not a length.
_BOXES = frozenset(
  {b'ftyp', b'styp', b'moov', b'moof', b'mdat', b'mfra', b'sidx', b'meta', b'udta', b'uuid', b'free', b'skip', b'wide'}
)


def missing_bytes(path: str) -> int:
  """Bytes that an AVI, Matroska, WebM or MP4 file promises and lacks; 0 where it is whole or says nothing.

  Raises:
    OSError: the file cannot be read.
  """
  length = os.path.getsize(path)
  with open(path, 'rb') as f:
    start = f.read(12)
    f.seek(0)
    if start[:4] == b'RIFF':
      end = _riff_end(start)
    elif start[:4] == _EBML.to_bytes(4):
      end = _matroska_end(f)
    elif start[4:8] in _BOXES:
      end = _mp4_end(f, length)
    else:
      end = 0
  return max(end - length, 0)


def _riff_end(start: bytes) -> int:
  size = int.from_bytes(start[4:8], 'little')
  # The length leaves out its own 8 bytes; some writers count them, so these 8 are not asked for. All ones: a writer
  # that could not go back and fill the length in.
  return 0 if size == 0xFFFFFFFF else size


def _mp4_end(f: BinaryIO, length: int) -> int:
  """The end of the last box at the top level."""
  at = 0
  while at + 8 <= length:
    f.seek(at)
    size, name = int.from_bytes(f.read(4)), f.read(4)
    if name not in _BOXES:
      break
    if size == 1:  # a length of 64 bits follows the name
      f.seek(at + 8)
      size = int.from_bytes(f.read(8))
    if size < 8:  # 0: to the end of the file
      break
    at += size
  return at


def _matroska_end(f: BinaryIO) -> int:
  """The end of the segment, which holds all the media."""
  for _ in range(8):  # the EBML header, perhaps padding, then the segment
    name = _element_number(f, keep_marker=True)
    size = _element_number(f)
    if name is None or size is None:
      return 0
    if name == _SEGMENT:
      return f.tell() + size
    f.seek(size, os.SEEK_CUR)
  return 0


def _element_number(f: BinaryIO, keep_marker: bool = False) -> int | None:
  """EBML's number of variable length; None at the end of the file, or for the value that means "not known"."""
  first = f.read(1)
  if not first or not first[0]:
    return None
  width = 9 - first[0].bit_length()
  rest = f.read(width - 1)
  if len(rest) < width - 1:
    return None
  value = int.from_bytes(first + rest)
  if keep_marker:
    return value
  value ^= 1 << 7 * width
  return None if value == (1 << 7 * width) - 1 else value
