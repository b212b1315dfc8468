"""HDC-style: which frames its clips show, what each level and task is compared with, how levels are weighed."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import hdc_digits, semi_supervised_digits
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings as config_settings
from cover_jax.objectives import hdc
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny, two_levels
from tests.pretext_runs import built, check_resumes, check_shards

PLAIN = {'appearance': {}, 'still_frame': 0.0, 'shuffle': 0.0}
TASKS, LEVELS = ('spatial', 'temporal'), ('near', 'far')


def objective(**options):
  of_run = {'encode': two_levels.encode, 'model': two_levels.TwoLevels(), 'stream': two_levels.STREAM}
  of_run |= {'num_frames': two_levels.FRAMES, 'size': two_levels.SIZE}
  return hdc.make(**of_run, **{'queue_size': 8, 'dim': 5, 'head_layers': 1, 'stride': 1, **PLAIN, **options})


# ---- Which frames.


@settings(max_examples=80, deadline=None)
@given(
  frames=st.integers(2, 60), length=st.integers(2, 8), stride=st.integers(1, 5), gap=st.integers(1, 12),
  shuffle=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_frames_of_the_clips(frames, length, stride, gap, shuffle, seed):
  rng = np.random.default_rng(seed)
  last = max(frames - (length - 1) * stride - 1, 0)
  for generator in (rng, rng, None):
    views = hdc.clips_of_video(frames, generator, length=length, stride=stride, min_gap=gap, shuffle=shuffle)
    assert views['temporal'].tolist() == views['anchor'].tolist()
    for v in views.values():
      assert v.shape == (length,) and v.dtype == np.int64 and v.min() >= 0 and v.max() < frames
    assert views['negative'].tolist() != views['anchor'].tolist()
    in_order = np.sort(views['spatial'])
    if last >= gap:  # two intervals fit
      assert abs(views['negative'][0] - views['anchor'][0]) >= gap
      assert abs(in_order[0] - views['anchor'][0]) >= gap
      assert set(np.diff(in_order)) in [{s} for s in (max(stride // 2, 1), stride, 2 * stride)]
    if generator is None or not shuffle:
      assert views['spatial'].tolist() == in_order.tolist() or last < gap


def test_the_spatial_key_varies_in_rate_start_and_order():
  rng = np.random.default_rng(0)
  options = {'length': 3, 'stride': 2, 'min_gap': 3, 'shuffle': 0.5}
  drawn = [hdc.clips_of_video(14, rng, **options)['spatial'] for _ in range(600)]
  assert {int(np.diff(np.sort(v))[0]) for v in drawn} == {1, 2, 4}
  assert 0.3 < np.mean([np.any(np.diff(v) < 0) for v in drawn]) < 0.55  # 5 of 6 orders of half of them
  assert {int(v.min()) for v in drawn} == set(range(12))


@settings(max_examples=30, deadline=None)
@given(frames=st.sampled_from([3, 4, 7]), seed=st.integers(0, 99))
def test_shuffled_is_neither_the_clip_nor_its_reverse(frames, seed):
  clip = jnp.broadcast_to(jnp.arange(frames, dtype=jnp.float32)[None, :, None], (6, frames, 2))
  order = np.asarray(hdc.shuffled(jax.random.key(seed), clip))
  np.testing.assert_array_equal(order[..., 0], order[..., 1])
  assert (np.sort(order[..., 0]) == np.arange(frames)).all()
  for row in order[..., 0].tolist():
    assert row not in (sorted(row), sorted(row, reverse=True))
  assert frames == 3 or len({tuple(row) for row in order[..., 0].tolist()}) > 1  # each clip has its own


# ---- How levels are weighed.


def test_weights_of_the_levels():
  c = jnp.array([0.1, 0.5, 0.3])
  by = lambda how, c=c, **kw: np.asarray(hdc.level_weights(c, weighting=how, **kw))
  expected = 3 * np.exp(np.asarray(c) / 0.2) / np.exp(np.asarray(c) / 0.2).sum()
  np.testing.assert_allclose(by('invariance'), expected, rtol=1e-5)
  for how in ('uniform', 'invariance', 'inverse'):
    assert by(how).sum() == pytest.approx(3, rel=1e-5)
    np.testing.assert_allclose(by(how, jnp.full(3, 0.7)), 1, rtol=1e-5)
  assert np.argsort(by('inverse')).tolist() == np.argsort(by('invariance'))[::-1].tolist() == [1, 2, 0]
  np.testing.assert_allclose(by('fixed', fixed=(1.0, 0.0, 3.0)), [0.75, 0, 2.25])
  slope = jax.grad(lambda c: (hdc.level_weights(c, weighting='invariance') * jnp.arange(3.0)).sum())(c)
  assert not np.any(slope)


# ---- The objective.


def filled(task, seed=0):
  """(objective, params, state) with full queues of other videos and invariances that differ."""
  params, state = two_levels.start(task, seed)
  rng = np.random.default_rng(7)
  unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
  for queues in state['queues'].values():
    for level, queue in queues.items():
      ids = jnp.arange(8, dtype=jnp.int32)
      queues[level] = queue._replace(
        key_KxD=jnp.asarray(unit(rng.normal(size=(8, 5)))),
        source_K=jnp.zeros(8, jnp.int32),
        video_K=ids - 6,  # slots 6 and 7 are of the videos 0 and 1
        filled=jnp.int32(8),
      )
  for i, name in enumerate(state['invariance']):
    state['invariance'][name] = jnp.array([0.2, 0.4]) * (i + 1)
  return params, state


def vector(params, task, level, clip):
  """A clip's unit vector from the encoder's level, in numpy."""
  level_map = np.asarray(two_levels.encode(params['encoder'], jnp.asarray(clip), levels=(level,)).levels[level])
  x, own = level_map.mean(axis=(1, 2, 3)).astype(np.float64), params['heads'][level]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * np.asarray(own['norm']['scale']) + np.asarray(own['norm']['bias'])
  y = x @ np.asarray(own[task]['layer_0']['kernel']) + np.asarray(own[task]['layer_0']['bias'])
  return y / np.linalg.norm(y, axis=-1, keepdims=True)


def test_loss_by_hand():
  """Every term from the encoder's levels, heads and queues, put together in numpy; keys go into their own queue."""
  task = objective(temporal_weight=0.7, shuffled_negative=False)
  params, state = filled(task)
  params['encoder'] = jax.tree.map(lambda x: 1.1 * x, params['encoder'])  # the teacher is another network
  batch = two_levels.batch(task)
  out = two_levels.jitted(task)(params, state, batch, jax.random.key(0))
  online = {'encoder': params['encoder'], 'heads': params['objectives']['video']['heads']}
  views, total = batch['views'], np.zeros(4)
  for name, rate in (('spatial', 1.0), ('temporal', 0.7)):
    c = np.asarray(state['invariance'][name], np.float64)
    weights = 2 * np.exp(c / 0.2) / np.exp(c / 0.2).sum()
    for i, level in enumerate(LEVELS):
      q, k = vector(online, name, level, views['anchor']), vector(state['teacher'], name, level, views[name])
      n = vector(online, name, level, views['negative'])
      queue = jax.device_get(state['queues'][name][level])
      for b in range(4):
        logits = [q[b] @ k[b], *(q[b] @ key for key, v in zip(queue.key_KxD, queue.video_K, strict=True) if v != b)]
        logits = np.array([*logits, *([q[b] @ n[b]] if name == 'temporal' else [])]) / 0.1
        total[b] += rate * weights[i] * np.log(np.exp(logits - logits[0]).sum())
      after = out.state['queues'][name][level]
      np.testing.assert_allclose(after.key_KxD[:4], k, atol=1e-5)  # of this task and level, and no other
      np.testing.assert_array_equal(after.key_KxD[4:], queue.key_KxD[4:])
      moved = c[i] + 0.01 * ((q * k).sum(-1).mean() - c[i])
      assert float(out.state['invariance'][name][i]) == pytest.approx(moved, abs=1e-5)
      np.testing.assert_allclose(out.measures[f'{name}_weight_{level}'], weights[i], rtol=1e-5)
  np.testing.assert_allclose(out.measures['loss'], total, rtol=1e-4)
  assert float(out.loss) == pytest.approx(total.mean(), rel=1e-4)


