"""What the clips of an example show: time, boxes, mirrors and maps, in training and under a test protocol."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import sources
from data_pipelines.clips import affine, sampling
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays, loader
from data_pipelines.loading.mixture import philox
from data_pipelines.loading.views import Stream, check, examples_per_step, label_of, make_test_set, plan, protocol
from data_pipelines.sources import open_tfds
from tests import tiny_datasets

CLIPS = {'dataset': 'tiny_test_clips', 'train': 'train', 'test': 'validation'}


def source_of(num_frames=60, count=2, height=12, width=16, class_names=('a', 'b'), fps=None, **settings):
  videos = [np.full((num_frames, height, width, 3), i, np.uint8) for i in range(count)]
  labels = np.arange(count) % len(class_names)
  rates = None if fps is None else np.full(count, fps, np.float32)
  return arrays.array_source('s', videos, labels, class_names, fps=rates, **settings)


def stream_of(num_frames=4, size=8, **settings):
  return Stream((0,), num_frames, size, 2, **settings)


# Time.


@pytest.mark.parametrize(
  ('stored', 'target', 'stride', 'expected'),
  [
    (30, 30, 4, [0, 4, 8, 12]),
    (60, 30, 4, [0, 8, 16, 24]),
    (12, 24, 4, [0, 2, 4, 6]),
    (25, 10, 1, [0, 3, 5, 8]),  # 0, 2.5, 5, 7.5
    (10, 30, 1, [0, 0, 1, 1]),  # slower than asked for: frames repeat
    (29.97, 0, 3, [0, 3, 6, 9]),
  ],
)
def test_stride_counts_frames_at_the_target_rate(stored, target, stride, expected):
  source = source_of(60, fps=stored, target_fps=target, stride=stride)
  for rng in (None, philox(1, 0), philox(1, 1)):
    (view,) = plan(source, 0, stream_of(), rng).values()
    assert (view.frames - view.frames[0]).tolist() == expected
  if target:
    seconds = (view.frames - view.frames[0]) / stored
    assert np.abs(seconds - np.arange(4) * stride / target).max() <= 0.5 / stored + 1e-9


def test_unknown_rate_is_refused():
  for fps in (None, 0.0):
    with pytest.raises(UserError, match="fps of source 's' is 30, but the dataset does not say"):
      source_of(fps=fps, target_fps=30)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 16), st.floats(0.1, 20), st.integers(2, 10), st.booleans())
def test_dense_places_are_in_the_video_and_differ_where_there_is_room(num_frames, length, stride, count, loop):
  starts = []
  for place in np.linspace(0, 1, count):
    frames = sampling.dense(num_frames, length, stride, place=place, loop=loop)
    assert frames.min() >= 0 and frames.max() < num_frames
    starts.append(int(frames[0]))
  free = num_frames - 1 - math.floor(stride * (length - 1) + 0.5)
  assert starts == sorted(starts)
  if free >= count - 1:
    assert len(set(starts)) == count and starts[0] == 0 and starts[-1] == free


@pytest.mark.parametrize('sampler', ['dense', 'segments'])
@pytest.mark.parametrize('count', [2, 3, 10])
def test_temporal_views_really_differ(sampler, count):
  source = source_of(100, sampler=sampler, stride=2, test_clips=count)
  views = plan(source, 0, stream_of(), None)
  assert list(views) == [f'clip/{i:03}' for i in range(count)]
  assert len({tuple(v.frames) for v in views.values()}) == count
  frames = np.stack([v.frames for v in views.values()])
  assert (np.diff(frames, axis=0) > 0).all()
  if sampler == 'segments':  # each view takes one frame of each segment
    assert (frames // 25 == np.arange(4)).all()


def test_loop_and_clamp_of_short_videos():
  looped, clamped = (plan(source_of(3, loop=loop), 0, stream_of(5), None)['clip/000'].frames for loop in (True, False))
  assert looped.tolist() == [0, 1, 2, 0, 1] and clamped.tolist() == [0, 1, 2, 2, 2]


# Boxes.


def test_protocol_crops():
  boxes = lambda count, h=240, w=320, **k: sampling.protocol_crops(h, w, (224, 224), count, **k)
  assert boxes(1) == [(sampling.center_crop(240, 320, (224, 224)), False)]
  assert [b.left for b, _ in boxes(3)] == [0, 40, 80] and {b.top for b, _ in boxes(3)} == {0}
  assert [b.top for b, _ in boxes(3, 320, 240)] == [0, 40, 80]
  assert [(b.top, b.left) for b, _ in boxes(5, fraction=0.5)] == [(0, 0), (0, 200), (120, 0), (120, 200), (60, 100)]
  ten = boxes(10)
  assert [b for b, _ in ten[:5]] == [b for b, _ in ten[5:]] and [f for _, f in ten] == [False] * 5 + [True] * 5
  with pytest.raises(UserError, match=r'test_crops.*expected 1, 3, 5 or 10'):
    source_of(test_crops=4)


def test_views_are_clips_times_crops():
  source = source_of(100, test_clips=2, test_crops=3)
  views = plan(source, 0, stream_of(), None)
  assert len(views) == 6
  assert len({(tuple(v.frames), v.box, v.flip) for v in views.values()}) == 6
  assert all(v.affine is None for v in views.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(50, 700), st.integers(50, 700), st.integers(0, 2**32))
def test_short_side_crop_is_within_and_square(height, width, seed):
  box = sampling.short_side_crop(height, width, philox(1, seed), (256, 320), (224, 224))
  assert box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
  assert abs(box.height - box.width) <= 1
  assert 224 / 320 - 0.02 <= box.height / min(height, width) <= 224 / 256 + 0.02


def test_short_side_crop_reaches_both_ends_and_must_hold_the_clip():
  source = source_of(height=320, width=400, short_side=(256, 320))
  boxes = [plan(source, 0, stream_of(size=224), philox(1, i))['clip'].box for i in range(300)]
  sides = [b.height for b in boxes]
  assert min(sides) <= 226 and max(sides) >= 278
  assert {b.top for b in boxes} >= {0, 50} and len({b.left for b in boxes}) > 80
  check(source, stream_of(size=224), 'here')
  with pytest.raises(UserError, match=r'short_side of source .* in here of size \(288, 288\)'):
    check(source, stream_of(size=288), 'here')


# Maps.


def test_plain_training_views_have_no_map():
  assert plan(source_of(), 0, stream_of(), philox(1, 0))['clip'].affine is None


def test_rotation_is_pillows():
  rng = np.random.default_rng(0)
  picture = np.kron(rng.integers(60, 200, (5, 6, 3)), np.ones((6, 6, 1))).astype(np.uint8)
  height, width = picture.shape[:2]
  for degrees in (-30, 10, 90):
    turned = Image.fromarray(picture).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(affine.FILL,) * 3)
    expected = np.asarray(turned).astype(int)
    found = mapped(picture[None], affine.rotation(degrees, (height, width)))[0]
    inner = np.s_[10:-10, 10:-10]
    assert np.abs(found[inner].astype(int) - expected[inner]).max() <= 2


def mapped(clip, map_2x3):
  """A clip under a map, by TensorFlow; Pillow's way of `arrays` must agree but at the border."""
  from data_pipelines.clips import decode

  size = clip.shape[1:3]
  found = decode.warp(np.asarray(clip), affine.projective(map_2x3).astype(np.float32)).numpy()
  view = loader_view(len(clip), size, map_2x3)
  pillow = arrays._clip(clip, view, size)
  inside = np.ones((*size, 1), bool)
  y, x = np.mgrid[: size[0], : size[1]]
  shown = np.einsum('ij,jhw->ihw', map_2x3, np.stack([x, y, np.ones_like(x)]))
  inside[..., 0] = (shown[0] > 0) & (shown[0] < size[1] - 1) & (shown[1] > 0) & (shown[1] < size[0] - 1)
  assert inside.mean() > 0.2
  assert (np.abs(found.astype(int) - pillow) * inside).max() <= 2
  return found


