"""Self-supervised pre-training (spatio-temporal statistics) on the embedded motions, without their labels.

    python -m cover_jax.main --config=configs/statistics_digits.py --workdir=/tmp/statistics_digits

What is asked of each clip: where it moves most and in which direction, where its colours change most, and which they
are. What was learnt is judged by `--mode=frozen` (configs/frozen_digits.py) and by fine-tuning with few labels
(configs/finetune_digits.py), as docs/vtdl.md shows for VTDL; `stream` beside a labelled stream co-trains, as in
configs/semi_supervised_digits.py. Every number is ours, and motion is normal flow, which is cheap:
`--config.streams.unlabelled.objective.motion_source=flow` takes TV-L1 flow.

`--config=configs/statistics_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, vtdl_digits


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """A stream of statistics for the short videos of the embedded data."""
  objective = {'name': 'statistics', 'motion_source': 'normal_flow', 'target_mode': 'classify'}
  return defaults.stream((source,), num_frames=8, size=32, objective=objective, **changes)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = vtdl_digits.get_config(variant)  # the same encoder and optimiser
  config.sources = {
    'motions_unlabelled': defaults.source(
      'moving_digits/motions', label_key=None, test='test', crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3)
    )
  }
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  return config
