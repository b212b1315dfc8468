"""What pretext objectives share: a linear layer on a feature, and how well it knows a label."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Linear(nn.Module):
  """Features [..., D] to float32 outputs [..., classes]."""

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(
      self.classes,
      dtype=jnp.float32,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', 'classes')),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('classes',)),
    )(x.astype(jnp.float32))


def classify(logits_BxK: jax.Array, label_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cross-entropy f32 [B], whether the label's logit is above all others bool [B])."""
  own_B = jnp.take_along_axis(logits_BxK, label_B[:, None], axis=-1)[:, 0]
  others_BxK = jnp.arange(logits_BxK.shape[-1]) != label_B[:, None]
  right_B = jnp.all(jnp.where(others_BxK, logits_BxK < own_B[:, None], True), axis=-1)  # neither a tie nor NaN
  return optax.softmax_cross_entropy_with_integer_labels(logits_BxK, label_B), right_B


def init(heads: Mapping[str, nn.Module], rng: jax.Array, widths: Mapping[str, tuple[int, ...]]) -> dict:
  """Parameters of named heads, each from a feature of zeros of its shape [1, ...]."""
  keys = jax.random.split(rng, max(len(heads), 1))
  return {
    name: head.init(key, jnp.zeros((1, *widths[name])))['params']
    for key, (name, head) in zip(keys, heads.items(), strict=False)
  }
