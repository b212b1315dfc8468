"""How a head of several labels an example is judged: average precision of each class, precision at k.

All scores of a test split are kept on the host: average precision is of a whole ranking.
"""

import csv
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cover_jax.evaluation import average_precision as ap
from cover_jax.evaluation import scoring
from cover_jax.evaluation.answers import BEST, views_of
from cover_jax.experiment.build import Experiment
from cover_jax.models.heads import head_columns, is_labelled, sigmoid_cross_entropy
from cover_jax.runtime import sharding
from data_pipelines import durable
from data_pipelines.contract import TestSet, UserError

PICTURE = 'precision_recall'  # the picture's name, before the source's
_DRAWN = 8  # curves of classes in the picture


@dataclasses.dataclass(frozen=True)
class SeveralResult:
  """What a head of several labels does on its own source's test split of N labelled examples.

  Attributes:
    example_N: int32, ascending, numbers of the examples in the split.
    label_NxK: int8, 1 for a class that the example has, 0 for one that it has not, -1 where nobody knows.
    score_NxK: f32, log(p / (1 - p)) of the probability p averaged over the test views.
    loss: mean binary cross-entropy, summed over the classes.
    class_names: K names.
    protocol, missing, missing_wrong, fingerprint: as in `classify.SourceResult`. Precision at k counts missing examples
      as wrong where `missing_wrong` says so; average precision and loss never do.
  """

  example_N: np.ndarray
  label_NxK: np.ndarray
  score_NxK: np.ndarray
  loss: float
  class_names: tuple[str, ...]
  protocol: str
  missing: int = 0
  missing_wrong: bool = False
  fingerprint: str = ''

  @property
  def examples(self) -> int:
    return len(self.example_N)

  @property
  def expected(self) -> int:
    return self.examples + self.missing

  @functools.cached_property
  def average_precision_K(self) -> np.ndarray:
    """f64; NaN for a class that no example has."""
    return ap.average_precisions(self.score_NxK, self.label_NxK)

  @functools.cached_property
  def positives_K(self) -> np.ndarray:
    """int64: examples that have each class."""
    return np.sum(self.label_NxK == 1, axis=0)

  @property
  def chance_K(self) -> np.ndarray:
    """f64: the share of examples that have each class, which is the precision of any order by chance."""
    return self.positives_K / np.maximum(np.sum(self.label_NxK >= 0, axis=0), 1)

  def precision_at(self, k: int) -> float:
    share = ap.precision_at(self.score_NxK, self.label_NxK, k)
    return share * self.examples / self.expected if self.missing_wrong else share

  def summary(self) -> dict[str, Any]:
    judged_K = self.positives_K > 0
    return {
      'labels': 'several',
      'mAP': float(np.mean(self.average_precision_K[judged_K])),
      'precision_at_1': self.precision_at(1),
      'precision_at_5': self.precision_at(5),
      'loss': self.loss,
      'examples': self.examples,
      'expected': self.expected,
      'missing': 'wrong' if self.missing_wrong else 'leave_out',
      'classes': len(judged_K),
      'classes_without_positives': [self.class_names[k] for k in np.flatnonzero(~judged_K)],
      'labels_an_example': float(self.positives_K.sum() / self.examples),
      'chance': float(np.mean(self.chance_K[judged_K])),
      'protocol': self.protocol,
      'data_sha256': self.fingerprint,
    }


def zero_totals(classes: int) -> dict[str, np.ndarray]:
  """What `eval_step` starts from."""
  del classes
  return {'loss': np.zeros((), np.float32)}


def eval_step(experiment: Experiment, name: str, mesh: Mesh) -> Callable[[Any, Any, Any], Any]:
  """One jitted pass: adds a batch to the totals, leaving padding out, and gives the scores of it."""
  heads = experiment.heads.only(name)
  columns = head_columns(heads.class_counts, [s.name for s in experiment.sources])

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def step(params, batch, totals):
    score_BxK = scoring.log_odds(scoring.views(experiment, name, params, batch['views']['clip']))
    labels_BxK, source_B = batch['labels'], batch['source']
    counted_B = batch['mask'] & is_labelled(labels_BxK, source_B, columns)
    loss_B = sigmoid_cross_entropy(score_BxK, labels_BxK, source_B, columns)
    given = {'example': batch['example_id'], 'labels': labels_BxK, 'counted': counted_B, 'score': score_BxK}
    return {'loss': totals['loss'] + jnp.sum(loss_B, where=counted_B)}, given

  return step


