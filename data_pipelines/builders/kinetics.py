"""TFDS builder of Kinetics-400, 600, 700 and 700-2020 from a local folder.

Where to get it: https://github.com/cvdfoundation/kinetics-dataset has videos and tables. Videos vanish from YouTube, so
copies differ; the build says how many of the listed clips yours has.
Licence: annotations CC BY 4.0 (Google), as far as we know; the videos stay their uploaders'.

    <manual_dir>/
      annotations/train.csv, val.csv, test.csv      anywhere; also as kinetics-400_train.csv
      train/abseiling/<id>_000417_000427.mp4        anywhere; class folders, split folders or flat
"""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations
from data_pipelines.builders.listing import Listing, official_names
from data_pipelines.builders.media import MediaBuilder, MediaConfig


@dataclasses.dataclass(eq=False, kw_only=True)
class KineticsConfig(MediaConfig):
  """One of the releases.

  Attributes:
    variant: '400', '600', '700' or '700_2020', which is 700 with more videos.
  """

  variant: str = '400'


class Kinetics(MediaBuilder):
  """Human actions in 10 s clips of YouTube videos."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    KineticsConfig(name=v, variant=v, description=f'Kinetics-{v.replace("_", "-")}.')
    for v in ('400', '600', '700', '700_2020')
  ]
  DESCRIPTION = 'Human actions in 10 s clips of YouTube videos, one label each; 400, 600 or 700 classes.'
  HOMEPAGE = 'https://github.com/cvdfoundation/kinetics-dataset'
  LICENSE = "Annotations: CC BY 4.0, as far as we know. Videos: their uploaders'."

  def _list(self, manual_dir: Path) -> Listing:
    return annotations.kinetics(manual_dir, self.builder_config.variant)

  def _class_names(self) -> tuple[str, ...]:
    return official_names(f'kinetics_{self.builder_config.variant[:3]}')
