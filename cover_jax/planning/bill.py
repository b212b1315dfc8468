"""What a run costs beside its steps: core hours and disk for its data, hours and the price of a slice."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from cover_jax.planning.report import table
from data_pipelines.sources.sizes import Size

ROUGH = (
  'Training splits of data that is still to be built, as JPEG frames of a short side of 256, from what single clips of '
  'each kind took (docs/datasets.md): take it for half to twice as much.'
)


class Rate(NamedTuple):
  """Of 1,000 videos: CPU minutes of one core, and GB; as measured, at the clips' own frame rate and at 10 a second."""

  minutes: float
  gb: float
  minutes_at_10: float
  gb_at_10: float


# docs/datasets.md, `python -m benchmarks.build_cost`; the middle where two clips differ.
RATES = {
  'kinetics': Rate(7.3, 4.7, 3.9, 1.65),
  'something_something_v2': Rate(1.7, 1.1, 1.3, 0.9),
  'ucf101': Rate(2.3, 2.0, 1.2, 0.8),
  'moments_in_time': Rate(2.5, 1.5, 1.7, 0.5),
  'hmdb51': Rate(1.3, 1.0, 0.8, 0.3),
}


def data(known: Mapping[str, Size], sources: Mapping[str, Mapping[str, Any]], fps: float) -> list[dict[str, Any]]:
  """What building the training split of each source takes.

  Args:
    known: the sources' sizes.
    sources: of the config, for the names of their data sets.
    fps: frames a second that are stored: 0 for the videos' own, or 10.

  Returns:
    {'source', 'core_hours', 'gb'} of each; None where nobody measured it, 0 where it lies here already.
  """
  rows = []
  for name, size in known.items():
    rate = RATES.get(sources[name]['dataset'].split('/')[0].split(':')[0])
    row = {'source': name, 'core_hours': None, 'gb': None}
    if size.origin.startswith('prepared'):
      row |= {'core_hours': 0.0, 'gb': 0.0}
    elif rate:
      thousands = size.num_examples / 1000
      minutes, gb = (rate.minutes_at_10, rate.gb_at_10) if fps else (rate.minutes, rate.gb)
      row |= {'core_hours': thousands * minutes / 60, 'gb': thousands * gb}
    rows.append(row)
  return rows


def data_report(rows: list[dict[str, Any]], fps: float) -> str:
  """The table, with its sum over what is known."""
  show = lambda x: '-' if x is None else f'{x:,.0f}' if x >= 10 else f'{x:.1f}'
  total = {key: sum(row[key] or 0.0 for row in rows) for key in ('core_hours', 'gb')}
  lines = [[row['source'], show(row['core_hours']), show(row['gb'])] for row in [*rows, {'source': 'in all', **total}]]
  rate = f'at {fps:g} frames a second' if fps else "at the videos' own rate"
  return f'{table([f"data, {rate}", "core hours to build", "GB"], lines)}\n\n{ROUGH}\n'


def slice_price(result: Mapping[str, Any], dollars: float | None) -> dict[str, float]:
  """{'chip_hours', 'dollars'} of a whole run on a slice by the estimate of its steps; {} where there is none.

  Args:
    result: of `cover_jax.plan.plan`.
    dollars: for a chip and an hour; None: no price.
  """
  if 'time' not in result:
    return {}
  hours = 24 * result['time']['days'] * math.prod(result['mesh'].values())
  return {'chip_hours': hours} | ({} if dollars is None else {'dollars': hours * dollars})


def price_report(price: Mapping[str, float]) -> str:
  """One sentence."""
  if not price:
    return ''
  cost = f', {price["dollars"]:,.0f} dollars' if 'dollars' in price else ''
  return (
    f'The whole run: {price["chip_hours"]:,.1f} chip hours{cost}, if nothing overlaps and nothing waits for data; '
    'evaluation and restarts come on top.\n'
  )
