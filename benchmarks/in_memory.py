"""Runs configs on the embedded data, drawn in memory: no TensorFlow, no data set on disk. For studies of many runs."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from cover_jax import checkpoints, evaluate, initialise, sharding
from cover_jax import experiment as experiments
from cover_jax import train as training
from cover_jax.experiment import Experiment
from cover_jax.state import TrainState, state_shardings
from data_pipelines import arrays, subsets, views
from data_pipelines.builders import digits_rendering as rendering
from data_pipelines.contract import SourceInfo, TestSet, UserError
from data_pipelines.sources import Source

Drawn = tuple[list[np.ndarray], list[int]]  # frames uint8 [n, 32, 32, 3] and label of each example

_SOURCE_KEYS = ('sampler', 'stride', 'crop_scale', 'crop_ratio', 'rotation', 'flip')


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
  settings = {key: config[key] for key in _SOURCE_KEYS}
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


def train(
  config: ml_collections.ConfigDict, sources: Sequence[Source], seed: int
) -> tuple[Experiment, Mesh, TrainState, list[dict[str, float]]]:
  """Trains from nothing, or from `config.init_from`.

  Args:
    config: of the run. Its own seed is part of the compiled program: leave it, and vary `seed`.
    sources: those of the config, in its order.
    seed: of weights, data order and augmentation on the host.

  Returns:
    (run, mesh, final state, losses of each step by stream).

  Raises:
    UserError: if a loss is not finite, or as `experiment.build` says.
  """
  experiment, mesh = build(config, sources)
  optimizer, _ = training.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  seeded = ml_collections.ConfigDict({**config.to_dict(), 'seed': seed})
  state = initialise.start(dataclasses.replace(experiment, config=seeded), optimizer, mesh, placed)
  streams = {
    name: views.Stream(
      s.sources,
      s.num_frames,
      s.size,
      s.batch_size,
      weights={sources[i].name: experiment.weights[sources[i].name] for i in s.sources},
      one_source_a_step=config.mixture.one_source_a_step,
      views=experiment.objectives[name].views,
    )
    for name, s in experiment.streams.items()
  }
  step, losses = training.compile_step(experiment, optimizer, mesh), []
  for batch in arrays.array_batches(sources, streams, seed, num_steps=experiment.total_steps):
    state, report = step(state, sharding.to_global(batch, mesh))
    losses.append(report['losses'])
  losses = [{k: float(v) for k, v in row.items()} for row in jax.device_get(losses)]
  if not all(np.isfinite(v) for row in losses for v in row.values()):
    raise UserError('A loss was not finite: lower config.optimizer.learning_rate.')
  return experiment, mesh, state, losses


def test_set(experiment: Experiment, source: Source) -> TestSet:
  """All examples of a source, one view each."""
  plan, source_id = experiment.stream_of(source.name), experiment.source_id(source.name)
  size = views.examples_per_step(source, experiment.config.eval_batch_size, jax.device_count())
  stream = views.Stream(plan.sources, plan.num_frames, plan.size, size)
  return views.make_test_set(source, stream, lambda: arrays.array_eval_batches(source, source_id, stream, size))


def top1(experiment: Experiment, mesh: Mesh, params: Any, sources: Sequence[Source]) -> Mapping[str, float]:
  """{source: share of its examples whose best-scored class is theirs}."""
  sets = {source.name: test_set(experiment, source) for source in sources}
  return {name: r.top1 for name, r in evaluate.make_evaluate(experiment, sets, mesh)(params).items()}


def save(path: str, experiment: Experiment, state: TrainState) -> None:
  """Writes the parameters as a file for `config.init_from.path`."""
  about = checkpoints.about(experiment.config.to_dict(), experiment.sources, int(state.step))
  with open(path + '.tmp', 'wb') as f:
    f.write(flax.serialization.msgpack_serialize({'about': about, 'state': {'params': jax.device_get(state.params)}}))
  os.replace(path + '.tmp', path)
