"""TFDS builder of `moving_digits`: three sets of videos of real handwritten digits, embedded, no download."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.builders import digits_drawing as drawing
from data_pipelines.builders import digits_rendering as rendering


class MovingDigits(tfds.core.GeneratorBasedBuilder):
  """Short 32x32 videos whose three configs ask for what Kinetics, SSv2 and Moments in Time ask for."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(
      name='objects',
      description='Label = digit x action (30 classes): one frame names the digit, not the action.',
    ),
    tfds.core.BuilderConfig(
      name='motions',
      description='16 motions in 8 pairs, whatever the digit. The two motions of a pair show the same frames '
      'in another order: no single frame and no unordered bag of frames tells them apart.',
    ),
    tfds.core.BuilderConfig(
      name='moments',
      description='10 kinds of events on cluttered backgrounds, seen by a moving camera, with noise.',
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Real handwritten digits from scikit-learn's `load_digits`, animated into videos of 12 "
      'to 24 frames. No test scan is ever used for training.',
      features=tfds.features.FeaturesDict(
        {
          'video': tfds.features.Video(shape=(None, drawing.SIZE, drawing.SIZE, 3), encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(names=rendering.class_names(self.builder_config.name)),
        }
      ),
      supervised_keys=('video', 'label'),
      homepage=rendering.HOMEPAGE,
      # Record i is example i. Classes alternate, so that any stretch of the file is balanced.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing to download
    return {split: self._generate_examples(split) for split in rendering.SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    config = self.builder_config.name
    for index in range(rendering.num_examples(config, split)):
      example = rendering.render(config, split, index)
      # A list of JPEG bytes is stored byte for byte; arrays would be compressed anew at another quality.
      yield index, {'video': [rendering.encode_jpeg(f) for f in example.frames], 'label': example.label}
