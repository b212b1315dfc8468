"""What every encoder is, so that nothing outside its file needs to know which one it is.

An encoder is one file in this folder with a Linen module named in `ENCODERS`; `config.model = {'name': 'resnet3d',
'depths': (1, 1, 1, 1)}` chooses it and sets its fields. To add one:

1.  Write `cover_jax/models/<name>.py` with a subclass of `Encoder`. Its fields are keys of `config.model`: annotate
    each with what it may be (`depth: Annotated[int, whole(1)] = 12`; see `data_pipelines/declared.py`) and explain it
    in the class's docstring. The last is `dtype: Any = jnp.float32`, that of the computation; parameters stay float32.
    `convolutions.py` and `transformer.py` have parts that keep points 2 and 3.
2.  `__call__(clip, *, train=False, levels=())` takes clips f32 or bf16 [B, T, H, W, 3] that are normalised already
    (`config.pixel_mean`, `config.pixel_std`) and returns `Encoded`, without its `statistics`. It calls `check_levels`
    first. It must give finite values for one frame, or `limits` must say why it cannot. A field that makes no sense
    beside another is a ValueError. Randomness comes from `self.make_rng('drop_path')` and only where `train` is true.
    Batch statistics are Linen's collection 'batch_stats': compute them over the whole batch axis, never over a
    device's part of it. With them goes a field `freeze_statistics: Annotated[bool, flag] = False`: if it is true, the
    running ones are used in training, too, and stay. Fields that leave the function of the weights as it is have the
    names `remat`, `scan_unroll`, `tokens_together`, `drop_path` and `freeze_statistics`: weights may be tested with
    other values of these than they were trained with, of no others.
3.  Name the axes of every parameter (`nn.with_logical_partitioning`) with names from `LOGICAL_AXES` in `__init__.py`,
    or None; `DEFAULT_RULES` in `cover_jax/runtime/sharding.py` says what is split over what. A convolution's kernel
    has 'embed' on its outputs. What is to have weight decay is called 'kernel', as Linen calls it.
4.  `width`: D of the feature. `level_names`: the maps that can be asked for, first to last; the last is
    `tokens_BxTxHxWxD` or of its shape.
5.  `limits(frames, size)`: '' or why clips of this geometry cannot be encoded, as the end of 'clips of 1 frame of
    size 32 x 32 and ...', without a full stop; where one frame is too few, with 'an image has one'. It is asked
    before any data is opened.
6.  `products(frames, size)`: multiply-adds of the matrix products and convolutions of one clip's way forward. What is
    inherited counts those of the code; write a formula where the code pads or computes something twice.
7.  `num_layers` and `layer(name)`: where a parameter ('blocks/mlp/out/kernel') stands between the pixels (0) and the
    heads (`num_layers`), none in between left out, for layer-wise learning rates; an array where layers are stacked
    on the first axis. `LoopEncoder` has both, and `level_names`, for an encoder that is an embedding, one loop over
    equal layers and a norm.
8.  `DEBUG`: fields that make it tiny, for tests and for `shrink` in `configs/defaults.py`. `DEPTHS`: the fields that
    count the layers of a loop over layers; a plan extrapolates from few of them. Such an encoder has a field
    `scan_unroll`, too.
9.  Optional, where there is attention to show: `attention_map`, and `SHOWS_ATTENTION = True`.
10. Add the name to `ENCODERS` and to the README's table. `pytest -m '' tests/test_encoders.py -k <name>` then checks
    all of the above, and that it trains, resumes, shards, accumulates and exports like the others (without `-m ''` the
    slow half is left out). An encoder that needs more than 4 frames has a line in FRAMES there. Public weights are a
    table in `cover_jax/weights/` (`layouts.py`, `convolution_layouts.py`, `video_layouts.py`).
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models.products import product_flops
from data_pipelines import declared
from data_pipelines.contract import UserError
from data_pipelines.declared import number, one_of, whole

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


# What fields of several encoders may be.
Count = Annotated[int, whole(1)]
Share = Annotated[float, number(0, below=1)]
Deviation = Annotated[float, number(0)]

# Where an encoder's parameters hold its batch statistics, if it has any: beside its layers, so that whatever copies,
# averages, saves or places an encoder does so with them. No gradient and no optimizer is for them.
STATISTICS = 'statistics'


class Encoded(flax.struct.PyTreeNode):
  """What an encoder makes of B clips.

  Attributes:
    feature_BxD: what linear heads and probes see: the class token, or the pooled map. In the encoder's dtype.
    tokens_BxTxHxWxD: the last map in the encoder's own grid: T' <= T, H' x W' after patches, tubelets and strides.
    levels: {name: [B, T', H', W', C]} of the maps that were asked for.
    statistics: the encoder's batch statistics after these clips, which `run` puts here, not the encoder; None where it
      has none or does not train.
  """

  feature_BxD: jax.Array
  tokens_BxTxHxWxD: jax.Array
  levels: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
  statistics: Any = None


class Encoder(nn.Module):
  """The contract; see the top of this file. Subclasses are Linen modules with a field `dtype`."""

  DEBUG: ClassVar[Mapping[str, Any]] = {}
  DEPTHS: ClassVar[tuple[str, ...]] = ()
  SHOWS_ATTENTION: ClassVar[bool] = False

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
    """'' or why clips of this many frames and this (height, width) cannot be encoded: the end of a sentence."""
    raise NotImplementedError

  def products(self, frames: int, size: tuple[int, int]) -> float:
    """Multiply-adds of one clip's way through the encoder: those of its convolutions and matrix products as written."""
    clip = jax.ShapeDtypeStruct((1, frames, *size, 3), jnp.float32)
    variables = jax.eval_shape(self.init, jax.random.key(0), clip)
    return product_flops(self.apply, variables, clip) / 2

  def attention_map(self, variables: Any, clip: jax.Array) -> jax.Array:
    """Where the encoder looked in clips [B, T, H, W, 3]: float32 [B, T', H', W'], which sums to 1 over each clip."""
    raise NotImplementedError


class LoopEncoder(Encoder):
  """An encoder of one loop over `depth` layers ('blocks/...') between an embedding and a norm ('norm/...')."""

  DEPTHS: ClassVar[tuple[str, ...]] = ('depth',)
  LEVEL: ClassVar[str] = 'layer'  # what a layer is called: 'layer1' is the map after the first

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f'{self.LEVEL}{i + 1}' for i in range(self.depth))

  @property
  def num_layers(self) -> int:
    return self.depth + 1

  def layer(self, name: str) -> int | np.ndarray:
    if name.startswith('blocks/'):
      return 1 + np.arange(self.depth)
    return self.num_layers if name.startswith('norm/') else 0


def name_of(options: Mapping[str, Any]) -> str:
  """The encoder that `config.model` names; configs of before there were several name none."""
  return options.get('name', 'timesformer')


def encoder_class(options: Mapping[str, Any]) -> type[Encoder]:
  """The Linen module that `config.model` names.

  Raises:
    KeyError: if there is none of that name.
  """
  module, kind = ENCODERS[name_of(options)]
  return getattr(importlib.import_module(f'cover_jax.models.{module}'), kind)


def check(options: Mapping[str, Any], where: str) -> None:
  """Raises UserError if there is no encoder of that name, or it does not take the options.

  Args:
    options: `name` and the encoder's own options.
    where: the config key, for messages.
  """
  known = {'name': declared.Key('timesformer', one_of(*ENCODERS))}
  declared.check({key: value for key, value in options.items() if key == 'name'}, known, where)
  own = known | declared.options_of(encoder_class(options))
  for key in options:
    of_others = [n for n in ENCODERS if key not in own and key in declared.options_of(encoder_class({'name': n}))]
    if of_others:
      raise UserError(
        f'{where} has the key {key!r}, which is of {", ".join(of_others)} and not of {name_of(options)!r}: set {where} '
        f'as a whole, such as --{where}="{{\'name\': {name_of(options)!r}}}".'
      )
  declared.check(options, own, where)


def make(options: Mapping[str, Any], dtype: Any) -> Encoder:
  """The encoder of a config.

  Args:
    options: `name` and the encoder's own options.
    dtype: of the computation.

  Raises:
    UserError: as `check`.
  """
  check(options, 'config.model')
  fields = {key: _tuples(value) for key, value in options.items() if key != 'name'}
  return encoder_class(options)(**fields, dtype=jnp.dtype(dtype))


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
  """Every option of the encoder that `config.model` names with its default."""
  own = {key: option.default for key, option in declared.options_of(encoder_class(options)).items()}
  return {'name': 'timesformer', **own}


def options_of(encoder: Encoder) -> dict[str, Any]:
  """The fields of an encoder and their values, without Linen's own."""
  return {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder) if f.name not in ('parent', 'name')}


