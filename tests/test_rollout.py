"""Attention rollout against the definition: a product of explicit matrices over all tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models.attention_rollout import class_token_rollout, heat_maps
from cover_jax.models.timesformer import TimeSformer

T, ROWS, COLUMNS = 3, 2, 3
N = ROWS * COLUMNS
KINDS = ('divided', 'joint', 'space')


@functools.cache
def attention_of(kind, frames=T, batch=2):
  """Attention probabilities of a tiny model with weights far from their initial ones."""
  model = TimeSformer(
    patch_size=4, width=8, depth=3, num_heads=2, mlp_dim=16, num_frames=frames, image_size=8, attention=kind
  )
  clip = jax.random.normal(jax.random.key(1), (batch, frames, 4 * ROWS, 4 * COLUMNS, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), clip)['params']
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  params = tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
  apply = jax.jit(lambda p, c: model.apply({'params': p}, c, mutable=['attention']))
  _, kept = apply(params, clip)
  return jax.tree.map(np.array, kept['attention']['blocks'])


def patch(n, t, frames):
  return 1 + n * frames + t


def dense_matrices(attention, kind, b, frames):
  """Every step of every block as a matrix over the tokens [1 + N * T] (float64), in the order in which they act."""
  space = attention['space'].astype(np.float64).mean(axis=3)[:, b]
  for layer in range(len(space)):
    size = 1 + N * frames
    if kind == 'divided':
      time = attention['time'].astype(np.float64).mean(axis=3)[layer, b]
      a = np.eye(size)
      for n, t in itertools.product(range(N), range(frames)):
        a[patch(n, t, frames)] = 0
        for k in range(frames):
          a[patch(n, t, frames), patch(n, k, frames)] = time[n, t, k]
      yield (np.eye(size) + a) / 2
    a = np.zeros((size, size))
    if kind == 'joint':
      a = space[layer, 0]
    else:
      for t in range(frames):
        of_frame = [0] + [patch(n, t, frames) for n in range(N)]
        a[0, of_frame] += space[layer, t, 0] / frames
        for n in range(N):
          a[patch(n, t, frames), of_frame] = space[layer, t, n + 1]
    yield (np.eye(size) + a) / 2


@pytest.mark.parametrize(('kind', 'frames'), [('divided', T), ('joint', T), ('divided', 1), ('joint', 1)])
def test_equals_the_product_of_dense_matrices(kind, frames):
  attention = attention_of(kind, frames)
  rollout = np.asarray(class_token_rollout(attention))
  for b in range(2):
    product = np.eye(1 + N * frames)
    for step in dense_matrices(attention, kind, b, frames):
      np.testing.assert_allclose(step.sum(axis=1), 1, atol=1e-6)
      product = step @ product
    np.testing.assert_allclose(rollout[b], product[0], rtol=1e-5, atol=1e-7)


def test_space_is_the_average_of_the_frames_alone():
  attention = attention_of('space')
  rollout = np.asarray(class_token_rollout(attention))
  for b in range(2):
    expected = np.zeros(1 + N * T)
    for t in range(T):
      product = np.eye(1 + N)
      for layer in attention['space'].astype(np.float64).mean(axis=3)[:, b, t]:
        product = (np.eye(1 + N) + layer) / 2 @ product
      expected[[0] + [patch(n, t, T) for n in range(N)]] += product[0] / T
    np.testing.assert_allclose(rollout[b], expected, rtol=1e-5, atol=1e-7)


def test_class_attention_of_divided_is_averaged_over_frames_in_every_block():
  """A patch of one frame that all look at only in that frame: the class token spreads over the frames again."""
  attention = attention_of('divided')
  space = np.zeros_like(attention['space'])
  space[..., 0] = 1  # everything looks at the class token only
  rollout = np.asarray(class_token_rollout({'time': attention['time'], 'space': space}))
  np.testing.assert_allclose(rollout[:, 0], 1, rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_sums_to_one_and_is_not_negative(kind):
  rollout = np.asarray(class_token_rollout(attention_of(kind)))
  assert rollout.shape == (2, 1 + N * T) and rollout.min() >= 0
  np.testing.assert_allclose(rollout.sum(axis=1), 1, rtol=1e-5)
  maps = np.asarray(heat_maps(rollout, T, (ROWS, COLUMNS)))
  assert maps.shape == (2, T, ROWS, COLUMNS)
  np.testing.assert_allclose(maps.sum(axis=(1, 2, 3)), 1, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_uniform_attention_gives_a_uniform_map(kind):
  attention = {name: np.full_like(a, 1 / a.shape[-1]) for name, a in attention_of(kind).items()}
  maps = np.asarray(heat_maps(class_token_rollout(attention), T, (ROWS, COLUMNS)))
  np.testing.assert_allclose(maps, 1 / (T * N), rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_map_finds_the_patch_that_everything_looks_at(kind):
  """Catches a wrong order of places and frames."""
  n, t = 4, 2  # second row, second column, last frame
  attention = {name: np.full_like(a, 1e-3) for name, a in attention_of(kind).items()}
  if kind == 'joint':
    attention['space'][..., patch(n, t, T)] = 1
  else:
    attention['space'][:, :, t, ..., 1 + n] = 1
  if kind == 'divided':
    attention['time'][..., t] = 1
  attention = {name: a / a.sum(axis=-1, keepdims=True) for name, a in attention.items()}
  maps = np.asarray(heat_maps(class_token_rollout(attention), T, (ROWS, COLUMNS)))
  assert (np.unravel_index(maps[0].argmax(), maps[0].shape)) == (2, 1, 1)


def test_gives_each_example_its_own():
  attention = attention_of('divided')
  both = class_token_rollout(attention)
  alone = class_token_rollout({name: a[:, 1:] for name, a in attention.items()})
  assert not jnp.allclose(both[0], both[1], rtol=1e-3)
  np.testing.assert_allclose(both[1:], alone, rtol=1e-5)
