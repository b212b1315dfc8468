"""What the study of CoVeR's claims has to run, in which order, and what of it is done."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import claims_runs
from benchmarks.claims_runs import Run
from configs import claims_digits
from data_pipelines.contract import UserError

_REACH = 4  # how far beyond the ends of the grid the search goes at most, as a factor


@dataclasses.dataclass(frozen=True)
class Cell:
  """One training to be done or done: its result is one line of the file of cells."""

  run: str
  seed: int
  learning_rate: float
  start_rate: float | None  # of the run that it starts from


Results = dict[Cell, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
  """What is to be run: the runs, the seeds that count, those of the search and its learning rates."""

  runs: Mapping[str, Run]
  seeds: tuple[int, ...]
  search_seeds: tuple[int, ...]
  learning_rates: tuple[float, ...]

  @functools.cached_property
  def fingerprints(self) -> dict[str, str]:
    """Of each run."""
    return {name: claims_runs.fingerprint(self.runs, name) for name in self.runs}

  def rate(self, name: str, results: Results) -> float | None:
    """The learning rate of a run: the best of the search on the validation split; None if that is not over."""
    name = self.runs[name].rate_of or name
    if len(self.learning_rates) == 1:
      return self.learning_rates[0]
    cells = self._search(name, results)
    return _best(cells, results) if cells and all(cell in results for cell in cells) else None

  def _search(self, name: str, results: Results) -> list[Cell]:
    """The cells of a run's search, as far as known; none yet where the run that it starts from is still searched.

    A best rate at an end of the grid says that the grid was not for this run: the next one beyond, half or double, is
    tried, too, until the best lies between two others or the grid has grown by `_REACH` on that side.
    """
    start = self.runs[name].start
    start_rate = self.rate(start, results) if start else None
    if start and start_rate is None:
      return []
    rates = sorted(self.learning_rates)
    lowest, highest = rates[0] / _REACH, rates[-1] * _REACH
    while True:
      cells = [Cell(name, seed, rate, start_rate) for rate in rates for seed in self.search_seeds]
      if not all(cell in results for cell in cells):
        return cells
      best = _best(cells, results)
      if best == rates[0] > lowest:
        rates = [best / 2, *rates]
      elif best == rates[-1] < highest:
        rates = [*rates, best * 2]
      else:
        return cells

  def cells(self, results: Results) -> list[Cell]:
    """All cells that are known to be wanted by now, in the order in which they are best run."""
    wanted = []
    if len(self.learning_rates) > 1:
      for name, run in self.runs.items():
        if not run.rate_of:
          wanted += self._search(name, results)
    for late in (False, True):  # the sweep and longer runs come last: they take the rates of others
      for seed in self.seeds:
        for name, run in self.runs.items():
          rate, start_rate = self.rate(name, results), self.rate(run.start, results) if run.start else None
          if bool(run.rate_of) == late and rate is not None and (not run.start or start_rate is not None):
            wanted.append(Cell(name, seed, rate, start_rate))
    return wanted

  def whole(self, results: Results) -> float:
    """The cost of all that is known to be wanted by now."""
    return sum(run.cost * (len(self.seeds) + self._searches(name, results)) for name, run in self.runs.items())

  def left(self, results: Results) -> float:
    """The cost of what is not done of it."""
    return self.whole(results) - sum(self.runs[c.run].cost for c in set(self.cells(results)) if c in results)

  def _searches(self, name: str, results: Results) -> int:
    """How many cells a run's search has, at least."""
    if self.runs[name].rate_of or len(self.learning_rates) == 1:
      return 0
    return max(len(self.learning_rates) * len(self.search_seeds), len(self._search(name, results)))


def _best(cells: Sequence[Cell], results: Results) -> float:
  """The rate with the highest score, summed over seeds."""
  scores = collections.defaultdict(float)
  for cell in cells:
    scores[cell.learning_rate] += _score(results[cell]['validation'])
  return max(scores, key=scores.get)


def _score(top1: Mapping[str, float]) -> float:
  """What the search maximises: the mean over the video sources; of a run on images, the images."""
  videos = [value for source, value in top1.items() if source in claims_digits.VIDEOS]
  return sum(videos) / len(videos) if videos else sum(top1.values())


def weights_path(folder: str, study: Study, cell: Cell) -> str:
  name = f'{cell.run.replace("/", "_")}-{cell.seed}-{cell.learning_rate:g}-{study.fingerprints[cell.run]}.flax'
  return os.path.join(folder, 'weights', name)


def start_cell(study: Study, cell: Cell) -> Cell | None:
  """The cell whose weights a cell starts from."""
  start = study.runs[cell.run].start
  return Cell(start, cell.seed, cell.start_rate, None) if start else None


def ready(study: Study, results: Results, folder: str) -> list[Cell]:
  """The cells that can run now, without those that are done; a start whose weights are gone is run again."""
  cells = []
  for cell in study.cells(results):
    if cell in results:
      continue
    start = start_cell(study, cell)
    if start is None or (start in results and os.path.exists(weights_path(folder, study, start))):
      cells.append(cell)
    elif start in results:
      cells.append(start)
  return list(dict.fromkeys(cells))


def read(path: str, study: Study) -> Results:
  """The cells of a file; a last line that was cut off is left out.

  Raises:
    UserError: if one is of a run that there is not, or that was changed since.
  """
  results: Results = {}
  if not os.path.exists(path):
    return results
  with open(path, encoding='utf-8') as f:
    lines = f.read().split('\n')
  for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is no whole line
    row = json.loads(line)
    if row['fingerprint'] != study.fingerprints.get(row['run']):
      raise UserError(
        f'{path}, line {number} is of a run {row["run"]!r} with other settings than that of this study: give another '
        '--output or --doc, or delete the lines of this run.'
      )
    results[Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})] = row
  return results


def append(path: str, row: Mapping[str, Any]) -> None:
  """Adds a line; what a kill left half written goes."""
  if os.path.exists(path):
    with open(path, 'rb+') as f:
      f.truncate(f.read().rfind(b'\n') + 1)
  with open(path, 'a', encoding='utf-8') as f:
    f.write(json.dumps(row) + '\n')
