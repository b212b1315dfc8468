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


def step_of(stride: int, fps: float, target_fps: float) -> float:
  """Frames of a video from one frame of a dense clip to the next.

  Args:
    stride: counted at `target_fps`.
    fps: of the video's frames.
    target_fps: in Hz; 0: `stride` counts the video's own frames, and `fps` does not matter.
  """
  return stride * fps / target_fps if target_fps else stride


def offsets(length: int, step: float) -> np.ndarray:
  """int64 [length]: the frames of a dense clip, counted from its first: those nearest to 0, step, 2 step, ..."""
  return np.floor(step * np.arange(length) + 0.5).astype(np.int64)


def dense(
  num_frames: int,
  length: int,
  stride: float,
  rng: np.random.Generator | None = None,
  *,
  loop: bool = False,
  place: float = 0.5,
) -> np.ndarray:
  """`length` frames, `stride` apart, from a random place of the video (with rng) or from a given one.

  A video shorter than the clip starts at frame 0 and then repeats its last frame, or begins again with `loop`.

  Args:
    num_frames: of the video.
    length: T.
    stride: in frames of the video; if it is no whole number, the frames nearest to the exact places are taken.
    rng: for a random start.
    loop: begin again at the end of the video, rather than stay at its last frame.
    place: without rng, where among the starts that leave room for the clip: 0 first, 0.5 the middle, 1 last.

  Returns:
    int64 [length], each within [0, num_frames).
  """
  from_start = offsets(length, stride)
  free = max(num_frames - int(from_start[-1]) - 1, 0)
  start = math.floor(rng.random() * (free + 1)) if rng else math.floor(place * free + 1e-9)  # 2/3 of 3 is below 2
  frames = start + from_start
  return frames % num_frames if loop else np.minimum(frames, num_frames - 1)


def segments(num_frames: int, length: int, rng: np.random.Generator | None = None, *, place: float = 0.5) -> np.ndarray:
  """One frame of each of `length` equal parts of the video: a random one with rng, else that at `place` of each.

  The segments of TSN (Wang et al. 2016, section 3.1), with real-valued borders so that any number of frames
  works; a video with fewer frames than segments repeats some. `place` is in [0, 1); 0.5 takes the middles.

  Returns:
    int64 [length], not decreasing, each within [0, num_frames).
  """
  offset = rng.random(length) if rng else place
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


def short_side_crop(
  height: int, width: int, rng: np.random.Generator, short_side: tuple[int, int], size: tuple[int, int]
) -> Box:
  """The box that equals "resize the short side to a random length, then crop `size` at random".

  The training crop of TimeSformer's and SlowFast's recipes: the length is uniform in 256 to 320 pixels for a crop of
  224. The stretch of the picture never changes.

  Args:
    height, width: of the source frame.
    rng: always advanced by the same number of draws.
    short_side: shortest and longest length in pixels, at least the height and width of the output.
    size: (height, width) of the output.
  """
  draws = rng.random(3)
  low, high = short_side
  shrink = min(height, width) / (low + draws[0] * (high - low))
  h = min(max(round(size[0] * shrink), 1), height)
  w = min(max(round(size[1] * shrink), 1), width)
  return Box(math.floor(draws[1] * (height - h + 1)), math.floor(draws[2] * (width - w + 1)), h, w)


# (share of the free height, share of the free width) of the crops of a test protocol.
_CORNERS_AND_CENTRE = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
PROTOCOL_CROPS = (1, 3, 5, 10)


def protocol_crops(
  height: int, width: int, size: tuple[int, int], count: int = 1, fraction: float = 1.0
) -> list[tuple[Box, bool]]:
  """The boxes of a test protocol, and whether each is mirrored.

  Args:
    height, width: of the source frame.
    size: (height, width) of the output.
    count: 1, the centre; 3, first, middle and last along the longer free side (Kinetics' "3 crops"); 5, corners and
      centre; 10, these and their mirror images (ImageNet's and TSN's "10 crops").
    fraction: as in `center_crop`.
  """
  box = center_crop(height, width, size, fraction)
  free_y, free_x = height - box.height, width - box.width
  along = [(p, 0.5) if free_y > free_x else (0.5, p) for p in (0.0, 0.5, 1.0)]
  places = {1: along[1:2], 3: along, 5: _CORNERS_AND_CENTRE, 10: 2 * _CORNERS_AND_CENTRE}[count]
  boxes = [box._replace(top=math.floor(y * free_y), left=math.floor(x * free_x)) for y, x in places]
  return [(b, i >= 5) for i, b in enumerate(boxes)]


def _centered(height: int, width: int, aspect: float, fraction: float) -> Box:
  # The largest box of the given width over height, shrunk by fraction.
  h = min(max(round(min(height, width / aspect) * fraction), 1), height)
  w = min(max(round(min(width, height * aspect) * fraction), 1), width)
  return Box((height - h) // 2, (width - w) // 2, h, w)
