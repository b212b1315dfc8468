"""Multi-head self-attention: over the frames at one place, the patches of one frame, or all tokens of a clip."""

import functools
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

# Tokens in one matrix of logits: the lanes of a TPU's vector registers.
_LANES = 128


def written(arrays: Any) -> Any:
  """The arrays, which XLA writes to memory on a TPU before it computes anything from them; elsewhere it may fuse."""
  return jax.lax.platform_dependent(arrays, tpu=jax.lax.optimization_barrier, default=lambda arrays: arrays)


def rows_together(num_rows: int, length: int, most: int = _LANES) -> int:
  """How many rows of `length` tokens `attend` should treat as parts of one.

  The 8 x 8 logits of eight frames would be padded to 8 x 128 on a TPU, and laid out anew for every product. Those of
  14 places at once, masked to the diagonal blocks, cost fewer cycles although most of them are thrown away.

  Args:
    num_rows: rows that may be joined, those of one clip.
    length: tokens in each.
    most: tokens that they may have together.

  Returns:
    The largest divisor of `num_rows` that leaves them at most so many tokens; 1 if two rows have more.
  """
  return max(n for n in range(1, num_rows + 1) if num_rows % n == 0 and (n == 1 or n * length <= most))


def _same_part(length: int, part: int) -> jax.Array | None:
  """Bool [L, L]: True within blocks of `part` tokens; None if all tokens are of the same one."""
  if length == part:
    return None
  part_L = jnp.asarray(np.arange(length) // part)
  return part_L[:, None] == part_L


def _logits(query_RxHxLxK: jax.Array, key_RxHxLxK: jax.Array, part: int) -> jax.Array:
  logits_RxHxLxL = _multiply(query_RxHxLxK, key_RxHxLxK.swapaxes(2, 3))
  same_part_LxL = _same_part(logits_RxHxLxL.shape[-1], part)
  return logits_RxHxLxL if same_part_LxL is None else jnp.where(same_part_LxL, logits_RxHxLxL, -1e30)


def _largest_logit(query_RxHxLxK: jax.Array, key_RxHxLxK: jax.Array, part: int) -> jax.Array:
  """Float32 [R, H, L, 1], the shift of the softmax.

  On TPUs its logits are a product of their own, so that the exponential is the epilogue of the second one and no logits
  are ever written. The maximum must be written, else XLA computes it beside the exponential and writes those logits.
  """
  query_RxHxLxK, key_RxHxLxK = written((query_RxHxLxK, key_RxHxLxK))
  return written(_logits(query_RxHxLxK, key_RxHxLxK, part).max(axis=-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query_RxHxLxK: jax.Array, key_RxHxLxK: jax.Array, value_RxHxLxK: jax.Array, part: int) -> jax.Array:
  """Softmax attention of every token of a row to the tokens of the same part of the row.

  Rows and heads come first, so that both products are batched matrix products with leading batch axes, which XLA's
  CPU backend runs up to twice as fast as the same einsum over [R, L, H, K]; they stay apart, so that a mesh can shard
  both. Weights are normalised after the product with the values, which is linear in them and K/L of the work.

  The gradient is written out: the backward pass gets the weights before normalisation in the dtype of the values, and
  every [L, L] array it makes is the epilogue of a product. On the TPU compiler that is a tenth faster than what JAX
  derives.

  Args:
    query_RxHxLxK: R rows of L tokens, H heads of K features each, any float dtype; so are the keys and values.
    part: tokens in a part: token i attends to those j with j // part == i // part. The last part may be shorter.

  Returns:
    The attended values [R, H, L, K] in the values' dtype. The softmax is float32.
  """
  return _attend_forward(query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, part)[0]


def _attend_forward(query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, part):
  scaled_RxHxLxK = query_RxHxLxK * query_RxHxLxK.shape[-1] ** -0.5
  shift_RxHxLx1 = _largest_logit(scaled_RxHxLxK, key_RxHxLxK, part)
  weights_RxHxLxL = jnp.exp(_logits(scaled_RxHxLxK, key_RxHxLxK, part) - shift_RxHxLx1)
  total_RxHxLx1 = weights_RxHxLxL.sum(axis=-1, keepdims=True)
  weights_RxHxLxL = weights_RxHxLxL.astype(value_RxHxLxK.dtype)
  context_RxHxLxK = _multiply(weights_RxHxLxL, value_RxHxLxK) / total_RxHxLx1
  # Else the float32 product is what is kept, and divided again by all that read it.
  context_RxHxLxK = written(context_RxHxLxK.astype(value_RxHxLxK.dtype))
  kept = query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, weights_RxHxLxL, total_RxHxLx1, context_RxHxLxK
  return context_RxHxLxK, kept


def _attend_backward(part, kept, d_context_RxHxLxK):
  del part  # the weights are zero wherever the mask was
  query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, weights_RxHxLxL, total_RxHxLx1, context_RxHxLxK = kept
  dtype, scale = query_RxHxLxK.dtype, query_RxHxLxK.shape[-1] ** -0.5
  d_context_RxHxLxK = d_context_RxHxLxK / total_RxHxLx1
  mean_RxHxLx1 = (d_context_RxHxLxK * context_RxHxLxK).sum(axis=-1, keepdims=True)
  d_context_RxHxLxK = d_context_RxHxLxK.astype(dtype)
  d_weights_RxHxLxL = _multiply(d_context_RxHxLxK, value_RxHxLxK.swapaxes(2, 3))
  d_logits_RxHxLxL = (weights_RxHxLxL * (d_weights_RxHxLxL - mean_RxHxLx1)).astype(dtype)
  d_query_RxHxLxK = _multiply(d_logits_RxHxLxL, key_RxHxLxK) * scale
  d_key_RxHxLxK = _multiply(d_logits_RxHxLxL.swapaxes(2, 3), query_RxHxLxK) * scale
  d_value_RxHxLxK = _multiply(weights_RxHxLxL.swapaxes(2, 3), d_context_RxHxLxK)
  return tuple(d.astype(dtype) for d in (d_query_RxHxLxK, d_key_RxHxLxK, d_value_RxHxLxK))


attend.defvjp(_attend_forward, _attend_backward)


def attend_capped(query_RxHxLxK: jax.Array, key_RxHxLxK: jax.Array, value_RxHxLxK: jax.Array, cap: float) -> jax.Array:
  """Softmax attention of every token of a row to all of it, with logits x squashed to cap * tanh(x / cap) in float32.

  Returns:
    The attended values [R, H, L, K] in the values' dtype.
  """
  logits_RxHxLxL = _multiply(query_RxHxLxK * query_RxHxLxK.shape[-1] ** -0.5, key_RxHxLxK.swapaxes(2, 3))
  weights_RxHxLxL = jax.nn.softmax(cap * jnp.tanh(logits_RxHxLxL / cap), axis=-1)
  return _multiply(weights_RxHxLxL.astype(value_RxHxLxK.dtype), value_RxHxLxK).astype(value_RxHxLxK.dtype)


def attention_probabilities(query_RxHxLxK: jax.Array, key_RxHxLxK: jax.Array) -> jax.Array:
  """What `attend` weights the values with, float32 [R, H, L, L], for rows of one part."""
  scale = query_RxHxLxK.shape[-1] ** -0.5
  return jax.nn.softmax(_multiply(query_RxHxLxK * scale, key_RxHxLxK.swapaxes(2, 3)), axis=-1)


class Projection(nn.Module):
  """A Linear between [D] and [H, K]: contracts the last axes of x with the first axes of the kernel.

  `nn.DenseGeneral` would do, but it initialises its kernel flattened, which fails under a mesh where the axes of the
  unflattened kernel have names.

  Attributes:
    shape: of the kernel.
    axes: logical names of the kernel's axes.
    contracted: the number of axes to contract; the other ones make the bias.
    dtype: dtype of the computation.
    init_std: of the kernel's truncated normal.
    use_bias: adds a bias.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contracted: int
  dtype: Any = jnp.float32
  init_std: float = 0.02
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n = self.contracted
    init = nn.initializers.truncated_normal(self.init_std)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, self.axes), self.shape)
    if not self.use_bias:
      return jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=n)
    bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, self.axes[n:]), self.shape[n:])
    x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
    return jnp.tensordot(x, kernel, axes=n) + bias


class Attention(nn.Module):
  """Multi-head self-attention with biases, no dropout.

  Query, key and value are three projections rather than one: on the TPU compiler a split of one wide product
  costs copies.

  Attributes:
    num_heads: must divide the feature size.
    dtype: dtype of the computation; the softmax is float32, parameters are float32.
    init_std: of the kernels' truncated normal.
  """

  num_heads: int
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, x_RxLxD: jax.Array, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """Attends within rows, or within equal parts of rows.

    Args:
      x_RxLxD: R rows of L tokens.
      parts: P, a divisor of L; each part of a row attends to itself only.

    Returns:
      Tokens [R, L, D] and attention probabilities [R * P, H, L / P, L / P] (float32), which cost nothing where they
      are not used.
    """
    rows, length, width = x_RxLxD.shape
    part = length // parts
    by_head = self.num_heads, width // self.num_heads
    # Whole registers of eight rows, else XLA lays out every [L, L] array anew to save the memory of the padding.
    # Below 128 tokens the extra ones would cost more than that.
    padding = -length % 8 if length >= _LANES else 0
    padded_RxLxD = jnp.pad(x_RxLxD, ((0, 0), (0, padding), (0, 0)))
    query_RxHxLxK, key_RxHxLxK, value_RxHxLxK = (
      Projection((width, *by_head), ('embed', 'heads', 'head_dim'), 1, self.dtype, self.init_std, name=name)(
        padded_RxLxD
      ).swapaxes(1, 2)
      for name in ('query', 'key', 'value')
    )
    if part == 1:
      # One key gets all the attention, so XLA drops the query and the key with all their cost.
      context_RxHxLxK = value_RxHxLxK
      probs_RPxHxLxL = jnp.ones((rows * parts, self.num_heads, 1, 1), jnp.float32)
    else:
      # The padding is a part of its own, that no other attends to.
      context_RxHxLxK = attend(query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, part)
      by_part = lambda x: einops.rearrange(x[:, :, :length], 'r h (p l) k -> (r p) h l k', p=parts)
      probs_RPxHxLxL = attention_probabilities(by_part(query_RxHxLxK), by_part(key_RxHxLxK))
    out = Projection((*by_head, width), ('heads', 'head_dim', 'embed'), 2, self.dtype, self.init_std, name='out')
    out_RxLxD = out(context_RxHxLxK.swapaxes(1, 2))[:, :length]
    # The name under which the remat policy 'attention' of TimeSformer keeps it.
    return checkpoint_name(out_RxLxD, 'attention'), probs_RPxHxLxL
