"""Tests of the leak guard: exclusion and overlaps by original video."""

import dataclasses
import logging
import os
import shutil

import jax
import numpy as np
import pytest

from configs import timesformer_k400
from data_pipelines import arrays, leaks
from data_pipelines.contract import UserError


def _source(name, videos, dataset='mine'):
  clips = [np.full((2, 8, 8, 3), i, np.uint8) for i in range(len(videos))]
  source = arrays.array_source(name, clips, list(range(len(videos))), tuple('abcdefgh'[: len(videos)]))
  ids = [f'{v}_{i}' for i, v in enumerate(videos)]
  return dataclasses.replace(
    source, video_names=np.array(videos, 'S'), ids=np.array(ids, 'S'), expected=9, dataset=dataset
  )


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
  assert [left.frames[r][0, 0, 0, 0] for r in left.rows] == [1, 3]
  assert leaks.leave_out(train, [], open_split) is train


@pytest.mark.parametrize('table', [True, False])
def test_exclude_from_a_file(tmp_path, table):
  rows = ['label,youtube_id,time_start,time_end,split', *(f'"a, b",{y},0,10,val' for y in YOUTUBE[:2])]
  path = tmp_path / 'val.csv'
  path.write_text('\r\n'.join(rows if table else YOUTUBE[:2]) + '\n')
  left = leaks.leave_out(_source('k700', YOUTUBE), [str(path)], None)
  assert left.video_names.tolist() == [YOUTUBE[2].encode()]


def test_what_cannot_be_excluded_is_said(tmp_path):
  train = _source('k700', YOUTUBE)
  unnamed = dataclasses.replace(train, video_names=None)
  empty = tmp_path / 'empty.txt'
  empty.write_text('\n')
  (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
  cases = [
    (unnamed, 'kinetics/400:validation', 'does not name original videos'),
    (train, 'kinetics/400', 'expected an existing file or dataset:split'),
    (train, str(empty), 'names no video'),
    (train, str(tmp_path / 'latin.txt'), 'cannot be read'),
    (train, 'other:test', 'whose dataset does not name original videos'),
    (train, 'same:test', 'leaves no training example'),
  ]
  open_split = lambda dataset, split: train if dataset == 'same' else unnamed
  for source, entry, words in cases:
    with pytest.raises(UserError, match=words):
      leaks.leave_out(source, [entry], open_split)


def test_overlap_between_any_training_and_any_test_split(caplog):
  train = [
    _source('k700', [YOUTUBE[0], YOUTUBE[0], YOUTUBE[1]], 'kinetics/700'),
    _source('mine', ['1', '2'], 'video_folder/a'),
  ]
  tests = [
    _source('k400', [YOUTUBE[0], YOUTUBE[2]], 'kinetics/400'),
    _source('other', ['1', YOUTUBE[1]], 'moments:1.0.0'),
  ]
  found = leaks.overlaps(train, tests)
  # '1' of two different datasets says nothing; a YouTube id does.
  assert [(o.train, o.test, o.videos, o.train_examples, o.test_examples) for o in found] == [
    ('k700', 'k400', 1, 2, 1),
    ('k700', 'other', 1, 1, 1),
  ]
  same = leaks.overlaps(train[1:], [dataclasses.replace(tests[1], dataset='video_folder/b')])
  assert [(o.train, o.test, o.some) for o in same] == [('mine', 'other', ('1',))]
  with pytest.raises(UserError, match=r"'k700' trains on 2 examples from 1 original videos .*'k400' .*exclude"):
    leaks.check(found, allowed=False)
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    leaks.check(found, allowed=True)
  assert caplog.text.count('Leak: ') == 2
  leaks.check([], allowed=False)


@pytest.fixture(scope='module')
def kinetics(media, tmp_path_factory):
  """Two variants of Kinetics: a training video of the one is a validation video of the other."""
  from data_pipelines import build

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
        shutil.copyfile(media / 'video_edge/tiny_carphone.mp4', clip)
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
  from cover_jax import jobs, sharding

  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  with pytest.raises(UserError, match=r"^Source 'k700' trains on 1 examples .* 'k400' has too \(bbbbbbbbbbb\)"):
    jobs.open_experiment(_config(kinetics, '400', '700'), mesh)
  allowed = _config(kinetics, '400', '700')
  allowed.allow_overlap = True
  jobs.open_experiment(allowed, mesh)
  without = _config(kinetics, '400', '700', k700={'exclude': ('kinetics/400:validation',)})
  run, _, _ = jobs.open_experiment(without, mesh)
  assert {s.name: s.num_examples for s in run.sources} == {'k400': 2, 'k700': 1}


def test_a_run_that_starts_from_weights_trained_on_its_test_split_does_not_start(kinetics, tmp_path, caplog):
  from cover_jax import jobs, sharding

  before = _config(kinetics, '700')
  jobs.train(before, str(tmp_path / 'before'))
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  config = _config(kinetics, '400')
  config.init_from.path = str(tmp_path / 'before')
  with pytest.raises(
    UserError, match=r"^The run .*before, whose .* a source 'k700' that trains on 1 .* 'k400' has too"
  ):
    jobs.open_experiment(config, mesh)
  config.allow_overlap = True
  with caplog.at_level(logging.WARNING):
    jobs.open_experiment(config, mesh)
  assert f'k700 of {tmp_path / "before"} trains on' in caplog.text
  os.rename(kinetics + '/kinetics/700', kinetics + '/kinetics/gone')
  with caplog.at_level(logging.WARNING):
    jobs.open_experiment(config, mesh)
  assert 'cannot be compared' in caplog.text
