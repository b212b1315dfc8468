"""Photometric augmentation of clips on the device, inside the jitted step.

Each function takes clips f32 [B, T, H, W, 3] with pixels in [0, 1] and draws once a clip: all its frames change alike,
so a clip that stands still goes on standing still. All B draws come from one key, so they do not depend on how the
batch is split over devices.

A config names them in one place: `config.streams.<stream>.augment = {'color_jitter': {'brightness': 0.4}, ...}`; see
`make`. Geometry (crop, flip, rotation) is the host's: `data_pipelines/loading/views.py`. Mixup and cutmix are
`mixing.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from cover_jax.augment import rand_augment
from cover_jax.augment.colour import blend, luma, shift_hue
from cover_jax.runtime import keys
from data_pipelines import declared
from data_pipelines.clips import affine
from data_pipelines.contract import UserError
from data_pipelines.declared import flag, number, span

_Amount = Annotated[float, number(0)]
_Chance = Annotated[float, number(0, 1)]
_Range = Annotated[tuple[float, float], span(above=0)]


def color_jitter(
  rng: jax.Array,
  clip_BxTxHxWx3: jax.Array,
  *,
  brightness: _Amount = 0.0,
  contrast: _Amount = 0.0,
  saturation: _Amount = 0.0,
  hue: Annotated[float, number(0, 0.5)] = 0.0,
  probability: _Chance = 1.0,
  clamp: Annotated[bool, flag] = True,
) -> jax.Array:
  """Changes brightness, contrast, saturation and hue, in that order (the order is our choice; torchvision draws it).

  Contrast is about the mean grey of the whole clip, not of each frame: with `clamp=False` and without hue the result
  is one affine map of the pixels for all frames, so its differences in time are those of the clip under one linear map.

  Args:
    rng: a key.
    clip_BxTxHxWx3: f32 in [0, 1].
    brightness, contrast, saturation: factors are uniform in [max(0, 1 - x), 1 + x]; 0 leaves the pixels alone.
    hue: turns of the colour wheel, uniform in [-hue, hue]; at most 0.5.
    probability: of changing a clip at all.
    clamp: cut to [0, 1] after each change, as 8-bit images are.

  Returns:
    f32 [B, T, H, W, 3], in [0, 1] if clamp.
  """
  keys = jax.random.split(rng, 5)
  cut = (lambda x: jnp.clip(x, 0.0, 1.0)) if clamp else (lambda x: x)
  factor = lambda key, x: _per_clip(key, clip_BxTxHxWx3, max(0.0, 1.0 - x), 1.0 + x)
  x = clip_BxTxHxWx3
  if brightness:
    x = cut(x * factor(keys[0], brightness))
  if contrast:
    mean_Bx1x1x1x1 = jnp.mean(luma(x), axis=(1, 2, 3, 4), keepdims=True)
    x = cut(blend(mean_Bx1x1x1x1, x, factor(keys[1], contrast)))
  if saturation:
    x = cut(blend(luma(x), x, factor(keys[2], saturation)))
  if hue:
    x = cut(shift_hue(x, _per_clip(keys[3], x, -hue, hue)))
  return sometimes(keys[4], probability, x, clip_BxTxHxWx3)


def grayscale(rng: jax.Array, clip_BxTxHxWx3: jax.Array, probability: _Chance) -> jax.Array:
  """Replaces a clip's colours by their grey (ITU-R 601), with a probability."""
  grey = jnp.broadcast_to(luma(clip_BxTxHxWx3), clip_BxTxHxWx3.shape)
  return sometimes(rng, probability, grey, clip_BxTxHxWx3)


def gaussian_blur(
  rng: jax.Array, clip_BxTxHxWx3: jax.Array, *, probability: _Chance = 0.5, sigma: _Range = (0.1, 2.0)
) -> jax.Array:
  """Blurs each frame with a Gaussian of `sigma` pixels, uniform in the range given (Chen et al. 2020, appendix A).

  The kernel ends at two of the largest sigma, in whole pixels; borders repeat their last pixel.
  """
  key, chance = jax.random.split(rng)
  radius = max(round(2 * sigma[1]), 1)
  sigma_B = jax.random.uniform(key, (len(clip_BxTxHxWx3),), minval=sigma[0], maxval=sigma[1])
  weight_BxK = jax.nn.softmax(-0.5 * (jnp.arange(-radius, radius + 1.0) / sigma_B[:, None]) ** 2)
  x = clip_BxTxHxWx3
  for axis in (2, 3):
    edges = [(radius, radius) if a == axis else (0, 0) for a in range(5)]
    padded = jnp.pad(x, edges, mode='edge')
    parts = [jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(2 * radius + 1)]
    x = sum(weight_BxK[:, i, None, None, None, None] * part for i, part in enumerate(parts))
  return sometimes(chance, probability, x, clip_BxTxHxWx3)


