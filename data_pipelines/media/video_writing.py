"""Pictures as a video file that people can play: H.264, MPEG-4 or a GIF, whichever PyAV can write."""

from collections.abc import Iterable

import av
import numpy as np
from PIL import Image

from data_pipelines.media import compact

_ENCODERS = ('libx264', 'mpeg4')
_GIF_FRAMES = 200


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
