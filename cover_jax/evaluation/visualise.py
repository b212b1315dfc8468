"""Pictures: training curves, confusion matrices, clips with what the model says of them."""

import collections
import io
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import logging

from cover_jax.training.metrics import TOP1
from data_pipelines import durable
from data_pipelines.contract import UserError
from data_pipelines.media import still_images

matplotlib.use('Agg')  # machines that train have no screen

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

# Names of classes, sources and files are drawn as they are: a '$' is a '$'.
matplotlib.rcParams.update({'text.parse_math': False, 'text.usetex': False})

_TITLE = 100  # characters of a title


def each(pictures: Mapping[str, Callable[[], Any]]) -> None:
  """Draws pictures (or does other last things), each even where another fails; then raises what went wrong.

  Args:
    pictures: {name: draws it}.
  """
  failed = {}
  for name, draw in pictures.items():
    try:
      draw()
    except Exception as error:
      logging.error('%s could not be made: %s: %s', name, type(error).__name__, error)
      failed[name] = error
  if failed:
    # A mistake of ours says more than a full disk.
    raise min(failed.values(), key=lambda error: isinstance(error, OSError | UserError))


def _save(figure: plt.Figure, path: str, dpi: int = 110, **options: Any) -> None:
  """Renders first: a kill leaves the whole picture, or the one before."""
  rendered = io.BytesIO()
  figure.savefig(rendered, dpi=dpi, format='png', **options)
  plt.close(figure)
  durable.write(path, rendered.getvalue())


def confusion_matrix(
  confusion_KxK: np.ndarray,
  class_names: Sequence[str],
  pairs: Sequence[tuple[int, int, int]],
  title: str,
  path: str,
  most: int = 50,
) -> None:
  """Draws rows (true class) that sum to 1, and beside them the most confused pairs.

  Args:
    confusion_KxK: counts, true class by predicted class.
    class_names: K names.
    pairs: (true class, predicted class, times), most often first.
    title: above the picture.
    path: PNG to write.
    most: classes that are drawn with their names. Of more, the picture shows all of them small and, enlarged, those of
      the most confused pairs.
  """
  rate_KxK = confusion_KxK / np.maximum(confusion_KxK.sum(axis=1, keepdims=True), 1)
  classes = len(class_names)
  everything = np.arange(classes)
  some = everything
  if classes > most:
    of_pairs = dict.fromkeys(k for true, predicted, _ in pairs for k in (true, predicted))
    some = np.sort(list(of_pairs)[:most]).astype(int)
  side = float(np.clip(0.24 * len(some), 4, 11))
  panels = [(side, some)] if classes <= most else [(side, everything), (side, some)]
  panels = [(width, shown) for width, shown in panels if len(shown)]
  widths = [width + 2 for width, _ in panels] + [6]
  figure, grid = plt.subplots(
    1, len(widths), figsize=(sum(widths), side + 2.5), width_ratios=widths, squeeze=False, layout='constrained'
  )
  for axes, (_, shown) in zip(grid[0], panels, strict=False):
    image = axes.imshow(rate_KxK[np.ix_(shown, shown)], vmin=0, vmax=1, cmap='viridis', interpolation='nearest')
    axes.set(ylabel='true', xlabel='predicted', title=_drawn(title, _TITLE))
    if shown is everything and classes > most:
      axes.set_title(f'{_drawn(title, _TITLE)}, all {classes} classes')
      continue
    if shown is not everything:
      axes.set_title(f'the {len(shown)} classes of the most confused pairs')
    names = [_drawn(class_names[k]) for k in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
  figure.colorbar(image, ax=list(grid[0, :-1]), shrink=0.7, label='share of the true class')
  bars = grid[0, -1]
  bars.barh(range(len(pairs)), [times for _, _, times in pairs], color='firebrick')
  labels = [f'{_drawn(class_names[t])} → {_drawn(class_names[p])}' for t, p, _ in pairs]
  bars.set_yticks(range(len(pairs)), labels, fontsize=7)
  bars.invert_yaxis()
  bars.set(title='most confused (true → predicted)', xlabel='times')
  _save(figure, path)


def precision_recall(curves: Mapping[str, Any], title: str, path: str) -> None:
  """Draws precision against recall.

  Args:
    curves: {name of a class: its `average_precision.Curve`}.
    title: above the picture.
    path: PNG to write.
  """
  figure, axes = plt.subplots(figsize=(7, 5), layout='constrained')
  for name, curve in curves.items():
    axes.step(curve.recall_S, curve.precision_S, where='pre', label=_drawn(name, 40))
  axes.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02), title=_drawn(title, _TITLE))
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  _save(figure, path)