def variables(params: Mapping[str, Any]) -> dict[str, Any]:
  """What an encoder's Linen module takes: its parameters and, where it has any, its batch statistics."""
  weights = {key: value for key, value in params.items() if key != STATISTICS}
  return {'params': weights} | ({'batch_stats': params[STATISTICS]} if STATISTICS in params else {})


def run(
  encoder: Encoder,
  params: Mapping[str, Any],
  clip_BxTxHxWx3: jax.Array,
  *,
  rng: jax.Array | None = None,
  levels: Sequence[str] = (),
) -> Encoded:
  """Encodes clips that are normalised already.

  Args:
    encoder: the Linen module.
    params: with its batch statistics, if it has any.
    clip_BxTxHxWx3: in the encoder's dtype.
    rng: runs it in training mode; the statistics that the clips moved are then in the result.
    levels: of its `level_names`.
  """
  given = variables(params)
  if rng is None:
    return encoder.apply(given, clip_BxTxHxWx3, train=False, levels=levels)
  train = functools.partial(encoder.apply, given, clip_BxTxHxWx3, train=True, levels=levels, rngs={'drop_path': rng})
  if 'batch_stats' not in given:
    return train()
  encoded, moved = train(mutable=['batch_stats'])
  return encoded.replace(statistics=moved['batch_stats'])


def _tuples(value: Any) -> Any:
  """Tuples for lists, which a config that went through JSON holds."""
  return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def check_levels(encoder: Encoder, levels: Sequence[str]) -> None:
  """Raises ValueError for a level that the encoder does not have."""
  if unknown := sorted(set(levels) - set(encoder.level_names)):
    raise ValueError(f'{type(encoder).__name__} has no level {unknown}; expected names among {encoder.level_names}.')
