"""Batches from sources: numpy decides, TensorFlow reads, decodes, crops, resizes and batches.

`plan` says what one example shows; it is a pure function of the example and a random stream, and the random
stream is one of (seed, stream, position). So a step's data is a pure function of (seed, step): a restart at step
s gives what a run to s gives, and processes that split the batch see the rows that one process would see.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines import clips
from data_pipelines import sources as sources_lib
from data_pipelines.contract import Batch, SubBatch, UserError, ViewSampler
from data_pipelines.mixture import AUGMENTATION, Mixture, philox, sampling_weights
from data_pipelines.sources import Source


@dataclass(frozen=True)
class Stream:
  """Sources that share a clip geometry; each step it yields one sub-batch of a fixed shape.

  Attributes:
    sources: indices into the run's list of sources.
    num_frames: T of a clip.
    size: (H, W) of a clip, or both as one int.
    batch_size: examples a step over all processes.
    temperature, weights: how sources are weighed against each other (`mixture.sampling_weights`; weights by name).
    views: frame numbers of several named clips an example; None: one, 'clip', from the source's own sampler.
    crop_fraction: of evaluation's centre crop (`clips.center_crop`).
  """

  sources: tuple[int, ...]
  num_frames: int
  size: int | tuple[int, int]
  batch_size: int
  temperature: float = 1.0
  weights: Mapping[str, float] | None = None
  views: ViewSampler | None = None
  crop_fraction: float = 1.0

  @property
  def height_width(self) -> tuple[int, int]:
    return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)


@dataclass(frozen=True, eq=False)
class View:
  """One clip of an example: int64 [T] frame numbers, one box and one flip for all of them."""

  frames: np.ndarray
  box: clips.Box
  flip: bool


def plan(source: Source, example: int, stream: Stream, rng: np.random.Generator | None) -> dict[str, View]:
  """What the clips of one example show: random with rng, the deterministic test clip without."""
  num_frames, height, width = (int(x[example]) for x in (source.num_frames, source.height, source.width))
  if stream.views is not None:
    frames = stream.views(num_frames, rng)
  elif source.sampler == 'dense':
    frames = {'clip': clips.dense(num_frames, stream.num_frames, source.stride, rng)}
  else:
    frames = {'clip': clips.segments(num_frames, stream.num_frames, rng)}
  out_height, out_width = stream.height_width
  views = {}
  for name in sorted(frames):
    if rng is None:
      box, flip = clips.center_crop(height, width, stream.height_width, stream.crop_fraction), False
    else:
      aspect = out_width / out_height
      box = clips.random_resized_crop(height, width, rng, source.crop_scale, source.crop_ratio, aspect)
      flip = bool(rng.random() < 0.5) and source.flip
    views[name] = View(np.asarray(frames[name], np.int64), box, flip)
  return views


def stream_mixture(name: str, sources: Sequence[Source], stream: Stream, seed: int) -> Mixture:
  """The order of a stream's examples. It depends on the stream's own name and sources, not on other streams."""
  own = {sources[i].name: sources[i].num_examples for i in stream.sources}
  weights = sampling_weights(own, stream.temperature, stream.weights)
  return Mixture(tuple(own.values()), tuple(weights.values()), seed, zlib.crc32(name.encode()))


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
  """Each example of a source exactly once, in order, as deterministic test clips.

  Args:
    source: to evaluate.
    source_id: its index in the run's list of sources.
    stream: the geometry and views of the clips; its sources and batch_size are not used.
    batch_size: examples a step over all processes.
    process_index, process_count: which contiguous part of each global batch to give.

  Returns:
    An iterator of sub-batches (see `contract`), equally many on every process. Padding is mask False and has
    label and example_id -1.

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
  return (batch['only'] for batch in _iterate({'only': dataset}, trouble, sources, {'only': rows}, 0))


def check_stream(where: str, members: Sequence[Source], stream: Stream, batch_size: int, process_count: int) -> None:
  """Raises UserError where sources, clip geometry, batch size and processes do not go together."""
  if batch_size <= 0 or batch_size % process_count:
    raise UserError(
      f'batch_size of {where} is {batch_size}; expected a positive multiple of the {process_count} processes.'
    )
  for source in members:
    if source.num_examples == 0:
      raise UserError(f'Source {source.name!r} in {where} has no examples: choose another split.')
    lengths = {len(v.frames) for v in plan(source, 0, stream, None).values()}
    if source.modality == 'image' and lengths != {1}:
      raise UserError(
        f'Image source {source.name!r} is in {where} of {max(lengths)} frames; images are never padded to clips: '
        f'put it into a stream with num_frames=1.'
      )


