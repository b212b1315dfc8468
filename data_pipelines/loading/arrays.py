"""Batches of arrays in memory, without TensorFlow: the same plan, cropped and resized by Pillow.

For training, benchmarks and tests where TensorFlow is absent. Data order, frames, boxes and flips are those of
`loader`; the pixels differ, since Pillow antialiases where TensorFlow's bilinear resize does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from data_pipelines.clips import affine
from data_pipelines.contract import Batch, SubBatch
from data_pipelines.loading import loader
from data_pipelines.loading.loader import Rows
from data_pipelines.loading.views import Stream, View, label_of, labels_of, plan, target_of
from data_pipelines.sources import Source, label_sets


def array_source(
  name: str,
  videos: Sequence[np.ndarray],
  labels: Sequence[int] | Sequence[Sequence[int]] | None = None,
  class_names: tuple[str, ...] = (),
  modality: str = 'video',
  **settings,
) -> Source:
  """A source of uint8 arrays [num_frames, height, width, 3] (an image has one frame); settings as in `Source`.

  Labels are a class for each example, or a sequence of classes for each: `label_sets`.
  """
  num_frames, height, width, _ = np.array([v.shape for v in videos], np.int64).T
  label = np.full(len(videos), -1, np.int32)
  if labels is not None and any(np.ndim(one) for one in labels):
    settings['labels'] = label_sets.of_lists(labels)
  elif labels is not None:
    label = np.array(labels, np.int32)
  rows = np.arange(len(videos))
  return Source(name, modality, class_names, label, num_frames, height, width, videos, rows, **settings)


def array_batches(
  sources: Sequence[Source],
  streams: Mapping[str, Stream],
  seed: int,
  *,
  start_step: int = 0,
  num_steps: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """`loader.train_batches` of sources made by `array_source`."""
  mixtures = {name: loader.stream_mixture(name, sources, stream, seed) for name, stream in streams.items()}
  for name, stream in streams.items():
    members = [sources[i] for i in stream.sources]
    loader.check_stream(f'stream {name!r}', members, stream, stream.batch_size, process_count)

  def batch(step):
    out = {}
    for name, stream in streams.items():
      rows = loader.train_rows(stream, mixtures[name], step, process_index, process_count)
      rng = lambda position, mixture=mixtures[name]: loader.augmentation_rng(mixture, position)
      out[name] = _sub_batch(sources, stream, rows, rng)
    return out

  stop = np.iinfo(np.int64).max if num_steps is None else start_step + num_steps
  return map(batch, range(start_step, stop))


def array_eval_batches(
  source: Source,
  source_id: int,
  stream: Stream,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[SubBatch]:
  """`loader.eval_batches` of a source made by `array_source`."""
  loader.check_stream(f'the evaluation of {source.name!r}', [source], stream, batch_size, process_count)

  def batch(step):
    n = source.num_examples
    rows = loader.eval_rows(n, source_id, batch_size, step, process_index, process_count)
    return loader.stack_views(_sub_batch({source_id: source}, stream, rows, lambda position: None))

  return map(batch, range(-(-source.num_examples // batch_size)))


def _sub_batch(
  sources: Sequence[Source] | Mapping[int, Source],
  stream: Stream,
  rows: Rows,
  make_rng: Callable[[int], np.random.Generator | None],
) -> SubBatch:
  labels, video_ids, clips, planned = [], [], [], []
  for position, s, example in zip(rows.position, rows.source, rows.example, strict=True):
    source = sources[int(s)]
    views = plan(source, int(example), stream, make_rng(int(position)))
    frames = source.frames[source.rows[example]]
    clips.append({name: _clip(frames, view, stream.height_width) for name, view in views.items()})
    labels.append(label_of(source, int(example), views))
    video_ids.append(source.video_id[example])
    planned.append((source, int(example), views))
  return {
    'views': {name: np.stack([c[name] for c in clips]) for name in clips[0]},
    'targets': {
      target: {name: np.stack([target_of(target, s, e, v[name]) for s, e, v in planned]) for name in clips[0]}
      for target in stream.targets
    },
    'label': np.where(rows.mask, np.array(labels, np.int32), np.int32(-1)),
    **({'labels': _labels(stream, rows, planned)} if stream.label_width else {}),
    'source': rows.source,
    'mask': rows.mask,
    'example_id': np.where(rows.mask, rows.example, -1).astype(np.int32),
    'video_id': np.where(rows.mask, np.array(video_ids, np.int32), np.int32(-1)),
  }


def _labels(stream: Stream, rows: Rows, planned: Sequence[tuple[Source, int, Mapping[str, View]]]) -> np.ndarray:
  labels_BxK = np.stack([labels_of(*one, stream.label_width) for one in planned])
  return np.where(rows.mask[:, None], labels_BxK, np.int8(-1))


def _clip(frames: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
  top, left, height, width = view.box
  box = (left, top, left + width, top + height)
  shape = (size[1], size[0])
  resize = lambda frame: Image.fromarray(frame).resize(shape, Image.Resampling.BILINEAR, box)
  clip = np.stack([np.asarray(resize(frames[i])) for i in view.frames])
  clip = clip[:, :, ::-1] if view.flip else clip
  if view.affine is None:
    return clip
  # Pillow counts from the corner of the first pixel, `affine` from its centre.
  linear, shift = view.affine[:, :2], view.affine[:, 2]
  rows = np.column_stack([linear, shift + 0.5 - 0.5 * linear.sum(axis=1)])
  how = {'method': Image.Transform.AFFINE, 'data': tuple(rows.ravel()), 'fillcolor': (affine.FILL,) * 3}
  warp = lambda frame: Image.fromarray(frame).transform(shape, resample=Image.Resampling.BILINEAR, **how)
  return np.stack([np.asarray(warp(frame)) for frame in clip])
