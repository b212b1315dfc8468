"""Training: one jitted step over all streams, and the loop around it."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.experiment import optim
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState, state_shardings
from cover_jax.models.encoder import STATISTICS
from cover_jax.objectives import LossOutput
from cover_jax.runtime import keys, processes, sharding
from cover_jax.training import accumulation, finite, metrics
from cover_jax.weights import initialise
from data_pipelines import contract, durable
from data_pipelines.contract import BatchIterator, SubBatch, UserError

TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


class Preempted(Exception):
  """SIGTERM came, the state was saved, the same command continues the run."""


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
      name: metrics.per_source(
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


def start_state(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh, workdir: str
) -> tuple[TrainState, Any, Any]:
  """The state to start from: the workdir's newest whole checkpoint.

  Only where no checkpoint lies it is a fresh one, seeded as `config.init_from` says.

  Returns:
    (state on the mesh, the metrics being summed at that step, the same with nothing summed yet).

  Raises:
    UserError: if there are checkpoints and none is whole, or the newest whole one does not fit the run.
  """
  abstract, placed = state_shardings(experiment, optimizer, mesh)
  _check_frozen(experiment, abstract.params)
  _, report = jax.eval_shape(make_train_step(experiment, optimizer), abstract, abstract_batch(experiment))
  zeros = lambda: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), report['measures'])
  place = lambda tree: sharding.put(tree, sharding.replicated(mesh))
  if not checkpoints.lie_in(workdir):
    return initialise.start(experiment, optimizer, mesh, placed), place(zeros()), place(zeros())
  template = {'state': abstract, 'interval': zeros()}
  where = {'state': placed, 'interval': jax.tree.map(lambda _: sharding.replicated(mesh), zeros())}
  restored = checkpoints.restore(workdir, template, where, experiment.sources)
  logging.info('Continuing from %s (step %d)', restored['path'], int(restored['state'].step))
  return restored['state'], restored['interval'], place(zeros())


def abstract_batch(experiment: Experiment) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """The shapes and dtypes of a global batch; see `data_pipelines/contract.py`."""
  abstract = lambda shape_dtype: jax.ShapeDtypeStruct(*shape_dtype)
  batch = {
    name: contract.shapes(s.batch_size, experiment.view_lengths(name), s.size, experiment.objectives[name].targets)
    for name, s in experiment.streams.items()
  }
  return jax.tree.map(abstract, batch, is_leaf=lambda x: isinstance(x, tuple))


def train(
  experiment: Experiment,
  batches: Callable[[int], BatchIterator],
  workdir: str,
  mesh: Mesh,
  evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
  stop: Callable[[], bool] = lambda: False,
) -> TrainState:
  """Runs the config's steps, from the workdir's newest checkpoint if there is one.

  The state is saved every `config.checkpoint_every` steps, before every evaluation, at the end and when `stop` says so;
  never after a step whose loss or gradient is not finite.

  Args:
    experiment: the run.
    batches: step -> iterator of this process's batches from that step on; see `data_pipelines/contract.py`.
    workdir: an existing folder for checkpoints, metrics and logs; see `workdir.hold`.
    mesh: the devices.
    evaluate: state -> scalars; called every `config.eval_every` steps and at the end, also where the workdir's
      checkpoint is at the end already.
    stop: asked once a step whether to save and stop; see `processes.watch_preemption`. `evaluate` may ask it, too,
      and raise `Preempted`; see `stoppable`.

  Returns:
    The final state.

  Raises:
    Preempted: when `stop` says so, once the state is saved.
    NonFiniteLoss: at the first step whose loss or gradient is not finite, naming step, stream and last checkpoint.
    UserError: if the checkpoint does not fit the config, or something cannot be written.
  """
  config, total = experiment.config, experiment.total_steps
  optimizer, schedule = make_optimizer(experiment)
  state, interval, empty = start_state(experiment, optimizer, mesh, workdir)
  first = int(state.step)
  _check_start(state, workdir, config)
  train_step = compile_step(experiment, optimizer, mesh)
  saver = checkpoints.Saver(workdir, config.keep_checkpoints)  # what cannot be saved is found now
  # Only now: the checkpoint that is there, if any, fits this config.
  processes.first(lambda: _write_config(workdir, config))
  actions = []
  if jax.process_index() == 0:
    logging.info('\n%s', parameter_overview.get_parameter_overview(state.params, include_stats='sharding'))
    actions = _periodic_actions(experiment, workdir)
  # The evaluation of the restored step came after its save, if it came at all: it is done again.
  evaluate_first = evaluate is not None and (first >= total or (first > 0 and _due(config.eval_every, first)))
  writer = metrics.Writer(workdir, first_step=first, tests_again=evaluate_first)

  def save(step, state, interval):
    if bad := finite.bad_arrays(state):
      stop_at(step, f'Loss and gradient are finite, but the state is not ({", ".join(bad[:3])}, {len(bad)} arrays)')
    writer.flush()
    text = checkpoints.about(config.to_dict(), experiment.sources, step)
    path = saver.save({'about': text, 'state': state, 'interval': interval})
    logging.info('Saved %s (step %d)', path, step)
    if _due(config.keep_every, step):
      saver.keep(f'step-{step}')

  def evaluate_at(step, state):
    scalars = evaluate(state)
    writer.write(step, scalars)
    if config.keep_best:
      if config.keep_best not in scalars:
        raise UserError(f'config.keep_best is {config.keep_best!r}: expected one of {", ".join(sorted(scalars))}.')
      saver.keep_if_best(config.keep_best, scalars[config.keep_best], step)

  def settle(step, report):
    """Reads a step that has been dispatched; blocks until it is done."""
    losses, scalars = jax.device_get((report['losses'], report['scalars']))
    if trouble := finite.trouble(losses, scalars['loss'], scalars['gradient_norm']):
      stop_at(step, trouble)
    if 'log' in report:
      averages = {f'train/{k}': v for k, v in metrics.compute(report['log']).items()}
      own = {f'train/{k}': float(v) for k, v in scalars.items()}
      writer.write(step, averages | own | {'learning_rate': float(schedule(step - 1))})

  def stop_at(step, trouble):
    if saved > first:
      saver.wait()
    raise finite.NonFiniteLoss(
      f'{trouble} at step {step}. Nothing of that step was saved; the last whole checkpoint is '
      f'{checkpoints.latest(workdir) or "none"}. Lower config.optimizer.learning_rate, set '
      'config.optimizer.clip_norm, or look at the data of that step, then run the same command again.'
    )

  if first == total:
    logging.info('The run in %s has done its %d steps: what is left is to evaluate and to report.', workdir, total)
  if first > total:
    past = 'is at step %d, past its last one, %d: that step is evaluated. To train on, raise config.total_steps.'
    logging.warning(f'The run in %s {past}', workdir, first, total)
  unread = None  # (step, report) that has been dispatched and not read: the host stays one step ahead
  step = saved = first
  with writer:
    try:
      if first > 0 and _due(config.keep_every, first):
        saver.keep(f'step-{first}')  # a kill may have come between its save and this
      if evaluate_first:
        evaluate_at(first, state)
      data = batches(first) if first < total else iter(())
      for step in range(first + 1, total + 1):
        batch = sharding.to_global(next(data), mesh)
        state, report = train_step(state, batch)
        interval = metrics.merge(interval, report['measures'])
        if step % config.log_every == 0 or step == total:
          report['log'], interval = interval, empty
        if unread:
          settle(*unread)
        unread = (step, report)
        for action in actions:
          action(step)
        stopping, last = stop(), step == total
        evaluate_now = evaluate is not None and not last and not stopping and _due(config.eval_every, step)
        save_now = _due(config.checkpoint_every, step) or _due(config.keep_every, step)
        if save_now or evaluate_now or last or stopping:
          settle(*unread)
          unread = None
          save(step, state, interval)
          saved = step
        if stopping and not last:
          raise Preempted
        if evaluate_now:
          evaluate_at(step, state)
      if evaluate is not None and first < total:
        evaluate_at(total, state)
      if saved > first:
        saver.wait()
    except Preempted as request:
      if saved > first:
        saver.wait()
      raise Preempted(f'SIGTERM: saved {checkpoints.latest(workdir)} at step {step} of {total}.') from request
    except finite.NonFiniteLoss:
      raise
    except Exception:
      logging.error('Stopped at step %d. The last whole checkpoint: %s', step, checkpoints.latest(workdir) or 'none')
      raise
  return state


def _check_start(state: TrainState, workdir: str, config: Any) -> None:
  """Raises a UserError if the state to start from holds numbers that are none: training could only spread them."""
  if bad := finite.bad_arrays(state):
    newest = checkpoints.latest(workdir)
    where = newest or config.init_from.path or 'The state to start from'
    remedy = 'remove it, to go on from the one before' if newest else 'start from other weights'
    raise UserError(f'{where} holds numbers that are not finite ({", ".join(bad[:3])}, {len(bad)} arrays): {remedy}.')


def _check_frozen(experiment: Experiment, params: Mapping[str, Any]) -> None:
  """Raises a UserError where an encoder whose parameters are all frozen would change with its batch statistics."""
  statistics = STATISTICS in params['encoder'] and not experiment.model.freeze_statistics
  learning, _ = optim.split(tuple(experiment.config.optimizer.learning_rate_rules), params)
  if statistics and not jax.tree.leaves(learning.get('encoder', {})):
    raise UserError(
      'config.optimizer.learning_rate_rules freezes the whole encoder, but its batch statistics would move, and its '
      'features with them: set config.model.freeze_statistics=True.'
    )


def _write_config(workdir: str, config: Any) -> None:
  with workdirs.writing(workdir, 'config.json'):
    durable.write(os.path.join(workdir, 'config.json'), config.to_json_best_effort(indent=2) + '\n')


def stoppable(batches: Callable[[], Iterator[SubBatch]], stop: Callable[[], bool]) -> Callable[[], Iterator[SubBatch]]:
  """Batches of a test set during which `stop` is asked, too: the iterator raises `Preempted` when it says so."""

  def watched():
    for batch in batches():
      if stop():
        raise Preempted
      yield batch

  return watched


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


def _periodic_actions(experiment: Experiment, workdir: str) -> list[Callable[[int], Any]]:
  """CLU's progress report (steps/s, time left) and, if the config asks for it, a profile."""
  try:
    from clu import periodic_actions  # imports TensorFlow
  except ImportError:
    logging.warning('TensorFlow is not installed: no progress report and no profile.')
    return []
  config = experiment.config
  actions = [
    periodic_actions.ReportProgress(
      num_train_steps=experiment.total_steps, every_steps=config.log_every, every_secs=None
    )
  ]
  if config.profile_at_step:
    profile = periodic_actions.Profile(
      logdir=workdir,
      first_profile=config.profile_at_step,
      num_profile_steps=5,
      profile_duration_ms=None,  # or CLU would also wait for three seconds to pass
      every_secs=None,
    )
    actions.append(profile)
  return actions
