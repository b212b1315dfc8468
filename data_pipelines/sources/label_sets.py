"""The labels of examples that have several: any number of classes each, also none; or nobody knows them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNKNOWN = (-1,)  # the classes of an example that is unlabelled, as they are stored; () is one that has none of them


class LabelSets(NamedTuple):
  """The classes of N examples, as lists one behind the other.

  Attributes:
    pointer: int64 [N + 1]; example n has `classes[pointer[n]:pointer[n + 1]]`.
    classes: int32 [pointer[N]], ascending within an example; the one value -1 where it is unlabelled.
  """

  pointer: np.ndarray
  classes: np.ndarray

  @property
  def known_N(self) -> np.ndarray:
    """Bool [N]: the example is labelled, with whatever classes or none."""
    known = np.ones(len(self.pointer) - 1, bool)
    known[_owner(self)[self.classes < 0]] = False
    return known


def of_lists(lists: Sequence[Sequence[int]]) -> LabelSets:
  """Of a list of classes for each example; `UNKNOWN` for an unlabelled one."""
  pointer = np.cumsum([0, *map(len, lists)], dtype=np.int64)
  return LabelSets(pointer, np.array([c for one in lists for c in sorted(one)], np.int32))


def of(sets: LabelSets, example: int) -> np.ndarray:
  """int32: the classes of an example; (-1,) where it is unlabelled."""
  return sets.classes[sets.pointer[example] : sets.pointer[example + 1]]


def select(sets: LabelSets, examples: np.ndarray) -> LabelSets:
  """Those of some examples, int64 [n], in that order."""
  count = np.diff(sets.pointer)[examples]
  pointer = np.concatenate([[0], np.cumsum(count, dtype=np.int64)])
  places = np.arange(pointer[-1]) + np.repeat(sets.pointer[:-1][examples] - pointer[:-1], count)
  return LabelSets(pointer, sets.classes[places])


def unique(sets: LabelSets) -> LabelSets:
  """The same with each class once an example, ascending; int32, whatever the integers were."""
  pairs = np.unique(np.stack([_owner(sets), sets.classes], axis=1), axis=0)
  count = np.bincount(pairs[:, 0], minlength=len(sets.pointer) - 1)
  return LabelSets(np.concatenate([[0], np.cumsum(count, dtype=np.int64)]), pairs[:, 1].astype(np.int32))


def counts(sets: LabelSets, num_classes: int) -> np.ndarray:
  """int64 [K]: how many examples have each class."""
  return np.bincount(sets.classes[sets.classes >= 0], minlength=num_classes)


def target(classes: np.ndarray, num_classes: int, width: int) -> np.ndarray:
  """One example's row of a batch's 'labels' (`contract`), int8 [width].

  Args:
    classes: of the example; (-1,) for an unlabelled one.
    num_classes: of its source.
    width: of the stream.
  """
  row = np.full(width, -1, np.int8)
  if -1 not in classes:
    row[:num_classes] = 0
    row[classes] = 1
  return row


def _owner(sets: LabelSets) -> np.ndarray:
  """int64: the example of each entry of `classes`."""
  return np.repeat(np.arange(len(sets.pointer) - 1), np.diff(sets.pointer))
