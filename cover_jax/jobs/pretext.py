"""`--mode=pretext`: what the streams of a run have learnt, by their own objectives' measures on held-out videos."""

import os

import jax
import ml_collections

from cover_jax import checkpoints
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import pretext
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings, state
from cover_jax.jobs.evaluate import load_params
from cover_jax.jobs.opening import check_leaks, options_of
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from data_pipelines.sources import leaks, open_tfds


def judge_pretext(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Judges the newest checkpoint of a workdir on the test splits of its streams, beside weights that are untrained.

  Raises:
    UserError: if there is no checkpoint, or no stream with another objective than classification has a test split.
  """
  settings.check(config)
  mesh = sharding.make_mesh(config.mesh)
  divisor = sharding.batch_divisor(mesh)
  streams = pretext.streams_of(config)
  if not streams:
    raise UserError(
      'No stream of config.streams has an objective other than classification and a test split of each of its sources: '
      'name the splits, such as --config.sources.<source>.test=test.'
    )
  described = checkpoints.describe(workdir)
  experiment = experiments.build(config, checkpoints.sources_of(described, list(config.sources)), batch_divisor=divisor)
  wanted = {source for name in streams for source in config.streams[name].sources}
  sources = [open_tfds.open_source(n, options_of(c), 'test') for n, c in config.sources.items() if n in wanted]
  leaked = check_leaks(config, sources, [], workdir)
  judged = pretext.held_out(experiment, streams, sources, divisor)
  judge = pretext.make_judge(judged, sources, mesh)

  loaded = load_params(experiment, workdir, mesh)
  optimizer, _ = stepping.make_optimizer(experiment)
  abstract, placed = state.state_shardings(experiment, optimizer, mesh)
  states = checkpoints.restore_objectives(loaded['path'], abstract.objectives, placed.objectives)
  trained = judge(loaded['params'], states)
  fresh = state.create(experiment, optimizer, mesh, placed)
  untrained = judge(fresh.params, fresh.objectives)
  if jax.process_index() != 0:
    return
  about = {
    'step': loaded['about']['step'],
    'params': config.eval_params,
    'leaks': leaked,
    'clips': {name: sum(sources[i].num_examples for i in judged.streams[name].sources) for name in streams},
  }
  print(f'\nStep {about["step"]}, {config.eval_params} parameters, {loaded["path"]}\n')
  print(f'{pretext.table(trained, untrained)}\n\n{leaks.sentence(leaked)}')
  folder = os.path.join(workdir, 'pretext')
  with workdirs.writing(workdir, 'the report'), workdirs.turn(folder):
    print(f'Report: {pretext.write_report(trained, untrained, folder, about)}')
