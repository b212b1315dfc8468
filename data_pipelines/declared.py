"""What a setting may be: declared once, beside its default, and checked before anything is opened.

A table {name: Key(default, kind)} says which settings there are; a table within a table is a section. The options of a
function are declared in its signature, `rate: Annotated[float, number(0, 1)] = 0.5`: `options_of` makes the table.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.contract import UserError

_LONGEST_NAME = 100
_MOST = 2**31 - 1  # whole numbers are held in 32 bits


class Kind(NamedTuple):
  """What a value may be.

  Attributes:
    expected: in words: 'a whole number of at least 1'.
    holds: whether a value, which may be anything, is of the kind.
    free: a dict whose names are not declared here.
    mixed: its values are of several Python types, such as a number or None.
  """

  expected: str
  holds: Callable[[Any], bool]
  free: bool = False
  mixed: bool = False


class Key(NamedTuple):
  """One setting: its default, or REQUIRED, or OPTIONAL (not there unless it is given), and what it may be."""

  default: Any
  kind: Kind


REQUIRED, OPTIONAL = object(), object()
Keys = Mapping[str, 'Key | Keys']


# What a value may be.

text = Kind('text', lambda value: isinstance(value, str))
nonempty = Kind('text that is not empty', lambda value: isinstance(value, str) and value != '')
flag = Kind('True or False', lambda value: isinstance(value, bool))
none = Kind('None', lambda value: value is None)


def whole(low: int = 0, high: int = _MOST) -> Kind:
  """An int; True is none."""
  expected = f'a whole number of at least {low}' if high == _MOST else f'a whole number from {low} to {high}'
  return Kind(expected, lambda value: type(value) is int and low <= value <= high)


def number(
  low: float = -math.inf,
  high: float = math.inf,
  *,
  above: float | None = None,
  below: float | None = None,
  infinite: bool = False,
) -> Kind:
  """An int or a float that is finite, unless `infinite`, in [low, high], and strictly between `above` and `below`.

  It is judged as float32 holds it: what rounds to 0 there is not above 0.
  """
  limits = [f'above {above}'] if above is not None else [f'of at least {low}'] if low > -math.inf else []
  limits += [f'below {below}'] if below is not None else [f'at most {high}'] if high < math.inf else []
  bounded = len(limits) == 2 or infinite
  expected = ' '.join(['a number' if bounded else 'a finite number', ' and '.join(limits)]).strip()

  def holds(value):
    if not isinstance(value, int | float) or isinstance(value, bool):
      return False
    try:
      with np.errstate(all='ignore'):
        x = float(np.float32(value))
    except OverflowError:  # an int of hundreds of digits
      return False
    inside = low <= x <= high and (above is None or x > above) and (below is None or x < below)
    return inside and (math.isfinite(x) or (infinite and value == x))

  return Kind(expected + ', or inf' * infinite, holds)


def one_of(*choices: Any) -> Kind:
  """One of a few values, of just that type: True is not 1."""
  words = [repr(c) for c in choices]
  expected = words[0] if len(words) == 1 else f'{", ".join(words[:-1])} or {words[-1]}'
  return Kind(expected, lambda value: any(type(value) is type(c) and value == c for c in choices))


def either(*kinds: Kind) -> Kind:
  """One of several kinds."""
  expected = ', or '.join(kind.expected for kind in kinds)
  return Kind(expected, lambda value: any(kind.holds(value) for kind in kinds), mixed=True)


def span(*, above: float, high: float = math.inf) -> Kind:
  """(low, high), two numbers with above < low <= high, and at most `high`."""
  low, most = number(above=above), number(high=high)
  expected = f'(low, high) with {above} < low <= high' + (f' <= {high}' if high < math.inf else '')

  def holds(value):
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(low.holds, value))
    return pair and value[0] <= value[1] and most.holds(value[1])

  return Kind(expected, holds)


def several(of: Kind, *, count: int | None = None, least: int = 0, distinct: bool = False) -> Kind:
  """A tuple or a list of values of one kind.

  Args:
    of: the kind.
    count: how many; None: any number, but `least`.
    least: the fewest.
    distinct: none of them twice.
  """
  fewest = f'at least {least} value{"s" * (least != 1)}' if least else 'values'
  many = fewest if count is None else f'{count} values'
  expected = f'a tuple of {many}, each {of.expected}' + ', none of them twice' * distinct

  def holds(value):
    if not isinstance(value, tuple | list) or not all(map(of.holds, value)):
      return False
    right = len(value) >= least if count is None else len(value) == count
    return right and not (distinct and len(set(value)) < len(value))

  return Kind(expected, holds)


def named(of: Kind | None = None, *, least: int = 0) -> Kind:
  """A dict with names of the user's own, of letters, digits, '_' and '-'; `of`: what its values may be.

  Names are bounded, since files are named by them.
  """
  expected = 'a dict' + (f' of at least {least} entr{"y" if least == 1 else "ies"}' if least else '')
  expected += f' whose keys are names of letters, digits, _ and -, of at most {_LONGEST_NAME} bytes'
  expected += f' and each of whose values is {of.expected}' if of else ''

  def holds(value):
    if not isinstance(value, Mapping) or len(value) < least:
      return False
    texts = all(isinstance(k, str) for k in value)
    named = texts and all(re.fullmatch(r'[\w-]+', k) and len(k.encode()) <= _LONGEST_NAME for k in value)
    return named and (of is None or all(map(of.holds, value.values())))

  return Kind(expected, holds, free=True)


# Tables of them.


def options_of(function: Callable[..., Any]) -> dict[str, Key]:
  """The parameters of a function or dataclass that are annotated with a kind."""
  found = {}
  for parameter in inspect.signature(function).parameters.values():
    kinds = [m for m in getattr(parameter.annotation, '__metadata__', ()) if isinstance(m, Kind)]
    if kinds:
      default = REQUIRED if parameter.default is parameter.empty else parameter.default
      found[parameter.name] = Key(default, kinds[0])
  return found


def check(values: Any, keys: Keys, where: str, *, complete: str = '') -> None:
  """Raises UserError for the first key that there is not, that is missing, or whose value it may not have.

  Args:
    values: what is set, a plain dict.
    keys: the table.
    where: of the values, for messages: 'config.optimizer'.
    complete: what to do if keys that have a default are missing; '': they may be.
  """
  if not isinstance(values, Mapping):
    raise UserError(f'{where} is {_shown(values)}: expected a dict with keys among {", ".join(keys)}.')
  for key in values:
    if key not in keys:
      close = difflib.get_close_matches(str(key), keys, 1)
      hint = f'did you mean {close[0]!r}?' if close else f'expected keys among {", ".join(keys)}.'
      raise UserError(f'{where} has no key {key!r}: {hint}')
  default = lambda key: key.default if isinstance(key, Key) else None
  absent = {key: default(declared) for key, declared in keys.items() if key not in values}
  missing = [key for key, d in absent.items() if d is REQUIRED or (complete and d is not OPTIONAL)]
  if missing:
    raise UserError(f'{where} lacks {", ".join(map(repr, missing))}: {complete or "give them"}.')
  for key, declared in keys.items():
    if key not in values:
      continue
    if isinstance(declared, Key):
      check_value(values[key], declared.kind, f'{where}.{key}')
    else:
      check(values[key], declared, f'{where}.{key}', complete=complete)


def check_value(value: Any, kind: Kind, where: str) -> None:
  """Raises UserError if a value is not of a kind."""
  if not kind.holds(value):
    most = ' (they are held in 32 bits)' if type(value) is int and value > _MOST else ''
    raise UserError(f'{where} is {_shown(value)}: expected {kind.expected}{most}.')


def _shown(value: Any) -> str:
  words = ' '.join(repr(value).split())
  return words if len(words) <= 100 else f'{words[:97]}...'