def result(
  totals: Mapping[str, np.ndarray],
  given: Sequence[Mapping[str, np.ndarray]],
  experiment: Experiment,
  name: str,
  test_set: TestSet,
) -> SeveralResult:
  """What the batches of a test split come to.

  Raises:
    UserError: if no example is labelled, or none of them has a label.
  """
  joined = {k: np.concatenate([np.asarray(batch[k]) for batch in given]) for k in given[0]}
  rows = np.flatnonzero(joined['counted'])
  rows = rows[np.argsort(joined['example'][rows], kind='stable')]
  if not np.any(joined['labels'][rows] == 1):
    raise UserError(f'config.sources.{name}.test holds no example with a label: nothing to evaluate.')
  return SeveralResult(
    *(joined[k][rows] for k in ('example', 'labels', 'score')),
    loss=float(totals['loss']) / len(rows),
    class_names=experiment.sources[experiment.source_id(name)].class_names,
    protocol=test_set.protocol,
    missing=test_set.missing,
    missing_wrong=experiment.config.eval_missing == 'wrong',
    fingerprint=test_set.fingerprint,
  )


def write(
  judged: SeveralResult, name: str, names: Sequence[str], folder: str, class_names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
  """Writes `per_class_<name>.csv` and `predictions_<name>.csv` into a folder.

  Args:
    judged: of the source.
    name: of the source.
    names: of the test examples, by number; empty where the data set gives none.
    folder: of the report.
    class_names: K names.

  Returns:
    (what `report.json` says of the source, {picture: draws it}).
  """
  with durable.replacing(os.path.join(folder, f'per_class_{name}.csv'), 'w') as f:
    rows = csv.writer(f)
    rows.writerow(['class', 'positives', 'share', 'average precision'])
    for k, class_name in enumerate(class_names):
      precision = judged.average_precision_K[k]
      shown = '' if np.isnan(precision) else f'{precision:.6f}'
      rows.writerow([class_name, int(judged.positives_K[k]), f'{judged.chance_K[k]:.6f}', shown])
  with durable.replacing(os.path.join(folder, f'predictions_{name}.csv'), 'w') as f:
    rows = csv.writer(f)
    count = min(BEST, len(class_names))
    rows.writerow(['example', 'name', 'labels', *(f'{w} {i + 1}' for i in range(count) for w in _ANSWER)])
    for example, label_K, score_K in zip(judged.example_N, judged.label_NxK, judged.score_NxK, strict=True):
      true = '; '.join(class_names[k] for k in np.flatnonzero(label_K == 1))
      best = np.argsort(-score_K, kind='stable')[:count]
      said = (w for k in best for w in (class_names[k], f'{1 / (1 + np.exp(-np.float64(score_K[k]))):.4f}'))
      rows.writerow([int(example), names[example] if len(names) else '', true, *said])
  picture = f'{PICTURE}_{name}.png'
  return judged.summary(), {picture: functools.partial(_draw, judged, name, os.path.join(folder, picture))}


_ANSWER = ('answer', 'probability')


def samples(
  judged: SeveralResult, name: str, class_names: Sequence[str], test_set: TestSet, most: int
) -> list[dict[str, Any]]:
  """Examples with their clips, labels and best answers; about half of the best answers are none of the labels."""
  best_N = judged.score_NxK.argmax(axis=1)
  right_N = judged.label_NxK[np.arange(len(best_N)), best_N] == 1
  wrong, right = np.flatnonzero(~right_N), np.flatnonzero(right_N)
  errors = min(len(wrong), max(most - most // 2, most - len(right)))
  rows = np.sort(np.concatenate([wrong[:errors], right[: most - errors]]))
  shown = []
  for row, views in zip(rows.tolist(), views_of(test_set, judged.example_N[rows]), strict=True):
    score_K = judged.score_NxK[row].astype(np.float64)
    best = np.argsort(-score_K, kind='stable')[:BEST]
    predicted = [(class_names[k], float(1 / (1 + np.exp(-score_K[k])))) for k in best]
    label = tuple(class_names[k] for k in np.flatnonzero(judged.label_NxK[row] == 1))
    shown.append({'clip': views[len(views) // 2], 'source': name, 'label': label, 'predicted': predicted})
  return shown


def _draw(judged: SeveralResult, name: str, path: str) -> None:
  """Draws the curves of classes evenly spaced from the best average precision to the worst."""
  from cover_jax.evaluation import visualise  # matplotlib, which training itself does not need

  ranked = [k for k in np.argsort(-judged.average_precision_K, kind='stable') if judged.positives_K[k]]
  some = [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, _DRAWN).round().astype(int))]
  curves = {
    f'{judged.class_names[k]} ({judged.average_precision_K[k]:.1%})': ap.curve(
      judged.score_NxK[:, k], judged.label_NxK[:, k]
    )
    for k in some
  }
  mean = judged.summary()['mAP']
  visualise.precision_recall(curves, f'{name}: mAP {mean:.1%}, {len(some)} of {len(ranked)} classes', path)