def test_margin_is_less_the_queue():
  batch = two_levels.batch(objective())
  moved = {}
  for how in hdc.ESTIMATORS:
    task = objective(estimator=how, weight_momentum=0.0, temporal_weight=0.0)
    params, state = filled(task)
    out = two_levels.jitted(task)(params, state, batch, jax.random.key(0))
    moved[how] = np.asarray(out.state['invariance']['spatial'])
  assert np.abs(moved['positive'] - moved['margin']).max() > 1e-3


def test_strong_changes_reach_the_temporal_key_and_nothing_else():
  """The spatial loss is that without them to the bit; and shuffled anchors only make the temporal loss harder."""
  batch, losses = two_levels.batch(objective()), {}
  for how, options in {
    'plain': {'shuffled_negative': False, 'interval_negative': False},
    'strong': {
      'shuffled_negative': False, 'interval_negative': False, 'still_frame': 0.9,
      'appearance': {'color_jitter': {'brightness': 0.9, 'hue': 0.5}},
    },
    'hard': {},
  }.items():  # fmt: skip
    task = objective(**options)
    params, state = filled(task)
    losses[how] = jax.device_get(two_levels.jitted(task)(params, state, batch, jax.random.key(0)).measures)
  np.testing.assert_allclose(losses['strong']['spatial_loss'], losses['plain']['spatial_loss'], rtol=1e-6)
  assert np.abs(losses['strong']['temporal_loss'] - losses['plain']['temporal_loss']).min() > 1e-4
  assert (losses['hard']['temporal_loss'] > losses['plain']['temporal_loss']).all()
  np.testing.assert_allclose(losses['hard']['spatial_loss'], losses['plain']['spatial_loss'], rtol=1e-5)


