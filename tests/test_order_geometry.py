"""Order and geometry: twelve classes, maps that do what they say, and no way to the answer but the picture's."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import order_geometry_digits, order_geometry_ucf101, order_geometry_ultrasound
from cover_jax.experiment import build as experiments
from cover_jax.objectives import order_geometry, warps
from cover_jax.runtime import keys
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.loading import arrays
from data_pipelines.loading.views import Stream
from tests import tiny
from tests.pretext_runs import built, check_resumes, check_shards, first_losses
from tests.test_vtdl import start

RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 4, 8, 8), 'kind': 'r3d'}
SECTOR = (-0.1, 0.5, 35.0, 0.2, 1.05)


def config(**changes):
  options = {k.removeprefix('own__'): changes.pop(k) for k in list(changes) if k.startswith('own__')}
  model = changes.pop('model', None)
  c = tiny.config(**changes)
  if model:
    c.model = model
    options['parts'] = 'apart'
  c.streams.video.objective = {'name': 'order_geometry', 'gap': 2, 'part_shift': 1, 'hidden': 8, **options}
  return c


def bilinear(picture_HxW, x, y):
  """The value at a place within a picture, by the textbook."""
  i, j = min(int(y), picture_HxW.shape[0] - 2), min(int(x), picture_HxW.shape[1] - 2)
  a, b = y - i, x - j
  p = picture_HxW
  return (1 - a) * ((1 - b) * p[i, j] + b * p[i, j + 1]) + a * ((1 - b) * p[i + 1, j] + b * p[i + 1, j + 1])


def reflected(v, n):
  """By walking back and forth."""
  while not 0 <= v <= n - 1:
    v = -v if v < 0 else 2 * (n - 1) - v
  return v


def smooth(size=(32, 32), count=2, seed=0):
  """Clips of 4 frames of a few waves, f32 [B, 4, H, W, 3]."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[: size[0], : size[1]] / 32
  waves = [np.cos(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 1.5, (count * 12, 3))]
  return np.moveaxis(np.reshape(waves, (count, 4, 3, *size)), 2, -1).astype(np.float32)


# ---- Orders.


@pytest.mark.parametrize('differences', [False, True])
def test_differences_are_those_of_the_pair(differences):
  """The head of the order, in numpy."""
  x_BxPxD = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  head = order_geometry.PairHead(6, differences)
  params = nn.meta.unbox(head.init(jax.random.key(1), x_BxPxD))
  pair, out = (params['params'][name] for name in ('pair', 'out'))
  rows = []
  for parts in x_BxPxD:
    seen = [np.concatenate([a, b, *[np.abs(a - b)] * differences]) for a, b in itertools.combinations(parts, 2)]
    hidden = np.maximum(np.stack(seen) @ pair['kernel'] + pair['bias'], 0).reshape(-1)
    (dense,) = out.values()
    rows.append(hidden @ dense['kernel'] + dense['bias'])
  np.testing.assert_allclose(head.apply(params, x_BxPxD), rows, atol=1e-5)


def test_twelve_classes_of_two_orders_each():
  orders = [tuple(p) for p in order_geometry.PERMUTATIONS.tolist()]
  assert sorted(orders) == sorted(itertools.permutations(range(4)))
  class_of = dict(zip(orders, order_geometry.CLASSES.tolist(), strict=True))
  assert sorted(class_of.values()) == sorted(2 * list(range(12)))
  assert all(class_of[p] == class_of[p[::-1]] for p in orders)
  canonical = sorted({min(p, p[::-1]) for p in orders})
  assert [class_of[p] for p in canonical] == list(range(12))


