"""From listed clips to TFRecord files: which clip goes into which file, and writing one file.

Every file ('shard') has a spec in the folder `shards` beside it, which names its clips and how they are stored, and
once it is written an outcome. `write_shard` needs nothing but a path, so that a thread here and a worker of a Beam
cluster do the same. A clip's place follows from the hash of its id: one more or less changes one shard, not all.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from data_pipelines import durable
from data_pipelines.builders.listing import Clip
from data_pipelines.media import compact
from data_pipelines.media.transcode import Decoder, Failure, Media, Settings

NOTES = 'shards'  # folder of specs and outcomes

# Enough files to keep some cores busy with a small dataset, few enough for a large one.
_SHARDS, _FEWEST = 64, 16
_MOST = {'video': 256, 'image': 4096}  # examples; at most some GB


class Lost(NamedTuple):
  """A clip that is not in the data.

  Attributes:
    id, path, line: of the clip; path '' where there is no file.
    reason: one sentence.
  """

  id: str
  path: str
  line: str
  reason: str


class Outcome(NamedTuple):
  """What a written shard holds.

  Attributes:
    num_examples: in the file.
    num_bytes: of the examples.
    lost: the clips that are not in it.
    stamps: per clip of the spec [bytes, time of change in ns] of its file; None where there was none.
  """

  num_examples: int
  num_bytes: int
  lost: list[Lost]
  stamps: list[list[int] | None]


LABEL_KEY = {'one': 'label', 'several': 'labels'}  # the feature, by how many labels an example has


def features(
  modality: str, class_names: Sequence[str] | None, storage: str = 'jpeg', labels: str = 'one'
) -> dict[str, Any]:
  """The TFDS features of an example; without class names, their number is open, too."""
  text, label = tfds.features.Text, tfds.features.ClassLabel(names=class_names)
  names = {
    LABEL_KEY[labels]: label if labels == 'one' else tfds.features.Sequence(label),
    'id': text(),
    'video_id': text(),
    'file_sha256': text(),
  }
  if modality == 'image':
    return {'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')} | names
  numbers = {'fps': np.float32, 'original_fps': np.float32, 'duration': np.float32, 'num_frames': np.int64}
  if storage == 'mp4':
    return compact.features() | names | numbers
  return {'video': tfds.features.Video(shape=(None, None, None, 3), encoding_format='jpeg')} | names | numbers


def assign(clips: Sequence[Clip], modality: str, num_shards: int | None = None) -> list[list[Clip]]:
  """Deals clips out to shards, in an order that is random and the same on every machine.

  Args:
    clips: of one split, with distinct ids.
    modality: 'video' or 'image'.
    num_shards: None: by the number of clips, a power of two, so that it seldom changes when clips are added.
  """
  if num_shards is None:
    size = min(max(len(clips) / _SHARDS, _FEWEST), _MOST[modality])
    num_shards = 1
    while num_shards * size < len(clips):
      num_shards *= 2
  shards = [[] for _ in range(num_shards)]
  for place, clip in ordered(clips):
    shards[place % num_shards].append(clip)
  return shards


def ordered(clips: Sequence[Clip]) -> list[tuple[int, Clip]]:
  """(hash of the id, clip), by the hash."""
  hashed = lambda clip: int.from_bytes(hashlib.sha256(clip.id.encode()).digest()[:8])
  return sorted(((hashed(clip), clip) for clip in clips), key=lambda pair: pair[0])


def write_spec(shard: str, clips: Sequence[Clip], settings: Settings) -> bool:
  """Says beside a shard what it has to hold.

  Args:
    shard: path of the TFRecord file.
    clips: that it holds.
    settings: how they are stored.

  Returns:
    Whether the shard is there already, made of the same clips from files that have not changed since.
  """
  # With the names of the features: a build of a version that wrote others does not go on, but anew.
  names = sorted(features(settings.modality, None, settings.storage, _labels(clips)))
  text = json.dumps({'settings': dataclasses.asdict(settings), 'features': names, 'clips': clips})
  spec = _note(shard, 'spec')
  spec.parent.mkdir(exist_ok=True)
  with contextlib.suppress(FileNotFoundError):
    same = spec.read_text() == text and os.path.exists(shard)
    if same and [_stamp(c.path) for c in clips] == read_outcome(shard).stamps:
      return True
    _note(shard, 'outcome').unlink(missing_ok=True)
  spec.write_text(text)
  return False


def _labels(clips: Sequence[Clip]) -> str:
  return 'one' if all(isinstance(clip.label, int) for clip in clips) else 'several'


def read_outcome(shard: str) -> Outcome:
  """What became of a shard.

  Raises:
    FileNotFoundError: it is not written yet.
  """
  num_examples, num_bytes, lost, stamps = json.loads(_note(shard, 'outcome').read_text())
  return Outcome(num_examples, num_bytes, [Lost(*x) for x in lost], stamps)


def write_shard(shard: str, note: Callable[[Lost | None], None] = lambda lost: None) -> Outcome:
  """Writes one TFRecord file as its spec says; it appears, whole, at the end.

  Args:
    shard: path of the file.
    note: called after each clip; what it raises ends the work.

  Raises:
    OSError: the file cannot be written.
    transcode.Interrupted: the decoder was told to stop.
  """
  spec = json.loads(_note(shard, 'spec').read_text())
  clips, settings = [Clip(*c) for c in spec['clips']], Settings(**spec['settings'])
  num_examples, num_bytes, lost, stamps = 0, 0, [], []
  temporary = f'{shard}.{uuid.uuid4().hex}.tmp'
  try:
    with tf.io.TFRecordWriter(temporary) as writer, Decoder() as decode:
      for clip in clips:
        stamps.append(_stamp(clip.path))
        found = _transcoded(clip, stamps[-1], settings, decode)
        if isinstance(found, Lost):
          lost.append(found)
          note(found)
          continue
        example = _serialized(_example(clip, *found, settings))
        writer.write(example)
        num_examples, num_bytes = num_examples + 1, num_bytes + len(example)
        note(None)
    durable.flush(temporary)
    os.replace(temporary, shard)
    durable.flush_folder(os.path.dirname(shard))
  except tf.errors.OpError as error:
    raise OSError(f'{shard} cannot be written: {error.message}') from None
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
  outcome = Outcome(num_examples, num_bytes, lost, stamps)
  durable.write(_note(shard, 'outcome'), json.dumps(outcome))
  return outcome


def _transcoded(clip: Clip, stamp: list[int] | None, settings: Settings, decode: Decoder) -> tuple[Media, str] | Lost:
  """The file of a clip and its SHA-256."""
  if clip.path is None or stamp is None:
    return Lost(clip.id, clip.path or '', clip.line, 'there is no such file')
  if not stamp[0]:  # as pipes and devices are, too
    reason = 'the file is empty' if os.path.isfile(clip.path) else 'it is not a regular file'
    return Lost(clip.id, clip.path, clip.line, reason)
  try:
    media = decode(clip.path, settings)
  except Failure as failure:
    return Lost(clip.id, clip.path, clip.line, str(failure))
  try:
    with open(clip.path, 'rb') as f:  # all of it: the decoder has just read it, so it costs no disk
      sha256 = hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as error:
    return Lost(clip.id, clip.path, clip.line, f'the file cannot be read ({error.strerror})')
  # Pillow has read what is kept byte for byte; it is another decoder that will read it in training.
  kept = settings.modality == 'image' and hashlib.sha256(media.frames[0]).hexdigest() == sha256
  if kept and (reason := _refusal(media.frames[0])):
    return Lost(clip.id, clip.path, clip.line, reason)
  return media, sha256


def _refusal(jpeg: bytes) -> str:
  """Why the loader (`decode`) cannot read a JPEG; '' if it can."""
  try:
    tf.io.decode_jpeg(jpeg, channels=3, dct_method='INTEGER_ACCURATE')
  except tf.errors.OpError as error:
    reason = re.sub(r'\{\{.*?\}\}\s*|\s*\[Op:\w+\].*', '', error.message.splitlines()[0])
    return f'its JPEG data are damaged: TensorFlow, which reads them in training, says {reason!r}'
  return ''


def _example(clip: Clip, media: Media, sha256: str, settings: Settings) -> dict[str, list]:
  """The values of `features`."""
  texts = {'id': clip.id, 'video_id': clip.video_id, 'file_sha256': sha256}
  labels = {'label': [clip.label]} if isinstance(clip.label, int) else {'labels': list(clip.label)}
  names = labels | {k: [v.encode()] for k, v in texts.items()}
  if settings.modality == 'image':
    return names | {'image': media.frames}
  numbers = {k: [getattr(media, k)] for k in ('fps', 'original_fps', 'duration', 'num_frames')}
  if settings.storage == 'mp4':
    return names | numbers | {k: [v] for k, v in compact.values(media.frames[0], media.shape).items()}
  return names | numbers | {'video': media.frames}


def _serialized(values: Mapping[str, list]) -> bytes:
  """A tf.train.Example as TFDS makes it, but the same bytes each time."""
  example = tf.train.Example()
  for name, value in values.items():
    feature = example.features.feature[name]
    if not value:  # an empty set of labels: a list of integers all the same
      feature.int64_list.SetInParent()
      continue
    kinds = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}
    kinds[type(value[0])].value.extend(value)
  return example.SerializeToString(deterministic=True)  # features are a map, without an order of its own


def _stamp(path: str | None) -> list[int] | None:
  try:
    found = os.stat(path) if path is not None else None
  except OSError:
    return None
  return found and [found.st_size, found.st_mtime_ns]


def _note(shard: str, kind: str) -> Path:
  return Path(shard).parent / NOTES / f'{Path(shard).name}.{kind}.json'
