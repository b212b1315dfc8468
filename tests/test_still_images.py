"""Pictures of more than 8 bits: scaled by their range, in every format that has them, or refused in one sentence."""

import io
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.contract import UserError
from data_pipelines.media import still_images, transcode, video_files
from data_pipelines.media.transcode import Failure, Settings

SETTINGS = Settings('image', short_side=0, fps=0, jpeg_quality=95)
# From black to white in steps of 8 rows, as shares of white.
SHARE_8x1 = np.arange(8)[:, None] / 7
SHARE_64x48 = np.repeat(SHARE_8x1, 8, axis=0) * np.ones((1, 48))


def tiff(bits, data, white_is_zero=False, kind=1):
  """A grey TIFF of 64 x 48 pixels; kind 1: unsigned, 2: signed, 3: floats."""
  tags = [(256, 48), (257, 64), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8), (277, 1), (278, 64)]
  tags += [(279, len(data)), (339, kind)]
  directory = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', t, 4, 1, value) for t, value in tags)
  return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + directory + bytes(4)


def fits(data):
  """A grey picture of 64 x 48 pixels as astronomers have it: signed, of 16 bits."""
  cards = {'SIMPLE': 'T', 'BITPIX': 16, 'NAXIS': 2, 'NAXIS1': 48, 'NAXIS2': 64}
  head = ''.join(f'{name:<8}= {value:>20}'.ljust(80) for name, value in cards.items()) + 'END'
  return head.ljust(2880).encode() + data.ljust(3 * 2880, b'\0')


def stored(white, kind='<u2'):
  return np.rint(SHARE_64x48 * white).astype(kind)


def packed_12():
  pairs = stored(4095).ravel().reshape(-1, 2)
  return b''.join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


def saved(picture, kind):
  file = io.BytesIO()
  picture.save(file, kind)
  return file.getvalue()


DEEP = {
  'png': lambda: saved(Image.fromarray(stored(65535)), 'PNG'),
  'jp2': lambda: saved(Image.fromarray(stored(65535)), 'JPEG2000'),
  'tif': lambda: saved(Image.fromarray(stored(65535)), 'TIFF'),
  'big.tif': lambda: saved(Image.frombytes('I;16B', (48, 64), stored(65535, '>u2').tobytes()), 'TIFF'),
  '12.tif': lambda: tiff(12, packed_12()),
  'inverted.tif': lambda: tiff(16, stored(65535)[::-1].tobytes(), white_is_zero=True),
  'pgm': lambda: b'P5 48 64 65535\n' + stored(65535, '>u2').tobytes(),
  '1023.pgm': lambda: b'P5 48 64 1023\n' + stored(1023, '>u2').tobytes(),
  '8.png': lambda: saved(Image.fromarray(stored(255, np.uint8)), 'PNG'),
}
UNKNOWN = {
  'float.tif': lambda: tiff(32, SHARE_64x48.astype('<f4').tobytes(), kind=3),
  'signed.tif': lambda: tiff(16, stored(32767, '<i2').tobytes(), kind=2),
  'signed_8.tif': lambda: tiff(8, stored(127, 'i1').tobytes(), kind=2),
  'fits': lambda: fits(stored(32767, '>i2').tobytes()),
  '32.tif': lambda: tiff(32, stored(2**31, '<u4').tobytes()),
  'pfm': lambda: b'Pf\n48 64\n-1.0\n' + SHARE_64x48.astype('<f4').tobytes(),
}


@pytest.mark.parametrize('name', DEEP)
def test_deep_grey_is_scaled_by_its_range(tmp_path, name):
  path = tmp_path / f'a.{name}'
  path.write_bytes(DEEP[name]())
  built = np.asarray(Image.open(io.BytesIO(transcode.image(str(path), SETTINGS))))
  (frame,) = video_files.frames(str(path))
  assert frame.size == (64, 48)
  for found in (built, frame.pixels()):
    assert found.shape == (64, 48, 3)
    np.testing.assert_allclose(found[4::8].mean(axis=(1, 2)), 255 * SHARE_8x1[:, 0], atol=2)


@pytest.mark.parametrize('name', UNKNOWN)
def test_grey_of_no_known_range_is_refused(tmp_path, name):
  path = tmp_path / f'a.{name}'
  path.write_bytes(UNKNOWN[name]())
  words = (
    r'has grey pixels that are (floats|32-bit or signed integers), and nothing says which is white: save it with 8'
  )
  with pytest.raises(Failure, match=f'^{words}'):
    transcode.image(str(path), SETTINGS)
  with pytest.raises(UserError, match=f'{name} {words}'):
    list(video_files.frames(str(path)))


