"""What one train step costs on a mesh: compiled, never run."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from cover_jax.experiment import optim, state
from cover_jax.experiment.build import Experiment
from cover_jax.models.products import product_flops
from cover_jax.planning import collectives, hlo
from cover_jax.planning import schedule as schedules
from cover_jax.planning.chips import Chip
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one chip while a step runs. The first five kinds are what lies there between steps."""

  parameters: float
  optimizer: float
  ema: float
  objectives: float
  batch: float
  padding: float  # what the chip's tiles add to the kinds above
  temporaries: float  # activations, gradients, everything else of the step
  program: float

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """The compiler's refusal.

  Attributes:
    needed: bytes; a lower bound where the compiler gave up early.
    available: bytes.
    kinds: the first five of `Memory`, which are known without compiling.
  """

  needed: float
  available: float
  kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _abstract(run: Experiment, mesh: Mesh) -> tuple[Any, Any]:
  """The state and the batch of a step as shapes that know where they lie."""
  optimizer, _ = stepping.make_optimizer(run)
  shapes, placed = state.state_shardings(run, optimizer, mesh)
  at = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
  batch = stepping.abstract_batch(run)
  return jax.tree.map(at, shapes, placed), jax.tree.map(lambda s: at(s, NamedSharding(mesh, sharding.BATCH)), batch)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled | OutOfMemory:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    # "... HLO temporaries (88.02G) exceeds available HBM (15.75G)", "Used 19.30G of 15.75G hbm".
    found = re.search(r'\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)', text) or re.search(
      r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm', text
    )
    if 'RESOURCE_EXHAUSTED' not in text or not found:
      raise
    factor = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
    return OutOfMemory(float(found[1]) * factor[found[2]], float(found[3]) * factor[found[4]])


def compile_step(run: Experiment, mesh: Mesh) -> jax.stages.Compiled | OutOfMemory:
  """Compiles the step that `train` would run."""
  optimizer, _ = stepping.make_optimizer(run)
  step, arguments = stepping.jit_step(run, optimizer, mesh), _abstract(run, mesh)
  with sharding.use(mesh, run.config.logical_axis_rules):
    return _compile(step.lower(*arguments))


def memory(
  compiled: jax.stages.Compiled | OutOfMemory, run: Experiment, mesh: Mesh, limit: float | None
) -> Memory | OutOfMemory:
  """Splits the memory of a compiled step by kind.

  Args:
    compiled: as `compile_step` gives it.
    run, mesh: what was compiled.
    limit: bytes of a chip, if known. The TPU compiler also takes steps whose parts are some percent more than that
      together, since not all are needed at once; a chip has to hold them all, so here they do not fit.
  """
  abstract_state, batch = _abstract(run, mesh)
  kinds = {
    'parameters': _bytes_on_a_chip(abstract_state.params),
    'optimizer': _bytes_on_a_chip(abstract_state.opt_state),
    'ema': _bytes_on_a_chip(abstract_state.ema),
    'objectives': _bytes_on_a_chip(abstract_state.objectives),
    'batch': _bytes_on_a_chip(batch),
  }
  if isinstance(compiled, OutOfMemory):
    return dataclasses.replace(compiled, kinds=kinds)
  stats = compiled.memory_analysis()
  found = Memory(
    **kinds,
    padding=max(stats.argument_size_in_bytes - sum(kinds.values()), 0),
    # Outputs that do not take the place of a donated argument are as good as temporary.
    temporaries=stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
    program=stats.generated_code_size_in_bytes,
  )
  return found if limit is None or found.total <= limit else OutOfMemory(found.total, limit, kinds)


def _bytes_on_a_chip(tree: Any) -> float:
  sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)]
  return float(sum(sizes))


def communication(compiled: jax.stages.Compiled, mesh: Mesh) -> list[collectives.Collective]:
  return collectives.read(compiled.as_text(), mesh.size)


