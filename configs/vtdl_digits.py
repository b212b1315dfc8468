"""Self-supervised pre-training (VTDL) on the embedded motions, without their labels; then CoVeR on top of it.

    python -m cover_jax.main --config=configs/vtdl_digits.py --workdir=/tmp/vtdl_digits
    python -m cover_jax.main --config=configs/digits_cover.py --workdir=/tmp/digits_cover \
        --config.init_from.path=/tmp/vtdl_digits

What was learnt is judged without further training (linear probe, nearest neighbours, retrieval) by

    python -m cover_jax.main --config=configs/frozen_digits.py --workdir=/tmp/vtdl_frozen --mode=frozen \
        --config.init_from.path=/tmp/vtdl_digits

and by fine-tuning with few labels: configs/finetune_digits.py. Figures: docs/vtdl.md.

`--config=configs/vtdl_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, digits_cover

# VTDL's basic augmentation, as its release sets it, but for two things. Colours are not cut to the range of pixels,
# so that they and TCA leave motion alone (hue only roughly: its shift
# is not linear). Contrast is about the mean of the clip, not of each frame.
COLOURS = {'brightness': 0.5, 'contrast': 0.5, 'saturation': 0.25, 'hue': 0.5, 'clamp': False}
GEOMETRY = {'rotation': 10.0, 'crop_scale': (0.6, 1.0), 'crop_ratio': (3 / 4, 4 / 3)}


def unlabelled(dataset: str, **changes) -> ml_collections.ConfigDict:
  """A source whose labels are not read, so that there is no head; its test split judges the pretext task."""
  return defaults.source(dataset, label_key=None, test='test', **{**GEOMETRY, **changes})


def stream(source: str, **changes) -> ml_collections.ConfigDict:
  """A VTDL stream for the short videos of the embedded data."""
  objective = {
    'name': 'vtdl',
    'stride': 1,  # the videos have 12 to 22 frames
    'min_gap': 4,
    'queue_size': 512,
    'momentum': 0.99,  # hundreds of steps, not the release's hundred thousand
  }
  return defaults.stream(
    (source,), num_frames=8, size=32, objective=objective, augment={'color_jitter': COLOURS}, **changes
  )


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  second_stage = digits_cover.get_config(variant)
  config = defaults.get_config()
  config.sources = {'motions_unlabelled': unlabelled('moving_digits/motions')}
  config.streams = {'unlabelled': stream('motions_unlabelled')}
  config.model = second_stage.model
  config.batch_size = 64
  config.total_steps = 1000
  config.optimizer.learning_rate = 1e-3
  config.optimizer.options = {'b2': 0.98}
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 0.05
  config.checkpoint_every = 250

  if defaults.is_debug(variant):
    config.batch_size = 16
    config.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
  return config
