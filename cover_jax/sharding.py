"""One mesh, one table of logical axis rules, and arrays placed by them.

Every parameter names its axes ('embed', 'mlp', ...); the config's table says
on which mesh axis each name lies. Nothing else in the code knows the mesh.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.contract import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))

Rules = Sequence[tuple[str, Any]]

# (logical axis, mesh axis, axes or None). A parameter is split over `fsdp` along its embedding and over
# `tensor` along heads, hidden units and classes. The first rule whose mesh axis is still free wins.
DEFAULT_RULES = (
  ('batch', ('data', 'fsdp')),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('mlp', 'tensor'),
  ('classes', 'tensor'),
  ('layers', None),
  ('embed_out', None),
  ('norm', None),
  ('head_dim', None),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes the mesh `data x fsdp x tensor`.

  Args:
    sizes: devices along each axis; one of them may be -1 (all that remain).
    devices: the devices to use, all of them by default.

  Returns:
    A mesh whose axes are all `AxisType.Auto` (jax.make_mesh's default, Explicit,
    makes Linen's logical constraints fail).

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  count = len(devices) if devices is not None else jax.device_count()
  shape = [int(sizes[axis]) for axis in AXES]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    raise UserError(f'config.mesh is {dict(sizes)}: sizes must be positive, and at most one may be -1.')
  if -1 in shape:
    fixed = int(np.prod([n for n in shape if n != -1]))
    shape[shape.index(-1)] = max(count // fixed, 1)
  if np.prod(shape) != count:
    raise UserError(
      f'config.mesh asks for {" x ".join(map(str, shape))} = {int(np.prod(shape))} devices '
      f'(data x fsdp x tensor) but there are {count}: set one axis to -1 or change the sizes.'
    )
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_divisor(mesh: Mesh) -> int:
  """The number of devices over which the batch axis is split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Enters the mesh and the rules, so that logical constraints inside a step take effect."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(list(rules)):
    yield


def shardings(abstract_tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """The `NamedSharding` of every array of a tree whose leaves may carry logical axis names.

  Args:
    abstract_tree: shapes, as `jax.eval_shape` gives them, with Linen's metadata boxes.
    mesh: the mesh.
    rules: (logical axis, mesh axis or axes or None) pairs; the first whose mesh axis is free wins.

  Returns:
    The unboxed tree's shardings. Arrays without names are replicated.

  Raises:
    UserError: if a logical axis has no rule (it would be replicated silently).
  """
  specs = nn.get_partition_spec(abstract_tree)
  known = {name for name, _ in rules}
  is_spec = lambda x: isinstance(x, PartitionSpec)
  for spec in jax.tree.leaves(specs, is_leaf=is_spec):
    unknown = {name for name in spec if name is not None} - known
    if unknown:
      raise UserError(
        f'config.logical_axis_rules has no rule for {sorted(unknown)}: '
        'add (name, mesh axis), or (name, None) to replicate it.'
      )
  wanted = nn.logical_to_mesh_sharding(specs, mesh, list(rules))
  return jax.tree.map(_divisible, nn.meta.unbox(abstract_tree), wanted)


def _divisible(array: jax.ShapeDtypeStruct, wanted: NamedSharding) -> NamedSharding:
  """Leaves whole the axes that the mesh does not divide: a data set has the number of classes that it has."""
  mesh = wanted.mesh
  axes = [axes if isinstance(axes, tuple) else (axes,) for axes in wanted.spec]
  ways = [int(np.prod([mesh.shape[a] for a in names if a])) for names in axes]
  spec = [name if size % n == 0 else None for name, size, n in zip(wanted.spec, array.shape, ways, strict=False)]
  return NamedSharding(mesh, PartitionSpec(*spec))


def to_global(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's rows of a batch on its devices as rows of one global array."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
