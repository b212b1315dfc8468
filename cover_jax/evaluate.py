"""Evaluation: all sources of one model in one table, each example counted exactly once."""

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cover_jax import sharding
from cover_jax.experiment import Experiment
from cover_jax.models.heads import Heads, cross_entropy, head_columns, rank_of_label
from data_pipelines.contract import SubBatch, UserError

# {source: () -> this process's batches of its test split}; see `data_pipelines/contract.py`.
TestSets = Mapping[str, Callable[[], Iterator[SubBatch]]]


@dataclasses.dataclass(frozen=True)
class SourceResult:
  """What one head does on its own source's test split.

  Attributes:
    confusion_KxK: int64, true class by predicted class. Everything but the loss and top-5 follows from it.
    loss: mean cross-entropy.
    top5: fraction in [0, 1].
    protocol: what a number means: frames, size, views.
  """

  confusion_KxK: np.ndarray
  loss: float
  top5: float
  protocol: str

  @property
  def examples(self) -> int:
    return int(self.confusion_KxK.sum())

  @property
  def top1(self) -> float:
    return float(np.trace(self.confusion_KxK) / max(self.examples, 1))

  @property
  def class_accuracy_K(self) -> np.ndarray:
    """Top-1 of each class; NaN for a class without examples."""
    total_K = self.confusion_KxK.sum(axis=1)
    return np.divide(np.diag(self.confusion_KxK), total_K, where=total_K > 0, out=np.full(len(total_K), np.nan))

  def summary(self) -> dict[str, Any]:
    classes = len(self.confusion_KxK)
    return {
      'top1': self.top1,
      'top5': self.top5,
      'mean_class_accuracy': float(np.nanmean(self.class_accuracy_K)),
      'loss': self.loss,
      'examples': self.examples,
      'classes': classes,
      'chance': 1.0 / classes,
      'protocol': self.protocol,
    }


def make_evaluate(experiment: Experiment, test_sets: TestSets, mesh: Mesh) -> Callable[[Any], dict[str, SourceResult]]:
  """Makes `evaluate(params) -> {source: result}`, which runs every test set through its own source's head.

  Args:
    experiment: the run.
    test_sets: the data.
    mesh: the devices.

  Returns:
    A function of the run's parameters (raw or averaged, on the mesh), compiled once a source; its results are
    the same on every process. It raises UserError for a test set without a labelled example.
  """
  steps = {name: _eval_step(experiment, name) for name in test_sets}

  def evaluate(params: Any) -> dict[str, SourceResult]:
    return {name: _run(name, params) for name in test_sets}

  def _run(name, params):
    totals = _zero_totals(len(experiment.sources[experiment.source_id(name)].class_names))
    with sharding.use(mesh, experiment.config.logical_axis_rules):
      for batch in test_sets[name]():
        totals = steps[name](params, sharding.to_global(batch, mesh), totals)
    totals = jax.device_get(totals)
    count = int(totals['confusion'].sum())
    if count == 0:
      raise UserError(f'config.sources.{name}.test holds no labelled example: nothing to evaluate.')
    stream = experiment.stream_of(name)
    frames = f'{stream.num_frames} frame' + 's' * (stream.num_frames > 1)
    height, width = stream.size
    return SourceResult(
      confusion_KxK=totals['confusion'].astype(np.int64),
      loss=float(totals['loss']) / count,
      top5=float(totals['top5']) / count,
      protocol=f'1 clip x 1 crop, {frames}, {height}x{width}',
    )

  return evaluate


def _zero_totals(classes: int) -> dict[str, np.ndarray]:
  return {
    'loss': np.zeros((), np.float32),
    'top5': np.zeros((), np.int32),
    'confusion': np.zeros((classes, classes), np.int32),
  }


