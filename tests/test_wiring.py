"""Every key of a config reaches the place that it is for: what a run of `opening.open_experiment` shows of each.

The stored frames tell where each of their pixels was: red is the column, green the row, blue the frame's number. So a
batch shows what was done to its clips.
"""

import dataclasses
import io
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import defaults
from cover_jax.experiment import build as experiments
from cover_jax.experiment.state import create, init_params
from cover_jax.jobs import evaluate as evaluate_job
from cover_jax.jobs import opening
from cover_jax.models.encoder import Encoded
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines.contract import SourceInfo
from tests import tiny

HEIGHT, WIDTH, FRAMES, FPS = 24, 32, 12, 20.0
CLASSES = ('push left', 'push right', 'wave')


def stored(number):
  pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
  pixels[..., 0], pixels[..., 1], pixels[..., 2] = 8 * np.arange(WIDTH), 10 * np.arange(HEIGHT)[:, None], 8 * number
  encoded = io.BytesIO()
  Image.fromarray(pixels).save(encoded, 'PNG')
  return encoded.getvalue()


class WiringTestClips(tfds.core.GeneratorBasedBuilder):
  """24 videos to train on, 10 for tests, whose pixels say where they were."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'video': tfds.features.Video(shape=(None, HEIGHT, WIDTH, 3), encoding_format='png'),
      'label': tfds.features.ClassLabel(names=list(CLASSES)),
      'video_id': tfds.features.Text(),
      'fps': np.float32,
    }
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 24), 'test': self._generate_examples(24, 34)}

  def _generate_examples(self, first, last):
    frames = [stored(number) for number in range(FRAMES)]
    for i in range(first, last):
      yield i, {'video': frames, 'label': i % 3, 'video_id': f'name{i:07}', 'fps': FPS}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('data'))
  tfds.builder('wiring_test_clips', data_dir=folder).download_and_prepare()
  return folder


def config_of(data_dir, stream=None, few=None, many=None, **source):
  """Two sources of 8 and 16 videos in one stream of 8 whole clips a step; changes to each, to both, to the stream."""
  config = defaults.get_config()
  parts = {'few': ('train[:8]', few or {}), 'many': ('train[8:]', many or {})}
  config.sources = {
    name: defaults.source('wiring_test_clips', data_dir=data_dir, **{'train': train, 'test': 'test'} | source | own)
    for name, (train, own) in parts.items()
  }
  geometry = {'num_frames': 4, 'size': (HEIGHT, WIDTH)} | (stream or {})
  config.streams = {'video': defaults.stream(('few', 'many'), **geometry)}
  config.model = {'patch_size': 8, 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'num_frames': 4}
  config.model.image_size = 32
  config.batch_size = config.eval_batch_size = 8
  config.total_steps = 60
  return config


def opened(config):
  return opening.open_experiment(config, sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1]))


def train_clips(config, steps=1):
  """The sub-batches of the first steps, joined: {key: array}, pixels as int."""
  _, batches, _ = opened(config)
  some = [batch['video'] for batch in itertools.islice(batches(0), steps)]
  joined = jax.tree.map(lambda *parts: np.concatenate(parts), *some)
  return joined | {'views': {'clip': joined['views']['clip'].astype(int)}}


def clips_of_both(config):
  """Training clips of 'few' and of 'many', some of each."""
  found = train_clips(config, steps=3)
  return [found['views']['clip'][found['source'] == source] for source in (0, 1)]


def numbers(clip_BxTxHxWx3):
  """Which stored frame each frame of a clip shows, [B, T]."""
  return clip_BxTxHxWx3[..., 12, 16, 2] // 8


def shown(clip_BxTxHxWx3, colour):
  """Share of the stored columns (colour 0) or rows (1) that each clip shows, [B]."""
  of_clip = clip_BxTxHxWx3[..., colour].reshape(len(clip_BxTxHxWx3), -1)
  return (of_clip.max(axis=1) - of_clip.min(axis=1)) / (8 * (WIDTH - 1) if colour == 0 else 10 * (HEIGHT - 1))


# How training clips are cut.


def test_plain_clips_are_the_stored_pixels(data_dir):
  found = train_clips(config_of(data_dir))
  expected = np.asarray(Image.open(io.BytesIO(stored(0))))[..., :2]
  np.testing.assert_array_equal(found['views']['clip'][..., :2], np.broadcast_to(expected, (8, 4, HEIGHT, WIDTH, 2)))
  np.testing.assert_array_equal(np.diff(numbers(found['views']['clip'])), 1)
  labels = {0: np.arange(8) % 3, 1: np.arange(8, 24) % 3}
  for source, example, label in zip(found['source'], found['example_id'], found['label'], strict=True):
    assert label == labels[int(source)][example]


def test_time(data_dir):
  faster, segments = map(numbers, clips_of_both(config_of(data_dir, few={'fps': 10.0}, many={'sampler': 'segments'})))
  np.testing.assert_array_equal(np.diff(faster), 2)  # 20 a second are stored
  np.testing.assert_array_equal(segments // 3, np.broadcast_to(np.arange(4), segments.shape))  # one of each quarter
  assert set(np.diff(segments).ravel()) > {2, 3}


def test_stride_and_loop(data_dir):
  looped, stopped = map(numbers, clips_of_both(config_of(data_dir, stride=5, few={'loop': True})))
  np.testing.assert_array_equal(looped, np.broadcast_to([0, 5, 10, 3], looped.shape))
  np.testing.assert_array_equal(stopped, np.broadcast_to([0, 5, 10, 11], stopped.shape))


def test_boxes(data_dir):
  quarter, flat = clips_of_both(config_of(data_dir, crop_scale=(0.25, 0.25), many={'crop_ratio': (4.0, 4.0)}))
  np.testing.assert_allclose(shown(quarter, 0), 0.5, atol=0.05)
  np.testing.assert_allclose(shown(quarter, 1), 0.5, atol=0.05)
  assert len({tuple(clip[0, 0, 0, :2]) for clip in quarter}) > 4  # anywhere
  np.testing.assert_allclose(shown(flat, 0) / shown(flat, 1), 4.0, rtol=0.25)


def test_short_side_and_rotation(data_dir):
  short, turned = clips_of_both(config_of(data_dir, few={'short_side': (64, 64)}, many={'rotation': 30.0}))
  np.testing.assert_allclose(shown(short, 1), HEIGHT / 64, atol=0.06)
  sloped = lambda clip: np.mean(np.abs(clip[:, 0, 8, 16, 0] - clip[:, 0, 16, 16, 0]) > 4)
  assert sloped(short) == 0 and sloped(turned) > 0.5


def test_mirrors(data_dir):
  found = train_clips(config_of(data_dir, few={'flip': True}, many={'flip': 'labels'}), steps=3)
  turned = found['views']['clip'][:, 0, 0, 0, 0] > found['views']['clip'][:, 0, 0, -1, 0]
  plain = (found['example_id'] + 8 * found['source']) % 3
  exchanged = turned & (found['source'] == 1)
  np.testing.assert_array_equal(found['label'], np.where(exchanged, np.array([1, 0, 2])[plain], plain))
  for source in (0, 1):
    assert 0.1 < turned[found['source'] == source].mean() < 0.9


def test_rand_augments_geometry_is_done_by_the_host(data_dir):
  """The share of clips that draw a geometric operation are changed; the others are those of the plain run."""
  clips = lambda **stream: train_clips(config_of(data_dir, stream), steps=6)['views']['clip']
  plain = clips()
  changed = lambda **settings: (clips(augment={'rand_augment': settings}) != plain).any(axis=(1, 2, 3, 4)).mean()
  assert 0.5 < changed(num_ops=6, magnitude=9) < 0.85  # 1 - (5 / 6)^6; the default of two operations: 0.31
  assert changed(num_ops=6, magnitude=0, magnitude_std=0) == 0


def test_an_objectives_views_are_loaded(data_dir):
  objective = {'name': 'vtdl', 'stride': 1, 'queue_size': 8, 'dim': 8}
  found = next(opened(config_of(data_dir, {'objective': objective}))[1](0))['video']
  assert found['views'].keys() == {'anchor', 'negative', 'positive'}


# Which examples, and in what order.


def share_of_many(config):
  return float(np.mean(train_clips(config, steps=12)['source'] == 1))


def test_weights_of_the_mixture_choose_the_examples(data_dir):
  config = config_of(data_dir)
  config.mixture.temperature = float('inf')
  assert share_of_many(config) == pytest.approx(1 / 2, abs=1e-6)  # over whole epochs; the sizes' own is 2 / 3
  config.mixture.weights = {'few': 5.0, 'many': 1.0}
  assert share_of_many(config) == pytest.approx(1 / 6, abs=1e-6)


def test_one_source_a_step(data_dir):
  config = config_of(data_dir)
  config.mixture.one_source_a_step = True
  found = train_clips(config, steps=9)['source'].reshape(9, 8)
  assert (found == found[:, :1]).all() and set(found[:, 0]) == {0, 1}


def test_seed_and_step_choose_the_examples(data_dir):
  config = config_of(data_dir, crop_scale=(0.25, 0.25))
  _, batches, _ = opened(config)
  first = list(itertools.islice(batches(0), 3))
  jax.tree.map(np.testing.assert_array_equal, next(batches(2))['video'], first[2]['video'])
  config.seed = 1
  other = next(opened(config)[1](0))['video']
  assert (other['example_id'] != first[0]['video']['example_id']).any()
  config.total_steps = 2
  assert len(list(opened(config)[1](0))) == 2


def test_some_of_the_training_examples(data_dir, tmp_path):
  sizes = lambda config: {s.name: s.num_examples for s in opened(config)[0].sources}
  assert sizes(config_of(data_dir)) == {'few': 8, 'many': 16}
  assert sizes(config_of(data_dir, label_fraction=0.5)) == {'few': 5, 'many': 9}  # of 3, 3, 2 and 5, 5, 6
  names = tmp_path / 'names.txt'
  names.write_text('name0000002\nname0000009\nname0000010\n')
  assert sizes(config_of(data_dir, exclude=(str(names),))) == {'few': 7, 'many': 14}


def test_labels_can_be_left_out(data_dir):
  run, batches, tests = opened(config_of(data_dir, label_key=None))
  assert all(s.class_names == () for s in run.sources) and tests == {}
  assert set(next(batches(0))['video']['label']) == {-1}


# Tests.


def test_protocol_of_a_test(data_dir):
  source = {'test_clips': 2, 'test_crops': 3, 'test_crop_fraction': 0.5}
  run, _, tests = opened(config_of(data_dir, {'num_frames': 3, 'size': 16}, **source))
  assert list(tests) == ['few', 'many']
  batches = list(tests['many'].batches())
  clip = batches[0]['views']['clip'].astype(int)
  assert clip.shape == (1, 6, 3, 16, 16, 3)  # 8 clips at once hold one example of six views
  assert len(batches) == 10 and [int(b['example_id'][0]) for b in batches] == list(range(10))
  assert {int(b['source'][0]) for b in batches} == {run.source_id('many')} == {1}
  assert [int(b['label'][0]) for b in batches] == [i % 3 for i in range(24, 34)]
  np.testing.assert_array_equal(clip[0, :, 0, 8, 8, 2] // 8, [0, 0, 0, 9, 9, 9])
  np.testing.assert_allclose(shown(clip[0], 1), 0.5, atol=0.08)
  assert clip[0, 0, 0, 8, 0, 0] < 30 < 200 < clip[0, 2, 0, 8, -1, 0]  # left and right
  assert '2 clips x 3 crops, 3 frames x 1 at native fps, 16x16 of 0.5' in tests['many'].protocol


def test_splits_and_batch_size_of_tests(data_dir):
  config = config_of(data_dir)
  config.sources.few.test = ''
  config.sources.many.test = 'test[:5]'
  config.eval_batch_size = 4
  _, _, tests = opened(config)
  assert list(tests) == ['many']
  assert [int(b['mask'].sum()) for b in tests['many'].batches()] == [4, 1]


def test_a_source_of_two_streams_is_tested_as_in_the_first(data_dir):
  config = config_of(data_dir)
  config.streams = {
    'long': defaults.stream(('few',), num_frames=3, size=16, batch_size=4),
    'short': defaults.stream(('few', 'many'), num_frames=1, size=8, batch_size=4),
  }
  _, batches, tests = opened(config)
  batch = next(batches(0))
  shapes = {name: sub['views']['clip'].shape for name, sub in batch.items()}
  assert shapes == {'long': (4, 3, 16, 16, 3), 'short': (4, 1, 8, 8, 3)}
  assert next(iter(tests['few'].batches()))['views']['clip'].shape[2:5] == (3, 16, 16)
  assert next(iter(tests['many'].batches()))['views']['clip'].shape[2:5] == (1, 8, 8)


# The parts of a run.


def built(config):
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  return experiments.build(config, infos)


def test_length_and_batch_sizes_of_a_run():
  run = built(tiny.config(total_steps=0, total_epochs=3.0))
  assert (run.steps_per_epoch, run.total_steps) == (128 / 16, 24)
  assert built(tiny.config(total_steps=7, total_epochs=3.0)).total_steps == 7
  sizes = lambda **changes: {name: s.batch_size for name, s in built(tiny.config(**changes)).streams.items()}
  assert sizes(batch_size=48) == {'video': 24, 'image': 24}
  assert sorted(sizes(batch_size=48, batch_multiple=16).values()) == [16, 32]
  assert sizes(batch_size=48, streams__image__batch_size=8) == {'video': 40, 'image': 8}


def test_weights_of_the_streams_losses():
  weights = lambda **changes: {name: s.loss_weight for name, s in built(tiny.config(**changes)).streams.items()}
  assert weights(streams__video__loss_weight=0.0, streams__image__loss_weight=3) == {'video': 0.0, 'image': 3.0}
  assert weights(mixture__weights={'acts': 1.0, 'moves': 2.0, 'things': 1.0}) == {'video': 0.75, 'image': 0.25}


def test_epochs_of_the_schedule_are_the_runs():
  options = {'schedule': 'steps', 'decay_epochs': (1.0,), 'decay_factor': 0.5, 'warmup_epochs': 0.5}
  changes = {f'optimizer__{key}': value for key, value in options.items()}
  _, schedule = stepping.make_optimizer(built(tiny.config(optimizer__learning_rate=1.0, **changes)))
  np.testing.assert_allclose([float(schedule(i)) for i in (0, 2, 4, 7, 8)], [0, 0.5, 1, 1, 0.5])


def test_dtype_and_fields_of_the_model():
  model = built(tiny.config(dtype='bfloat16', model__depth=3)).model
  assert (model.dtype, model.depth, model.width) == (jnp.bfloat16, 3, 16)


@pytest.mark.parametrize('key', [None, 3])
def test_pixels_and_drop_paths_of_the_encoder(key):
  run = built(tiny.config(pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.5, 1.0, 2.0), dtype='bfloat16'))
  seen = {}

  def apply(variables, pixels, **options):
    seen.update(options, pixels=pixels, variables=variables)

  run = dataclasses.replace(run, model=SimpleNamespace(apply=apply, dtype=run.model.dtype))
  rng = None if key is None else jax.random.key(key)
  run.encode({'kernel': 'params'}, np.full((1, 1, 1, 1, 3), 51, np.uint8), rng=rng)
  np.testing.assert_allclose(seen['pixels'].astype(np.float32).ravel(), [0.2, 0.0, -0.05], atol=1e-3)
  assert seen['pixels'].dtype == jnp.bfloat16 and seen['variables'] == {'params': {'kernel': 'params'}}
  assert seen['train'] == (key is not None) and ('drop_path' in seen.get('rngs', {})) == (key is not None)


class Seen(Exception):
  """What a function that a test replaced was called with."""


def objective_of(monkeypatch, objective=None, augment=None):
  """(what the encoder gets, loss per example) of the tiny run's image stream: flat pictures, 16 times darker each."""
  seen = []

  def encode(config, model, params, clip, *, rng=None, levels=()):
    seen.append((np.asarray(clip, np.float32), rng))
    feature_BxD = jnp.zeros((len(clip), model.width))
    return Encoded(feature_BxD, feature_BxD[:, None, None, None])

  monkeypatch.setattr(experiments, '_encode', encode)
  changes = {'streams__image__objective': {'name': 'classification', **(objective or {})}}
  run = built(tiny.config(streams__image__augment=augment or {}, **changes))
  clip = np.broadcast_to(np.arange(8).reshape(8, 1, 1, 1, 1) * 16 + np.array([0, 40, 80]), (8, 1, 16, 16, 3))
  label, source = np.arange(8, dtype=np.int32) % 7, np.full(8, 2, np.int32)
  batch = {'views': {'clip': clip.astype(np.uint8)}, 'label': label, 'source': source, 'mask': np.ones(8, bool)}
  heads = {'things': {'kernel': jnp.zeros((16, 7)), 'bias': jnp.arange(7.0)}}
  out = run.objectives['image'].loss({'encoder': None, 'heads': heads}, {}, batch, jax.random.key(0))
  ((found, rng),) = seen
  assert rng is not None  # or nothing would be dropped
  return clip, found, np.asarray(out.measures['loss']), label


