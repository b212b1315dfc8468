"""One arm of the study of CoVeR's claims (docs/claims.md): which of the embedded sources one small model learns from.

    python -m cover_jax.main --config=configs/claims_digits.py:motions --workdir=/tmp/alone
    python -m cover_jax.main --config=configs/claims_digits.py:objects,motions,moments --workdir=/tmp/videos
    python -m cover_jax.main --config=configs/claims_digits.py --workdir=/tmp/videos_and_images

The words after the colon are sources; none means all four. `python -m benchmarks.claims` runs the whole study from
this file, in memory; what it changes for an arm are keys of this config. Labelled examples are few on purpose: with
plenty, a model of one source has little to learn from another.

`--config=configs/claims_digits.py:debug` runs a few steps of a tiny model, in seconds.
"""

from collections.abc import Mapping

import ml_collections

from configs import defaults

# Of the labelled training examples, rounded within each class: objects 210, motions 64, moments about 300, digits about
# 1000.
SHARES = {'objects': 1 / 4, 'motions': 1 / 8, 'moments': 1 / 8, 'digits': 1 / 4}
VIDEOS = ('objects', 'motions', 'moments')
BATCH = {'video': 16, 'image': 16}  # of a step


def make(sources: tuple[str, ...], shares: Mapping[str, float] = SHARES) -> ml_collections.ConfigDict:
  """The config of an arm, without its length: some of the four sources, and the share of each one's labels."""
  config = defaults.get_config()
  dataset = lambda name: name if name == 'digits' else f'moving_digits/{name}'
  options = lambda name: {} if name == 'digits' else {'sampler': 'segments'}
  config.sources = {
    name: defaults.source(dataset(name), label_fraction=shares[name], **options(name)) for name in sources
  }
  videos, images = tuple(s for s in sources if s in VIDEOS), tuple(s for s in sources if s not in VIDEOS)
  config.streams = {}
  if videos:
    config.streams.video = defaults.stream(videos, num_frames=8, size=32, batch_size=BATCH['video'])
  if images:
    config.streams.image = defaults.stream(images, num_frames=1, size=32, batch_size=BATCH['image'])
  config.batch_size = sum(stream.batch_size for stream in config.streams.values())
  config.model = {
    'patch_size': 8,
    'width': 48,
    'depth': 2,
    'num_heads': 4,
    'mlp_dim': 96,
    'num_frames': 8,
    'image_size': 32,
    # As in configs/digits_cover.py, and why: docs/demo.md.
    'init_std': 0.15,
    'position_init_std': 1.0,
    'time_init_std': 2.0,
    'scan_unroll': 2,
    'tokens_together': 0,  # a CPU's choice
  }
  config.optimizer.update({'learning_rate': 2e-3, 'options': {'b2': 0.98}, 'warmup_steps': 50, 'weight_decay': 0.05})
  config.eval_batch_size = 64
  return config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, *SHARES)
  config = make(tuple(name for name in SHARES if name in words) or tuple(SHARES))
  config.total_epochs = 65.0
  config.checkpoint_every = 500
  if 'debug' in words:
    config.model.update({'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'scan_unroll': 1})
    config.total_steps, config.total_epochs = 4, 0.0
    config.optimizer.warmup_steps = 1
    config.log_every = 1
  return config
