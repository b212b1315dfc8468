"""What a program costs, read from its jaxpr (products) and from the text of its compiled HLO (collectives)."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16}  # the others end in their number of bits: f32, s8, f8e4m3fn
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')


def product_flops(function: Any, *args: Any) -> float:
  """Floating-point operations of a function's matrix products and convolutions, of all devices together.

  Loops count as often as they run, recomputation counts as it is written, results that nothing uses do not count, and
  of branches the dearest does.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _product_flops(jaxpr)


def _product_flops(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, dims = eqn.invars[1].aval.shape, eqn.params['dimension_numbers']
      groups = eqn.params['batch_group_count']
      inputs, window = kernel[dims.rhs_spec[1]], math.prod(kernel[i] for i in dims.rhs_spec[2:])
      # Of a dilated image (the gradient by the input) most products are with zeros that the compiler leaves out.
      dilated = math.prod(eqn.params['lhs_dilation'])
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * inputs * window / groups / dilated
    else:
      inner = [_product_flops(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
      times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
      total += max(inner, default=0.0) if eqn.primitive.name == 'cond' else times * sum(inner)
  return total


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
    ValueError: if a loop that communicates does not say how often it runs.
  """
  totals = {}
  for kind, result, rest, times in _communication(hlo_text):
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


def _communication(hlo_text: str) -> Iterator[tuple[str, str, str, int]]:
  """(kind, result type, the rest of the line, how often it runs) of every collective."""
  computations: dict[str, list[tuple[str, str, str, str]]] = {}
  main, lines = '', None
  for line in hlo_text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = computations.setdefault(match[1], [])
      main = match[1] if line.startswith('ENTRY') else main
    elif lines is not None and (match := _INSTRUCTION.match(line)):
      lines.append(match.groups())

  def walk(name: str, times: int | None) -> Iterator[tuple[str, str, str, int]]:
    for _, result, op, rest in computations[name]:
      kind = op.removesuffix('-start')
      if kind in _KINDS:
        if times is None:
          raise ValueError(f'{kind} runs in a loop whose number of turns is not known: {name}')
        yield kind, _results(kind, result) if op.endswith('-start') else result, rest, times
      if op == 'while':
        body, condition = _named(rest, 'body'), _named(rest, 'condition')
        turns = _turns(rest, computations[condition])
        yield from walk(body, None if turns is None or times is None else turns * times)
      elif op in ('call', 'fusion', 'conditional', 'async-start'):
        for inner in re.findall(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', rest):
          yield from walk(inner, times)
        for several in re.findall(r'branch_computations=\{([^}]*)\}', rest):
          for inner in re.findall(r'%?([\w.\-]+)', several):
            yield from walk(inner, times)

  return walk(main, 1)


def _named(rest: str, key: str) -> str:
  return re.search(rf'\b{key}=%?([\w.\-]+)', rest)[1]


def _turns(rest: str, condition: list[tuple[str, str, str, str]]) -> int | None:
  """How often a loop runs: as the compiler says, else the constant that its counter is compared with."""
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
    return int(said[1])
  constants = [rest for _, result, op, rest in condition if op == 'constant' and result.startswith('s32[]')]
  compares = [rest for _, _, op, rest in condition if op == 'compare']
  if len(constants) == 1 and len(compares) == 1 and 'direction=LT' in compares[0]:
    return int(re.match(r'(\d+)', constants[0])[1])
  return None


def _group_size(rest: str, devices: int) -> int:
  """Devices that take part in one collective, from any of the three ways in which HLO writes groups."""
  if axes := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", axes[2]))
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=', rest):
    return int(iota[2])
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return len(listed[1].split(','))
  return devices


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
