"""The photometric half of RandAugment on the device; the geometric one is the host's: `data_pipelines/clips/affine.py`.

RandAugment (Cubuk et al. 2020) applies `num_ops` operations, each drawn evenly from a list. List and magnitudes are
those of timm's "increasing" set ("rand-m9-n2-mstd0.5-inc1" and the like): 15 operations, 10 photometric and 5
geometric, magnitudes 0 to 10, each operation applied with probability 0.5.

Here each half makes `num_ops` draws of its own from the whole list and leaves the other half's operations out. So an
operation is as frequent as in the original, but `num_ops` of them a clip hold on average only, and geometry comes
first: our choice, since moving pixels belongs to the host's one resampling and colours to the device.

One operation holds for all frames of a clip; its statistics (mean, extremes, histogram) are those of the whole clip.
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from cover_jax.augment.colour import blend, luma
from data_pipelines.clips.affine import APPLIED, GEOMETRIC, PHOTOMETRIC
from data_pipelines.declared import number, whole


def photometric(
  rng: jax.Array,
  clip_BxTxHxWx3: jax.Array,
  *,
  num_ops: Annotated[int, whole(0)] = 2,
  magnitude: Annotated[float, number(0, 10)] = 9.0,
  magnitude_std: Annotated[float, number(0)] = 0.5,
) -> jax.Array:
  """Applies the photometric share of `num_ops` random operations.

  Args:
    rng: a key.
    clip_BxTxHxWx3: f32 in [0, 1].
    num_ops: operations drawn a clip, geometric ones among them.
    magnitude: 0 (weak) to 10.
    magnitude_std: of a normal distribution about the magnitude, cut to [0, 10]; one draw an operation.

  Returns:
    f32 [B, T, H, W, 3] in [0, 1].
  """
  batch = len(clip_BxTxHxWx3)
  x = clip_BxTxHxWx3
  for i in range(num_ops):
    keys = jax.random.split(jax.random.fold_in(rng, i), 4)
    op_B = jax.random.randint(keys[0], (batch,), 0, len(PHOTOMETRIC) + len(GEOMETRIC))
    skipped_B = jax.random.uniform(keys[1], (batch,)) >= APPLIED
    level_B = jnp.clip(magnitude + magnitude_std * jax.random.normal(keys[2], (batch,)), 0, 10) / 10
    sign_B = jnp.where(jax.random.bernoulli(keys[3], 0.5, (batch,)), 1.0, -1.0)
    x = apply(x, jnp.where(skipped_B, -1, op_B), level_B, sign_B)
  return x


def apply(clip_BxTxHxWx3: jax.Array, op_B: jax.Array, level_B: jax.Array, sign_B: jax.Array) -> jax.Array:
  """One operation a clip.

  All of them are computed for all clips and one is chosen: a branch on the data would not run in parallel over the
  batch, and all but `equalize` and `sharpness` are a few operations a pixel that XLA makes one loop of.

  Args:
    clip_BxTxHxWx3: f32 in [0, 1].
    op_B: int32, index into PHOTOMETRIC; anything else leaves the clip as it is.
    level_B: f32 in [0, 1], the strength.
    sign_B: f32, -1 or 1: whether an enhancement is less or more than the original.

  Returns:
    f32 [B, T, H, W, 3] in [0, 1].
  """
  x = clip_BxTxHxWx3
  over = lambda value_B: value_B[:, None, None, None, None]
  level, factor = over(level_B), over(1.0 + 0.9 * sign_B * level_B)
  results = {
    'autocontrast': autocontrast(x),
    'equalize': equalize(x),
    'invert': 1.0 - x,
    'posterize': posterize(x, jnp.floor(4.0 - jnp.floor(4.0 * level))),
    'solarize': jnp.where(jnp.round(x * 255.0) < 256.0 - jnp.floor(256.0 * level), x, 1.0 - x),
    'solarize_add': jnp.where(x * 255.0 < 127.5, x + jnp.floor(110.0 * level) / 255.0, x),
    'color': blend(luma(x), x, factor),
    'contrast': blend(jnp.mean(luma(x), axis=(1, 2, 3, 4), keepdims=True), x, factor),
    'brightness': x * factor,
    'sharpness': blend(smooth(x), x, factor),
  }
  for i, name in enumerate(PHOTOMETRIC):
    x = jnp.where(over(op_B == i), jnp.clip(results[name], 0.0, 1.0), x)
  return x


def autocontrast(clip: jax.Array) -> jax.Array:
  """Stretches each colour to [0, 1]; a colour of one value stays."""
  low = jnp.min(clip, axis=(1, 2, 3), keepdims=True)
  high = jnp.max(clip, axis=(1, 2, 3), keepdims=True)
  return jnp.where(high > low, (clip - low) / jnp.where(high > low, high - low, 1.0), clip)


def posterize(clip: jax.Array, bits: jax.Array) -> jax.Array:
  """Keeps the `bits` highest of 8 bits; 0 bits are black."""
  step = 2.0 ** (8.0 - bits)
  return jnp.floor(jnp.round(clip * 255.0) / step) * step / 255.0


def smooth(clip: jax.Array) -> jax.Array:
  """Pillow's SMOOTH: each frame under (1 1 1, 1 5 1, 1 1 1) / 13; the border stays."""
  padded = jnp.pad(clip, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
  height, width = clip.shape[2:4]
  total = sum(padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3))
  smoothed = (total + 4.0 * clip) / 13.0
  y_H, x_W = jnp.arange(height), jnp.arange(width)
  inside_H, inside_W = (y_H > 0) & (y_H < height - 1), (x_W > 0) & (x_W < width - 1)
  return jnp.where((inside_H[:, None] & inside_W[None, :])[..., None], smoothed, clip)


