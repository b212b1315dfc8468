"""Tests of the leak guard: exclusion and overlaps by record, by file and by original video."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import digits_cover, timesformer_k400
from data_pipelines import build
from data_pipelines.builders import shards
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays
from data_pipelines.sources import leaks, open_tfds
from tests import tiny_datasets
from tests.test_video_files import write


def _source(name, videos, dataset='mine'):
  pixels = lambda clip: np.frombuffer(hashlib.sha256(clip.encode()).digest()[:12], np.uint8).reshape(1, 2, 2, 3)
  clips = [pixels(f'{name} {i}') for i in range(len(videos))]
  source = arrays.array_source(name, clips, list(range(len(videos))), tuple('abcdefgh'[: len(videos)]))
  ids = [f'{v}_{i}' for i, v in enumerate(videos)]
  return dataclasses.replace(
    source, video_names=np.array(videos, 'S'), ids=np.array(ids, 'S'), expected=9, dataset=dataset
  )


def _overlaps(*pair):
  """(training examples, test examples, videos) that two sources share."""
  found = leaks.compare({'': pair[:1]}, pair[1:]).overlaps
  return [(o.train_examples, len(o.tested_M), o.videos) for o in found]


YOUTUBE = ['dQw4w9WgXcQ', '---v8pgm1eQ', '0xreS8KFbrw']


def test_examples_of_excluded_videos_are_left_out():
  train = _source('k700', [YOUTUBE[0], YOUTUBE[1], YOUTUBE[0], 'x' * 11])
  opened = []

  def open_split(dataset, split):
    opened.append((dataset, split))
    return _source('k400', YOUTUBE[:1])

  left = leaks.leave_out(train, ['kinetics/400:validation'], open_split)
  assert opened == [('kinetics/400', 'validation')]
  assert left.label.tolist() == [1, 3] and left.ids.tolist() == [train.ids[1], train.ids[3]]
  assert left.expected is None and left.num_examples == 2
  assert left.rows.tolist() == [1, 3]
  assert leaks.leave_out(train, [], open_split) is train


@pytest.mark.parametrize('table', [True, False])
def test_exclude_from_a_file(tmp_path, table):
  rows = ['label,youtube_id,time_start,time_end,split', *(f'"a, b",{y},0,10,val' for y in YOUTUBE[:2])]
  path = tmp_path / 'val.csv'
  path.write_text('\r\n'.join(rows if table else YOUTUBE[:2]) + '\n')
  left = leaks.leave_out(_source('k700', YOUTUBE), [str(path)], None)
  assert left.video_names.tolist() == [YOUTUBE[2].encode()]


def test_what_cannot_be_excluded_is_said(tmp_path, tiny):
  train = _source('k700', YOUTUBE)
  unnamed = tiny('tiny_test_pictures', label_key='fine')
  empty = tmp_path / 'empty.txt'
  empty.write_text('\n')
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
  cases = [
    (unnamed, 'kinetics/400:validation', 'cannot be compared with'),
    (unnamed, str(empty), 'does not name original videos'),
    (train, 'kinetics/400', 'expected an existing file or dataset:split'),
    (train, str(empty), 'names no video'),
    (train, str(tmp_path / 'latin.txt'), 'cannot be read'),
    (train, 'other:test', 'cannot be compared with'),
    (train, 'same:test', 'leaves no training example'),
  ]
  open_split = lambda dataset, split: unnamed if dataset == 'other' else train
  for source, entry, words in cases:
    with pytest.raises(UserError, match=words):
      leaks.leave_out(source, [entry], open_split)


def test_overlap_between_any_training_and_any_test_split(caplog):
  train = [
    _source('k700', [YOUTUBE[0], YOUTUBE[0], YOUTUBE[1]], 'kinetics/700'),
    _source('mine', ['1', '2'], 'something/a'),
  ]
  tests = [
    _source('k400', [YOUTUBE[0], YOUTUBE[2]], 'kinetics/400'),
    _source('other', ['1', YOUTUBE[1]], 'moments:1.0.0'),
  ]
  found = leaks.compare({'': train}, tests)
  # '1' of two different datasets says nothing; a YouTube id does.
  assert [(o.train, o.test, o.videos, o.train_examples, o.tested_M.tolist()) for o in found.overlaps] == [
    ('k700', 'k400', 1, 2, [0]),
    ('k700', 'other', 1, 1, [1]),
  ]
  same = leaks.compare({'': train[1:]}, [dataclasses.replace(tests[1], dataset='something/b')])
  assert [(o.train, o.test, o.some) for o in same.overlaps] == [('mine', 'other', ('1',))]
  with pytest.raises(UserError, match=r"'k700' trains on 2 examples from 1 original videos .*'k400' .*exclude"):
    leaks.check(found, allowed=False)
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    leaks.check(found, allowed=True)
  assert caplog.text.count('Leak: ') == 2
  leaks.check(leaks.Findings([], []), allowed=False)


def test_the_report_counts_each_tested_example_once():
  train = [_source('k700', YOUTUBE[:2], 'kinetics/700'), _source('k600', YOUTUBE[1:], 'kinetics/600')]
  found = leaks.compare(
    {'': train[:1], '/a/before/': train[1:]}, [_source('k400', [*YOUTUBE, 'x' * 11], 'kinetics/400')]
  )
  report = leaks.report(found, 'unknown')
  assert report == {
    'trained_on': {'k400': {'examples': 3, 'by': ['k600 of before', 'k700']}},
    'not_compared': [],
    'weights': 'unknown',
  }
  assert leaks.sentence(report) == (
    'Leaks: trained on 3 of the tested examples of k400 (by k600 of before, k700). Not all that the weights were '
    'trained on before is known.'
  )
  assert leaks.sentence(leaks.report(leaks.Findings([], ['a']), 'none')) == (
    'Leaks: no tested example was found in training. Not compared with all others: a.'
  )


def test_arrays_are_compared_by_their_pixels():
  a, b = _source('a', ['1', '2', '3'], 'a/x'), _source('b', ['4', '5'], 'b/x')
  assert _overlaps(a, b) == []
  assert _overlaps(a, arrays.array_source('c', [*b.frames, a.frames[2]])) == [(1, 1, 1)]


# ---- Records: splits of one dataset.


@pytest.fixture(scope='module')
def tiny_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiny')
  tiny_datasets.build(path)
  return path


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  """(dataset, split, other keys) -> a source of `tiny_datasets`."""

  def opened(dataset='tiny_test_clips', split='train', **keys):
    return open_tfds.open_source(split, {'dataset': dataset, 'data_dir': str(tiny_dir), 's': split, **keys}, 's')

  return opened


_BOUND = st.none() | st.integers(-11, 11) | st.integers(0, 100).map(lambda n: f'{n}%')
_PART = st.tuples(st.sampled_from(['train', 'validation']), st.none() | st.tuples(_BOUND, _BOUND)).map(
  lambda part: part[0] + ('' if part[1] is None else '[{}:{}]'.format(*('' if b is None else b for b in part[1])))
)
_SPLIT = st.lists(_PART, min_size=1, max_size=3).map('+'.join)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=_SPLIT, test=_SPLIT)
def test_splits_of_one_dataset_overlap_where_their_rows_do(tiny, train, test):
  """Against the ids of the examples, which the guard does not read."""
  try:
    pair = tiny(split=train), tiny(split=test)
  except UserError:
    assume(False)  # a split of no examples
  a, b = (s.ids.tolist() for s in pair)
  assert _overlaps(*pair) == [(sum(i in b for i in a), sum(i in a for i in b), sum(i in a for i in b))] * bool(
    set(a) & set(b)
  )
  open_split = lambda dataset, split: tiny(dataset, split)
  left = [i for i in a if i not in b]
  if left:
    assert leaks.leave_out(pair[0], [f'tiny_test_clips:{test}'], open_split).ids.tolist() == left
  else:
    with pytest.raises(UserError, match='leaves no training example'):
      leaks.leave_out(pair[0], [f'tiny_test_clips:1.0.0:{test}'], open_split)


def test_one_dataset_under_two_names_is_one(tiny, tiny_dir, tmp_path):
  train = tiny(split='train')
  assert _overlaps(train, tiny('tiny_test_clips:1.0.0', 'train[15:]+validation')) == [(5, 5, 5)]
  (tmp_path / 'link').symlink_to(tiny_dir)
  shutil.copytree(tiny_dir, tmp_path / 'copy')
  for place in ('link', 'copy'):
    assert _overlaps(train, tiny(split='all', data_dir=str(tmp_path / place))) == [(20, 20, 20)], place
  assert _overlaps(train, tiny(split='validation', data_dir=str(tmp_path / 'copy'))) == []


def test_pictures_are_compared_and_other_datasets_are_said_not_to_be(tiny, caplog):
  pictures = lambda split, key='fine': tiny('tiny_test_pictures', split, label_key=key)
  assert _overlaps(pictures('train[:5]'), pictures('train[4:]', 'coarse')) == [(1, 1, 1)]
  found = leaks.compare({'': [pictures('train[:4]'), tiny(split='train')]}, [pictures('train[4:]')])
  assert found == ([], ['train', 'train[4:]'])
  with caplog.at_level(logging.INFO):
    leaks.check(found, allowed=False)
  assert caplog.text.count('not compared') == 1 and 'train, train[4:]' in caplog.text


# ---- Files of one's own.


@pytest.fixture
def folder(tmp_path):
  """(name, {file: frames, (file, 'copy' or 'link') of another, or the text of a list}) -> split -> its source."""

  def built(name, files, kind='video_folder'):
    manual = tmp_path / name
    for file, content in files.items():
      path = manual / file
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, str):
        path.write_text(content.replace('ROOT', str(manual)))
      elif isinstance(content, tuple):
        {'copy': shutil.copyfile, 'link': os.symlink}[content[1]](tmp_path / content[0], path)
      elif kind == 'image_folder':
        Image.fromarray(np.full((8, 8, 3), content, np.uint8)).save(path)
      else:
        write(path, content)
    build.main([f'{kind}/{name}', f'--manual_dir={manual}', f'--data_dir={tmp_path}/tfds', '--workers=1'])
    config = {'dataset': f'{kind}/{name}', 'data_dir': f'{tmp_path}/tfds'}
    return lambda split: open_tfds.open_source(f'{name} {split}', config | {'s': split}, 's')

  return built


def test_a_file_is_known_by_its_bytes_wherever_it_lies(folder):
  mine = folder(
    'mine',
    {
      'train/cat/1.mp4': 3,
      'train/cat/2.mp4': 4,
      'train/dog/3.mp4': 5,
      'test/cat/1.mp4': ('mine/train/cat/1.mp4', 'copy'),
      'test/cat/other_name.mp4': ('mine/train/cat/2.mp4', 'link'),
      'test/dog/3.mp4': 6,  # only its path is one of training
    },
  )
  train, test = mine('train'), mine('test')
  assert train.file_sha256.dtype == 'S64' and len(set(train.file_sha256)) == 3
  found = leaks.compare({'': [train]}, [test])
  assert found.not_compared == []
  (o,) = found.overlaps
  assert (o.train_examples, sorted(test.ids[o.tested_M])) == (2, [b'cat/1.mp4', b'cat/other_name.mp4'])
  other = folder('other', {'train/cat/new.mp4': ('mine/test/dog/3.mp4', 'copy'), 'train/cat/1.mp4': 7})
  assert _overlaps(other('train'), test) == [(1, 1, 1)]
  left = leaks.leave_out(other('train'), ['video_folder/mine:test'], lambda _, split: mine(split))
  assert left.ids.tolist() == [b'cat/1.mp4']


def test_lists_of_two_folders_with_equal_paths_share_nothing(folder):
  a = folder('a', {'x/1.mp4': 3, 'x/2.mp4': 4, 'train.txt': 'x/1.mp4 0\n', 'test.txt': 'x/2.mp4 0\n'})
  b = folder('b', {'x/1.mp4': 5, 'train.txt': 'x/1.mp4 0\n'})
  assert a('train').video_names.tolist() == b('train').video_names.tolist() == [b'x/1.mp4']
  assert _overlaps(a('train'), a('test')) == _overlaps(b('train'), a('train')) == []


@pytest.mark.parametrize('spelt', ['./x/1.mp4', 'x/../x/1.mp4', 'ROOT/x/1.mp4', 'y/link.mp4', 'z/1.mp4'])
def test_one_file_in_two_lists_is_one_however_it_is_spelt(folder, spelt):
  files = {'x/1.mp4': 3, 'x/2.mp4': 4, 'y/link.mp4': ('a/x/1.mp4', 'link'), 'z': ('a/x', 'link')}
  source = folder('a', files | {'train.txt': 'x/1.mp4 0\n', 'test.txt': f'{spelt} 0\nx/2.mp4 0\n'})
  assert _overlaps(source('train'), source('test')) == [(1, 1, 1)]
  assert sorted(source('test').video_names.tolist()) == [b'x/1.mp4', b'x/2.mp4']


def test_images_of_ones_own_are_compared(folder):
  files = {'train/a/1.png': 10, 'train/b/2.png': 20, 'test/a/1.png': 30, 'test/b/9.png': ('mine/train/a/1.png', 'copy')}
  source = folder('mine', files, 'image_folder')
  assert _overlaps(source('train'), source('test')) == [(1, 1, 1)]


def test_data_built_before_files_were_told_apart_still_opens(folder, tmp_path, monkeypatch):
  """Compared by record and, within one folder, by name; and said to be compared by no more."""
  features, example = shards.features, shards._example
  without = lambda values: {k: v for k, v in values.items() if k != 'file_sha256'}
  with monkeypatch.context() as patch:
    patch.setattr(shards, 'features', lambda *args: without(features(*args)))
    patch.setattr(shards, '_example', lambda *args: without(example(*args)))
    files = {'x/1.mp4': 3, 'x/2.mp4': ('old/x/1.mp4', 'copy'), 'x/3.mp4': 5}
    lists = {'train.txt': 'x/1.mp4 0\n', 'test.txt': 'x/2.mp4 0\n', 'val.txt': 'x/1.mp4 0\nx/3.mp4 0\n'}
    old = folder('old', files | lists)
  new = folder('new', {'x/1.mp4': 6, 'train.txt': 'x/1.mp4 0\n'})
  assert old('train').file_sha256 is None
  assert leaks.compare({'': [old('train')]}, [old('test')]) == ([], ['old test', 'old train'])
  assert _overlaps(old('train'), old('val')) == [(1, 1, 1)]
  assert leaks.compare({'': [new('train')]}, [old('val')]) == ([], ['old val'])
  build.main(['video_folder/old', f'--manual_dir={tmp_path}/old', f'--data_dir={tmp_path}/tfds', '--again'])
  assert _overlaps(old('train'), old('test')) == [(1, 1, 1)]


# ---- Runs.


@pytest.fixture(scope='module')
def kinetics(media, tmp_path_factory):
  """Two variants of Kinetics: a training video of the one is a validation video of the other."""
  root = tmp_path_factory.mktemp('kinetics')
  videos = {'400': {'train': ('a', 'd'), 'val': ('b', 'e')}, '700': {'train': ('b', 'c'), 'val': ('f',)}}
  for variant, splits in videos.items():
    manual = root / variant
    (manual / 'videos').mkdir(parents=True)
    for split, letters in splits.items():
      rows = [f'yoga,{11 * letter},0,10,{split}\n' for letter in letters]
      (manual / f'{split}.csv').write_text('label,youtube_id,time_start,time_end,split\n' + ''.join(rows))
      for letter in letters:
        clip = manual / f'videos/{11 * letter}_000000_000010.mp4'
        video = (media / 'video_edge/tiny_carphone.mp4').read_bytes()
        # With a box that says nothing: files of one name are one file in both variants, others differ.
        clip.write_bytes(video + (19).to_bytes(4) + b'free' + 11 * letter.encode())
    build.main([f'kinetics/{variant}', f'--manual_dir={manual}', f'--data_dir={root}/tfds', '--workers=1'])
  return str(root / 'tfds')


def _config(data_dir, *variants, **options):
  config = timesformer_k400.get_config('debug')
  config.sources = {f'k{v}': timesformer_k400.kinetics(v, **options.get(f'k{v}', {})) for v in variants}
  config.streams.video.sources = tuple(config.sources)
  for source in config.sources.values():
    source.data_dir = data_dir
  return config


def test_a_run_that_tests_what_it_trains_on_does_not_start(kinetics):
  from cover_jax.jobs import opening
  from cover_jax.runtime import sharding

  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  with pytest.raises(UserError, match=r"^Source 'k700' trains on 1 examples .* 'k400' has too \(bbbbbbbbbbb\)"):
    opening.open_experiment(_config(kinetics, '400', '700'), mesh)
  allowed = _config(kinetics, '400', '700')
  allowed.allow_overlap = True
  opening.open_experiment(allowed, mesh)
  without = _config(kinetics, '400', '700', k700={'exclude': ('kinetics/400:validation',)})
  run, _, _ = opening.open_experiment(without, mesh)
  assert {s.name: s.num_examples for s in run.sources} == {'k400': 2, 'k700': 1}


@pytest.mark.slow
def test_a_run_that_starts_from_weights_trained_on_its_test_split_does_not_start(kinetics, tmp_path, caplog):
  from cover_jax.jobs import opening
  from cover_jax.jobs import train as train_job
  from cover_jax.runtime import sharding

  before = _config(kinetics, '700')
  train_job.train(before, str(tmp_path / 'before'))
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  opened = lambda config: opening.open_experiment(config, mesh)[0].leaks
  config = _config(kinetics, '400')
  config.init_from.path = str(tmp_path / 'before')
  with pytest.raises(
    UserError, match=r"^The run .*before, whose .* a source 'k700' that trains on 1 .* 'k400' has too"
  ):
    opened(config)
  config.allow_overlap = True
  with caplog.at_level(logging.WARNING):
    found = opened(config)
  assert f'k700 of {tmp_path / "before"} trains on' in caplog.text
  assert found == {
    'trained_on': {'k400': {'examples': 1, 'by': ['k700 of before']}},
    'not_compared': [],
    'weights': 'compared',
  }
  # The data of the run before may be elsewhere, its checkpoint gone, or the weights another's.
  os.rename(kinetics + '/kinetics/700', kinetics + '/kinetics/gone')
  unknown = {'trained_on': {}, 'weights': 'unknown'}
  with caplog.at_level(logging.WARNING):
    assert opened(config) == unknown | {'not_compared': ['k700 of before']}
    config.init_from.path = str(tmp_path / 'gone.flax')
    assert opened(config) == unknown | {'not_compared': ['gone.flax']}
  assert caplog.text.count('cannot be compared with the test splits') == 2
  config.init_from.path = str(tmp_path / 'ViT-B_16.npz')
  assert opened(config) == unknown | {'not_compared': []}
  config.init_from.path = ''
  assert opened(config) == unknown | {'not_compared': [], 'weights': 'none'}


@pytest.mark.slow
def test_training_and_evaluation_report_what_was_trained_on(tmp_path, capsys):
  from cover_jax.jobs import evaluate as evaluate_job
  from cover_jax.jobs import opening
  from cover_jax.jobs import train as train_job
  from cover_jax.runtime import sharding

  config = digits_cover.get_config('debug')
  config.sources = {'digits': config.sources.digits}
  config.streams = {'image': config.streams.image}
  config.batch_size, config.total_steps, config.eval_every = 8, 2, 0
  config.sources.digits.train, config.sources.digits.test = 'train+test[:30]', 'test[:40]'
  run = str(tmp_path / 'run')
  with pytest.raises(UserError, match=r"^Source 'digits' trains on 30 examples from 30 .*\(example 0, example 1"):
    train_job.train(config, run)
  config.allow_overlap = True
  train_job.train(config, run)
  expected = {
    'trained_on': {'digits': {'examples': 30, 'by': ['digits']}},
    'not_compared': [],
    'weights': 'none',
  }
  report = tmp_path / 'run/evaluation/report.json'
  said = 'Leaks: trained on 30 of the tested examples of digits (by digits).'
  assert json.loads(report.read_text())['leaks'] == expected and said in capsys.readouterr().out
  report.unlink()
  # What counts is what the checkpoint was trained on, not what the config says by now.
  config.sources.digits.train = 'train'
  mesh = sharding.make_mesh(config.mesh)
  assert opening.open_experiment(config, mesh)[0].leaks == {'trained_on': {}, 'not_compared': [], 'weights': 'none'}
  evaluate_job.evaluate(config, run)
  assert json.loads(report.read_text())['leaks'] == expected and said in capsys.readouterr().out
  config.allow_overlap = False
  with pytest.raises(UserError, match=r"^Source 'digits' trains on 30 examples"):
    evaluate_job.evaluate(config, run)
