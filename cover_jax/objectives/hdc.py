"""HDC-style: spatial and temporal contrast, decoupled by augmentation, at several depths of the encoder; no labels.

After Zhang and Crandall, "Hierarchically Decoupled Spatial-Temporal Contrast for Self-supervised Video Representation
Learning" (WACV 2022, arXiv 2011.11261). From its abstract: two contrastive tasks, of which one asks for spatial and one
for temporal features; augmentation decides which; both are solved at several levels of the encoder; and how invariant a
level is measured to be becomes its weight in the loss. **Everything else is ours**: no code was released and only the
abstract was read, so nothing here reproduces a number of the paper.

    config.streams.video.objective = {'name': 'hdc', 'queue_size': 4096}

*Spatial* task: the anchor finds a clip of its video that shows other frames, at another rate and in half of the cases
in shuffled order. What stays the same is how things look. *Temporal* task: the anchor finds the same frames under
strong changes of colour, with a still frame mixed in. What stays the same is how things move; told from it are also
another interval of the video and the anchor itself in shuffled order. Crop, flip and rotation (of the source) and weak
colours (of the stream's `augment`) are drawn for each clip anew, in both tasks.

Levels of a transformer are depths, of a CNN stages. A level's map is averaged over time and space, normalised (a
LayerNorm of its own, since between the blocks of a transformer nothing is) and projected by a head for each task. Keys
come from an averaged teacher; each level and task has a queue of its own.

Weights: c, of each level and task, is a running mean of how alike positive pairs are (`estimator`); the weights of a
task's levels are a softmax of +c / t ('invariance') or -c / t ('inverse') times their number, so that their mean is 1.
The abstract says that invariance becomes the weight, but neither its sign nor how it is estimated.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.augment import photometric
from cover_jax.augment.still_frame import temporal_consistent
from cover_jax.models.encoder import Encoder
from cover_jax.models.pointwise import layer_norm
from cover_jax.objectives import Encode, LossOutput, Objective, Shown, Stages, contrastive, mean_over, pairs, raw
from cover_jax.objectives.contrastive import Negatives
from cover_jax.objectives.stages import staged
from cover_jax.runtime import keys
from data_pipelines import declared
from data_pipelines.contract import UserError
from data_pipelines.declared import flag, named, nonempty, number, one_of, several, whole

WEIGHTINGS = {'uniform': 0.0, 'fixed': 0.0, 'invariance': 1.0, 'inverse': -1.0}  # the sign of c
ESTIMATORS = ('positive', 'margin')
APPEARANCE: Mapping[str, Any] = {
  'color_jitter': {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1, 'probability': 0.8},
  'grayscale': {'probability': 0.2},
  'gaussian_blur': {'probability': 0.5},
}


class Task(NamedTuple):
  """One contrast.

  Attributes:
    key: the view that the anchor is to find.
    strong: whether the key's colours are changed strongly.
    hard: whether the video's own other interval and shuffled anchor are negatives.
  """

  key: str
  strong: bool
  hard: bool


TASKS = {'spatial': Task('spatial', False, False), 'temporal': Task('temporal', True, True)}
JOINT = {'joint': Task('spatial', True, False)}  # both nuisances at once: what decoupling is compared with


class LevelHead(nn.Module):
  """One level's map [B, T, H, W, C] to a unit vector [B, dim] for each task, float32."""

  tasks: tuple[str, ...]
  dim: int
  layers: int
  hidden: int

  @nn.compact
  def __call__(self, map_BxTxHxWxC: jax.Array) -> dict[str, jax.Array]:
    x_BxC = layer_norm('norm', jnp.float32)(jnp.mean(map_BxTxHxWxC.astype(jnp.float32), axis=(1, 2, 3)))
    head = lambda task: contrastive.ProjectionHead(self.dim, self.layers, self.hidden, name=task)
    return {task: head(task)(x_BxC) for task in self.tasks}


