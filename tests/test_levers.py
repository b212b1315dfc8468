"""Levers of memory and time change neither the function nor the mathematics: each against a reference by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.experiment import optim
from cover_jax.experiment.state import create, state_shardings
from cover_jax.models.timesformer import TimeSformer
from cover_jax.objectives import LossOutput
from cover_jax.runtime import sharding
from cover_jax.training import accumulation, measuring
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from tests import tiny

SGD = {'optimizer__name': 'sgd', 'optimizer__options': {'decay': 0.9}}  # Adam's first steps amplify rounding
STILL = {'model__drop_path': 0.0}  # microbatches draw other random numbers than the large batch


def make(mesh_shape=(1, 1, 1), **changes):
  """(experiment, mesh, fresh state, step, batches) of the tiny run."""
  sizes = dict(zip(sharding.AXES, mesh_shape, strict=True))
  run, mesh, batches, _ = tiny.build(tiny.config(mesh=sizes, **changes), jax.devices()[: int(np.prod(mesh_shape))])
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state_shardings(run, optimizer, mesh)
  return run, mesh, create(run, optimizer, mesh, placed), stepping.compile_step(run, optimizer, mesh), batches


_RUNS = {}


def run_steps(**options):
  """Losses, final state and sums of measures of some steps; the same run is made once."""
  key = repr(sorted(options.items()))
  if key not in _RUNS:
    _RUNS[key] = _run_steps(**options)
  return _RUNS[key]


def _run_steps(steps=3, change_batch=lambda batch: batch, **changes):
  _, mesh, state, step, batches = make(**changes)
  losses = []
  for batch in itertools.islice(batches(0), steps):
    state, report = step(state, sharding.to_global(change_batch(batch), mesh))
    losses.append(jax.device_get(report['losses']))
  measures = measuring.compute(report['measures'])
  return losses, jax.device_get(state), measures


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# Accumulation.


@pytest.mark.parametrize(
  ('steps', 'mesh_shape'),
  [
    pytest.param(2, (1, 1, 1), marks=pytest.mark.slow),
    pytest.param(8, (1, 1, 1), marks=pytest.mark.slow),
    (2, (2, 2, 1)),
  ],
)
def test_accumulation_is_the_large_batch(steps, mesh_shape):
  sgd = STILL | SGD | {'batch_size': 32}
  expected_losses, expected, expected_measures = run_steps(**sgd)
  losses, state, measures = run_steps(accumulation_steps=steps, mesh_shape=mesh_shape, **sgd)
  assert_close(losses, expected_losses, rtol=1e-5)
  assert_close(state.params, expected.params, atol=1e-5)
  assert_close(state.opt_state, expected.opt_state, atol=1e-5)
  assert measures == pytest.approx(expected_measures, rel=1e-5)


@pytest.mark.slow
def test_accumulation_counts_examples_not_microbatches():
  """With padding, microbatches hold different numbers of examples, some none; each example still counts once."""

  def pad(batch):
    keep = np.arange(8) % 4 == 1  # microbatch 1 of 4 has all of them, the others none
    keep[2] = True
    return {name: sub | {'mask': keep} for name, sub in batch.items()}

  sgd = STILL | SGD | {'change_batch': pad, 'steps': 2}
  expected_losses, expected, _ = run_steps(**sgd)
  losses, state, _ = run_steps(accumulation_steps=4, **sgd)
  assert_close(losses, expected_losses, rtol=1e-5)
  assert_close(state.params, expected.params, atol=1e-5)


def test_accumulation_threads_the_state_of_objectives():
  """A queue sees the microbatches one after the other, and measures keep the order of the batch."""

  def loss_and_gradient(params, states, statistics, batch, rng, share):
    del rng
    x_B = batch['s']['views']['clip'][:, 0]
    order = jnp.concatenate([states['s'][2:], x_B])
    loss = params['w'] * jnp.mean(x_B)
    out = LossOutput(loss, order, {'x': x_B})
    return (share['s'] * loss, ({'s': out}, statistics + jnp.sum(x_B))), {'w': share['s'] * jnp.mean(x_B)}

  batch = {'s': {'views': {'clip': jnp.arange(8.0)[:, None]}, 'mask': jnp.ones(8, bool)}}
  params, states = {'w': jnp.float32(3.0)}, {'s': jnp.full(8, -1.0)}
  (loss, (outputs, statistics)), gradients = accumulation.accumulate(
    loss_and_gradient, params, states, jnp.float32(2), batch, jax.random.key(0), steps=4
  )
  assert float(statistics) == 2 + 28
  assert float(loss) == pytest.approx(3.0 * 3.5)
  assert float(gradients['w']) == pytest.approx(3.5)
  np.testing.assert_array_equal(outputs['s'].measures['x'], np.arange(8.0))
  np.testing.assert_array_equal(outputs['s'].state, [0, 4, 1, 5, 2, 6, 3, 7])


def test_microbatches_stay_on_their_devices():
  """Splitting a batch over 8 devices into microbatches moves no clip between them."""
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  batched = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  micro = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *sharding.BATCH))
  split = jax.jit(lambda x: accumulation.microbatches(x, 4), in_shardings=batched, out_shardings=micro)
  text = split.lower(jax.ShapeDtypeStruct((32, 2, 4, 4, 3), jnp.uint8)).compile().as_text()
  assert not any(f' {op}' in text for op in ('all-gather(', 'all-to-all(', 'collective-permute('))


def test_accumulation_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match=r'accumulation_steps = 3: the 8 examples a step of stream .* a multiple of 3'):
    tiny.build(tiny.config(accumulation_steps=3, mesh__data=1), jax.devices()[:1])
  with pytest.raises(UserError, match='a multiple of 16'):
    tiny.build(tiny.config(accumulation_steps=2))


# Frozen parameters.

FREEZE_ENCODER = (('^encoder/', 0.0), ('.*', 1.0))


def test_frozen_parameters_stay_to_the_bit_and_have_no_moments():
  _, _, start, _, _ = make()
  start = jax.device_get(start)
  _, state, _ = run_steps(optimizer__learning_rate_rules=FREEZE_ENCODER, optimizer__weight_decay=0.5)
  jax.tree.map(np.testing.assert_array_equal, state.params['encoder'], start.params['encoder'])
  jax.tree.map(np.testing.assert_array_equal, state.ema['encoder'], start.params['encoder'])
  assert np.any(state.params['heads']['acts']['kernel'] != start.params['heads']['acts']['kernel'])
  moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
  assert moments and not any('encoder' in jax.tree_util.keystr(path) for path, _ in moments)
  assert jax.tree.structure(state.params) == jax.tree.structure(start.params)


@pytest.mark.slow
def test_frozen_parameters_cost_no_gradient():
  """With the encoder frozen a step has the products of the forward pass and hardly more."""

  def flops(**changes):
    run, mesh, state, _, batches = make(model__scan_unroll=2, **STILL, **changes)
    optimizer, _ = stepping.make_optimizer(run)
    step = jax.jit(stepping.make_train_step(run, optimizer))
    return step.lower(state, sharding.to_global(next(batches(0)), mesh)).compile().cost_analysis()['flops']

  assert flops(optimizer__learning_rate_rules=FREEZE_ENCODER) < 0.45 * flops()


@pytest.mark.slow
def test_learning_parameters_learn_as_before_when_others_are_frozen():
  """Freezing the heads, which start at zero, does not change the heads' siblings: the same update, the same moments."""
  rules = (('^heads/things/', 0.0), ('.*', 1.0))
  no_clip = {'optimizer__clip_norm': 0.0, 'steps': 1}
  _, frozen, _ = run_steps(optimizer__learning_rate_rules=rules, **no_clip)
  _, free, _ = run_steps(**no_clip)
  assert_close(frozen.params['heads']['acts'], free.params['heads']['acts'], atol=1e-7)
  assert not np.any(frozen.params['heads']['things']['kernel'])
  assert np.any(free.params['heads']['things']['kernel'])