def test_gradients_go_where_they_belong():
  """Teacher, queues and keys get none; a head gets its own term's alone."""
  task = objective(weighting='fixed', fixed_weights=(1.0, 0.0))
  params, state = filled(task)
  batch = jax.tree.map(jnp.asarray, two_levels.batch(task))
  clips = {name: x.astype(jnp.float32) for name, x in batch['views'].items()}

  def loss(params, teacher, clips):
    return task.loss(params, {**state, 'teacher': teacher}, {**batch, 'views': clips}, jax.random.key(0)).loss

  by_params, by_teacher, by_clip = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, state['teacher'], clips)
  assert not any(np.any(x) for x in jax.tree.leaves(by_teacher))
  assert {name for name, x in by_clip.items() if np.any(x)} == {'anchor', 'negative'}
  of_heads = by_params['objectives']['video']['heads']
  for name in TASKS:
    assert np.any(of_heads['near'][name]['layer_0']['kernel'])
  assert not any(np.any(x) for x in jax.tree.leaves(of_heads['far']))
  assert np.any(by_params['encoder']['near']['kernel']) and not np.any(by_params['encoder']['far']['kernel'])


def test_a_split_batch_gives_the_same_loss_and_state():
  task = objective()
  params, state = filled(task)
  batch = two_levels.batch(task, examples=8)
  loss = two_levels.jitted(task)
  one = loss(params, state, batch, jax.random.key(0))
  eight = loss(params, state, two_levels.on_all_devices(batch), jax.random.key(0))
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(near, jax.device_get(eight), jax.device_get(one))


def test_joint_is_one_task_and_a_task_of_no_weight_is_left_out():
  views = lambda **options: set(objective(**options).views(40, None))
  assert views() == {'anchor', 'spatial', 'temporal', 'negative'}
  assert views(temporal_weight=0.0) == views(decoupled=False) == {'anchor', 'spatial'}
  assert views(spatial_weight=0.0, interval_negative=False) == {'anchor', 'temporal'}
  task = objective(decoupled=False)
  params, state = two_levels.start(task)
  assert set(state['queues']) == set(state['invariance']) == {'joint'}
  assert set(params['objectives']['video']['heads']['far']) == {'norm', 'joint'}


# ---- In a run.


HDC = {'name': 'hdc', 'stride': 1, 'queue_size': 20, 'dim': 8, 'momentum': 0.9, 'head_hidden': 16, 'appearance': {
  'color_jitter': {'brightness': 0.4}}, 'min_gap': 1}  # fmt: skip
RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 8, 8, 16)}


def config(encoder='timesformer', **changes):
  c = tiny.config(**changes)
  if encoder == 'resnet3d':
    c.model = RESNET
  c.streams.video.objective = HDC
  return c


@pytest.mark.parametrize('encoder', ['resnet3d', pytest.param('timesformer', marks=pytest.mark.slow)])
def test_levels_of_real_encoders(encoder):
  experiment = tiny.build(config(encoder))[0]
  own = jax.eval_shape(experiment.objectives['video'].init_params, jax.random.key(0))
  names = {'resnet3d': {'layer2', 'layer3', 'layer4'}, 'timesformer': {'block1', 'block2'}}[encoder]
  assert set(own['heads']) == names


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['timesformer', 'resnet3d'])
def test_devices_do_not_matter(encoder):
  check_shards(lambda **changes: config(encoder, **changes))


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['timesformer', 'resnet3d'])
def test_resumed_run_is_bit_equal(encoder, tmp_path):
  check_resumes(config(encoder, total_steps=8, checkpoint_every=3), tmp_path)
  assert 'train/video/acts/spatial_weight_' in (tmp_path / 'whole/metrics.jsonl').read_text()


def hues(count):
  """Still clips [count, 4, 8, 8, 3] that differ in hue alone."""
  shades = np.array([colorsys.hsv_to_rgb(i / count, 0.8, 0.8) for i in range(count)]) * 255
  return np.broadcast_to(shades[:, None, None, None], (count, 4, 8, 8, 3)).astype(np.uint8)


