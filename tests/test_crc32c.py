"""CRC-32C is that of the standard and of TensorFlow's files, at every length where the code takes another way."""

import numpy as np
import pytest
import tensorflow as tf

from data_pipelines.storage import crc32c


def bitwise(data):
  register = 0xFFFFFFFF
  for byte in data:
    register ^= byte
    for _ in range(8):
      register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
  return register ^ 0xFFFFFFFF


def test_values_of_the_standard():
  # RFC 3720, B.4, and the usual check value.
  assert crc32c.crc32c(b'123456789') == 0xE3069283
  assert crc32c.crc32c(bytes(32)) == 0x8A9136AA
  assert crc32c.crc32c(b'\xff' * 32) == 0x62A8AB43
  assert crc32c.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize('length', [0, 1, 1023, 1024, 1025, 1026, 1027, 16383, 16384, 16385, 16388, 40000])
def test_every_length(length):
  rng = np.random.default_rng(length)
  data = rng.bytes(length)
  assert crc32c.crc32c(data) == bitwise(data)
  assert crc32c.crc32c(bytes(length)) == bitwise(bytes(length))


def test_masked_is_what_tensorflow_writes(tmp_path):
  path = str(tmp_path / 'a')
  payloads = [np.random.default_rng(n).bytes(n) for n in (0, 5, 2000, 300_001)]
  with tf.io.TFRecordWriter(path) as writer:
    for payload in payloads:
      writer.write(payload)
  data = (tmp_path / 'a').read_bytes()
  at = 0
  for payload in payloads:
    assert crc32c.masked(data[at : at + 8]) == int.from_bytes(data[at + 8 : at + 12], 'little')
    at += 12 + len(payload)
    assert crc32c.masked(payload) == int.from_bytes(data[at : at + 4], 'little')
    at += 4
  assert at == len(data)
