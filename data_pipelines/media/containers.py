"""Is a video file all there, by the structure of its container? Every length that it states is held against the file.

Decoders do not tell: FFmpeg reads a file that was cut short as if it ended there, and looks for the next piece that
makes sense where bytes are missing in the middle, so half a clip would pass for a short one. Nothing is decoded here,
and only the heads of the pieces are read, but for checksums.
"""

import functools
import os
import re
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

from data_pipelines.media.container_bytes import (
  CHUNK,
  Damage,
  broken,
  bytes_at,
  checksum_of,
  element,
  holds,
  integer,
  need,
  seek,
)
from data_pipelines.media.container_streams import PACK, ogg, program_stream, transport_packets, transport_stream

# What stands at the top level of MP4 and QuickTime files; other bytes there are junk, not a length.
BOXES = frozenset(
  {b'ftyp', b'styp', b'moov', b'moof', b'mdat', b'mfra', b'sidx', b'meta', b'udta', b'uuid', b'free', b'skip', b'wide'}
  | {b'ssix', b'emsg', b'prft', b'pdin', b'pnot', b'PICT'}
)
_EBML, _SEGMENT, _CLUSTER, _VOID, _CRC = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0xEC, 0xBF
# SeekHead, Info, Tracks, Cues, Attachments, Chapters, Tags: what stands beside clusters.
_IN_SEGMENT = frozenset(
  {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, _VOID, _CRC}
)
_CHECKED = frozenset({0x1549A966, 0x1654AE6B})  # Info, Tracks: what is beside them shows nothing
# Elements of elements: these, SeekHead, Seek, TrackEntry, Video, Audio, Colour, Tags, Tag, Targets, SimpleTag.
_NESTED = _CHECKED | {0x114D9B74, 0x4DBB, 0xAE, 0xE0, 0xE1, 0x55B0, 0x1254C367, 0x7373, 0x63C0, 0x67C8}
# Timestamp, SimpleBlock, BlockGroup, EncryptedBlock, PrevSize, Position, SilentTracks.
_IN_CLUSTER = frozenset({0xE7, 0xA3, 0xA0, 0xAF, 0xAB, 0xA7, 0x5854, _VOID, _CRC})
_ASF_HEADER = bytes.fromhex('3026B2758E66CF11A6D900AA0062CE6C')
_ASF_DATA = bytes.fromhex('3626B2758E66CF11A6D900AA0062CE6C')
_ASF_FILE = bytes.fromhex('A1DCAB8C47A9CF118EE400C00C205365')
_ASF_FIELDS = ((40, 48), (56, 64), (88, 92), (92, 96))  # length of the file, number of packets, flags, their size
_MXF, _MXF_PARTITION = bytes.fromhex('060E2B34'), bytes.fromhex('060E2B34020501010D01020101')
_LISTS = (b'ffconcat', b'#EXTM3U')  # FFmpeg's lists of pieces; HLS
_MANIFESTS = (b'<MPD', b'<CompositionPlaylist', b'<AssetMap')  # DASH; two of IMF
# Of a packet ('00dc'), of an index ('ix00'), of another piece ('LIST', 'idx1').
_CHUNK_NAME = re.compile(rb'\d\d[A-Za-z]{2}|ix\d\d|[A-Za-z]{3}[A-Za-z0-9 ]')
_PNG, _OF_ANIMATIONS = b'\x89PNG\r\n\x1a\n', (b'acTL', b'fcTL', b'fdAT')
_FLV_TAGS = (8, 9, 18)  # sound, video, data


def damage(path: str) -> str:
  """What is wrong with the structure of a file, in words that follow its name; '' where nothing is or can be known.

  Known are AVI, WebP, Matroska, WebM, MP4, QuickTime, FLV, Ogg, ASF, MPEG-TS, MPEG-PS, MXF, IVF, Y4M, GIF and PNG. A
  transport stream does not say where it ends, nor do a Matroska segment of unknown length and an MP4 in fragments
  without an index.

  Raises:
    OSError: the file cannot be read.
  """
  length = os.path.getsize(path)
  with open(path, 'rb') as f:
    walk = _walker(f.read(512))
    try:
      if walk is not None:
        walk(f, length)
    except Damage as error:
      return str(error)
    except (IndexError, KeyError, ValueError):  # numbers that are none
      return 'its structure makes no sense'
  return ''


