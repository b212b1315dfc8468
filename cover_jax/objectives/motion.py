"""Motion of a clip, from its pixels, inside `jit`: frame difference, normal flow, optical flow (TV-L1), flow edges.

Nothing is stored beside the frames: an objective that needs motion calls one of these functions on the clip that it
sees, so that crop and flip of the clip are those of its motion. A *flow* is f32 [B, T-1, H, W, 2]: entry t says how
far, in pixels, what frame t shows has moved in frame t+1, (u, v) = (to the right, down).

All of them are elementwise in the batch: a clip's motion is the same however a batch is split over devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.augment.colour import luma

# Longest flow of `normal_flow`, pixels per frame: the range in which the statistics' release stores flow.
MAX_FLOW = 20.0
_SMALLEST_SIDE = 16  # of the coarsest image of a pyramid, as in OpenCV


def grey(clip_BxTxHxWx3: jax.Array) -> jax.Array:
  """Luma (ITU-R 601) f32 [B, T, H, W] of pixels of any dtype, in the clip's own unit."""
  return luma(clip_BxTxHxWx3.astype(jnp.float32))[..., 0]


def frame_difference(clip_BxTxHxWx3: jax.Array) -> jax.Array:
  """Luma of each next frame minus luma of the frame: f32 [B, T-1, H, W], in the clip's unit, with its sign.

  Zero where nothing moves; a brightness that is added to all frames leaves it as it is.
  """
  grey_BxTxHxW = grey(clip_BxTxHxWx3)
  return grey_BxTxHxW[:, 1:] - grey_BxTxHxW[:, :-1]


def normal_flow(clip_BxTxHxWx3: jax.Array) -> jax.Array:
  """The part of the motion along the brightness gradient: all that one pixel's neighbourhood can tell.

  (u, v) = -I_t (I_x, I_y) / (I_x^2 + I_y^2 + 1) of the luma after a 5 x 5 box blur, with central differences of the
  mean of the two frames, and each component cut to +-20 pixels. An edge that moves along itself shows none.

  Args:
    clip_BxTxHxWx3: pixels 0..255 of any dtype; the 1 under the fraction is of their unit, squared.

  Returns:
    f32 [B, T-1, H, W, 2], pixels per frame.
  """
  image_BxTxHxW = _blur5(grey(clip_BxTxHxWx3))
  change = image_BxTxHxW[:, 1:] - image_BxTxHxW[:, :-1]
  dx, dy = _central((image_BxTxHxW[:, 1:] + image_BxTxHxW[:, :-1]) / 2)
  flow = -change[..., None] * jnp.stack([dx, dy], -1) / (dx * dx + dy * dy + 1.0)[..., None]
  return jnp.clip(flow, -MAX_FLOW, MAX_FLOW)


def flow_edges(flow_BxTxHxWx2: jax.Array) -> jax.Array:
  """Where motion changes in space: Sobel gradient lengths of u, of v and of the flow's length.

  Motion that is the same everywhere, as that of a camera that pans, has none.

  Args:
    flow_BxTxHxWx2: f32, pixels per frame.

  Returns:
    f32 [B, T, H, W, 3], at least 0, pixels per frame a pixel (Sobel kernels divided by 8). Borders repeat.
  """
  length = jnp.sqrt(jnp.sum(flow_BxTxHxWx2**2, axis=-1, keepdims=True))
  maps = jnp.concatenate([flow_BxTxHxWx2, length], axis=-1)
  padded = jnp.pad(maps, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode='edge')
  smooth = lambda x, axis: sum(w * _cut(x, i, 2, axis) for i, w in enumerate((0.25, 0.5, 0.25)))
  slope = lambda x, axis: (_cut(x, 2, 2, axis) - _cut(x, 0, 2, axis)) / 2
  return jnp.sqrt(smooth(slope(padded, 3), 2) ** 2 + smooth(slope(padded, 2), 3) ** 2)


