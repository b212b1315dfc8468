"""A picture file's pixels as 8-bit RGB, upright: what builds store and predictions see. Pillow, no TensorFlow."""

import os

import numpy as np
from PIL import Image, ImageFont, ImageOps

_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO, _PLANAR, _APART = 258, 262, 0, 284, 2  # of TIFF

LARGEST_FILE = 1 << 30  # bytes; our choice: 178 million pixels, the most that Pillow takes, have half of it as RGB


def is_named_as_one(path: str) -> bool:
  """Whether a file has the ending of a picture, of any kind that Pillow knows."""
  Image.init()
  return Image.EXTENSION.get(os.path.splitext(path)[1].lower(), 'MPEG') != 'MPEG'  # which is a video


class Refused(ValueError):
  """A picture whose pixels have no range that is known: a sentence that goes on from the name of the file."""


def opened(path: str) -> Image.Image:
  """The file as Pillow opens it; raises what Pillow raises."""
  picture = Image.open(path)
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
  if picture.mode.startswith('I;16'):
    bits = picture.tag_v2.get(_BITS, (16,))[0] if picture.format == 'TIFF' else 16  # TIFF has 12 as well
    return 2**bits - 1
  if picture.mode == 'I' and picture.format in ('PNG', 'PPM'):  # 16 bits there, which Pillow gives as 32
    return 65535
  if picture.mode in ('I', 'F'):
    kind = 'floats' if picture.mode == 'F' else '32-bit or signed integers'
    raise Refused(f'has grey pixels that are {kind}, and nothing says which is white: save it with 8 or 16 bits.')
  return None


def font(size: int) -> ImageFont.FreeTypeFont:
  """DejaVu Sans, which matplotlib brings: it has the letters of most alphabets, though none of East Asia."""
  import matplotlib

  return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)
