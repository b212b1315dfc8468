"""MoDist-style: what motion is, which queue each term looks into, where gradients go, what an export leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cover_jax
from configs import modist_digits, semi_supervised_digits
from cover_jax import export, objectives
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings as config_settings
from cover_jax.experiment.state import state_shardings
from cover_jax.objectives import modist
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny, two_levels
from tests.pretext_runs import built, check_resumes, check_shards
from tests.test_train import bits

MOTION_ENCODER = {'name': 'resnet3d', 'kind': 'mc3', 'depths': (1,), 'widths': (4,)}
SIDES = ('visual', 'motion')


def objective(**options):
  of_run = {'encode': two_levels.encode, 'model': two_levels.TwoLevels(), 'stream': two_levels.STREAM}
  of_run |= {'num_frames': two_levels.FRAMES, 'size': two_levels.SIZE, 'width': 6}
  own = {'queue_size': 8, 'dim': 5, 'head_layers': 1, 'stride': 2, 'min_shift': 3, 'motion_weight': 1.0}
  return modist.make(**of_run, **{**own, 'motion_encoder': MOTION_ENCODER, **options})


# ---- Frames and motion.


@pytest.mark.parametrize('frames', [2, 9, 30, 400])
def test_two_clips(frames):
  rng = np.random.default_rng(0)
  options = {'length': 9, 'stride': 1, 'min_shift': 5, 'max_shift': 12}
  shifts = set()
  for generator in [rng] * 300 + [None]:
    views = modist.two_clips(frames, generator, **options)
    for v in views.values():
      assert v.shape == (9,) and v.min() >= 0 and v.max() < frames
    shifts.add(abs(int(views['first'][0] - views['second'][0])))
  if frames >= 30:
    assert shifts == set(range(5, 13))


def test_frame_difference():
  still = np.full((1, 5, 6, 6, 3), 90, np.uint8)
  clip = np.random.default_rng(0).integers(0, 200, (2, 5, 6, 6, 3)).astype(np.uint8)
  of = lambda x: np.asarray(modist.motion_of(jnp.asarray(x), kind='frame_difference'))
  assert of(still).shape == (1, 4, 6, 6, 3) and not of(still).any()
  luma = clip.astype(np.float64) @ [0.299, 0.587, 0.114] / 255
  d = np.diff(luma, axis=1)
  np.testing.assert_allclose(of(clip), np.stack([np.maximum(d, 0), np.maximum(-d, 0), np.abs(d)], -1), atol=1e-5)
  np.testing.assert_allclose(of(clip[:, ::-1])[:, ::-1], of(clip)[..., [1, 0, 2]], atol=1e-6)  # time reversed
  np.testing.assert_allclose(of(clip + np.uint8(40)), of(clip), atol=1e-6)  # brightness that is added to all


def moving_square(step):
  clip = np.full((1, 3, 32, 32, 3), 60, np.uint8)
  clip += np.random.default_rng(0).integers(0, 8, (1, 1, 32, 32, 1)).astype(np.uint8)
  for t in range(3):
    x = 10 + step * t
    clip[0, t, 10:22, x : x + 12] = 200
  return clip


def test_flow_is_scaled_and_mirrors():
  of = lambda x: np.asarray(modist.motion_of(jnp.asarray(x), kind='flow', flow='normal'))
  flow, mirrored = of(moving_square(1)), of(moving_square(1)[:, :, :, ::-1])
  assert flow.shape == (1, 2, 32, 32, 3) and flow[..., 2].max() == pytest.approx(1)
  np.testing.assert_allclose(np.linalg.norm(flow[..., :2], axis=-1), flow[..., 2], atol=1e-5)
  assert flow[0, 0, 12:20, 8:24, 0].sum() > 1  # to the right
  np.testing.assert_allclose(mirrored[:, :, :, ::-1] * [-1, 1, 1], flow, atol=1e-4)
  assert not of(moving_square(0)).any()


def test_edges_of_flow_are_where_motion_changes():
  of = lambda x: np.asarray(modist.motion_of(jnp.asarray(x), kind='flow_edges', flow='normal'))
  edges = of(moving_square(1))
  assert edges.shape == (1, 2, 32, 32, 3) and edges.min() >= 0 and edges.max() > 0.1
  assert edges[0, 0, 4:28, 4:28].mean() > 5 * edges[0, 0, :3].mean()


@pytest.mark.slow
def test_tvl1_is_the_default_flow():
  clip = jnp.asarray(moving_square(1))
  flow = np.asarray(modist.motion_of(clip, kind='flow'))
  assert flow[0, 0, 12:20, 12:20, 0].mean() > 0.5


# ---- The objective.


def filled(task):
  """(params, state) with full queues of other videos, whose motion statistics have moved."""
  params, state = two_levels.start(task)
  rng = np.random.default_rng(7)
  unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
  for side in SIDES:
    state['queues'][side] = state['queues'][side]._replace(
      key_KxD=jnp.asarray(unit(rng.normal(size=(8, 5)))),
      source_K=jnp.zeros(8, jnp.int32),
      video_K=jnp.arange(8, dtype=jnp.int32) - 6,  # slots 6 and 7 are of the videos 0 and 1
      filled=jnp.int32(8),
    )
  return params, state


def embed(task_params, side, clip, train=False):
  """Unit vectors of one pathway, from raw pixels of a view of 9 frames."""
  if side == 'visual':
    feature = two_levels.encode(task_params['encoder'], jnp.asarray(clip[:, :-1:2])).feature_BxD
  else:
    encoder = modist.encoders.make(MOTION_ENCODER, 'float32')
    motion = modist.motion_of(jnp.asarray(clip), kind='frame_difference')
    rng = jax.random.key(0) if train else None
    feature = modist.encoders.run(encoder, task_params['encoder'], motion, rng=rng).feature_BxD
  y = np.asarray(feature) @ np.asarray(task_params['head']['layer_0']['kernel'])
  y = y + np.asarray(task_params['head']['layer_0']['bias'])
  return y / np.linalg.norm(y, axis=-1, keepdims=True)


def online(params, state):
  own = params['objectives']['video']
  motion = {**own['motion_encoder'], modist.STATISTICS: state['statistics']}
  return {
    'visual': {'encoder': params['encoder'], 'head': own['head']},
    'motion': {'encoder': motion, 'head': own['motion_head']},
  }


@pytest.mark.parametrize('pair', ['other', pytest.param('same', marks=pytest.mark.slow)])
def test_loss_by_hand(pair):
  """All four terms in numpy: the negatives of each are the queue of its key's pathway."""
  task = objective(cross_weight=0.6, motion_weight=0.3, cross_pair=pair)
  params, state = filled(task)
  batch = two_levels.batch(task)
  out = two_levels.jitted(task)(params, state, batch, jax.random.key(0))
  student, teacher = online(params, state), state['teacher']
  first, second = batch['views']['first'], batch['views']['second']
  query = {side: embed(student[side], side, first, train=True) for side in SIDES}
  key = {side: {'second': embed(teacher[side], side, second)} for side in SIDES}
  if pair == 'same':
    key = {side: key[side] | {'first': embed(teacher[side], side, first)} for side in SIDES}
  partner = {'other': 'second', 'same': 'first'}[pair]
  total = np.zeros(4)
  for name, weight, q, k, clip in (
    ('visual', 1.0, 'visual', 'visual', 'second'), ('visual_to_motion', 0.6, 'visual', 'motion', partner),
    ('motion_to_visual', 0.6, 'motion', 'visual', partner), ('motion', 0.3, 'motion', 'motion', 'second'),
  ):  # fmt: skip
    queue, loss = jax.device_get(state['queues'][k]), np.zeros(4)
    for b in range(4):
      logits = [query[q][b] @ key[k][clip][b]]
      logits += [query[q][b] @ x for x, v in zip(queue.key_KxD, queue.video_K, strict=True) if v != b]
      logits = np.array(logits, np.float64) / 0.1
      loss[b] = np.log(np.exp(logits - logits[0]).sum())
    np.testing.assert_allclose(out.measures[f'{name}_loss'], loss, rtol=2e-4, atol=1e-5)
    total += weight * loss
  np.testing.assert_allclose(out.measures['loss'], total, rtol=2e-4)
  for side in SIDES:
    np.testing.assert_allclose(out.state['queues'][side].key_KxD[:4], key[side]['second'], atol=1e-4)
  # The motion encoder's statistics have moved, the teacher's follow after the update alone.
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), out.state['statistics'], state['statistics'])
  assert min(jax.tree.leaves(moved)) > 0
  assert bits(out.state['teacher']) == bits(state['teacher'])
  follows = task.after_update(params, out.state)['teacher']['motion']['encoder'][modist.STATISTICS]
  expected = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b, state['statistics'], out.state['statistics'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), follows, expected)


