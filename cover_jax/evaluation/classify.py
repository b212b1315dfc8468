"""Evaluation: all sources of one model in one table, each example counted exactly once."""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cover_jax.evaluation import answers as answering
from cover_jax.evaluation import scoring, several_labels
from cover_jax.evaluation.answers import Answers
from cover_jax.evaluation.several_labels import SeveralResult
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.settings import MEASURES
from cover_jax.models.heads import cross_entropy, head_columns, rank_of_label
from cover_jax.runtime import sharding
from data_pipelines import durable, paths
from data_pipelines.contract import SubBatch, TestSet, UserError

REPORT_EVERY = 10.0  # seconds

# {source: its test split}; see `data_pipelines/contract.py`.
TestSets = Mapping[str, TestSet]

# The columns of the table, of every kind of head: (measure, heading, width, form).
_COLUMNS = (
  ('top1', 'top-1', 8, '.1%'),
  ('top5', 'top-5', 8, '.1%'),
  ('mean_class_accuracy', 'class acc', 11, '.1%'),
  ('mAP', 'mAP', 8, '.1%'),
  ('precision_at_1', 'P@1', 8, '.1%'),
  ('precision_at_5', 'P@5', 8, '.1%'),
  ('chance', 'chance', 8, '.1%'),
  ('loss', 'loss', 8, '.3f'),
)


@dataclasses.dataclass(frozen=True)
class SourceResult:
  """What one head does on its own source's test split.

  Attributes:
    confusion_KxK: int64, true class by predicted class. Everything but the loss and top-5 follows from it.
    loss: mean cross-entropy.
    top5_correct: how many examples have their class among the best five.
    protocol: what a number means: views, frames, size.
    missing: examples that the data set should have and lacks.
    missing_wrong: top-1 and top-5 count these as wrong. Loss and class accuracy never do: nobody knows what a model
      would say, nor, from what is there, how many a class lacks.
    fingerprint: of the examples, see `TestSet`.
    answers: to every example; None: not kept.
  """

  confusion_KxK: np.ndarray
  loss: float
  top5_correct: int
  protocol: str
  missing: int = 0
  missing_wrong: bool = False
  fingerprint: str = ''
  answers: Answers | None = None

  @property
  def examples(self) -> int:
    return int(self.confusion_KxK.sum())

  @property
  def expected(self) -> int:
    return self.examples + self.missing

  @property
  def top1(self) -> float:
    return self._share(int(np.trace(self.confusion_KxK)))

  @property
  def top5(self) -> float:
    return self._share(self.top5_correct)

  def _share(self, correct: int) -> float:
    return correct / max(self.expected if self.missing_wrong else self.examples, 1)

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
      'expected': self.expected,
      'missing': 'wrong' if self.missing_wrong else 'leave_out',
      'classes': classes,
      'chance': 1.0 / classes,
      'protocol': self.protocol,
      'data_sha256': self.fingerprint,
    }


Results = Mapping[str, SourceResult | SeveralResult]
CONFUSION = 'confusion'  # of one label: the picture's name, before the source's


class Kind(NamedTuple):
  """How heads of a kind are judged (`SourceInfo.labels`): `several_labels.py` explains each."""

  zero_totals: Callable[[int], Any]
  eval_step: Callable[[Experiment, str, Mesh], Callable[[Any, Any, Any], Any]]
  result: Callable[..., Any]
  write: Callable[..., tuple[dict[str, Any], dict[str, Callable[[], Any]]]]
  samples: Callable[..., list[dict[str, Any]]]
  picture: str


def _kind(experiment: Experiment, name: str) -> Kind:
  if experiment.sources[experiment.source_id(name)].labels == 'several':
    of = several_labels
    return Kind(of.zero_totals, of.eval_step, of.result, of.write, of.samples, of.PICTURE)
  return Kind(_zero_totals, _eval_step, _result, _write, _samples, CONFUSION)


