"""The readers that `benchmarks.input` compares: each gives the same clips, and runs in a process of its own.

    python -m benchmarks.input_contestants NAME FOLDER START_STEP

Answers on stdout, one JSON object a line: first {'first_batch': seconds}, then for each number n on
stdin {'seconds': what n batches took}; or {'absent': why} where a package is missing.

A clip is 8 frames, 32 apart, of a random box resized to 224 x 224, uint8; a batch is 8 clips. The peers read files in
the workers of a PyTorch DataLoader, one worker a core, and resize with OpenCV, the fastest way that each has.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipelines.clips import sampling
from data_pipelines.sources import open_tfds

FRAMES, STRIDE, SIZE, BATCH = 8, 32, 224, 8
CROP_SCALE = (0.3, 1.0)
SOURCES = 8  # of the mixture

Reader = Callable[[str, np.random.Generator], np.ndarray]  # (path, rng) -> uint8 [FRAMES, SIZE, SIZE, 3]


# Ours.


def _ours(folder: Path, start_step: int, dataset: str, count: int = 1) -> Iterator:
  from data_pipelines.loading import loader
  from data_pipelines.loading.views import Stream

  config = {'dataset': dataset, 'train': 'train', 'data_dir': str(folder / 'tfds'), 'stride': STRIDE}
  config['crop_scale'] = CROP_SCALE
  opened = [open_tfds.open_source(f'source {i}', config, 'train') for i in range(count)]
  stream = Stream(tuple(range(count)), FRAMES, SIZE, BATCH)
  return loader.train_batches(opened, {'video': stream}, 0, start_step=start_step)


def ours(folder: Path, start_step: int) -> Iterator:
  import tensorflow  # noqa: F401  so that importing it is not counted

  return _ours(folder, start_step, 'bench_frames')


def ours_eight_sources(folder: Path, start_step: int) -> Iterator:
  import tensorflow  # noqa: F401

  return _ours(folder, start_step, 'bench_frames', SOURCES)


def ours_compact(folder: Path, start_step: int) -> Iterator:
  import tensorflow  # noqa: F401

  return _ours(folder, start_step, 'bench_compact')


# TFDS as its guide says.


def tfds_skip_decoding(folder: Path, start_step: int) -> Iterator:
  import tensorflow as tf
  import tensorflow_datasets as tfds

  del start_step
  builder = tfds.builder('bench_frames', data_dir=folder / 'tfds')
  skip = {'video': tfds.decode.SkipDecoding()}
  read = tfds.ReadConfig(try_autocache=False)
  dataset = builder.as_dataset('train', decoders=skip, shuffle_files=True, read_config=read).repeat()

  def plan(num_frames, shape):
    rng = np.random.default_rng()
    box = sampling.random_resized_crop(int(shape[0]), int(shape[1]), rng, CROP_SCALE)
    return sampling.dense(int(num_frames), FRAMES, STRIDE, rng), np.array(box, np.int32)

  def clip(example):
    video = example['video']
    shape = tf.io.extract_jpeg_shape(video[0])
    numbers, box = tf.numpy_function(plan, (tf.size(video), shape), (tf.int64, tf.int32))
    frames = tf.gather(video, tf.ensure_shape(numbers, (FRAMES,)))
    box = tf.ensure_shape(box, (4,))
    pixels = tf.stack([tf.io.decode_and_crop_jpeg(frames[i], box, channels=3) for i in range(FRAMES)])
    return tf.cast(tf.round(tf.image.resize(pixels, (SIZE, SIZE))), tf.uint8), example['label']

  # A shuffle buffer of whole videos, as small as is still a shuffle.
  dataset = dataset.shuffle(16).map(clip, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
  return dataset.as_numpy_iterator()


# PyTorch DataLoaders.


def _data_loader(paths: list[str], read: Reader) -> Iterator:
  import cv2
  import torch

  class Clips(torch.utils.data.Dataset):
    def __len__(self):
      return 1 << 30

    def __getitem__(self, index):
      rng = np.random.default_rng(index)
      return read(paths[int(rng.integers(len(paths)))], rng), 0

  def start(worker):
    del worker
    cv2.setNumThreads(0)
    torch.set_num_threads(1)

  loader = torch.utils.data.DataLoader(
    Clips(), BATCH, num_workers=len(os.sched_getaffinity(0)), prefetch_factor=4, worker_init_fn=start
  )
  return iter(loader)


def _cropped(frames, rng: np.random.Generator) -> np.ndarray:
  import cv2

  box = None
  clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
  for i, frame in enumerate(frames):
    box = box or sampling.random_resized_crop(*frame.shape[:2], rng, CROP_SCALE)
    top, left, height, width = box
    cv2.resize(frame[top : top + height, left : left + width], (SIZE, SIZE), clip[i])
  return clip


def jpeg_folder(folder: Path, start_step: int) -> Iterator:
  import cv2

  del start_step

  def read(path, rng):
    names = counts[path]
    decode = lambda n: cv2.cvtColor(cv2.imread(f'{path}/{names[n]}'), cv2.COLOR_BGR2RGB)
    return _cropped(map(decode, sampling.dense(len(names), FRAMES, STRIDE, rng)), rng)

  paths = sorted(str(p) for p in (folder / 'frames').iterdir())
  counts = {p: sorted(os.listdir(p)) for p in paths}
  return _data_loader(paths, read)


def pyav(folder: Path, start_step: int) -> Iterator:
  import av

  del start_step

  def read(path, rng):
    with av.open(path) as container:
      stream = container.streams.video[0]
      wanted = sampling.dense(stream.frames, FRAMES, STRIDE, rng).tolist()
      tick = 1 / (stream.average_rate * stream.time_base)
      container.seek(int(wanted[0] * tick), stream=stream)  # to the key frame before
      found = {}
      for frame in container.decode(stream):
        number = round(frame.pts / tick)
        if number in wanted:
          found[number] = frame.to_ndarray(format='rgb24')
        if number >= wanted[-1]:
          break
    return _cropped((found[n] for n in wanted), rng)

  return _data_loader(_videos(folder, 'mp4'), read)


def decord(folder: Path, start_step: int) -> Iterator:
  import decord

  del start_step

  def read(path, rng):
    reader = decord.VideoReader(path, num_threads=1)
    return _cropped(reader.get_batch(sampling.dense(len(reader), FRAMES, STRIDE, rng)).asnumpy(), rng)

  return _data_loader(_videos(folder, 'mp4'), read)


def _torchcodec(folder: Path, form: str) -> Iterator:
  from torchcodec.decoders import VideoDecoder

  def read(path, rng):
    decoder = VideoDecoder(path, dimension_order='NHWC', num_ffmpeg_threads=1, seek_mode='approximate')
    wanted = sampling.dense(decoder.metadata.num_frames, FRAMES, STRIDE, rng).tolist()
    return _cropped(decoder.get_frames_at(wanted).data.numpy(), rng)

  return _data_loader(_videos(folder, form), read)


def torchcodec(folder: Path, start_step: int) -> Iterator:
  del start_step
  return _torchcodec(folder, 'mp4')


def torchcodec_key8(folder: Path, start_step: int) -> Iterator:
  del start_step
  return _torchcodec(folder, 'key8')


def _videos(folder: Path, form: str) -> list[str]:
  return sorted(str(p) for p in (folder / form).glob('*.mp4'))


OURS = (ours, ours_eight_sources, ours_compact)
PEERS = (jpeg_folder, decord, tfds_skip_decoding, torchcodec_key8, torchcodec, pyav)


def main(name: str, folder: str, start_step: str) -> None:
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what libraries print is no answer
  say = lambda **answer: print(json.dumps(answer), file=answers, flush=True)
  contestant = next(c for c in (*OURS, *PEERS) if c.__name__ == name)
  try:
    begin = time.monotonic()
    batches = contestant(Path(folder), int(start_step))
    first = next(batches)
    say(first_batch=time.monotonic() - begin)
  except (ImportError, OSError) as e:  # the latter from torchcodec where there is no FFmpeg
    say(absent=str(e).strip().splitlines()[0])
    return
  del first
  for line in sys.stdin:
    begin = time.monotonic()
    for _ in range(int(line)):
      next(batches)
    say(seconds=time.monotonic() - begin)
  os._exit(0)  # workers of the loaders end with their parent


if __name__ == '__main__':
  main(*sys.argv[1:])