def make(
  *,
  encode: Encode,
  model: Encoder,
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  levels: Annotated[tuple[str, ...], several(nonempty, distinct=True)] = (),
  stride: Annotated[int, whole(1)] = 4,
  min_gap: Annotated[int, whole(0)] = 0,
  shuffle: Annotated[float, number(0, 1)] = 0.5,
  decoupled: Annotated[bool, flag] = True,
  spatial_weight: Annotated[float, number(0)] = 1.0,
  temporal_weight: Annotated[float, number(0)] = 1.0,
  interval_negative: Annotated[bool, flag] = True,
  shuffled_negative: Annotated[bool, flag] = True,
  appearance: Annotated[Mapping[str, Any], named()] = APPEARANCE,
  still_frame: Annotated[float, number(0, 1)] = 0.3,
  weighting: Annotated[str, one_of(*WEIGHTINGS)] = 'invariance',
  fixed_weights: Annotated[tuple[float, ...], several(number(0))] = (),
  estimator: Annotated[str, one_of(*ESTIMATORS)] = 'positive',
  weight_temperature: Annotated[float, number(1e-4)] = 0.2,
  weight_momentum: Annotated[float, number(0, 1)] = 0.99,
  queue_size: Annotated[int, whole(0)] = 4096,
  temperature: Annotated[float, number(1e-4)] = 0.1,
  momentum: Annotated[float, number(0, 1)] = 0.999,
  dim: Annotated[int, whole(1)] = 128,
  head_layers: Annotated[int, whole(1)] = 2,
  head_hidden: Annotated[int, whole(1)] = 2048,
) -> Objective:
  """The weighted sum of spatial and temporal InfoNCE over the levels. All defaults are ours.

  Args:
    encode: the encoder.
    model: the same as a module: its levels and how wide they are.
    stream: under which the heads lie in params['objectives'].
    num_frames, size: of the clips.
    levels: of the encoder's `level_names`; () for three of them, evenly spaced, the last one included.
    stride: stored frames from one frame of a clip to the next; the spatial task's key may have half or twice of it.
    min_gap: stored frames at least between the starts of two intervals of a video; 0 for half of a clip's span.
    shuffle: how often the frames of the spatial task's key come in another order.
    decoupled: False for one task, 'joint', whose key shows other frames in strong colours; its weight is
      `spatial_weight`. It is what decoupling is to be compared with.
    spatial_weight, temporal_weight: of the two tasks' losses; a task of weight 0 is left out.
    interval_negative, shuffled_negative: what the temporal task tells the key from, beside the queue.
    appearance: the strong colours, as in a stream's `augment`, upon the stream's own.
    still_frame: strong clips are mixed with one of their frames in a share of at most this; 0 for none.
    weighting: of the levels: 'uniform', 'fixed', 'invariance' (the more alike positive pairs are, the more the level
      counts) or 'inverse'.
    fixed_weights: of 'fixed', one for each level, scaled to a mean of 1.
    estimator: of invariance: 'positive', the mean cosine of positive pairs, or 'margin', that less the mean cosine with
      the queue.
    weight_temperature: t of the softmax over levels.
    weight_momentum: of the running mean of the estimate, which starts at 0.
    queue_size: K, keys of earlier steps, for each level and task.
    temperature: of InfoNCE.
    momentum: of the averaged teacher.
    dim, head_layers, head_hidden: of the projection heads.

  Returns:
    An objective with the views 'anchor' and, as its tasks need them, 'spatial', 'temporal' and 'negative'; its state is
    {'teacher', 'queues': {task: {level: Queue}}, 'invariance': {task: f32 [levels]}}. It measures 'loss', for each task
    '<task>_loss', '<task>_top1' and '<task>_positive', means over the levels, and '<task>_weight_<level>'.
  """
  where = f'config.streams.{stream}.objective'
  levels = _levels(model, levels, where)
  rates = {'spatial': spatial_weight, 'temporal': temporal_weight, 'joint': spatial_weight}
  tasks = {name: task for name, task in (TASKS if decoupled else JOINT).items() if rates[name]}
  hard = any(task.hard for task in tasks.values())
  negatives = ('interval',) * (hard and interval_negative) + ('shuffled',) * (hard and shuffled_negative)
  _check(tasks, negatives, num_frames, queue_size, weighting, fixed_weights, levels, stream)
  declared.check(appearance, {name: photometric.OPTIONS[name] for name in APPEARANCE}, f'{where}.appearance')
  colours = photometric.make(appearance, f'{where}.appearance').photometric

  head = LevelHead(tuple(tasks), dim, head_layers, head_hidden)
  project = functools.partial(_project, head, levels)
  online = lambda params: {'encoder': params['encoder'], 'heads': params['objectives'][stream]['heads']}
  strong = functools.partial(_strong, colours=colours, still_frame=still_frame)
  move = functools.partial(contrastive.ema_update, momentum=weight_momentum)
  weights_of = functools.partial(
    level_weights, weighting=weighting, fixed=fixed_weights, temperature=weight_temperature
  )

  def show(batch, rng):
    clips = {name: clip.astype(jnp.float32) for name, clip in batch['views'].items() if name in wanted}
    seen, plain = {'anchor': clips['anchor']}, {}
    if 'interval' in negatives:
      seen['negative'] = strong(keys.of(rng, 'interval'), clips['negative'])
    if 'shuffled' in negatives:
      mixed_up = functools.partial(shuffled, keys.of(rng, 'shuffled'))
      seen['shuffled'], plain['shuffled'] = mixed_up(clips['anchor']), lambda: mixed_up(raw(batch, 'anchor'))
    key_of = lambda name, clip: strong(keys.of(rng, f'key {name}'), clip) if tasks[name].strong else clip
    key_clips = {name: key_of(name, clips[task.key]) for name, task in tasks.items()}
    return Shown(seen, keys.of(rng, 'encode'), key_clips, plain)

  def judge(params, state, batch, encoded, key_clips):
    maps = {level: pairs.side_by_side([e.levels[level] for e in encoded.values()]) for level in levels}
    vectors = jax.tree.map(lambda x: pairs.apart(x, len(encoded)), project(online(params), maps))
    next_state, losses, measures = {'teacher': state['teacher'], 'queues': {}, 'invariance': {}}, [], {}
    for name, task in tasks.items():
      by_teacher = encode(state['teacher']['encoder'], key_clips[name], levels=levels)
      found = {
        level: jax.lax.stop_gradient(key[name]) for level, key in project(state['teacher'], by_teacher.levels).items()
      }
      queues, weight_M = state['queues'][name], weights_of(state['invariance'][name])
      results = {
        level: _contrast(vectors[level][name], found[level], queues[level], task.hard, batch, temperature)
        for level in levels
      }
      losses.append(rates[name] * sum(w * results[level].loss for w, level in zip(weight_M, levels, strict=True)))
      measures |= _measures(name, results, weight_M)
      next_state['queues'][name] = _pushed(queues, found, batch)
      estimate_M = jnp.stack([_estimate(estimator, results[level], batch['mask']) for level in levels])
      # Where all examples are padding there is nothing to estimate.
      moved_M = move(state['invariance'][name], estimate_M)
      next_state['invariance'][name] = jnp.where(jnp.any(batch['mask']), moved_M, state['invariance'][name])
    loss_B = sum(losses)
    return LossOutput(mean_over(loss_B, batch['mask']), next_state, {'loss': loss_B, **measures})

  def init_params(rng):
    shapes = _level_shapes(model, num_frames, size, levels)
    init = lambda level: head.init(keys.of(rng, level), jnp.zeros(shapes[level]))['params']
    return {'heads': {level: init(level) for level in levels}}

  def init_state(params):
    queues = {name: {level: contrastive.empty_queue(queue_size, dim) for level in levels} for name in tasks}
    invariance = {name: jnp.zeros(len(levels)) for name in tasks}
    return {'teacher': jax.tree.map(jnp.copy, online(params)), 'queues': queues, 'invariance': invariance}

  def after_update(params, state):
    return {**state, 'teacher': contrastive.ema_update(state['teacher'], online(params), momentum)}

  wanted = {'anchor', *(task.key for task in tasks.values()), *(('negative',) * ('interval' in negatives))}
  sample = functools.partial(
    clips_of_video, length=num_frames, stride=stride, min_gap=min_gap or _half(num_frames, stride), shuffle=shuffle
  )

  def views(video_frames, rng):
    return {name: frames for name, frames in sample(video_frames, rng).items() if name in wanted}

  seen = ('anchor', *('negative',) * ('interval' in negatives), *('shuffled',) * ('shuffled' in negatives))
  encoded = dict.fromkeys([*seen, *(f'key of {name}' for name in tasks)], (num_frames, *size))
  own = {'init_params': init_params, 'init_state': init_state, 'views': views, 'after_update': after_update}
  return staged('hdc', encode, Stages(show, judge, levels), encoded=encoded, **own)


