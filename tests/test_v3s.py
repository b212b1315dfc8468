"""V3S: the maps take what they say, the labels are true, and nothing but the picture tells the class."""

import copy
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import v3s_digits, v3s_ucf101
from cover_jax.experiment import build as experiments
from cover_jax.experiment.state import init_params
from cover_jax.objectives import v3s, warps
from cover_jax.runtime import keys
from cover_jax.training import step as stepping
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.loading import arrays
from data_pipelines.loading.views import Stream
from tests import tiny
from tests.pretext_runs import built, check_resumes, check_shards, first_losses
from tests.test_vtdl import start

RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 4, 8, 8), 'kind': 'r3d'}
TABLE = {  # a ConfigDict has its keys in alphabetical order
  'time': {'accelerate': (1, 2), 'plain': (1, 1), 'twice': (2, 2)},
  'space': {'left': (1, 1, 2, 1), 'plain': (1, 1, 1, 1), 'rows': (2, 2, 1, 1)},
}
L, SIZE = 16, (64, 48)


def maps(classes=v3s.CLASSES, frames=L, size=SIZE, output=None):
  return v3s.Maps(classes, frames, size, output, 'config.streams.video')


def config(**changes):
  options = {k.removeprefix('v3s__'): changes.pop(k) for k in list(changes) if k.startswith('v3s__')}
  model = changes.pop('model', None)
  c = tiny.config(**changes)
  if model:
    c.model = model
  c.streams.video.objective = {'name': 'v3s', 'classes': TABLE, 'output': 8, **options}
  return c


def ramp(frames, size):
  """A clip whose pixel (t, h, w) is (t, h, w)."""
  return np.stack(np.meshgrid(np.arange(frames), *map(np.arange, size), indexing='ij'), axis=-1).astype(np.float32)


def expected(first, last, count):
  """Places by adding up rates one by one: a reference of its own."""
  rates = [first + (last - first) * i / (count - 2) for i in range(count - 1)] if count > 2 else [first]
  if first > last:
    forward = expected(last, first, count)
    return [forward[-1] - g for g in forward[::-1]]
  return [int(sum(rates[:j]) + 0.5 + 1e-9) for j in range(count)]


# ---- Maps.


@pytest.mark.parametrize('rates', [(1, 1), (2, 2), (3, 3), (1, 4), (4, 1), (1, 2), (2, 1), (1.5, 1.5)])
@pytest.mark.parametrize('count', [2, 8, 16, 32])
def test_steps(rates, count):
  places = warps.steps(*rates, count)
  assert places.tolist() == expected(*rates, count)
  assert places[0] == 0 and np.diff(places).min() >= 1 and np.diff(places).max() <= max(rates) + 1
  assert (places[-1] - warps.steps(*rates[::-1], count)[::-1]).tolist() == places.tolist()  # mirrored
  assert abs(places[-1] - (count - 1) * np.mean(rates)) <= (0.5 if count > 2 else 2)


def test_every_pair_of_classes_on_a_ramp():
  """From the values of a ramp the places that were read are known, and so is the class, in time and in space."""
  of = maps()
  assert (len(of.time_names), len(of.space_names), of.output) == (6, 7, (32, 24))
  video = ramp(80, SIZE)
  seen = set()
  sample = jax.jit(of.sample)
  for step in range(12):
    rng = np.random.default_rng(step)
    frames = np.stack([of.frames(80, rng, all_classes=True) for _ in range(16)])
    clips, space = jax.device_get(sample(jax.random.key(step), jnp.asarray(video[frames])))
    time = np.asarray(of.time_of(jnp.asarray(frames)))
    assert clips.shape == (16, L, 32, 24, 3)
    for b in range(16):
      names = of.time_names[time[b]], of.space_names[space[b]]
      seen.add(names)
      rates = (v3s.CLASSES['time'][names[0]], *np.reshape(v3s.CLASSES['space'][names[1]], (2, 2)))
      for axis, (rate, count) in enumerate(zip(rates, clips.shape[1:4], strict=True)):
        read = np.moveaxis(clips[b, ..., axis], axis, 0).reshape(count, -1)
        assert (read == read[:, :1]).all()  # separable
        assert (read[:, 0] - read[0, 0]).tolist() == expected(*rate, count)
        assert read.min() >= 0 and read.max() < video.shape[axis]
  assert len(seen) == 42


