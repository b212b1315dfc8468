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

_TITLE, _NAME, _AXIS = 100, 44, 60  # characters of a title, of a class name beside clips, of one beside a matrix
_STRIP, _BESIDE = 8, 3  # frames of a strip; frames' width of the text beside it


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
  everything = np.arange(len(class_names))
  if len(everything) <= most:
    panels = [(everything, 'counts; shade: share of the true class', True)]
  else:
    of_pairs = dict.fromkeys(k for true, predicted, _ in pairs for k in (true, predicted))
    some = np.sort(list(of_pairs)[:most]).astype(int)
    panels = [(everything, f'all {len(everything)} classes; shade: share of the true class', False)]
    panels += [(some, f'the {len(some)} classes of the most confused pairs', True)] if len(some) else []
  named = max(len(shown) for shown, _, has_names in panels if has_names) if panels[-1][2] else 0
  side = float(np.clip(0.34 * named, 4.5, 10))
  letters = max((len(_drawn(class_names[k], _AXIS)) for k in panels[-1][0]), default=0) if named else 0
  widths = [side + (0.075 * letters if has_names else 0) + 0.8 for _, _, has_names in panels] + [5.5]
  figure, grid = plt.subplots(
    1, len(widths), figsize=(sum(widths), side + 1.6), width_ratios=widths, squeeze=False, layout='constrained'
  )
  figure.suptitle(_drawn(title, _TITLE))
  for axes, (shown, said, has_names) in zip(grid[0], panels, strict=False):
    _confusion_panel(axes, confusion_KxK, shown, [_drawn(class_names[k], _AXIS) for k in shown] if has_names else [])
    axes.set_title(said, fontsize=9)
  _confused_pairs(grid[0, -1], [(_drawn(class_names[t]), _drawn(class_names[p]), n) for t, p, n in pairs])
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


def _confusion_panel(axes: plt.Axes, confusion_KxK: np.ndarray, shown: np.ndarray, names: Sequence[str]) -> None:
  """Some classes' rows and columns. Names, where given, stand left; below, where they are long, their numbers do."""
  rate_KxK = confusion_KxK / np.maximum(confusion_KxK.sum(axis=1, keepdims=True), 1)
  shade = matplotlib.colors.PowerNorm(0.5, 0, 1)  # a rare confusion is seen
  axes.imshow(rate_KxK[np.ix_(shown, shown)], norm=shade, cmap='Blues', interpolation='nearest')
  axes.set(ylabel='true', xlabel='predicted')
  if not names:
    return
  short = max(map(len, names)) <= 3
  numbers = [str(i) for i in range(1, len(names) + 1)]
  both = [f'{name}  {number}' for name, number in zip(names, numbers, strict=True)]
  axes.set_yticks(range(len(names)), names if short else both, fontsize=8)
  axes.set_xticks(range(len(names)), names if short else numbers, fontsize=8 if len(names) <= 30 else 6)
  if len(names) > 30:
    return
  for i, j in np.ndindex(len(shown), len(shown)):
    if count := confusion_KxK[shown[i], shown[j]]:
      colour = 'white' if rate_KxK[shown[i], shown[j]] > 0.3 else 'black'
      axes.text(j, i, f'{count:.0f}', ha='center', va='center', fontsize=7, color=colour)


def _confused_pairs(axes: plt.Axes, pairs: Sequence[tuple[str, str, int]]) -> None:
  """(true, predicted, times) as bars, each under its names."""
  axes.set_title('most confused: true → predicted, times', fontsize=9)
  axes.axis('off')
  if not pairs:
    axes.text(0, 0.95, 'None: every example is right.', fontsize=9, transform=axes.transAxes)
    return
  axes.barh(range(len(pairs)), [times for _, _, times in pairs], height=0.25, color='firebrick')
  for i, (true, predicted, times) in enumerate(pairs):
    axes.text(0, i - 0.2, f'{true} → {predicted}', fontsize=8, va='bottom')
    axes.text(times, i, f' {times}', fontsize=8, va='center')
  axes.set(ylim=(max(len(pairs), 10) - 0.5, -1), xlim=(0, 1.1 * pairs[0][2]))


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
  figure, ((loss, top1), (rate, norm)) = plt.subplots(2, 2, figsize=(12, 7.5), layout='constrained')
  colours: dict[str, str] = {}
  for key, points in sorted(series.items()):
    parts = key.split('/')
    steps, values = zip(*sorted(points.items()), strict=True)
    source = parts[-2] if len(parts) > 2 else ''
    colour = colours.setdefault(source, f'C{len(colours)}')
    if parts[0] == 'train' and len(parts) == 4 and parts[3] == 'loss':
      loss.plot(steps, values, label=_drawn(source), color=colour)
    elif parts[0] == 'train' and len(parts) == 4 and parts[3] in TOP1:
      top1.plot(steps, values, label=_drawn(source), color=colour)
    elif parts[0] == 'test' and len(parts) == 3 and parts[2] in ('top1', 'mAP'):
      top1.plot(steps, values, 'o', color=colour, markeredgecolor='black')
    elif key == 'learning_rate':
      rate.plot(steps, values, color='black')
    elif key == 'train/gradient_norm':
      norm.plot(steps, values, color='black')
  loss.set(title='loss in training')
  top1.set(title='top-1: lines in training, dots (top-1 or mAP) on the test split', ylim=(0, 1.02))
  rate.set(title='learning rate')
  norm.set(title='norm of the gradient')
  for axes in (loss, top1, rate, norm):
    axes.set_xlabel('step')
    axes.grid(alpha=0.3)
    if axes is not top1 and axes.lines:
      axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8)
  _save(figure, path)


