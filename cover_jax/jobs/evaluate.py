"""`--mode=evaluate`: the newest checkpoint of a workdir on every source's test split."""

import os
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.evaluation import page, runs
from cover_jax.experiment import state
from cover_jax.experiment.build import Experiment
from cover_jax.jobs import resume
from cover_jax.jobs.opening import open_evaluation
from cover_jax.runtime import processes, sharding
from cover_jax.training import finite, metrics
from data_pipelines import durable
from data_pipelines.sources import leaks

PAGE = 'index.html'


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Evaluates the newest checkpoint of a workdir on every source's test split."""
  described = checkpoints.describe(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, tests = open_evaluation(config, mesh, described, workdir)
  loaded = load_params(experiment, workdir, mesh)
  results = evaluation.make_evaluate(experiment, tests, mesh)(loaded['params'])
  params = processes.gather(loaded['params'])
  if jax.process_index() == 0:
    report(experiment, results, tests, params, workdir, loaded['about']['step'], loaded['path'])


def load_params(experiment: Experiment, path: str, mesh: Mesh) -> dict[str, Any]:
  """Reads a checkpoint's parameters (raw or averaged, as `config.eval_params` says); see `checkpoints.restore_params`.

  Raises:
    UserError: if they or the classes of their heads do not fit the run, the config would make another function of
      them, or there is no average.
  """
  abstract, placed = state.params_shardings(experiment, mesh)
  about = checkpoints.describe(path)['about']
  resume.check_function(about, experiment.config.to_dict(), path)
  loaded = checkpoints.restore_params(path, experiment.config.eval_params, abstract, placed)
  finite.check(loaded['params'], loaded['path'])
  checkpoints.check_sources(loaded, experiment.sources)
  return loaded


def chosen_params(config: ml_collections.ConfigDict, current: state.TrainState) -> Any:
  return {'raw': current.params, 'ema': current.ema}[config.eval_params]


def report(
  experiment: Experiment,
  results: evaluation.Results,
  tests: evaluation.TestSets,
  params: Any,
  workdir: str,
  step: int,
  checkpoint: str,
) -> str:
  """Prints the table, writes the folder `evaluation` of a workdir and gives the path of its JSON."""
  folder = os.path.join(workdir, runs.FOLDER)
  about = {
    'step': step,
    'params': experiment.config.eval_params,
    'params_sha256': evaluation.params_sha256(params),
    'leaks': experiment.leaks,
  }
  print(f'\nStep {step}, {experiment.config.eval_params} parameters, {checkpoint}\n\n{evaluation.table(results)}\n')
  print(leaks.sentence(experiment.leaks))
  with workdirs.writing(workdir, 'the report'), workdirs.turn(folder):
    last = {PAGE: lambda: durable.write(os.path.join(folder, PAGE), page.of_run(runs.read(workdir)))}
    path = evaluation.write_report(results, experiment, folder, about=about, test_sets=tests, last=last)
    drawn = {f'results/{name}': os.path.join(folder, evaluation.picture_file(experiment, name)) for name in results}
    metrics.write_pictures(workdir, step, drawn, experiment.config.to_dict())
  print(f'Table, per-class accuracy, confusions, clips: {os.path.join(folder, PAGE)}')
  return path
