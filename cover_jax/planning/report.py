"""A plan as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from cover_jax.planning.costs import Memory, OutOfMemory
from data_pipelines.sources.sizes import Size

GiB = 2**30


def gib(size: float) -> str:
  """Bytes as GiB, small ones too."""
  return f'{size / GiB:.2f}' if size >= GiB / 10 else f'{size / GiB:.2g}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; all but the first column are numbers."""
  rule = ['---', *['---:'] * (len(header) - 1)]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, rule, *rows))


def versions(known: Mapping[str, str]) -> str:
  return ', '.join(f'{package} {version}' for package, version in known.items())


def sources(known: Mapping[str, Size]) -> str:
  rows = [[name, f'{s.num_examples:,}', str(s.num_classes), s.origin] for name, s in known.items()]
  return table(['source', 'examples', 'classes', 'as'], rows) + '\n'


def slice_report(result: Mapping[str, Any]) -> str:
  """All that is known of one slice."""
  mesh = ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items())
  parts = [f'## {result["topology"]} ({mesh})', verdict(result), _batch(result), _memory(result)]
  if largest := result.get('largest_batch'):
    parts.append(_largest(largest))
  if 'costs' in result:
    parts.append(_costs(result))
  if 'collectives' in result:
    parts.append(_collectives(result['collectives']))
  if 'unreadable' in result:
    parts.append(f'Communication cannot be counted, so there is no time of a step: {result["unreadable"]}.')
  if 'time' in result:
    parts.append(_time(result))
  if 'levers' in result:
    parts.append(_levers(result['levers']))
  return '\n\n'.join(parts) + '\n'


def verdict(result: Mapping[str, Any]) -> str:
  memory, available = result['memory'], result['chip']['hbm_bytes']
  if isinstance(memory, OutOfMemory):
    again = '' if result['remat'] in (None, 'full') else 'config.model.remat=full, '
    return (
      f'**Does not fit**: needs {gib(memory.needed)} of {gib(memory.available)} GiB a chip. Try a smaller '
      f'batch, {again}a larger config.mesh.fsdp or config.accumulation_steps (--levers compares them).'
    )
  if available is None:
    return f'Needs {gib(memory.total)} GiB a device; how much it has is not known.'
  return f'**Fits**: {gib(memory.total)} of {gib(available)} GiB a chip.'


def _batch(result: Mapping[str, Any]) -> str:
  chips = _chips(result)
  clip = lambda s: f'{s["num_frames"]} x {s["size"][0]} x {s["size"][1]}'
  streams = ', '.join(
    f'{name} {s["batch_size"]} ({s["batch_size"] / chips:g} a chip, {clip(s)})' for name, s in result['streams'].items()
  )
  text = f'Examples a step: {streams}; {result["total_steps"]:,} steps.'
  if result['batch_multiple'] != result['configured_batch_multiple']:
    text += f' For this slice set config.batch_multiple={result["batch_multiple"]}.'
  return text


def _chips(result: Mapping[str, Any]) -> int:
  count = 1
  for size in result['mesh'].values():
    count *= size
  return count


def _memory(result: Mapping[str, Any]) -> str:
  memory = result['memory']
  if isinstance(memory, OutOfMemory):
    kinds = dict(memory.kinds) | {'the rest': memory.needed - sum(memory.kinds.values()), 'total': memory.needed}
  else:
    kinds = dict(vars(memory)) | {'total': memory.total}
  rows = [[kind, gib(size)] for kind, size in kinds.items() if size]
  return table(['HBM of a chip', 'GiB'], rows)


def _largest(largest: Mapping[str, Any]) -> str:
  tried = ', '.join(
    f'{sum(t["batch_sizes"].values())} ({gib(t["bytes"])} GiB{"" if t["fits"] else ", does not fit"})'
    for t in largest['tried']
  )
  if largest['batch_sizes'] is None:
    return f'No batch fits. Compiled: {tried}.'
  sizes = ', '.join(f'{name} {size}' for name, size in largest['batch_sizes'].items())
  bound = '' if largest['exact'] else ' (within the steps of the search)'
  return f'Largest batch that fits{bound}: {sum(largest["batch_sizes"].values())} ({sizes}). Compiled: {tried}.'


