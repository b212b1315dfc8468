"""Video files whose content is known: what `benchmarks.media_matrix` makes its rows of.

A scene has another colour in each corner, so that a turned or mirrored one is another scene, and a brightness in its
middle that numbers the frame.
"""

import dataclasses
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES, SIZE, RATE = 10, (128, 192), 10
_SOUND_RATE = 48000
# Name: (number in H.273, shares of red and blue in luma).
_MATRICES = {'601': (6, 0.299, 0.114), '709': (1, 0.2126, 0.0722), '2020': (9, 0.2627, 0.0593)}
_QUICK = {
  'libx264': {'preset': 'ultrafast', 'crf': '4', 'threads': '1'},
  'libx264rgb': {'preset': 'ultrafast', 'crf': '4', 'threads': '1'},
  'libx265': {'preset': 'ultrafast', 'crf': '4', 'x265-params': 'log-level=none:pools=none'},
  'libvpx': {'deadline': 'realtime', 'cpu-used': '8', 'crf': '4', 'qmin': '0', 'qmax': '8'},
  'libvpx-vp9': {'deadline': 'realtime', 'cpu-used': '8', 'crf': '4', 'qmin': '0', 'qmax': '8'},
  'libsvtav1': {'preset': '12', 'crf': '4'},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
  """What a file holds.

  Attributes:
    pictures: as they are to be shown, each uint8 [H, W, 3]; none where there is nothing to show.
    seconds: of each picture since the first one.
  """

  pictures: Sequence[np.ndarray]
  seconds: Sequence[float]


def scene(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
  """Frame `number` of every recording.

  Args:
    number: 0 to 27 are told apart.
    size: (H, W).

  Returns:
    uint8 [H, W, 3].
  """
  height, width = size
  y_Hx1, x_1xW = np.arange(height)[:, None] / height, np.arange(width)[None] / width
  flat_HxW = np.zeros(size)
  picture_HxWx3 = np.stack([60 + 120 * x_1xW + flat_HxW, 60 + 120 * y_Hx1 + flat_HxW, 150 - 60 * x_1xW * y_Hx1], -1)
  # Even, so that no chroma lies across an edge.
  above, left, below, right = (share * side // 8 * 2 for share in (1, 3) for side in size)
  for rows, columns, colour in (
    (slice(above), slice(left), (210, 40, 40)),
    (slice(above), slice(right, None), (60, 180, 60)),
    (slice(below, None), slice(left), (50, 60, 200)),
    (slice(below, None), slice(right, None), (200, 190, 60)),
    (slice(above, below), slice(left, right), (16 + 8 * (number % 28),) * 3),
  ):
    picture_HxWx3[rows, columns] = colour
  return np.rint(picture_HxWx3).astype(np.uint8)


def turns(picture: np.ndarray) -> dict[str, np.ndarray]:
  """A picture in all eight orientations, by their names."""
  mirrored = picture[:, ::-1]
  return {
    'upright': picture,
    'turned left': np.rot90(picture),
    'upside down': np.rot90(picture, 2),
    'turned right': np.rot90(picture, 3),
    'mirrored': mirrored,
    'mirrored, turned left': np.rot90(mirrored),
    'flipped': np.rot90(mirrored, 2),
    'mirrored, turned right': np.rot90(mirrored, 3),
  }


def film(count: int = FRAMES, size: tuple[int, int] = SIZE, times: Sequence[float] | None = None) -> Recorded:
  """`count` scenes, at `RATE` a second or at times of their own."""
  seconds = [i / RATE for i in range(count)] if times is None else [t - times[0] for t in times]
  return Recorded([scene(i, size) for i in range(len(seconds))], seconds)


def grey_film() -> Recorded:
  """The scenes without colour."""
  plain = film()
  return Recorded([grey(p) for p in plain.pictures], plain.seconds)


def grey(picture: np.ndarray) -> np.ndarray:
  """A picture's luma in all three channels, by BT.601."""
  luma_HxWx1 = picture.astype(float) @ np.array([[0.299], [0.587], [0.114]])
  return np.rint(luma_HxWx1).astype(np.uint8).repeat(3, -1)


def write(
  path: Path,
  codec: str,
  recorded: Recorded | None = None,
  *,
  pixels: str = 'yuv420p',
  matrix: str = '601',
  full: bool = False,
  stored: Callable[[np.ndarray], np.ndarray] | None = None,
  container: str | None = None,
  muxer: Mapping[str, str] | None = None,
  options: Mapping[str, str] | None = None,
  rate: Fraction | int = RATE,
  unit: Fraction | None = None,
  begin: float = 0.0,
  sound: str | None = None,
  before: Callable[[av.container.OutputContainer], Callable[[], None]] | None = None,
  aspect: Fraction | None = None,
  filters: tuple[str, str] | None = None,
) -> Recorded:
  """Writes a video file.

  Args:
    path: to write.
    codec: name of an encoder.
    recorded: pictures and times; None: `film`.
    pixels: format of the encoder's pixels.
    matrix, full: how colours become luma and chroma, '601', '709' or '2020', of limited or full range; it is noted.
    stored: turns a picture before it is encoded, for files that say how to turn it back.
    container: of FFmpeg; None: by the name.
    muxer, options: of FFmpeg's muxer and encoder.
    rate: that the header names.
    unit: seconds of a unit of timestamps; None: 1 / rate.
    begin: seconds of the first picture; sound begins at 0.
    sound: encoder of a silent track beside it.
    before: adds other streams first and gives what writes them; the video is flagged as the default.
    aspect: width of a pixel by its height.
    filters: (name, arguments) of a bit-stream filter.

  Returns:
    What was recorded.
  """
  recorded = film() if recorded is None else recorded
  with av.open(os.fspath(path), 'w', format=container, options=dict(muxer or {})) as out:
    opening = before(out) if before is not None else None
    stream = out.add_stream(codec, rate=rate, options={**_QUICK.get(codec, {'qmin': '1', 'q': '1'}), **(options or {})})
    first = recorded.pictures[0] if stored is None else stored(recorded.pictures[0])
    stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pixels
    if codec != 'libsvtav1':  # which takes a quality or a rate
      stream.bit_rate = 4_000_000
    if aspect:
      stream.codec_context.sample_aspect_ratio = aspect
    if before is not None:
      stream.disposition = av.stream.Disposition.default
    stream.codec_context.time_base = unit or 1 / Fraction(rate)
    in_luma = pixels.startswith(('yuv', 'gray'))
    if in_luma:
      stream.codec_context.colorspace, stream.codec_context.color_range = _MATRICES[matrix][0], 2 if full else 1
    audio = out.add_stream(sound, rate=_SOUND_RATE, layout='stereo') if sound else None
    if opening:
      opening()
    if audio:
      for part in _silence(begin + recorded.seconds[-1]):
        out.mux(audio.encode(part))
    copy = filters and av.bitstream.BitStreamFilterContext('='.join(filters), stream)
    for picture, at in zip(recorded.pictures, recorded.seconds, strict=True):
      pixels_HxWx3 = np.ascontiguousarray(picture if stored is None else stored(picture))
      if in_luma:
        frame = luma_frame(pixels_HxWx3, pixels, matrix, full)
      else:
        frame = av.VideoFrame.from_ndarray(pixels_HxWx3, 'rgb24').reformat(format=pixels)
      frame.time_base = stream.codec_context.time_base
      frame.pts = round((begin + at) / frame.time_base)
      _mux(out, stream.encode(frame), copy)
    _mux(out, stream.encode(), copy)
    if audio:
      out.mux(audio.encode())
  return recorded


def luma_frame(picture_HxWx3: np.ndarray, pixels: str, matrix: str, full: bool) -> av.VideoFrame:
  """A picture as luma and chroma, by the formulas of BT.601, 709 and 2020 and not by FFmpeg's.

  Args:
    picture_HxWx3: uint8.
    pixels: planar format of FFmpeg.
    matrix: '601', '709' or '2020'.
    full: whether luma takes all values, or 16 to 235 (of 8 bits).
  """
  number, red, blue = _MATRICES[matrix]
  r_HxW, g_HxW, b_HxW = np.moveaxis(picture_HxWx3 / 255, -1, 0)
  y_HxW = red * r_HxW + (1 - red - blue) * g_HxW + blue * b_HxW
  parts = [y_HxW, (b_HxW - y_HxW) / (2 - 2 * blue), (r_HxW - y_HxW) / (2 - 2 * red), np.ones_like(y_HxW)]
  frame = av.VideoFrame(*picture_HxWx3.shape[1::-1], pixels)
  for i, (plane, component) in enumerate(zip(frame.planes, frame.format.components, strict=True)):
    bits = component.bits
    most, unit = (1 << bits) - 1, 1 << (bits - 8)
    scale, offset = ((most, 0), (most, 1 << (bits - 1)), (most, 1 << (bits - 1)), (most, 0))[i]
    if not full and i < 3:
      scale, offset = ((219 * unit, 16 * unit), (224 * unit, 128 * unit), (224 * unit, 128 * unit))[i]
    values_HxW = np.rint(_smaller(parts[i], plane.height, plane.width) * scale + offset).clip(0, most)
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    data = values_HxW.astype('<u2' if bits > 8 else np.uint8).view(np.uint8)
    rows[:, : data.shape[1]] = data
    plane.update(rows.tobytes())
  frame.colorspace, frame.color_range = number, 2 if full else 1
  return frame


def _smaller(part_HxW: np.ndarray, height: int, width: int) -> np.ndarray:
  """Means of blocks; the last row and column are repeated where sides are odd."""
  down, across = -(-part_HxW.shape[0] // height), -(-part_HxW.shape[1] // width)
  missing = ((0, down * height - part_HxW.shape[0]), (0, across * width - part_HxW.shape[1]))
  return np.pad(part_HxW, missing, 'edge').reshape(height, down, width, across).mean((1, 3))


def _mux(out, packets, copy) -> None:
  for packet in packets:
    out.mux(copy.filter(packet) if copy else packet)


def _silence(seconds: float):
  for i in range(int(seconds * _SOUND_RATE / 1920)):
    part = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1920), np.int16), format='s16', layout='stereo')
    part.sample_rate, part.pts, part.time_base = _SOUND_RATE, 1920 * i, Fraction(1, _SOUND_RATE)
    yield part


def write_sound(path: Path, codec: str = 'aac') -> Recorded:
  """A file that has no video."""
  with av.open(os.fspath(path), 'w') as out:
    stream = out.add_stream(codec, rate=_SOUND_RATE, layout='stereo')
    for part in _silence(1):
      out.mux(stream.encode(part))
    out.mux(stream.encode())
  return Recorded([], [])


def thumbnail(disposition: int) -> Callable[[av.container.OutputContainer], Callable[[], None]]:
  """For `write`: a picture of its own as stream 0, with a disposition of FFmpeg's."""

  def add(out) -> Callable[[], None]:
    stream = out.add_stream('mjpeg', rate=RATE)
    stream.width, stream.height, stream.pix_fmt, stream.disposition = 160, 120, 'yuvj420p', disposition

    def opening() -> None:
      frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), 200, np.uint8), 'rgb24')
      for packet in [*stream.encode(frame), *stream.encode()]:
        out.mux(packet)

    return opening

  return add


def note_matrix(path: Path, entries: tuple[int, int, int, int]) -> None:
  """Writes a display matrix (a, b, c, d) into the track header of an MP4 or QuickTime file."""
  a, b, c, d = entries
  data = bytearray(path.read_bytes())
  struct.pack_into('>9i', data, data.index(b'tkhd') + 44, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
  path.write_bytes(data)
