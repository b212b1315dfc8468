"""The train state: everything that a step changes, and how it is laid over the mesh."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cover_jax.experiment import optim
from cover_jax.experiment.build import Experiment
from cover_jax.models.encoder import STATISTICS
from cover_jax.runtime import keys, sharding


class TrainState(flax.struct.PyTreeNode):
  """The state of a run after `step` steps.

  Attributes:
    step: int32 scalar.
    params: {'encoder': ..., 'heads': {source: ...}, 'objectives': {stream: ...}}, f32. Batch statistics of the encoder
      lie in params['encoder']['statistics'].
    opt_state: optax's, for the parameters that are not frozen.
    ema: an exponential moving average of `params`, or {} where the config asks for none.
    objectives: {stream: the state of its objective}.
  """

  step: jax.Array
  params: Mapping[str, Any]
  opt_state: Any
  ema: Mapping[str, Any]
  objectives: Mapping[str, Any]


def init_params(experiment: Experiment, rng: jax.Array) -> dict[str, Any]:
  """Draws the parameters, with Linen's axis names still on them. A pure function of `rng`."""
  encoder_rng, heads_rng, objectives_rng = jax.random.split(rng, 3)
  clip = jnp.zeros(experiment.one_clip.shape, experiment.model.dtype)
  encoded, made = experiment.model.init_with_output({'params': encoder_rng}, clip)
  encoder = made['params'] | ({STATISTICS: made['batch_stats']} if 'batch_stats' in made else {})
  heads = experiment.heads.init(heads_rng, encoded).get('params', {})
  own = {
    name: objective.init_params(keys.of(objectives_rng, name)) for name, objective in experiment.objectives.items()
  }
  return {'encoder': encoder, 'heads': heads, 'objectives': own}


def init_state(experiment: Experiment, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
  """Makes the state at step 0, with Linen's axis names still on the arrays."""
  return around(experiment, optimizer, init_params(experiment, rng))


def around(experiment: Experiment, optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> TrainState:
  """The state at step 0 with these parameters."""
  learning, _ = optim.split(tuple(experiment.config.optimizer.learning_rate_rules), params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(learning),
    ema=jax.tree.map(jnp.copy, params) if experiment.config.ema_decay else {},
    objectives={name: o.init_state(params) for name, o in experiment.objectives.items()},
  )


def state_shardings(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """The shapes of the state and where each array lies, without allocating anything.

  Returns:
    (a TrainState of ShapeDtypeStructs, a TrainState of NamedShardings), both without metadata boxes.
  """
  boxed = jax.eval_shape(lambda: init_state(experiment, optimizer, jax.random.key(0)))
  placed = sharding.shardings(boxed, mesh, experiment.config.logical_axis_rules)
  return nn.meta.unbox(boxed), placed


def params_shardings(experiment: Experiment, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
  """As `state_shardings`, of the parameters alone."""
  boxed = jax.eval_shape(lambda: init_params(experiment, jax.random.key(0)))
  return nn.meta.unbox(boxed), sharding.shardings(boxed, mesh, experiment.config.logical_axis_rules)


def create(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh, placed: TrainState
) -> TrainState:
  """Makes the state at step 0 where it belongs on the mesh; the same values on any mesh."""
  make = lambda rng: nn.meta.unbox(init_state(experiment, optimizer, rng))
  with sharding.use(mesh, experiment.config.logical_axis_rules):
    return jax.jit(make, out_shardings=placed)(jax.random.key(experiment.config.seed))
