"""What the parity tests of several encoders share: weights of a file into a module, norms and counts."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models.encoder import Encoded
from cover_jax.weights.huggingface import nest
from cover_jax.weights.layouts import Rule


def sequence(encoded: Encoded) -> jax.Array:
  """Feature and tokens in one sequence [B, 1 + H'W'T', D], frame fastest."""
  patches_BxPxD = einops.rearrange(encoded.tokens_BxTxHxWxD, 'b t h w d -> b (h w t) d')
  return jnp.concatenate([encoded.feature_BxD[:, None], patches_BxPxD], axis=1)


class Array(NamedTuple):
  array: np.ndarray


def ours(rule: Rule, array: np.ndarray) -> np.ndarray:
  """One array of a file with the axes of our parameter."""
  return (array if rule.axes is None else array.transpose(rule.axes)) + rule.add


def shapes(module: nn.Module, *example: jax.Array) -> dict[str, tuple[int, ...]]:
  """{'a/b': shape} of a module's parameters."""
  made = jax.eval_shape(module.init, jax.random.key(0), *example)
  flat = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(made)['params'])
  return {'/'.join(k.key for k in path): leaf.shape for path, leaf in flat}


def fill(module: nn.Module, found: Mapping[str, Any], *example: jax.Array) -> dict[str, Any]:
  """The module's parameters, each from the array of its name; none is missing and none is left."""
  wanted = shapes(module, *example)
  assert set(found) == set(wanted)
  return nest({name: jnp.asarray(found[name].array).reshape(shape) for name, shape in wanted.items()})


def get(tree: Mapping[str, Any], name: str) -> jax.Array:
  for part in name.split('/'):
    tree = tree[part]
  return tree


def norm(tree: Mapping[str, Any], name: str) -> float:
  return float(jnp.linalg.norm(get(tree, name)))


def count(module: nn.Module, clip_shape: tuple[int, ...]) -> int:
  """The number of parameters."""
  return sum(math.prod(s) for s in shapes(module, jax.ShapeDtypeStruct(clip_shape, jnp.float32)).values())
