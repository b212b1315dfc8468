"""Which files can be read: a generated matrix of containers x codecs x oddities, against an independent decoder.

    python -m benchmarks.media_matrix [--doc=docs/files.md] [--only=WORD] [--keep=DIR]

Each row is a file that is made here, of scenes that are known. It is read as predictions and builds read it
(`video_files.frames`, `transcode`), and by the program of the package imageio-ffmpeg (extra `bench`), which is another
FFmpeg than PyAV's. A verdict is computed: 'right' is a file of which every frame has its place, its time, its
orientation and its colours, by both what was recorded and the other decoder; 'refused' is one that may be refused, with
the sentence. Anything else is WRONG, and the command's exit code is 1. About 2 minutes on one core.
"""

import argparse
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import PIL

from benchmarks import documents
from benchmarks.media_picture_rows import picture_rows
from benchmarks.media_recordings import Recorded, turns
from benchmarks.media_rows import Row, video_rows
from data_pipelines import flags
from data_pipelines.contract import UserError
from data_pipelines.media import transcode, video_files

HEADER = ('file', 'what went in', 'frames', 'a second', 'shown', 'error to FFmpeg', 'to the scene', 'verdict')
_LATE = 0.02  # seconds by which a frame may be off: containers round to milliseconds, GIF to hundredths
# Mean errors, 0 to 255. Decoders scale chroma up with different filters: 1.7 at most here. Taking BT.709 for BT.601
# makes 4.0, limited range for full 6.
_APART = 2.5
_SENTENCE = 110  # characters of a refusal that the table shows


class Read(NamedTuple):
  """What a reader makes of a file.

  Attributes:
    pictures: uint8 [H, W, 3] each.
    seconds: of each since the first.
    fps: frames a second by its header; None: it says none.
    refusal: the sentence; '' where the file is taken.
  """

  pictures: list[np.ndarray]
  seconds: list[float]
  fps: float | None
  refusal: str


class Result(NamedTuple):
  """A row's cells of the table, and whether all is well."""

  cells: tuple[str, ...]
  wrong: bool


def ours(path: Path) -> Read:
  """A file as predictions see it."""
  pictures, seconds, fps, refusal = [], [], None, ''
  try:
    fps = video_files.header(os.fspath(path)).fps
    for frame in video_files.frames(os.fspath(path), threads=1):
      pictures.append(frame.pixels())
      seconds.append(frame.seconds)
  except UserError as error:
    refusal = str(error).replace(f'{path} ', '', 1)
  return Read(pictures, seconds, fps, refusal)


def built(path: Path, still: bool) -> list[np.ndarray] | None:
  """The pictures that a build stores, before they become JPEG; None: it counts the file as broken.

  Args:
    path: of the file.
    still: for a build of pictures, which stores the first one; its pixels are not given ([]).
  """
  settings = transcode.Settings('image' if still else 'video', short_side=0, fps=0, jpeg_quality=95)
  try:
    if still:
      transcode.image(os.fspath(path), settings)
      return []
    return [np.asarray(p) for p in transcode.pictures(os.fspath(path), settings, [])]
  except (UserError, transcode.Failure):
    return None


def program() -> str | None:
  """The path of imageio-ffmpeg's program; None: the package is missing."""
  try:
    import imageio_ffmpeg
  except ImportError:
    return None
  return imageio_ffmpeg.get_ffmpeg_exe()


def theirs(path: Path, ffmpeg: str) -> Read:
  """A file as FFmpeg's own program shows it."""
  command = [ffmpeg, '-hide_banner', '-nostdin', '-threads', '1', '-i', os.fspath(path), '-an', '-sn', '-dn']
  command += ['-vf', 'showinfo=checksum=0', '-fps_mode', 'passthrough', '-pix_fmt', 'rgb24', '-c:v', 'ppm']
  done = subprocess.run([*command, '-f', 'image2pipe', '-'], capture_output=True, timeout=120)
  log = done.stderr.decode(errors='replace')
  seconds = [float(t) for t in re.findall(r'\bpts_time:(-?[\d.]+)', log)]
  last = log.strip().splitlines()[-1] if log.strip() else ''
  pictures = list(_ppm(done.stdout))
  return Read(pictures, [t - seconds[0] for t in seconds], None, '' if pictures else last)


def _ppm(data: bytes):
  at = 0
  while head := re.match(rb'P6\n(\d+) (\d+)\n255\n', data[at : at + 64]):
    width, height = map(int, head.groups())
    start, at = at + head.end(), at + head.end() + 3 * width * height
    yield np.frombuffer(data, np.uint8, 3 * width * height, start).reshape(height, width, 3)


