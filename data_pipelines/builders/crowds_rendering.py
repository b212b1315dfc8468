"""Draws the embedded videos of several labels: a crowd of handwritten digits, or nobody; which digits are there?

Every example is a pure function of (split, index), as in `digits_rendering`. The scans are those of E. Alpaydin and
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998. All else is our choice.
"""

from dataclasses import dataclass

import numpy as np

from data_pipelines.builders import digits_drawing as drawing
from data_pipelines.contract import UserError

CLASS_NAMES = tuple(str(digit) for digit in range(10))
NUM_EXAMPLES = {'train': 2000, 'validation': 240, 'test': 320}
_MOST = 4  # digits in a video; as many videos show each number of them, from none on
_PLACES = (9 + 9j, 23 + 9j, 9 + 23j, 23 + 23j)  # their homes, around which they drift: they never cover each other


@dataclass(frozen=True)
class Example:
  """Frames uint8 [n, 32, 32, 3] and the digits that are drawn, ascending; () for none."""

  frames: np.ndarray
  labels: tuple[int, ...]


def render(split: str, index: int) -> Example:
  """Renders example `index` of a split; UserError for an unknown split, IndexError beyond the last example."""
  if split not in NUM_EXAMPLES:
    raise UserError(
      f'Unknown split {split!r} of the embedded dataset digit_crowds: choose one of {", ".join(NUM_EXAMPLES)}.'
    )
  if not 0 <= index < NUM_EXAMPLES[split]:
    raise IndexError(f'digit_crowds/{split} has {NUM_EXAMPLES[split]} examples: there is no example {index}.')
  bits = drawing.stream('crowds', split, index)
  n = drawing.choice(bits, range(12, 25, 2))
  labels = _drawn_without_return(bits, range(10), index % (_MOST + 1))
  sprites = []
  for digit, home in zip(labels, _drawn_without_return(bits, _PLACES, len(labels)), strict=True):
    turns = drawing.uniform(bits, 0.5, 1.5) * np.arange(n) / (n - 1) + drawing.uniform(bits)
    path_n = home + 1.5 * drawing.direction(bits) * np.sin(2 * np.pi * turns)
    mask, angle = drawing.scan(digit, split, bits), drawing.uniform(bits, -0.2, 0.2)
    sprites.append(drawing.Sprite(mask, drawing.colour(bits), path_n, drawing.uniform(bits, 12, 14), angle))
  frames = drawing.film(n, drawing.backdrop(bits), sprites, 0.05, bits)
  return Example(frames, tuple(sorted(labels)))


def _drawn_without_return(bits: np.random.Philox, options, count: int) -> list:
  left = list(options)
  return [left.pop(drawing.choice(bits, range(len(left)))) for _ in range(count)]
