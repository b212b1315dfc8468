"""What Python does for TensorFlow: plans some examples of a stream and reads their encoded frames."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import sources as sources_lib
from data_pipelines.clips import affine
from data_pipelines.contract import TARGETS
from data_pipelines.loading.views import Stream, View, label_of, labels_of, plan, target_of
from data_pipelines.sources import Source

SEVERAL = 16  # examples that are read by one call from TensorFlow into Python: entering it costs more than the work
CALLS = 4  # at a time, where clips come from a bucket: 64 requests of some 30 ms each


class Example(NamedTuple):
  """One row of a step: what to load."""

  position: int
  source: int
  example: int
  mask: bool


class Fetch(NamedTuple):
  """How the examples of a stream are fetched.

  Attributes:
    sources: by the numbers that rows name them with; each with a reader of its own (`sources.unshared`).
    stream: geometry, views and targets of the clips.
    make_rng: position -> the random stream of a training example; None for the views of a test.
    lengths: {view: T of its clips}, the same for every example.
  """

  sources: Mapping[int, Source]
  stream: Stream
  make_rng: Callable[[int], np.random.Generator | None]
  lengths: Mapping[str, int]

  @property
  def fields(self) -> dict[str, tuple[type, tuple[int | None, ...]]]:
    """{name: (dtype, shape)} of what is fetched of one example: `object` stands for encoded frames.

    encoded: each frame that some view shows, once, then b''; `union` is how many; places: for the frames of all views,
    one behind the other, which of them each is; box, flip, affine: of each view; targets by '<target>/<view>'.
    """
    total, views = sum(self.lengths.values()), len(self.lengths)
    return {
      'encoded': (object, (total,)),
      'union': (np.int64, ()),
      'places': (np.int64, (total,)),
      'box': (np.int32, (views, 4)),
      'flip': (np.bool_, (views,)),
      'affine': (np.float32, (views, 8)),
      **dict.fromkeys(('label', 'source', 'example_id', 'video_id'), (np.int32, ())),
      'mask': (np.bool_, ()),
      **({'labels': (np.int8, (width,))} if (width := self.stream.label_width) else {}),
      **{
        f'{target}/{view}': (TARGETS[target][1], TARGETS[target][0](length))
        for target in self.stream.targets
        for view, length in self.lengths.items()
      },
    }

  @property
  def in_order(self) -> bool:
    """Whether some files can only be read forwards, so that examples must be fetched one after the other."""
    return any(source.runs is not None for source in self.sources.values())

  @property
  def from_afar(self) -> bool:
    """Whether some clips come over a network."""
    return any(source.from_afar for source in self.sources.values())


def prepare(
  sources: Mapping[int, Source], stream: Stream, make_rng: Callable[[int], np.random.Generator | None], some: Example
) -> Fetch:
  """How a stream's examples are fetched, given one of them."""
  views = plan(sources[some.source], some.example, stream, make_rng(some.position))
  return Fetch(sources, stream, make_rng, {name: len(view.frames) for name, view in views.items()})


def several(fetch: Fetch, examples: Sequence[Example]) -> list[np.ndarray]:
  """Each of the fields of some examples, [n, ...]."""
  threads = SEVERAL * CALLS if fetch.from_afar else SEVERAL
  pool = _pool(threads) if any(source.waits for source in fetch.sources.values()) else None
  ahead = {}  # clips of files that are read in order are fetched here, in order, the others that wait beside them
  for i, example in enumerate(examples if pool else ()):
    source = fetch.sources[example.source]
    if source.waits and source.runs is None:
      ahead[i] = pool.submit(_one, fetch, example)
  fetched = [ahead[i].result() if i in ahead else _one(fetch, example) for i, example in enumerate(examples)]
  return [np.stack([one[name] for one in fetched]) for name in fetch.fields]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
  return ThreadPoolExecutor(threads)


def _one(fetch: Fetch, row: Example) -> dict[str, Any]:
  source, lengths = fetch.sources[row.source], fetch.lengths
  views = plan(source, row.example, fetch.stream, fetch.make_rng(row.position))
  if {name: len(view.frames) for name, view in views.items()} != lengths:
    raise ValueError(f'the view sampler gave clips of other names or lengths than before: {lengths}')
  shown = [views[name] for name in lengths]
  union, places = np.unique(np.concatenate([view.frames for view in shown]), return_inverse=True)
  encoded = np.full(len(places), b'', object)
  encoded[: len(union)] = sources_lib.read(source, row.example, union)
  return {
    'encoded': encoded,
    'union': np.int64(len(union)),
    'places': places.astype(np.int64),
    'box': np.array([view.box for view in shown], np.int32),
    'flip': np.array([view.flip for view in shown], bool),
    'affine': np.array([affine.projective(view.affine) for view in shown], np.float32),
    **_annotations(source, row, views, fetch.stream.label_width),
    **{f'{t}/{v}': target_of(t, source, row.example, views[v]) for t in fetch.stream.targets for v in lengths},
  }


def _annotations(source: Source, row: Example, views: Mapping[str, View], label_width: int) -> dict[str, Any]:
  known = lambda value: value if row.mask else np.full_like(value, -1)
  return {
    'label': known(np.int32(label_of(source, row.example, views))),
    'source': np.int32(row.source),
    'example_id': known(np.int32(row.example)),
    'video_id': known(np.int32(source.video_id[row.example])),
    'mask': np.bool_(row.mask),
    **({'labels': known(labels_of(source, row.example, views, label_width))} if label_width else {}),
  }
