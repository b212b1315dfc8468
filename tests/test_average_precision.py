"""Average precision is scikit-learn's, ties and all; precision at k by its definition."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from cover_jax.evaluation import average_precision as ap
from cover_jax.evaluation.several_labels import SeveralResult


@pytest.mark.parametrize('round_to', [None, 1, 0])
def test_average_precision_is_that_of_scikit_learn(round_to):
  rng = np.random.default_rng(0)
  score = rng.normal(size=(500, 20)).astype(np.float32)
  if round_to is not None:
    score = np.round(score, round_to)  # ties: at 0 there are five or so distinct scores
  label = (rng.random((500, 20)) < rng.random(20) ** 3).astype(np.int8)
  label[:, 3], label[:, 4] = 0, 1
  found = ap.average_precisions(score, label)
  assert np.isnan(found[3]) and found[4] == 1
  for k in range(20):
    if label[:, k].any():
      assert found[k] == pytest.approx(average_precision_score(label[:, k], score[:, k]), abs=1e-9)
  some = ap.curve(score[:, 5], label[:, 5])
  precision, recall, _ = precision_recall_curve(label[:, 5], score[:, 5])
  np.testing.assert_allclose(some.precision_S[::-1], precision[:-1])
  np.testing.assert_allclose(some.recall_S[::-1], recall[:-1])


def test_what_nobody_knows_is_left_out_and_what_is_no_number_ranks_last():
  rng = np.random.default_rng(1)
  score, label = rng.normal(size=60), rng.integers(0, 2, 60).astype(np.int8)
  label[::4] = -1
  known = label >= 0
  assert ap.curve(score, label).average_precision == pytest.approx(average_precision_score(label[known], score[known]))
  assert ap.curve(np.array([np.nan, 1.0, 0.0]), np.array([1, 0, 0])).average_precision == pytest.approx(1 / 3)
  assert ap.curve(np.array([np.inf, -np.inf, 0.0]), np.array([1, 0, 0])).average_precision == 1
  # All alike: the share of positives, in whatever order the examples come.
  assert ap.curve(np.zeros(10), np.arange(10) < 3).average_precision == pytest.approx(0.3)


def test_precision_at_k():
  score = np.array([[3, 2, 1, 0], [0, 0, 0, 0], [1, 2, 3, 4], [9, 8, 7, np.nan]], np.float32)
  label = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [-1, 1, 1, 1]], np.int8)
  assert ap.precision_at(score, label, 1) == np.mean([1, 0, 0, 1])
  assert ap.precision_at(score, label, 2) == np.mean([1 / 2, 1 / 2, 0, 1])
  assert ap.precision_at(score, label, 9) == np.mean([2 / 4, 1 / 4, 0, 3 / 4])


def test_summary_names_classes_without_an_example_and_counts_what_is_missing():
  score = np.array([[1, 5, 0], [2, 4, 1], [3, 6, 2], [0, 7, 3]], np.float32)
  label = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]], np.int8)
  of = lambda wrong: SeveralResult(np.arange(4), label, score, 1.5, ('a', 'b', 'c'), 'p', 4, wrong, 'x')
  out, wrong = of(False).summary(), of(True).summary()
  assert out['classes_without_positives'] == ['b'] and out['classes'] == 3 and out['labels_an_example'] == 0.75
  assert out['mAP'] == wrong['mAP'] == pytest.approx((1 + 1 / 2) / 2) and out['chance'] == pytest.approx(
    (0.5 + 0.25) / 2
  )
  assert (out['examples'], out['expected'], out['missing'], wrong['missing']) == (4, 8, 'leave_out', 'wrong')
  assert out['precision_at_1'] == 0 and out['precision_at_5'] == pytest.approx(3 / 12)
  assert wrong['precision_at_5'] == pytest.approx(3 / 24)
