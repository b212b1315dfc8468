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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.contract import UserError

AXES = ('data', 'fsdp', 'tensor')
_AUTO = (AxisType.Auto,) * len(AXES)
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
  """Makes the mesh `data x fsdp x tensor`. Of several TPU slices, `data` spans them: their network is the slower one.

  Args:
    sizes: devices along each axis; one of them may be -1 (all that remain).
    devices: the devices to use, all of them by default.

  Returns:
    A mesh whose axes are all `AxisType.Auto` (Explicit ones make Linen's logical constraints fail).

  Raises:
    UserError: if the sizes do not multiply to the number of devices, or several slices do not divide `data`.
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
  slices = len({getattr(d, 'slice_index', 0) for d in (jax.devices() if devices is None else devices)})
  # `jax.make_mesh` refuses meshes that split an axis of the torus on all chips but v5e: fsdp = 8 on a 4 x 4 x 4 v5p.
  if slices == 1:
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)
  if shape[0] % slices:
    raise UserError(
      f'config.mesh.data = {shape[0]} cannot be divided over {slices} slices: make it a multiple of {slices}, '
      'since parameters are split within a slice only.'
    )
  within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
  placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=_AUTO)


def data_part(mesh: Mesh) -> tuple[int, int]:
  """Which part of each global batch this process loads: (index, number of parts).

  Processes whose devices lie on the same rows of the batch (the mesh axis `tensor` spans them) share a part, so it is
  not always the process's own index. A part's rows need not be neighbours on the mesh: the batch's rows are then in
  another order than in one process, which changes nothing but which random mask an example gets.

  Raises:
    UserError: if two processes share only some of their rows, or have different numbers of them.
  """
  rows_of_process: dict[int, set[int]] = {}
  for device, (rows,) in NamedSharding(mesh, BATCH).devices_indices_map((batch_divisor(mesh),)).items():
    rows_of_process.setdefault(device.process_index, set()).update(range(batch_divisor(mesh))[rows])
  parts = sorted({tuple(sorted(rows)) for rows in rows_of_process.values()})
  if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != batch_divisor(mesh):
    sizes = ' x '.join(str(mesh.shape[axis]) for axis in AXES)
    raise UserError(
      f'config.mesh = {sizes} (data x fsdp x tensor) gives {len(rows_of_process)} processes overlapping or uneven '
      'parts of the batch: let tensor be a multiple or a divisor of the devices of one process.'
    )
  return parts.index(tuple(sorted(rows_of_process[jax.process_index()]))), len(parts)


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
  """Puts this process's rows of a batch (its `data_part`) on its devices as rows of one global array."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put(tree: Any, shardings: Any) -> Any:
  """Puts arrays that every process holds whole where they belong on the mesh.

  Args:
    tree: arrays, equal in all processes.
    shardings: a tree of `NamedSharding`s like it, or one for all.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(_put, tree, shardings)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
  if sharding.is_fully_addressable or (isinstance(array, jax.Array) and array.sharding == sharding):
    return jax.device_put(array, sharding)
  # jax.device_put would compare the whole array between the processes first.
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
