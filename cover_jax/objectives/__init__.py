"""Objectives: what a stream is trained for. One file each; a config names the file.

    config.streams.video.objective = {'name': 'classification', 'label_smoothing': 0.1}

loads `cover_jax.objectives.classification` and calls its `make`. A new objective is a new file with such a function,
which names as keywords what it needs of the run (see `make` below) and then its own options, annotated with what they
may be, with their defaults.

    config.streams.video.objective = ({'name': 'v3s', 'weight': 1.0}, {'name': 'vtdl', 'weight': 0.5})

trains for several at once: see `several.py`. Their losses are written in `Stages`, so that they can share a pass of the
encoder.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from cover_jax.models.encoder import Encoded, Encoder
from cover_jax.models.heads import Heads
from cover_jax.runtime import keys
from data_pipelines import declared
from data_pipelines.contract import SourceInfo, ViewSampler

Params = Mapping[str, Any]


class Encode(Protocol):
  """Runs the encoder on raw pixels."""

  def __call__(
    self,
    encoder_params: Params,
    clip_BxTxHxWx3: jax.Array,
    *,
    rng: jax.Array | None = None,
    levels: Sequence[str] = (),
  ) -> Encoded:
    """Gives what the encoder makes of clips in 0..255.

    Args:
      encoder_params: with the encoder's batch statistics, if it has any.
      clip_BxTxHxWx3: any dtype.
      rng: runs the encoder in training mode: it drops paths, and normalises by the statistics of these clips.
      levels: intermediate maps wanted, of the encoder's `level_names`.
    """


class LossOutput(NamedTuple):
  """What an objective makes of a sub-batch.

  Attributes:
    loss: f32 scalar, mean over the sub-batch.
    state: the objective's next state; the same structure as it was given.
    measures: per-example values f32 [B], averaged per source and written as metrics.
    statistics: the run's encoder's after this sub-batch, `Encoded.statistics`; None if it has none or did not train.
  """

  loss: jax.Array
  state: Any
  measures: Mapping[str, jax.Array]
  statistics: Any = None


class Shown(NamedTuple):
  """What an objective shows the run's encoder of a sub-batch, in one pass in training mode.

  Attributes:
    clips: {name: pixels 0..255 [B, T, H, W, 3] of any dtype}, at least one, all of one shape.
    rng: of the pass.
    made: for `Stages.judge`: labels, other clips, random keys. Any tree.
    raw: {name: () -> uint8 [B, T, H, W, 3]}, of the clips that show other frames, rows or columns than the view of
      their name: the same before colours were changed, made only where it is wanted.
  """

  clips: Mapping[str, jax.Array]
  rng: jax.Array
  made: Any = None
  raw: Mapping[str, Callable[[], jax.Array]] = MappingProxyType({})


class Stages(NamedTuple):
  """A loss in two halves around a pass of the run's encoder, which other objectives of the stream can share.

  Attributes:
    show: (sub-batch, rng) -> Shown.
    judge: (params of the run, objective state, sub-batch, {name of a clip: Encoded}, `Shown.made`) -> LossOutput,
      without statistics.
    levels: intermediate maps wanted of each clip.
  """

  show: Callable[[Mapping[str, Any], jax.Array], Shown]
  judge: Callable[[Params, Any, Mapping[str, Any], Mapping[str, Encoded], Any], LossOutput]
  levels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
  """A stream's training task as pure functions.

  Attributes:
    loss: (params of the run, objective state, sub-batch, rng) -> LossOutput. `params` holds
      'encoder', 'heads' and 'objectives'; gradients are taken of `loss` for all of them.
    init_params: rng -> own parameters, kept under params['objectives'][stream].
    init_state: params of the run -> own state (EMA encoder, queue, ...), kept in the train state,
      sharded by the same rules and checkpointed with it.
    views: the clips wanted of each example; None for the single view 'clip'.
    after_update: (params of the run, objective state) -> objective state, once after each optimizer step (a loss may
      run several times for one): where an average of the parameters moves on.
    targets: what it wants to know of each clip, as the host cut it: names of `contract.TARGETS`, which it then finds
      under batch['targets'].
    encoded: {clip: (frames, height, width)} of all that the run's encoder sees, also as a teacher, where these are not
      the views as they are: an objective may make several clips of one view, and smaller ones.
    stages: the halves of `loss`, if it is written so (`stages.staged`): in a list of objectives it then shares passes.
  """

  loss: Callable[[Params, Any, Mapping[str, jax.Array], jax.Array], LossOutput]
  init_params: Callable[[jax.Array], Params] = lambda rng: {}
  init_state: Callable[[Params], Any] = lambda params: {}
  views: ViewSampler | None = None
  after_update: Callable[[Params, Any], Any] = lambda params, state: state
  targets: tuple[str, ...] = ()
  encoded: Mapping[str, tuple[int, int, int]] | None = None
  stages: Stages | None = None


def mean_over(x_Bx: jax.Array, mask_B: jax.Array) -> jax.Array:
  """The mean over the examples that are no padding, f32; 0 where all are, also in the gradient."""
  mask_Bx = mask_B.reshape(-1, *[1] * (x_Bx.ndim - 1))
  return jnp.sum(x_Bx, axis=0, where=mask_Bx) / jnp.maximum(jnp.sum(mask_B), 1)


def check(
  options: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str, more: Mapping[str, declared.Key] | None = None
) -> None:
  """Raises UserError if there is no objective of that name, or it does not take the options.

  Args:
    options: `name` and the objective's own options; or a list of such, which take `several.ENTRY`, too.
    where: the config key, for messages.
    more: keys that are taken beside the objective's own.
  """
  if not isinstance(options, Mapping):
    _module('several').check(options, where)
    return
  known = {'name': declared.Key(declared.REQUIRED, declared.one_of(*names()))}
  declared.check({'name': options['name']} if 'name' in options else {}, known, where)
  declared.check(options, known | (more or {}) | declared.options_of(maker(options['name'])), where)


def names() -> list[str]:
  """The files that make an objective; the others are what several of them share."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if hasattr(_module(m.name), 'make'))


