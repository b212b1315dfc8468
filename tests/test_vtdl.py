"""VTDL: the augmentation keeps motion, the triplets are what they should be, the state is exact."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cover_jax import checkpoints
from cover_jax.augment import photometric
from cover_jax.experiment import build as experiments
from cover_jax.experiment.state import create, state_shardings
from cover_jax.objectives import contrastive, vtdl
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from cover_jax.training import step as stepping
from data_pipelines import sources
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.loading import arrays
from data_pipelines.loading.views import Stream
from tests import tiny
from tests.test_train import Stopped, bits

VTDL = {'name': 'vtdl', 'stride': 1, 'queue_size': 20, 'dim': 8, 'momentum': 0.9}


def config(**changes):
  """The tiny run with its video stream trained by VTDL, beside the labelled image stream."""
  options = {k.removeprefix('vtdl__'): changes.pop(k) for k in list(changes) if k.startswith('vtdl__')}
  c = tiny.config(**changes)
  c.streams.video.objective = {**VTDL, **options}
  return c


def start(c, devices=None):
  """(experiment, mesh, batches, state, step)."""
  experiment, mesh, batches, _ = tiny.build(c, devices)
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  state = create(experiment, optimizer, mesh, placed)
  return experiment, mesh, batches, state, stepping.compile_step(experiment, optimizer, mesh)


# ---- Temporal Consistent Augmentation.


def moving_clip(frames=8):
  return jax.random.uniform(jax.random.key(3), (3, frames, 4, 4, 3), minval=0, maxval=255)


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5])
def test_tca_scales_every_time_difference(order):
  clip = np.asarray(moving_clip(), np.float64)
  mixed = np.asarray(vtdl.temporal_consistent(jax.random.key(0), moving_clip(), 0.9), np.float64)
  before, after = np.diff(clip, order, axis=1), np.diff(mixed, order, axis=1)
  ratio = [float((after[b] * before[b]).sum() / (before[b] ** 2).sum()) for b in range(3)]
  for b in range(3):  # one number a clip explains all of it
    np.testing.assert_allclose(after[b], ratio[b] * before[b], atol=2e-3)
    assert 0.1 <= ratio[b] < 1
  assert len({round(r, 6) for r in ratio}) == 3  # each clip has its own share
  first = np.diff(mixed, axis=1)[0] / np.diff(clip, axis=1)[0]
  assert np.median(first) == pytest.approx(ratio[0], abs=1e-3)  # and the same at every order


def test_contrast_about_each_frames_mean_and_cutting_break_it():
  """The test above can fail: these are the changes that must not be used with TCA."""
  clip = np.asarray(moving_clip(), np.float64)
  per_frame = clip.mean(axis=(2, 3, 4), keepdims=True)
  per_clip = clip.mean(axis=(1, 2, 3, 4), keepdims=True)

  def unexplained(changed):
    before, after = np.diff(clip, axis=1), np.diff(changed, axis=1)
    ratio = (after * before).sum() / (before**2).sum()
    return np.abs(after - ratio * before).max()

  assert unexplained(per_clip + 1.5 * (clip - per_clip)) < 1e-9
  assert unexplained(per_frame + 1.5 * (clip - per_frame)) > 1
  assert unexplained(np.clip(1.5 * clip, 0, 255)) > 1


def test_colours_as_the_configs_use_them_keep_it():
  clip = moving_clip() / 255
  changed = photometric.color_jitter(jax.random.key(1), clip, brightness=0.5, contrast=0.5, clamp=False)
  before, after = np.diff(clip, axis=1), np.diff(changed, axis=1)
  for b in range(3):
    ratio = (after[b] * before[b]).sum() / (before[b] ** 2).sum()
    np.testing.assert_allclose(after[b], ratio * before[b], atol=1e-5)


def test_tca_mixes_in_a_frame_of_the_same_clip():
  clip = moving_clip()
  mixed = vtdl.temporal_consistent(jax.random.key(5), clip, 0.5)
  for b in range(3):  # the frame mixed in is the one that stays as it was
    unchanged = [t for t in range(8) if np.allclose(mixed[b, t], clip[b, t], atol=1e-3)]
    assert len(unchanged) == 1
  assert np.array_equal(vtdl.temporal_consistent(jax.random.key(5), clip, 0.0), clip)
  span = lambda x: np.ptp(np.diff(x, axis=1), axis=(1, 2, 3, 4))
  share = lambda **kw: span(vtdl.temporal_consistent(jax.random.key(5), clip, 0.5, **kw)) / span(clip)
  assert np.ptp(share(one_share=True)) < 1e-4 < np.ptp(share())


# ---- Triplets.


@settings(max_examples=60, deadline=None)
@given(
  frames=st.integers(2, 60), length=st.integers(2, 9), stride=st.integers(1, 5), gap=st.integers(1, 12),
  seed=st.integers(0, 999),
)  # fmt: skip
def test_triplet(frames, length, stride, gap, seed):
  options = {'length': length, 'stride': stride, 'min_gap': gap}
  rng = np.random.default_rng(seed)
  for generator in (rng, rng, None):
    views = vtdl.triplet(frames, generator, **options)
    assert views['anchor'].tolist() == views['positive'].tolist()
    for v in views.values():
      assert v.shape == (length,) and v.dtype == np.int64 and v.min() >= 0 and v.max() < frames
    assert views['negative'].tolist() != views['anchor'].tolist()
    if frames - (length - 1) * stride - 1 >= gap:  # both fit: apart, and no jump in either
      assert abs(views['negative'][0] - views['anchor'][0]) >= gap
      for v in views.values():
        assert set(np.diff(v)) == {stride}
    else:
      assert (views['negative'][0] - views['anchor'][0]) % frames == frames // 2


def test_triplet_reaches_all_pairs_and_is_stateless():
  options = {'length': 3, 'stride': 2, 'min_gap': 3}
  rng = np.random.default_rng(0)
  pairs = {(int(v['anchor'][0]), int(v['negative'][0])) for v in (vtdl.triplet(10, rng, **options) for _ in range(500))}
  assert pairs == {(a, n) for a in range(6) for n in range(6) if abs(a - n) >= 3}
  one, two = (vtdl.triplet(50, np.random.default_rng(7), **options) for _ in range(2))
  assert all(one[k].tolist() == two[k].tolist() for k in one)


def test_released_starts():
  """Videos of at most twice the clip's span have one start; the negative starts a third of the video later."""
  options = {'length': 16, 'stride': 4, 'min_gap': 2}
  for seed in range(5):
    views = vtdl.released_views(96, np.random.default_rng(seed), **options)
    assert views['anchor'].tolist() == list(range(0, 64, 4))
    assert views['negative'][0] == 1 + 96 // 3 - 1
  starts = {int(vtdl.released_views(200, np.random.default_rng(s), **options)['anchor'][0]) for s in range(300)}
  assert starts <= set(range(200 - 128 + 1)) and len(starts) > 50
  walk = vtdl.released_views(40, None, **options)['anchor']
  assert walk[:9].tolist() == list(range(0, 36, 4)) and walk[9] == 0  # begins again before the end


