"""Co-trains one TimeSformer-B on a folder of your own videos and one of your own images, a class a folder in each.

    python -m data_pipelines.build video_folder/mine --manual_dir=videos
    python -m data_pipelines.build image_folder/mine --manual_dir=photos
    python -m cover_jax.main --config=configs/cotrain_folders.py --workdir=run --config.init_from.path=WEIGHTS

Each folder has a head of its own, and its classes need not be those of the other. Batches mix them in proportion to
their sizes; `--config.mixture.weights.videos=2.0 --config.mixture.weights.photos=1.0` draws two videos for each image.
A third source is a line in `config.sources`, and its name in the stream of its kind.

Data sets are built and found in the folder that TFDS_DATA_DIR names; other names of them are
`--config.sources.photos.dataset=image_folder/others`. `:tiny` is a model of 1.2 million parameters that trains from
nothing on a laptop's CPU, `:debug` two steps of a smaller one. The recipe is that of configs/finetune_folder.py, with
which the result is fine-tuned on one data set: `--config.init_from.path=run`. What to expect depends on your data.
"""

import ml_collections

from configs import defaults, finetune_folder


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'tiny')
  size = 64 if 'tiny' in words else 224
  config = defaults.get_config()
  config.sources = {
    'videos': finetune_folder.videos(),
    'photos': defaults.source('image_folder/mine', crop_scale=(0.3, 1.0), crop_ratio=(3 / 4, 4 / 3), flip='auto'),
  }
  config.streams = {
    'video': defaults.stream(('videos',), num_frames=8, size=size),
    'image': defaults.stream(('photos',), num_frames=1, size=size),
  }
  finetune_folder.recipe(config, tiny='tiny' in words)
  if 'debug' in words:
    defaults.shrink(config)
  return config
