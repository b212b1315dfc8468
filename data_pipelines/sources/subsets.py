"""Parts of a source: few labels, and a part held out of training to choose settings on.

Both are stratified by class and a pure function of (source, seed): the same on every machine and in every run.
"""

import math

import numpy as np

from data_pipelines.contract import UserError
from data_pipelines.philox import SUBSET, philox
from data_pipelines.sources import Source, label_sets, select

# Seeds of the orders in which examples are taken, so that the two functions do not pick the same ones.
_FEW, _HELD_OUT = 0, 1


def few_labels(source: Source, fraction: float, seed: int = 0) -> Source:
  """The source with a share of the examples of each class only; see `choose_few` and `choose_few_of_several`."""
  if not 0 < fraction <= 1:
    raise UserError(
      f'config.sources.{source.name}.label_fraction is {fraction}: expected more than 0 and at most 1, such as 0.05.'
    )
  if fraction == 1:
    return source
  if not np.any(source.labelled_N):
    raise UserError(
      f'config.sources.{source.name}.label_fraction is {fraction}, but the source has no labels to take a part of: set '
      'it to 1.'
    )
  if source.labels is not None:
    return select(source, choose_few_of_several(source.labels, fraction, seed))
  return select(source, choose_few(source.label, fraction, seed))


def choose_few(label_N: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
  """A share of the examples of each class, at least one of each; unlabelled examples are left out.

  The choice is nested: what 1 % takes, 5 % takes too. A class's share is rounded to the nearest, halves up.

  Args:
    label_N: int, -1 where unlabelled.
    fraction: in (0, 1].
    seed: another one makes another choice.

  Returns:
    int64 indices, sorted.
  """
  order = _order(len(label_N), _FEW, seed)
  chosen = [np.zeros(0, np.int64)]
  for label in np.unique(label_N[label_N >= 0]):
    of_class = order[label_N[order] == label]
    chosen.append(of_class[: max(math.floor(fraction * len(of_class) + 0.5), 1)])
  return np.sort(np.concatenate(chosen))


def choose_few_of_several(sets: label_sets.LabelSets, fraction: float, seed: int = 0) -> np.ndarray:
  """A share of the labelled examples, and of each class that none of them has the first example.

  An example of several classes cannot be counted for one of them alone, so classes have their shares by chance. The
  choice is nested, too.

  Args:
    sets: the labels of N examples.
    fraction: in (0, 1].
    seed: another one makes another choice.

  Returns:
    int64 indices, sorted.
  """
  order = _order(len(sets.pointer) - 1, _FEW, seed)
  order = order[sets.known_N[order]]
  chosen = set(order[: max(math.floor(fraction * len(order) + 0.5), 1)].tolist())
  seen = set()
  for example in order.tolist():
    new = set(label_sets.of(sets, example).tolist()) - seen
    seen |= new
    chosen |= {example} if new else set()
  return np.array(sorted(chosen), np.int64)


def hold_out(
  label_N: np.ndarray, video_id_N: np.ndarray, fraction: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Splits the labelled examples in two, class by class, without cutting an original video in two.

  Args:
    label_N: int, -1 where unlabelled.
    video_id_N: int, which original video each example was cut from.
    fraction: of the examples of each class to hold out, in (0, 1); approximate where an original video gave several
      examples. A class of one video stays in training.
    seed: another one makes another split.

  Returns:
    (kept, held out): int64 indices, sorted.
  """
  rank = np.argsort(_order(int(video_id_N.max(initial=-1)) + 1, _HELD_OUT, seed))
  held = np.zeros(len(label_N), bool)
  for label in np.unique(label_N[label_N >= 0]):
    of_class = np.flatnonzero(label_N == label)
    videos = np.unique(video_id_N[of_class])
    wanted, taken = round(fraction * len(of_class)), 0
    for video in videos[np.argsort(rank[videos])][:-1]:  # the last one stays, so that the class can be learnt
      if taken >= wanted:
        break
      members = of_class[video_id_N[of_class] == video]
      held[members] = True
      taken += len(members)
  # A video with examples of several classes goes whole to the side that one of them went to.
  held |= np.isin(video_id_N, video_id_N[held])
  labelled = label_N >= 0
  return np.flatnonzero(labelled & ~held), np.flatnonzero(labelled & held)


def _order(size: int, what: int, seed: int) -> np.ndarray:
  bits = philox(SUBSET, seed, what).bit_generator.random_raw(size)
  return np.argsort(bits, kind='stable')
