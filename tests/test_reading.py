"""Files of every kind give the same sources and the same batches; only what a clip reads differs."""

import contextlib
import gzip
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines import sources
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.mixture import MERGED
from data_pipelines.loading.views import Stream
from data_pipelines.sources import open_tfds
from data_pipelines.storage import frame_index, reading
from tests import tiny_datasets

CLIPS = {'dataset': 'tiny_test_clips', 'train': 'train'}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  path = tmp_path_factory.mktemp('plain')
  tiny_datasets.build(path)
  return path


@pytest.fixture
def packed(plain, tmp_path):
  """The same dataset with gzipped files."""
  for file in plain.rglob('*'):
    if file.is_file() and 'frame_index' not in file.name:
      copy = tmp_path / 'packed' / file.relative_to(plain)
      copy.parent.mkdir(parents=True, exist_ok=True)
      data = file.read_bytes()
      copy.write_bytes(gzip.compress(data, 1) if 'tfrecord' in file.name else data)
  return tmp_path / 'packed'


def put(path, data):
  if tf.io.gfile.exists(path):
    tf.io.gfile.remove(path)  # in memory, writing appends
  with tf.io.gfile.GFile(path, 'wb') as f:
    f.write(data)


@pytest.fixture
def remote(monkeypatch):
  """Lets files of the datasets be read from TensorFlow's file system in memory."""
  load_or_build = frame_index.load_or_build

  def moved(files, *args, **kwargs):
    for file in files if not reading.is_remote(files[0]) else ():
      put(f'ram://{file}', Path(file).read_bytes())
    return load_or_build([f if reading.is_remote(f) else f'ram://{f}' for f in files], *args, **kwargs)

  monkeypatch.setattr(frame_index, 'load_or_build', moved)


def opened(data_dir, **settings):
  return open_tfds.open_source('clips', CLIPS | {'data_dir': str(data_dir)} | settings, 'train')


def build_array_record(data_dir):
  tfds.builder('tiny_test_clips', data_dir=data_dir, file_format='array_record').download_and_prepare()
  return data_dir


def by_id(source, example):
  return str(source.ids[example], 'utf8'), [bytes(f) for f in all_frames(source, example)]


def all_frames(source, example):
  return sources.read(source, example, np.arange(source.num_frames[example]))


def same_batches(a, b):
  alike = jax.tree.map(np.array_equal, [dict(x['v']) for x in a], [dict(y['v']) for y in b])
  return all(jax.tree.leaves(alike))


def test_all_kinds_of_files_hold_the_same(plain, packed, tmp_path, remote, monkeypatch):
  in_memory = opened(plain)
  monkeypatch.undo()
  source = opened(plain)
  expected = dict(by_id(source, i) for i in range(source.num_examples))
  assert len(expected) == 20
  for other in (in_memory, opened(packed), opened(build_array_record(tmp_path / 'array'))):
    assert dict(by_id(other, i) for i in range(other.num_examples)) == expected
    assert sorted(other.label) == sorted(source.label) and sorted(other.height) == sorted(source.height)
    assert sources.read(other, 3, np.array([0, 0])) == [all_frames(other, 3)[0]] * 2


def test_the_log_says_once_what_unusual_files_cost(plain, packed, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'info', lambda text, *args: said.append(text % args))
  open_tfds._say_once.cache_clear()
  opened(plain)
  assert not any('is read from' in s for s in said)
  opened(packed)
  opened(packed)
  opened(build_array_record(tmp_path / 'array'))
  assert [s.split('is read from ')[1].split()[0] for s in said if 'is read from' in s] == ['gzipped', 'ArrayRecord']


# Object storage.


def test_a_clip_in_object_storage_is_one_read(plain, remote, monkeypatch):
  source = opened(plain)
  example = int(np.argmax(source.num_frames))
  reads = []
  read = tf.io.gfile.GFile.read
  monkeypatch.setattr(tf.io.gfile.GFile, 'read', lambda f, n=-1: reads.append(n) or read(f, n))
  frames = sources.read(source, example, np.array([5, 2, 3]))
  offset, length = source.frames.frames(source.rows[example])
  assert reads == [offset[5] + length[5] - offset[2]]
  assert frames == [all_frames(source, example)[i] for i in (5, 2, 3)]


def test_batches_from_object_storage_are_those_of_the_disk(plain, remote, monkeypatch):
  streams = {'v': Stream((0,), 3, 16, 8)}
  stored = list(loader.train_batches([opened(plain)], streams, 3, num_steps=4))
  monkeypatch.undo()
  assert same_batches(stored, loader.train_batches([opened(plain)], streams, 3, num_steps=4))


