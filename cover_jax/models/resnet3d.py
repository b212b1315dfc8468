"""Residual networks over space and time: R3D, MC3 and R(2+1)D (Tran et al. 2018, arXiv 1711.11248).

With 18 layers they are torchvision's `r3d_18`, `mc3_18` and `r2plus1d_18`, whose weights fit. The networks of one block
a layer that self-supervised work trains (`depths=(1, 1, 1, 1)`, `factoring='convolution'`) are those of Xu et al.
2019 (VCOP).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models.convolutions import BatchNorm, Conv, Triple, Unit
from cover_jax.models.encoder import Encoded, Encoder, check_levels
from data_pipelines.declared import flag, one_of, several, whole

KINDS = ('r3d', 'mc3', 'r2plus1d')
FACTORINGS = ('block', 'convolution')


def middle(kernel: Triple, inputs: int, outputs: int) -> int:
  """Channels between the two halves of a factored convolution that keep its number of parameters (section 3.5)."""
  t, h, w = kernel
  return t * h * w * inputs * outputs // (h * w * inputs + t * outputs)


class Factored(nn.Module):
  """A convolution in space, normalised and rectified, then one in time."""

  features: int
  between: int
  kernel: Triple
  stride: Triple
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxHxWxC: jax.Array, use_running: bool) -> jax.Array:
    (t, h, w), (st, sh, sw) = self.kernel, self.stride
    x = Unit(self.between, (1, h, w), (1, sh, sw), dtype=self.dtype, name='space')(x_BxTxHxWxC, use_running)
    return Conv(self.features, (t, 1, 1), (st, 1, 1), dtype=self.dtype, name='time')(x)


class Block(nn.Module):
  """Two convolutions and a shortcut; the fields are those of `ResNet3D` but for
  kind: 'full', 'space' (1 x 3 x 3) or 'factored'.
  """

  kind: str
  factoring: str
  features: int
  stride: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxHxWxC: jax.Array, use_running: bool) -> jax.Array:
    inputs, s = x_BxTxHxWxC.shape[-1], self.stride
    stride = (1 if self.kind == 'space' else s, s, s)
    norm = lambda name: BatchNorm(dtype=self.dtype, name=name)
    x = nn.relu(norm('norm1')(self._conv('conv1', x_BxTxHxWxC, inputs, stride, use_running), use_running))
    x = norm('norm2')(self._conv('conv2', x, inputs, (1, 1, 1), use_running), use_running)
    shortcut = x_BxTxHxWxC
    if s != 1 or inputs != self.features:
      shortcut = norm('shortcut_norm')(self._shortcut(shortcut, stride, use_running), use_running)
    return nn.relu(x + shortcut)

  def _conv(self, name: str, x: jax.Array, inputs: int, stride: Triple, use_running: bool) -> jax.Array:
    if self.kind != 'factored':
      kernel = (1 if self.kind == 'space' else 3, 3, 3)
      return Conv(self.features, kernel, stride, dtype=self.dtype, name=name)(x)
    # torchvision computes the width once a block, from the block's input; VCOP for each convolution.
    wide = inputs if self.factoring == 'block' else x.shape[-1]
    between = middle((3, 3, 3), wide, self.features)
    return Factored(self.features, between, (3, 3, 3), stride, self.dtype, name=name)(x, use_running)

  def _shortcut(self, x: jax.Array, stride: Triple, use_running: bool) -> jax.Array:
    if self.kind == 'factored' and self.factoring == 'convolution':
      between = middle((1, 1, 1), x.shape[-1], self.features)
      return Factored(self.features, between, (1, 1, 1), stride, self.dtype, name='shortcut')(x, use_running)
    return Conv(self.features, (1, 1, 1), stride, dtype=self.dtype, name='shortcut')(x)


class ResNet3D(Encoder):
  """Encodes clips of any number of frames and any size; an image is a clip of one frame.

  Attributes:
    kind: 'r3d' (3 x 3 x 3), 'mc3' (so in the first layer, 1 x 3 x 3 after it: time keeps its length) or 'r2plus1d'
      (1 x 3 x 3, then 3 x 1 x 1).
    depths: blocks of each layer: (2, 2, 2, 2) has 18 layers, (1, 1, 1, 1) is VCOP's.
    widths: channels of each layer; the last is that of the feature.
    factoring: of 'r2plus1d': channels between the halves are computed once a 'block' (torchvision; the stem has 45,
      shortcuts are whole), or for each 'convolution' (VCOP; stem and shortcuts are factored by the same rule).
    freeze_statistics: normalise by the running statistics in training, too, and leave them as they are.
    dtype: of the computation. Parameters and statistics are float32.
  """

  kind: Annotated[str, one_of(*KINDS)] = 'r2plus1d'
  depths: Annotated[tuple[int, ...], several(whole(1), least=1)] = (2, 2, 2, 2)
  widths: Annotated[tuple[int, ...], several(whole(1), least=1)] = (64, 128, 256, 512)
  factoring: Annotated[str, one_of(*FACTORINGS)] = 'block'
  freeze_statistics: Annotated[bool, flag] = False
  dtype: Any = jnp.float32

  DEBUG: ClassVar[Mapping[str, Any]] = {'depths': (1, 1), 'widths': (8, 16)}

  @property
  def width(self) -> int:
    return self.widths[-1]

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f'layer{i + 1}' for i in range(len(self.depths)))

  @property
  def num_layers(self) -> int:
    return len(self.depths) + 1

  def layer(self, name: str) -> int:
    return int(name.split('/')[0].split('_')[0].removeprefix('layer')) if name.startswith('layer') else 0

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    return ''

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, normalised.
      train: normalise by the statistics of the batch and move the running ones: 'batch_stats' must be mutable.
      levels: of `level_names`; the map after that layer.

    Returns:
      `Encoded`; tokens are the last map, the feature is its mean.
    """
    check_levels(self, levels)
    if len(self.depths) != len(self.widths):
      raise ValueError(f'ResNet3D.depths {self.depths} and widths {self.widths} are not equally long.')
    use_running = self.freeze_statistics or not train
    x = self._stem(clip_BxTxHxWx3.astype(self.dtype), use_running)
    kept = {}
    for i, (depth, features) in enumerate(zip(self.depths, self.widths, strict=True)):
      kind = {'r3d': 'full', 'mc3': 'space' if i else 'full', 'r2plus1d': 'factored'}[self.kind]
      for j in range(depth):
        stride = 2 if i and not j else 1
        block = Block(kind, self.factoring, features, stride, self.dtype, name=f'layer{i + 1}_{j}')
        x = block(x, use_running)
      kept[f'layer{i + 1}'] = x
    return Encoded(x.mean(axis=(1, 2, 3)), x, {name: kept[name] for name in levels})

  def _stem(self, x: jax.Array, use_running: bool) -> jax.Array:
    kernel, stride, features = (3, 7, 7), (1, 2, 2), self.widths[0]
    if self.kind != 'r2plus1d':
      return Unit(features, kernel, stride, dtype=self.dtype, name='stem')(x, use_running)
    between = 45 if self.factoring == 'block' else middle(kernel, 3, features)
    x = Factored(features, between, kernel, stride, self.dtype, name='stem')(x, use_running)
    return nn.relu(BatchNorm(dtype=self.dtype, name='stem_norm')(x, use_running))
