"""Objectives: what a stream is trained for. One file each; a config names the file.

    config.streams.video.objective = {'name': 'classification', 'label_smoothing': 0.1}

loads `cover_jax.objectives.classification` and calls its `make`.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from cover_jax.models.heads import Heads
from data_pipelines.contract import SourceInfo, UserError, ViewSampler

Params = Mapping[str, Any]


class Encode(Protocol):
  """Runs the encoder on raw pixels."""

  def __call__(self, encoder_params: Params, clip_BxTxHxWx3: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
    """Gives tokens [B, 1+N*T, D]; with `rng` in training mode (drop-path)."""


class LossOutput(NamedTuple):
  """What an objective makes of a sub-batch.

  Attributes:
    loss: f32 scalar, mean over the sub-batch.
    state: the objective's next state; the same structure as it was given.
    measures: per-example values f32 [B], averaged per source and written as metrics.
  """

  loss: jax.Array
  state: Any
  measures: Mapping[str, jax.Array]


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
  """

  loss: Callable[[Params, Any, Mapping[str, jax.Array], jax.Array], LossOutput]
  init_params: Callable[[jax.Array], Params] = lambda rng: {}
  init_state: Callable[[Params], Any] = lambda params: {}
  views: ViewSampler | None = None


def make(
  options: Mapping[str, Any],
  *,
  encode: Encode,
  heads: Heads,
  sources: Sequence[SourceInfo],
  where: str,
) -> Objective:
  """Makes the objective that a config names.

  Args:
    options: `name` and the objective's own options.
    encode: the encoder as a function of parameters and clips.
    heads: the classification heads of the stream's labelled sources.
    sources: the run's sources; `source` of a sub-batch indexes them.
    where: the config key, for messages.

  Returns:
    The objective.

  Raises:
    UserError: if there is no such objective or it does not take the options.
  """
  options = dict(options)
  name = options.pop('name')
  known = sorted(m.name for m in pkgutil.iter_modules(__path__))
  if name not in known:
    raise UserError(f'{where}.name is {name!r}: expected one of {known}.')
  module = importlib.import_module(f'{__name__}.{name}')
  given = dict(encode=encode, heads=heads, sources=sources, **options)
  try:
    inspect.signature(module.make).bind(**given)
  except TypeError as error:
    raise UserError(f'{where} does not fit the objective {name!r}: {error}.') from error
  return module.make(**given)
