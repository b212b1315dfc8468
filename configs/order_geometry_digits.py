"""Order-and-geometry pre-training on the embedded motions, without their labels.

    python -m cover_jax.main --config=configs/order_geometry_digits.py --workdir=/tmp/order_geometry_digits

The encoder is judged as that of configs/vtdl_digits.py: `--mode=frozen` with configs/frozen_digits.py, and
configs/finetune_digits.py. All numbers are ours. The videos have 12 to 22 frames of 32 pixels: parts have 2 frames and
begin 3 to 4 frames apart.

`--config=configs/order_geometry_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, vtdl_digits


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """An order-and-geometry stream for the short videos of the embedded data."""
  objective = {
    'name': 'order_geometry',
    'gap': 4,
    'parts': 'apart',  # together was tried without `differences` alone
    'differences': True,  # without them the order is at chance after 1,200 steps
    'part_colours': 0.1,
    'part_shift': 1,
    'still': 1.0,
    'rotation': 60.0,
    'shear': 0.0,
    'hidden': 128,
    'geometry_weight': 10.0,  # its Huber loss is of 0.05
  }
  return defaults.stream((source,), num_frames=8, size=32, objective=objective, **changes)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = vtdl_digits.get_config(variant)
  # No rotation by the host: the geometry is the objective's.
  source = defaults.source(
    'moving_digits/motions', label_key=None, test='test', crop_scale=(0.7, 1.0), crop_ratio=(1.0, 1.0)
  )
  config.sources = {'motions_unlabelled': source}
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  return config
