"""Temporal Consistent Augmentation (VTDL, arXiv 2008.02129): a still frame mixed in leaves a clip's motion alone."""

import jax
import jax.numpy as jnp


def temporal_consistent(
  rng: jax.Array, clip_BxTxHxWx3: jax.Array, alpha: float, *, one_share: bool = False
) -> jax.Array:
  """Mixes one frame of the clip into all of its frames: x'_t = (1 - s) x_t + s x_k.

  x_k does not depend on t, so differences in time of any order are those of the clip times 1 - s: what moves and how
  stays, what stands still changes. Nothing is cut to the range of pixels, which would break this.

  Args:
    rng: a key.
    clip_BxTxHxWx3: float.
    alpha: the share s is uniform in [0, alpha].
    one_share: draw one s for the whole batch instead of one a clip; k is drawn for each clip in any case.
  """
  frame_key, share_key = jax.random.split(rng)
  batch, frames = clip_BxTxHxWx3.shape[:2]
  k_B = jax.random.randint(frame_key, (batch,), 0, frames)
  share = alpha * jax.random.uniform(share_key, (1 if one_share else batch, 1, 1, 1, 1))
  still_Bx1xHxWx3 = jnp.take_along_axis(clip_BxTxHxWx3, k_B[:, None, None, None, None], axis=1)
  return clip_BxTxHxWx3 + share * (still_Bx1xHxWx3 - clip_BxTxHxWx3)
