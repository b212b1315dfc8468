"""Two kinds of heads in one batch: a source with one label a clip and one with several train one encoder.

`moments` asks which of ten events a video shows; `crowds` asks which digits are in it, from none to four of them. The
images of `digits` show the encoder what single digits look like.

    python -m cover_jax.main --config=configs/cotrain_heads_digits.py --workdir=/tmp/cotrain_heads_digits

`--config=configs/cotrain_heads_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults, digits_cover


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = digits_cover.get_config(variant)
  config.sources = {
    'moments': defaults.source('moving_digits/moments', sampler='segments'),
    'crowds': defaults.source('digit_crowds', sampler='segments'),
    'digits': defaults.source('digits'),
  }
  config.streams = {
    'video': defaults.stream(('moments', 'crowds'), num_frames=8, size=32),
    'image': defaults.stream(('digits',), num_frames=1, size=32),
  }
  config.keep_best = 'test/crowds/mAP'
  return config
