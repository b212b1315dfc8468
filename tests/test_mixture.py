"""The order of examples: exact epochs, exact proportions, no state."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.contract import UserError
from data_pipelines.loading import arrays, views
from data_pipelines.loading.mixture import MERGED, Mixture, philox, quotas, sampling_weights

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**63)
quick = settings(max_examples=50, deadline=None)


@st.composite
def weighted(draw):
  sizes = draw(SIZES)
  weights = draw(st.lists(st.sampled_from([0, 1e-6, 0.1, 1, 2, 7.5]), min_size=len(sizes), max_size=len(sizes)))
  return tuple(sizes), tuple(weights) if sum(weights) else (1.0,) * len(sizes)


def proportional(sizes, seed=0, stream=0):
  return Mixture(tuple(sizes), tuple(map(float, sizes)), seed, stream)


@quick
@given(SIZES, SEEDS, st.integers(0, 10**9))
def test_proportional_epoch_holds_every_example_once(sizes, seed, epoch):
  mixture = proportional(sizes, seed)
  assert mixture.virtual_sizes.tolist() == sizes
  source, example = mixture.locate(epoch * sum(sizes) + np.arange(sum(sizes)))
  assert sorted(zip(source, example, strict=True)) == [(s, i) for s, n in enumerate(sizes) for i in range(n)]


@quick
@given(weighted(), SEEDS)
def test_any_weights_see_each_example_once_per_pass(case, seed):
  sizes, weights = case
  mixture = Mixture(sizes, weights, seed)
  epochs = 3
  source, example = mixture.locate(np.arange(epochs * mixture.epoch_size))
  for s, size in enumerate(sizes):
    draws = epochs * mixture.virtual_sizes[s]
    seen = np.bincount(example[source == s], minlength=size)
    assert len(seen) == size and seen.sum() == draws
    assert seen.min() == draws // size and seen.max() == -(-draws // size)


@quick
@given(weighted())
def test_virtual_sizes_are_within_one_of_the_weights(case):
  sizes, weights = case
  mixture = Mixture(sizes, weights, 0)
  drawn = np.array(weights) > 0
  exact = np.array(weights) / sum(weights) * mixture.epoch_size
  assert mixture.epoch_size == sum(np.array(sizes)[drawn])
  assert ((mixture.virtual_sizes > 0) == drawn).all()
  if (exact[drawn] >= 1).all():
    assert np.abs(mixture.virtual_sizes - exact).max() < 1


def test_proportional_is_exact_for_large_sizes():
  sizes = (241_181, 168_913, 791_297, 1_281_167, 7)
  weights = sampling_weights({str(i): n for i, n in enumerate(sizes)})
  assert Mixture(sizes, tuple(weights.values()), 0).virtual_sizes.tolist() == list(sizes)


@quick
@given(weighted(), SEEDS, st.integers(0, 10**13))
def test_scalar_and_vector_agree_anywhere(case, seed, start):
  mixture = Mixture(*case, seed)
  positions = start + np.arange(6).reshape(2, 3)
  source, example = mixture.locate(positions)
  assert source.shape == example.shape == (2, 3)
  fresh = Mixture(*case, seed)
  assert [tuple(map(int, fresh.locate(int(p)))) for p in positions.flat[::-1]] == list(
    zip(source.flat[::-1], example.flat[::-1], strict=True)
  )


def test_far_positions_cost_what_near_ones_do():
  seconds = []
  for start in (0, 10**12):
    mixture = proportional((50_000, 30_000))
    begin = time.perf_counter()
    mixture.locate(start + np.arange(64))
    seconds.append(time.perf_counter() - begin)
  assert seconds[1] < 5 * seconds[0] + 0.05


def test_seed_stream_and_epoch_each_change_the_order():
  order = lambda mixture, epoch=0: mixture.locate(epoch * 100 + np.arange(100))[1].tolist()
  base = order(proportional([100]))
  assert base == order(proportional([100]))
  assert base != order(proportional([100], seed=1))
  assert base != order(proportional([100], stream=1))
  assert base != order(proportional([100]), epoch=1)


def test_order_never_changes():
  # A resumed run depends on these numbers: a change here breaks every checkpoint's data order.
  source, example = Mixture((5, 3), (1.0, 1.0), seed=7, stream=3).locate(np.arange(10))
  assert source.tolist() == [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]
  assert example.tolist() == [2, 0, 0, 1, 2, 4, 2, 3, 0, 1]


def test_random_streams_of_different_arguments_differ():
  arguments = [(d, s, a, b) for d in range(2) for s in range(3) for a in range(3) for b in range(3)]
  draws = {tuple(philox(*a).bit_generator.random_raw(4)) for a in arguments}
  assert len(draws) == len(arguments)
  assert (philox(0, -1).random(3) == philox(0, 2**64 - 1).random(3)).all()


@quick
@given(st.dictionaries(st.text(min_size=1), st.integers(1, 10**7), min_size=1), st.floats(0.05, 1e3))
def test_temperature_flattens(sizes, temperature):
  weights = sampling_weights(sizes, temperature)
  assert math.isclose(sum(weights.values()), 1) and weights.keys() == sizes.keys()
  low, high = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
  expected = (sizes[high] / sizes[low]) ** (1 / temperature) if weights[low] else math.inf
  assert weights[low] == 0 or math.isclose(weights[high] / weights[low], expected, rel_tol=1e-6)


def test_weightings():
  sizes = {'a': 300, 'b': 100}
  assert sampling_weights(sizes) == {'a': 0.75, 'b': 0.25}
  assert sampling_weights(sizes, math.inf) == {'a': 0.5, 'b': 0.5}
  assert sampling_weights(sizes, 0.5) == pytest.approx({'a': 0.9, 'b': 0.1})
  assert sampling_weights(sizes, 3.0, {'b': 2, 'a': 0}) == {'a': 0.0, 'b': 1.0}


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (({'a': 0},), "'a' has no examples"),
    (({'a': 1}, 0.0), 'temperature is 0.0'),
    (({'a': 1}, math.nan), 'temperature is nan'),
    (({'a': 1, 'b': 1}, 1.0, {'a': 0, 'b': 0}), 'all zero'),
    (({'a': 1, 'b': 1}, 1.0, {'a': 2, 'b': -1}), 'not negative'),
    (({'a': 1}, 1.0, {'a': math.nan}), 'finite'),
    (({'a': 1, 'b': 1}, 1.0, {'a': 1, 'bee': 1}), 'unknown: bee; missing: b'),
    (({'a': 1, 'b': 1}, 1.0, {'a': 1}), 'unknown: none; missing: b'),
  ],
)
def test_wrong_weights_are_one_sentence(arguments, message):
  with pytest.raises(UserError, match=message) as e:
    sampling_weights(*arguments)
  assert '\n' not in str(e.value)


@quick
@given(
  st.dictionaries(st.text(min_size=1), st.floats(1e-6, 1e9), min_size=1, max_size=6),
  st.integers(1, 8),
  st.integers(0, 100),
)
def test_quotas_are_multiples_that_sum(weights, multiple, extra):
  batch_size = (len(weights) + extra) * multiple
  quota = quotas(weights, batch_size, multiple)
  assert sum(quota.values()) == batch_size and quota.keys() == weights.keys()
  assert all(q > 0 and q % multiple == 0 for q in quota.values())
  exact = {k: w / sum(weights.values()) * batch_size for k, w in weights.items()}
  if min(exact.values()) >= multiple:
    assert all(abs(quota[k] - exact[k]) < multiple for k in quota)


def test_wrong_quotas():
  assert quotas({'video': 1.2e6, 'image': 1.28e6}, 64, 8) == {'video': 32, 'image': 32}
  for batch_size, multiple in ((12, 8), (8, 8), (0, 1), (-8, 8)):
    with pytest.raises(UserError, match=f'batch_size is {batch_size}'):
      quotas({'a': 1, 'b': 1}, batch_size, multiple)
  with pytest.raises(UserError, match="'a' is 0"):
    quotas({'a': 0}, 8)


# Sources whose examples lie in runs that can only be read in order.


@st.composite
def in_runs(draw):
  runs = draw(st.lists(st.none() | st.lists(st.integers(1, 12), min_size=1, max_size=20), min_size=1, max_size=3))
  sizes = tuple(draw(st.integers(1, 30)) if r is None else sum(r) for r in runs)
  weights = tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(runs), max_size=len(runs))))
  return sizes, weights, tuple(r and tuple(r) for r in runs)


@quick
@given(in_runs(), SEEDS)
def test_runs_are_read_forwards_and_few_at_a_time(case, seed):
  sizes, weights, runs = case
  mixture = Mixture(sizes, weights, seed, runs=runs)
  source, example = mixture.locate(np.arange(3 * mixture.epoch_size))
  for s, lengths in enumerate(runs):
    if lengths is None:
      continue
    drawn = example[source == s]
    for begin in range(0, len(drawn) - sizes[s] + 1, sizes[s]):
      one_pass = drawn[begin : begin + sizes[s]]
      assert sorted(one_pass) == list(range(sizes[s]))
      run = np.searchsorted(np.cumsum(lengths), one_pass, side='right')
      order = [one_pass[run == r] for r in range(len(lengths))]
      assert all((np.diff(o) == 1).all() for o in order)
      first, last = (np.array([np.flatnonzero(run == r)[i] for r in range(len(lengths))]) for i in (0, -1))
      assert all(((first <= at) & (at <= last)).sum() <= MERGED for at in range(sizes[s]))


def test_runs_leave_the_other_sources_as_they_were():
  plain, mixed = Mixture((50, 30), (50, 30), 1), Mixture((50, 30), (50, 30), 1, runs=(None, (10, 20)))
  (source, example), (source_runs, example_runs) = plain.locate(np.arange(160)), mixed.locate(np.arange(160))
  assert np.array_equal(source, source_runs)
  assert np.array_equal(example[source == 0], example_runs[source == 0])
  assert not np.array_equal(example[source == 1], example_runs[source == 1])


def test_merged_runs_are_shuffled_and_anew_in_each_pass():
  mixture = Mixture((1000,), (1,), 0, runs=((100,) * 10,))
  run = mixture.locate(np.arange(2000))[1].reshape(2, 1000) // 100
  assert len(set(run[0][:100])) == MERGED and not np.array_equal(run[0], run[1])
  assert len(set(run[0][:16])) >= 5  # neighbours come from many runs


@quick
@given(weighted(), SEEDS, st.integers(2, 7))
def test_a_block_is_of_one_source_and_passes_stay_exact(case, seed, block):
  sizes, weights = case
  mixture = Mixture(sizes, weights, seed, block=block)
  blocks = mixture.virtual_sizes // block
  assert mixture.epoch_size % block == 0 and ((blocks > 0) == (np.array(weights) > 0)).all()
  source, example = mixture.locate(np.arange(4 * mixture.epoch_size))
  by_block = source.reshape(-1, block)
  assert (by_block == by_block[:, :1]).all()
  for epoch in by_block[:, 0].reshape(4, -1):
    assert (np.bincount(epoch, minlength=len(sizes)) == blocks).all()
  for s, size in enumerate(sizes):
    seen = np.bincount(example[source == s], minlength=size)
    assert seen.min() == 4 * mixture.virtual_sizes[s] // size and seen.max() - seen.min() <= 1


def test_one_source_a_step_fills_each_sub_batch_of_the_loader():
  labels = [0] * 24
  videos = [np.zeros((4, 16, 16, 3), np.uint8)] * 24
  sources = [arrays.array_source(name, videos[:n], labels[:n], ('a',)) for name, n in (('few', 8), ('many', 24))]
  stream = views.Stream((0, 1), 2, 16, 8, one_source_a_step=True)
  steps = [b['video']['source'] for b in arrays.array_batches(sources, {'video': stream}, 3, num_steps=16)]
  assert all(len(set(step)) == 1 for step in steps)
  assert sum(step[0] == 1 for step in steps) == 12  # three quarters of the steps
  assert any(len(set(step)) == 2 for step in _mixed(sources, stream))


def _mixed(sources, stream):
  mixed = dataclasses.replace(stream, one_source_a_step=False)
  return [b['video']['source'] for b in arrays.array_batches(sources, {'video': mixed}, 3, num_steps=16)]
