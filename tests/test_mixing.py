"""Mixup and cutmix: partners of the same source, one mixture for all frames, the loss in the same shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cover_jax.augment import mixing
from cover_jax.models.encoder import Encoded
from cover_jax.models.heads import Heads
from cover_jax.objectives import classification
from cover_jax.runtime import sharding
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny
from tests.test_train import ONE_DEVICE, run_steps

SOURCES = (SourceInfo('a', 'video', 9, ('x', 'y', 'z')), SourceInfo('b', 'video', 9, ('u', 'v')))
HEADS = Heads((('a', 3), ('b', 2)))
B, T, H, W = 12, 2, 8, 10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=24), st.integers(0, 1000))
def test_partners_are_a_permutation_within_the_group_without_the_clip_itself(groups, seed):
  group = np.array(groups, np.int32)
  partner = np.asarray(mixing.partners(jax.random.key(seed), group))
  assert sorted(partner) == list(range(len(group)))
  assert (group[partner] == group).all()
  alone = np.bincount(group, minlength=5)[group] == 1
  assert ((partner == np.arange(len(group))) == alone).all()


def test_partners_are_random():
  group = np.array([0, 1] * 6, np.int32)
  found = np.stack([mixing.partners(jax.random.key(i), group) for i in range(60)])
  for i in range(12):
    assert set(found[:, i]) == {j for j in range(12) if j % 2 == i % 2 and j != i}


def test_mixup_is_one_share_for_the_whole_clip():
  mix = mixing.draw(jax.random.key(0), np.zeros(400, np.int32), H, W, mixup=0.8)
  weight = np.asarray(mix.weight_BxHxW)
  assert (weight == weight[:, :1, :1]).all()
  np.testing.assert_allclose(mix.share_B, weight[:, 0, 0], rtol=1e-6)
  assert weight.min() < 0.05 and weight.max() > 0.95 and weight.mean() == pytest.approx(0.5, abs=0.05)
  assert np.var(weight[:, 0, 0]) == pytest.approx(1 / (4 * 2.6), rel=0.2)  # of Beta(0.8, 0.8)


def test_cutmix_is_one_box_and_its_share():
  mix = mixing.draw(jax.random.key(1), np.zeros(300, np.int32), H, W, cutmix=1.0)
  weight = np.asarray(mix.weight_BxHxW)
  assert set(np.unique(weight)) == {0.0, 1.0}
  np.testing.assert_allclose(mix.share_B, weight.mean(axis=(1, 2)), rtol=1e-6)
  for cut in weight == 0:
    rows, columns = np.flatnonzero(cut.any(axis=1)), np.flatnonzero(cut.any(axis=0))
    assert not len(rows) or cut.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
  assert (weight == 0).any(axis=0).all()  # boxes reach every pixel
  both = mixing.draw(jax.random.key(1), np.zeros(300, np.int32), H, W, mixup=1.0, cutmix=1.0)
  cut = np.isin(np.asarray(both.weight_BxHxW), (0.0, 1.0)).all(axis=(1, 2))
  assert cut.mean() == pytest.approx(0.5, abs=0.1)


def encode(params, clip, *, rng=None, levels=()):
  """A stand-in encoder: one token, the mean colours of the four corners' quarters."""
  x = clip.astype(jnp.float32).reshape(len(clip), T, 2, H // 2, 2, W // 2, 3).mean(axis=(1, 3, 5)) / 255
  feature_BxD = x.reshape(len(clip), -1) @ params['kernel']
  return Encoded(feature_BxD, feature_BxD[:, None, None, None])


def batch_and_params(seed=0):
  rng = np.random.default_rng(seed)
  source = rng.integers(0, 2, B).astype(np.int32)
  label = (rng.integers(0, 6, B) % np.array([3, 2])[source]).astype(np.int32)
  batch = {
    'views': {'clip': rng.integers(0, 256, (B, T, H, W, 3)).astype(np.uint8)},
    'label': label,
    'source': source,
    'mask': np.ones(B, bool),
  }
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  heads = {n: {'kernel': normal(5, k) * 3, 'bias': normal(k)} for n, k in (('a', 3), ('b', 2))}
  return batch, {'encoder': {'kernel': normal(12, 5)}, 'heads': heads}


@pytest.mark.parametrize('options', [{'mixup': 0.8}, {'cutmix': 1.0}, {'mixup': 0.8, 'cutmix': 1.0}])
def test_loss_is_the_mixture_of_both_labels_losses(options):
  batch, params = batch_and_params()
  objective = classification.make(encode=encode, heads=HEADS, sources=SOURCES, **options)
  rng = jax.random.key(3)
  found = objective.loss(params, {}, batch, rng)
  mix = mixing.draw(jax.random.split(rng)[1], 2 * batch['source'] + 1, H, W, **options)
  weight, partner = np.asarray(mix.weight_BxHxW)[:, None, :, :, None], np.asarray(mix.partner_B)
  clip = weight * batch['views']['clip'] + (1 - weight) * batch['views']['clip'][partner].astype(float)
  feature = np.asarray(encode(params['encoder'], jnp.asarray(clip)).feature_BxD).astype(float)
  for i in range(B):
    assert batch['source'][partner[i]] == batch['source'][i]
    head = params['heads'][SOURCES[batch['source'][i]].name]
    logits = feature[i] @ head['kernel'] + head['bias']
    log_p = logits - np.log(np.exp(logits).sum())
    share = float(mix.share_B[i])
    expected = -share * log_p[batch['label'][i]] - (1 - share) * log_p[batch['label'][partner[i]]]
    assert found.measures['loss'][i] == pytest.approx(expected, rel=1e-4, abs=1e-5)
  assert found.loss == pytest.approx(float(np.mean(found.measures['loss'])), rel=1e-5)


def test_gradient_reaches_the_own_head_only_and_an_unlabelled_clip_mixes_with_its_like():
  batch, params = batch_and_params()
  batch['source'][:] = 1
  batch['label'] = np.arange(B, dtype=np.int32) % 2
  batch['label'][:2] = -1
  objective = classification.make(encode=encode, heads=HEADS, sources=SOURCES, mixup=1.0, cutmix=1.0)
  loss = lambda p, rng: objective.loss(p, {}, batch, rng)
  gradient = jax.grad(lambda p: loss(p, jax.random.key(0)).loss)(params)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradient['heads']['a']))
  assert np.asarray(gradient['heads']['b']['kernel']).any()
  measures = loss(params, jax.random.key(0)).measures['loss']
  assert (np.asarray(measures[:2]) == 0).all()
  # Were the unlabelled clips partners of labelled ones, a share of these' losses would be missing.
  mix = mixing.draw(jax.random.split(jax.random.key(0))[1], 2 + (batch['label'] >= 0), H, W, mixup=1.0, cutmix=1.0)
  assert sorted(np.asarray(mix.partner_B[:2])) == [0, 1]
  assert measures[2:].sum() > 0


