"""Draws the embedded datasets from scikit-learn's 1,797 real scans of handwritten digits.

Every example is a pure function of (config, split, index): no state, no download, no TensorFlow, the same
pixels on every machine. The four configs stand for the four datasets of CoVeR, at about their relative sizes:

  config   like               label                                                             train
  digits   ImageNet           the digit (10), one frame                                          4000
  objects  Kinetics           digit x action (30): one frame names the digit, not the action      800
  motions  SSv2               motion (16, in 8 pairs), whatever the digit                         560
  moments  Moments in Time    event (10), on clutter, with noise, seen by a moving camera        2400

The scans are those of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998. The
motions are worded after the templates of Something-Something (arXiv:1706.04261). All else is our choice. How they are
drawn: `digits_drawing.py`.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines.builders import digits_drawing as drawing
from data_pipelines.contract import UserError

HOMEPAGE = 'https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html'
SPLITS = ('train', 'validation', 'test')

ACTIONS = ('slides', 'spins', 'pulses')
# Class 2k+1 shows the frames of class 2k in another order.
MOTIONS = (
  'Moving something from left to right',
  'Moving something from right to left',
  'Moving something down',
  'Moving something up',
  'Approaching something with your camera',
  'Moving away from something with your camera',
  'Turning something clockwise',
  'Turning something counter-clockwise',
  'Covering something with something',
  'Uncovering something',
  'Moving something out of view',
  'Moving something into view',
  'Pretending to move something out of view',
  'Pretending to move something into view',
  'Moving something and something closer to each other',
  'Moving something and something away from each other',
)
EVENTS = (
  'crossing',
  'chasing',
  'orbiting',
  'colliding',
  'scattering',
  'gathering',
  'swapping',
  'falling',
  'blinking',
  'shaking',
)
_CLASS_NAMES = {
  'digits': tuple(str(digit) for digit in range(10)),
  'objects': tuple(f'{digit} {action}' for digit in range(10) for action in ACTIONS),
  'motions': MOTIONS,
  'moments': EVENTS,
}
# Multiples of the number of classes where an evaluation should be exactly balanced. The evaluation splits of
# `digits` show every scan of their split exactly once.
_NUM_EXAMPLES = {
  'digits': {'train': 4000, 'validation': 280, 'test': 350},
  'objects': {'train': 800, 'validation': 330, 'test': 330},
  'motions': {'train': 560, 'validation': 320, 'test': 320},
  'moments': {'train': 2400, 'validation': 320, 'test': 320},
}


@dataclass(frozen=True)
class Example:
  """Frames uint8 [n, 32, 32, 3], class index, and the digits drawn, the main one first."""

  frames: np.ndarray
  label: int
  digits: tuple[int, ...]


def class_names(config: str) -> tuple[str, ...]:
  """Names of the classes of 'digits', 'objects', 'motions' or 'moments'; UserError for any other config."""
  if config not in _CLASS_NAMES:
    raise UserError(f'Unknown embedded dataset {config!r}: choose one of {", ".join(_CLASS_NAMES)}.')
  return _CLASS_NAMES[config]


def num_examples(config: str, split: str) -> int:
  """Number of examples of a split; UserError for a config or split that does not exist."""
  class_names(config)
  if split not in SPLITS:
    raise UserError(f'Unknown split {split!r} of the embedded dataset {config!r}: choose one of {", ".join(SPLITS)}.')
  return _NUM_EXAMPLES[config][split]


def render(config: str, split: str, index: int) -> Example:
  """Renders example `index` of a split; UserError for an unknown config or split, IndexError beyond the last."""
  n_examples, n_classes = num_examples(config, split), len(class_names(config))
  if not 0 <= index < n_examples:
    raise IndexError(f'{config}/{split} has {n_examples} examples: there is no example {index}.')
  label, repeat = index % n_classes, index // n_classes
  match config:
    case 'digits':
      return _render_digit(label, repeat, split, drawing.stream(config, split, index))
    case 'objects':
      return _render_object(label, split, drawing.stream(config, split, index))
    case 'motions':
      # Every motion sees the same digits equally often.
      return render_motion(label, repeat % 10, split, index)
    case _:
      return _render_moment(label, split, drawing.stream(config, split, index))


def encode_jpeg(frame_HxWx3: np.ndarray) -> bytes:
  """JPEG bytes of a uint8 frame, quality 92, colour at full resolution (4:4:4)."""
  buffer = io.BytesIO()
  Image.fromarray(frame_HxWx3).save(buffer, 'JPEG', quality=92, subsampling=0)
  return buffer.getvalue()


# ---- digits.


def _render_digit(digit: int, repeat: int, split: str, bits: np.random.Philox) -> Example:
  """Goes through the scans of the split in turn, so that each is seen equally often."""
  numbers = drawing.scan_numbers(split)[digit]
  scan = drawing.load_scans()[0][numbers[repeat % len(numbers)]]
  sprite = drawing.Sprite(
    mask_8x8=scan,
    colour_3=drawing.colour(bits),
    centre_n=complex(drawing.uniform(bits, 14, 18), drawing.uniform(bits, 14, 18)),
    size_n=drawing.uniform(bits, 22, 27),
    angle_n=drawing.uniform(bits, -0.12, 0.12),
  )
  return Example(drawing.film(1, drawing.backdrop(bits), [sprite], 0.06, bits), digit, (digit,))


# ---- objects.


def _render_object(label: int, split: str, bits: np.random.Philox) -> Example:
  digit, action = divmod(label, len(ACTIONS))
  n = drawing.choice(bits, range(12, 25, 2))
  u_n = np.arange(n) / (n - 1)  # time, 0 to 1
  size, angle = drawing.uniform(bits, 13, 17), drawing.uniform(bits, -0.15, 0.15)
  centre = complex(drawing.uniform(bits, 13, 19), drawing.uniform(bits, 13, 19))
  match ACTIONS[action]:
    case 'slides':
      centre = centre + drawing.uniform(bits, 14, 20) * drawing.direction(bits) * (u_n - 0.5)
    case 'spins':
      angle = angle + drawing.choice(bits, (-1, 1)) * drawing.uniform(bits, 1.0, 1.5) * 2 * np.pi * u_n
    case 'pulses':
      size = size + 5 * np.sin(2 * np.pi * (drawing.uniform(bits, 1.5, 2.5) * u_n + drawing.uniform(bits)))
  sprite = drawing.Sprite(drawing.scan(digit, split, bits), drawing.colour(bits), centre, size, angle)
  return Example(drawing.film(n, drawing.backdrop(bits), [sprite], 0.05, bits), label, (digit,))


# ---- motions.


def render_motion(label: int, digit: int, split: str, index: int) -> Example:
  """Renders a video of a motion: the canonical one of its pair, its frames put in the order of the class.

  With the other arguments equal, classes 2k and 2k+1 show exactly the same frames, noise included. What the
  frames look like is drawn alike for both, hence nothing but their order tells the two apart.

  `index` names the random stream; it may be any non-negative integer. An evaluation that looks at the middle
  frames of 8 (or 4) segments also sees the same frames of both: for that, no length is a multiple of 8, where
  reversal would move the middles by a frame.
  """
  bits = drawing.stream('motions', split, index)
  n = drawing.choice(bits, (12, 14, 18, 20, 22))
  other_digit = drawing.choice(bits, range(10))
  masks = [drawing.scan(digit, split, bits), drawing.scan(other_digit, split, bits)]
  pair, is_second = divmod(label, 2)
  sprites = _motion_sprites(pair, n, masks, bits)
  frames = drawing.film(n, drawing.backdrop(bits), sprites, 0.05, bits)
  if is_second:
    frames = frames[_second_order(pair, n)]
  return Example(frames, label, (digit, other_digit)[: 1 + (pair in _TWO_DIGITS)])


_PRETENDING = MOTIONS.index('Pretending to move something out of view') // 2
_TWO_DIGITS = (
  MOTIONS.index('Covering something with something') // 2,
  MOTIONS.index('Moving something and something closer to each other') // 2,
)


def _second_order(pair: int, n: int) -> np.ndarray:
  """Frame numbers [n] that make a canonical video one of the second class of its pair.

  Time runs backwards; but pretending goes out and back, the same both ways: it starts half a period later.
  """
  return np.roll(np.arange(n), -n // 2) if pair == _PRETENDING else np.arange(n)[::-1]


def _motion_sprites(pair: int, n: int, masks: list[np.ndarray], bits: np.random.Philox) -> list[drawing.Sprite]:
  """The canonical video of a pair, the one of class 2 * pair, as sprites."""
  u_n = np.arange(n) / (n - 1)  # time, 0 to 1
  size = drawing.uniform(bits, 12, 15)
  jitter = complex(drawing.uniform(bits, -3, 3), drawing.uniform(bits, -3, 3))
  centre = 16 + 16j + jitter
  first, second = (functools.partial(drawing.Sprite, mask, drawing.colour(bits)) for mask in masks)
  side = drawing.choice(bits, (1, 1j, -1, -1j))
  match MOTIONS[2 * pair]:
    case 'Moving something from left to right':
      return [first(centre + drawing.uniform(bits, 16, 20) * (u_n - 0.5), size)]
    case 'Moving something down':
      return [first(centre + drawing.uniform(bits, 16, 20) * (u_n - 0.5) * 1j, size)]
    case 'Approaching something with your camera':
      return [first(centre, drawing.uniform(bits, 7, 10) * drawing.uniform(bits, 2.4, 3.0) ** u_n)]
    case 'Turning something clockwise':
      arc = drawing.uniform(bits, 1.1, 1.6) * np.pi
      return [first(centre, size, drawing.uniform(bits, 0, 2 * np.pi) + arc * u_n)]
    case 'Covering something with something':
      # A digit on a card slides over a digit at rest. The card hides it whole.
      path = centre + side * drawing.uniform(bits, 16, 20) * (1 - u_n)
      card = drawing.Sprite(np.ones((8, 8)), drawing.uniforms(bits, 0.3, 0.5, 3), path, size + 3)
      return [second(centre, size), card, first(path, size)]
    case 'Moving something out of view':
      return [first(centre + side * drawing.uniform(bits, 24, 28) * u_n, size)]
    case 'Pretending to move something out of view':
      out_and_back_n = (1 - np.cos(2 * np.pi * np.arange(n) / n)) / 2
      return [first(centre + side * drawing.uniform(bits, 14, 17) * out_and_back_n, size)]
    case _:
      axis = drawing.direction(bits)
      distance_n = drawing.uniform(bits, 10, 12) * (1 - u_n) + drawing.uniform(bits, 3, 4) * u_n
      return [
        first(centre - axis * distance_n, size - 3),
        second(centre + axis * distance_n, size - 3),
      ]


# ---- moments.


def _render_moment(label: int, split: str, bits: np.random.Philox) -> Example:
  n = drawing.choice(bits, range(12, 25, 2))
  digits = tuple(drawing.choice(bits, range(10)) for _ in range(4))
  u_n = np.arange(n) / (n - 1)
  # The camera drifts and trembles; it carries the clutter and the actors along.
  drift = drawing.uniform(bits, 0, 5) * drawing.direction(bits)
  tremble_nx2 = drawing.uniforms(bits, -0.5, 0.5, n, 2)
  camera_n = drift * (u_n - 0.5) + tremble_nx2 @ np.array([1, 1j])
  path_Axn, opacity_n = _event(EVENTS[label], u_n, bits)
  size = drawing.uniform(bits, 9, 12) if len(path_Axn) <= 2 else drawing.uniform(bits, 7, 9)
  sprites = [
    drawing.Sprite(
      drawing.scan(digit, split, bits),
      drawing.colour(bits),
      path_n + camera_n,
      size,
      drawing.uniform(bits, -0.4, 0.4),
      opacity_n * drawing.uniform(bits, 0.8, 1.0),
    )
    for digit, path_n in zip(digits, path_Axn, strict=False)  # an event has 1, 2 or 4 actors
  ]
  frames = drawing.film(n, _clutter(camera_n, split, bits), sprites, 0.15, bits)
  return Example(frames, label, digits[: len(path_Axn)])


def _event(event: str, u_n: np.ndarray, bits: np.random.Philox) -> tuple[np.ndarray, np.ndarray]:
  """Paths complex [actors, n] and opacity [n] of an event, before the camera moves."""
  n = len(u_n)
  centre = complex(drawing.uniform(bits, 13, 19), drawing.uniform(bits, 13, 19))
  axis, turn = drawing.direction(bits), drawing.choice(bits, (-1, 1))
  reach = drawing.uniform(bits, 9, 12)
  opacity_n = np.ones(n)
  quarter_turns = 1j ** np.arange(4)[:, None]
  match event:
    case 'crossing':  # past each other, side by side
      lane = 1j * axis * drawing.uniform(bits, 2.5, 4)
      offset = np.stack([axis * reach * (2 * u_n - 1) + lane, -axis * reach * (2 * u_n - 1) - lane])
    case 'chasing':  # one behind the other
      lead_n = axis * reach * (2.2 * u_n - 1.1)
      offset = np.stack([lead_n + axis * 4.5, lead_n - axis * 4.5])
    case 'orbiting':  # one around the other
      around_n = axis * reach * 0.85 * np.exp(turn * 2j * np.pi * drawing.uniform(bits, 1.0, 1.5) * u_n)
      offset = np.stack([around_n, np.zeros(n)])
    case 'colliding':  # bounce off each other
      away_n = axis * (3.5 + reach * np.abs(2 * u_n - 1))
      offset = np.stack([away_n, -away_n])
    case 'scattering':
      offset = axis * quarter_turns * (1.5 + reach * u_n)
    case 'gathering':
      offset = axis * quarter_turns * (1.5 + reach * (1 - u_n))
    case 'swapping':  # rest, change places along half a circle, rest
      half_turn_n = np.clip(2 * u_n - 0.5, 0, 1) * turn * np.pi
      around_n = axis * 0.75 * reach * np.exp(1j * half_turn_n)
      offset = np.stack([around_n, -around_n])
    case 'falling':  # faster and faster
      offset = (drawing.uniform(bits, -4, 4) + 1j * (24 * u_n**2 - 12))[None]
    case 'blinking':
      period = drawing.uniform(bits, 0.3, 0.5)
      opacity_n = ((u_n / period + drawing.uniform(bits)) % 1 < 0.5).astype(float)
      offset = np.zeros((1, n), complex)
    case _:  # shaking, to and fro
      offset = (3.5 * axis * np.sin(2 * np.pi * (drawing.uniform(bits, 2.5, 3.5) * u_n + drawing.uniform(bits))))[None]
  return centre + offset, opacity_n


def _clutter(camera_n: np.ndarray, split: str, bits: np.random.Philox) -> np.ndarray:
  """A backdrop of scattered pieces of other scans that moves with the camera: float [n, 32, 32, 3]."""
  margin, pieces = 6, 14
  extent = drawing.SIZE + 2 * margin
  cut = np.zeros((pieces, 8, 8))
  for p in range(pieces):
    y, x = bits.random_raw() % 5, bits.random_raw() % 5
    cut[p, y : y + 4, x : x + 4] = drawing.scan(drawing.choice(bits, range(10)), split, bits)[y : y + 4, x : x + 4]
  place = drawing.uniforms(bits, 0, extent, pieces, 2) @ np.array([1, 1j])
  ink = drawing.warp(
    cut, place, drawing.uniforms(bits, 10, 18, pieces), drawing.uniforms(bits, 0, 2 * np.pi, pieces), extent
  )
  wide = drawing.backdrop(bits)[0] + (ink[..., None] * drawing.uniforms(bits, 0.1, 0.45, pieces, 1, 1, 3)).sum(axis=0)
  frames = np.empty((len(camera_n), drawing.SIZE, drawing.SIZE, 3))
  for frame, camera in zip(frames, camera_n, strict=True):
    left, top = margin - camera.real, margin - camera.imag
    x, y = int(left), int(top)
    window = wide[y : y + drawing.SIZE + 1, x : x + drawing.SIZE + 1]
    window = window[:, :-1] + (left - x) * (window[:, 1:] - window[:, :-1])
    frame[...] = window[:-1] + (top - y) * (window[1:] - window[:-1])
  return frames
