"""What the readers of containers share: numbers and bytes at a place of a file, and what is wrong with it."""

from typing import BinaryIO

CHUNK = 1 << 20  # bytes read at once


class Damage(Exception):
  """Says what is wrong."""


def need(end: int, length: int) -> None:
  if end > length:
    raise Damage(f'its last {end - length:,} bytes are missing')


def broken(at: int) -> Damage:
  return Damage(f'its structure breaks at byte {at:,}')


def checksum_of(at: int) -> Damage:
  return Damage(f'the checksum at its byte {at:,} does not agree with what stands there')


def seek(f: BinaryIO, at: int) -> None:
  """Goes to a place; a damaged file may name one that no file system has."""
  try:
    f.seek(at)
  except (OSError, ValueError):
    raise Damage('its structure makes no sense') from None


def bytes_at(f: BinaryIO, at: int, count: int) -> bytes:
  seek(f, at)
  return f.read(count)


def integer(f: BinaryIO, at: int, count: int, order: str = 'big') -> int:
  seek(f, at)
  return int.from_bytes(f.read(count), order)


def holds(f: BinaryIO, at: int, marks: tuple[bytes, ...]) -> bool:
  """Whether one of some marks of 4 bytes stands in the rest of a file."""
  seek(f, at)
  before = b''
  while chunk := f.read(CHUNK):
    if any(mark in before + chunk for mark in marks):
      return True
    before = chunk[-3:]
  return False


def element(f: BinaryIO, at: int) -> tuple[int | None, int | None, int]:
  """(name, length of the content, its first byte) of an EBML element; None: not a number, or "not known"."""
  seek(f, at)
  name, size = _number(f, keep_marker=True), _number(f)
  return name, size, f.tell()


def _number(f: BinaryIO, keep_marker: bool = False) -> int | None:
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
