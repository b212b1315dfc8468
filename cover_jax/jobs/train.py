"""`--mode=train`: trains (or continues) a run, evaluates it and draws what it has learnt."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from cover_jax import checkpoints
from cover_jax.checkpoints import going_back
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.experiment import state
from cover_jax.experiment.build import Experiment
from cover_jax.jobs import resume
from cover_jax.jobs.evaluate import chosen_params, report
from cover_jax.jobs.opening import open_experiment
from cover_jax.runtime import processes, sharding
from cover_jax.training import loop as training
from cover_jax.training import metrics
from data_pipelines.contract import SourceInfo


def train(config: ml_collections.ConfigDict, workdir: str, *, resume_from: int | None = None) -> None:
  """Trains (or continues) an experiment, evaluates it and leaves everything in the workdir.

  Args:
    config: of the experiment.
    workdir: made if missing.
    resume_from: the step of a checkpoint to go back to; see `going_back.go_back`. None: the newest.
  """
  workdirs.prepare(workdir)
  with workdirs.hold(workdir):
    if resume_from is not None:
      processes.first(lambda: going_back.go_back(workdir, resume_from))
    changes = resume.check(workdir, config.to_dict())
    with resume.naming(changes):
      _train(config, workdir, changes)


def _train(config: ml_collections.ConfigDict, workdir: str, changes: Sequence[str]) -> None:
  mesh = sharding.make_mesh(config.mesh)
  experiment, data, tests = open_experiment(config, mesh)
  resume.say_rate(workdir, experiment, changes)
  evaluation.check_keep_best(config.keep_best, experiment, tests)
  for name, stream in experiment.streams.items():
    members = ', '.join(_size(experiment.sources[i]) for i in stream.sources)
    logging.info(
      'Stream %s: %d examples a step, loss weight %.4f: %s', name, stream.batch_size, stream.loss_weight, members
    )

  results: dict[str, Any] = {}  # `evaluation.Results`
  stop = processes.watch_preemption()
  watched = {
    name: dataclasses.replace(test, batches=training.stoppable(test.batches, stop)) for name, test in tests.items()
  }
  evaluate_params = evaluation.make_evaluate(experiment, watched, mesh)

  def evaluate_now(current: state.TrainState) -> dict[str, float]:
    results.update(evaluate_params(chosen_params(config, current)))
    logging.info('Step %d\n%s', int(current.step), evaluation.table(results))
    return evaluation.scalars(results)

  try:
    final = training.train(experiment, data, workdir, mesh, evaluate_now if tests else None, stop)
  finally:
    processes.leave_interrupts()
  _finish(experiment, final, results, tests, workdir)


def _size(source: SourceInfo) -> str:
  return f'{source.name} ({source.num_examples}{"" if source.class_names else " without labels"})'


def _finish(experiment, final, results, tests, workdir) -> None:
  """Writes the report and the pictures, and says where everything is."""
  params = processes.gather(chosen_params(experiment.config, final)) if tests else None
  if jax.process_index() != 0:
    return
  from cover_jax.evaluation import visualise

  checkpoint = checkpoints.latest(workdir)
  curves, predictions = (os.path.join(workdir, name) for name in ('training_curves.png', 'predictions.png'))
  last = {}
  if results:
    last['The report'] = lambda: report(experiment, results, tests, params, workdir, int(final.step), checkpoint)
  rows = metrics.read_jsonl(os.path.join(workdir, metrics.FILE))
  last[curves] = lambda: visualise.training_curves(rows, curves)
  if tests:
    last[predictions] = lambda: visualise.predictions(sample_predictions(experiment, results, tests), predictions)
    last['TensorBoard'] = lambda: metrics.write_pictures(
      workdir, int(final.step), {'predictions': predictions}, experiment.config.to_dict()
    )
  with workdirs.writing(workdir, 'all of the results'):
    visualise.each(last)
  print(f'Checkpoint:          {checkpoint}')
  print(f'Training curves:     {curves}')
  if tests:
    print(f'Sample predictions:  {predictions}')
  print(f'TensorBoard:         tensorboard --logdir {workdir}')


def sample_predictions(
  experiment: Experiment, results: evaluation.Results, tests: evaluation.TestSets, most: int = 4
) -> list[dict[str, Any]]:
  """Test clips of each source with its head's answers, half of them errors; see `visualise.predictions`."""
  shown = []
  for name, result in results.items():
    shown += evaluation.samples(experiment, name, result, tests[name], most)
  return shown
