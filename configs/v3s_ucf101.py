"""V3S-style pre-training on UCF101's videos, without their labels.

    python -m data_pipelines.build ucf101_videos/split1 --manual_dir=/data/ucf101 --data_dir=/data/tfds
    python -m cover_jax.main --config=configs/v3s_ucf101.py --workdir=DIR --config.sources.ucf101.data_dir=/data/tfds

Of the method's paper (arXiv 2107.03578) only the abstract was read: no number here is from it. The network is VCOP's
R(2+1)D of one block a layer and the clip, 16 frames of 112 x 112, its (Xu et al. 2019, from their released code), since
that is what such methods are compared on. **Ours**: all else.

Clips at four times the rate need 61 frames: videos that are shorter are asked for fewer classes, which
'time_chance' shows. Expected: unknown; nobody has run it on the real data. `:debug` runs two steps of a tiny network.
"""

import ml_collections

from configs import defaults


def network() -> dict:
  """VCOP's R(2+1)D."""
  return {'name': 'resnet3d', 'kind': 'r2plus1d', 'depths': (1, 1, 1, 1), 'factoring': 'convolution'}


def unlabelled(**changes) -> ml_collections.ConfigDict:
  """UCF101's first training split without labels, so that there is no head and no test of it."""
  cut = {'crop_scale': (0.5, 1.0), 'crop_ratio': (1.0, 1.0), 'flip': True}
  return defaults.source('ucf101_videos/split1', label_key=None, test='', **{**cut, **changes})


def recipe(config: ml_collections.ConfigDict) -> None:
  """Momentum SGD with a cosine, for a network that starts from nothing. Ours."""
  config.model = network()
  config.batch_size = 32
  config.total_epochs = 300.0
  config.dtype = 'bfloat16'
  config.optimizer.update(
    {'name': 'sgd', 'options': {'decay': 0.9}, 'learning_rate': 0.01, 'schedule': 'cosine', 'warmup_epochs': 5.0}
  )
  config.optimizer.weight_decay = 5e-4


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  debug = defaults.is_debug(variant)
  config = defaults.get_config()
  config.sources = {'ucf101': unlabelled()}
  config.streams = {
    'video': defaults.stream(
      ('ucf101',), num_frames=16, size=224, objective={'name': 'v3s'}, augment={'color_jitter': {'brightness': 0.2}}
    )
  }
  recipe(config)
  if debug:
    defaults.shrink(config)
    config.streams.video.objective = {
      'name': 'v3s',
      'classes': {
        'time': {'plain': (1, 1), 'twice': (2, 2)},
        'space': {'plain': (1, 1, 1, 1), 'rows': (2, 2, 1, 1), 'left': (1, 1, 2, 1)},
      },
    }
  return config
