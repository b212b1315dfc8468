"""The step and the loop: many devices equal one, a resumed run equals an uninterrupted one, failures are clear."""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax import checkpoints
from cover_jax.experiment import optim
from cover_jax.experiment.state import create, state_shardings
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from cover_jax.training import metrics
from cover_jax.training import step as stepping
from cover_jax.training.finite import NonFiniteLoss
from data_pipelines.contract import UserError
from tests import tiny

ONE_DEVICE = {'data': 1, 'fsdp': 1, 'tensor': 1}


def run_steps(mesh_sizes, steps=20, **changes):
  """Losses [steps] and final parameters of the tiny run on a mesh."""
  count = int(np.prod(list(mesh_sizes.values())))
  config = tiny.config(mesh=mesh_sizes, **changes)
  experiment, mesh, batches, _ = tiny.build(config, jax.devices()[:count])
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  step = stepping.compile_step(experiment, optimizer, mesh)
  losses = []
  for batch in itertools.islice(batches(0), steps):
    state, report = step(state, sharding.to_global(batch, mesh))
    losses.append(float(report['scalars']['loss']))
  return np.array(losses), jax.device_get(state.params), state


@pytest.fixture(scope='module')
def one_device():
  return run_steps(ONE_DEVICE)


@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    (2, 2, 2),
    pytest.param((1, 8, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 8), marks=pytest.mark.slow),
  ],
)
def test_mesh_does_not_change_training(one_device, mesh):
  losses, params, state = run_steps(dict(zip(sharding.AXES, mesh, strict=True)))
  expected_losses, expected_params, _ = one_device
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, expected_params)
  kernel = state.params['encoder']['blocks']['mlp']['hidden']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  moments = state.opt_state['scale'].mu['encoder']['blocks']['mlp']['hidden']['kernel']
  assert moments.sharding.spec == kernel.sharding.spec  # the optimizer follows its parameter


@pytest.mark.slow
def test_training_learns():
  """Random pixels with random labels can only be learnt by heart: the same batch again and again."""
  experiment, mesh, batches, _ = tiny.build(tiny.config(model__drop_path=0.0))
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  step = stepping.compile_step(experiment, optimizer, mesh)
  batch = sharding.to_global(next(batches(0)), mesh)
  losses = []
  for _ in range(20):
    state, report = step(state, batch)
    losses.append(float(report['scalars']['loss']))
  assert losses[-1] < losses[0] - 0.2


def test_gradient_is_that_of_proportional_sampling():
  """Quotas are rounded; loss weights are the exact shares of the union, so they undo the rounding."""
  experiment, _, _, _ = tiny.build(tiny.config())
  weights = {name: s.loss_weight for name, s in experiment.streams.items()}
  assert weights == pytest.approx({'video': 64 / 128, 'image': 64 / 128})
  fixed = tiny.build(tiny.config(streams__video__batch_size=24, batch_size=32))[0]
  assert {n: s.batch_size for n, s in fixed.streams.items()} == {'video': 24, 'image': 8}
  assert {n: s.loss_weight for n, s in fixed.streams.items()} == weights


def test_step_of_all_streams_is_the_weighted_sum():
  experiment, mesh, batches, _ = tiny.build(tiny.config(model__drop_path=0.0))
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  batch = sharding.to_global(next(batches(0)), mesh)
  _, report = stepping.compile_step(experiment, optimizer, mesh)(state, batch)
  losses = report['losses']
  assert float(report['scalars']['loss']) == pytest.approx(
    sum(experiment.streams[n].loss_weight * float(v) for n, v in losses.items()), rel=1e-6
  )