def _eval_step(experiment: Experiment, name: str) -> Callable[[Any, Any, Any], Any]:
  """One jitted pass: adds a batch to the totals, leaving padding out."""
  source = experiment.sources[experiment.source_id(name)]
  heads = Heads(((name, len(source.class_names)),))
  columns = head_columns(heads.class_counts, [s.name for s in experiment.sources])

  @jax.jit
  def step(params, batch, totals):
    tokens_BxSxD = experiment.encode(params['encoder'], batch['clip'])
    logits_BxK = heads.apply({'params': params['heads']}, tokens_BxSxD[:, 0])
    label_B, source_B = batch['label'], batch['source']
    counted_B = batch['mask'] & (label_B >= 0)
    loss_B = cross_entropy(logits_BxK, label_B, source_B, columns)
    rank_B = rank_of_label(logits_BxK, label_B, source_B, columns)
    predicted_B = jnp.argmax(logits_BxK, axis=-1)
    return {
      'loss': totals['loss'] + jnp.sum(loss_B, where=counted_B),
      'top5': totals['top5'] + jnp.sum((rank_B < 5) & counted_B),
      'confusion': totals['confusion'].at[label_B, predicted_B].add(counted_B.astype(jnp.int32)),
    }

  return step


def predict(experiment: Experiment, params: Any, name: str, clip_BxTxHxWx3: Any) -> jax.Array:
  """Class probabilities f32 [B, K] of clips (uint8 [B, T, H, W, 3]) under one source's head."""
  source = experiment.sources[experiment.source_id(name)]
  heads = Heads(((name, len(source.class_names)),))

  @jax.jit
  def run(params, clip):
    tokens_BxSxD = experiment.encode(params['encoder'], clip)
    return jax.nn.softmax(heads.apply({'params': params['heads']}, tokens_BxSxD[:, 0]))

  return run(params, clip_BxTxHxWx3)


def table(results: Mapping[str, SourceResult]) -> str:
  """The results as text, one source a line."""
  header = f'{"source":<16}{"top-1":>8}{"top-5":>8}{"class acc":>11}{"chance":>8}{"loss":>8}  examples  protocol'
  lines = [header, '-' * len(header)]
  for name, result in results.items():
    s = result.summary()
    lines.append(
      f'{name:<16}{s["top1"]:>8.1%}{s["top5"]:>8.1%}{s["mean_class_accuracy"]:>11.1%}{s["chance"]:>8.1%}'
      f'{s["loss"]:>8.3f}  {s["examples"]:>8}  {s["protocol"]}'
    )
  return '\n'.join(lines)


def scalars(results: Mapping[str, SourceResult]) -> dict[str, float]:
  """The results as metrics: 'test/<source>/<measure>'."""
  measures = ('top1', 'top5', 'mean_class_accuracy', 'loss')
  return {f'test/{name}/{m}': r.summary()[m] for name, r in results.items() for m in measures}


def write_report(
  results: Mapping[str, SourceResult], experiment: Experiment, folder: str, *, about: Mapping[str, Any]
) -> str:
  """Writes `report.json`, `per_class_<source>.csv` and `confusion_<source>.png` into a folder.

  Args:
    results: of `evaluate`.
    experiment: the run.
    folder: made if it is missing.
    about: step, checkpoint and which parameters; goes into the JSON.

  Returns:
    The path of the JSON.
  """
  from cover_jax import visualise  # matplotlib, which training itself does not need

  os.makedirs(folder, exist_ok=True)
  for name, result in results.items():
    class_names = experiment.sources[experiment.source_id(name)].class_names
    with open(os.path.join(folder, f'per_class_{name}.csv'), 'w', newline='', encoding='utf-8') as f:
      rows = csv.writer(f)
      rows.writerow(['class', 'examples', 'correct', 'accuracy', 'most confused with'])
      for k, class_name in enumerate(class_names):
        row_K = result.confusion_KxK[k]
        others_K = np.where(np.arange(len(row_K)) == k, 0, row_K)
        worst = class_names[int(np.argmax(others_K))] if others_K.any() else ''
        accuracy = f'{row_K[k] / row_K.sum():.4f}' if row_K.any() else ''
        rows.writerow([class_name, int(row_K.sum()), int(row_K[k]), accuracy, worst])
    visualise.confusion_matrix(
      result.confusion_KxK,
      class_names,
      f'{name}: top-1 {result.top1:.1%}',
      os.path.join(folder, f'confusion_{name}.png'),
    )
  path = os.path.join(folder, 'report.json')
  with open(path, 'w', encoding='utf-8') as f:
    json.dump({**about, 'sources': {name: r.summary() for name, r in results.items()}}, f, indent=2)
    f.write('\n')
  return path
