"""Spatio-temporal statistics: where a clip moves most and how, where its colours change most, and which they are.

After Wang et al. (CVPR 2019, and 2021 as "Self-supervised Video Representation Learning by Uncovering Spatio-temporal
Statistics", arXiv 2008.13426). The labels are those of the released code, 14 of motion and 13 of appearance, made in
`jit` from the raw pixels of the clip after crop and mirror: `cover_jax.objectives.regions`.

    config.streams.video.objective = {'name': 'statistics'}

The release regresses the ids of the labels, whose order means little (`target_mode='regress'`): the mean square error
of the 14, plus 0.1 times that of the 13. **Ours**: `classify`, the default, in which each label is a class of a head of
its own; flow that is computed in training, by TV-L1 or as one of two cheaper sources, in place of stored files; the
dominant colour as the octant with most pixels; that a mirror mirrors flow; and that sizes other than 112 x 112 have the
same regions. `released` takes back what can be taken back. No figure of the paper is claimed.

Clips are cut by their source, as for classification: choose the 'dense' sampler with a short stride, since motion
between frames far apart is no motion. A video too short for its clip stands still at its end, or jumps with `loop`.
Frames should show motion in whole regions: sizes that are multiples of 8.
"""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax.objectives import (
  Encode,
  LossOutput,
  Objective,
  Shown,
  Stages,
  contrastive,
  mean_over,
  motion,
  pretext,
  raw,
  regions,
)
from cover_jax.objectives.stages import staged
from cover_jax.runtime import keys
from data_pipelines.contract import UserError
from data_pipelines.declared import number, one_of, several

SOURCES = ('flow', 'normal_flow', 'frame_difference')
RELEASED = ('colour', 'ring', 'flip', 'frames', 'start')
_SMALLEST = 8  # pixels of a side: two for each cell of the grid


def make(
  *,
  encode: Encode,
  stream: str,
  num_frames: int,
  size: tuple[int, int],
  width: int,
  target_mode: Annotated[str, one_of('classify', 'regress')] = 'classify',
  motion_source: Annotated[str, one_of(*SOURCES)] = 'flow',
  motion_weight: Annotated[float, number(0)] = 1.0,
  appearance_weight: Annotated[float, number(0)] = 0.1,
  bins: Annotated[int, one_of(256, 128, 64, 32, 16)] = 256,
  released: Annotated[Sequence[str], several(one_of(*RELEASED), distinct=True)] = (),
  pool: Annotated[str, one_of('cls', 'mean')] = 'mean',
) -> Objective:
  """Cross-entropies of the labels, or square errors of their ids.

  Args:
    encode: the encoder.
    stream: under which the heads lie in params['objectives'].
    num_frames: T of the clip that the encoder sees.
    size: (height, width) of it.
    width: D of the encoder's feature.
    target_mode: 'classify': cross-entropy over the logarithm of the number of classes, so that all labels count alike,
      and 1 is chance; labels of motion do not count in a clip where nothing moves. 'regress': square error of the ids.
    motion_source: 'flow', TV-L1; 'normal_flow', the part of it along the brightness gradient, much cheaper; or
      'frame_difference', cheaper still, which is one map and has 7 labels of motion in place of 14. Runs with different
      sources have different labels and are not comparable, so that measures are named by the source.
    motion_weight, appearance_weight: 1 and 0.1, as in the release; 0 leaves the labels out.
    bins: of the histograms of a channel, 256 in the release.
    released: what is to be as in the release: 'colour', the octant of the single most frequent colour; 'ring', that
      colour of the second ring from other pixels, by a slip; 'flip', horizontal flow is not negated in a mirrored
      clip; 'frames', motion from the clip's last frame to the next counts for regions and directions, but not for the
      frame of most motion; 'start', the predicted ids start at 0, and not at the mean of all ids.
    pool: what the heads see: 'mean', of the encoder's tokens, or 'cls', its feature. For a CNN both are the pooled map.

  Returns:
    An objective with one view, 'clip', that measures 'loss' and 'appearance_loss', and, with <source> for the motion
    source, '<source>_loss'. As classes: '<source>_moves', the share of the labels of motion that count, and
    '<source>_region_top1', '<source>_direction_top1', '<source>_frame_top1', the shares of such labels that count and
    are right (over '<source>_moves', the accuracy); 'appearance_region_top1' and 'appearance_colour_top1'. As ids:
    '<source>_spread' and 'appearance_spread', the square differences from the mean ids of the batch: 1 - loss over
    spread is the explained share of the variance.

  Raises:
    UserError: if clips are too short or too small, no label is left, or `released` asks what cannot be.
  """
  released = frozenset(released)
  one_more = 'frames' in released
  weights = {'motion': motion_weight, 'appearance': appearance_weight}
  _check(stream, num_frames, size, motion_source, weights, released, target_mode)
  components = 1 if motion_source == 'frame_difference' else 2
  shown = {'motion': motion_source, 'appearance': 'appearance'}
  last_frames = num_frames if one_more else num_frames - 1
  tasks = {
    name: (Classes if target_mode == 'classify' else Ids)(shown[name], kinds, counts)
    for name, weight, (kinds, counts) in (
      ('motion', motion_weight, _motion_classes(components, min(last_frames, num_frames - 1))),
      ('appearance', appearance_weight, _appearance_classes()),
    )
    if weight
  }
  if 'start' in released:
    tasks = {name: task.from_zero() for name, task in tasks.items()}
  heads = {name: pretext.Linear(task.outputs) for name, task in tasks.items()}

  def labels(batch):
    """{task: (ids [B, labels], which of them count)}."""
    clip_BxTxHxWx3 = raw(batch, 'clip')
    found = {}
    if 'motion' in tasks:
      mirrored_B = batch['targets']['flip']['clip'] if 'flip' in released else None
      maps = motion_maps(clip_BxTxHxWx3, motion_source, mirrored_B)
      found['motion'] = regions.motion_labels(maps, one_more=one_more)
    if 'appearance' in tasks:
      id_Bx13 = regions.appearance_labels(
        clip_BxTxHxWx3[:, :num_frames], bins=bins, most_frequent='colour' in released, other_ring='ring' in released
      )
      found['appearance'] = (id_Bx13, jnp.ones_like(id_Bx13, bool))
    return jax.lax.stop_gradient(found)

  def show(batch, rng):
    rng, clip = keys.of(rng, 'encode'), batch['views']['clip']
    if one_more:
      return Shown({'clip': clip[:, :num_frames]}, rng, raw={'clip': lambda: raw(batch, 'clip')[:, :num_frames]})
    return Shown({'clip': clip}, rng)

  def judge(params, state, batch, encoded, _):
    target = labels(batch)
    feature_BxD, own = contrastive.pool(encoded['clip'], pool), params['objectives'][stream]
    loss_B, measures = 0.0, {}
    for name, task in tasks.items():
      output = heads[name].apply({'params': own[name]}, feature_BxD)
      task_loss_B, task_measures = task.judge(output, *target[name], batch['mask'])
      loss_B += weights[name] * task_loss_B
      measures |= task_measures
    measures['loss'] = loss_B
    return LossOutput(mean_over(loss_B, batch['mask']), state, measures)

  return staged(
    'statistics',
    encode,
    Stages(show, judge),
    init_params=lambda rng: pretext.init(heads, rng, dict.fromkeys(heads, (width,))),
    views=_one_more_frame(num_frames) if one_more else None,
    targets=('flip',) if 'flip' in released else (),
    encoded={'clip': (num_frames, *size)},
  )


