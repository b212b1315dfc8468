"""Grey, blends and hue of pixels: what the photometric augmentations share."""

import jax
import jax.numpy as jnp

# ITU-R 601, the grey of Pillow and torchvision.
_LUMA = (0.299, 0.587, 0.114)


def luma(clip: jax.Array) -> jax.Array:
  """Grey value [..., 1] of pixels [..., 3] (ITU-R 601)."""
  return jnp.sum(clip * jnp.asarray(_LUMA, clip.dtype), axis=-1, keepdims=True)


def blend(from_: jax.Array, to: jax.Array, factor: jax.Array) -> jax.Array:
  """`from_` at factor 0, `to` at 1, beyond it above 1 (Pillow's Image.blend)."""
  return from_ + factor * (to - from_)


def shift_hue(clip: jax.Array, turns: jax.Array) -> jax.Array:
  """Turns the hue of HSV by a share of the colour wheel; saturation and value stay.

  Written without dividing by the value, so that it holds for pixels outside [0, 1] as well.
  """
  r, g, b = clip[..., 0:1], clip[..., 1:2], clip[..., 2:3]
  top, bottom = jnp.max(clip, axis=-1, keepdims=True), jnp.min(clip, axis=-1, keepdims=True)
  chroma = top - bottom
  safe = jnp.where(chroma > 0, chroma, 1.0)
  # Not `top == r`: a compiler may compute a pixel twice, and the two differ in their last bit. Where two channels are
  # nearly equal, either of their formulas will do.
  from_b = jnp.where(g >= b, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe)
  hue = jnp.where((r >= g) & (r >= b), (g - b) / safe, from_b)
  # In sixths of a turn; red falls away from hue 5, green from 3, blue from 1.
  k = jnp.mod(jnp.asarray([5.0, 3.0, 1.0]) + hue + 6.0 * turns, 6.0)
  return top - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
