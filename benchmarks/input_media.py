"""The clips that `benchmarks.input` reads, in every form its contestants want them: mp4, JPEG folders, TFDS.

All videos of one length are copies: what they show does not change what reading them costs. Content is a video of the
user's, played to and fro, or a textured scene with moving patches drawn here, whose JPEG frames weigh about what those
of Kinetics do.
"""

import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.media import compact, video_files

FPS = 30
HEIGHT, WIDTH = 256, 340
JPEG_QUALITY = 85
_LONGEST = 600  # frames of the user's video that are used
_FORMS = {'mp4': 250, 'key8': 8}  # frames from one key frame to the next


def scene(seed: int = 0) -> Iterator[np.ndarray]:
  """Endless uint8 frames [256, 340, 3]: a camera pans over 1/f texture, as photographs have, behind moving patches."""
  rng = np.random.default_rng(seed)
  size = 512
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
  frequency[0, 0] = 1
  texture = np.fft.ifft2(np.exp(2j * np.pi * rng.random((3, size, size))) / frequency**1.5).real
  texture /= texture.std((1, 2), keepdims=True)
  texture_HxWx3 = np.clip(128 + 48 * (0.8 * texture[:1] + 0.2 * texture), 0, 255).astype(np.uint8).transpose(1, 2, 0)
  room = np.array([HEIGHT - 48, WIDTH - 48])
  patches = [(rng.random(2) * room, rng.normal(0, 2, 2), rng.integers(0, 128, 3, np.uint8)) for _ in range(4)]
  for number in itertools.count():
    angle = 2 * np.pi * number / 300
    top, left = int(120 + 100 * np.sin(angle)), int(80 + 70 * np.cos(angle))
    frame = texture_HxWx3[top : top + HEIGHT, left : left + WIDTH].copy()
    for place, speed, colour in patches:
      y, x = ((place + number * speed) % room).astype(int)
      frame[y : y + 48, x : x + 48] = frame[y : y + 48, x : x + 48] // 2 + colour
    yield frame


def prepare(folder: Path, seconds: int, count: int, video: str | None) -> dict[str, int]:
  """Writes `count` videos of a length in every form, unless they are there.

  Args:
    folder: to write into: mp4/, key8/ (a key frame every 8 frames), frames/<video>/<number>.jpg, tfds/.
    seconds: of each video.
    count: videos.
    video: a file to take the content from; None: the drawn scene.

  Returns:
    Bytes a video by form.
  """
  done = folder / 'done.json'
  what = [seconds, count, video]
  if done.exists():
    known = json.loads(done.read_text(encoding='utf-8'))
    if known['what'] == what:
      return known['bytes']
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  frames = list(itertools.islice(_content(video), seconds * FPS))
  for form, gap in _FORMS.items():
    (folder / form).mkdir()
    _encode(folder / form / '000.mp4', frames, gap)
    for i in range(1, count):
      shutil.copy(folder / form / '000.mp4', folder / form / f'{i:03d}.mp4')
  unique = {id(frame): frame for frame in frames}  # to and fro: each is encoded once
  jpegs = {key: _jpeg(frame) for key, frame in unique.items()}
  encoded = [jpegs[id(frame)] for frame in frames]
  for i in range(count):
    (folder / 'frames' / f'{i:03d}').mkdir(parents=True)
    for number, data in enumerate(encoded):
      (folder / 'frames' / f'{i:03d}' / f'{number:05d}.jpg').write_bytes(data)
  stored, shape = compact.encode(frames, FPS)
  _write_tfds(folder / 'tfds', encoded, compact.values(stored, shape), count)
  sizes = {form: os.path.getsize(folder / form / '000.mp4') for form in _FORMS}
  sizes |= {'jpeg': sum(map(len, encoded)), 'compact': len(stored)}
  done.write_text(json.dumps({'what': what, 'bytes': sizes}), encoding='utf-8')
  return sizes


def _content(video: str | None) -> Iterator[np.ndarray]:
  source = scene() if video is None else (frame.pixels() for frame in video_files.frames(video))
  first = [Image.fromarray(pixels) for pixels in itertools.islice(source, _LONGEST)]
  scale = HEIGHT / min(first[0].size)
  size = tuple(round(side * scale / 2) * 2 for side in first[0].size)
  fitted = [np.asarray(image if image.size == size else image.resize(size)) for image in first]
  return itertools.cycle(fitted + fitted[::-1])  # no cut that would cost the encoder a key frame


def _encode(path: Path, frames: Sequence[np.ndarray], gap: int) -> None:
  height, width = frames[0].shape[:2]
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('libx264', rate=Fraction(FPS), options={'crf': '23', 'preset': 'veryfast'})
    stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, 'yuv420p', gap
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
    container.mux(stream.encode())


def _jpeg(frame: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(frame).save(out, 'JPEG', quality=JPEG_QUALITY)
  return out.getvalue()


def _write_tfds(data_dir: Path, encoded: list[bytes], stored: dict, count: int) -> None:
  video = {'video': tfds.features.Video(shape=(None, None, None, 3), encoding_format='jpeg')}

  class BenchFrames(_BenchBuilder, skip_registration=True):
    """JPEG frames, the same bytes as in the folders."""

    features, example, examples = video, {'video': encoded}, count

  class BenchCompact(_BenchBuilder, skip_registration=True):
    """The compact tier."""

    features, example, examples = compact.features(), stored, count

  for builder in (BenchFrames, BenchCompact):
    builder(data_dir=data_dir).download_and_prepare()


class _BenchBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {**self.features, 'label': tfds.features.ClassLabel(num_classes=8)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(self.examples):
      yield i, {**self.example, 'label': i % 8}
