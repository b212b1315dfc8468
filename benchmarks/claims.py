"""CoVeR's claims in miniature: does co-training win on the embedded data, by how much, and is it real?

    python -m benchmarks.claims --output=DIR [--doc=docs/lab/claims.md] [--seeds=0,1,2,3,4] [--workers=2] [--quick]

Runs every training of the study (`claims_runs.py`, on configs/claims_digits.py) in memory, without TensorFlow: first
each arm with each learning rate of a grid, and beyond where the best is at its end, on a seed of the search, judged on
the validation split; then with the best one on the seeds that count, judged on the test split. What is finished is
a line of `cells.jsonl` in DIR (with --doc: beside the document), so the same command goes on where it was stopped; so
does another machine that has the file. Weights and compiled programs lie in DIR and may be deleted.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from multiprocessing import connection
from typing import Any

from benchmarks import claims_report, claims_runs
from benchmarks.claims_runs import LEARNING_RATES, Run
from benchmarks.claims_study import Cell, Results, Study, append, read, ready, start_cell, weights_path
from configs import claims_digits
from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed


SEARCH_SEEDS = (100,)
STEPS, FINETUNING_STEPS = 2400, 300
QUICK_STEPS, QUICK_FINETUNING_STEPS = 600, 100


@functools.cache
def _drawn(source: str, split: str):
  from benchmarks import in_memory

  return in_memory.draw(source, split)


def _start_worker(folder: str, cores: Any = None) -> None:
  """Prepares a process to train; `cores` is a queue with the numbers of those that are still free."""
  if cores is not None:
    # Before XLA counts the cores: with a thread for each of them in every worker, a step takes a quarter longer.
    os.sched_setaffinity(0, {cores.get()})
  if parent := multiprocessing.parent_process():

    def follow() -> None:  # a worker of a killed command would go on, and then wait for ever
      connection.wait([parent.sentinel])
      os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

  # Seeds share their programs, so most of them are compiled once.
  import jax

  jax.config.update('jax_compilation_cache_dir', os.path.join(folder, 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def train_cell(run: Run, cell: Cell, start: str, keep: str, split: str) -> dict[str, Any]:
  """Trains one run in this process and judges it.

  Args:
    run: what to train.
    cell: its seed and learning rates.
    start: file of the weights to start from; '' for random ones.
    keep: file for the weights; '' for none.
    split: which it is judged on.

  Returns:
    The cell's line: top-1 of each source under the name of the split, the mean loss of the last 20 steps, seconds and
    device. A search that diverges has a top-1 of 0 and no loss.

  Raises:
    in_memory.Diverged: if a run that counts does.
  """
  import jax

  from benchmarks import in_memory

  begin = time.monotonic()
  config = run.config(cell.learning_rate)
  config.init_from.path = start
  sources = [in_memory.make_source(s, c, _drawn(s, 'train'), cell.seed) for s, c in config.sources.items()]
  about = {
    **dataclasses.asdict(cell),
    'steps': run.steps,
    'examples': {source.name: source.num_examples for source in sources},
    'device': f'{jax.devices()[0].device_kind} ({platform.machine()})',
  }
  try:
    trained = in_memory.train(config, sources, cell.seed)
  except in_memory.Diverged:
    if split == 'test':
      raise
    return about | {split: dict.fromkeys(run.sources, 0.0), 'loss': None, 'seconds': time.monotonic() - begin}
  whole = claims_digits.make(run.sources, dict.fromkeys(run.shares, 1.0)).sources
  judged = [in_memory.make_source(s, c, _drawn(s, split)) for s, c in whole.items()]
  top1 = in_memory.make_top1(trained.experiment, trained.mesh, judged)(trained.state.params)
  if keep:
    os.makedirs(os.path.dirname(keep), exist_ok=True)
    in_memory.save(keep, trained.experiment, trained.state)
  last = trained.losses[-20:]
  loss = {stream: sum(row[stream] for row in last) / len(last) for stream in last[0]}
  return about | {split: top1, 'loss': loss, 'seconds': round(time.monotonic() - begin, 1)}


def execute(study: Study, results: Results, cells_path: str, folder: str) -> None:
  """Runs what is left, several cells at a time, and says how long the rest will take."""
  begin, spent = time.monotonic(), 0.0
  context, cores = multiprocessing.get_context('spawn'), None
  if _OPTIONS.workers > 1 and hasattr(os, 'sched_setaffinity'):
    cores, mine = context.Queue(), sorted(os.sched_getaffinity(0))
    for worker in range(_OPTIONS.workers):
      cores.put(mine[worker % len(mine)])
  with futures.ProcessPoolExecutor(_OPTIONS.workers, context, _start_worker, (folder, cores)) as pool:
    running: dict[futures.Future, Cell] = {}
    while True:
      late = _OPTIONS.minutes and time.monotonic() - begin > 60 * _OPTIONS.minutes
      for cell in [] if late else ready(study, results, folder):
        if len(running) == _OPTIONS.workers:
          break
        if cell not in running.values():
          running[_submit(pool, study, cell, folder)] = cell
      if not running:
        return
      for done in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
        cell, row = running.pop(done), done.result()
        if cell not in results:
          results[cell] = {**row, 'fingerprint': study.fingerprints[cell.run]}
          append(cells_path, results[cell])
        spent += study.runs[cell.run].cost
        left = study.left(results)
        minutes = left / spent * (time.monotonic() - begin) / 60
        split = _split(study, cell)
        top1 = ' '.join(f'{source} {value:.1%}' for source, value in row[split].items())
        print(
          f'{1 - left / study.whole(results):5.1%} done, {minutes:.0f} min left · {cell.run}, seed {cell.seed}, '
          f'rate {cell.learning_rate:g}: {split} {top1} ({row["seconds"]:.0f} s)',
          flush=True,
        )


def _submit(pool: futures.Executor, study: Study, cell: Cell, folder: str) -> futures.Future:
  start = start_cell(study, cell)
  is_start = any(run.start == cell.run for run in study.runs.values())
  return pool.submit(
    train_cell,
    study.runs[cell.run],
    cell,
    weights_path(folder, study, start) if start else '',
    weights_path(folder, study, cell) if is_start else '',
    _split(study, cell),
  )


def _split(study: Study, cell: Cell) -> str:
  """What a cell is judged on: the test split is never looked at by the search."""
  return 'test' if cell.seed in study.seeds else 'validation'


def again(study: Study, results: Results, names: Sequence[str], changes: Mapping[str, Any], folder: str) -> None:
  """Trains runs again, with the rates that the search chose, and prints them beside what is recorded.

  Args:
    study: they are of.
    results: what is recorded.
    names: of the runs.
    changes: dotted keys of their configs, and of those they start from, and values. With any, the runs are judged on
      the validation split with the seeds of the search: an idea can be tried without a look at the test split.
    folder: for weights.

  Raises:
    UserError: if a run is unknown or its search not over, or a key is not in its config.
  """
  if unknown := sorted(set(names) - set(study.runs)):
    close = [c for name in unknown for c in difflib.get_close_matches(name, study.runs)]
    raise UserError(
      f'--rerun has {", ".join(unknown)}: expected some of '
      + (f'{", ".join(close)}, ...' if close else ', '.join(study.runs))
      + ' (names with > in quotes).'
    )
  if missing := sorted(name for name in names if study.rate(name, results) is None):
    raise UserError(
      f'--rerun has {", ".join(missing)}, whose search is not over: run the study first, or give its --doc.'
    )
  seeds, split = (study.search_seeds, 'validation') if changes else (study.seeds, 'test')
  changed = lambda run: dataclasses.replace(run, changes={**run.changes, **changes})
  for run in map(study.runs.get, names):
    try:
      changed(run).config(0.0)
    except (KeyError, TypeError) as error:
      raise UserError(f'--try does not fit the config of {run.name}: {error}.') from error
  for seed in seeds:
    for name in names:
      start, file = study.runs[name].start, ''
      if start:
        first = Cell(start, seed, study.rate(start, results), None)
        file = weights_path(os.path.join(folder, 'again'), study, first)
        train_cell(changed(study.runs[start]), first, '', file, 'validation')
      cell = Cell(name, seed, study.rate(name, results), study.rate(start, results) if start else None)
      row = train_cell(changed(study.runs[name]), cell, file, '', split)
      for source, top1 in row[split].items():
        was = [results[cell][split][source]] if cell in results else []
        others = [r[split][source] for c, r in results.items() if c.run == name and split == 'test' and split in r]
        print(
          f'{name}, {source}, seed {seed}: {split} {100 * top1:.1f}; recorded: '
          + (', '.join(f'{100 * value:.1f}' for value in was) or 'nothing')
          + (f', of all seeds {", ".join(f"{100 * value:.1f}" for value in others)}' if others else ''),
          flush=True,
        )


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.claims', __doc__)
  to.add_argument('--output', required=True, help='folder for weights, compiled programs and, without --doc, results')
  to.add_argument('--doc', default='', help='Markdown file to write the tables to; cells and pictures go beside it')
  to.add_argument('--seeds', type=flags.words, default=['0', '1', '2', '3', '4'], help='seeds of the runs that count')
  to.add_argument(
    '--workers',
    type=int,
    default=os.cpu_count() or 1,
    help='runs at a time, each on one core; 1 on a GPU',
  )
  to.add_argument('--minutes', type=float, default=0.0, help='start no further run after so long; 0: until all is done')
  to.add_argument(
    '--rerun',
    type=flags.words,
    default=[],
    help='only train these runs again and print them beside what is recorded',
  )
  to.add_argument(
    '--try',
    dest='changes',
    default='',
    help='with --rerun: changes of its config, such as {"model.width": 96}; judged on the validation split',
  )
  to.add_argument(
    '--quick',
    action='store_true',
    help='a small study: short runs, two seeds, no search, no sweep, no longer runs',
  )
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  steps, finetuning_steps = (QUICK_STEPS, QUICK_FINETUNING_STEPS) if _OPTIONS.quick else (STEPS, FINETUNING_STEPS)
  try:
    seeds = tuple(int(seed) for seed in _OPTIONS.seeds)
  except ValueError as error:
    raise UserError(f'--seeds is {",".join(_OPTIONS.seeds)}: expected whole numbers, such as 0,1,2.') from error
  try:
    changes = json.loads(_OPTIONS.changes or '{}')
    if not isinstance(changes, dict):
      raise ValueError('it is no object')
  except ValueError as error:
    raise UserError(f'--try is {_OPTIONS.changes!r}: expected JSON such as {{"model.width": 96}}: {error}.') from error
  if changes and not _OPTIONS.rerun:
    raise UserError('--try needs --rerun: name the runs to change.')
  if clash := set(seeds) & set(SEARCH_SEEDS):
    raise UserError(f'--seeds has {sorted(clash)}, which the search uses: take others.')
  study = Study(
    claims_runs.study(steps, finetuning_steps, whole=not _OPTIONS.quick),
    seeds[:2] if _OPTIONS.quick else seeds,
    SEARCH_SEEDS,
    LEARNING_RATES[1:2] if _OPTIONS.quick else LEARNING_RATES,
  )
  os.makedirs(_OPTIONS.output, exist_ok=True)
  files = os.path.splitext(_OPTIONS.doc)[0] if _OPTIONS.doc else os.path.join(_OPTIONS.output, 'cells')
  cells_path = files + '.jsonl'
  results = read(cells_path, study)
  if _OPTIONS.workers > 1:  # one core each, which the workers inherit; sums in the same order when a run is repeated
    single = '--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {single}'
  if _OPTIONS.rerun:
    if _OPTIONS.workers > 1 and hasattr(os, 'sched_setaffinity'):  # as a worker
      os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    _start_worker(_OPTIONS.output)
    return again(study, results, _OPTIONS.rerun, changes, _OPTIONS.output)
  execute(study, results, cells_path, _OPTIONS.output)
  final = [results[cell] for cell in study.cells(results) if cell in results and cell.seed in study.seeds]
  searched = {name: study.rate(name, results) for name, run in study.runs.items() if not run.rate_of}
  done = 1 - study.left(results) / study.whole(results)
  print('\n' + claims_report.write(files, _OPTIONS.doc, final, searched, list(results.values()), done))


if __name__ == '__main__':
  sys.exit(flags.run(main))
