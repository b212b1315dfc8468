"""TFDS builder of HMDB51 from a local folder.

Where to get it: https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database, hmdb51_org.rar with an
archive a class inside, and test_train_splits.rar. Unpack all of them.
Licence: CC BY 4.0, as far as we know; the clips are from films and the web.

    <manual_dir>/
      testTrainMulti_7030_splits/brush_hair_test_split1.txt, ...      anywhere
      hmdb51_org/brush_hair/<file>.avi                                anywhere
"""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations
from data_pipelines.builders.listing import Listing, official_names
from data_pipelines.builders.media import MediaBuilder, MediaConfig


@dataclasses.dataclass(eq=False, kw_only=True)
class Hmdb51Config(MediaConfig):
  """One of the official splits.

  Attributes:
    split: 1, 2 or 3.
  """

  split: int = 1


class Hmdb51(MediaBuilder):
  """51 actions in clips of films and web videos: 70 training and 30 test clips a class in each split."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    Hmdb51Config(name=f'split{n}', split=n, description=f'Official split {n}.') for n in (1, 2, 3)
  ]
  DESCRIPTION = '51 actions in 6,766 clips of films and web videos; a split uses 5,100 of them.'
  HOMEPAGE = 'https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database'
  LICENSE = 'CC BY 4.0, as far as we know; the clips are from films and the web.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations.hmdb51(manual_dir, self.builder_config.split)

  def _class_names(self) -> tuple[str, ...]:
    return official_names('hmdb51')

  def _official_counts(self) -> dict[str, int]:
    return {'train': 51 * 70, 'test': 51 * 30}