def test_plain_clips_are_the_windows_pixels():
  alone = {'time': v3s.CLASSES['time'], 'space': {'plain': (1, 1, 1, 1)}}
  of = maps(alone)
  clip = jax.random.uniform(jax.random.key(0), (2, 4, *SIZE, 3))
  assert of.output == SIZE
  np.testing.assert_array_equal(of.sample(jax.random.key(1), clip)[0], clip)


def test_places_reach_the_whole_window():
  of = maps(output=24)
  rows = [of.sample(jax.random.key(i), jnp.asarray(ramp(1, SIZE))[None])[0][0, 0, :, 0, 1] for i in range(200)]
  assert min(r.min() for r in rows) == 0 and max(r.max() for r in rows) == SIZE[0] - 1


def test_rows_and_columns_have_places_of_their_own():
  of = maps(size=(32, 32), output=12)
  window = np.stack([*np.mgrid[:32, :32], np.zeros((32, 32))], axis=-1, dtype=np.float32)
  clips, _ = of.sample(jax.random.key(0), jnp.asarray(window)[None, None].repeat(64, axis=0))
  first = np.asarray(clips[:, 0, 0, 0, :2])
  assert abs(np.corrcoef(first.T)[0, 1]) < 0.5 and first.std(axis=0).min() > 1


def test_mirrors():
  """Mirrored in space left is right, and up and down stay; played backwards only acceleration changes."""
  of = maps()
  index = {name: i for i, name in enumerate(of.space_names)}
  mirrored = lambda places: (places[-1] - places[::-1]).tolist()
  for name, partner in {'left': 'right', 'right': 'left'}.items():
    assert mirrored(of.column_CxW[index[name]]) == of.column_CxW[index[partner]].tolist()
    assert mirrored(of.column_CxW[index[name]]) != of.column_CxW[index[name]].tolist()
  for name in set(index) - {'left', 'right'}:
    assert mirrored(of.column_CxW[index[name]]) == of.column_CxW[index[name]].tolist()
  assert of.row_CxH[index['up']].tolist() == mirrored(of.row_CxH[index['down']])
  time = {name: of.time_CxT[i] for i, name in enumerate(of.time_names)}
  for name, places in time.items():
    partner = {'accelerate': 'decelerate', 'decelerate': 'accelerate'}.get(name, name)
    assert mirrored(places) == time[partner].tolist()
  assert np.diff(time['accelerate'])[0] == 1 and np.diff(time['accelerate'])[-1] == 4


# ---- Shortcuts.


def sharpness(noise_BxHxW):
  """What of a picture of noise a filter would change: [B, 3], deviation and correlation of neighbours on both axes."""
  x = noise_BxHxW - noise_BxHxW.mean(axis=(1, 2), keepdims=True)
  std = x.std(axis=(1, 2))
  rows = (x[:, 1:] * x[:, :-1]).mean(axis=(1, 2)) / std**2
  return np.stack([std, rows, (x[:, :, 1:] * x[:, :, :-1]).mean(axis=(1, 2)) / std**2], axis=1)


