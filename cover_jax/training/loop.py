"""The loop around the step: what is read, saved, evaluated and said, and when."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.experiment import optim
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState, state_shardings
from cover_jax.models.encoder import STATISTICS
from cover_jax.runtime import laggards, processes, sharding
from cover_jax.training import finite, measuring, records
from cover_jax.training.records import due
from cover_jax.training.step import abstract_batch, compile_step, make_optimizer, make_train_step
from cover_jax.weights import initialise
from data_pipelines.contract import BatchIterator, SubBatch, UserError


class Preempted(Exception):
  """SIGTERM or Ctrl-C came, the state was saved, the same command continues the run."""


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
  records.check_start(state, workdir, config)
  train_step = compile_step(experiment, optimizer, mesh)
  # The evaluation of the restored step came after its save, if it came at all: it is done again.
  evaluate_first = evaluate is not None and (first >= total or (first > 0 and due(config.eval_every, first)))
  kept = records.Records(experiment, workdir, schedule, first, tests_again=evaluate_first)
  actions = []
  if jax.process_index() == 0:
    logging.info('\n%s', parameter_overview.get_parameter_overview(state.params, include_stats='sharding'))
    actions = _periodic_actions(experiment, workdir)
  _say_if_past(first, total, workdir)
  unread = None  # (step, report) that has been dispatched and not read: the host stays one step ahead
  step = first
  with kept.writing(), laggards.watch() as started:
    try:
      if evaluate_first:
        kept.evaluated(first, evaluate(state))
      data = batches(first) if first < total else iter(())
      if first < total:
        logging.info('Compiling the step: the first one takes from seconds to many minutes, with the size of the model')
      for step in range(first + 1, total + 1):
        batch = next(data)
        started(step)
        state, report = train_step(state, sharding.to_global(batch, mesh))
        interval = measuring.merge(interval, report['measures'])
        if step % config.log_every == 0 or step == total:
          report['log'], interval = interval, empty
        if unread:
          kept.settle(*unread)
        unread = (step, report)
        for action in actions:
          action(step)
        stopping, last = stop(), step == total
        evaluate_now = evaluate is not None and not last and not stopping and due(config.eval_every, step)
        save_now = due(config.checkpoint_every, step) or due(config.keep_every, step)
        if save_now or evaluate_now or last or stopping:
          kept.settle(*unread)
          unread = None
          kept.save(step, state, interval)
        if stopping and not last:
          raise Preempted
        if evaluate_now:
          kept.evaluated(step, evaluate(state))
      _end_profile(actions)
      if evaluate is not None and first < total:
        kept.evaluated(total, evaluate(state))
      kept.wait()
    except Preempted as request:
      kept.wait()
      why = 'Ctrl-C' if processes.interrupted() else 'SIGTERM'
      raise Preempted(f'{why}: saved {checkpoints.latest(workdir)} at step {step} of {total}.') from request
    except finite.NonFiniteLoss:
      raise
    except Exception:
      logging.error('Stopped at step %d. The last whole checkpoint: %s', step, checkpoints.latest(workdir) or 'none')
      raise
    finally:
      _end_profile(actions)
  return state


def _say_if_past(first: int, total: int, workdir: str) -> None:
  if first == total:
    logging.info('The run in %s has done its %d steps: what is left is to evaluate and to report.', workdir, total)
  if first > total:
    past = 'is at step %d, past its last one, %d: that step is evaluated. To train on, raise config.total_steps.'
    logging.warning(f'The run in %s {past}', workdir, first, total)


def _check_frozen(experiment: Experiment, params: Mapping[str, Any]) -> None:
  """Raises a UserError where an encoder whose parameters are all frozen would change with its batch statistics."""
  statistics = STATISTICS in params['encoder'] and not experiment.model.freeze_statistics
  learning, _ = optim.split(tuple(experiment.config.optimizer.learning_rate_rules), params)
  if statistics and not jax.tree.leaves(learning.get('encoder', {})):
    raise UserError(
      'config.optimizer.learning_rate_rules freezes the whole encoder, but its batch statistics would move, and its '
      'features with them: set config.model.freeze_statistics=True.'
    )


def stoppable(batches: Callable[[], Iterator[SubBatch]], stop: Callable[[], bool]) -> Callable[[], Iterator[SubBatch]]:
  """Batches of a test set during which `stop` is asked, too: the iterator raises `Preempted` when it says so."""

  def watched():
    for batch in batches():
      if stop():
        raise Preempted
      yield batch

  return watched


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


def _end_profile(actions: Sequence[Callable[[int], Any]]) -> None:
  """Closes and writes a profile that is still being taken: the run ended, or was stopped, within its five steps."""
  for profile in actions:
    if getattr(profile, '_session_running', False):  # CLU ends a profile at a later step only
      from clu import profiler

      profile._end_session(profiler.stop())
