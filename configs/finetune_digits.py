"""Fine-tuning with few labels: a new head, all weights trained, on a share of the motions' labels.

    python -m cover_jax.main --config=configs/finetune_digits.py --workdir=/tmp/finetune_digits \
        --config.sources.motions.label_fraction=0.05 --config.init_from.path=/tmp/vtdl_digits

Without `init_from` it is training from nothing on the same examples. A share of each class is chosen, at least one
example, the same in every run; the smaller share is part of the larger. The length of a run is in steps, not epochs, so
that fewer labels do not mean fewer steps, and nothing is chosen on the test split: what is reported is the last step.

`--config=configs/finetune_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, digits_cover, vtdl_digits


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  cover = digits_cover.get_config(variant)
  config = defaults.get_config()
  config.sources = {'motions': cover.sources.motions}
  # The augmentation is that of pre-training, as in VTDL's release.
  config.sources.motions.update({'label_fraction': 0.05, **vtdl_digits.GEOMETRY})
  config.streams = {
    'video': defaults.stream(('motions',), num_frames=8, size=32, augment={'color_jitter': vtdl_digits.COLOURS})
  }
  config.model = cover.model
  config.batch_size = 32
  config.total_steps = 300
  config.optimizer.learning_rate = 1e-3
  config.optimizer.options = {'b2': 0.98}
  config.optimizer.warmup_steps = 30
  config.optimizer.weight_decay = 0.05

  if defaults.is_debug(variant):
    config.batch_size = 16
    config.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
  return config