def test_noise_does_not_tell_the_class():
  """Independent noise is the same noise in every class; a filter and a map that enlarges would both be seen."""
  rng = np.random.default_rng(0)
  of = maps(size=(64, 64))
  noise = rng.normal(size=(1200, 1, 64, 64, 1)).astype(np.float32)
  clips, label = jax.device_get(jax.jit(of.sample)(jax.random.key(0), jnp.asarray(noise)))
  seen = sharpness(clips[:, 0, ..., 0])
  for c in range(7):
    mean = seen[label == c].mean(axis=0)
    assert mean[0] == pytest.approx(1, rel=0.01) and np.abs(mean[1:]).max() < 0.01
  for places in itertools.chain(of.row_CxH, of.column_CxW):
    assert len(set(places.tolist())) == len(places)
  # The negative control: an area filter, and a projection that is normalised to the size of the picture.
  area = sharpness(noise[:, 0, ..., 0].reshape(-1, 32, 2, 64).mean(axis=2)).mean(axis=0)
  assert area[0] < 0.75
  normal = np.floor(np.append(0, np.cumsum(np.linspace(1, 2, 63))) * 63 / 94.5 + 0.5).astype(int)
  assert sharpness(noise[:, 0, normal][..., 0]).mean(axis=0)[1] > 0.03
  # And a linear model of these statistics finds no class on other pictures.
  features = np.concatenate([seen, seen**2, np.ones((1200, 1))], axis=1)
  weights = np.linalg.lstsq(features[:800], np.eye(7)[label[:800]], rcond=None)[0]
  assert (np.argmax(features[800:] @ weights, axis=1) == label[800:]).mean() < 1 / 7 + 3 * (0.143 * 0.857 / 400) ** 0.5


def test_a_still_video_does_not_tell_the_class_in_time():
  """Its clips are the same whatever the class."""
  of = maps()
  still = np.broadcast_to(np.random.default_rng(0).integers(0, 255, (1, 6, 6, 3)), (80, 6, 6, 3))
  clips = [still[of.frames(80, np.random.default_rng(i), all_classes=True)] for i in range(20)]
  assert all((clip == clips[0]).all() for clip in clips)


# ---- Time.


def test_classes_in_time_are_drawn_evenly_among_those_with_room():
  of = maps()
  rng = np.random.default_rng(0)
  needed = dict(zip(of.time_names, of.time_CxT[:, -1] + 1, strict=True))
  assert needed == {'plain': 16, 'twice': 31, 'thrice': 46, 'four_times': 61, 'accelerate': 39, 'decelerate': 39}
  for length, fit in ((16, 1), (31, 2), (40, 4), (60, 5), (61, 6), (200, 6)):
    frames = np.stack([of.frames(length, rng, all_classes=False) for _ in range(1200)])
    assert frames.min() >= 0 and frames.max() < length and (np.diff(frames) >= 1).all()
    counts = np.bincount(np.asarray(of.time_of(jnp.asarray(frames))), minlength=6)
    assert sorted(counts > 0).count(True) == fit == int(of.possible(jnp.asarray([length]))[0])
    assert np.abs(counts[counts > 0] / 1200 - 1 / fit).max() < 0.06
    if length == 200:
      assert frames.min() < 8 and frames.max() > 191
  middle = of.frames(101, None, all_classes=False)
  assert middle.tolist() == list(range(42, 58))


@pytest.mark.parametrize(('short', 'length', 'message'), [
  ('fewer_classes', 3, "the video has 3 frames, and class 'plain' of V3S needs 4;"),
  ('refuse', 6, "the video has 6 frames, and class 'twice' of V3S needs 7;"),
])  # fmt: skip
def test_a_video_too_short_is_named_before_the_first_step(short, length, message):
  views = tiny.build(config())[0].objectives['video'].views
  if short == 'refuse':
    infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
    views = experiments.build(config(v3s__short_videos='refuse'), infos).objectives['video'].views
  videos = [np.zeros((n, 16, 16, 3), np.uint8) for n in (8, length, 9)]
  with pytest.raises(UserError, match=r'No clips can be made of example 1 of source') as found:
    arrays.array_batches([arrays.array_source('talks', videos)], {'unlabelled': Stream((0,), 4, 16, 2, views=views)}, 0)
  assert message in str(found.value)


# ---- The objective.


def stepped(c, number=0):
  """(experiment, params, output of the loss of one batch, the batch)."""
  experiment, _, batches, state, _ = start(c)
  batch = next(itertools.islice(batches(0), number, None))['video']
  out = jax.jit(experiment.objectives['video'].loss)(state.params, {}, batch, jax.random.key(3))
  return experiment, state.params, jax.device_get(out), batch


