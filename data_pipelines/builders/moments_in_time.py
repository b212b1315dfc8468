"""TFDS builder of Moments in Time, v1 (339 classes) and v2 (305), from a local folder.

Where to get it: http://moments.csail.mit.edu, a link after a form.
Licence: for non-commercial research and education, under the terms of the form.

    <manual_dir>/
      moments_categories.txt, trainingSet.csv, validationSet.csv
      training/<class>/<file>.mp4, validation/<class>/<file>.mp4
"""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations
from data_pipelines.builders.listing import Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig


@dataclasses.dataclass(eq=False, kw_only=True)
class MomentsInTimeConfig(MediaConfig):
  """One of the releases.

  Attributes:
    release: 'v1', 339 classes, or 'v2', 305.
  """

  release: str = 'v1'


class MomentsInTime(MediaBuilder):
  """Events of 3 s: people, animals, things and nature. The order of the classes is that of moments_categories.txt."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    MomentsInTimeConfig(name=v, release=v, description=f'Moments in Time {v}.') for v in ('v1', 'v2')
  ]
  DESCRIPTION = 'Events in 3 s clips: people, animals, things and natural phenomena.'
  HOMEPAGE = 'http://moments.csail.mit.edu'
  LICENSE = 'For non-commercial research and education, under the terms of the download form.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations.moments_in_time(manual_dir, self.builder_config.release)