def names_others(path: str) -> bool:
  """Whether a file is a list of other files, which a demuxer would open in its place, wherever they lie.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb') as f:
    start = f.read(4096).removeprefix(b'\xef\xbb\xbf').lstrip()
  return start.startswith(_LISTS) or (start.startswith(b'<') and any(mark in start for mark in _MANIFESTS))


def begins(path: str, marks: tuple[bytes, ...]) -> bool:
  """Whether a file begins with one of some marks, but for zeros.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb') as f:
    return f.read(4096).lstrip(b'\0').startswith(marks)


def _walker(start: bytes) -> Callable[[BinaryIO, int], object] | None:
  """The function for a kind of file, by its first bytes; each raises Damage, or returns where nothing is wrong."""
  for mark, at, walk in (
    (b'RIFF', 0, _riff),
    (_EBML.to_bytes(4), 0, _matroska),
    (b'FLV', 0, _flv),
    (b'OggS', 0, ogg),
    (_ASF_HEADER, 0, _asf),
    (PACK, 0, program_stream),
    (_MXF_PARTITION, 0, _mxf),
    (b'YUV4MPEG2', 0, _y4m),
    (b'DKIF', 0, _ivf),
    (b'GIF8', 0, gif_end),
    (_PNG, 0, _png),
    *((box, 4, _mp4) for box in BOXES),
  ):
    if start[at : at + len(mark)] == mark:
      return walk
  if layout := transport_packets(start):
    return functools.partial(transport_stream, size=layout[0], sync=layout[1])
  return None


def _riff(f: BinaryIO, length: int) -> None:
  """AVI files above 1 GB are several of these."""
  at = end = 0
  parts = []
  while at + 8 <= length and bytes_at(f, at, 4) == b'RIFF':
    size = integer(f, at + 4, 4, 'little')
    if size == 0xFFFFFFFF:  # a writer that could not go back and fill the length in
      return
    # The length leaves out its own 8 bytes; some writers count them, so these 8 are not asked for.
    if f.read(3) == b'AVI':
      parts.append((at + 12, min(at + 8 + size, length)))
    end, at = at + size, at + 8 + size + size % 2
  need(end, length)
  for start, stop in parts:
    _avi(f, start, stop)


def _avi(f: BinaryIO, at: int, end: int) -> None:
  """Chunks with names of four letters, up to the end of the list `movi`, which holds the packets."""
  movi = odd = 0
  last = at
  while at + 8 <= min(movi or end, end):
    name, earlier = bytes_at(f, at, 4), bytes_at(f, at - 1, 4)
    if odd and not _CHUNK_NAME.fullmatch(name) and _CHUNK_NAME.fullmatch(earlier):  # a writer that does not pad
      at, name = at - 1, earlier
    if not _CHUNK_NAME.fullmatch(name):
      if any(bytes_at(f, at, min(CHUNK, (movi or end) - at))):  # and not zeros: a place that was kept and not used
        raise broken(at)
      return
    size = integer(f, at + 4, 4, 'little')
    kind = f.read(4) if name == b'LIST' else b''
    if kind == b'movi':
      movi = min(at + 8 + size, end)
    inside = kind in (b'movi', b'rec ')
    odd = 0 if inside else size % 2
    last, at = at, at + (12 if inside else 8 + size + odd)
  if at > end + 8 + odd:  # by which the length of the whole may be wrong
    raise broken(last)


def _mp4(f: BinaryIO, length: int) -> None:
  """Boxes at the top level; an index of fragments may reach further than they do."""
  at = indexed = 0
  names = set()
  while at + 8 <= length:
    size, name = integer(f, at, 4), f.read(4)
    if size == 1:  # a length of 64 bits follows the name
      size = integer(f, at + 8, 8)
    if not (name in BOXES or _is_box(f, at, size, name, length)) or size < 8:
      if name in BOXES and size == 0:  # to the end of the file
        at = length
      break
    names.add(name)
    if name == b'sidx':
      indexed = max(indexed, _indexed_end(f, at, at + size))
    at += size
  if at < length and holds(f, at, (b'moof', b'mdat', b'mfra', b'moov', b'sidx')):
    raise broken(at)
  lost = max(at, indexed) - length
  # Behind what is cut off lies the index, of which nobody knows how long it was.
  if at > 0 and name == b'mdat' and not {b'moov', b'moof', b'meta'} & names:  # meta: of pictures
    raise Damage(f'its index, the box moov, is missing{f", and {lost:,} bytes before it" if lost > 0 else ""}')
  if lost > 0 and name == b'moov':
    raise Damage(f'the last {lost:,} bytes of its index, the box moov, are missing')
  need(max(at, indexed), length)


