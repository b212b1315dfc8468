"""Containers made to be received from the middle on: Ogg, MPEG transport and program streams. See `containers`."""

import itertools
import re
import zlib
from typing import BinaryIO

import numpy as np

from data_pipelines.media.container_bytes import CHUNK, Damage, broken, bytes_at, checksum_of, holds, need

PACK = b'\0\0\1\xba'  # what a program stream begins with
# Of a transport stream's packets (bytes, place of the mark): plain, with a time before each (M2TS), with error
# correction.
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))
OGG_FIRST, _OGG_LAST = 2, 4
_REVERSED = bytes(int(f'{byte:08b}'[::-1], 2) for byte in range(256))  # each byte with its bits in the other order


def ogg(f: BinaryIO, length: int) -> None:
  """Pages have checksums and numbers, and the last one of a stream says that it is."""
  at, following, unended = 0, {}, set()
  while at < length:
    head = bytes_at(f, at, 27)
    if head[:4] != b'OggS'[: len(head)]:
      if holds(f, at, (b'OggS',)):
        raise broken(at)
      break  # junk behind the end
    if len(head) < 27:
      need(at + 27, length)
    lengths = f.read(head[26])
    body = f.read(sum(lengths))
    need(at + 27 + head[26] + sum(lengths), length)
    if checksum(head[:22] + bytes(4) + head[26:] + lengths + body) != int.from_bytes(head[22:26], 'little'):
      raise checksum_of(at)
    flags, serial, number = head[5], head[14:18], int.from_bytes(head[18:22], 'little')
    if not flags & OGG_FIRST and following.get(serial, number) != number:
      raise Damage(f'pages are missing before its byte {at:,}')
    following[serial] = number + 1
    unended = unended - {serial} if flags & _OGG_LAST else unended | {serial}
    at += 27 + len(lengths) + len(body)
  if unended:
    raise Damage('its last pages are missing')


def checksum(page: bytes) -> int:
  """CRC-32 with the highest bit first, by zlib's, which has the lowest first, starts with all ones and inverts."""
  reflected = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
  return int.from_bytes(reflected.to_bytes(4, 'little').translate(_REVERSED))


def program_stream(f: BinaryIO, length: int) -> None:
  """Packs and packets, one behind the other."""
  at = 0
  while at + 4 <= length:
    head = bytes_at(f, at, 14)
    if head[:3] != PACK[:3] or head[3] < 0xB9:
      if holds(f, at, (PACK,)):
        raise broken(at)
      return  # junk behind the end
    if head[3] == 0xB9:  # the end
      at += 4
    elif head[3] != 0xBA:
      at += 6 + int.from_bytes(head[4:6])
    elif len(head) < 14:
      at += 14
    else:  # of MPEG-2 or MPEG-1
      at += 14 + head[13] % 8 if head[4] >> 6 == 1 else 12
  need(at, length)


