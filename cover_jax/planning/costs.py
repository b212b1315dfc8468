"""What one train step costs on a mesh: compiled, never run."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from cover_jax.experiment import optim, state
from cover_jax.experiment.build import Experiment
from cover_jax.models.products import product_flops
from cover_jax.planning import collectives
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


def _gradient(run: Experiment, stream: str) -> Callable[[Any, Any, Any], Any]:
  """(params, objective states, batch) -> loss and gradient of one stream, without the optimizer."""
  rules = tuple(run.config.optimizer.learning_rate_rules)

  def gradient(params, states, batch):
    learning, frozen = optim.split(rules, params)

    def loss(learning):
      out = run.objectives[stream].loss(optim.join(learning, frozen), states[stream], batch[stream], jax.random.key(0))
      return out.loss, out

    return jax.value_and_grad(loss, has_aux=True)(learning)

  return gradient


def step_products(run: Experiment) -> float:
  """Floating-point operations of a step's matrix products as the step does them, on all chips together."""
  optimizer, _ = stepping.make_optimizer(run)
  shapes = jax.eval_shape(lambda: nn.meta.unbox(state.init_state(run, optimizer, jax.random.key(0))))
  return product_flops(stepping.make_train_step(run, optimizer), shapes, stepping.abstract_batch(run))


@dataclasses.dataclass(frozen=True)
class StreamCosts:
  """What a stream's examples cost, forwards and backwards, without the optimizer.

  Attributes:
    examples: a step, on all chips.
    model_flops: of the matrix products of the encoder for one example, as the paper has them: once forwards and
      twice backwards for each of its clips; a frozen encoder's forwards alone. What MFU counts.
    flops: of one example, as the compiler counts them: with recomputation and elementwise operations.
    bytes: read from and written to HBM for one example; with the parameters, shared by the examples of a chip.
  """

  examples: int
  model_flops: float
  flops: float
  bytes: float


@dataclasses.dataclass(frozen=True)
class StepCosts:
  """What a step costs.

  Attributes:
    streams: by name.
    update_bytes: read and written by the optimizer and the EMA on one chip.
    flops, bytes: of one chip, a step.
    model_flops: of all chips, a step.
  """

  streams: Mapping[str, StreamCosts]
  update_bytes: float
  flops: float
  bytes: float
  model_flops: float


# From programs of this depth and of 1 those of any depth follow. On the TPU compiler the second block costs more bytes
# than the others.
_DEEPER = 3


