"""Multi-head self-attention over short sequences (the frames at one place, the patches of one frame)."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def attend(query_RxLxHxK: jax.Array, key_RxLxHxK: jax.Array, value_RxLxHxK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Softmax attention of every token of a row to every token of the same row.

  Heads move next to the rows before the products: both are then plain batched matrix products with leading
  batch axes, which XLA's CPU backend runs up to twice as fast as the same einsum over [R, L, H, K]. The two
  batch axes stay apart, so that a mesh can shard rows and heads at once. Weights are normalised after the
  product with the values, which is linear in them and K/L of the work.

  Args:
    query_RxLxHxK: R rows of L tokens, H heads of K features each, any float dtype; so are the keys and
      values.

  Returns:
    The attended values [R, L, H, K] in the values' dtype, and the attention probabilities [R, H, L, L] in
    float32, which cost nothing where they are not used.
  """
  scale = query_RxLxHxK.shape[-1] ** -0.5
  query_RxHxLxK, key_RxHxLxK, value_RxHxLxK = (
    x.swapaxes(1, 2) for x in (query_RxLxHxK * scale, key_RxLxHxK, value_RxLxHxK)
  )
  multiply = partial(jnp.matmul, preferred_element_type=jnp.float32)
  logits_RxHxLxL = multiply(query_RxHxLxK, key_RxHxLxK.swapaxes(2, 3))
  # The softmax does not depend on the shift, so neither does its gradient.
  shift_RxHxLx1 = jax.lax.stop_gradient(logits_RxHxLxL.max(axis=-1, keepdims=True))
  weights_RxHxLxL = jnp.exp(logits_RxHxLxL - shift_RxHxLx1)
  total_RxHxLx1 = weights_RxHxLxL.sum(axis=-1, keepdims=True)
  context_RxHxLxK = multiply(weights_RxHxLxL.astype(value_RxLxHxK.dtype), value_RxHxLxK) / total_RxHxLx1
  context_RxLxHxK = context_RxHxLxK.astype(value_RxLxHxK.dtype).swapaxes(1, 2)
  return context_RxLxHxK, weights_RxHxLxL / total_RxHxLx1


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
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contracted: int
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n = self.contracted
    init = nn.initializers.truncated_normal(self.init_std)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, self.axes), self.shape)
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
  def __call__(self, x_RxLxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps tokens [R, L, D] to tokens [R, L, D] and attention probabilities [R, H, L, L] (float32)."""
    rows, length, width = x_RxLxD.shape
    by_head = self.num_heads, width // self.num_heads
    query_RxLxHxK, key_RxLxHxK, value_RxLxHxK = (
      Projection((width, *by_head), ('embed', 'heads', 'head_dim'), 1, self.dtype, self.init_std, name=name)(x_RxLxD)
      for name in ('query', 'key', 'value')
    )
    if length == 1:
      # One key gets all the attention, so XLA drops the query and the key with all their cost.
      context_RxLxHxK, weights_RxHxLxL = value_RxLxHxK, jnp.ones((rows, self.num_heads, 1, 1), jnp.float32)
    else:
      context_RxLxHxK, weights_RxHxLxL = attend(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK)
    out = Projection((*by_head, width), ('heads', 'head_dim', 'embed'), 2, self.dtype, self.init_std, name='out')
    return out(context_RxLxHxK), weights_RxHxLxL
