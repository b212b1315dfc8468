"""What streams have learnt, by the measures of their own objectives on held-out videos; see docs/ssl.md.

Clips are cut and changed as in training, by random numbers of the run's seed, and the encoder runs as in evaluation.
What is at chance is seen beside the same measures of weights that were not trained.
"""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cover_jax.experiment import build as experiments
from cover_jax.experiment import wire
from cover_jax.experiment.build import Experiment
from cover_jax.objectives import contrastive
from cover_jax.runtime import keys, processes, sharding
from cover_jax.training import measuring
from data_pipelines import durable
from data_pipelines.sources import Source

Measures = Mapping[str, float]  # '<stream>/<source>/<measure>' -> mean over the clips


def streams_of(config: ml_collections.ConfigDict) -> list[str]:
  """The streams that can be judged: all their sources have a test split, and they do not only classify."""
  return [
    name
    for name, stream in config.streams.items()
    if not _classifies(stream.objective) and all(config.sources[s].test for s in stream.sources)
  ]


def _classifies(objective: Any) -> bool:
  several = objective if isinstance(objective, tuple | list) else [objective]
  return all(o['name'] == 'classification' for o in several)


def held_out(
  experiment: Experiment, streams: Sequence[str], sources: Sequence[Source], batch_divisor: int
) -> Experiment:
  """The run of some of an experiment's streams on other splits of their sources.

  Args:
    experiment: the run that was trained.
    streams: names of some of its streams.
    sources: the splits to judge on, in the order of `config.sources`: of these streams' sources.
    batch_divisor: devices over which a batch is split.

  Returns:
    An Experiment whose objectives are `judged`; its parameters and states are those of the streams that it has.
  """
  config = ml_collections.ConfigDict(experiment.config.to_dict())
  config.streams = {name: config.streams[name] for name in streams}
  config.sources = {source.name: config.sources[source.name] for source in sources}
  for name in streams:
    config.streams[name].batch_size = experiment.streams[name].batch_size
    config.streams[name].sources = tuple(s for s in config.streams[name].sources if s in config.sources)
  config.accumulation_steps = 1
  weights = config.mixture.weights.to_dict()
  config.mixture.weights = {name: weights[name] for name in config.sources if name in weights}
  return experiments.build(config, [s.info for s in sources], batch_divisor=batch_divisor, judged=True)


def make_judge(
  experiment: Experiment, sources: Sequence[Source], mesh: Mesh
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Measures]:
  """Makes `judge(params, states) -> measures`: the means over every example of every source; nothing is learnt from it.

  Args:
    experiment: of `held_out`.
    sources: the same.
    mesh: the devices.

  Returns:
    A function of the run's parameters and of the states of its objectives, both on the mesh: the same batches each
    time, and the same result on every process. Averaged teachers stay as they are.
  """

  def step(name, params, state, batch, number):
    rng = keys.of(jax.random.fold_in(jax.random.key(experiment.config.seed), number), name)
    out = experiment.objectives[name].loss(params, state, batch, rng)
    of_stream = experiment.streams[name].sources
    rows = batch['source'], batch['mask']
    return measuring.per_source(out.measures, *rows, experiment.sources, of_stream), out.state

  runs = {name: jax.jit(functools.partial(step, name)) for name in experiment.streams}
  passes = {
    (name, index): _pass(experiment, name, index, sources[index], mesh)
    for name, stream in experiment.streams.items()
    for index in stream.sources
  }

  def judge(params, states):
    total = {}
    with sharding.use(mesh, experiment.config.logical_axis_rules):
      for (name, index), batches in passes.items():
        logging.info('Judging stream %r on source %r', name, sources[index].name)
        # What a queue holds is of the training split, or nothing yet. A first pass, which does not count, fills it.
        state = jax.jit(contrastive.emptied)(states[name])
        for counts in (False, True) if jax.tree.leaves(state) else (True,):
          for number, batch in enumerate(batches()):
            found, state = runs[name](params, state, sharding.to_global(batch, mesh), number)
            if counts:
              total[name] = measuring.merge(total[name], found) if name in total else found
            jax.block_until_ready(found)  # one batch at a time on the devices
    return measuring.compute(processes.gather(total))

  return judge


def _pass(
  experiment: Experiment, stream: str, index: int, source: Source, mesh: Mesh
) -> Callable[[], Iterator[Mapping[str, Any]]]:
  """() -> this process's sub-batches of one source, cut as a stream trains on it: each example once, then padding."""
  alone = held_out(experiment, [stream], [source], sharding.batch_divisor(mesh))
  size = alone.streams[stream].batch_size
  batches = wire.training_batches(alone, [source], mesh)

  def marked(number: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    rows = len(batch['mask'])
    place_B = number * size + jax.process_index() * rows + np.arange(rows)
    mask_B = place_B < source.num_examples  # behind it the next pass begins
    ids = {name: np.where(mask_B, batch[name], -1) for name in ('label', 'example_id', 'video_id')}
    if 'labels' in batch:
      ids['labels'] = np.where(mask_B[:, None], batch['labels'], np.int8(-1))
    return {**batch, **ids, 'mask': mask_B, 'source': np.where(mask_B, np.int32(index), -1).astype(np.int32)}

  def once() -> Iterator[Mapping[str, Any]]:
    steps = -(-source.num_examples // size)
    for number, batch in enumerate(itertools.islice(batches(0), steps)):
      yield marked(number, batch[stream])

  return once


def table(trained: Measures, untrained: Measures) -> str:
  """Markdown: a line a measure."""
  lines = ['| stream / source / measure | trained | untrained |', '| --- | --- | --- |']
  lines += [f'| {key} | {value:.4f} | {untrained[key]:.4f} |' for key, value in sorted(trained.items())]
  return '\n'.join(lines)


def write_report(trained: Measures, untrained: Measures, folder: str, about: Mapping[str, Any]) -> str:
  """Writes `report.json` into a folder that is there, and gives its path."""
  path = os.path.join(folder, 'report.json')
  measures = {key: {'trained': value, 'untrained': untrained[key]} for key, value in trained.items()}
  durable.write(path, json.dumps({**about, 'measures': measures}, indent=2, sort_keys=True) + '\n')
  return path
