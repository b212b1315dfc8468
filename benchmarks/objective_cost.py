"""What a step of each self-supervised objective costs, beside classification of the same clips.

    python -m benchmarks.objective_cost [--objectives=hdc,v3s] [--rounds=7] [--batch_size=16] [--doc=docs/ssl.md]

Each row is the training step of a config of the embedded data, as shipped, but for the batch; classification is that of
configs/finetune_digits.py. Programs take turns, one step each a round, so that a machine whose speed drifts is the same
for all; ratios are medians of the rounds' ratios. Bytes accessed and temporaries are the compiler's, for this machine.
The second table is motion from pixels, which `statistics` and `modist` may ask for: ms a pair of frames.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks import documents, in_memory
from configs import (
  finetune_digits,
  hdc_digits,
  modist_digits,
  order_geometry_digits,
  statistics_digits,
  v3s_digits,
  vtdl_digits,
)
from cover_jax.experiment import wire
from cover_jax.objectives import motion
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed

BEGIN, END = '<!-- costs: begin -->', '<!-- costs: end -->'
BASE = 'classification'
CONFIGS = {
  BASE: finetune_digits,
  'vtdl': vtdl_digits,
  'hdc': hdc_digits,
  'statistics': statistics_digits,
  'order_geometry': order_geometry_digits,
  'v3s': v3s_digits,
  'modist': modist_digits,
}
MOTIONS = {
  'frame difference': motion.frame_difference,
  'normal flow': motion.normal_flow,
  'TV-L1': motion.tvl1,
}
MOTION_CLIP = (1, 9, 112, 112, 3)  # of which eight pairs: the size that 3D CNNs see


class Program(NamedTuple):
  """A compiled step: `run` returns when it is done; gigabytes accessed and of temporaries."""

  run: Callable[[], None]
  accessed: float
  temporaries: float


def program(config: ml_collections.ConfigDict) -> Program:
  """The training step of a config on one batch of the embedded motions."""
  config.batch_size, config.batch_multiple, config.total_steps = _OPTIONS.batch_size, 1, 10
  config.optimizer.warmup_steps = 1
  for source in config.sources.values():
    source.label_fraction = 1.0
  for stream in config.streams.values():
    stream.batch_size = None
  drawn = in_memory.draw('motions', 'train', 4 * _OPTIONS.batch_size)
  sources = [in_memory.make_source(name, settings, drawn) for name, settings in config.sources.items()]
  experiment, mesh = in_memory.build(config, sources)
  optimizer, _ = stepping.make_optimizer(experiment)
  batch = sharding.to_global(next(iter(wire.training_batches(experiment, sources, mesh, 0)(0))), mesh)
  held = [in_memory.initial(config, sources, 0)]
  with sharding.use(mesh, config.logical_axis_rules):
    compiled = stepping.jit_step(experiment, optimizer, mesh).lower(held[0], batch).compile()

  def run() -> None:
    held[0], report = compiled(held[0], batch)
    jax.block_until_ready((held[0], report))

  return Program(
    run, compiled.cost_analysis()['bytes accessed'] / 1e9, compiled.memory_analysis().temp_size_in_bytes / 1e9
  )


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
  """{name: ms of each round}; a round runs each once, after one that does not count."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(rounds + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if number:
        times[name].append(1e3 * (time.perf_counter() - start))
  return times


def _timed(values: Sequence[float]) -> str:
  return f'{median(values):.0f} ({min(values):.0f} to {max(values):.0f})'


def step_table(programs: dict[str, Program], times: dict[str, list[float]]) -> str:
  """A line for each objective."""
  base, lines = programs[BASE], []
  for name, one in programs.items():
    ratio = median(a / b for a, b in zip(times[name], times[BASE], strict=True))
    accessed = f'{one.accessed:.2f} ({one.accessed / base.accessed:.2f})'
    lines.append([name, _timed(times[name]), f'{ratio:.2f}', accessed, f'{one.temporaries:.3f}'])
  return documents.markdown(
    ['objective', 'ms a step (fastest to slowest)', 'times classification', 'GB accessed (times)', 'GB of temporaries'],
    lines,
  )


def motion_table() -> str:
  """A line for each way to see motion."""
  clip = jax.device_put(np.random.default_rng(0).uniform(0, 255, MOTION_CLIP).astype(np.float32))

  def runner(function: Any) -> Callable[[], None]:
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(clip))

  times = measure({name: runner(function) for name, function in MOTIONS.items()}, _OPTIONS.rounds)
  pairs = MOTION_CLIP[1] - 1
  lines = [
    [name, f'{median(t) / pairs:.2f}', f'{min(t) / pairs:.2f} to {max(t) / pairs:.2f}'] for name, t in times.items()
  ]
  return documents.markdown(['motion', f'ms a pair of {MOTION_CLIP[2]} x {MOTION_CLIP[3]}', 'rounds'], lines)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.objective_cost', __doc__)
  to.add_argument('--objectives', type=flags.words, default=[], help='only these, beside classification')
  to.add_argument('--rounds', type=int, default=7, help='steps of each that count')
  to.add_argument('--batch_size', type=int, default=16, help='videos a step')
  to.add_argument('--doc', default='', help='Markdown file to write the tables to')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  if unknown := sorted(set(_OPTIONS.objectives) - set(CONFIGS)):
    raise UserError(f'--objectives has {unknown}: expected some of {", ".join(CONFIGS)}.')
  programs = {}
  for name, module in CONFIGS.items():
    if name == BASE or not _OPTIONS.objectives or name in _OPTIONS.objectives:
      print(f'{name}: compiling ...', flush=True)
      programs[name] = program(module.get_config())
  times = measure({name: one.run for name, one in programs.items()}, _OPTIONS.rounds)
  text = f'{step_table(programs, times)}\n\n{motion_table()}'
  print(f'\n{text}')
  if _OPTIONS.doc:
    documents.fill(_OPTIONS.doc, text, 'Self-supervised objectives', BEGIN, END)


if __name__ == '__main__':
  flags.run(main)
