"""The weights and clips of tests/data/torchvision_video.json, and how its numbers were taken from arrays."""

import math
import zlib

import numpy as np

# (clips, frames, pixels) for each network; S3D's last pooling needs a map of 2 x 7 x 7.
GEOMETRY = {
  'r3d_18': (4, 8, 48),
  'mc3_18': (4, 8, 48),
  'r2plus1d_18': (4, 8, 48),
  's3d': (1, 16, 224),
}


def array_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 values of one array of a state dict, from its name and shape."""
  rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
  wave = rng.uniform(-1, 1, shape)
  if name.endswith('running_var'):
    return (1 + 0.5 * wave).astype(np.float32)
  if len(shape) == 1:
    return (0.2 * wave + name.endswith('weight')).astype(np.float32)
  return (wave * math.sqrt(6 / math.prod(shape[1:]))).astype(np.float32)


def clip_of(geometry: tuple[int, int, int]) -> np.ndarray:
  clips, frames, pixels = geometry
  return np.random.Generator(np.random.Philox(7)).uniform(-1, 1, (clips, frames, pixels, pixels, 3)).astype(np.float32)


def probe(array: np.ndarray) -> list[float]:
  """[norm, product with a fixed random direction]: two numbers that tell an array from its negative and its mirror."""
  flat = np.asarray(array, np.float64).ravel()
  direction = np.random.Generator(np.random.Philox(flat.size)).standard_normal(flat.size)
  return [float(np.linalg.norm(flat)), float(flat @ direction / math.sqrt(flat.size))]