@settings(max_examples=150, deadline=None)
@given(
  length=st.integers(1, 5), stride=st.integers(1, 3), gap=st.integers(1, 30), jitter=st.sampled_from([0.0, 0.25, 0.9]),
  extra=st.integers(0, 80), seed=st.integers(0, 99),
)  # fmt: skip
def test_parts(length, stride, gap, jitter, extra, seed):
  options = {'length': length, 'stride': stride, 'gap': gap, 'jitter': jitter}
  needed = 3 * length * stride + (length - 1) * stride + 1
  frames = needed + extra
  for rng in (np.random.default_rng(seed), None):
    parts = order_geometry.part_frames(frames, rng, **options).reshape(4, length)
    assert parts.min() >= 0 and parts.max() < frames and (np.diff(parts, axis=1) == stride).all()
    assert (np.diff(parts.ravel()) > 0).all()  # no overlap
    gaps = np.diff(parts[:, 0])
    room = (frames - (length - 1) * stride - 1) // 3
    assert (gaps >= min(max(gap * (1 - jitter), length * stride), room) - 1e-6).all()
    assert (gaps <= min(max(gap * (1 + jitter), length * stride), room) + 1e-6).all()
  with pytest.raises(UserError, match=f'has {needed - 1} frames, and 4 parts .* need {needed};'):
    order_geometry.part_frames(needed - 1, None, **options)


def test_gaps_and_starts_vary():
  drawn = [
    order_geometry.part_frames(60, np.random.default_rng(i), length=1, stride=1, gap=8, jitter=0.25) for i in range(400)
  ]
  assert set(np.diff(drawn).ravel()) == {6, 7, 8, 9, 10} and {d[0] for d in drawn} >= set(range(30))


def test_shuffling_moves_whole_parts():
  clip = np.arange(2 * 8).reshape(2, 8, 1, 1, 1).repeat(3, axis=-1).astype(np.float32)
  order = jnp.array([[2, 0, 3, 1], [0, 1, 2, 3]])
  shuffled, maps = order_geometry._jittered(jax.random.key(0), jnp.asarray(clip), order, 0.0, 0)
  assert shuffled[0, :, 0, 0, 0].tolist() == [4, 5, 0, 1, 6, 7, 2, 3] and maps is None
  assert shuffled[1, :, 0, 0, 0].tolist() == list(range(8, 16))


def test_a_still_video_is_not_asked_for_its_order():
  moving = np.zeros((3, 8, 4, 4, 3), np.float32)
  moving[1, 4:6] = 2.5  # one part differs
  moving[2, 4:6, 0, 0] = 20.0  # but only in a corner: 1.25 on average
  assert order_geometry._moves(jnp.asarray(moving), 2.0).tolist() == [False, True, False]


# ---- Maps.


def theta(**values):
  return jnp.array([[values.get(name, 0.0) for name in warps.PARAMETERS]], jnp.float32)


