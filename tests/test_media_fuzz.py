"""Two hundred damaged media files and two hundred damaged lists: each is read or refused in a sentence, in time.

Where a damaged file is taken and shows something else than the whole one, it is said why that could not be known, and
the reasons are counted and printed (`pytest -s`). SEED in the environment draws other damage.
"""

import collections
import dataclasses
import hashlib
import multiprocessing
import os
import random
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from benchmarks.media_picture_rows import picture_rows
from benchmarks.media_rows import video_rows
from data_pipelines.builders import folders, media
from data_pipelines.builders.listing import VIDEO_EXTENSIONS
from data_pipelines.contract import UserError
from data_pipelines.media import transcode, video_files
from tests.test_annotations import mutate
from tests.test_transcode import mutations

pytestmark = pytest.mark.slow

LIMIT = 20.0  # seconds for one file
MEMORY = 8 << 30  # bytes of address space, as a build's decoder has
SEED = int(os.environ.get('SEED', '7'))
COUNT = int(os.environ.get('COUNT', '200'))
ORIGINALS = (
  *('h264.mp4', 'fragments.mp4', 'hevc.mp4', 'mjpeg.mov', 'prores.mov', 'h264.mkv', 'vp8.webm', 'vp9.webm', 'av1.webm'),
  *('live.webm', 'mpeg4.avi', 'raw.avi', 'h264.ts', 'mpeg2.ts', 'h264.m2ts', 'mpeg2.vob', 'h264.flv', 'vp8.ogv'),
  *('wmv2.wmv', 'h263.3gp', 'vp8.ivf', 'raw.y4m', 'h264.h264', 'gif.gif', 'turned_90.mov', 'edited.mp4', 'one.mkv'),
  *('exif_6.jpg', 'progressive.jpg', 'cmyk.jpg', 'alpha.png', 'rgb_16.png', 'lossy.webp', 'still.avif', 'still.gif'),
  *('palette.bmp', 'still.ppm', 'lzw.tif', 'grey_16.tif', 'still.jp2', 'moving.png', 'moving.webp'),
)
CHECKED = ('.mkv', '.ogv', '.png')  # with checksums over all that shows
ENDLESS = ('.ts', '.m2ts', '.h264', '.ivf', '.y4m', 'live.webm', 'fragments.mp4')  # that do not say where they end
IN_PIECES = ('.ts', '.m2ts', '.vob', '.wmv', '.h264', '.ogv')  # pictures are cut into packets
NO_LENGTHS = ('.h264', '.jpg')
JUNK_ALLOWED = (
  '.bmp',
  '.ppm',
  '.tif',
  '.avif',
  '.webp',
)  # one stretch of bytes is a picture, and more may stand behind it


@dataclasses.dataclass(frozen=True)
class Seen:
  """What came of a file.

  Attributes:
    shown: a hash of each picture, or a row of a list.
    refusal: '' where it is taken.
    fault: a traceback, 'crashed' or 'hung'; '' where all is well.
  """

  shown: tuple = ()
  refusal: str = ''
  fault: str = ''


def see(path: str) -> Seen:
  """A file as predictions read it."""
  shown = []
  try:
    video_files.header(path)
    for frame in video_files.frames(path, threads=1):
      pixels = frame.pixels()
      shown.append(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest())
  except UserError as error:
    return Seen(tuple(shown), str(error))
  return Seen(tuple(shown))


def listed(folder: str) -> Seen:
  """A folder's lists as a build reads them: its rows in place of pictures."""
  try:
    found = folders.list_folder(Path(folder), VIDEO_EXTENSIONS, 'video')
    media._check('lists', found)
  except UserError as error:
    return Seen(refusal=str(error))
  names = (*found.class_names, '')
  rows = [(split, c.id, names[c.label], c.path is not None) for split, clips in found.splits.items() for c in clips]
  return Seen(tuple(sorted(rows)))


