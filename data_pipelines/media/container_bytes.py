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