def test_warp_against_the_textbook():
  rng = np.random.default_rng(0)
  clip = rng.uniform(0, 255, (2, 4, 7, 9, 3)).astype(np.float32)
  maps = np.eye(2, 3) + rng.normal(size=(2, 2, 2, 3)) * [0.3, 0.3, 4]
  warped = np.asarray(jax.jit(warps.warp)(clip, maps.astype(np.float32)))
  for b, t, i, j, c in rng.integers(0, (2, 4, 7, 9, 3), (200, 5)):
    x, y = maps[b, t // 2] @ (j, i, 1)
    expected = bilinear(clip[b, t, :, :, c], reflected(x, 9), reflected(y, 7))
    assert warped[b, t, i, j, c] == pytest.approx(expected, abs=0.02)


def test_the_identity_is_the_clip_to_the_bit():
  clip = smooth()
  np.testing.assert_array_equal(warps.warp(clip, warps.affine_map(jnp.zeros((2, 1, 5)), (32, 32))), clip)


def test_signs_of_the_parameters():
  """A bright pixel right of the centre goes where each parameter says."""
  clip = np.zeros((1, 1, 33, 33, 1), np.float32)
  clip[0, 0, 16, 24] = 1
  place = lambda **of: np.unravel_index(
    int(np.argmax(warps.warp(clip, warps.affine_map(theta(**of)[:, None], (33, 33)))[0, 0, ..., 0])), (33, 33)
  )
  assert place() == (16, 24)
  assert place(rotation=np.pi / 2) == (8, 16)  # counter-clockwise
  assert place(scale=np.log(1.5)) == (16, 28)
  assert place(shift_x=4 / 33) == (16, 28) and place(shift_y=4 / 33) == (20, 24)
  assert place(shear=0.5) == (16, 24)
  clip = np.swapaxes(clip, 2, 3)  # below the centre
  assert place(shear=np.arctan(0.5)) == (24, 12)


def test_there_and_back_again():
  clip = smooth()
  there = warps.affine_map(theta(rotation=0.4, scale=0.1, shear=0.2, shift_x=0.05, shift_y=-0.03)[:, None], (32, 32))
  whole = np.concatenate([there[0, 0], [[0, 0, 1]]])
  back = jnp.asarray(np.linalg.inv(whole)[:2], jnp.float32)[None, None]
  np.testing.assert_allclose(warps.then(there, back), np.eye(2, 3)[None, None], atol=1e-5)
  again = np.asarray(warps.warp(warps.warp(clip, jnp.repeat(there, 2, 0)), jnp.repeat(back, 2, 0)))
  inner = np.s_[:, :, 9:-9, 9:-9]
  assert (
    np.abs(again - clip)[inner].max() < 0.12 and np.corrcoef(again[inner].ravel(), clip[inner].ravel())[0, 1] > 0.99
  )


def test_then_is_one_after_the_other():
  rng = np.random.default_rng(1)
  first, second = np.eye(2, 3) + 0.2 * rng.normal(size=(2, 5, 2, 3))
  expected = first @ np.concatenate([second, np.tile([[[0, 0, 1]]], (5, 1, 1))], axis=1)
  np.testing.assert_allclose(warps.then(jnp.asarray(first), jnp.asarray(second)), expected, atol=1e-5)


def test_a_mirrored_clip_has_mirrored_parameters():
  values = {'rotation': 0.3, 'scale': 0.1, 'shear': 0.15, 'shift_x': 0.08, 'shift_y': 0.05}
  mirrored = values | {name: -values[name] for name in ('rotation', 'shear', 'shift_x')}
  show = lambda clip, of: np.asarray(
    warps.warp(clip, jnp.repeat(warps.affine_map(theta(**of)[:, None], (32, 32)), 2, 0))
  )
  clip = smooth()
  np.testing.assert_allclose(show(clip[:, :, :, ::-1], mirrored)[:, :, :, ::-1], show(clip, values), atol=2e-3)
  for name in values:
    assert (
      np.abs(show(clip[:, :, :, ::-1], mirrored | {name: -mirrored[name]})[:, :, :, ::-1] - show(clip, values)).max()
      > 0.1
    )


def test_one_map_for_all_frames_and_a_shift_for_each_part():
  clip = np.broadcast_to(smooth(count=1)[:, :1], (1, 8, 32, 32, 3))
  of_clip = warps.affine_map(theta(rotation=0.3), (32, 32))
  warped = np.asarray(order_geometry._show(jnp.asarray(clip), None, of_clip, None))
  assert (warped == warped[:, :1]).all() and np.abs(warped - clip).max() > 0.1
  shifts = warps.translation(jnp.array([[0.0, 2, 0, -3]]), jnp.array([[0.0, 0, 1, 2]]))
  shifted = np.asarray(order_geometry._show(jnp.asarray(clip), shifts, None, None))
  inner = shifted[:, :, 4:-4, 4:-4]
  for part, (dx, dy) in enumerate([(0, 0), (2, 0), (0, 1), (-3, 2)]):
    np.testing.assert_array_equal(inner[:, 2 * part], clip[:, 0, 4 - dy : 28 - dy, 4 - dx : 28 - dx])


@pytest.mark.parametrize('kind', ['params', 'matrix6'])
def test_targets(kind):
  range_5 = np.array([0.5, 0.2, 0.25, 0.1, 0.1])
  target = order_geometry._target(kind, range_5)
  np.testing.assert_allclose(target(np.zeros((1, 5)), np), 0, atol=1e-12)
  drawn = np.random.default_rng(0).uniform(-1, 1, (5000, 5))
  values = target(drawn, np)
  assert values.shape == (5000, 5 if kind == 'params' else 6) and 0.8 < np.abs(values).max() <= 1 + 1e-9
  np.testing.assert_allclose(target(jnp.asarray(drawn[:9], jnp.float32), jnp), values[:9], atol=1e-5)
  if kind == 'params':  # each parameter moves its own target alone; one without a range has none
    np.testing.assert_array_equal(target(np.eye(5), np), np.eye(5))
    assert order_geometry._target(kind, range_5 * [1, 0, 1, 0, 0])(drawn, np).shape == (5000, 2)
  else:  # the entries of the map, from its definition
    a, s, k = drawn[7, :3] * range_5[:3]
    linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ [[1, np.tan(k)], [0, 1]] / np.exp(s)
    entries = np.column_stack([linear - np.eye(2), -linear @ (drawn[7, 3:] * 0.1)]).ravel()
    ratio = values[7] / entries
    again = target(np.array([[0.3, -0.5, 0.9, -0.2, 0.4]]), np)[0]
    a, s, k = np.array([0.3, -0.5, 0.9]) * range_5[:3]
    linear = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) @ [[1, np.tan(k)], [0, 1]] / np.exp(s)
    other = np.column_stack([linear - np.eye(2), -linear @ [-0.02, 0.04]]).ravel()
    np.testing.assert_allclose(again, ratio * other, rtol=1e-6)


