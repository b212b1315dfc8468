"""Order and geometry: which order a clip's parts were put in, and which affine map was applied, without labels.

After Jiao, Droste, Drukker, Papageorghiou and Noble (ISBI 2020, arXiv 2003.00105), for fetal ultrasound. From its
abstract and a reader's summary, which are all that was read: a clip of 4 frames is shuffled and its order classified
into 12 = 4! / 2 classes, since an order and its reverse are one; an affine map (rotation, scale, shear) is the same for
all frames and its parameters are predicted; both happen to one input of one network ('joint'), or to two inputs of two
networks that share their weights ('parallel'). All else is ours: intervals, ranges, the loss of the parameters,
weights, heads, jitter, and every default. The authors' data are private; no figure of theirs is claimed. The head over
pairs of parts has the shape of Xu et al. 2019 (VCOP).

    config.streams.video.objective = {'name': 'order_geometry', 'gap': 8}                          # a TimeSformer
    config.streams.video.objective = {'name': 'order_geometry', 'gap': 8, 'parts': 'apart'}        # a 3D CNN

A clip of T frames is 4 parts of T / 4 frames. What would tell the answer without looking at what moves is closed: each
part has colours and a shift of its own, gaps vary, and what a map shows beyond the border is a reflection. Ultrasound
has a border within the frame, its field of view: with `sector` the reflection is at that border, which stays where it
is.
"""

import functools
import itertools
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cover_jax.augment import photometric
from cover_jax.models.encoder import Encoder
from cover_jax.objectives import Encode, LossOutput, Objective, Shown, Stages, mean_over, pretext, raw, warps
from cover_jax.objectives.stages import staged
from cover_jax.runtime import keys
from data_pipelines.contract import UserError
from data_pipelines.declared import either, flag, none, number, one_of, several, whole

PARTS = 4
_LEAST_SHOWN = 0.05  # of a clip, within a sector
PERMUTATIONS = np.array(list(itertools.permutations(range(PARTS))), np.int32)  # [24, 4]


def _classes() -> np.ndarray:
  """The class of each permutation, int32 [24]: the rank of the smaller of it and its reverse among the 12 such."""
  smaller = [min(tuple(p), tuple(p[::-1])) for p in PERMUTATIONS.tolist()]
  return np.array([sorted(set(smaller)).index(p) for p in smaller], np.int32)


CLASSES = _classes()


class PairHead(nn.Module):
  """Features of the parts [B, 4, D] to logits [B, 12]: a layer that each pair goes through, one for all pairs.

  With `differences` a pair is also shown by how far its two parts are from each other. An order and its reverse are
  one class, so that which of two parts is first says nothing, and how far they are apart says most.
  """

  hidden: int
  differences: bool = False

  @nn.compact
  def __call__(self, x_BxPxD: jax.Array) -> jax.Array:
    pairs = list(itertools.combinations(range(PARTS), 2))
    first, second = x_BxPxD[:, [i for i, _ in pairs]], x_BxPxD[:, [j for _, j in pairs]]
    x_BxQxH = nn.Dense(
      self.hidden,
      dtype=jnp.float32,
      kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', 'mlp')),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('mlp',)),
      name='pair',
    )(jnp.concatenate([first, second, *([jnp.abs(first - second)] if self.differences else [])], axis=-1))
    return pretext.Linear(len(set(CLASSES.tolist())), name='out')(nn.relu(x_BxQxH).reshape(len(x_BxPxD), -1))


