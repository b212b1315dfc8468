"""VideoMAE's ViT (Tong et al. 2022, arXiv 2203.12602): joint attention over all tubelets of a clip.

The arithmetic is that of transformers' `VideoMAEForVideoClassification`, whose fine-tuned weights it reads: fixed sine
positions, no bias on keys, the mean of all tokens and a LayerNorm as the feature.
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
from cover_jax.models.transformer import Remat, Transformer
from data_pipelines.declared import number


def sine_positions(places: int, width: int) -> np.ndarray:
  """The table [places, D] of Vaswani et al. (2017), sine and cosine interleaved."""
  angle = np.arange(places)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
  return np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


class VideoMAE(LoopEncoder):
  """Encodes clips of one frame or an even number; a frame that stands alone fills a tubelet (our choice).

  Attributes:
    patch_size, tubelet_size: pixels and frames of a tubelet.
    width: D, the size of a token.
    depth, num_heads, mlp_dim: of the transformer: 12, 12, 3072 in B; 24, 16, 4096 in L, with width 1024.
    num_frames, image_size: clips that the sine positions count; others interpolate them in space and time (our choice).
    epsilon: of the LayerNorms within the layers; that of the feature has 1e-5, as released.
    drop_path: rate of stochastic depth in the last layer; it grows linearly from 0 in the first.
    dtype: of the computation. Parameters, softmax and LayerNorm statistics are float32.
    remat, scan_unroll: as in `cover_jax.models.timesformer.TimeSformer`.
    init_std: of the truncated normal that Linear kernels are drawn from.
  """

  patch_size: Count = 16
  tubelet_size: Count = 2
  width: Count = 768
  depth: Count = 12
  num_heads: Count = 12
  mlp_dim: Count = 3072
  num_frames: Count = 16
  image_size: Count = 224
  epsilon: Annotated[float, number(above=0)] = 1e-12
  drop_path: Share = 0.0
  dtype: Any = jnp.float32
  remat: Remat = 'none'
  scan_unroll: Count = 1
  init_std: Deviation = 0.02

  DEBUG: ClassVar[Mapping[str, Any]] = {
    'patch_size': 8, 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'num_frames': 4, 'image_size': 32,
    'remat': 'none',
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
      `Encoded` on the grid T / tubelet_size x H / patch_size x W / patch_size; tokens are those after the last layer,
      the feature is the LayerNorm of their mean.
    """
    check_levels(self, levels)
    embed = tubelets.TubeletEmbedding(
      self.width, self.tubelet_size, self.patch_size, self.dtype, self.init_std, name='patch_embedding'
    )
    x_BxTxHxWxD = embed(clip_BxTxHxWx3)
    grid = x_BxTxHxWxD.shape[1:4]
    x_BxSxD = x_BxTxHxWxD.reshape(len(x_BxTxHxWxD), -1, self.width) + self._positions(grid).astype(self.dtype)
    blocks = Transformer(
      self.depth, self.num_heads, self.mlp_dim, self.epsilon, key_bias=False, dtype=self.dtype, init_std=self.init_std,
      remat=self.remat, scan_unroll=min(self.scan_unroll, self.depth), name='blocks',
    )  # fmt: skip
    rates = jnp.linspace(0, self.drop_path, self.depth) if train and self.drop_path else None
    x_BxSxD, kept = blocks(x_BxSxD, rates, keep=bool(levels))
    on_grid = lambda x: x.reshape(len(x), *grid, self.width)
    feature_BxD = layer_norm('norm', self.dtype, 1e-5)(x_BxSxD.mean(axis=1))
    return Encoded(feature_BxD, on_grid(x_BxSxD), {name: on_grid(kept[int(name[5:]) - 1]) for name in levels})

  def _positions(self, grid: tuple[int, int, int]) -> jax.Array:
    stored = tubelets.grid_of(self.num_frames, (self.image_size, self.image_size), self.tubelet_size, self.patch_size)
    table_SxD = jnp.asarray(sine_positions(int(np.prod(stored)), self.width))
    if grid == stored:
      return table_SxD
    resized = jax.image.resize(table_SxD.reshape(*stored, -1), (*grid, self.width), 'linear', antialias=False)
    return resized.reshape(-1, self.width)
