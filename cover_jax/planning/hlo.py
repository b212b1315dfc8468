"""What a program sends between devices, read from the text of its compiled HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16}  # the others end in their number of bits: f32, s8, f8e4m3fn
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')


class Unreadable(ValueError):
  """A program whose communication this module cannot count."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of communication in a step.

  Attributes:
    kind: 'all-gather', 'all-reduce', ...
    count: how often it runs a step.
    result_bytes: of its results on one chip, a step.
    sent_bytes: that one chip sends, a step, around a ring of those that take part.
  """

  kind: str
  count: int
  result_bytes: float
  sent_bytes: float


def collectives(hlo_text: str, devices: int) -> list[Collective]:
  """The collectives that a step runs, loops counted as often as they run.

  Args:
    hlo_text: `compiled.as_text()`.
    devices: that take part where the text names no groups.

  Raises:
    Unreadable: if a loop that communicates does not say how often it runs, or a collective not among how many.
  """
  totals, channels = {}, set()
  for kind, result, rest, times in _communication(hlo_text):
    # The TPU's compiler writes an asynchronous collective again in each fusion that moves it on, and in its end.
    if channel := re.search(r'\bchannel_id=(\d+)', rest):
      if channel[1] in channels:
        continue
      channels.add(channel[1])
    n = _group_size(rest, devices)
    size = _bytes(result)
    # Bytes a chip sends for a result of `size`: a ring passes (n - 1)/n of the whole array, twice to reduce it.
    sent = {
      'all-reduce': 2 * (n - 1) / n,
      'reduce-scatter': n - 1,  # the whole array is n results
      'collective-permute': 1,
      'collective-broadcast': 1,
    }.get(kind, (n - 1) / n)
    if n > 1 or kind == 'collective-permute':
      count, result_bytes, sent_bytes = totals.get(kind, (0, 0.0, 0.0))
      totals[kind] = count + times, result_bytes + times * size, sent_bytes + times * size * sent
  return [Collective(kind, *totals[kind]) for kind in _KINDS if kind in totals]


class _Instruction(NamedTuple):
  type: str
  op: str
  rest: str  # of the line: operands and attributes


class _Computation(NamedTuple):
  instructions: dict[str, _Instruction]
  root: list[str]  # the name of its result


def _parse(hlo_text: str) -> tuple[dict[str, _Computation], str]:
  """Computations by name, and the name of the main one."""
  computations: dict[str, _Computation] = {}
  main, current = '', None
  for line in hlo_text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[1], _Computation({}, []))
      main = match[1] if line.startswith('ENTRY') else main
    elif current is not None and (match := _INSTRUCTION.match(line)):
      is_root, name, *what = match.groups()
      current.instructions[name] = _Instruction(*what)
      if is_root:
        current.root.append(name)
  return computations, main


def _communication(hlo_text: str) -> Iterator[tuple[str, str, str, int]]:
  """(kind, result type, the rest of the line, how often it runs) of every collective, in the order of the program."""
  computations, main = _parse(hlo_text)

  def walk(name: str, times: int | None) -> Iterator[tuple[str, str, str, int]]:
    for result, op, rest in computations[name].instructions.values():
      kind = op.removesuffix('-start')
      if kind in _KINDS:
        if times is None:
          raise Unreadable(f'{kind} runs in a loop whose number of turns is not known: {name}')
        yield kind, _results(kind, result) if op.endswith('-start') else result, rest, times
      if op == 'while':
        turns = _turns(rest, computations[name], computations)
        yield from walk(_named(rest, 'body'), None if turns is None or times is None else turns * times)
      elif op == 'fusion' and (scattered := _scattered(computations.get(_named(rest, 'calls')))):
        yield 'reduce-scatter', result, scattered, times
      elif op in ('call', 'fusion', 'conditional', 'async-start'):
        for inner in re.findall(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', rest):
          yield from walk(inner, times)
        for several in re.findall(r'branch_computations=\{([^}]*)\}', rest):
          for inner in re.findall(r'%?([\w.\-]+)', several):
            yield from walk(inner, times)

  return walk(main, 1)


def _scattered(fused: _Computation | None) -> str | None:
  """The line of the all-reduce in a fusion that keeps a part of it: the way in which a TPU program writes a scatter."""
  if fused is None or fused.instructions[fused.root[0]].op != 'dynamic-slice':
    return None
  reduced = fused.instructions.get(_operands(fused.instructions[fused.root[0]].rest)[0])
  return reduced.rest if reduced is not None and reduced.op == 'all-reduce' else None


def _named(rest: str, key: str) -> str:
  return re.search(rf'\b{key}=%?([\w.\-]+)', rest)[1]


def _turns(loop: str, around: _Computation, computations: Mapping[str, _Computation]) -> int | None:
  """How often a loop runs: as the compiler says, else from its counter; None where neither tells.

  Args:
    loop: the rest of the line of the `while`.
    around: the computation that it is in.
    computations: all.
  """
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
    return int(said[1])
  condition, body = (computations[_named(loop, key)] for key in ('condition', 'body'))
  compare = condition.instructions[condition.root[0]]
  if compare.op != 'compare' or 'direction=LT' not in compare.rest:
    return None
  counter, bound = (_through_copies(name, condition) for name in _operands(compare.rest))
  index = _element(counter)
  if index is None:
    return None
  start = _carried(_operands(loop)[0], index, around)
  step = _carried(body.root[0], index, body)
  if step is None or step.op != 'add':
    return None
  # The counter and what is added to it, which may be in either place.
  added = [x for x in (_through_copies(name, body) for name in _operands(step.rest)) if _element(x) != index]
  numbers = [_constant(x) for x in (start, bound, *added)]
  if len(numbers) != 3 or None in numbers or numbers[2] <= 0:
    return None
  return max(-(-(numbers[1] - numbers[0]) // numbers[2]), 0)


def _operands(rest: str) -> list[str]:
  """The names of an instruction's operands."""
  depth = 1
  for end, c in enumerate(rest):
    depth += (c == '(') - (c == ')')
    if depth == 0:
      return re.findall(r'%([\w.\-]+)', rest[:end])
  return []