def make_evaluate(experiment: Experiment, test_sets: TestSets, mesh: Mesh) -> Callable[[Any], dict[str, Any]]:
  """Makes `evaluate(params) -> {source: result}`, which runs every test set through its own source's head.

  Args:
    experiment: the run.
    test_sets: the data.
    mesh: the devices.

  Returns:
    A function of the run's parameters (raw or averaged, on the mesh), compiled once a source; its results are
    the same on every process. It raises UserError for a test set without a labelled example.
  """
  steps = {name: _kind(experiment, name).eval_step(experiment, name, mesh) for name in test_sets}

  def evaluate(params: Any) -> dict[str, Any]:
    return {name: _run(name, params) for name in test_sets}

  def _run(name, params):
    # Placed as the step returns them, or it would be traced and compiled a second time.
    kind = _kind(experiment, name)
    zero = kind.zero_totals(len(experiment.sources[experiment.source_id(name)].class_names))
    totals = sharding.put(zero, sharding.replicated(mesh))
    given, waiting = [], None
    with sharding.use(mesh, experiment.config.logical_axis_rules):
      for batch in reported(name, test_sets[name], mesh):
        before = waiting
        totals, waiting = steps[name](params, sharding.to_global(batch, mesh), totals)
        # One batch ahead of the devices, or the report would be of what was only asked.
        given += [jax.device_get(before)] if before is not None else []
    totals, last = jax.device_get((totals, waiting))
    return kind.result(totals, [*given, last], experiment, name, test_sets[name])

  return evaluate


def _result(totals, given, experiment: Experiment, name: str, test_set: TestSet) -> SourceResult:
  count = int(totals['confusion'].sum())
  if count == 0:
    raise UserError(f'config.sources.{name}.test holds no labelled example: nothing to evaluate.')
  return SourceResult(
    confusion_KxK=totals['confusion'].astype(np.int64),
    loss=float(totals['loss']) / count,
    top5_correct=int(totals['top5']),
    protocol=test_set.protocol,
    missing=test_set.missing,
    missing_wrong=experiment.config.eval_missing == 'wrong',
    fingerprint=test_set.fingerprint,
    answers=answering.collect(given),
  )


def reported(name: str, test_set: TestSet, mesh: Mesh) -> Iterator[SubBatch]:
  """The batches of a test set, with a line in the log every `REPORT_EVERY` seconds and at the end.

  Args:
    name: of the source, for the log.
    test_set: the data.
    mesh: the devices.
  """
  parts, done = sharding.data_part(mesh)[1], 0
  begun = last = time.monotonic()
  rate = lambda: done / max(time.monotonic() - begun, 1e-9)
  for batch in test_set.batches():
    yield batch  # comes back when the next one is asked for
    done = min(done + parts * len(batch['mask']), test_set.examples)
    if time.monotonic() - last >= REPORT_EVERY:
      last = time.monotonic()
      logging.info('%s: %d of %d examples (%.1f/s)', name, done, test_set.examples, rate())
  logging.info('%s: all %d examples in %.1f s (%.1f/s)', name, done, time.monotonic() - begun, rate())


def _zero_totals(classes: int) -> dict[str, np.ndarray]:
  return {
    'loss': np.zeros((), np.float32),
    'top5': np.zeros((), np.int32),
    'confusion': np.zeros((classes, classes), np.int32),
  }


def _eval_step(experiment: Experiment, name: str, mesh: Mesh) -> Callable[[Any, Any, Any], Any]:
  """One jitted pass: adds a batch to the totals, leaving padding out, and gives the answers to it."""
  columns = head_columns(experiment.heads.only(name).class_counts, [s.name for s in experiment.sources])

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def step(params, batch, totals):
    logits_BxK = _log_probabilities(experiment, name, params, batch['views']['clip'])
    label_B, source_B = batch['label'], batch['source']
    counted_B = batch['mask'] & (label_B >= 0)
    loss_B = cross_entropy(logits_BxK, label_B, source_B, columns)
    rank_B = rank_of_label(logits_BxK, label_B, source_B, columns)
    predicted_B = jnp.argmax(logits_BxK, axis=-1)
    best_BxM, class_BxM = jax.lax.top_k(logits_BxK, min(answering.BEST, logits_BxK.shape[-1]))
    totals = {
      'loss': totals['loss'] + jnp.sum(loss_B, where=counted_B),
      'top5': totals['top5'] + jnp.sum((rank_B < 5) & counted_B),
      'confusion': totals['confusion'].at[label_B, predicted_B].add(counted_B.astype(jnp.int32)),
    }
    given = {
      'example': batch['example_id'],
      'label': label_B,
      'counted': counted_B,
      'best': class_BxM,
      'probability': jnp.exp(best_BxM).astype(jnp.float32),
    }
    return totals, given

  return step


