"""From a config to the data sets of a run, and to the run: opened, checked against each other and for leaks."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.evaluation.classify import TestSets
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings, wire
from cover_jax.experiment.build import Experiment
from cover_jax.runtime import agreement, processes, sharding
from cover_jax.weights import files
from data_pipelines import sources
from data_pipelines.contract import BatchIterator, UserError
from data_pipelines.sources import leaks, open_tfds, subsets


def open_experiment(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[Experiment, Callable[[int], BatchIterator], TestSets]:
  """Opens the data sets of a config (building the embedded ones on first use) and builds the run, to train it.

  Returns:
    (the run, step -> this process's training batches from that step on, the test sets).

  Raises:
    UserError: for anything wrong with the config or the data.
  """
  settings.check(config)
  train_sources = _opened(lambda: [open_training(name, options_of(c)) for name, c in config.sources.items()])
  infos = [source.info for source in train_sources]
  experiment = experiments.build(config, infos, batch_divisor=sharding.batch_divisor(mesh))
  test_sources = _opened(lambda: open_tests(experiment))
  for source in test_sources:
    if source.class_names != experiment.sources[experiment.source_id(source.name)].class_names:
      raise UserError(f'The train and test splits of source {source.name!r} have different classes.')
  experiment = dataclasses.replace(experiment, leaks=check_leaks(config, test_sources, train_sources))
  batches = wire.training_batches(experiment, train_sources, mesh)
  return experiment, batches, wire.test_sets(experiment, test_sources, mesh)


def open_evaluation(
  config: ml_collections.ConfigDict, mesh: Mesh, described: Mapping[str, Any], workdir: str
) -> tuple[Experiment, TestSets]:
  """Opens the test splits of a config and builds the run as its checkpoint knows it: no training data is needed.

  Args:
    config: of the run.
    mesh: the devices.
    described: of `checkpoints.describe`: the sources and their classes.
    workdir: the path that it is of.

  Raises:
    UserError: for anything wrong with the config or the test splits, or if these have other classes than the heads.
  """
  settings.check(config)
  # Batches of training are not divided over these devices.
  experiment = experiments.build(config, checkpoints.sources_of(described, list(config.sources)))
  test_sources = _opened(lambda: open_tests(experiment))
  if not test_sources:
    raise UserError('No source of config.sources has labels and a test split: there is nothing to evaluate.')
  checkpoints.check_sources(described, [source.info for source in test_sources])
  experiment = dataclasses.replace(experiment, leaks=check_leaks(config, test_sources, [], workdir))
  return experiment, wire.test_sets(experiment, test_sources, mesh)


def _opened(do: Callable[[], list[sources.Source]]) -> list[sources.Source]:
  """Data sets that every process opens, and that are the same in each."""
  opened = processes.together(do)
  if jax.process_count() > 1:
    agreement.check('The data', agreement.of_data(opened))
  return opened


def open_tests(experiment: Experiment) -> list[sources.Source]:
  """The test splits of the labelled sources that have one."""
  configs = {s.name: options_of(experiment.config.sources[s.name]) for s in experiment.sources if s.class_names}
  return [open_tfds.open_source(name, config, 'test') for name, config in configs.items() if config['test']]


def open_training(name: str, source_config: Mapping[str, Any]) -> sources.Source:
  def open_split(dataset, split):
    return open_tfds.open_source(name, source_config | {'dataset': dataset, 'train': split}, 'train')

  source = open_tfds.open_source(name, source_config, 'train')
  source = leaks.leave_out(source, source_config['exclude'], open_split)
  return subsets.few_labels(source, source_config['label_fraction'])


def options_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
  options = config.to_dict()
  options['data_dir'] = options.get('data_dir') or None
  return options


def check_leaks(
  config: ml_collections.ConfigDict,
  test_sources: list[sources.Source],
  train_sources: list[sources.Source],
  evaluated: str = '',
) -> dict[str, Any]:
  """Refuses tests on what the weights were trained on, unless the config allows it; gives `leaks.report`.

  Args:
    config: of the run.
    test_sources: its test splits.
    train_sources: what it trains on; ignored where weights are only tested.
    evaluated: path of trained weights that are only tested: what counts is what they were trained on, whatever the
      config says now.
  """
  if not test_sources:
    return {}
  trained, not_opened, all_known = _trained_before(evaluated or config.init_from.path)
  now = trained.pop(evaluated, []) if evaluated else train_sources
  found = leaks.compare({'': now, **trained}, test_sources)
  leaks.check(found, config.allow_overlap)
  found = found._replace(not_compared=sorted({*found.not_compared, *not_opened}))
  return leaks.report(found, 'unknown' if not all_known else 'compared' if trained else 'none')


def _trained_before(path: str) -> tuple[dict[str, list[sources.Source]], list[str], bool]:
  """What the weights at a path for `init_from` were trained on, back to their beginning.

  Returns:
    ({path of a run of this project: those of its sources that can be opened}, the names of sources and runs that
    cannot, whether that is all that the weights were trained on).
  """
  trained, not_opened = {}, []
  while path and path not in trained:
    if not files.is_own(path):
      logging.info('Leak check: what %s was trained on is unknown', path)
      return trained, not_opened, False
    trained[path], run = [], os.path.basename(os.path.normpath(path))
    try:
      config = ml_collections.ConfigDict(checkpoints.describe(path)['about']['config'])
      source_configs, before = dict(config['sources'].items()), config['init_from']['path']
    except (UserError, KeyError) as error:  # the latter: of a version with other keys
      logging.warning('Leak check: what %s was trained on cannot be compared with the test splits (%s)', path, error)
      return trained, [*not_opened, run], False
    faults = {}
    for name, source_config in source_configs.items():
      try:
        trained[path].append(open_training(name, options_of(source_config)))
      except (UserError, KeyError) as error:
        faults[name] = error
    if faults:
      first = next(iter(faults))
      logging.warning(
        'Leak check: %s of %s cannot be compared with the test splits; why not %s: %s',
        ', '.join(faults), path, first, faults[first],
      )  # fmt: skip
    not_opened += [f'{name} of {run}' for name in faults]
    path = before
  return trained, not_opened, not not_opened
