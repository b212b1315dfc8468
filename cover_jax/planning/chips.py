"""The chips that a plan can be made for: what they can do at most, and their slices described without having them."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence

import jax

from data_pipelines.contract import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip's limits, from its maker's data sheet: nothing here was measured on a chip.

  Attributes:
    name: as in --topology.
    peak_flops: bf16 multiply-adds as two operations, per second.
    hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second that a chip sends to its neighbours, over all its links, one way.
    hbm_bytes: what the compiler gives a program; None where it does not say.
    clock: cycles per second, by which the compiler's estimates become seconds; None where it makes none.
    source: of the numbers.
  """

  name: str
  peak_flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  hbm_bytes: float | None
  source: str
  clock: float | None = None


_DOCS = 'https://cloud.google.com/tpu/docs'
GiB = 2**30
# `hbm_bytes` is the limit in the compiler's own out-of-memory message (libtpu 0.0.42.1). The documents give links in
# both directions together (v5e 400, v5p 1200, v6e 800 GB/s). v4's links are from memory: 2400 Gbps, one way.
# Clocks are the peak over what the matrix units do in a cycle (v4, v5p: 8 of 128 x 128; v5e: 4; v6e: 4 of 256 x 256):
# our reckoning.
TPUS = {
  'v4': Chip('v4', 275e12, 1200e9, 300e9, 30.75 * GiB, f'{_DOCS}/v4', 1.05e9),
  'v5e': Chip('v5e', 197e12, 819e9, 200e9, 15.75 * GiB, f'{_DOCS}/v5e', 1.5e9),
  'v5p': Chip('v5p', 459e12, 2765e9, 600e9, 95.74 * GiB, f'{_DOCS}/v5p', 1.75e9),
  'v6e': Chip('v6e', 918e12, 1638e9, 400e9, 31.25 * GiB, f'{_DOCS}/v6e', 1.75e9),
}
# By a part of jax.Device.device_kind. NVLink one way; several machines are slower. From memory, not looked up again.
GPUS = {
  'H200': Chip('H200', 989e12, 4800e9, 450e9, None, 'NVIDIA H200 data sheet, SXM, dense'),
  'H100': Chip('H100', 989e12, 3350e9, 450e9, None, 'NVIDIA H100 data sheet, SXM, dense'),
  'A100': Chip('A100', 312e12, 2039e9, 300e9, None, 'NVIDIA A100 80 GB data sheet, SXM, dense'),
}
# A stand-in so that the whole tool runs anywhere; its times mean nothing.
CPU = Chip('cpu', 1e12, 100e9, 10e9, None, 'made up: a CPU is for trying the tool')


@dataclasses.dataclass(frozen=True)
class Slice:
  """Devices to compile for.

  Attributes:
    name: as in --topology.
    chip: of each device.
    devices: real ones, or descriptions that only a compiler can use.
  """

  name: str
  chip: Chip
  devices: Sequence[jax.Device]


def versions() -> dict[str, str]:
  """{package: version} of what a plan's figures depend on."""
  found = {}
  for name in ('jax', 'jaxlib', 'libtpu'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def prepare(names: Sequence[str]) -> None:
  """Sets up JAX for slices with these names; to be called before anything asks JAX for devices."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # do not look for a TPU VM's metadata server
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # else a lock file admits one process at a time
  if 'local' not in names:
    jax.config.update('jax_platforms', 'cpu')
  counts = [int(n.split(':')[1]) for n in names if n.startswith('cpu:') and n[4:].isdigit()]
  if counts:
    jax.config.update('jax_num_cpu_devices', max(counts))


def open_slice(name: str) -> Slice:
  """Describes a slice.

  Args:
    name: 'v5e:4x8' and the like, with v4, v5e, v5p or v6e: chips along the axes of the torus; 'cpu:8', that many fake
      devices; 'local', this machine's accelerators.

  Raises:
    UserError: for any other name, a shape that does not exist, or a TPU without libtpu.
  """
  kind, _, shape = name.partition(':')
  if name == 'local':
    devices = _local_devices()
    return Slice(name, _local_chip(devices[0]), devices)
  if kind == 'cpu' and shape.isdigit() and int(shape) > 0:
    devices = jax.devices('cpu')
    if len(devices) < int(shape):
      raise UserError(f'--topology={name} needs {shape} devices, but JAX was started with {len(devices)} of them.')
    return Slice(name, CPU, devices[: int(shape)])
  if kind not in TPUS or not shape:
    raise UserError(
      f'--topology={name}: expected a generation of {sorted(TPUS)} and the shape of a slice as in v5e:4x8 or '
      'v5p:4x4x4 (chips), cpu:8, or local.'
    )
  return Slice(name, TPUS[kind], _tpu_devices(name, kind, shape))


def _tpu_devices(name: str, kind: str, shape: str) -> list[jax.Device]:
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(f'--topology={name} needs the TPU compiler, libtpu: pip install -e ".[plan]" where setup.py is.')
  from jax.experimental import topologies

  # The two cores of a v4 chip are one device, as on a TPU VM. A slice of one chip is a part of a host.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  if set(shape.split('x')) == {'1'}:
    options['chips_per_host_bounds'] = [1, 1, 1]
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    raise UserError(f'--topology={name} is not a slice of {kind}: {str(error).splitlines()[0]}.') from error


def _local_devices() -> list[jax.Device]:
  try:
    devices = jax.devices()
  except RuntimeError as error:  # JAX_PLATFORMS asks for what is not here
    raise UserError(f'--topology=local: JAX cannot start here: {str(error).splitlines()[0]}.') from error
  if devices[0].platform == 'cpu':
    raise UserError(
      '--topology=local: JAX sees no GPU here, only a CPU. Install its GPU part (pip install -e ".[cuda]") and '
      'leave JAX_PLATFORMS unset, or name a slice as in v5e:4x4, or cpu:8 to try the tool.'
    )
  return devices


def _local_chip(device: jax.Device) -> Chip:
  if device.platform == 'tpu':
    raise UserError('--topology=local is for GPUs: name the TPU slice instead, as in v5e:4x4.')
  known = [chip for part, chip in GPUS.items() if part in device.device_kind]
  if not known:
    raise UserError(
      f'--topology=local: the limits of {device.device_kind} are not known; add them to cover_jax/planning/chips.py.'
    )
  return dataclasses.replace(known[0], hbm_bytes=(device.memory_stats() or {}).get('bytes_limit'))
