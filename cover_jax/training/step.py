"""One jitted step over all streams: losses, gradients, update, averages, measures."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cover_jax.experiment import optim
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState, state_shardings
from cover_jax.models.encoder import STATISTICS
from cover_jax.objectives import LossOutput
from cover_jax.runtime import keys, sharding
from cover_jax.training import accumulation, measuring
from data_pipelines import contract

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


def make_train_step(experiment: Experiment, optimizer: optax.GradientTransformation) -> TrainStep:
  """Makes `train_step(state, batch) -> (state, report)`, a pure function of its arguments and the config.

  The loss is the weighted sum of the streams' losses. `report` holds
    'losses': {stream: f32 scalar}, 'measures': {stream: {source: CLU collection}},
    'scalars': {'loss', 'gradient_norm'}.
  """
  config = experiment.config
  rate_rules = tuple(config.optimizer.learning_rate_rules)

  def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    # All randomness of a step comes from its number: a resumed run draws the same.
    step_rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

    learning, frozen = optim.split(rate_rules, state.params)

    def total_loss(learning, states, statistics, batch, rng, share):
      params = with_statistics(optim.join(learning, frozen), statistics)
      outputs = {
        name: objective.loss(params, states[name], batch[name], keys.of(rng, name))
        for name, objective in experiment.objectives.items()
      }
      total = sum(share[name] * experiment.streams[name].loss_weight * out.loss for name, out in outputs.items())
      return total, (outputs, _mean_statistics(experiment, outputs, statistics))

    loss_and_gradient = jax.value_and_grad(total_loss, has_aux=True)
    (loss, (outputs, statistics)), gradients = accumulation.accumulate(
      loss_and_gradient,
      learning,
      state.objectives,
      state.params['encoder'].get(STATISTICS),
      batch,
      step_rng,
      config.accumulation_steps,
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, learning)
    learning = optax.apply_updates(learning, updates)
    params = with_statistics(optim.join(learning, frozen), statistics)
    step = state.step + 1
    ema = state.ema
    if config.ema_decay:
      # A short warm-up, else the average is of the random initial weights for 1/(1-decay) steps.
      decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
      averaged = optim.split(rate_rules, ema)[0]
      ema = optim.join(optax.incremental_update(learning, averaged, 1.0 - decay), frozen)
      old = state.ema['encoder'].get(STATISTICS)
      ema = with_statistics(ema, optax.incremental_update(statistics, old, 1.0 - decay))
    measures = {
      name: measuring.per_source(
        out.measures,
        batch[name]['source'],
        batch[name]['mask'],
        experiment.sources,
        experiment.streams[name].sources,
      )
      for name, out in outputs.items()
    }
    report = {
      'losses': {name: out.loss for name, out in outputs.items()},
      'scalars': {'loss': loss, 'gradient_norm': optax.global_norm(gradients)},
      'measures': measures,
    }
    own = {name: experiment.objectives[name].after_update(params, out.state) for name, out in outputs.items()}
    return TrainState(step=step, params=params, opt_state=opt_state, ema=ema, objectives=own), report

  return train_step


def with_statistics(params: Mapping[str, Any], statistics: Any) -> Mapping[str, Any]:
  """The parameters of a run with other batch statistics of its encoder; as they are for None."""
  return params if statistics is None else {**params, 'encoder': {**params['encoder'], STATISTICS: statistics}}


def _mean_statistics(experiment: Experiment, outputs: Mapping[str, LossOutput], old: Any) -> Any:
  """The encoder's statistics after a step: those after each stream's clips, weighted as the streams' losses are.

  A mean over streams, which all start from the same ones, does not depend on their order (our choice).
  """
  moved = {name: out.statistics for name, out in outputs.items() if out.statistics is not None}
  weights = {name: experiment.streams[name].loss_weight for name in moved}
  total = sum(weights.values())
  if not total:
    return old
  mean = lambda *values: sum(w * x for w, x in zip(weights.values(), values, strict=True)) / total
  return jax.lax.stop_gradient(jax.tree.map(mean, *moved.values()))


def jit_step(experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Wrapped:
  """The jitted step for a mesh, with the state donated; to be called within `sharding.use`."""
  _, placed = state_shardings(experiment, optimizer, mesh)
  return jax.jit(
    make_train_step(experiment, optimizer),
    donate_argnums=0,
    out_shardings=(placed, sharding.replicated(mesh)),
  )


def compile_step(experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainStep:
  """Jits the step for a mesh, with the state donated."""
  step = jit_step(experiment, optimizer, mesh)

  def run(state, batch):
    with sharding.use(mesh, experiment.config.logical_axis_rules):
      return step(state, batch)

  return run


def make_optimizer(experiment: Experiment) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The config's optimizer and its learning-rate schedule."""
  options = experiment.config.optimizer
  schedule = optim.make_schedule(options, experiment.total_steps, experiment.steps_per_epoch)
  return optim.make_optimizer(options, schedule, experiment.model), schedule


def abstract_batch(experiment: Experiment) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """The shapes and dtypes of a global batch; see `data_pipelines/contract.py`."""
  abstract = lambda shape_dtype: jax.ShapeDtypeStruct(*shape_dtype)
  batch = {
    name: contract.shapes(
      s.batch_size,
      experiment.view_lengths(name),
      s.size,
      experiment.objectives[name].targets,
      experiment.label_width(name),
    )
    for name, s in experiment.streams.items()
  }
  return jax.tree.map(abstract, batch, is_leaf=lambda x: isinstance(x, tuple))