def predictions(examples: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws clips as strips of frames, each with its true and its predicted classes beside it.

  Args:
    examples: each with 'clip' uint8 [T, H, W, 3], 'source', 'label' (class name, or a tuple of any number of them) and
      'predicted', a list of (class name, probability), best first.
    path: PNG to write.
  """
  lines = _packed([min(len(e['clip']), _STRIP) for e in examples])
  width = _STRIP + _BESIDE
  figure = plt.figure(figsize=(1.1 * width, 1.1 * len(lines)))
  for row, line in enumerate(lines):
    for left, number in line:
      example, count = examples[number], min(len(examples[number]['clip']), _STRIP)
      frames = example['clip'][np.linspace(0, len(example['clip']) - 1, count).round().astype(int)]
      at = lambda x, w, row=row: ((x + 0.02) / width, 1 - (row + 0.98) / len(lines), w / width, 0.96 / len(lines))
      for column, frame in enumerate(frames):
        axes = figure.add_axes(at(left + column, 0.96))
        axes.imshow(frame)
        axes.axis('off')
      axes = figure.add_axes(at(left + count + 0.05, _BESIDE - 0.1))
      axes.axis('off')
      text, colour = _answers(example)
      axes.text(0, 0.5, text, va='center', fontsize=8, color=colour, transform=axes.transAxes)
  _save(figure, path)


def _packed(counts: Sequence[int]) -> list[list[tuple[int, int]]]:
  """Lines of (left, number of the clip): as many clips of `counts` frames in a line as have room with their texts."""
  lines: list[list[tuple[int, int]]] = []
  for number, count in enumerate(counts):
    left = lines[-1][-1][0] + counts[lines[-1][-1][1]] + _BESIDE if lines else 0
    if not lines or left + count + _BESIDE > _STRIP + _BESIDE:
      lines.append([(0, number)])
    else:
      lines[-1].append((left, number))
  return lines


def _answers(example: Mapping[str, Any]) -> tuple[str, str]:
  """(text, colour) beside a clip."""
  label = example['label']
  labels = label if isinstance(label, tuple) else (label,)
  right = example['predicted'][0][0] in labels
  said = [f'{_drawn(name, _NAME)}  {probability:.0%}' for name, probability in example['predicted'][:2]]
  said[0] = f'{"✓" if right else "✗"} {said[0]}'
  true = _drawn(', '.join(labels) or 'none of the classes', _NAME)
  return '\n'.join([f'{_drawn(example["source"])}: {true}', *said]), 'darkgreen' if right else 'firebrick'


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
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1.0, 0.5))
  grid[0, 0].set_title(_drawn(title, _TITLE))
  grid[-1, 0].set_xlabel('seconds')
  figure.supylabel('probability of the best class', fontsize=9)
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
    still = len(clip) > 1 and (clip == clip[0]).all()  # a photo, repeated for a head of videos
    clip, heat, shown = (clip[:1], heat.mean(axis=0, keepdims=True), shown[:1]) if still else (clip, heat, shown)
    share = heat / max(float(heat.max()), 1e-12)
    for column, t in enumerate(shown):
      above[column].imshow(clip[t])
      below[column].imshow(clip[t].mean(axis=-1), cmap='gray', vmin=0, vmax=255)
      # What was looked at little stays to be seen. Nearest: patches are what there is.
      below[column].imshow(
        share[t], vmin=0, vmax=1, cmap='autumn', alpha=0.7 * share[t], extent=(-0.5, width - 0.5, height - 0.5, -0.5)
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