def test_motion_is_of_the_raw_pixels_and_without_cross_terms_this_is_moco():
  """Colours of the stream reach the visual clips alone; without weights for motion there is one term."""
  task = objective()
  params, state = filled(task)
  batch = two_levels.batch(task)
  dark = objectives.augmented(task, lambda rng, clip: clip.astype(jnp.float32) * 0.3)
  plain = two_levels.jitted(task)(params, state, batch, jax.random.key(0))
  changed = two_levels.jitted(dark)(params, state, batch, jax.random.key(0))
  np.testing.assert_allclose(changed.measures['motion_loss'], plain.measures['motion_loss'], rtol=1e-5)
  assert np.abs(changed.measures['visual_loss'] - plain.measures['visual_loss']).max() > 1e-4
  alone = objective(cross_weight=0.0, motion_weight=0.0)
  out = two_levels.jitted(alone)(params, state, batch, jax.random.key(0))
  assert set(out.measures) == {'loss', 'visual_loss', 'visual_top1'}
  np.testing.assert_allclose(out.measures['loss'], plain.measures['visual_loss'], rtol=1e-6)
  assert bits(out.state['queues']['motion']) == bits(state['queues']['motion'])


def test_gradients_go_where_they_belong():
  """The motion encoder learns from its own queries, the visual one from its own; teachers get none."""
  found = {}
  for name, options in {'all': {}, 'visual': {'cross_weight': 0.0, 'motion_weight': 0.0}}.items():
    task = objective(**options)
    params, state = filled(task)
    batch = two_levels.batch(task)
    loss = lambda p, teacher: task.loss(p, {**state, 'teacher': teacher}, batch, jax.random.key(0)).loss  # noqa: B023
    found[name], by_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, state['teacher'])
    assert not any(np.any(x) for x in jax.tree.leaves(by_teacher))
  for name, gradient in found.items():
    assert np.any(gradient['encoder']['near']['kernel'])
    own = gradient['objectives']['video']
    for part in ('motion_encoder', 'motion_head'):
      assert any(np.any(x) for x in jax.tree.leaves(own[part])) == (name == 'all')
  # A visual query meets the key of motion, which comes from the teacher: its term moves nothing of the motion pathway.
  task = objective(motion_weight=0.0)
  params, state = filled(task)
  batch = two_levels.batch(task)
  term = lambda p: task.loss(p, state, batch, jax.random.key(0)).measures['visual_to_motion_loss'].sum()
  own = jax.jit(jax.grad(term))(params)['objectives']['video']
  assert np.any(own['head']['layer_0']['kernel'])
  assert not any(np.any(x) for part in ('motion_encoder', 'motion_head') for x in jax.tree.leaves(own[part]))


