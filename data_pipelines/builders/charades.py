"""TFDS builder of Charades from a local folder: the classes of the actions in each video.

Where to get it: https://prior.allenai.org/projects/charades, the annotations and the videos scaled to 480p.
Licence: for non-commercial research, under the terms of license.txt in the download.

    <manual_dir>/
      Charades_v1_classes.txt, Charades_v1_train.csv, Charades_v1_test.csv      anywhere
      Charades_v1_480/<id>.mp4                                                  anywhere
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations_of_several
from data_pipelines.builders.listing import Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig


class Charades(MediaBuilder):
  """Things that people do at home, in videos of about 30 s: 157 classes of actions, several in a video."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [MediaConfig(name='v1', description='Charades v1.', labels='several')]  # noqa: RUF012
  DESCRIPTION = 'What people do at home, in videos of about 30 s: 157 classes of actions, several in a video.'
  HOMEPAGE = 'https://prior.allenai.org/projects/charades'
  LICENSE = 'For non-commercial research, under the terms of license.txt in the download.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations_of_several.charades(manual_dir)
