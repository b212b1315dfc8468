"""What every encoder is, so that nothing outside its file needs to know which one it is.

An encoder is one file in this folder with a Linen module named in `ENCODERS`; `config.model = {'name': 'resnet3d',
'depths': (1, 1, 1, 1)}` chooses it and sets its fields. To add one:

1.  Write `cover_jax/models/<name>.py` with a subclass of `Encoder`. Fields that are numbers, strings, booleans or
    tuples of them become keys of `config.model`; their docstring is their documentation. `dtype` is that of the
    computation; parameters stay float32.
2.  `__call__(clip, *, train, levels)` takes clips f32 or bf16 [B, T, H, W, 3] that are normalised already
    (`config.pixel_mean`, `config.pixel_std`) and returns `Encoded`. It must give finite values for one frame, or
    `limits` must say why it cannot.
    Randomness comes from `self.make_rng('drop_path')` and only where `train` is true. Batch statistics are Linen's
    collection 'batch_stats': compute them over the whole batch axis, never over a device's part of it.
3.  Name the axes of every parameter (`nn.with_logical_partitioning`) with names from `LOGICAL_AXES`.
4.  `width`: D of the feature. `level_names`: the intermediate maps that can be asked for, first to last.
5.  `limits(frames, size)`: '' or one sentence on why clips of this geometry cannot be encoded. It is asked before any
    data is opened.
6.  `products(frames, size)`: multiply-adds of the matrix products and convolutions of one clip's way forward. What is
    inherited counts those of the code; write a formula where the code pads or computes something twice.
7.  `num_layers` and `layer(name)`: where a parameter stands between the pixels (0) and the heads (`num_layers`), for
    layer-wise learning rates; an array where layers are stacked on the first axis.
8.  `DEBUG`: fields that make it tiny for `:debug` configs and tests. `at_depth(n)`: the same with n layers of the kind
    that repeats, from which a plan extrapolates; itself where nothing repeats.
9.  Optional: `attention_map(variables, clip)` where there is attention to show.
10. Add the name to `ENCODERS`; `tests/test_encoders.py` then checks all of the above, and that it trains, resumes,
    shards, accumulates and exports like the others. Public weights are a table in `layouts.py`.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# {config.model.name: (module, class)}; imported when it is asked for.
ENCODERS: Mapping[str, tuple[str, str]] = {
  'timesformer': ('timesformer', 'TimeSformer'),
  'videoprism': ('videoprism', 'VideoPrism'),
  'videomae': ('videomae', 'VideoMAE'),
  'vjepa2': ('vjepa2', 'VJEPA2'),
  'resnet3d': ('resnet3d', 'ResNet3D'),
  's3d': ('s3d', 'S3D'),
  'c3d': ('c3d', 'C3D'),
}


class Encoded(flax.struct.PyTreeNode):
  """What an encoder makes of B clips.

  Attributes:
    feature_BxD: what linear heads and probes see: the class token, or the pooled map. In the encoder's dtype.
    tokens_BxTxHxWxD: the last map in the encoder's own grid: T' <= T, H' x W' after patches, tubelets and strides.
    levels: {name: [B, T', H', W', C]} of the maps that were asked for.
  """

  feature_BxD: jax.Array
  tokens_BxTxHxWxD: jax.Array
  levels: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)


class Encoder(nn.Module):
  """The contract; see the top of this file. Subclasses are Linen modules with a field `dtype`."""

  DEBUG: ClassVar[Mapping[str, Any]] = {}

  @property
  def width(self) -> int:
    """D of `Encoded.feature_BxD`."""
    raise NotImplementedError

  @property
  def level_names(self) -> tuple[str, ...]:
    """Names of the intermediate maps, first to last."""
    return ()

  @property
  def num_layers(self) -> int:
    """The number that `layer` gives what stands last."""
    raise NotImplementedError

  def layer(self, name: str) -> int | np.ndarray:
    """Where the parameter 'blocks/mlp/out/kernel' stands, from 0 at the pixels to `num_layers`."""
    raise NotImplementedError

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    """'' or one sentence on why clips of this many frames and this (height, width) cannot be encoded."""
    raise NotImplementedError

  def products(self, frames: int, size: tuple[int, int]) -> float:
    """Multiply-adds of one clip's way through the encoder: those of its convolutions and matrix products as written."""
    clip = jax.ShapeDtypeStruct((1, frames, *size, 3), jnp.float32)
    variables = jax.eval_shape(self.init, jax.random.key(0), clip)
    return _products(jax.make_jaxpr(self.apply)(variables, clip).jaxpr)

  def at_depth(self, depth: int) -> 'Encoder':
    """The encoder with `depth` of the layers that repeat; itself where none do."""
    return self


def encoder_class(name: str) -> type[Encoder]:
  """The module of `config.model.name`.

  Raises:
    KeyError: if there is none.
  """
  module, kind = ENCODERS[name]
  return getattr(importlib.import_module(f'cover_jax.models.{module}'), kind)


def check_levels(encoder: Encoder, levels: Sequence[str]) -> None:
  """Raises ValueError for a level that the encoder does not have."""
  if unknown := sorted(set(levels) - set(encoder.level_names)):
    raise ValueError(f'{type(encoder).__name__} has no level {unknown}; expected names among {encoder.level_names}.')


def _products(jaxpr: Any) -> float:
  """Multiply-adds of the convolutions and matrix products of a jaxpr, with those of the functions that it calls."""
  total = 0.0
  for equation in jaxpr.eqns:
    outputs, parameters = math.prod(equation.outvars[0].aval.shape), equation.params
    if equation.primitive.name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      total += outputs * math.prod(kernel) / kernel[parameters['dimension_numbers'].rhs_spec[0]]
    elif equation.primitive.name == 'dot_general':
      (contracted, _), _ = parameters['dimension_numbers']
      total += outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    inner = sum(
      _products(getattr(p, 'jaxpr', p)) for p in parameters.values() if hasattr(getattr(p, 'jaxpr', p), 'eqns')
    )
    total += inner * parameters.get('length', 1)
  return total
