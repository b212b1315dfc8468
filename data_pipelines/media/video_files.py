"""Any video or image file as frames and clips: PyAV and Pillow, no TensorFlow.

Decoding is sequential and keeps no more than the frames of the clips at hand, so an hour of video takes the memory
of a minute. Containers are not trusted: `video_decoder` shows what players show, `clock` repairs timestamps, and
`containers` knows what is missing. docs/files.md says what is read, repaired and refused.
"""

import collections
import functools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.clips import sampling
from data_pipelines.contract import UserError
from data_pipelines.media import chained, containers, still_images, video_decoder
from data_pipelines.media.video_decoder import Frame

# Our choice: a head that samples segments was trained on whole videos, which are seconds long in its field. It sees
# this many frames (10 s at 30 a second) as one video; a longer one is several.
SEGMENT_WINDOW = 300

_LOG = logging.getLogger(__name__)

_ANIMATED = ('GIF', 'WEBP', 'PNG', 'AVIF')  # other formats with several pictures hold pages or stereo pairs
_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_MOTION_JPEG = ('.mjpg', '.mjpeg')
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
  """How clips are cut from a video: the settings of a `data_pipelines.sources.Source` and of its stream.

  Attributes:
    num_frames, size: T and (H, W) of a clip.
    sampler, stride, loop: as in `Source`.
    fps: at which `stride` counts, whatever the file's own; 0: the file's frames. `Source.target_fps`.
    crop_fraction: of the short side that a clip shows. `Source.test_crop_fraction`.
  """

  num_frames: int
  size: tuple[int, int]
  sampler: str
  stride: int
  fps: float = 0.0
  loop: bool = False
  crop_fraction: float = 1.0


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
    try:
      if not _is_animated(image):
        image.close()
        return Header(None, 1)
      count = image.n_frames
      seconds = max(frame.seconds for frame in _image_frames(image))
    except Exception as error:  # Pillow raises anything on broken bytes
      raise UserError(f'{path} cannot be read ({video_decoder.reason(error)}): is it complete?') from None
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
    if isinstance(error, still_images.Refused):
      raise UserError(f'{path} {error}') from None
    reason = video_decoder.reason(error)
  if found.breaks:
    first, more = found.breaks[0], len(found.breaks) - 1
    _LOG.warning(
      '%s: its timestamps leap by %.1f s after frame %d%s; time goes on from there without the leap.',
      *(path, first.seconds, first.packet, f', and {more} times more' if more else ''),
    )
  try:
    # It says more than decoders do, whose words depend on the number of their threads.
    missing = containers.damage(path)
    reason = missing or reason
  except OSError as error:  # it has been removed, or a folder put in its place, since it was opened
    missing, reason = '', reason or video_decoder.reason(error)
  if not reason and found.declared is not None and found.packets < found.declared:
    reason = 'the file ends early'
  if not decoded:
    raise video_decoder.incomplete(path, reason or 'none in it is whole') from None
  if reason:
    again = ' Fetch or copy it again.' if missing else ''
    of = '' if found.declared is None else f' of {found.declared} declared'
    raise BrokenOff(f'{path} breaks off: {decoded}{of} frames could be decoded ({reason}).{again}') from None
  if found.damaged:
    numbers = sorted(set(found.damaged))
    which = f'frame {numbers[0]}' + (f' and {len(numbers) - 1} more' if numbers[1:] else '')
    raise Damaged(f'{path} is damaged: its decoder says so of {which} of {decoded}, counted from 0.') from None


