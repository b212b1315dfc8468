"""What becomes of a class when its clips are mirrored, by the words of its name (`flip='auto'`)."""

import re
from collections.abc import Sequence

_SHOWN = 3  # classes that a line of the log names
_OTHER = {'left': 'right', 'leftward': 'rightward', 'leftwards': 'rightwards', 'lefthanded': 'righthanded'}
_OTHER |= {right: left for left, right in _OTHER.items()}
# The words of 'turn_left', 'TurnLeft', 'turn LEFT'; 'right out', as in 'pulling it right out', is no side.
_WORD = re.compile(r'(?:[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+)(?! [oO]ut\b)')
_TURN = re.compile(r'(?<![A-Za-z])(?:(?P<against>counter|anti)[ _-]?)?clockwise(?![A-Za-z])', re.IGNORECASE)
_AGAINST = [f'{word}{between}clockwise' for word in ('counter', 'anti') for between in ('', '-', '_', ' ')]


def by_names(class_names: Sequence[str]) -> tuple[tuple[int, ...] | None, str]:
  """Decides what mirroring does to each class.

  Args:
    class_names: of a source; empty where it is unlabelled.

  Returns:
    (the label of a mirrored clip, per class: that of the class whose name has left and right, or clockwise and
    counterclockwise, exchanged; -1 for a class that names a side and has no such counterpart: its clips are never
    mirrored. None where no class names one: every clip may be mirrored, and the label stays; a sentence that says so).
  """
  index = {name.casefold(): k for k, name in enumerate(class_names)}
  other = [_counterparts(name) for name in class_names]
  if not any(other):
    return None, 'no class names a side (left, right, clockwise), so half of the training clips are mirrored'
  found = [[index[n.casefold()] for n in names if n.casefold() in index] for names in other]
  labels = tuple(
    k if not names else at[0] if at else -1 for k, (names, at) in enumerate(zip(other, found, strict=True))
  )
  changed = [f'{class_names[k]!r} -> {class_names[to]!r}' for k, to in enumerate(labels) if to not in (k, -1)]
  alone = [repr(class_names[k]) for k, to in enumerate(labels) if to == -1]
  parts = [
    f'{len(changed)} classes change their label when a clip is mirrored ({_some(changed)})' if changed else '',
    f'{len(alone)} name a side without a counterpart and are never mirrored ({_some(alone)})' if alone else '',
    f'the other {len(labels) - len(changed) - len(alone)} are mirrored and keep theirs',
  ]
  return labels, ', '.join(filter(None, parts))


def _counterparts(name: str) -> list[str]:
  """The names that the mirrored class may have; none where a name says nothing of a side."""
  swapped = _WORD.sub(_other_side, name)
  turn = _TURN.search(name)
  if turn is None:
    return [swapped] if swapped != name else []
  return [_TURN.sub(way, swapped) for way in (['clockwise'] if turn['against'] else _AGAINST)]


def _other_side(match: re.Match) -> str:
  word = match[0]
  other = _OTHER.get(word.lower())
  if other is None:
    return word
  return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _some(words: Sequence[str]) -> str:
  return ', '.join(words[:_SHOWN]) + (', ...' if len(words) > _SHOWN else '')
