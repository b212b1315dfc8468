"""What it costs that no damaged bit is used: CPU of the checks, next to that of the clips and of the index.

    python -m benchmarks.stored_bits --output=DIR [--video=FILE] [--count=24] [--rounds=5]

makes videos of 10 s as `benchmarks.input` does, as JPEG frames and in the compact tier, and prints medians over the
rounds of CPU time, which other work on the machine disturbs less than the time that passes. About 3 minutes.
"""

import argparse
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import input_contestants, input_media
from benchmarks.input import Contestant
from data_pipelines import flags, inspect, sources
from data_pipelines.clips import sampling
from data_pipelines.sources import open_tfds
from data_pipelines.storage import crc32c, frame_index, reading
from data_pipelines.storage.layout import FrameIndex

_KINDS = {'ours': 'bench_frames', 'ours_compact': 'bench_compact'}
_CLIPS = 200


def cpu(function: Callable[[], None], rounds: int) -> float:
  """Median CPU seconds."""
  seconds = []
  for _ in range(rounds):
    begin = time.process_time()
    function()
    seconds.append(time.process_time() - begin)
  return float(np.median(seconds))


def check_of_a_clip(source: sources.Source, rounds: int) -> tuple[float, float]:
  """(CPU seconds to compare what a clip reads with the index, bytes of that)."""
  rng = np.random.default_rng(0)
  read = []
  for _ in range(_CLIPS):
    example = rng.integers(source.num_examples)
    numbers = sampling.dense(source.num_frames[example], input_contestants.FRAMES, input_contestants.STRIDE, rng)
    stored = np.unique(numbers) if source.decode is None else np.zeros(1, np.int64)
    read.append((source.rows[example], stored, source.frames.storage.read(source.frames, source.rows[example], stored)))

  def check():
    for row, stored, found in read:
      expected = source.frames.checksum[source.frames.pointer[row] + stored].tolist()
      assert [zlib.crc32(frame) for frame in found] == expected

  return cpu(check, rounds) / _CLIPS, sum(len(f) for _, _, found in read for f in found) / _CLIPS


def measure(folder: Path, name: str, rounds: int) -> dict[str, float]:
  """Figures of one kind of storage."""
  config = {'dataset': _KINDS[name], 'data_dir': str(folder / 'tfds'), 'train': 'train'}
  source = open_tfds.open_source('s', config, 'train')
  index = source.frames
  contestant = Contestant(name, folder, sys.executable)
  whole = np.median([contestant.turn(3)['cpu_ms'] / 1e3 for _ in range(rounds)])
  contestant.close()
  seconds, read = check_of_a_clip(source, rounds)
  gigabytes = sum(map(os.path.getsize, index.files)) / 1e9
  records = [data for file in index.files for data, _ in reading.storage_of([file]).records(file)]
  a_gigabyte = lambda function: cpu(function, rounds) / gigabytes
  frames = [f for row in range(len(index.shard)) for f in index.storage.read(index, row, _all(index, row))]
  size_of = frame_index._image_size if source.decode is None else lambda *_: (0, 0)
  return {
    'kB a clip that are compared': read / 1e3,
    'CPU ms a clip for that': seconds * 1e3,
    'CPU ms a clip in all': whole * 1e3,
    '% of the clip': 100 * seconds / whole,
    'bytes of an example in the index': sum(getattr(index, k).nbytes for k in ('length', 'checksum'))
    / len(index.shard),
    '... of them checksums': index.checksum.nbytes / len(index.shard),
    'bytes of an example in the data': gigabytes * 1e9 / len(index.shard),
    'CPU s a GB to index': a_gigabyte(lambda: frame_index._build(index.files, 'video', index.storage, size_of)),
    "... of them for the records' CRC-32C": a_gigabyte(lambda: [crc32c.crc32c(r) for r in records]),
    "... of them for the frames' CRC-32": a_gigabyte(lambda: [zlib.crc32(f) for f in frames]),
    'CPU s a GB of --verify': a_gigabyte(lambda: [inspect._check(f, len(records)) for f in index.files]),
  }


def _all(index: FrameIndex, row: int) -> np.ndarray:
  return np.arange(index.pointer[row + 1] - index.pointer[row])


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.stored_bits', __doc__)
  to.add_argument('--output', required=True, help='folder for the videos')
  to.add_argument('--video', help='to take the content from; drawn if absent')
  to.add_argument('--count', type=int, default=24, help='videos')
  to.add_argument('--rounds', type=int, default=5)
  return to


def main(argv: Sequence[str] | None = None) -> None:
  options = flags.parse(parser(), argv)
  folder = Path(options.output, 'videos_10s').resolve()
  input_media.prepare(folder, 10, options.count, options.video)
  frames, compact = (measure(folder, name, options.rounds) for name in _KINDS)
  print('| | JPEG frames | compact tier |\n| --- | --- | --- |')
  for what, value in frames.items():
    print(f'| {what} | {value:,.4g} | {compact[what]:,.4g} |')


if __name__ == '__main__':
  sys.exit(flags.run(main))
