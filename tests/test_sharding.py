"""The mesh over slices and processes, what lies where, and what a step sends between devices."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from configs import defaults
from cover_jax.experiment import build as experiments
from cover_jax.experiment.state import state_shardings
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh looks at."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = 'cpu'
  device_kind: str = 'fake'


def mesh_of(shape, processes):
  """A mesh over devices of several processes, in order of the processes unless a list tells each device's."""
  count = int(np.prod(shape))
  owner = processes if isinstance(processes, list) else np.arange(count) * processes // count
  devices = np.array([Device(i, int(p)) for i, p in enumerate(owner)], object).reshape(shape)
  return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
  ('shape', 'processes', 'expected'),
  [
    ((8, 1, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 4, 1), 2, [(0, 2), (1, 2)]),
    ((2, 2, 2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # `tensor` spans two processes, which load the same rows
    ((1, 1, 8), 4, [(0, 1)] * 4),
    ((4, 1, 1), [0, 1, 0, 1], [(0, 2), (1, 2)]),  # as on a TPU, whose mesh follows the wires
    ((2, 1, 2), [0, 1, 1, 0], [(0, 1), (0, 1)]),
  ],
)
def test_rows_follow_from_the_mesh(monkeypatch, shape, processes, expected):
  mesh = mesh_of(shape, processes)
  for index, part in enumerate(expected):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    assert sharding.data_part(mesh) == part


@pytest.mark.parametrize('processes', [[0, 0, 0, 1], [0, 1, 1, 2]])
def test_rows_that_processes_cannot_share_evenly(processes):
  with pytest.raises(UserError, match=r'config\.mesh = 4 x 1 x 1|config\.mesh = 2 x 1 x 2'):
    sharding.data_part(mesh_of((4, 1, 1), processes))
  with pytest.raises(UserError, match='uneven'):
    sharding.data_part(mesh_of((2, 1, 3), [0, 0, 1, 1, 2, 2]))


def test_data_spans_slices_and_nothing_else_does():
  devices = [Device(i, i // 2, slice_index=i // 8) for i in range(16)]
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 4, 'tensor': 2}, devices)
  assert mesh.devices.shape == (2, 4, 2) and set(mesh.axis_types) == {AxisType.Auto}
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert (slices == np.arange(2)[:, None, None]).all()
  assert {d.id for d in mesh.devices.flat} == set(range(16))
  with pytest.raises(UserError, match='multiple of 2'):
    sharding.make_mesh({'data': 1, 'fsdp': 16, 'tensor': 1}, devices)


SIZES = {
  'B/16': {'patch_size': 16, 'width': 768, 'depth': 12, 'num_heads': 12, 'mlp_dim': 3072, 'image_size': 224},
  'L/16': {'patch_size': 16, 'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096, 'image_size': 448},
}


def large(size, mesh_sizes):
  """A CoVeR of a real size: (experiment, mesh), of shapes only."""
  config = tiny.config(mesh=dict(zip(sharding.AXES, mesh_sizes, strict=True)))
  config.model = SIZES[size] | {'num_frames': 16}
  config.sources = {n: defaults.source(f'memory/{n}') for n in ('k400', 'mit', 'imagenet')}
  image_size = SIZES[size]['image_size']
  config.streams = {
    'video': defaults.stream(('k400', 'mit'), num_frames=16, size=image_size),
    'image': defaults.stream(('imagenet',), num_frames=1, size=image_size),
  }
  classes = {'k400': 400, 'mit': 339, 'imagenet': 1000}
  infos = [
    SourceInfo(n, 'image' if n == 'imagenet' else 'video', 1000, tuple(map(str, range(k)))) for n, k in classes.items()
  ]
  mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(mesh_sizes))])
  return experiments.build(config, infos, batch_divisor=sharding.batch_divisor(mesh)), mesh


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('mesh_sizes', [(1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_no_large_parameter_is_replicated(size, mesh_sizes):
  experiment, mesh = large(size, mesh_sizes)
  optimizer, _ = stepping.make_optimizer(experiment)
  abstract, placed = state_shardings(experiment, optimizer, mesh)
  whole = {}
  for (path, x), where in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(placed), strict=True):
    size_of = lambda shape, dtype=x.dtype: int(np.prod(shape)) * dtype.itemsize
    ways = size_of(x.shape) / size_of(where.shard_shape(x.shape))
    if size_of(x.shape) > 1 << 20 and ways < mesh.shape['fsdp']:
      whole[jax.tree_util.keystr(path)] = x.shape, where.spec
  assert not whole
  assert max(x.size for x in jax.tree.leaves(abstract.params)) > 1 << 21  # there are large ones


def collectives(mesh_sizes, **changes):
  """{kind: [shape of the result, ...]} of the compiled tiny step."""
  count = int(np.prod(mesh_sizes))
  config = tiny.config(mesh=dict(zip(sharding.AXES, mesh_sizes, strict=True)), **changes)
  experiment, mesh, _, _ = tiny.build(config, jax.devices()[:count])
  optimizer, _ = stepping.make_optimizer(experiment)
  abstract, placed = state_shardings(experiment, optimizer, mesh)
  on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  batch_sharding = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  state = jax.tree.map(on, abstract, placed)
  batch = jax.tree.map(lambda x: on(x, batch_sharding), stepping.abstract_batch(experiment))
  step = jax.jit(stepping.make_train_step(experiment, optimizer), out_shardings=(placed, sharding.replicated(mesh)))
  with sharding.use(mesh, config.logical_axis_rules):
    text = step.lower(state, batch).compile().as_text()
  found: dict[str, list[str]] = {}
  for shapes, kind in re.findall(
    r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(', text
  ):
    found.setdefault(kind, []).append(shapes)
  return found


def test_data_parallel_step_gathers_nothing():
  found = collectives((8, 1, 1))
  assert found.pop('all-reduce')  # gradients, losses, metrics
  assert found == {}