def test_a_split_batch_gives_the_same_loss_and_state():
  task = objective()
  params, state = filled(task)
  batch = two_levels.batch(task, examples=8)
  loss = two_levels.jitted(task)
  one = loss(params, state, batch, jax.random.key(0))
  eight = loss(params, state, two_levels.on_all_devices(batch), jax.random.key(0))
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(near, jax.device_get(eight), jax.device_get(one))


# ---- In a run.


MODIST = {'name': 'modist', 'stride': 2, 'min_shift': 1, 'queue_size': 20, 'dim': 8, 'momentum': 0.9, 'head_hidden': 16,
          'motion_weight': 1.0, 'motion_encoder': MOTION_ENCODER}  # fmt: skip
RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 8, 8, 16)}


def config(encoder='timesformer', **changes):
  c = tiny.config(**changes)
  if encoder == 'resnet3d':
    c.model = RESNET
  c.streams.video.objective = MODIST
  return c


def test_the_encoder_sees_a_part_of_each_view():
  experiment = tiny.build(config())[0]
  assert experiment.view_lengths('video') == {'first': 9, 'second': 9}
  assert experiment.encoded_clips('video') == dict.fromkeys(('first', 'second'), (4, 16, 16))
  clip = np.arange(9)[None, :, None, None, None]
  assert clip[:, :-1:2].ravel().tolist() == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['timesformer', 'resnet3d'])
