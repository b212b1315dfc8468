"""The text of a compiled program (`compiled.as_text()`): its computations, instructions, loops and arrays."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16}  # the others end in their number of bits: f32, s8, f8e4m3fn
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')


class Unreadable(ValueError):
  """A program that cannot be counted."""


class Instruction(NamedTuple):
  type: str
  op: str
  rest: str  # of the line: operands and attributes


class Computation(NamedTuple):
  instructions: dict[str, Instruction]
  root: list[str]  # the name of its result


def parse(hlo_text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the name of the main one."""
  computations: dict[str, Computation] = {}
  main, current = '', None
  for line in hlo_text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[1], Computation({}, []))
      main = match[1] if line.startswith('ENTRY') else main
    elif current is not None and (match := _INSTRUCTION.match(line)):
      is_root, name, *what = match.groups()
      current.instructions[name] = Instruction(*what)
      if is_root:
        current.root.append(name)
  return computations, main


def named(rest: str, key: str) -> str:
  return re.search(rf'\b{key}=%?([\w.\-]+)', rest)[1]


def turns(loop: str, around: Computation, computations: Mapping[str, Computation]) -> int | None:
  """How often a loop runs: as the compiler says, else from its counter; None where neither tells.

  Args:
    loop: the rest of the line of the `while`.
    around: the computation that it is in.
    computations: all.
  """
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
    return int(said[1])
  condition, body = (computations[named(loop, key)] for key in ('condition', 'body'))
  compare = condition.instructions[condition.root[0]]
  if compare.op != 'compare' or 'direction=LT' not in compare.rest:
    return None
  counter, bound = (_through_copies(name, condition) for name in operands(compare.rest))
  index = _element(counter)
  if index is None:
    return None
  start = _carried(operands(loop)[0], index, around)
  step = _carried(body.root[0], index, body)
  if step is None or step.op != 'add':
    return None
  # The counter and what is added to it, which may be in either place.
  added = [x for x in (_through_copies(name, body) for name in operands(step.rest)) if _element(x) != index]
  numbers = [_constant(x) for x in (start, bound, *added)]
  if len(numbers) != 3 or None in numbers or numbers[2] <= 0:
    return None
  return max(-(-(numbers[1] - numbers[0]) // numbers[2]), 0)


def operands(rest: str) -> list[str]:
  """The names of an instruction's operands."""
  depth = 1
  for end, c in enumerate(rest):
    depth += (c == '(') - (c == ')')
    if depth == 0:
      return re.findall(r'%([\w.\-]+)', rest[:end])
  return []


def _through_copies(name: str, computation: Computation) -> Instruction | None:
  found = computation.instructions.get(name)
  while found is not None and found.op == 'copy':
    found = computation.instructions.get(operands(found.rest)[0])
  return found


def _carried(name: str, index: int, computation: Computation) -> Instruction | None:
  """What makes one element of a tuple that a loop carries."""
  made = computation.instructions.get(name)
  if made is None or made.op != 'tuple':
    return None
  return _through_copies(operands(made.rest)[index], computation)


def _element(instruction: Instruction | None) -> int | None:
  """Which element of a tuple an instruction takes."""
  if instruction is None or instruction.op != 'get-tuple-element':
    return None
  return int(re.search(r'\bindex=(\d+)', instruction.rest)[1])


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.op != 'constant':
    return None
  number = re.match(r'(-?\d+)\)', instruction.rest)
  return int(number[1]) if number else None


def results(op: str, type_text: str) -> str:
  """The type of what an operation gives; of an asynchronous start, whose type is '(operands, results, ...)', too."""
  if not op.endswith('-start') or op == 'all-reduce-start' or not type_text.startswith('('):
    return type_text
  return tuple_parts(type_text)[1]


def tuple_parts(type_text: str) -> list[str]:
  """The types of a tuple's elements; of an array its own."""
  if not type_text.startswith('('):
    return [type_text]
  parts, depth = [''], 0
  for c in type_text[1:-1]:
    depth += (c in '({[') - (c in ')}]')
    if c == ',' and depth == 0:
      parts.append('')
    else:
      parts[-1] += c
  return [re.sub(r'/\*.*?\*/', '', part).strip() for part in parts]


def array_bytes(type_text: str) -> float:
  """The bytes of an array type, or of a tuple of them."""
  total = 0.0
  for dtype, shape in _ARRAY.findall(re.sub(r'\{[^}]*\}', '', type_text)):
    bits = _BITS.get(dtype) or int(re.match(r'[a-z]+(\d+)', dtype)[1])
    total += math.prod(int(d) for d in shape.split(',') if d) * bits / 8
  return total
