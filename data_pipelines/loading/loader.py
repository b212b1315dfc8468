"""Batches from sources: numpy decides, TensorFlow reads, decodes, crops, resizes and batches.

`views.plan` says what one example shows; it is a pure function of the example and a random stream, and the random
stream is one of (seed, stream, position). So a step's data is a pure function of (seed, step): a restart at step
s gives what a run to s gives, and processes that split the batch see the rows that one process would see.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines import sources as sources_lib
from data_pipelines.contract import Batch, SubBatch, UserError
from data_pipelines.loading import fetch as fetching
from data_pipelines.loading.mixture import Mixture, sampling_weights
from data_pipelines.loading.views import Stream, check
from data_pipelines.philox import AUGMENTATION, philox
from data_pipelines.sources import Source

_STEPS = 4  # whose rows are remembered: those that are being fetched
_READY = 2  # batches held beyond the one in use


def stream_mixture(name: str, sources: Sequence[Source], stream: Stream, seed: int) -> Mixture:
  """The order of a stream's examples. It depends on the stream's own name and sources, not on other streams."""
  own = {sources[i].name: sources[i].num_examples for i in stream.sources}
  weights = sampling_weights(own, stream.temperature, stream.weights)
  runs = tuple(sources[i].runs for i in stream.sources)
  block = stream.batch_size if stream.one_source_a_step else 1
  return Mixture(tuple(own.values()), tuple(weights.values()), seed, zlib.crc32(name.encode()), runs, block)


def augmentation_rng(mixture: Mixture, position: int) -> np.random.Generator:
  """The random stream of the example at a position of a stream."""
  return philox(AUGMENTATION, mixture.seed, mixture.stream, position)


@dataclass(frozen=True, eq=False)
class Rows:
  """One process's rows of a step's sub-batch, [b] each: what to load, without its pixels."""

  position: np.ndarray  # int64, in the stream's endless sequence of examples
  source: np.ndarray  # int32, index into the run's list of sources
  example: np.ndarray  # int64, within the source
  mask: np.ndarray  # bool, False: padding


def _positions(step: int, batch_size: int, process_index: int, process_count: int) -> np.ndarray:
  local = batch_size // process_count
  return step * batch_size + process_index * local + np.arange(local, dtype=np.int64)


def train_rows(stream: Stream, mixture: Mixture, step: int, process_index: int = 0, process_count: int = 1) -> Rows:
  """The examples that a process trains on in a step; the processes' rows in order are the global sub-batch."""
  position = _positions(step, stream.batch_size, process_index, process_count)
  member, example = mixture.locate(position)
  return Rows(position, np.array(stream.sources, np.int32)[member], example, np.ones(len(position), bool))


def eval_rows(
  num_examples: int, source_id: int, batch_size: int, step: int, process_index: int = 0, process_count: int = 1
) -> Rows:
  """The examples that a process evaluates in a step, in order; rows past the end repeat the last one, masked."""
  position = _positions(step, batch_size, process_index, process_count)
  example = np.minimum(position, num_examples - 1)
  return Rows(position, np.full(len(position), source_id, np.int32), example, position < num_examples)


