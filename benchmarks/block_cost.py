"""What a block costs on a TPU that is not here: the TPU compiler's own figures for our block and two others.

    python -m benchmarks.block_cost --rows=shipped,loop # the step as configs/cover_b16.py runs it, and as a loop
    python -m benchmarks.block_cost --fast              # one block, forward and backward: minutes
    python -m benchmarks.block_cost --depths=1,3        # the training step at two depths, and what that makes of 12
    python -m benchmarks.block_cost --fast --rows=unrolled --top=30      # and its dearest operations
    [--rows=shipped,loop,unrolled,vivit,naive] [--topology=v5p:2x2x1] [--clips=8] [--json=FILE]

Needs the extra [plan] (libtpu), no TPU and no TensorFlow. B/16 at 8 x 224, bfloat16, SGD with momentum.

  HBM   GB of arrays outside fast memory that are read or written, loops as often as they turn
  cyc   estimated cycles of the scheduled program at the chip's clock, in ms, loops as often as they turn; sees padding,
        ignores overlap
  GB    bytes accessed, by the compiler; counts copies into fast memory, too, and a loop's body once
  opt   the compiler's `optimal_seconds`, a roofline of each operation, in ms; does not see the padding of tiles, counts
        a loop's body once, and is meaningless on v5e and v6e

They are deterministic and not validated on a chip; differences below 3 % are ties. What the compiler keeps in fast
memory changes from depth to depth, so an extrapolation is good to a few percent only.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

# Before JAX is imported: describe a TPU slice without one, and let other processes do so at the same time.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import cover_b16
from cover_jax.models import Heads, TimeSformer
from cover_jax.models.encoder import Encoded
from cover_jax.models.timesformer import Block
from cover_jax.planning import chips, report, schedule
from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed

WIDTH, NUM_HEADS, MLP_DIM, DEPTH = 768, 12, 3072, 12
FRAMES, SIZE, PLACES, CLASSES = 8, 224, 196, 400

# Scenic's own code, measured once with the same compiler (jax 0.10.2, libtpu 0.0.42.1, depth 12): what we compare to.
# On v5p, 8 clips a chip, without a loop.
SCENIC = {'TFLOP': 8.895, 'GB': 116.1, 'opt': 59.2, 'cyc': 68.1, 'GiB': 7.58}
ROWS = ('shipped', 'loop', 'unrolled', 'vivit', 'naive')
OURS = ROWS[:3]

Cost = dict[str, float]


_dense = partial(nn.DenseGeneral, dtype=jnp.bfloat16)
_norm = partial(nn.LayerNorm, dtype=jnp.bfloat16)


def _mlp(x: jax.Array) -> jax.Array:
  return _dense(WIDTH, name='mlp_out')(nn.gelu(_dense(MLP_DIM, name='mlp_hidden')(x), approximate=False))


class VivitBlock(nn.Module):
  """The form of scenic's ViViT, factorised self-attention: space, time, MLP; no class token, no temporal_fc.

  Tokens are float32 [B, T, N, D] between the residual branches, which compute in bfloat16.
  """

  @nn.compact
  def __call__(self, x_BxTxNxD: jax.Array) -> jax.Array:
    for axis, name in ((2, 'space'), (1, 'time')):
      rows = jnp.moveaxis(_norm(name=f'norm_{name}')(x_BxTxNxD), axis, 2)
      query, key, value = (_dense((NUM_HEADS, WIDTH // NUM_HEADS), name=f'{name}_{n}')(rows) for n in 'qkv')
      rows = nn.dot_product_attention(query, key, value, dtype=jnp.bfloat16)
      rows = _dense(WIDTH, axis=(-2, -1), name=f'{name}_out')(rows)
      x_BxTxNxD = x_BxTxNxD + jnp.moveaxis(rows, 2, axis)
    return x_BxTxNxD + _mlp(_norm(name='norm_mlp')(x_BxTxNxD))


class NaiveBlock(nn.Module):
  """TimeSformer as one would first write it: the class token apart, swapped axes, one wide projection, f32 softmax."""

  def attend(self, x_RxLxD: jax.Array, name: str) -> jax.Array:
    qkv = _dense((3, NUM_HEADS, WIDTH // NUM_HEADS), name=f'{name}_qkv')(_norm(name=f'norm_{name}')(x_RxLxD))
    query, key, value = jnp.moveaxis(qkv, -3, 0)
    logits = jnp.einsum('rlhk,rmhk->rhlm', query, key) / np.sqrt(WIDTH // NUM_HEADS)
    probs = jax.nn.softmax(logits.astype(jnp.float32)).astype(x_RxLxD.dtype)
    return _dense(WIDTH, axis=(-2, -1), name=f'{name}_out')(jnp.einsum('rhlm,rmhk->rlhk', probs, value))

  @nn.compact
  def __call__(self, tokens: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    class_Bx1xD, x_BxTxNxD = tokens
    batch, frames, places, width = x_BxTxNxD.shape
    rows = x_BxTxNxD.swapaxes(1, 2).reshape(batch * places, frames, width)
    rows = _dense(WIDTH, name='temporal_fc')(self.attend(rows, 'time'))
    x_BxTxNxD = x_BxTxNxD + rows.reshape(batch, places, frames, width).swapaxes(1, 2)
    rows = x_BxTxNxD.reshape(batch * frames, places, width)
    rows = self.attend(jnp.concatenate([jnp.repeat(class_Bx1xD, frames, axis=0), rows], axis=1), 'space')
    class_Bx1xD = class_Bx1xD + rows[:, 0].reshape(batch, frames, width).mean(axis=1, keepdims=True)
    x_BxTxNxD = x_BxTxNxD + rows[:, 1:].reshape(x_BxTxNxD.shape)
    x_BxSxD = jnp.concatenate([class_Bx1xD, x_BxTxNxD.reshape(batch, frames * places, width)], axis=1)
    x_BxSxD = x_BxSxD + _mlp(_norm(name='norm_mlp')(x_BxSxD))
    return x_BxSxD[:, :1], x_BxSxD[:, 1:].reshape(x_BxTxNxD.shape)


class Peer(nn.Module):
  """A classifier of clips around one of the blocks above."""

  block: Any
  depth: int

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array) -> jax.Array:
    batch = len(clip_BxTxHxWx3)
    frames = clip_BxTxHxWx3.reshape(batch * FRAMES, SIZE, SIZE, 3)
    x = nn.Conv(WIDTH, (16, 16), (16, 16), 'VALID', dtype=jnp.bfloat16, name='patches')(frames)
    x = x.reshape(batch, FRAMES, PLACES, WIDTH)
    x = x + self.param('position', nn.initializers.normal(0.02), x.shape[1:]).astype(jnp.bfloat16)
    if self.block is NaiveBlock:
      token = self.param('class', nn.initializers.zeros, (1, 1, WIDTH)).astype(jnp.bfloat16)
      x = jnp.broadcast_to(token, (batch, 1, WIDTH)), x
    else:
      x = x.astype(jnp.float32)
    for i in range(self.depth):
      x = self.block(name=f'block_{i}')(x)
    feature = _norm(name='norm')(x[0][:, 0] if self.block is NaiveBlock else x.mean(axis=(1, 2)))
    return nn.Dense(CLASSES, name='head')(feature)


def _init(module: nn.Module, *args: Any) -> Any:
  return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))['params']


def one_block(program: str, batch: int) -> tuple[Callable[..., Any], Any, Any]:
  """(function of parameters and tokens, the shapes of both) of one block."""
  token = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((batch, *shape, WIDTH), dtype)
  if program in OURS:
    x = token(1 + FRAMES * PLACES)
    block = Block(NUM_HEADS, MLP_DIM, 'divided', FRAMES, False, 'run', False, jnp.bfloat16, 0.02, 128, False)
    return lambda params, x: block.apply({'params': params}, x, 0.0)[0], _init(block, x, 0.0), x
  naive = program == 'naive'
  x = (token(1), token(FRAMES, PLACES)) if naive else token(FRAMES, PLACES, dtype=jnp.float32)
  block = NaiveBlock() if naive else VivitBlock()
  return lambda params, x: block.apply({'params': params}, x), _init(block, x), x


def classifier(program: str, depth: int, batch: int) -> tuple[Callable[..., jax.Array], Any, Any]:
  """(logits of parameters and a clip, the shapes of both) of a whole model."""
  clip = jax.ShapeDtypeStruct((batch, FRAMES, SIZE, SIZE, 3), jnp.float32)
  if program not in OURS:
    model = Peer(NaiveBlock if program == 'naive' else VivitBlock, depth)
    return lambda params, clip: model.apply({'params': params}, clip), _init(model, clip), clip
  shipped = cover_b16.get_config().model.to_dict()
  fields = {key: shipped[key] for key in ('remat', 'scan_unroll') if key in shipped}
  if program in ('unrolled', 'loop'):
    fields = {'scan_unroll': depth if program == 'unrolled' else 1, 'remat': 'none'}
  encoder, heads = TimeSformer(depth=depth, dtype=jnp.bfloat16, **fields), Heads((('source', CLASSES),))
  params = {
    'encoder': _init(encoder, clip),
    'heads': _init(heads, _encoded(batch)),
  }

  def logits(params, clip):
    encoded = encoder.apply({'params': params['encoder']}, clip)
    return heads.apply({'params': params['heads']}, encoded)

  return logits, params, clip


def _encoded(batch: int) -> Encoded:
  x = lambda *shape: jax.ShapeDtypeStruct((batch, *shape, WIDTH), jnp.bfloat16)
  return Encoded(x(), x(FRAMES, 1, PLACES))


def cost_of_compiled(compiled: jax.stages.Compiled, chip: chips.Chip) -> Cost:
  """The figures of one compiled program, a chip."""
  analysis, found = compiled.cost_analysis(), schedule.read(compiled.as_text())
  optimal = analysis.get('optimal_seconds', -1.0)
  return {
    'TFLOP': analysis['flops'] / 1e12,
    'HBM': found.hbm_bytes / 1e9,
    'cyc': found.cycles / chip.clock * 1e3,
    'GB': analysis['bytes accessed'] / 1e9,
    'opt': optimal * 1e3 if optimal > 0 else float('nan'),  # an operation that it cannot judge has -1 second
    'GiB': compiled.memory_analysis().temp_size_in_bytes / 2**30,
  }


def dearest_operations(hlo_text: str, chip: chips.Chip, count: int) -> list[tuple[float, str]]:
  """(estimated ms of all its runs, the line of the program) of the operations with the most cycles, most first."""
  lines = {}
  for line in hlo_text.splitlines():
    if operation := re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ', line):
      source = re.search(r'op_name="([^"]*)"', line)
      results = re.sub(r'\{[^}]*\}|/\*.*?\*/', '', operation[2])
      lines[operation[1]] = f'{operation[1]:32} {results[:80]:80} {source[1][-100:] if source else ""}'
  found = [(one.times * (one.cycles or 0) / chip.clock * 1e3, lines[one.name]) for one in schedule.operations(hlo_text)]
  return sorted(found, reverse=True)[:count]


def open_mesh(topology: str) -> tuple[Mesh, chips.Chip]:
  """The chips of a slice that need not exist, along one axis 'data'."""
  found = chips.open_slice(topology)
  if found.chip.clock is None:
    raise UserError(f'--topology={topology}: its compiler estimates no cycles; name a TPU slice, as v5p:2x2x1.')
  return Mesh(np.array(found.devices), ('data',), axis_types=(jax.sharding.AxisType.Auto,)), found.chip


def _place(tree: Any, mesh: Mesh, spec: P) -> Any:
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  return jax.tree.map(place, tree)


def compile_block(program: str, mesh: Mesh) -> jax.stages.Compiled:
  """Forward and backward of one block: gradients of the parameters and of the tokens."""
  apply, params, x = one_block(program, _OPTIONS.clips * mesh.size)

  def gradients(params, x, cotangent):
    return jax.vjp(apply, params, x)[1](cotangent)

  x = _place(x, mesh, P('data'))
  return jax.jit(gradients).lower(_place(params, mesh, P()), x, x).compile()


def compile_step(program: str, depth: int, mesh: Mesh) -> jax.stages.Compiled:
  """A training step: cross-entropy, gradients, SGD with momentum, everything donated."""
  batch = _OPTIONS.clips * mesh.size
  logits, params, clip = classifier(program, depth, batch)

  def step(params, momentum, clip, label):
    # Without gather and scatter, which have no estimate.
    target = jax.nn.one_hot(label, CLASSES)
    loss = lambda params: -(target * jax.nn.log_softmax(logits(params, clip))).sum() / batch
    value, gradients = jax.value_and_grad(loss)(params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    return jax.tree.map(lambda p, m: p - 0.005 * m, params, momentum), momentum, value

  params = _place(params, mesh, P())
  label = jax.ShapeDtypeStruct((batch,), jnp.int32)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, params, *_place((clip, label), mesh, P('data')))
  return lowered.compile()


def extrapolate(shallow: Cost, deep: Cost, depths: tuple[int, int]) -> Cost:
  """The cost at depth 12, linear in depth."""
  a, b = depths
  return {name: shallow[name] + (deep[name] - shallow[name]) * (DEPTH - a) / (b - a) for name in shallow}


def row(name: str, cost: Cost, reference: Cost | None) -> str:
  """One line of the table; with a reference, its ratios to it follow each figure."""
  cells = []
  for key in ('TFLOP', 'HBM', 'cyc', 'GB', 'opt'):
    known = reference is not None and key in reference and key != 'TFLOP'
    cells.append(
      f'{key} {cost.get(key, math.nan):7.3f}' + f'{f" ({cost[key] / reference[key]:.2f}x)" if known else "":8}'
    )
  return f'{name:<28}{"  ".join(cells)}  {cost["GiB"]:.2f} GiB'


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.block_cost', __doc__)
  to.add_argument('--fast', action='store_true', help='one block only')
  to.add_argument(
    '--depths',
    type=flags.words,
    default=['1', '3'],
    help='depths of the training steps to compile; the last two extrapolate',
  )
  to.add_argument(
    '--rows', type=flags.words, default=['unrolled', 'vivit', 'naive'], help=f'of the table, some of {", ".join(ROWS)}'
  )
  to.add_argument('--topology', default='v5p:2x2x1', help='a slice')
  to.add_argument('--clips', type=int, default=8, help='clips a chip')
  to.add_argument('--top', type=int, default=0, help='operations to list, by estimated cycles')
  to.add_argument('--json', default='', help='file for the figures; none if empty')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  if unknown := set(_OPTIONS.rows) - set(ROWS):
    raise UserError(f'--rows names {", ".join(sorted(unknown))}; there are {", ".join(ROWS)}.')
  depths = [int(depth) for depth in _OPTIONS.depths]
  mesh, chip = open_mesh(_OPTIONS.topology)
  scenic = SCENIC if chip.name == 'v5p' and _OPTIONS.clips == 8 else None
  results: dict[str, Cost] = {}

  def show(name: str, cost: Cost, reference: Cost | None, note: str = '') -> Cost:
    results[name] = cost
    print(row(name, cost, reference), note, flush=True)
    return cost

  def measure(name: str, make: Callable[[], jax.stages.Compiled], reference: Cost | None) -> Cost:
    start = time.time()
    compiled = make()
    cost = show(name, cost_of_compiled(compiled, chip), reference, f'  [{time.time() - start:.0f} s]')
    for ms, operation in dearest_operations(compiled.as_text(), chip, _OPTIONS.top):
      print(f'  {ms:7.3f} ms  {operation}')
    return cost

  versions = report.versions(chips.versions())
  print(f'{_OPTIONS.topology}, {_OPTIONS.clips} clips a chip, {versions}')
  if scenic:
    print(row('scenic, depth 12 (recorded)', scenic, None))
  for program in _OPTIONS.rows:
    if program in ('shipped', 'loop') and not _OPTIONS.fast:
      measure(f'{program}, depth {DEPTH}', partial(compile_step, program, DEPTH, mesh), scenic)
      continue
    if _OPTIONS.fast:
      twelfth = scenic and {key: value / DEPTH for key, value in scenic.items()}
      measure(f'{program}, one block', partial(compile_block, program, mesh), twelfth)
      continue
    steps = {}
    for depth in depths:
      reference = scenic if depth == DEPTH else None
      steps[depth] = measure(f'{program}, depth {depth}', partial(compile_step, program, depth, mesh), reference)
    if len(depths) > 1:
      a, b = depths[-2:]
      show(f'{program}, {DEPTH} from {a} and {b}', extrapolate(steps[a], steps[b], (a, b)), scenic)
  if _OPTIONS.json:
    with open(_OPTIONS.json, 'w', encoding='utf-8') as f:
      json.dump({'topology': _OPTIONS.topology, 'versions': chips.versions(), 'rows': results}, f, indent=2)


if __name__ == '__main__':
  sys.exit(flags.run(main))
