"""CoVeR (arXiv 2112.07175) at its published size: ViT-L/16 TimeSformer, 16 frames of 448, 430 million parameters.

    python -m cover_jax.main --config=configs/cover_l16.py --workdir=DIR --config.init_from.path=VIT.npz

`:k600`, `:k700`, `:image_folder` and `:noimages` are those of configs/cover_b16.py; `:debug` runs two steps of a tiny
model. VIT.npz is a ViT-L/16 trained on ImageNet-21K (docs/weights.md); the paper's best models started from JFT-3B,
which is private.

The size is the paper's (24 blocks; 16 x 448 x 448, 1 clip x 3 crops and 431 M parameters as UniFormerV2's table 8
lists it); everything else is as in configs/cover_b16.py, whose docstring says what is public, what is ours, and which
numbers to expect.

Each block is computed again in the backward pass and the parameters are sharded over 8 devices (`mesh.fsdp`), so that
a step fits 16 GB chips. `python -m cover_jax.plan --config=configs/cover_l16.py --topology=v5e:16x16` says what it
costs.
"""

import ml_collections

from configs import cover_b16, defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, *cover_b16.WORDS)
  config = cover_b16.cover(words, num_frames=16, size=448)
  config.model = {
    'patch_size': 16,
    'width': 1024,
    'depth': 24,
    'num_heads': 16,
    'mlp_dim': 4096,
    'num_frames': 16,
    'image_size': 448,
    'drop_path': 0.1,
    'remat': 'full',
  }
  config.mesh.fsdp = 8
  config.batch_size = 512
  config.batch_multiple = 64
  config.eval_batch_size = 256
  if 'debug' in words:
    config.mesh.fsdp = 1
    defaults.shrink(config)
  return config
