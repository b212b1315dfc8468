"""The rows of `benchmarks.media_matrix` that are pictures."""

import functools
import io
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.media_recordings import SIZE, Recorded, grey, scene
from benchmarks.media_rows import Row

_ORIENTATION = 0x0112  # of EXIF
# How the rows and columns of a scene are stored under each value of EXIF's orientation.
_STORED = {
  1: lambda p: p,
  2: lambda p: p[:, ::-1],
  3: lambda p: p[::-1, ::-1],
  4: lambda p: p[::-1],
  5: lambda p: p.swapaxes(0, 1),
  6: lambda p: p.swapaxes(0, 1)[::-1],
  7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
  8: lambda p: p.swapaxes(0, 1)[:, ::-1],
}
_NO_WHITE = 'nothing says which value is white'


def picture_rows(ffmpeg: str | None) -> Iterator[Row]:
  """All rows; those that Pillow cannot write need the program `ffmpeg`, and are left out where it is None."""
  for rows in (_turned(), _jpegs(), _modes(), _deep(), _animations(), _damaged()):
    for row in rows:
      yield row._replace(still=True)
  if ffmpeg is not None:
    for name, what, options, refuse, still in (
      ('still.jxl', 'JPEG XL', ('-c:v', 'libjxl', '-distance', '0.5'), 'no decoder of it here', True),
      ('still.qoi', 'QOI', (), '', True),
      ('still.dpx', 'DPX, which Pillow does not know: a video of one frame', (), '', False),
    ):
      yield Row(name, what, functools.partial(_converted, ffmpeg=ffmpeg, options=options), refuse, still=still)


def _saved(pixels: np.ndarray | Image.Image, **options) -> Callable[[Path], Recorded]:
  """The scene, saved by Pillow from other pixels."""

  def make(path: Path) -> Recorded:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    picture.save(path, **options)
    plain = picture.mode in ('L', 'I;16', '1', 'LA', 'I', 'F')
    return Recorded([grey(scene(5)) if plain else scene(5)], [0.0])

  return make


def _rgb() -> Image.Image:
  return Image.fromarray(scene(5))


def _turned() -> Iterator[Row]:
  for value, turn in _STORED.items():
    note = Image.Exif()
    note[_ORIENTATION] = value
    what = f'JPEG, EXIF orientation {value}'
    yield Row(f'exif_{value}.jpg', what, _saved(turn(scene(5)), quality=95, subsampling=0, exif=note))
  note = Image.Exif()
  note[_ORIENTATION] = 6
  for kind, options in (
    ('png', {}),
    ('webp', {'lossless': True}),
    ('tif', {}),
    ('avif', {'quality': 95, 'subsampling': '4:4:4'}),
  ):
    yield Row(f'exif_6.{kind}', f'{kind.upper()}, orientation 6', _saved(_STORED[6](scene(5)), exif=note, **options))


def _jpegs() -> Iterator[Row]:
  for name, what, picture, options in (
    ('420.jpg', 'JPEG, 4:2:0', _rgb(), {'subsampling': 2}),
    ('422.jpg', 'JPEG, 4:2:2', _rgb(), {'subsampling': 1}),
    ('progressive.jpg', 'JPEG, progressive', _rgb(), {'progressive': True}),
    ('grey.jpg', 'JPEG, grey', _rgb().convert('L'), {}),
    ('rgb.jpg', 'JPEG, RGB inside', _rgb(), {'keep_rgb': True}),
    ('cmyk.jpg', 'JPEG, CMYK (Adobe, inverted)', _rgb().convert('CMYK'), {}),
    ('stereo.mpo', 'MPO: two pictures of a stereo camera', _rgb(), {'save_all': True, 'append_images': [_rgb()]}),
  ):
    make = _saved(picture, quality=95, **options)
    yield Row(name, what, make)
  odd = scene(5, (67, 113))
  odd_sides = functools.partial(_plain, picture=Image.fromarray(odd), pictures=[odd], quality=95, subsampling=2)
  yield Row('odd.jpg', 'JPEG, odd sides', odd_sides)