def test_augmentation_on_the_device_comes_before_the_objective(monkeypatch):
  clip, found, _, _ = objective_of(monkeypatch)
  np.testing.assert_array_equal(found, clip)
  _, grey, _, _ = objective_of(monkeypatch, augment={'grayscale': {'probability': 1.0}})
  np.testing.assert_allclose(grey, np.broadcast_to(clip @ [[0.299], [0.587], [0.114]], clip.shape), atol=0.5)


def test_clips_are_mixed_where_the_config_says(monkeypatch):
  clip, mixed, _, _ = objective_of(monkeypatch, augment={'mixup': 1.0, 'cutmix': 1.0})
  cut = np.array([len(np.unique(one[..., 0])) == 2 for one in mixed])
  blended = ~cut & (np.abs(mixed - clip).max(axis=(1, 2, 3, 4)) > 1)
  assert cut.any() and blended.any()


def test_options_of_the_objective(monkeypatch):
  log_p = np.arange(7.0) - np.log(np.exp(np.arange(7.0)).sum())
  _, _, plain, label = objective_of(monkeypatch)
  np.testing.assert_allclose(plain, -log_p[label], rtol=1e-5)
  _, _, smooth, _ = objective_of(monkeypatch, {'label_smoothing': 0.25})
  np.testing.assert_allclose(smooth, -0.75 * log_p[label] - 0.25 * log_p.mean(), rtol=1e-5)


