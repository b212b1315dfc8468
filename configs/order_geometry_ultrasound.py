"""Order-and-geometry pre-training on a folder of ultrasound videos: grey, with a field of view that is a sector.

    python -m data_pipelines.build video_folder/ultrasound --manual_dir=videos --data_dir=tfds
    python -m cover_jax.main --config=configs/order_geometry_ultrasound.py --workdir=run \
        --config.sources.ultrasound.data_dir=tfds

The folder is as docs/datasets.md says, with one class folder where there are no classes: labels are not read. From the
method's abstract and a reader's summary (arXiv 2003.00105): 4 frames in 12 orders, an affine map that is the same for
all frames and whose parameters are predicted, both on one input or on two. **Ours**: every number, and the TimeSformer.
The authors' videos are private. Expected: unknown; nobody has run it on real ultrasound.

Look at a frame and say where its field of view is, as shares of height and width of the square that is cut out of the
middle: `--config.streams.video.objective.sector="(row, column, half_angle, near, far)"`. Row and column are where the
two sides of the sector would meet, which may lie above the picture (a row below 0); half_angle is in degrees, from
straight down; near and far are the radii of its arcs, as shares of the height. Without it the border of the sector
would turn with the picture and tell the angle. It is why clips are not cropped at random; they may be mirrored, since
this sector is symmetric. What is burnt in outside of the sector is not seen.

`gap` is in stored frames: at 30 a second, 15 is half a second between the parts. `:debug` runs two steps of a tiny
model.
"""

import ml_collections

from configs import defaults
from configs.timesformer_k400 import base_model

SECTOR = (-0.12, 0.5, 35.0, 0.2, 1.05)


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  debug = defaults.is_debug(variant)
  config = defaults.get_config()
  config.sources = {'ultrasound': defaults.source('video_folder/ultrasound', label_key=None, test='', flip=True)}
  config.streams = {
    'video': defaults.stream(
      ('ultrasound',),
      num_frames=4,
      size=224,
      objective={'name': 'order_geometry', 'gap': 15, 'sector': SECTOR, 'part_colours': 0.1},
      augment={'grayscale': {'probability': 1.0}},
    )
  }
  config.model = base_model(4, 224)
  config.batch_size = 64
  config.total_epochs = 100.0
  config.dtype = 'bfloat16'
  config.optimizer.update({'learning_rate': 3e-4, 'weight_decay': 0.05, 'warmup_epochs': 5.0})
  if debug:
    defaults.shrink(config)
  return config
