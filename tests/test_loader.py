"""Sources and batches: the right bytes, the right rows, on any number of processes, from any step."""

import io
import os
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import contract, sources
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays, loader
from data_pipelines.loading.views import Stream, plan
from data_pipelines.sources import open_tfds
from tests import tiny_datasets

H, W = tiny_datasets.HEIGHT, tiny_datasets.WIDTH
CLIPS = {'dataset': 'tiny_test_clips', 'train': 'train', 'test': 'validation'}
PICTURES = {'dataset': 'tiny_test_pictures', 'train': 'train', 'label_key': 'fine'}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  tiny_datasets.build(path)
  return str(path)


@pytest.fixture(scope='module')
def run(data_dir):
  """Sources and streams of a small run."""
  opened = [
    open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir, 'flip': True}, 'train'),
    open_tfds.open_source('more', CLIPS | {'data_dir': data_dir, 'sampler': 'segments'}, 'test'),
    open_tfds.open_source('pictures', PICTURES | {'data_dir': data_dir}, 'train'),
  ]
  streams = {'video': Stream((0, 1), 3, (16, 20), 8), 'image': Stream((2,), 1, 16, 4)}
  return opened, streams


def in_memory(count, name='arrays', frames=5, **settings):
  videos = [np.full((frames, 12, 16, 3), i, np.uint8) for i in range(count)]
  return arrays.array_source(name, videos, list(range(count)), tuple(map(str, range(count))), **settings)


def same(a, b):
  return a.keys() == b.keys() and all(
    same(a[k], b[k]) if isinstance(a[k], dict) else np.array_equal(a[k], b[k]) for k in a
  )


# Sources.


def test_source_is_what_the_dataset_says(data_dir):
  source = open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir}, 'train')
  assert (source.modality, source.class_names, source.num_examples) == ('video', ('a', 'b', 'c'), 20)
  pictures = open_tfds.open_source('pictures', PICTURES | {'data_dir': data_dir}, 'train')
  assert (pictures.modality, pictures.class_names) == ('image', ('0', '1', '2', '3'))
  assert set(pictures.num_frames) == {1} and Counter(pictures.label) == {0: 3, 1: 2, 2: 2, 3: 2}
  unlabelled = open_tfds.open_source('p', PICTURES | {'data_dir': data_dir, 'label_key': None}, 'train')
  assert unlabelled.class_names == () and set(unlabelled.label) == {-1}


@pytest.mark.parametrize('split', ['train', 'train[:50%]', 'train[3:7]', 'train+validation', 'validation+train[15:]'])
def test_any_split_holds_the_examples_that_tfds_gives(data_dir, split):
  source = open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir, 'train': split}, 'train')
  builder = tfds.builder('tiny_test_clips', data_dir=data_dir)
  expected = [int(str(e['id'], 'utf8').split()[1]) for e in tfds.as_numpy(builder.as_dataset(split=split))]
  found = [int(i.split()[1]) for i in source.frames.columns['id'][source.rows]]
  assert sorted(found) == sorted(expected) and len(found) == source.num_examples
  for example, video in enumerate(found):
    assert source.num_frames[example] == tiny_datasets.num_frames(video) and source.label[example] == video % 3
    last = source.num_frames[example] - 1
    assert sources.read(source, example, np.array([last, 0])) == [
      tiny_datasets.frame(video, last), tiny_datasets.frame(video, 0)
    ]  # fmt: skip


def test_subsplits_share_one_index(data_dir):
  where = os.path.join(data_dir, 'tiny_test_clips', '1.0.0')
  for split in ('train', 'train[:10%]', 'train[50%:]'):
    open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir, 'train': split}, 'train')
  before = set(os.listdir(where))
  open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir, 'train': 'train[2:3]'}, 'train')
  assert set(os.listdir(where)) == before


