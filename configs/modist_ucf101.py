"""MoDist-style pre-training of R3D-18 on UCF101's training videos (split 1), without their labels.

    python -m cover_jax.main --config=configs/modist_ucf101.py --workdir=DIR

MoDist's own pre-training code was not released. The recipe is that of an independent re-implementation, in
megvii-research/MSCL: R3D-18, 8 frames of 112 x 112, 8 apart; crops of 0.2 to 1 of the frame; clips at most 64 frames
apart; temperature 0.07; all four terms at weight 1; queues of 65,536; batches of 128, SGD at 0.02, weight decay 1e-4,
gradients cut at 40, cosine over 400 epochs after 5 of warm-up. There the data are Kinetics-400 and the motion is
optical flow by a network. **Ours**: UCF101, which can be had without it; frame differences, two for each frame of a
clip, and the motion encoder (R3D's 18 layers at an eighth of the width, convolutions in time in its first layer only);
a queue of 8,192, since UCF101 has 9,537 videos; a teacher's momentum of 0.999 (MSCL's grows from 0.994 to 1); weight
decay that is decoupled; colours. `--config.streams.unlabelled.objective.motion_input=flow_edges` takes edges of TV-L1
flow instead. Expected: unknown. Nobody has run this at full size. `:debug` runs two steps of tiny networks.
"""

import ml_collections

from configs import cover_r2plus1d, defaults, hdc_ucf101


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  words = defaults.variants(variant)
  config = defaults.get_config()
  config.sources = {'ucf101_unlabelled': hdc_ucf101.unlabelled(crop_scale=(0.2, 1.0))}
  objective = {
    'name': 'modist',
    'stride': 8,
    'motion_per_frame': 2,
    'min_shift': 1,
    'max_shift': 64,
    'motion_input': 'frame_difference',
    'motion_encoder': {'name': 'resnet3d', 'kind': 'mc3', 'depths': (2, 2, 2, 2), 'widths': (8, 16, 32, 64)},
    'motion_weight': 1.0,
    'queue_size': 8192,
    'temperature': 0.07,
  }
  colours = {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1, 'probability': 0.8}
  augment = {'color_jitter': colours, 'grayscale': {'probability': 0.2}, 'gaussian_blur': {'probability': 0.5}}
  config.streams = {
    'unlabelled': defaults.stream(('ucf101_unlabelled',), num_frames=8, size=112, objective=objective, augment=augment)
  }
  config.model = {'name': 'resnet3d', 'kind': 'r3d'}
  config.pixel_mean, config.pixel_std = cover_r2plus1d.PIXEL_MEAN, cover_r2plus1d.PIXEL_STD
  config.dtype = 'bfloat16'
  config.batch_size = 128
  config.total_epochs = 400.0
  config.optimizer.update({'name': 'sgd', 'options': {'decay': 0.9}, 'learning_rate': 0.02})
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 40.0
  config.optimizer.warmup_epochs = 5.0
  if 'debug' in words:
    small = {'name': 'resnet3d', 'kind': 'mc3', 'depths': (1, 1), 'widths': (4, 8)}
    config.streams.unlabelled.objective.update({'motion_encoder': small, 'queue_size': 16, 'dim': 8, 'head_hidden': 16})
    defaults.shrink(config)
  return config
