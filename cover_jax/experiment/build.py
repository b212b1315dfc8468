"""From a config to the parts of a run: model, heads, streams and objectives.

No data is read here and no device is touched, so that training, evaluation,
planning and loading a checkpoint all build the same run from the same config.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from cover_jax import objectives
from cover_jax.augment import photometric
from cover_jax.checkpoints.contents import sources_of
from cover_jax.models import encoder as encoders
from cover_jax.models.encoder import Encoded, Encoder
from cover_jax.models.heads import Heads
from cover_jax.objectives import several
from data_pipelines.clips import affine
from data_pipelines.contract import SourceInfo, UserError, label_width
from data_pipelines.loading import mixture

# Frames of a video in which every view has room. How long the views are does not depend on it.
_LONG_VIDEO = 1 << 16


@dataclasses.dataclass(frozen=True)
class StreamPlan:
  """One stream of a run.

  Attributes:
    sources: indices into the run's sources.
    num_frames: T.
    size: (height, width) in pixels.
    batch_size: examples a step, over all devices.
    rand_augment: the geometric half of RandAugment for the host; None for none.
    loss_weight: what the stream's mean loss is multiplied by. The exact share of the stream's
      sources in the mixture, so that rounding the batch sizes does not bias the gradient.
  """

  sources: tuple[int, ...]
  num_frames: int
  size: tuple[int, int]
  batch_size: int
  loss_weight: float
  rand_augment: affine.RandAugment | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All parts of a run, as pure functions and plain data.

  `leaks` is what its reports say of tested examples that were trained on (`leaks.report`); {} where nobody looked.
  """

  config: ml_collections.ConfigDict
  sources: tuple[SourceInfo, ...]
  weights: Mapping[str, float]
  streams: Mapping[str, StreamPlan]
  model: Encoder
  heads: Heads
  objectives: Mapping[str, objectives.Objective]
  total_steps: int
  steps_per_epoch: float
  leaks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def encode(self, encoder_params: Any, clip_BxTxHxWx3: jax.Array, **options: Any) -> Encoded:
    """Encodes raw pixels; see `objectives.Encode`."""
    return _encode(self.config, self.model, encoder_params, clip_BxTxHxWx3, **options)

  def view_lengths(self, stream: str) -> dict[str, int]:
    """{view: T of its clips} of a stream's batches."""
    return _view_lengths(self.objectives[stream], self.streams[stream])

  def label_width(self, stream: str) -> int:
    """K of the 'labels' of a stream's batches; see `contract.label_width`."""
    return label_width([self.sources[i] for i in self.streams[stream].sources])

  def encoded_clips(self, stream: str) -> dict[str, tuple[int, int, int]]:
    """{clip: (frames, height, width)} that the encoder sees of an example."""
    return _encoded_clips(self.objectives[stream], self.streams[stream])

  @property
  def one_clip(self) -> jax.ShapeDtypeStruct:
    """A normalised clip of the first stream, from whose shape the encoder can be initialised."""
    return _one_clip(self.model, next(iter(self.streams.values())))

  def source_id(self, name: str) -> int:
    return [s.name for s in self.sources].index(name)

  def stream_of(self, source: str) -> StreamPlan:
    """The first stream that holds a source: its geometry is the one that the source is evaluated with."""
    source_id = self.source_id(source)
    return next(s for s in self.streams.values() if source_id in s.sources)


def normalise(config: ml_collections.ConfigDict, clip_BxTxHxWx3: jax.Array, dtype: Any) -> jax.Array:
  """Pixels 0..255 of any dtype to (x / 255 - config.pixel_mean) / config.pixel_std."""
  pixels = clip_BxTxHxWx3.astype(jnp.float32) / 255.0
  mean, std = jnp.asarray(config.pixel_mean), jnp.asarray(config.pixel_std)
  return ((pixels - mean) / std).astype(dtype)


def _encode(config, model, encoder_params, clip_BxTxHxWx3, *, rng=None, levels=()):
  return encoders.run(model, encoder_params, normalise(config, clip_BxTxHxWx3, model.dtype), rng=rng, levels=levels)


def _encode_judged(config, model, encoder_params, clip_BxTxHxWx3, *, rng=None, levels=()):
  return _encode(config, model, encoder_params, clip_BxTxHxWx3, levels=levels)


def _view_lengths(objective, stream):
  if objective.views is None:
    return {'clip': stream.num_frames}
  return {name: len(frames) for name, frames in objective.views(_LONG_VIDEO, None).items()}


def _encoded_clips(objective, stream):
  if objective.encoded is not None:
    return dict(objective.encoded)
  return {view: (frames, *stream.size) for view, frames in _view_lengths(objective, stream).items()}


