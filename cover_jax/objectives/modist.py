"""MoDist-style: a visual pathway, the run's encoder, learns from the motion that a second pathway sees; no labels.

After Xiao, Tighe and Modolo, "MoDist: Motion Distillation for Self-supervised Video Representation Learning", later
"MaCLR: Motion-aware Contrastive Learning of Representations for Videos" (arXiv 2106.09703). From its abstract: contrast
of clips as usual, and across pathways, so that what moves is looked at; motion is not needed afterwards. The pre-
training code was not released. Defaults marked * are those of the configuration that was released with the transfer
code (amazon-science/self-supervised-maclr, Apache-2.0); the fourth term is off there by default, and so it is here.
**The rest is ours**: how motion is rendered, the size of the motion encoder, and that the queues leave a video's own
keys out. Numbers of the paper are not reproduced.

    config.streams.video.objective = {'name': 'modist', 'motion_encoder': {'name': 'resnet3d', 'kind': 'mc3', ...}}

Two clips of each video start some seconds apart. v is what the encoder sees of a clip, m its motion, made in `jit` from
the raw pixels of the same crop, mirrored if they are, without changes of colour. Keys k come from averaged teachers of
both pathways, and each pathway has a queue Q of its own, whose keys are the negatives wherever the key is of it:

    loss = NCE(v1, k_v2; Q_v) + cross_weight [NCE(v1, k_m; Q_m) + NCE(m1, k_v; Q_v)] + motion_weight NCE(m1, k_m2; Q_m)

with k_m and k_v of the other clip ('other', as the re-implementation in megvii-research/MSCL has it) or of the 'same'
one. The motion encoder lies under params['objectives'][stream] and what it learnt of batch statistics in the
objective's state, so that an export has the visual encoder alone. Teachers normalise by running statistics. In a video
too short for a clip, frames go on at its beginning, where motion shows a cut.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models import encoder as encoders
from cover_jax.models.encoder import STATISTICS, Encoder
from cover_jax.objectives import (
  Encode,
  LossOutput,
  Objective,
  Shown,
  Stages,
  contrastive,
  mean_over,
  motion,
  pairs,
  raw,
)
from cover_jax.objectives.contrastive import Negatives
from cover_jax.objectives.stages import staged
from cover_jax.runtime import keys
from data_pipelines.contract import UserError
from data_pipelines.declared import named, number, one_of, whole

MOTIONS = ('frame_difference', 'flow_edges', 'flow')
FLOWS = {'tvl1': motion.tvl1, 'normal': motion.normal_flow}
# An eighth of the widths of a network of 18 layers, one block a layer; convolutions in space but for the first layer.
MOTION_ENCODER = {'name': 'resnet3d', 'kind': 'mc3', 'depths': (1, 1, 1, 1), 'widths': (8, 16, 32, 64)}


class Term(NamedTuple):
  """One contrast.

  Attributes:
    weight: in the loss.
    query: the pathway, 'visual' or 'motion', whose student is asked.
    key: (pathway, clip) that it is to find; the negatives are the queue of that pathway.
  """

  weight: float
  query: str
  key: tuple[str, str]


def make(
  *,
  encode: Encode,
  model: Encoder,
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  width: int,
  judged: bool = False,
  stride: Annotated[int, whole(1)] = 8,
  motion_per_frame: Annotated[int, whole(1)] = 2,
  min_shift: Annotated[int, whole(1)] = 15,
  max_shift: Annotated[int, whole(1)] = 300,
  motion_input: Annotated[str, one_of(*MOTIONS)] = 'frame_difference',
  flow: Annotated[str, one_of(*FLOWS)] = 'tvl1',
  motion_encoder: Annotated[Mapping[str, Any], named()] = MOTION_ENCODER,
  cross_weight: Annotated[float, number(0)] = 1.0,
  motion_weight: Annotated[float, number(0)] = 0.0,
  cross_pair: Annotated[str, one_of('other', 'same')] = 'other',
  queue_size: Annotated[int, whole(1)] = 65536,
  temperature: Annotated[float, number(1e-4)] = 0.1,
  momentum: Annotated[float, number(0, 1)] = 0.999,
  dim: Annotated[int, whole(1)] = 128,
  head_layers: Annotated[int, whole(1)] = 2,
  head_hidden: Annotated[int, whole(1)] = 2048,
  pool: Annotated[str, one_of('cls', 'mean')] = 'cls',
) -> Objective:
  """The four terms above.

  Args:
    encode: the visual encoder.
    model: the same as a module, for the dtype of the computation.
    judged: the motion encoder runs as in evaluation, too.
    stream: under which heads and motion encoder lie in params['objectives'].
    num_frames, size: of the visual clips.
    width: D of the encoder's feature.
    stride: stored frames from one frame of a visual clip to the next, 8*.
    motion_per_frame: maps of motion for each frame of the visual clip, 2*; divides `stride`.
    min_shift, max_shift: stored frames between the starts of the two clips, where the video is long enough. The release
      says 0.5 to 10 seconds at 30 frames a second, which is 15* and 300*.
    motion_input: 'frame_difference', brighter, darker and either, as shares of 255; 'flow_edges', Sobel lengths of
      optical flow; or 'flow', (u, v, its length) over the longest in the clip.
    flow: how optical flow is computed: 'tvl1', or 'normal', much cheaper, the part along the brightness gradient.
    motion_encoder: as `config.model`. The release has a 2D ResNet-50 of an eighth of the channels; the default is ours.
    cross_weight: of the two terms across pathways, 1*.
    motion_weight: of the term within motion, 0*; MSCL has 1.
    cross_pair: whose key a query meets in the other pathway, that of the 'other' clip or of the 'same' one.
    queue_size: K of each queue, 65,536*.
    temperature: 0.1*.
    momentum: of the teachers, 0.999*.
    dim, head_layers, head_hidden: of the projection heads, 128*, 2*, 2,048*.
    pool: of the visual encoder: its own feature ('cls': a class token, a CNN's pooled map*), or the 'mean' of its
      tokens.

  Returns:
    An objective with the views 'first' and 'second'; its state is {'teacher', 'queues', 'statistics'}, the last those
    of the motion encoder. It measures 'loss' and, of each term that it has ('visual', 'visual_to_motion',
    'motion_to_visual', 'motion'), '<term>_loss' and '<term>_top1'.
  """
  where = f'config.streams.{stream}.objective'
  length = num_frames * motion_per_frame + 1  # one more frame than maps of motion
  encoder = _motion_encoder(motion_encoder, model.dtype, length - 1, size, where)
  _check(stream, num_frames, stride, motion_per_frame, min_shift, max_shift)
  terms = _terms(cross_weight, motion_weight, cross_pair)
  head = contrastive.ProjectionHead(dim, head_layers, head_hidden)
  motion_shown = functools.partial(motion_of, kind=motion_input, flow=flow)
  visual = functools.partial(pairs.embed, encode, head, pool)
  moving = functools.partial(_moving, encoder, head)
  thin = lambda clip: clip[:, :-1:motion_per_frame]  # what the visual encoder sees of a clip

  def online(params, state):
    own = params['objectives'][stream]
    statistics = {STATISTICS: state['statistics']} if state['statistics'] else {}
    return {
      'visual': {'encoder': params['encoder'], 'head': own['head']},
      'motion': {'encoder': {**own['motion_encoder'], **statistics}, 'head': own['motion_head']},
    }

  def show(batch, rng):
    plain = lambda: thin(raw(batch, 'first'))
    first = thin(batch['views']['first'])
    return Shown({'first': first}, keys.of(rng, 'visual'), keys.of(rng, 'motion'), {'first': plain})

  def judge(params, state, batch, encoded, motion_rng):
    moves = {name: motion_shown(raw(batch, name)) for name in ('first', 'second')}
    student, teacher = online(params, state), state['teacher']
    visual_BxD = contrastive.pool(encoded['first'], pool)
    queries, statistics = {'visual': head.apply({'params': student['visual']['head']}, visual_BxD)}, None
    if any(term.query == 'motion' for term in terms.values()):
      queries['motion'], statistics = moving(student['motion'], moves['first'], None if judged else motion_rng)
    by_teacher = {
      'visual': lambda name: visual(teacher['visual'], thin(batch['views'][name])),
      'motion': lambda name: jax.lax.stop_gradient(moving(teacher['motion'], moves[name], None)[0]),
    }
    found = {key: by_teacher[key[0]](key[1]) for key in dict.fromkeys(term.key for term in terms.values())}
    results = {
      name: _contrast(queries[term.query], found[term.key], state['queues'][term.key[0]], batch, temperature)
      for name, term in terms.items()
    }
    loss_B = sum(term.weight * results[name].loss for name, term in terms.items())
    measures = {f'{name}_{field}': getattr(r, field) for name, r in results.items() for field in ('loss', 'top1')}
    state = {**state, 'queues': _pushed(state['queues'], found, batch)}
    if statistics is not None:
      state['statistics'] = jax.lax.stop_gradient(statistics)
    return LossOutput(mean_over(loss_B, batch['mask']), state, {'loss': loss_B, **measures})

  def init_params(rng):
    made = _init(encoder, keys.of(rng, 'motion_encoder'), length - 1, size)
    init = lambda name, width: head.init(keys.of(rng, name), jnp.zeros((1, width)))['params']
    return {
      'head': init('head', width),
      'motion_encoder': made['params'],
      'motion_head': init('motion_head', encoder.width),
    }

  def init_state(params):
    made = _init(encoder, jax.random.key(0), length - 1, size)  # statistics start the same whatever the key
    state = {'statistics': made.get('batch_stats', {})}
    queues = {side: contrastive.empty_queue(queue_size, dim) for side in ('visual', 'motion')}
    return {**state, 'teacher': jax.tree.map(jnp.copy, online(params, state)), 'queues': queues}

  def after_update(params, state):
    return {**state, 'teacher': contrastive.ema_update(state['teacher'], online(params, state), momentum)}

  sample = functools.partial(
    two_clips, length=length, stride=stride // motion_per_frame, min_shift=min_shift, max_shift=max_shift
  )
  own = {'init_params': init_params, 'init_state': init_state, 'views': sample, 'after_update': after_update}
  encoded = dict.fromkeys(('first', 'second'), (num_frames, *size))
  return staged('modist', encode, Stages(show, judge), encoded=encoded, **own)


def two_clips(
  video_frames: int, rng: np.random.Generator | None, *, length: int, stride: int, min_shift: int, max_shift: int
) -> dict[str, np.ndarray]:
  """Frame numbers of two clips of a video: {'first', 'second'}, int64 [length] (`pairs.two_starts`).

  Raises:
    UserError: if the video has one frame.
  """
  span = (length - 1) * stride + 1
  starts = pairs.two_starts(video_frames, rng, span=span, min_gap=min_shift, max_gap=max_shift)
  return {
    name: pairs.walk(start, length, stride, video_frames)
    for name, start in zip(('first', 'second'), starts, strict=True)
  }


def motion_of(clip_BxTxHxWx3: jax.Array, *, kind: str, flow: str = 'tvl1') -> jax.Array:
  """What the motion encoder sees of a clip.

  Args:
    clip_BxTxHxWx3: raw pixels 0..255.
    kind: of `MOTIONS`.
    flow: of `FLOWS`, for those that are made of optical flow.

  Returns:
    f32 [B, T-1, H, W, 3], without a gradient. 'frame_difference': (d+, d-, |d|) of the luma, in [0, 1]. 'flow_edges':
    `motion.flow_edges`, in pixels per frame a pixel. 'flow': (u, v, length), over the greatest length in the clip.
  """
  clip = jax.lax.stop_gradient(clip_BxTxHxWx3.astype(jnp.float32))
  if kind == 'frame_difference':
    d = motion.frame_difference(clip) / 255.0
    return jnp.stack([jnp.maximum(d, 0), jnp.maximum(-d, 0), jnp.abs(d)], axis=-1)
  flow_BxTxHxWx2 = FLOWS[flow](clip)
  if kind == 'flow_edges':
    return motion.flow_edges(flow_BxTxHxWx2)
  length = jnp.sqrt(jnp.sum(flow_BxTxHxWx2**2, axis=-1, keepdims=True))
  longest = jnp.max(length, axis=(1, 2, 3, 4), keepdims=True)
  return jnp.concatenate([flow_BxTxHxWx2, length], axis=-1) / jnp.maximum(longest, 1e-6)


def _terms(cross_weight: float, motion_weight: float, cross_pair: str) -> dict[str, Term]:
  """The terms that count."""
  partner = {'other': 'second', 'same': 'first'}[cross_pair]
  terms = {
    'visual': Term(1.0, 'visual', ('visual', 'second')),
    'visual_to_motion': Term(cross_weight, 'visual', ('motion', partner)),
    'motion_to_visual': Term(cross_weight, 'motion', ('visual', partner)),
    'motion': Term(motion_weight, 'motion', ('motion', 'second')),
  }
  return {name: term for name, term in terms.items() if term.weight}


def _motion_encoder(options, dtype, frames, size, where) -> Encoder:
  """The module of the motion pathway, which can encode the stream's motion."""
  where = f'{where}.motion_encoder'
  encoders.check(options, where)
  encoder = encoders.make(options, dtype)
  if problem := encoder.limits(frames, size):
    raise UserError(
      f'{where} is to encode motion of {frames} frames of size {size[0]} x {size[1]} and {problem}: change one of them.'
    )
  try:  # shapes only: nothing is computed
    jax.eval_shape(functools.partial(_init, encoder, frames=frames, size=size), jax.random.key(0))
  except (ValueError, TypeError, ZeroDivisionError) as error:
    raise UserError(f'{where} does not make a model: {str(error).splitlines()[0]}') from error
  return encoder


def _check(stream, num_frames, stride, motion_per_frame, min_shift, max_shift) -> None:
  """Raises UserError for clips that show no motion and for numbers that contradict each other."""
  where = f'config.streams.{stream}.objective'
  if num_frames < 2:
    raise UserError(f'config.streams.{stream}.num_frames is {num_frames}: MoDist needs clips of at least 2 frames.')
  if stride % motion_per_frame:
    raise UserError(
      f'{where} has stride={stride} and motion_per_frame={motion_per_frame}: the frames of motion lie evenly between '
      'those of the clip, so the first must be a multiple of the second.'
    )
  if min_shift > max_shift:
    raise UserError(f'{where} has min_shift={min_shift} above max_shift={max_shift}: exchange them.')


def _init(encoder, rng, frames, size):
  return encoder.init(rng, jnp.zeros((1, frames, *size, 3), encoder.dtype))


def _moving(encoder, head, params, motion_BxTxHxWx3, rng):
  """(vectors [B, D], the motion encoder's statistics) of motion."""
  encoded = encoders.run(encoder, params['encoder'], motion_BxTxHxWx3.astype(encoder.dtype), rng=rng)
  return head.apply({'params': params['head']}, encoded.feature_BxD), encoded.statistics


def _contrast(query_BxD, key_BxD, queue, batch, temperature):
  negatives = Negatives(queue.key_KxD, contrastive.usable(queue, batch['source'], batch['video_id']))
  return contrastive.info_nce(query_BxD, key_BxD, [negatives], temperature=temperature)


def _pushed(queues, found, batch):
  """Each pathway's queue with the keys of its second clips, or of its first where it has no others."""
  pushed = dict(queues)
  for side in queues:
    keys_of_side = [found[side, clip] for clip in ('second', 'first') if (side, clip) in found]
    if keys_of_side:
      pushed[side] = contrastive.push(queues[side], keys_of_side[0], batch['source'], batch['video_id'], batch['mask'])
  return pushed
