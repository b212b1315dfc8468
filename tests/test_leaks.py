"""Tests of the leak guard: exclusion and overlaps by original video."""

import dataclasses
import logging

import numpy as np
import pytest

from data_pipelines import arrays, leaks
from data_pipelines.contract import UserError


def _source(name, videos):
  clips = [np.full((2, 8, 8, 3), i, np.uint8) for i in range(len(videos))]
  source = arrays.array_source(name, clips, list(range(len(videos))), tuple('abcdefgh'[: len(videos)]))
  ids = [f'{v}_{i}' for i, v in enumerate(videos)]
  return dataclasses.replace(source, video_names=np.array(videos, 'S'), ids=np.array(ids, 'S'), expected=9)


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
  train = [_source('k700', [YOUTUBE[0], YOUTUBE[0], YOUTUBE[1]]), _source('mine', ['1', '2'])]
  tests = [_source('k400', [YOUTUBE[0], YOUTUBE[2]]), _source('other', ['1', YOUTUBE[1]])]
  datasets = {'k700': 'kinetics/700', 'k400': 'kinetics/400', 'mine': 'video_folder/a', 'other': 'moments:1.0.0'}
  found = leaks.overlaps(train, tests, datasets)
  # '1' of two different datasets says nothing; a YouTube id does.
  assert [(o.train, o.test, o.videos, o.train_examples, o.test_examples) for o in found] == [
    ('k700', 'k400', 1, 2, 1),
    ('k700', 'other', 1, 1, 1),
  ]
  same = leaks.overlaps(train[1:], tests[1:], datasets | {'other': 'video_folder/b'})
  assert [(o.train, o.test, o.some) for o in same] == [('mine', 'other', ('1',))]
  with pytest.raises(UserError, match=r"'k700' trains on 2 examples from 1 original videos .*'k400' .*exclude"):
    leaks.check(found, allowed=False)
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    leaks.check(found, allowed=True)
  assert caplog.text.count('Leak: ') == 2
  leaks.check([], allowed=False)
