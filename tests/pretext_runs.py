"""What tests of pretext objectives share: runs on one device and on eight, whole and in parts."""

import itertools

import jax
import numpy as np
import pytest

from cover_jax.experiment import build as experiments
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from data_pipelines.contract import SourceInfo
from tests import tiny
from tests.test_train import Stopped, bits
from tests.test_vtdl import start


def built(c):
  """The experiment of a config on the tiny sources."""
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  return experiments.build(c, infos)


def run(c, mesh_sizes, steps=3):
  """(losses of the video stream, the state on the host) after steps on a mesh."""
  c.mesh = dict(zip(sharding.AXES, mesh_sizes, strict=True))
  _, mesh, batches, state, step = start(c, jax.devices()[: int(np.prod(mesh_sizes))])
  losses = []
  for batch in itertools.islice(batches(0), steps):
    state, report = step(state, sharding.to_global(batch, mesh))
    losses.append(float(report['losses']['video']))
  return np.array(losses), jax.device_get(state)


def check_shards(config, mesh=(2, 2, 2)):
  """`config(**changes)` trains alike on one device and on a mesh. SGD: Adam would make a rounding error a step."""
  sgd = {'optimizer__name': 'sgd', 'optimizer__options': {'decay': 0.9}}
  losses, one = run(config(**sgd), (1, 1, 1))
  sharded_losses, eight = run(config(**sgd), mesh)
  np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
  near = lambda atol: lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)
  jax.tree.map(near(1e-4), eight.params, one.params)
  jax.tree.map(near(3e-4), eight.objectives, one.objectives)  # keys of queues are unit vectors of small features


def check_resumes(c, folder):
  """A run that is stopped and goes on is the uninterrupted one to the bit; gives its metrics as text."""

  def train_in(name, stop_before=None):
    (folder / name).mkdir(exist_ok=True)
    experiment, mesh, batches, _ = tiny.build(c)

    def cut(first):
      for number, batch in enumerate(batches(first), first + 1):
        if number == stop_before:
          raise Stopped
        yield batch

    return training.train(experiment, cut, str(folder / name), mesh)

  whole = train_in('whole')
  with pytest.raises(Stopped):
    train_in('parts', 5)
  assert bits(train_in('parts')) == bits(whole)
  read = lambda name: (folder / name / 'metrics.jsonl').read_text()
  assert read('parts') == read('whole')
  return read('whole')


def first_losses(c, steps):
  """Losses of the video stream on one batch again and again."""
  _, mesh, batches, state, step = start(c)
  batch = sharding.to_global(next(batches(0)), mesh)
  losses = []
  for _ in range(steps):
    state, report = step(state, batch)
    losses.append(float(report['losses']['video']))
  return losses
