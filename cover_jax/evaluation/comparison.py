"""Two runs on the same examples: which of them is better, and by more than chance?"""

import collections
from typing import NamedTuple

from cover_jax.evaluation.answers import Row
from cover_jax.evaluation.runs import Head, Run
from cover_jax.evaluation.significance import holm, mcnemar
from data_pipelines.contract import UserError


class Verdict(NamedTuple):
  """Two runs on the same examples of a head, or of one of its classes.

  Attributes:
    examples: how many.
    first, second: how many each gets right.
    only_first, only_second: how many only the one, only the other, gets right.
    p: of McNemar's test; of a class corrected for the number of classes (Holm).
  """

  examples: int
  first: int
  second: int
  only_first: int
  only_second: int
  p: float


class Compared(NamedTuple):
  """One head of two runs.

  Attributes:
    first, second: the heads.
    pairs: the answers of both to one example.
    unmatched: examples that only the one, only the other, was tested on.
    whole: the verdict over all pairs.
    of_classes: of each class that has a pair, by its index in `first`.
  """

  first: Head
  second: Head
  pairs: list[tuple[Row, Row]]
  unmatched: tuple[int, int]
  whole: Verdict
  of_classes: dict[int, Verdict]


def compare(first: Run, second: Run) -> list[Compared]:
  """Compares every head of one label an example that both runs have, example by example.

  Examples are the same where the test splits are (`data_sha256`), by their number; else where they have one name and
  one true class.

  Raises:
    UserError: if no head is in both, the classes of one differ, or it was tested on other examples.
  """
  others = {head.name: head for head in second.heads}
  shared = [head for head in first.heads if head.name in others]
  if not shared and not table_of_several(first, second):
    raise UserError(
      f'{first.name} has the heads {", ".join(h.name for h in first.heads)}, {second.name} has '
      f'{", ".join(others)}: none is in both, so there is nothing to compare; name two runs that share a source.'
    )
  return [_compare(first, second, head, others[head.name]) for head in shared]


def _compare(first: Run, second: Run, one: Head, other: Head) -> Compared:
  if set(one.class_names) != set(other.class_names):
    raise UserError(
      f'Head {one.name!r} has {len(one.class_names)} classes in {first.name} and {len(other.class_names)}, which are '
      f'not all the same, in {second.name}: name two runs with the same classes.'
    )
  # Two builds of a data set may count its classes in another order.
  number = {name: k for k, name in enumerate(one.class_names)}
  index = [number[name] for name in other.class_names]
  theirs = [row._replace(label=index[row.label], best=tuple((index[k], p) for k, p in row.best)) for row in other.rows]
  pairs = _match(one, other, theirs)
  if not pairs:
    raise UserError(
      f'Head {one.name!r} was tested on other examples in {first.name} ({len(one.rows):,}) than in {second.name} '
      f'({len(other.rows):,}), and none of them has the same name and class: evaluate both runs on one test split.'
    )
  of_classes = {}
  for label in sorted({row.label for row, _ in pairs}):
    of_classes[label] = _verdict([pair for pair in pairs if pair[0].label == label])
  corrected = holm([verdict.p for verdict in of_classes.values()])
  of_classes = {k: v._replace(p=p) for (k, v), p in zip(of_classes.items(), corrected, strict=True)}
  unmatched = len(one.rows) - len(pairs), len(theirs) - len(pairs)
  return Compared(one, other, pairs, unmatched, _verdict(pairs), of_classes)


def _match(one: Head, other: Head, theirs: list[Row]) -> list[tuple[Row, Row]]:
  of = lambda rows: [(row.example, row.name, row.label) for row in rows]
  if one.summary['data_sha256'] == other.summary['data_sha256'] and of(one.rows) == of(theirs):
    return list(zip(one.rows, theirs, strict=True))
  mine, found = _by_name(one.rows), _by_name(theirs)
  return [(row, found[key]) for key, row in mine.items() if key in found]


def _by_name(rows: list[Row]) -> dict[tuple[str, int], Row]:
  """{(name, true class): row}; what has no name, or one that another example has, too, cannot be told."""
  keys = [(row.name, row.label) for row in rows]
  times = collections.Counter(keys)
  return {key: row for key, row in zip(keys, rows, strict=True) if key[0] and times[key] == 1}


def _verdict(pairs: list[tuple[Row, Row]]) -> Verdict:
  first = sum(a.right for a, _ in pairs)
  second = sum(b.right for _, b in pairs)
  both = sum(a.right and b.right for a, b in pairs)
  return Verdict(len(pairs), first, second, first - both, second - both, mcnemar(first - both, second - both))


def table_of_several(first: Run, second: Run) -> str:
  """mAP of the heads of several labels that both runs have, as text, '' for none: no test of chance is made of it."""
  others = {head.name: head.summary for head in second.several}
  lines = []
  for head in first.several:
    if (other := others.get(head.name)) is None:
      continue
    same = head.summary['data_sha256'] == other['data_sha256']
    on = f'on the same {other["examples"]:,} examples' if same else 'on other examples: not comparable'
    lines.append(f'{head.name}: mAP {head.summary["mAP"]:.1%} (first), {other["mAP"]:.1%} (second), {on}')
  return ''.join(f'{line}\n' for line in lines)


def table(compared: list[Compared], first: str, second: str) -> str:
  """A comparison as text, one head a line; `first` and `second` name the runs."""
  wide = max(len('head'), *(len(c.first.name) for c in compared))
  header = f'{"head":<{wide}}{"examples":>10}{"first":>9}{"second":>9}{"only first":>12}{"only second":>13}{"p":>10}'
  lines = [f'first: {first}', f'second: {second}', header, '-' * len(header)]
  for c in compared:
    w = c.whole
    share = f'{w.first / w.examples:>9.1%}{w.second / w.examples:>9.1%}'
    lines.append(f'{c.first.name:<{wide}}{w.examples:>10,}{share}{w.only_first:>12,}{w.only_second:>13,}{w.p:>10.2g}')
    if any(c.unmatched):
      lines.append(
        f'  the splits of {c.first.name} differ, of {len(c.first.rows):,} and {len(c.second.rows):,} examples:'
      )
      lines[-1] += f' the {w.examples:,} in both, by name and class, are compared'
  return '\n'.join(lines)