def loader_view(length, size, map_2x3):
  from data_pipelines.loading.views import View

  return View(np.arange(length), sampling.Box(0, 0, *size), False, map_2x3)


def test_maps_are_applied_in_order_and_alike_to_all_frames():
  rng = np.random.default_rng(0)
  clip = np.repeat(np.kron(rng.integers(60, 200, (1, 5, 6, 3)), np.ones((1, 6, 6, 1))).astype(np.uint8), 3, axis=0)
  size = clip.shape[1:3]
  shift = np.array([[1.0, 0.0, 4.0], [0.0, 1.0, 2.0]])
  both = mapped(clip, affine.then(affine.rotation(90, size), shift))
  assert (both == both[:1]).all()
  one_by_one = mapped(mapped(clip, affine.rotation(90, size)), shift)
  inner = np.s_[:, 4:-6, 6:-8]
  assert np.abs(both[inner].astype(int) - one_by_one[inner]).max() <= 3
  assert (mapped(clip, shift)[:, :-2, :-4] == clip[:, 2:, 4:]).all()
  assert (mapped(clip, shift)[:, -1] == affine.FILL).all()
  np.testing.assert_array_equal(mapped(clip, affine.identity()), clip)


def test_random_operations_are_as_frequent_as_in_the_whole_list():
  settings_ = affine.RandAugment(num_ops=1, magnitude=9, magnitude_std=0)
  found = [affine.random_operations(philox(1, i), settings_, (20, 20)) for i in range(900)]
  assert np.mean([f is not None for f in found]) == pytest.approx(0.5 * 5 / 15, abs=0.04)
  kinds = {tuple(np.round(f.ravel(), 3)) for f in found if f is not None}
  assert len(kinds) == 10  # five operations, either sign
  assert affine.random_operations(philox(1, 0), affine.RandAugment(num_ops=0), (20, 20)) is None
  angles = [np.degrees(math.asin(affine.random_rotation(philox(1, i), 10, (9, 9))[1, 0])) for i in range(200)]
  assert -10 <= min(angles) < -9 and 9 < max(angles) <= 10