def _module(name: str) -> Any:
  return importlib.import_module(f'{__name__}.{name}')


def maker(name: str) -> Callable[..., Objective]:
  """The `make` of an objective that there is."""
  return _module(name).make


def make(
  options: Mapping[str, Any] | Sequence[Mapping[str, Any]],
  *,
  encode: Encode,
  heads: Heads,
  sources: Sequence[SourceInfo],
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  width: int,
  model: Encoder,
  where: str,
  judged: bool = False,
) -> Objective:
  """Makes the objective that a config names.

  Args:
    options: `name` and the objective's own options; or a list of such (`several.make_all`).
    encode: the encoder as a function of parameters and clips.
    heads: the classification heads of the stream's labelled sources.
    sources: the run's sources; `source` of a sub-batch indexes them.
    stream: its name, under which the objective finds its own parameters in params['objectives'].
    num_frames: T of the stream's clips.
    size: (height, width) of them, in pixels.
    width: D of the encoder's feature.
    model: the encoder's Linen module, for its levels and their shapes; `encode` is what runs it.
    where: the config key, for messages.
    judged: it is asked for its measures alone, and nothing runs in training mode.

  Returns:
    The objective, whose own `make` was given those of these arguments that it has as parameters, and the options.

  Raises:
    UserError: if there is no such objective or it does not take the options.
  """
  check(options, where)
  of_run = {'encode': encode, 'heads': heads, 'sources': sources, 'stream': stream}
  of_run |= {'num_frames': num_frames, 'size': size, 'width': width, 'model': model, 'judged': judged}
  if not isinstance(options, Mapping):
    return _module('several').make_all(options, of_run, where)
  return make_one(options, of_run)


def make_one(options: Mapping[str, Any], of_run: Mapping[str, Any]) -> Objective:
  """The objective of checked options; `of_run`: what `make` is given of the run, by name."""
  own = maker(options['name'])
  needed = {key: value for key, value in of_run.items() if key in inspect.signature(own).parameters}
  return own(**needed, **{key: value for key, value in options.items() if key != 'name'})


def augmented(objective: Objective, change: Callable[[jax.Array, jax.Array], jax.Array] | None) -> Objective:
  """The objective on augmented clips: each of its views has draws of its own. `raw` still gives the others.

  Args:
    objective: of a stream.
    change: (rng, pixels 0..255 of any dtype [B, T, H, W, 3]) -> f32 pixels 0..255; None for none.
  """
  if change is None:
    return objective

  def loss(params, state, batch, rng):
    rng, own_rng = jax.random.split(rng)
    views = {name: change(keys.of(own_rng, name), clip) for name, clip in batch['views'].items()}
    return objective.loss(params, state, {**batch, 'views': views, 'raw': batch['views']}, rng)

  return dataclasses.replace(objective, loss=loss)


def raw(batch: Mapping[str, Any], view: str) -> jax.Array:
  """A view's pixels as the host cut them, before colours were changed: what labels are to be made of. uint8."""
  return batch.get('raw', batch['views'])[view]