@pytest.mark.slow
def test_no_gradient_reaches_a_head_without_samples():
  """Through the whole step: a source whose weight is zero never moves its head."""
  config = tiny.config(mixture__weights={'acts': 1.0, 'moves': 0.0, 'things': 1.0}, optimizer__weight_decay=0.0)
  experiment, mesh, _, _ = tiny.build(config)
  assert experiment.weights['moves'] == 0
  _, params, state = run_steps(ONE_DEVICE, steps=2)
  assert np.any(params['heads']['moves']['kernel'])  # it does move where it has samples
  sources = tiny.sources()
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  step = stepping.compile_step(experiment, optimizer, mesh)
  _, _, batches, _ = tiny.build(tiny.config())
  batch = next(batches(0))
  video = batch['video'] | {'source': np.zeros_like(batch['video']['source'])}
  video['label'] = video['label'] % len(sources[0].class_names)
  state, _ = step(state, sharding.to_global(batch | {'video': video}, mesh))
  assert not np.any(jax.device_get(state.params['heads']['moves']['kernel']))
  assert np.any(jax.device_get(state.params['heads']['acts']['kernel']))


class Stopped(Exception):
  pass


def train_in(folder, *, stop_before=None, evaluate=None, **changes):
  """Trains the tiny run in a folder; a batch that never comes stands for a kill."""
  experiment, mesh, batches, _ = tiny.build(tiny.config(**changes))

  def cut(start):
    for number, batch in enumerate(batches(start), start + 1):
      if number == stop_before:
        raise Stopped
      yield batch

  return training.train(experiment, cut, str(folder), mesh, evaluate)


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


