"""TFDS builder of videos of one's own: `python -m data_pipelines.build video_folder/<name> --manual_dir=<folder>`.

`folders.list_folder` says how the folder may be laid out. Each such dataset has a name of its own, the config's.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import folders
from data_pipelines.builders.listing import VIDEO_EXTENSIONS, Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig


class VideoFolder(MediaBuilder):
  """Videos in a folder for each class, or in list files."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [MediaConfig(name='default', description='The only one; others are named when built.')]  # noqa: RUF012
  DESCRIPTION = 'Videos in a folder for each class, or in list files.'

  def _list(self, manual_dir: Path) -> Listing:
    return folders.list_folder(manual_dir, VIDEO_EXTENSIONS, 'video', self.builder_config.labels)
