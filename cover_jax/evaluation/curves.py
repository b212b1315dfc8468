"""Training curves as SVG within a page."""

import html
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Okabe and Ito's colours, which those who see fewer tell apart; beyond them lines are dashed.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6d31', '#777777')
_DASHES = ('', '7 3', '2 3')
_MOST_POINTS = 300  # of a line
_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE, _RIGHT = 460, 240, 62, 30, 10, 12


class Line(NamedTuple):
  """(step, value) of one measure, in the order of steps; `dots`: drawn as dots."""

  name: str
  points: list[tuple[int, float]]
  dots: bool = False


class Panel(NamedTuple):
  """What one picture shows."""

  title: str
  lines: list[Line]


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
  """The pictures of a run, each with one axis; those that would be empty are left out.

  Args:
    rows: lines of `metrics.jsonl`: 'train/<stream>/<source>/<measure>' and 'test/<source>/<measure>'. Of several values
      for a step the last counts; what is no finite number is left out.
  """
  series: dict[str, dict[int, float]] = {}
  for row in rows:
    for key, value in row.items():
      if type(value) in (int, float) and abs(value) <= sys.float_info.max:
        series.setdefault(key, {})[row['step']] = value
  loss, top1, tests, rate, norm = [], [], [], [], []
  for key, values in series.items():
    parts, points = key.split('/'), sorted(values.items())
    if parts[0] == 'train' and len(parts) == 4 and parts[3] == 'loss':
      loss.append(Line('/'.join(parts[1:3]), points))
    elif parts[0] == 'train' and len(parts) == 4 and parts[3] == 'top1':
      top1.append(Line('/'.join(parts[1:3]), points))
    elif parts[0] == 'test' and len(parts) == 3 and parts[2] in ('top1', 'mAP'):
      tests.append(Line(parts[1] + ' (mAP)' * (parts[2] == 'mAP'), points, dots=True))
    elif key == 'learning_rate':
      rate.append(Line('learning rate', points))
    elif key == 'train/gradient_norm':
      norm.append(Line('gradient norm', points))
  found = [
    Panel('Loss in training', loss),
    Panel('Top-1 in training', top1),
    Panel('Top-1 on the test split', tests),
    Panel('Learning rate', rate),
    Panel('Norm of the gradient', norm),
  ]
  return [panel for panel in found if panel.lines]


def svg(panel: Panel) -> str:
  """A panel as a figure: an SVG whose lines have tooltips, and a legend where there are several."""
  xs = [x for line in panel.lines for x, _ in line.points]
  ys = [y for line in panel.lines for _, y in line.points]
  x_ticks, y_ticks = _ticks(0, max(max(xs), 1), whole=True), _ticks(min(0.0, *ys), max(ys))
  across = lambda x: _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
  up = lambda y: _HEIGHT - _BELOW - (_HEIGHT - _BELOW - _ABOVE) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
  parts = [
    f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
    f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>'
    for y in y_ticks
  ]
  parts += [f'<text x="{across(x):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{x:g}</text>' for x in x_ticks]
  legend = []
  for i, line in enumerate(panel.lines):
    colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
    points = [(across(x), up(y)) for x, y in _thinned(line.points)]
    name = html.escape(line.name)
    if line.dots or len(points) == 1:
      drawn = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points)
    else:
      path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
      drawn = f'<polyline points="{path}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
    last = line.points[-1]
    parts.append(f'<g><title>{name}: {last[1]:.6g} at step {last[0]}</title>{drawn}</g>')
    mark = '<svg class="mark" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" x2="24" y1="4" y2="4" ' + (
      f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )
    legend.append(f'<li>{mark}{name}: {last[1]:.4g}</li>')
  title = html.escape(panel.title)
  return (
    f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="{title} against the step">{"".join(parts)}</svg><ul class="legend">{"".join(legend)}</ul></figure>'
  )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
  """At most so many points as can be seen, the first and the last among them."""
  if len(points) <= _MOST_POINTS:
    return points
  step = (len(points) - 1) / (_MOST_POINTS - 1)
  return [points[round(i * step)] for i in range(_MOST_POINTS)]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
  """Three to seven round numbers, the first at most `low`, the last at least `high`."""
  if high <= low:  # in a double, anything above 1e-300 has room around it
    low, high = low - max(abs(low), 1e-3) * 0.5, high + max(abs(high), 1e-3) * 0.5
  rough = (high - low) / 5 or high / 5
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= rough * 0.999)
  step = max(round(step), 1) if whole else step
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, max(last, first + 1) + 1)]
