"""What the data side and the model side both know: the batch, the errors.

This file imports neither TensorFlow nor JAX. `data_pipelines` never imports
`cover_jax`; `cover_jax` reads batches and knows nothing of how they are made.

A *batch* is a nested dict of host arrays, one sub-batch per stream:

    {stream: {
        'views':      {name: uint8 [B, T, H, W, 3]}   the clips; one, 'clip', unless the objective names others
        'targets':    {name: {view: array [B, ...]}}  what the objective asked to know of each clip; see `TARGETS`
        'label':      int32 [B]              class index within the example's own source; -1 if unlabelled, or if its
                                             source has several labels an example
        'labels':     int8  [B, K]           of a source that has several: 1 for a class that the example has, 0 for one
                                             that it has not, -1 where nobody knows: all of an unlabelled example, and
                                             all behind the source's own classes; all -1 for other sources
        'source':     int32 [B]              index into the run's list of sources
        'mask':       bool  [B]              False for padding (only evaluation pads); label and ids are -1 there
        'example_id': int32 [B]              index of the example within its source split
        'video_id':   int32 [B]              which original video it was cut from, within its source split
    }}

'labels' is there where a source of the stream has several labels an example; K is `label_width` of the stream's
sources. An example that has none of the classes is labelled, too: its row is of zeros.

`shapes` says this once, for whoever needs it before there is a batch. On several processes each holds its own
contiguous rows of the global sub-batch.

In evaluation an example shows V test views (clips x crops), also where V is 1: 'views' are uint8 [B, V, T, H, W, 3], so
that each example is one row, counted once, and the batch axis is the only one that is split over devices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SubBatch = Mapping[str, Any]
Batch = Mapping[str, SubBatch]
BatchIterator = Iterator[Batch]

# What an objective can ask to know of its clips, as the host cut them (`Objective.targets`): shape behind [B], given
# the clip's T, and dtype.
TARGETS: Mapping[str, tuple[Callable[[int], tuple[int, ...]], type]] = {
  'frames': (lambda length: (length,), np.int32),  # numbers of the stored frames that it shows
  'num_frames': (lambda length: (), np.int32),  # of the stored video
  'box': (lambda length: (4,), np.float32),  # (top, left, height, width) of the crop, as shares of the stored frame
  'flip': (lambda length: (), np.bool_),  # whether it is mirrored
}

# How many labels an example of a source has: what kind of head judges it.
LABELS = ('one', 'several')

# (number of frames of the video, rng or None for the deterministic test clip)
# -> {view name: int frame numbers [T]}. An objective that needs several clips
# of one video passes its own; the loader decodes the union of the frames once.
ViewSampler = Callable[[int, 'np.random.Generator | None'], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  """What the model side knows of one dataset split.

  Attributes:
    name: the source's name in the config, and its head's name.
    modality: 'video' or 'image'.
    num_examples: examples in the training split.
    class_names: in label order; empty for an unlabelled source.
    fps: frames a second of its stored videos; 0 where they differ or nobody knows.
    labels: of an example, of `LABELS`: 'one' class, or 'several', from none to all of them.
  """

  name: str
  modality: str
  num_examples: int
  class_names: tuple[str, ...]
  fps: float = 0.0
  labels: str = 'one'


@dataclasses.dataclass(frozen=True)
class TestSet:
  """What is evaluated of one source.

  Attributes:
    batches: () -> this process's evaluation sub-batches, each example once.
    examples: how many there are.
    missing: examples that the split's annotations list and the data set lacks.
    protocol: what the test views are, in words.
    fingerprint: of the examples (`sources.fingerprint`): equal for those who evaluate the same ones.
    identity: () -> a hash of all that the clips depend on, to the pixel (`views.identity`).
    names: () -> the examples' own names, by number; empty where the data set gives none.
    some: numbers of examples, ascending -> sub-batches of these alone, in that order, all in this process; their
      example_id counts from 0. None at all where they cannot be had again.
  """

  __test__ = False  # it is no test case for pytest

  batches: Callable[[], Iterator[SubBatch]]
  examples: int
  missing: int
  protocol: str
  fingerprint: str
  identity: Callable[[], str]
  names: Callable[[], Sequence[str]] = tuple
  some: Callable[[np.ndarray], Iterator[SubBatch]] = lambda examples: iter(())


class UserError(Exception):
  """A mistake in a config, a command or a file: one sentence, no traceback.

  The message says what is wrong, where, what was expected and what to do.
  The command line prints it and exits with code 2.
  """


def label_width(sources: Sequence[SourceInfo]) -> int:
  """K of the 'labels' of a stream of these sources; 0 where it has no such entry."""
  return max((len(s.class_names) for s in sources if s.labels == 'several'), default=0)


def shapes(
  batch_size: int,
  view_lengths: Mapping[str, int],
  size: tuple[int, int],
  targets: Sequence[str] = (),
  labels: int = 0,
) -> dict[str, Any]:
  """The sub-batch's tree with (shape, dtype) in place of each array.

  Args:
    batch_size: B.
    view_lengths: {view: T}.
    size: (H, W) in pixels.
    targets: of `TARGETS`.
    labels: of `label_width`.
  """
  of_target = lambda shape, dtype: {v: ((batch_size, *shape(n)), np.dtype(dtype)) for v, n in view_lengths.items()}
  return {
    'views': {v: ((batch_size, n, *size, 3), np.dtype(np.uint8)) for v, n in view_lengths.items()},
    'targets': {name: of_target(*TARGETS[name]) for name in targets},
    **dict.fromkeys(('label', 'source', 'example_id', 'video_id'), ((batch_size,), np.dtype(np.int32))),
    **({'labels': ((batch_size, labels), np.dtype(np.int8))} if labels else {}),
    'mask': ((batch_size,), np.dtype(np.bool_)),
  }