def _modes() -> Iterator[Row]:
  clear = _rgb().convert('RGBA')
  clear.putalpha(Image.linear_gradient('L').resize(SIZE[::-1]))
  palette = _rgb().quantize(64)
  for name, what, picture, options in (
    ('rgb.png', 'PNG, RGB', _rgb(), {}),
    ('alpha.png', 'PNG with transparency', clear, {}),
    ('grey.png', 'PNG, grey', _rgb().convert('L'), {}),
    ('grey_alpha.png', 'PNG, grey with transparency', _rgb().convert('LA'), {}),
    ('palette.png', 'PNG, palette', palette, {}),
    ('clear_palette.png', 'PNG, palette with a clear colour', palette, {'transparency': 3}),
    ('lossy.webp', 'WebP', _rgb(), {'quality': 95}),
    ('lossless.webp', 'WebP, lossless', _rgb(), {'lossless': True}),
    ('alpha.webp', 'WebP with transparency', clear, {'lossless': True, 'exact': True}),
    ('still.avif', 'AVIF, 4:2:0', _rgb(), {'quality': 95, 'subsampling': '4:2:0'}),
    ('alpha.avif', 'AVIF with transparency', clear, {'quality': 95}),
    ('still.gif', 'GIF', palette, {}),
    ('still.bmp', 'BMP', _rgb(), {}),
    ('palette.bmp', 'BMP, palette', palette, {}),
    ('still.ppm', 'PPM', _rgb(), {}),
    ('still.pgm', 'PGM', _rgb().convert('L'), {}),
    ('still.tga', 'TGA', _rgb(), {}),
    ('still.pcx', 'PCX', _rgb(), {}),
    ('still.jp2', 'JPEG 2000', _rgb(), {}),
    ('still.ico', 'ICO', _rgb(), {'sizes': [SIZE[::-1]]}),
    ('still.tif', 'TIFF', _rgb(), {}),
    ('lzw.tif', 'TIFF, LZW', _rgb(), {'compression': 'tiff_lzw'}),
    ('jpeg.tif', 'TIFF with JPEG inside', _rgb(), {'compression': 'jpeg', 'quality': 95}),
    ('cmyk.tif', 'TIFF, CMYK', _rgb().convert('CMYK'), {}),
    ('pages.tif', 'TIFF of two pages: the first', _rgb(), {'save_all': True, 'append_images': [_rgb().rotate(180)]}),
  ):
    make = _saved(picture, **options)
    yield Row(name, what, make)
  line = scene(5)[:1]
  yield Row('one_high.png', '1 pixel high', functools.partial(_plain, picture=Image.fromarray(line), pictures=[line]))


def _deep() -> Iterator[Row]:
  luma_HxW = grey(scene(5))[..., 0]
  deep_HxW = luma_HxW.astype(np.uint16) * 257
  for name, what, pixels, refuse in (
    ('grey_16.png', 'PNG, grey of 16 bits', deep_HxW, ''),
    ('grey_16.tif', 'TIFF, grey of 16 bits', deep_HxW, ''),
    ('grey_16.jp2', 'JPEG 2000, grey of 16 bits', deep_HxW, ''),
    ('floats.tif', 'TIFF, floats', luma_HxW.astype(np.float32) / 255, _NO_WHITE),
    ('integers.tif', 'TIFF, 32-bit integers', luma_HxW.astype(np.int32), _NO_WHITE),
  ):
    yield Row(name, what, _saved(pixels), refuse)
  height, width = SIZE
  black = luma_HxW > 127
  yield Row('bits.png', 'PNG, black and white', functools.partial(
    _plain, picture=Image.fromarray(black), pictures=[np.where(black[..., None], 255, np.zeros_like(scene(5)))],
  ))  # fmt: skip
  yield Row('deep.pgm', 'PGM, 10 bits', functools.partial(
    _bytes, data=b'P5 %d %d 1023\n' % (width, height) + np.rint(luma_HxW / 255 * 1023).astype('>u2').tobytes(),
    pictures=[grey(scene(5))],
  ))  # fmt: skip
  yield Row('rgb_16.ppm', 'PPM, 16 bits', functools.partial(
    _bytes, data=b'P6 %d %d 65535\n' % (width, height) + (scene(5).astype('>u2') * 257).tobytes(), pictures=[scene(5)],
  ))  # fmt: skip
  yield Row('rgb_16.png', 'PNG, RGB of 16 bits', functools.partial(_bytes, data=_png_16(), pictures=[scene(5)]))


