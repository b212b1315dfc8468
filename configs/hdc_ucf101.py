"""HDC-style pre-training of R(2+1)D-18 on UCF101's training videos (split 1), without their labels.

    python -m cover_jax.main --config=configs/hdc_ucf101.py --workdir=DIR

After Zhang and Crandall (arXiv 2011.11261), of which the abstract was read: two contrasts, decoupled by augmentation,
at several levels, weighted by invariance. **Every number here is ours** (what no release says: learning rate, epochs,
queue, temperature, clips), but for the size of the frames, 112, which a list of results gives for the paper's networks.
The paper trained on Kinetics-400; UCF101 is what can be had without it. Expected: unknown. Nobody has run this at full
size. `:debug` runs two steps of a tiny network.
"""

import ml_collections

from configs import defaults


def unlabelled(dataset: str = 'ucf101_videos/split1', **changes) -> ml_collections.ConfigDict:
  """UCF101's training videos whose labels are not read, so that there is no head and no test of them."""
  crops = {'crop_scale': (0.5, 1.0), 'crop_ratio': (3 / 4, 4 / 3), 'flip': True}
  return defaults.source(dataset, label_key=None, test='', **{**crops, **changes})


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
  config.pixel_mean, config.pixel_std = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
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