def test_an_index_that_moved_with_its_files_is_used(plain, remote, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  source = opened(plain)
  assert not list(tmp_path.rglob('*.npz'))  # it is kept beside the files
  monkeypatch.setattr(frame_index, '_build', None)  # must not be called
  assert [by_id(opened(plain), i) for i in range(20)] == [by_id(source, i) for i in range(20)]
  # An index that was made on a disk knows times of change; objects have other ones.
  name = next(n for n in tf.io.gfile.listdir(os.path.dirname(source.frames.files[0])) if n.endswith('.npz'))
  monkeypatch.undo()
  local = next(Path(opened(plain).frames.files[0]).parent.glob('*.npz'))
  put(f'{os.path.dirname(source.frames.files[0])}/{name}', local.read_bytes())
  monkeypatch.setattr(frame_index, '_build', None)
  assert len(frame_index.load_or_build(source.frames.files, 'video').shard) == 20


def test_changed_and_missing_objects_are_named(plain, remote):
  source = opened(plain)
  file = source.frames.files[source.frames.shard[source.rows[0]]]
  with tf.io.gfile.GFile(file, 'rb') as f:
    data = f.read()
  put(file, data[:40])
  with pytest.raises(UserError, match='has been damaged or changed'):
    all_frames(source, 0)
  with pytest.raises(UserError, match=f'{file}, record 0, byte 0: the file is truncated'):
    frame_index.load_or_build([file], 'video')
  tf.io.gfile.remove(file)
  with pytest.raises(UserError, match=r'ram://.* has been damaged or changed: .* it cannot be read'):
    all_frames(source, 0)
  with pytest.raises(UserError, match='Cannot read ram://'):
    frame_index.load_or_build([file], 'video')


# Files that are read in order.


def test_gzipped_files_are_read_forwards_once_a_pass(packed, monkeypatch):
  source = opened(packed)
  starts = []
  records = reading._unpacked
  monkeypatch.setattr(reading, '_unpacked', lambda file: starts.append(file) or records(file))
  stream = Stream((0,), 2, 16, 5)
  batches = list(loader.train_batches([source], {'v': stream}, 7, num_steps=8))
  passes = np.concatenate([b['v']['example_id'] for b in batches]).reshape(2, 20)
  assert [sorted(p) for p in passes] == [list(range(20))] * 2 and passes[0].tolist() != passes[1].tolist()
  assert len(starts) == len(set(starts)) * 2 == 6
  # A batch shows several files, not one after the other.
  shards = source.frames.shard[source.rows]
  assert len(set(shards[passes[0][:10]])) > 1


def test_a_pass_keeps_the_order_of_every_file(packed):
  source = opened(packed)
  mixture = loader.stream_mixture('v', [source], Stream((0,), 2, 16, 4), 1)
  for epoch in range(3):
    _, example = mixture.locate(epoch * 20 + np.arange(20))
    for shard in range(3):
      assert (np.diff(example[source.frames.shard[source.rows][example] == shard]) > 0).all()


def test_gzipped_files_restart_and_split_as_others(packed, plain):
  both = [opened(packed), opened(plain)]  # a stream may have sources of both kinds
  streams = {'v': Stream((0, 1), 2, 16, 8)}
  whole = list(loader.train_batches(both, streams, 3, num_steps=8))
  assert same_batches(loader.train_batches(both, streams, 3, start_step=5, num_steps=3), whole[5:])
  parts = [loader.train_batches(both, streams, 3, num_steps=8, process_index=i, process_count=2) for i in range(2)]
  joined = [jax.tree.map(lambda *x: np.concatenate(x), *both) for both in zip(*parts, strict=True)]
  assert same_batches(joined, whole)


def test_gzipped_files_are_evaluated_like_others(packed, plain):
  stream = Stream((0,), 2, 16, 1)
  of_both = [loader.eval_batches(opened(d), 0, stream, 8) for d in (packed, plain)]
  for a, b in zip(*of_both, strict=True):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


def test_two_streams_over_one_source_do_not_disturb_each_other(packed, monkeypatch):
  source = opened(packed)
  starts = []
  records = reading._unpacked
  monkeypatch.setattr(reading, '_unpacked', lambda file: starts.append(file) or records(file))
  streams = {'v': Stream((0,), 2, 16, 4), 'w': Stream((0,), 1, 16, 4)}
  both = list(loader.train_batches([source], streams, 3, num_steps=5))
  assert len(starts) == 6  # each stream goes through the three files once
  alone = loader.train_batches([source], {'v': streams['v']}, 3, num_steps=5)
  assert same_batches([{'v': b['v']} for b in both], alone)


def test_more_gzipped_files_than_may_be_open(tmp_path):
  data_dir = tmp_path / 'many'
  config = tfds.download.DownloadConfig(num_shards=MERGED + 3)
  tfds.builder('tiny_test_clips', data_dir=data_dir).download_and_prepare(download_config=config)
  for file in data_dir.rglob('*tfrecord*'):
    file.write_bytes(gzip.compress(file.read_bytes(), 1) if file.stat().st_size else b'')
  source = opened(data_dir)
  backwards = {by_id(source, i)[0] for i in reversed(range(20))}
  assert len(backwards) == 20


def test_damaged_files_of_any_kind_are_a_sentence(packed, tmp_path):
  rng = np.random.default_rng(0)
  for data_dir in (packed, build_array_record(tmp_path / 'array')):
    good = opened(data_dir)
    file = Path(good.frames.files[0])
    data = file.read_bytes()
    for i in range(40):
      damaged = bytearray(data[: rng.integers(len(data))] if i % 4 == 0 else data)
      for place in rng.integers(0, len(damaged), 3) if damaged else ():
        damaged[place] = rng.integers(256)
      file.write_bytes(damaged)
      with contextlib.suppress(UserError):
        frame_index.load_or_build([str(file)], 'video', str(tmp_path / 'cache'))
      with contextlib.suppress(UserError):
        for example in np.flatnonzero(good.frames.shard[good.rows] == 0):
          all_frames(sources.unshared(good), example)


def test_a_damaged_gzipped_file_is_named_while_it_is_read(packed):
  source = opened(packed)
  for file in source.frames.files:
    os.truncate(file, 200)
  with pytest.raises(UserError, match='has been damaged or changed'):
    next(loader.train_batches([source], {'v': Stream((0,), 2, 16, 20)}, 0))