def _png_16() -> bytes:
  """Pillow writes no RGB of 16 bits."""
  import zlib

  height, width = SIZE
  rows = b''.join(b'\0' + row.astype('>u2').__mul__(257).astype('>u2').tobytes() for row in scene(5).astype(int))
  chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
  head = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def _plain(path: Path, picture: Image.Image, pictures: list[np.ndarray], **options) -> Recorded:
  picture.save(path, **options)
  return Recorded(pictures, [0.0] * len(pictures))


def _bytes(path: Path, data: bytes, pictures: list[np.ndarray]) -> Recorded:
  path.write_bytes(data)
  return Recorded(pictures, [0.0] * len(pictures))


def _animations() -> Iterator[Row]:
  """Predictions see a video; `image_folder` takes the first picture."""

  def make(path: Path, **options) -> Recorded:
    pictures = [scene(i) for i in range(4)]
    first, *rest = map(Image.fromarray, pictures)
    first.save(path, save_all=True, append_images=rest, duration=200, **options)
    return Recorded(pictures, [0.2 * i for i in range(4)])

  yield Row('moving.gif', 'GIF of several pictures, by Pillow', make, '', 25.0)
  yield Row('moving.webp', 'WebP of several pictures', functools.partial(make, lossless=True))
  yield Row('moving.png', 'PNG of several pictures, by Pillow', make)
  yield Row('moving.avif', 'AVIF of several pictures', functools.partial(make, quality=95, subsampling='4:4:4'))


def _damaged() -> Iterator[Row]:
  def cut(path: Path, share: float, **options) -> Recorded:
    file = io.BytesIO()
    _rgb().save(file, {'jpg': 'JPEG'}.get(path.suffix[1:], path.suffix[1:]), **options)
    path.write_bytes(file.getvalue()[: int(share * len(file.getvalue()))])
    return Recorded([scene(5)], [0.0])

  for kind in ('jpg', 'png', 'webp', 'gif', 'bmp', 'avif'):
    yield Row(
      f'half_still.{kind}', f'{kind.upper()}, cut in the middle', functools.partial(cut, share=0.5), 'it is cut'
    )

  def changed(path: Path) -> Recorded:
    cut(path, 1.0)
    data = bytearray(path.read_bytes())
    at = data.index(b'IDAT')
    data[at + 40 : at + 44] = bytes(b ^ 255 for b in data[at + 40 : at + 44])
    path.write_bytes(data)
    return Recorded([scene(5)], [0.0])

  def junk(path: Path) -> Recorded:
    cut(path, 1.0, quality=95)
    path.write_bytes(path.read_bytes() + b'<html>' * 100)
    return Recorded([scene(5)], [0.0])

  yield Row('bytes.png', 'PNG, 4 bytes changed', changed, 'its bytes are changed')
  yield Row('junk.jpg', 'JPEG with junk behind its end', junk)
  svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"><rect width="9" height="9"/></svg>'
  yield Row('drawing.svg', 'SVG: a drawing', functools.partial(_bytes, data=svg, pictures=[]), 'it has no pixels')


def _converted(path: Path, ffmpeg: str, options: tuple[str, ...]) -> Recorded:
  source = path.with_name('original.ppm')
  _rgb().save(source)
  command = [ffmpeg, '-v', 'error', '-nostdin', '-y', '-i', source, *options, path]
  subprocess.run(command, check=True, timeout=60)
  return Recorded([scene(5)], [0.0])
