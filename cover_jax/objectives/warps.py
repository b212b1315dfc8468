"""Warps of clips in `jit`, which objectives make their labels of: affine maps, and maps of rows and columns.

An affine map is f32 [..., 2, 3], as in `data_pipelines/clips/affine.py`: it takes the (x, y, 1) of an output pixel,
counted from 0 at the centre of the upper left one, to the place in the clip that the pixel shows.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What `affine_map` is made of, in this order.
PARAMETERS = ('rotation', 'scale', 'shear', 'shift_x', 'shift_y')


class Sector(NamedTuple):
  """The field of view of a curved ultrasound probe: a part of a ring that opens downwards.

  Attributes:
    row, column: of the ring's centre, as shares of height and width; the row may lie above the picture (below 0).
    half_angle: degrees to either side of straight down.
    near, far: radii, as shares of the height.
  """

  row: float
  column: float
  half_angle: float
  near: float
  far: float


def linear_part(theta: jax.Array, xp: ModuleType = jnp) -> jax.Array:
  """The [..., 2, 2] of a map: rotation after shear, over the scale.

  Args:
    theta: [..., 5], see `affine_map`.
    xp: numpy or jax.numpy.
  """
  cos, sin, shear = xp.cos(theta[..., 0]), xp.sin(theta[..., 0]), xp.tan(theta[..., 2])
  rows = xp.stack([xp.stack([cos, cos * shear - sin], -1), xp.stack([sin, sin * shear + cos], -1)], -2)
  return rows * xp.exp(-theta[..., 1])[..., None, None]


def affine_map(theta: jax.Array, size: tuple[int, int], xp: ModuleType = jnp) -> jax.Array:
  """Maps [..., 2, 3] about the centre of the picture.

  Args:
    theta: f32 [..., 5], in the order of `PARAMETERS`: rotation (radians, turns the picture counter-clockwise), natural
      logarithm of the scale (above 0 the picture grows), shear (radians), shifts to the right and down (shares of width
      and height).
    size: (height, width) of the picture.
    xp: numpy or jax.numpy.
  """
  height, width = size
  linear = linear_part(theta, xp)
  centre = xp.asarray([(width - 1) / 2, (height - 1) / 2])
  from_x, from_y = centre[0] + theta[..., 3] * width, centre[1] + theta[..., 4] * height
  offset = centre - xp.stack(
    [linear[..., i, 0] * from_x + linear[..., i, 1] * from_y for i in (0, 1)], -1
  )  # no matrix product: its default precision on a TPU would move pixels
  return xp.concatenate([linear, offset[..., None]], -1)


def then(first: jax.Array, second: jax.Array) -> jax.Array:
  """The map [..., 2, 3] that shows what applying `first` to a clip and `second` to the result would."""
  columns = [first[..., 0] * second[..., None, 0, j] + first[..., 1] * second[..., None, 1, j] for j in range(3)]
  return jnp.stack([*columns[:2], columns[2] + first[..., 2]], -1)


def translation(shift_x: jax.Array, shift_y: jax.Array) -> jax.Array:
  """Maps [..., 2, 3] that move the picture right and down by pixels [...]."""
  one, zero = jnp.ones_like(shift_x), jnp.zeros_like(shift_x)
  return jnp.stack([jnp.stack([one, zero, -shift_x], -1), jnp.stack([zero, one, -shift_y], -1)], -2)


def warp(clip_BxTxHxWxC: jax.Array, map_BxSx2x3: jax.Array, sector: Sector | None = None) -> jax.Array:
  """Shows clips as maps say, bilinearly; whatever lies beyond the border is a reflection.

  A border of one colour would tell the angle of the picture.

  Args:
    clip_BxTxHxWxC: f32.
    map_BxSx2x3: one for each of S equal parts of the clip's frames.
    sector: the border is that of this field of view, and what is outside is 0: so the field of view stays where it is
      and only what it shows is moved. None: the border is that of the frame.

  Returns:
    f32 [B, T, H, W, C]; exactly the clip under the identity.
  """
  batch, frames, height, width, channels = clip_BxTxHxWxC.shape
  parts = map_BxSx2x3.shape[1]
  y_N, x_N = (g.reshape(-1).astype(np.float32) for g in np.mgrid[:height, :width])
  a_BxSx2x3x1 = map_BxSx2x3[..., None]
  place_BxSx2xN = a_BxSx2x3x1[..., 0, :] * x_N + a_BxSx2x3x1[..., 1, :] * y_N + a_BxSx2x3x1[..., 2, :]
  x, y = place_BxSx2xN[..., 0, :], place_BxSx2xN[..., 1, :]
  if sector is not None:
    x, y = _into(sector, x, y, height, width)
  x, y = fold(x, 0.0, width - 1.0), fold(y, 0.0, height - 1.0)
  left, top = (jnp.clip(jnp.floor(v), 0, max(n - 2, 0)) for v, n in ((x, width), (y, height)))
  dx, dy = (x - left)[:, :, None, :, None], (y - top)[:, :, None, :, None]
  left, top = left.astype(jnp.int32), top.astype(jnp.int32)
  right, below = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)

  pixels = clip_BxTxHxWxC.reshape(batch, parts, frames // parts, height * width, channels)
  pick = jax.vmap(jax.vmap(lambda of_part, place_N: of_part[:, place_N]))
  at = lambda row, column: pick(pixels, row * width + column)
  between = lambda a, b, share: (1 - share) * a + share * b  # exact at both ends
  upper, lower = (between(at(row, left), at(row, right), dx) for row in (top, below))
  warped = between(upper, lower, dy).reshape(clip_BxTxHxWxC.shape)
  return warped if sector is None else warped * inside(sector, height, width)[..., None]


def fold(x: jax.Array, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
  """Numbers reflected at both ends of [low, high] until they lie within; the ends are not repeated."""
  span = jnp.maximum(jnp.asarray(high - low, x.dtype), 1e-6)
  away = jnp.mod(x - low, 2 * span)
  return low + jnp.clip(jnp.minimum(away, 2 * span - away), 0, span)


def inside(sector: Sector, height: int, width: int) -> np.ndarray:
  """f32 [H, W]: 1 where a pixel lies in the field of view, else 0."""
  y, x = np.mgrid[:height, :width]
  dx, dy = x + 0.5 - sector.column * width, y + 0.5 - sector.row * height
  radius, angle = np.hypot(dx, dy), np.degrees(np.arctan2(dx, dy))
  ring = (radius >= sector.near * height) & (radius <= sector.far * height)
  return (ring & (np.abs(angle) <= sector.half_angle)).astype(np.float32)


def _into(sector, x, y, height, width):
  """Places folded into the field of view, along the radius and around the probe, a pixel and a half from its border.

  The four pixels that a place is mixed of then lie within, at the corners of the field, too.
  """
  centre_x, centre_y = sector.column * width - 0.5, sector.row * height - 0.5
  dx, dy = x - centre_x, y - centre_y
  radius = fold(jnp.hypot(dx, dy), sector.near * height + 1.5, sector.far * height - 1.5)
  half = np.radians(sector.half_angle)
  half = jnp.maximum(half - 1.5 / jnp.maximum(radius, 1.0), 0.5 * half)
  angle = fold(jnp.arctan2(dx, dy), -half, half)
  return centre_x + radius * jnp.sin(angle), centre_y + radius * jnp.cos(angle)


def steps(first: float, last: float, count: int) -> np.ndarray:
  """int64 [count]: places 0, ... whose distances grow or shrink linearly from `first` to `last`, rounded.

  From 2 to 1 is the mirror image of from 1 to 2. Distances of at least 1 never repeat a place.
  """
  if first > last:
    mirrored = steps(last, first, count)
    return mirrored[-1] - mirrored[::-1]
  exact = np.concatenate([[0.0], np.cumsum(np.linspace(first, last, count - 1))])
  return np.floor(exact + 0.5 + 1e-9).astype(np.int64)


def take(clip_BxTxHxWxC: jax.Array, row_BxR: jax.Array, column_BxS: jax.Array) -> jax.Array:
  """The pixels at these rows and columns of each clip as they are, [B, T, R, S, C]: no filter."""
  pick = lambda clip, row_R, column_S: jnp.take(jnp.take(clip, row_R, axis=1), column_S, axis=2)
  return jax.vmap(pick)(clip_BxTxHxWxC, row_BxR, column_BxS)