def _drawn(name: str, most: int = 32) -> str:
  """A name of the user's as it is drawn: in one line, cut in its middle, of characters that fonts may have."""
  # Bytes of a file name that are no text; line breaks and other control characters.
  name = ''.join(c if c.isprintable() else ' ' for c in name.encode('utf-8', 'replace').decode())
  # Long names differ at their ends: 'Pushing something from left to right', 'Pushing something from right to left'.
  name = name if len(name) <= most else f'{name[: most // 2 - 1]}…{name[-(most // 2) :]}'
  return f' {name}' if name.startswith('_') else name  # matplotlib leaves such a label out of legends


def training_curves(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws loss and top-1 (on the test split of several labels: mAP) of every source against the step.

  Args:
    rows: lines of `metrics.jsonl`: 'train/<stream>/<source>/<measure>' and 'test/<source>/<measure>'. Of several values
      for a step the last counts; what is no finite number is left out.
    path: PNG to write.
  """
  series: dict[str, dict[int, float]] = {}
  for row in rows:
    for key, value in row.items():
      if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        series.setdefault(key, {})[row['step']] = value
  figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout='constrained')
  colours: dict[str, str] = {}
  for key, points in series.items():
    parts = key.split('/')
    steps, values = zip(*sorted(points.items()), strict=True)
    source = parts[-2] if len(parts) > 2 else ''
    colour = colours.setdefault(source, f'C{len(colours)}')
    if parts[0] == 'train' and len(parts) == 4 and parts[3] == 'loss':
      left.plot(steps, values, label=_drawn(source), color=colour)
    elif parts[0] == 'train' and len(parts) == 4 and parts[3] in TOP1:
      middle.plot(steps, values, label=_drawn(source), color=colour)
    elif parts[0] == 'test' and len(parts) == 3 and parts[2] in ('top1', 'mAP'):
      middle.plot(steps, values, 'o', color=colour, markeredgecolor='black')
    elif key == 'learning_rate':
      right.plot(steps, values, color='black', label='learning rate')
    elif key == 'train/gradient_norm':
      right.plot(steps, np.asarray(values) * 1e-3, color='grey', alpha=0.6, label='gradient norm / 1000')
  left.set(title='training loss', xlabel='step')
  middle.set(title='top-1: line in training, dot (top-1 or mAP) on test', xlabel='step', ylim=(0, 1))
  right.set(title='optimizer', xlabel='step')
  for axes in (left, middle, right):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8)
  _save(figure, path)


def predictions(examples: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws one clip a row as a strip of frames, with the true and the predicted classes.

  Args:
    examples: each with 'clip' uint8 [T, H, W, 3], 'source', 'label' (class name, or a tuple of any number of them; None
      for an unlabelled example) and 'predicted', a list of (class name, probability), best first.
    path: PNG to write.
  """
  columns = max(len(e['clip']) for e in examples)
  figure, grid = plt.subplots(
    len(examples), columns + 3, figsize=(1.05 * columns + 4.2, 1.1 * len(examples)), squeeze=False
  )
  for row, example in zip(grid, examples, strict=True):
    for axes in row:
      axes.axis('off')
    for axes, frame in zip(row, example['clip'], strict=False):
      axes.imshow(frame)
    best = example['predicted'][0][0]
    label = example['label']
    labels = label if isinstance(label, tuple) else (label,)
    colour = 'black' if label is None else 'darkgreen' if best in labels else 'firebrick'
    lines = [f'{_drawn(name)}  {probability:.0%}' for name, probability in example['predicted'][:2]]
    true = 'no label' if label is None else _drawn(', '.join(labels) or 'none of the classes')
    text = f'{_drawn(example["source"])}: {true}\n' + '\n'.join(lines)
    row[columns].text(0, 0.5, text, va='center', fontsize=8, color=colour, transform=row[columns].transAxes)
  figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.08)
  _save(figure, path)


def timeline(rows: Mapping[str, Sequence[tuple[float, str, float]]], end: float, title: str, path: str) -> None:
  """Draws each head's best class over the time of a video: colour is the class, height its probability.

  Args:
    rows: {head: [(start in seconds, class name, probability), ...]} in time order.
    end: of the video, in seconds.
    title: above the picture.
    path: PNG to write.
  """
  figure, grid = plt.subplots(
    len(rows), figsize=(12, 1.7 * len(rows) + 0.8), sharex=True, squeeze=False, layout='constrained'
  )
  for axes, (head, windows) in zip(grid[:, 0], rows.items(), strict=True):
    starts = [start for start, _, _ in windows]
    # The last window may begin before the one ahead of it ends; each is shown until the next begins.
    edges = [*starts, max(end, starts[-1])]
    names = [name for _, name, _ in windows]
    frequent = [name for name, _ in collections.Counter(names).most_common(9)]
    colours = {name: f'C{i}' for i, name in enumerate(frequent)}
    for name in [*frequent, None]:
      heights = [p if n == name or (name is None and n not in colours) else 0.0 for _, n, p in windows]
      if any(heights):
        shown = 'others' if name is None else _drawn(name)
        axes.stairs(heights, edges, fill=True, color=colours.get(name, 'lightgrey'), label=shown)
    axes.set(ylabel=_drawn(head, 24), ylim=(0, 1), xlim=(0, end or 1.0))
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1.0, 0.5))
  grid[0, 0].set_title(_drawn(title, _TITLE))
  grid[-1, 0].set_xlabel('seconds')
  _save(figure, path)


