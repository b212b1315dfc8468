"""`--mode=frozen`: what the features of an encoder are worth, as it is."""

import dataclasses
import os
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.evaluation import frozen
from cover_jax.experiment import state, wire
from cover_jax.experiment.build import Experiment
from cover_jax.jobs.evaluate import load_params
from cover_jax.jobs.opening import open_experiment, open_training, options_of
from cover_jax.runtime import processes, sharding
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines import sources
from data_pipelines.contract import UserError
from data_pipelines.sources import leaks, open_tfds


def judge_frozen(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Linear probe, k-NN and retrieval of an encoder as it is: the workdir's, else that of `config.init_from`.

  Without either it is a random one, the baseline that pre-training has to beat.
  """
  workdirs.prepare(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, _, tests = open_experiment(config, mesh)
  if not tests:
    raise UserError('No source of config.sources has labels and a test split: there is nothing to judge features on.')
  tests = _with_one_label(experiment, tests)
  options = config.frozen.to_dict()
  encoder = _frozen_encoder(experiment, workdir, mesh)
  sha256 = evaluation.params_sha256(processes.gather(encoder))
  results, nearest = {}, []
  for name in tests:
    source_config = options_of(config.sources[name])
    info = experiment.sources[experiment.source_id(name)]
    if info.modality == 'video':
      source_config['test_clips'] = options['clips']
    pair = open_training(name, source_config), open_tfds.open_source(name, source_config, 'test')
    sets = [wire.test_set(experiment, source, mesh) for source in pair]
    train_features, test_features = (
      frozen.cached(workdir, experiment, encoder, sha256, f'{name}_{split}', test_set, mesh, options['pool'])
      for split, test_set in zip(('train', 'test'), sets, strict=True)
    )
    results[name] = frozen.judge(train_features, test_features, len(info.class_names), options)
    shown = sets[1].protocol.rsplit(', softmax', 1)[0]  # no probabilities are averaged here
    results[name]['protocol'] = f'{options["pool"]} feature of the encoder, mean over {shown}'
    results[name]['missing'] = {'train': sets[0].missing, 'test': sets[1].missing}
    results[name]['data_sha256'] = {'train': sets[0].fingerprint, 'test': sets[1].fingerprint}
    nearest.append((pair, results[name].pop('nearest')))
  if jax.process_index() != 0:
    return
  from cover_jax.evaluation import visualise

  folder = os.path.join(workdir, 'frozen')
  with workdirs.writing(workdir, 'the report'), workdirs.turn(folder):
    path = frozen.write_report(results, folder, {'encoder_sha256': sha256, 'leaks': experiment.leaks})
  print(f'\n{frozen.table(results)}\n\n{leaks.sentence(experiment.leaks)}')
  picture = os.path.join(folder, 'neighbours.png')

  def neighbours() -> None:
    rows = [row for pair, found in nearest for row in _nearest(experiment, pair, found)]
    visualise.neighbours(rows, picture)

  print(f'Report and neighbours: {path}, {picture}')
  with workdirs.writing(workdir, 'the neighbours'), workdirs.turn(folder):
    visualise.each({picture: neighbours})  # last: what cannot be drawn costs no number


def _with_one_label(experiment: Experiment, tests: evaluation.TestSets) -> evaluation.TestSets:
  """The test sets that the protocols are for; says which are left out."""
  of_one = {n: t for n, t in tests.items() if experiment.sources[experiment.source_id(n)].labels == 'one'}
  left = ', '.join(name for name in tests if name not in of_one)
  if not of_one:
    raise UserError(
      f'All tested sources ({left}) have several labels a clip: the frozen protocols are of one label. Train a head on '
      "the frozen encoder (config.optimizer.learning_rate_rules=(('encoder/', 0.0), ('.*', 1.0))) and evaluate it."
    )
  if left and jax.process_index() == 0:
    print(f'Left out, since the frozen protocols are of one label a clip: {left}')
  return of_one


def _frozen_encoder(experiment: Experiment, workdir: str, mesh: Mesh) -> Any:
  if checkpoints.latest(workdir):
    loaded = load_params(experiment, workdir, mesh)
    print(f'Encoder: {experiment.config.eval_params} parameters of {loaded["path"]}')
    return loaded['params']['encoder']
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state.state_shardings(experiment, optimizer, mesh)
  print(f'Encoder: {experiment.config.init_from.path or "random weights, neither the workdir nor init_from has any"}')
  return initialise.start(experiment, optimizer, mesh, placed).params['encoder']


def _nearest(
  experiment: Experiment, pair: tuple[sources.Source, sources.Source], nearest: list[list[int]]
) -> list[list[tuple[str, np.ndarray, bool]]]:
  """Test videos of six classes and the training videos nearest to each; see `visualise.neighbours`."""
  train, test = pair
  labelled = [np.flatnonzero(s.label >= 0) for s in pair]
  classes, queries = np.unique(test.label[labelled[1]], return_index=True)
  queries = queries[np.unique(np.linspace(0, len(classes) - 1, 6).round().astype(int))]  # evenly over the classes

  def clips(source, examples):
    chosen = dataclasses.replace(sources.select(source, examples), test_clips=1, test_crops=1)
    batches = wire.test_set(experiment, chosen).batches()
    rows = ((batch['views']['clip'], batch['mask']) for batch in batches)
    return [clip[0] for shown, mask in rows for clip, used in zip(shown, mask, strict=True) if used]

  rows = []
  for q in queries:
    query, found = labelled[1][[q]], labelled[0][nearest[q]]
    (clip,), of_found = clips(test, query), clips(train, found)
    label = test.label[query[0]]
    row = [(f'{test.name}: {test.class_names[label]}', clip, True)]
    for k, c in zip(found, of_found, strict=True):
      row.append((train.class_names[train.label[k]], c, bool(train.label[k] == label)))
    rows.append(row)
  return rows