def test_a_clip_reads_its_own_frames_and_no_others(data_dir, monkeypatch):
  source = open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir}, 'train')
  example = int(np.argmax(source.num_frames))
  assert source.num_frames[example] == 7
  reads = []
  pread = os.pread
  monkeypatch.setattr(os, 'pread', lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
  frames = sources.read(source, example, np.array([5, 2, 5, 5]))
  assert len(reads) == 2 and sum(reads) == len(frames[0]) + len(frames[1])
  assert frames[0] == frames[2] == frames[3] != frames[1]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dataset': 'tiny_test_clip'}, 'close matches: tiny_test_clips'),
    ({'dataset': 'tiny_test_clips:9.0.0'}, 'cannot be loaded at version 9.0.0'),
    ({'dataset': 'moving_digits/nothing'}, 'nothing'),
    ({'dataset': 'mnist'}, 'tfds build mnist --data_dir='),
    ({'train': 'trian'}, 'close matches: train'),
    ({'train': 'train[:x]'}, 'it has train, validation'),
    ({'train': 'train[:500]'}, r'Requested slice'),
    ({'train': 'train[0:0]'}, 'no examples'),
    ({'frames_key': 'id'}, "frames_key is 'id'"),
    ({'label_key': 'id'}, "label_key is 'id'"),
    ({'dataset': 'tiny_test_pictures', 'label_key': ''}, 'coarse, fine'),
    ({'sampler': 'random'}, "sampler of source 'clips'"),
    ({'stride': 0}, 'stride'),
    ({'crop_scale': (0.5, 2)}, 'crop_scale'),
    ({'crop_ratio': (0, 2)}, 'crop_ratio'),
    ({'data_dir': 'nowhere://bucket'}, 'Cannot open dataset'),
  ],
)
def test_mistakes_are_one_sentence(data_dir, change, message):
  with pytest.raises(UserError, match=message) as e:
    open_tfds.open_source('clips', CLIPS | {'data_dir': data_dir} | change, 'train')
  assert '\n' not in str(e.value)


def test_missing_keys_and_other_formats(data_dir, tmp_path, monkeypatch):
  with pytest.raises(UserError, match="lacks the key 'train'"):
    open_tfds.open_source('clips', {'dataset': 'x'}, 'train')
  with pytest.raises(UserError, match="coarse, fine; label_key is ''"):
    open_tfds.open_source('p', {'dataset': 'tiny_test_pictures', 'train': 'train', 'data_dir': data_dir}, 'train')
  builder = tfds.builder('tiny_test_clips', data_dir=tmp_path, file_format='riegeli')
  monkeypatch.setattr(builder, 'is_prepared', lambda: True)
  monkeypatch.setattr(tfds, 'builder', lambda *args, **kwargs: builder)
  with pytest.raises(UserError, match='stored as riegeli; expected tfrecord'):
    open_tfds.open_source('clips', CLIPS | {'data_dir': str(tmp_path)}, 'train')


def test_shortened_file_is_named(tmp_path):
  tiny_datasets.build(tmp_path)
  source = open_tfds.open_source('clips', CLIPS | {'data_dir': str(tmp_path)}, 'train')
  file = source.frames.files[source.frames.shard[source.rows[0]]]
  os.truncate(file, 100)
  with pytest.raises(UserError, match='has been damaged or changed'):
    sources.read(source, 0, np.array([0]))
  with pytest.raises(UserError, match='has been damaged or changed'):
    next(loader.train_batches([source], {'v': Stream((0,), 2, 8, 20)}, 0))
  with pytest.raises(UserError, match='truncated'):
    open_tfds.open_source('clips', CLIPS | {'data_dir': str(tmp_path)}, 'train')