def fit(image_HxWx3: np.ndarray, size: tuple[int, int], fraction: float = 1.0) -> np.ndarray:
  """Crops the centre and resizes it as evaluation does (`sampling.center_crop`, then bilinear without antialiasing).

  Args:
    image_HxWx3: uint8, any size.
    size: (height, width) wanted.
    fraction: of the short side that is shown; see `sampling.center_crop`.

  Returns:
    uint8 [*size, 3]; the same pixels that TensorFlow's resize gives in `loader`.
  """
  top, left, height, width = sampling.center_crop(*image_HxWx3.shape[:2], size, fraction)
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

  'dense' clips follow each other without a gap, each cut as evaluation cuts one that starts there; clips by 'segments'
  take one frame of each part of up to `length` frames; clips of one frame are taken once a second. The last clip ends
  with the video, and overlaps the one before if it must. A video shorter than a clip is one clip, of the frames that
  evaluation takes (`sampling.dense`, `sampling.segments`).

  Args:
    path: of a video or image.
    cuts: the geometries wanted.
    hop: frames from the start of a clip to the start of the next, for all cuts; for 'dense' rounded to a multiple of
      the frames from one of its pictures to the next.
    length: frames that 'segments' takes for one video.

  Returns:
    An iterator of windows, in time order for each cut.

  Raises:
    UserError: as `frames`, and where a cut counts frames at an `fps` and a video does not say its own.
    BrokenOff: as `frames`. What was decoded until then has been given.
  """
  fps, declared = header(path)
  if not fps and declared != 1 and (timed := [cut.fps for cut in cuts if cut.fps and _is_dense(cut)]):
    raise UserError(
      f'{path} does not say at how many frames a second it was recorded, and the model looks at {timed[0]:g} a second: '
      'convert it to a file that does, such as an mp4.'
    )
  cutters = [_cutter(i, cut, hop, length, fps) for i, cut in enumerate(cuts)]
  broken = None
  try:
    for number, frame in enumerate(frames(path)):
      wanted = [cutter for cutter in cutters if cutter.wants(number)]
      pixels = frame.pixels() if wanted else None
      for cutter in wanted:
        yield from cutter.push(number, _Picture(frame.seconds, cutter.fit(pixels)))
  except BrokenOff as error:
    broken = error
  for cutter in cutters:
    yield from cutter.finish(number, frame)
  if broken:
    raise broken


class _Picture(NamedTuple):
  """A frame as a clip shows it."""

  seconds: float
  pixels: np.ndarray


def _is_dense(cut: Cut) -> bool:
  return cut.sampler == 'dense' and cut.num_frames > 1


def _cutter(index: int, cut: Cut, hop: int | None, length: int, fps: float | None) -> '_Dense | _Segments':
  if _is_dense(cut):
    return _Dense(index, cut, hop, sampling.step_of(cut.stride, fps or 0.0, cut.fps if fps else 0.0))
  if cut.num_frames == 1:
    return _Segments(index, cut, every=hop or max(round(fps or 25), 1), length=1, hop=1)
  return _Segments(index, cut, every=1, length=length, hop=hop or length)


class _Dense:
  """Collects the frames of one video's dense clips; holds those of one clip, or as many as it spans to loop a video.

  A clip may start at the frames nearest to 0, step, 2 step, ... and shows `sampling.offsets` from there.
  """

  def __init__(self, index: int, cut: Cut, hop: int | None, step: float):
    self.index, self.cut, self.step = index, cut, step
    self.offsets = sampling.offsets(cut.num_frames, step)
    self.hop = max(round(hop / step), 1) if hop else cut.num_frames  # in steps, as are the next two
    self.due = 0  # the next clip
    self.latest = -1  # the last start of which all frames came
    self.given = -1  # frame at which the last clip given starts
    self.kept: dict[int, _Picture] = {}

  def fit(self, pixels: np.ndarray) -> np.ndarray:
    return fit(pixels, self.cut.size, self.cut.crop_fraction)

  def wants(self, number: int) -> bool:
    if self.cut.loop and self.latest < 0:
      return True  # a video that ends before the clip does may show any of its frames again
    # A start and an offset are each rounded by half a frame at most, where the step is no whole number.
    away = abs(number - self.step * round(number / self.step))
    return away <= (0 if self.step == round(self.step) else 1.001)

  def push(self, number: int, picture: _Picture) -> Iterator[Window]:
    self.kept[number] = picture
    while self._start(self.latest + 1) + self.offsets[-1] <= number:
      self.latest += 1
    while self.due <= self.latest:
      yield self._window(self._start(self.due) + self.offsets)
      while self._start(self.due) <= self.given:
        self.due += self.hop
    if self.latest >= 0:
      first = self._start(self.latest)
      self.kept = {n: kept for n, kept in self.kept.items() if n >= first}

  def finish(self, number: int, frame: Frame) -> Iterator[Window]:
    if self.latest < 0:
      numbers = sampling.dense(number + 1, self.cut.num_frames, self.step, loop=self.cut.loop)
      if number not in self.kept:
        self.kept[number] = _Picture(frame.seconds, self.fit(frame.pixels()))
      yield self._window(numbers)
    elif self._start(self.latest) > self.given:
      yield self._window(self._start(self.latest) + self.offsets)

  def _start(self, steps: int) -> int:
    return math.floor(self.step * steps + 0.5)

  def _window(self, numbers: np.ndarray) -> Window:
    self.given = int(numbers[0])
    end = self.kept[int(numbers.max())].seconds
    return Window(self.index, self.kept[self.given].seconds, end, np.stack([self.kept[int(n)].pixels for n in numbers]))


class _Segments:
  """Collects every so many frames of one video until they make a window, and holds one window's at most."""

  def __init__(self, index: int, cut: Cut, *, every: int, length: int, hop: int):
    self.index, self.cut, self.every, self.hop = index, cut, every, hop
    self.kept: collections.deque[_Picture] = collections.deque(maxlen=length)
    self.count, self.due, self.covered = 0, length, 0

  def fit(self, pixels: np.ndarray) -> np.ndarray:
    return fit(pixels, self.cut.size, self.cut.crop_fraction)

  def wants(self, number: int) -> bool:
    return number % self.every == 0

  def push(self, number: int, picture: _Picture) -> Iterator[Window]:
    self.kept.append(picture)
    self.count += 1
    if self.count == self.due:
      self.due += self.hop
      self.covered = self.count
      yield self._window()

  def finish(self, number: int, frame: Frame) -> Iterator[Window]:
    if self.covered < self.count:
      yield self._window()

  def _window(self) -> Window:
    kept = list(self.kept)
    chosen = [kept[i] for i in sampling.segments(len(kept), self.cut.num_frames)]
    return Window(self.index, kept[0].seconds, kept[-1].seconds, np.stack([picture.pixels for picture in chosen]))


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
    several = chained.kind(path)
  except OSError as error:
    raise UserError(f'{path} cannot be opened ({video_decoder.reason(error)}).') from error
  if several:
    raise UserError(
      f'{path} is several {several} files one behind the other, of which readers show the first or mistake the times: '
      'split it into them, or join them by a program that writes one (ffmpeg -f concat).'
    )
  size = os.path.getsize(path)
  if size > still_images.LARGEST_FILE:  # Pillow would read it whole, and more than once
    if still_images.is_named_as_one(path):
      raise UserError(
        f'{path} has {size:,} bytes; a picture may have {still_images.LARGEST_FILE:,}: if it is a video, give its name '
        'the ending of one.'
      )
    return None
  try:
    image = still_images.opened(path)
  except Image.UnidentifiedImageError:
    if containers.begins(path, _TIFF):  # FFmpeg would show something
      raise UserError(f'{path} is a TIFF of a kind that is not read: save it with 8 or 16 bits.') from None
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
      upright = still_images.upright(image)
      yield Frame(seconds, (upright.height, upright.width), functools.partial(_image_pixels, upright))
      duration = image.info.get('duration', 0) / 1000
      seconds += duration if duration > _NO_DURATION else 0.1  # as browsers show it


def _image_pixels(image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
  if size is not None and size != (image.height, image.width):
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
  return np.asarray(image)
