"""TimeSformer: a vision transformer over space and time (Bertasius et al. 2021, arXiv 2102.05095).

The computation is that of the authors' release, which the published weights need, where it differs from the
paper: the class token takes no part in temporal attention (the paper's Eq. 11 has it as a key), and a Linear
initialised at zero, `temporal_fc`, follows temporal attention, so that a new model is the image model it was
seeded from.

Between blocks, tokens are one sequence [B, S, D]: the patches in order (place, frame), frame fastest, then the class
token. That makes the tokens of one place a contiguous row for temporal attention, and no patch is ever moved to make
room for the class token. As a single block it was among the cheapest layouts tried on the TPU compiler; docs/block.md
has the figures and what is open.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models import attention_rollout
from cover_jax.models.attention import Attention, rows_together
from cover_jax.models.encoder import Count, Deviation, Encoded, LoopEncoder, Share, check_levels
from cover_jax.models.pointwise import layer_norm
from cover_jax.models.transformer import REMAT_POLICIES, Mlp, Remat, dense, drop_path, token_init
from data_pipelines import declared
from data_pipelines.declared import flag, one_of, whole


def resize_position_embedding(position_1xPxD: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Resizes a stored square grid of position embeddings to another (rows, columns), bilinearly.

  The first row belongs to the class token and stays as it is. Bilinear in two dimensions is ViT's way;
  TimeSformer's release interpolates to the nearest entry.

  Args:
    position_1xPxD: float [1, 1 + n * n, D].
    grid: rows and columns of patches wanted.

  Returns:
    Float [1, 1 + rows * columns, D]; the input itself where the grid is the stored one.
  """
  side = math.isqrt(position_1xPxD.shape[1] - 1)
  if grid == (side, side):
    return position_1xPxD
  class_1x1xD, patches_1xNxD = position_1xPxD[:, :1], position_1xPxD[:, 1:]
  width = position_1xPxD.shape[-1]
  square = patches_1xNxD.reshape(1, side, side, width)
  resized = jax.image.resize(square, (1, *grid, width), 'bilinear', antialias=False)
  return jnp.concatenate([class_1x1xD, resized.reshape(1, -1, width)], axis=1)


def resize_time_embedding(time_1xTxD: jax.Array, num_frames: int) -> jax.Array:
  """Resizes stored time embeddings [1, T, D] to [1, num_frames, D], linearly.

  Frames are taken as the middles of equal parts of the clip, so that one frame stands for the middle of the
  clip (our choice: TimeSformer's release takes the nearest entry, which is the first one; CoVeR does not say).
  """
  if num_frames == time_1xTxD.shape[1]:
    return time_1xTxD
  return jax.image.resize(time_1xTxD, (1, num_frames, time_1xTxD.shape[2]), 'linear', antialias=False)


def class_token_first(x: jax.Array, *axes: int) -> jax.Array:
  """Moves the last entry of each axis, where the blocks have the class token, to the front."""
  return jnp.roll(x, (1,) * len(axes), axes)