@functools.partial(
  jax.jit, static_argnames=('scales', 'step', 'warps', 'iterations', 'median', 'smoothness', 'theta', 'tau')
)
def tvl1(
  clip_BxTxHxWx3: jax.Array,
  *,
  scales: int = 5,
  step: float = 0.8,
  warps: int = 3,
  iterations: int = 20,
  median: bool = True,
  smoothness: float = 0.15,
  theta: float = 0.3,
  tau: float = 0.25,
) -> jax.Array:
  """Optical flow by TV-L1: total variation of the flow plus the absolute difference of brightness along it.

  Zach, Pock, Bischof 2007, "A duality based approach for realtime TV-L1 optical flow"; solved from coarse to fine with
  warps of the second frame. Written from the paper's equations; values of `scales`, `step`, `smoothness`, `theta` and
  `tau` are the defaults of OpenCV's DualTVL1. A fixed number of iterations replaces its test for convergence, so that
  the cost is known and the result depends on the pair of frames alone; their number, the bilinear warp and the median
  of 3 x 3 are ours (there 5 warps, up to 300 iterations, cubic, 5 x 5). Made for labels: the gradient of it is of no
  use.

  Args:
    clip_BxTxHxWx3: pixels 0..255 of any dtype.
    scales: of the pyramid, at most; no image of it has a side under 16 pixels.
    step: of the sides from one image of the pyramid to the next.
    warps: of the second frame at each scale.
    iterations: between two warps, of flow and dual variable.
    median: whether the flow goes through a 3 x 3 median before each warp's iterations.
    smoothness: lambda, how much the brightness counts against the smoothness of the flow.
    theta: how far the two halves of the problem may differ.
    tau: step of the dual variable.

  Returns:
    f32 [B, T-1, H, W, 2], pixels per frame.
  """
  image = grey(clip_BxTxHxWx3)
  batch, frames, height, width = image.shape
  pairs = lambda x: x.reshape(batch * (frames - 1), height, width)
  first, second = [pairs(image[:, :-1])], [pairs(image[:, 1:])]
  for _ in range(scales - 1):
    size = tuple(round(side * step) for side in first[-1].shape[1:])
    if min(size) < _SMALLEST_SIDE:
      break
    first.append(_resize(first[-1], size))
    second.append(_resize(second[-1], size))
  u = v = jnp.zeros_like(first[-1])
  solve = functools.partial(
    _one_scale, warps=warps, iterations=iterations, median=median, smoothness=smoothness, theta=theta, tau=tau
  )
  for one, two in zip(reversed(first), reversed(second), strict=True):
    if one.shape != u.shape:
      grow = one.shape[2] / u.shape[2], one.shape[1] / u.shape[1]
      u, v = _resize(u, one.shape[1:]) * grow[0], _resize(v, one.shape[1:]) * grow[1]
    u, v = solve(one, two, u, v)
  return jnp.stack([u, v], axis=-1).reshape(batch, frames - 1, height, width, 2)


def _one_scale(first, second, u, v, *, warps, iterations, median, smoothness, theta, tau):
  """Flow [N, H, W] of pairs of images at one scale, from a first guess."""
  second_x, second_y = _central(second)
  threshold, rate = smoothness * theta, tau / theta
  planes = jnp.stack([second, second_x, second_y], axis=-1)

  def warp(_, carry):
    u, v, duals = carry
    if median:
      u, v = _median3(u), _median3(v)
    moved, inside = _warp(planes, u, v)
    image, gx, gy = (moved[..., i] for i in range(3))
    gx, gy = gx * inside, gy * inside  # nothing is known of what has left the frame: there it is smooth
    length2 = gx * gx + gy * gy
    constant = (image - gx * u - gy * v - first) * inside
    divisor = jnp.where(length2 > 1e-6, length2, 1.0)

    def iterate(_, carry):
      u, v, (ux, uy, vx, vy) = carry
      rho = constant + gx * u + gy * v
      # The shift along the gradient that makes the difference 0, cut to the threshold.
      shift = jnp.where(length2 > 1e-6, jnp.clip(-rho / divisor, -threshold, threshold), 0.0)
      u = u + shift * gx + theta * _divergence(ux, uy)
      v = v + shift * gy + theta * _divergence(vx, vy)
      return u, v, (*_ascend(u, ux, uy, rate), *_ascend(v, vx, vy, rate))

    return jax.lax.fori_loop(0, iterations, iterate, (u, v, duals))

  zero = jnp.zeros_like(u)
  u, v, _ = jax.lax.fori_loop(0, warps, warp, (u, v, (zero,) * 4))
  return u, v


