"""flip='auto' reads the names of the classes: what a mirrored clip is called then, and what is said of it."""

import pathlib

import numpy as np
import pytest
from absl import logging

from configs import defaults
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays
from data_pipelines.sources import mirroring, open_tfds
from tests import tiny_datasets

LABELS = pathlib.Path(open_tfds.__file__).parent.parent / 'builders/labels'


@pytest.mark.parametrize(
  ('names', 'labels'),
  [
    (('turn left', 'turn right', 'jump'), (1, 0, 2)),
    (('turn_left', 'turn_right'), (1, 0)),
    (('TurnLeft', 'TurnRight', 'LeftTurn', 'RightTurn'), (1, 0, 3, 2)),
    (('LEFT', 'RIGHT', 'stand'), (1, 0, 2)),
    (('leftwards', 'rightwards'), (1, 0)),
    (('left-handed serve', 'Right-handed serve'), (1, 0)),  # the case of a folder's name does not matter
    (('from left to right', 'from right to left', 'left hook'), (1, 0, -1)),
    (('clockwise', 'counterclockwise'), (1, 0)),
    (('wind clockwise', 'wind anti-clockwise', 'hold'), (1, 0, 2)),
    (('spin_clockwise', 'spin_counter_clockwise'), (1, 0)),
    (('spin clockwise', 'stand'), (-1, 1)),
    (('pull it right out', 'turn left', 'turn right'), (0, 2, 1)),
  ],
)
def test_words_say_what_a_mirrored_clip_is(names, labels):
  found, said = mirroring.by_names(names)
  assert found == labels and said


@pytest.mark.parametrize('names', [(), ('cat', 'dog'), ('bright', 'upright', 'cleft', 'Copyright', 'lefty bar')])
def test_without_such_words_labels_stay(names):
  assert mirroring.by_names(names) == (
    None, 'no class names a side (left, right, clockwise), so half of the training clips are mirrored'
  )  # fmt: skip


def test_it_says_how_many_and_which():
  names = [f'{kind} {side}' for kind in 'abcd' for side in ('left', 'right')] + ['hook left', 'wait']
  said = mirroring.by_names(names)[1]
  assert said.startswith("8 classes change their label when a clip is mirrored ('a left' -> 'a right', 'a right' -> 'a")
  assert ', ...)' in said and "1 name a side without a counterpart and are never mirrored ('hook left')" in said
  assert said.endswith('the other 1 are mirrored and keep theirs')


def test_it_agrees_with_something_somethings_own_mapping():
  labels = (LABELS / 'something_something_v2.txt').read_text().splitlines()
  assert len(labels) == 174
  assert mirroring.by_names(labels)[0] == open_tfds.left_right_labels(labels)


def test_a_source_is_opened_with_what_was_decided_and_says_so_once(tmp_path, monkeypatch):
  tiny_datasets.build(str(tmp_path))
  config = defaults.source('tiny_test_clips', data_dir=str(tmp_path), test='validation', flip='auto').to_dict()
  lines = []
  monkeypatch.setattr(logging, 'info', lambda text, *args: lines.append(text % args))
  open_tfds._say_once.cache_clear()
  sources = [open_tfds.open_source('mine', config, split) for split in ('train', 'test')]
  assert [(s.flip, s.flip_labels) for s in sources] == [(True, None)] * 2
  assert [line for line in lines if 'flip' in line] == [
    'Source mine, flip=auto: no class names a side (left, right, clockwise), so half of the training clips are mirrored'
  ]
  by_hand = open_tfds._label_feature
  monkeypatch.setattr(open_tfds, '_label_feature', lambda *a: (by_hand(*a)[0], ('go left', 'go right', 'c'), False))
  source = open_tfds.open_source('mine', config, 'train')
  assert source.flip is True and source.flip_labels == (1, 0, 2)


def test_arrays_want_it_decided():
  with pytest.raises(UserError, match="flip of source 'a' is 'auto': set it in the config of `open_source`"):
    arrays.array_source('a', [np.zeros((1, 4, 4, 3), np.uint8)], flip='auto')
