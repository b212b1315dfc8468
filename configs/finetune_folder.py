"""Fine-tunes a TimeSformer-B (8 frames of 224) on a folder of your own videos, a class a folder.

    python -m data_pipelines.build video_folder/mine --manual_dir=videos --data_dir=tfds
    python -m cover_jax.main --config=configs/finetune_folder.py --workdir=run \
        --config.sources.videos.dataset=video_folder/mine --config.sources.videos.data_dir=tfds \
        --config.init_from.path=WEIGHTS

docs/datasets.md says what the folder may look like, docs/weights.md which weights there are: a ViT, a TimeSformer or a
run of this project. `:tiny` is a model of 1.2 million parameters that trains on a laptop's CPU, `:debug` two steps of
a smaller one. The recipe is ours: momentum SGD, 0.005 for 32 clips, cosine, 20 epochs. What to expect depends on your
videos.
"""

import ml_collections

from configs import defaults
from configs.timesformer_k400 import base_model


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'tiny')
  tiny = 'tiny' in words
  size = 64 if tiny else 224
  config = defaults.get_config()
  config.sources = {
    'videos': defaults.source(
      'video_folder/mine',
      sampler='segments',
      crop_scale=(0.3, 1.0),
      crop_ratio=(3 / 4, 4 / 3),
      flip=True,
      test_crops=3,
    )
  }
  config.streams = {'videos': defaults.stream(('videos',), num_frames=8, size=size)}
  config.model = base_model(8, size)
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
    config.batch_size = config.batch_multiple = config.eval_batch_size = 8
    config.dtype = 'float32'
    config.log_every = 10
  if 'debug' in words:
    defaults.shrink(config)
  return config