def attention_maps(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], path: str, most: int = 8) -> None:
  """Draws clips as strips of frames, and below each the same frames under where the model looked.

  Args:
    rows: (title, clip uint8 [T, H, W, 3], heat float [T, rows, columns]) each; brightness is relative to the
      brightest patch of the clip, so frames of a clip can be compared.
    path: PNG to write.
    most: frames to show of a clip.
  """
  columns = min(max(len(clip) for _, clip, _ in rows), most)
  figure, grid = plt.subplots(
    2 * len(rows), columns, figsize=(1.6 * columns + 0.4, 3.6 * len(rows)), squeeze=False, layout='constrained'
  )
  for axes in grid.flat:
    axes.axis('off')
  labels = []
  for i, (title, clip, heat) in enumerate(rows):
    above, below = grid[2 * i : 2 * i + 2]
    label = above[0].text(0, 1.06, _drawn(title, 2 * _TITLE), fontsize=8, transform=above[0].transAxes)
    label.set_in_layout(False)  # or it would widen the first column
    labels.append(label)
    shown = np.unique(np.linspace(0, len(clip) - 1, min(len(clip), columns)).round().astype(int))
    height, width = clip.shape[1:3]
    for column, t in enumerate(shown):
      above[column].imshow(clip[t])
      below[column].imshow(clip[t].mean(axis=-1), cmap='gray', vmin=0, vmax=255)
      below[column].imshow(
        heat[t], vmin=0, vmax=heat.max(), cmap='inferno', alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
      )
  _save(figure, path, bbox_inches='tight', bbox_extra_artists=labels)


def neighbours(rows: Sequence[Sequence[tuple[str, np.ndarray, bool]]], path: str) -> None:
  """Draws videos and, right of each, the videos nearest to it: three frames each, red where the class is another.

  Args:
    rows: (title, clip uint8 [T, H, W, 3], whether the class is the query's) of the query and of its neighbours.
    path: PNG to write.
  """
  columns = max(len(row) for row in rows)
  figure, grid = plt.subplots(
    len(rows), columns, figsize=(2.6 * columns, 1.35 * len(rows) + 0.3), squeeze=False, layout='constrained'
  )
  for axes in grid.flat:
    axes.axis('off')
  for line, row in zip(grid, rows, strict=True):
    for i, (axes, (title, clip, same)) in enumerate(zip(line, row, strict=False)):
      shown = clip[np.unique(np.linspace(0, len(clip) - 1, 3).round().astype(int))]
      gap = ((0, 0), (0, 0), (0, max(clip.shape[2] // 24, 1)), (0, 0))  # so that a frame is seen to end
      axes.imshow(np.concatenate(list(np.pad(shown, gap, constant_values=255)), axis=1))
      colour = 'black' if i == 0 else 'tab:green' if same else 'tab:red'
      axes.set_title(textwrap.fill(_drawn(title, _TITLE), 40), fontsize=6, color=colour)
  _save(figure, path, dpi=130)


def annotate(image_HxWx3: np.ndarray, lines: Sequence[str]) -> np.ndarray:
  """Writes lines of text over the upper left of a picture, on a darkened strip.

  Args:
    image_HxWx3: uint8.
    lines: of text.

  Returns:
    uint8, of the same shape.
  """
  height = len(image_HxWx3)
  size = int(np.clip(0.6 * height / max(len(lines), 8), 7, 28))
  picture = Image.fromarray(image_HxWx3)
  draw = ImageDraw.Draw(picture, 'RGBA')
  text, font = '\n'.join(_drawn(line, _TITLE) for line in lines), still_images.font(size)
  left, top, right, bottom = draw.multiline_textbbox((4, 4), text, font=font, spacing=2)
  draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill=(0, 0, 0, 150))
  draw.multiline_text((4, 4), text, font=font, spacing=2, fill=(255, 255, 255, 255))
  return np.asarray(picture)