def test_resumed_run_is_bit_equal(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir(), parts.mkdir()
  expected = train_in(whole)
  for stop in (3, 12, 19):  # before the first save, after a log, near the end
    with pytest.raises(Stopped):
      train_in(parts, stop_before=stop)
  resumed = train_in(parts)
  assert bits(resumed) == bits(expected)  # parameters, optimizer, EMA, step
  read = lambda folder: (folder / 'metrics.jsonl').read_text()
  assert read(parts) == read(whole)
  steps = [row['step'] for row in metrics.read_jsonl(str(whole / 'metrics.jsonl'))]
  assert steps == [4, 8, 12, 16, 20]


@pytest.mark.slow
def test_evaluation_cut_by_a_kill_is_done_again(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir(), parts.mkdir()
  measure = lambda state: {'test/acts/loss': float(state.step), 'test/acts/top1': 0.5}
  train_in(whole, evaluate=measure, eval_every=10, total_steps=15)

  def killed(state):
    raise Stopped

  for _ in range(2):  # after the save of step 10, in the middle of its evaluation
    with pytest.raises(Stopped):
      train_in(parts, evaluate=killed, eval_every=10, total_steps=15)
  with pytest.raises(Stopped):
    train_in(parts, evaluate=measure, eval_every=10, total_steps=15, stop_before=12)
  train_in(parts, evaluate=measure, eval_every=10, total_steps=15)
  train_in(parts, evaluate=measure, eval_every=10, total_steps=15)  # it is finished: nothing is written twice
  assert (parts / 'metrics.jsonl').read_text() == (whole / 'metrics.jsonl').read_text()
  tested = [row['step'] for row in metrics.read_jsonl(str(parts / 'metrics.jsonl')) if 'test/acts/top1' in row]
  assert tested == [10, 15]


@pytest.mark.slow
def test_stop_during_an_evaluation_saves_and_evaluates_again(tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  whole.mkdir(), parts.mkdir()
  measure = lambda state: {'test/acts/loss': float(state.step), 'test/acts/top1': 0.5}
  options = {'eval_every': 7, 'total_steps': 10, 'keep_every': 4, 'keep_best': 'test/acts/loss'}

  def stopped(state):
    raise training.Preempted

  train_in(whole, evaluate=measure, **options)
  with pytest.raises(training.Preempted, match='at step 7 of 10'):
    train_in(parts, evaluate=stopped, **options | {'keep_best': ''})
  assert checkpoints.describe(str(parts))['about']['step'] == 7
  with pytest.raises(training.Preempted, match='at step 7 of 10'):  # again, before its first step
    train_in(parts, evaluate=stopped, **options)
  train_in(parts, evaluate=measure, **options)
  assert (parts / 'metrics.jsonl').read_text() == (whole / 'metrics.jsonl').read_text()
  for folder in (whole, parts):
    kept = {
      n: checkpoints.load(str(folder / checkpoints.FOLDER / n))['about']['step'] for n in ('step-4', 'step-8', 'best')
    }
    assert kept == {'step-4': 4, 'step-8': 8, 'best': 7}
  with pytest.raises(UserError, match=r'keep_best.*test/acts/loss, test/acts/top1'):
    train_in(parts, evaluate=measure, **options | {'keep_best': 'test/act/loss'})


def test_a_request_to_stop_saves_that_step(tmp_path):
  experiment, mesh, batches, _ = tiny.build(tiny.config(total_steps=6))
  calls = itertools.count(1)
  with pytest.raises(training.Preempted, match=r'ckpt-1\.flax at step 3 of 6'):
    training.train(experiment, batches, str(tmp_path), mesh, stop=lambda: next(calls) == 3)


@pytest.mark.slow
def test_resume_restores_and_init_does_not(tmp_path):
  train_in(tmp_path, total_steps=5)
  again = train_in(tmp_path, total_steps=5)
  assert int(again.step) == 5
  loaded = checkpoints.load(str(tmp_path))
  assert loaded['about']['step'] == 5
  assert bits(loaded['state']['params']) == bits(again.params)


@pytest.mark.slow
def test_ema_follows_its_definition():
  params = {'w': jnp.ones(3)}
  ema = {'w': jnp.zeros(3)}
  decay = 0.9
  for step in range(1, 4):
    d = min(decay, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda p, e, d=d: d * e + (1 - d) * p, params, ema)
  experiment, mesh, batches, _ = tiny.build(tiny.config(optimizer__learning_rate=0.0))
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  zero = jax.tree.map(jnp.zeros_like, state.ema)
  expected = jax.tree.map(lambda p: np.asarray(p) * float(ema['w'][0]), state.params)
  state = state.replace(ema=zero)
  step = stepping.compile_step(experiment, optimizer, mesh)
  for batch in itertools.islice(batches(0), 3):
    state, _ = step(state, sharding.to_global(batch, mesh))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.device_get(state.ema), expected)


def test_non_finite_loss_stops_and_names_step_stream_and_checkpoint(tmp_path):
  def labelled(batch):  # with a label that the head does not have: the data set changed under the run
    return batch | {'image': batch['image'] | {'label': np.full(8, 99, np.int32)}}

  with pytest.raises(NonFiniteLoss, match=r'stream image is not finite at step 7\. .*ckpt-1\.flax'):
    _train_with_bad_batch(tmp_path, labelled)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [{}, pytest.param({'dtype': 'bfloat16', 'accumulation_steps': 2, 'ema_decay': 0.0}, marks=pytest.mark.slow)],
)
def test_a_bad_gradient_of_a_finite_loss_is_found_before_the_save(tmp_path, changes):
  """Step 7 would be saved: its loss is finite, and every parameter after it is NaN."""

  def black(batch):
    return batch | {'image': batch['image'] | {'views': {'clip': np.zeros_like(batch['image']['views']['clip'])}}}

  with pytest.raises(NonFiniteLoss, match=r'gradient is not finite.* at step 7\. .*ckpt-1\.flax'):
    _train_with_bad_batch(tmp_path, black, keep_every=7, **changes)
  loaded = checkpoints.load(str(tmp_path))
  assert loaded['about']['step'] == 5
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded['state']))


def _train_with_bad_batch(folder, spoil, **changes):
  """Trains with a spoiled batch at step 7; black clips have a finite loss whose gradient is NaN."""
  experiment, mesh, batches, _ = tiny.build(tiny.config(**{'mesh__data': 1} | changes), jax.devices()[:1])
  plain = experiment.objectives['image']

  def loss(params, state, batch, rng):
    out = plain.loss(params, state, batch, rng)
    brightness = jnp.mean(batch['views']['clip'].astype(jnp.float32))
    # At brightness 0 the root's derivative is infinity, times 0.
    root = jnp.sqrt(brightness * (1 + params['heads']['things']['bias'][0]) ** 2)
    return out._replace(loss=out.loss + 1e-9 * root)

  image = dataclasses.replace(plain, loss=loss)
  experiment = dataclasses.replace(experiment, objectives={**experiment.objectives, 'image': image})

  def spoiled(start):
    for number, batch in enumerate(batches(start), start + 1):
      yield spoil(batch) if number == 7 else batch

  return training.train(experiment, spoiled, str(folder), mesh)


