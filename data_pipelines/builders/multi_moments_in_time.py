"""TFDS builder of Multi-Moments in Time, v1 (313 classes) and v2 (292), from a local folder.

Where to get it: http://moments.csail.mit.edu, a link after a form.
Licence: for non-commercial research and education, under the terms of the form.

    <manual_dir>/
      moments_categories.txt, trainingSet.csv, validationSet.csv      anywhere
      videos/<file>.mp4                                               anywhere
"""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations_of_several
from data_pipelines.builders.listing import Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig


@dataclasses.dataclass(eq=False, kw_only=True)
class MultiMomentsInTimeConfig(MediaConfig):
  """One of the releases.

  Attributes:
    release: 'v1', 313 classes, or 'v2', 292.
  """

  release: str = 'v1'
  labels: str = 'several'


class MultiMomentsInTime(MediaBuilder):
  """Events of 3 s, several labels each. The order of the classes is that of moments_categories.txt."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    MultiMomentsInTimeConfig(name=v, release=v, description=f'Multi-Moments in Time {v}.') for v in ('v1', 'v2')
  ]
  DESCRIPTION = 'Events in 3 s clips, several labels each.'
  HOMEPAGE = 'http://moments.csail.mit.edu'
  LICENSE = 'For non-commercial research and education, under the terms of the download form.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations_of_several.multi_moments_in_time(manual_dir, self.builder_config.release)