def test_all_frozen_is_refused():
  with pytest.raises(UserError, match='nothing would learn'):
    make(optimizer__learning_rate_rules=(('.*', 0.0),))
  with pytest.raises(UserError, match='No rule matches'):
    make(optimizer__learning_rate_rules=(('^heads/', 0.0),))


def test_split_and_join():
  params = {'encoder': {'a': 1, 'b': {'c': 2}}, 'heads': {'h': {'kernel': 3}}, 'objectives': {'video': {}}}
  rules = (('encoder/b/', 0), ('.*', 0.5))
  learning, frozen = optim.split(rules, params)
  assert frozen == {'encoder': {'b': {'c': 2}}}
  assert learning == {'encoder': {'a': 1}, 'heads': {'h': {'kernel': 3}}, 'objectives': {'video': {}}}
  assert optim.join(learning, frozen) == params
  assert optim.split((('.*', 1.0),), params) == (params, {})


# Layer-wise learning-rate decay.


def test_layer_factors_by_hand():
  params = {
    'encoder': {
      'blocks': {'mlp': {'hidden': {'kernel': np.zeros((3, 4, 5)), 'bias': np.zeros((3, 5))}}},
      'patch_embedding': {'kernel': np.zeros((2, 2, 3, 4))},
      'class_token': np.zeros((1, 1, 4)),
      'norm': {'scale': np.zeros(4)},
    },
    'heads': {'acts': {'kernel': np.zeros((4, 7))}},
  }
  factors = optim.layer_factors(0.5, TimeSformer(depth=3), params)
  hidden = factors['encoder']['blocks']['mlp']['hidden']
  np.testing.assert_array_equal(hidden['kernel'], np.array([1 / 8, 1 / 4, 1 / 2]).reshape(3, 1, 1))
  np.testing.assert_array_equal(hidden['bias'], np.array([1 / 8, 1 / 4, 1 / 2]).reshape(3, 1))
  assert factors['encoder']['patch_embedding']['kernel'] == factors['encoder']['class_token'] == 1 / 16
  assert factors['encoder']['norm']['scale'] == factors['heads']['acts']['kernel'] == 1


