"""TFDS builder of `digits`: images of real handwritten digits, embedded, no download."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.builders import digits_drawing as drawing
from data_pipelines.builders import digits_rendering as rendering


class Digits(tfds.core.GeneratorBasedBuilder):
  """Ten classes told apart by appearance: to `moving_digits` what ImageNet is to the video sets of CoVeR."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Real handwritten digits from scikit-learn's `load_digits`, drawn on 32x32 colour images. "
      'No test scan is ever used for training.',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(drawing.SIZE, drawing.SIZE, 3), encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(names=rendering.class_names('digits')),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage=rendering.HOMEPAGE,
      # Record i is example i. Classes alternate, so that any stretch of the file is balanced.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing to download
    return {split: self._generate_examples(split) for split in rendering.SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(rendering.num_examples('digits', split)):
      example = rendering.render('digits', split, index)
      yield index, {'image': rendering.encode_jpeg(example.frames[0]), 'label': example.label}
