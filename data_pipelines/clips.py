"""What of a video a clip shows: frame numbers and one box, as pure numpy.

A clip has one box and one flip for all its frames, so every view is consistent in time by construction.
Randomness comes from `rng.random` only, the plainest conversion of raw bits; without rng the choice is the
deterministic one of evaluation.
"""

import math
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
  """A rectangle in source pixels; `top` and `left` count from the upper left corner."""

  top: int
  left: int
  height: int
  width: int


def dense(
  num_frames: int, length: int, stride: int, rng: np.random.Generator | None = None, *, loop: bool = False
) -> np.ndarray:
  """`length` frames, `stride` apart, from a random place (with rng) or from the middle of the video.

  A video shorter than the clip starts at frame 0 and then repeats its last frame, or begins again with `loop`.

  Returns:
    int64 [length], each within [0, num_frames).
  """
  free = max(num_frames - (length - 1) * stride - 1, 0)
  start = math.floor(rng.random() * (free + 1)) if rng else free // 2
  frames = start + stride * np.arange(length, dtype=np.int64)
  return frames % num_frames if loop else np.minimum(frames, num_frames - 1)


def segments(num_frames: int, length: int, rng: np.random.Generator | None = None) -> np.ndarray:
  """One frame of each of `length` equal parts of the video: a random one with rng, else the middle one.

  The segments of TSN (Wang et al. 2016, section 3.1), with real-valued borders so that any number of frames
  works; a video with fewer frames than segments repeats some.

  Returns:
    int64 [length], not decreasing, each within [0, num_frames).
  """
  offset = rng.random(length) if rng else 0.5
  frames = np.floor((np.arange(length) + offset) * num_frames / length).astype(np.int64)
  return np.minimum(frames, num_frames - 1)  # the last product may round up to num_frames


def random_resized_crop(
  height: int,
  width: int,
  rng: np.random.Generator,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  aspect: float = 1.0,
) -> Box:
  """A random box to be resized to the model's input (the crop of Szegedy et al. 2015, section 6).

  Args:
    height, width: of the source frame.
    rng: always advanced by the same number of draws.
    scale: lowest and highest share of the frame's area.
    ratio: lowest and highest stretch (width over height, relative to the output's); log-uniform.
    aspect: width over height of the output.

  Returns:
    A box within the frame. If ten trials do not fit, the largest centred box with the stretch nearest to the
    frame's own.
  """
  draws_10x4 = rng.random((10, 4))
  area = height * width * (scale[0] + draws_10x4[:, 0] * (scale[1] - scale[0]))
  shape = aspect * ratio[0] * (ratio[1] / ratio[0]) ** draws_10x4[:, 1]
  widths = np.rint(np.sqrt(area * shape)).astype(np.int64)
  heights = np.rint(np.sqrt(area / shape)).astype(np.int64)
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
  if not fits.any():
    return _centered(height, width, min(max(width / height, aspect * ratio[0]), aspect * ratio[1]), 1.0)
  i = int(np.argmax(fits))
  h, w = int(heights[i]), int(widths[i])
  top, left = (math.floor(draws_10x4[i, 2] * (height - h + 1)), math.floor(draws_10x4[i, 3] * (width - w + 1)))
  return Box(top, left, h, w)


def center_crop(height: int, width: int, size: tuple[int, int], fraction: float = 1.0) -> Box:
  """The box that equals "resize the short side to size / fraction, then crop the centre of size".

  Args:
    height, width: of the source frame.
    size: (height, width) of the output.
    fraction: 1 keeps the whole short side; 224 / 256 is the classical ImageNet crop.
  """
  return _centered(height, width, size[1] / size[0], fraction)


def _centered(height: int, width: int, aspect: float, fraction: float) -> Box:
  # The largest box of the given width over height, shrunk by fraction.
  h = min(max(round(min(height, width / aspect) * fraction), 1), height)
  w = min(max(round(min(width, height * aspect) * fraction), 1), width)
  return Box((height - h) // 2, (width - w) // 2, h, w)
