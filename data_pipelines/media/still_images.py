"""A picture file's pixels as 8-bit RGB, upright: what builds store and predictions see. Pillow, no TensorFlow."""

import os

import numpy as np
from PIL import Image, ImageFont, ImageOps

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO, _PLANAR, _APART, _SAMPLES, _SIGNED = 258, 262, 0, 284, 2, 339, 2  # of TIFF

LARGEST_FILE = 1 << 30  # bytes; our choice: 178 million pixels, the most that Pillow takes, have half of it as RGB


def is_named_as_one(path: str) -> bool:
  """Whether a file has the ending of a picture, of any kind that Pillow knows."""
  Image.init()
  return Image.EXTENSION.get(os.path.splitext(path)[1].lower(), 'MPEG') != 'MPEG'  # which is a video


class Refused(ValueError):
  """A picture whose pixels have no range that is known: a sentence that goes on from the name of the file."""


def opened(path: str) -> Image.Image:
  """The file as Pillow opens it; raises what Pillow raises, or Refused."""
  picture = Image.open(path)
  if picture.format == 'EPS':  # a program, which may open other files, whatever the name of this one
    picture.close()
    raise Refused('it is a drawing in PostScript, which another program would have to draw: save it as a PNG')
  # By this name Pillow would map raw pixels into memory, by the size that they have once they are turned.
  picture.filename = ''
  return picture


def upright(picture: Image.Image) -> Image.Image:
  """The picture as RGB, turned as its EXIF note says.

  Grey of 16 bits is scaled by its range; transparency is left out.

  Raises:
    Refused: its pixels are floats or 32-bit integers, or colours of 16 bits in planes. Pillow raises anything on broken
      bytes.
  """
  if picture.format == 'TIFF' and picture.tag_v2.get(_PLANAR) == _APART and max(picture.tag_v2.get(_BITS, (8,))) > 8:
    raise Refused('has colours of more than 8 bits in planes, which are not read: save it with interleaved pixels.')
  turned = ImageOps.exif_transpose(picture)
  white = _white(picture)
  if white is None:
    return turned.convert('RGB')
  grey_HxW = np.asarray(turned).astype(np.float32) * (255 / white)
  if picture.format == 'TIFF' and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    grey_HxW = 255 - grey_HxW
  return Image.fromarray(np.rint(np.clip(grey_HxW, 0, 255)).astype(np.uint8)).convert('RGB')


def _white(picture: Image.Image) -> int | None:
  """The value of white where a grey pixel has more than 8 bits; None: of all others, Pillow knows."""
  signed = picture.format == 'FITS' or (picture.format == 'TIFF' and _SIGNED in _all(picture.tag_v2.get(_SAMPLES, 1)))
  if signed and picture.mode != 'F':  # of 8 and 16 bits, which Pillow takes for unsigned
    raise _no_white('32-bit or signed integers')
  if picture.mode.startswith('I;16'):
    bits = picture.tag_v2.get(_BITS, (16,))[0] if picture.format == 'TIFF' else 16  # TIFF has 12 as well
    return 2**bits - 1
  if picture.mode == 'I' and picture.format in ('PNG', 'PPM'):  # 16 bits there, which Pillow gives as 32
    return 65535
  if picture.mode in ('I', 'F'):
    kind = 'floats' if picture.mode == 'F' else '32-bit or signed integers'
    raise _no_white(kind)
  return None


def _no_white(kind: str) -> Refused:
  return Refused(f'has grey pixels that are {kind}, and nothing says which is white: save it with 8 or 16 bits.')


def _all(value: int | tuple[int, ...]) -> tuple[int, ...]:
  return value if isinstance(value, tuple) else (value,)


def font(size: int) -> ImageFont.FreeTypeFont:
  """DejaVu Sans, which matplotlib brings: it has the letters of most alphabets, though none of East Asia."""
  import matplotlib

  return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)
