"""Patches of space and time, for transformers that look at two frames at once."""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp


def fill_tubelets(clip_BxTxHxWx3: jax.Array, tubelet: int) -> jax.Array:
  """Repeats the frame of an image until it fills one tubelet; longer clips stay as they are."""
  return jnp.repeat(clip_BxTxHxWx3, tubelet, axis=1) if clip_BxTxHxWx3.shape[1] == 1 else clip_BxTxHxWx3


def grid_of(frames: int, size: tuple[int, int], tubelet: int, patch: int) -> tuple[int, int, int]:
  """(T', H', W') of a clip's tokens; an image has T' = 1."""
  return max(frames // tubelet, 1), size[0] // patch, size[1] // patch


def limits(frames: int, size: tuple[int, int], tubelet: int, patch: int) -> str:
  """'' or why clips of this geometry have no whole tubelets."""
  if any(side % patch for side in size):
    return f'the height and width of a clip must be multiples of patch_size = {patch}'
  if frames != 1 and frames % tubelet:
    return f'a clip must have one frame or a multiple of tubelet_size = {tubelet}'
  return ''


class TubeletEmbedding(nn.Module):
  """A Linear on each block of `tubelet` frames and `patch` x `patch` pixels: [B, T, H, W, 3] -> [B, T', H', W', D]."""

  width: int
  tubelet: int
  patch: int
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array) -> jax.Array:
    blocks = einops.rearrange(
      fill_tubelets(clip_BxTxHxWx3, self.tubelet),
      'b (t u) (h p) (w q) c -> b t h w (u p q c)',
      u=self.tubelet,
      p=self.patch,
      q=self.patch,
    )
    kernel_init = nn.with_logical_partitioning(nn.initializers.truncated_normal(self.init_std), (None, 'embed'))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
    linear = nn.Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init, name='projection')
    return linear(blocks.astype(self.dtype))