def test_options_of_the_weights_to_start_from(monkeypatch):
  options = {'path': 'file', 'params': 'ema', 'temporal_attention': 'zero', 'heads': {'acts': 'other'}}
  run = built(tiny.config(seed=3, **{f'init_from__{key}': value for key, value in options.items()}))
  monkeypatch.setattr(initialise.files, 'read', lambda path, params, model_size: (path, params, model_size))
  monkeypatch.setattr(initialise, 'check_encoder', lambda *_: None)
  monkeypatch.setattr(jax, 'jit', lambda function, **_: lambda key: ('fresh', key))  # nothing is to be drawn

  def seed(params, weights, **given):
    raise Seen(params, weights, given)

  monkeypatch.setattr(initialise, 'seed', seed)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1}, jax.devices()[:1])
  with pytest.raises(Seen) as seen:
    initialise.start(run, None, mesh, SimpleNamespace(params=None))
  params, weights, given = seen.value.args
  shapes = jax.eval_shape(lambda key: init_params(run, key), jax.random.key(0))
  size = sum(x.size for x in jax.tree.leaves(shapes))
  assert params[0] == 'fresh' and weights == ('file', 'ema', size)
  np.testing.assert_array_equal(jax.random.key_data(params[1]), jax.random.key_data(jax.random.key(3)))
  names = {s.name: s.class_names for s in tiny.sources()}
  first_bias = dict.fromkeys(names, 0.0)
  told = {'class_names': names, 'temporal_attention': 'zero', 'heads': {'acts': 'other'}, 'first_bias': first_bias}
  assert given == told


def test_parameters_that_are_evaluated():
  state = SimpleNamespace(params='raw ones', ema='averaged ones')
  for which, expected in (('raw', 'raw ones'), ('ema', 'averaged ones')):
    assert evaluate_job.chosen_params(ml_collections.ConfigDict({'eval_params': which}), state) == expected


def test_seed_of_the_initial_weights(monkeypatch):
  run, mesh, *_ = tiny.build(tiny.config(seed=3, mesh__data=1), jax.devices()[:1])
  monkeypatch.setattr(jax, 'jit', lambda function, **_: lambda key: key)  # what they would be drawn from
  for key in (create(run, None, mesh, None), initialise.start(run, None, mesh, None)):
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))