def level_weights(
  invariance_M: jax.Array, *, weighting: str, fixed: Sequence[float] = (), temperature: float = 0.2
) -> jax.Array:
  """How much each level counts: f32 [M] with a mean of 1, through which no gradient flows.

  Args:
    invariance_M: how alike positive pairs are at each level.
    weighting: of `WEIGHTINGS`.
    fixed: the weights of 'fixed', up to their sum.
    temperature: of the softmax.
  """
  if weighting == 'fixed':
    fixed_M = jnp.asarray(fixed, jnp.float32)
    return fixed_M * (len(fixed) / jnp.sum(fixed_M))
  logits_M = WEIGHTINGS[weighting] * jax.lax.stop_gradient(invariance_M) / temperature
  return len(invariance_M) * jax.nn.softmax(logits_M)


def clips_of_video(
  video_frames: int, rng: np.random.Generator | None, *, length: int, stride: int, min_gap: int, shuffle: float
) -> dict[str, np.ndarray]:
  """Frame numbers of the anchor, of its two keys and of another interval.

  'temporal' shows the anchor's frames. 'negative' is another interval at the anchor's stride, as `pairs.two_starts`
  draws it. 'spatial' starts as far from the anchor at least, with half, once or twice the stride: each that has room is
  as likely. In a share `shuffle` of the draws its frames come in another order. In a video too short for two intervals
  it starts half the video later.

  Args:
    video_frames: in the video, at least 2.
    rng: None for the deterministic choice: the first and the last start, at one stride, in order.
    length, stride: of the anchor.
    min_gap: between the starts, in frames.
    shuffle: in [0, 1].

  Returns:
    {'anchor', 'temporal', 'spatial', 'negative'}: int64 [length], within [0, video_frames).

  Raises:
    UserError: if the video has one frame.
  """
  start, negative = pairs.two_starts(video_frames, rng, span=(length - 1) * stride + 1, min_gap=min_gap)
  of_stride = {s: np.arange(max(video_frames - (length - 1) * s, 0)) for s in (max(stride // 2, 1), stride, 2 * stride)}
  far = {s: start_S[np.abs(start_S - start) >= min_gap] for s, start_S in of_stride.items()}
  strides = [s for s, start_S in far.items() if len(start_S)]
  if rng is None or not strides:
    step, spatial = stride, negative if rng is None else start + video_frames // 2
  else:
    step = strides[int(rng.random() * len(strides))]
    spatial = far[step][int(rng.random() * len(far[step]))]
  order = rng.permutation(length) if rng is not None and rng.random() < shuffle else np.arange(length)
  anchor = pairs.walk(start, length, stride, video_frames)
  return {
    'anchor': anchor,
    'temporal': anchor.copy(),
    'spatial': pairs.walk(spatial, length, step, video_frames)[order],
    'negative': pairs.walk(negative, length, stride, video_frames),
  }


def shuffled(rng: jax.Array, clip_BxTx: jax.Array) -> jax.Array:
  """Clips [B, T, ...] of at least 3 frames in another order: each has its own, neither the old one nor its reverse."""
  batch, frames = clip_BxTx.shape[:2]
  order_BxT = jnp.argsort(jax.random.uniform(rng, (batch, frames)), axis=1)
  same, reverse = jnp.arange(frames), jnp.arange(frames)[::-1]
  either_B = jnp.all(order_BxT == same, axis=1) | jnp.all(order_BxT == reverse, axis=1)
  order_BxT = jnp.where(either_B[:, None], jnp.roll(same, -1), order_BxT)
  return jnp.take_along_axis(clip_BxTx, order_BxT.reshape(batch, frames, *[1] * (clip_BxTx.ndim - 2)), axis=1)


def _half(length: int, stride: int) -> int:
  """Half of the span of a clip, in frames."""
  return max(length * stride // 2, 1)


def _levels(model: Encoder, levels: Sequence[str], where: str) -> tuple[str, ...]:
  """The levels asked for, or three of the encoder's."""
  known = model.level_names
  if not known:
    raise UserError(f'{where}: HDC contrasts at levels inside the encoder, and {type(model).__name__} names none.')
  if unknown := [level for level in levels if level not in known]:
    raise UserError(f'{where}.levels names {unknown[0]!r}: expected levels of the encoder, of {", ".join(known)}.')
  count = min(3, len(known))
  return tuple(levels) or tuple(known[math.ceil(len(known) * (i + 1) / count) - 1] for i in range(count))


def _check(tasks, negatives, num_frames, queue_size, weighting, fixed_weights, levels, stream) -> None:
  """Raises UserError for options that leave nothing to learn or contradict each other."""
  where = f'config.streams.{stream}.objective'
  if num_frames < 2:
    raise UserError(f'config.streams.{stream}.num_frames is {num_frames}: HDC needs clips of at least 2 frames.')
  if not tasks:
    raise UserError(f'{where} gives every task a weight of 0, so nothing would be learnt: give one of them more.')
  if 'shuffled' in negatives and num_frames < 3:
    raise UserError(
      f'config.streams.{stream}.num_frames is {num_frames}: the frames of a clip can only be shuffled where there are '
      f'at least 3; take more, or set {where}.shuffled_negative=False.'
    )
  if lonely := [name for name, task in tasks.items() if not queue_size and not (task.hard and negatives)]:
    raise UserError(f'{where} has queue_size=0, so the {lonely[0]} task has nothing to tell apart: set it above 0.')
  if weighting == 'fixed' and (len(fixed_weights) != len(levels) or not 1e-6 <= sum(fixed_weights) <= 1e6):
    raise UserError(
      f'{where}.fixed_weights is {tuple(fixed_weights)}: expected one number for each of the levels '
      f'{", ".join(levels)}, whose sum lies between 0.000001 and 1,000,000.'
    )


def _level_shapes(model, num_frames, size, levels):
  """{level: shape of its map for one clip}; nothing is computed."""
  clip = jax.ShapeDtypeStruct((1, num_frames, *size, 3), model.dtype)
  run = functools.partial(model.init_with_output, levels=levels)
  return {level: x.shape for level, x in jax.eval_shape(run, jax.random.key(0), clip)[0].levels.items()}


def _project(head, levels, params, maps):
  """{level: {task: unit vectors [B, D]}} of maps {level: [B, T, H, W, C]}."""
  return {level: head.apply({'params': params['heads'][level]}, maps[level]) for level in levels}


def _strong(rng, clip, *, colours, still_frame):
  """The clip under the strong change of its appearance, which is the same for all of its frames."""
  if colours is not None:
    clip = colours(keys.of(rng, 'colours'), clip)
  return temporal_consistent(keys.of(rng, 'still frame'), clip, still_frame) if still_frame else clip


def _contrast(vectors_BxVxD, key_BxD, queue, hard, batch, temperature):
  """InfoNCE of the anchors against their keys, the queue and, for a hard task, the video's own other clips."""
  groups = [Negatives(queue.key_KxD, contrastive.usable(queue, batch['source'], batch['video_id']))]
  if hard and vectors_BxVxD.shape[1] > 1:
    groups.append(Negatives(vectors_BxVxD[:, 1:]))
  return contrastive.info_nce(vectors_BxVxD[:, 0], key_BxD, groups, temperature=temperature)


def _pushed(queues, found, batch):
  """Each level's queue with that level's keys."""
  return {
    level: contrastive.push(q, found[level], batch['source'], batch['video_id'], batch['mask'])
    for level, q in queues.items()
  }


def _estimate(estimator, result, mask):
  """How alike positive pairs are, a scalar."""
  alike_B = result.positive - (result.negatives[0] if estimator == 'margin' else 0.0)
  return mean_over(alike_B, mask)


def _measures(name, results, weight_M):
  mean = lambda field: sum(getattr(result, field) for result in results.values()) / len(results)
  of_task = {f'{name}_{field}': mean(field) for field in ('loss', 'top1', 'positive')}
  weights = zip(results.items(), weight_M, strict=True)
  return of_task | {f'{name}_weight_{level}': jnp.broadcast_to(w, result.loss.shape) for (level, result), w in weights}
