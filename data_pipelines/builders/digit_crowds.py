"""TFDS builder of `digit_crowds`: videos of several real handwritten digits, or of none, embedded, no download."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.builders import crowds_rendering as rendering
from data_pipelines.builders import digits_drawing, digits_rendering


class DigitCrowds(tfds.core.GeneratorBasedBuilder):
  """Short 32x32 videos of none to four digits: an example has several labels, one for each digit in it."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    size = digits_drawing.SIZE
    return tfds.core.DatasetInfo(
      builder=self,
      description="Real handwritten digits from scikit-learn's `load_digits`, none to four in a video of 12 to 24 "
      'frames. No test scan is ever used for training.',
      features=tfds.features.FeaturesDict(
        {
          'video': tfds.features.Video(shape=(None, size, size, 3), encoding_format='jpeg'),
          'labels': tfds.features.Sequence(tfds.features.ClassLabel(names=rendering.CLASS_NAMES)),
        }
      ),
      supervised_keys=('video', 'labels'),
      homepage=digits_rendering.HOMEPAGE,
      # Record i is example i. Numbers of digits alternate, so that any stretch of the file is balanced.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager  # nothing to download
    return {split: self._generate_examples(split) for split in rendering.NUM_EXAMPLES}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(rendering.NUM_EXAMPLES[split]):
      example = rendering.render(split, index)
      # A list of JPEG bytes is stored byte for byte; arrays would be compressed anew at another quality.
      yield index, {'video': [digits_rendering.encode_jpeg(f) for f in example.frames], 'labels': example.labels}
