"""What a run leaves behind as it goes: its config, metrics, checkpoints, the best one."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
from absl import logging

from cover_jax import checkpoints
from cover_jax.checkpoints import going_back
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState
from cover_jax.runtime import processes
from cover_jax.training import finite, measuring, metrics
from data_pipelines import durable
from data_pipelines.contract import UserError


class Records:
  """Writes into the workdir of one run. Every process makes one and calls it alike."""

  def __init__(self, experiment: Experiment, workdir: str, schedule: optax.Schedule, first: int, *, tests_again: bool):
    """Opens checkpoints and metrics and writes config.json.

    Args:
      experiment: the run.
      workdir: where all of it lies.
      schedule: step -> learning rate, to be told with the metrics.
      first: the step that the run starts from.
      tests_again: that step is evaluated again.

    Raises:
      UserError: if something cannot be written there.
    """
    self._experiment, self._workdir, self._schedule, self._first = experiment, workdir, schedule, first
    self._saved = first
    config = experiment.config
    self._saver = checkpoints.Saver(workdir, config.keep_checkpoints)  # what cannot be saved is found now
    # Only now: the checkpoint that is there, if any, fits this config.
    processes.first(lambda: _write_config(workdir, config))
    self._writer = metrics.Writer(workdir, first_step=first, tests_again=tests_again)
    self._writer.describe(config.to_dict())

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """While the run goes on; what was written is flushed at its end."""
    with self._writer:
      if self._first > 0 and due(self._experiment.config.keep_every, self._first):
        self._saver.keep(f'step-{self._first}')  # a kill may have come between its save and this
      yield

  def settle(self, step: int, report: Mapping[str, Any]) -> None:
    """Reads the report of a step that has been dispatched; blocks until it is done. Writes it where it has a 'log'.

    Raises:
      NonFiniteLoss: if its loss or gradient is not a number.
    """
    losses, scalars = jax.device_get((report['losses'], report['scalars']))
    if trouble := finite.trouble(losses, scalars['loss'], scalars['gradient_norm']):
      self._stop_at(step, trouble)
    if 'log' in report:
      averages = {f'train/{k}': v for k, v in measuring.compute(report['log']).items()}
      own = {f'train/{k}': float(v) for k, v in scalars.items()}
      self._writer.write(step, averages | own | {'learning_rate': float(self._schedule(step - 1))})

  def save(self, step: int, state: TrainState, interval: Any) -> None:
    """Saves a checkpoint; raises NonFiniteLoss if the state holds numbers that are none, or absurd weights."""
    if bad := finite.bad_arrays(state):
      trouble = f'Loss and gradient are finite, but the state is not ({", ".join(bad[:3])}, {len(bad)} arrays)'
      self._stop_at(step, trouble)
    if absurd := finite.diverged(state):
      trouble = f'Loss and gradient are finite, but no network learns with such weights ({", ".join(absurd[:3])})'
      self._stop_at(step, trouble)
    workdirs.check_held(self._workdir)
    self._writer.flush()
    config = self._experiment.config
    text = checkpoints.about(config.to_dict(), self._experiment.sources, step)
    path = self._saver.save({'about': text, 'state': state, 'interval': interval})
    logging.info('Saved %s (step %d)', path, step)
    if due(config.keep_every, step):
      self._saver.keep(f'step-{step}')
    self._saved = step

  def evaluated(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes what an evaluation gave, and keeps the checkpoint of that step if it is the best."""
    self._writer.write(step, scalars)
    best = self._experiment.config.keep_best
    if best:
      if best not in scalars:
        raise UserError(f'config.keep_best is {best!r}: expected one of {", ".join(sorted(scalars))}.')
      self._saver.keep_if_best(best, scalars[best], step)

  def wait(self) -> None:
    """Until what was saved is whole."""
    if self._saved > self._first:
      self._saver.wait()

  def _stop_at(self, step: int, trouble: str) -> None:
    self.wait()
    steps = going_back.steps(self._workdir)
    older = f' (or from an older one, of {", ".join(map(str, steps))}: --resume_from=STEP)' if len(steps) > 1 else ''
    raise finite.NonFiniteLoss(
      f'{trouble} at step {step}. Nothing of that step was saved; the last whole checkpoint is '
      f'{checkpoints.latest(self._workdir) or "none"}. Lower config.optimizer.learning_rate, set '
      f'config.optimizer.clip_norm, or look at the data of that step, then run the same command again{older}.'
    )


def due(every: int, step: int) -> bool:
  """Whether something that is done every so many steps (0: never) is done after this one."""
  return bool(every) and step % every == 0


def check_start(state: TrainState, workdir: str, config: Any) -> None:
  """Raises a UserError if the state to start from holds numbers that are none, or absurd: training could only spread
  them."""
  bad, what = finite.bad_arrays(state), 'numbers that are not finite'
  if not bad:
    bad, what = finite.diverged(state), 'weights of a run that has diverged'
  if bad:
    newest = checkpoints.latest(workdir)
    where = newest or config.init_from.path or 'The state to start from'
    steps = [step for step in going_back.steps(workdir) if step < int(state.step)]
    remedy = 'start from other weights'
    if newest:
      remedy = f'go back to another one with --resume_from={steps[0]}' if steps else 'take another --workdir'
    raise UserError(f'{where} holds {what} ({", ".join(bad[:3])}, {len(bad)} arrays): {remedy}.')


def _write_config(workdir: str, config: Any) -> None:
  with workdirs.writing(workdir, 'config.json'):
    durable.write(os.path.join(workdir, 'config.json'), config.to_json_best_effort(indent=2) + '\n')