@pytest.mark.parametrize('model', [None, pytest.param(RESNET, marks=pytest.mark.slow)], ids=['timesformer', 'resnet3d'])
def test_loss_by_hand(model):
  c = config(model=model) if model else config(model__drop_path=0.0)
  experiment, params, out, batch = stepped(c)
  of = v3s.Maps(TABLE, 4, (16, 16), 8, '')
  key = jax.random.key(3)
  clip, space = of.sample(keys.of(key, 'space'), jnp.asarray(batch['views']['clip'], jnp.float32))
  encoded = jax.jit(lambda p, x: experiment.encode(p, x, rng=keys.of(key, 'encode')))(params['encoder'], clip)
  own = params['objectives']['video']
  frames = batch['targets']['frames']['clip']
  lengths = batch['targets']['num_frames']['clip']
  features = {'space': np.asarray(encoded.tokens_BxTxHxWxD).mean(axis=(1, 2, 3)), 'time': encoded.feature_BxD}
  steps = [[0, 1, 3, 5], [0, 1, 2, 3], [0, 2, 4, 6]]
  label = {'space': space, 'time': [steps.index((f - f[0]).tolist()) for f in frames]}
  room = np.sum(lengths[:, None] >= [6, 4, 7], axis=1)
  total = np.zeros(8)
  for axis, x in features.items():
    dense = own[axis]['Dense_0']
    logits = np.asarray(x) @ np.asarray(dense['kernel']) + np.asarray(dense['bias'])
    entropy = [np.log(np.exp(z - z[y]).sum()) for z, y in zip(logits, np.asarray(label[axis]), strict=True)]
    np.testing.assert_allclose(out.measures[f'{axis}_loss'], entropy, rtol=1e-3, atol=1e-5)
    assert out.measures[f'{axis}_top1'].tolist() == [z.argmax() == y for z, y in zip(logits, label[axis], strict=True)]
    total += np.array(entropy) * (1 if axis == 'space' else room > 1)
  np.testing.assert_allclose(out.measures['loss'], total, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(out.loss, total.mean(), rtol=1e-3)
  np.testing.assert_allclose(out.measures['time_chance'], 1 / room)
  shares = [out.measures[f'time_share_{name}'] for name in TABLE['time']]
  np.testing.assert_array_equal(np.argmax(shares, axis=0), label['time'])
  hits = np.sum([out.measures[f'time_found_{name}'] for name in TABLE['time']], axis=0)
  np.testing.assert_array_equal(hits, out.measures['time_top1'])
  assert (out.statistics is None) == (model is None)


def test_the_class_in_time_has_a_weight():
  _, _, out, batch = stepped(config(v3s__time_weight=0.25, model__drop_path=0.0))
  asked = batch['targets']['num_frames']['clip'] >= 6  # for one class there is room in all, for two in these
  total = out.measures['space_loss'] + 0.25 * asked * out.measures['time_loss']
  np.testing.assert_allclose(out.measures['loss'], total, rtol=1e-5)


@pytest.mark.slow
def test_one_head_for_all_pairs():
  _, params, out, _ = stepped(config(v3s__joint=True, model__drop_path=0.0))
  assert params['objectives']['video'].keys() == {'joint'}
  assert params['objectives']['video']['joint']['Dense_0']['kernel'].shape == (16, 9)
  both = np.asarray(out.measures['space_top1']) & np.asarray(out.measures['time_top1'])
  np.testing.assert_array_equal(out.measures['top1'], both)
  assert np.isfinite(out.loss) and 'time_loss' not in out.measures


@pytest.mark.parametrize('axis', ['time', pytest.param('space', marks=pytest.mark.slow)])
def test_one_axis_alone(axis):
  classes = copy.deepcopy(TABLE)
  classes[axis] = {'plain': TABLE[axis]['plain']}
  _, params, out, _ = stepped(config(v3s__classes=classes))
  assert list(params['objectives']['video']) == ['space' if axis == 'time' else 'time']
  assert f'{axis}_top1' not in out.measures and np.isfinite(out.loss)


@pytest.mark.slow
def test_it_learns_one_batch():
  """Windows have no room to move: from these clips of noise no other cut of them can be learnt."""
  classes = {**TABLE, 'space': {'plain': (1, 1, 1, 1)}}
  losses = first_losses(config(model__drop_path=0.0, v3s__classes=classes, v3s__output=16), 40)
  assert np.mean(losses[-5:]) < 0.1 * np.mean(losses[:5])


@pytest.mark.parametrize('model', [None, RESNET])
@pytest.mark.slow
def test_sharded_is_unsharded(model):
  check_shards(lambda **changes: config(model=model, **changes))


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path):
  text = check_resumes(config(total_steps=6, checkpoint_every=3, log_every=2), tmp_path)
  assert 'train/video/acts/time_top1' in text and 'train/video/moves/space_top1' in text