def step_costs(build: Callable[..., tuple[Experiment, Mesh]]) -> StepCosts:
  """Costs from the compiler, which counts the body of a loop once: from programs of 1 and 3 blocks without a loop.

  A program's cost is nearly linear in its number of blocks: cost(L) = cost(1) + (L - 1) (cost(3) - cost(1)) / 2, and so
  for each loop of an encoder that has several. The programs hold one microbatch each.

  Args:
    build: changed config keys -> (run, mesh).
  """
  run, mesh = build()
  steps = run.config.accumulation_steps
  micro = {name: s.batch_size // steps for name, s in run.streams.items()}
  one_microbatch = {'accumulation_steps': 1} | {f'streams.{name}.batch_size': b for name, b in micro.items()}
  depths = {field: getattr(run.model, field) for field in run.model.DEPTHS}
  shallow, deeper = _unrolled(depths)
  shallow, *deeper = (build(**one_microbatch, **changes)[0] for changes in (shallow, *deeper))
  operations = 2 * _passes(run, mesh)  # of each multiply-add of a way forward
  streams = {}
  for name, stream in run.streams.items():
    flops, size = first = _stream_cost(shallow, mesh, name)
    for program, depth in zip(deeper, depths.values(), strict=True):
      more = _stream_cost(program, mesh, name)
      flops, size = (
        total + (depth - 1) * (b - a) / (_DEEPER - 1) for total, a, b in zip((flops, size), first, more, strict=True)
      )
    streams[name] = StreamCosts(
      examples=stream.batch_size,
      model_flops=operations * sum(run.model.products(t, tuple(size)) for t, *size in run.encoded_clips(name).values()),
      flops=flops * mesh.size / micro[name],
      bytes=size * mesh.size / micro[name],
    )
  of_all = lambda key: sum(getattr(s, key) * s.examples for s in streams.values())
  update = _update_bytes(run, mesh)
  return StepCosts(
    streams=streams,
    update_bytes=update,
    flops=of_all('flops') / mesh.size,
    bytes=of_all('bytes') / mesh.size + update,
    model_flops=of_all('model_flops'),
  )


def _passes(run: Experiment, mesh: Mesh) -> int:
  """The products of a step, in those of the encoder's way forward: backward there are twice as many, if it learns."""
  abstract_state, _ = _abstract(run, mesh)
  learning, _ = optim.split(tuple(run.config.optimizer.learning_rate_rules), abstract_state.params)
  return 3 if jax.tree.leaves(learning.get('encoder', {})) else 1


def _unrolled(depths: Mapping[str, int]) -> tuple[dict[str, int], list[dict[str, int]]]:
  """Changes of the config that make each loop over layers 1 layer deep, and those that make one of them deeper."""
  if not depths:
    return {}, []
  changes = lambda of: (
    {f'model.{field}': of.get(field, 1) for field in depths} | {'model.scan_unroll': max(of.values(), default=1)}
  )
  return changes({}), [changes({field: _DEEPER}) for field in depths]


def _stream_cost(run: Experiment, mesh: Mesh, stream: str) -> tuple[float, float]:
  """(FLOPs, bytes) of one chip for the gradient of one stream; NaN where not even this fits."""
  abstract_state, batch = _abstract(run, mesh)
  with sharding.use(mesh, run.config.logical_axis_rules):
    gradient = jax.jit(_gradient(run, stream))
    compiled = _compile(gradient.lower(abstract_state.params, abstract_state.objectives, batch))
  if isinstance(compiled, OutOfMemory):
    return math.nan, math.nan
  analysis = compiled.cost_analysis()
  return float(analysis['flops']), float(analysis['bytes accessed'])


def _update_bytes(run: Experiment, mesh: Mesh) -> float:
  """Bytes that the optimizer's update and the EMA read and write on one chip, each array once."""
  abstract_state, _ = _abstract(run, mesh)
  learning, _ = optim.split(tuple(run.config.optimizer.learning_rate_rules), abstract_state.params)
  size = _bytes_on_a_chip
  gradients = size(learning)
  return gradients + 2 * (size(learning) + size(abstract_state.opt_state) + size(abstract_state.ema))


def step_time(
  costs: StepCosts, sent: Sequence[collectives.Collective], chip: Chip, run: Experiment, mesh: Mesh
) -> dict[str, float]:
  """Seconds of a step from the chip's data sheet: operations at the peak rate, HBM and links at full bandwidth.

  Returns:
    'compute', 'memory', 'links': seconds that each alone would take; 'at_least': the longest of them, as if they
    overlapped wholly; 'estimate': their sum, as if they did not at all; and of the estimate 'mfu', the share of the
    chips' peak that model FLOPs make, 'examples_per_second' and 'days' of the whole run.
  """
  alone = {
    'compute': costs.flops / chip.peak_flops,
    'memory': costs.bytes / chip.hbm_bandwidth,
    'links': sum(c.sent_bytes for c in sent) / chip.link_bandwidth,
  }
  estimate = sum(alone.values())
  return alone | {
    'at_least': max(alone.values()),
    'estimate': estimate,
    'mfu': costs.model_flops / (mesh.size * chip.peak_flops * estimate),
    'examples_per_second': sum(s.batch_size for s in run.streams.values()) / estimate,
    'days': run.total_steps * estimate / 86400,
  }
