"""CoVeR's sources on VideoPrism (Zhao et al. 2024, arXiv 2402.13217), fine-tuned or frozen under attentive heads.

    python -m cover_jax.main --config=configs/cover_videoprism_b.py --workdir=DIR --config.init_from.path=FILE.npz

FILE.npz is the released encoder (`videoprism_public_v1_base`; `large` for `:l`), whose weights are CC-BY 4.0; see
docs/weights.md. Words combine as in `:videoglue,l`:

| word | what it changes |
| --- | --- |
| `frozen` | the encoder stays as it is, the heads learn: no backward pass of the encoder is computed |
| `videoglue` | frozen, on Kinetics-400, SSv2 and Moments alone: the heads of VideoGLUE's three sets in one run |
| `l` | VideoPrism-L: 24 + 4 layers of width 1024, 8 frames |
| `k600`, `k700` | that Kinetics in K400's place |
| `image_folder`, `noimages` | your own images in ImageNet's place, or none (configs/cover_b16.py) |
| `debug` | two steps of a tiny model |

From the release: sizes, 16 frames (L: 8) of 288 x 288, pixels in [0, 1] without mean and deviation, a head of one query
with as many heads as the encoder. **Ours**: how clips are cut (as configs/cover_b16.py), the optimiser (AdamW, 1e-3 for
heads and 5e-5 for fine-tuning, cosine, 0.05 of weight decay, layers 0.75 apart), the batch, the length.

Expected with `:videoglue`: the release's README gives, for the frozen encoder and a head trained on each set alone,
K400 82.9, MiT 39.7, SSv2 62.2 (B) and 85.0, 43.3, 64.6 (L). Nobody has run this config on the real data sets yet.
`python -m cover_jax.plan --config=configs/cover_videoprism_b.py:frozen --topology=v5e:4x4` says what it costs.
"""

import ml_collections

from configs import cover_b16, defaults


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'frozen', 'videoglue', 'l', *cover_b16.WORDS)
  large = 'l' in words
  config = cover_b16.cover(words, num_frames=8 if large else 16, size=288)
  config.model = {
    'name': 'videoprism',
    'width': 1024 if large else 768,
    'spatial_depth': 24 if large else 12,
    'temporal_depth': 4,
    'num_heads': 16 if large else 12,
    'mlp_dim': 4096 if large else 3072,
    'num_frames': 8 if large else 16,
    'image_size': 288,
    'remat': 'full',
    'scan_unroll': 1,
  }
  config.heads.all = {'name': 'attentive', 'num_heads': config.model.num_heads}
  config.pixel_mean, config.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  config.batch_size = 256
  config.eval_batch_size = 128
  cover_b16.adamw(config, learning_rate=5e-5, layer_decay=0.75)
  if words & {'frozen', 'videoglue'}:
    cover_b16.freeze(config)
    cover_b16.adamw(config, learning_rate=1e-3, layer_decay=1.0)
  if 'videoglue' in words:
    cover_b16.videos_alone(config)
  if 'debug' in words:
    config.heads.all.num_heads = 2
    defaults.shrink(config)
  return config