def equalize(clip_BxTxHxWx3: jax.Array) -> jax.Array:
  """Makes the 256-bin histogram of each colour even, as Pillow's ImageOps.equalize does, over the whole clip.

  A level is 16 a + b, so the histogram is a product of two matrices of 16 columns and looking a level up is another:
  matrix units do that fast, scatters and gathers they do not. One frame at a time bounds the memory.
  """
  level_TxBxNx3 = jnp.moveaxis(jnp.round(clip_BxTxHxWx3 * 255.0).astype(jnp.int32), 1, 0)
  level_TxBxNx3 = level_TxBxNx3.reshape(*level_TxBxNx3.shape[:2], -1, 3)

  def digits(level):  # like the levels below, exact in whatever precision a device multiplies
    return jax.nn.one_hot(level // 16, 16), jax.nn.one_hot(level % 16, 16)

  def count(total_Bx3x16x16, level_BxNx3):
    high, low = digits(level_BxNx3)
    found = jnp.einsum('bnca,bncd->bcad', high, low)
    return total_Bx3x16x16 + found, None

  zero = jnp.zeros((len(clip_BxTxHxWx3), 3, 16, 16), jnp.float32)
  histogram = jax.lax.scan(count, zero, level_TxBxNx3)[0].reshape(-1, 3, 256)
  # The step leaves the last occupied level out; where it is 0 (one level, or almost) nothing changes.
  occupied = histogram > 0
  last = 255 - jnp.argmax(occupied[..., ::-1], axis=-1)
  last_count = jnp.take_along_axis(histogram, last[..., None], axis=-1)
  step = jnp.floor((jnp.sum(histogram, axis=-1, keepdims=True) - last_count) / 255.0)
  before = jnp.cumsum(histogram, axis=-1) - histogram
  table = jnp.floor((jnp.floor(step / 2.0) + before) / jnp.maximum(step, 1.0))
  table = jnp.where(step > 0, jnp.clip(table, 0.0, 255.0), jnp.arange(256.0))
  table_Bx3x16x16 = table.reshape(-1, 3, 16, 16)

  def look_up(_, level_BxNx3):
    high, low = digits(level_BxNx3)
    rows = jnp.einsum('bnca,bcad->bncd', high, table_Bx3x16x16)
    return None, jnp.sum(rows * low, axis=-1)

  new_TxBxNx3 = jax.lax.scan(look_up, None, level_TxBxNx3)[1]
  batch, frames, *rest = clip_BxTxHxWx3.shape
  return jnp.moveaxis(new_TxBxNx3.reshape(frames, batch, *rest), 0, 1) / 255.0
