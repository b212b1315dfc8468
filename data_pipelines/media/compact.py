"""The compact tier: a video is stored as one small mp4 with a key frame every 8 frames, in place of its JPEG frames.

About a seventh of the disk for several times the CPU a clip (docs/input.md). Only the groups of frames that a clip
needs are decoded, by PyAV, in processes of their own: a decoder that crashes or hangs on a video ends with a sentence
that names the example, not with a dead run. Decoded frames travel as uncompressed pictures (BMP), so that whatever
follows is the same as for JPEG frames.
"""

import functools
import io
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe

import av
import numpy as np

KEY_GAP = 8  # frames from one key frame to the next
TIMEOUT = 30.0  # seconds for one clip, thousands of times what it takes
_SLICES = 30  # of the timeout
_ENCODERS = {'libx264': {'crf': '23', 'preset': 'veryfast', 'sc_threshold': '0'}, 'mpeg4': {'q': '4'}}

# Features of an example, beside those of every builder: `video` holds the mp4.
NUM_FRAMES, HEIGHT, WIDTH = 'stored_frames', 'stored_height', 'stored_width'


class BrokenVideo(Exception):
  """What went wrong with the decoding of a stored video."""


def features():
  """The TFDS features of a stored video."""
  import tensorflow_datasets as tfds

  return {
    'video': tfds.features.Tensor(shape=(), dtype=np.object_),
    NUM_FRAMES: np.int64,
    HEIGHT: np.int64,
    WIDTH: np.int64,
  }


def values(video: bytes, shape: tuple[int, int, int]) -> dict[str, bytes | int]:
  """The values of `features`, of what `encode` gave."""
  return {'video': video} | dict(zip((NUM_FRAMES, HEIGHT, WIDTH), shape, strict=True))


def encode(frames: Iterable[np.ndarray], fps: float) -> tuple[bytes, tuple[int, int, int]]:
  """Encodes frames as an example stores them.

  Args:
    frames: uint8 [H, W, 3], all of one size; see `even`.
    fps: frames a second, for players; frames are found by their number.

  Returns:
    The mp4 and its (frames, height, width).

  Raises:
    ValueError: no video can be of this size.
    RuntimeError: this PyAV has neither of the encoders libx264 and mpeg4.
  """
  out = io.BytesIO()
  count = height = width = 0
  with av.open(out, 'w', format='mp4') as container:
    stream = None
    for frame in frames:
      picture = even(frame)
      if stream is None:
        height, width, _ = picture.shape
        encoder = _encoder()
        stream = container.add_stream(encoder, rate=rate(fps), options={**_ENCODERS[encoder], 'bf': '0'})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, 'yuv420p', KEY_GAP
        try:
          stream.codec_context.open(strict=False)
        except av.FFmpegError:
          raise ValueError(f'{encoder} cannot encode frames of {width} x {height} pixels') from None
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
      count += 1
    if stream is not None:
      container.mux(stream.encode())
  return out.getvalue(), (count, height, width)


def even(picture_HxWx3: np.ndarray) -> np.ndarray:
  """A picture of even sides, as encoders want it: an odd last row or column is dropped, a lone one is doubled."""
  for axis in (0, 1):
    side = picture_HxWx3.shape[axis]
    numbers = [0, 0] if side == 1 else slice(side // 2 * 2)
    picture_HxWx3 = picture_HxWx3[numbers] if axis == 0 else picture_HxWx3[:, numbers]
  return np.ascontiguousarray(picture_HxWx3)


def rate(fps: float) -> Fraction:
  """Frames a second as encoders take them: MPEG-4 has 16 bits for each number. 25 where none is known."""
  exact = Fraction(fps if fps > 0 else 25)
  found = exact.limit_denominator(1001)
  return found if 0 < found.numerator < 1 << 16 else Fraction(min(max(round(exact), 1), (1 << 16) - 1))


@functools.cache
def _encoder() -> str:
  for name in _ENCODERS:
    try:
      if av.Codec(name, 'w').is_encoder:
        return name
    except ValueError:  # av.codec.codec.UnknownCodecError
      continue
  raise RuntimeError(f'PyAV has none of the encoders {", ".join(_ENCODERS)}.')


def decode(video: bytes, numbers: Sequence[int]) -> list[bytes]:
  """Some frames of a stored video, as BMP pictures.

  Args:
    video: as `encode` made it: no B-frames, so that the n-th packet is the n-th frame.
    numbers: of the frames, ascending.

  Raises:
    BrokenVideo: it holds no such frames. PyAV raises its own errors on broken bytes.
  """
  with av.open(io.BytesIO(video)) as container:
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.size]
    context = stream.codec_context
    context.thread_count = 1  # there is a process for every core
    pictures, at = [], None
    for number in numbers:
      if number >= len(packets):
        raise BrokenVideo(f'it holds {len(packets)} frames, frame {number} was asked for')
      key = next(i for i in range(number, -1, -1) if packets[i].is_keyframe or i == 0)
      if at is None or at < key:
        context.flush_buffers()
        at = key
      while at <= number:
        found = context.decode(packets[at])
        at += 1
      if len(found) != 1:
        raise BrokenVideo(f'packet {number} gave {len(found)} frames')
      pictures.append(_bmp(found[0].to_ndarray(format='bgr24')))
  return pictures