def _one_clip(model, stream):
  return jax.ShapeDtypeStruct((1, stream.num_frames, *stream.size, 3), model.dtype)


def _heads(config: ml_collections.ConfigDict, sources: Sequence[SourceInfo]) -> Heads:
  """One head for every labelled source, in the order of the run's sources."""
  options = config.get('heads', {'all': {'name': 'linear'}, 'only': {}})  # configs of older checkpoints lack it
  kind = lambda name: tuple(sorted(dict(options['only'].get(name, options['all'])).items()))
  counts = tuple((s.name, len(s.class_names)) for s in sources if s.class_names)
  if unlabelled := sorted(set(options['only']) - {name for name, _ in counts}):
    raise UserError(f'config.heads.only names {unlabelled[0]!r}, which has no classes, so no head: remove it.')
  several_labels = tuple(s.name for s in sources if s.class_names and s.labels == 'several')
  kinds = tuple((name, kind(name)) for name, _ in counts if kind(name) != (('name', 'linear'),))
  return Heads(counts, kinds, several_labels)


def build(
  config: ml_collections.ConfigDict, sources: Sequence[SourceInfo], *, batch_divisor: int = 1, judged: bool = False
) -> Experiment:
  """Builds a run.

  Args:
    config: a config whose keys and values `settings.check` allows.
    sources: what is known of each of `config.sources`, in that order.
    batch_divisor: devices over which the batch axis is split.
    judged: its objectives run the encoder as in evaluation, though they ask for training: for their measures alone.

  Returns:
    The run's parts.

  Raises:
    UserError: if the config contradicts itself or the sources.
  """
  streams_of = {name: tuple(stream.sources) for name, stream in config.streams.items()}
  sizes = {s.name: s.num_examples for s in sources}
  explicit = config.mixture.weights.to_dict() or None
  weights = mixture.sampling_weights(sizes, temperature=config.mixture.temperature, explicit=explicit)
  augments = {
    name: photometric.make(_plain(stream.get('augment')), f'config.streams.{name}.augment')
    for name, stream in config.streams.items()
  }
  streams = _streams(config, sources, weights, {name: a.geometry for name, a in augments.items()}, batch_divisor)
  model = encoders.make(config.model.to_dict(), config.dtype)
  heads = _heads(config, sources)
  _check_model(model, heads, streams)
  encode = functools.partial(_encode_judged if judged else _encode, config, model)
  tasks = {
    name: _objective(
      config, model, encode, heads.only(*streams_of[name]), sources, name, streams[name], augments[name], judged
    )
    for name in streams
  }
  total_steps, steps_per_epoch = _length(config, sizes, weights, sum(s.batch_size for s in streams.values()))
  return Experiment(config, tuple(sources), weights, streams, model, heads, tasks, total_steps, steps_per_epoch)


def _streams(config, sources, weights, geometry, batch_divisor) -> dict[str, StreamPlan]:
  """What each stream of a config is, with its share of the mixture as batch size and as loss weight."""
  names = [s.name for s in sources]
  share = {name: sum(weights[member] for member in stream.sources) for name, stream in config.streams.items()}
  total_share = sum(share.values())
  batch_sizes = _batch_sizes(config, share, batch_divisor)
  _check_accumulation(config.accumulation_steps, batch_sizes, batch_divisor)
  return {
    name: StreamPlan(
      sources=tuple(names.index(member) for member in stream.sources),
      num_frames=stream.num_frames,
      size=(stream.size, stream.size) if isinstance(stream.size, int) else tuple(stream.size),
      batch_size=batch_sizes[name],
      loss_weight=share[name] / total_share if stream.loss_weight is None else float(stream.loss_weight),
      rand_augment=geometry[name],
    )
    for name, stream in config.streams.items()
  }


def _objective(config, model, encode, heads, sources, name, stream, augments, judged) -> objectives.Objective:
  """The objective of a stream, on augmented clips; its views are checked against the encoder's limits."""
  options = config.streams[name].objective
  if isinstance(options, tuple | list):
    options = several.with_mixing(options, augments.mixing, f'config.streams.{name}.objective')
  else:
    options = {**_plain(options), **augments.mixing}
  task = objectives.make(
    options,
    encode=encode,
    heads=heads,
    sources=sources,
    stream=name,
    num_frames=stream.num_frames,
    size=stream.size,
    width=model.width,
    model=model,
    where=f'config.streams.{name}.objective',
    judged=judged,
  )
  task = objectives.augmented(task, augments.photometric)
  for clip, (frames, *size) in _encoded_clips(task, stream).items():
    _check_geometry(model, name, frames, tuple(size), f'in {clip!r} ')
  return task