def orders(of):
  """Clips of the same four greys in different orders, [len(of), 4, 8, 8, 3]."""
  greys = np.array([20, 90, 160, 230], np.uint8)[np.asarray(of)]
  return np.broadcast_to(greys[:, :, None, None, None], (len(of), 4, 8, 8, 3))


@pytest.mark.parametrize('differs', ['motion', pytest.param('hue', marks=pytest.mark.slow)])
def test_what_each_task_can_use(differs):
  """Videos that differ in hue alone teach the spatial task, those that differ in motion alone the temporal one.

  The other task stays at chance: hue is what strong colours take away, order what another order does.
  """
  strong = {'color_jitter': {'hue': 0.5}, 'grayscale': {'probability': 0.2}} if differs == 'hue' else {}
  alone = {'interval_negative': False, 'shuffled_negative': False, 'weighting': 'uniform', 'levels': ('far',)}
  learns, cannot = TASKS if differs == 'hue' else TASKS[::-1]
  weights = {f'{learns}_weight': 1.0, f'{cannot}_weight': 0.1}  # or what cannot be learnt would hold up the other
  task = objective(**alone, **weights, queue_size=6, appearance=strong, momentum=0.9)
  params, _ = two_levels.start(task)
  params['encoder'] = jax.tree.map(lambda x: 3 * x, params['encoder'])  # curved enough for the order to be seen
  state = task.init_state(params)
  cyclic = [(0, *order) for order in itertools.permutations((1, 2, 3))]  # six videos
  clip = hues(6) if differs == 'hue' else orders(cyclic)
  batch = two_levels.batch(task, 6)
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(params, state, moments, batch, rng):
    def loss(params):
      out = task.loss(params, state, batch, rng)
      return out.loss, out

    gradient, out = jax.grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradient, moments)
    params = optax.apply_updates(params, updates)
    return params, task.after_update(params, out.state), moments, out.measures

  rng, moments, last = np.random.default_rng(0), optimizer.init(params), []
  for i in range(400):
    other = clip if differs == 'hue' else orders([cyclic[k] for k in rng.integers(0, 6, 6)])
    views = {'anchor': clip, 'temporal': clip, 'spatial': other}
    params, state, moments, measures = step(params, state, moments, {**batch, 'views': views}, jax.random.key(i))
    last.append([float(measures[f'{name}_loss'].mean()) for name in TASKS])
  loss = dict(zip(TASKS, np.mean(last[-100:], axis=0), strict=True))
  assert loss[learns] < 0.5 * np.log(6) < 0.9 * np.log(6) < loss[cannot]


@pytest.mark.parametrize(('changes', 'message'), [
  ({'levels': ('block3',)}, r"levels names 'block3': expected levels of the encoder, of block1, block2"),
  ({'spatial_weight': 0.0, 'temporal_weight': 0.0}, 'nothing would be learnt'),
  ({'queue_size': 0}, 'the spatial task has nothing to tell apart'),
  ({'weighting': 'fixed', 'fixed_weights': (1.0,)}, 'one number for each of the levels block1, block2'),
  ({'weighting': 'fixed', 'fixed_weights': (0.0, 0.0)}, 'whose sum lies between'),
  ({'weighting': 'fixed', 'fixed_weights': (1e-46, 0.0)}, 'whose sum lies between'),
  ({'appearance': {'mixup': 1.0}}, r"objective\.appearance has no key 'mixup'"),
  ({'appearance': {'color_jitter': {'hue': 2}}}, r'appearance\.color_jitter\.hue is 2'),
  ({'weighting': 'invariant'}, 'weighting'), ({'momentum': 2.0}, 'momentum'), ({'model': None}, "no key 'model'"),
])  # fmt: skip
def test_mistakes_in_options(changes, message):
  c = config()
  c.streams.video.objective = {**HDC, **changes}
  with pytest.raises(UserError, match=message):
    built(c)


@pytest.mark.parametrize(('frames', 'message'), [(1, 'needs clips of at least 2'), (2, 'can only be shuffled where')])
def test_clips_that_are_too_short(frames, message):
  c = config(streams__video__num_frames=frames)
  with pytest.raises(UserError, match=message):
    built(c)
  with pytest.raises(UserError, match='the video has one frame'):
    objective().views(1, None)


def test_co_training_is_one_line():
  c = semi_supervised_digits.get_config('debug')
  c.streams.unlabelled = hdc_digits.stream('motions_unlabelled', batch_size=8, loss_weight=0.5)
  config_settings.check(c)
  infos = [SourceInfo('motions', 'video', 32, ('a', 'b')), SourceInfo('motions_unlabelled', 'video', 640, ())]
  run = experiments.build(c, infos)
  assert set(run.view_lengths('unlabelled')) == {'anchor', 'spatial', 'temporal', 'negative'}
