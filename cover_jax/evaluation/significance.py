"""How sure a share of right answers is, and whether two runs differ by more than chance; plain Python."""

import math
from collections.abc import Sequence

_EXACT = 1000  # discordant examples up to which every outcome is counted; beyond, the two ways agree to four digits


def wilson(right: int, examples: int, z: float = 1.959964) -> tuple[float, float]:
  """The interval of a share (Wilson 1927, "Probable inference").

  Args:
    right: examples that count, from 0 to `examples`.
    examples: how many there are; 0: nothing is known, and the interval is (0, 1).
    z: quantile of the normal distribution; 1.96 is 95 %.

  Returns:
    (low, high) in [0, 1].
  """
  if not examples:
    return 0.0, 1.0
  share, spread = right / examples, z * z / examples
  centre = (share + spread / 2) / (1 + spread)
  half = z * math.sqrt(share * (1 - share) / examples + spread / (4 * examples)) / (1 + spread)
  # At the ends one limit is exactly 0 or 1, which rounding would miss.
  return (0.0 if right == 0 else centre - half), (1.0 if right == examples else centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
  """The two-sided p of McNemar's test (1947): that two runs, judged on the same examples, are equally good.

  Args:
    only_first, only_second: examples that only the one, and only the other, gets right.

  Returns:
    p in (0, 1]: exact (binomial) for up to 1,000 such examples, else by the normal distribution with Edwards'
    correction.
  """
  count, fewer = only_first + only_second, min(only_first, only_second)
  if not count:
    return 1.0
  if count <= _EXACT:
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)
  distance = max(abs(only_first - only_second) - 1, 0) / math.sqrt(count)
  return math.erfc(distance / math.sqrt(2))


def holm(p: Sequence[float]) -> list[float]:
  """The p of several tests, corrected for their number (Holm 1979): one that is below 0.05 is so among all of them."""
  corrected, most = [1.0] * len(p), 0.0
  for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
    most = max(most, min(1.0, (len(p) - rank) * p[i]))
    corrected[i] = most
  return corrected
