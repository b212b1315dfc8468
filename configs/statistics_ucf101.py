"""Pre-training by spatio-temporal statistics of R(2+1)D on UCF101's training videos (split 1), without their labels.

    python -m data_pipelines.build ucf101_videos/split1 --manual_dir=/data/ucf101 --data_dir=/data/tfds
    python -m cover_jax.main --config=configs/statistics_ucf101.py --workdir=DIR \
        --config.sources.ucf101.data_dir=/data/tfds

The recipe is that of the released code (laura-wang/video_repres_sts): R(2+1)D of one block a layer; 16 frames of
112 x 112, one after the other, cut at random from 128 x 171 and mirrored or not; pixels 0 to 255 as they are; momentum
SGD at 5e-4, twice that for biases, a tenth after 6 and after 12 of 18 epochs; weight decay 5e-3 on everything; batches
of 30 (its help text; its default is 4); motion 1, appearance 0.1. **Ours**: labels as classes and flow by TV-L1 in the
step; RGB, not BGR; crops of a short side of 128, the aspect ratio kept; weight decay that is decoupled; batches of 32,
since they are divided over devices; one clip a video and epoch. The variant 'released' regresses ids with all of the
release's departures (`released` in cover_jax/objectives/statistics.py). Expected: unknown; nobody has run it on the
real data. `:debug` runs two steps of a tiny network.
"""

import ml_collections

from configs import defaults, v3s_ucf101
from cover_jax.objectives import statistics


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant, 'released')
  config = defaults.get_config()
  config.sources = {'ucf101': v3s_ucf101.unlabelled(crop_scale=(1.0, 1.0), short_side=(128, 128))}
  objective = {'name': 'statistics', 'motion_source': 'flow', 'target_mode': 'classify', 'released': ()}
  if 'released' in words:
    objective.update({'target_mode': 'regress', 'released': statistics.RELEASED})
  config.streams = {'video': defaults.stream(('ucf101',), num_frames=16, size=112, objective=objective)}
  config.model = v3s_ucf101.network()
  config.pixel_mean, config.pixel_std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
  config.batch_size = 32
  config.total_epochs = 18.0
  config.dtype = 'bfloat16'
  config.optimizer.update({'name': 'sgd', 'options': {'decay': 0.9}, 'learning_rate': 5e-4, 'schedule': 'steps'})
  config.optimizer.decay_epochs = (6.0, 12.0)
  config.optimizer.clip_norm = 0.0
  config.optimizer.weight_decay = 5e-3
  config.optimizer.weight_decay_rules = (('.*', 1.0),)
  config.optimizer.learning_rate_rules = (('bias$', 2.0), ('.*', 1.0))
  if 'debug' in words:
    config.sources.ucf101.short_side = None
    defaults.shrink(config)
  return config