def motion_maps(clip_BxTxHxWx3: jax.Array, source: str, mirrored_B: jax.Array | None = None) -> jax.Array:
  """Motion of a clip in whole steps, so that a rounding error makes no label.

  Args:
    clip_BxTxHxWx3: raw pixels 0..255.
    source: of `SOURCES`.
    mirrored_B: clips whose horizontal flow is that of the clip before it was mirrored; None for none.

  Returns:
    f32 [B, T-1, H, W, 2], or one component for frame differences, which are whole grey levels.
  """
  if source == 'frame_difference':
    return jnp.round(motion.frame_difference(clip_BxTxHxWx3))[..., None]
  flow = {'flow': motion.tvl1, 'normal_flow': motion.normal_flow}[source](clip_BxTxHxWx3)
  if mirrored_B is not None:
    flow = jnp.where(mirrored_B[:, None, None, None, None], flow * np.array([-1.0, 1.0], np.float32), flow)
  return regions.steps_of_flow(flow)


class Classes:
  """Labels as classes, one cross-entropy each.

  Attributes:
    outputs: logits of all labels, one label after the other.
  """

  def __init__(self, name: str, kinds: Sequence[str], counts: Sequence[int]):
    """`name` of its measures; what each label says, and how many ids it has."""
    self._name, self._kinds, self._counts = name, kinds, counts
    self.outputs = sum(counts)

  def judge(self, logits, id_BxN, counts_BxN, mask_B):
    """(loss [B], measures) of ids 1..count; those that do not count may be 0."""
    parts = jnp.split(logits, np.cumsum(self._counts)[:-1], axis=-1)
    judged = [pretext.classify(part, jnp.maximum(id_BxN[:, i] - 1, 0)) for i, part in enumerate(parts)]
    entropy_BxN = jnp.stack([entropy_B for entropy_B, _ in judged], axis=-1) / np.log(
      np.array(self._counts, np.float32)
    )
    right_BxN = jnp.stack([right_B for _, right_B in judged], axis=-1) & counts_BxN
    loss_B = jnp.sum(jnp.where(counts_BxN, entropy_BxN, 0), axis=-1) / jnp.maximum(jnp.sum(counts_BxN, axis=-1), 1)
    measures = {f'{self._name}_loss': loss_B}
    for kind in dict.fromkeys(self._kinds):
      of_kind = np.flatnonzero([k == kind for k in self._kinds])
      measures[f'{self._name}_{kind}_top1'] = jnp.mean(right_BxN[:, of_kind].astype(jnp.float32), axis=-1)
    if self._name != 'appearance':
      measures[f'{self._name}_moves'] = jnp.mean(counts_BxN.astype(jnp.float32), axis=-1)
    return loss_B, measures


