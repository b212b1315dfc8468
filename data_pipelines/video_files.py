"""Any video or image file as frames and clips: PyAV and Pillow, no TensorFlow.

Decoding is sequential and keeps no more than the frames of the clips at hand, so an hour of video takes the memory
of a minute. Containers are not trusted: `video_decoder` shows what players show, `clock` repairs timestamps, and
`containers` knows what is missing. docs/files.md says what is read, repaired and refused.
"""

import collections
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageOps

from data_pipelines import clips, compact, containers, video_decoder
from data_pipelines.contract import UserError
from data_pipelines.video_decoder import Frame

# Our choice: a head that samples segments was trained on whole videos, which are seconds long in its field. It sees
# this many frames (10 s at 30 a second) as one video; a longer one is several.
SEGMENT_WINDOW = 300

_LOG = logging.getLogger(__name__)

_ANIMATED = ('GIF', 'WEBP', 'PNG', 'AVIF')  # other formats with several pictures hold pages or stereo pairs
_MOTION_JPEG = ('.mjpg', '.mjpeg')
_ENCODERS = ('libx264', 'mpeg4')
_GIF_FRAMES = 200
_NO_DURATION = 0.01  # seconds; a picture of an animation that says so little says nothing


class BrokenOff(UserError):
  """A file of which something is missing; it is raised after the frames that could be decoded were given."""


class Damaged(BrokenOff):
  """A file that was read to its end, and some of whose frames are not what was recorded, by the decoder's own word."""


class Header(NamedTuple):
  """What a file says of itself.

  Attributes:
    fps: frames a second, by its timestamps; None for an image, or where the file says nothing plausible.
    declared: number of frames, by its index; None where the file has none. 1 for an image.
  """

  fps: float | None
  declared: int | None


class Cut(NamedTuple):
  """How clips are cut from a video: T frames of (H, W), by the sampler of `data_pipelines.sources.Source`."""

  num_frames: int
  size: tuple[int, int]
  sampler: str
  stride: int


class Window(NamedTuple):
  """A clip of a file.

  Attributes:
    cut: index of the cut that it was made by.
    start: seconds of its first frame.
    end: seconds of its last frame.
    clip: uint8 [T, H, W, 3].
  """

  cut: int
  start: float
  end: float
  clip: np.ndarray


def header(path: str) -> Header:
  """Reads what a file says of itself; a video is not decoded for it.

  Raises:
    UserError: if it is no video or image that can be read.
  """
  image = _open_image(path)
  if image is not None:
    if not _is_animated(image):
      image.close()
      return Header(None, 1)
    count = image.n_frames
    seconds = max(frame.seconds for frame in _image_frames(image))
    return Header((count - 1) / seconds, count)
  return Header(*video_decoder.survey(path))


def frames(path: str, threads: int = 0) -> Iterator[Frame]:
  """Decodes a file from its first frame to its last, in the order in which they are shown.

  Args:
    path: a video, an image (one frame) or an animated image. They come upright, as the header says.
    threads: of the decoder; 0: as many as it likes.

  Raises:
    UserError: if it is no video or image that can be read.
    BrokenOff: after the last frame that could be decoded, if decoding fails there, or the file lacks something that
      its index lists or its structure promises.
    Damaged: after the last frame, if the decoder says of some that they are damaged.
  """
  image = _open_image(path)
  found = video_decoder.Findings()
  source = video_decoder.frames(path, threads, found) if image is None else _image_frames(image)
  decoded, reason = 0, ''
  try:
    for frame in source:
      yield frame
      decoded += 1
  except Exception as error:  # decoders raise anything on broken bytes
    if isinstance(error, UserError):
      raise
    reason = video_decoder.reason(error)
  if found.breaks:
    first, more = found.breaks[0], len(found.breaks) - 1
    _LOG.warning(
      '%s: its timestamps leap by %.1f s after frame %d%s; time goes on from there without the leap.',
      *(path, first.seconds, first.packet, f', and {more} times more' if more else ''),
    )
  reason = reason or containers.damage(path)
  if not reason and found.declared is not None and found.packets < found.declared:
    reason = 'the file ends early'
  if not decoded:
    reason = reason or 'none in it is whole'
    raise UserError(f'{path} holds no frame that can be decoded ({reason}): is it complete?') from None
  if reason:
    of = '' if found.declared is None else f' of {found.declared} declared'
    raise BrokenOff(f'{path} breaks off: {decoded}{of} frames could be decoded ({reason}).') from None
  if found.damaged:
    numbers = sorted(set(found.damaged))
    which = f'frame {numbers[0]}' + (f' and {len(numbers) - 1} more' if numbers[1:] else '')
    raise Damaged(f'{path} is damaged: its decoder says so of {which} of {decoded}, counted from 0.') from None


