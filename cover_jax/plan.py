"""Plans a run on devices that this machine does not have: does it fit, what does it cost, how long would it take?

    python -m cover_jax.plan --config=configs/cover_l16.py --topology=v5e:16x16,v5p:4x4x4 [--levers] [--output=FILE]

Compiles the run's own train step with the real compiler of a TPU slice (libtpu: pip install -e '.[plan]'), reads
memory and communication from the result, and bounds the time of a step by the chips' data sheets. No data is opened.
docs/plan.md says how to read it.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from cover_jax import command_line
from cover_jax.experiment import build as experiment
from cover_jax.experiment.build import Experiment
from cover_jax.planning import bill, chips, hlo, report
from cover_jax.planning import costs as plan_costs
from cover_jax.planning.chips import Slice
from cover_jax.planning.costs import Memory, OutOfMemory
from cover_jax.runtime import sharding
from data_pipelines import durable, flags, installed, paths
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.sources import sizes

LEVERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
  *((f'remat {policy}', {'model.remat': policy}) for policy in ('none', 'dots', 'attention', 'full')),
  *((f'fsdp {n}', {'mesh.data': -1, 'mesh.fsdp': n}) for n in (1, 8)),
  *((f'accumulation {n}', {'accumulation_steps': n}) for n in (1, 2, 4)),
  ('float32', {'dtype': 'float32'}),
)


def changed(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A copy of a config with dotted keys changed."""
  config = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()), type_safe=False)
  for key, value in changes.items():
    *parents, last = key.split('.')
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = value
  return config


@dataclasses.dataclass(frozen=True)
class Planner:
  """Builds and compiles variants of one config for one slice.

  Attributes:
    config: the run's.
    infos: its sources.
    slice: the devices.
  """

  config: ml_collections.ConfigDict
  infos: Sequence[SourceInfo]
  slice: Slice

  def build(self, **changes: Any) -> tuple[Experiment, jax.sharding.Mesh]:
    """The run with changed keys, its batch rounded to what the slice divides.

    Raises:
      UserError: if it cannot be.
    """
    config = changed(self.config, changes)
    mesh = sharding.make_mesh(config.mesh, self.slice.devices)
    # The config may be written for fewer devices: what a user would have to change, and is told (`batch_note`).
    unit = sharding.batch_divisor(mesh) * config.accumulation_steps
    config.batch_multiple = math.lcm(config.batch_multiple, unit)
    return experiment.build(config, self.infos, batch_divisor=sharding.batch_divisor(mesh)), mesh

  def memory(self, **changes: Any) -> Memory | OutOfMemory:
    run, mesh = self.build(**changes)
    return plan_costs.memory(plan_costs.compile_step(run, mesh), run, mesh, self.slice.chip.hbm_bytes)


def largest_batch(
  planner: Planner,
  now: Memory | OutOfMemory,
  limit: float | None,
  save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any] | None:
  """Searches the largest batch that fits: memory is nearly linear in it, so few compilations do.

  Args:
    planner: of the slice.
    now: the memory of the config's own batch.
    limit: bytes of a chip; None if unknown, then there is nothing to search.
    save: gets what is known so far, after each compilation.

  Returns:
    {'batch_sizes': of the largest batch seen to fit, 'exact': whether the next larger one was seen not to fit, 'tried':
    what was compiled}; None without a limit.
  """
  if limit is None:
    return None
  run, mesh = planner.build()
  own = {name: s.batch_size for name, s in run.streams.items()}
  search = _Search(own, sharding.batch_divisor(mesh) * run.config.accumulation_steps)
  search.saw(own, now)
  for _ in range(6):
    sizes = search.next(_fixed(now), limit)
    if sizes is None:
      break
    search.saw(sizes, planner.memory(**{f'streams.{name}.batch_size': b for name, b in sizes.items()}))
    save(search.found())
  return search.found()


