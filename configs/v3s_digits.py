"""V3S-style pre-training on the embedded motions, without their labels.

    python -m cover_jax.main --config=configs/v3s_digits.py --workdir=/tmp/v3s_digits

The encoder is judged as that of configs/vtdl_digits.py: `--mode=frozen` with configs/frozen_digits.py, and
configs/finetune_digits.py. All numbers are ours. The videos have 12 to 22 frames, so that clips have 6 and rates end at
3; windows of 48 pixels are sampled to 32, so that rates in space are 1.5, or grow from 1 to 2.

`--config=configs/v3s_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, vtdl_digits

CLASSES = {
  'time': {'plain': (1, 1), 'twice': (2, 2), 'accelerate': (1, 3), 'decelerate': (3, 1)},
  'space': {
    'plain': (1, 1, 1, 1),
    'rows': (1.5, 1.5, 1, 1),
    'columns': (1, 1, 1.5, 1.5),
    'left': (1, 1, 2, 1),
    'right': (1, 1, 1, 2),
    'up': (2, 1, 1, 1),
    'down': (1, 2, 1, 1),
  },
}


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """A V3S stream for the short videos of the embedded data."""
  objective = {'name': 'v3s', 'classes': CLASSES, 'output': 32, 'short_videos': 'refuse'}
  return defaults.stream((source,), num_frames=6, size=48, objective=objective, **changes)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = vtdl_digits.get_config(variant)
  config.sources = {
    'motions_unlabelled': defaults.source(
      'moving_digits/motions', label_key=None, test='test', crop_scale=(0.7, 1.0), crop_ratio=(1.0, 1.0)
    )
  }
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  return config