# ---- Mistakes.


@pytest.mark.parametrize(('options', 'message'), [
  ({'classes': {'time': {'plain': (1, 1)}}}, 'classes is'),
  ({'classes': {**TABLE, 'time': {'slow': (0.5, 1)}}}, 'classes is'),
  ({'classes': {**TABLE, 'space': {'plain': (1, 1)}}}, 'classes is'),
  ({'classes': {'time': {'plain': (1, 1)}, 'space': {'plain': (1, 1, 1, 1)}}}, 'nothing to tell'),
  ({'classes': {**TABLE, 'time': {'a': (1, 1), 'b': (1, 1.1)}}}, "'a' and 'b', which are the same"),
  ({'time_weight': 0.5, 'joint': True}, 'joint=True, whose one head'),
  ({'time_weight': 0.0, 'classes': {**TABLE, 'space': {'plain': (1, 1, 1, 1)}}}, 'so nothing is asked'),
  ({'output': 9}, r'have room for 2 to 8 x 11'),
  ({'output': (8, 4)}, 'multiples of config.model.patch_size'),
  ({'time_weight': -1.0}, 'time_weight'), ({'short_videos': 'loop'}, 'short_videos'), ({'space_pool': 'max'}, 'pool'),
])  # fmt: skip
def test_mistakes_in_options(options, message):
  with pytest.raises(UserError, match=message):
    built(config(**{f'v3s__{k}': v for k, v in options.items()}))


def test_classes_are_numbered_by_the_alphabet():
  """Not by how a dict was written, which a config sorts, a list of objectives keeps and a checkpoint sorts."""
  backwards = {axis: dict(reversed(classes.items())) for axis, classes in TABLE.items()}
  one, other = (v3s.Maps(t, 4, (16, 16), 8, 'x') for t in (TABLE, backwards))
  assert one.time_names == other.time_names == tuple(sorted(TABLE['time']))
  assert one.space_names == other.space_names == tuple(sorted(TABLE['space']))
  np.testing.assert_array_equal(one.time_CxT, other.time_CxT)
  np.testing.assert_array_equal(one.row_CxH, other.row_CxH)


def test_a_class_may_have_any_name():
  """Also that of a measure."""
  names = {'top1': (1, 1), 'loss': (2, 2), 'chance': (1, 2), 'top1_share': (2, 1)}
  run = built(config(v3s__classes={**TABLE, 'time': names}, streams__video__num_frames=3, model__num_frames=3))
  measures = jax.eval_shape(
    lambda params, batch: run.objectives['video'].loss(params, {}, batch, jax.random.key(0)).measures,
    jax.eval_shape(lambda: nn.meta.unbox(init_params(run, jax.random.key(0)))),
    stepping.abstract_batch(run)['video'],
  )
  own = {f'time_{what}_{name}' for what in ('found', 'share') for name in names}
  assert own < set(measures) and len(measures) == len(own) + 7


def test_images_are_refused():
  c = config()
  c.streams.image.objective = {'name': 'v3s'}
  with pytest.raises(UserError, match=r'streams.image.num_frames is 1: V3S samples in time .* not images'):
    built(c)


@pytest.mark.parametrize('variant', ['', 'debug'])
@pytest.mark.parametrize('module', [v3s_digits, v3s_ucf101])
def test_configs_build(module, variant):
  c = module.get_config(variant)
  infos = [SourceInfo(name, 'video', 500, ()) for name in c.sources]
  run = experiments.build(c, infos)
  assert [type(o).__name__ for o in run.objectives.values()] == ['Objective']