def _through_copies(name: str, computation: _Computation) -> _Instruction | None:
  found = computation.instructions.get(name)
  while found is not None and found.op == 'copy':
    found = computation.instructions.get(_operands(found.rest)[0])
  return found


def _carried(name: str, index: int, computation: _Computation) -> _Instruction | None:
  """What makes one element of a tuple that a loop carries."""
  made = computation.instructions.get(name)
  if made is None or made.op != 'tuple':
    return None
  return _through_copies(_operands(made.rest)[index], computation)


def _element(instruction: _Instruction | None) -> int | None:
  """Which element of a tuple an instruction takes."""
  if instruction is None or instruction.op != 'get-tuple-element':
    return None
  return int(re.search(r'\bindex=(\d+)', instruction.rest)[1])


def _constant(instruction: _Instruction | None) -> int | None:
  if instruction is None or instruction.op != 'constant':
    return None
  number = re.match(r'(-?\d+)\)', instruction.rest)
  return int(number[1]) if number else None


def _group_size(rest: str, devices: int) -> int:
  """Devices that take part in one collective, from any of the ways in which HLO writes groups."""
  groups = re.search(r'replica_groups=(.*)', rest)
  if not groups or groups[1].startswith('{}'):
    return devices
  # mesh['a'=8,'b'=32], device_ids=([32,8]T(1,0)) {'a'}: along the named axes, whatever the order of the devices.
  if axes := re.match(r'mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}', groups[1]):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", axes[2]))
  if iota := re.match(r'\[(\d+),(\d+)\]<=', groups[1]):
    return int(iota[2])
  if listed := re.match(r'\{\{([\d,]*)\}', groups[1]):
    return len(listed[1].split(','))
  raise Unreadable(f'The devices of a collective are written in an unknown way: {groups[1][:80]}')


def _results(kind: str, type_text: str) -> str:
  """The part of the type of an asynchronous start that is its results: of '(operands, results, ...)' the second."""
  if kind == 'all-reduce' or not type_text.startswith('('):
    return type_text
  parts, depth = [''], 0
  for c in type_text[1:-1]:
    depth += (c in '({[') - (c in ')}]')
    if c == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += c
  return parts[1]


def _bytes(type_text: str) -> float:
  """The bytes of an array type, or of a tuple of them."""
  total = 0.0
  for dtype, shape in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', type_text)):
    bits = _BITS.get(dtype) or int(re.match(r'[a-z]+(\d+)', dtype)[1])
    total += math.prod(int(d) for d in shape.split(',') if d) * bits / 8
  return total
