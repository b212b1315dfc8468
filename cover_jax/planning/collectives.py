"""What a program sends between devices, read from the text of its compiled HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator

from cover_jax.planning import hlo
from cover_jax.planning.hlo import Unreadable

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')


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


def read(hlo_text: str, devices: int) -> list[Collective]:
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
    size = hlo.array_bytes(result)
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
  """(kind, result type, the rest of the line, how often it runs) of every collective, in the order of the program."""
  computations, main = hlo.parse(hlo_text)

  def walk(name: str, times: int | None) -> Iterator[tuple[str, str, str, int]]:
    for result, op, rest in computations[name].instructions.values():
      kind = op.removesuffix('-start')
      if kind in _KINDS:
        if times is None:
          raise Unreadable(f'{kind} runs in a loop whose number of turns is not known: {name}')
        yield kind, hlo.results(op, result), rest, times
      if op == 'while':
        turns = hlo.turns(rest, computations[name], computations)
        yield from walk(hlo.named(rest, 'body'), None if turns is None or times is None else turns * times)
      elif op == 'fusion' and (scattered := _scattered(computations.get(hlo.named(rest, 'calls')))):
        yield 'reduce-scatter', result, scattered, times
      elif op in ('call', 'fusion', 'conditional', 'async-start'):
        for inner in re.findall(r'(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)', rest):
          yield from walk(inner, times)
        for several in re.findall(r'branch_computations=\{([^}]*)\}', rest):
          for inner in re.findall(r'%?([\w.\-]+)', several):
            yield from walk(inner, times)

  return walk(main, 1)


def _scattered(fused: hlo.Computation | None) -> str | None:
  """The line of the all-reduce in a fusion that keeps a part of it: the way in which a TPU program writes a scatter."""
  if fused is None or fused.instructions[fused.root[0]].op != 'dynamic-slice':
    return None
  reduced = fused.instructions.get(hlo.operands(fused.instructions[fused.root[0]].rest)[0])
  return reduced.rest if reduced is not None and reduced.op == 'all-reduce' else None


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
