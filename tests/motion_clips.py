"""The clips whose flow by OpenCV is stored in data/dual_tvl1.npz: one by a formula, others from test videos."""

import pathlib

import av
import numpy as np

# {name: (file under COVER_JAX_TEST_MEDIA, first of 5 frames)}
VIDEOS = {
  'arm_wrestling': ('video/k400_arm_wrestling.mp4', 30),
  'something': ('video/ssv2_166766.mp4', 10),
  'pancake': ('video/kinetics_pancake.mkv', 31),
  'ucf': ('video/ucf_like_example.avi', 10),
}
FRAMES, SIZE = 5, (96, 128)


def formula_clip() -> np.ndarray:
  """uint8 [5, 96, 128, 3]: a texture that moves left by 1.5 and up by 0.5 pixels a frame, before it a disc that moves
  right by 2 and down by 1."""
  y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float64)

  def texture(y, x, phase):
    waves = [(0.31, 0.12), (-0.17, 0.43), (0.05, -0.29), (0.52, 0.33), (-0.41, 0.21)]
    return sum(np.sin(a * x + b * y + phase + i) for i, (a, b) in enumerate(waves)) / len(waves)

  frames = []
  for t in range(FRAMES):
    ground, disc = texture(y + 0.5 * t, x + 1.5 * t, 0.0), texture(y - t, x - 2 * t, 2.0)
    inside = np.hypot(y - 40 - t, x - 50 - 2 * t) < 22
    frames.append(np.round(127.5 + 120 * np.where(inside, disc, ground)))
  return np.repeat(np.stack(frames)[..., None], 3, axis=-1).astype(np.uint8)


def video_clip(folder: str | pathlib.Path, name: str) -> np.ndarray:
  """uint8 [5, 96, 128, 3]: the middle 192 x 256 pixels of five frames one after the other, each mean of 2 x 2."""
  file, first = VIDEOS[name]
  frames = []
  with av.open(str(pathlib.Path(folder) / file)) as container:
    for number, frame in enumerate(container.decode(video=0)):
      if first <= number < first + FRAMES:
        pixels = frame.to_ndarray(format='rgb24').astype(np.float64)
        top, left = (n - 2 * s for n, s in zip(pixels.shape, SIZE, strict=False))
        pixels = pixels[top // 2 :, left // 2 :][: 2 * SIZE[0], : 2 * SIZE[1]]
        frames.append(np.round(pixels.reshape(SIZE[0], 2, SIZE[1], 2, 3).mean(axis=(1, 3))))
  return np.stack(frames).astype(np.uint8)


def golden_clips(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
  """All of them by name."""
  return {'formula': formula_clip(), **{name: video_clip(folder, name) for name in VIDEOS}}
