"""A video or image file as the JPEG frames that a dataset stores, decoded in a process of its own.

A decoder meets any bytes that a crawler brought home: it may crash, hang or eat memory, and must not take an hours-long
build with it. So `Decoder` runs this module as a child process, which imports neither TensorFlow nor JAX, and the
kernel ends a child that gives no frame for too long.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.contract import UserError
from data_pipelines.media import compact, containers, still_images, video_decoder, video_files

TIMEOUT = 60  # seconds without a frame
_JPEG_SIDE = 65500  # pixels, of libjpeg
_LARGEST = 1 << 30  # bytes of an example; a protocol buffer ends at 2 GiB, and a clip is some MB
_MEMORY = 8 << 30  # address space of a child: 8K video fits, a bomb does not
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Failure(Exception):
  """Why a file cannot be part of a dataset: one sentence without the path."""


class Interrupted(Exception):
  """The child was told to stop, which says nothing about the file."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How frames are stored.

  Attributes:
    modality: 'video' or 'image'.
    short_side: pixels of the shorter side, which is never enlarged; 0: as it is.
    fps: frames a second; 0: as they are. By time: where the original is slower or stands still, frames repeat.
    jpeg_quality: of Pillow, 1 to 95. An image that is an upright RGB JPEG of the right size keeps its own bytes.
    storage: 'jpeg': every frame a JPEG; 'mp4': all frames one small video (`compact`).
  """

  modality: str
  short_side: int
  fps: float
  jpeg_quality: int
  storage: str = 'jpeg'


class Media(NamedTuple):
  """A file, transcoded.

  Attributes:
    frames: JPEG files of one size; with storage 'mp4' one video of all frames.
    fps: of these frames; 0 for an image.
    original_fps: of the file: by its timestamps, by its header where there is one frame.
    duration: seconds that the original frames are shown.
    num_frames: decoded from the original.
    shape: with storage 'mp4' (frames, height, width) of the stored video.
  """

  frames: list[bytes]
  fps: float
  original_fps: float
  duration: float
  num_frames: int
  shape: tuple[int, int, int] | None = None


def fitted(size: tuple[int, int], short_side: int) -> tuple[int, int]:
  """(H, W) with the shorter side at most `short_side`, the ratio kept to the nearest pixel."""
  short = min(size)
  if not short_side or short <= short_side:
    return size
  return tuple(short_side if side == short else round(side * short_side / short) for side in size)


def pictures(path: str, settings: Settings, times: list[float]) -> Iterator[Image.Image]:
  """The frames of a video that are stored: upright, of one size, at `settings.fps`.

  Args:
    path: of the file.
    settings: how frames are stored.
    times: seconds of each frame decoded are appended here.

  Returns:
    An iterator of RGB pictures; a frame that repeats is the same object.

  Raises:
    UserError: as `video_files.frames`: part of a file is no file, and neither is a damaged one.
  """
  size, due = None, 0
  frames = video_files.frames(path, threads=1)  # one process a core: threads on top would be in each other's way
  for frame, following in itertools.pairwise(itertools.chain(frames, [None])):
    times.append(frame.seconds)
    if size is None:
      size = fitted(frame.size, settings.short_side)  # of all frames, though the resolution may change on the way
    if not settings.fps:
      yield Image.fromarray(frame.pixels(size))
      continue
    # A frame stands for all instants that it is nearest to; the last one for as long as the ones before on average.
    if following is not None:
      until = (frame.seconds + following.seconds) / 2
    else:
      until = frame.seconds + (frame.seconds / (len(times) - 1) / 2 if len(times) > 1 else 0)
    picture = None
    while due / settings.fps < until - 1e-6 or due == 0:
      picture = picture or Image.fromarray(frame.pixels(size))
      yield picture
      due += 1


def video(path: str, settings: Settings, times: list[float]) -> Iterator[bytes]:
  """The JPEG frames of a video; arguments and errors are those of `pictures`."""
  last, encoded = None, b''
  for picture in pictures(path, settings, times):
    if picture is not last:
      last, encoded = picture, _jpeg(picture, settings)
    yield encoded


def compact_video(
  path: str, settings: Settings, times: list[float], alive: Callable[[], object]
) -> tuple[bytes, tuple[int, int, int]]:
  """All frames of a video as one small video, and its shape; `alive` is called at each frame, errors as `pictures`."""

  def arrays():
    for picture in pictures(path, settings, times):
      alive()
      yield np.asarray(picture)

  try:
    return compact.encode(arrays(), settings.fps or video_files.header(path).fps or 25.0)
  except ValueError as error:
    raise Failure(str(error)) from None


def image(path: str, settings: Settings) -> bytes:
  """An image as JPEG.

  Raises:
    Failure: it cannot be read as a whole, in the words of `video_files.frames`.
  """
  if not os.path.isfile(path):
    raise Failure('it is not a regular file')  # a pipe would be waited for
  if (size := os.path.getsize(path)) > still_images.LARGEST_FILE:
    raise Failure(f'has {size:,} bytes; a picture may have {still_images.LARGEST_FILE:,}')
  try:
    picture = still_images.opened(path)
  except Image.UnidentifiedImageError:
    raise Failure('is not an image that can be read') from None
  except MemoryError:
    raise
  except Exception as error:  # no permission, a picture too large to be honest, a broken header
    raise Failure(f'cannot be opened ({video_decoder.reason(error)}).') from None
  try:
    with picture:
      picture.load()
      if reason := containers.damage(path):  # Pillow asks for no checksum
        raise _incomplete(path, reason)
      upright = still_images.upright(picture)
      height, width = fitted((upright.height, upright.width), settings.short_side)
      same = (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', (width, height))
      if same and picture.getexif().get(0x0112, 1) == 1:  # its orientation
        return Path(path).read_bytes()
      if upright.size != (width, height):
        upright = upright.resize((width, height), Image.Resampling.BICUBIC)
      return _jpeg(upright, settings)
  except (Failure, MemoryError):
    raise
  except still_images.Refused as error:
    raise Failure(str(error)) from None
  except Exception as error:  # Pillow raises anything on broken bytes
    raise _incomplete(path, containers.damage(path) or video_decoder.reason(error)) from None


def _incomplete(path: str, why: str) -> Failure:
  return Failure(str(video_decoder.incomplete(path, why)).removeprefix(f'{path} '))


def _jpeg(picture: Image.Image, settings: Settings) -> bytes:
  if max(picture.size) > _JPEG_SIDE:
    raise Failure('its frames of {} x {} pixels are larger than a JPEG can be'.format(*picture.size))
  file = io.BytesIO()
  picture.save(file, 'JPEG', quality=settings.jpeg_quality)
  return file.getvalue()


class Decoder:
  """Transcodes one file after the other in a child process, which is started when it is needed."""

  def __init__(self, timeout: float = TIMEOUT):
    self._timeout, self._child, self._used = timeout, None, 0

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stop()

  def __call__(self, path: str, settings: Settings) -> Media:
    """Transcodes a file.

    Raises:
      Failure: it cannot be.
      Interrupted: the child was told to stop.
    """
    while True:
      fresh = not self._used
      media = self._ask(path, settings)
      if media is not None:
        return media
      code = self._stop()
      if code == -signal.SIGALRM:
        raise Failure(f'no frame for {self._timeout:g} s')
      if -code in _INTERRUPTS:
        raise Interrupted(f'The decoder was stopped by {signal.Signals(-code).name}.')
      # Files before may have left a wreck, so the last one is tried again alone.
      if fresh:
        raise Failure(f'the decoder crashed ({signal.Signals(-code).name if code < 0 else f"exit code {code}"})')

  def _ask(self, path: str, settings: Settings) -> Media | None:
    """The file, or None if the child died of it."""
    if self._child is None:
      self._start()
    self._used += 1
    frames = []
    try:
      _send(self._child.stdin, json.dumps([path, dataclasses.asdict(settings)]).encode())
      while frame := _receive(self._child.stdout):
        frames.append(frame)
      answer = json.loads(_receive(self._child.stdout))
    except (EOFError, BrokenPipeError):
      return None
    if isinstance(answer, str):
      raise Failure(answer)
    return Media(frames, *answer)

  def _start(self) -> None:
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
    self._child = subprocess.Popen(
      # -P: files in the working directory must not stand in for modules.
      [sys.executable, '-P', '-W', 'ignore', '-m', 'data_pipelines.media.transcode', str(self._timeout)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {'PYTHONPATH': paths},
      start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    self._used = 0
    try:
      _receive(self._child.stdout)  # it stands
    except EOFError:
      raise RuntimeError(f'The decoder cannot start (exit code {self._stop()}); its message is above.') from None

  def _stop(self) -> int:
    child, self._child, self._used = self._child, None, 0
    if child is None:
      return 0
    with contextlib.suppress(BrokenPipeError):
      child.stdin.close()
    child.stdout.close()
    return child.wait()


def _send(pipe: BinaryIO, data: bytes) -> None:
  pipe.write(struct.pack('<I', len(data)))
  pipe.write(data)
  pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
  head = pipe.read(4)
  if len(head) < 4:
    raise EOFError
  (size,) = struct.unpack('<I', head)
  data = pipe.read(size)
  if len(data) < size:
    raise EOFError
  return data


def _serve(timeout: float) -> None:
  """The child: a request (path, settings), then its frames, an empty message, and the numbers or the reason."""
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # what libraries print must not land between the frames
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  _send(answers, b'')
  while True:
    try:
      request = _receive(sys.stdin.buffer)
    except EOFError:
      return
    path, settings = json.loads(request)
    answer = _transcode(path, Settings(**settings), answers, timeout)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _send(answers, b'')
    _send(answers, json.dumps(answer).encode())


def _transcode(path: str, settings: Settings, answers: BinaryIO, timeout: float) -> list[float] | str:
  """Sends the frames; gives the numbers of `Media`, or why there are none."""
  times, stored, total, shape = [], 0, 0, None
  # The alarm's default action ends the process even where it hangs in C code.
  alive = lambda: signal.setitimer(signal.ITIMER_REAL, timeout)
  alive()
  try:
    if settings.modality == 'image':
      frames = [image(path, settings)]
    elif settings.storage == 'mp4':
      whole, shape = compact_video(path, settings, times, alive)
      frames = [whole]
    else:
      frames = video(path, settings, times)
    for frame in frames:
      stored, total = stored + 1, total + len(frame)
      if total > _LARGEST:
        return f'longer than a clip can be: its first {stored} frames take 1 GiB; cut it into pieces'
      signal.setitimer(signal.ITIMER_REAL, 0)  # a slow reader is no fault of the file
      _send(answers, frame)
      alive()
    if settings.modality == 'image':
      return [0.0, 0.0, 0.0, 1]
    # At least a positive number: of a lone frame nothing depends on it.
    original = (len(times) - 1) / times[-1] if times[-1] > 0 else video_files.header(path).fps or 25.0
  except (UserError, Failure) as error:
    return str(error).replace(f'{path} ', '', 1)
  except MemoryError:
    return f'it needs more than {_MEMORY >> 30} GiB of memory'
  return [float(settings.fps or original), original, len(times) / original, len(times), shape]


if __name__ == '__main__':
  with contextlib.suppress(BrokenPipeError):  # the parent is gone
    _serve(float(sys.argv[1]))
