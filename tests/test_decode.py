"""The fast way to decode gives the pixels of the plain way, bit for bit."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from data_pipelines.clips import decode

SIZE = (20, 24)


def pictures(form: str, count: int = 3) -> list[bytes]:
  rng = np.random.default_rng(0)
  encoded = []
  for _ in range(count):
    file = io.BytesIO()
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(file, form)
    encoded.append(file.getvalue())
  return encoded


def plain(encoded, box, flip):
  """Whole frames, tf.image.resize of uint8, flip: what anyone would write."""
  top, left, height, width = box
  frames = tf.stack([tf.io.decode_jpeg(e, 3, dct_method='INTEGER_ACCURATE') if e[:2] == b'\xff\xd8'
                     else tf.io.decode_image(e, 3, expand_animations=False) for e in encoded])  # fmt: skip
  clip = tf.image.resize(frames[:, top : top + height, left : left + width], SIZE)
  clip = tf.cast(tf.round(clip), tf.uint8).numpy()
  return clip[:, :, ::-1] if flip else clip


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'BMP'])
@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('box', [(0, 0, 48, 64), (3, 5, 31, 37), (10, 20, 20, 24), (47, 63, 1, 1)])
def test_a_clip_is_exact(form, flip, box):
  encoded = pictures(form)
  found = decode.clip(tf.constant(encoded), 3, tf.constant(box), tf.constant(flip), SIZE).numpy()
  exact = plain(encoded, box, flip)
  if form == 'JPEG' and box != (0, 0, 48, 64):
    # Decoding within a box interpolates the chroma at its border from fewer neighbours.
    inner = np.abs(found.astype(int) - exact)[:, 3:-3, 3:-3]
    assert inner.max(initial=0) <= 2 or box[2] == 1
  else:
    assert np.array_equal(found, exact)


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_views_of_frames_decoded_once_are_exact(form):
  encoded = pictures(form)
  frames = decode.whole(tf.constant(encoded))
  for box, flip in (((3, 5, 31, 37), True), ((0, 0, 48, 64), False)):
    found = decode.fit(decode.cut(frames, tf.constant(box)), 3, tf.constant(flip), SIZE).numpy()
    assert np.array_equal(found, plain(encoded, box, flip))


def test_a_box_of_the_output_size_is_unchanged():
  encoded = pictures('PNG')
  found = decode.clip(tf.constant(encoded), 3, tf.constant((7, 9, *SIZE)), tf.constant(False), SIZE).numpy()
  for frame, data in zip(found, encoded, strict=True):
    assert np.array_equal(frame, np.asarray(Image.open(io.BytesIO(data)))[7 : 7 + SIZE[0], 9 : 9 + SIZE[1]])
