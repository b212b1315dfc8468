"""Average precision and precision at k of several labels an example, in plain numpy.

Average precision is the sum over thresholds of (recall - recall before) * precision, without interpolation: what
scikit-learn's `average_precision_score` gives. Equal scores are one threshold, so the order of examples is nothing.
"""

from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
  """Precision and recall of a class at each distinct score, from the highest on: f64 in [0, 1]."""

  precision_S: np.ndarray
  recall_S: np.ndarray

  @property
  def average_precision(self) -> float:
    return float(np.sum(np.diff(self.recall_S, prepend=0.0) * self.precision_S))


def curve(score_N: np.ndarray, label_N: np.ndarray) -> Curve | None:
  """The curve of one class; None where no example has it.

  Args:
    score_N: float; what is no number ranks last.
    label_N: 1 for an example that has the class, 0 for one that has not, -1 where nobody knows, which is left out.
  """
  known_N = label_N >= 0
  score_N, label_N = np.nan_to_num(score_N[known_N], nan=-np.inf, posinf=np.inf, neginf=-np.inf), label_N[known_N]
  if not label_N.any():
    return None
  order = np.argsort(-score_N, kind='stable')
  score_N, found_N = score_N[order], np.cumsum(label_N[order], dtype=np.float64)
  last_N = np.append(score_N[1:] != score_N[:-1], True)  # of those with an equal score
  asked_N = np.arange(1, len(score_N) + 1)
  return Curve((found_N / asked_N)[last_N], (found_N / found_N[-1])[last_N])


def average_precisions(score_NxK: np.ndarray, label_NxK: np.ndarray) -> np.ndarray:
  """f64 [K], NaN for a class that no example has; the arguments as in `curve`, for each class."""
  curves = [curve(score_N, label_N) for score_N, label_N in zip(score_NxK.T, label_NxK.T, strict=True)]
  return np.array([np.nan if c is None else c.average_precision for c in curves])


def precision_at(score_NxK: np.ndarray, label_NxK: np.ndarray, k: int) -> float:
  """The share of the k classes that score highest which are labels, averaged over examples.

  Of equal scores the lower class is first. An example of fewer than k labels cannot reach 1. A class that nobody knows
  of an example is not asked. Where there are fewer than k classes, k is their number.
  """
  score_NxK = np.where((label_NxK >= 0) & ~np.isnan(score_NxK), score_NxK, -np.inf)
  best_NxK = np.argsort(-score_NxK, axis=1, kind='stable')[:, :k]
  return float(np.mean(np.take_along_axis(label_NxK, best_NxK, axis=1) == 1))
