"""What is drawn for a stream depends on its own name and config, not on what else the run has."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import defaults
from cover_jax.augment import photometric
from cover_jax.experiment import state
from cover_jax.objectives import LossOutput, Objective, augmented
from cover_jax.training import step as stepping
from tests import tiny

JITTER = {'color_jitter': {'brightness': 0.9, 'contrast': 0.9}}


def losses_and_params(*others):
  """The loss of the stream 'video' in the first step and its objective's parameters, in a run with other streams."""
  config = tiny.config(model__drop_path=0.5)
  config.streams.video.update({'augment': JITTER, 'batch_size': 8})
  config.streams.image.batch_size = 8
  config.streams['own'] = defaults.stream(
    ('acts',), num_frames=4, size=16, batch_size=8, objective={'name': 'vtdl', 'stride': 1, 'queue_size': 16, 'dim': 4}
  )
  for name in others:
    config.streams[name] = defaults.stream(('things',), num_frames=1, size=16, batch_size=8)
  run, _, batches, _ = tiny.build(config, jax.devices()[:1])
  optimizer, _ = stepping.make_optimizer(run)
  fresh = jax.jit(lambda: nn.meta.unbox(state.init_state(run, optimizer, jax.random.key(0))))()
  heads = jax.tree.map(lambda x: np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), fresh.params['heads'])
  fresh = fresh.replace(params={**fresh.params, 'heads': heads})  # zero heads give every clip the same loss
  _, report = jax.jit(stepping.make_train_step(run, optimizer))(fresh, next(batches(0)))
  return jax.device_get(report['losses']), jax.device_get(fresh.params['objectives']['own'])


@pytest.mark.slow
def test_a_stream_draws_the_same_whatever_other_streams_there_are():
  losses, params = losses_and_params()
  more_losses, more_params = losses_and_params('a_stream_before', 'z_stream_behind')
  for name in losses:
    assert more_losses[name] == pytest.approx(losses[name], rel=1e-5), name
  jax.tree.map(np.testing.assert_array_equal, more_params, params)


def drawn(options, views):
  """What an objective with these views sees of one clip in 'video'."""
  seen = {}

  def loss(params, state, batch, rng):
    seen.update(batch)
    return LossOutput(0.0, state, {})

  clip = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8, 3), np.uint8)
  batch = {'views': dict.fromkeys(views, clip)}
  augmented(Objective(loss), photometric.make(options, 'here').photometric).loss({}, {}, batch, jax.random.key(0))
  return np.asarray(seen['views']['video'])


def test_a_view_draws_the_same_whatever_other_views_there_are():
  np.testing.assert_array_equal(drawn(JITTER, ['video']), drawn(JITTER, ['another', 'video', 'z']))


def test_an_augmentation_draws_the_same_whatever_other_augmentations_there_are():
  erasing = {'random_erasing': {'probability': 1.0}}
  both = drawn({'grayscale': {'probability': 0.0}, **erasing}, ['video'])
  np.testing.assert_array_equal(drawn(erasing, ['video']), both)