class _Search:
  """Which batch to compile next, counted in units: the examples that devices and microbatches divide evenly."""

  def __init__(self, own: Mapping[str, int], unit: int):
    self._own, self._unit = own, unit
    self._seen: dict[int, Memory | OutOfMemory] = {}
    self._sizes: dict[int, Mapping[str, int]] = {}

  def saw(self, sizes: Mapping[str, int], memory: Memory | OutOfMemory) -> None:
    units = sum(sizes.values()) // self._unit
    self._seen[units], self._sizes[units] = memory, sizes

  def next(self, fixed: float, limit: float) -> dict[str, int] | None:
    """The batch sizes to try, or None where the largest is known closely enough."""
    low, high = self._bounds()
    near = max(1, low // 32)
    if high is not None and high - low <= near:
      return None
    guess = _on_the_line({n: _bytes(memory) for n, memory in self._seen.items()}, fixed, limit)
    if guess is None:
      guess = 2 * max(low, 1) if high is None else (low + high) // 2
    # Where the line ends at a batch that was seen, the next one says whether it is the last.
    guess = max(guess, low + near)
    guess = guess if high is None else min(guess, high - near)
    free = self._between(low, high or 2 * guess + len(self._own))
    return self._batch_sizes(min(free, key=lambda n: abs(n - guess))) if free else None

  def found(self) -> dict[str, Any]:
    """What `largest_batch` returns, as far as it is known."""
    low, high = self._bounds()
    return {
      'batch_sizes': self._sizes[low] if low in self._seen else None,
      'exact': low in self._seen and high is not None and not self._between(low, high),
      'tried': [
        {'batch_sizes': self._sizes[n], 'fits': isinstance(memory, Memory), 'bytes': _bytes(memory)}
        for n, memory in sorted(self._seen.items())
      ],
    }

  def _bounds(self) -> tuple[int, int | None]:
    low = max((n for n, memory in self._seen.items() if isinstance(memory, Memory)), default=len(self._own) - 1)
    return low, min((n for n, memory in self._seen.items() if isinstance(memory, OutOfMemory)), default=None)

  def _batch_sizes(self, n: int) -> dict[str, int]:
    """About n units a step, each stream's share as in the config and at least one unit."""
    total = sum(self._own.values())
    return {name: self._unit * max(1, round(n * b / total)) for name, b in self._own.items()}

  def _between(self, low: int, high: int) -> list[int]:
    """All n that make a batch between the two."""
    return [n for n in range(1, high) if low < sum(self._batch_sizes(n).values()) // self._unit < high]


def _bytes(found: Memory | OutOfMemory) -> float:
  return found.total if isinstance(found, Memory) else found.needed


def _fixed(found: Memory | OutOfMemory) -> float:
  """The bytes that no batch needs: at the start of the search, all that is known of a batch of nothing."""
  kinds = dataclasses.asdict(found) if isinstance(found, Memory) else found.kinds
  return float(sum(kinds.get(kind, 0) for kind in ('parameters', 'optimizer', 'ema', 'objectives')))


def _on_the_line(bytes_of: Mapping[int, float], fixed: float, limit: float) -> int | None:
  """The batch where the line through the two points nearest to the limit meets it."""
  points = sorted(bytes_of.items(), key=lambda point: abs(point[1] - limit))[:2]
  if len(points) < 2:
    points.append((0, fixed))
  (n, size), (other, other_size) = points
  slope = (other_size - size) / (other - n)
  return n + math.floor((limit - size) / slope) if slope > 0 else None


def levers(
  planner: Planner, compiled: jax.stages.Compiled | OutOfMemory, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
  """What each lever alone does to memory, products and communication; the config itself comes first.

  Args:
    planner: of the slice.
    compiled: the config's own step.
    save: gets the rows so far, after each.
  """
  rows, known = [], set()
  for name, changes in (('as configured', {}), *LEVERS):
    row = {'lever': name, 'changes': dict(changes)}
    try:
      run, mesh = planner.build(**changes)
    except UserError as error:
      rows.append(row | {'refused': str(error)})
      continue
    program = repr(run.model), tuple(mesh.shape.items()), run.config.accumulation_steps
    if program not in known:  # else the lever is what the config has
      known.add(program)
      rows.append(row | _lever(planner, run, mesh, plan_costs.compile_step(run, mesh) if changes else compiled))
      save(rows)
  return rows


def _lever(
  planner: Planner, run: Experiment, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled | OutOfMemory
) -> dict[str, Any]:
  chip = planner.slice.chip
  costs = plan_costs.step_costs(compiled, run, mesh)
  row = {'memory': plan_costs.memory(compiled, run, mesh, chip.hbm_bytes), 'product_flops': costs.product_flops}
  if costs.schedule is not None:
    with contextlib.suppress(hlo.Unreadable):
      sent = plan_costs.communication(compiled, mesh)
      row['sent_bytes'] = sum(c.sent_bytes for c in sent)
      row['time'] = plan_costs.step_time(costs, sent, chip, run, mesh)
  return row


def plan(
  planner: Planner,
  *,
  with_search: bool,
  with_levers: bool,
  save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
  """Everything about one slice, as plain data; `save` gets what is known so far, each time that there is more.

  Raises:
    UserError: if the config cannot run on this slice.
  """
  run, mesh = planner.build()
  chip = planner.slice.chip
  compiled = plan_costs.compile_step(run, mesh)
  memory = plan_costs.memory(compiled, run, mesh, chip.hbm_bytes)
  result = {
    'topology': planner.slice.name,
    'chip': dataclasses.asdict(chip),
    'mesh': dict(mesh.shape),
    'batch_multiple': run.config.batch_multiple,
    'configured_batch_multiple': planner.config.batch_multiple,
    'accumulation_steps': run.config.accumulation_steps,
    'remat': getattr(run.model, 'remat', None),  # some encoders cannot compute again what they did not keep
    'streams': {name: dataclasses.asdict(s) for name, s in run.streams.items()},
    'total_steps': run.total_steps,
    'fits': isinstance(memory, Memory),
    'memory': memory,
  }
  save(result)
  if isinstance(memory, Memory):
    try:
      result['collectives'] = plan_costs.communication(compiled, mesh)
    except hlo.Unreadable as error:  # the rest of the plan stands
      result['unreadable'] = str(error)
  result['costs'] = costs = plan_costs.step_costs(compiled, run, mesh)
  if 'collectives' in result and costs.schedule is not None:
    result['time'] = plan_costs.step_time(costs, result['collectives'], chip, run, mesh)
  save(result)
  if with_search:
    keep = lambda found: save(result | {'largest_batch': found})
    result['largest_batch'] = largest_batch(planner, memory, chip.hbm_bytes, keep)
    save(result)
  if with_levers:
    result['levers'] = levers(planner, compiled, lambda rows: save(result | {'levers': rows}))
  return result


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.plan', __doc__)
  command_line.add_config(to)
  to.add_argument(
    '--topology',
    type=flags.words,
    default=['v5e:4x4'],
    help='slices: v5e:4x8, v5p:4x4x4, v4:..., v6e:..., cpu:8, local, with commas between them (default: v5e:4x4)',
  )
  to.add_argument('--sizes', default='', help='of sources that are not prepared here: SOURCE=EXAMPLES/CLASSES,...')
  what = 'writes all numbers to this JSON file, too'
  to.add_argument('--output', default='', type=flags.path, metavar='FILE', help=what)
  what = 'frames a second that data is built with, for its bill: 0 (as they are) or 10'
  to.add_argument('--build_fps', type=float, choices=(0, 10), default=0, help=what)
  what = 'the price of a chip and hour, for the price of the run'
  to.add_argument('--dollars_per_chip_hour', type=float, metavar='X', help=what)
  to.add_argument('--levers', action='store_true', help='compile what remat, fsdp and accumulation would change, too')
  to.add_argument(
    '--nosearch', dest='search', action='store_false', help='no search for the largest batch: four compilations less'
  )
  return to


def run(options: argparse.Namespace) -> None:
  """Does what the flags ask for."""
  installed.need_train('A plan')
  config = options.config
  chips.prepare(options.topology)
  given = sizes.parse(options.sizes, config.sources)
  known = {name: sizes.size_of(name, source, given) for name, source in config.sources.items()}
  infos = [sizes.info(name, size) for name, size in known.items()]
  price = options.dollars_per_chip_hour
  if price is not None and not 0 <= price < math.inf:
    raise UserError(f'--dollars_per_chip_hour={price}: expected a number, at least 0.')
  slices = [chips.open_slice(name) for name in options.topology]
  print(report.versions(chips.versions()), report.sources(known), sep='\n\n', flush=True)
  print(bill.data_report(bill.data(known, config.sources, options.build_fps), options.build_fps), flush=True)
  done, failed = [], {}
  parts = {'with_search': options.search, 'with_levers': options.levers}
  for one in slices:
    save = lambda result: _save(options.output, known, [*done, result])
    try:
      done.append(plan(Planner(config, infos, one), **parts, save=save))
    except UserError as error:
      failed[one.name] = str(error)  # of this slice; the others may do
      continue
    except jax.errors.JaxRuntimeError as error:
      failed[one.name] = f'the compiler failed: {str(error).splitlines()[0]}'
      continue
    done[-1]['price'] = bill.slice_price(done[-1], price)
    _save(options.output, known, done)
    print(report.slice_report(done[-1]), bill.price_report(done[-1]['price']), sep='\n', flush=True)
  if len(done) > 1:
    print(report.comparison(done))
  if failed:
    raise UserError('\n'.join(f'--topology={name}: {why}' for name, why in failed.items()))


def _save(output: str, known: Mapping[str, sizes.Size], results: Sequence[Mapping[str, Any]]) -> None:
  """Writes --output: a plan takes long, and what is known stays known where it is interrupted."""
  if output:
    text = json.dumps({'versions': chips.versions(), 'sources': known, 'slices': results}, indent=2, default=_plain)
    _write(output, text + '\n')


def _plain(x: Any) -> Any:
  return dataclasses.asdict(x) | ({'total': x.total} if isinstance(x, Memory) else {})


def _write(path: str, text: str) -> None:
  try:
    paths.make_folder(os.path.dirname(paths.absolute(path)))
    durable.write(path, text)
  except OSError as error:
    raise UserError(f'--output={path} cannot be written ({error.strerror}): choose another place.') from error


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: run(command_line.parse(parser(), argv)))


if __name__ == '__main__':
  sys.exit(main())
