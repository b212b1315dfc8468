"""Padding is nothing to an objective: not to this step, and not to the next by what its state keeps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.experiment.state import init_params
from tests import tiny
from tests.pretext_runs import built

MOTION = {'name': 'resnet3d', 'kind': 'mc3', 'depths': (1, 1), 'widths': (4, 4)}
CLASSES = {'time': {'plain': (1, 1), 'faster': (1, 2)}, 'space': {'left': (1, 1, 2, 1), 'plain': (1, 1, 1, 1)}}
SMALL = {'stride': 1, 'queue_size': 16, 'dim': 8, 'momentum': 0.9}
OBJECTIVES = {
  'classification': {},
  'vtdl': SMALL,
  'hdc': {**SMALL, 'head_hidden': 16},
  'modist': {**SMALL, 'motion_per_frame': 1, 'min_shift': 1, 'max_shift': 4, 'head_hidden': 16, 'motion_weight': 1.0,
             'motion_encoder': MOTION},
  'statistics': {'motion_source': 'normal_flow'},
  'order_geometry': {'gap': 1, 'hidden': 8},
  'v3s': {'output': 8, 'classes': CLASSES},
}  # fmt: skip
FAST = ('vtdl',)
# MoDist's own encoder normalises by the statistics of its batch, in which padding is as in every encoder with such.
CASES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OBJECTIVES if n != 'modist']


def make(name):
  """(loss with its gradient, parameters, first state, function of a mask and a seed of masked pixels to a batch)."""
  c = tiny.config(model__depth=1, model__drop_path=0.0)
  c.streams.video.objective = {'name': name, **OBJECTIVES[name]}
  run = built(c)
  task = run.objectives['video']
  params = nn.meta.unbox(init_params(run, jax.random.key(0)))
  state = nn.meta.unbox(task.init_state(params))
  lengths, size = run.view_lengths('video'), run.streams['video'].size

  def batch(mask_B, seed):
    rng, padding = np.random.default_rng(0), np.random.default_rng(seed)
    count = len(mask_B)
    draw = lambda r, n: r.integers(0, 256, (count, n, *size, 3)).astype(np.uint8)
    views = {v: np.where(mask_B[:, None, None, None, None], draw(rng, n), draw(padding, n)) for v, n in lengths.items()}
    ids = np.where(mask_B, np.arange(count), -1).astype(np.int32)
    steps = {v: np.tile(np.arange(n, dtype=np.int32), (count, 1)) for v, n in lengths.items()}
    targets = {'frames': steps, 'num_frames': {v: np.full(count, 60, np.int32) for v in lengths}}
    return {'views': views, 'targets': {t: targets[t] for t in task.targets}, 'mask': mask_B, 'example_id': ids,
            'video_id': ids, 'source': np.where(mask_B, 0, -1).astype(np.int32),
            'label': np.where(mask_B, 1, -1).astype(np.int32)}  # fmt: skip

  def loss(params, state, batch, rng):
    out = task.loss(params, state, batch, rng)
    return out.loss, out

  return jax.jit(jax.value_and_grad(loss, has_aux=True)), params, state, batch


@pytest.mark.parametrize('name', CASES)
def test_what_padding_shows_does_not_matter(name):
  loss, params, state, batch = make(name)
  mask = np.arange(8) < 5
  ends = []
  for seed in (1, 2):
    (first, out), gradient = loss(params, state, batch(mask, seed), jax.random.key(3))
    (second, _), _ = loss(params, out.state, batch(mask, seed), jax.random.key(4))
    ends.append((first, second, gradient))
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(near, *ends)
  assert float(ends[0][0]) > 0


@pytest.mark.parametrize('name', [*CASES, pytest.param('modist', marks=pytest.mark.slow)])
def test_padding_alone_is_a_loss_of_nothing(name):
  loss, params, state, batch = make(name)
  (value, out), gradient = loss(params, state, batch(np.zeros(8, bool), 1), jax.random.key(3))
  assert float(value) == 0 and not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradient))
  kept, before = (
    {k: v for k, v in s.items() if k in ('queue', 'queues', 'invariance')} if isinstance(s, dict) else s
    for s in (out.state, state)
  )
  jax.tree.map(np.testing.assert_array_equal, kept, before)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(out.state) if jnp.issubdtype(x.dtype, jnp.inexact))
