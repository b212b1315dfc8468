"""What is counted: each measure by hand, over the examples that it is of and no others; and what a step draws."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.evaluation import classify
from cover_jax.experiment import state
from cover_jax.models.encoder import Encoded
from cover_jax.objectives import LossOutput, Objective
from cover_jax.training import measuring
from cover_jax.training import step as stepping
from data_pipelines.contract import SourceInfo, TestSet
from tests import tiny

SOURCES = [SourceInfo(name, 'video', 9, ('x', 'y')) for name in 'abc']


def test_measures_are_means_over_the_examples_of_their_source():
  """Over two steps of different sizes: examples count alike, padding does not count, nothing is reported of nothing."""
  rng = np.random.default_rng(0)
  steps = [
    {
      'value': rng.normal(size=size).astype(np.float32),
      'hit': rng.random(size) < 0.5,
      'source': np.array([0, 1] * (size // 2), np.int32),
      'mask': np.arange(size) % 5 != 0,
    }
    for size in (12, 6)
  ]

  def one(step):
    measures = {'value': jnp.asarray(step['value']), 'hit': jnp.asarray(step['hit'])}
    of_sources = measuring.per_source(measures, step['source'], step['mask'], SOURCES, (0, 1, 2))
    return {'video': of_sources}

  found = measuring.compute(measuring.merge(*map(one, steps)))
  whole = {key: np.concatenate([step[key] for step in steps]) for key in steps[0]}
  expected = {}
  for index, name in enumerate('ab'):
    own = whole['mask'] & (whole['source'] == index)
    for key in ('value', 'hit'):
      expected[f'video/{name}/{key}'] = pytest.approx(float(np.mean(whole[key][own])), rel=1e-5)
  assert found == expected


def test_evaluation_counts_labelled_examples_once():
  """Neither padding nor an example without a label counts, and every number is that of the predictions by hand."""
  run, mesh, *_ = tiny.build(tiny.config(mesh__data=1, eval_batch_size=8), jax.devices()[:1])
  rng = np.random.default_rng(1)

  def apply(variables, pixels, **_):
    feature_BxD = jnp.mean(pixels, axis=(1, 2, 3)) @ variables['params']['kernel']
    return Encoded(feature_BxD, feature_BxD[:, None, None, None])

  run = dataclasses.replace(run, model=SimpleNamespace(apply=apply, dtype=jnp.float32))
  kernel, head = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(16, 7)).astype(np.float32)
  params = {'encoder': {'kernel': kernel}, 'heads': {'things': {'kernel': 3 * head, 'bias': np.zeros(7, np.float32)}}}
  label = rng.integers(0, 7, 24).astype(np.int32)
  label[::5] = -1
  mask = np.arange(24) < 21
  clip = np.broadcast_to(rng.integers(0, 256, (24, 1, 1, 1, 1, 3)), (24, 1, 1, 8, 8, 3))
  batch = {
    'views': {'clip': clip.astype(np.uint8)},
    'label': np.where(mask, label, -1),
    'source': np.full(24, 2, np.int32),
    'mask': mask,
    'example_id': np.arange(24, dtype=np.int32),
    'video_id': np.arange(24, dtype=np.int32),
  }
  parts = [jax.tree.map(lambda x, i=i: x[i : i + 8], batch) for i in (0, 8, 16)]
  test_set = TestSet(lambda: iter(parts), 24, 0, 'by hand', '', lambda: '')
  found = classify.make_evaluate(run, {'things': test_set}, mesh)(params)['things']

  counted = mask & (label >= 0)
  pixels = (batch['views']['clip'][counted, 0, 0, 0, 0] / 255.0 - 0.5) / 0.5
  logits = pixels @ kernel @ (3 * head)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  label = label[counted]
  rank = (logits > logits[np.arange(len(label)), label][:, None]).sum(axis=1)
  confusion = np.zeros((7, 7), int)
  np.add.at(confusion, (label, logits.argmax(axis=1)), 1)
  np.testing.assert_array_equal(found.confusion_KxK, confusion)
  assert found.examples == counted.sum() == len(label) < 21
  assert found.top1 == pytest.approx(np.mean(rank == 0)) and found.top5 == pytest.approx(np.mean(rank < 5))
  assert found.loss == pytest.approx(-np.mean(log_p[np.arange(len(label)), label]), rel=1e-4)
  assert 4 in rank and 5 in rank  # else top-4 or top-6 would look alike


def draws_of(**changes):
  """A number drawn from every key that the streams' objectives are given in three steps."""
  seen = []

  def loss(params, own, batch, rng):
    del params
    jax.debug.callback(lambda x: seen.append(float(x)), jax.random.uniform(rng))
    return LossOutput(jnp.zeros(()), own, {'loss': jnp.zeros(len(batch['mask']))})

  run, *_ = tiny.build(tiny.config(mesh__data=1, **changes), jax.devices()[:1])
  run = dataclasses.replace(run, objectives=dict.fromkeys(run.streams, Objective(loss=loss)))
  optimizer, _ = stepping.make_optimizer(run)
  step = jax.jit(stepping.make_train_step(run, optimizer))
  now = state.around(run, optimizer, {'encoder': {'kernel': jnp.ones(2)}, 'heads': {}, 'objectives': {}})
  size = {name: stream.batch_size for name, stream in run.streams.items()}
  batch = {name: {'source': np.zeros(n, np.int32), 'mask': np.ones(n, bool)} for name, n in size.items()}
  for _ in range(3):
    now, _ = step(now, batch)
  jax.effects_barrier()
  return seen


def test_every_step_stream_microbatch_and_seed_draws_its_own_numbers():
  whole, halves, other = draws_of(), draws_of(accumulation_steps=2), draws_of(seed=1)
  assert len(set(whole)) == len(whole) == 3 * 2
  assert len(set(halves)) == len(halves) == 3 * 2 * 2
  assert not set(whole) & set(other)
  assert set(draws_of()) == set(whole)