def _length(config, sizes, weights, examples_per_step: int) -> tuple[int, float]:
  """(steps of the run, steps of an epoch)."""
  steps_per_epoch = mixture.epoch_examples(list(sizes.values()), list(weights.values())) / examples_per_step
  total_steps = config.total_steps or round(config.total_epochs * steps_per_epoch)
  if not 1 <= total_steps < 2**31:
    raise UserError(
      f'config.total_steps = {config.total_steps} and config.total_epochs = {config.total_epochs:g} make '
      f'{total_steps:.6g} steps: set one of them so that there are at least 1 and fewer than 2^31.'
    )
  return total_steps, steps_per_epoch


def of_checkpoint(loaded: Mapping[str, Any]) -> Experiment:
  """The run that a checkpoint describes; nothing but the description is needed.

  Args:
    loaded: of `checkpoints.load` or `checkpoints.describe`.

  Raises:
    UserError: if its config is not one that can be built.
  """
  try:
    return build(ml_collections.ConfigDict(loaded['about']['config']), sources_of(loaded))
  except UserError:
    raise
  except Exception as error:  # a key that is missing, or of another type: in a strange file it may be any
    raise UserError(
      f'{loaded["path"]} holds a config that this version cannot build ({type(error).__name__}: '
      f'{" ".join(str(error).split())[:200]}): use the version that wrote it.'
    ) from error


def _plain(options: ml_collections.ConfigDict | Mapping[str, Any] | None) -> dict[str, Any]:
  # Configs of older checkpoints lack the key.
  return options.to_dict() if isinstance(options, ml_collections.ConfigDict) else dict(options or {})


def _check_model(model: Encoder, heads: Heads, streams: Mapping[str, StreamPlan]) -> None:
  """Raises a UserError if fields of encoder or heads contradict each other, or a stream's clips cannot be encoded."""
  for name, stream in streams.items():
    _check_geometry(model, name, stream.num_frames, stream.size)
  try:  # shapes only: nothing is computed
    encoded, _ = jax.eval_shape(
      model.init_with_output, jax.random.key(0), _one_clip(model, next(iter(streams.values())))
    )
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(f'config.model does not make a model: {str(error).splitlines()[0]}') from error
  try:
    jax.eval_shape(heads.init, jax.random.key(0), encoded)
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(f'config.heads does not fit the encoder: {str(error).splitlines()[0]}') from error


def _check_geometry(model: Encoder, stream: str, frames: int, size: tuple[int, int], view: str = '') -> None:
  if problem := model.limits(frames, size):
    raise UserError(
      f'config.streams.{stream} has clips of {frames} frames of size {size[0]} x {size[1]} {view}and {problem}: '
      'change the stream or config.model.'
    )


def _check_accumulation(steps: int, batch_sizes: Mapping[str, int], batch_divisor: int) -> None:
  for name, size in batch_sizes.items():
    if size % (steps * batch_divisor):
      raise UserError(
        f'config.accumulation_steps = {steps}: the {size} examples a step of stream {name!r} cannot be divided into '
        f"{steps} microbatches over {batch_divisor} devices: make config.batch_multiple, or the stream's batch_size, "
        f'a multiple of {steps * batch_divisor}.'
      )


def _batch_sizes(config, share: Mapping[str, float], batch_divisor: int) -> dict[str, int]:
  """The examples a step of each stream: as the config says, else in proportion to the shares."""
  fixed = {name: stream.batch_size for name, stream in config.streams.items() if stream.batch_size}
  multiple = config.batch_multiple
  if multiple % batch_divisor:
    raise UserError(
      f'config.batch_multiple = {multiple} is not a multiple of the {batch_divisor} devices that share a batch '
      '(mesh axes data x fsdp): streams could not be split evenly. Change config.batch_multiple or config.mesh.'
    )
  for name, size in fixed.items():
    if size % batch_divisor:
      raise UserError(
        f'config.streams.{name}.batch_size = {size} cannot be divided over {batch_divisor} devices '
        '(mesh axes data x fsdp): use a multiple.'
      )
  free = {name: s for name, s in share.items() if name not in fixed}
  if not free:
    return fixed
  if config.batch_size % batch_divisor:
    raise UserError(
      f'config.batch_size = {config.batch_size} cannot be divided over {batch_divisor} devices '
      '(mesh axes data x fsdp): use a multiple.'
    )
  rest = config.batch_size - sum(fixed.values())
  return {**fixed, **mixture.quotas(free, rest, multiple)}