def _is_box(f: BinaryIO, at: int, size: int, name: bytes, length: int) -> bool:
  """Whether bytes are a box of a kind that is not known, which readers skip: its name is text, and another follows."""
  end = at + size
  if not (re.fullmatch(rb'[A-Za-z0-9 _\xa9-]{4}', name) and size >= 8 and end <= length):
    return False
  if end == length:
    return True
  seek(f, end + 4)
  return f.read(4) in BOXES


def _indexed_end(f: BinaryIO, start: int, end: int) -> int:
  """The end of what a segment index lists."""
  seek(f, start)
  box = f.read(min(end - start, CHUNK))
  wide = box[8] == 1  # its version
  first = int.from_bytes(box[28:36] if wide else box[24:28])
  entries = box[36 if wide else 28 :]
  count = int.from_bytes(entries[2:4])
  sizes = (int.from_bytes(entries[4 + 12 * i : 8 + 12 * i]) & 0x7FFFFFFF for i in range(count))
  return end + first + sum(sizes)


def _matroska(f: BinaryIO, length: int) -> None:
  at = 0
  while at < length:
    name, size, start = element(f, at)
    if name == _SEGMENT:
      at = _segment(f, start, None if size is None else start + size, length)
    elif name in (_EBML, _VOID) and size is not None:
      at = start + size
    else:
      break
  if at < length and holds(f, at, (_CLUSTER.to_bytes(4),)):  # else junk behind the end
    raise broken(at)
  need(at, length)


def _segment(f: BinaryIO, at: int, end: int | None, length: int) -> int:
  """Walks what a segment holds; returns its end. One of unknown length ends where something else begins."""
  while at < (length if end is None else min(end, length)):
    name, size, start = element(f, at)
    if name == _CLUSTER:
      at = _cluster(f, start, None if size is None else start + size, length)
    elif name in _IN_SEGMENT and size is not None:
      if end is not None and start + size > end:
        raise broken(at)
      if name in _CHECKED:
        _check(f, start, start + size, length)
      if name in _NESTED:
        _nested(f, start, start + size, length)
      at = start + size
    elif end is None:
      return at
    elif start < length:
      raise broken(at)
    else:
      break
  return at if end is None else end


def _cluster(f: BinaryIO, at: int, end: int | None, length: int) -> int:
  """Walks the blocks of a cluster; returns its end. One of unknown length ends where something else begins."""
  if end is not None:
    _check(f, at, end, length)
  while at < (length if end is None else min(end, length)):
    name, size, start = element(f, at)
    if name not in _IN_CLUSTER or size is None:
      if end is None:
        return at
      if start < length:
        raise broken(at)
      break
    if end is not None and start + size > end:
      raise broken(at)
    at = start + size
  return at if end is None else end


def _nested(f: BinaryIO, at: int, end: int, length: int) -> None:
  """Walks the elements of an element, which fill it."""
  while at < min(end, length):
    name, size, start = element(f, at)
    if name is None or size is None or start + size > end:
      raise broken(at)
    if name in _NESTED:
      _nested(f, start, start + size, length)
    at = start + size


def _check(f: BinaryIO, at: int, end: int, length: int) -> None:
  """Holds what an element holds against the checksum that it may begin with."""
  name, size, start = element(f, at)
  if name == _CRC and size == 4 and end <= length and integer(f, start, 4, 'little') != _checksum(f, start + 4, end):
    raise checksum_of(at)


def _checksum(f: BinaryIO, at: int, end: int) -> int:
  seek(f, at)
  value = 0
  while at < end and (chunk := f.read(min(CHUNK, end - at))):
    value, at = zlib.crc32(chunk, value), at + len(chunk)
  return value


def _flv(f: BinaryIO, length: int) -> None:
  """Tags, each of which is followed by its size; some writers state the length of the file in the first one."""
  head, stated = bytes_at(f, 0, 4096), 0.0
  if (found := head.find(b'filesize\0')) >= 0 and len(head) >= found + 17:
    (stated,) = struct.unpack_from('>d', head, found + 9)
    if 0 < stated < 1 << 50:
      need(int(stated), length)
  at = integer(f, 5, 4) + 4
  while at < length:
    kind, size = integer(f, at, 1), int.from_bytes(f.read(3))
    if kind & 0x1F not in _FLV_TAGS:
      last = length - 4 - integer(f, length - 4, 4)
      if at < stated or (at < last and integer(f, last, 1) & 0x1F in _FLV_TAGS):
        raise broken(at)
      return  # junk behind the end
    at += 11 + size + 4
  need(at - 4, length)


