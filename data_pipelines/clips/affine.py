"""Affine maps of a whole clip: rotation, and the geometric half of RandAugment. Pure numpy.

A map is f64 [2, 3]: it takes the (x, y, 1) of an output pixel, counted from 0 at the centre of the upper left one, to
the place in the clip that the pixel shows. The photometric half is the device's (`cover_jax/augment/rand_augment.py`).
"""

import math
from dataclasses import dataclass

import numpy as np

# The operations of RandAugment, drawn evenly: those of timm. Both halves know the whole list.
PHOTOMETRIC = (
  'autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add', 'color', 'contrast', 'brightness',
  'sharpness',
)  # fmt: skip
GEOMETRIC = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
APPLIED = 0.5  # chance that an operation that was drawn is applied
FILL = 128  # of what a map shows from outside the clip: the grey that normalises to zero under mean 0.5


@dataclass(frozen=True)
class RandAugment:
  """`num_ops` draws of an operation of a strength of 0 to 10, normally distributed about `magnitude` and cut."""

  num_ops: int = 2
  magnitude: float = 9.0
  magnitude_std: float = 0.5


def identity() -> np.ndarray:
  return np.eye(2, 3)


def rotation(degrees: float, size: tuple[int, int]) -> np.ndarray:
  """Turns the picture counter-clockwise about the centre of (height, width)."""
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  return _about_centre(np.array([[cos, -sin], [sin, cos]]), size)


def then(first: np.ndarray | None, second: np.ndarray) -> np.ndarray:
  """What applying `first` to the clip and `second` to the result shows."""
  if first is None:
    return second
  return first @ np.vstack([second, (0.0, 0.0, 1.0)])


def random_rotation(rng: np.random.Generator, most: float, size: tuple[int, int]) -> np.ndarray:
  """A rotation by an angle that is uniform in +-`most` degrees."""
  return rotation((2.0 * rng.random() - 1.0) * most, size)


def random_operations(rng: np.random.Generator, settings: RandAugment, size: tuple[int, int]) -> np.ndarray | None:
  """The geometric ones of `num_ops` random operations as one map; None if there are none.

  Strengths at magnitude 10: 30 degrees, a shear of 0.3, a shift of 0.45 of the side; either sign.
  Shears are about the centre (timm's are about a corner) and all is bilinear (timm's draws bicubic, too): our choice.
  """
  height, width = size
  found = None
  for op, applied, radius, angle, sign in rng.random((settings.num_ops, 5)):
    name = (PHOTOMETRIC + GEOMETRIC)[math.floor(op * len(PHOTOMETRIC + GEOMETRIC))]
    normal = math.sqrt(-2.0 * math.log(1.0 - radius)) * math.cos(2.0 * math.pi * angle)  # Box and Muller
    level = min(max(settings.magnitude + settings.magnitude_std * normal, 0.0), 10.0) / 10.0
    level = level if sign < 0.5 else -level
    if name in PHOTOMETRIC or applied >= APPLIED:
      continue
    one = {
      'rotate': rotation(30.0 * level, size),
      'shear_x': _about_centre(np.array([[1.0, 0.3 * level], [0.0, 1.0]]), size),
      'shear_y': _about_centre(np.array([[1.0, 0.0], [0.3 * level, 1.0]]), size),
      'translate_x': np.array([[1.0, 0.0, 0.45 * level * width], [0.0, 1.0, 0.0]]),
      'translate_y': np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.45 * level * height]]),
    }[name]
    found = then(found, one)
  return found


def projective(map_2x3: np.ndarray | None) -> np.ndarray:
  """f64 [8]: the map, or for None the identity, as TensorFlow's ImageProjectiveTransform takes it."""
  return np.append(identity() if map_2x3 is None else map_2x3, (0.0, 0.0))


def _about_centre(linear_2x2: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  centre = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
  return np.column_stack([linear_2x2, centre - linear_2x2 @ centre])
