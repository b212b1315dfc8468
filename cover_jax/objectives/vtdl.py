"""VTDL: video-based temporal-discriminative learning (Wang, Lin, Ma, Yuen 2020, arXiv 2008.02129), without labels.

A clip is to be told from the clips of other videos, kept in a queue of keys, and from another interval of its own
video. Anchor and positive show the same frames, augmented independently; one of them is mixed with a still frame of
its own, which leaves its motion alone (Temporal Consistent Augmentation).

    config.streams.video.objective = {'name': 'vtdl', 'queue_size': 4096}
    config.streams.video.augment = {'color_jitter': {..., 'clamp': False}}

Checked against the authors' released code, not their body text. Defaults marked * are that code's; the others are ours,
and so are the masks of the queue: the release starts from random keys and takes a video's own keys for negatives.
Crop, flip and rotation (of the source) and colours (of the stream) are drawn for each of the three clips anew; colours
are changed without cutting them to the range of pixels (`clamp`), so that TCA's property holds.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.augment.still_frame import temporal_consistent
from cover_jax.objectives import Encode, LossOutput, Objective, Shown, Stages, contrastive, mean_over, pairs
from cover_jax.objectives.contrastive import Negatives
from cover_jax.objectives.stages import staged
from data_pipelines.contract import UserError
from data_pipelines.declared import flag, number, one_of, whole

TCA_ON = {'query': ('anchor',), 'key': ('positive',), 'both': ('anchor', 'positive')}


def make(
  *,
  encode: Encode,
  stream: str,
  num_frames: int,
  width: int,
  stride: Annotated[int, whole(1)] = 4,
  min_gap: Annotated[int, whole(1)] = 2,
  queue_size: Annotated[int, whole(0)] = 4096,
  temperature: Annotated[float, number(1e-4)] = 0.07,
  momentum: Annotated[float, number(0, 1)] = 0.999,
  dim: Annotated[int, whole(1)] = 128,
  head_layers: Annotated[int, whole(1)] = 1,
  head_hidden: Annotated[int, whole(1)] = 2048,
  pool: Annotated[str, one_of('cls', 'mean')] = 'cls',
  temporal_discrimination: Annotated[bool, flag] = True,
  tca_alpha: Annotated[float, number(0, 1)] = 0.1,
  tca_on: Annotated[str, one_of(*TCA_ON)] = 'query',
  released_code: Annotated[bool, flag] = False,
) -> Objective:
  """InfoNCE over [positive | queue | another interval of the same video].

  Args:
    encode: the encoder.
    stream: under which the projection head lies in params['objectives'].
    num_frames: T.
    width: D of the encoder's feature.
    stride: stored frames from one frame of a clip to the next, 4*.
    min_gap: stored frames at least between the starts of anchor and negative, 2*.
    queue_size: K, keys of earlier steps. The release has 3,569 for HMDB51, 5,000 for UCF101, 12,500 for Kinetics.
    temperature: 0.07*.
    momentum: of the averaged encoder that makes the keys, 0.999*.
    dim: of the vectors that are compared, 128*.
    head_layers: linear layers of the projection head, 1*, with ReLU and `head_hidden` units between them.
    head_hidden: see there.
    pool: 'cls', the encoder's feature (a TimeSformer's class token; of a CNN the pooled map), or 'mean' of its tokens.
    temporal_discrimination: whether the video's other interval is a negative.
    tca_alpha: TCA mixes in a share of at most this, 0.1*; 0 for none.
    tca_on: 'query'*, 'key' or 'both'. The abstract says the positive, the release does it to the anchor.
    released_code: the release's quirks, for comparison with it: the clips start as `released_views` draws them, TCA
      draws one share for the whole batch, the queue starts with random vectors that count, and keys of the same video
      count as negatives. Its colour jitter, of which only one change of four takes effect, is not copied.

  Returns:
    An objective with the views 'anchor', 'positive' and, if it discriminates in time, 'negative'; its state is
    {'teacher', 'queue'}. It measures 'loss', 'top1' (the positive is nearest), 'positive' (its cosine), 'queue' (the
    mean cosine of the keys) and 'negative' (the cosine of the other interval).
  """
  _check(stream, num_frames, queue_size, temporal_discrimination)
  names = ('anchor', 'positive', 'negative') if temporal_discrimination else ('anchor', 'positive')
  seen = tuple(name for name in names if name != 'positive')  # the student's, the anchor first
  head = contrastive.ProjectionHead(dim, head_layers, head_hidden)
  online = lambda params: {'encoder': params['encoder'], 'head': params['objectives'][stream]['head']}
  embed = functools.partial(pairs.embed, encode, head, pool)
  mix = functools.partial(_mix, names=TCA_ON[tca_on] if tca_alpha else (), alpha=tca_alpha, one_share=released_code)
  compare = functools.partial(_compare, temperature=temperature, own_video_counts=released_code)

  def show(batch, rng):
    encode_rng, clips = mix(rng, {name: batch['views'][name].astype(jnp.float32) for name in names})
    return Shown({name: clips[name] for name in seen}, encode_rng, clips['positive'])

  def judge(params, state, batch, encoded, positive):
    key_BxD = embed(state['teacher'], positive)
    feature_NxD = pairs.side_by_side([contrastive.pool(encoded[name], pool) for name in seen])
    vectors_BxVxD = pairs.apart(head.apply({'params': online(params)['head']}, feature_NxD), len(seen))
    loss_B, measures = compare(vectors_BxVxD, key_BxD, state['queue'], batch)
    queue = contrastive.push(state['queue'], key_BxD, batch['source'], batch['video_id'], batch['mask'])
    return LossOutput(mean_over(loss_B, batch['mask']), {**state, 'queue': queue}, measures)

  def init_params(rng):
    return {'head': head.init(rng, jnp.zeros((1, width)))['params']}

  def init_state(params):
    queue = _random_queue(queue_size, dim) if released_code else contrastive.empty_queue(queue_size, dim)
    return {'teacher': jax.tree.map(jnp.copy, online(params)), 'queue': queue}

  def after_update(params, state):
    return {**state, 'teacher': contrastive.ema_update(state['teacher'], online(params), momentum)}

  def views(video_frames, rng):
    sample = released_views if released_code else triplet
    drawn = sample(video_frames, rng, length=num_frames, stride=stride, min_gap=min_gap)
    return {name: drawn[name] for name in names}

  own = {'init_params': init_params, 'init_state': init_state, 'views': views, 'after_update': after_update}
  return staged('vtdl', encode, Stages(show, judge), **own)


def _check(stream: str, num_frames: int, queue_size: int, temporal_discrimination: bool) -> None:
  """Raises UserError for options that leave nothing to learn."""
  if num_frames < 2:
    raise UserError(f'config.streams.{stream}.num_frames is {num_frames}: VTDL needs clips of at least 2 frames.')
  if not queue_size and not temporal_discrimination:
    raise UserError(
      f'config.streams.{stream}.objective has queue_size=0 and temporal_discrimination=False: there is nothing to tell '
      'apart.'
    )


def _mix(rng, clips, *, names, alpha, one_share):
  """(a key for what comes next, the clips with those of `names` augmented by TCA)."""
  next_rng, *keys = jax.random.split(rng, 1 + len(names))
  changed = {
    name: temporal_consistent(key, clips[name], alpha, one_share=one_share)
    for key, name in zip(keys, names, strict=True)
  }
  return next_rng, {**clips, **changed}


def _compare(vectors_BxVxD, key_BxD, queue, batch, *, temperature, own_video_counts):
  """(loss [B], measures) of the first of each video's vectors against its key, the queue and its other vectors."""
  mask_BxK = True if own_video_counts else contrastive.usable(queue, batch['source'], batch['video_id'])
  groups = {'queue': Negatives(queue.key_KxD, mask_BxK)} if len(queue.key_KxD) else {}
  if vectors_BxVxD.shape[1] > 1:
    groups['negative'] = Negatives(vectors_BxVxD[:, 1:])
  result = contrastive.info_nce(vectors_BxVxD[:, 0], key_BxD, list(groups.values()), temperature=temperature)
  measures = {'loss': result.loss, 'top1': result.top1, 'positive': result.positive}
  return result.loss, measures | dict(zip(groups, result.negatives, strict=True))


