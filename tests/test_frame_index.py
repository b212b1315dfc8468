"""The byte index: the bytes are TFDS's own, the cache is never stale, a broken file is named."""

import fcntl
import gzip
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from data_pipelines.contract import UserError
from data_pipelines.storage import array_cache, frame_index
from tests import tiny_datasets
from tests.tiny_datasets import frame


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  tiny_datasets.build(data_dir)
  return data_dir


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  return tmp_path / 'home'


def encoded(index, record):
  data = Path(index.files[index.shard[record]]).read_bytes()
  return [data[o : o + n] for o, n in zip(*index.frames(record), strict=True)]


def feature(*values):
  if isinstance(values[0], bytes):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
  if isinstance(values[0], float):
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))
  return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def write(path, records, options=None):
  with tf.io.TFRecordWriter(str(path), options) as writer:
    for record in records:
      features = {k: feature(*v) for k, v in record.items()}
      writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
  return str(path)


@pytest.fixture
def file(tmp_path):
  return write(tmp_path / 'a.tfrecord', [{'video': [frame(i, t) for t in range(3)], 'label': [i]} for i in range(4)])


@pytest.mark.parametrize(('name', 'key'), [('tiny_test_clips', 'video'), ('tiny_test_pictures', 'image')])
def test_bytes_are_those_of_tfds(prepared, name, key):
  builder = tfds.builder(name, data_dir=prepared)
  files = builder.info.splits['train'].filepaths
  index = frame_index.load_or_build(files, key)
  skip = {key: tfds.decode.SkipDecoding()}
  options = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  examples = list(tfds.as_numpy(builder.as_dataset(split='train', decoders=skip, read_config=options)))
  assert len(index.shard) == len(examples) > 0
  for record, example in enumerate(examples):
    assert encoded(index, record) == np.atleast_1d(example[key]).tolist()
    for column, values in index.columns.items():
      assert values[record] == example[column]
  assert set(index.height) == {tiny_datasets.HEIGHT} and set(index.width) == {tiny_datasets.WIDTH}
  if key == 'video':
    assert len(set(index.shard)) == 3
    assert set(index.columns) == {'label', 'id', 'fps', 'shift'}  # not 'box', which has four values
    assert index.columns['shift'].min() < 0 and index.columns['fps'].dtype == np.float32
    assert index.columns['id'].dtype.kind == 'S'


def test_frames_of_any_length_are_found(tmp_path):
  # Lengths around the steps of the varint that stands before each frame; the first one is an image.
  lengths = [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21]
  frames = [frame(0, 0), *(os.urandom(n) for n in lengths)]
  index = frame_index.load_or_build([write(tmp_path / 'a', [{'video': frames}, {'video': frames[::-1][-1:]}])], 'video')
  assert encoded(index, 0) == frames and encoded(index, 1) == frames[:1]


def test_columns_are_what_every_record_has_once(tmp_path):
  image = [frame(0, 0)]
  records = [
    {'image': image, 'big': [2**63 - 1], 'low': [-(2**63)], 'some': [1], 'list': [1, 2], 'mask': [b'x' * 2000]},
    {'image': image, 'big': [0], 'low': [-1], 'list': [1], 'mask': [b'x']},
  ]
  index = frame_index.load_or_build([write(tmp_path / 'a', records)], 'image')
  assert {k: v.tolist() for k, v in index.columns.items()} == {'big': [2**63 - 1, 0], 'low': [-(2**63), -1]}


def test_records_without_frames_and_empty_files(tmp_path):
  files = [tmp_path / 'empty', tmp_path / 'a']
  files[0].touch()
  write(files[1], [{'video': [frame(0, 0)], 'label': [5]}])
  with tf.io.TFRecordWriter(str(files[1])) as writer:
    features = {'video': tf.train.Feature(bytes_list=tf.train.BytesList()), 'label': feature(5)}
    writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
  index = frame_index.load_or_build(files, 'video')
  assert index.shard.tolist() == [1] and np.diff(index.pointer).tolist() == [0] and index.height.tolist() == [0]


def test_index_is_built_once_and_again_when_a_file_changes(file, monkeypatch):
  builds = []
  build = frame_index._build
  monkeypatch.setattr(frame_index, '_build', lambda *a: builds.append(1) or build(*a))
  first = frame_index.load_or_build([file], 'video')
  again = frame_index.load_or_build([file], 'video')
  assert len(builds) == 1
  assert [encoded(again, r) for r in range(4)] == [encoded(first, r) for r in range(4)]
  assert again.columns['label'].tolist() == [0, 1, 2, 3]

  size = os.stat(file).st_size
  write(file, [{'video': [frame(3 - i, t) for t in range(3)], 'label': [i]} for i in range(4)])
  assert os.stat(file).st_size == size  # the time of change alone tells
  changed = frame_index.load_or_build([file], 'video')
  assert len(builds) == 2 and encoded(changed, 0)[0] == frame(3, 0)
  assert len([f for f in os.listdir(os.path.dirname(file)) if 'frame_index' in f]) == 1