def transport_stream(f: BinaryIO, length: int, size: int, sync: int) -> None:
  """Packets of one size. Sound packets say how long they are, so that a cut often shows at the end."""
  marks = re.compile(b'G.{%d}G.{%d}G' % (size - 1, size - 1), re.DOTALL)
  at = 0
  while at + size <= length:
    chunk = bytes_at(f, at, CHUNK // size * size)
    count = len(chunk) // size
    if chunk[sync : count * size : size].count(b'G') < count:
      at += next(i for i in range(count) if chunk[i * size + sync] != 0x47) * size
      rest = bytes_at(f, at, CHUNK)
      if marks.search(rest):
        raise broken(at)
      length = at  # junk behind the end
      break
    at += count * size
    if not count:
      break
  if length - at > sync and bytes_at(f, at + sync, 1) == b'G':
    need(at + size, length)
  tail = max(at - CHUNK // size * size, 0)
  _whole_packets(bytes_at(f, tail, at - tail)[sync:], size, length)


def transport_packets(start: bytes) -> tuple[int, int] | None:
  """(bytes, place of the mark) of a transport stream's packets, by the first bytes of a file; None: it is none."""
  for size, sync in _TS_PACKETS:
    if start[sync : sync + 1] == start[sync + size : sync + size + 1] == b'G':
      return size, sync
  return None


def counter_breaks(path: str, stream: int) -> list[tuple[int, bool]]:
  """Where the counters of one stream of a transport stream break: (byte, whether two files were joined there).

  A writer counts the packets of each stream and starts at the same number for each file. So two files were joined where
  a table of programs and a packet of the stream that begins a picture have the counters that they have at the
  beginning, or zero, with no packet of a sound torn before them. Packets that were lost leave no such place.

  Args:
    path: of the file; [] where it is no transport stream.
    stream: its number (PID).

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, 'rb') as f:
    layout = transport_packets(f.read(512))
    if layout is None:
      return []
    size, sync = layout
    f.seek(0)
    rows, at = [], 0
    while count := len(chunk := f.read(CHUNK // size * size)) // size:
      heads = np.frombuffer(chunk, np.uint8)[: count * size].reshape(count, size)[:, sync : sync + 6].astype(np.int64)
      number = (heads[:, 1] & 0x1F) << 8 | heads[:, 2]
      mine = np.flatnonzero((number == 0) | (number == stream))
      rows.append(np.column_stack([at + mine * size, number[mine], heads[mine][:, [1, 3, 4, 5]]]))
      at += len(chunk)
    packets = np.concatenate(rows)
    tables, shown = ([row for row in packets.tolist() if row[1] == wanted] for wanted in (0, stream))
    if not (tables and shown):
      return []
    fresh = {(0, 0), (tables[0][3] & 15, shown[0][3] & 15)}
    table_at, found = np.array([row[0] for row in tables]), []
    for before, (place, _, flags, counter, field, field_flags) in itertools.pairwise(shown):
      told = counter & 0x20 and field and field_flags & 0x80  # a break that the writer announces
      goes_on = counter & 15 == (before[3] + (counter >> 4 & 1)) & 15
      if not flags & 0x80 and (told or goes_on):
        continue
      between = range(*np.searchsorted(table_at, (before[0], place)).tolist())
      joined = flags & 0xC0 == 0x40 and any((tables[i][3] & 15, counter & 15) in fresh for i in between)
      found.append((place, bool(joined) and _ends_whole(f, tables[between[0]][0], size, sync)))
  return found


def _ends_whole(f: BinaryIO, end: int, size: int, sync: int) -> bool:
  """Whether what stands before a place of a transport stream is whole, as far as its packets say how long they are."""
  tail = max(end - CHUNK // size * size, 0)
  try:
    _whole_packets(bytes_at(f, tail, end - tail)[sync:], size, end)
  except Damage:
    return False
  return True


def _whole_packets(tail: bytes, size: int, length: int) -> None:
  """At the end of a transport stream, holds the stated length of each stream's last packet against what is there."""
  missing: dict[int, int] = {}
  for at in range(0, len(tail), size):
    stream = int.from_bytes(tail[at + 1 : at + 3]) & 0x1FFF
    has = tail[at + 3] >> 4 & 3  # 1: data, 2: fields before it
    data = tail[at + 4 + (1 + tail[at + 4] if has & 2 else 0) : at + 188] if has & 1 else b''
    if tail[at + 1] & 0x40 and data[:3] == b'\0\0\1':  # a packet begins
      stated = int.from_bytes(data[4:6])
      missing[stream] = 6 + stated if stated else 0
    if missing.get(stream, 0) > 0:
      missing[stream] -= len(data)
  if any(count > 0 for count in missing.values()):
    need(length + max(missing.values()), length)


def whole_slices(packet: bytes) -> bool:
  """Whether a packet of FFV1 is slices with checksums, all right: RFC 9043, 4.9. FFmpeg tells its log alone of others.

  A slice ends in its length without what follows (3 bytes), a status (1) and a checksum (4), by which the whole is 0.
  """
  end = len(packet)
  while end > 8:
    start = end - 8 - int.from_bytes(packet[end - 8 : end - 5])
    if start < 0 or checksum(packet[start:end]):
      return False
    end = start
  return end == 0
