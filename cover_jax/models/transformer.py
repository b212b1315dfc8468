"""Parts that several transformers are made of, and a plain pre-LayerNorm transformer over one sequence of tokens."""

from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cover_jax.models.attention import Projection, attend, attend_capped, written
from cover_jax.models.pointwise import gelu, layer_norm
from data_pipelines.declared import one_of

# What the backward pass may keep of a block instead of computing it again; None keeps nothing but its input.
REMAT_POLICIES = {
  'full': None,
  'attention': jax.checkpoint_policies.save_only_these_names('attention'),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
Remat = Annotated[str, one_of('none', *REMAT_POLICIES)]


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
  """Stochastic depth: zeroes rows of x [R, ...] with probability `rate`, scales the rest by 1 / (1 - rate)."""
  kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
  return (x * (kept / (1 - rate))).astype(x.dtype)


def dense(name: str, features: int, axes: tuple[str, str], dtype: Any, init: Any) -> nn.Dense:
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    dot_general=_product_with_written_kernel,
    name=name,
  )


def _product_with_written_kernel(x: jax.Array, kernel: jax.Array, *args, **kwargs) -> jax.Array:
  # Else a TPU converts a slice of the stacked float32 kernels within each product, again and again.
  return jax.lax.dot_general(x, written(kernel), *args, **kwargs)


def token_init(std: float) -> Any:
  return nn.with_logical_partitioning(nn.initializers.truncated_normal(std), (None, None, 'embed'))


class Mlp(nn.Module):
  """The two-layer perceptron of a block: [..., D] -> [..., mlp_dim] -> GELU -> [..., D]."""

  mlp_dim: int
  gelu_approximate: bool = False
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = nn.initializers.truncated_normal(self.init_std)
    hidden = dense('hidden', self.mlp_dim, ('embed', 'mlp'), self.dtype, init)(x)
    hidden = nn.gelu(hidden, approximate=True) if self.gelu_approximate else gelu(hidden)
    return dense('out', x.shape[-1], ('mlp', 'embed'), self.dtype, init)(hidden)


def heads_of(width: int, num_heads: int) -> tuple[int, int]:
  """(number of heads, features of each); raises ValueError where the width cannot be divided so."""
  if width % num_heads:
    raise ValueError(f'{width} features cannot be divided over num_heads {num_heads}.')
  return num_heads, width // num_heads


# (queries or keys [R, H, L, K]) -> the same, turned by the positions of their tokens.
Rotate = Callable[[jax.Array], jax.Array]


class SelfAttention(nn.Module):
  """Attention of every token of a row to all of it, as a video transformer that is no TimeSformer has it.

  Attributes:
    num_heads: must divide D.
    dtype: of the computation; the softmax is float32.
    init_std: of the kernels.
    key_bias: adds a bias to the keys. It never changes the softmax; some released weights have none.
    logit_cap: squashes logits x to cap * tanh(x / cap); 0 leaves them alone.
  """

  num_heads: int
  dtype: Any = jnp.float32
  init_std: float = 0.02
  key_bias: bool = True
  logit_cap: float = 0.0

  @nn.compact
  def __call__(self, x_RxLxD: jax.Array, rotate: Rotate | None = None) -> jax.Array:
    """Tokens [R, L, D] to tokens [R, L, D]; `rotate` turns queries and keys."""
    width = x_RxLxD.shape[-1]
    by_head = heads_of(width, self.num_heads)
    axes = ('embed', 'heads', 'head_dim')
    query_RxHxLxK, key_RxHxLxK, value_RxHxLxK = (
      Projection((width, *by_head), axes, 1, self.dtype, self.init_std, self.key_bias or name != 'key', name=name)(
        x_RxLxD
      ).swapaxes(1, 2)
      for name in ('query', 'key', 'value')
    )
    if rotate is not None:
      query_RxHxLxK, key_RxHxLxK = rotate(query_RxHxLxK), rotate(key_RxHxLxK)
    if self.logit_cap:
      context_RxHxLxK = attend_capped(query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, self.logit_cap)
    else:
      context_RxHxLxK = attend(query_RxHxLxK, key_RxHxLxK, value_RxHxLxK, x_RxLxD.shape[1])
    out = Projection((*by_head, width), ('heads', 'head_dim', 'embed'), 2, self.dtype, self.init_std, name='out')
    # The name under which the remat policy 'attention' keeps it.
    return checkpoint_name(out(context_RxHxLxK.swapaxes(1, 2)), 'attention')