def _random_queue(size, dim):
  """A queue without a filled slot but full of vectors, as the release starts."""
  side = (dim / 3) ** -0.5
  keys_KxD = jax.random.uniform(jax.random.key(0), (size, dim), minval=-side, maxval=side)
  return contrastive.empty_queue(size, dim)._replace(key_KxD=keys_KxD)


def triplet(
  video_frames: int, rng: np.random.Generator | None, *, length: int, stride: int, min_gap: int
) -> dict[str, np.ndarray]:
  """Frame numbers of anchor, positive (the same) and negative (another interval of the video).

  Where the video is long enough, both intervals lie within it, and each pair of starts that are at least `min_gap`
  apart can come: the anchor's start is uniform over those that have a partner, the negative's over its partners. In a
  shorter video the negative starts half the video later and both begin again at the video's end, as in the release;
  the two then overlap.

  Args:
    video_frames: in the video, at least 2: one frame has no other interval.
    rng: None for the deterministic choice, the first and the last possible start.
    length, stride: of the clips.
    min_gap: in frames.

  Returns:
    {'anchor', 'positive', 'negative'}: int64 [length], within [0, video_frames).

  Raises:
    UserError: if the video has one frame.
  """
  _check_length(video_frames)
  span = (length - 1) * stride + 1
  anchor, negative = pairs.two_starts(video_frames, rng, span=span, min_gap=min_gap)
  first, second = (pairs.walk(start, length, stride, video_frames) for start in (anchor, negative))
  return {'anchor': first, 'positive': first.copy(), 'negative': second}


def released_views(
  video_frames: int, rng: np.random.Generator | None, *, length: int, stride: int, min_gap: int
) -> dict[str, np.ndarray]:
  """Frame numbers as the released code draws them for UCF101 and HMDB51.

  Starts leave room for clips of twice the length (32 frames where clips have 16), so that many videos have only one
  start; a negative that starts less than `min_gap` from the anchor starts a third of the video later; a clip that comes
  within `stride` of the video's end goes on at its first frame. Arguments, result and error as of `triplet`.
  """
  _check_length(video_frames)
  n = video_frames
  room = max(n - 2 * length * stride, 0) + 1
  draw = lambda: 1 + int(rng.random() * room) if rng is not None else 1
  anchor, negative = draw(), draw()
  if abs(negative - anchor) < min_gap:
    negative = (negative + n // 3) % n or 1

  def walk(start):  # frames count from 1 there
    frames, p = [], start
    for _ in range(length):
      frames.append(p - 1)
      p = p + stride if p + stride < n - stride + 1 else 1
    return np.minimum(np.array(frames, np.int64), n - 1)

  return {'anchor': walk(anchor), 'positive': walk(anchor), 'negative': walk(negative)}


def _check_length(video_frames: int) -> None:
  if video_frames < 2:
    raise UserError('the video has one frame, and VTDL needs another interval of it; leave it out of the data set.')