def _bmp(bgr_HxWx3: np.ndarray) -> bytes:
  """An uncompressed picture: a header of 54 bytes, rows from the top, each padded to a multiple of 4 bytes."""
  height, width, _ = bgr_HxWx3.shape
  rows = np.zeros((height, -(-3 * width // 4) * 4), np.uint8)
  rows[:, : 3 * width] = bgr_HxWx3.reshape(height, 3 * width)
  header = np.array([54 + rows.size, 0, 54, 40, width, -height, 1 | 24 << 16, 0, rows.size, 0, 0, 0, 0], '<i4')
  return b'BM' + header.tobytes() + rows.tobytes()


class Decoders:
  """A pool of processes that run `decode`, started when they are needed. Safe to call from many threads.

  Args:
    count: of processes, so of videos that are decoded at a time.
    timeout: seconds after which a process that gave no answer is killed.
  """

  def __init__(self, count: int, timeout: float = TIMEOUT):
    self._timeout = timeout
    self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
    for _ in range(count):
      self._idle.put(None)

  def __call__(self, video: bytes, numbers: Sequence[int]) -> list[bytes]:
    """As `decode`; raises BrokenVideo whatever happens to the process."""
    process = self._idle.get()
    try:
      process = process or _Process()
      answer = process.ask((video, [int(n) for n in numbers]), self._timeout)
    except (EOFError, OSError) as e:
      code = process.kill() if process else None
      process = None
      if isinstance(e, TimeoutError):
        raise BrokenVideo(f'its decoder gave no answer in {self._timeout:g} s') from None
      raise BrokenVideo(f'its decoder crashed (exit code {code})') from None
    finally:
      self._idle.put(process)
    if isinstance(answer, str):
      raise BrokenVideo(answer)
    return answer


@functools.cache
def decoders() -> Decoders:
  """The pool that all sources of this process share: one decoder a core."""
  return Decoders(os.cpu_count() or 1)


class _Process:
  def __init__(self):
    self._connection, theirs = Pipe()
    # Not multiprocessing: that would import the caller's main module, with JAX and TensorFlow, into every decoder.
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
    command = [sys.executable, '-m', 'data_pipelines.media.compact', str(theirs.fileno())]
    self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {'PYTHONPATH': path})
    theirs.close()

  def ask(self, question: tuple, timeout: float) -> list[bytes] | str:
    self._connection.send(question)
    # In slices, so that a run that was suspended for a while takes that for one slice, not for a hang.
    if not any(self._connection.poll(timeout / _SLICES) for _ in range(_SLICES)):
      raise TimeoutError
    return self._connection.recv()

  def kill(self) -> int:
    self._process.kill()
    self._connection.close()
    return self._process.wait()


def _serve(connection: Connection) -> None:
  while True:
    try:
      video, numbers = connection.recv()
      try:
        answer = decode(video, numbers)
      except Exception as e:  # PyAV raises anything on broken bytes
        answer = str(e).splitlines()[0] if str(e) else type(e).__name__
      connection.send(answer)
    except (EOFError, BrokenPipeError):  # the one who asked is gone
      return


if __name__ == '__main__':
  _serve(Connection(int(sys.argv[1])))
