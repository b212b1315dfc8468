"""CoVeR's sources on R(2+1)D with 18 layers (Tran et al. 2018, arXiv 1711.11248), fine-tuned or frozen.

    python -m cover_jax.main --config=configs/cover_r2plus1d.py --workdir=DIR --config.init_from.path=FILE.safetensors

FILE.safetensors holds torchvision's `r2plus1d_18` (BSD-3; docs/weights.md says how to make it of the released file).
Without it the network starts from random weights, and says so. `:frozen` trains attentive heads on the encoder as it
is, running statistics included; `:k600`, `:k700`, `:image_folder` and `:noimages` are those of configs/cover_b16.py,
`:debug` runs two steps of a tiny network.

From torchvision: the network, 16 frames of 112 x 112 from videos of 128 pixels, mean and deviation. Images are clips of
one frame: the convolutions in time see zeros beside it. Batch statistics are those of the global batch of each stream,
and the running ones the mean of the streams' (our choice). **Ours**: how clips are cut and the optimiser, which are
those of configs/cover_b16.py.

Expected: unknown. torchvision says 67.5 top-1 on K400 for its weights, 16 frames, many clips. Nobody has run this
config on the real data sets yet. `python -m cover_jax.plan --config=configs/cover_r2plus1d.py --topology=v5e:4x4` says
what it costs.
"""

import ml_collections

from configs import cover_b16, defaults

# Of torchvision's video networks.
PIXEL_MEAN, PIXEL_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'frozen', *cover_b16.WORDS)
  config = cover_b16.cover(words, num_frames=16, size=112)
  config.model = {'name': 'resnet3d', 'kind': 'r2plus1d', 'freeze_statistics': 'frozen' in words}
  config.pixel_mean, config.pixel_std = PIXEL_MEAN, PIXEL_STD
  config.batch_size = 256
  if 'frozen' in words:
    config.heads.all = {'name': 'attentive', 'num_heads': 8}
    cover_b16.freeze(config)
    cover_b16.adamw(config, learning_rate=1e-3, layer_decay=1.0)
  if 'debug' in words:
    if 'frozen' in words:
      config.heads.all.num_heads = 2
    defaults.shrink(config)
  return config
