"""TFDS builder of Something-Something v2 from a local folder.

Where to get it: https://www.qualcomm.com/developer/software/something-something-v-2-dataset after registration: videos
in parts of one tar archive, labels in a zip file.
Licence: for research, under the terms accepted at registration.

    <manual_dir>/
      labels/labels.json, train.json, validation.json, test.json, test-answers.csv     anywhere
      20bn-something-something-v2/<id>.webm                                            anywhere
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations
from data_pipelines.builders.listing import Listing, official_names
from data_pipelines.builders.media import MediaBuilder, MediaConfig


class SomethingSomethingV2(MediaBuilder):
  """What people do with things, whatever the things are: 174 classes that need the order of frames."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [MediaConfig(name='full', description='All of it.')]  # noqa: RUF012
  DESCRIPTION = 'Crowd workers act out 174 sentences with things at hand, 2 to 6 s at 12 frames a second.'
  HOMEPAGE = 'https://www.qualcomm.com/developer/software/something-something-v-2-dataset'
  LICENSE = 'For research, under the terms accepted at registration.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations.something_something_v2(manual_dir)

  def _class_names(self) -> tuple[str, ...]:
    return official_names('something_something_v2')

  def _official_counts(self) -> dict[str, int]:
    return {'train': 168_913, 'validation': 24_777}