def _asf(f: BinaryIO, length: int) -> None:
  """A header, which states the length of the file, then packets of one size that all begin alike, then indexes."""
  start = integer(f, 16, 8, 'little')
  header = bytes_at(f, 0, min(start, CHUNK))
  found = header.find(_ASF_FILE)
  if found < 0 or len(header) < found + 96:
    return
  if start > length:
    raise broken(16)
  stated, count, flags, size = (int.from_bytes(header[found + a : found + b], 'little') for a, b in _ASF_FIELDS)
  if flags & 1:  # live: nothing was filled in
    return
  need(stated, length)
  at = before = start
  while at < stated:  # the packets, then indexes
    if (of_it := integer(f, at + 16, 8, 'little')) < 24:
      raise broken(at)
    at, before = at + of_it, at
  if at > stated:
    raise broken(before)
  first = start + 50
  corrected = integer(f, first, 1) if bytes_at(f, start, 16) == _ASF_DATA and size else 0
  if corrected & 0x80:
    for at in range(first, min(first + count * size, length), size):
      if integer(f, at, 1) != corrected:
        raise broken(at)


def _mxf(f: BinaryIO, length: int) -> None:
  """Keys of 16 bytes, lengths, values; the first one says where the last partition begins."""
  at = 0
  while at < length:
    head = bytes_at(f, at, 25)
    if head[:4] != _MXF[: len(head)]:
      if holds(f, at, (_MXF,)):
        raise broken(at)
      return  # junk behind the end
    width = head[16] - 0x80 if len(head) > 16 and head[16] > 0x80 else 0
    size = int.from_bytes(head[17 : 17 + width]) if width else int.from_bytes(head[16:17])
    value = at + 17 + width
    if at == 0 and head.startswith(_MXF_PARTITION):
      footer = integer(f, value + 24, 8)
      need(footer + 1, length) if footer else None
    at = value + size
  need(at, length)


def _y4m(f: BinaryIO, length: int) -> None:
  """A line, then frames of one size, each behind a line of its own."""
  first = len(bytes_at(f, 0, 512).split(b'\n')[0]) + 1
  line = len(bytes_at(f, first, 512).split(b'\n')[0]) + 1
  words = bytes_at(f, 1, first - 2).decode('ascii', 'replace').split()[1:]
  said = {word[0]: word[1:] for word in words}
  width, height, kind = int(said['W']), int(said['H']), said.get('C', '420')
  half = (width + 1) // 2
  chroma = {'420': 2 * half * ((height + 1) // 2), '422': 2 * half * height, '444': 2 * width * height, 'mon': 0}
  if kind[:3] not in chroma or 'alpha' in kind:
    return
  deep = 'p1' in kind or kind[4:] in ('10', '12', '16')  # 10 bits and more
  size = line + (width * height + chroma[kind[:3]]) * (2 if deep else 1)
  rest = (length - first) % size
  if rest and bytes_at(f, length - rest, 5) == b'FRAME':
    need(length - rest + size, length)


def _ivf(f: BinaryIO, length: int) -> None:
  at = integer(f, 6, 2, 'little')
  while at < length:
    at += 12 + integer(f, at, 4, 'little')
  need(at, length)


def gif_end(f: BinaryIO, length: int) -> int:
  """The byte behind a GIF's last block: the length of the file, unless junk or another file follows."""
  head = bytes_at(f, 0, 13)
  at = 13 + _colours(head[10:11])
  pictures = 0
  while at < length:
    head = bytes_at(f, at, 10)
    if head[:1] == b'\x2c':
      pictures += 1
      at += 10 + _colours(head[9:10]) + 1
    elif head[:1] == b'!':  # an extension
      at += 2
    elif not pictures or (head[:1] != b';' and holds(f, at, (b'!\xf9\x04',))):  # another picture follows
      raise broken(at)
    else:  # the end, or junk in its place
      return at + (head[:1] == b';')
    while size := integer(f, at, 1) if at < length else 1:
      at += 1 + size
      need(at, length)
    at += 1
  need(at, length)
  return length


def _png(f: BinaryIO, length: int) -> None:
  """Chunks, each with a checksum, of which libpng obeys those of chunks with a capital letter. Pillow obeys none."""
  at, name = len(_PNG), b''
  while name != b'IEND':
    size, name = integer(f, at, 4), f.read(4)
    end = at + 8 + size
    need(max(end, at + 8) + 4, length)
    if not name.isalpha():
      raise broken(at)
    if (name[:1].isupper() or name in _OF_ANIMATIONS) and integer(f, end, 4) != _checksum(f, at + 4, end):
      raise checksum_of(end)
    at = end + 4


def _colours(flags: bytes) -> int:
  """Bytes of the colour table that a GIF's flags announce."""
  return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0