def cache_of(file):
  (cache,) = Path(file).parent.glob('frame_index-*.npz')
  return cache


def same_index(a, b):
  fields = ('shard', 'start', 'pointer', 'length', 'checksum', 'height', 'width')
  same = [np.array_equal(getattr(a, f), getattr(b, f)) for f in fields]
  return (
    all(same)
    and a.columns.keys() == b.columns.keys()
    and all(np.array_equal(a.columns[c], b.columns[c]) for c in a.columns)
  )


def test_a_damaged_index_is_built_again(file):
  index = frame_index.load_or_build([file], 'video')
  cache = cache_of(file)
  good = cache.read_bytes()
  rng = np.random.default_rng(0)
  damaged = [b'', b'garbage', good[: len(good) // 2], good[:-1], good + b'more', bytes(len(good))]
  for _ in range(60):
    flipped = bytearray(good)
    flipped[rng.integers(len(good))] ^= 1 << rng.integers(8)
    damaged.append(bytes(flipped))
  for data in damaged:
    cache.write_bytes(data)
    assert same_index(frame_index.load_or_build([file], 'video'), index)


def test_an_array_whose_length_is_damaged_is_noticed(tmp_path):
  # NumPy takes it for a shorter array, and does not come to where the archive's own checksum is compared.
  path = tmp_path / 'a.npz'
  array_cache.save(str(path), 'key', {'x': np.arange(9000)})
  key, arrays = array_cache.load(str(path))
  assert key == 'key' and arrays.keys() == {'x'} and arrays['x'].tolist() == list(range(9000))
  path.write_bytes(path.read_bytes().replace(b'(9000,)', b'(1000,)'))
  with np.load(path) as stored:
    assert len(stored['x']) == 1000
  assert array_cache.load(str(path)) is None


def test_an_index_of_an_earlier_version_is_built_again_and_said(file, caplog):
  index = frame_index.load_or_build([file], 'video')
  cache = cache_of(file)
  with np.load(cache) as stored:
    np.savez(cache, key='["1"]', **{n: stored[n] for n in stored.files if n != 'checksum' and not n.startswith('.')})
  with caplog.at_level(logging.INFO, logger='absl'):
    assert same_index(frame_index.load_or_build([file], 'video'), index)
  assert 'earlier version' in caplog.text and 'Indexing the frames' in caplog.text
  assert array_cache.load(str(cache)) is not None


def test_an_index_of_another_dataset_is_built_again(file, tmp_path):
  """Same names, sizes and times of change: the checksum at the end of the file tells."""
  frame_index.load_or_build([file], 'video')
  changed = os.stat(file).st_mtime_ns
  write(file, [{'video': [frame(i, t) for t in range(3)], 'label': [i + 1]} for i in range(4)])
  os.utime(file, ns=(changed, changed))
  assert frame_index.load_or_build([file], 'video').columns['label'].tolist() == [1, 2, 3, 4]


_OPEN = """
import sys, time
from data_pipelines.storage import frame_index
file, folder, number = sys.argv[1:]
build = frame_index._build
def slow(*args):
  open(f'{folder}/walk-{number}', 'w').close()
  time.sleep(1)
  return build(*args)
frame_index._build = slow
open(f'{folder}/ready-{number}', 'w').close()
while not __import__('os').path.exists(f'{folder}/go'):
  time.sleep(0.01)
assert frame_index.load_or_build([file], 'video').columns['label'].tolist() == [0, 1, 2, 3]
"""


def opening(file, folder, number):
  return subprocess.Popen([sys.executable, '-c', _OPEN, file, str(folder), str(number)])


def test_of_processes_that_open_an_unindexed_set_one_walks_it(file, tmp_path):
  folder = tmp_path / 'told'
  folder.mkdir()
  processes = [opening(file, folder, i) for i in range(4)]
  while len(list(folder.glob('ready-*'))) < 4:
    assert all(p.poll() is None for p in processes)
    time.sleep(0.01)
  (folder / 'go').touch()
  assert [p.wait(60) for p in processes] == [0] * 4
  assert len(list(folder.glob('walk-*'))) == 1
  assert sorted(f.name for f in tmp_path.iterdir()) == ['a.tfrecord', cache_of(file).name, 'told']  # no lock is left


def test_a_process_that_dies_while_it_walks_frees_the_others(file, tmp_path):
  folder = tmp_path / 'told'
  folder.mkdir()
  (folder / 'go').touch()
  first = opening(file, folder, 0)
  while not (folder / 'walk-0').exists():
    assert first.poll() is None
    time.sleep(0.01)
  first.kill()
  first.wait()
  begin = time.monotonic()
  assert len(frame_index.load_or_build([file], 'video').shard) == 4
  assert time.monotonic() - begin < 5
  assert not list(tmp_path.glob('*.lock'))


def test_where_no_lock_can_be_had_everybody_walks(file, monkeypatch):
  def refuse(*args):
    raise OSError(38, 'Function not implemented')  # of file systems without locks

  monkeypatch.setattr(fcntl, 'flock', refuse)
  assert len(frame_index.load_or_build([file], 'video').shard) == 4


def test_read_only_data_is_cached_in_the_users_directory(file, home, monkeypatch):
  save = array_cache.save

  def refuse(path, *args):
    if home not in Path(path).parents:
      raise PermissionError(13, 'Permission denied', str(path))
    save(path, *args)

  monkeypatch.setattr(array_cache, 'save', refuse)
  frame_index.load_or_build([file], 'video')
  assert len(list(home.rglob('*.npz'))) == 1
  monkeypatch.setattr(frame_index, '_build', None)  # must not be called
  frame_index.load_or_build([file], 'video')


def test_index_works_where_nothing_can_be_written(file, monkeypatch):
  def refuse(path, *args):
    raise OSError(28, 'No space left on device', str(path))

  monkeypatch.setattr(array_cache, 'save', refuse)
  assert len(frame_index.load_or_build([file], 'video').shard) == 4


def test_failed_save_leaves_nothing_behind(file, monkeypatch, home):
  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', fail)
  frame_index.load_or_build([file], 'video')
  assert os.listdir(os.path.dirname(file)) in (['a.tfrecord'], ['a.tfrecord', 'home'], ['home', 'a.tfrecord'])
  assert not [f for f in home.rglob('*') if f.is_file()]


def refused(file, key='video'):
  with pytest.raises(UserError) as e:
    frame_index.load_or_build([file], key)
  assert '\n' not in str(e.value) and str(file) in str(e.value)
  assert not [f for f in os.listdir(os.path.dirname(file)) if 'frame_index' in f]
  return str(e.value)


def test_truncated_files_are_named_with_their_byte(file):
  data = Path(file).read_bytes()
  begins = [0]
  while begins[-1] < len(data):
    begins.append(begins[-1] + 16 + int.from_bytes(data[begins[-1] : begins[-1] + 8], 'little'))
  assert len(begins) == 5
  for record, cut in ((3, len(data) - 1), (2, begins[2] + 500), (2, begins[2] + 5), (0, 3)):
    Path(file).write_bytes(data[:cut])
    assert f'byte {begins[record]}:' in refused(file)
  Path(file).write_bytes(data[: begins[2]])  # cut between records: dataset_info.json tells, see open_source
  assert len(frame_index.load_or_build([file], 'video').shard) == 2


def test_other_files_are_named(file, tmp_path):
  data = Path(file).read_bytes()
  Path(file).write_bytes(gzip.compress(b'no records'))
  assert 'byte 0: the file ends within the header of a record' in refused(file)
  Path(file).write_bytes(gzip.compress(data)[:-30])
  assert 'gzipped file is damaged' in refused(file)
  write(file, [{'video': [frame(0, 0)]}], tf.io.TFRecordOptions(compression_type='ZLIB'))
  assert 'expected a TFRecord' in refused(file)
  Path(file).write_bytes(b'just text, nothing else' * 10)
  refused(file)
  with tf.io.TFRecordWriter(file) as writer:
    writer.write(b'\xff' * 40)
  assert 'no tf.train.Example' in refused(file)
  with tf.io.TFRecordWriter(file) as writer:
    writer.write(b'\x0a\x7f')  # a length that leads out of the record
  assert 'no tf.train.Example' in refused(file)
  write(file, [{'video': [b'no image']}])
  assert 'no image' in refused(file)
  write(file, [{'movie': [frame(0, 0)]}])
  assert "without the feature 'video'" in refused(file)
  shutil.move(file, tmp_path / 'gone')
  assert 'No such file' in refused(file)


def test_random_damage_never_goes_unnoticed_or_escapes(file, tmp_path, monkeypatch):
  # A damaged byte gives an index or a UserError, nothing else, and never a frame outside the file.
  data = Path(file).read_bytes()
  monkeypatch.setattr(array_cache, 'load', lambda *a: None)
  rng = np.random.default_rng(0)
  for _ in range(150):
    damaged = bytearray(data)
    damaged[rng.integers(60)] = rng.integers(256)
    Path(file).write_bytes(damaged)
    try:
      index = frame_index.load_or_build([file], 'video', str(tmp_path / 'none'))
    except UserError:
      continue
    for record in range(len(index.shard)):
      offset, length = index.frames(record)
      assert (offset + length <= len(data)).all()
