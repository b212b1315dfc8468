"""One page that shows what a run gets right and wrong, or two runs: HTML that needs no server and no network.

What users have named (classes, files, configs) stands in it as text: within HTML it is escaped, within the block of
JSON no '<' is left, and the script makes text nodes of it. A policy in the page forbids every other script and every
request.
"""

import base64
import collections
import hashlib
import html
import importlib.resources
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cover_jax.evaluation import comparison, curves
from cover_jax.evaluation.answers import Row
from cover_jax.evaluation.runs import Head, Run, SeveralHead
from cover_jax.evaluation.significance import wilson
from data_pipelines import paths
from data_pipelines.sources import leaks

MOST_BYTES = 15_000_000
_MOST_CELLS = 20_000  # of a confusion matrix, the most frequent
_MOST_CONFIG = 200_000  # characters


def of_run(run: Run) -> str:
  """The page of a run, at most 15 MB: clips that do not go into it are counted, and left out."""
  heads = [_head_data(head) for head in run.heads]
  clips = [_ordered([_clip(row, head.clips.get(row.example)) for row in head.rows]) for head in run.heads]
  tables = (
    ''
    if run.several and not run.heads
    else _table(
      ['head', 'top-1', '95 % interval', 'top-5', 'class accuracy', 'chance', 'loss', 'examples', 'protocol'],
      [_summary(head) for head in run.heads],
    )
  )
  tables += _several(run.several)
  about = f'Step {run.report.get("step")}, {run.report.get("params")} parameters.'
  parts = {
    'title': html.escape(run.name),
    'about': html.escape(about),
    'heads': tables,
    'curves': _curves(run),
    'config': _pre(_flat(run.config)),
    'prints': _fingerprints([run]),
  }
  return _rendered(parts, {'runs': [run.name], 'heads': heads}, clips)


def of_two(first: Run, second: Run, compared: Sequence[comparison.Compared]) -> str:
  """The page that compares two runs, of `comparison.compare`; at most 15 MB, too."""
  heads, clips = [], []
  for c in compared:
    data = _head_data(c.first) | {
      'rows': [[k, *verdict] for k, verdict in c.of_classes.items()],
      'cells': [],
      'judged': len(c.pairs),
    }
    heads.append(data)
    kept = [_clip(a, c.first.clips.get(a.example) or c.second.clips.get(b.example), b) for a, b in c.pairs]
    clips.append(_ordered(kept))
  header = ['head', 'examples', 'first', 'second', 'difference', 'only first right', 'only second right', 'p (McNemar)']
  about = f'First: {first.name}. Second: {second.name}. Both on the same examples.'
  parts = {
    'title': html.escape(f'{first.name} and {second.name}'),
    'about': html.escape(about),
    'heads': _table(header, [_verdict(c) for c in compared]) + _unmatched(compared),
    'curves': ''.join(f'<h3>{html.escape(run.name)}</h3>{_curves(run)}' for run in (first, second)),
    'config': _differences(first, second),
    'prints': _fingerprints([first, second]),
  }
  return _rendered(parts, {'runs': [first.name, second.name], 'heads': heads}, clips)


# Parts of it.


def _summary(head: Head) -> list[str]:
  s = head.summary
  right = sum(head.right_K)
  low, high = wilson(right, s['expected'] if s['missing'] == 'wrong' else s['examples'])
  count = f'{s["examples"]:,}' + (f' of {s["expected"]:,}' if s['expected'] > s['examples'] else '')
  shares = (f'{s["top1"]:.1%}', f'{low:.1%} to {high:.1%}', f'{s["top5"]:.1%}', f'{s["mean_class_accuracy"]:.1%}')
  return [head.name, *shares, f'{s["chance"]:.1%}', f'{s["loss"]:.3f}', count, s['protocol']]


