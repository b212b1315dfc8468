"""Every key that a config can set for a source, with its default, what it may be and its meaning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.clips import sampling
from data_pipelines.declared import (
  OPTIONAL,
  REQUIRED,
  Key,
  either,
  flag,
  none,
  nonempty,
  number,
  one_of,
  several,
  span,
  text,
  whole,
)

# How clips are cut.
CLIPS = {
  # 'dense': `num_frames` frames `stride` apart; or 'segments': one of each of `num_frames` parts.
  'sampler': Key('dense', one_of('dense', 'segments')),
  'stride': Key(1, whole(1)),
  'fps': Key(0.0, number(0)),  # at which `stride` counts, whatever the rate of a video; 0: its stored frames
  # Begin a video again that is too short for a dense clip; else its last frame stands still.
  'loop': Key(False, flag),
  # Random resized crop in training: share of the area, aspect ratio.
  'crop_scale': Key((1.0, 1.0), span(above=0, high=1)),
  'crop_ratio': Key((1.0, 1.0), span(above=0)),
  # (low, high) pixels, such as (256, 320) for a crop of 224, in place of the two above.
  'short_side': Key(None, either(none, span(above=0))),
  'rotation': Key(0.0, number(0, 180)),  # of training clips, in +- degrees
  # Mirror half of the training clips; 'labels': and where a class names left or right, its label becomes that of
  # the class that names the other side (a class without such a counterpart is never mirrored). 'auto' looks at the
  # names of the classes: 'labels' where one of them names a side or a turn, else True.
  'flip': Key(False, either(flag, one_of('labels', 'auto'))),
  'test_clips': Key(1, whole(1)),  # clips an evaluated video, evenly over its length
  # 1, 3 along the long side, 5 or 10; probabilities are averaged over clips x crops.
  'test_crops': Key(1, one_of(*sampling.PROTOCOL_CROPS)),
  # Share of the short side that a test crop shows; 224 / 256 is ImageNet's.
  'test_crop_fraction': Key(1.0, number(above=0, high=1)),
}

# Settings that have another name as a field: the `fps` of a source are those of its stored frames.
_FIELDS = {'fps': 'target_fps'}

# Who inherits from it has the settings as keyword-only fields with their defaults.
ClipSettings = dataclasses.make_dataclass(
  'ClipSettings',
  [(_FIELDS.get(key, key), Any, dataclasses.field(default=declared.default)) for key, declared in CLIPS.items()],
  frozen=True,
  eq=False,
  kw_only=True,
)


def fields(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings by their names in a config to the fields of `ClipSettings`."""
  return {_FIELDS.get(key, key): value for key, value in settings.items()}


def of(holder: ClipSettings) -> dict[str, Any]:
  """The settings of who holds them, by their names in a config."""
  return {key: getattr(holder, _FIELDS.get(key, key)) for key in CLIPS}


SOURCE = {
  'dataset': Key(REQUIRED, nonempty),  # a TFDS name with config and version as needed, e.g. 'moving_digits/objects'
  'data_dir': Key('', text),  # TFDS's default folder if empty
  'train': Key('train', nonempty),  # TFDS split strings
  'test': Key('test', text),  # '' if there is none
  # The features to use where the data set has several; label_key=None leaves its labels out.
  'frames_key': Key(OPTIONAL, either(nonempty, none)),
  'label_key': Key(OPTIONAL, either(nonempty, none)),
  # Original videos never to train on: 'dataset:split' ('kinetics/400:validation') or files that name them.
  'exclude': Key((), several(nonempty)),
  # Train on this share of the examples of each class (at least one of each): 0.05 is the 5 % label protocol.
  'label_fraction': Key(1.0, number(above=0, high=1)),
  **CLIPS,
}