@pytest.mark.slow
def test_augmented_training_is_the_same_on_many_devices_and_again():
  augment = {'color_jitter': {'brightness': 0.4, 'hue': 0.1}, 'random_erasing': {}, 'mixup': 0.8, 'cutmix': 1.0}
  one, params, _ = run_steps(ONE_DEVICE, steps=2, streams__video__augment=augment)
  again, same, _ = run_steps(ONE_DEVICE, steps=2, streams__video__augment=augment)
  many, _, _ = run_steps(dict(zip(sharding.AXES, (8, 1, 1), strict=True)), steps=2, streams__video__augment=augment)
  np.testing.assert_array_equal(one, again)
  jax.tree.map(np.testing.assert_array_equal, params, same)
  np.testing.assert_allclose(many, one, rtol=1e-5)


def test_mixing_is_refused_by_an_objective_without_labels():
  config = tiny.config(streams__video__augment={'mixup': 0.8}, streams__video__objective={'name': 'vtdl'})
  with pytest.raises(UserError, match='mixup'):
    tiny.build(config)


def test_classification_needs_classes():
  """Else a run on a folder without class folders would end well and have learnt nothing."""
  objective = classification.make(encode=None, heads=Heads(()), sources=(), stream='videos')
  with pytest.raises(UserError, match=r"Stream 'videos' .*none of its sources has classes"):
    objective.loss({}, {}, {}, None)