def _several(heads: Sequence[SeveralHead]) -> str:
  """The heads of several labels an example, and the classes of each, folded up."""
  if not heads:
    return ''
  header = ['head of several labels', 'mAP', 'P@1', 'P@5', 'chance', 'loss', 'examples', 'labels each', 'protocol']
  parts = [_table(header, [_several_summary(head) for head in heads])]
  for head in heads:
    percent = lambda share: '' if share is None else f'{share:.1%}'
    rows = [[name, f'{count:,}', percent(share), percent(ap)] for name, count, share, ap in head.rows]
    table = _table(['class', 'examples', 'share of all', 'average precision'], rows)
    without = len(head.summary['classes_without_positives'])
    note = f', {without:,} without an example, so not in mAP' if without else ''
    said = html.escape(f'Classes of {head.name}: {len(rows):,}{note}')
    parts.append(f'<details><summary>{said}</summary>{table}</details>')
  return ''.join(parts)


def _several_summary(head: SeveralHead) -> list[str]:
  s = head.summary
  count = f'{s["examples"]:,}' + (f' of {s["expected"]:,}' if s['expected'] > s['examples'] else '')
  shares = (f'{s[key]:.1%}' for key in ('mAP', 'precision_at_1', 'precision_at_5', 'chance'))
  return [head.name, *shares, f'{s["loss"]:.3f}', count, f'{s["labels_an_example"]:.2f}', s['protocol']]


def _verdict(c: comparison.Compared) -> list[str]:
  w = c.whole
  shares = [f'{w.first / w.examples:.1%}', f'{w.second / w.examples:.1%}', f'{(w.second - w.first) / w.examples:+.1%}']
  return [c.first.name, f'{w.examples:,}', *shares, f'{w.only_first:,}', f'{w.only_second:,}', f'{w.p:.2g}']


def _unmatched(compared: Sequence[comparison.Compared]) -> str:
  lines = [
    f'{c.first.name}: the test splits differ. Of {len(c.first.rows):,} and {len(c.second.rows):,} examples '
    f'{len(c.pairs):,} are in both, by name and class; the others are left out.'
    for c in compared
    if any(c.unmatched)
  ]
  return ''.join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def _head_data(head: Head) -> dict[str, Any]:
  """What the script needs of a head, without its clips."""
  times = collections.Counter((row.label, row.best[0][0]) for row in head.rows)
  cells = [[*cell, count] for cell, count in times.most_common(_MOST_CELLS)]
  classes = enumerate(zip(head.examples_K, head.right_K, strict=True))
  rows = [[k, n, right, *(round(x, 4) for x in wilson(right, n))] for k, (n, right) in classes]
  views, shown = head.about_clips.get('views', 1), head.about_clips.get('shown', 1)
  said = f'The clips show view {shown} of the {views} that were judged.' if views > 1 else ''
  return {
    'name': head.name,
    'classes': head.class_names,
    'rows': rows,
    'cells': cells,
    'cells_left_out': len(times) - len(cells),
    'judged': len(head.rows),
    'views': said,
  }


class _Clip(NamedTuple):
  """A clip that may be shown: what the script must know of it, and its file."""

  data: dict[str, Any]
  path: str


def _clip(row: Row, path: str | None, other: Row | None = None) -> _Clip | None:
  if path is None:
    return None
  data = {'e': row.example, 'n': row.name, 't': row.label, 'a': row.best}
  return _Clip(data if other is None else data | {'b': other.best}, path)


def _ordered(clips: Sequence[_Clip | None]) -> list[_Clip]:
  """By what matters most where not all have room: what changed between runs, errors, the surest answers first."""
  right = lambda clip, of: clip.data[of][0][0] == clip.data['t']
  changed = lambda clip: 'b' in clip.data and right(clip, 'a') != right(clip, 'b')
  return sorted(filter(None, clips), key=lambda c: (not changed(c), right(c, 'a'), -c.data['a'][0][1]))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  head = ''.join(f'<th scope="col">{html.escape(word)}</th>' for word in header)
  body = ''.join(
    f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])}</tr>'
    for row in rows
  )
  return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curves(run: Run) -> str:
  drawn = [curves.svg(panel) for panel in curves.panels(run.metrics)]
  return f'<div class="curves">{"".join(drawn)}</div>' if drawn else '<p>There is no metrics.jsonl beside it.</p>'