def serve(pipe, function: Callable[[str], object]) -> None:
  """A child: a path comes in, what `function` gives goes out, or a traceback."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
  while path := pipe.recv():
    try:
      pipe.send(function(path))
    except Exception:
      pipe.send(Seen(fault=traceback.format_exc()))


class Reader:
  """Calls a function in a process of its own, which is ended where it hangs."""

  def __init__(self, function: Callable[[str], object]):
    self._function, self._child = function, None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stop()

  def __call__(self, path: Path):
    if self._child is None:
      context = multiprocessing.get_context('spawn')
      self._pipe, theirs = context.Pipe()
      self._child = context.Process(target=serve, args=(theirs, self._function), daemon=True)
      self._child.start()
      theirs.close()
    self._pipe.send(str(path))
    try:
      if self._pipe.poll(LIMIT):
        return self._pipe.recv()
      fault = 'hung'
    except EOFError:
      fault = 'crashed'
    self._stop()
    return Seen(fault=fault)

  def _stop(self) -> None:
    if self._child is not None:
      self._child.kill()
      self._child.join()
      self._pipe.close()
    self._child = None


def coded(path: Path) -> list[range]:
  """Where the bytes of coded pictures lie in a whole file; [] of a still picture."""
  if path.suffix in IN_PIECES:
    return [range(path.stat().st_size)]
  try:
    with av.open(str(path)) as container:
      return [range(p.pos, p.pos + p.size) for p in container.demux(video=0) if p.size and (p.pos or 0) > 0]
  except av.FFmpegError:
    return []


def why(name: str, whole: bytes, damaged: bytes, pictures: list[range], is_shorter: bool) -> str:
  """Why nobody could know that a file is not what was recorded; '' where somebody could.

  Args:
    name: of the original.
    whole, damaged: bytes of both.
    pictures: where coded pictures lie in the original.
    is_shorter: whether what is shown is a beginning of what was recorded.
  """
  if name.endswith(CHECKED):
    return ''
  if name.endswith(ENDLESS) and is_shorter:
    return 'its last pictures are gone, and its format does not say where it ends'
  if len(damaged) > len(whole) and name.endswith(JUNK_ALLOWED):
    return 'bytes were doubled, and what is too many at the end passes for junk'
  if len(damaged) != len(whole) and name.endswith('.gif'):  # which says its lengths 255 bytes at a time
    return 'bytes were left out or doubled, and its lengths fit all the same'
  if len(damaged) != len(whole):
    known = not name.endswith(NO_LENGTHS)
    return '' if known else 'bytes were left out or doubled, its format has no lengths, and the decoder takes them'
  changed = [i for i, (a, b) in enumerate(zip(whole, damaged, strict=True)) if a != b]
  inside = [any(i in part for part in pictures) for i in changed]
  if name == 'edited.mp4' and any(i in part for i in changed for part in pictures[:4]):
    return 'bytes of pictures that an edit list hides have other values, and a decoder says nothing of these'
  if any(inside) or not pictures:
    return 'bytes of coded pictures have other values, no checksum covers them, and the decoder takes them'
  return 'a field of a header has another value that makes sense, and no checksum covers it'


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  rows = {row.name: row for row in (*video_rows(None), *picture_rows(None))}
  for name in ORIGINALS:
    rows[name].make(folder / name)
  return {name: (folder / name, rows[name].still) for name in ORIGINALS}


def test_damaged_media_files(originals, tmp_path):
  rng = random.Random(SEED)
  sources = {name: mutations(path.read_bytes(), rng) for name, (path, _) in originals.items()}
  tally, faults, slowest = collections.Counter(), [], 0.0
  with Reader(see) as read, transcode.Decoder(LIMIT) as decode:
    whole = {name: read(path) for name, (path, _) in originals.items()}
    assert all(seen.shown and not seen.refusal and not seen.fault for seen in whole.values())
    for number in range(COUNT):
      name = ORIGINALS[number % len(ORIGINALS)]
      original, still = originals[name]
      path = tmp_path / f'{number}{original.suffix}'
      path.write_bytes(next(sources[name]))
      start = time.monotonic()
      seen = read(path)
      slowest = max(slowest, time.monotonic() - start)
      # A build sees the same, or less: of an animation that is to be a picture it takes the first one.
      try:
        decode(str(path), transcode.Settings('image' if still else 'video', 0, 0, 85))
        built = ''
      except transcode.Failure as failure:
        built = str(failure)
      if seen.fault or 'the decoder crashed' in built or 'no frame for' in built or '\n' in seen.refusal + built:
        faults.append((name, number, seen.fault or built or seen.refusal))
      elif seen.refusal:
        tally['refused'] += 1
      elif seen.shown == whole[name].shown:
        tally['taken, shows the same'] += 1
      elif reason := why(
        name,
        original.read_bytes(),
        path.read_bytes(),
        coded(original),
        seen.shown == whole[name].shown[: len(seen.shown)],
      ):
        tally[f'taken, shows something else: {reason}'] += 1
      else:
        faults.append((name, number, f'taken, and {len(seen.shown)} pictures show something else'))
      if not still and not seen.fault and bool(built) != bool(seen.refusal):
        faults.append((name, number, f'a build says {built!r}, a prediction {seen.refusal!r}'))
  print(f'\n{COUNT} media files, seed {SEED}, slowest {slowest:.1f} s')
  for what, count in tally.most_common():
    print(f'{count:5d} {what}')
  assert not faults, '\n'.join(map(str, faults))
  assert tally['refused'] > COUNT // 4 and sum(tally.values()) == COUNT


# Folders of one's own, each {file: text}; there are 12 videos in each.
ROWS = [(f'videos/{i:02d} a.mp4', f'class {i % 4}') for i in range(12)]
LISTS = (
  {
    'train.txt': ''.join(f'{path} {i % 4}\n' for i, (path, _) in enumerate(ROWS)),
    'classes.txt': 'run\nsit\njump\nfly\n',
  },
  {'train.csv': 'path,label\n' + ''.join(f'"{path}",{label}\n' for path, label in ROWS)},
  {'train.tsv': ''.join(f'{path}\t{label}\n' for path, label in ROWS[:8]), 'val.tsv': f'{ROWS[9][0]}\tclass 1\n'},
  {
    'training.csv': ''.join(f'{path},{i % 4}\r\n' for i, (path, _) in enumerate(ROWS)),
    'classes.csv': 'id,name\r\n0,"tench, Tinca"\r\n1,b\r\n2,c\r\n3,d\r\n',
  },
  {'trainlist01.txt': ''.join(f'{path}\n' for path, _ in ROWS), 'testlist01.txt': f'{ROWS[3][0]}\n'},
)


def why_listed(whole: Seen, seen: Seen) -> str:
  """Why nobody could know that lists are not what they were; '' where somebody could."""
  before, now = ({(split, name): label for split, name, label, _ in s.shown} for s in (whole, seen))
  if new := [row for row in seen.shown if row[:2] not in before]:
    absent = not any(present for *_, present in new)
    return (
      'a line names a file that is not there: a build counts it as missing' if absent else 'a line names another file'
    )
  if any(now[key] != before[key] for key in now):
    return 'a line has another label, or a class another name'
  return 'lines are missing, and a list does not say how many it has' if len(now) < len(before) else ''


def test_damaged_lists(tmp_path):
  rng = random.Random(SEED)
  tally, faults, slowest = collections.Counter(), [], 0.0
  with Reader(listed) as read:
    for number in range(COUNT):
      texts = LISTS[number % len(LISTS)]
      folder = tmp_path / str(number)
      (folder / 'videos').mkdir(parents=True)
      for path, _ in ROWS:
        (folder / path).touch()
      for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
      if number < len(LISTS):
        read(folder)  # the first one starts the child
      whole = read(folder)
      assert whole.shown and not whole.refusal and not whole.fault
      damaged = folder / rng.choice(sorted(texts))
      damaged.write_bytes(mutate(damaged.read_bytes(), rng))
      start = time.monotonic()
      seen = read(folder)
      slowest = max(slowest, time.monotonic() - start)
      if seen.fault or '\n' in seen.refusal or len(seen.refusal) > 1000:
        faults.append((damaged, seen.fault or seen.refusal))
      elif seen.refusal:
        tally['refused'] += 1
      elif seen.shown == whole.shown:
        tally['taken, says the same'] += 1
      elif reason := why_listed(whole, seen):
        tally[f'taken, says something else: {reason}'] += 1
      else:
        faults.append((damaged, 'taken, and says something else'))
  print(f'\n{COUNT} lists, seed {SEED}, slowest {slowest:.1f} s')
  for what, count in tally.most_common():
    print(f'{count:5d} {what}')
  assert not faults, '\n'.join(map(str, faults))
  assert tally['refused'] > COUNT // 4 and sum(tally.values()) == COUNT