# ---- Fields of view.


def test_the_sector_stays_where_it_is():
  """Whatever the map, the same pixels are shown, none of them is black, and nothing from outside comes in."""
  sector = warps.Sector(*SECTOR)
  mask = warps.inside(sector, 48, 48)
  assert 0.3 < mask.mean() < 0.8
  clip = np.where(mask[None, None, :, :, None] > 0, 100.0, 7000.0) * np.ones((1, 4, 48, 48, 3))
  for seed in range(6):
    unit = np.random.default_rng(seed).uniform(-1, 1, 5) * [0.5, 0.2, 0.25, 0.1, 0.1]
    maps = warps.affine_map(jnp.asarray(unit, jnp.float32)[None, None], (48, 48))
    shown = np.asarray(warps.warp(jnp.asarray(clip, jnp.float32), maps, sector))
    assert (shown[0, 0, mask == 0] == 0).all()
    np.testing.assert_allclose(shown[0, 0, mask > 0], 100, atol=1e-2)


def test_a_border_would_tell_the_angle_and_this_one_does_not():
  """On pictures of one brightness each there is nothing to see but the border: a linear model finds no parameter."""
  rng = np.random.default_rng(0)
  unit = rng.uniform(-1, 1, (600, 5))
  range_5 = np.array([0.5, 0.2, 0.25, 0.1, 0.1])
  maps = warps.affine_map(jnp.asarray(unit * range_5, jnp.float32)[:, None], (16, 16))
  flat = jnp.asarray(rng.uniform(50, 200, (600, 1, 1, 1, 1)) * np.ones((1, 1, 16, 16, 1)), jnp.float32)
  field = warps.inside(warps.Sector(*SECTOR), 16, 16)[..., None]

  def explained(pictures):
    x = np.asarray(pictures).reshape(600, -1)
    x = np.column_stack([x / x.mean(axis=1, keepdims=True), np.ones(600)])
    weights = np.linalg.solve(x[:400].T @ x[:400] + 1e-3 * np.eye(x.shape[1]), x[:400].T @ unit[:400])
    return 1 - ((x[400:] @ weights - unit[400:]) ** 2).mean(axis=0) / unit[400:].var(axis=0)

  assert explained(warps.warp(flat, maps)).max() < 0.05
  assert explained(warps.warp(flat, maps, warps.Sector(*SECTOR))).max() < 0.05
  assert explained(warps.warp(flat * field, maps)).max() > 0.5  # the field of view turned with the picture


# ---- Shortcuts.