@pytest.mark.parametrize('sampler', [vtdl.triplet, vtdl.released_views])
def test_a_video_of_one_frame_is_an_error(sampler):
  with pytest.raises(UserError, match='one frame'):
    sampler(1, None, length=4, stride=1, min_gap=2)


@pytest.mark.parametrize('named', [True, False])
def test_a_video_of_one_frame_is_named_before_the_first_step(named):
  views = tiny.build(config())[0].objectives['video'].views
  videos = [np.zeros((n, 16, 16, 3), np.uint8) for n in (5, 7, 1, 9, 1)]
  names = {'ids': np.array([b'v_0', b'v_1', b'v_2', b'v_3', b'v_4'])} if named else {}
  source = arrays.array_source('talks', videos, **names)
  streams = {'unlabelled': Stream((0,), 4, 16, 2, views=views)}
  example = "example 2, 'v_2'," if named else 'example 2'
  with pytest.raises(UserError) as found:
    arrays.array_batches([source], streams, 0)  # no batch is asked for
  assert str(found.value) == (
    f"No clips can be made of {example} of source 'talks' (and of 1 more) in stream 'unlabelled': "
    'the video has one frame, and VTDL needs another interval of it; leave it out of the data set.'
  )
  next(arrays.array_batches([sources.select(source, np.array([0, 1, 3]))], streams, 0))


# ---- The objective.