@pytest.mark.slow
def test_layer_decay_scales_the_first_update():
  """The first update of SGD is the learning rate times gradient and weight decay, so factors show in it."""
  one = SGD | {'optimizer__clip_norm': 0.0, 'steps': 2, 'optimizer__weight_decay': 0.1}
  _, _, start, _, _ = make()
  start = jax.device_get(start.params)
  _, plain, _ = run_steps(**one)
  _, decayed, _ = run_steps(optimizer__layer_decay=0.5, **one)
  # The warm-up's first learning rate is 0, so two steps make one update, of the same gradient in both runs.
  factors = optim.layer_factors(0.5, TimeSformer(depth=2), start)
  expected = jax.tree.map(lambda p, s, f: s + f * (p - s), plain.params, start, factors)
  assert_close(decayed.params, expected, atol=1e-7)
  moved = plain.params['encoder']['blocks']['mlp']['hidden']['kernel']
  assert np.any(moved != start['encoder']['blocks']['mlp']['hidden']['kernel'])


# Remat and dtype.


@pytest.mark.slow
@pytest.mark.parametrize(
  ('remat', 'unroll'),
  [
    ('full', 1),
    ('attention', 1),
    ('dots', 1),
    ('attention', 2),
  ],
)
def test_remat_does_not_change_training(remat, unroll):
  expected_losses, expected, _ = run_steps(steps=2)  # with drop paths: the second forward pass must draw the same
  losses, state, _ = run_steps(steps=2, model__remat=remat, model__scan_unroll=unroll)
  assert_close(losses, expected_losses, rtol=1e-5)
  assert_close(state.params, expected.params, atol=1e-5)


@pytest.mark.slow
def test_remat_keeps_less():
  """The policies in order of what the backward pass keeps of a block."""

  def temporaries(remat):
    changes = {'model__remat': remat, 'model__depth': 6, 'streams__video__batch_size': 64, 'batch_size': 72}
    run, mesh, state, _, batches = make(**STILL, **changes)
    optimizer, _ = stepping.make_optimizer(run)
    step = jax.jit(stepping.make_train_step(run, optimizer), donate_argnums=0)
    compiled = step.lower(state, sharding.to_global(next(batches(0)), mesh)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  full, attention, dots, none = map(temporaries, ('full', 'attention', 'dots', 'none'))
  assert full < attention < dots < none


def test_unknown_remat_is_refused():
  with pytest.raises(UserError, match=r"remat is 'some'.*none.*full.*attention.*dots"):
    tiny.build(tiny.config(model__remat='some'))


@pytest.mark.slow
def test_state_is_donated():
  _, mesh, state, step, batches = make()
  before = state.params['encoder']['blocks']['mlp']['hidden']['kernel']
  step(state, sharding.to_global(next(batches(0)), mesh))
  assert before.is_deleted()


@pytest.mark.slow
def test_levers_work_together():
  """All at once still train, on a mesh: bf16, remat, accumulation, a frozen part, layer decay."""
  changes = {
    'dtype': 'bfloat16',
    'model__remat': 'attention',
    'accumulation_steps': 2,
    'optimizer__layer_decay': 0.8,
    'optimizer__learning_rate_rules': (('patch_embedding|position', 0.0), ('.*', 1.0)),
    'mesh_shape': (2, 2, 1),
  }
  run, _, _, _, _ = make(**changes)
  assert dataclasses.asdict(run.streams['video'])['batch_size'] == 8
  losses, state, _ = run_steps(steps=3, **changes)
  assert all(np.isfinite(loss) for step in losses for loss in step.values())
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
