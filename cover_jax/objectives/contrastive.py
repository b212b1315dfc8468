"""What contrastive objectives share: projection head, averaged teacher, queue of keys, InfoNCE.

Everything is a pure function of arrays, so that an objective's state is plain data: kept in the train state, saved and
restored with it, and the same on one device and on many. Batch statistics are those of the whole batch, and an averaged
teacher normalises by running ones: none of the tricks that hide statistics (shuffled batches) is needed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models.encoder import Encoded

# exp of it is exactly 0, and the difference of two of them is not NaN.
_MASKED = -1e30


def pool(encoded: Encoded, how: str) -> jax.Array:
  """One feature [B, D] of a clip: 'cls', the encoder's own (a class token, a pooled map), or 'mean', of its tokens."""
  return {'cls': lambda: encoded.feature_BxD, 'mean': lambda: jnp.mean(encoded.tokens_BxTxHxWxD, axis=(1, 2, 3))}[how]()


def unit(x: jax.Array) -> jax.Array:
  """Vectors [..., D] scaled to length 1, in float32; a zero vector stays zero, with finite gradients."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


class ProjectionHead(nn.Module):
  """Features [B, D] to unit vectors [B, dim], float32: `layers` linear layers with ReLU between them.

  Attributes:
    dim: of the vectors that are compared.
    layers: 1 in VTDL's release, 2 in MoCo v2 and MaCLR.
    hidden: width of the layers but the last.
  """

  dim: int = 128
  layers: int = 1
  hidden: int = 2048

  @nn.compact
  def __call__(self, x_BxD: jax.Array) -> jax.Array:
    # Scaled to the width, so that a narrow model projects as far as a wide one.
    init = nn.initializers.lecun_normal()
    for i in range(self.layers):
      first, last = i == 0, i == self.layers - 1
      axes = ('embed' if first else 'mlp', 'mlp' if first and not last else 'embed_out')
      x_BxD = nn.Dense(
        self.dim if last else self.hidden,
        dtype=jnp.float32,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=f'layer_{i}',
      )(x_BxD)
      x_BxD = x_BxD if last else nn.relu(x_BxD)
    return unit(x_BxD)


def ema_update(teacher: Any, student: Any, momentum: float | jax.Array) -> Any:
  """momentum * teacher + (1 - momentum) * student, written so that equal trees stay equal to the bit.

  To be called once after each optimizer step. No gradient flows into the result.
  """
  move = lambda t, s: t + (1.0 - momentum) * (s - t)
  return jax.lax.stop_gradient(jax.tree.map(move, teacher, student))


class Queue(NamedTuple):
  """A ring of the last K keys. It is replicated: 65,536 keys of 128 are 32 MiB.

  Attributes:
    key_KxD: float32 unit vectors.
    source_K, video_K: int32, the source and the original video within it that each key was computed from.
    next: int32 scalar, the slot that the next key takes.
    filled: int32 scalar, slots that hold a key.
  """

  key_KxD: jax.Array
  source_K: jax.Array
  video_K: jax.Array
  next: jax.Array
  filled: jax.Array


def empty_queue(size: int, dim: int) -> Queue:
  """A queue of `size` free slots; a size of 0 is a queue that never holds anything."""
  no_one = jnp.full(size, -1, jnp.int32)
  zero = jnp.zeros((), jnp.int32)
  return Queue(jnp.zeros((size, dim), jnp.float32), no_one, jnp.copy(no_one), zero, jnp.copy(zero))


def push(
  queue: Queue, key_BxD: jax.Array, source_B: jax.Array, video_B: jax.Array, mask_B: jax.Array | None = None
) -> Queue:
  """Puts B keys in, each over the oldest one. B need not divide K and may exceed it: then the last K stay.

  Those that `mask_B` (bool) leaves out, of padding, are not put in.

  To be called after the loss that uses the queue: a key is no negative of its own step. No gradient flows in.
  """
  size = len(queue.source_K)
  if size == 0:
    return queue
  mask_B = jnp.ones(len(key_BxD), bool) if mask_B is None else mask_B
  rank_B = jnp.cumsum(mask_B, dtype=jnp.int32) - 1  # among those that are put in
  count = jnp.sum(mask_B, dtype=jnp.int32)
  kept_B = mask_B & (rank_B >= count - size)  # a scatter to one slot twice would be undefined
  slot_B = jnp.where(kept_B, (queue.next + rank_B) % size, size)  # there is no slot of that number
  put = lambda old, new: old.at[slot_B].set(jax.lax.stop_gradient(new.astype(old.dtype)), mode='drop')
  return Queue(
    key_KxD=put(queue.key_KxD, key_BxD),
    source_K=put(queue.source_K, source_B),
    video_K=put(queue.video_K, video_B),
    next=(queue.next + count) % size,
    filled=jnp.minimum(queue.filled + count, size),
  )


def emptied(state: Any) -> Any:
  """A tree in which every queue has been emptied."""
  is_queue = lambda x: isinstance(x, Queue)
  empty = lambda x: empty_queue(*x.key_KxD.shape) if is_queue(x) else x
  return jax.tree.map(empty, state, is_leaf=is_queue)


def usable(queue: Queue, source_B: jax.Array, video_B: jax.Array) -> jax.Array:
  """Bool [B, K]: the slot holds a key, and of another original video than the example's."""
  filled_K = jnp.arange(len(queue.source_K)) < queue.filled
  same_BxK = (queue.source_K == source_B[:, None]) & (queue.video_K == video_B[:, None])
  return filled_K & ~same_BxK