def test_batch_has_the_views_and_the_loss_starts_where_it_must():
  experiment, mesh, batches, state, _ = start(config(model__drop_path=0.0, vtdl__tca_alpha=0.0))
  batch = next(batches(0))
  assert batch['video']['views'].keys() == {'anchor', 'positive', 'negative'}
  # Empty queue: what is left is the positive against the video's other interval.
  objective = experiment.objectives['video']
  with sharding.use(mesh, experiment.config.logical_axis_rules):
    video = sharding.to_global(batch, mesh)['video']
    loss = jax.jit(objective.loss)
    same = video | {'views': dict.fromkeys(video['views'], video['views']['anchor'])}
    out = loss(state.params, state.objectives['video'], same, jax.random.key(0))
    full = loss(state.params, out.state, video, jax.random.key(0))
  np.testing.assert_allclose(out.measures['loss'], np.log(2), rtol=1e-4)  # n = k: they cannot be told apart
  np.testing.assert_allclose(out.measures['positive'], 1, rtol=1e-4)
  assert out.measures['queue'].tolist() == [0] * 8  # it was empty
  assert int(out.state['queue'].filled) == 8 and int(full.state['queue'].filled) == 16
  assert float(full.loss) > 0 and np.abs(full.measures['queue']).min() > 0


def test_loss_by_hand():
  """The objective's loss from the encoder, the head and the queue, put together in numpy."""
  c = config(model__drop_path=0.0, vtdl__tca_alpha=0.0)
  experiment, mesh, batches, state, step = start(c)
  for batch in itertools.islice(batches(0), 3):
    state, _ = step(state, sharding.to_global(batch, mesh))
  batch = next(batches(3))['video']
  batch['video_id'][:3] = np.asarray(state.objectives['video']['queue'].video_K)[:3]
  batch['source'][:3] = np.asarray(state.objectives['video']['queue'].source_K)[:3]
  own = state.objectives['video']
  out = jax.jit(experiment.objectives['video'].loss)(state.params, own, batch, jax.random.key(0))
  online = {'encoder': state.params['encoder'], 'head': state.params['objectives']['video']['head']}

  def vector(params, clip):
    cls = np.asarray(jax.jit(experiment.encode)(params['encoder'], clip).feature_BxD)
    y = cls @ np.asarray(params['head']['layer_0']['kernel']) + np.asarray(params['head']['layer_0']['bias'])
    return y / np.linalg.norm(y, axis=-1, keepdims=True)

  q, n, k = (
    vector(online, batch['views']['anchor']),
    vector(online, batch['views']['negative']),
    vector(own['teacher'], batch['views']['positive']),
  )
  queue = jax.device_get(own['queue'])
  left_out = 0
  for b in range(8):
    logits = [q[b] @ k[b]]
    for slot in range(20):
      if (queue.source_K[slot], queue.video_K[slot]) == (batch['source'][b], batch['video_id'][b]):
        left_out += 1
      else:
        logits.append(q[b] @ queue.key_KxD[slot])
    logits = np.array([*logits, q[b] @ n[b]], np.float64) / 0.07
    assert float(out.measures['loss'][b]) == pytest.approx(np.log(np.exp(logits - logits[0]).sum()), rel=1e-3, abs=1e-5)
  assert left_out >= 3
  slots = (int(queue.next) + np.arange(8)) % 20
  np.testing.assert_allclose(out.state['queue'].key_KxD[slots], k, atol=1e-4)


def test_clips_of_one_original_video_are_no_negatives_of_each_other():
  """As of UCF101, whose groups of clips were cut from one video: from the source's names to the mask of the queue."""
  videos = [np.zeros((8, 16, 16, 3), np.uint8)] * 4
  source = arrays.array_source('clips', videos, video_names=np.array([b'v_g01', b'v_g02', b'v_g01', b'v_g03']))
  stream = Stream((0,), 4, 16, 4, views=tiny.build(config())[0].objectives['video'].views)
  batch = next(arrays.array_batches([source], {'unlabelled': stream}, 0))['unlabelled']
  of_batch = batch['source'], batch['video_id']
  queue = contrastive.push(contrastive.empty_queue(5, 2), jnp.ones((4, 2)), *of_batch)
  group = source.video_names[batch['example_id']]
  expected = group[:, None] != group[None]
  assert contrastive.usable(queue, *of_batch)[:, :4].tolist() == expected.tolist()
  assert (~expected).sum() == 6  # each is the same as itself, two are the same as each other