def test_devices_do_not_matter(encoder):
  """The motion encoder's statistics, too, are those of the global batch."""
  check_shards(lambda **changes: config(encoder, **changes))


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['timesformer', 'resnet3d'])
def test_resumed_is_bit_equal_and_an_export_is_the_visual_encoder(encoder, tmp_path):
  check_resumes(config(encoder, total_steps=8, checkpoint_every=3), tmp_path)  # teachers, queues, motion statistics

  export.export(str(tmp_path / 'whole'), str(tmp_path / 'model.flax'), 'flax')
  loaded, whole = (cover_jax.load(str(tmp_path / name)) for name in ('model.flax', 'whole'))
  assert not loaded.params.get('objectives')
  assert jax.tree.structure(loaded.params['encoder']) == jax.tree.structure(whole.params['encoder'])
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(loaded.params)]
  assert not any('motion' in name for name in names)
  # It seeds a labelled run, which lacks nothing.
  c = tiny.config(init_from__path=str(tmp_path / 'whole'))
  if encoder == 'resnet3d':
    c.model = RESNET
  experiment, mesh, _, _ = tiny.build(c)
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  seeded = initialise.start(experiment, optimizer, mesh, placed)
  assert bits(seeded.params['encoder']) == bits(whole.params['encoder'])


@pytest.mark.parametrize(('changes', 'message'), [
  ({'stride': 3}, 'stride=3 and motion_per_frame=2'), ({'min_shift': 9, 'max_shift': 5}, 'min_shift=9 above'),
  ({'motion_encoder': {'name': 'resnet4d'}}, r'objective\.motion_encoder\.name'),
  ({'motion_encoder': {'name': 'resnet3d', 'depth': 3}}, r"objective\.motion_encoder has the key 'depth', which is of"),
  ({'motion_encoder': {'name': 'resnet3d', 'depths': (1,), 'widths': (4, 8)}}, 'motion_encoder does not make a model'),
  ({'motion_encoder': {'name': 'timesformer', 'patch_size': 5}}, 'motion of 8 frames of size 16 x 16 and .*patch_size'),
  ({'motion_input': 'frames'}, 'motion_input'), ({'flow': 'raft'}, 'flow'), ({'cross_pair': 'both'}, 'cross_pair'),
])  # fmt: skip
def test_mistakes_in_options(changes, message):
  c = config()
  c.streams.video.objective = {**MODIST, **changes}
  with pytest.raises(UserError, match=message):
    built(c)


def test_an_image_has_no_motion():
  with pytest.raises(UserError, match='MoDist needs clips of at least 2 frames'):
    built(config(streams__video__num_frames=1))
  with pytest.raises(UserError, match='the video has one frame'):
    objective().views(1, None)


def test_a_transformer_can_be_the_motion_encoder():
  c = config()
  small = {'patch_size': 8, 'width': 8, 'depth': 1, 'num_heads': 2, 'mlp_dim': 8, 'num_frames': 8, 'image_size': 16}
  c.streams.video.objective = {**MODIST, 'motion_encoder': {'name': 'timesformer', **small}}
  run = built(c)
  own = jax.eval_shape(run.objectives['video'].init_params, jax.random.key(0))
  assert 'patch_embedding' in own['motion_encoder']


def test_co_training_is_one_line():
  c = semi_supervised_digits.get_config('debug')
  c.streams.unlabelled = modist_digits.stream('motions_unlabelled', batch_size=8, loss_weight=0.5)
  config_settings.check(c)
  infos = [SourceInfo('motions', 'video', 32, ('a', 'b')), SourceInfo('motions_unlabelled', 'video', 640, ())]
  run = experiments.build(c, infos)
  assert run.view_lengths('unlabelled') == {'first': 9, 'second': 9}
