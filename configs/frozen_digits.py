"""Judges an encoder on the embedded videos as it is: linear probe, k-NN, retrieval, with 1 to 100 % of the labels.

    python -m cover_jax.main --config=configs/frozen_digits.py --workdir=/tmp/frozen --mode=frozen \
        --config.init_from.path=/tmp/vtdl_digits

Without `init_from` it judges random weights, the baseline. Features are kept in the workdir and read again as long as
weights, examples and views are the same. `--config=configs/frozen_digits.py:debug` takes a tiny model.
"""

import ml_collections

from configs import defaults, digits_cover


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  cover = digits_cover.get_config(variant)
  config = defaults.get_config()
  config.sources = {name: cover.sources[name] for name in ('motions', 'objects')}
  config.streams = {'video': defaults.stream(('motions', 'objects'), num_frames=8, size=32)}
  config.model = cover.model
  config.total_steps = 1  # nothing is trained
  config.eval_batch_size = 320

  if defaults.is_debug(variant):
    config.sources = {'motions': cover.sources.motions}
    config.streams.video.sources = ('motions',)
    config.frozen.clips = 2
  return config