class Block(nn.Module):
  """One transformer block, the body of the scan over depth; the fields are those of `TimeSformer`.

  Attributes:
    num_frames: T of the clip at hand, not of the stored time embedding.
    use_drop_path: drops residual paths, with keys from the 'drop_path' stream.
  """

  num_heads: int
  mlp_dim: int
  attention: str
  num_frames: int
  use_drop_path: bool
  image_temporal: str
  gelu_approximate: bool
  dtype: Any
  init_std: float
  tokens_together: int
  keep: bool

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array, drop_rate: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """One step of the scan: tokens [B, S, D] and this block's drop rate to tokens, and these again if they are kept.

    The class token is the last. With 'space' attention each frame is a row of its own, [B * T, N + 1, D].
    """
    # Without this, XLA may shard activations along D as it likes, at a hundred times the memory.
    x_BxSxD = nn.with_logical_constraint(x_BxSxD, ('batch', None, None))

    def drop(x: jax.Array) -> jax.Array:
      return drop_path(x, drop_rate, self.make_rng('drop_path')) if self.use_drop_path else x

    if self.attention == 'divided':
      x_BxSxD = self._divided(x_BxSxD, drop)
    else:
      residual_BxSxD, probs_BxHxSxS = self._attend('space', x_BxSxD)
      frames = self.num_frames if self.attention == 'space' else 1
      self._sow('space', einops.rearrange(class_token_first(probs_BxHxSxS, 2, 3), '(b t) h q k -> b t h q k', t=frames))
      x_BxSxD = x_BxSxD + drop(residual_BxSxD)

    normed_BxSxD = layer_norm('norm_mlp', self.dtype)(x_BxSxD)
    residual_BxSxD = Mlp(self.mlp_dim, self.gelu_approximate, self.dtype, self.init_std, name='mlp')(normed_BxSxD)
    x_BxSxD = x_BxSxD + drop(residual_BxSxD)
    return x_BxSxD, x_BxSxD if self.keep else None

  def _divided(self, x_BxSxD: jax.Array, drop: Any) -> jax.Array:
    """Temporal attention among the frames at one place, then spatial attention within each frame."""
    batch, frames, width = len(x_BxSxD), self.num_frames, x_BxSxD.shape[-1]
    patches_BxPxD, class_Bx1xD = x_BxSxD[:, :-1], x_BxSxD[:, -1:]
    places = patches_BxPxD.shape[1] // frames

    # G places at a time, each attending to itself.
    together = rows_together(places, frames, self.tokens_together)
    groups_RxGTxD = einops.rearrange(patches_BxPxD, 'b (r gt) d -> (b r) gt d', gt=together * frames)
    residual_RxGTxD, probs_BNxHxTxT = self._attend('time', groups_RxGTxD, parts=together)
    self._sow('time', einops.rearrange(probs_BNxHxTxT, '(b n) h q k -> b n h q k', b=batch))
    # The path is dropped before `temporal_fc`, as released: a dropped place still gets its bias.
    dropped_BNxTxD = drop(einops.rearrange(residual_RxGTxD, 'r (g t) d -> (r g) t d', t=frames))
    temporal_fc = dense('temporal_fc', width, ('embed', 'embed_out'), self.dtype, nn.initializers.zeros)
    residual_RxGTxD = temporal_fc(einops.rearrange(dropped_BNxTxD, '(r g) t d -> r (g t) d', g=together))
    if frames > 1 or self.image_temporal == 'run':
      groups_RxGTxD = groups_RxGTxD + residual_RxGTxD
    patches_BxPxD = einops.rearrange(groups_RxGTxD, '(b r) gt d -> b (r gt) d', b=batch)

    # Each frame sees the one class token; what the frames tell it is averaged.
    rows_BTxNxD = einops.rearrange(patches_BxPxD, 'b (n t) d -> (b t) n d', t=frames)
    class_BTx1xD = einops.repeat(class_Bx1xD, 'b 1 d -> (b t) 1 d', t=frames)
    residual_BTxMxD, probs_BTxHxMxM = self._attend('space', jnp.concatenate([rows_BTxNxD, class_BTx1xD], axis=1))
    self._sow('space', einops.rearrange(class_token_first(probs_BTxHxMxM, 2, 3), '(b t) h q k -> b t h q k', t=frames))
    residual_BTxMxD = drop(residual_BTxMxD)
    patch_residual_BxPxD = einops.rearrange(residual_BTxMxD[:, :-1], '(b t) n d -> b (n t) d', t=frames)
    class_residual_Bx1xD = einops.reduce(residual_BTxMxD[:, -1:], '(b t) 1 d -> b 1 d', 'mean', t=frames)
    return jnp.concatenate([patches_BxPxD + patch_residual_BxPxD, class_Bx1xD + class_residual_Bx1xD], axis=1)

  def _attend(self, name: str, x_RxLxD: jax.Array, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    normed_RxLxD = layer_norm(f'norm_{name}', self.dtype)(x_RxLxD)
    return Attention(self.num_heads, self.dtype, self.init_std, name=f'attention_{name}')(normed_RxLxD, parts)

  def _sow(self, name: str, probs: jax.Array):
    """Keeps attention probabilities where the caller asked for them with `mutable=['attention']`."""
    if not self.is_initializing():
      self.sow('attention', name, probs, init_fn=lambda: None, reduce_fn=lambda _, new: new)


class TimeSformer(LoopEncoder):
  """Encodes clips of any number of frames and any size; an image is a clip of one frame.

  Attributes:
    patch_size: side of a square patch in pixels.
    width: D, the size of a token.
    depth: number of blocks.
    num_heads: must divide `width`.
    mlp_dim: hidden size of the MLPs.
    num_frames: rows of the stored time embedding; clips of other lengths interpolate it.
    image_size: side of the images that the stored position embedding is for; other sizes interpolate it.
    attention: 'divided' (time, then space), 'joint' (all tokens at once) or 'space' (each frame alone; the
      class tokens of the frames are averaged before the final LayerNorm).
    drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first.
    image_temporal: what 'divided' does with a clip of one frame: 'run' temporal attention as it is (our
      default; the softmax over one key is 1, so only value, output and `temporal_fc` act) or 'skip' it. Its
      time embedding is added either way.
    gelu_approximate: the tanh form, which google-research ViT weights had; TimeSformer's is exact.
    dtype: dtype of the computation. Parameters, softmax and LayerNorm statistics are float32.
    remat: what the backward pass computes again: 'none', all but the products with weights ('dots'), all but the
      outputs of attention ('attention'), or 'full'.
    init_std: of the truncated normal that Linear kernels and the class token are drawn from. TimeSformer's 0.02
      suits widths near 768; a narrow model learns faster from about 1 / sqrt(width).
    position_init_std: the same for the position embedding.
    time_init_std: the same for the time embedding. TimeSformer's 0 makes a new model the image model that it was
      seeded from; without such a seed a larger value lets it see the order of frames much sooner.
    scan_unroll: number of blocks that one step of the loop over depth holds.
    tokens_together: places whose frames attend to each other are joined until they have this many tokens, and masked.
      128 suits TPUs; 0 joins none, which saves a small model a quarter of its step on a CPU. Neither this nor
      `scan_unroll` nor `remat` changes the function.
  """

  patch_size: Count = 16
  width: Count = 768
  depth: Count = 12
  num_heads: Count = 12
  mlp_dim: Count = 3072
  num_frames: Count = 8
  image_size: Count = 224
  attention: Annotated[str, one_of('divided', 'joint', 'space')] = 'divided'
  drop_path: Share = 0.0
  image_temporal: Annotated[str, one_of('run', 'skip')] = 'run'
  gelu_approximate: Annotated[bool, flag] = False
  dtype: Any = jnp.float32
  remat: Remat = 'none'
  scan_unroll: Count = 1
  tokens_together: Annotated[int, whole(0)] = 128
  init_std: Deviation = 0.02
  position_init_std: Deviation = 0.02
  time_init_std: Deviation = 0.0

  DEBUG: ClassVar[Mapping[str, Any]] = {
    'patch_size': 8, 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'num_frames': 4, 'image_size': 32,
    'remat': 'none',
  }  # fmt: skip
  LEVEL: ClassVar[str] = 'block'
  SHOWS_ATTENTION: ClassVar[bool] = True

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    if any(side % self.patch_size for side in size):
      return f'the height and width of a clip must be multiples of config.model.patch_size = {self.patch_size}'
    return ''

  def products(self, frames: int, size: tuple[int, int]) -> float:
    """As the paper's equations have them: how the blocks compute them is another matter, they pad and join."""
    places, width = size[0] * size[1] // self.patch_size**2, self.width
    project = 4 * width**2  # query, key, value and output of one token
    per_frame = (places + 1) * project + 2 * (places + 1) ** 2 * width
    tokens = places * frames + 1
    joint = tokens * project + 2 * tokens**2 * width
    attention = joint if self.attention == 'joint' else frames * per_frame
    if self.attention == 'divided' and (frames > 1 or self.image_temporal == 'run'):
      # The softmax over one frame is 1, whatever query and key are. `temporal_fc` follows.
      over_time = project + 2 * frames * width if frames > 1 else project / 2
      attention += places * frames * (over_time + width**2)
    in_mlp = frames * (places + 1) if self.attention == 'space' else tokens
    block = attention + 2 * in_mlp * width * self.mlp_dim
    return frames * places * 3 * self.patch_size**2 * width + self.depth * block

  def attention_map(self, variables: Any, clip_BxTxHxWx3: jax.Array) -> jax.Array:
    """Attention rollout from the class token, float32 [B, T, rows, columns]; see `attention_rollout`."""
    frames, height, width = clip_BxTxHxWx3.shape[1:4]
    _, kept = self.apply(variables, clip_BxTxHxWx3, mutable=['attention'])
    rollout_BxS = attention_rollout.class_token_rollout(kept['attention']['blocks'])
    return attention_rollout.heat_maps(rollout_BxS, frames, (height // self.patch_size, width // self.patch_size))

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, already normalised; H and W multiples of `patch_size`.
      train: drop paths, which needs `rngs={'drop_path': key}` when `drop_path` > 0.
      levels: of `level_names`; patches after that block.

    Returns:
      `Encoded` in `dtype` on the grid T x H / patch_size x W / patch_size: the feature is the class token after the
      final LayerNorm, tokens are the patches after it.
      With `mutable=['attention']` also {'attention': {'blocks': probabilities}}, float32 with the block
      first: 'time' [depth, B, N, heads, T, T] and 'space' [depth, B, T, heads, 1 + N, 1 + N] for 'divided',
      'space' alone for 'space', and 'space' [depth, B, 1, heads, 1 + N * T, 1 + N * T] for 'joint'.

    Raises:
      ValueError: where the clip or a field is not as described.
    """
    self._check(clip_BxTxHxWx3)
    check_levels(self, levels)
    batch, frames = clip_BxTxHxWx3.shape[:2]
    x = self._embed(clip_BxTxHxWx3)
    if self.attention == 'space':
      x = einops.rearrange(x, 'b t m d -> (b t) m d')
    else:
      time_init = token_init(self.time_init_std)
      time_1xTxD = self.param('time_embedding', time_init, (1, self.num_frames, self.width))
      time_1xTx1xD = resize_time_embedding(time_1xTxD, frames)[:, :, None].astype(self.dtype)
      patches_BxPxD = einops.rearrange(x[:, :, :-1] + time_1xTx1xD, 'b t n d -> b (n t) d')
      # The class token has neither a frame nor, before the first block, anything of the clip in it.
      x = jnp.concatenate([patches_BxPxD, x[:, 0, -1:]], axis=1)

    x, kept = self._blocks(frames, train, bool(levels))(x, jnp.linspace(0, self.drop_path, self.depth))
    x = nn.with_logical_constraint(x, ('batch', None, None))

    rows = clip_BxTxHxWx3.shape[2] // self.patch_size
    on_grid = lambda x: einops.rearrange(x[:, :-1], 'b (h w t) d -> b t h w d', h=rows, t=frames)
    of_block = on_grid
    if self.attention == 'space':
      of_block = lambda x: einops.rearrange(x[:, :-1], '(b t) (h w) d -> b t h w d', h=rows, t=frames)
      x_BxTxMxD = einops.rearrange(x, '(b t) m d -> b t m d', b=batch)
      patches_BxPxD = einops.rearrange(x_BxTxMxD[:, :, :-1], 'b t n d -> b (n t) d')
      x = jnp.concatenate([patches_BxPxD, x_BxTxMxD[:, :, -1].mean(axis=1, keepdims=True)], axis=1)
    x = layer_norm('norm', self.dtype)(x)
    return Encoded(x[:, -1], on_grid(x), {name: of_block(kept[int(name[5:]) - 1]) for name in levels})

  def _check(self, clip_BxTxHxWx3: jax.Array):
    for field, (_, kind) in declared.options_of(TimeSformer).items():
      if not kind.holds(getattr(self, field)):
        raise ValueError(f'TimeSformer.{field} is {getattr(self, field)!r}; expected {kind.expected}.')
    if self.width % self.num_heads:
      raise ValueError(f'TimeSformer.width {self.width} is not a multiple of num_heads {self.num_heads}.')
    if self.image_size % self.patch_size:
      raise ValueError(f'TimeSformer.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.')
    shape = clip_BxTxHxWx3.shape
    if len(shape) != 5 or shape[-1] != 3 or 0 in shape[1:]:
      raise ValueError(f'A clip has shape [B, T, H, W, 3] with T, H and W at least 1; this one has {shape}.')
    if not jnp.issubdtype(clip_BxTxHxWx3.dtype, jnp.floating):
      raise ValueError(f'A clip is normalised floats; this one is {clip_BxTxHxWx3.dtype}: normalise it first.')
    if shape[2] % self.patch_size or shape[3] % self.patch_size:
      raise ValueError(
        f'The height and width of a clip are multiples of patch_size {self.patch_size}; this one is '
        f'{shape[2]} x {shape[3]}: resize or crop it.'
      )

  def _embed(self, clip_BxTxHxWx3: jax.Array) -> jax.Array:
    """Patches and class token of every frame with their position embeddings, [B, T, N + 1, D]."""
    batch, frames, height, width = clip_BxTxHxWx3.shape[:4]
    grid = height // self.patch_size, width // self.patch_size
    stored = (self.image_size // self.patch_size) ** 2
    patches_BTxRxCxD = nn.Conv(
      self.width,
      kernel_size=(self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding='VALID',
      dtype=self.dtype,
      # As ViT: 1/sqrt(fan-in), which keeps the scale of the pixels.
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, None, 'embed')),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
      name='patch_embedding',
    )(einops.rearrange(clip_BxTxHxWx3, 'b t h w c -> (b t) h w c'))
    class_1x1xD = self.param('class_token', token_init(self.init_std), (1, 1, self.width))
    position_1xPxD = self.param('position_embedding', token_init(self.position_init_std), (1, 1 + stored, self.width))
    patches_BTxNxD = einops.rearrange(patches_BTxRxCxD, 'f r c d -> f (r c) d')
    class_BTx1xD = jnp.broadcast_to(class_1x1xD.astype(self.dtype), (batch * frames, 1, self.width))
    x_BTxMxD = jnp.concatenate([patches_BTxNxD, class_BTx1xD], axis=1)
    position_1xMxD = resize_position_embedding(position_1xPxD, grid).astype(self.dtype)
    x_BTxMxD = x_BTxMxD + jnp.roll(position_1xMxD, -1, axis=1)
    return einops.rearrange(x_BTxMxD, '(b t) m d -> b t m d', b=batch)

  def _blocks(self, num_frames: int, train: bool, keep: bool) -> nn.Module:
    block = Block
    if self.remat != 'none':
      # Within one iteration of a loop nothing can merge the recomputation with the forward pass; unrolled,
      # XLA would undo it.
      block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=self.scan_unroll > 1)
    scanned = nn.scan(
      block,
      variable_axes={'params': 0, 'attention': 0},
      split_rngs={'params': True, 'drop_path': True},
      length=self.depth,
      unroll=min(self.scan_unroll, self.depth),
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
      attention=self.attention,
      num_frames=num_frames,
      use_drop_path=train and self.drop_path > 0,
      image_temporal=self.image_temporal,
      gelu_approximate=self.gelu_approximate,
      dtype=self.dtype,
      init_std=self.init_std,
      tokens_together=self.tokens_together,
      keep=keep,
      name='blocks',
    )
