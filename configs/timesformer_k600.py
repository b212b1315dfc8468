"""TimeSformer on Kinetics-600, with the recipe of configs/timesformer_k400.py.

    python -m cover_jax.main --config=configs/timesformer_k600.py --workdir=DIR --config.init_from.path=VIT.npz

| variant | frames x stride, pixels | top-1 / top-5, 3 crops x 1 clip (paper, table 6, IN-21K) |
| --- | --- | --- |
| (none) | 8 x 32, 224 | 79.1 / 94.4 |
| `:hr` | 16 x 16, 448 | 81.8 / 95.8 |
| `:l` | 96 x 4, 224 | 82.2 / 95.6 |

`:debug` runs two steps of a tiny model. The paper's numbers are not ours: nobody has run this config on Kinetics yet.
"""

import ml_collections

from configs import timesformer_k400


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  return timesformer_k400.recipe(variant, {'k600': timesformer_k400.kinetics('600')})