def judge(row: Row, path: Path, ffmpeg: str | None) -> Result:
  """Makes a row's file and reads it.

  Args:
    row: of the matrix.
    path: of the file, which is written.
    ffmpeg: program of the other decoder; None: the file is held against what was recorded alone.
  """
  recorded = row.make(path)
  read = ours(path)
  if read.refusal:
    cells = (f'{len(read.pictures)} of {len(recorded.pictures)}' if read.pictures else '-', *['-'] * 4)
    sentence = re.sub(r'\s+', ' ', read.refusal.replace('|', '/'))
    sentence = sentence if len(sentence) <= _SENTENCE else sentence[:_SENTENCE].rsplit(' ', 1)[0] + ' ...'
    wrong = not row.refuse or built(path, row.still) is not None
    return Result((row.name, row.what, *cells, f'{"WRONG: " if wrong else ""}refused: {sentence}'), wrong)
  other = theirs(path, ffmpeg) if ffmpeg else None
  apart = None if other is None else error(read.pictures, other.pictures)
  off = error(read.pictures, recorded.pictures)
  # A decoder that is off the scene itself is no witness.
  their_off = None if other is None else error(other.pictures, recorded.pictures)
  witness = their_off is not None and their_off <= row.coarse
  faults = list(_faults(row, recorded, read, apart if witness else None, off, path))
  size = ' x '.join(str(s) for s in read.pictures[0].shape[1::-1])
  number = lambda value: '-' if value is None else f'{value:.1f}'
  cells = (
    f'{len(read.pictures)} of {len(recorded.pictures)}',
    '-' if read.fps is None or len(read.pictures) == 1 else f'{read.fps:.4g}',
    f'{size}, {orientation(read.pictures[0], recorded)}'.removesuffix(', '),
    number(apart) if witness else f'({number(apart)})',
    number(off),
    f'WRONG: {"; ".join(faults)}' if faults else 'right',
  )
  return Result((row.name, row.what, *cells), bool(faults))


def _faults(row: Row, recorded: Recorded, read: Read, apart: float | None, off: float | None, path: Path):
  if not recorded.pictures:
    yield f'{len(read.pictures)} frames of what is no video'
    return
  if len(read.pictures) != len(recorded.pictures):
    yield f'{len(read.pictures)} frames for {len(recorded.pictures)}'
    return
  if off is None:
    yield 'another size'
  elif (turn := orientation(read.pictures[0], recorded)) not in ('', 'upright'):
    yield turn
  elif off > row.coarse:
    yield 'other pictures'
  if apart is not None and apart > _APART:
    yield 'other colours than FFmpeg shows'
  late = np.abs(np.array(read.seconds) - recorded.seconds).max()
  if late > _LATE:
    yield f'times off by {late:.2f} s'
  span = recorded.seconds[-1]
  if span and (read.fps is None or abs(read.fps / ((len(recorded.seconds) - 1) / span) - 1) > 0.02):
    yield f'{read.fps} frames a second'
  stored = built(path, row.still)
  if stored is None:
    yield 'a build refuses what a prediction takes'
  elif not row.still and (len(stored) != len(read.pictures) or any(map(_differ, stored, read.pictures))):
    yield 'a build and a prediction see different pictures'


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
  return not np.array_equal(one, other)


def error(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float | None:
  """The largest over the frames of the mean absolute difference, 0 to 255; None where sizes or counts differ."""
  if len(some) != len(others) or any(a.shape != b.shape for a, b in zip(some, others, strict=True)):
    return None
  return max((float(np.abs(a.astype(int) - b).mean()) for a, b in zip(some, others, strict=True)), default=None)


def orientation(shown: np.ndarray, recorded: Recorded) -> str:
  """Which of the eight turns of what was recorded is shown; '' where a picture is too small to tell."""
  if not recorded.pictures or min(shown.shape[:2]) < 8:
    return ''
  apart = {name: error([shown], [turned]) for name, turned in turns(recorded.pictures[0]).items()}
  return min((name for name in apart if apart[name] is not None), key=apart.get, default='')


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.media_matrix', __doc__)
  to.add_argument('--doc', help='Markdown file that gets the table between its markers')
  to.add_argument('--only', default='', help='rows whose file has this in its name')
  to.add_argument('--keep', help='folder for the files; else they are deleted')
  return to


def main(argv: Sequence[str] | None = None) -> int:
  args = flags.parse(parser(), argv)
  ffmpeg = program()
  if ffmpeg is None:
    raise UserError("The other decoder is missing: pip install 'cover_jax[bench]' or imageio-ffmpeg.")
  logging.getLogger('data_pipelines').setLevel(logging.ERROR)
  rows = [row for row in (*video_rows(ffmpeg), *picture_rows(ffmpeg)) if args.only in row.name]
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(args.keep or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    results = [judge(row, folder / row.name, ffmpeg) for row in rows]
  table = documents.markdown(HEADER, (r.cells for r in results))
  wrong = sum(r.wrong for r in results)
  refused = sum(r.cells[-1].startswith('refused') for r in results)
  text = (
    f'{len(rows)} files: {len(rows) - wrong - refused} right, {refused} refused, {wrong} wrong. {versions(ffmpeg)}\n\n'
    f'{table}'
  )
  print(text)
  if args.doc:
    documents.fill(args.doc, text, 'Which files can be read')
  return int(wrong > 0)


def versions(ffmpeg: str) -> str:
  """What the figures were made with."""
  line = subprocess.run([ffmpeg, '-version'], capture_output=True, text=True).stdout.splitlines()[0]
  return (
    f'Python {platform.python_version()}, PyAV {av.__version__} (FFmpeg {av.ffmpeg_version_info}), '
    f'Pillow {PIL.__version__}; the other decoder is FFmpeg {line.split()[2]}.'
  )


if __name__ == '__main__':
  sys.exit(flags.run(main))