def _dataset(
  sources: Sequence[Source] | Mapping[int, Source],
  stream: Stream,
  rows: Callable[[int], Rows],
  make_rng: Callable[[int], np.random.Generator | None],
  steps: range,
  trouble: list[Exception],
):
  """tf.data of a stream's sub-batches. What Python raises in it is kept in `trouble`: TensorFlow loses the type."""
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')  # the accelerator belongs to JAX
  some_rows = rows(steps.start)
  some = plan(sources[int(some_rows.source[0])], int(some_rows.example[0]), stream, None)
  lengths = {name: len(view.frames) for name, view in some.items()}

  def noting(function):
    def noted(*args):
      try:
        return function(*args)
      except Exception as e:
        trouble.append(e)
        raise

    return noted

  def locate(step):
    r = rows(int(step))
    return r.position, r.source, r.example, r.mask

  def fetch(position, source_id, example, mask):
    source = sources[int(source_id)]
    views = plan(source, int(example), stream, make_rng(int(position)))
    if {name: len(view.frames) for name, view in views.items()} != lengths:
      raise ValueError(f'the view sampler gave clips of other names or lengths than before: {lengths}')
    # The union of all views' frames is read once; places say which of them each view shows.
    union, places = np.unique(np.concatenate([views[name].frames for name in lengths]), return_inverse=True)
    encoded = np.array(sources_lib.read(source, int(example), union), object)
    boxes = np.array([views[name].box for name in lengths], np.int32)
    flips = np.array([views[name].flip for name in lengths], bool)
    label = source.label[example] if mask else np.int32(-1)
    return encoded, places.astype(np.int64), boxes, flips, label

  def load(position, source_id, example, mask):
    encoded, places, boxes, flips, label = tf.numpy_function(
      noting(fetch), (position, source_id, example, mask), (tf.string, tf.int64, tf.int32, tf.bool, tf.int32)
    )
    sub_batch = {
      'label': tf.ensure_shape(label, ()),
      'source': source_id,
      'mask': mask,
      'example_id': tf.cast(tf.where(mask, example, -1), tf.int32),
    }
    boxes.set_shape((len(lengths), 4))
    first = 0
    for i, (name, length) in enumerate(lengths.items()):
      frames = tf.gather(encoded, places[first : first + length])
      sub_batch[name] = _decode(frames, length, boxes[i], flips[i], stream.height_width)
      first += length
    return sub_batch

  def expand(step):
    columns = tf.numpy_function(noting(locate), [step], (tf.int64, tf.int32, tf.int64, tf.bool))
    for column in columns:
      column.set_shape((len(some_rows.position),))
    return columns

  dataset = tf.data.Dataset.range(steps.start, steps.stop).map(lambda step: tuple(expand(step))).unbatch()
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return dataset.batch(len(some_rows.position), drop_remainder=True)


def _decode(frames, length: int, box, flip, size: tuple[int, int]):
  """Encoded frames [length] -> uint8 [length, *size, 3]; a box of exactly `size` comes out unchanged."""
  import tensorflow as tf

  top, left, height, width = tf.unstack(box)

  def cropped_jpeg(frame):  # decodes the box only; the accurate DCT is what other decoders use
    return tf.io.decode_and_crop_jpeg(frame, box, channels=3, dct_method='INTEGER_ACCURATE')

  def cropped_other(frame):
    image = tf.io.decode_image(frame, channels=3, expand_animations=False)
    return image[top : top + height, left : left + width]

  clip = tf.cond(
    tf.io.is_jpeg(frames[0]),
    lambda: tf.stack([cropped_jpeg(frames[i]) for i in range(length)]),
    lambda: tf.stack([cropped_other(frames[i]) for i in range(length)]),
  )
  clip = tf.image.resize(clip, size)
  clip = tf.cast(tf.round(clip), tf.uint8)  # bilinear weights sum to one: no value leaves [0, 255]
  clip = tf.cond(flip, lambda: tf.reverse(clip, [2]), lambda: clip)
  return tf.ensure_shape(clip, (length, *size, 3))


def _iterate(
  datasets: Mapping,
  trouble: list[Exception],
  sources: Sequence[Source] | Mapping[int, Source],
  rows: Mapping[str, Callable[[int], Rows]],
  step: int,
) -> Iterator[Batch]:
  import tensorflow as tf

  dataset = tf.data.Dataset.zip(dict(datasets)).prefetch(tf.data.AUTOTUNE)
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
