"""What is where in a clip: 28 regions, how its motion and its colours differ between them, all in `jit` from pixels.

The labels of Wang et al.'s spatio-temporal statistics (arXiv 2008.13426), by the definitions of their released code
(laura-wang/video_repres_sts), which were read and written anew. Three patterns divide a frame:

    1: a grid of 4 x 4 cells, row by row            ids 1 to 16
    2: a square in the middle and 3 rings around it  ids 1 to 4, from within
    3: 8 triangles, two a quadrant                   ids 1 to 8

Ids count from 1, as there. Where two regions are equal the lower id is taken.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.objectives import motion

PATTERNS = {1: slice(0, 16), 2: slice(16, 20), 3: slice(20, 28)}
REGIONS = {1: 16, 2: 4, 3: 8}
DIRECTIONS = COLOURS = 8
RING = 17  # the ring next to the square, whose colour the release takes from other pixels
_SIDE = 112
# Steps of a stored flow: 255 over -20 to 20 pixels a frame.
_STEP = 2 * motion.MAX_FLOW / 255
_HIGHEST = jax.lax.Precision.HIGHEST


@functools.cache
def masks(size: tuple[int, int]) -> np.ndarray:
  """The 28 regions of a frame, bool [28, H, W], pattern after pattern.

  Those of 112 x 112 pixels, whose nearest pixels are taken for another size: 224 has each of them twice. The two
  triangles of a quadrant share the pixels on the line between them, as in the release.
  """
  y, x = np.mgrid[:_SIDE, :_SIDE]
  cell = y // 28 * 4 + x // 28
  ring = 3 - np.minimum(np.minimum(y, x), np.minimum(_SIDE - 1 - y, _SIDE - 1 - x)) // 14
  quadrant, y, x = y // 56 * 2 + x // 56, y % 56, x % 56
  mirrored = 55 - x
  below = [x <= y, mirrored >= y, mirrored >= y, x <= y]  # first triangle of each quadrant, and the second
  above = [x >= y, mirrored <= y, mirrored <= y, x >= y]
  triangles = [(quadrant == q) & half[q] for q in range(4) for half in (below, above)]
  whole = np.stack([*(cell == i for i in range(16)), *(ring == i for i in range(4)), *triangles])
  rows, columns = (((np.arange(side) + 0.5) * _SIDE / side).astype(int) for side in size)
  return whole[:, rows][:, :, columns]


def steps_of_flow(flow_BxTxHxWx2: jax.Array) -> jax.Array:
  """Flow in pixels as whole steps of 40 / 255 pixels, f32, of what is cut to +-20 pixels.

  The range and the step are those of the flow that the release stores; that no motion is a whole step, and a mirrored
  flow its negative, is ours. So motions under a twelfth of a pixel are none, and sums of steps are exact.
  """
  return jnp.round(jnp.clip(flow_BxTxHxWx2, -motion.MAX_FLOW, motion.MAX_FLOW) / _STEP)


def boundaries(maps_BxTxHxWxC: jax.Array) -> jax.Array:
  """Where maps of motion change in space: f32 [B, T, H, W, C, 2], along x and along y.

  Convolution with Prewitt's kernels ((-1, 0, 1) in three rows, and transposed); borders repeat. A convolution mirrors
  its kernel, so that a map that grows by 1 a pixel to the right has -6 along x: angles are turned by 180 degrees, in
  the release and here.
  """
  padded = jnp.pad(maps_BxTxHxWxC, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode='edge')
  cut = lambda x, i, axis: jax.lax.slice_in_dim(x, i, i + x.shape[axis] - 2, axis=axis)
  three = lambda x, axis: cut(x, 0, axis) + cut(x, 1, axis) + cut(x, 2, axis)
  fall = lambda x, axis: cut(x, 0, axis) - cut(x, 2, axis)
  return jnp.stack([fall(three(padded, 2), 3), three(fall(padded, 2), 3)], axis=-1)


def motion_labels(maps_BxTxHxWxC: jax.Array, *, one_more: bool = False) -> tuple[jax.Array, jax.Array]:
  """The labels of motion.

  Args:
    maps_BxTxHxWxC: motion, C components: horizontal and vertical flow, or one map; in whole steps of any unit.
    one_more: the last map belongs to the regions and directions alone.

  Returns:
    (ids int32 [B, 6 * C + C]: for each pattern and component (region where its motion changes most, direction in which
    it changes there), then for each component the frame in which it changes most; whether anything changes at all,
    bool of the same shape). The change is that of all frames summed. 'Most' is the sum of its length over a region, and
    for the rings the mean. A direction is one of 8 of 45 degrees each, the greatest in a histogram to which an angle
    adds its length, shared between the two nearest. Where nothing changes, ids are those of the release: 0 and 0 for
    pattern 1, and 1 elsewhere.
  """
  change = boundaries(maps_BxTxHxWxC)
  total_BxHxWxCx2 = jnp.sum(change, axis=1)
  length_BxHxWxC = _length(total_BxHxWxCx2)
  mask = jnp.asarray(masks(length_BxHxWxC.shape[1:3]), jnp.float32)
  amount_BxCxR = jnp.einsum('bhwc,rhw->bcr', length_BxHxWxC, mask, precision=_HIGHEST)
  histogram_BxCxRxK = jnp.einsum(
    'bhwck,rhw->bcrk', length_BxHxWxC[..., None] * _share(total_BxHxWxCx2), mask, precision=_HIGHEST
  )
  direction_BxCxR = jnp.argmax(histogram_BxCxRxK, axis=-1)
  moves_BxC = jnp.any(length_BxHxWxC > 0, axis=(1, 2))
  ids = []
  for pattern, of in PATTERNS.items():
    part = amount_BxCxR[..., of]
    if pattern == 2:
      part = part / jnp.sum(mask[of], axis=(1, 2))
    best_BxC = jnp.argmax(part, axis=-1)
    direction_BxC = jnp.take_along_axis(direction_BxCxR[..., of], best_BxC[..., None], axis=-1)[..., 0]
    pair = jnp.stack([best_BxC, direction_BxC], axis=-1) + 1
    if pattern == 1:
      pair = jnp.where(moves_BxC[..., None], pair, 0)
    ids.append(pair.reshape(len(pair), -1))
  frames_BxTxC = jnp.sum(_length(change[:, :-1] if one_more else change), axis=(2, 3))
  ids.append(jnp.argmax(frames_BxTxC, axis=1) + 1)
  moves = [jnp.repeat(moves_BxC, 2, axis=-1)] * 3 + [jnp.any(frames_BxTxC > 0, axis=1)]
  return jnp.concatenate(ids, axis=-1).astype(jnp.int32), jnp.concatenate(moves, axis=-1)


def _length(change):
  return jnp.sqrt(jnp.sum(change**2, axis=-1))


def _share(change):
  """How much of an angle each of the 8 directions has, [..., 8]: 1 where it is its own, linear to the next."""
  place = jnp.arctan2(change[..., 1], change[..., 0]) * (DIRECTIONS / (2 * np.pi)) % DIRECTIONS
  away = jnp.abs(place[..., None] - np.arange(DIRECTIONS))
  return jnp.maximum(1 - jnp.minimum(away, DIRECTIONS - away), 0)


def colour_of(clip: jax.Array) -> jax.Array:
  """The octant of the colour cube of pixels 0..255 [..., 3], int32 0..7: an id less 1.

  4 where blue is dark, plus 2 where red is bright, plus 1 where green is bright; bright is at least 128.
  """
  red, green, blue = (clip[..., i] >= 128 for i in range(3))
  return 4 * (~blue).astype(jnp.int32) + 2 * red + green


def appearance_labels(
  clip_BxTxHxWx3: jax.Array, *, bins: int = 256, most_frequent: bool = False, other_ring: bool = False
) -> jax.Array:
  """The labels of appearance.

  Args:
    clip_BxTxHxWx3: raw pixels 0..255, in whole numbers of any dtype.
    bins: of the histograms of a channel, a divisor of 256.
    most_frequent: a colour is that of the most frequent of all 2 ** 24 colours, as in the release (of several the one
      with the least blue, then green, then red), and not the octant with most pixels.
    other_ring: the colour of the ring next to the square, as in the release: its lower strip is replaced by the square
      of 56 x 56 pixels (of 112) that it closes, black in the middle, in all frames but the last 14.

  Returns:
    int32 [B, 13]: for each pattern (region that changes most over time, its colour, region that changes least, its
    colour), then the colour of the clip. The change is 1 less the overlap over the union of a region's histograms of
    all frames, averaged over channels.
  """
  clip = clip_BxTxHxWx3.astype(jnp.int32)
  batch, frames, height, width, _ = clip.shape
  overlap_BxR = _overlap(clip, bins)
  picked = []
  for of in PATTERNS.values():
    part = overlap_BxR[:, of]
    picked += [of.start + jnp.argmin(part, axis=-1), of.start + jnp.argmax(part, axis=-1)]
  picked.append(jnp.full_like(picked[0], 28))
  picked_Bx7 = jnp.stack(picked, axis=-1)
  weight_RxTxHxW, black_R = _weights((height, width), frames, other_ring)
  colours = _most_frequent_octants if most_frequent else _octants
  colour_Bx7 = colours(clip, weight_RxTxHxW, black_R, picked_Bx7)
  region_Bx7 = picked_Bx7 - np.array([0, 0, 16, 16, 20, 20, 0])
  pairs = jnp.stack([region_Bx7, colour_Bx7], axis=-1)[:, :6].reshape(batch, 12)
  return (jnp.concatenate([pairs, colour_Bx7[:, 6:]], axis=-1) + 1).astype(jnp.int32)


def _overlap(clip_BxTxHxWx3, bins):
  """Overlap over union of the histograms of all frames, mean over channels, f32 [B, 28].

  Pixels are counted for each set of pixels that the same regions have, and then added up for the regions.
  """
  frames, height, width = clip_BxTxHxWx3.shape[1:4]
  sets, of_HW = np.unique(masks((height, width)).reshape(28, -1), axis=1, return_inverse=True)
  place_HxW = of_HW.reshape(height, width)
  offset = (np.arange(frames)[:, None, None] * sets.shape[1] + place_HxW) * bins

  def one(channel_TxHxW):
    index = (offset + channel_TxHxW // (256 // bins)).reshape(-1)
    counts = jnp.zeros(frames * sets.shape[1] * bins).at[index].add(1.0)
    return counts.reshape(frames, sets.shape[1], bins)

  def ratio(channel_BxTxHxW):
    counts = jax.vmap(one)(channel_BxTxHxW)
    histogram = jnp.einsum('bjsk,rs->bjrk', counts, sets.astype(np.float32), precision=_HIGHEST)
    return jnp.sum(jnp.min(histogram, axis=1), axis=-1) / jnp.sum(jnp.max(histogram, axis=1), axis=-1)

  return sum(jax.lax.map(ratio, jnp.moveaxis(clip_BxTxHxWx3, -1, 0))) / 3


def _weights(size, frames, other_ring):
  """(how often a pixel counts for the colour of each region and of the clip, uint8 [29, 1 or T, H, W]; black [29])."""
  mask = masks(size)
  black = np.zeros(29, np.float32)
  whole = np.concatenate([mask, np.ones_like(mask[:1])])[:, None].astype(np.uint8)
  if other_ring:
    early = max(frames - 14, 0)
    inner = mask[RING] | mask[RING - 1]
    rows = np.flatnonzero(mask[RING - 1].any(axis=1))
    strip = mask[RING] & (np.arange(size[0]) > rows[-1])[:, None]
    whole = np.repeat(whole, frames, axis=1)
    whole[RING, :, strip] = 0
    whole[RING, :early] += mask[RING]
    black[RING] = early * np.sum(inner & ~mask[RING])
  return whole, black


def _octants(clip_BxTxHxWx3, weight_RxTxHxW, black_R, picked_BxN):
  """The octant with most pixels of picked regions, int [B, N]."""
  own = (colour_of(clip_BxTxHxWx3)[..., None] == np.arange(COLOURS)).astype(jnp.float32)
  if weight_RxTxHxW.shape[1] == 1:
    own = jnp.sum(own, axis=1, keepdims=True)
  count_BxRxK = jnp.einsum('bthwk,rthw->brk', own, weight_RxTxHxW.astype(np.float32), precision=_HIGHEST)
  count_BxRxK = count_BxRxK + black_R[:, None] * (np.arange(COLOURS) == 4)
  return jnp.take_along_axis(jnp.argmax(count_BxRxK, axis=-1), picked_BxN, axis=1)


def _most_frequent_octants(clip_BxTxHxWx3, weight_RxTxHxW, black_R, picked_BxN):
  """The octant of the most frequent colour of picked regions, int [B, N]: colours are sorted, then runs counted."""
  shape = clip_BxTxHxWx3.shape[1:4]
  weight_RxP = jnp.asarray(np.broadcast_to(weight_RxTxHxW, (len(black_R), *shape)).reshape(len(black_R), -1))

  def one(clip, picked_N):
    code_P = ((clip[..., 2] * 256 + clip[..., 1]) * 256 + clip[..., 0]).reshape(-1)
    order_P = jnp.argsort(code_P)
    code_P = jnp.concatenate([jnp.zeros(1, jnp.int32), code_P[order_P]])  # black is the lowest code
    run_P = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (code_P[1:] != code_P[:-1]).astype(jnp.int32)]))

    def colour(region):
      weight_P = jnp.concatenate([jnp.asarray(black_R)[region, None], weight_RxP[region][order_P].astype(jnp.float32)])
      run = jnp.argmax(jnp.zeros(len(code_P)).at[run_P].add(weight_P))
      code = code_P[jnp.argmax(run_P == run)]
      return colour_of(jnp.stack([code % 256, code // 256 % 256, code // 65536]))

    return jax.lax.map(colour, picked_N)

  return jax.vmap(one)(clip_BxTxHxWx3, picked_BxN)
