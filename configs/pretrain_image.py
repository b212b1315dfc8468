"""The first stage of CoVeR in miniature: the parameters of space, trained on images alone.

    python -m cover_jax.main --config=configs/pretrain_image.py --workdir=/tmp/pretrain_image
    python -m cover_jax.main --config=configs/digits_cover.py --workdir=/tmp/digits_cover \
        --config.init_from.path=/tmp/pretrain_image

CoVeR first trains "all non-temporal parameters" on an image data set (JFT; here the embedded digits). Attention is
'space', so the model of this stage is a ViT and has no temporal parameters that could drift: the second stage derives
them from the spatial ones as `config.init_from.temporal_attention` says, and keeps the head of the digits.

`--config=configs/pretrain_image.py:debug` runs a few steps of a tiny model, in seconds; it seeds
configs/digits_cover.py:debug. `python -m benchmarks.first_stage` compares co-training with and without this stage.
"""

import ml_collections

from configs import defaults, digits_cover


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  second_stage = digits_cover.get_config(variant)
  config = defaults.get_config()
  config.sources = {'digits': second_stage.sources.digits}
  config.streams = {'image': defaults.stream(('digits',), num_frames=1, size=second_stage.streams.image.size)}
  config.model = second_stage.model
  config.model.attention = 'space'
  config.batch_size = 64
  config.total_steps = 1000
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 0.05
  config.eval_every = 250

  if defaults.is_debug(variant):
    config.batch_size = 16
    config.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
    config.eval_every = 0
  return config