def step_products(run: Experiment) -> float:
  """Floating-point operations of a step's matrix products as the step does them, on all chips together."""
  optimizer, _ = stepping.make_optimizer(run)
  shapes = jax.eval_shape(lambda: nn.meta.unbox(state.init_state(run, optimizer, jax.random.key(0))))
  return product_flops(stepping.make_train_step(run, optimizer), shapes, stepping.abstract_batch(run))


@dataclasses.dataclass(frozen=True)
class StepCosts:
  """What a step costs.

  Attributes:
    model_flops: {stream: of the encoder's matrix products for one example, as the paper has them: once forwards and
      twice backwards for each of its clips; a frozen encoder's forwards alone}. What MFU counts.
    product_flops: of the matrix products that the step does on one chip, recomputation included.
    schedule: of the compiled step on one chip; None where the compiler refused it or it cannot be read.
    unreadable: why it cannot be read, if so.
  """

  model_flops: Mapping[str, float]
  product_flops: float
  schedule: schedules.Schedule | None
  unreadable: str = ''


def step_costs(compiled: jax.stages.Compiled | OutOfMemory, run: Experiment, mesh: Mesh) -> StepCosts:
  """Costs of the step that was compiled: of the very program that `train` runs, loops as often as they run."""
  operations = 2 * _passes(run, mesh)  # of each multiply-add of a way forward
  model_flops = {
    name: operations * sum(run.model.products(t, tuple(size)) for t, *size in run.encoded_clips(name).values())
    for name in run.streams
  }
  found, unreadable = None, ''
  if not isinstance(compiled, OutOfMemory):
    try:
      found = schedules.read(compiled.as_text())
    except hlo.Unreadable as error:
      unreadable = str(error)
  return StepCosts(model_flops, step_products(run) / mesh.size, found, unreadable)


def _passes(run: Experiment, mesh: Mesh) -> int:
  """The products of a step, in those of the encoder's way forward: backward there are twice as many, if it learns."""
  abstract_state, _ = _abstract(run, mesh)
  learning, _ = optim.split(tuple(run.config.optimizer.learning_rate_rules), abstract_state.params)
  return 3 if jax.tree.leaves(learning.get('encoder', {})) else 1


def step_time(
  costs: StepCosts, sent: Sequence[collectives.Collective], chip: Chip, run: Experiment, mesh: Mesh
) -> dict[str, float]:
  """Seconds of a step, from the compiler's schedule and the chip's data sheet.

  Args:
    costs: with a schedule.
    sent: what the chips send to each other.

  Returns:
    'products', 'memory', 'links': what each alone would take at the chip's peak; 'at_least': the longest of them, as if
    they overlapped wholly; 'cycles', where the compiler estimates them: its operations one after the other, each with
    the slower of its arithmetic and its memory; 'estimate': the cycles, or products and memory one after the other, and
    then the links, as if nothing were sent meanwhile; and of the estimate 'mfu', the share of the chips' peak that
    model FLOPs make, 'examples_per_second' and 'days' of the whole run.
  """
  alone = {
    'products': costs.product_flops / chip.peak_flops,
    'memory': costs.schedule.hbm_bytes / chip.hbm_bandwidth,
    'links': sum(c.sent_bytes for c in sent) / chip.link_bandwidth,
  }
  at_least = max(alone.values())
  busy = alone['products'] + alone['memory']
  if costs.schedule.cycles is not None and chip.clock is not None:
    alone['cycles'] = costs.schedule.cycles / chip.clock
    busy = max(alone['cycles'], alone['products'], alone['memory'])
  estimate = busy + alone['links']
  model_flops = sum(costs.model_flops[name] * s.batch_size for name, s in run.streams.items())
  return alone | {
    'at_least': at_least,
    'estimate': estimate,
    'mfu': model_flops / (mesh.size * chip.peak_flops * estimate),
    'examples_per_second': sum(s.batch_size for s in run.streams.values()) / estimate,
    'days': run.total_steps * estimate / 86400,
  }
