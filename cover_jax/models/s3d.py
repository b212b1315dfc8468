"""S3D and S3D-G (Xie et al. 2018, arXiv 1712.04851): Inception over space and time, each convolution factored.

Without gating it is torchvision's `s3d`, whose weights fit. With it, features are weighted by what is seen in the whole
clip after each convolution in time (section 5; where it stands in the network is our reading).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models.convolutions import Unit, lengths_after, max_pool, shortest
from cover_jax.models.encoder import Count, Encoded, Encoder, check_levels
from data_pipelines.declared import flag

# Channels of the four branches of each Inception block: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | pool, 1x1x1.
_BLOCKS: tuple[tuple[tuple[int, ...], ...], ...] = (
  ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
  (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
  ),
  ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
_IN_TIME = ((7, 2, 3), (3, 2, 1), (2, 2, 0))
_IN_SPACE = ((7, 2, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1), (2, 2, 0))


class Gate(nn.Module):
  """x * sigmoid(W mean(x) + b), the mean over the clip."""

  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxHxWxC: jax.Array) -> jax.Array:
    kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, 'embed'))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
    linear = nn.Dense(x_BxTxHxWxC.shape[-1], dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init, name='fc')
    return x_BxTxHxWxC * nn.sigmoid(linear(x_BxTxHxWxC.mean(axis=(1, 2, 3), keepdims=True)))


class S3D(Encoder):
  """Encodes clips of at least 5 frames; an image is too short for its poolings in time.

  Attributes:
    gating: S3D-G.
    divide: divides all channels; 1 is the paper's network, more make a small one.
    freeze_statistics: normalise by the running statistics in training, too, and leave them as they are.
    dtype: of the computation. Parameters and statistics are float32.
  """

  gating: Annotated[bool, flag] = False
  divide: Count = 1
  freeze_statistics: Annotated[bool, flag] = False
  dtype: Any = jnp.float32

  DEBUG: ClassVar[Mapping[str, Any]] = {'divide': 16}

  @property
  def width(self) -> int:
    a, _, b, _, c, d = (n // self.divide for n in _BLOCKS[-1][-1])
    return a + b + c + d

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f'stage{i + 1}' for i in range(len(_BLOCKS) + 1))

  @property
  def num_layers(self) -> int:
    return len(_BLOCKS) + 1

  def layer(self, name: str) -> int:
    return int(name.split('_')[0].removeprefix('stage')) - 1 if name.startswith('stage') else 0

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    if not lengths_after(frames, _IN_TIME):
      return f'a clip must have at least {shortest(_IN_TIME)} frames, since time is pooled; an image has one'
    if not all(lengths_after(side, _IN_SPACE) for side in size):
      return f'the height and width of a clip must be at least {shortest(_IN_SPACE)}'
    return ''

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, normalised.
      train: normalise by the statistics of the batch and move the running ones: 'batch_stats' must be mutable.
      levels: of `level_names`; the map at the end of that stage.

    Returns:
      `Encoded`; tokens are the last map. The feature is the mean over all windows of 2 x 7 x 7 of their means, as
      released: places at the border of a larger map count less.
    """
    check_levels(self, levels)
    use_running = self.freeze_statistics or not train
    kept = {}
    x = self._factored('stem', clip_BxTxHxWx3.astype(self.dtype), 64 // self.divide, 7, 2, use_running)
    x = max_pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = self._unit('stage1_0', x, 64 // self.divide, use_running)
    kept['stage1'] = x = self._factored('stage1_1', x, 192 // self.divide, 3, 1, use_running)
    pools = (((1, 3, 3), (1, 2, 2), (0, 1, 1)), ((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((2, 2, 2), (2, 2, 2), (0, 0, 0)))
    for i, (stage, pool) in enumerate(zip(_BLOCKS, pools, strict=True)):
      x = max_pool(x, *pool)
      for j, channels in enumerate(stage):
        x = self._inception(f'stage{i + 2}_{j}', x, tuple(n // self.divide for n in channels), use_running)
      kept[f'stage{i + 2}'] = x
    window = tuple(min(a, b) for a, b in zip((2, 7, 7), x.shape[1:4], strict=True))
    feature_BxD = nn.avg_pool(x, window).mean(axis=(1, 2, 3))
    return Encoded(feature_BxD, x, {name: kept[name] for name in levels})

  def _unit(self, name, x, features, use_running, kernel=(1, 1, 1), stride=(1, 1, 1)):
    unit = Unit(features, kernel, stride, momentum=1e-3, epsilon=1e-3, dtype=self.dtype, name=name)
    return unit(x, use_running)

  def _factored(self, name, x, features, k, s, use_running):
    x = self._unit(f'{name}_space', x, features, use_running, (1, k, k), (1, s, s))
    x = self._unit(f'{name}_time', x, features, use_running, (k, 1, 1), (s, 1, 1))
    return Gate(self.dtype, name=f'{name}_gate')(x) if self.gating else x

  def _inception(self, name, x, channels, use_running):
    one, two_in, two, three_in, three, four = channels
    pooled = max_pool(x, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    narrow = [self._unit(f'{name}_{branch}_in', x, n, use_running) for branch, n in ((1, two_in), (2, three_in))]
    branches = [
      self._unit(f'{name}_0', x, one, use_running),
      self._factored(f'{name}_1', narrow[0], two, 3, 1, use_running),
      self._factored(f'{name}_2', narrow[1], three, 3, 1, use_running),
      self._unit(f'{name}_3', pooled, four, use_running),
    ]
    return jnp.concatenate(branches, axis=-1)
