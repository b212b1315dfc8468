"""The jobs of the command line: from a config and a workdir to data, run and results."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cover_jax import checkpoints, metrics, sharding, state
from cover_jax import evaluate as evaluation
from cover_jax import experiment as experiments
from cover_jax import train as training
from cover_jax.experiment import Experiment
from data_pipelines.contract import BatchIterator, SourceInfo, SubBatch, UserError


def train(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Trains (or continues) an experiment, evaluates it and leaves everything in the workdir."""
  _prepare_workdir(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, data, tests = open_experiment(config, mesh)
  for name, stream in experiment.streams.items():
    members = ', '.join(f'{experiment.sources[i].name} ({experiment.sources[i].num_examples})' for i in stream.sources)
    logging.info(
      'Stream %s: %d examples a step, loss weight %.4f: %s', name, stream.batch_size, stream.loss_weight, members
    )

  results: dict[str, evaluation.SourceResult] = {}
  evaluate_params = evaluation.make_evaluate(experiment, tests, mesh)

  def evaluate_now(current: state.TrainState) -> dict[str, float]:
    results.update(evaluate_params(_chosen_params(config, current)))
    logging.info('Step %d\n%s', int(current.step), evaluation.table(results))
    return evaluation.scalars(results)

  final = training.train(experiment, data, workdir, mesh, evaluate_now if tests else None)
  _finish(experiment, final, results, tests, workdir)


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Evaluates the newest checkpoint of a workdir on every source's test split."""
  loaded = checkpoints.load(workdir)
  mesh = sharding.make_mesh(config.mesh)
  experiment, _, tests = open_experiment(config, mesh)
  checkpoints.check_sources(loaded, experiment.sources)
  current = load_params(experiment, loaded, mesh)
  results = evaluation.make_evaluate(experiment, tests, mesh)(current)
  if jax.process_index() == 0:
    _report(experiment, results, workdir, loaded['about']['step'], loaded['path'])


def open_experiment(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[Experiment, Callable[[int], BatchIterator], evaluation.TestSets]:
  """Opens the data sets of a config (building the embedded ones on first use) and builds the run.

  Returns:
    (the run, step -> this process's training batches from that step on, the test sets).

  Raises:
    UserError: for anything wrong with the config or the data.
  """
  from data_pipelines import loader, sources  # TensorFlow

  if not config.sources:
    raise UserError('config.sources is empty: name at least one source.')
  train_sources = [sources.open_source(n, _source_config(n, c), 'train') for n, c in config.sources.items()]
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in train_sources]
  experiment = experiments.build(config, infos, batch_divisor=sharding.batch_divisor(mesh))
  streams = {
    name: loader.Stream(
      sources=stream.sources,
      num_frames=stream.num_frames,
      size=stream.size,
      batch_size=stream.batch_size,
      weights={experiment.sources[i].name: experiment.weights[experiment.sources[i].name] for i in stream.sources},
      views=experiment.objectives[name].views,
    )
    for name, stream in experiment.streams.items()
  }
  process = {'process_index': jax.process_index(), 'process_count': jax.process_count()}

  def batches(start_step: int) -> BatchIterator:
    steps = experiment.total_steps - start_step
    return loader.train_batches(train_sources, streams, config.seed, start_step=start_step, num_steps=steps, **process)

  batch_size = config.eval_batch_size
  if batch_size % sharding.batch_divisor(mesh):
    raise UserError(
      f'config.eval_batch_size = {batch_size} cannot be divided over {sharding.batch_divisor(mesh)} devices '
      '(mesh axes data x fsdp): use a multiple.'
    )

  def test_set(source_id: int, source_config: Mapping[str, Any]) -> Callable[[], Iterator[SubBatch]]:
    source = sources.open_source(infos[source_id].name, source_config, 'test')
    if source.class_names != infos[source_id].class_names:
      raise UserError(f'The train and test splits of source {source.name!r} have different classes.')
    plan = experiment.stream_of(source.name)
    stream = loader.Stream(plan.sources, plan.num_frames, plan.size, batch_size)
    return lambda: loader.eval_batches(source, source_id, stream, batch_size, **process)

  tests = {
    name: test_set(i, _source_config(name, c))
    for i, (name, c) in enumerate(config.sources.items())
    if c.test and infos[i].class_names
  }
  return experiment, batches, tests


def _source_config(name: str, config: ml_collections.ConfigDict) -> dict[str, Any]:
  options = config.to_dict()
  options['data_dir'] = options.get('data_dir') or None
  return options


def load_params(experiment: Experiment, loaded: Mapping[str, Any], mesh: Mesh) -> Any:
  """Puts a checkpoint's parameters (raw or averaged, as `config.eval_params` says) on the mesh.

  Raises:
    UserError: if they do not fit the run's model, or there is no average.
  """
  optimizer, _ = training.make_optimizer(experiment)
  abstract, placed = state.state_shardings(experiment, optimizer, mesh)
  which = {'raw': 'params', 'ema': 'ema'}[experiment.config.eval_params]
  if not loaded['state'].get(which):
    raise UserError(f'{loaded["path"]} holds no moving average: evaluate with --config.eval_params=raw.')
  params = checkpoints.fit(loaded, loaded['state'][which], abstract.params)
  return jax.tree.map(jax.device_put, params, placed.params)


def _chosen_params(config: ml_collections.ConfigDict, current: state.TrainState) -> Any:
  return {'raw': current.params, 'ema': current.ema}[config.eval_params]


def _prepare_workdir(workdir: str) -> None:
  try:
    os.makedirs(workdir, exist_ok=True)
    probe = os.path.join(workdir, f'.writable-{jax.process_index()}')
    with open(probe, 'w', encoding='utf-8'):
      pass
    os.remove(probe)
  except OSError as error:
    raise UserError(f'--workdir={workdir} cannot be written ({error.strerror}): choose another folder.') from error


def _report(
  experiment: Experiment,
  results: Mapping[str, evaluation.SourceResult],
  workdir: str,
  step: int,
  checkpoint: str,
) -> str:
  folder = os.path.join(workdir, 'evaluation')
  about = {'step': step, 'checkpoint': checkpoint, 'params': experiment.config.eval_params}
  path = evaluation.write_report(results, experiment, folder, about=about)
  print(f'\nStep {step}, {experiment.config.eval_params} parameters, {checkpoint}\n\n{evaluation.table(results)}\n')
  print(f'Table, per-class accuracy and confusion matrices: {folder}')
  return path


def _finish(experiment, final, results, tests, workdir) -> None:
  """Writes the report and the pictures, and says where everything is."""
  if jax.process_index() != 0:
    return
  from cover_jax import visualise

  checkpoint = checkpoints.latest(workdir)
  if results:
    _report(experiment, results, workdir, int(final.step), checkpoint)
  curves = os.path.join(workdir, 'training_curves.png')
  visualise.training_curves(metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl')), curves)
  print(f'Checkpoint:          {checkpoint}')
  print(f'Training curves:     {curves}')
  if tests:
    pictures = os.path.join(workdir, 'predictions.png')
    visualise.predictions(sample_predictions(experiment, _chosen_params(experiment.config, final), tests), pictures)
    print(f'Sample predictions:  {pictures}')
  print(f'TensorBoard:         tensorboard --logdir {workdir}')


def sample_predictions(
  experiment: Experiment, params: Any, tests: evaluation.TestSets, count: int = 3
) -> list[dict[str, Any]]:
  """The first test clips of each source with the model's best classes; see `visualise.predictions`."""
  samples = []
  for name, batches in tests.items():
    batch = next(iter(batches()))
    class_names = experiment.sources[experiment.source_id(name)].class_names
    probabilities = np.asarray(evaluation.predict(experiment, params, name, batch['clip'][:count]))
    for clip, label, p_K in zip(batch['clip'], batch['label'], probabilities, strict=False):
      best = [(class_names[k], float(p_K[k])) for k in np.argsort(-p_K, kind='stable')[:5]]
      samples.append({'clip': clip, 'source': name, 'label': class_names[label], 'predicted': best})
  return samples