def test_batches_show_the_maps(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  tiny_datasets.build(data_dir)
  config = CLIPS | {'data_dir': str(data_dir), 'rotation': 45.0, 'crop_scale': (1, 1), 'crop_ratio': (1, 1)}
  source = open_tfds.open_source('clips', config, 'train')
  assert (
    open_tfds.open_source('clips', config | {'train': 'all'}, 'train').expected is None
  )  # no lists, nothing expected
  stream = Stream((0,), 2, 16, 4)
  (batch,) = loader.train_batches([source], {'v': stream}, 0, num_steps=1)
  plain = open_tfds.open_source('clips', config | {'rotation': 0.0}, 'train')
  (still,) = loader.train_batches([plain], {'v': stream}, 0, num_steps=1)
  turned = (np.abs(batch['v']['views']['clip'][..., 2].astype(int) - affine.FILL) <= 3).mean()
  assert turned > 0.9 and (batch['v']['views']['clip'] != still['v']['views']['clip']).any()
  mixture = loader.stream_mixture('v', [source], stream, 0)
  rows = loader.train_rows(stream, mixture, 0)
  for i in range(4):
    views = plan(source, int(rows.example[i]), stream, loader.augmentation_rng(mixture, int(rows.position[i])))
    corner = views['clip'].affine @ (0, 0, 1)
    outside = (corner < -1).any() or (corner > 16).any()
    assert (batch['v']['views']['clip'][i, 0, 0, 0] == affine.FILL).all() == outside


# Mirrors.


def test_flip_exchanges_labels_of_directions():
  names = ('push left', 'push right', 'wave', 'turn left')
  labels = open_tfds.left_right_labels(names)
  assert labels == (1, 0, 2, -1)
  source = source_of(count=4, class_names=names, flip=True, flip_labels=labels)
  seen = {example: set() for example in range(4)}
  for seed in range(40):
    for example in range(4):
      views = plan(source, example, stream_of(), philox(1, seed))
      seen[example].add((views['clip'].flip, label_of(source, example, views)))
  assert seen == {0: {(False, 0), (True, 1)}, 1: {(False, 1), (True, 0)}, 2: {(False, 2), (True, 2)}, 3: {(False, 3)}}
  assert label_of(source, 0, plan(source, 0, stream_of(), None)) == 0


def test_flipped_labels_reach_the_batch():
  ramp = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None, None, :, None], 3, axis=-1)
  videos = [np.repeat(np.repeat(ramp, 12, axis=1), 6, axis=0)] * 8
  settings_ = {'crop_scale': (1, 1), 'crop_ratio': (1, 1), 'flip': True, 'flip_labels': (1, 0)}
  source = arrays.array_source('s', videos, [0] * 8, ('left', 'right'), **settings_)
  (batch,) = arrays.array_batches([source], {'v': Stream((0,), 2, (12, 16), 8)}, 0, num_steps=1)
  mirrored = batch['v']['views']['clip'][:, 0, 0, 0, 0] > 128
  assert set(mirrored) == {True, False}
  np.testing.assert_array_equal(batch['v']['label'], mirrored.astype(int))


def test_views_of_one_example_are_mirrored_alike_where_the_label_depends_on_it():
  views = lambda n, rng: {'a': np.arange(2), 'b': np.arange(2)}
  directed = source_of(flip=True, flip_labels=(1, 0))
  free = source_of(flip=True)
  pair = lambda source, i: [v.flip for v in plan(source, 0, stream_of(views=views), philox(1, i)).values()]
  assert {tuple(pair(directed, i)) for i in range(60)} == {(False, False), (True, True)}
  assert len({tuple(pair(free, i)) for i in range(60)}) == 4


def test_left_and_right_are_words():
  names = ('left', 'right', 'Left turn', 'Right turn', 'bright', 'upright', 'aleft', 'left_hand', 'right_hand')
  assert open_tfds.left_right_labels(names) == (1, 0, 3, 2, 4, 5, 6, 8, 7)
  assert open_tfds.left_right_labels(('from left to right', 'from right to left')) == (1, 0)


