"""What the clips of one example show, as a pure function of the example and a random stream.

A training example gives the clips that its stream's objective names; a test example gives the V views of its source's
protocol, clips times crops.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipelines.clips import affine, sampling, settings
from data_pipelines.contract import TARGETS, SubBatch, TestSet, UserError, ViewSampler
from data_pipelines.sources import Source, content, fingerprint, label_sets


@dataclass(frozen=True)
class Stream:
  """Sources that share a clip geometry; each step it yields one sub-batch of a fixed shape.

  Attributes:
    sources: indices into the run's list of sources.
    num_frames: T of a clip.
    size: (H, W) of a clip, or both as one int.
    batch_size: examples a step over all processes.
    temperature, weights: how sources are weighed against each other (`mixture.sampling_weights`; weights by name).
    one_source_a_step: a sub-batch is of one source only, drawn anew each step with these weights.
    targets: what else a batch says of each training clip, names of `contract.TARGETS`.
    label_width: K of a batch's 'labels' (`contract.label_width`); 0 for none.
    views: frame numbers of several named clips an example; None: one, 'clip', from the source's own sampler.
    rand_augment: its geometric half for training clips; None for none.
  """

  sources: tuple[int, ...]
  num_frames: int
  size: int | tuple[int, int]
  batch_size: int
  temperature: float = 1.0
  weights: Mapping[str, float] | None = None
  one_source_a_step: bool = False
  views: ViewSampler | None = None
  targets: tuple[str, ...] = ()
  label_width: int = 0
  rand_augment: affine.RandAugment | None = None

  @property
  def height_width(self) -> tuple[int, int]:
    return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)


@dataclass(frozen=True, eq=False)
class View:
  """One clip of an example: int64 [T] frame numbers; one box, one flip and one map for all of them.

  `affine` is applied last, to the clip as it has its size and is mirrored: f64 [2, 3] (see `affine`), None for none.
  """

  frames: np.ndarray
  box: sampling.Box
  flip: bool
  affine: np.ndarray | None = None


def plan(source: Source, example: int, stream: Stream, rng: np.random.Generator | None) -> dict[str, View]:
  """What the clips of one example show.

  Args:
    source: of the example.
    example: its index within the source.
    stream: the geometry and the names of the clips.
    rng: for a training example; None for the deterministic views of a test example.

  Returns:
    {name: view}, sorted. Test views are named '<name>/<v>' with v from '000', all crops of the first clip first.
  """
  return _test_views(source, example, stream) if rng is None else _training_views(source, example, stream, rng)


def label_of(source: Source, example: int, views: Mapping[str, View]) -> int:
  """The label of an example as its clips show it: that of the mirrored class where they are mirrored; -1 for none."""
  label = int(source.label[example])
  return source.flip_labels[label] if label >= 0 and _changes_labels(source, views) else label


def labels_of(source: Source, example: int, views: Mapping[str, View], width: int) -> np.ndarray:
  """An example's row of a batch's 'labels', int8 [width], as its clips show it; all -1 where it has one label."""
  classes = np.array(label_sets.UNKNOWN) if source.labels is None else label_sets.of(source.labels, example)
  if -1 not in classes and _changes_labels(source, views):
    classes = np.array(source.flip_labels, np.int32)[classes]
  return label_sets.target(classes, len(source.class_names), width)


def _changes_labels(source: Source, views: Mapping[str, View]) -> bool:
  return source.flip_labels is not None and any(v.flip for v in views.values())


def target_of(name: str, source: Source, example: int, view: View) -> np.ndarray:
  """One of `contract.TARGETS` of one clip."""
  stored = (source.height[example], source.width[example])
  values = {
    'frames': lambda: view.frames,
    'num_frames': lambda: source.num_frames[example],
    'box': lambda: np.asarray(view.box) / np.tile(stored, 2),
    'flip': lambda: view.flip,
  }
  return np.asarray(values[name](), TARGETS[name][1])


def protocol(source: Source, stream: Stream) -> str:
  """What the test views of a source are, in words: no number of an evaluation means anything without it."""
  (height, width), frames = stream.height_width, stream.num_frames
  count = lambda n, what: f'{n} {what}' + 's' * (n != 1)
  parts = [f'{count(source.test_clips, "clip")} x {count(source.test_crops, "crop")}']
  if source.modality == 'image':
    parts.append('1 frame')
  elif stream.views is not None:
    parts.append(f"{count(frames, 'frame')} by the objective's sampler")
  elif source.sampler == 'segments':
    parts.append(f'{count(frames, "frame")}, one a segment')
  else:
    rate = f'{source.target_fps:g} fps' if source.target_fps else 'native fps'
    parts.append(f'{count(frames, "frame")} x {source.stride} at {rate}' + ', looped' * source.loop)
  shown = '' if source.test_crop_fraction == 1 else f' of {source.test_crop_fraction:.4g} of the short side'
  parts.append(f'{height}x{width}{shown}')
  if source.test_clips * source.test_crops > 1:
    parts.append(f'{"softmax" if source.labels is None else "sigmoid"} averaged')
  return ', '.join(parts)


def make_test_set(
  source: Source,
  stream: Stream,
  batches: Callable[[], Iterator[SubBatch]],
  some: Callable[[np.ndarray], Iterator[SubBatch]] = lambda examples: iter(()),
) -> TestSet:
  """What is evaluated of a source, for its report; `batches` and `some` as in `TestSet`."""
  missing = max((source.expected or 0) - source.num_examples, 0)
  words, shown = protocol(source, stream), fingerprint(source)
  names = lambda: [] if source.ids is None else [i.decode('utf-8', 'replace') for i in source.ids]
  same = functools.partial(identity, source, stream)
  return TestSet(batches, source.num_examples, missing, words, shown, same, names, some)


def identity(source: Source, stream: Stream) -> str:
  """SHA-256 (hex) of all that a source's test clips depend on: what is stored of its examples, and how it is cut."""
  cut = settings.of(source) | {'flip_labels': source.flip_labels, 'modality': source.modality}
  text = json.dumps([content(source), cut, stream.num_frames, stream.height_width], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def examples_per_step(source: Source, clips_at_once: int, multiple: int) -> int:
  """Examples a step, a multiple of `multiple`, such that their test views are about `clips_at_once` clips."""
  return max(clips_at_once // (source.test_clips * source.test_crops) // multiple, 1) * multiple


def check(source: Source, stream: Stream, where: str) -> None:
  """Raises UserError where a source's clips do not go with the stream's geometry."""
  if source.short_side is not None and source.short_side[0] < max(stream.height_width):
    raise UserError(
      f'short_side of source {source.name!r} is {source.short_side} in {where} of size {stream.height_width}; expected '
      f'at least {max(stream.height_width)}, the longer side of a clip.'
    )
  if source.modality == 'image' and stream.num_frames != 1:
    raise UserError(
      f'Image source {source.name!r} is in {where} of {stream.num_frames} frames; images are never padded to clips: '
      f'put it into a stream with num_frames=1.'
    )
  if stream.views is not None:
    _check_lengths(source, stream.views, where)


def _check_lengths(source: Source, sampler: ViewSampler, where: str) -> None:
  """Raises UserError that names the first video of a length of which the objective can make no clips."""
  for length in np.unique(source.num_frames):
    try:
      sampler(int(length), None)
    except UserError as error:
      affected = np.flatnonzero(source.num_frames == length)
      first = affected[0]
      names = source.video_names if source.ids is None else source.ids
      named = '' if names is None else f', {names[first].decode("utf-8", "replace")!r},'
      others = f' (and of {len(affected) - 1:,} more)' if len(affected) > 1 else ''
      raise UserError(
        f'No clips can be made of example {first}{named} of source {source.name!r}{others} in {where}: {error}'
      ) from None


def _training_views(source: Source, example: int, stream: Stream, rng: np.random.Generator) -> dict[str, View]:
  num_frames, height, width = (int(x[example]) for x in (source.num_frames, source.height, source.width))
  size = stream.height_width
  can_flip = source.flip
  if source.flip_labels is not None:
    classes = source.label[[example]] if source.labels is None else label_sets.of(source.labels, example)
    can_flip &= all(source.flip_labels[c] >= 0 for c in classes if c >= 0)
  if stream.views is not None:
    frames = stream.views(num_frames, rng)
  elif source.sampler == 'dense':
    frames = {'clip': sampling.dense(num_frames, stream.num_frames, _step(source, example), rng, loop=source.loop)}
  else:
    frames = {'clip': sampling.segments(num_frames, stream.num_frames, rng)}
  views = {}
  for name in sorted(frames):
    if source.short_side is None:
      box = sampling.random_resized_crop(height, width, rng, source.crop_scale, source.crop_ratio, size[1] / size[0])
    else:
      box = sampling.short_side_crop(height, width, rng, source.short_side, size)
    flip = bool(rng.random() < 0.5) and can_flip
    if views and source.flip_labels is not None:
      flip = next(iter(views.values())).flip  # the example has one label
    warp = affine.random_rotation(rng, source.rotation, size) if source.rotation else None
    if stream.rand_augment is not None:
      operations = affine.random_operations(rng, stream.rand_augment, size)
      warp = warp if operations is None else affine.then(warp, operations)
    views[name] = View(np.asarray(frames[name], np.int64), box, flip, warp)
  return views


def _test_views(source: Source, example: int, stream: Stream) -> dict[str, View]:
  num_frames, height, width = (int(x[example]) for x in (source.num_frames, source.height, source.width))
  length, count = stream.num_frames, source.test_clips
  if stream.views is not None:
    of_clips = [stream.views(num_frames, None)]
  elif source.sampler == 'dense':
    places = np.linspace(0, 1, count) if count > 1 else [0.5]
    step = _step(source, example)
    of_clips = [{'clip': sampling.dense(num_frames, length, step, loop=source.loop, place=p)} for p in places]
  else:
    of_clips = [{'clip': sampling.segments(num_frames, length, place=(k + 0.5) / count)} for k in range(count)]
  boxes = sampling.protocol_crops(height, width, stream.height_width, source.test_crops, source.test_crop_fraction)
  return {
    f'{name}/{i * len(boxes) + j:03}': View(np.asarray(frames[name], np.int64), box, flip)
    for name in sorted(of_clips[0])
    for i, frames in enumerate(of_clips)
    for j, (box, flip) in enumerate(boxes)
  }


def _step(source: Source, example: int) -> float:
  """Stored frames from one frame of a dense clip to the next."""
  fps = float(source.fps[example]) if source.target_fps else 0.0
  return sampling.step_of(source.stride, fps, source.target_fps)
