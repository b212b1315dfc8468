"""V3S-style: clips are sampled unevenly along width, height and time, and the encoder says how, without labels.

After Video 3D Sampling (Li, Luo, Fang, Zhou, Wang 2021, arXiv 2107.03578). From its abstract and the caption of its
first figure, which are all that was read: the three dimensions are sampled (frames are skipped, rows and columns of
pixels are removed), there are scale and projection transformations in space and in time, and what was done is the
target. All else is ours: the classes, their rates, the loss, the heads and every default. No figure of the paper is
claimed.

    config.streams.video.objective = {'name': 'v3s'}
    config.streams.video.size = 224        # the encoder sees clips of half this size: see `classes`

A class in time is a rate at which frames are skipped, even or changing; one in space a rate for rows and one for
columns. Pixels are removed and never averaged: a filter would leave each class with noise of another strength, and a
map that enlarges would repeat rows, so that the class could be read off the noise of a single frame. All classes are
cut from the same decoded window, each at a random place of it. For the same reason blur no clips before
(`augment.gaussian_blur`), and let windows not be enlarged much: `size` should not exceed the stored short side. Let
`crop_scale` of the source vary, which hides the grid of JPEG blocks.

A mirrored clip is mirrored before it is sampled, so that its class is true.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.models.encoder import Encoder
from cover_jax.objectives import (
  Encode,
  LossOutput,
  Objective,
  Shown,
  Stages,
  contrastive,
  mean_over,
  pretext,
  raw,
  warps,
)
from cover_jax.objectives.stages import staged
from cover_jax.runtime import keys
from data_pipelines.contract import UserError
from data_pipelines.declared import Kind, either, flag, none, number, one_of, several, whole

# {'time': {class: (first rate, last rate)}, 'space': {class: (first and last rate of rows, the same of columns)}}.
CLASSES = {
  'time': {
    'plain': (1, 1),
    'twice': (2, 2),
    'thrice': (3, 3),
    'four_times': (4, 4),
    'accelerate': (1, 4),
    'decelerate': (4, 1),
  },
  'space': {
    'plain': (1, 1, 1, 1),
    'rows': (2, 2, 1, 1),
    'columns': (1, 1, 2, 2),
    'left': (1, 1, 2, 1),
    'right': (1, 1, 1, 2),
    'up': (2, 1, 1, 1),
    'down': (1, 2, 1, 1),
  },
}


def _is_table(value: Any) -> bool:
  rates = {'time': several(number(1, 64), count=2), 'space': several(number(1, 64), count=4)}
  of_axis = lambda axis: (
    isinstance(value[axis], Mapping)
    and len(value[axis]) > 0
    and all(isinstance(name, str) and name.isidentifier() for name in value[axis])
    and all(map(rates[axis].holds, value[axis].values()))
  )
  return isinstance(value, Mapping) and value.keys() == rates.keys() and all(map(of_axis, rates))


table = Kind(
  "{'time': {name: (first, last)}, 'space': {name: (first, last of rows, first, last of columns)}} with rates of 1 to "
  '64 and names of letters, digits and _',
  _is_table,
)


def make(
  *,
  encode: Encode,
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  width: int,
  model: Encoder,
  classes: Annotated[Mapping[str, Any], table] = CLASSES,
  output: Annotated[Any, either(none, whole(1), several(whole(1), count=2))] = None,
  short_videos: Annotated[str, one_of('fewer_classes', 'refuse')] = 'fewer_classes',
  time_weight: Annotated[float, number(0)] = 1.0,
  joint: Annotated[bool, flag] = False,
  space_pool: Annotated[str, one_of('cls', 'mean')] = 'mean',
  time_pool: Annotated[str, one_of('cls', 'mean')] = 'cls',
) -> Objective:
  """Cross-entropy of the class in space and of the class in time that a clip was sampled with.

  Args:
    encode: the encoder.
    stream: under which the heads lie in params['objectives'].
    num_frames: T of the clip that the encoder sees.
    size: (height, width) of the decoded window that clips are sampled from.
    width: D of the encoder's feature.
    model: for its limits at the size of the sampled clip.
    classes: the table of `CLASSES`. Rates change linearly from the first frame, row or column to the last and are
      rounded to whole steps (`warps.steps`): 1 takes every one, 2 every other one. 'left': columns are removed at the
      left, as if that side were farther away. One class alone on an axis means that nothing is asked there.
    output: side, or (height, width), of the sampled clip; None: the largest for which every class has room, half the
      size by default.
    short_videos: a class in time needs so many frames: 'fewer_classes' draws among those that a video has room for
      ('time_chance' tells), 'refuse' ends the run before its first step if a video has not room for all.
    time_weight: of the class in time; that in space counts 1. A video with room for one class alone is not asked.
    joint: one head for all pairs of a class in space and one in time.
    space_pool, time_pool: what the heads see: 'cls', the encoder's feature, or 'mean', of its tokens. For a CNN both
      are the pooled map. A joint head has `time_pool`.

  Returns:
    An objective with the view 'clip'. It measures 'loss', 'top1' (all that is asked is right), 'space_top1' and
    'time_top1', 'space_loss' and 'time_loss' unless joint, 'time_chance' (one over the classes that the video has room
    for) and for each class in time 'time_found_<class>' (it was this one, and was found) and 'time_share_<class>' (it
    was this one): their quotient is the class's recall, and the mean of these the accuracy with balanced classes.

  Raises:
    UserError: if two classes are the same, nothing is asked, or the encoder cannot have clips of the sampled size.
  """
  where = f'config.streams.{stream}'
  maps = Maps(classes, num_frames, size, output, where)
  if problem := model.limits(num_frames, maps.output):
    raise UserError(
      f'config.streams.{stream} samples clips of {maps.output[0]} x {maps.output[1]} from windows of {size[0]} x '
      f'{size[1]} pixels and {problem}: change its size or objective.output.'
    )
  counts = {'space': len(maps.space_names), 'time': len(maps.time_names)}
  asked = {axis: count for axis, count in counts.items() if count > 1}
  if joint and time_weight != 1.0:
    raise UserError(
      f'{where}.objective has joint=True, whose one head weighs both classes alike, and time_weight={time_weight:g}: '
      'leave one of them out.'
    )
  if not joint and list(asked) == ['time'] and not time_weight:
    raise UserError(
      f'{where}.objective has one class in space and time_weight=0, so nothing is asked: raise it, or add a class.'
    )
  heads = {axis: pretext.Linear(count) for axis, count in asked.items()}
  if joint:
    heads = {'joint': pretext.Linear(counts['space'] * counts['time'])}
  pools = {'space': space_pool, 'time': time_pool, 'joint': time_pool}

  def show(batch, rng):
    clip_BxTxHxWx3 = batch['views']['clip'].astype(jnp.float32)
    label = {'time': maps.time_of(batch['targets']['frames']['clip'])}
    space_rng = keys.of(rng, 'space')
    clip_BxTxHxWx3, label['space'] = maps.sample(space_rng, clip_BxTxHxWx3)
    plain = lambda: maps.sample(space_rng, raw(batch, 'clip'))[0]  # the same rows and columns
    return Shown({'clip': clip_BxTxHxWx3}, keys.of(rng, 'encode'), label, {'clip': plain})

  def judge(params, state, batch, encoded, label):
    own = params['objectives'][stream]
    logits = {
      name: head.apply({'params': own[name]}, contrastive.pool(encoded['clip'], pools[name]))
      for name, head in heads.items()
    }
    possible_B = maps.possible(batch['targets']['num_frames']['clip'])
    if joint:
      loss_B, measures = _judge_joint(logits['joint'], label, counts)
    else:
      loss_B, measures = _judge(logits, label, {'space': 1.0, 'time': time_weight * (possible_B > 1)})
    measures['time_chance'] = 1 / jnp.maximum(possible_B, 1)
    if 'time' in asked:
      for c, name in enumerate(maps.time_names):
        measures[f'time_found_{name}'] = measures['time_top1'] & (label['time'] == c)
        measures[f'time_share_{name}'] = label['time'] == c
    measures['loss'] = loss_B
    return LossOutput(mean_over(loss_B, batch['mask']), state, measures)

  return staged(
    'v3s',
    encode,
    Stages(show, judge),
    init_params=lambda rng: pretext.init(heads, rng, dict.fromkeys(heads, (width,))),
    views=lambda frames, rng: {'clip': maps.frames(frames, rng, all_classes=short_videos == 'refuse')},
    targets=('frames', 'num_frames'),
    encoded={'clip': (num_frames, *maps.output)},
  )


def _judge(logits, label, weights):
  """(loss [B], measures) of a head for each axis."""
  judged = {axis: pretext.classify(logits[axis], label[axis]) for axis in logits}
  measures = {f'{axis}_loss': entropy_B for axis, (entropy_B, _) in judged.items()}
  measures |= {f'{axis}_top1': right_B for axis, (_, right_B) in judged.items()}
  measures['top1'] = jnp.all(jnp.stack([right_B for _, right_B in judged.values()]), axis=0)
  return sum(weights[axis] * entropy_B for axis, (entropy_B, _) in judged.items()), measures


def _judge_joint(logits_BxK, label, counts):
  """(loss [B], measures) of one head for all pairs; it says a class of an axis where its best pair has it."""
  loss_B, right_B = pretext.classify(logits_BxK, label['space'] * counts['time'] + label['time'])
  best_B = jnp.argmax(logits_BxK, axis=-1)
  measures = {
    'top1': right_B,
    'space_top1': best_B // counts['time'] == label['space'],
    'time_top1': best_B % counts['time'] == label['time'],
  }
  return loss_B, measures


class Maps:
  """Which frames, rows and columns each class takes.

  Attributes:
    time_names, space_names: the classes, in the order of their labels, that of the alphabet.
    time_CxT, row_CxH, column_CxW: int64, counted from the first that is taken.
    output: (height, width) of a sampled clip.
  """

  def __init__(self, classes, num_frames: int, size: tuple[int, int], output: Any, where: str):
    """`classes` and `output` as of `make`; `where` is the stream's key, for messages."""
    if num_frames < 2:
      raise UserError(
        f'{where}.num_frames is {num_frames}: V3S samples in time and needs clips of at least 2 frames, not images.'
      )
    # Sorted, as config and checkpoint keep them: the number of a class does not depend on how they were written.
    self.time_names, self.space_names = tuple(sorted(classes['time'])), tuple(sorted(classes['space']))
    if len(self.time_names) == len(self.space_names) == 1:
      raise UserError(f'{where}.objective.classes has one class in time and one in space: there is nothing to tell.')
    rates = np.array([classes['space'][name] for name in self.space_names], float)
    most = rates.reshape(-1, 2, 2).mean(axis=-1).max(axis=0)
    room = tuple(int(np.floor((side - 1) / rate + 1e-9)) + 1 for side, rate in zip(size, most, strict=True))
    self.output = room if output is None else (output, output) if isinstance(output, int) else tuple(output)
    if any(wanted > most or wanted < 2 for wanted, most in zip(self.output, room, strict=True)):
      raise UserError(
        f'{where}.objective.output is {self.output[0]} x {self.output[1]}, but windows of {size[0]} x {size[1]} '
        f'pixels have room for 2 to {room[0]} x {room[1]} with these classes: change it or {where}.size.'
      )
    self._size = size
    self.time_CxT = np.stack([warps.steps(*classes['time'][name], num_frames) for name in self.time_names])
    self.row_CxH = np.stack([warps.steps(*rate[:2], self.output[0]) for rate in rates])
    self.column_CxW = np.stack([warps.steps(*rate[2:], self.output[1]) for rate in rates])
    self._check_distinct('time', self.time_names, self.time_CxT, where)
    self._check_distinct('space', self.space_names, np.hstack([self.row_CxH, self.column_CxW]), where)
    self._needed_C = self.time_CxT[:, -1] + 1

  def _check_distinct(self, axis, names, places_CxN, where):
    first = {}
    for name, places in zip(names, places_CxN.tolist(), strict=True):
      if (other := first.setdefault(tuple(places), name)) != name:
        raise UserError(
          f'{where}.objective.classes.{axis} has {other!r} and {name!r}, which are the same in clips of this length '
          'and size: take one out, or make the clips larger.'
        )

  def frames(self, video_frames: int, rng: np.random.Generator | None, *, all_classes: bool) -> np.ndarray:
    """Frame numbers int64 [T] of one class, drawn evenly among those that the video has room for.

    Args:
      video_frames: in the video. Nothing is repeated and no video begins again: that could be seen.
      rng: for class and start; None for the class that needs fewest frames, in the middle.
      all_classes: refuse a video that has not room for all.

    Raises:
      UserError: if there is room for no class, or not for all.
    """
    possible = np.flatnonzero(self._needed_C <= video_frames)
    if not len(possible) or (all_classes and len(possible) < len(self._needed_C)):
      c = int(np.argmax(self._needed_C)) if all_classes else int(np.argmin(self._needed_C))
      raise UserError(
        f'the video has {video_frames} frames, and class {self.time_names[c]!r} of V3S needs {self._needed_C[c]}; use '
        'fewer or slower classes, shorter clips, or leave the video out of the data set.'
      )
    shortest = int(np.argmin(self._needed_C))
    c = possible[int(rng.random() * len(possible))] if rng is not None else shortest
    free = video_frames - self._needed_C[c]
    start = int(rng.random() * (free + 1)) if rng is not None else free // 2
    return start + self.time_CxT[c]

  def time_of(self, frames_BxT: jax.Array) -> jax.Array:
    """The class in time, int32 [B], of clips of these stored frames."""
    same_BxC = jnp.all((frames_BxT - frames_BxT[:, :1])[:, None] == self.time_CxT, axis=-1)
    return jnp.argmax(same_BxC, axis=-1).astype(jnp.int32)

  def possible(self, video_frames_B: jax.Array) -> jax.Array:
    """How many classes in time videos of so many frames have room for, int32 [B]."""
    return jnp.sum(video_frames_B[:, None] >= self._needed_C, axis=-1)

  def sample(self, rng: jax.Array, clip_BxTxHxWxC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(clips [B, T, *output, C] of a random class in space and a random place, the class int32 [B])."""
    class_key, row_key, column_key = jax.random.split(rng, 3)
    batch = len(clip_BxTxHxWxC)
    label_B = jax.random.randint(class_key, (batch,), 0, len(self.space_names))
    row_BxH = self._place(row_key, jnp.asarray(self.row_CxH, jnp.int32)[label_B], self._size[0])
    column_BxW = self._place(column_key, jnp.asarray(self.column_CxW, jnp.int32)[label_B], self._size[1])
    return warps.take(clip_BxTxHxWxC, row_BxH, column_BxW), label_B

  def _place(self, rng, place_BxN, side):
    """Moves places to somewhere within the side."""
    free_B = side - place_BxN[:, -1]  # starts that there are
    start_B = jnp.floor(jax.random.uniform(rng, free_B.shape) * free_B).astype(jnp.int32)
    return place_BxN + jnp.minimum(start_B, free_B - 1)[:, None]
