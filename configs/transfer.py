"""Transfer A -> B: fine-tunes what was trained on A (one data set or CoVeR's many) on B alone.

    python -m cover_jax.main --config=configs/transfer.py:ssv2 --workdir=DIR --config.init_from.path=WORKDIR_OF_A

The variant names B: `k400`, `k600`, `k700`, `ssv2` or `mit`; `:ssv2,debug` runs two steps of a tiny model.
WORKDIR_OF_A is that of any run of this project with 8 frames of 224 and a ViT-B/16, such as configs/cover_b16.py. The
encoder is taken over whole; a head too, if A has one of the same name and classes, otherwise B's starts anew. A run
that was trained on videos of B's test split, as Kinetics-700 holds most of Kinetics-400's, is refused.

CoVeR's blog post reports what fine-tuning from the co-trained model gains over fine-tuning from one data set: on K400
+1.3 over K400, +1.7 over SSv2, +0.4 over MiT; on SSv2 +2.0, +1.8 and +1.1 over SSv2, K400 and MiT. Its recipe is not
public; this one is **ours**: that of configs/cover_b16.py at a tenth of the learning rate, for 5 epochs of B. Nobody
has run it on the real data sets yet; docs/claims.md asks the same question of small ones.
"""

import ml_collections

from configs import cover_b16, defaults
from configs.timesformer_k400 import base_model
from data_pipelines.contract import UserError

TARGETS = ('k400', 'k600', 'k700', 'ssv2', 'mit')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, *TARGETS)
  targets = sorted(words & set(TARGETS))
  if len(targets) != 1:
    raise UserError(f'configs/transfer.py was asked for {targets or "no target"}: name one of {", ".join(TARGETS)}.')
  (target,) = targets
  config = cover_b16.cover(words, num_frames=8, size=224)
  config.sources = {target: config.sources[target]}
  config.streams = {'video': defaults.stream((target,), num_frames=8, size=224)}
  config.model = base_model(8, 224)
  config.batch_size = 64
  config.total_epochs = 5.0
  config.optimizer.learning_rate = 0.01
  config.optimizer.warmup_epochs = 0.5
  if 'debug' in words:
    defaults.shrink(config)
  return config
