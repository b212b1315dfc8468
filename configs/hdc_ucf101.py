"""HDC-style pre-training of R(2+1)D-18 on UCF101's training videos (split 1), without their labels.

    python -m cover_jax.main --config=configs/hdc_ucf101.py --workdir=DIR

After Zhang and Crandall (arXiv 2011.11261), of which the abstract was read: two contrasts, decoupled by augmentation,
at several levels, weighted by invariance. **Every number here is ours** (what no release says: learning rate, epochs,
queue, temperature, clips), but for the size of the frames, 112, which a list of results gives for the paper's networks.
The paper trained on Kinetics-400; UCF101 is what can be had without it. Expected: unknown. Nobody has run this at full
size. `:debug` runs two steps of a tiny network.
"""

import ml_collections

from configs import cover_r2plus1d, defaults, v3s_ucf101


def unlabelled(**changes) -> ml_collections.ConfigDict:
  """UCF101's training videos without labels, cropped to boxes of other shapes, too."""
  return v3s_ucf101.unlabelled(**{'crop_ratio': (3 / 4, 4 / 3), **changes})


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant)
  config = defaults.get_config()
  config.sources = {'ucf101_unlabelled': unlabelled()}
  objective = {'name': 'hdc', 'stride': 2, 'queue_size': 4096}
  weak = {'brightness': 0.1, 'contrast': 0.1, 'saturation': 0.1}
  config.streams = {
    'unlabelled': defaults.stream(
      ('ucf101_unlabelled',), num_frames=16, size=112, objective=objective, augment={'color_jitter': weak}
    )
  }
  config.model = {'name': 'resnet3d', 'kind': 'r2plus1d'}
  config.pixel_mean, config.pixel_std = cover_r2plus1d.PIXEL_MEAN, cover_r2plus1d.PIXEL_STD
  config.dtype = 'bfloat16'
  config.batch_size = 128
  config.total_epochs = 200.0
  config.optimizer.update({'name': 'sgd', 'options': {'decay': 0.9}, 'learning_rate': 0.02})
  config.optimizer.weight_decay = 1e-4
  config.optimizer.warmup_epochs = 5.0
  if 'debug' in words:
    config.streams.unlabelled.objective.update({'queue_size': 16, 'dim': 8, 'head_hidden': 16})
    defaults.shrink(config)
  return config
