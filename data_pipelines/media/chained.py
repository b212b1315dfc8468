"""Files that are several, one behind the other (`cat a.mp4 b.mp4`), of which readers show the first and say nothing."""

from typing import BinaryIO

from data_pipelines.media.container_bytes import CHUNK, Damage, bytes_at, integer
from data_pipelines.media.container_streams import ogg_is_chained

_ASF_HEADER = bytes.fromhex('3026B2758E66CF11A6D900AA0062CE6C')
_ASF_LEAST = 24  # bytes of an object: its kind and its length
_TIME_OF_FRAGMENT = b'tfdt'


def kind(path: str, container: str) -> str:
  """What a file is several of ('MP4'), or '' if it is one, or one of a kind that readers go on in.

  Args:
    path: of the file.
    container: FFmpeg's name for its format.

  Raises:
    OSError: the file cannot be read.
  """
  if container == 'ogg':
    return 'Ogg' if ogg_is_chained(path) else ''
  for name, shown, several in (('mp4', 'MP4', _mp4), ('asf', 'WMV', _asf)):
    if name in container.split(','):
      with open(path, 'rb') as f:
        try:
          return shown if several(f) else ''
        except Damage:  # a place that no file has; `containers` says so
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
  while len(head := bytes_at(f, at, _ASF_LEAST)) == _ASF_LEAST:
    if head.startswith(_ASF_HEADER):
      return True
    size = int.from_bytes(head[16:], 'little')
    if size < _ASF_LEAST:
      return False
    at += size
  return False
