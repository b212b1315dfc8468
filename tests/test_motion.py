"""Motion sources: each against clips whose motion is known, TV-L1 against OpenCV's."""

import pathlib

import jax
import numpy as np
import pytest

from cover_jax.objectives import motion
from tests import motion_clips

GOLDEN = pathlib.Path(__file__).parent / 'data/dual_tvl1.npz'


def shifted(dx, dy, frames=3, height=40, width=48):
  """uint8 [1, T, H, W, 3]: smooth waves that move by (dx, dy) pixels a frame."""
  y, x = np.mgrid[:height, :width].astype(np.float64)
  wave = lambda t: np.sin(0.4 * (x - dx * t) + 0.2 * (y - dy * t)) + np.sin(0.35 * (y - dy * t) - 0.15 * (x - dx * t))
  grey = np.stack([np.round(127 + 60 * wave(t)) for t in range(frames)])
  return np.repeat(grey[None, ..., None], 3, axis=-1).astype(np.uint8)


def agreement(name, clip):
  """Distances [N] in pixels of the two flows where OpenCV's is longer than half a pixel."""
  expected = np.load(GOLDEN)[name].astype(np.float32)
  flow = np.asarray(motion.tvl1(clip[None]))[0, :, ::2, ::2]
  return np.linalg.norm(flow - expected, axis=-1)[np.linalg.norm(expected, axis=-1) > 0.5]


def test_frame_difference():
  clip = shifted(1.0, 0.0)
  grey = clip[..., 0].astype(np.float32)
  difference = motion.frame_difference(clip)
  np.testing.assert_allclose(difference, grey[:, 1:] - grey[:, :-1], atol=1e-3)
  np.testing.assert_allclose(motion.frame_difference(clip[:, ::-1]), -difference[:, ::-1], atol=1e-3)
  np.testing.assert_allclose(motion.frame_difference(clip + np.float32(7)), difference, atol=1e-3)
  assert not np.any(motion.frame_difference(clip[:, :1].repeat(3, 1)))
  red = np.zeros((1, 2, 1, 1, 3), np.uint8)
  red[0, 1, 0, 0, 0] = 100
  assert float(motion.frame_difference(red)[0, 0, 0, 0]) == pytest.approx(29.9)


@pytest.mark.parametrize('shift', [(0.6, 0.0), (0.0, -0.5), (-0.4, 0.3)])
def test_normal_flow_is_the_motion_along_the_gradient(shift):
  flow = np.asarray(motion.normal_flow(shifted(*shift)), np.float64)[:, :, 4:-4, 4:-4]
  # Along the gradient n, n . flow is n . motion: the flow is its own gradient's direction.
  length2 = np.sum(flow**2, axis=-1)
  clear = length2 > 0.04
  ratio = (flow @ np.array(shift))[clear] / length2[clear]
  assert np.median(ratio) == pytest.approx(1, abs=0.1) and clear.mean() > 0.2
  assert not np.any(motion.normal_flow(shifted(0, 0)))
  assert np.abs(motion.normal_flow(255 * (shifted(9, 3) % 2))).max() <= motion.MAX_FLOW


@pytest.mark.parametrize('shift', [(2.0, -1.0), (0.0, 0.0), (-3.0, 0.5)])
def test_tvl1_finds_a_shift(shift):
  flow = np.asarray(motion.tvl1(shifted(*shift)))
  assert flow.shape == (1, 2, 40, 48, 2) and flow.dtype == np.float32
  np.testing.assert_allclose(np.median(flow[:, :, 6:-6, 6:-6], axis=(0, 1, 2, 3)), shift, atol=0.05)


def test_tvl1_turns_with_the_clip_and_pairs_do_not_mix():
  one, two = shifted(1.5, -0.5), shifted(-2.0, 1.0)
  flow = np.asarray(motion.tvl1(np.concatenate([one, two])))
  np.testing.assert_allclose(flow[:1], motion.tvl1(one), atol=1e-3)
  mirrored = np.asarray(motion.tvl1(one[:, :, :, ::-1]))[:, :, :, ::-1] * np.array([-1, 1])
  # Forward differences are not symmetric, so the two agree but for a little.
  assert np.median(np.linalg.norm(mirrored - flow[:1], axis=-1)) < 0.02


def test_tvl1_agrees_with_opencv_on_a_formula():
  distance = agreement('formula', motion_clips.formula_clip())
  assert np.median(distance) < 0.1 and len(distance) > 12000


@pytest.mark.parametrize('name', motion_clips.VIDEOS)
def test_tvl1_agrees_with_opencv_on_videos(media, name):
  distance = agreement(name, motion_clips.video_clip(media, name))
  assert np.median(distance) < 0.25 and np.quantile(distance, 0.9) < 1
  assert len(distance) > 5000


def test_median_and_warp():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, 7, 9)).astype(np.float32)
  padded = np.pad(image, [(0, 0), (1, 1), (1, 1)], mode='edge')
  windows = np.stack([padded[:, i : i + 7, j : j + 9] for i in range(3) for j in range(3)])
  np.testing.assert_array_equal(motion._median3(image), np.median(windows, axis=0))
  u, v = np.full(image.shape, 1.25, np.float32), np.full(image.shape, -0.5, np.float32)
  moved, inside = motion._warp(image[..., None], u, v)
  expected = 0.375 * (image[:, 2, 4] + image[:, 1, 4]) + 0.125 * (image[:, 2, 5] + image[:, 1, 5])
  np.testing.assert_allclose(moved[:, 2, 3, 0], expected, rtol=1e-5)
  assert inside[0].tolist() == [[float(y > 0 and x < 7) for x in range(9)] for y in range(7)]


def test_flow_edges():
  y, x = np.mgrid[:6, :8].astype(np.float32)
  flow = np.stack([3 + 0 * x, 2 * x - y], axis=-1)[None, None]
  edges = np.asarray(motion.flow_edges(flow))[0, 0, 1:-1, 1:-1]
  np.testing.assert_allclose(edges[..., 0], 0, atol=1e-6)
  np.testing.assert_allclose(edges[..., 1], np.sqrt(5), rtol=1e-5)
  assert edges.shape == (4, 6, 3) and np.all(motion.flow_edges(flow) >= 0)
  same = motion.flow_edges(np.full((1, 2, 4, 4, 2), 5.0, np.float32))
  assert not np.any(same)


def test_small_and_odd_frames():
  for height, width in ((16, 16), (17, 23), (9, 33)):
    flow = jax.eval_shape(motion.tvl1, jax.ShapeDtypeStruct((2, 3, height, width, 3), np.uint8))
    assert flow.shape == (2, 2, height, width, 2)