def test_gradients_reach_query_and_negative_only():
  experiment, _, batches, state, _ = start(config(model__drop_path=0.0))
  batch = jax.tree.map(jnp.asarray, next(batches(0))['video'])
  own = state.objectives['video']
  own['queue'] = own['queue']._replace(
    key_KxD=jax.random.normal(jax.random.key(2), (20, 8)), filled=jnp.full((), 20, jnp.int32)
  )
  objective = experiment.objectives['video']

  def loss(clips, keys, teacher, params):
    used = {'teacher': teacher, 'queue': own['queue']._replace(key_KxD=keys)}
    return objective.loss(params, used, batch | {'views': clips}, jax.random.key(0)).loss

  clips = {k: x.astype(jnp.float32) for k, x in batch['views'].items()}
  by_clip, by_keys, by_teacher, by_params = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(
    clips, own['queue'].key_KxD, own['teacher'], state.params
  )
  assert np.any(by_clip['anchor']) and np.any(by_clip['negative'])
  assert not np.any(by_clip['positive'])
  assert not any(np.any(x) for x in jax.tree.leaves(by_teacher))
  assert np.any(by_params['encoder']['patch_embedding']['kernel'])
  assert np.any(by_params['objectives']['video']['head']['layer_0']['kernel'])
  # The queue's keys enter the loss, but the state that a step hands on carries no gradient.
  handed_on = lambda p: objective.loss(p, own, batch, jax.random.key(0)).state['queue'].key_KxD.sum()
  assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(handed_on))(state.params)))
  del by_keys


@pytest.mark.parametrize('microbatches', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_teacher_follows_each_optimizer_step_once(microbatches):
  """teacher_t = m teacher_(t-1) + (1 - m) params_t, however many losses a step takes; the first one is the student."""
  c = config(accumulation_steps=microbatches, mesh={'data': 1, 'fsdp': 1, 'tensor': 1})
  _, mesh, batches, state, step = start(c, jax.devices()[:1])

  def online():
    params = jax.device_get(state.params)
    return {'encoder': params['encoder'], 'head': params['objectives']['video']['head']}

  expected = online()
  assert bits(state.objectives['video']['teacher']) == bits(expected)
  for batch in itertools.islice(batches(0), 3):
    state, _ = step(state, sharding.to_global(batch, mesh))
    expected = jax.tree.map(lambda t, s: 0.9 * t + 0.1 * s, expected, online())
    got = jax.device_get(state.objectives['video']['teacher'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
  assert int(state.objectives['video']['queue'].filled) == 20


def run(mesh_sizes, steps=6, **changes):
  count = int(np.prod(list(mesh_sizes)))
  sizes = dict(zip(sharding.AXES, mesh_sizes, strict=True))
  _, mesh, batches, state, step = start(config(mesh=sizes, **changes), jax.devices()[:count])
  losses = []
  for batch in itertools.islice(batches(0), steps):
    state, report = step(state, sharding.to_global(batch, mesh))
    losses.append(float(report['losses']['video']))
  return np.array(losses), state


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)])
def test_devices_do_not_matter(mesh):
  expected_losses, expected = run((1, 1, 1))
  losses, state = run(mesh)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  queue, wanted = (
    jax.device_get(state.objectives['video']['queue']),
    jax.device_get(expected.objectives['video']['queue']),
  )
  np.testing.assert_allclose(queue.key_KxD, wanted.key_KxD, atol=2e-4)
  assert [x.tolist() for x in queue[1:]] == [x.tolist() for x in wanted[1:]]
  assert int(queue.filled) == 20 and int(queue.next) == 6 * 8 % 20
  kernel = state.objectives['video']['teacher']['encoder']['blocks']['mlp']['hidden']['kernel']
  assert kernel.sharding.spec == state.params['encoder']['blocks']['mlp']['hidden']['kernel'].sharding.spec


