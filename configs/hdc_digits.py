"""Self-supervised pre-training (HDC-style: spatial and temporal contrast, decoupled) on the embedded motions.

    python -m cover_jax.main --config=configs/hdc_digits.py --workdir=/tmp/hdc_digits

Labels are not read. What was learnt is judged by `--mode=frozen` (configs/frozen_digits.py) and by fine-tuning with few
labels (configs/finetune_digits.py), as docs/vtdl.md shows for VTDL; `stream` beside a labelled stream co-trains, as in
configs/semi_supervised_digits.py. Every number is ours.

`--config=configs/hdc_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, vtdl_digits

# Weak: what both clips of a spatial pair get, and the anchor of a temporal one.
WEAK = {'brightness': 0.1, 'contrast': 0.1, 'saturation': 0.1}


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """An HDC-style stream for the short videos of the embedded data."""
  objective = {
    'name': 'hdc',
    'stride': 1,  # the videos have 12 to 22 frames
    'min_gap': 4,
    'queue_size': 512,
    'momentum': 0.99,
    'head_hidden': 128,
    'appearance': {
      'color_jitter': {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.5},
      'grayscale': {'probability': 0.2},
    },
  }
  return defaults.stream(
    (source,), num_frames=8, size=32, objective=objective, augment={'color_jitter': WEAK}, **changes
  )


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = vtdl_digits.get_config(variant)  # the same data, encoder and optimiser
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  return config
