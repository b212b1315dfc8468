"""What streams have learnt, by the measures of their own objectives on held-out videos; see docs/ssl.md.

Clips are cut and changed as in training, by random numbers of the run's seed, and the encoder runs as in evaluation.
What is at chance is seen beside the same measures of weights that were not trained.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from cover_jax.experiment import build as experiments
from cover_jax.experiment import wire
from cover_jax.experiment.build import Experiment
from cover_jax.runtime import keys, processes, sharding
from cover_jax.training import metrics
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
  """The run of some of an experiment's streams on other splits of their sources, for one pass over these.

  Args:
    experiment: the run that was trained.
    streams: names of some of its streams.
    sources: the splits to judge on: one of each source of these streams, in the order of `config.sources`.
    batch_divisor: devices over which a batch is split.

  Returns:
    An Experiment whose objectives are `judged`; its parameters and states are those of the streams that it has.
  """
  config = ml_collections.ConfigDict(experiment.config.to_dict())
  config.streams = {name: config.streams[name] for name in streams}
  config.sources = {source.name: config.sources[source.name] for source in sources}
  for name in streams:
    config.streams[name].batch_size = experiment.streams[name].batch_size
  config.accumulation_steps = 1
  weights = config.mixture.weights.to_dict()
  config.mixture.weights = {name: weights[name] for name in config.sources if name in weights}
  built = experiments.build(config, [s.info for s in sources], batch_divisor=batch_divisor, judged=True)
  return dataclasses.replace(built, total_steps=max(round(built.steps_per_epoch), 1))


def make_judge(
  experiment: Experiment, sources: Sequence[Source], mesh: Mesh
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Measures]:
  """Makes `judge(params, states) -> measures`: the means over one pass; nothing is learnt from it.

  Args:
    experiment: of `held_out`.
    sources: the same.
    mesh: the devices.

  Returns:
    A function of the run's parameters and of the states of its objectives, both on the mesh: the same batches each
    time, and the same result on every process. Averaged teachers stay as they are.
  """

  def step(params, states, batch, number):
    rng = jax.random.fold_in(jax.random.key(experiment.config.seed), number)
    found, states = {}, dict(states)
    for name, objective in experiment.objectives.items():
      out = objective.loss(params, states[name], batch[name], keys.of(rng, name))
      rows = batch[name]['source'], batch[name]['mask']
      found[name] = metrics.per_source(out.measures, *rows, experiment.sources, experiment.streams[name].sources)
      states[name] = out.state
    return found, states

  run = jax.jit(step)
  batches = wire.training_batches(experiment, sources, mesh)

  def judge(params, states):
    states = {name: states[name] for name in experiment.objectives}
    total = None
    with sharding.use(mesh, experiment.config.logical_axis_rules):
      # Queues are filled by a first pass, which does not count: an empty one would make a contrast easy.
      for counts in (False, True) if jax.tree.leaves(states) else (True,):
        for number, batch in enumerate(itertools.islice(batches(0), experiment.total_steps)):
          found, states = run(params, states, sharding.to_global(batch, mesh), number)
          if counts:
            total = found if total is None else metrics.merge(total, found)
          jax.block_until_ready(found)  # one batch at a time on the devices
    return metrics.compute(processes.gather(total))

  return judge


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