# The plan: pure numpy.


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 2**40), st.integers(0, 10**9))
def test_processes_split_the_rows_of_one(counts, seed, step):
  members = [in_memory(n, str(i)) for i, n in enumerate(counts)]
  stream = Stream(tuple(range(len(members))), 2, 8, 8)
  mixture = loader.stream_mixture('video', members, stream, seed)
  whole = loader.train_rows(stream, mixture, step)
  for count in (2, 4, 8):
    parts = [loader.train_rows(stream, mixture, step, i, count) for i in range(count)]
    for field in ('position', 'source', 'example', 'mask'):
      assert np.array_equal(np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_evaluation_counts_each_example_once(count, local, processes):
  seen, steps = [], -(-count // (local * processes))
  for process in range(processes):
    for step in range(steps):
      rows = loader.eval_rows(count, 3, local * processes, step, process, processes)
      assert len(rows.mask) == local and set(rows.source) == {3} and rows.example.max() < count
      seen += rows.example[rows.mask].tolist()
  assert sorted(seen) == list(range(count))


def test_plan_is_a_function_of_seed_stream_and_position():
  source = in_memory(4, frames=50, flip=True)
  stream = Stream((0,), 4, 8, 4)

  def plans(seed, name):
    mixture = loader.stream_mixture(name, [source], stream, seed)
    views = [plan(source, 0, stream, loader.augmentation_rng(mixture, p))['clip'] for p in range(20)]
    return [(v.frames.tolist(), v.box, v.flip) for v in views]

  assert plans(0, 'a') == plans(0, 'a')
  assert plans(0, 'a') != plans(1, 'a') and plans(0, 'a') != plans(0, 'b')
  assert {flip for _, _, flip in plans(0, 'a')} == {True, False}
  assert len({str(p) for p in plans(0, 'a')}) == 20


def test_without_rng_the_plan_is_the_centre_and_never_flips():
  source = in_memory(1, frames=9, flip=True, stride=2)
  view = plan(source, 0, Stream((0,), 3, 8, 1), None)['clip/000']
  assert view.frames.tolist() == [2, 4, 6] and view.box == (0, 2, 12, 12) and view.flip is False


def test_array_batches_agree_with_the_rows_and_resume():
  members = [in_memory(7, 'a'), in_memory(5, 'b', flip=True)]
  streams = {'video': Stream((0, 1), 2, 8, 4)}
  run = list(arrays.array_batches(members, streams, 3, num_steps=6))
  assert len(run) == 6
  for step, batch in enumerate(run):
    video = batch['video']
    assert video['views']['clip'].shape == (4, 2, 8, 8, 3) and video['views']['clip'].dtype == np.uint8
    assert (video['views']['clip'][:, 0, 0, 0, 0] == video['label']).all()
    late = arrays.array_batches(members, streams, 3, start_step=step, num_steps=1)
    assert same(next(late), batch)
  first_epoch = Counter(
    (s, i) for b in run[:3] for s, i in zip(b['video']['source'], b['video']['example_id'], strict=True)
  )
  assert len(first_epoch) == 12 and set(first_epoch.values()) == {1}
  seen = [e for b in arrays.array_eval_batches(members[0], 0, streams['video'], 4) for e in b['example_id'][b['mask']]]
  assert seen == list(range(7))


def test_arrays_need_no_tensorflow():
  code = 'import sys; from data_pipelines.loading import arrays; sys.exit("tensorflow" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


def test_streams_are_checked():
  video, image = in_memory(3, 'v'), in_memory(3, 'i', frames=1, modality='image')
  for make in (arrays.array_batches, loader.train_batches):
    with pytest.raises(UserError, match="Image source 'i' is in stream 's' of 4 frames"):
      make([video, image], {'s': Stream((0, 1), 4, 8, 4)}, 0)
    with pytest.raises(UserError, match='batch_size of stream'):
      make([video], {'s': Stream((0,), 4, 8, 6)}, 0, process_count=4)
    with pytest.raises(UserError, match='weights'):
      make([video], {'s': Stream((0,), 4, 8, 4, weights={'other': 1})}, 0)
  (batch,) = arrays.array_batches([video], {'s': Stream((0,), 1, 8, 2)}, 0, num_steps=1)
  assert batch['s']['views']['clip'].shape == (2, 1, 8, 8, 3)


# TensorFlow: only a few, since each builds a graph.


def test_batches_keep_the_contract_and_show_the_planned_frames(run):
  opened, streams = run
  batches = list(loader.train_batches(opened, streams, seed=5, num_steps=4))
  assert len(batches) == 4
  assert batches[0].keys() == {'video', 'image'}
  seen = Counter()
  for step, batch in enumerate(batches):
    for name, stream in streams.items():
      sub = batch[name]
      mixture = loader.stream_mixture(name, opened, stream, 5)
      rows = loader.train_rows(stream, mixture, step)
      clip = (np.uint8, (stream.batch_size, stream.num_frames, *stream.height_width, 3))
      ids = dict.fromkeys(('label', 'source', 'example_id', 'video_id'), (np.int32, (stream.batch_size,)))
      mask = (np.bool_, (stream.batch_size,))
      found = jax.tree.map(lambda x: (x.dtype, x.shape), dict(sub))
      assert found == {'views': {'clip': clip}, 'targets': {}, **ids, 'mask': mask}
      assert np.array_equal(sub['source'], rows.source) and np.array_equal(sub['example_id'], rows.example)
      assert sub['mask'].all()
      for i in range(stream.batch_size):
        source, example = opened[rows.source[i]], rows.example[i]
        assert sub['label'][i] == source.label[example]
        if name == 'video':
          seen[int(rows.source[i]), int(example)] += 1
          rng = loader.augmentation_rng(mixture, int(rows.position[i]))
          frames = plan(source, int(example), stream, rng)['clip'].frames
          video = int(source.frames.columns['id'][source.rows[example]].split()[1])
          centre = sub['views']['clip'][i, :, 8, 10].astype(int)
          assert abs(centre[:, 0] - video * 8).max() <= 4
          assert abs(centre[:, 1] - frames * 8).max() <= 4
  assert len(seen) == 31 and seen.total() == 32  # 20 + 11 examples: one epoch and one position more


def test_restart_and_processes_give_the_same_batches(run):
  opened, streams = run
  whole = list(loader.train_batches(opened, streams, seed=1, num_steps=3))
  assert same(next(loader.train_batches(opened, streams, seed=1, start_step=2)), whole[2])
  assert not same(next(loader.train_batches(opened, streams, seed=2)), whole[0])
  parts = [
    list(loader.train_batches(opened, streams, 1, num_steps=3, process_index=i, process_count=2)) for i in range(2)
  ]
  for step, batch in enumerate(whole):
    for name, sub in batch.items():
      joined = jax.tree.map(lambda *x: np.concatenate(x), parts[0][step][name], parts[1][step][name])
      assert same(joined, sub)


def test_evaluation_gives_each_example_once_with_padding(run):
  opened, streams = run
  whole = list(loader.eval_batches(opened[0], 0, streams['video'], 8))
  parts = [list(loader.eval_batches(opened[0], 0, streams['video'], 8, i, 4)) for i in range(4)]
  assert len(whole) == 3 and {len(p) for p in parts} == {3}
  ids = np.concatenate([b['example_id'] for b in whole])
  mask = np.concatenate([b['mask'] for b in whole])
  assert ids[mask].tolist() == list(range(20)) and mask.sum() == 20
  assert set(ids[~mask]) == {-1} == set(np.concatenate([b['label'] for b in whole])[~mask])
  for step, batch in enumerate(whole):
    assert same(jax.tree.map(lambda *x: np.concatenate(x), *(p[step] for p in parts)), batch)


def test_a_box_of_the_output_size_comes_out_unchanged(data_dir):
  config = {'crop_scale': (1, 1), 'crop_ratio': (1, 1), 'data_dir': data_dir}
  clips = open_tfds.open_source('clips', CLIPS | config, 'train')
  pictures = open_tfds.open_source('pictures', PICTURES | config, 'train')
  for source in (clips, pictures):
    stream = Stream((0,), 1, (H, W), source.num_examples)
    for batch in (
      next(loader.train_batches([source], {'s': stream}, 0))['s'],
      next(loader.eval_batches(source, 0, stream, source.num_examples)),
    ):
      clips_BxTxHxWx3 = batch['views']['clip'].reshape(-1, 1, H, W, 3)  # evaluation's has a view axis
      for example, clip in zip(batch['example_id'], clips_BxTxHxWx3, strict=True):
        numbers = np.rint(clip[:, 0, 0, 1] / 8).astype(int) if source is clips else np.array([0])
        expected = decode(sources.read(source, int(example), numbers)[0])
        assert np.abs(clip[0].astype(int) - expected).max() <= 2


def decode(encoded):
  return np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB')).astype(int)


def test_several_views_read_their_union_once(run, monkeypatch):
  opened, _ = run
  views = lambda n, rng: {'near': np.array([0, 0]), 'far': np.array([n - 1, 0])}
  asked = []
  read = sources.read
  monkeypatch.setattr(sources, 'read', lambda s, e, numbers: asked.append(list(numbers)) or read(s, e, numbers))
  (batch,) = loader.train_batches(opened, {'v': Stream((0, 1), 2, 8, 31, views=views)}, 0, num_steps=1)
  assert batch['v']['views'].keys() == {'far', 'near'}
  assert len(asked) == 31 and all(a == sorted(set(a)) and len(a) <= 2 for a in asked)
  for i in range(31):
    n = opened[batch['v']['source'][i]].num_frames[batch['v']['example_id'][i]]
    green = batch['v']['views']['far'][i, :, 4, 4, 1].astype(int)
    assert abs(green - [8 * (n - 1), 0]).max() <= 4 and batch['v']['views']['near'][i, :, 4, 4, 1].max() <= 4


def test_undecodable_frames_end_the_run_with_a_sentence(tmp_path):
  tiny_datasets.build(tmp_path)
  source = open_tfds.open_source('clips', CLIPS | {'data_dir': str(tmp_path)}, 'train')
  with open(source.frames.files[source.frames.shard[source.rows[0]]], 'r+b') as f:
    for offset, length in zip(*source.frames.frames(source.rows[0]), strict=True):
      f.seek(offset + 20)
      f.write(b'\0' * (length - 20))
  frames = source.frames.storage.read(source.frames, source.rows[0], range(source.num_frames[0]))
  first = source.frames.pointer[source.rows[0]]
  source.frames.checksum[first : first + len(frames)] = [zlib.crc32(f) for f in frames]  # as if they had been built so
  with pytest.raises(UserError, match="Frame 0 of example 0 of source 'clips'"):
    list(loader.eval_batches(source, 0, Stream((0,), 1, 8, 1), 4))


# The embedded datasets.


def test_embedded_datasets_are_built_once_by_jobs_that_start_together(tmp_path, monkeypatch):
  # flock holds between open files, so two threads show what two processes do, without importing TensorFlow twice.
  builds = []
  build = tfds.core.GeneratorBasedBuilder._download_and_prepare
  counted = lambda *args, **kwargs: builds.append(1) or build(*args, **kwargs)
  monkeypatch.setattr(tfds.core.GeneratorBasedBuilder, '_download_and_prepare', counted)
  config = {'dataset': 'digits', 'test': 'test', 'data_dir': str(tmp_path)}
  with ThreadPoolExecutor(2) as pool:
    found = list(pool.map(lambda _: open_tfds.open_source('digits', config, 'test'), range(2)))
  assert len(builds) == 1
  assert all(len(source.class_names) == 10 and source.num_examples > 100 for source in found)


@pytest.mark.parametrize('reader', ['tensorflow', 'arrays'])
def test_targets_say_how_the_host_cut_each_clip(run, reader):
  """What an objective asks for is there, for each view and in the shapes of the contract, and is the plan's."""
  opened, _ = run
  rng = np.random.default_rng(0)
  if reader == 'arrays':
    opened = (arrays.array_source('a', [rng.integers(0, 256, (n, 16, 20, 3), np.uint8) for n in (4, 7, 9)], flip=True),)
  views = lambda n, rng: {'near': np.array([0, n - 1, 0]), 'far': np.array([n - 1, 0])}
  stream = Stream((0,), 3, 8, 6, views=views, targets=('frames', 'num_frames', 'box', 'flip'))
  make = arrays.array_batches if reader == 'arrays' else loader.train_batches
  (batch,) = make(opened, {'v': stream}, 3, num_steps=1)
  sub, mixture = batch['v'], loader.stream_mixture('v', opened, stream, 3)
  wanted = contract.shapes(6, {'near': 3, 'far': 2}, (8, 8), stream.targets)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(sub)) == wanted
  rows = loader.train_rows(stream, mixture, 0)
  for i, (position, example) in enumerate(zip(rows.position, rows.example, strict=True)):
    planned = plan(opened[0], int(example), stream, loader.augmentation_rng(mixture, int(position)))
    for name, view in planned.items():
      of = {target: values[name][i] for target, values in sub['targets'].items()}
      assert of['frames'].tolist() == view.frames.tolist() and of['flip'] == view.flip
      assert of['num_frames'] == opened[0].num_frames[example]
      shape = opened[0].height[example], opened[0].width[example]
      np.testing.assert_allclose(of['box'], np.array(view.box) / (*shape, *shape), rtol=1e-6)
