"""CRC-32C, the checksum in TFRecord files, in numpy.

The register of a CRC is a linear function of its bits and of the message's: bits are added by XOR, and a zero byte that
passes multiplies the register by a matrix of bits. So a message is taken a row of many 4-byte words at a time, all
words side by side: the words so far, moved on by one row (two table look-ups a word), are added to the next row. In
the end each word counts by its distance from the end. Zeros in front of a message change nothing, so it is padded
there to whole rows; a register that starts with ones is a message whose first 32 bits are flipped.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_SHORT = 1024  # bytes; below, a byte at a time is faster
_LANES = 1 << 12  # words in a row: a power of two


def crc32c(data: bytes) -> int:
  """The CRC-32C of some bytes."""
  if len(data) < _SHORT:
    register = 0xFFFFFFFF
    for byte in data:
      register = _BYTE[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF
  low_table, high_table, counted = _tables()
  padding = -len(data) % (4 * _LANES)
  padded = np.zeros(padding + len(data), np.uint8)
  padded[padding:] = np.frombuffer(data, np.uint8)
  padded[padding : padding + 4] ^= 0xFF
  rows = padded.view('<u4').reshape(-1, _LANES)
  words, moved = rows[0].copy(), np.empty(_LANES, np.uint32)
  low, high = words.view('<u2')[::2], words.view('<u2')[1::2]
  low_index, high_index = np.empty((2, _LANES), np.intp)
  for row in rows[1:]:
    low_index[:], high_index[:] = low, high
    np.take(low_table, low_index, out=moved, mode='wrap')  # 'wrap' writes into `out` directly; 'raise' does not
    np.bitwise_xor(moved, row, out=words)
    np.take(high_table, high_index, out=moved, mode='wrap')
    np.bitwise_xor(moved, words, out=words)
  odd = np.bitwise_count(np.bitwise_xor.reduce(words & counted, axis=1)) & 1
  return int(np.packbits(odd, bitorder='little').view('<u4')[0]) ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
  """The CRC-32C of some bytes as TFRecord files store it."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _byte_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [register >> 1 ^ (_POLYNOMIAL if register & 1 else 0) for register in table]
  return table


_BYTE = _byte_table()


def _times(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
  """Registers, uint32 [...], times a matrix of bits, uint32 [32]: column i is what becomes of bit i."""
  bits = [np.where(registers >> np.uint32(i) & np.uint32(1), columns[i], np.uint32(0)) for i in range(32)]
  return np.bitwise_xor.reduce(bits)


def _zeros(count: int) -> np.ndarray:
  """The matrix, uint32 [32], of `count` zero bytes that pass."""
  bit = np.uint32(1) << np.arange(32, dtype=np.uint32)
  power = np.array(_BYTE, np.uint32)[bit & np.uint32(0xFF)] ^ bit >> np.uint32(8)
  matrix = bit
  while count:
    if count & 1:
      matrix = _times(power, matrix)
    power = _times(power, power)
    count >>= 1
  return matrix


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(low, high, counted), made once.

  low, high: uint32 [65536]; the halves of a word moved on by one row are low[word & 0xFFFF] ^ high[word >> 16].
  counted: uint32 [32, _LANES]; bit j of the register at the end is 1 if an odd number is set of those bits of the last
    row that counted[j] has.
  """
  halves = []
  for columns in _zeros(4 * _LANES).reshape(2, 16):
    table = np.zeros(1, np.uint32)
    for column in columns:
      table = np.concatenate([table, table ^ column])
    halves.append(table)
  added = _zeros(4)[None]  # uint32 [words, 32], what each bit of the last words adds to the register
  while len(added) < _LANES:
    added = np.concatenate([_times(_zeros(4 * len(added)), added), added])
  bits = np.unpackbits(added.view(np.uint8).reshape(_LANES, 32, 4), axis=-1, bitorder='little')
  counted = np.packbits(bits.transpose(2, 0, 1), axis=-1, bitorder='little').view('<u4')[..., 0]
  return *halves, counted
