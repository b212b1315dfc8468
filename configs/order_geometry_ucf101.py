"""Order-and-geometry pre-training on UCF101's videos, without their labels.

    python -m data_pipelines.build ucf101_videos/split1 --manual_dir=/data/ucf101 --data_dir=/data/tfds
    python -m cover_jax.main --config=configs/order_geometry_ucf101.py --workdir=DIR \
        --config.sources.ucf101.data_dir=/data/tfds

The method is one for ultrasound (arXiv 2003.00105): configs/order_geometry_ultrasound.py. On ordinary videos the
network is VCOP's, as in configs/v3s_ucf101.py, and each of the 4 parts of 4 frames is encoded alone. **Ours**: all
numbers. Expected: unknown; nobody has run it on the real data. `:debug` runs two steps of a tiny network.
"""

import ml_collections

from configs import defaults, v3s_ucf101


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  debug = defaults.is_debug(variant)
  config = defaults.get_config()
  config.sources = {'ucf101': v3s_ucf101.unlabelled()}
  objective = {'name': 'order_geometry', 'strategy': 'parallel', 'parts': 'apart', 'gap': 6}
  config.streams = {'video': defaults.stream(('ucf101',), num_frames=16, size=112, objective=objective)}
  v3s_ucf101.recipe(config)
  if debug:
    defaults.shrink(config)
  return config