def train_batches(
  sources: Sequence[Source],
  streams: Mapping[str, Stream],
  seed: int,
  *,
  start_step: int = 0,
  num_steps: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches of the steps start_step, start_step + 1, ...

  Args:
    sources: of the run; a row's 'source' is an index into it.
    streams: by name.
    seed: of the run; with the step it determines the data.
    start_step: of the first batch. Starting late costs nothing.
    num_steps: how many batches to give; None: without end.
    process_index, process_count: which contiguous part of each global batch to give.

  Returns:
    An iterator of batches (see `contract`), this process's rows of them.

  Raises:
    UserError: a batch size that process_count does not divide, an image source in a stream of several frames,
      wrong sampling weights; from the iterator: frames that cannot be read or decoded.
  """
  datasets, all_rows, trouble = {}, {}, []
  for name, stream in streams.items():
    mixture = stream_mixture(name, sources, stream, seed)
    check_stream(f'stream {name!r}', [sources[i] for i in stream.sources], stream, stream.batch_size, process_count)

    def rows(step, stream=stream, mixture=mixture):
      return train_rows(stream, mixture, step, process_index, process_count)

    def rng(position, mixture=mixture):
      return augmentation_rng(mixture, position)

    stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
    all_rows[name] = rows
    datasets[name] = _dataset(sources, stream, rows, rng, range(start_step, stop), trouble)
  return _iterate(datasets, trouble, sources, all_rows, start_step)


def eval_batches(
  source: Source,
  source_id: int,
  stream: Stream,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[SubBatch]:
  """Each example of a source exactly once, in order, with the V test views of the source's protocol.

  Args:
    source: to evaluate.
    source_id: its index in the run's list of sources.
    stream: the geometry and views of the clips; its sources and batch_size are not used.
    batch_size: examples a step over all processes.
    process_index, process_count: which contiguous part of each global batch to give.

  Returns:
    An iterator of sub-batches (see `contract`), equally many on every process, whose clips are uint8
    [B, V, T, H, W, 3]. Padding is mask False and has label and example_id -1.

  Raises:
    UserError: as `train_batches`.
  """
  check_stream(f'the evaluation of {source.name!r}', [source], stream, batch_size, process_count)

  def rows(step):
    return eval_rows(source.num_examples, source_id, batch_size, step, process_index, process_count)

  steps = range(-(-source.num_examples // batch_size))
  trouble = []
  sources = {source_id: source}
  dataset = _dataset(sources, stream, rows, lambda position: None, steps, trouble)
  return (stack_views(batch['only']) for batch in _iterate({'only': dataset}, trouble, sources, {'only': rows}, 0))


def stack_views(sub_batch: SubBatch) -> SubBatch:
  """Puts the test views '<name>/000', '<name>/001', ... [B, T, H, W, 3] of an example into one [B, V, T, H, W, 3]."""
  clips = sub_batch['views']
  numbered = {name: sorted(k for k in clips if k.split('/')[0] == name) for name in {k.split('/')[0] for k in clips}}
  return {**sub_batch, 'views': {name: np.stack([clips[k] for k in ks], axis=1) for name, ks in numbered.items()}}


def check_stream(where: str, members: Sequence[Source], stream: Stream, batch_size: int, process_count: int) -> None:
  """Raises UserError where sources, clip geometry, batch size and processes do not go together."""
  if batch_size <= 0 or batch_size % process_count:
    raise UserError(
      f'batch_size of {where} is {batch_size}; expected a positive multiple of the {process_count} processes.'
    )
  for source in members:
    if source.num_examples == 0:
      raise UserError(f'Source {source.name!r} in {where} has no examples: choose another split.')
    check(source, stream, where)


def _dataset(
  sources: Sequence[Source] | Mapping[int, Source],
  stream: Stream,
  rows: Callable[[int], Rows],
  make_rng: Callable[[int], np.random.Generator | None],
  steps: range,
  trouble: list[Exception],
):
  """tf.data of a stream's sub-batches: some examples are fetched at a time, each is decoded, b of them are batched.

  What Python raises in it is kept in `trouble`: TensorFlow loses the type.
  """
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # the accelerator belongs to JAX
  members = sources if isinstance(sources, Mapping) else stream.sources
  rows = functools.lru_cache(maxsize=_STEPS)(rows)
  b = len(rows(steps.start).position)
  some = _examples(rows, steps.start, b, 0, 1)[0]
  fetch = fetching.prepare({i: sources_lib.unshared(sources[i]) for i in members}, stream, make_rng, some)
  fields, count = fetch.fields, b * len(steps)

  def fetched(number):
    def several(number):
      try:
        first = int(number) * fetching.SEVERAL
        return fetching.several(fetch, _examples(rows, steps.start, b, first, min(first + fetching.SEVERAL, count)))
      except Exception as e:
        trouble.append(e)
        raise

    dtypes = [tf.string if dtype is object else tf.as_dtype(dtype) for dtype, _ in fields.values()]
    arrays = dict(zip(fields, tf.numpy_function(several, [number], dtypes), strict=True))
    for name, (_, shape) in fields.items():
      arrays[name].set_shape((None, *shape))
    return arrays

  as_written = tf.autograph.experimental.do_not_convert  # half the time to the first batch is spent otherwise
  dataset = tf.data.Dataset.range(min(-(-count // fetching.SEVERAL), np.iinfo(np.int64).max))
  parallel = 1 if fetch.in_order else fetching.CALLS if fetch.from_afar else tf.data.AUTOTUNE
  dataset = dataset.map(as_written(fetched), num_parallel_calls=parallel, deterministic=True).unbatch()
  decoded = functools.partial(_sub_batch, fetch)
  dataset = dataset.map(as_written(decoded), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return dataset.batch(b, drop_remainder=True)


def _examples(rows: Callable[[int], Rows], start: int, b: int, first: int, stop: int) -> list[fetching.Example]:
  """The examples first, ..., stop - 1, counted from the first row of step `start`, where a step has b rows."""
  found = []
  for step, row in (divmod(i, b) for i in range(first, stop)):
    r = rows(start + step)
    found.append(fetching.Example(int(r.position[row]), int(r.source[row]), int(r.example[row]), bool(r.mask[row])))
  return found


def _sub_batch(fetch: fetching.Fetch, example: Mapping[str, Any]) -> dict[str, Any]:
  """One example of a sub-batch (see `contract`) of what was fetched of it."""
  of_view = lambda target: {view: example[f'{target}/{view}'] for view in fetch.lengths}
  names = ('label', 'source', 'mask', 'example_id', 'video_id', *['labels'] * bool(fetch.stream.label_width))
  annotations = {k: example[k] for k in names}
  targets = {target: of_view(target) for target in fetch.stream.targets}
  return annotations | {'targets': targets, 'views': _decoded(fetch, example)}


def _decoded(fetch: fetching.Fetch, example: Mapping[str, Any]) -> dict[str, Any]:
  """{view: clip, uint8 [T, H, W, 3]} of one example."""
  import tensorflow as tf

  from data_pipelines.clips import decode

  size, lengths = fetch.stream.height_width, fetch.lengths
  encoded, places = example['encoded'], example['places']
  boxes, flips, affines = example['box'], example['flip'], example['affine']
  if len(lengths) == 1:
    ((name, length),) = lengths.items()
    clip = decode.clip(tf.gather(encoded, places), length, boxes[0], flips[0], size)
    return {name: decode.warp(clip, affines[0])}
  frames_UxHxWx3 = decode.whole(encoded[: example['union']])
  clips, first = {}, 0
  for i, (name, length) in enumerate(lengths.items()):
    frames = tf.gather(decode.cut(frames_UxHxWx3, boxes[i]), places[first : first + length])
    clips[name] = decode.warp(decode.fit(frames, length, flips[i], size), affines[i])
    first += length
  return clips


def _iterate(
  datasets: Mapping,
  trouble: list[Exception],
  sources: Sequence[Source] | Mapping[int, Source],
  rows: Mapping[str, Callable[[int], Rows]],
  step: int,
) -> Iterator[Batch]:
  import tensorflow as tf

  # A number, not AUTOTUNE, which may take half of the machine's memory. Two batches: one waits, one is filled.
  dataset = tf.data.Dataset.zip(dict(datasets)).prefetch(_READY)
  options = tf.data.Options()
  options.deterministic = True
  iterator = dataset.with_options(options).as_numpy_iterator()
  while True:
    try:
      batch = next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError as e:
      if trouble:
        raise trouble[0] from None
      culprit = next(filter(None, (_broken_frame(sources, of_stream(step)) for of_stream in rows.values())), None)
      if culprit is None:
        raise
      raise UserError(f'{culprit} cannot be decoded ({e.message.splitlines()[0]}): build the dataset again.') from None
    yield batch
    step += 1


def _broken_frame(sources: Sequence[Source] | Mapping[int, Source], rows: Rows) -> str | None:
  """The first frame of some examples that cannot be decoded. TensorFlow's own message does not tell which."""
  import tensorflow as tf

  for source_id, example in zip(rows.source, rows.example, strict=True):
    source = sources[int(source_id)]
    for number, frame in enumerate(sources_lib.read(source, example, np.arange(source.num_frames[example]))):
      try:
        tf.io.decode_image(frame, expand_animations=False)
      except tf.errors.OpError:
        row = source.rows[example]
        file, offset = source.frames.files[source.frames.shard[row]], source.frames.frames(row)[0][number]
        return f'Frame {number} of example {example} of source {source.name!r} (byte {offset} of {file})'
  return None
