"""Every sample is judged by its own source's head and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models import Heads
from cover_jax.models.encoder import Encoded
from cover_jax.models.heads import cross_entropy, head_columns, is_labelled, masked_logits, rank_of_label

SOURCES = ('objects', 'unlabelled', 'motions', 'digits')
CLASS_COUNTS = (('motions', 3), ('objects', 7), ('digits', 5))  # neither the order nor the number of the sources
COLUMNS = head_columns(CLASS_COUNTS, SOURCES)
OWN = {'motions': slice(0, 3), 'objects': slice(3, 10), 'digits': slice(10, 15)}
LARGEST = np.iinfo(np.int32).max


def random_batch(rng, size=64):
  source = rng.integers(len(SOURCES), size=size).astype(np.int32)
  label = np.array([rng.integers(n) if n else -1 for n in COLUMNS.count[source]], np.int32)
  return rng.normal(size=(size, 15)).astype(np.float32) * 3, label, source


def test_columns():
  np.testing.assert_array_equal(COLUMNS.start, [3, 0, 0, 10])
  np.testing.assert_array_equal(COLUMNS.count, [7, 0, 3, 5])
  subset = head_columns(CLASS_COUNTS[2:], SOURCES)
  np.testing.assert_array_equal(subset.start, 0)
  np.testing.assert_array_equal(subset.count, [0, 0, 0, 5])


def encoded(feature_BxD):
  """What an encoder of one token gives."""
  return Encoded(feature_BxD, -feature_BxD[:, None, None, None])


def test_heads_are_separate_linear_classifiers():
  rng = np.random.default_rng(0)
  feature = rng.normal(size=(4, 6)).astype(np.float32)
  params = {
    name: {'kernel': rng.normal(size=(6, n)).astype(np.float32), 'bias': rng.normal(size=n).astype(np.float32)}
    for name, n in CLASS_COUNTS
  }
  logits = Heads(CLASS_COUNTS).apply({'params': params}, encoded(feature))
  assert logits.shape == (4, 15)
  for name, columns in OWN.items():
    want = feature @ params[name]['kernel'] + params[name]['bias']
    np.testing.assert_allclose(logits[:, columns], want, rtol=1e-5, atol=1e-5)
  # A stream with fewer sources runs its own heads on the same parameters.
  some = Heads(CLASS_COUNTS[1:2]).apply({'params': params}, encoded(feature))
  np.testing.assert_allclose(some, logits[:, OWN['objects']], rtol=1e-6)
  assert Heads(CLASS_COUNTS).apply({'params': params}, encoded(feature.astype(jnp.bfloat16))).dtype == jnp.float32


def test_heads_start_at_zero():
  params = Heads(CLASS_COUNTS).init(jax.random.key(0), encoded(jnp.ones((1, 6))))['params']
  assert all(not leaf.any() for leaf in jax.tree.leaves(params))


def test_gradient_of_a_head_comes_from_its_own_samples_alone():
  rng = np.random.default_rng(1)
  heads = Heads(CLASS_COUNTS)
  feature = rng.normal(size=(64, 6)).astype(np.float32) * 100
  _, label, source = random_batch(rng)
  params = {
    name: {'kernel': rng.normal(size=(6, n)).astype(np.float32), 'bias': rng.normal(size=n).astype(np.float32)}
    for name, n in CLASS_COUNTS
  }

  @jax.jit
  def gradient(params, feature, label, source):
    total = lambda p: cross_entropy(
      heads.apply({'params': p}, encoded(feature)), label, source, COLUMNS, label_smoothing=0.1
    ).sum()
    return jax.grad(total)(params)

  for index, name in enumerate(SOURCES):
    # Only this source has labels: bit for bit nothing reaches the others.
    got = gradient(params, feature, np.where(source == index, label, -1), source)
    for other in OWN:
      arrays = jax.tree.leaves(got[other])
      assert all(np.isfinite(x).all() for x in arrays)
      assert any(np.asarray(x).any() for x in arrays) == (other == name), (name, other)
    if name in OWN:
      # With all of them there, the head's gradient is what it was alone.
      together = gradient(params, feature, label, source)[name]
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), together, got[name])


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_cross_entropy_is_that_of_the_own_head(smoothing):
  logits, label, source = random_batch(np.random.default_rng(2))
  loss = jax.jit(lambda *args: cross_entropy(*args, COLUMNS, label_smoothing=smoothing))(logits, label, source)
  for i, name in enumerate(SOURCES[s] for s in source):
    if name == 'unlabelled':
      assert loss[i] == 0
      continue
    own = logits[i, OWN[name]].astype(np.float64)
    log_probs = own - np.log(np.exp(own).sum())
    target = np.eye(len(own))[label[i]] * (1 - smoothing) + smoothing / len(own)
    np.testing.assert_allclose(loss[i], -(target * log_probs).sum(), rtol=1e-5, atol=1e-6)


def test_other_heads_change_nothing_whatever_they_say():
  logits, label, source = random_batch(np.random.default_rng(3))
  own = np.asarray(masked_logits(logits, source, COLUMNS)) > -1e29
  for junk in (1e9, -1e9, np.inf, -np.inf, np.nan):
    other = np.where(own, logits, np.float32(junk))
    for function in (cross_entropy, rank_of_label):
      np.testing.assert_array_equal(function(other, label, source, COLUMNS), function(logits, label, source, COLUMNS))
    gradient = jax.grad(lambda x: cross_entropy(x, label, source, COLUMNS, label_smoothing=0.1).sum())(other)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~own].any()


def test_softmax_of_masked_logits_is_exact():
  logits, _, source = random_batch(np.random.default_rng(4))
  probs = np.asarray(jax.nn.softmax(masked_logits(logits, source, COLUMNS)))
  for i, name in enumerate(SOURCES[s] for s in source):
    if name != 'unlabelled':
      assert np.delete(probs[i], np.r_[OWN[name]]).max() == 0
      np.testing.assert_allclose(probs[i].sum(), 1, rtol=1e-6)


def test_unlabelled_and_impossible_labels():
  logits = np.random.default_rng(5).normal(size=(5, 15)).astype(np.float32)
  source = np.array([0, 1, 2, 2, 9], np.int32)  # the run has no source 9
  label = np.array([-1, 2, 3, 2, 0], np.int32)  # 'motions' has classes 0 to 2
  np.testing.assert_array_equal(is_labelled(label, source, COLUMNS), [False, False, True, True, False])
  loss, gradient = jax.vmap(jax.value_and_grad(lambda x, y, s: cross_entropy(x[None], y[None], s[None], COLUMNS)[0]))(
    logits, label, source
  )
  assert np.isnan(loss[2])
  np.testing.assert_array_equal(loss[np.array([0, 1, 4])], 0)
  np.testing.assert_array_equal(gradient[np.array([0, 1, 4])], 0)
  assert loss[3] > 0
  ranks = np.asarray(rank_of_label(logits, label, source, COLUMNS))
  assert (ranks == LARGEST).tolist() == [True, True, True, False, True]


def test_rank_agrees_with_top_k_and_breaks_ties_like_it():
  rng = np.random.default_rng(6)
  logits, label, source = random_batch(rng, 300)
  logits = np.round(logits / 3) + 0.0  # many ties; top_k puts -0 after 0, so none of those
  ranks = np.asarray(jax.jit(lambda *args: rank_of_label(*args, COLUMNS))(logits, label, source))
  assert ranks.dtype == np.int32
  for i, name in enumerate(SOURCES[s] for s in source):
    if name == 'unlabelled':
      assert ranks[i] == LARGEST
      continue
    own = logits[i, OWN[name]]
    order = np.argsort(-own, kind='stable')
    assert ranks[i] == order.tolist().index(label[i])
    top = jax.lax.top_k(own, 3)[1]
    assert (ranks[i] < 3) == (label[i] in np.asarray(top))


def test_a_broken_model_is_never_right():
  label, source = np.array([1, 1], np.int32), np.array([2, 2], np.int32)
  logits = np.zeros((2, 15), np.float32)
  logits[0, 1] = np.nan  # the true class
  logits[1, 0] = np.nan  # another class of the same head
  ranks = rank_of_label(logits, label, source, COLUMNS)
  assert ranks[0] == LARGEST
  assert ranks[1] == 1