def _log_probabilities(experiment: Experiment, name: str, params: Any, clip_BxVxTxHxWx3: jax.Array) -> jax.Array:
  """f32 [B, K]: the logarithm of the class probabilities averaged over the V views."""
  count = clip_BxVxTxHxWx3.shape[1]
  views_BxVxK = scoring.views(experiment, name, params, clip_BxVxTxHxWx3, jax.nn.log_softmax)
  return jax.nn.logsumexp(views_BxVxK, axis=1) - jnp.log(count)


def predict(experiment: Experiment, params: Any, name: str, clip_BxVxTxHxWx3: Any) -> jax.Array:
  """Class probabilities f32 [B, K] under one source's head, averaged over the V views of uint8 [B, V, T, H, W, 3]."""

  @jax.jit
  def run(params, clip):
    if name in experiment.heads.several_labels:
      return jax.nn.sigmoid(scoring.log_odds(scoring.views(experiment, name, params, clip)))
    return jnp.exp(_log_probabilities(experiment, name, params, clip))

  return run(params, clip_BxVxTxHxWx3)


def table(results: Results) -> str:
  """The results as text, one source a line; a measure that its kind of head does not have is left blank."""
  counts = {name: _count(result) for name, result in results.items()}
  wide = max([len('examples'), *map(len, counts.values())])
  summaries = {name: result.summary() for name, result in results.items()}
  columns = [column for column in _COLUMNS if any(column[0] in s for s in summaries.values())]
  header = f'{"source":<16}{"".join(f"{heading:>{width}}" for _, heading, width, _ in columns)}  '
  header += f'{"examples":>{wide}}  protocol'
  lines = [header, '-' * len(header)]
  for name, s in summaries.items():
    cells = (f'{format(s[m], form) if m in s else "":>{width}}' for m, _, width, form in columns)
    lines.append(f'{name:<16}{"".join(cells)}  {counts[name]:>{wide}}  {s["protocol"]}')
    if without := s.get('classes_without_positives'):
      lines.append(f'{"":<16}  {len(without)} of {s["classes"]} classes have no example, so are not in mAP: '
                   f'{", ".join(without[:5])}{", ..." if len(without) > 5 else ""}')  # fmt: skip
  return '\n'.join(lines)


def _count(result: SourceResult | SeveralResult) -> str:
  if not result.missing:
    return f'{result.examples:,}'
  treated = 'the missing wrong' if result.missing_wrong else 'the missing left out'
  return f'{result.examples:,} of {result.expected:,} ({treated})'


def most_confused(confusion_KxK: np.ndarray, count: int = 20) -> list[tuple[int, int, int]]:
  """(true class, predicted class, times) of the pairs that are confused most often, at most `count` of them."""
  off_KxK = np.where(np.eye(len(confusion_KxK), dtype=bool), 0, confusion_KxK)
  worst = np.argsort(-off_KxK, axis=None, kind='stable')[:count]
  pairs = [divmod(int(i), len(off_KxK)) for i in worst]
  return [(true, predicted, int(off_KxK[true, predicted])) for true, predicted in pairs if off_KxK[true, predicted]]


def scalars(results: Results) -> dict[str, float]:
  """The results as metrics: 'test/<source>/<measure>'."""
  every = {m for measures in MEASURES.values() for m in measures}
  return {f'test/{name}/{m}': s for name, r in results.items() for m, s in r.summary().items() if m in every}


def check_keep_best(keep_best: str, experiment: Experiment, test_sets: TestSets) -> None:
  """Raises a UserError if `config.keep_best` names none of the `scalars` that evaluations of these sets give."""
  labels = {source.name: source.labels for source in experiment.sources}
  names = [f'test/{name}/{m}' for name in test_sets for m in MEASURES[labels[name]]]
  if keep_best and keep_best not in names:
    known = f'one of {", ".join(names)}' if names else "'', since no source has a test split with labels"
    raise UserError(f'config.keep_best is {keep_best!r}: expected {known}.')


