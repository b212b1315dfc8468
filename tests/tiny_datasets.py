"""Throw-away TFDS datasets for the tests: JPEG videos and pictures whose pixels tell which frame they are."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

HEIGHT, WIDTH = 24, 32


def frame(video: int, number: int, mode: str = 'RGB', form: str = 'JPEG') -> bytes:
  """A flat frame: red tells the video, green the frame number."""
  pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
  pixels[...] = video * 8, number * 8, 128
  encoded = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(encoded, form)
  return encoded.getvalue()


def num_frames(video: int) -> int:
  return 1 + video % 7


class TinyTestClips(tfds.core.GeneratorBasedBuilder):
  """Videos of 1 to 7 frames with a label, a text, a float and a box."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'video': tfds.features.Video(shape=(None, None, None, 3), encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(names=['a', 'b', 'c']),
      'id': tfds.features.Text(),
      'fps': np.float32,
      'shift': np.int64,
      'box': tfds.features.BBoxFeature(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 20), 'validation': self._generate_examples(20, 31)}

  def _generate_examples(self, first, last):
    for i in range(first, last):
      yield (
        i,
        {
          'video': [frame(i, t) for t in range(num_frames(i))],
          'label': i % 3,
          'id': f'video {i}',
          'fps': 12.5,
          'shift': -i,
          'box': tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        },
      )


class TinyTestPictures(tfds.core.GeneratorBasedBuilder):
  """Pictures, PNG among them, with two class labels, neither called 'label'."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'image': tfds.features.Image(),
      'coarse': tfds.features.ClassLabel(num_classes=2),
      'fine': tfds.features.ClassLabel(num_classes=4),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(9):
      mode, form = (('RGB', 'JPEG'), ('L', 'JPEG'), ('RGB', 'PNG'), ('CMYK', 'JPEG'), ('L', 'PNG'))[i % 5]
      yield i, {'image': io.BytesIO(frame(i, 0, mode, form)), 'coarse': i % 2, 'fine': i % 4}


def build(data_dir) -> None:
  for name, shards in (('tiny_test_clips', 3), ('tiny_test_pictures', 1)):
    config = tfds.download.DownloadConfig(num_shards=shards)
    tfds.builder(name, data_dir=data_dir).download_and_prepare(download_config=config)