@pytest.mark.slow
def test_metrics_are_averages_over_the_interval(tmp_path):
  train_in(tmp_path, total_steps=4, log_every=4)
  (row,) = metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))
  for name in ('video/acts', 'video/moves', 'image/things'):
    assert 0 <= row[f'train/{name}/top1'] <= row[f'train/{name}/top5'] <= 1
    assert row[f'train/{name}/loss'] > 0
  losses, _, _ = run_steps(ONE_DEVICE, steps=4, total_steps=4)
  assert row['train/loss'] == pytest.approx(losses[-1], rel=1e-4)
  assert row['learning_rate'] == pytest.approx(3e-3 * 0.5 * (1 + np.cos(np.pi * 3 / 4)))  # of the fourth update


def test_weight_decay_and_rates_by_rule():
  tree = {'encoder': {'kernel': jnp.ones(2), 'bias': jnp.ones(2)}, 'heads': {'a': {'kernel': jnp.ones(2)}}}
  values = optim.by_rule((('^heads/', 5.0), ('kernel$', 1.0), ('.*', 0.0)), tree)
  assert values == {'encoder': {'kernel': 1.0, 'bias': 0.0}, 'heads': {'a': {'kernel': 5.0}}}
  with pytest.raises(UserError, match='encoder/bias'):
    optim.by_rule((('kernel', 1.0),), tree)


def test_schedules():
  options = tiny.config().optimizer
  options.learning_rate, options.warmup_steps = 1.0, 10
  cosine = optim.make_schedule(options, 110, 10.0)
  np.testing.assert_allclose(
    [cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6
  )
  options.schedule, options.decay_epochs, options.warmup_steps = 'steps', (2.0, 4.0), 0
  steps = optim.make_schedule(options, 60, 10.0)
  np.testing.assert_allclose([steps(0), steps(19), steps(21), steps(41)], [1, 1, 0.1, 0.01], rtol=1e-5)


def test_every_logical_axis_has_a_rule_and_a_missing_one_is_an_error():
  from cover_jax.models import LOGICAL_AXES

  assert set(LOGICAL_AXES) <= {name for name, _ in sharding.DEFAULT_RULES}
  config = tiny.config()
  config.logical_axis_rules = tuple(r for r in sharding.DEFAULT_RULES if r[0] != 'mlp')
  experiment, mesh, _, _ = tiny.build(config)
  optimizer, _ = stepping.make_optimizer(experiment)
  with pytest.raises(UserError, match='mlp'):
    state_shardings(experiment, optimizer, mesh)


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(one_device):
  losses, _, state = run_steps(ONE_DEVICE, steps=5, dtype='bfloat16')
  np.testing.assert_allclose(losses, one_device[0][:5], rtol=0.03)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_workdir_holds_no_stray_files(tmp_path):
  train_in(tmp_path, total_steps=12)
  kept = sorted(f for f in os.listdir(tmp_path / checkpoints.FOLDER) if f.endswith('.flax'))
  assert kept == ['ckpt-2.flax', 'ckpt-3.flax']  # keep_checkpoints = 2, numbered in order


@pytest.mark.slow
def test_a_profile_is_written_where_the_config_asks_for_it(tmp_path):
  experiment, mesh, batches, _ = tiny.build(tiny.config(total_steps=10, profile_at_step=2), jax.devices()[:1])
  training.train(experiment, batches, str(tmp_path), mesh)
  (profile,) = tmp_path.rglob('*.xplane.pb')
  assert profile.stat().st_size > 1000
