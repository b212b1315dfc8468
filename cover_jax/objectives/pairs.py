"""Several clips of one video: which frames they show, and how they go through an encoder together."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.objectives import Encode, Params, contrastive
from data_pipelines.contract import UserError


def two_starts(
  video_frames: int,
  rng: np.random.Generator | None,
  *,
  span: int,
  min_gap: int,
  max_gap: int | None = None,
) -> tuple[int, int]:
  """First frames of two intervals of a video, at least `min_gap` and at most `max_gap` frames apart.

  Where the video is long enough, both intervals lie within it and each pair of starts that are so far apart can come:
  the first is uniform over the starts that have a partner, the second over its partners. In a shorter video the second
  starts half the video later and both may run over the end (`walk` goes on at the beginning); the two then overlap.

  Args:
    video_frames: in the video, at least 2: one frame has no other interval.
    rng: None for the deterministic choice: the first start and its last partner.
    span: frames from the first to the last frame of an interval, both counted.
    min_gap, max_gap: between the starts, in frames; None for no upper limit.

  Raises:
    UserError: if the video has one frame.
  """
  if video_frames < 2:
    raise UserError('the video has one frame, and another interval of it is needed; leave it out of the data set.')
  last = max(video_frames - span, 0)
  max_gap = max(max_gap if max_gap is not None else last, min_gap)
  start_S = np.arange(last + 1)
  partners = lambda start: start_S[(np.abs(start_S - start) >= min_gap) & (np.abs(start_S - start) <= max_gap)]
  with_partner_S = start_S[(start_S >= min_gap) | (start_S <= last - min_gap)]
  pick = lambda of: of[int(rng.random() * len(of))] if rng is not None else of[-1]
  if len(with_partner_S):
    first = pick(with_partner_S) if rng is not None else 0
    return int(first), int(pick(partners(first)))
  first = pick(start_S) if rng is not None else 0
  return int(first), int(first + video_frames // 2)


def walk(start: int, length: int, stride: int, video_frames: int) -> np.ndarray:
  """Frame numbers int64 [length] from `start` on; at the video's end it goes on at the beginning."""
  return (start + stride * np.arange(length, dtype=np.int64)) % video_frames


def side_by_side(clips: Sequence[jax.Array]) -> jax.Array:
  """V clips [B, ...] of B videos as one batch [B * V, ...]; one clip alone is itself.

  All clips of a video lie next to each other, so that on many devices none has to move.
  """
  if len(clips) == 1:
    return clips[0]
  together = jnp.stack(clips, axis=1)
  return together.reshape(-1, *together.shape[2:])


def apart(x_NxD: jax.Array, views: int) -> jax.Array:
  """The inverse of `side_by_side` for what an encoder made of the clips: [B * V, ...] to [B, V, ...]."""
  return x_NxD.reshape(-1, views, *x_NxD.shape[1:])


def embed(encode: Encode, head: nn.Module, how: str, teacher: Params, clip: jax.Array) -> jax.Array:
  """Vectors [B, D] of clips by a teacher: not in training mode, and no gradient flows into them.

  Args:
    encode, head: the run's encoder and a projection head.
    how: `contrastive.pool`.
    teacher: {'encoder', 'head'}.
    clip: [B, T, H, W, 3].
  """
  feature_BxD = contrastive.pool(encode(teacher['encoder'], clip), how)
  return jax.lax.stop_gradient(head.apply({'params': teacher['head']}, feature_BxD))