def random_erasing(
  rng: jax.Array,
  clip_BxTxHxWx3: jax.Array,
  *,
  probability: _Chance = 0.25,
  area: _Range = (0.02, 1 / 3),
  ratio: _Range = (0.3, 10 / 3),
) -> jax.Array:
  """Fills one box, the same in all frames, with noise (Zhong et al. 2020, section 3; ranges as in timm).

  Args:
    rng: a key.
    clip_BxTxHxWx3: f32 in [0, 1].
    probability: of erasing anything.
    area: lowest and highest share of the frame. A box higher or wider than the frame is cut to it.
    ratio: lowest and highest height over width, log-uniform.

  Returns:
    f32 [B, T, H, W, 3]. The noise is uniform in [0, 1] a pixel and colour and stands still over the frames.
  """
  batch, _, height, width, _ = clip_BxTxHxWx3.shape
  keys = jax.random.split(rng, 6)
  area_B = jax.random.uniform(keys[0], (batch,), minval=area[0], maxval=area[1]) * height * width
  log_B = jax.random.uniform(keys[1], (batch,), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
  high_B = jnp.clip(jnp.round(jnp.sqrt(area_B * jnp.exp(log_B))), 1, height)
  wide_B = jnp.clip(jnp.round(jnp.sqrt(area_B / jnp.exp(log_B))), 1, width)
  top_B = jnp.floor(jax.random.uniform(keys[2], (batch,)) * (height - high_B + 1))
  left_B = jnp.floor(jax.random.uniform(keys[3], (batch,)) * (width - wide_B + 1))
  inside_BxHxW = box_mask(top_B, left_B, high_B, wide_B, height, width)
  noise = jax.random.uniform(keys[4], (batch, 1, height, width, 3))
  erased = jnp.where(inside_BxHxW[:, None, :, :, None], noise, clip_BxTxHxWx3)
  return sometimes(keys[5], probability, erased, clip_BxTxHxWx3)


@dataclasses.dataclass(frozen=True)
class Augment:
  """What `config.streams.<stream>.augment` asks for, by who does it.

  Attributes:
    photometric: (rng, pixels 0..255 of any dtype [B, T, H, W, 3]) -> f32 pixels 0..255; None for none.
    geometry: of RandAugment, done by the host; None for none.
    mixing: {'mixup': x, 'cutmix': x}, options of an objective that has labels to mix.
  """

  photometric: Callable[[jax.Array, jax.Array], jax.Array] | None
  geometry: affine.RandAugment | None
  mixing: Mapping[str, float]


def make(options: Mapping[str, Any], where: str) -> Augment:
  """Puts the augmentations of a stream together.

  Args:
    options: {'color_jitter': {...}, 'grayscale': {...}, 'gaussian_blur': {...}, 'rand_augment': {...},
      'random_erasing': {...}} with the keyword arguments of the functions, applied in that order; and 'mixup' and
      'cutmix', numbers (see `mixing.draw`), which come last.
    where: the config key, for messages.

  Raises:
    UserError: for an augmentation or an argument that there is not, a value out of its range, or RandAugment behind
      a jitter that leaves the range of pixels.
  """
  declared.check(options, OPTIONS, where)
  steps = {name: (function, dict(options[name])) for name, function in _FUNCTIONS.items() if name in options}
  if 'rand_augment' in options and not options.get('color_jitter', {}).get('clamp', True):
    raise UserError(
      f'{where} has color_jitter with clamp=False, which leaves the range of pixels, and after it rand_augment, whose '
      'operations are not defined outside: set clamp=True, or take one of the two out.'
    )
  mixing = {key: options[key] for key in _MIXING if options.get(key)}

  def photometric(rng, clip_BxTxHxWx3):
    x = clip_BxTxHxWx3.astype(jnp.float32) / 255.0
    for name, (function, given) in steps.items():
      x = function(keys.of(rng, name), x, **given)
    return x * 255.0

  geometry = affine.RandAugment(**options['rand_augment']) if 'rand_augment' in options else None
  return Augment(photometric if steps else None, geometry, mixing)


_FUNCTIONS = {
  'color_jitter': color_jitter,
  'grayscale': grayscale,
  'gaussian_blur': gaussian_blur,
  'rand_augment': rand_augment.photometric,
  'random_erasing': random_erasing,
}
_MIXING = ('mixup', 'cutmix')

# What `config.streams.<stream>.augment` may hold.
OPTIONS: declared.Keys = {
  **{name: declared.options_of(function) for name, function in _FUNCTIONS.items()},
  **dict.fromkeys(_MIXING, declared.Key(0.0, number(0))),
}


def box_mask(top_B, left_B, high_B, wide_B, height: int, width: int) -> jax.Array:
  """Bool [B, H, W]: True inside each box."""
  y_H, x_W = jnp.arange(height), jnp.arange(width)
  in_y_BxH = (y_H >= top_B[:, None]) & (y_H < (top_B + high_B)[:, None])
  in_x_BxW = (x_W >= left_B[:, None]) & (x_W < (left_B + wide_B)[:, None])
  return in_y_BxH[:, :, None] & in_x_BxW[:, None, :]


def sometimes(rng: jax.Array, probability: float, changed: jax.Array, clip: jax.Array) -> jax.Array:
  """`changed` for a share of the clips, `clip` for the others."""
  if probability >= 1.0:
    return changed
  return jnp.where(_per_clip(rng, clip, 0.0, 1.0) < probability, changed, clip)


def _per_clip(rng: jax.Array, clip: jax.Array, low: float, high: float) -> jax.Array:
  return jax.random.uniform(rng, (len(clip), 1, 1, 1, 1), minval=low, maxval=high)
