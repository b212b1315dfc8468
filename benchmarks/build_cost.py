"""What it costs to build a dataset of one's own videos: CPU time, frames a second a core, bytes a video.

    python -m benchmarks.build_cost --video=a.mp4 --video=b.webm [--copies=32] [--fps=0] [--storage=jpeg]

Each video is built by itself, `copies` times with one decoding process, by the engine that real builds use. CPU time is
that of all processes, so other work on the machine disturbs it little; start-up is left out. About 30 s a video.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines import flags
from data_pipelines.builders.media import MediaConfig
from data_pipelines.builders.video_folder import VideoFolder
from data_pipelines.sources import open_tfds


def cpu_seconds() -> float:
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(u.ru_utime + u.ru_stime for u in used)


def build(video: str, copies: int, config: MediaConfig) -> dict[str, float]:
  """Figures for one video."""
  with tempfile.TemporaryDirectory() as root:
    folder = Path(root, 'videos')
    folder.mkdir()
    for i in range(copies):
      (folder / f'{i}{Path(video).suffix}').symlink_to(os.path.abspath(video))
    builder = VideoFolder(data_dir=root, config=config)
    builder.workers = 1
    cpu, wall = cpu_seconds(), time.perf_counter()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    where = {'dataset': f'video_folder/{config.name}', 'data_dir': root, 'train': 'train'}
    source = open_tfds.open_source('x', where, 'train')
    (example,) = builder.as_dataset(split='train[:1]', decoders={'video': tfds.decode.SkipDecoding()})
    return {
      'frames': int(example['num_frames']),
      'stored': int(source.num_frames[0]),
      'cpu_s': cpu / copies,
      'wall_s': wall / copies,
      'frames_s': float(example['num_frames']) * copies / cpu,
      'mb': builder.info.dataset_size / copies / 1e6,
      'source_mb': os.path.getsize(video) / 1e6,
    }


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.build_cost', __doc__)
  to.add_argument('--video', action='append', required=True)
  to.add_argument('--copies', type=int, default=32)
  to.add_argument('--fps', type=float, default=0)
  to.add_argument('--short_side', type=int, default=256)
  to.add_argument('--storage', default='jpeg')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  options = flags.parse(parser(), argv)
  config = MediaConfig(name='bench', fps=options.fps, short_side=options.short_side, storage=options.storage)
  rows = {Path(v).name: build(v, options.copies, config) for v in options.video}
  print(f'{"video":28} {"frames":>6} {"stored":>6} {"CPU s":>6} {"frames/CPU s":>12} {"MB":>6} {"source MB":>9}')
  for name, row in rows.items():
    print(
      f'{name:28} {row["frames"]:6} {row["stored"]:6} {row["cpu_s"]:6.2f} {row["frames_s"]:12.0f} {row["mb"]:6.2f} '
      f'{row["source_mb"]:9.2f}'
    )


if __name__ == '__main__':
  sys.exit(flags.run(main))
