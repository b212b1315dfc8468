"""Mixup and cutmix on the device, between clips of one source: their labels belong to one head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cover_jax.augment.photometric import box_mask


class Mix(NamedTuple):
  """How each clip of a sub-batch is mixed with another one.

  Attributes:
    partner_B: int32, the other clip; the clip itself where there is no other of its group.
    weight_BxHxW: f32 in [0, 1], the share of the clip itself in each pixel, the same in all frames.
    share_B: f32 in [0, 1], the mean of `weight_BxHxW`: the share of the clip's own label.
  """

  partner_B: jax.Array
  weight_BxHxW: jax.Array
  share_B: jax.Array


def draw(
  rng: jax.Array, group_B: jax.Array, height: int, width: int, *, mixup: float = 0.0, cutmix: float = 0.0
) -> Mix:
  """Draws partners and shares.

  A share is Beta(x, x) distributed (Zhang et al. 2018 for mixup, section 2; Yun et al. 2019 for cutmix, section 3). A
  cutmix box is cut to the frame and the share is then what is left. Where both are given a clip gets either, with equal
  chance, as in timm.

  Args:
    rng: a key.
    group_B: int32; only clips of one group are mixed. Of a batch of several sources: the source.
    height, width: of the frames.
    mixup, cutmix: x of the distributions; 0 for none. At least one of them is positive.
  """
  keys = jax.random.split(rng, 5)
  batch = len(group_B)
  share_of = lambda key, x: jax.random.beta(key, x, x, (batch,)) if x else jnp.ones(batch)
  blend_B = share_of(keys[0], mixup)
  cut_side_B = jnp.sqrt(1.0 - share_of(keys[1], cutmix))
  high_B, wide_B = jnp.round(height * cut_side_B), jnp.round(width * cut_side_B)
  centre_Bx2 = jax.random.uniform(keys[2], (batch, 2)) * jnp.asarray([height, width])
  top_B, left_B = jnp.floor(centre_Bx2[:, 0] - high_B / 2), jnp.floor(centre_Bx2[:, 1] - wide_B / 2)
  outside_BxHxW = ~box_mask(top_B, left_B, high_B, wide_B, height, width)
  use_cut_B = jax.random.uniform(keys[3], (batch,)) < (0.5 if mixup and cutmix else float(cutmix > 0))
  weight_BxHxW = jnp.where(use_cut_B[:, None, None], outside_BxHxW, blend_B[:, None, None])
  return Mix(partners(keys[4], group_B), weight_BxHxW, jnp.mean(weight_BxHxW, axis=(1, 2)))


def partners(rng: jax.Array, group_B: jax.Array) -> jax.Array:
  """int32 [B]: a random permutation that maps each group to itself, and nothing to itself but the only one of a group.

  Each group stands in a random circle and the next one is the partner. Shapes do not depend on the groups' sizes.
  """
  order_B = jnp.lexsort((jax.random.uniform(rng, group_B.shape), group_B))
  sorted_B = group_B[order_B]
  first_B = jnp.searchsorted(sorted_B, sorted_B, side='left')
  after_B = jnp.searchsorted(sorted_B, sorted_B, side='right')
  place_B = jnp.arange(len(group_B)) + 1
  next_B = jnp.where(place_B < after_B, place_B, first_B)
  return jnp.zeros_like(order_B).at[order_B].set(order_B[next_B]).astype(jnp.int32)


def mixed_clip(mix: Mix, clip_BxTxHxWx3: jax.Array) -> jax.Array:
  """f32 [B, T, H, W, 3]: each clip mixed with its partner's."""
  weight_Bx1xHxWx1 = mix.weight_BxHxW[:, None, :, :, None]
  clip = clip_BxTxHxWx3.astype(jnp.float32)
  return weight_Bx1xHxWx1 * clip + (1.0 - weight_Bx1xHxWx1) * clip[mix.partner_B]


def mixed_loss(mix: Mix, own_B: jax.Array, partner_B: jax.Array) -> jax.Array:
  """f32 [B]: the losses under the own label and under the partner's label, in the shares of the mixture."""
  return mix.share_B * own_B + (1.0 - mix.share_B) * partner_B
