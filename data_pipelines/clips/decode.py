"""Encoded frames to clips, in TensorFlow: decode, crop, resize, mirror.

A clip of 8 frames of 340 x 256 to 224 x 224 takes 2.1 ms of CPU to decode and 1.4 to resize (docs/input.md). Three
choices carry that. The last two change no bit; the first interpolates the colour of the pixels along the border of the
box from fewer neighbours (tests/test_decode.py).

- A JPEG is decoded within the box only, where one view alone shows it. Several views of an example share frames, so
  their union is decoded once, whole, and each view cuts its box out of the pixels.
- The resize kernel works in float32. Given uint8 it converts every neighbour of every output pixel anew, so one cast
  beforehand halves its time.
- Mirroring [rows, width, 3] has a fast kernel, mirroring [frames, height, width, 3] does not.
"""

import tensorflow as tf

from data_pipelines.clips import affine


def clip(encoded, length: int, box, flip, size: tuple[int, int]):
  """Shows one box of some frames.

  Args:
    encoded: string [length], in any format that TensorFlow decodes (JPEG, PNG, BMP, GIF).
    length: T of the clip.
    box: int32 [4]: top, left, height, width in pixels of the frames.
    flip: bool [], mirror left and right.
    size: (H, W) of the clip.

  Returns:
    uint8 [T, H, W, 3], bilinear without antialiasing; a box of exactly `size` comes out unchanged.
  """

  def of_jpeg():
    # The accurate DCT is what other decoders use; with SIMD the fast one saves nothing (measured).
    crop = lambda frame: tf.io.decode_and_crop_jpeg(frame, box, channels=3, dct_method='INTEGER_ACCURATE')
    return tf.stack([crop(encoded[i]) for i in range(length)])

  def of_others():
    return tf.stack([cut(tf.io.decode_image(encoded[i], 3, expand_animations=False), box) for i in range(length)])

  return fit(tf.cond(tf.io.is_jpeg(encoded[0]), of_jpeg, of_others), length, flip, size)


def whole(encoded):
  """uint8 [U, h, w, 3] of string [U]: all of each frame, once, for several views."""

  def of_jpeg():
    decode = lambda frame: tf.io.decode_jpeg(frame, channels=3, dct_method='INTEGER_ACCURATE')
    return tf.map_fn(decode, encoded, fn_output_signature=tf.uint8)

  def of_others():
    decode = lambda frame: tf.io.decode_image(frame, channels=3, expand_animations=False)
    return tf.map_fn(decode, encoded, fn_output_signature=tf.uint8)

  frames_UxHxWx3 = tf.cond(tf.io.is_jpeg(encoded[0]), of_jpeg, of_others)
  frames_UxHxWx3.set_shape((None, None, None, 3))
  return frames_UxHxWx3


def cut(frames_xHxWx3, box):
  """The box of frames: [..., height, width, 3]."""
  top, left, height, width = tf.unstack(box)
  return frames_xHxWx3[..., top : top + height, left : left + width, :]


def fit(frames_TxHxWx3, length: int, flip, size: tuple[int, int]):
  """Resizes uint8 frames of any one size to [length, *size, 3] and mirrors them if `flip`."""
  clip_TxHxWx3 = tf.image.resize(tf.cast(frames_TxHxWx3, tf.float32), size)
  clip_TxHxWx3 = tf.cast(tf.round(clip_TxHxWx3), tf.uint8)  # bilinear weights sum to one: no value leaves [0, 255]
  rows_xWx3 = tf.reshape(clip_TxHxWx3, (length * size[0], size[1], 3))
  rows_xWx3 = tf.cond(flip, lambda: tf.reverse(rows_xWx3, [1]), lambda: rows_xWx3)
  return tf.reshape(rows_xWx3, (length, *size, 3))


def warp(clip_TxHxWx3, map_8):
  """Applies a map of `affine.projective` to all frames of a uint8 clip, bilinear; the identity costs nothing."""

  def warped():
    frames = tf.raw_ops.ImageProjectiveTransformV3(
      images=tf.cast(clip_TxHxWx3, tf.float32),
      transforms=map_8[None],
      output_shape=tf.shape(clip_TxHxWx3)[1:3],
      fill_value=float(affine.FILL),
      interpolation='BILINEAR',
      fill_mode='CONSTANT',
    )
    return tf.cast(tf.round(frames), tf.uint8)

  still = tf.reduce_all(map_8 == affine.projective(None))
  return tf.ensure_shape(tf.cond(still, lambda: clip_TxHxWx3, warped), clip_TxHxWx3.shape)