@pytest.mark.slow
def test_resumed_run_is_bit_equal(tmp_path):
  def train_in(folder, stop_before=None):
    folder.mkdir(exist_ok=True)
    experiment, mesh, batches, _ = tiny.build(config(total_steps=12))

    def cut(first):
      for number, batch in enumerate(batches(first), first + 1):
        if number == stop_before:
          raise Stopped
        yield batch

    return training.train(experiment, cut, str(folder), mesh)

  whole = train_in(tmp_path / 'whole')
  for stop in (4, 8):
    with pytest.raises(Stopped):
      train_in(tmp_path / 'parts', stop)
  resumed = train_in(tmp_path / 'parts')
  assert bits(resumed) == bits(whole)  # teacher and queue included
  assert int(resumed.objectives['video']['queue'].filled) == 20
  read = lambda name: (tmp_path / name / 'metrics.jsonl').read_text()
  assert read('parts') == read('whole')
  assert 'train/video/acts/negative' in read('whole') and 'train/video/moves/queue' in read('whole')
  # Its checkpoint seeds a labelled run: encoder loaded, projection head dropped, fresh heads.
  from cover_jax.weights import initialise

  c = tiny.config(init_from__path=str(tmp_path / 'whole'))
  experiment, mesh, _, _ = tiny.build(c)
  optimizer, _ = stepping.make_optimizer(experiment)
  _, placed = state_shardings(experiment, optimizer, mesh)
  seeded = initialise.start(experiment, optimizer, mesh, placed)
  assert bits(seeded.params['encoder']) == bits(whole.params['encoder'])
  assert checkpoints.load(str(tmp_path / 'whole'))['about']['step'] == 12


@pytest.mark.slow
def test_training_pulls_positives_together():
  """On one batch again and again the positive wins against queue and negative."""
  c = config(model__drop_path=0.0, optimizer__learning_rate=3e-3, vtdl__queue_size=8, total_steps=60)
  _, mesh, batches, state, step = start(c)
  batch = sharding.to_global(next(batches(0)), mesh)
  losses = []
  for _ in range(40):
    state, report = step(state, batch)
    losses.append(float(report['losses']['video']))
  assert losses[-1] < 0.6 * losses[1]


@pytest.mark.parametrize('options', [
  {'temporal_discrimination': False, 'pool': 'mean'}, {'released_code': True},
  pytest.param({'tca_on': 'both', 'head_layers': 2, 'queue_size': 3}, marks=pytest.mark.slow),
  pytest.param({'tca_on': 'key', 'queue_size': 0}, marks=pytest.mark.slow),
])  # fmt: skip
def test_options_change_the_loss_and_stay_finite(options):
  experiment, _, batches, state, _ = start(config(**{f'vtdl__{k}': v for k, v in options.items()}))
  loss, own, losses = jax.jit(experiment.objectives['video'].loss), state.objectives['video'], []
  for batch in itertools.islice(batches(0), 3):
    out = loss(state.params, own, batch['video'], jax.random.key(0))
    own = out.state
    losses.append(float(out.loss))
  assert np.all(np.isfinite(losses)) and np.any(np.array(losses) != 0)
  size = options.get('queue_size', 20)
  assert own['queue'].key_KxD.shape == (size, 8) and int(own['queue'].filled) == min(size, 24)
  assert ('negative' in out.measures, 'queue' in out.measures) == (
    options.get('temporal_discrimination', True),
    size > 0,
  )
  if options.get('released_code'):  # an empty queue is full of random vectors that count
    first = loss(state.params, state.objectives['video'], next(batches(0))['video'], jax.random.key(0))
    assert np.abs(first.measures['queue']).min() > 0


@pytest.mark.parametrize(('options', 'message'), [
  ({'tca_on': 'value'}, 'tca_on'), ({'pool': 'max'}, 'pool'), ({'temperature': 0.0}, 'temperature'),
  ({'queue_size': 0, 'temporal_discrimination': False}, 'nothing to tell apart'), ({'tau': 0.1}, 'tau'),
  ({'stream': 'video'}, 'stream'), ({'min_gap': 0}, 'min_gap'), ({'stride': 1.5}, 'stride is 1.5: expected a whole'),
  ({'head_layers': 0}, 'head_layers'), ({'queue_size': '512'}, 'queue_size'), ({'momentum': 'fast'}, 'momentum'),
])  # fmt: skip
def test_mistakes_in_options(options, message):
  c = tiny.config()
  c.streams.video.objective = {**VTDL, **options}
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  with pytest.raises(UserError, match=message):
    experiments.build(c, infos)
