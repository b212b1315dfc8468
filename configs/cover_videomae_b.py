"""CoVeR's sources on VideoMAE's ViT-B (Tong et al. 2022, arXiv 2203.12602), fine-tuned or frozen.

    python -m cover_jax.main --config=configs/cover_videomae_b.py --workdir=DIR --config.init_from.path=FILE.safetensors

FILE.safetensors is a VideoMAE in the format of Hugging Face (pre-trained: `MCG-NJU/videomae-base`, or fine-tuned on
Kinetics or SSv2). **Those weights are CC-BY-NC 4.0: not for commercial use**; see docs/weights.md. `:frozen` trains
attentive heads on the encoder as it is, `:l` is ViT-L, `:k600`, `:k700`, `:image_folder` and `:noimages` are those of
configs/cover_b16.py, `:debug` runs two steps of a tiny model.

From the release: sizes, 16 frames of 224 x 224 in tubelets of two frames, ImageNet's mean and deviation, the mean of
all tokens as the feature. A clip of one frame fills a tubelet with it (our choice). **Ours**: how clips are cut (as
configs/cover_b16.py), the optimiser (AdamW, 5e-4 for fine-tuning and 1e-3 for heads, cosine, 0.05 of weight decay,
layers 0.75 apart, drop-path 0.1), the batch, the length.

Expected: unknown. Nobody has run this config on the real data sets yet. `python -m cover_jax.plan
--config=configs/cover_videomae_b.py --topology=v5e:4x4` says what it costs.
"""

import ml_collections

from configs import cover_b16, defaults

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'frozen', 'l', *cover_b16.WORDS)
  large = 'l' in words
  config = cover_b16.cover(words, num_frames=16, size=224)
  config.model = {
    'name': 'videomae',
    'width': 1024 if large else 768,
    'depth': 24 if large else 12,
    'num_heads': 16 if large else 12,
    'mlp_dim': 4096 if large else 3072,
    'num_frames': 16,
    'image_size': 224,
    'drop_path': 0.1,
    'remat': 'full',
    'scan_unroll': 1,
  }
  config.pixel_mean, config.pixel_std = IMAGENET_MEAN, IMAGENET_STD
  config.batch_size = 256
  cover_b16.adamw(config, learning_rate=5e-4, layer_decay=0.75)
  if 'frozen' in words:
    config.heads.all = {'name': 'attentive', 'num_heads': config.model.num_heads}
    config.model.drop_path = 0.0
    cover_b16.freeze(config)
    cover_b16.adamw(config, learning_rate=1e-3, layer_decay=1.0)
  if 'debug' in words:
    if 'frozen' in words:
      config.heads.all.num_heads = 2
    defaults.shrink(config)
  return config
