"""The ablation's table is that of its cells; the whole of it runs, tiny, and goes on where it stopped."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import documents
from benchmarks import vtdl as benchmark
from tests.test_main import ROOT


def cell(row, seed, top1):
  """A cell as `run_row` leaves it; every number differs."""
  return {
    'row': row,
    'seed': seed,
    'finetuned': {'0.05': {'67': top1 / 4, '133': top1 / 2, '200': top1}},
    'retrieval': {'R@1': top1 / 8, 'R@5': top1 / 3},
    'labels': [{'fraction': 0.05, 'probe': 0.01, 'knn': 0.02}, {'fraction': 1.0, 'probe': top1 / 5, 'knn': top1 / 6}],
  }


CELLS = [cell('vtdl', 0, 0.4), cell('random', 0, 0.2), cell('vtdl', 1, 0.6)]
SEMI = {'row': 'semi', 'seed': 0, 'labelled_alone': 0.5, 'semi': 0.45}


def test_table_has_mean_and_spread_of_the_seeds():
  lines = benchmark.table([*CELLS, SEMI]).splitlines()
  columns = [c.strip() for c in lines[0].strip('|').split('|')]
  rows = {line.split('|')[1].strip(): [c.strip() for c in line.strip('|').split('|')] for line in lines[2:4]}
  assert list(rows) == [benchmark.ROWS['random'][0], benchmark.ROWS['vtdl'][0]]  # in the order of the ablation
  found = dict(zip(columns, rows[benchmark.ROWS['vtdl'][0]], strict=True))
  deviation = np.std([40, 60], ddof=1)
  assert found['fine-tuned on 5%, 200 steps'] == f'50.0 ± {deviation:.1f}'
  assert found['fine-tuned on 5%, 67 steps'] == f'12.5 ± {deviation / 4:.1f}'
  assert found['R@1'] == f'6.2 ± {deviation / 8:.1f}' and found['probe, 100%'] == f'10.0 ± {deviation / 5:.1f}'
  assert found['seeds'] == '2'
  of_one = dict(zip(columns, rows[benchmark.ROWS['random'][0]], strict=True))
  assert of_one['fine-tuned on 5%, 200 steps'] == '20.0' and of_one['seeds'] == '1'  # no spread of one
  assert lines[-2:] == ['| labelled stream alone | 50.0 | 1 |', '| co-trained with VTDL on all videos | 45.0 | 1 |']


def test_the_words_around_the_table_stay(tmp_path):
  path = tmp_path / 'vtdl.md'
  path.write_text(f'# Title\n\nWhy.\n\n{documents.BEGIN}\nold\n{documents.END}\n\nAfter.\n')
  for table in ('first', 'second'):
    documents.fill(str(path), table, 'Other')
    text = path.read_text()
    assert text == f'# Title\n\nWhy.\n\n{documents.BEGIN}\n{table}\n{documents.END}\n\nAfter.\n'
  documents.fill(str(tmp_path / 'new.md'), 'table', 'Title')
  assert (tmp_path / 'new.md').read_text().startswith('# Title\n\n<!--')


def test_the_picture_is_drawn(tmp_path):
  benchmark.picture(CELLS, str(tmp_path / 'vtdl.png'))
  assert (tmp_path / 'vtdl.png').stat().st_size > 5_000


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_stopped(tmp_path):
  """pytest tests/test_benchmark_vtdl.py -m slow: a minute or two, of which nearly all is compilation."""

  def run(rows, *flags):
    command = [sys.executable, '-m', 'benchmarks.vtdl', f'--output={tmp_path}', '--quick', '--seeds=0', *flags]
    return subprocess.run([*command, f'--rows={rows}'], cwd=ROOT, capture_output=True, text=True)

  done = run('random,temporal')
  assert done.returncode == 0, done.stderr[-2000:]
  files = {path.name: path.read_bytes() for path in tmp_path.glob('*.json')}
  assert files.keys() == {'test_random_0.json', 'test_temporal_0.json'}
  temporal = json.loads(files['test_temporal_0.json'])
  assert len(temporal['finetuned']['0.05']) == 3 and len(temporal['losses']) == 3
  measured = {name.split('/')[-1] for name in temporal['measures']}
  assert measured == {'loss', 'top1', 'positive', 'queue', 'negative'}
  done = run('random,temporal,semi', f'--doc={tmp_path}/doc.md')
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'semi, seed 0' in done.stdout and 'random, seed' not in done.stdout
  assert all((tmp_path / name).read_bytes() == kept for name, kept in files.items())
  assert 'co-trained with VTDL' in (tmp_path / 'doc.md').read_text() and (tmp_path / 'doc.png').exists()
  unknown = run('all')
  assert unknown.returncode == 2 and "--rows has ['all']" in unknown.stderr
  temporal['settings']['steps'] = 7  # results of other settings are not mixed with these
  (tmp_path / 'test_temporal_0.json').write_text(json.dumps(temporal))
  mixed = run('random,temporal')
  assert mixed.returncode == 2 and 'different settings' in mixed.stderr