def test_a_still_video_does_not_tell_its_order():
  """A linear model on raw pixels of 5,000 still clips stays at chance: colours and shifts of the parts tell nothing."""
  rng = np.random.default_rng(0)
  still = rng.uniform(0, 255, (5000, 1, 6, 6, 3)).repeat(4, axis=1).astype(np.float32)
  which = rng.integers(0, 24, 5000)
  order = jnp.asarray(order_geometry.PERMUTATIONS)[which]
  shuffled, maps = order_geometry._jittered(jax.random.key(0), jnp.asarray(still), order, 0.4, 1)
  pixels = np.asarray(order_geometry._show(shuffled, maps, None, None)).reshape(5000, -1) / 255 - 0.5
  x = np.column_stack([pixels, np.ones(5000)])
  label = order_geometry.CLASSES[which]
  weights = np.linalg.solve(x[:4000].T @ x[:4000] + 10 * np.eye(x.shape[1]), x[:4000].T @ np.eye(12)[label[:4000]])
  accuracy = (np.argmax(x[4000:] @ weights, axis=1) == label[4000:]).mean()
  assert accuracy < 1 / 12 + 3 * (1 / 12 * 11 / 12 / 1000) ** 0.5


# ---- The objective.


def computed(c, key=3):
  """(experiment, state, batch, output, gradients) of one loss of the video stream."""
  experiment, _, batches, state, _ = start(c)
  batch = next(batches(0))['video']

  def loss(params):
    out = experiment.objectives['video'].loss(params, {}, batch, jax.random.key(key))
    return out.loss, out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
  return experiment, state, batch, jax.device_get(out), gradients


@pytest.mark.parametrize('model', [None, RESNET], ids=['timesformer', 'resnet3d'])
def test_loss_by_hand(model):
  """The joint loss in numpy, from the tokens that the encoder makes of what is shown."""
  plain = {'own__part_colours': 0.0, 'own__part_shift': 0, 'own__still': 0.0}
  c = config(model=model, **plain) if model else config(model__drop_path=0.0, **plain)
  experiment, state, batch, out, _ = computed(c)
  key = jax.random.key(3)
  which = np.asarray(jax.random.randint(keys.of(key, 'order'), (8,), 0, 24))
  unit = np.asarray(jax.random.uniform(keys.of(key, 'geometry'), (8, 5), minval=-1.0))
  units = np.array([np.radians(30), np.log(1.25), np.radians(15), 0.1, 0.1])
  clip = np.asarray(batch['views']['clip'], np.float32)
  clip = np.stack([clip[b][order_geometry.PERMUTATIONS[which[b]]] for b in range(8)])
  maps = warps.affine_map(jnp.asarray(unit * units, jnp.float32), (16, 16))[:, None]
  clip = warps.warp(clip, maps)
  clip = clip.reshape(32, 1, 16, 16, 3) if model else clip
  encode = jax.jit(lambda p, x: experiment.encode(p, x, rng=keys.of(key, 'encode')).tokens_BxTxHxWxD)
  tokens = np.asarray(encode(state.params['encoder'], clip), np.float64)
  parts = tokens.reshape(8, 4, -1, tokens.shape[-1]).mean(axis=2)
  own = jax.device_get(state.params['objectives']['video'])
  dense = lambda x, p: x @ p['kernel'] + p['bias']
  for b in range(8):
    pairs = [
      np.maximum(dense(np.concatenate([parts[b, i], parts[b, j]]), own['order']['pair']), 0)
      for i in range(4) for j in range(i + 1, 4)
    ]  # fmt: skip
    logits = dense(np.concatenate(pairs), own['order']['out']['Dense_0'])
    y = order_geometry.CLASSES[which[b]]
    entropy = np.log(np.exp(logits - logits[y]).sum())
    error = np.abs(dense(parts[b].mean(axis=0), own['geometry']['Dense_0']) - unit[b])
    huber = np.where(error < 0.1, 0.5 * error**2, 0.1 * (error - 0.05)).mean()
    assert out.measures['order_loss'][b] == pytest.approx(entropy, rel=1e-3)
    assert out.measures['geometry_loss'][b] == pytest.approx(huber, rel=1e-2, abs=1e-5)
    assert out.measures['loss'][b] == pytest.approx(entropy + huber, rel=1e-3)
    assert bool(out.measures['top1'][b]) == (np.argmax(logits) == y)
    assert out.measures['geometry_mse'][b] == pytest.approx((error**2).mean(), rel=1e-2)
    assert out.measures['rotation_error'][b] == pytest.approx(30 * error[0], rel=1e-2, abs=1e-3)
    assert out.measures['scale_error'][b] == pytest.approx(np.log(1.25) * error[1], rel=1e-2, abs=1e-4)
    assert out.measures['shift_y_error'][b] == pytest.approx(0.1 * error[4], rel=1e-2, abs=1e-4)
  assert out.loss == pytest.approx(out.measures['loss'].mean(), rel=1e-5)
  assert (out.statistics is None) == (model is None)


