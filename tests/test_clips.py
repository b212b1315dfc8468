"""Frame numbers and boxes: always within the video, exact where the answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.clips import sampling
from data_pipelines.loading.mixture import philox

quick = settings(max_examples=100, deadline=None)
RNGS = st.one_of(st.none(), st.integers(0, 2**32).map(lambda seed: philox(1, seed)))
PIXELS = st.integers(1, 3000)


@quick
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 40), RNGS, st.booleans())
def test_dense_is_within_the_video_and_evenly_spaced(num_frames, length, stride, rng, loop):
  frames = sampling.dense(num_frames, length, stride, rng, loop=loop)
  assert frames.shape == (length,) and frames.dtype == np.int64
  assert frames.min() >= 0 and frames.max() < num_frames
  if num_frames > (length - 1) * stride:
    assert (np.diff(frames) == stride).all()
  elif not loop:
    assert frames[0] == 0 and frames[-1] == num_frames - 1


def test_dense_reaches_both_ends_and_centres_without_rng():
  starts = {int(sampling.dense(10, 4, 2, philox(1, 0, i))[0]) for i in range(200)}
  assert starts == {0, 1, 2, 3}
  assert sampling.dense(10, 4, 2).tolist() == [1, 3, 5, 7]
  assert sampling.dense(3, 5, 1).tolist() == [0, 1, 2, 2, 2]
  assert sampling.dense(3, 5, 1, loop=True).tolist() == [0, 1, 2, 0, 1]
  assert {int(sampling.dense(5, 1, 8, philox(1, 0, i))[0]) for i in range(200)} == set(range(5))


@quick
@given(st.integers(1, 10**6), st.integers(1, 64), RNGS)
def test_segments_take_one_frame_of_each_part(num_frames, length, rng):
  frames = sampling.segments(num_frames, length, rng)
  assert frames.shape == (length,) and frames.dtype == np.int64
  part = np.arange(length)
  assert (frames >= part * num_frames // length).all()
  assert (frames <= np.minimum((part + 1) * num_frames // length, num_frames - 1)).all()


def test_segments_without_rng_are_the_middles_and_random_ones_cover_all():
  assert sampling.segments(32, 4).tolist() == [4, 12, 20, 28]
  assert sampling.segments(2, 4).tolist() == [0, 0, 1, 1]
  seen = {int(f) for i in range(200) for f in sampling.segments(12, 4, philox(1, 0, i))}
  assert seen == set(range(12))


@quick
@given(PIXELS, PIXELS, st.integers(0, 2**32), st.floats(0.01, 1), st.floats(0, 1), st.floats(1, 3), st.floats(0.3, 3))
def test_random_boxes_are_within_the_frame(height, width, seed, low, more, stretch, aspect):
  scale = (low, low + more * (1 - low))
  box = sampling.random_resized_crop(height, width, philox(1, seed), scale, (1 / stretch, stretch), aspect)
  within(box, height, width)


@quick
@given(PIXELS, PIXELS, PIXELS, PIXELS, st.floats(0.01, 1))
def test_center_boxes_are_within_the_frame(height, width, out_height, out_width, fraction):
  box = sampling.center_crop(height, width, (out_height, out_width), fraction)
  within(box, height, width)
  assert abs(2 * box.top + box.height - height) <= 1 and abs(2 * box.left + box.width - width) <= 1


def within(box, height, width):
  assert all(isinstance(x, int) for x in box)
  assert box.height > 0 and box.width > 0 and box.top >= 0 and box.left >= 0
  assert box.top + box.height <= height and box.left + box.width <= width


def test_center_crop_is_resize_short_side_and_crop():
  assert sampling.center_crop(240, 320, (112, 112)) == (0, 40, 240, 240)
  assert sampling.center_crop(256, 340, (224, 224), 224 / 256) == (16, 58, 224, 224)
  assert sampling.center_crop(224, 224, (224, 224)) == (0, 0, 224, 224)
  assert sampling.center_crop(100, 100, (50, 100)) == (25, 0, 50, 100)


def test_random_crop_follows_scale_and_ratio():
  boxes = [sampling.random_resized_crop(1000, 1000, philox(1, 0, i), (0.2, 0.5), (0.5, 2.0)) for i in range(500)]
  areas = [b.height * b.width / 1e6 for b in boxes]
  ratios = [math.log(b.width / b.height) for b in boxes]
  assert min(areas) == pytest.approx(0.2, abs=0.01) and max(areas) == pytest.approx(0.5, abs=0.01)
  assert np.mean(areas) == pytest.approx(0.35, abs=0.02)
  assert max(map(abs, ratios)) <= math.log(2) + 0.01 and abs(np.mean(ratios)) < 0.1
  assert len({(b.top, b.left) for b in boxes}) > 400


def test_random_crop_keeps_whole_frames_and_falls_back():
  assert sampling.random_resized_crop(64, 64, philox(1, 0), (1, 1), (1, 1)) == (0, 0, 64, 64)
  assert sampling.random_resized_crop(32, 64, philox(1, 0), (1, 1), (1, 1), aspect=2.0) == (0, 0, 32, 64)
  # No box of 90 % of a very wide frame is nearly square: the largest centred one stands in.
  assert sampling.random_resized_crop(10, 1000, philox(1, 0), (0.9, 1), (0.5, 2)) == (0, 490, 10, 20)


def test_random_crop_advances_rng_by_a_fixed_count():
  rngs = philox(1, 0), philox(1, 0)
  sampling.random_resized_crop(10, 1000, rngs[0], (0.9, 1))
  sampling.random_resized_crop(64, 64, rngs[1], (0.1, 0.2))
  assert rngs[0].random() == rngs[1].random()
