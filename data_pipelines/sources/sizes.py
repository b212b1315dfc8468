"""How large a source is without opening it, for plans on machines that have no data."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipelines.contract import SourceInfo, UserError


class Size(NamedTuple):
  """What a plan needs of a training split.

  Attributes:
    modality: 'video' or 'image'.
    num_examples: in the split.
    num_classes: 0 if it is unlabelled.
    origin: where the numbers come from.
    labels: of an example, 'one' or 'several'.
  """

  modality: str
  num_examples: int
  num_classes: int
  origin: str
  labels: str = 'one'


# Training splits as published; what is left of the YouTube ones today is less.
PUBLISHED = {
  'kinetics/400': Size('video', 240_000, 400, 'arXiv 2102.05095'),
  'kinetics/600': Size('video', 363_213, 600, "scenic's configs"),
  'kinetics/700': Size('video', 537_000, 700, 'arXiv 2205.09113'),
  'something_something_v2': Size('video', 168_913, 174, "scenic's configs"),
  'moments_in_time/v1': Size('video', 791_297, 339, "scenic's configs"),
  'charades/v1': Size('video', 7_985, 157, 'arXiv 1604.01753', 'several'),
  'imagenet2012': Size('image', 1_281_167, 1000, 'ILSVRC 2012'),
}


def size_of(name: str, config: Mapping[str, Any], given: Mapping[str, Size]) -> Size:
  """The size of a source's training split: as given, else of the prepared data set, else as published.

  Args:
    name: of the source.
    config: its 'dataset', 'data_dir' and 'train' split.
    given: sizes by source name, see `parse`.

  Raises:
    UserError: if no one knows it.
  """
  if name in given:
    return given[name]
  dataset, split = config['dataset'], config['train']
  if prepared := _prepared(dataset, split, config.get('data_dir') or None):
    return prepared
  without_version = re.sub(r':\d.*$', '', dataset)
  if without_version in PUBLISHED and split == 'train':
    return PUBLISHED[without_version]
  raise UserError(
    f'The size of source {name!r} ({dataset}, split {split}) is not known here: prepare the data set, or say it as '
    f'--sizes={name}=EXAMPLES/CLASSES.'
  )


def info(name: str, size: Size) -> SourceInfo:
  """A source of this size, with class names that stand for the real ones."""
  class_names = tuple(f'class {k}' for k in range(size.num_classes))
  return SourceInfo(name, size.modality, size.num_examples, class_names, labels=size.labels)


def parse(text: str, config: Mapping[str, Any]) -> dict[str, Size]:
  """Reads 'k400=240000/400,mine=5000/12'.

  Args:
    text: source=examples/classes, separated by commas.
    config: the run's `sources`, which the names must be among.

  Raises:
    UserError: if it is written otherwise.
  """
  sizes = {}
  for part in filter(None, text.split(',')):
    match = re.fullmatch(r'(\w+)=(\d+)/(\d+)', part)
    if not match or match[1] not in config or not int(match[2]):
      raise UserError(f'--sizes={part}: expected SOURCE=EXAMPLES/CLASSES with a source of {sorted(config)}.')
    sizes[match[1]] = Size('video', int(match[2]), int(match[3]), '--sizes')
  return sizes


def _prepared(dataset: str, split: str, data_dir: str | None) -> Size | None:
  """The size that TFDS recorded when it prepared the data set; None if it is not there."""
  try:
    import tensorflow_datasets as tfds
  except ImportError:
    return None
  import data_pipelines.builders  # noqa: F401  registers ours

  try:
    builder = tfds.builder(dataset, data_dir=data_dir)
    if not builder.is_prepared():
      return None
    examples = builder.info.splits[split].num_examples
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, KeyError, OSError):
    return None  # an unknown name, configuration, version or split: `size_of` says what to do
  features = builder.info.features
  one = [f.num_classes for f in features.values() if isinstance(f, tfds.features.ClassLabel)]
  sequences = [f.feature for f in features.values() if isinstance(f, tfds.features.Sequence)]
  several = [f.num_classes for f in sequences if isinstance(f, tfds.features.ClassLabel)]
  classes, labels = (one, 'one') if one or not several else (several, 'several')
  is_video = any(isinstance(f, tfds.features.Video) for f in features.values())
  origin = f'prepared in {builder.data_dir}'
  return Size('video' if is_video else 'image', examples, classes[0] if classes else 0, origin, labels)