def fit(image_HxWx3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Crops the centre and resizes it as evaluation does (`clips.center_crop`, then bilinear without antialiasing).

  Args:
    image_HxWx3: uint8, any size.
    size: (height, width) wanted.

  Returns:
    uint8 [*size, 3]; the same pixels that TensorFlow's resize gives in `loader`.
  """
  top, left, height, width = clips.center_crop(*image_HxWx3.shape[:2], size)
  image_HxWx3 = image_HxWx3[top : top + height, left : left + width]
  if (height, width) == tuple(size):
    return image_HxWx3
  above, below, down_H = _neighbours(height, size[0])
  before, after, right_W = _neighbours(width, size[1])
  right_Wx1, down_Hx1x1 = right_W[:, None], down_H[:, None, None]

  def along_rows(rows_HxWx3: np.ndarray) -> np.ndarray:
    left_HxWx3 = rows_HxWx3[:, before].astype(np.float32)
    return left_HxWx3 + (rows_HxWx3[:, after] - left_HxWx3) * right_Wx1

  upper_HxWx3 = along_rows(image_HxWx3[above])
  lower_HxWx3 = along_rows(image_HxWx3[below])
  return np.rint(upper_HxWx3 + (lower_HxWx3 - upper_HxWx3) * down_Hx1x1).astype(np.uint8)


def windows(path: str, cuts: Sequence[Cut], hop: int | None = None, length: int = SEGMENT_WINDOW) -> Iterator[Window]:
  """Covers a file with clips, decoding it once.

  'dense' clips follow each other without a gap; clips by 'segments' take one frame of each part of up to
  `length` frames; clips of one frame are taken once a second. The last clip ends with the video, and
  overlaps the one before if it must. A video shorter than a clip is one clip, of the frames that evaluation takes
  (`clips.dense`, `clips.segments`).

  Args:
    path: of a video or image.
    cuts: the geometries wanted.
    hop: frames from the start of a clip to the start of the next, for all cuts; for 'dense' rounded to a multiple of
      its stride.
    length: frames that 'segments' takes for one video.

  Returns:
    An iterator of windows, in time order for each cut.

  Raises:
    UserError, BrokenOff: as `frames`. What was decoded until then has been given.
  """
  fps = header(path).fps
  cutters = [_Cutter(i, cut, hop, length, fps) for i, cut in enumerate(cuts)]
  broken = None
  try:
    for number, frame in enumerate(frames(path)):
      wanted = [cutter for cutter in cutters if cutter.wants(number)]
      pixels = frame.pixels() if wanted else None
      for cutter in cutters:
        cutter.last = frame
      for cutter in wanted:
        yield from cutter.push(frame.seconds, pixels)
  except BrokenOff as error:
    broken = error
  for cutter in cutters:
    yield from cutter.finish()
  if broken:
    raise broken


class _Cutter:
  """Collects frames of one video until they make a window; holds one window's frames at most."""

  def __init__(self, index: int, cut: Cut, hop: int | None, length: int, fps: float | None):
    self.index, self.cut = index, cut
    if cut.num_frames == 1:
      self.every, self.length, self.hop = hop or max(round(fps or 25), 1), 1, 1
    elif cut.sampler == 'dense':
      self.every, self.length = cut.stride, cut.num_frames
      self.hop = max(round(hop / cut.stride), 1) if hop else self.length
    else:
      self.every, self.length, self.hop = 1, length, hop or length
    self.kept: collections.deque[tuple[float, np.ndarray]] = collections.deque(maxlen=self.length)
    self.count, self.due, self.covered = 0, self.length, 0
    self.last: Frame | None = None

  def wants(self, number: int) -> bool:
    return number % self.every == 0

  def push(self, seconds: float, pixels: np.ndarray) -> Iterator[Window]:
    self.kept.append((seconds, fit(pixels, self.cut.size)))
    self.count += 1
    if self.count == self.due:
      self.due += self.hop
      self.covered = self.count
      yield self._window(list(self.kept))

  def finish(self) -> Iterator[Window]:
    if self.covered == self.count:
      return
    kept = list(self.kept)
    if self.cut.sampler == 'dense':
      # As `clips.dense` does with a short video: the very last frame fills the clip.
      missing = self.length - len(kept)
      kept += [(self.last.seconds, fit(self.last.pixels(), self.cut.size))] * missing
    yield self._window(kept)

  def _window(self, kept: list[tuple[float, np.ndarray]]) -> Window:
    chosen = kept
    if len(kept) != self.cut.num_frames or self.cut.sampler != 'dense':
      chosen = [kept[i] for i in clips.segments(len(kept), self.cut.num_frames)]
    return Window(self.index, kept[0][0], kept[-1][0], np.stack([pixels for _, pixels in chosen]))


def write_video(path: str, pictures: Iterable[np.ndarray], fps: float) -> str:
  """Encodes pictures one by one, as H.264 or MPEG-4 in an mp4, or a GIF where PyAV has neither encoder.

  Args:
    path: to write, without an ending.
    pictures: uint8 [H, W, 3], all of one size; see `compact.even`.
    fps: frames a second.

  Returns:
    The path with its ending.
  """
  encoder = next((name for name in _ENCODERS if name in av.codecs_available and _encodes(name)), None)
  if encoder is None:
    return _write_gif(f'{path}.gif', pictures, fps)
  path = f'{path}.mp4'
  with av.open(path, 'w') as container:
    stream = None
    for picture in pictures:
      even = compact.even(picture)
      if stream is None:
        stream = container.add_stream(encoder, rate=compact.rate(fps))
        stream.height, stream.width = even.shape[:2]
        stream.pix_fmt, stream.bit_rate = 'yuv420p', 2_000_000
      container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format='rgb24')))
    if stream is not None:
      container.mux(stream.encode())
  return path


