"""CoVeR's sources on V-JEPA 2's ViT-L (Assran et al. 2025, arXiv 2506.09985), fine-tuned or frozen.

    python -m cover_jax.main --config=configs/cover_vjepa2_l.py:frozen --workdir=DIR \\
        --config.init_from.path=FILE.safetensors

FILE.safetensors is a V-JEPA 2 in the format of Hugging Face (`facebook/vjepa2-vitl-fpc64-256`; MIT or Apache-2.0, see
its page and docs/weights.md). `:frozen` leaves the encoder as it is and trains the heads, as the paper's evaluations
do; `:k600`, `:k700`, `:image_folder` and `:noimages` are those of configs/cover_b16.py, `:debug` runs two steps of a
tiny model.

From the release: sizes, 256 x 256 pixels in tubelets of two frames, rotary positions (so clips may have any length and
size), ImageNet's mean and deviation, heads of three layers of self-attention and one query that looks at them. A clip
of one frame fills a tubelet with it. **Ours**: 16 frames (the released model saw 64), how clips are cut (as
configs/cover_b16.py), the optimiser (AdamW, 1e-4 for heads and 5e-5 for fine-tuning, cosine, 0.05 of weight decay,
layers 0.75 apart), the batch, the length.

Expected: unknown. Nobody has run this config on the real data sets yet. `python -m cover_jax.plan
--config=configs/cover_vjepa2_l.py:frozen --topology=v5e:4x4` says what it costs.
"""

import ml_collections

from configs import cover_b16, defaults
from configs.cover_videomae_b import IMAGENET_MEAN, IMAGENET_STD


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'frozen', *cover_b16.WORDS)
  config = cover_b16.cover(words, num_frames=16, size=256)
  config.model = {
    'name': 'vjepa2',
    'width': 1024,
    'depth': 24,
    'num_heads': 16,
    'mlp_dim': 4096,
    'remat': 'full',
    'scan_unroll': 1,
  }
  config.heads.all = {'name': 'attentive_blocks', 'depth': 3, 'num_heads': 16, 'mlp_dim': 4096}
  config.pixel_mean, config.pixel_std = IMAGENET_MEAN, IMAGENET_STD
  config.batch_size = 256
  config.eval_batch_size = 128
  cover_b16.adamw(config, learning_rate=5e-5, layer_decay=0.75)
  if 'frozen' in words:
    cover_b16.freeze(config)
    cover_b16.adamw(config, learning_rate=1e-4, layer_decay=1.0)
  if 'debug' in words:
    config.heads.all.update({'depth': 1, 'num_heads': 2, 'mlp_dim': 32})
    defaults.shrink(config)
  return config