def _ascend(u, px, py, rate):
  """A step of the dual variable of one component of the flow."""
  ux = jnp.pad(u[:, :, 1:] - u[:, :, :-1], [(0, 0), (0, 0), (0, 1)])
  uy = jnp.pad(u[:, 1:] - u[:, :-1], [(0, 0), (0, 1), (0, 0)])
  scale = 1.0 / (1.0 + rate * jnp.sqrt(ux * ux + uy * uy))
  return (px + rate * ux) * scale, (py + rate * uy) * scale


def _divergence(px, py):
  """The negative adjoint of the forward difference in `_ascend`."""
  dx = px - jnp.pad(px[:, :, :-1], [(0, 0), (0, 0), (1, 0)])
  dy = py - jnp.pad(py[:, :-1], [(0, 0), (1, 0), (0, 0)])
  return dx + dy


def _central(image):
  """Central differences along x and y of [..., H, W]; borders repeat their last pixel."""
  padded = jnp.pad(image, [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)], mode='edge')
  dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
  dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
  return dx, dy


def _warp(planes_NxHxWxC, u, v):
  """(planes at (x + u, y + v), bilinear [N, H, W, C]; f32 [N, H, W], 1 where that lies within the frame)."""
  batch, height, width, _ = planes_NxHxWxC.shape
  x, y = jnp.arange(width) + u, jnp.arange(height)[:, None] + v
  inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  x, y = jnp.clip(x, 0, width - 1), jnp.clip(y, 0, height - 1)
  x0 = jnp.clip(jnp.floor(x), 0, max(width - 2, 0))
  y0 = jnp.clip(jnp.floor(y), 0, max(height - 2, 0))
  fx, fy = (x - x0)[..., None], (y - y0)[..., None]
  x0, y0 = x0.astype(jnp.int32), y0.astype(jnp.int32)
  flat = planes_NxHxWxC.reshape(batch, height * width, -1)

  def at(row, column):
    index = (row * width + column).reshape(batch, -1, 1)
    return jnp.take_along_axis(flat, index, axis=1).reshape(planes_NxHxWxC.shape)

  top = at(y0, x0) * (1 - fx) + at(y0, x0 + 1) * fx
  bottom = at(y0 + 1, x0) * (1 - fx) + at(y0 + 1, x0 + 1) * fx
  return top * (1 - fy) + bottom * fy, inside.astype(jnp.float32)


def _median3(image_NxHxW):
  """3 x 3 median; borders repeat. By minima and maxima alone: rows are sorted, then their columns are compared."""
  padded = jnp.pad(image_NxHxW, [(0, 0), (1, 1), (1, 1)], mode='edge')
  low, middle, high = _sort3(*(_cut(padded, i, 2, 2) for i in range(3)))
  rows = lambda x: [_cut(x, i, 2, 1) for i in range(3)]
  lows, highs = rows(low), rows(high)
  greatest_low = jnp.maximum(jnp.maximum(lows[0], lows[1]), lows[2])
  least_high = jnp.minimum(jnp.minimum(highs[0], highs[1]), highs[2])
  return _sort3(greatest_low, _sort3(*rows(middle))[1], least_high)[1]


def _sort3(a, b, c):
  a, b = jnp.minimum(a, b), jnp.maximum(a, b)
  b, c = jnp.minimum(b, c), jnp.maximum(b, c)
  return jnp.minimum(a, b), jnp.maximum(a, b), c


def _blur5(image):
  """Mean of 5 x 5 pixels of [..., H, W]; borders repeat."""
  for axis in (-2, -1):
    edges = [(0, 0)] * image.ndim
    edges[axis] = (2, 2)
    padded = jnp.pad(image, edges, mode='edge')
    image = sum(_cut(padded, i, 4, image.ndim + axis) for i in range(5)) / 5
  return image


def _cut(x, start: int, less: int, axis: int):
  """x[start : start + n - less] along an axis of n."""
  return jax.lax.slice_in_dim(x, start, start + x.shape[axis] - less, axis=axis)


def _resize(image_NxHxW, size):
  """Bilinear between the centres of pixels, without a filter, by two small matrices: [N, *size]."""
  rows, columns = (_weights(a, b) for a, b in zip(image_NxHxW.shape[1:], size, strict=True))
  return jnp.einsum('ih,nhw,jw->nij', rows, image_NxHxW, columns, precision=jax.lax.Precision.HIGHEST)


def _weights(old: int, new: int) -> np.ndarray:
  """f32 [new, old]: how much each old pixel counts for each new one."""
  place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  return np.maximum(1 - np.abs(place[:, None] - np.arange(old)), 0).astype(np.float32)
