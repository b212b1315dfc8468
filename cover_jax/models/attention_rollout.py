"""Attention rollout for divided space-time attention: which patches of which frames the class token looked at.

Abnar & Zuidema (2020, arXiv 2005.00928) multiply, block by block, the matrices (I + A) / 2, where A is the attention
averaged over heads and I stands for the residual path. Their A is one matrix over all tokens. A divided block has two
attentions over different groups of tokens; the extension is our choice and follows the block's own arithmetic:

  time   a patch mixes with the patches at its place in other frames; the class token is left as it is.
  space  a patch mixes with the class token and the patches of its frame; the class token does so in every frame, and
         the results are averaged over the frames.

With both written as row-stochastic matrices M over all 1 + N * T tokens, the rollout is the class token's row of
M_space(L) M_time(L) ... M_space(1) M_time(1). That row is taken backwards through the blocks, vector by matrix within
each group of tokens: O(L (N T^2 + T N^2)) instead of products of (1 + N T)^2 matrices. 'joint' and 'space' attention
are the same without the time step.

As any rollout it takes the two paths of a residual as equal and leaves the MLPs, the values and `temporal_fc` out: it
shows where information could come from, not what decided.
"""

from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp


def class_token_rollout(attention: Mapping[str, jax.Array]) -> jax.Array:
  """Rolls attention out from the class token to the tokens before the first block.

  Args:
    attention: what the model gave under ['attention']['blocks'] with `mutable=['attention']`; see
      `cover_jax.models.timesformer.TimeSformer`. Whether it has 'time' tells divided attention from the others.

  Returns:
    float32 [B, 1 + N * T] in the order of the model's tokens; not negative, sums to 1.
  """
  mean = {name: jnp.asarray(probs, jnp.float32).mean(axis=3) for name, probs in attention.items()}
  _, batch, frames, tokens, _ = mean['space'].shape
  # A row over the tokens of every frame. Divided attention has one class token: each frame holds an equal share.
  # 'space' averages the frames' class tokens at the end; 'joint' is one "frame" of all tokens.
  start_BxTxM = jnp.zeros((batch, frames, tokens)).at[:, :, 0].set(1 / frames)

  def before(row_BxTxM, probs):
    """The row before a block, from the row behind it."""
    attended_BxTxM = jnp.einsum('btm,btmk->btk', row_BxTxM, probs['space'], precision='highest')
    row_BxTxM = (row_BxTxM + attended_BxTxM) / 2
    if 'time' in probs:
      class_BxTx1, patches_BxTxN = row_BxTxM[:, :, :1], row_BxTxM[:, :, 1:]
      attended_BxTxN = jnp.einsum('btn,bntk->bkn', patches_BxTxN, probs['time'], precision='highest')
      class_BxTx1 = jnp.broadcast_to(class_BxTx1.mean(axis=1, keepdims=True), class_BxTx1.shape)
      row_BxTxM = jnp.concatenate([class_BxTx1, (patches_BxTxN + attended_BxTxN) / 2], axis=2)
    return row_BxTxM, None

  row_BxTxM, _ = jax.lax.scan(before, start_BxTxM, mean, reverse=True)
  class_Bx1 = row_BxTxM[:, :, 0].sum(axis=1, keepdims=True)
  return jnp.concatenate([class_Bx1, einops.rearrange(row_BxTxM[:, :, 1:], 'b t n -> b (n t)')], axis=1)


def heat_maps(rollout_BxS: jax.Array, num_frames: int, grid: tuple[int, int]) -> jax.Array:
  """Lays the patches' part of a rollout over the frames.

  Args:
    rollout_BxS: of `class_token_rollout`.
    num_frames: T.
    grid: (rows, columns) of patches in a frame.

  Returns:
    float32 [B, T, rows, columns]; sums to 1 over each clip.
  """
  patches_BxP = rollout_BxS[:, 1:] / rollout_BxS[:, 1:].sum(axis=1, keepdims=True)
  return einops.rearrange(patches_BxP, 'b (r c t) -> b t r c', t=num_frames, r=grid[0], c=grid[1])