@pytest.mark.parametrize('still', [0.0, pytest.param(1e6, marks=pytest.mark.slow)])
def test_weights_of_order_and_geometry(still):
  """A still video is not asked for its order, whatever the weight."""
  options = {'own__order_weight': 2.0, 'own__geometry_weight': 0.5, 'own__still': still, 'model__drop_path': 0.0}
  experiment, _, batches, state, _ = start(config(**options))
  measures = jax.jit(experiment.objectives['video'].loss)(
    state.params, {}, next(batches(0))['video'], jax.random.key(3)
  ).measures
  assert np.all(measures['order_loss'] > 0) == (still == 0) == np.any(measures['order_loss'] > 0)
  total = 2 * measures['order_loss'] + 0.5 * measures['geometry_loss']
  np.testing.assert_allclose(measures['loss'], total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('alone', [{'geometry_weight': 0.0}, {'order_weight': 0.0}], ids=['order', 'geometry'])
def test_of_one_task_both_strategies_are_one(alone):
  options = {f'own__{k}': v for k, v in alone.items()} | {'model__drop_path': 0.1}
  joint, parallel = (computed(config(own__strategy=s, **options)) for s in ('joint', 'parallel'))
  assert joint[3].loss == parallel[3].loss != 0
  jax.tree.map(np.testing.assert_array_equal, joint[4], parallel[4])
  task = 'order' if 'geometry_weight' in alone else 'geometry'
  assert list(joint[1].params['objectives']['video']) == [task]
  assert ('top1' in joint[3].measures) == (task == 'order') != ('geometry_mse' in joint[3].measures)


@pytest.mark.slow
def test_still_videos_have_no_gradient_of_their_order():
  experiment, state, batch, _, _ = computed(config(own__geometry_weight=0.0))
  loss = lambda params, clips: experiment.objectives['video'].loss(
    params, {}, {**batch, 'views': {'clip': clips}}, jax.random.key(0)
  )
  still = np.broadcast_to(batch['views']['clip'][:, :1], batch['views']['clip'].shape)
  gradients, out = jax.jit(jax.grad(lambda p: (lambda o: (o.loss, o))(loss(p, still)), has_aux=True))(state.params)
  assert not any(np.any(g) for g in jax.tree.leaves(gradients)) and not np.any(out.measures['moving'])
  assert not np.any(out.measures['top1'])


@pytest.mark.parametrize('options', [
  pytest.param({'strategy': 'parallel'}, marks=pytest.mark.slow),
  {'transform_target': 'aet', 'sector': SECTOR},
  pytest.param({'transform_target': 'aet', 'strategy': 'parallel'}, marks=pytest.mark.slow),
  pytest.param({'transform_target': 'matrix6', 'parts': 'apart', 'scale': 1.0}, marks=pytest.mark.slow),
])  # fmt: skip
def test_options_are_finite_and_learn(options):
  _, state, _, out, gradients = computed(config(**{f'own__{k}': v for k, v in options.items()}))
  assert np.isfinite(out.loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  own = state.params['objectives']['video']
  aet = options.get('transform_target') == 'aet'
  assert own['geometry']['Dense_0']['kernel'].shape == (
    32 if aet else 16,
    5 if 'transform_target' not in options else 6,
  )
  assert all(np.any(g) for g in jax.tree.leaves(gradients['objectives']['video']))
  assert ('rotation_error' in out.measures) == ('transform_target' not in options)


@pytest.mark.slow
def test_it_learns_one_batch():
  changes = {'own__part_colours': 0.0, 'own__part_shift': 0, 'model__drop_path': 0.0, 'own__geometry_weight': 0.0}
  losses = first_losses(config(total_steps=200, optimizer__learning_rate=1e-2, **changes), 150)
  assert np.mean(losses[-10:]) < 0.8 * np.log(12)


@pytest.mark.parametrize('model', [None, RESNET])
@pytest.mark.slow
def test_sharded_is_unsharded(model):
  check_shards(lambda **changes: config(model=model, **changes))


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path):
  text = check_resumes(config(total_steps=6, checkpoint_every=3, log_every=2), tmp_path)
  assert 'train/video/acts/top1' in text and 'train/video/moves/rotation_error' in text


# ---- Mistakes.


@pytest.mark.parametrize(('options', 'message'), [
  ({'strategy': 'both'}, 'strategy'), ({'gap': 0}, 'gap'), ({'gap_jitter': 1.0}, 'gap_jitter'),
  ({'scale': 0.5}, 'scale'), ({'rotation': -1.0}, 'rotation'), ({'transform_target': 'matrix'}, 'transform_target'),
  ({'order_weight': 0.0, 'geometry_weight': 0.0}, 'nothing is asked'), ({'slots': 4}, "no key 'slots'"),
  ({'order_weight': 0.0, 'rotation': 0.0, 'scale': 1.0, 'shear': 0.0, 'shift': 0.0}, 'nothing is asked'),
  ({'sector': (10.0, 10.0, 1.0, 0.0, 0.1)}, r'a field of view of 0\.0% of a clip'),
  ({'part_shift': 2**31}, 'part_shift'),
  ({'order_weight': 0.0, 'transform_target': 'matrix6', 'rotation': 1e-8, 'scale': 1.0, 'shear': 0.0, 'shift': 0.0},
   'nothing is asked'),
  ({'sector': (0.0, 0.5, 100.0, 0.1, 1.0)}, 'objective.sector is'), ({'sector': (0.0, 0.5)}, 'sector is'),
])  # fmt: skip
def test_mistakes_in_options(options, message):
  with pytest.raises(UserError, match=message):
    built(config(**{f'own__{k}': v for k, v in options.items()}))


def test_streams_and_encoders_that_do_not_do():
  c = config()
  c.streams.image.objective = {'name': 'order_geometry'}
  with pytest.raises(UserError, match=r'streams.image.num_frames is 1: order_geometry cuts clips .* not images'):
    built(c)
  with pytest.raises(UserError, match=r"makes 1 steps in time, which are no 4 parts: set objective\.parts='apart'"):
    c = config(model=RESNET)
    c.streams.video.objective.parts = 'together'
    built(c)
  with pytest.raises(UserError, match=r'parts of 4 of its 16 frames and .*at least 5 frames'):
    c = config(model={'name': 's3d'}, streams__video__num_frames=16, streams__video__size=32)
    c.streams = {'video': c.streams.video}
    c.sources = {name: c.sources[name] for name in ('acts', 'moves')}
    experiments.build(c, [SourceInfo(name, 'video', 20, ('a', 'b')) for name in ('acts', 'moves')])


def test_a_video_too_short_is_named_before_the_first_step():
  views = built(config()).objectives['video'].views
  videos = [np.zeros((n, 16, 16, 3), np.uint8) for n in (8, 3, 9)]
  with pytest.raises(UserError, match=r'No clips can be made of example 1 .*the video has 3 frames, and 4 parts of 1'):
    arrays.array_batches([arrays.array_source('talks', videos)], {'unlabelled': Stream((0,), 4, 16, 2, views=views)}, 0)


@pytest.mark.parametrize('variant', ['', 'debug'])
@pytest.mark.parametrize('module', [order_geometry_digits, order_geometry_ucf101, order_geometry_ultrasound])
def test_configs_build(module, variant):
  c = module.get_config(variant)
  experiments.build(c, [SourceInfo(name, 'video', 500, ()) for name in c.sources])
