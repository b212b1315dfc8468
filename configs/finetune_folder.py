"""Fine-tunes a TimeSformer-B (8 frames of 224) on a folder of your own videos, a class a folder.

    python -m data_pipelines.build video_folder/mine --manual_dir=videos
    python -m cover_jax.main --config=configs/finetune_folder.py --workdir=run --config.init_from.path=WEIGHTS

docs/datasets.md says what the folder may look like, docs/weights.md which weights there are: a ViT, a TimeSformer or a
run of this project, such as one of configs/cotrain_folders.py. Data sets are built and found in the folder that
TFDS_DATA_DIR names. `:tiny` is a model of 1.2 million parameters that trains on a laptop's CPU, `:debug` two steps of
a smaller one. The recipe is ours: momentum SGD, 0.005 for 32 clips, cosine, 20 epochs. What to expect depends on your
videos.
"""

import ml_collections

from configs import defaults
from configs.timesformer_k400 import base_model


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'tiny')
  size = 64 if 'tiny' in words else 224
  config = defaults.get_config()
  config.sources = {'videos': videos()}
  config.streams = {'videos': defaults.stream(('videos',), num_frames=8, size=size)}
  recipe(config, tiny='tiny' in words)
  if 'debug' in words:
    defaults.shrink(config)
  return config


def videos() -> ml_collections.ConfigDict:
  """A folder of videos. They are mirrored, and where classes name left and right, so are the labels."""
  return defaults.source(
    'video_folder/mine', sampler='segments', crop_scale=(0.3, 1.0), crop_ratio=(3 / 4, 4 / 3), flip='auto', test_crops=3
  )


def recipe(config: ml_collections.ConfigDict, *, tiny: bool) -> None:
  """Sets model, optimizer and length of a run whose streams are there; image_size and num_frames follow from them."""
  config.model = {key: value for key, value in base_model(8, 224).items() if key not in ('num_frames', 'image_size')}
  config.optimizer.update(
    {'name': 'sgd', 'options': {'decay': 0.9}, 'learning_rate': 0.005, 'schedule': 'cosine', 'warmup_epochs': 1.0}
  )
  config.batch_size = 32
  config.total_epochs = 20.0
  config.dtype = 'bfloat16'
  if tiny:
    config.model.update({'patch_size': 16, 'width': 128, 'depth': 4, 'num_heads': 4, 'mlp_dim': 512, 'drop_path': 0.0})
    # Trained from nothing: see docs/demo.md for why these are wide.
    config.model.update({'init_std': 0.1, 'position_init_std': 1.0, 'time_init_std': 1.0})
    config.optimizer.update({'name': 'adam', 'learning_rate': 1e-3, 'weight_decay': 0.05})
    config.optimizer.options = {}
    config.batch_multiple = config.eval_batch_size = 8
    config.batch_size = 8 * len(config.streams)
    config.dtype = 'float32'
    config.log_every = 10
