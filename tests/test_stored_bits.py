"""A flipped bit in stored data is an error before it is a wrong pixel, label or id, whatever file it lies in.

Of a file that is damaged when it is indexed, indexing says so. A file that is damaged afterwards, silently (its size
and time stay), gives labels and ids from the index, and frames that are as they were or an error.
"""

import dataclasses
import gzip
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from data_pipelines import inspect, sources
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.views import Stream
from data_pipelines.media import compact
from data_pipelines.sources import open_tfds
from data_pipelines.storage import frame_index, reading
from tests import tiny_datasets

FLIPS = 200
WHEN_READ = 'has been damaged or changed'


class TinyTestStored(tfds.core.GeneratorBasedBuilder):
  """Three small stored videos."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {**compact.features(), 'label': tfds.features.ClassLabel(num_classes=3), 'id': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      pixels = np.random.default_rng(i).integers(0, 256, (9, 16, 16, 3), np.uint8)
      stored, shape = compact.encode(pixels, 8)
      yield i, {**compact.values(stored, shape), 'label': i, 'id': f'video {i}'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A dataset in every kind of file."""
  root = tmp_path_factory.mktemp('bits')
  tiny_datasets.build(root / 'tfrecord')
  shutil.copytree(root / 'tfrecord', root / 'gzip')
  for file in (root / 'gzip').rglob('*.tfrecord*'):
    file.write_bytes(gzip.compress(file.read_bytes(), 1))
  tfds.builder('tiny_test_clips', data_dir=root / 'array_record', file_format='array_record').download_and_prepare()
  TinyTestStored(data_dir=root / 'compact').download_and_prepare()
  return root


def opened(folder):
  name = 'tiny_test_stored' if folder.name == 'compact' else 'tiny_test_clips'
  return open_tfds.open_source('s', {'dataset': name, 'data_dir': str(folder), 'train': 'train'}, 'train')


def examples(source):
  """[(id, label, frames)] of what lies in the first file."""
  source = sources.unshared(source)
  own = np.flatnonzero(source.frames.shard[source.rows] == 0)
  return [(source.ids[i], source.label[i], all_frames(source, i)) for i in own]


def all_frames(source, example):
  return sources.read(source, example, np.arange(source.num_frames[example]))


class Bits:
  """The bits of a file, to be flipped one at a time."""

  def __init__(self, file):
    self.file, self.good, self.time = Path(file), Path(file).read_bytes(), os.stat(file).st_mtime_ns

  def some(self, count, seed):
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(len(self.good))), int(rng.integers(8))) for _ in range(count)]

  def flip(self, byte, bit):
    data = bytearray(self.good)
    data[byte] ^= 1 << bit
    self.write(data)

  def write(self, data):
    self.file.write_bytes(data)
    os.utime(self.file, ns=(self.time, self.time))
    reading._array_reader.cache_clear()  # which keeps files open


@pytest.fixture
def source_and_bits(request, folders):
  source = opened(folders / request.param)
  bits = Bits(source.frames.files[0])
  yield source, bits
  bits.write(bits.good)


of = lambda *kinds: pytest.mark.parametrize('source_and_bits', kinds, indirect=True)


def index_anew(source, folder):
  return frame_index.load_or_build(source.frames.files[:1], 'video', str(folder), pictures=source.decode is None)


# Damaged before it is indexed.


@of('tfrecord', 'compact')
def test_every_bit_of_a_tfrecord_is_noticed_by_indexing(source_and_bits, tmp_path):
  source, bits = source_and_bits
  noticed = 0
  for number, place in enumerate(bits.some(FLIPS, 0)):
    bits.flip(*place)
    try:
      index_anew(source, tmp_path / str(number))
    except UserError as e:
      assert str(bits.file) in str(e) and ', record ' in str(e) and ', byte ' in str(e) and '\n' not in str(e)
      noticed += 1
  assert noticed == FLIPS


@of('tfrecord')
def test_a_flipped_label_is_noticed_by_indexing(source_and_bits, tmp_path):
  source, bits = source_and_bits
  label = bits.good.index(b'\x0a\x05label\x12') + len(b'\x0a\x05label\x12') + 5  # tag, sizes: then the number
  assert bits.good[label] == source.label[0] != bits.good[label] ^ 1 < 3
  bits.flip(label, 0)
  with pytest.raises(UserError, match='record 0, byte 0: the checksum of the record does not match'):
    index_anew(source, tmp_path)


@of('gzip', 'array_record')
def test_bits_of_other_files_are_noticed_by_indexing_or_change_nothing(source_and_bits, tmp_path):
  """Not every bit of such a file belongs to a record: there are names, times and padding."""
  source, bits = source_and_bits
  own = np.flatnonzero(source.frames.shard == 0)
  noticed = 0
  for number, place in enumerate(bits.some(FLIPS, 1)):
    bits.flip(*place)
    try:
      index = index_anew(source, tmp_path / str(number))
    except UserError:
      noticed += 1
      continue
    assert np.array_equal(index.checksum, source.frames.checksum[: source.frames.pointer[len(own)]])
    assert all(np.array_equal(v, source.frames.columns[name][own]) for name, v in index.columns.items())
  assert noticed


# Damaged after it was indexed.


