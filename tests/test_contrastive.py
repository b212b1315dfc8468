"""The shared pieces of contrastive learning, each against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cover_jax.models.encoder import Encoded
from cover_jax.objectives import contrastive
from cover_jax.objectives.contrastive import Negatives, Queue

push, usable = jax.jit(contrastive.push), jax.jit(contrastive.usable)


def vectors(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Ring:
  """The queue as a list of dicts."""

  def __init__(self, size):
    self.slots, self.next, self.filled = [None] * size, 0, 0

  def push(self, keys, sources, videos):
    for row in zip(keys, sources, videos, strict=True):
      self.slots[self.next] = row
      self.next = (self.next + 1) % len(self.slots)
      self.filled = min(self.filled + 1, len(self.slots))


@settings(max_examples=25, deadline=None)
@given(  # few shapes, so that little is compiled
  size=st.sampled_from([1, 5, 8]),
  batches=st.lists(st.sampled_from([1, 3, 5, 12]), min_size=1, max_size=6),
  seed=st.integers(0, 99),
  masked=st.booleans(),
)
def test_queue_is_a_ring(size, batches, seed, masked):
  rng = np.random.default_rng(seed)
  queue, ring = contrastive.empty_queue(size, 3), Ring(size)
  for batch in batches:
    keys, sources, videos = vectors(rng, batch, 3), rng.integers(0, 3, batch), rng.integers(0, 5, batch)
    sources, videos = sources.astype(np.int32), videos.astype(np.int32)
    mask = rng.random(batch) < (0.5 if masked else 2)
    queue = push(queue, *map(jnp.asarray, (keys, sources, videos, mask)))
    ring.push(keys[mask], sources[mask], videos[mask])
    held = jax.device_get(queue)
    assert (int(held.next), int(held.filled)) == (ring.next, ring.filled)
    for k, slot in enumerate(ring.slots):
      if slot is not None:
        np.testing.assert_array_equal(held.key_KxD[k], slot[0])
        assert (held.source_K[k], held.video_K[k]) == (slot[1], slot[2])
    # A slot counts for an example unless it is free or of the same video of the same source.
    can_use = np.asarray(usable(queue, jnp.asarray(sources), jnp.asarray(videos)))
    for b in range(batch):
      wanted = [s is not None and (s[1], s[2]) != (sources[b], videos[b]) for s in ring.slots]
      assert can_use[b].tolist() == wanted


def test_queues_of_a_tree_are_emptied():
  ids = jnp.zeros(2, jnp.int32)
  full = contrastive.push(contrastive.empty_queue(3, 4), jnp.ones((2, 4)), ids, ids)
  state = contrastive.emptied({'teacher': jnp.ones(2), 'queues': {'a': full}})
  np.testing.assert_array_equal(state['teacher'], 1)
  jax.tree.map(np.testing.assert_array_equal, state['queues']['a'], contrastive.empty_queue(3, 4))


def test_queue_of_size_zero_stays_empty():
  queue = contrastive.empty_queue(0, 4)
  again = contrastive.push(queue, jnp.ones((2, 4)), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
  assert again.key_KxD.shape == (0, 4) and int(again.filled) == 0


def test_info_nce_against_numpy():
  rng = np.random.default_rng(0)
  query, key, queue, own = vectors(rng, 5, 8), vectors(rng, 5, 8), vectors(rng, 7, 8), vectors(rng, 5, 2, 8)
  mask = rng.random((5, 7)) < 0.6
  mask[2] = False
  groups = [Negatives(jnp.asarray(queue), jnp.asarray(mask)), Negatives(jnp.asarray(own))]
  result = contrastive.info_nce(jnp.asarray(query), jnp.asarray(key), groups, temperature=0.07)
  for b in range(5):
    q = query[b].astype(np.float64)
    candidates = [q @ key[b], *(q @ queue[k] for k in range(7) if mask[b, k]), *(q @ own[b, j] for j in range(2))]
    weights = np.exp(np.array(candidates) / 0.07)
    assert float(result.loss[b]) == pytest.approx(-np.log(weights[0] / weights.sum()), rel=1e-4)
    assert float(result.top1[b]) == (candidates[0] > max(candidates[1:]))
    assert float(result.positive[b]) == pytest.approx(candidates[0], abs=1e-5)
    in_queue = queue[mask[b]] @ q
    assert float(result.negatives[0][b]) == pytest.approx(in_queue.mean() if len(in_queue) else 0, abs=1e-5)
    assert float(result.negatives[1][b]) == pytest.approx((own[b] @ q).mean(), abs=1e-5)


def test_info_nce_limits():
  rng = np.random.default_rng(1)
  query, key = jnp.asarray(vectors(rng, 4, 8)), jnp.asarray(vectors(rng, 4, 8))
  alone = contrastive.info_nce(query, key, [], temperature=0.07)
  np.testing.assert_allclose(alone.loss, 0, atol=1e-6)
  assert alone.top1.tolist() == [1, 1, 1, 1]
  # The key as its own negative: it cannot be told from itself, whatever the encoder does.
  copied = contrastive.info_nce(query, key, [Negatives(key[:, None])], temperature=0.07)
  np.testing.assert_allclose(copied.loss, np.log(2), rtol=1e-5)
  assert copied.top1.tolist() == [0, 0, 0, 0]  # a tie is no hit
  # What is masked has no influence, not even through gradients.
  garbage = jnp.full((3, 8), 1e3)
  loss = lambda q: contrastive.info_nce(q, key, [Negatives(garbage, False)], temperature=0.07).loss.sum()
  assert float(loss(query)) == pytest.approx(0, abs=1e-6)
  np.testing.assert_allclose(jax.grad(loss)(query), 0, atol=1e-6)


def test_teacher_closed_form_and_no_gradient():
  m, student = 0.9, {'w': jnp.asarray([1.0, -2.0])}
  teacher = {'w': jnp.zeros(2)}
  for _ in range(7):
    teacher = contrastive.ema_update(teacher, student, m)
  np.testing.assert_allclose(teacher['w'], (1 - m**7) * np.array([1.0, -2.0]), rtol=1e-6)
  x = {'w': jnp.asarray([0.1, 1 / 3])}
  assert contrastive.ema_update(x, x, 0.999)['w'].tolist() == x['w'].tolist()  # to the bit
  gradient = jax.grad(lambda s: contrastive.ema_update(teacher, s, m)['w'].sum())(student)
  assert gradient['w'].tolist() == [0, 0]


def test_push_stops_the_gradient():
  queue = contrastive.empty_queue(4, 2)
  ids = jnp.zeros(2, jnp.int32)
  gradient = jax.grad(lambda key: contrastive.push(queue, key, ids, ids).key_KxD.sum())(jnp.ones((2, 2)))
  assert not np.any(gradient)


def test_unit_of_zero_is_finite():
  x = jnp.zeros((1, 4))
  assert contrastive.unit(x).tolist() == [[0, 0, 0, 0]]
  assert np.all(np.isfinite(jax.grad(lambda v: contrastive.unit(v).sum())(x)))


@pytest.mark.parametrize('layers', [1, 2, 3])
def test_projection_gives_unit_vectors(layers):
  head = contrastive.ProjectionHead(dim=8, layers=layers, hidden=16)
  x = jax.random.normal(jax.random.key(0), (5, 12))
  params = head.init(jax.random.key(1), x)['params']
  assert len(params) == layers
  out = head.apply({'params': params}, x)
  assert out.shape == (5, 8) and out.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(out, axis=-1), 1, rtol=1e-5)


def test_pool():
  tokens = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
  encoded = Encoded(-tokens[:, 0], tokens.reshape(2, 1, 2, 2, 3))
  assert contrastive.pool(encoded, 'cls').tolist() == (-tokens[:, 0]).tolist()
  np.testing.assert_allclose(contrastive.pool(encoded, 'mean'), tokens.mean(1))


def test_queue_is_a_pytree_of_arrays():
  queue = contrastive.empty_queue(3, 2)
  assert isinstance(queue, Queue) and len(jax.tree.leaves(queue)) == 5
  buffers = {id(x) for x in jax.tree.leaves(queue)}
  assert len(buffers) == 5  # donated state must not share buffers
