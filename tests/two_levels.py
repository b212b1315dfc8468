"""An encoder of two levels that compiles in a moment, and batches for objectives of several views."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models import encoder as encoders
from cover_jax.models.encoder import Encoded, Encoder
from cover_jax.runtime import sharding

FRAMES, SIZE, STREAM = 4, (8, 8), 'video'


class TwoLevels(Encoder):
  """'near' is 4 wide and sees patches of 4 x 4 pixels, 'far' is 6 wide and sees two frames of 'near'."""

  dtype: Any = jnp.float32

  @property
  def width(self) -> int:
    return 6

  @property
  def level_names(self) -> tuple[str, ...]:
    return ('near', 'far')

  @nn.compact
  def __call__(self, clip: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    b, t, h, w, _ = clip.shape
    patches = (
      clip.reshape(b, t, h // 4, 4, w // 4, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h // 4, w // 4, 48)
    )
    near = jnp.tanh(nn.Dense(4, name='near')(patches))
    both = jnp.concatenate([near, jnp.roll(near, 1, axis=1)], axis=-1)
    far = jnp.tanh(nn.Dense(6, name='far')(both))
    return Encoded(far.mean(axis=(1, 2, 3)), far, {name: {'near': near, 'far': far}[name] for name in levels})


def encode(params, clip, *, rng=None, levels=()):
  return encoders.run(TwoLevels(), params, clip.astype(jnp.float32) / 255, rng=rng, levels=levels)


def start(objective, seed=0):
  """(params of a run of this encoder and objective, the objective's state), without boxes."""
  clip = jnp.zeros((1, FRAMES, *SIZE, 3))
  params = {
    'encoder': TwoLevels().init(jax.random.key(seed), clip)['params'],
    'heads': {},
    'objectives': {STREAM: objective.init_params(jax.random.key(seed + 1))},
  }
  params = nn.meta.unbox(params)
  return params, nn.meta.unbox(objective.init_state(params))


def batch(objective, examples=4, seed=0, **videos):
  """A sub-batch of random pixels; each example is a video of its own unless `videos` says otherwise."""
  rng = np.random.default_rng(seed)
  lengths = {name: len(frames) for name, frames in objective.views(1000, None).items()}
  pixels = lambda frames: rng.integers(0, 256, (examples, frames, *SIZE, 3), np.uint8)
  ids = {'source': np.zeros(examples, np.int32), 'video_id': 100 * seed + np.arange(examples, dtype=np.int32)}
  views = {name: pixels(frames) for name, frames in lengths.items()}
  return {'views': views, 'mask': np.ones(examples, bool), **ids, **videos}


def jitted(objective):
  return jax.jit(functools.partial(objective.loss))


def on_all_devices(sub_batch):
  """The sub-batch with its examples split over the devices."""
  mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1})
  return sharding.to_global({STREAM: sub_batch}, mesh)[STREAM]
