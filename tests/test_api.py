"""The three lines: load, predict, encode; against the run's own evaluation and against plain definitions."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import flax.serialization
import jax
import numpy as np
import pytest
from PIL import Image

import cover_jax
from cover_jax import api, checkpoints
from cover_jax.evaluation import classify
from cover_jax.models import attention_rollout
from data_pipelines.contract import UserError
from data_pipelines.media import video_files
from tests import tiny, tiny_checkpoint

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def model():
  return cover_jax.load(tiny_checkpoint.trained())


def random_clip(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def test_loads_what_was_trained(model):
  assert model.heads == {s.name: s.class_names for s in tiny.sources()}
  assert model.model.depth == 2 and model.step == 3
  saved = checkpoints.load(tiny_checkpoint.trained())['state']
  for kept, params in (('params', model.params), ('ema', api.load(tiny_checkpoint.trained(), 'ema').params)):
    for part in ('encoder', 'heads'):
      jax.tree.map(np.testing.assert_array_equal, params[part], saved[kept][part])
  assert not np.array_equal(saved['params']['heads']['acts']['kernel'], saved['ema']['heads']['acts']['kernel'])


def test_batch_predictions_are_those_of_evaluation(model):
  experiment, *_ = tiny.build(tiny.config())
  for name in model.heads:
    stream = experiment.stream_of(name)
    clip = random_clip(11, stream.num_frames, *stream.size)  # more than a batch, not a multiple of it
    expected_BxK = np.asarray(classify.predict(experiment, model.params, name, clip[:, None]))
    found = model.predict(clip, top=99)
    assert len(found) == 11
    for p_K, ranking in zip(expected_BxK, found, strict=True):
      best = np.argsort(-p_K, kind='stable')
      assert [c for c, _ in ranking[name]] == [model.heads[name][k] for k in best]
      np.testing.assert_allclose([p for _, p in ranking[name]], p_K[best], rtol=1e-4)
      assert sum(p for _, p in ranking[name]) == pytest.approx(1, abs=1e-5)


def test_only_the_heads_that_are_asked(model):
  one = cover_jax.load(tiny_checkpoint.trained(), heads=['moves'])
  clip = random_clip(9, 16, 16)
  assert list(one.heads) == ['moves'] and one.predict(clip) == {'moves': model.predict(clip)['moves']}
  assert [view.sources for view in one.views] == [('moves',)] and len(model.views) == 2
  with pytest.raises(UserError, match="has no head 'cats': its heads are"):
    cover_jax.load(tiny_checkpoint.trained(), heads=['moves', 'cats'])
  with pytest.raises(UserError, match="no source 'things'"):
    one.encode(clip, 'things')


def test_one_clip_is_a_batch_of_one_and_an_image_a_clip_of_one_frame(model):
  clip = random_clip(4, 16, 16)
  single, (batched,) = model.predict(clip), model.predict(clip[None])
  image, (frame,) = model.predict(clip[0]), model.predict(clip[None, :1])
  for one, other in ((single, batched), (image, frame)):
    assert list(one) == ['acts', 'moves', 'things'] and one == other
    assert [len(ranking) for ranking in one.values()] == [5, 3, 5]


def test_other_lengths_and_sizes_are_cut_as_evaluation_cuts(model):
  clip = random_clip(9, 40, 30)
  chosen = clip[[1, 3, 5, 7]]  # the middles of four parts of nine frames
  fitted = np.stack([video_files.fit(frame, (16, 16)) for frame in chosen])
  found, expected = model.predict(clip, top=1), model.predict(fitted, top=1)
  assert found['acts'] == expected['acts'] and found['moves'] == expected['moves']
  assert found['things'] == model.predict(clip[4], top=1)['things']


def test_file_of_one_window_equals_its_pixels(model, tmp_path):
  image = random_clip(20, 24)
  Image.fromarray(image).save(tmp_path / 'x.png')
  for path in (str(tmp_path / 'x.png'), tmp_path / 'x.png'):
    assert model.predict(path) == model.predict(image)


def test_file_is_the_mean_of_its_windows(model, tmp_path):
  pictures = [Image.fromarray(random_clip(16, 16, seed=i)) for i in range(42)]
  pictures[0].save(tmp_path / 'x.png', save_all=True, append_images=pictures[1:], duration=100)
  seen = list(model.watch(str(tmp_path / 'x.png')))
  images = [s for s in seen if 'things' in s.probabilities]
  assert [s.window.start for s in images] == pytest.approx([0, 1, 2, 3, 4])
  clips = [s for s in seen if 'acts' in s.probabilities]
  assert len(clips) == 11 and all({'acts', 'moves'} == set(s.probabilities) for s in clips)
  found = model.predict(tmp_path / 'x.png', top=7)
  for name, of_head in (('things', images), ('acts', clips), ('moves', clips)):
    mean_K = np.mean([s.probabilities[name] for s in of_head], axis=0)
    expected = dict(zip(model.heads[name], mean_K.tolist(), strict=True))
    assert dict(found[name]) == pytest.approx(expected, rel=1e-5)


def test_many_windows_compile_once(model, tmp_path):
  pictures = [Image.fromarray(random_clip(16, 16, seed=i)) for i in range(43)]
  pictures[0].save(tmp_path / 'x.gif', save_all=True, append_images=pictures[1:], duration=100)
  fresh = api.load(tiny_checkpoint.trained())
  seen = list(fresh.watch(str(tmp_path / 'x.gif'), hop=2))
  assert len([s for s in seen if 'things' in s.probabilities]) == 22  # 8 + 8 + 6
  assert fresh._forward._cache_size() == 2  # 8 clips of 1 frame, 8 clips of 4


def test_encode_gives_feature_and_tokens(model):
  clip = random_clip(4, 16, 16)
  encoded = model.encode(clip)
  assert encoded.tokens_BxTxHxWxD.shape == (4, 2, 2, 16) and encoded.feature_BxD.dtype == np.float32
  expected = jax.tree.map(lambda x: x[0], model.experiment.encode(model.params['encoder'], clip[None]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), encoded, expected)
  np.testing.assert_allclose(encoded.feature_BxD, model.run_clips(clip[None])['feature'][0], rtol=1e-4, atol=1e-5)
  assert model.encode(clip[None].repeat(3, axis=0)).feature_BxD.shape == (3, 16)
  assert model.encode(clip, source='things').tokens_BxTxHxWxD.shape == (1, 2, 2, 16)
  with pytest.raises(UserError, match=r"no source 'other'.*\['acts', 'moves', 'things'\]"):
    model.encode(clip, source='other')


def test_attention_sees_the_pixels_that_encode_sees(model):
  clip = random_clip(2, 4, 16, 16)
  maps = model.attention(clip)
  assert maps.shape == (2, 4, 2, 2) and maps.dtype == np.float32
  np.testing.assert_allclose(maps.sum(axis=(1, 2, 3)), 1, rtol=1e-5)
  assert model.attention(clip[0], source='things').shape == (1, 2, 2)
  # The same normalisation as `Experiment.encode`: tokens of the model on those pixels agree.
  config = model.experiment.config
  normal = ((clip / 255.0 - np.array(config.pixel_mean)) / np.array(config.pixel_std)).astype(np.float32)
  encoded, kept = model.model.apply({'params': model.params['encoder']}, normal, mutable=['attention'])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), encoded, model.encode(clip))
  expected = attention_rollout.class_token_rollout(kept['attention']['blocks'])
  expected = attention_rollout.heat_maps(expected, 4, (2, 2))
  np.testing.assert_allclose(maps, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['joint', 'space'])
def test_other_attentions_predict_and_show_theirs(attention):
  model = cover_jax.load(tiny_checkpoint.trained(attention))
  clip = random_clip(4, 16, 16)
  assert set(model.predict(clip)) == set(model.heads)
  assert model.attention(clip).sum() == pytest.approx(1, rel=1e-5)


def export(path, change=lambda tree: None):
  """What an export holds: the description and the parameters."""
  loaded = checkpoints.load(tiny_checkpoint.trained())
  tree = {'about': loaded['about'], 'state': {'params': loaded['state']['params']}}
  change(tree)
  tree['about'] = json.dumps(tree['about'])
  path.write_bytes(flax.serialization.msgpack_serialize(tree))
  return path


def test_loads_an_export_with_parameters_only(model, tmp_path):
  path = export(tmp_path / 'model.flax')
  clip = random_clip(4, 16, 16)
  assert cover_jax.load(path).predict(clip) == model.predict(clip)
  with pytest.raises(UserError, match='holds no moving average'):
    cover_jax.load(path, 'ema')


def test_a_model_without_heads_encodes(tmp_path):
  def unlabelled(tree):
    tree['state']['params']['heads'] = {}
    for source in tree['about']['sources']:
      source['class_names'] = []

  headless = cover_jax.load(export(tmp_path / 'model.flax', unlabelled))
  assert headless.heads == {} and headless.encode(random_clip(4, 16, 16)).feature_BxD.shape == (16,)
  with pytest.raises(UserError, match='has no heads'):
    headless.predict(random_clip(4, 16, 16))


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path):
  def narrower(tree):
    tree['about']['config']['model']['mlp_dim'] = 8

  with pytest.raises(UserError, match='does not fit'):
    cover_jax.load(export(tmp_path / 'model.flax', narrower))


@pytest.mark.parametrize(
  'pictures', [np.zeros((4, 16, 16, 3)), np.zeros((16, 16), np.uint8), np.zeros((0, 16, 16, 3), np.uint8), [1, 2]]
)
def test_wrong_arrays_are_refused(model, pictures):
  with pytest.raises(UserError, match='expected uint8'):
    model.predict(pictures)


def test_other_mistakes_are_one_sentence(model, tmp_path):
  for call, words in (
    (lambda: model.predict(random_clip(16, 16), top=0), 'top is 0'),
    (lambda: model.predict(str(tmp_path / 'absent.mp4')), 'does not exist'),
    (lambda: cover_jax.load(tmp_path), 'No checkpoint in'),
    (lambda: cover_jax.load(tmp_path, 'best'), "expected 'raw' or 'ema'"),
  ):
    with pytest.raises(UserError, match=words):
      call()


def test_a_broken_file_warns(model, media):
  with pytest.warns(UserWarning, match='28 of 50 declared frames'):
    assert set(model.predict(media / 'video_edge/corrupted.mp4')) == set(model.heads)


def test_needs_no_tensorflow(tmp_path):
  code = """
import sys
import cover_jax
assert 'jax' not in sys.modules, 'importing the package is light'
import numpy as np
model = cover_jax.load(sys.argv[1])
assert set(model.predict(np.zeros((4, 16, 16, 3), np.uint8))) == {'acts', 'moves', 'things'}
assert not any(name.split('.')[0] in ('tensorflow', 'clu', 'tensorflow_datasets') for name in sys.modules)
"""
  path = export(tmp_path / 'model.flax')
  done = subprocess.run(
    [sys.executable, '-c', code, str(path)],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