def write_report(
  results: Results,
  experiment: Experiment,
  folder: str,
  *,
  about: Mapping[str, Any],
  test_sets: TestSets | None = None,
  last: Mapping[str, Callable[[], Any]] | None = None,
) -> str:
  """Writes `report.json`, and of each source `per_class_<source>.csv`, `predictions_<source>.csv` and
  `confusion_<source>.png` (of several labels `precision_recall_<source>.png`), into a folder; and `clips/`, see
  `answers.write_clips`.

  Args:
    results: of `evaluate`.
    experiment: the run.
    folder: made if it is missing.
    about: step and parameters that were evaluated; goes into the JSON.
    test_sets: the data, for names and clips of examples; None: neither is kept.
    last: {name: does it}, what is made of all this, at the end. What fails there, or cannot be drawn, is raised when
      everything else is done.

  Returns:
    The path of the JSON. It holds no times and no paths, and its keys are sorted: those of two people can be compared
    line by line.
  """
  from cover_jax.evaluation import visualise  # matplotlib, which training itself does not need

  paths.make_folder(folder)
  summaries, pictures = {}, {}
  for name, result in results.items():
    names = test_sets[name].names() if test_sets else ()
    class_names = experiment.sources[experiment.source_id(name)].class_names
    summaries[name], drawn = _kind(experiment, name).write(result, name, names, folder, class_names)
    pictures |= drawn
  path = os.path.join(folder, 'report.json')
  text = json.dumps(_rounded({**about, 'sources': summaries}), indent=2, sort_keys=True, ensure_ascii=False)
  durable.write(path, text + '\n')
  if test_sets:
    given = {n: r.answers for n, r in results.items() if isinstance(r, SourceResult) and r.answers is not None}
    pictures[answering.FOLDER] = lambda: answering.write_clips(given, test_sets, folder)
  visualise.each(pictures | dict(last or {}))  # what cannot be drawn costs no number
  return path


def _write(result: SourceResult, name: str, names: Sequence[str], folder: str, class_names: Sequence[str]):
  from cover_jax.evaluation import visualise

  with durable.replacing(os.path.join(folder, f'per_class_{name}.csv'), 'w') as f:
    rows = csv.writer(f)
    rows.writerow(['class', 'examples', 'correct', 'accuracy', 'most confused with'])
    for k, class_name in enumerate(class_names):
      row_K = result.confusion_KxK[k]
      others_K = np.where(np.arange(len(row_K)) == k, 0, row_K)
      worst = class_names[int(np.argmax(others_K))] if others_K.any() else ''
      accuracy = f'{row_K[k] / row_K.sum():.4f}' if row_K.any() else ''
      rows.writerow([class_name, int(row_K.sum()), int(row_K[k]), accuracy, worst])
  if result.answers is not None:
    answering.write_csv(result.answers, class_names, names, os.path.join(folder, f'predictions_{name}.csv'))
  pairs = most_confused(result.confusion_KxK)
  worst = [
    {'true': class_names[t], 'predicted': class_names[p], 'times': n, 'share': n / int(result.confusion_KxK[t].sum())}
    for t, p, n in pairs
  ]
  picture = f'{CONFUSION}_{name}.png'
  draw = functools.partial(
    visualise.confusion_matrix,
    result.confusion_KxK,
    class_names,
    pairs,
    f'{name}: top-1 {result.top1:.1%}',
    os.path.join(folder, picture),
  )
  return result.summary() | {'most_confused': worst}, {picture: draw}


def _samples(result: SourceResult, name: str, class_names: Sequence[str], test_set: TestSet, most: int):
  return answering.samples(name, result.answers, class_names, test_set, most)


def samples(
  experiment: Experiment, name: str, result: SourceResult | SeveralResult, test_set: TestSet, most: int
) -> list[dict[str, Any]]:
  """At most `most` examples of a source with their clips and answers, about half of them errors."""
  class_names = experiment.sources[experiment.source_id(name)].class_names
  return _kind(experiment, name).samples(result, name, class_names, test_set, most)


def picture_file(experiment: Experiment, name: str) -> str:
  """The picture of a source's results, in the folder of the report."""
  return f'{_kind(experiment, name).picture}_{name}.png'


def params_sha256(params: Any) -> str:
  """SHA-256 (hex) of parameters on the host: their names, shapes and bits, wherever they were saved."""
  digest = hashlib.sha256()
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(array)
    digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()


def _rounded(tree: Any) -> Any:
  # Six digits: the last bits of a sum are the machine's, not the model's.
  if isinstance(tree, Mapping):
    return {k: _rounded(v) for k, v in tree.items()}
  if isinstance(tree, list):
    return [_rounded(v) for v in tree]
  return round(tree, 6) if isinstance(tree, float) else tree
