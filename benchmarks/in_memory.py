"""Runs configs on the embedded data, drawn in memory: no TensorFlow, no data set on disk. For studies of many runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.evaluation import classify
from cover_jax.experiment import build as experiments
from cover_jax.experiment import wire
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState, state_shardings
from cover_jax.runtime import sharding
from cover_jax.training import measuring
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines.builders import digits_rendering as rendering
from data_pipelines.clips import settings as clips
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.loading import arrays
from data_pipelines.sources import Source, subsets

Drawn = tuple[list[np.ndarray], list[int]]  # frames uint8 [n, 32, 32, 3] and label of each example


class Diverged(UserError):
  """A loss was not finite."""


def draw(dataset: str, split: str, limit: int | None = None) -> Drawn:
  """All examples of a split of 'digits', 'objects', 'motions' or 'moments', or the first `limit`."""
  count = rendering.num_examples(dataset, split)
  examples = [rendering.render(dataset, split, i) for i in range(count if limit is None else min(limit, count))]
  return [e.frames for e in examples], [e.label for e in examples]


def make_source(name: str, config: ml_collections.ConfigDict, data: Drawn, subset_seed: int = 0) -> Source:
  """A source of `config.sources` on examples that were drawn.

  Args:
    name: its key.
    config: what `configs.defaults.source` makes, of an embedded data set.
    data: as `draw` gives it.
    subset_seed: which part of the labels a `label_fraction` below 1 keeps.
  """
  settings = clips.fields({key: config[key] for key in clips.CLIPS})
  dataset = config.dataset.removeprefix('moving_digits/')
  settings['modality'] = 'image' if dataset == 'digits' else 'video'
  if config.get('label_key', 'label') is None:
    return arrays.array_source(name, data[0], **settings)
  source = arrays.array_source(name, *data, rendering.class_names(dataset), **settings)
  return subsets.few_labels(source, config.label_fraction, subset_seed)


def build(config: ml_collections.ConfigDict, sources: Sequence[Source]) -> tuple[Experiment, Mesh]:
  """The run of a config, on this machine's devices."""
  mesh = sharding.make_mesh(config.mesh)
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in sources]
  return experiments.build(config, infos, batch_divisor=sharding.batch_divisor(mesh)), mesh


class Run(NamedTuple):
  """A run that has ended.

  Attributes:
    experiment, mesh, state: of the run; the state is the final one.
    losses: of each step, by stream.
    measures: '<stream>/<source>/<measure>' -> mean over the last tenth of the steps.
  """

  experiment: Experiment
  mesh: Mesh
  state: TrainState
  losses: list[dict[str, float]]
  measures: dict[str, float]


def initial(config: ml_collections.ConfigDict, sources: Sequence[Source], seed: int) -> TrainState:
  """The state before the first step, on this machine's devices."""
  return _start(*build(config, sources), seed)[0]


def _start(experiment: Experiment, mesh: Mesh, seed: int) -> tuple[TrainState, TrainState]:
  """The initial state and its shardings."""
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  seeded = ml_collections.ConfigDict({**experiment.config.to_dict(), 'seed': seed})
  return initialise.start(dataclasses.replace(experiment, config=seeded), optimizer, mesh, placed), placed


def train(
  config: ml_collections.ConfigDict,
  sources: Sequence[Source],
  seed: int,
  encoder: Any = None,
  watch: Callable[[int, Experiment, Mesh, TrainState], None] | None = None,
) -> Run:
  """Trains from nothing, from an encoder, or from `config.init_from`.

  Args:
    config: of the run. Its own seed is that of what is drawn on the device, and part of the compiled program: runs that
      differ in `seed` alone share it.
    sources: those of the config, in its order.
    seed: of weights, data order and augmentation on the host.
    encoder: parameters for the place of the initial ones.
    watch: sees each step's number, the run, its mesh and the state after it.

  Raises:
    Diverged: if a loss is not finite.
    UserError: as `experiment.build` says.
  """
  experiment, mesh = build(config, sources)
  optimizer, _ = stepping.make_optimizer(experiment)
  state, placed = _start(experiment, mesh, seed)
  if encoder is not None:
    params = {**state.params, 'encoder': jax.tree.map(jax.device_put, encoder, placed.params['encoder'])}
    state = state.replace(params=params)
  step, losses, measures = stepping.compile_step(experiment, optimizer, mesh), [], None
  batches = wire.training_batches(experiment, sources, mesh, seed)(0)
  for number, batch in enumerate(batches, 1):
    state, report = step(state, sharding.to_global(batch, mesh))
    losses.append(report['losses'])
    if number > 0.9 * experiment.total_steps:
      measures = measuring.merge(measures, report['measures']) if measures else report['measures']
    if watch:
      watch(number, experiment, mesh, state)
  losses = [{k: float(v) for k, v in row.items()} for row in jax.device_get(losses)]
  if not all(np.isfinite(v) for row in losses for v in row.values()):
    raise Diverged('A loss was not finite: lower config.optimizer.learning_rate.')
  return Run(experiment, mesh, state, losses, measuring.compute(measures))


def make_top1(experiment: Experiment, mesh: Mesh, sources: Sequence[Source]) -> Callable[[Any], dict[str, float]]:
  """params -> {source: share of its examples whose best-scored class is theirs}."""
  sets = wire.test_sets(experiment, sources, mesh)
  run = classify.make_evaluate(experiment, sets, mesh)
  return lambda params: {name: result.top1 for name, result in run(params).items()}


def save(path: str, experiment: Experiment, state: TrainState) -> None:
  """Writes the parameters as a file for `config.init_from.path`."""
  about = checkpoints.about(experiment.config.to_dict(), experiment.sources, int(state.step))
  checkpoints.write(path, {'about': about, 'state': {'params': jax.device_get(state.params)}})
