"""V-JEPA 2's encoder (Assran et al. 2025, arXiv 2506.09985): joint attention with rotary positions in three dimensions.

The arithmetic is that of transformers' `VJEPA2Model`, whose weights it reads. Its classifiers pool by attention:
`cover_jax.models.pooling.AttentiveBlock`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models import transformer, tubelets
from cover_jax.models.encoder import Count, Deviation, Encoded, LoopEncoder, Share, check_levels
from cover_jax.models.pointwise import layer_norm
from cover_jax.models.transformer import Remat, Rotate, Transformer
from data_pipelines.declared import number


def rotary(grid: tuple[int, int, int], head_dim: int) -> Rotate:
  """Turns queries and keys [R, H, S, K] by their places on a grid (T', H', W'), time slowest.

  A third of the features, rounded down to an even number, turns with each dimension; what is left over is not turned.
  As released, features 2i and 2i + 1 turn together, but by the angles of frequencies 2i mod n and (2i + 1) mod n of a
  third's n frequencies.
  """
  part = 2 * (head_dim // 3 // 2)
  if not part:
    raise ValueError(f'VJEPA2 has {head_dim} features a head: positions need at least 6, so width 6 num_heads or more.')
  frequency = 10000.0 ** -(np.arange(part // 2) / (part / 2))
  places = np.stack(np.meshgrid(*map(np.arange, grid), indexing='ij'), axis=-1).reshape(-1, 3)
  angle_SxN = np.concatenate([np.tile(places[:, [axis]] * frequency, 2) for axis in range(3)], axis=1)
  cos_SxN, sin_SxN = (jnp.asarray(f(angle_SxN), jnp.float32) for f in (np.cos, np.sin))

  def rotate(x_RxHxSxK: jax.Array) -> jax.Array:
    turned, rest = jnp.split(x_RxHxSxK.astype(jnp.float32), [3 * part], axis=-1)
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    crossed = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(turned.shape)
    turned = turned * cos_SxN + crossed * sin_SxN
    return jnp.concatenate([turned, rest], axis=-1).astype(x_RxHxSxK.dtype)

  return rotate


class VJEPA2(LoopEncoder):
  """Encodes clips of one frame or an even number; a frame that stands alone fills a tubelet, as released.

  Attributes:
    patch_size, tubelet_size: pixels and frames of a tubelet.
    width: D, the size of a token.
    depth, num_heads, mlp_dim: of the transformer; those of ViT-L by default.
    epsilon: of the LayerNorms.
    drop_path: rate of stochastic depth in the last layer; it grows linearly from 0 in the first.
    dtype: of the computation. Parameters, softmax and LayerNorm statistics are float32.
    remat, scan_unroll: as in `cover_jax.models.timesformer.TimeSformer`.
    init_std: of the truncated normal that Linear kernels are drawn from.
  """

  patch_size: Count = 16
  tubelet_size: Count = 2
  width: Count = 1024
  depth: Count = 24
  num_heads: Count = 16
  mlp_dim: Count = 4096
  epsilon: Annotated[float, number(above=0)] = 1e-6
  drop_path: Share = 0.0
  dtype: Any = jnp.float32
  remat: Remat = 'none'
  scan_unroll: Count = 1
  init_std: Deviation = 0.02

  DEBUG: ClassVar[Mapping[str, Any]] = {
    'patch_size': 8, 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'remat': 'none',
  }  # fmt: skip

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    return tubelets.limits(frames, size, self.tubelet_size, self.patch_size)

  def products(self, frames: int, size: tuple[int, int]) -> float:
    tokens = np.prod(tubelets.grid_of(frames, size, self.tubelet_size, self.patch_size))
    patches = tokens * self.tubelet_size * 3 * self.patch_size**2 * self.width
    return float(patches + transformer.products(self.depth, 1, tokens, self.width, self.mlp_dim))

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, normalised; see `limits`.
      train: drop paths, which needs `rngs={'drop_path': key}` when `drop_path` > 0.
      levels: of `level_names`; tokens after that layer.

    Returns:
      `Encoded` on the grid T / tubelet_size x H / patch_size x W / patch_size; tokens are those after the last
      LayerNorm, the feature is their mean (our choice: the released classifiers pool by attention).
    """
    check_levels(self, levels)
    embed = tubelets.TubeletEmbedding(
      self.width, self.tubelet_size, self.patch_size, self.dtype, self.init_std, name='patch_embedding'
    )
    x_BxTxHxWxD = embed(clip_BxTxHxWx3)
    grid = x_BxTxHxWxD.shape[1:4]
    blocks = Transformer(
      self.depth, self.num_heads, self.mlp_dim, self.epsilon, dtype=self.dtype, init_std=self.init_std,
      remat=self.remat, scan_unroll=min(self.scan_unroll, self.depth), name='blocks',
    )  # fmt: skip
    rates = jnp.linspace(0, self.drop_path, self.depth) if train and self.drop_path else None
    rotate = rotary(grid, self.width // self.num_heads)
    x_BxSxD, kept = blocks(x_BxTxHxWxD.reshape(len(x_BxTxHxWxD), -1, self.width), rates, rotate, bool(levels))
    x_BxSxD = layer_norm('norm', self.dtype, self.epsilon)(x_BxSxD)
    on_grid = lambda x: x.reshape(len(x), *grid, self.width)
    return Encoded(x_BxSxD.mean(axis=1), on_grid(x_BxSxD), {name: on_grid(kept[int(name[5:]) - 1]) for name in levels})
