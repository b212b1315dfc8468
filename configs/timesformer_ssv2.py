"""TimeSformer on Something-Something v2, with the recipe of configs/timesformer_k400.py.

    python -m cover_jax.main --config=configs/timesformer_ssv2.py --workdir=DIR --config.init_from.path=VIT.npz

| variant | frames, pixels | top-1, 3 crops x 1 clip (paper, table 7) |
| --- | --- | --- |
| (none) | 8, 224 | 59.5 |
| `:hr` | 16, 448 | 62.2 |
| `:l` | 96, 224 (the released model: 64) | 62.4 |

`:debug` runs two steps of a tiny model. The paper's numbers are not ours: nobody has run this config on SSv2 yet.

A clip is one frame of each of `num_frames` equal parts of the video: a random one in training, the middle one in
tests. The release does not mirror clips here, since left and right are part of six labels; neither do we.
`flip='labels'` mirrors them and swaps the labels, as the data set's own table says (docs/datasets.md). The released
models were trained on BGR images by mistake; ours sees RGB.
"""

import ml_collections

from configs import defaults, timesformer_k400


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  return timesformer_k400.recipe(variant, {'ssv2': something_something()})


def something_something(**changes) -> ml_collections.ConfigDict:
  """SSv2 as TimeSformer reads it: segments of the whole video."""
  settings = {'train': 'train', 'test': 'validation', 'sampler': 'segments', 'flip': False, 'test_crops': 3}
  return defaults.source('something_something_v2', **(settings | changes))
