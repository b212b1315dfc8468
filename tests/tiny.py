"""A run small enough for a test: two streams of arrays in memory, a model of two narrow blocks."""

import dataclasses
import functools

import ml_collections
import numpy as np

from configs import defaults
from cover_jax.experiment import build as experiments
from cover_jax.experiment import wire
from cover_jax.runtime import sharding
from data_pipelines.contract import SourceInfo
from data_pipelines.loading import arrays


@functools.cache
def sources() -> tuple:
  """Two video sources and one image source of random pixels; sizes and class counts differ."""
  rng = np.random.default_rng(0)

  def make(name, modality, count, classes):
    lengths = rng.integers(4, 9, count) if modality == 'video' else np.ones(count, int)
    videos = [rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for n in lengths]
    names = tuple(f'{name} {k}' for k in range(classes))
    labels = rng.integers(0, classes, count)
    whole = {'crop_scale': (1.0, 1.0), 'crop_ratio': (1.0, 1.0), 'sampler': 'segments'}
    source = arrays.array_source(name, videos, labels, names, modality, **whole)
    for array in (*videos, source.label):  # all tests share them: one that writes here would change the others' runs
      array.flags.writeable = False
    return source

  return (make('acts', 'video', 40, 5), make('moves', 'video', 24, 3), make('things', 'image', 64, 7))


def config(**changes) -> ml_collections.ConfigDict:
  """The config of the tiny run; changes are dotted keys with '__' for dots."""
  c = defaults.get_config()
  c.sources = {s.name: defaults.source(f'memory/{s.name}') for s in sources()}
  c.streams = {
    'video': defaults.stream(('acts', 'moves'), num_frames=4, size=16),
    'image': defaults.stream(('things',), num_frames=1, size=16),
  }
  c.batch_size = 16
  c.batch_multiple = 8
  c.eval_batch_size = 16
  c.total_steps = 20
  c.log_every = 4
  c.checkpoint_every = 5
  c.model = {
    'patch_size': 8,
    'width': 16,
    'depth': 2,
    'num_heads': 2,
    'mlp_dim': 32,
    'num_frames': 4,
    'image_size': 16,
    'drop_path': 0.2,
  }
  c.optimizer.learning_rate = 3e-3
  c.optimizer.weight_decay = 0.01
  c.ema_decay = 0.9
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return c


def build(c: ml_collections.ConfigDict, devices=None, **protocol):
  """(experiment, mesh, step -> batches, test sets) of a config; `protocol`: fields of the video sources in tests."""
  mesh = sharding.make_mesh(c.mesh, devices)
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in sources()]
  experiment = experiments.build(c, infos, batch_divisor=sharding.batch_divisor(mesh))
  batches = wire.training_batches(experiment, sources(), mesh)
  tested = [dataclasses.replace(s, **protocol) if s.modality == 'video' else s for s in sources()]
  return experiment, mesh, batches, wire.test_sets(experiment, tested, mesh)
