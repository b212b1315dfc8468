"""Does the first stage of CoVeR pay? Steps of co-training to a given accuracy, from scratch and from image weights.

    python -m benchmarks.first_stage --output=DIR [--seeds=0,1] [--every=100] [--steps=400] [--variant=debug]

For each seed: `configs/pretrain_image.py`, then `configs/digits_cover.py` twice with the same seed, data and schedule,
once from scratch and once from the first stage's checkpoint. Each is a process of its own, one after the other; a run
that is there already is continued or read. The table has, for each source and each level, the first evaluated step at
which the test top-1 reaches it; levels are shares of what the run from scratch ends with, mean over the seeds.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from cover_jax.training import metrics
from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed

LEVELS = (0.5, 0.75, 0.9, 1.0)  # of the final accuracy from scratch


Curve = list[tuple[int, float]]  # (step, top-1)


def train(config: str, workdir: str, seed: str, *options: str) -> None:
  """Runs one training as a user would."""
  variant = f':{_OPTIONS.variant}' if _OPTIONS.variant else ''
  command = [sys.executable, '-m', 'cover_jax.main', f'--config=configs/{config}.py{variant}', f'--workdir={workdir}']
  print('Running', os.path.basename(workdir), flush=True)
  log = os.path.join(_OPTIONS.output, f'{os.path.basename(workdir)}.log')
  with open(log, 'a', encoding='utf-8') as f:
    done = subprocess.run([*command, f'--config.seed={seed}', *options], stdout=f, stderr=subprocess.STDOUT)
  if done.returncode:
    raise UserError(f'The run {workdir} ended with code {done.returncode}: its log is {log}.')


def curves(workdir: str) -> dict[str, Curve]:
  """Test top-1 by source, and under 'mean' their mean, at every evaluated step."""
  found: dict[str, Curve] = {}
  for row in metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl')):
    top1 = {key.split('/')[1]: value for key, value in row.items() if key.startswith('test/') and key.endswith('/top1')}
    if top1:
      for source, value in {**top1, 'mean': float(np.mean(list(top1.values())))}.items():
        found.setdefault(source, []).append((row['step'], value))
  return found


def steps_to(curve: Curve, level: float) -> float:
  """The first step at which a curve reaches a level; infinite if it never does."""
  return next((step for step, value in curve if value >= level), float('inf'))


def table(scratch: Sequence[Mapping[str, Curve]], seeded: Sequence[Mapping[str, Curve]]) -> str:
  """Steps to each level by source, mean over the seeds; 'never' if one of them does not get there."""
  show = lambda steps: f'{steps:.0f}' if np.isfinite(steps) else 'never'
  header = f'{"source":<12}{"top-1":>8}{"scratch":>10}{"seeded":>10}{"ratio":>8}'
  lines = [header, '-' * len(header)]
  for source in scratch[0]:
    final = float(np.mean([run[source][-1][1] for run in scratch]))
    for share in LEVELS:
      # Each run from scratch reaches its own final accuracy, not always the mean's.
      levels = [share * run[source][-1][1] for run in scratch]
      a, b = (
        float(np.mean([steps_to(run[source], level) for run, level in zip(runs, levels, strict=True)]))
        for runs in (scratch, seeded)
      )
      lines.append(f'{source:<12}{share * final:>8.1%}{show(a):>10}{show(b):>10}{b / a:>8.2f}')
    last = float(np.mean([run[source][-1][1] for run in seeded]))
    lines.append(f'{source:<12}{"at the end":>8}{final:>8.1%}{last:>10.1%}')
  return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.first_stage', __doc__)
  to.add_argument('--output', required=True, help='folder for the workdirs')
  to.add_argument('--seeds', type=flags.words, default=['0'], help='seeds, each a pair of runs')
  to.add_argument('--every', type=int, default=100, help='steps between evaluations: the resolution of the table')
  to.add_argument('--steps', type=int, default=0, help="steps of co-training; 0 for the config's own")
  to.add_argument('--variant', default='', help="variant of the configs, e.g. 'debug'")
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  os.makedirs(_OPTIONS.output, exist_ok=True)
  scratch, seeded = [], []
  for seed in _OPTIONS.seeds:
    first, plain, second = (os.path.join(_OPTIONS.output, f'{run}_{seed}') for run in ('first', 'scratch', 'seeded'))
    options = [f'--config.eval_every={_OPTIONS.every}']
    if _OPTIONS.steps:
      options.append(f'--config.total_steps={_OPTIONS.steps}')
    train('pretrain_image', first, seed)
    train('digits_cover', plain, seed, *options)
    train('digits_cover', second, seed, *options, f'--config.init_from.path={first}')
    scratch.append(curves(plain))
    seeded.append(curves(second))
  print(f'\nFirst step with that test top-1; {len(scratch)} seeds, evaluated every {_OPTIONS.every} steps\n')
  print(table(scratch, seeded))


if __name__ == '__main__':
  sys.exit(flags.run(main))
