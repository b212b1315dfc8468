"""Semi-supervised co-training: a labelled stream and a VTDL stream train one encoder, in the same steps.

Of the embedded motions 5 % have labels here; the VTDL stream sees all of them without. What the labels alone give, with
as many steps, is configs/finetune_digits.py without `init_from`; docs/vtdl.md compares the two.

    python -m cover_jax.main --config=configs/semi_supervised_digits.py --workdir=/tmp/semi_supervised_digits

`--config=configs/semi_supervised_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, digits_cover, vtdl_digits


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  cover = digits_cover.get_config(variant)
  config = defaults.get_config()
  config.sources = {
    'motions': cover.sources.motions,
    'motions_unlabelled': vtdl_digits.unlabelled('moving_digits/motions'),
  }
  config.sources.motions.update({'label_fraction': 0.05, **vtdl_digits.GEOMETRY})
  config.streams = {
    # Batches and weights are set by hand: in proportion to their sizes the labels would hardly count.
    'labelled': defaults.stream(
      ('motions',), num_frames=8, size=32, batch_size=32, loss_weight=1.0, augment={'color_jitter': vtdl_digits.COLOURS}
    ),
    'unlabelled': vtdl_digits.stream('motions_unlabelled', batch_size=64, loss_weight=0.5),
  }
  config.model = cover.model
  config.batch_size = 96
  config.total_steps = 1000
  config.optimizer.learning_rate = 1e-3
  config.optimizer.options = {'b2': 0.98}
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 0.05
  config.checkpoint_every = 250
  config.eval_every = 500

  if defaults.is_debug(variant):
    config.streams.labelled.batch_size = config.streams.unlabelled.batch_size = 8
    config.batch_size = 16
    config.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
    config.eval_every = 0
  return config