def test_a_drawing_that_another_program_would_draw_is_refused(tmp_path):
  path = tmp_path / 'a.jpg'
  path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(b.png) run\nshowpage\n%%EOF\n')
  words = 'PostScript.*another program.*save it as a PNG'
  with pytest.raises(Failure, match=words):
    transcode.image(str(path), SETTINGS)
  for read in (video_files.header, lambda name: list(video_files.frames(name))):
    with pytest.raises(UserError, match=words):
      read(str(path))


def test_turned_deep_grey_is_upright(tmp_path):
  picture = Image.fromarray(stored(65535))
  exif = picture.getexif()
  exif[0x0112] = 3  # upside down
  picture.save(tmp_path / 'a.png', exif=exif)
  (frame,) = video_files.frames(str(tmp_path / 'a.png'))
  np.testing.assert_allclose(frame.pixels()[4::8].mean(axis=(1, 2)), 255 * SHARE_8x1[::-1, 0], atol=1)


def test_a_picture_that_would_grow_beyond_the_limit_is_refused_by_its_header(tmp_path):
  def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

  header = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 0, 0, 0, 0)
  rows = zlib.compress(bytes(20_001 * 100), 9)
  path = tmp_path / 'bomb.png'
  path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b''))
  tracemalloc.start()
  words = r'400000000 pixels.*exceeds limit of 178956970 pixels'
  with pytest.raises(Failure, match=words):
    transcode.image(str(path), SETTINGS)
  with pytest.raises(UserError, match=rf'bomb\.png cannot be opened .*{words}'):
    list(video_files.frames(str(path)))
  assert tracemalloc.get_traced_memory()[1] < 1 << 24
  tracemalloc.stop()


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'CMYK', 'I;16'])
@pytest.mark.parametrize('orientation', [5, 6, 8])
def test_a_plain_tiff_that_is_turned_is_not_sheared(tmp_path, mode, orientation):
  """Pillow maps such pixels into memory by their turned size, where it has the name of the file."""
  ramp = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40)
  plain = Image.fromarray(ramp * 60 if mode == 'I;16' else (ramp % 251).astype(np.uint8)).convert(mode)
  exif = Image.Exif()
  exif[0x0112] = orientation
  plain.save(tmp_path / 'turned.tif', exif=exif)
  other = ('packed.tif', {'compression': 'tiff_lzw'}) if mode == 'CMYK' else ('turned.png', {})
  plain.save(tmp_path / other[0], exif=exif, **other[1])
  pixels = lambda name: np.asarray(still_images.upright(still_images.opened(str(tmp_path / name))))
  found, expected = pixels('turned.tif'), pixels(other[0])
  assert found.shape == (40, 24, 3)
  np.testing.assert_array_equal(found, expected)


def test_wide_colours_in_planes_are_refused(tmp_path):
  """What Pillow makes of them is noise."""
  pixels = np.arange(3 * 8 * 8, dtype='<u2').tobytes()
  entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 220),
             (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 3, 240), (284, 3, 1, 2)]  # fmt: skip
  directory = struct.pack('<H', len(entries)) + b''.join(struct.pack('<HHII', *e) for e in entries) + bytes(4)
  head = (b'II*\0' + struct.pack('<I', 8) + directory).ljust(200, b'\0') + struct.pack('<3H', 16, 16, 16)
  head = head.ljust(220, b'\0') + struct.pack('<3I', 300, 428, 556)
  (tmp_path / 'x.tif').write_bytes(
    (head.ljust(240, b'\0') + struct.pack('<3I', 128, 128, 128)).ljust(300, b'\0') + pixels
  )
  with pytest.raises(still_images.Refused, match='in planes'):
    still_images.upright(still_images.opened(str(tmp_path / 'x.tif')))


@pytest.mark.parametrize('start', [b'', b'GIF89a\x08\0\x08\0\0\0\0'])
def test_a_picture_file_of_a_size_that_none_has_is_refused_at_once(tmp_path, start):
  path = tmp_path / 'huge.gif'
  path.write_bytes(start)
  os.truncate(path, 64 << 30)  # it takes no room on the disk
  began = time.monotonic()
  for read in (video_files.header, lambda name: list(video_files.frames(name))):
    with pytest.raises(UserError, match=r'huge\.gif has 68,719,476,736 bytes; a picture may have 1,073,741,824'):
      read(str(path))
  with pytest.raises(Failure, match='has 68,719,476,736 bytes'):
    transcode.image(str(path), SETTINGS)
  assert time.monotonic() - began < 5