class Layer(nn.Module):
  """LayerNorm, attention, residual, LayerNorm, MLP, residual; the fields are those of `Transformer`."""

  num_heads: int
  mlp_dim: int
  use_drop_path: bool
  epsilon: float
  key_bias: bool
  logit_cap: float
  dtype: Any
  init_std: float
  rotate: Rotate | None
  keep: bool

  @nn.compact
  def __call__(self, x_RxLxD: jax.Array, drop_rate: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """One step of the scan: tokens and this layer's drop rate to tokens, and the tokens again if they are kept."""
    x_RxLxD = nn.with_logical_constraint(x_RxLxD, ('batch', None, None))

    def drop(x: jax.Array) -> jax.Array:
      return drop_path(x, drop_rate, self.make_rng('drop_path')) if self.use_drop_path else x

    attention = SelfAttention(
      self.num_heads, self.dtype, self.init_std, self.key_bias, self.logit_cap, name='attention'
    )
    x_RxLxD = x_RxLxD + drop(attention(layer_norm('norm_attention', self.dtype, self.epsilon)(x_RxLxD), self.rotate))
    mlp = Mlp(self.mlp_dim, dtype=self.dtype, init_std=self.init_std, name='mlp')
    x_RxLxD = x_RxLxD + drop(mlp(layer_norm('norm_mlp', self.dtype, self.epsilon)(x_RxLxD)))
    return x_RxLxD, x_RxLxD if self.keep else None


class Transformer(nn.Module):
  """A stack of `Layer`, parameters stacked on the first axis, run by a loop over depth.

  Attributes:
    depth: L, the number of layers.
    num_heads, mlp_dim: of each layer.
    epsilon: of the LayerNorms.
    key_bias, logit_cap: of `SelfAttention`.
    dtype, init_std: of the computation and of Linear kernels.
    remat, scan_unroll: as in `cover_jax.models.timesformer.TimeSformer`.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  key_bias: bool = True
  logit_cap: float = 0.0
  dtype: Any = jnp.float32
  init_std: float = 0.02
  remat: str = 'none'
  scan_unroll: int = 1

  @nn.compact
  def __call__(
    self,
    x_RxLxD: jax.Array,
    drop_rate_L: jax.Array | None = None,
    rotate: Rotate | None = None,
    keep: bool = False,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Runs all layers.

    Args:
      x_RxLxD: tokens.
      drop_rate_L: rate of dropped paths in each layer, with keys from the 'drop_path' stream; None drops none.
      rotate: turns queries and keys.
      keep: return what every layer gives, too.

    Returns:
      (tokens [R, L, D], tokens after each layer [depth, R, L, D] or None).
    """
    layer = Layer
    if self.remat != 'none':
      # Unrolled, XLA would merge the recomputation with the forward pass.
      layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=self.scan_unroll > 1)
    layers = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'drop_path': True},
      length=self.depth,
      unroll=self.scan_unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      use_drop_path=drop_rate_L is not None,
      epsilon=self.epsilon,
      key_bias=self.key_bias,
      logit_cap=self.logit_cap,
      dtype=self.dtype,
      init_std=self.init_std,
      rotate=rotate,
      keep=keep,
      name='layers',
    )
    return layers(x_RxLxD, jnp.zeros(self.depth) if drop_rate_L is None else drop_rate_L)


def products(depth: int, rows: float, length: float, width: int, mlp_dim: int) -> float:
  """Multiply-adds of `Transformer` on R rows of L tokens."""
  return depth * rows * length * (4 * width**2 + 2 * length * width + 2 * width * mlp_dim)
