"""TFDS builder of images of one's own: `python -m data_pipelines.build image_folder/<name> --manual_dir=<folder>`.

`folders.list_folder` says how the folder may be laid out. An upright RGB JPEG keeps its bytes if its shorter side has
at most 512 pixels, which most of ImageNet's have; other images are converted.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.builders import folders
from data_pipelines.builders.listing import IMAGE_EXTENSIONS, Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig


class ImageFolder(MediaBuilder):
  """Images in a folder for each class, or in list files."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    MediaConfig(name='default', short_side=512, description='The only one; others are named when built.')
  ]
  MODALITY = 'image'
  DESCRIPTION = 'Images in a folder for each class, or in list files.'

  def _list(self, manual_dir: Path) -> Listing:
    return folders.list_folder(manual_dir, IMAGE_EXTENSIONS, 'image', self.builder_config.labels)
