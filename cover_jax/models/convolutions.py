"""Parts of 3D convolutional networks: convolutions with explicit padding, batch statistics, max pooling."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Triple = tuple[int, int, int]


class Conv(nn.Module):
  """A 3D convolution padded alike on both sides, as PyTorch pads: never 'SAME', which shifts maps at stride 2.

  Attributes:
    features: output channels.
    kernel, stride: in (frames, rows, columns).
    padding: on both sides of each; None: half of the kernel, rounded down.
    use_bias: adds a bias.
    dtype: of the computation; parameters are float32.
  """

  features: int
  kernel: Triple
  stride: Triple = (1, 1, 1)
  padding: Triple | None = None
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxTxHxWxC: jax.Array) -> jax.Array:
    padding = self.padding or tuple(k // 2 for k in self.kernel)
    kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    return nn.Conv(
      self.features,
      self.kernel,
      self.stride,
      [(p, p) for p in padding],
      use_bias=self.use_bias,
      dtype=self.dtype,
      kernel_init=nn.with_logical_partitioning(kernel_init, (None, None, None, None, 'embed')),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
      name='conv',
    )(x_BxTxHxWxC)


class BatchNorm(nn.Module):
  """Batch normalisation as PyTorch has it: the running variance is the unbiased one, the batch's own is not.

  Mean and variance are those of the whole batch, whatever devices it lies on, in float32. They are kept in the
  collection 'batch_stats'.

  Attributes:
    momentum: the share of the batch in the new running statistics (PyTorch's sense).
    epsilon: added to the variance.
    dtype: of the result.
  """

  momentum: float = 0.1
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, use_running: bool) -> jax.Array:
    """Normalises the last axis of x [..., C].

    Args:
      x: any float dtype.
      use_running: by the running statistics, which stay as they are; else by the batch's, which move them.
    """
    features = x.shape[-1]
    scale_C = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (features,))
    bias_C = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)), (features,))
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (features,))
    running_var = self.variable('batch_stats', 'var', jnp.ones, (features,))
    x_f32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if use_running:
      mean_C, var_C = running_mean.value, running_var.value
    else:
      axes = tuple(range(x.ndim - 1))
      count = math.prod(x.shape[:-1])
      mean_C = x_f32.mean(axes)
      var_C = jnp.square(x_f32 - mean_C).mean(axes)
      if not self.is_initializing():
        move = lambda old, new: old + self.momentum * (jax.lax.stop_gradient(new) - old)
        running_mean.value = move(running_mean.value, mean_C)
        running_var.value = move(running_var.value, var_C * (count / max(count - 1, 1)))
    return ((x_f32 - mean_C) * (jax.lax.rsqrt(var_C + self.epsilon) * scale_C) + bias_C).astype(self.dtype)


class Unit(nn.Module):
  """Convolution, batch normalisation and, unless `relu` is false, a ReLU."""

  features: int
  kernel: Triple
  stride: Triple = (1, 1, 1)
  padding: Triple | None = None
  use_bias: bool = False
  relu: bool = True
  momentum: float = 0.1
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxTxHxWxC: jax.Array, use_running: bool) -> jax.Array:
    conv = Conv(self.features, self.kernel, self.stride, self.padding, self.use_bias, self.dtype, name='convolution')
    x = BatchNorm(self.momentum, self.epsilon, self.dtype, name='norm')(conv(x_BxTxHxWxC), use_running)
    return nn.relu(x) if self.relu else x


def max_pool(x_BxTxHxWxC: jax.Array, window: Triple, stride: Triple, padding: Triple = (0, 0, 0)) -> jax.Array:
  """Max pooling; borders are padded with minus infinity."""
  return nn.max_pool(x_BxTxHxWxC, window, stride, [(p, p) for p in padding])


def length_after(length: int, kernel: int, stride: int, padding: int) -> int:
  """Length of an axis after a convolution or a pooling."""
  return (length + 2 * padding - kernel) // stride + 1


def lengths_after(length: int, steps: Sequence[tuple[int, int, int]]) -> int:
  """Length of an axis after several (kernel, stride, padding); 0 where one of them has nothing left to look at."""
  for kernel, stride, padding in steps:
    length = length_after(length, kernel, stride, padding)
    if length < 1:
      return 0
  return length


def shortest(steps: Sequence[tuple[int, int, int]]) -> int:
  """The shortest axis of which something is left."""
  return next(n for n in range(1, 10_000) if lengths_after(n, steps))
