"""Attentive pooling: a learned query that looks at all tokens of a clip, in place of the encoder's own feature."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models.attention import Projection
from cover_jax.models.pointwise import layer_norm
from cover_jax.models.transformer import Mlp, Transformer, heads_of


def _look(query_1xHxK: jax.Array, key_BxSxHxK: jax.Array, value_BxSxHxK: jax.Array) -> jax.Array:
  """What a query, scaled already, sees of S tokens: [B, 1, H, K]; the softmax is float32."""
  logits_BxHx1xS = jnp.einsum('qhk,bshk->bhqs', query_1xHxK, key_BxSxHxK, preferred_element_type=jnp.float32)
  weights_BxHx1xS = jax.nn.softmax(logits_BxHx1xS, axis=-1).astype(value_BxSxHxK.dtype)
  return jnp.einsum('bhqs,bshk->bqhk', weights_BxHx1xS, value_BxSxHxK)


class AttentivePooling(nn.Module):
  """One query and one attention, as VideoPrism's frozen classifiers have it.

  The query is scaled by a learned softplus(s) / (ln 2 sqrt(K)) a dimension, 1 / sqrt(K) at first; a LayerNorm follows.

  Attributes:
    num_heads: must divide D.
    dtype: of the computation.
    init_std: of the query and the kernels (our choice).
  """

  num_heads: int
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, tokens_BxSxD: jax.Array) -> jax.Array:
    """Tokens [B, S, D] to a feature [B, D]."""
    width = tokens_BxSxD.shape[-1]
    by_head = heads_of(width, self.num_heads)
    project = lambda name: Projection(
      (width, *by_head), ('embed', 'heads', 'head_dim'), 1, self.dtype, self.init_std, name=name
    )
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(self.init_std), (None, 'embed'))
    query_1xD = self.param('query_token', init, (1, width)).astype(self.dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('head_dim',))
    scale_K = jax.nn.softplus(self.param('scale', zeros, by_head[1:])) / (math.log(2) * math.sqrt(by_head[1]))
    query_1xHxK = project('query')(query_1xD) * scale_K.astype(self.dtype)
    seen_Bx1xHxK = _look(query_1xHxK, project('key')(tokens_BxSxD), project('value')(tokens_BxSxD))
    axes = ('heads', 'head_dim', 'embed')
    pooled_Bx1xD = Projection((*by_head, width), axes, 2, self.dtype, self.init_std, name='out')(seen_Bx1xHxK)
    return layer_norm('norm', self.dtype)(pooled_Bx1xD)[:, 0]


class AttentiveBlock(nn.Module):
  """Layers of self-attention over the tokens, then a block whose one query looks at them, as V-JEPA 2's classifiers.

  The query's attention has no output projection; the query is added to what it sees, and an MLP follows.

  Attributes:
    depth: layers of self-attention; 3 in the released classifiers, 0 for none.
    num_heads: must divide D.
    mlp_dim: hidden size of the MLPs.
    epsilon: of the LayerNorms.
    dtype: of the computation.
    init_std: of the query and the kernels.
  """

  depth: int
  num_heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  dtype: Any = jnp.float32
  init_std: float = 0.02

  @nn.compact
  def __call__(self, tokens_BxSxD: jax.Array) -> jax.Array:
    """Tokens [B, S, D] to a feature [B, D]."""
    width = tokens_BxSxD.shape[-1]
    if self.depth:
      layers = Transformer(
        self.depth, self.num_heads, self.mlp_dim, self.epsilon, dtype=self.dtype, init_std=self.init_std, name='layers'
      )
      tokens_BxSxD, _ = layers(tokens_BxSxD)
    by_head = heads_of(width, self.num_heads)
    project = lambda name: Projection(
      (width, *by_head), ('embed', 'heads', 'head_dim'), 1, self.dtype, self.init_std, name=name
    )
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(self.init_std), (None, 'embed'))
    query_1xD = self.param('query_token', init, (1, width)).astype(self.dtype)
    normed_BxSxD = layer_norm('norm_tokens', self.dtype, self.epsilon)(tokens_BxSxD)
    query_1xHxK = project('query')(query_1xD) * by_head[1] ** -0.5
    seen_Bx1xHxK = _look(query_1xHxK, project('key')(normed_BxSxD), project('value')(normed_BxSxD))
    x_BxD = query_1xD + seen_Bx1xHxK.reshape(len(tokens_BxSxD), width)
    normed_BxD = layer_norm('norm_mlp', self.dtype, self.epsilon)(x_BxD)
    return x_BxD + Mlp(self.mlp_dim, dtype=self.dtype, init_std=self.init_std, name='mlp')(normed_BxD)