def make(
  *,
  encode: Encode,
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  width: int,
  model: Encoder,
  strategy: Annotated[str, one_of('joint', 'parallel')] = 'joint',
  stride: Annotated[int, whole(1)] = 1,
  gap: Annotated[int, whole(1)] = 8,
  gap_jitter: Annotated[float, number(0, below=1)] = 0.25,
  still: Annotated[float, number(0)] = 2.0,
  parts: Annotated[str, one_of('together', 'apart')] = 'together',
  part_colours: Annotated[float, number(0)] = 0.2,
  part_shift: Annotated[int, whole(0, 1024)] = 4,
  rotation: Annotated[float, number(0, 180)] = 30.0,
  scale: Annotated[float, number(1, 4)] = 1.25,
  shear: Annotated[float, number(0, 60)] = 15.0,
  shift: Annotated[float, number(0, 1)] = 0.1,
  transform_target: Annotated[str, one_of('params', 'matrix6', 'aet')] = 'params',
  sector: Annotated[Any, either(none, several(number(), count=5))] = None,
  hidden: Annotated[int, whole(1)] = 512,
  differences: Annotated[bool, flag] = False,
  order_weight: Annotated[float, number(0)] = 1.0,
  geometry_weight: Annotated[float, number(0)] = 1.0,
) -> Objective:
  """Cross-entropy of the order among 12, and a Huber loss of the affine map.

  Args:
    encode: the encoder.
    stream: under which the heads lie in params['objectives'].
    num_frames: T, a multiple of 4.
    size: (height, width).
    width: D of the encoder's feature.
    model: for the grid of its tokens, and its limits.
    strategy: 'joint': the clip is shuffled and warped, and encoded once; 'parallel': a shuffled clip and a warped one.
    stride: stored frames from one frame of a part to the next.
    gap: stored frames from the start of a part to that of the next; less where a video is shorter.
    gap_jitter: each gap is uniform within this share of it, but parts never overlap.
    still: a video whose parts all differ by less than this, on average over its pixels of 0 to 255 before colours are
      changed, has no order: it is not asked for.
    parts: 'together': the encoder sees the parts one behind the other, and a part's feature is the mean of its own
      tokens (a TimeSformer). 'apart': it sees each part alone (a CNN, whose strides would mix them).
    part_colours: brightness, contrast and saturation of each part of a shuffled clip vary by this.
    part_shift: pixels by which each part of a shuffled clip is moved at most.
    rotation, shear: degrees to either side.
    scale: the largest; the smallest is one over it.
    shift: shares of width and height. A range of 0 (of `scale`: 1) leaves its parameter out.
    transform_target: 'params': the parameters, over their ranges; 'matrix6': the entries of the map beyond the
      identity, over their largest values; 'aet': these, and the head also sees the feature of the clip that was not
      warped, which is encoded too.
    sector: None, or the field of view as (row, column of the probe, half its angle in degrees, nearest and farthest
      radius): see `warps.Sector`. Clips are cut to it.
    hidden: units of the head of the order, for each pair of parts.
    differences: that head also sees |x_i - x_j| of a pair of features; on 560 short videos it was at chance without
      it after 1,200 steps and learnt with it in 500.
    order_weight, geometry_weight: of the two losses; at 0 a clip is not shuffled, or not warped.

  Returns:
    An objective with the view 'clip'. Per example it measures 'loss'; of the order 'order_loss', 'moving' (the video is
    not still) and 'top1' (it moves and its order was found: over 'moving' this is the accuracy, by chance 1 / 12); of
    the map 'geometry_loss' and 'geometry_mse' (of the target; for parameters 1 / 3 by chance), and for 'params' the
    mean absolute '<parameter>_error', in degrees, natural logarithms of the scale and shares of the side, by chance
    half the range.

  Raises:
    UserError: if clips cannot be cut into parts, or nothing is asked.
  """
  ranges = {'rotation': math.radians(rotation), 'scale': math.log(scale), 'shear': math.radians(shear)}
  range_5 = np.array([*ranges.values(), shift, shift])
  orders, warped = order_weight > 0, geometry_weight > 0
  target_of = _target(transform_target, range_5)
  asked = target_of(np.zeros((1, 5)), np).shape[-1]
  _check(stream, num_frames, size, model, parts, orders, warped and asked)
  sector = None if sector is None else _sector(sector, size, f'config.streams.{stream}.objective.sector')
  heads, widths = {}, {}
  if orders:
    heads['order'], widths['order'] = PairHead(hidden, differences), (PARTS, width)
  if warped:
    heads['geometry'] = pretext.Linear(asked)
    widths['geometry'] = ((1 + (transform_target == 'aet')) * width,)

  def changed(rng, clip_BxTxHxWx3, permutation_BxP, map_Bx2x3, colours):
    """{name: the clip in another order, warped, or both}; `colours`: how much those of the parts vary."""
    jitter = lambda name: _jittered(keys.of(rng, name), clip_BxTxHxWx3, permutation_BxP, colours, part_shift)
    plain = (clip_BxTxHxWx3, None)
    shuffled = jitter('parts') if orders else plain
    bases = {'both': shuffled} if strategy == 'joint' else {'order': shuffled, 'geometry': plain}
    if not (orders and warped):
      bases = {'order': shuffled} if orders else {'geometry': plain}
    clips = {
      name: _show(*base, map_Bx2x3 if warped and name != 'order' else None, sector) for name, base in bases.items()
    }
    if warped and transform_target == 'aet':
      clips['before'] = _show(*bases.get('both', plain), None, sector)
    return clips

  def show(batch, rng):
    clip_BxTxHxWx3 = batch['views']['clip'].astype(jnp.float32)
    batch_size = len(clip_BxTxHxWx3)
    which_B = jax.random.randint(keys.of(rng, 'order'), (batch_size,), 0, len(PERMUTATIONS))
    unit_Bx5 = jax.random.uniform(keys.of(rng, 'geometry'), (batch_size, 5), minval=-1.0) * (range_5 > 0)
    map_Bx2x3 = warps.affine_map((unit_Bx5 * range_5).astype(jnp.float32), size)
    order_BxP = jnp.asarray(PERMUTATIONS)[which_B]

    def clips_of(pixels, colours):
      clips = changed(rng, pixels.astype(jnp.float32), order_BxP, map_Bx2x3, colours)
      return _apart(clips) if parts == 'apart' else clips

    clips = clips_of(clip_BxTxHxWx3, part_colours)
    plain = lambda name: jnp.round(clips_of(raw(batch, 'clip'), 0.0)[name]).astype(jnp.uint8)
    made = (_moves(raw(batch, 'clip').astype(jnp.float32), still), which_B, unit_Bx5)
    return Shown(clips, keys.of(rng, 'encode'), made, {name: functools.partial(plain, name) for name in clips})

  def judge(params, state, batch, encoded, made):
    moving_B, which_B, unit_Bx5 = made
    features = _features(encoded, parts)
    own, loss_B, measures = params['objectives'][stream], 0.0, {}
    apply = lambda name, x: heads[name].apply({'params': own[name]}, x)
    if orders:
      logits_Bx12 = apply('order', features['both' if 'both' in features else 'order'])
      entropy_B, right_B = pretext.classify(logits_Bx12, jnp.asarray(CLASSES)[which_B])
      loss_B += order_weight * moving_B * entropy_B
      measures |= {'order_loss': moving_B * entropy_B, 'moving': moving_B, 'top1': moving_B & right_B}
    if warped:
      seen = [features[n] for n in ('both', 'geometry', 'before') if n in features]
      found_BxK = apply('geometry', jnp.concatenate([x.mean(axis=1) for x in seen], axis=-1))
      target_BxK = target_of(unit_Bx5, jnp)
      huber_B = jnp.mean(optax.huber_loss(found_BxK, target_BxK, delta=0.1), axis=-1)
      loss_B += geometry_weight * huber_B
      measures |= {'geometry_loss': huber_B, 'geometry_mse': jnp.mean((found_BxK - target_BxK) ** 2, axis=-1)}
      if transform_target == 'params':
        measures |= _errors(found_BxK - target_BxK, range_5)
    measures['loss'] = loss_B
    return LossOutput(mean_over(loss_B, batch['mask']), state, measures)

  def views(video_frames, rng):
    options = {'length': num_frames // PARTS, 'stride': stride, 'gap': gap, 'jitter': gap_jitter}
    return {'clip': part_frames(video_frames, rng, **options)}

  names = ('both',) if strategy == 'joint' and orders and warped else ('order',) * orders + ('geometry',) * warped
  names += ('before',) * (warped and transform_target == 'aet')
  shown = dict.fromkeys(names, (num_frames, *size))
  if parts == 'apart':
    shown = {f'{name} {p}': (num_frames // PARTS, *size) for name in names for p in range(PARTS)}
  init_params = lambda rng: pretext.init(heads, rng, widths)
  return staged('order_geometry', encode, Stages(show, judge), init_params=init_params, views=views, encoded=shown)


def _check(stream, num_frames, size, model, parts, orders, warped) -> None:
  """Raises UserError for a stream or options that leave nothing to learn, or an encoder that mixes the parts."""
  where = f'config.streams.{stream}'
  if num_frames % PARTS:
    images = ', not images' if num_frames == 1 else ''
    raise UserError(
      f'{where}.num_frames is {num_frames}: order_geometry cuts clips into {PARTS} parts and needs videos in clips '
      f'whose number of frames is a multiple of {PARTS}{images}.'
    )
  if not orders and not warped:
    raise UserError(
      f'{where}.objective has order_weight=0 and no geometry (geometry_weight=0, or all ranges 0): nothing is asked.'
    )
  if parts == 'apart':
    if problem := model.limits(num_frames // PARTS, size):
      raise UserError(
        f'{where} gives the encoder parts of {num_frames // PARTS} of its {num_frames} frames and {problem}: change '
        'its num_frames or config.model.'
      )
    return
  clip = jax.ShapeDtypeStruct((1, num_frames, *size, 3), model.dtype)
  encoded, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), clip)
  if (steps := encoded.tokens_BxTxHxWxD.shape[1]) % PARTS:
    raise UserError(
      f'{where} has clips of {num_frames} frames, of which this encoder makes {steps} steps in time, which are no '
      f"{PARTS} parts: set objective.parts='apart', or make the clips longer."
    )


def _sector(values, size: tuple[int, int], where: str) -> warps.Sector:
  sector = warps.Sector(*map(float, values))
  if not (0 < sector.half_angle < 90 and 0 <= sector.near < sector.far):
    raise UserError(
      f'{where} is {tuple(values)}: expected (row, column, half angle, near, far) with an angle between 0 and 90 '
      'degrees and 0 <= near < far.'
    )
  if (shown := warps.inside(sector, *size).mean()) < _LEAST_SHOWN:
    raise UserError(
      f'{where} is {tuple(values)}, a field of view of {shown:.1%} of a clip of {size[0]} x {size[1]}: expected at '
      f'least {_LEAST_SHOWN:.0%} (row and column of the probe, near and far are shares of the height and width).'
    )
  return sector


def part_frames(
  video_frames: int, rng: np.random.Generator | None, *, length: int, stride: int, gap: int, jitter: float
) -> np.ndarray:
  """Frame numbers of 4 parts of a video, in order and apart.

  Args:
    video_frames: in the video.
    rng: for gaps and start; None for equal gaps in the middle.
    length: frames of a part.
    stride: from one to the next.
    gap: from the start of a part to that of the next. It varies by `jitter` of it, is cut to what the video has room
      for, and never so small that parts overlap.
    jitter: a share.

  Returns:
    int64 [4 * length], rising, each within [0, video_frames).

  Raises:
    UserError: if the video has not room for 4 parts.
  """
  least, inside = length * stride, (length - 1) * stride + 1
  most = (video_frames - inside) // (PARTS - 1)
  if most < least:
    raise UserError(
      f'the video has {video_frames} frames, and {PARTS} parts of {length} frames at stride {stride} need '
      f'{(PARTS - 1) * least + inside}; take shorter clips, or leave it out of the data set.'
    )
  low, high = math.ceil(gap * (1 - jitter) - 1e-9), math.floor(gap * (1 + jitter) + 1e-9)
  low, high = min(max(low, least), most), min(max(high, least), most)
  if rng is None:
    gaps = np.full(PARTS - 1, min(max(gap, least), most))
  else:
    gaps = np.array([low + int(rng.random() * (high - low + 1)) for _ in range(PARTS - 1)])
  free = video_frames - inside - int(gaps.sum())
  start = int(rng.random() * (free + 1)) if rng is not None else free // 2
  starts = start + np.concatenate([[0], np.cumsum(gaps)])
  return (starts[:, None] + stride * np.arange(length)).reshape(-1).astype(np.int64)


def _in_parts(clip_BxTxHxWxC):
  batch, frames, *picture = clip_BxTxHxWxC.shape
  return clip_BxTxHxWxC.reshape(batch, PARTS, frames // PARTS, *picture)


def _moves(clip_BxTxHxWx3, still: float) -> jax.Array:
  """Bool [B]: some two parts differ by at least `still` on average."""
  parts = _in_parts(clip_BxTxHxWx3)
  pairs = itertools.combinations(range(PARTS), 2)
  return jnp.any(
    jnp.stack([jnp.mean(jnp.abs(parts[:, i] - parts[:, j]), axis=(1, 2, 3, 4)) >= still for i, j in pairs]), axis=0
  )


def _jittered(rng, clip_BxTxHxWx3, permutation_BxP, colours: float, most: int):
  """(clips in that order with colours of each part changed, maps [B, 4, 2, 3] that shift each part)."""
  parts = jax.vmap(lambda of_clip, order_P: of_clip[order_P])(_in_parts(clip_BxTxHxWx3), permutation_BxP)
  if colours:
    each = parts.reshape(-1, *parts.shape[2:]) / 255.0
    jitter = {'brightness': colours, 'contrast': colours, 'saturation': colours}
    parts = 255.0 * photometric.color_jitter(keys.of(rng, 'colours'), each, **jitter).reshape(parts.shape)
  shift_2xBxP = jax.random.randint(keys.of(rng, 'shift'), (2, *permutation_BxP.shape), -most, most + 1)
  maps = warps.translation(*shift_2xBxP.astype(jnp.float32)) if most else None
  return parts.reshape(clip_BxTxHxWx3.shape), maps


def _show(clip_BxTxHxWx3, of_parts, of_clip, sector):
  """A clip under maps of its parts [B, 4, 2, 3], then one for all [B, 2, 3]; None stands for no map."""
  if of_clip is not None:
    of_clip = of_clip[:, None]
    of_parts = of_clip if of_parts is None else warps.then(of_parts, of_clip)
  if of_parts is None and sector is None:
    return clip_BxTxHxWx3
  if of_parts is None:
    return clip_BxTxHxWx3 * warps.inside(sector, *clip_BxTxHxWx3.shape[2:4])[..., None]
  return warps.warp(clip_BxTxHxWx3, of_parts, sector)


def _apart(clips):
  """{'<name> <part>': frames of a part} of {name: clip}."""
  return {f'{name} {p}': _in_parts(clip)[:, p] for name, clip in clips.items() for p in range(PARTS)}


def _features(encoded, how: str):
  """{name: features f32 [B, 4, D] of the parts of its clip}."""
  tokens = {name: e.tokens_BxTxHxWxD.astype(jnp.float32) for name, e in encoded.items()}
  in_parts = lambda x: x.reshape(len(x), PARTS, -1, x.shape[-1]).mean(axis=2)
  if how == 'together':
    return {name: in_parts(x) for name, x in tokens.items()}
  names = dict.fromkeys(name.rsplit(' ', 1)[0] for name in tokens)
  return {n: in_parts(jnp.stack([tokens[f'{n} {p}'] for p in range(PARTS)], axis=1)) for n in names}


def _target(kind: str, range_5: np.ndarray):
  """(unit parameters [..., 5], numpy or jax.numpy) -> targets [..., K], each within [-1, 1]."""
  varied = np.flatnonzero(range_5)
  if kind == 'params':
    return lambda unit, xp: unit[..., varied]

  def entries(unit, xp):
    beyond = warps.affine_map(unit * range_5, (1, 1), xp) - np.eye(2, 3)
    return beyond.reshape(*unit.shape[:-1], 6)

  grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 5, indexing='ij'), axis=-1).reshape(-1, 5)
  # A little more than on the grid, between whose points an entry may be larger.
  most_6 = 1.02 * np.abs(entries(grid, np)).max(axis=0)
  of_range = np.flatnonzero(most_6 > 1e-9)
  return lambda unit, xp: (entries(unit, xp)[..., of_range] / most_6[of_range]).astype(unit.dtype)


def _errors(difference_BxK, range_5):
  """{'<parameter>_error': mean absolute difference [B], in its own unit}."""
  units = np.where([name in ('rotation', 'shear') for name in warps.PARAMETERS], np.degrees(range_5), range_5)
  return {
    f'{warps.PARAMETERS[i]}_error': jnp.abs(difference_BxK[:, k]) * units[i]
    for k, i in enumerate(np.flatnonzero(range_5))
  }
