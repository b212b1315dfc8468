"""Pictures: training curves, confusion matrices, clips with what the model says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')  # machines that train have no screen

import matplotlib.pyplot as plt


def confusion_matrix(confusion_KxK: np.ndarray, class_names: Sequence[str], title: str, path: str) -> None:
  """Draws rows (true class) that sum to 1, and lists the most confused pairs below.

  Args:
    confusion_KxK: counts, true class by predicted class.
    class_names: K names.
    title: above the picture.
    path: PNG to write.
  """
  total_Kx1 = np.maximum(confusion_KxK.sum(axis=1, keepdims=True), 1)
  rate_KxK = confusion_KxK / total_Kx1
  classes = len(class_names)
  side = float(np.clip(0.28 * classes, 4, 14))
  figure, axes = plt.subplots(figsize=(side + 3, side + 2), layout='constrained')
  image = axes.imshow(rate_KxK, vmin=0, vmax=1, cmap='viridis')
  figure.colorbar(image, ax=axes, shrink=0.8, label='share of the true class')
  if classes <= 60:
    axes.set_xticks(range(classes), class_names, rotation=90, fontsize=7)
    axes.set_yticks(range(classes), class_names, fontsize=7)
  axes.set(title=title, ylabel='true')
  off_KxK = np.where(np.eye(classes, dtype=bool), 0, confusion_KxK)
  worst = [divmod(int(i), classes) for i in np.argsort(-off_KxK, axis=None, kind='stable')[:5]]
  lines = [f'{class_names[t]} → {class_names[p]}: {off_KxK[t, p]}' for t, p in worst if off_KxK[t, p]]
  axes.set_xlabel('predicted\n\nmost confused (true → predicted: times)\n' + '\n'.join(lines), fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def training_curves(rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws loss and top-1 of every source against the step.

  Args:
    rows: lines of `metrics.jsonl`: 'train/<stream>/<source>/<measure>' and 'test/<source>/<measure>'.
    path: PNG to write.
  """
  series: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    for key, value in row.items():
      if isinstance(value, int | float):
        series.setdefault(key, []).append((row['step'], value))
  figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout='constrained')
  colours: dict[str, str] = {}
  for key, points in series.items():
    parts = key.split('/')
    steps, values = zip(*points, strict=True)
    source = parts[-2] if len(parts) > 2 else ''
    colour = colours.setdefault(source, f'C{len(colours)}')
    if parts[0] == 'train' and len(parts) == 4 and parts[3] == 'loss':
      left.plot(steps, values, label=source, color=colour)
    elif parts[0] == 'train' and len(parts) == 4 and parts[3] == 'top1':
      middle.plot(steps, values, label=source, color=colour)
    elif parts[0] == 'test' and parts[2] == 'top1':
      middle.plot(steps, values, 'o', color=colour, markeredgecolor='black')
    elif key == 'learning_rate':
      right.plot(steps, values, color='black', label='learning rate')
    elif key == 'train/gradient_norm':
      right.plot(steps, np.asarray(values) * 1e-3, color='grey', alpha=0.6, label='gradient norm / 1000')
  left.set(title='training loss', xlabel='step')
  middle.set(title='top-1: line in training, dot on test', xlabel='step', ylim=(0, 1))
  right.set(title='optimizer', xlabel='step')
  for axes in (left, middle, right):
    axes.grid(alpha=0.3)
    if axes.has_data():
      axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def predictions(examples: Sequence[Mapping[str, Any]], path: str) -> None:
  """Draws one clip a row as a strip of frames, with the true and the predicted classes.

  Args:
    examples: each with 'clip' uint8 [T, H, W, 3], 'source', 'label' (class name) and 'predicted', a list of
      (class name, probability), best first.
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
    colour = 'darkgreen' if best == example['label'] else 'firebrick'
    lines = [f'{name}  {probability:.0%}' for name, probability in example['predicted'][:2]]
    text = f'{example["source"]}: {example["label"]}\n' + '\n'.join(lines)
    row[columns].text(0, 0.5, text, va='center', fontsize=8, color=colour, transform=row[columns].transAxes)
  figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.08)
  figure.savefig(path, dpi=110)
  plt.close(figure)
