"""TFDS builder of UCF101 from a local folder. TFDS's own `ucf101` downloads an archive and needs ffmpeg and unrar.

This one has another name so that both can be used. It keeps the groups that clips were cut from (`video_id`).

Where to get it: https://www.crcv.ucf.edu/data/UCF101.php, UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip.
Licence: none is stated; the videos are from YouTube.

    <manual_dir>/
      ucfTrainTestlist/classInd.txt, trainlist01.txt, testlist01.txt, ...     anywhere
      UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi                     anywhere
"""

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import annotations
from data_pipelines.builders.listing import Listing, official_names
from data_pipelines.builders.media import MediaBuilder, MediaConfig


@dataclasses.dataclass(eq=False, kw_only=True)
class Ucf101Config(MediaConfig):
  """One of the official splits.

  Attributes:
    split: 1, 2 or 3.
  """

  split: int = 1


class Ucf101Videos(MediaBuilder):
  """101 actions in YouTube videos, with the official split in training and test."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    Ucf101Config(name=f'split{n}', split=n, description=f'Official split {n}.') for n in (1, 2, 3)
  ]
  DESCRIPTION = '101 actions in 13,320 clips of YouTube videos, in groups that were cut from one video.'
  HOMEPAGE = 'https://www.crcv.ucf.edu/data/UCF101.php'
  LICENSE = 'None stated.'

  def _list(self, manual_dir: Path) -> Listing:
    return annotations.ucf101(manual_dir, self.builder_config.split)

  def _class_names(self) -> tuple[str, ...]:
    return official_names('ucf101')

  def _official_counts(self) -> dict[str, int]:
    train = {1: 9537, 2: 9586, 3: 9624}[self.builder_config.split]
    return {'train': train, 'test': 13_320 - train}
