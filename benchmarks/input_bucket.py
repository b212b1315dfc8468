"""How many clips a second come from a bucket, by how many are asked for at a time?

    python -m benchmarks.input_bucket [--delay=0.03] [--seconds=5]

The embedded videos are copied with their index into a bucket on this machine (`benchmarks/bucket_server.py`, a process
of its own), which takes `delay` seconds longer for each request. Clips of 8 frames of random examples are read by 1, 8
and 64 threads; then by the training's own loader, which decodes them, too. A clip is one request. What is measured is
how waiting is hidden: a loopback interface has no bandwidth to speak of, and client and server share the cores.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines import flags, paths, sources
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.views import Stream
from data_pipelines.sources import open_tfds

IN_FLIGHT = (1, 8, 64)
_FRAMES, _BATCH = 8, 64
_DATASET = {'dataset': 'moving_digits/moments', 'train': 'train'}


def serve(delay: float) -> subprocess.Popen:
  """Starts a bucket, and lets this process use it."""
  command = [sys.executable, '-m', 'benchmarks.bucket_server', f'--delay={delay}']
  server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  for line in iter(server.stdout.readline, '\n'):
    if not line:
      raise UserError("The bucket did not start: pip install '.[test]' brings what it needs.")
    name, _, value = line.strip().removeprefix('export ').partition('=')
    os.environ[name] = value
  return server


def copy() -> sources.Source:
  """The source in the bucket."""
  local = open_tfds.open_source('clips', _DATASET, 'train')
  folder = os.path.dirname(local.frames.files[0])
  name = '/'.join(folder.split(os.sep)[-3:])  # data set, config, version
  paths.upload(folder, f'gs://tests/{name}')
  return open_tfds.open_source('clips', _DATASET | {'data_dir': 'gs://tests'}, 'train')


def by_threads(source: sources.Source, threads: int, seconds: float) -> float:
  """Clips a second."""
  rng = np.random.default_rng(0)
  examples = rng.integers(0, source.num_examples, 100_000).tolist()

  def read(example: int) -> None:
    numbers = np.linspace(0, source.num_frames[example] - 1, _FRAMES).astype(int)
    sources.read(source, example, numbers)

  with ThreadPoolExecutor(threads) as pool:
    list(pool.map(read, examples[:threads]))  # connections are made
    done, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
      list(pool.map(read, examples[done : done + 4 * threads]))
      done += 4 * threads
    return done / (time.perf_counter() - began)


def by_loader(source: sources.Source, seconds: float) -> float:
  """Clips a second, decoded and cut to 64 x 64."""
  batches: Iterator = loader.train_batches([source], {'v': Stream((0,), _FRAMES, 64, _BATCH)}, 0)
  for _ in range(3):  # what was read ahead does not count
    next(batches)
  done, began = 0, time.perf_counter()
  while time.perf_counter() < began + seconds:
    next(batches)
    done += _BATCH
  return done / (time.perf_counter() - began)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.input_bucket', __doc__)
  to.add_argument('--delay', type=float, default=0.03, help='seconds added to each request (default: 0.03)')
  to.add_argument('--seconds', type=float, default=5.0, help='of each measurement (default: 5)')
  return to


def run(options: argparse.Namespace) -> None:
  """Measures, and prints a table."""
  server = serve(options.delay)
  try:
    source = copy()
    print(f'| clips in flight | clips/s, {1000 * options.delay:.0f} ms added to each request |\n| --- | --- |')
    for threads in IN_FLIGHT:
      print(f'| {threads} | {by_threads(source, threads, options.seconds):.0f} |', flush=True)
    print(f"| the training's loader | {by_loader(source, options.seconds):.0f} |")
  finally:
    server.stdin.close()
    server.wait()


def main() -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: run(flags.parse(parser())))


if __name__ == '__main__':
  sys.exit(main())