def _flat(config: Mapping[str, Any], before: str = '') -> dict[str, str]:
  """{'optimizer.learning_rate': '0.001', ...}."""
  found = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      found |= _flat(value, f'{before}{key}.')
    else:
      found[f'{before}{key}'] = json.dumps(value, ensure_ascii=False)
  return dict(sorted(found.items()))


def _pre(config: Mapping[str, str]) -> str:
  text = '\n'.join(f'{key} = {value}' for key, value in config.items()) or 'There is no config.json beside it.'
  return f'<pre tabindex="0">{html.escape(text[:_MOST_CONFIG])}</pre>'


def _differences(first: Run, second: Run) -> str:
  one, other = _flat(first.config), _flat(second.config)
  keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
  rows = [[key, one.get(key, 'not set')[:2000], other.get(key, 'not set')[:2000]] for key in keys]
  return _table(['key', first.name, second.name], rows) if rows else '<p>Their configs are the same.</p>'


def _fingerprints(runs: Sequence[Run]) -> str:
  rows = []
  for run in runs:
    of = f' of {run.name}' if len(runs) > 1 else ''
    rows.append([f'parameters{of}', str(run.report.get('params_sha256', 'unknown'))])
    tested = [*run.heads, *run.several]
    rows += [[f'test examples of {head.name}{of}', head.summary['data_sha256']] for head in tested]
    if run.report.get('leaks'):
      rows.append([f'leaks{of}', leaks.sentence(run.report['leaks'])])
  return _table(['SHA-256 of', 'is'], rows)


# Putting it together.


def _rendered(parts: Mapping[str, str], data: dict[str, Any], clips: Sequence[list[_Clip]]) -> str:
  """The whole page, with as many clips as it has room for: of each head in turn, in their order."""
  style, script = asset('page.css'), asset('page.js')
  policy = f"default-src 'none'; img-src data:; style-src '{hash_of(style)}'; script-src '{hash_of(script)}'"
  parts = dict(parts) | {'style': style, 'script': script, 'policy': html.escape(policy)}
  for head in data['heads']:
    head['clips'] = []
  fill = lambda: filled(asset('page.html'), parts | {'data': _json(data)})
  room = MOST_BYTES - len(fill().encode()) - 1000
  lists = [[(head, clip) for clip in of_head] for head, of_head in zip(data['heads'], clips, strict=True)]
  for head, clip in filter(None, itertools.chain(*itertools.zip_longest(*lists))):
    shown = clip.data | {'i': _image(clip.path)}
    room -= len(_json(shown).encode()) + 1
    if room < 0:
      break
    if shown['i']:
      head['clips'].append(shown)
  return fill()


def _image(path: str) -> str:
  try:
    return base64.b64encode(paths.read(path)).decode()
  except OSError:  # another evaluation has just replaced the folder
    return ''


def _json(data: Any) -> str:
  """JSON that can stand within <script>: no '<' is left in it, and no line separator of JavaScript's."""
  text = json.dumps(data, ensure_ascii=False, separators=(',', ':'))
  text = text.encode('utf-8', 'replace').decode()
  return re.sub('[<>&\u2028\u2029]', lambda m: f'\\u{ord(m[0]):04x}', text)


def filled(template: str, parts: Mapping[str, str]) -> str:
  """A template with each {{name}} in its place."""
  # In one pass: what is filled in is not looked at again.
  return re.sub(r'\{\{(\w+)\}\}', lambda m: parts[m[1]], template)


def hash_of(text: str) -> str:
  """What a policy allows a style or script of a page by."""
  return 'sha256-' + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def asset(name: str) -> str:
  """A file of `page_files/`."""
  return (importlib.resources.files('cover_jax.evaluation') / 'page_files' / name).read_text(encoding='utf-8')