class Ids:
  """Labels as numbers, one square error each.

  Attributes:
    outputs: one a label.
  """

  def __init__(self, name: str, kinds: Sequence[str], counts: Sequence[int]):
    """As of `Classes`."""
    self._name, self.outputs = name, len(kinds)
    self._start_N = (np.array(counts, np.float32) + 1) / 2

  def from_zero(self) -> 'Ids':
    """The same, but that outputs are ids and not differences from the mean of all ids."""
    self._start_N = np.zeros_like(self._start_N)
    return self

  def judge(self, output_BxN, id_BxN, _, mask_B):
    """(loss [B], measures); all ids count, as in the release."""
    id_BxN = id_BxN.astype(jnp.float32)
    loss_B = jnp.mean((output_BxN + self._start_N - id_BxN) ** 2, axis=-1)
    mean_N = mean_over(id_BxN, mask_B)
    spread_B = jnp.mean((id_BxN - mean_N) ** 2, axis=-1)
    return loss_B, {f'{self._name}_loss': loss_B, f'{self._name}_spread': spread_B}


def _motion_classes(components: int, frames: int) -> tuple[list[str], list[int]]:
  """What each label of motion says, and how many ids it has."""
  kinds = ['region', 'direction'] * (3 * components) + ['frame'] * components
  counts = [n for region in regions.REGIONS.values() for n in (region, regions.DIRECTIONS) * components]
  return kinds, counts + [frames] * components


def _appearance_classes() -> tuple[list[str], list[int]]:
  counts = [n for region in regions.REGIONS.values() for n in (region, regions.COLOURS) * 2]
  return ['region', 'colour'] * 6 + ['colour'], [*counts, regions.COLOURS]


def _one_more_frame(num_frames: int):
  """The sampler of clips of the release: frames one after the other, and one more for its motion."""

  def sample(video_frames, rng):
    free = video_frames - num_frames
    if free < 1:
      raise UserError(
        f"the video has {video_frames} frames, and the statistics with released='frames' need {num_frames + 1} one "
        'after the other; shorten the clips or leave the video out of the data set.'
      )
    start = int(rng.random() * free) if rng is not None else (free - 1) // 2
    return {'clip': start + np.arange(num_frames + 1)}

  return sample


def _check(stream, num_frames, size, motion_source, weights, released, target_mode) -> None:
  """Raises UserError for clips without the statistics, and for options that leave nothing or contradict each other."""
  where = f'config.streams.{stream}'
  if num_frames < 3:
    raise UserError(
      f'{where}.num_frames is {num_frames}: the statistics compare motion between frames and need clips of at least '
      '3 frames, not images.'
    )
  if min(size) < _SMALLEST:
    raise UserError(
      f'{where}.size is {size[0]} x {size[1]}: the 28 regions of the statistics need sides of at least {_SMALLEST}.'
    )
  if not any(weights.values()):
    raise UserError(
      f'{where}.objective has motion_weight=0 and appearance_weight=0: nothing is asked; raise one of them.'
    )
  asked = {'start': 'regress', 'flip': 'motion', 'frames': 'motion', 'colour': 'appearance', 'ring': 'appearance'}
  for name in sorted(released):
    if asked[name] in weights and not weights[asked[name]]:
      raise UserError(
        f'{where}.objective.released has {name!r}, but {asked[name]}_weight is 0, so that it would change nothing: '
        'take it out.'
      )
  if 'start' in released and target_mode != 'regress':
    raise UserError(
      f"{where}.objective.released has 'start', which is about ids: set target_mode='regress', or take it out."
    )
  if 'ring' in released and 'colour' not in released:
    raise UserError(f"{where}.objective.released has 'ring', a slip in how the release finds colours: add 'colour'.")
  if 'flip' in released and motion_source == 'frame_difference':
    raise UserError(
      f"{where}.objective.released has 'flip', but frame differences have no direction: take it out, or change "
      'motion_source.'
    )