def _costs(result: Mapping[str, Any]) -> str:
  costs = result['costs']
  streams = ', '.join(f'{name} {flops / 1e12:.4g}' for name, flops in costs.model_flops.items())
  products = f'{costs.product_flops / 1e12:.4g} TFLOP of matrix products'
  text = f'Model TFLOP of an example: {streams}. A step on one chip: {products}'
  if costs.schedule is None:
    why = f' Its schedule cannot be read, so there is no time of a step: {costs.unreadable}.'
    return f'{text}.{why if costs.unreadable else ""}'
  text += f', {costs.schedule.hbm_bytes / 1e9:.4g} GB to and from HBM.'
  if costs.schedule.cycles is not None:
    text += f' Operations for which the compiler gives no cycles: {costs.schedule.unjudged:,}.'
  return text


def _collectives(collectives: Sequence[Any]) -> str:
  if not collectives:
    return 'No communication between chips.'
  rows = [[c.kind, str(c.count), f'{c.result_bytes / 1e9:.4g}', f'{c.sent_bytes / 1e9:.4g}'] for c in collectives]
  return table(['communication, a step', 'count', 'GB on a chip', 'GB sent by a chip'], rows)


def _time(result: Mapping[str, Any]) -> str:
  t = result['time']
  ms = lambda key: f'{t[key] * 1e3:.3g} ms'
  parts = f'cycles {ms("cycles")}' if 'cycles' in t else f'products {ms("products")} + memory {ms("memory")}'
  alone = ', '.join(f'{key} {ms(key)}' for key in ('products', 'memory', 'links'))
  return (
    f'Step: at least {ms("at_least")} ({alone}); estimate {ms("estimate")} = {parts} + links {ms("links")}; '
    f'MFU {t["mfu"]:.1%}, {t["examples_per_second"]:.3g} examples/s, {t["days"]:.3g} days for '
    f'{result["total_steps"]:,} steps. By the compiler and a data sheet ({result["chip"]["source"]}), not from a chip.'
  )


def _levers(rows: Sequence[Mapping[str, Any]]) -> str:
  base = rows[0].get('product_flops')
  lines = []
  for row in rows:
    if 'refused' in row:
      lines.append([row['lever'], '-', '-', '-', '-', row['refused']])
      continue
    memory = row['memory']
    fits = isinstance(memory, Memory)
    lines.append(
      [
        row['lever'],
        gib(memory.total if fits else memory.needed),
        f'{row["product_flops"] / base:.2f}',
        f'{row["time"]["estimate"] * 1e3:.3g}' if 'time' in row else '-',
        f'{row["sent_bytes"] / 1e9:.3g}' if 'sent_bytes' in row else '-',
        'yes' if fits else 'no',
      ]
    )
  return table(['lever', 'GiB a chip', 'products', 'ms a step', 'GB sent by a chip', 'fits'], lines)


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
  """One row a slice."""
  rows = []
  for r in results:
    memory, time, largest = r['memory'], r.get('time'), r.get('largest_batch') or {}
    total = memory.total if isinstance(memory, Memory) else memory.needed
    available = r['chip']['hbm_bytes']
    rows.append(
      [
        r['topology'],
        str(_chips(r)),
        gib(total) + (f' of {gib(available)}' if available else ''),
        'yes' if isinstance(memory, Memory) else 'no',
        str(sum(largest['batch_sizes'].values())) if largest.get('batch_sizes') else '-',
        *([f'{time["estimate"] * 1e3:.3g}', f'{time["mfu"]:.1%}', f'{time["days"]:.3g}'] if time else ['-'] * 3),
      ]
    )
  header = ['slice', 'chips', 'GiB a chip', 'fits', 'largest batch', 'ms a step', 'MFU', 'days']
  return '## Slices compared\n\n' + table(header, rows)
