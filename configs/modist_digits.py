"""Self-supervised pre-training (MoDist-style: the encoder learns from a motion pathway) on the embedded motions.

    python -m cover_jax.main --config=configs/modist_digits.py --workdir=/tmp/modist_digits

Labels are not read. The motion pathway sees differences of frames and is left behind: an export, and a run that starts
from this one, has the encoder alone. What was learnt is judged by `--mode=frozen` (configs/frozen_digits.py) and by
fine-tuning with few labels (configs/finetune_digits.py), as docs/vtdl.md shows for VTDL; `stream` beside a labelled
stream co-trains, as in configs/semi_supervised_digits.py. Every number is ours.

`--config=configs/modist_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, vtdl_digits


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """A MoDist-style stream for the short videos of the embedded data."""
  objective = {
    'name': 'modist',
    'stride': 1,  # the videos have 12 to 22 frames
    'motion_per_frame': 1,
    'min_shift': 2,
    'max_shift': 10,
    'motion_weight': 1.0,  # the motion encoder is new, too
    'motion_encoder': {'name': 'resnet3d', 'kind': 'mc3', 'depths': (1, 1, 1), 'widths': (8, 16, 32)},
    'queue_size': 512,
    'momentum': 0.99,
    'head_hidden': 128,
  }
  return defaults.stream(
    (source,), num_frames=8, size=32, objective=objective, augment={'color_jitter': vtdl_digits.COLOURS}, **changes
  )


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = vtdl_digits.get_config(variant)  # the same data, encoder and optimiser
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  return config