def test_something_something_is_mirrored_as_its_authors_say(media):
  table = json.loads((media / 'ann/ssv2/augmentation_mappings.json').read_text())
  names = sorted(json.loads((media / 'ann/ssv2/labels.json').read_text()))
  found = open_tfds.left_right_labels(names)
  pairs = table['left/right']
  assert len(names) == 174 and len(pairs) == 6
  assert {*pairs, *table['left/right agnostic']} <= set(names)
  assert {name: names[label] for name, label in zip(names, found, strict=True)} == {n: pairs.get(n, n) for n in names}


def test_config_words(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  tiny_datasets.build(data_dir)
  config = CLIPS | {'data_dir': str(data_dir), 'fps': 25.0, 'flip': 'labels', 'short_side': [16, 20], 'test_clips': 2}
  source = open_tfds.open_source('clips', config, 'train')
  assert (source.target_fps, source.flip, source.flip_labels) == (25.0, True, (0, 1, 2))
  assert (source.short_side, source.test_clips) == ((16, 20), 2)
  assert set(source.fps) == {12.5}
  for change, message in (
    ({'flip': 'yes'}, "flip of source 'clips' is 'yes'"),
    ({'rotation': 200.0}, 'rotation'),
    ({'short_side': (20, 16)}, r'short_side .* expected .* 0 < low <= high'),
    ({'test_clips': 0}, 'test_clips'),
    ({'test_crops': 10}, 'half of them mirrored'),
    ({'test_crop_fraction': 0.0}, 'test_crop_fraction'),
  ):
    with pytest.raises(UserError, match=message):
      open_tfds.open_source('clips', config | change, 'train')


# Protocols.


def test_protocol_says_all():
  dense = source_of(100, fps=25, stride=32, target_fps=30, test_clips=10, test_crops=3)
  assert protocol(dense, stream_of(8, 224)) == (
    '10 clips x 3 crops, 8 frames x 32 at 30 fps, 224x224, softmax averaged'
  )
  one = protocol(source_of(stride=4), stream_of(16, (112, 224)))
  assert one == '1 clip x 1 crop, 16 frames x 4 at native fps, 112x224'
  looped = source_of(loop=True, sampler='dense', test_crop_fraction=224 / 256)
  assert protocol(looped, stream_of(1)) == (
    '1 clip x 1 crop, 1 frame x 1 at native fps, looped, 8x8 of 0.875 of the short side'
  )
  segments = source_of(sampler='segments', test_clips=2)
  assert protocol(segments, stream_of()) == '2 clips x 1 crop, 4 frames, one a segment, 8x8, softmax averaged'
  image = source_of(1, modality='image')
  assert protocol(image, stream_of(1)) == '1 clip x 1 crop, 1 frame, 8x8'
  with pytest.raises(UserError, match='an image has one frame'):
    source_of(1, modality='image', test_clips=2)


def test_number_of_examples_a_step_bounds_the_clips():
  many = source_of(test_clips=10, test_crops=3)
  assert [examples_per_step(many, clips_, 8) for clips_ in (8, 64, 240, 500)] == [8, 8, 8, 16]
  assert examples_per_step(source_of(), 64, 8) == 64


def test_fingerprint_and_missing_examples():
  from dataclasses import replace

  source = source_of(count=3, class_names=('a', 'b', 'c'))
  named = replace(source, ids=np.array([b'x', b'y', b'z'], object), expected=5)
  shuffled = sources.select(named, np.array([2, 0, 1]))
  assert sources.fingerprint(named) == sources.fingerprint(shuffled)
  others = [source, sources.select(named, np.array([0, 1])), replace(named, label=named.label[::-1].copy())]
  assert len({sources.fingerprint(s) for s in [named, *others]}) == 4
  assert [make_test_set(s, stream_of(), iter).missing for s in (named, shuffled)] == [2, 0]


def test_evaluation_batches_show_the_views(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  tiny_datasets.build(data_dir)
  config = CLIPS | {'data_dir': str(data_dir), 'sampler': 'segments', 'test_clips': 2, 'test_crops': 3}
  source = open_tfds.open_source('clips', config, 'test')
  stream = Stream((0,), 3, 16, 4)
  batches = list(loader.eval_batches(source, 0, stream, 4))
  assert {b['views']['clip'].shape for b in batches} == {(4, 6, 3, 16, 16, 3)} and len(batches) == 3
  seen = 0
  for batch in batches:
    for example, used, clip_VxTxHxWx3 in zip(batch['example_id'], batch['mask'], batch['views']['clip'], strict=True):
      if used:
        seen += 1
        for view, clip in zip(plan(source, int(example), stream, None).values(), clip_VxTxHxWx3, strict=True):
          assert np.abs(clip[:, 8, 8, 1].astype(int) - 8 * view.frames).max() <= 4
  assert seen == source.num_examples == 11
