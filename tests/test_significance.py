"""Intervals and tests against SciPy's and against counting."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cover_jax.evaluation.significance import holm, mcnemar, wilson


@pytest.mark.parametrize(('right', 'examples'), [(0, 7), (7, 7), (3, 10), (294, 320), (19761, 50000)])
def test_wilson_is_scipys(right, examples):
  expected = stats.binomtest(right, examples).proportion_ci(method='wilson')
  np.testing.assert_allclose(wilson(right, examples), (expected.low, expected.high), atol=1e-6)


def test_of_no_example_nothing_is_known():
  assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(('first', 'second'), [(0, 0), (0, 1), (5, 0), (3, 9), (12, 12), (300, 250), (0, 1000)])
def test_mcnemar_is_the_binomial_test(first, second):
  expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
  assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_goes_on_where_the_exact_one_ends():
  assert mcnemar(560, 480) == pytest.approx(stats.binomtest(480, 1040).pvalue, rel=0.02)
  assert mcnemar(600, 600) == 1.0
  assert 0 <= mcnemar(40000, 10) < 1e-300


def test_holm():
  assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
  for p in itertools.permutations((0.001, 0.02, 0.02, 0.5)):
    assert all(c >= q for c, q in zip(holm(p), p, strict=True))