def _write_gif(path: str, pictures: Iterable[np.ndarray], fps: float) -> str:
  # Pillow holds all pictures of a GIF, so a long video is cut.
  first, *rest = [Image.fromarray(p) for p, _ in zip(pictures, range(_GIF_FRAMES), strict=False)]
  first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
  return path


def _encodes(name: str) -> bool:
  try:
    return av.Codec(name, 'w').is_encoder
  except ValueError:  # av.codec.codec.UnknownCodecError
    return False


def _neighbours(have: int, want: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  # Pixel centres at half integers; TensorFlow computes this in float32, too.
  place = (np.arange(want, dtype=np.float32) + np.float32(0.5)) * np.float32(have / want) - np.float32(0.5)
  low = np.floor(place)
  lower = np.maximum(low, 0).astype(np.int64)
  upper = np.minimum(low + 1, have - 1).astype(np.int64)
  return lower, upper, place - low


def _open_image(path: str) -> Image.Image | None:
  """The file as Pillow opens it, or None if it is no image."""
  if not os.path.exists(path):
    raise UserError(f'{path} does not exist: give the path of a video or an image.')
  if not os.path.isfile(path):
    raise UserError(f'{path} is not a file: give the path of a video or an image.')
  try:
    image = Image.open(path)
  except Image.UnidentifiedImageError:
    return None
  except Exception as error:  # no permission, a picture too large to be honest, a broken header
    raise UserError(f'{path} cannot be opened ({video_decoder.reason(error)}).') from error
  # Pillow knows MPEG's first bytes and nothing more, and takes pictures one behind the other for the first one.
  return None if image.format == 'MPEG' or path.lower().endswith(_MOTION_JPEG) else image


def _is_animated(image: Image.Image) -> bool:
  return image.format in _ANIMATED and getattr(image, 'n_frames', 1) > 1


def _image_frames(image: Image.Image) -> Iterator[Frame]:
  seconds = 0.0
  with image:
    for number in range(image.n_frames if _is_animated(image) else 1):
      image.seek(number)
      # Decoded here, so that a broken picture is noticed here.
      upright = ImageOps.exif_transpose(image).convert('RGB')
      yield Frame(seconds, (upright.height, upright.width), functools.partial(_image_pixels, upright))
      duration = image.info.get('duration', 0) / 1000
      seconds += duration if duration > _NO_DURATION else 0.1  # as browsers show it


def _image_pixels(image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
  if size is not None and size != (image.height, image.width):
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
  return np.asarray(image)
