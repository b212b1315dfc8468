"""CoVeR in miniature: one TimeSformer co-trained on three video sources and one image source, in minutes on a CPU.

The sources are drawn from scikit-learn's scans of handwritten digits and stand for CoVeR's:
objects for Kinetics, motions for Something-Something v2, moments for Moments in Time, digits for ImageNet.

    python -m cover_jax.main --config=configs/digits_cover.py --workdir=/tmp/digits_cover

`--config=configs/digits_cover.py:debug` runs a few steps of a tiny model, in seconds.
"""

import ml_collections

from configs import defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  config = defaults.get_config()
  config.sources = {
    # Motions are defined over the whole video: one frame of each of 8 segments, as SSv2 is sampled.
    'objects': defaults.source('moving_digits/objects', sampler='segments'),
    'motions': defaults.source('moving_digits/motions', sampler='segments'),
    'moments': defaults.source('moving_digits/moments', sampler='segments'),
    'digits': defaults.source('digits'),
  }
  config.streams = {
    'video': defaults.stream(('objects', 'motions', 'moments'), num_frames=8, size=32),
    'image': defaults.stream(('digits',), num_frames=1, size=32),
  }
  config.batch_size = 64
  config.total_steps = 1000

  config.model = {
    'patch_size': 8,
    'width': 96,
    'depth': 3,
    'num_heads': 4,
    'mlp_dim': 192,
    'num_frames': 8,
    'image_size': 32,
    # Trained from nothing in a thousand steps. With a time embedding that starts at zero the model finds the pair of
    # motions but not, in this time, which of the two: see docs/demo.md.
    'init_std': 0.15,
    'position_init_std': 1.0,
    'time_init_std': 2.0,
    'remat': 'none',
    'scan_unroll': 3,
    'tokens_together': 0,  # a CPU's choice
  }
  config.optimizer.learning_rate = 1.5e-3
  config.optimizer.options = {'b2': 0.98}
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 0.05
  config.checkpoint_every = 250
  config.eval_every = 500

  if defaults.is_debug(variant):
    config.model.update({'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'scan_unroll': 1})
    config.batch_size = 32
    config.batch_multiple = 8
    config.total_steps = 4
    config.optimizer.warmup_steps = 1
    config.log_every = 1
    config.eval_every = 0
  return config
