"""CoVeR (arXiv 2112.07175) with a ViT-B/16 TimeSformer, 8 frames of 224: one model for K400, SSv2, MiT and ImageNet.

    python -m cover_jax.main --config=configs/cover_b16.py --workdir=DIR --config.init_from.path=VIT.npz

`:k600` and `:k700` put that Kinetics in K400's place; `:image_folder` puts your own images, `image_folder/mine`
(docs/datasets.md), in ImageNet's, `:noimages` leaves images out; `:debug` runs two steps of a tiny model; words combine
as in `:k600,debug`. VIT.npz is a ViT-B/16 trained on ImageNet-21K (docs/weights.md).

From the paper and its blog post: one TimeSformer (with temporal_fc) and one classifier per data set; batches mixed
from videos and images, images as single frames, sources drawn in proportion to their sizes; all parameters that are
not temporal pre-trained on images; tests with 1 clip x 3 crops.

The optimiser, learning rate, schedule, batch size, regularisation, frame strides and the treatment of labels are not
public. Those here are **ours**: momentum SGD with cosine decay, 2.5 epochs of warm-up and gradients clipped at 1,
which is how scenic (Apache-2.0) trains ViViT; 0.1 for 256 examples a step; the clips span 2.1 s of MiT's 3 s and 8.5 s
of Kinetics' 10 s; one classifier is one linear layer, and the loss is the mean cross-entropy of the mixed batch.

Expected: unknown. The paper gives no B/16. With JFT-3B it reports for L/16 at 16x448 K400 87.2, K600 87.9, K700 79.8,
SSv2 70.9, MiT 46.1; from ImageNet-21K its gains over TimeSformer-L amount to K400 83.1, K600 84.5, SSv2 64.7
(abstract, and TimeSformer's tables). Nobody has run this config on the real data sets yet.

An epoch is all 2.48 million examples: 10 % of them are K400's, 7 % SSv2's, 32 % MiT's and 52 % ImageNet's.
`python -m cover_jax.plan --config=configs/cover_b16.py --topology=v5e:8x8` says what it costs.
"""

import ml_collections

from configs import defaults
from configs.timesformer_k400 import base_model, kinetics
from configs.timesformer_ssv2 import something_something
from data_pipelines.contract import UserError

IMAGE_CROPS = {'crop_scale': (0.08, 1.0), 'crop_ratio': (3 / 4, 4 / 3)}
WORDS = ('k600', 'k700', 'noimages', 'image_folder')  # of variants, of every config with these sources


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, *WORDS)
  config = cover(words, num_frames=8, size=224)
  config.model = base_model(8, 224)
  config.batch_size = 256
  if 'debug' in words:
    defaults.shrink(config)
  return config


def cover(words: set[str], num_frames: int, size: int) -> ml_collections.ConfigDict:
  """Sources, streams and optimiser of co-training; the model is left to the caller."""
  if {'noimages', 'image_folder'} <= words:
    raise UserError('The config leaves images out (noimages) or takes yours (image_folder): give one of these words.')
  year = '700' if 'k700' in words else '600' if 'k600' in words else '400'
  short_side = (size * 8 // 7, size * 10 // 7)  # 256 to 320 for 224
  config = defaults.get_config()
  config.sources = {
    f'k{year}': kinetics(year, stride=256 // num_frames, short_side=short_side),
    'ssv2': something_something(short_side=short_side),
    'mit': defaults.source(
      'moments_in_time/v1',
      test='validation',
      sampler='dense',
      fps=30.0,
      stride=64 // num_frames,
      short_side=short_side,
      flip=True,
      test_crops=3,
    ),
    'imagenet': defaults.source('imagenet2012', test='validation', flip=True, **IMAGE_CROPS),
  }
  config.streams = {
    'video': defaults.stream((f'k{year}', 'ssv2', 'mit'), num_frames=num_frames, size=size),
    'image': defaults.stream(('imagenet',), num_frames=1, size=size),
  }
  if 'image_folder' in words:
    videos_alone(config)
    config.sources.images = defaults.source('image_folder/mine', flip='auto', **IMAGE_CROPS)
    config.streams.image = defaults.stream(('images',), num_frames=1, size=size)
  if 'noimages' in words:
    videos_alone(config)
  config.total_epochs = 15.0
  config.dtype = 'bfloat16'
  config.optimizer.update(
    {
      'name': 'sgd',
      'options': {'decay': 0.9},
      'learning_rate': 0.1,
      'schedule': 'cosine',
      'warmup_epochs': 2.5,
      'clip_norm': 1.0,
    }
  )
  config.eval_every = 10_000
  config.checkpoint_every = 1000
  return config


def adamw(config: ml_collections.ConfigDict, learning_rate: float, layer_decay: float) -> None:
  """The optimiser of transformers that were pre-trained on videos, in place of CoVeR's; ours."""
  config.optimizer.options = {}
  config.optimizer.update(
    {'name': 'adam', 'learning_rate': learning_rate, 'weight_decay': 0.05, 'layer_decay': layer_decay}
  )


def freeze(config: ml_collections.ConfigDict) -> None:
  """Trains the heads alone: the encoder gets no gradient, and no backward pass of it is computed."""
  config.optimizer.learning_rate_rules = (('^encoder/', 0.0), ('.*', 1.0))
  if 'remat' in config.model:
    config.model.remat = 'none'  # nothing of it is kept anyway


def videos_alone(config: ml_collections.ConfigDict) -> None:
  """Leaves out the images: Kinetics, SSv2 and Moments are VideoGLUE's three sources of whole-video classes."""
  if 'image' in config.streams:
    del config.sources[config.streams.image.sources[0]]
    del config.streams['image']
