"""What features are worth without further training: linear probe, weighted k-NN, nearest-neighbour retrieval.

Plain numpy on cached features, so that the same few functions judge any checkpoint on any source, and a test can check
them by brute force. Nothing here is chosen on test data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Queries compared with the gallery at once: bounds the memory of a matrix of cosines.
_CHUNK = 1024


class Probe(NamedTuple):
  """A linear classifier, features [N, D] to scores [N, K]: (x - mean) / scale @ kernel + bias, float64."""

  mean_D: np.ndarray
  scale_D: np.ndarray
  kernel_DxK: np.ndarray
  bias_K: np.ndarray

  def predict(self, feature_NxD: np.ndarray) -> np.ndarray:
    """Class indices int64 [N]."""
    return np.argmax((feature_NxD - self.mean_D) / self.scale_D @ self.kernel_DxK + self.bias_K, axis=1)


def fit_probe(feature_NxD: np.ndarray, label_N: np.ndarray, classes: int, penalties: Sequence[float]) -> list[Probe]:
  """Ridge regression to one-hot targets, in closed form: one classifier a penalty for one decomposition.

  minimises mean_n |W' z_n + b - onehot_n|^2 + penalty * |W|^2 over standardised features z; the bias is not penalised.
  There is no rate, no number of steps and no seed to tune, which is why it is preferred here to logistic regression.

  Args:
    feature_NxD: float.
    label_N: int, in [0, classes).
    classes: K. A class without an example is never predicted unless all scores are below 0.
    penalties: each > 0.
  """
  x_NxD = np.asarray(feature_NxD, np.float64)
  mean_D, scale_D = x_NxD.mean(axis=0), x_NxD.std(axis=0)
  scale_D = np.where(scale_D > 0, scale_D, 1.0)
  z_NxD = (x_NxD - mean_D) / scale_D
  target_NxK = np.eye(classes)[label_N]
  bias_K = target_NxK.mean(axis=0)
  values_D, vectors_DxD = np.linalg.eigh(z_NxD.T @ z_NxD / len(z_NxD))
  right_DxK = vectors_DxD.T @ (z_NxD.T @ (target_NxK - bias_K) / len(z_NxD))
  values_D = np.maximum(values_D, 0)  # rounding may leave them below
  return [Probe(mean_D, scale_D, vectors_DxD @ (right_DxK / (values_D + p)[:, None]), bias_K) for p in penalties]


def choose_penalty(
  feature_NxD: np.ndarray,
  label_N: np.ndarray,
  kept: np.ndarray,
  held_out: np.ndarray,
  classes: int,
  penalties: Sequence[float],
) -> float:
  """The penalty whose classifier of the examples `kept` is right most often on those `held_out`; of equals the largest.

  Without examples held out it is the one in the middle of the list.
  """
  if not len(held_out):
    return sorted(penalties)[len(penalties) // 2]
  probes = fit_probe(feature_NxD[kept], label_N[kept], classes, penalties)
  right = [np.mean(p.predict(feature_NxD[held_out]) == label_N[held_out]) for p in probes]
  return max(zip(right, penalties, strict=True))[1]


def neighbours(query_QxD: np.ndarray, gallery_NxD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The most similar entries of a gallery.

  Args:
    query_QxD, gallery_NxD: float features, of any length.
    count: of neighbours; at most N are given.

  Returns:
    (int64 [Q, count] indices into the gallery, best first, the lower index first of equals; their cosines, float32).
  """
  unit = lambda x: (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)
  gallery_DxN, count = unit(gallery_NxD).T, min(count, len(gallery_NxD))
  index, cosine = [], []
  for start in range(0, len(query_QxD), _CHUNK):
    similar_CxN = unit(query_QxD[start : start + _CHUNK]) @ gallery_DxN
    best_CxK = np.argsort(-similar_CxN, axis=1, kind='stable')[:, :count]
    index.append(best_CxK)
    cosine.append(np.take_along_axis(similar_CxN, best_CxK, axis=1))
  return np.concatenate(index), np.concatenate(cosine)


def recall_at(neighbour_label_QxK: np.ndarray, label_Q: np.ndarray, ranks: Sequence[int]) -> dict[int, float]:
  """R@k: the share of queries of whose k nearest neighbours at least one has the query's class.

  Ranks beyond the K neighbours given are left out rather than reported as something they are not.
  """
  hit_QxK = neighbour_label_QxK == label_Q[:, None]
  return {k: float(hit_QxK[:, :k].any(axis=1).mean()) for k in ranks if k <= hit_QxK.shape[1]}


def knn_predict(
  neighbour_label_QxK: np.ndarray, cosine_QxK: np.ndarray, classes: int, temperature: float
) -> np.ndarray:
  """Class indices int64 [Q]: neighbours vote with weight exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""
  weight_QxK = np.exp((cosine_QxK - cosine_QxK.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
  votes_QxC = np.zeros((len(neighbour_label_QxK), classes))
  np.add.at(votes_QxC, (np.arange(len(votes_QxC))[:, None], neighbour_label_QxK), weight_QxK)
  return np.argmax(votes_QxC, axis=1)
