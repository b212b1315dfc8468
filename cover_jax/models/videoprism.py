"""VideoPrism's encoder (Zhao et al. 2024, arXiv 2402.13217): attention in space, then attention in time.

A factorised transformer (ViViT's second model, which keeps its spatial tokens): each frame goes through a stack of its
own, then the tokens of each place go through a shorter one. Follows the released code where the paper is silent:
attention logits are squashed to +-50, positions are resized with antialiasing, pixels are in [0, 1]
(`config.pixel_mean = (0, 0, 0)`, `config.pixel_std = (1, 1, 1)`).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models import transformer
from cover_jax.models.encoder import Count, Deviation, Encoded, Encoder, Share, check_levels
from cover_jax.models.pointwise import layer_norm
from cover_jax.models.transformer import Remat, Transformer, dense
from data_pipelines.declared import number


class VideoPrism(Encoder):
  """Encodes clips of any number of frames; an image is a clip of one frame.

  Attributes:
    patch_size: side of a square patch in pixels.
    width: D, the size of a token.
    spatial_depth, temporal_depth: layers of the two stacks: 12 and 4 in B, 24 and 4 in L.
    num_heads: must divide `width`: 12 in B, 16 in L.
    mlp_dim: hidden size of the MLPs.
    num_frames: stored temporal positions: 16 in B, 8 in L; clips of other lengths interpolate them.
    image_size: side of the images that the stored spatial positions are for; other sizes interpolate them.
    logit_cap: attention logits x become cap * tanh(x / cap); 0 leaves them alone.
    drop_path: rate of stochastic depth in the last layer; it grows linearly from 0 in the first (our choice).
    dtype: of the computation. Parameters, softmax and LayerNorm statistics are float32.
    remat, scan_unroll: as in `cover_jax.models.timesformer.TimeSformer`.
    init_std: of the truncated normal that Linear kernels and positions are drawn from (our choice).
  """

  patch_size: Count = 18
  width: Count = 768
  spatial_depth: Count = 12
  temporal_depth: Count = 4
  num_heads: Count = 12
  mlp_dim: Count = 3072
  num_frames: Count = 16
  image_size: Count = 288
  logit_cap: Annotated[float, number(0)] = 50.0
  drop_path: Share = 0.0
  dtype: Any = jnp.float32
  remat: Remat = 'none'
  scan_unroll: Count = 1
  init_std: Deviation = 0.02

  DEBUG: ClassVar[Mapping[str, Any]] = {
    'patch_size': 8, 'width': 16, 'spatial_depth': 2, 'temporal_depth': 1, 'num_heads': 2, 'mlp_dim': 32,
    'num_frames': 4, 'image_size': 32, 'remat': 'none',
  }  # fmt: skip
  DEPTHS: ClassVar[tuple[str, ...]] = ('spatial_depth', 'temporal_depth')

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f'spatial{i + 1}' for i in range(self.spatial_depth)) + tuple(
      f'temporal{i + 1}' for i in range(self.temporal_depth)
    )

  @property
  def num_layers(self) -> int:
    return self.spatial_depth + self.temporal_depth + 1

  def layer(self, name: str) -> int | np.ndarray:
    if name.startswith('spatial/'):
      return 1 + np.arange(self.spatial_depth)
    if name.startswith('temporal/'):
      return 1 + self.spatial_depth + np.arange(self.temporal_depth)
    if name.startswith(('spatial_norm', 'temporal_position')):
      return 1 + self.spatial_depth
    return self.num_layers if name.startswith('temporal_norm') else 0

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    if any(side % self.patch_size for side in size):
      return f'the height and width of a clip must be multiples of patch_size = {self.patch_size}'
    return ''

  def products(self, frames: int, size: tuple[int, int]) -> float:
    places = size[0] * size[1] // self.patch_size**2
    patches = frames * places * 3 * self.patch_size**2 * self.width
    in_space = transformer.products(self.spatial_depth, frames, places, self.width, self.mlp_dim)
    return patches + in_space + transformer.products(self.temporal_depth, places, frames, self.width, self.mlp_dim)

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, normalised; H and W multiples of `patch_size`.
      train: drop paths, which needs `rngs={'drop_path': key}` when `drop_path` > 0.
      levels: of `level_names`; tokens after that layer, before any final LayerNorm.

    Returns:
      `Encoded`; tokens are those after the last LayerNorm on the grid T x H / patch_size x W / patch_size, the feature
      is their mean (our choice: VideoPrism's own classifiers pool by attention).
    """
    check_levels(self, levels)
    batch, frames, height, width, _ = clip_BxTxHxWx3.shape
    grid = height // self.patch_size, width // self.patch_size
    rates = self._drop_rates(train)

    x_BTxNxD = self._embed(clip_BxTxHxWx3, grid)
    x_BTxNxD, in_space = self._stack('spatial', self.spatial_depth)(
      x_BTxNxD, rates[0], keep=any(name.startswith('spatial') for name in levels)
    )
    x_BTxNxD = layer_norm('spatial_norm', self.dtype)(x_BTxNxD)

    x_BNxTxD = einops.rearrange(x_BTxNxD, '(b t) n d -> (b n) t d', b=batch)
    x_BNxTxD = x_BNxTxD + self._positions('temporal_position', (self.num_frames,), (frames,))
    x_BNxTxD, in_time = self._stack('temporal', self.temporal_depth)(
      x_BNxTxD, rates[1], keep=any(name.startswith('temporal') for name in levels)
    )
    x_BNxTxD = layer_norm('temporal_norm', self.dtype)(x_BNxTxD)

    of_space = lambda x: einops.rearrange(x, '(b t) (h w) d -> b t h w d', b=batch, h=grid[0])
    of_time = lambda x: einops.rearrange(x, '(b h w) t d -> b t h w d', b=batch, h=grid[0])
    tokens_BxTxHxWxD = of_time(x_BNxTxD)
    kept = {name: of_space(in_space[int(name[7:]) - 1]) for name in levels if name.startswith('spatial')}
    kept |= {name: of_time(in_time[int(name[8:]) - 1]) for name in levels if name.startswith('temporal')}
    return Encoded(tokens_BxTxHxWxD.mean(axis=(1, 2, 3)), tokens_BxTxHxWxD, kept)

  def _embed(self, clip_BxTxHxWx3: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The patches of every frame with their positions, [B * T, N, D]."""
    patches_BTxNxC = einops.rearrange(
      clip_BxTxHxWx3, 'b t (h p) (w q) c -> (b t) (h w) (p q c)', p=self.patch_size, q=self.patch_size
    )
    init = nn.initializers.lecun_normal()
    x_BTxNxD = dense('patch_embedding', self.width, (None, 'embed'), self.dtype, init)(patches_BTxNxC)
    side = self.image_size // self.patch_size
    return x_BTxNxD + self._positions('spatial_position', (side, side), grid)

  def _positions(self, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
    """Learned positions [places, D], resized from the stored grid (antialiased, as released)."""
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(self.init_std), (None, 'embed'))
    position_NxD = self.param(name, init, (int(np.prod(stored)), self.width))
    if stored != wanted:
      grid = position_NxD.reshape(*stored, self.width)
      position_NxD = jax.image.resize(grid, (*wanted, self.width), 'bilinear').reshape(-1, self.width)
    return position_NxD.astype(self.dtype)

  def _drop_rates(self, train: bool) -> tuple[jax.Array | None, jax.Array | None]:
    if not (train and self.drop_path):
      return None, None
    rates = jnp.linspace(0, self.drop_path, self.spatial_depth + self.temporal_depth)
    return rates[: self.spatial_depth], rates[self.spatial_depth :]

  def _stack(self, name: str, depth: int) -> Transformer:
    return Transformer(
      depth, self.num_heads, self.mlp_dim, logit_cap=self.logit_cap, dtype=self.dtype, init_std=self.init_std,
      remat=self.remat, scan_unroll=min(self.scan_unroll, depth), name=name,
    )  # fmt: skip
