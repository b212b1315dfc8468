"""What a compiled TPU program does on one chip, from the text of its schedule: cycles, and traffic with HBM."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from cover_jax.planning import hlo
from cover_jax.planning.hlo import Computation, Instruction, Unreadable

# They make no array, or name one that is there already.
_FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'call', 'conditional', 'after-all'}
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_FAST_ARRAY = re.compile(r'[a-z]+\d*\w*\[[\d,]*\]\{[^}]*S\(1\)\}')
_TOO_MANY = 2**40  # cycles; the compiler writes the largest integer for what it cannot judge


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A program's cost on one chip, loop bodies counted as often as they run.

  Attributes:
    cycles: the compiler's estimates of its operations, added up: it sees the padding of tiles and ignores that copies
      and communication run beside the rest. None from compilers that estimate none.
    hbm_bytes: of arrays outside fast memory that are read or written, a slice of an array as the slice that it is;
      without what tiles pad. Of a conditional all branches.
    unjudged: operations that write arrays and have no estimate; copies beside the program are not among them.
  """

  cycles: float | None
  hbm_bytes: float
  unjudged: int


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the schedule: how often it runs, and what it costs each time."""

  name: str
  op: str
  times: int
  cycles: float | None
  hbm_bytes: float


def read(hlo_text: str) -> Schedule:
  """The cost of a program.

  Args:
    hlo_text: `compiled.as_text()`.

  Raises:
    Unreadable: if a loop does not say how often it runs.
  """
  cycles, hbm_bytes, unjudged, judged = 0.0, 0.0, 0, False
  for one in operations(hlo_text):
    hbm_bytes += one.times * one.hbm_bytes
    if one.cycles is not None:
      cycles, judged = cycles + one.times * one.cycles, True
    elif not one.op.endswith(('-start', '-done')):
      unjudged += one.times
  return Schedule(cycles if judged else None, hbm_bytes, unjudged)


def operations(hlo_text: str) -> Iterator[Operation]:
  """The operations of a program that move or make arrays; see `read`."""
  computations, main = hlo.parse(hlo_text)

  def walk(name: str, times: int) -> Iterator[Operation]:
    computation = computations[name]
    for own, one in computation.instructions.items():
      if one.op == 'while':
        turns = hlo.turns(one.rest, computation, computations)
        if turns is None:
          raise Unreadable(f'it is not known how often the loop {own} runs')
        yield from walk(hlo.named(one.rest, 'body'), times * turns)
      for inner in _called(one):
        yield from walk(inner, times)
      if one.op not in _FREE and not one.op.endswith('-done') and not _allocates(one):
        yield Operation(own, one.op, times, _cycles(one), _traffic(one, computation, computations))

  return walk(main, 1)


def _called(one: Instruction) -> list[str]:
  if one.op == 'call':
    return [hlo.named(one.rest, 'to_apply')]
  if one.op == 'conditional':  # as if all of its branches ran
    listed = re.search(r'branch_computations=\{([^}]*)\}', one.rest)
    return re.findall(r'%?([\w.\-]+)', listed[1]) if listed else re.findall(r'\w+_computation=%?([\w.\-]+)', one.rest)
  return []


def _allocates(one: Instruction) -> bool:
  return one.op == 'custom-call' and 'custom_call_target="AllocateBuffer"' in one.rest


def _cycles(one: Instruction) -> float | None:
  found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
  return float(found[1]) if found and int(found[1]) < _TOO_MANY else None


def _traffic(one: Instruction, around: Computation, computations: Mapping[str, Computation]) -> float:
  """Bytes that one run of an operation reads from and writes to HBM."""
  types = [around.instructions[name].type for name in hlo.operands(one.rest) if name in around.instructions]
  if one.op in ('copy-start', 'slice-start'):
    # (to, from, context), or ((from), to, context): what is moved is as large as the part of it that arrives.
    parts = hlo.tuple_parts(one.type)
    moved = min(map(hlo.array_bytes, parts[:2]))
    return sum(moved for part in parts[:2] if _slow_bytes(part))
  if one.op == 'fusion':
    fused = computations[hlo.named(one.rest, 'calls')]
    known = sum(min(_read(fused, i, computations), _slow_bytes(t)) for i, t in enumerate(types))
    return known + _written(one.type, fused, fused.root[0], computations)
  result = _slow_bytes(hlo.results(one.op, one.type))
  if one.op in _SLICES:
    return min(_slow_bytes(types[0]), hlo.array_bytes(one.type)) + result
  if one.op == 'dynamic-update-slice':
    update = hlo.array_bytes(types[1])
    return _slow_bytes(types[1]) + min(result, update)
  return sum(map(_slow_bytes, types)) + result


def _slow_bytes(type_text: str) -> float:
  """The bytes of the arrays of a type that lie outside fast memory."""
  return hlo.array_bytes(_FAST_ARRAY.sub('', type_text))


def _read(fused: Computation, index: int, computations: Mapping[str, Computation]) -> float:
  """Bytes that a fused computation reads of one of its parameters."""
  return _used(fused, _parameter(fused, index), computations)


def _parameter(fused: Computation, index: int) -> str:
  return next(n for n, one in fused.instructions.items() if one.op == 'parameter' and one.rest.startswith(f'{index})'))


def _used(fused: Computation, name: str, computations: Mapping[str, Computation]) -> float:
  """Bytes that are read of an array: all of it, unless nothing but slices of it are used."""
  whole, total = hlo.array_bytes(fused.instructions[name].type), 0.0
  for own, user in fused.instructions.items():
    for place, operand in enumerate(hlo.operands(user.rest)):
      if operand != name:
        continue
      if user.op in _SLICES and place == 0:
        total += hlo.array_bytes(user.type)
      elif user.op == 'fusion':
        total += _read(computations[hlo.named(user.rest, 'calls')], place, computations)
      elif user.op == 'bitcast':
        total += _used(fused, own, computations)
      elif user.op != 'dynamic-update-slice' or place != 0:  # which leaves what it does not write in its place
        return whole
  return min(total, whole)


def _written(type_text: str, fused: Computation, name: str, computations: Mapping[str, Computation]) -> float:
  """Bytes that a fused computation writes to HBM as its result `name`, whose place `type_text` tells."""
  one = fused.instructions[name]
  if one.op == 'tuple':
    each = zip(hlo.tuple_parts(type_text), hlo.operands(one.rest), strict=True)
    return sum(_written(part, fused, operand, computations) for part, operand in each)
  size = _slow_bytes(type_text)
  if one.op == 'bitcast':
    return _written(type_text, fused, hlo.operands(one.rest)[0], computations)
  if one.op == 'dynamic-update-slice':
    return min(size, hlo.array_bytes(fused.instructions[hlo.operands(one.rest)[1]].type))
  if one.op == 'fusion':
    inner = computations[hlo.named(one.rest, 'calls')]
    return _written(type_text, inner, inner.root[0], computations)
  return size
