"""The jobs of the command line: from a config and a workdir to data, run and results."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cover_jax import checkpoints, weights
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.evaluation import frozen
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings, state
from cover_jax.experiment.build import Experiment
from cover_jax.jobs import resume
from cover_jax.runtime import processes, sharding
from cover_jax.training import finite, metrics
from cover_jax.training import loop as training
from cover_jax.weights import initialise
from data_pipelines import sources
from data_pipelines.contract import BatchIterator, SourceInfo, TestSet, UserError
from data_pipelines.loading import loader, views
from data_pipelines.sources import leaks, subsets


def _size(source: SourceInfo) -> str:
  return f'{source.name} ({source.num_examples}{"" if source.class_names else " without labels"})'


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains (or continues) an experiment, evaluates it and leaves everything in the workdir."""
  workdirs.prepare(workdir)
  with workdirs.hold(workdir):
    resume.check(workdir, config.to_dict())
    _train(config, workdir)


def _train(config: ml_collections.ConfigDict, workdir: str) -> None:
  mesh = sharding.make_mesh(config.mesh)
  experiment, data, tests = open_experiment(config, mesh)
  evaluation.check_keep_best(config.keep_best, tests)
  for name, stream in experiment.streams.items():
    members = ', '.join(_size(experiment.sources[i]) for i in stream.sources)
    logging.info(
      'Stream %s: %d examples a step, loss weight %.4f: %s', name, stream.batch_size, stream.loss_weight, members
    )

  results: dict[str, evaluation.SourceResult] = {}
  stop = processes.watch_preemption()
  watched = {
    name: dataclasses.replace(test, batches=training.stoppable(test.batches, stop)) for name, test in tests.items()
  }
  evaluate_params = evaluation.make_evaluate(experiment, watched, mesh)

  def evaluate_now(current: state.TrainState) -> dict[str, float]:
    results.update(evaluate_params(_chosen_params(config, current)))
    logging.info('Step %d\n%s', int(current.step), evaluation.table(results))
    return evaluation.scalars(results)

  final = training.train(experiment, data, workdir, mesh, evaluate_now if tests else None, stop)
  _finish(experiment, final, results, tests, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Evaluates the newest checkpoint of a workdir on every source's test split."""
  described = checkpoints.describe(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, tests = open_evaluation(config, mesh, described, workdir)
  loaded = load_params(experiment, workdir, mesh)
  results = evaluation.make_evaluate(experiment, tests, mesh)(loaded['params'])
  params = processes.gather(loaded['params'])
  if jax.process_index() == 0:
    _report(experiment, results, params, workdir, loaded['about']['step'], loaded['path'])


def judge_frozen(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Linear probe, k-NN and retrieval of an encoder as it is: the workdir's, else that of `config.init_from`.

  Without either it is a random one, the baseline that pre-training has to beat.
  """
  workdirs.prepare(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, _, tests = open_experiment(config, mesh)
  if not tests:
    raise UserError('No source of config.sources has labels and a test split: there is nothing to judge features on.')
  options = config.frozen.to_dict()
  encoder = _frozen_encoder(experiment, workdir, mesh)
  sha256 = evaluation.params_sha256(processes.gather(encoder))
  results, nearest = {}, []
  for name in tests:
    source_config = _source_config(config.sources[name])
    info = experiment.sources[experiment.source_id(name)]
    if info.modality == 'video':
      source_config['test_clips'] = options['clips']
    pair = _open_training(name, source_config), sources.open_source(name, source_config, 'test')
    sets = [_test_set(experiment, source, mesh) for source in pair]
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


def _frozen_encoder(experiment: Experiment, workdir: str, mesh: Mesh) -> Any:
  if checkpoints.latest(workdir):
    loaded = load_params(experiment, workdir, mesh)
    print(f'Encoder: {experiment.config.eval_params} parameters of {loaded["path"]}')
    return loaded['params']['encoder']
  optimizer, _ = training.make_optimizer(experiment)
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
    batches = _test_set(experiment, chosen).batches()
    return [clip[0] for batch in batches for clip, used in zip(batch['clip'], batch['mask'], strict=True) if used]

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


def open_experiment(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[Experiment, Callable[[int], BatchIterator], evaluation.TestSets]:
  """Opens the data sets of a config (building the embedded ones on first use) and builds the run, to train it.

  Returns:
    (the run, step -> this process's training batches from that step on, the test sets).

  Raises:
    UserError: for anything wrong with the config or the data.
  """
  settings.check(config)
  train_sources = [_open_training(name, _source_config(c)) for name, c in config.sources.items()]
  infos = [source.info for source in train_sources]
  experiment = experiments.build(config, infos, batch_divisor=sharding.batch_divisor(mesh))
  test_sources = _open_tests(experiment)
  for source in test_sources:
    if source.class_names != experiment.sources[experiment.source_id(source.name)].class_names:
      raise UserError(f'The train and test splits of source {source.name!r} have different classes.')
  experiment = dataclasses.replace(experiment, leaks=_check_leaks(config, test_sources, train_sources))
  batches = _training_batches(experiment, train_sources, mesh)
  return experiment, batches, _test_sets(experiment, test_sources, mesh)


def open_evaluation(
  config: ml_collections.ConfigDict, mesh: Mesh, described: Mapping[str, Any], workdir: str
) -> tuple[Experiment, evaluation.TestSets]:
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
  test_sources = _open_tests(experiment)
  if not test_sources:
    raise UserError('No source of config.sources has labels and a test split: there is nothing to evaluate.')
  checkpoints.check_sources(described, [source.info for source in test_sources])
  experiment = dataclasses.replace(experiment, leaks=_check_leaks(config, test_sources, [], workdir))
  return experiment, _test_sets(experiment, test_sources, mesh)


def _training_batches(
  experiment: Experiment, train_sources: list[sources.Source], mesh: Mesh
) -> Callable[[int], BatchIterator]:
  """step -> this process's training batches from that step on."""
  config = experiment.config
  streams = {
    name: views.Stream(
      sources=stream.sources,
      num_frames=stream.num_frames,
      size=stream.size,
      batch_size=stream.batch_size,
      weights={experiment.sources[i].name: experiment.weights[experiment.sources[i].name] for i in stream.sources},
      one_source_a_step=config.mixture.one_source_a_step,
      views=experiment.objectives[name].views,
      rand_augment=stream.rand_augment,
    )
    for name, stream in experiment.streams.items()
  }
  for name, stream in streams.items():  # the loader asks, too, but only when something has been written
    for i in stream.sources:
      views.check(train_sources[i], stream, f'stream {name!r}')
  part, parts = sharding.data_part(mesh)
  process = {'process_index': part, 'process_count': parts}

  def batches(start_step: int) -> BatchIterator:
    steps = experiment.total_steps - start_step
    return loader.train_batches(train_sources, streams, config.seed, start_step=start_step, num_steps=steps, **process)

  return batches


def _open_tests(experiment: Experiment) -> list[sources.Source]:
  """The test splits of the labelled sources that have one."""
  configs = {s.name: _source_config(experiment.config.sources[s.name]) for s in experiment.sources if s.class_names}
  return [sources.open_source(name, config, 'test') for name, config in configs.items() if config['test']]


def _test_sets(experiment: Experiment, test_sources: list[sources.Source], mesh: Mesh) -> evaluation.TestSets:
  batch_size = experiment.config.eval_batch_size
  if batch_size % sharding.batch_divisor(mesh):
    raise UserError(
      f'config.eval_batch_size = {batch_size} cannot be divided over {sharding.batch_divisor(mesh)} devices '
      '(mesh axes data x fsdp): use a multiple.'
    )
  return {source.name: _test_set(experiment, source, mesh) for source in test_sources}


def _test_set(experiment: Experiment, source: sources.Source, mesh: Mesh | None = None) -> TestSet:
  """All examples of a source, whichever split it is, with its test views; without a mesh, all in this process."""
  source_id, plan = experiment.source_id(source.name), experiment.stream_of(source.name)
  part, parts = sharding.data_part(mesh) if mesh else (0, 1)
  multiple = sharding.batch_divisor(mesh) if mesh else 1
  examples = views.examples_per_step(source, experiment.config.eval_batch_size, multiple)
  stream = views.Stream(plan.sources, plan.num_frames, plan.size, examples)
  return views.make_test_set(
    source,
    stream,
    lambda: loader.eval_batches(source, source_id, stream, examples, process_index=part, process_count=parts),
  )


def _open_training(name: str, source_config: Mapping[str, Any]) -> sources.Source:
  def open_split(dataset, split):
    return sources.open_source(name, source_config | {'dataset': dataset, 'train': split}, 'train')

  source = sources.open_source(name, source_config, 'train')
  source = leaks.leave_out(source, source_config['exclude'], open_split)
  return subsets.few_labels(source, source_config['label_fraction'])


def _check_leaks(
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
    if not weights.is_own(path):
      logging.info('Leak check: what %s was trained on is unknown', path)
      return trained, not_opened, False
    trained[path], run = [], os.path.basename(os.path.normpath(path))
    try:
      config = ml_collections.ConfigDict(checkpoints.describe(path)['about']['config'])
      source_configs, before = dict(config['sources'].items()), config['init_from']['path']
    except (UserError, KeyError) as error:  # the latter: of a version with other keys
      logging.warning('Leak check: what %s was trained on cannot be compared with the test splits (%s)', path, error)
      return trained, [*not_opened, run], False
    for name, source_config in source_configs.items():
      try:
        trained[path].append(_open_training(name, _source_config(source_config)))
      except (UserError, KeyError) as error:
        logging.warning('Leak check: source %s of %s cannot be compared with the test splits (%s)', name, path, error)
        not_opened.append(f'{name} of {run}')
    path = before
  return trained, not_opened, not not_opened


def _source_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  options = config.to_dict()
  options['data_dir'] = options.get('data_dir') or None
  return options


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


def _chosen_params(config: ml_collections.ConfigDict, current: state.TrainState) -> Any:
  return {'raw': current.params, 'ema': current.ema}[config.eval_params]


def _report(
  experiment: Experiment,
  results: Mapping[str, evaluation.SourceResult],
  params: Any,
  workdir: str,
  step: int,
  checkpoint: str,
) -> str:
  folder = os.path.join(workdir, 'evaluation')
  about = {
    'step': step,
    'params': experiment.config.eval_params,
    'params_sha256': evaluation.params_sha256(params),
    'leaks': experiment.leaks,
  }
  print(f'\nStep {step}, {experiment.config.eval_params} parameters, {checkpoint}\n\n{evaluation.table(results)}\n')
  print(leaks.sentence(experiment.leaks))
  with workdirs.writing(workdir, 'the report'), workdirs.turn(folder):
    path = evaluation.write_report(results, experiment, folder, about=about)
  print(f'Table, per-class accuracy and confusion matrices: {folder}')
  return path


def _finish(experiment, final, results, tests, workdir) -> None:
  """Writes the report and the pictures, and says where everything is."""
  params = processes.gather(_chosen_params(experiment.config, final)) if tests else None
  if jax.process_index() != 0:
    return
  from cover_jax.evaluation import visualise

  checkpoint = checkpoints.latest(workdir)
  curves, predictions = (os.path.join(workdir, name) for name in ('training_curves.png', 'predictions.png'))
  last = {}
  if results:
    last['The report'] = lambda: _report(experiment, results, params, workdir, int(final.step), checkpoint)
  rows = metrics.read_jsonl(os.path.join(workdir, metrics.FILE))
  last[curves] = lambda: visualise.training_curves(rows, curves)
  if tests:
    last[predictions] = lambda: visualise.predictions(sample_predictions(experiment, params, tests), predictions)
  with workdirs.writing(workdir, 'all of the results'):
    visualise.each(last)
  print(f'Checkpoint:          {checkpoint}')
  print(f'Training curves:     {curves}')
  if tests:
    print(f'Sample predictions:  {predictions}')
  print(f'TensorBoard:         tensorboard --logdir {workdir}')


def sample_predictions(
  experiment: Experiment, params: Any, tests: evaluation.TestSets, count: int = 3
) -> list[dict[str, Any]]:
  """The first test clips of each source with the model's best classes; see `visualise.predictions`."""
  samples = []
  for name, test in tests.items():
    batch = next(iter(test.batches()))
    class_names = experiment.sources[experiment.source_id(name)].class_names
    probabilities = np.asarray(evaluation.predict(experiment, params, name, batch['clip'][:count]))
    middle = batch['clip'].shape[1] // 2  # of the views
    shown = zip(batch['clip'][:, middle], batch['label'], batch['mask'], probabilities, strict=False)
    for clip, label, _, p_K in (row for row in shown if row[2]):
      best = [(class_names[k], float(p_K[k])) for k in np.argsort(-p_K, kind='stable')[:5]]
      true = class_names[label] if label >= 0 else None
      samples.append({'clip': clip, 'source': name, 'label': true, 'predicted': best})
  return samples