class Negatives(NamedTuple):
  """What an example is to be told from.

  Attributes:
    vector: float [K, D], the same for all examples, or [B, J, D], each example's own.
    mask: bool, broadcastable to [B, K] or [B, J]: False leaves an entry out.
  """

  vector: jax.Array
  mask: jax.Array | bool = True


class InfoNCE(NamedTuple):
  """Per-example results, float32 [B].

  Attributes:
    loss: cross-entropy of the positive among positive and negatives; 0 where there is no negative.
    top1: 1 where the positive is more similar than every negative.
    positive: cosine of query and key.
    negatives: for each group of negatives the mean cosine over those that are not left out; 0 where all are.
  """

  loss: jax.Array
  top1: jax.Array
  positive: jax.Array
  negatives: tuple[jax.Array, ...]


def info_nce(
  query_BxD: jax.Array, key_BxD: jax.Array, negatives: Sequence[Negatives], *, temperature: float | jax.Array
) -> InfoNCE:
  """-log(exp(q.k / t) / (exp(q.k / t) + sum over the negatives of exp(q.n / t))) (arXiv 1807.03748, 1911.05722).

  Args:
    query_BxD, key_BxD: unit vectors. The gradient flows into both; stop it where it must not.
    negatives: groups of them, unit vectors.
    temperature: t.
  """
  query_BxD, key_BxD = query_BxD.astype(jnp.float32), key_BxD.astype(jnp.float32)
  positive_B = jnp.sum(query_BxD * key_BxD, axis=-1)
  columns, masks, means = [positive_B[:, None]], [jnp.ones((len(query_BxD), 1), bool)], []
  for vector, mask in negatives:
    equation = 'bd,kd->bk' if vector.ndim == 2 else 'bd,bkd->bk'
    # The default precision of TPUs and of some GPUs would round the cosines to three digits.
    cosine_BxK = jnp.einsum(equation, query_BxD, vector.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    mask_BxK = jnp.broadcast_to(mask, cosine_BxK.shape)
    columns.append(cosine_BxK)
    masks.append(mask_BxK)
    count_B = jnp.sum(mask_BxK, axis=-1)
    means.append(jnp.sum(cosine_BxK, axis=-1, where=mask_BxK) / jnp.maximum(count_B, 1))
  cosine_BxC, mask_BxC = jnp.concatenate(columns, axis=-1), jnp.concatenate(masks, axis=-1)
  logits_BxC = jnp.where(mask_BxC, cosine_BxC / temperature, _MASKED)
  loss_B = jax.nn.logsumexp(logits_BxC, axis=-1) - logits_BxC[:, 0]
  # Written with <, so that neither a tie nor a NaN counts as a hit.
  top1_B = jnp.all(logits_BxC[:, 1:] < logits_BxC[:, :1], axis=-1)
  return InfoNCE(loss_B, top1_B.astype(jnp.float32), positive_B, tuple(means))