@of('tfrecord', 'gzip', 'array_record', 'compact')
def test_no_bit_that_flips_later_reaches_a_frame_a_label_or_an_id(source_and_bits):
  source, bits = source_and_bits
  before = examples(source)
  flips, noticed = bits.some(FLIPS, 2), 0
  for place in flips:
    bits.flip(*place)
    try:
      assert examples(source) == before
    except UserError as e:
      assert re.search(r"example \d+ \(.*\) of source 's'", str(e)) and str(bits.file) in str(e) and '\n' not in str(e)
      assert 'fetch the file or build the dataset again' in str(e)
      noticed += 1
  if source.frames.storage.cost is None:  # TFRecords: the file has the frames as they are
    assert noticed == sum(any(o <= byte < o + n for o, n in frames_of_file(source)) for byte, _ in flips)
  assert noticed


def frames_of_file(source):
  """[(offset, length)] of the frames in the first file."""
  index = source.frames
  return [span for row in np.flatnonzero(index.shard == 0) for span in zip(*index.frames(row), strict=True)]


@of('tfrecord')
def test_a_damaged_frame_is_named(source_and_bits):
  source, bits = source_and_bits
  offset, _ = source.frames.frames(source.rows[2])
  bits.flip(int(offset[1]) + 30, 6)
  with pytest.raises(UserError, match=WHEN_READ) as e:
    all_frames(source, 2)
  name = source.ids[2].decode()
  assert f"of example 2 ({name}) of source 's', frame 1, byte {offset[1]}, is not what was indexed" in str(e.value)
  assert 'data_pipelines.inspect tiny_test_clips --verify' in str(e.value)
  sources.read(source, 2, np.array([0]))  # the others are as they were


@of('tfrecord')
def test_batches_end_with_the_damaged_frame(source_and_bits):
  source, bits = source_and_bits
  data = bytearray(bits.good)
  for byte in source.frames.frames(0)[0]:
    data[byte + 100] ^= 8
  bits.write(data)
  stream = Stream((0,), 2, 16, 5)
  with pytest.raises(UserError, match=WHEN_READ):
    list(loader.train_batches([source], {'v': stream}, 0, num_steps=4))
  with pytest.raises(UserError, match=WHEN_READ):
    list(loader.eval_batches(source, 0, stream, 5))


def test_a_bit_that_flips_in_object_storage_is_noticed(folders):
  source = opened(folders / 'tfrecord')
  good = Path(source.frames.files[0]).read_bytes()
  remote = 'ram://bits/a.tfrecord'

  def put(data):
    if tf.io.gfile.exists(remote):
      tf.io.gfile.remove(remote)  # in memory, writing appends
    with tf.io.gfile.GFile(remote, 'wb') as f:
      f.write(data)

  put(good)
  index = frame_index.load_or_build([remote], 'video')
  there = dataclasses.replace(source, frames=index, rows=np.arange(len(index.shard)))
  before = all_frames(there, 0)
  offset, _ = index.frames(0)
  for byte in (offset[0], offset[-1] + 100):
    put(good[:byte] + bytes([good[byte] ^ 4]) + good[byte + 1 :])
    with pytest.raises(UserError, match=WHEN_READ):
      all_frames(there, 0)
  put(good)
  assert all_frames(there, 0) == before


# Looked for.


@of('tfrecord', 'gzip', 'array_record', 'compact')
def test_verify_says_that_whole_data_are(source_and_bits, capsys):
  source, bits = source_and_bits
  data_dir = next(p for p in bits.file.parents if p.name in ('tfrecord', 'gzip', 'array_record', 'compact'))
  assert inspect.main([source.dataset, f'--data_dir={data_dir}', '--verify']) == 0
  assert f'train: {source.num_examples} examples are whole, 0 places are damaged' in capsys.readouterr().out


@of('tfrecord')
def test_verify_finds_every_bit(source_and_bits, folders):
  source, bits = source_and_bits
  for place in bits.some(FLIPS, 3):
    bits.flip(*place)
    (whole, damage), validation = inspect.verify(source.dataset, str(folders / 'tfrecord')).values()
    assert whole < source.num_examples and damage and str(bits.file) in damage[0]
    assert validation == (11, [])


@of('tfrecord')
def test_verify_goes_on_behind_damage_and_ends_with_1(source_and_bits, folders, capsys):
  source, bits = source_and_bits
  data = bytearray(bits.good)
  for row in (0, 2):
    data[source.frames.frames(row)[0][0] + 20] ^= 1
  bits.write(data)
  assert inspect.main([source.dataset, f'--data_dir={folders / "tfrecord"}', '--verify']) == 1
  out = capsys.readouterr().out.splitlines()
  assert out[0] == 'train: 18 examples are whole, 2 places are damaged'
  assert out[1].startswith(f'  {bits.file}, record 0, byte 0: the checksum') and ', record 2, byte ' in out[2]
  assert out[3] == 'validation: 11 examples are whole, 0 places are damaged' and 'Fetch these files' in out[4]
  bits.write(bits.good[:-3])
  assert inspect.main([source.dataset, f'--data_dir={folders / "tfrecord"}', '--verify']) == 1
  assert 'truncated' in capsys.readouterr().out
  bits.write(b'')
  assert inspect.main([source.dataset, f'--data_dir={folders / "tfrecord"}', '--verify']) == 1
  assert '0 records; dataset_info.json says' in capsys.readouterr().out
  bits.file.unlink()
  assert inspect.main([source.dataset, f'--data_dir={folders / "tfrecord"}', '--verify']) == 1
  assert 'cannot be read: ' in capsys.readouterr().out
  assert inspect.main(['tiny_test_clip', '--verify']) == 2
