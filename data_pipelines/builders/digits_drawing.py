"""How the embedded datasets are drawn: repeatable randomness, scikit-learn's scans of digits, sprites on a film.

Positions are complex numbers: x to the right, y downwards, in pixels of the frame, so that a direction is
exp(i*angle) and a positive angle turns clockwise.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

SIZE = 32  # pixels, height and width of a frame


@dataclass(frozen=True)
class Sprite:
  """A scan drawn in one colour along a path. A number stands for an [n] array that does not change."""

  mask_8x8: np.ndarray
  colour_3: np.ndarray
  centre_n: np.ndarray | complex  # x + iy, pixels
  size_n: np.ndarray | float  # side of the scan, pixels
  angle_n: np.ndarray | float = 0.0  # radians, clockwise
  opacity_n: np.ndarray | float = 1.0


@functools.cache
def scan_numbers(split: str) -> tuple[np.ndarray, ...]:
  """For each digit, which of the 1,797 scans a split owns: 35 for test, 28 for validation, the others for train.

  The scans lie in the order of their writers, so each digit's scans are first put into a fixed random order.
  """
  numbers = []
  for digit in range(10):
    of_digit = np.flatnonzero(load_scans()[1] == digit)
    of_digit = of_digit[np.argsort(stream('scans', 'all', digit).random_raw(len(of_digit)), kind='stable')]
    numbers.append({'test': of_digit[:35], 'validation': of_digit[35:63], 'train': of_digit[63:]}[split])
  return tuple(numbers)


# ---- Randomness: raw Philox bits, the only part of NumPy's generators that never changes between versions.


def stream(config: str, split: str, index: int) -> np.random.Philox:
  return np.random.Philox(key=np.array([zlib.crc32(f'{config}/{split}'.encode()), index], np.uint64))


def uniform(bits: np.random.Philox, low: float = 0.0, high: float = 1.0) -> float:
  return low + (high - low) * (bits.random_raw() >> 11) * 2.0**-53


def uniforms(bits: np.random.Philox, low: float, high: float, *shape: int) -> np.ndarray:
  raw = bits.random_raw(int(np.prod(shape))).reshape(shape) >> np.uint64(11)
  return low + (high - low) * raw * 2.0**-53


def choice(bits: np.random.Philox, options: Sequence) -> object:
  return options[bits.random_raw() % len(options)]


def direction(bits: np.random.Philox) -> complex:
  return np.exp(1j * uniform(bits, 0, 2 * np.pi))


def colour(bits: np.random.Philox) -> np.ndarray:
  """A bright tint."""
  return uniforms(bits, 0.55, 1.0, 3)


def backdrop(bits: np.random.Philox) -> np.ndarray:
  """A plain dim colour, as one pixel that broadcasts to a frame."""
  return uniforms(bits, 0.02, 0.25, 1, 1, 1, 3)


# ---- Drawing.


@functools.cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
  scans = load_digits()
  # The pen's grey edge counts as ink: strokes stay solid when enlarged.
  return np.minimum(scans.images / 16 * 1.3, 1.0), scans.target


def scan(digit: int, split: str, bits: np.random.Philox) -> np.ndarray:
  return load_scans()[0][choice(bits, scan_numbers(split)[digit])]


def warp(mask_nx8x8: np.ndarray, centre_n, size_n, angle_n, extent: int = SIZE) -> np.ndarray:
  """Places 8x8 masks (one, or one for each frame) by a similarity, bilinearly: float [n, extent, extent]."""
  pixel = np.arange(extent) + 0.5
  pixel_HxW = pixel + 1j * pixel[:, None]
  centre_n, scale_n = np.broadcast_arrays(centre_n, 8 / np.asarray(size_n) * np.exp(-1j * np.asarray(angle_n)))
  local_nxHxW = (pixel_HxW - np.reshape(centre_n, (-1, 1, 1))) * np.reshape(scale_n, (-1, 1, 1))
  # One row of zeros all around, to which everything outside the mask is clipped.
  padded = np.pad(np.reshape(mask_nx8x8, (-1, 8, 8)), ((0, 0), (1, 1), (1, 1)))
  x = np.clip(local_nxHxW.real + 4.5, 0, 8.999999)
  y = np.clip(local_nxHxW.imag + 4.5, 0, 8.999999)
  column, row = x.astype(np.int64), y.astype(np.int64)
  x, y = x - column, y - row
  corner = 100 * np.arange(len(padded))[:, None, None] + 10 * row + column
  flat = padded.reshape(-1)
  upper = flat[corner] * (1 - x) + flat[corner + 1] * x
  lower = flat[corner + 10] * (1 - x) + flat[corner + 11] * x
  return upper * (1 - y) + lower * y


def film(n: int, backdrop: np.ndarray, sprites: Sequence[Sprite], noise: float, bits: np.random.Philox) -> np.ndarray:
  """Paints sprites over a backdrop, in order, adds grey noise in [-noise, noise]; uint8 [n, 32, 32, 3]."""
  canvas = np.broadcast_to(backdrop, (n, SIZE, SIZE, 3)).copy()
  for sprite in sprites:
    ink_nxHxW = warp(sprite.mask_8x8, np.broadcast_to(sprite.centre_n, n), sprite.size_n, sprite.angle_n)
    ink_nxHxWx1 = (ink_nxHxW * np.reshape(sprite.opacity_n, (-1, 1, 1)))[..., None]
    canvas += ink_nxHxWx1 * (sprite.colour_3 - canvas)
  canvas += uniforms(bits, -noise, noise, n, SIZE, SIZE, 1)
  return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
