"""Heads of several labels a clip: the labels in a batch, the loss, and a gradient that reaches no other head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.augment import mixing
from cover_jax.models import Heads
from cover_jax.models.encoder import Encoded
from cover_jax.models.heads import (
  cross_entropy,
  head_columns,
  is_labelled,
  rank_of_best_label,
  sigmoid_cross_entropy,
)
from cover_jax.objectives import classification
from data_pipelines import contract
from data_pipelines.contract import SourceInfo
from data_pipelines.loading import arrays
from data_pipelines.loading.views import Stream
from data_pipelines.sources import content, fingerprint, label_sets, select, sizes

SOURCES = ('tags', 'unlabelled', 'acts', 'digits', 'more')
COUNTS = (('acts', 3), ('tags', 6), ('more', 4), ('digits', 5))
HEADS = Heads(COUNTS, several_labels=('tags', 'more'))
COLUMNS = head_columns(COUNTS, SOURCES)
OWN = {'acts': slice(0, 3), 'tags': slice(3, 9), 'more': slice(9, 13), 'digits': slice(13, 18)}
WIDTH = 6
LARGEST = np.iinfo(np.int32).max


def encoded(feature_BxD):
  return Encoded(feature_BxD, -feature_BxD[:, None, None, None])


def random_batch(rng, size=96):
  """(logits, label, labels, source): every kind of labelled and unlabelled sample."""
  source = rng.integers(len(SOURCES), size=size).astype(np.int32)
  label, labels = np.full(size, -1, np.int32), np.full((size, WIDTH), -1, np.int8)
  for i, name in enumerate(SOURCES[s] for s in source):
    count = dict(COUNTS).get(name, 0)
    if name in HEADS.several_labels:
      labels[i, :count] = rng.random(count) < 0.4
      if rng.random() < 0.2:
        labels[i, :count] = 0
      labels[i, :count][rng.random(count) < 0.1] = -1
      if rng.random() < 0.2:
        labels[i] = -1
    elif count:
      label[i] = rng.integers(-1, count)
  return rng.normal(size=(size, 18)).astype(np.float32) * 3, label, labels, source


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_the_loss_is_the_sum_of_the_own_classes_binary_cross_entropies(smoothing):
  logits, _, labels, source = random_batch(np.random.default_rng(0))
  loss = jax.jit(lambda *args: sigmoid_cross_entropy(*args, COLUMNS, label_smoothing=smoothing))(logits, labels, source)
  seen = 0
  for i, name in enumerate(SOURCES[s] for s in source):
    if name not in HEADS.several_labels:
      assert loss[i] == 0
      continue
    x, y = logits[i, OWN[name]].astype(np.float64), labels[i, : dict(COUNTS)[name]].astype(np.float64)
    target = (1 - smoothing) * y + smoothing / len(y)
    p = 1 / (1 + np.exp(-x))
    each = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    np.testing.assert_allclose(loss[i], each[y >= 0].sum(), rtol=1e-5, atol=1e-6)
    seen += (y == 0).all()
  assert seen  # none of the classes is a label set like others, and costs something


def test_gradient_of_a_head_comes_from_its_own_samples_alone():
  rng = np.random.default_rng(1)
  feature = rng.normal(size=(96, 6)).astype(np.float32) * 100
  _, label, labels, source = random_batch(rng)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {name: {'kernel': normal(6, n), 'bias': normal(n)} for name, n in COUNTS}

  @jax.jit
  def gradient(params, label, labels):
    def total(p):
      logits = HEADS.apply({'params': p}, encoded(feature))
      one = cross_entropy(logits, label, source, COLUMNS, label_smoothing=0.1)
      return (one + sigmoid_cross_entropy(logits, labels, source, COLUMNS, label_smoothing=0.1)).sum()

    return jax.grad(total)(params)

  together = gradient(params, label, labels)
  for index, name in enumerate(SOURCES):
    own = source == index
    got = gradient(params, np.where(own, label, -1), np.where(own[:, None], labels, -1).astype(np.int8))
    for other in OWN:
      found = jax.tree.leaves(got[other])
      assert all(np.isfinite(x).all() for x in found)
      assert any(np.asarray(x).any() for x in found) == (other == name), (name, other)
    if name in OWN:
      jax.tree.map(np.testing.assert_array_equal, together[name], got[name])


def test_what_is_not_known_and_labels_that_a_head_lacks():
  logits = np.random.default_rng(2).normal(size=(5, 18)).astype(np.float32)
  source = np.array([0, 0, 4, 4, 1], np.int32)
  labels = np.full((5, WIDTH), -1, np.int8)
  labels[1] = 0
  labels[2, 5] = 0  # 'more' has classes 0 to 3
  labels[3, 2] = 1  # of one class alone something is known
  labels[4, 0] = 1  # a source without a head
  np.testing.assert_array_equal(is_labelled(labels, source, COLUMNS), [False, True, True, True, False])
  one = jax.value_and_grad(lambda x, y, s: sigmoid_cross_entropy(x[None], y[None], s[None], COLUMNS)[0])
  loss, slope = jax.jit(jax.vmap(one))(logits, labels, source)
  assert (loss[0], loss[4]) == (0, 0) and np.isnan(loss[2]) and loss[1] > 0
  assert not np.asarray(slope)[[0, 4]].any()
  assert np.flatnonzero(slope[3]).tolist() == [11]


def test_other_heads_change_nothing_whatever_they_say():
  logits, _, labels, source = random_batch(np.random.default_rng(3))
  own = np.zeros(logits.shape, bool)
  for i, name in enumerate(SOURCES[s] for s in source):
    own[i, OWN.get(name, slice(0))] = True

  @jax.jit
  def judged(logits):
    total = lambda x: (jnp.sum(loss := sigmoid_cross_entropy(x, labels, source, COLUMNS)), loss)
    (_, loss), slope = jax.value_and_grad(total, has_aux=True)(logits)
    return loss, rank_of_best_label(logits, labels, source, COLUMNS), slope

  as_it_is = judged(logits)
  for junk in (1e9, np.inf, -np.inf, np.nan):
    found = judged(np.where(own, logits, np.float32(junk)))
    jax.tree.map(np.testing.assert_array_equal, found, as_it_is)
    assert not np.asarray(found[2])[~own].any()


def test_rank_is_that_of_the_best_label():
  logits, _, labels, source = random_batch(np.random.default_rng(4), 300)
  logits = np.round(logits / 3) + 0.0  # many ties
  ranks = np.asarray(jax.jit(lambda *args: rank_of_best_label(*args, COLUMNS))(logits, labels, source))
  for i, name in enumerate(SOURCES[s] for s in source):
    true = np.flatnonzero(labels[i] == 1)
    if not len(true):
      assert ranks[i] == LARGEST
      continue
    order = np.argsort(-logits[i, OWN[name]], kind='stable').tolist()
    assert ranks[i] == min(order.index(k) for k in true)


def test_a_head_of_several_labels_starts_where_a_softmax_does():
  feature = encoded(np.ones((1, 6), np.float32))
  params = nn.meta.unbox(jax.jit(HEADS.init)(jax.random.key(0), feature)['params'])
  assert not any(np.asarray(x).any() for name in ('acts', 'digits') for x in jax.tree.leaves(params[name]))
  for name in HEADS.several_labels:
    count = dict(COUNTS)[name]
    np.testing.assert_allclose(1 / (1 + np.exp(-params[name]['bias'])), 1 / count, rtol=1e-6)
  labels, source = np.array([[1, 0, 0, 0, 0, 0]], np.int8), np.zeros(1, np.int32)
  judged = jax.jit(lambda p: sigmoid_cross_entropy(HEADS.apply({'params': p}, feature), labels, source, COLUMNS))
  loss = judged(params)[0]
  np.testing.assert_allclose(loss, np.log(6) - 5 * np.log(1 - 1 / 6), rtol=1e-5)


def encode(params, clip, *, rng=None, levels=()):
  x = clip.astype(jnp.float32).reshape(len(clip), -1) / 255
  return encoded(x @ params['kernel'])


def test_a_mixed_clip_has_the_labels_of_both_and_an_empty_set_mixes_with_others():
  rng = np.random.default_rng(5)
  infos = [SourceInfo('a', 'video', 9, tuple('xyz')), SourceInfo('b', 'video', 9, tuple('vwxyz'), labels='several')]
  heads = Heads((('a', 3), ('b', 5)), several_labels=('b',))
  source = np.repeat(np.arange(2, dtype=np.int32), 8)
  labels = np.where(source[:, None] == 1, rng.random((16, 5)) < 0.4, -1).astype(np.int8)
  labels[8], labels[9:11] = 0, -1
  label = np.where(source == 0, rng.integers(0, 3, 16), -1).astype(np.int32)
  clip = rng.integers(0, 256, (16, 2, 4, 4, 3)).astype(np.uint8)
  batch = {'views': {'clip': clip}, 'label': label, 'labels': labels, 'source': source, 'mask': np.ones(16, bool)}
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'encoder': {'kernel': normal(96, 5)}, 'heads': {n: {'kernel': normal(5, k), 'bias': normal(k)}
                                                          for n, k in heads.class_counts}}  # fmt: skip
  objective = classification.make(encode=encode, heads=heads, sources=infos, mixup=1.0)
  key = jax.random.key(0)
  found = np.asarray(jax.jit(objective.loss)(params, {}, batch, key).measures['loss'])
  labelled = (label >= 0) | (labels >= 0).any(axis=1)
  draw = jax.jit(lambda key, group: mixing.draw(key, group, 4, 4, mixup=1.0))
  mix = draw(jax.random.split(key)[1], 2 * source + labelled)
  partner, share = np.asarray(mix.partner_B), np.asarray(mix.share_B)
  assert partner[8] >= 11 and sorted(partner[9:11]) == [9, 10]
  clips = np.asarray(jax.jit(mixing.mixed_clip)(mix, clip), np.float64).reshape(16, -1) / 255
  for i in range(8, 16):
    x = clips[i] @ params['encoder']['kernel'] @ params['heads']['b']['kernel'] + params['heads']['b']['bias']
    y = share[i] * labels[i] + (1 - share[i]) * labels[partner[i]]
    want = (np.log1p(np.exp(-x)) * y + np.log1p(np.exp(x)) * (1 - y)).sum() if labelled[i] else 0
    np.testing.assert_allclose(found[i], want, rtol=1e-4, atol=1e-5)


# Labels on their way into a batch.

LISTS = [(0, 2), (), (-1,), (3,), (0, 1, 2, 3)]


def several(lists=LISTS, names=('left', 'right', 'up', 'down'), **settings):
  videos = [np.full((3, 8, 8, 3), 20 * i, np.uint8) for i in range(len(lists))]
  return arrays.array_source('tags', videos, lists, names, **settings)


def test_label_sets():
  sets = label_sets.of_lists([(2, 0), (), (-1,), (3,)])
  assert [label_sets.of(sets, i).tolist() for i in range(4)] == [[0, 2], [], [-1], [3]]
  assert sets.known_N.tolist() == [True, True, False, True]
  assert label_sets.counts(sets, 5).tolist() == [1, 0, 1, 1, 0]
  chosen = label_sets.select(sets, np.array([3, 1, 0, 0]))
  assert [label_sets.of(chosen, i).tolist() for i in range(4)] == [[3], [], [0, 2], [0, 2]]
  assert label_sets.target(np.array([0, 2]), 4, 6).tolist() == [1, 0, 1, 0, -1, -1]
  assert label_sets.target(np.array([], int), 4, 4).tolist() == [0] * 4
  assert label_sets.target(np.array([-1]), 4, 4).tolist() == [-1] * 4


def test_batches_say_every_label_and_tell_none_from_unknown():
  plain = arrays.array_source('acts', [np.zeros((3, 8, 8, 3), np.uint8)] * 4, [0, 1, 2, -1], ('a', 'b', 'c'))
  tags = several()
  infos = [plain.info, tags.info]
  assert [s.labels for s in infos] == ['one', 'several'] and contract.label_width(infos) == 4
  stream = Stream((0, 1), 2, 8, 9, label_width=4)
  (batch,) = arrays.array_batches([plain, tags], {'v': stream}, 0, num_steps=1)
  sub = batch['v']
  shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape(sub) == contract.shapes(9, {'clip': 2}, (8, 8), labels=4)
  for source, example, label, labels in zip(sub['source'], sub['example_id'], sub['label'], sub['labels'], strict=True):
    if source == 0:
      assert label == plain.label[example] and set(labels) == {-1}
    else:
      want = [-1] * 4 if LISTS[example] == (-1,) else [int(k in LISTS[example]) for k in range(4)]
      assert label == -1 and labels.tolist() == want
  *_, last = arrays.array_eval_batches(tags, 1, stream, 4)
  assert last['mask'].tolist() == [True] + [False] * 3 and (last['labels'][1:] == -1).all()
  assert 'labels' not in next(arrays.array_batches([plain], {'v': Stream((0,), 2, 8, 4)}, 0))['v']


def test_a_mirrored_clip_has_the_mirrored_labels_and_no_side_without_the_other_is_mirrored():
  tags = several(flip=True, flip_labels=(1, 0, 2, -1))
  stream = Stream((0,), 2, 8, 8, label_width=4)
  seen = {}
  for batch in arrays.array_batches([tags], {'v': stream}, 0, num_steps=20):
    for example, labels in zip(batch['v']['example_id'], batch['v']['labels'], strict=True):
      seen.setdefault(int(example), set()).add(tuple(labels.tolist()))
  assert seen[0] == {(1, 0, 1, 0), (0, 1, 1, 0)}
  assert seen[3] == {(0, 0, 0, 1)} and seen[4] == {(1, 1, 1, 1)} and seen[1] == {(0,) * 4} and seen[2] == {(-1,) * 4}


def test_a_plan_knows_how_many_labels_a_published_data_set_has():
  infos = [sizes.info(name, sizes.PUBLISHED[name]) for name in ('kinetics/400', 'charades/v1')]
  assert [s.labels for s in infos] == ['one', 'several'] and contract.label_width(infos) == 157


def test_labels_are_part_of_what_examples_are():
  tags, other = several(), several([(0, 2), (), (-1,), (3,), (0, 1, 2)])
  assert fingerprint(tags) != fingerprint(other) and content(tags) != content(other)
  assert fingerprint(several([(0, 2), (-1,), (-1,), (3,), (0, 1, 2, 3)])) != fingerprint(tags)
  some = select(tags, np.array([4, 1]))
  assert some.labelled_N.all() and label_sets.of(some.labels, 0).tolist() == [0, 1, 2, 3]
