"""The study of CoVeR's claims: what is run when, what is kept, and the statistics."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from benchmarks import claims, claims_report, claims_runs, claims_study, documents, in_memory
from benchmarks.claims_study import Cell, Study
from configs.claims_digits import VIDEOS
from data_pipelines.contract import UserError


def study(**changes) -> Study:
  runs = claims_runs.study(20, 4, whole=True)
  return dataclasses.replace(Study(runs, (0, 1), (100, 101), (0.1, 0.2)), **changes)


def line(study: Study, cell: Cell) -> dict:
  """A made-up result: the higher rate is better for co-trained runs, the lower one for the others."""
  rng = np.random.default_rng(hash((cell.run, cell.seed)) % 2**32)
  run = study.runs[cell.run]
  good = cell.learning_rate == (0.2 if len(run.sources) > 1 else 0.1)
  top1 = {source: 0.4 + 0.3 * good + 0.05 * rng.random() for source in run.sources}
  examples = {source: round(1000 * run.shares[source]) for source in run.sources}
  split = 'test' if cell.seed in study.seeds else 'validation'
  return {
    **dataclasses.asdict(cell),
    'examples': examples,
    split: top1,
    'loss': {'video': 0.5},
    'seconds': 1.0,
    'device': 'cpu',
  }


def run_all(study: Study, folder, results=None) -> tuple[dict, list[Cell]]:
  """Runs all cells with made-up results, one after the other, and leaves the files of the weights."""
  results, order = {} if results is None else results, []
  (folder / 'weights').mkdir(exist_ok=True)
  while cells := claims_study.ready(study, results, str(folder)):
    cell = cells[0]
    start = claims_study.start_cell(study, cell)
    if start is not None:
      with open(claims_study.weights_path(str(folder), study, start)) as f:
        assert f.read() == f'{start}'
    with open(claims_study.weights_path(str(folder), study, cell), 'w') as f:
      f.write(f'{cell}')
    results[cell] = line(study, cell)
    order.append(cell)
  return results, order


@pytest.mark.slow
def test_every_arm_is_searched_alike_and_run_with_its_best_rate(tmp_path):
  s = study()
  results, order = run_all(s, tmp_path)
  assert len(order) == len(set(order)) == len(results)
  searched = {name for name, run in s.runs.items() if not run.rate_of}
  for name, run in s.runs.items():
    search = [c for c in order if c.run == name and c.seed in s.search_seeds]
    final = [c for c in order if c.run == name and c.seed in s.seeds]
    assert len(search) == (6 if name in searched else 0)  # one rate beyond the end of the grid where the best was
    assert sorted(c.seed for c in final) == [0, 1]
    best = 0.2 if len(run.sources) > 1 else 0.1
    assert {c.learning_rate for c in final} == {best}
    if run.start:
      best = 0.2 if len(s.runs[run.start].sources) > 1 else 0.1
      assert {c.start_rate for c in (*search, *final)} == {best}
  assert all(claims._split(s, c) == ('test' if c.seed in s.seeds else 'validation') for c in order)
  assert s.left(results) == pytest.approx(0)
  assert s.whole(results) == pytest.approx(sum(s.runs[c.run].cost for c in order))
  assert s.left({}) == s.whole({}) < s.whole(results)


@pytest.mark.parametrize(
  'best, tried', [(0.2, {0.1, 0.2, 0.4}), (0.05, {0.025, 0.05, 0.1, 0.2, 0.4}), (0.0, {0.025, 0.05, 0.1, 0.2, 0.4})]
)
def test_the_search_leaves_the_grid_where_its_best_is_at_the_end(best, tried):
  s = study(learning_rates=(0.1, 0.2, 0.4))
  results = {}
  while s.rate('videos', results) is None:
    cell = next(c for c in s.cells(results) if c.run == 'videos' and c not in results)
    results[cell] = {**line(s, cell), 'validation': dict.fromkeys(VIDEOS, 1 - abs(cell.learning_rate - best))}
  assert {c.learning_rate for c in results} == tried
  assert s.rate('videos', results) == max(best, 0.025)


@pytest.mark.slow
def test_weights_that_were_deleted_are_made_again(tmp_path):
  s = study()
  results, _ = run_all(s, tmp_path)
  gone = next(c for c in results if c.run == 'videos>motions' and c.seed == 1)
  start = claims_study.start_cell(s, gone)
  assert start in results and start.run == 'videos'
  del results[gone]
  (tmp_path / 'weights' / claims_study.weights_path('', s, start).split('/')[-1]).unlink()
  assert claims_study.ready(s, results, str(tmp_path)) == [start]


def test_the_file_of_cells_survives_a_kill_and_refuses_changed_runs(tmp_path):
  path, s = str(tmp_path / 'cells.jsonl'), study()
  row = lambda cell: {**line(s, cell), 'fingerprint': s.fingerprints[cell.run]}
  cell = Cell('seeded_videos', 0, 0.1, 0.1)
  claims_study.append(path, row(cell))
  with open(path, 'a') as f:
    f.write('{"run": "vid')  # a kill in the middle of a line
  assert list(claims_study.read(path, s)) == [cell]
  other = Cell('uniform', 1, 0.1, None)
  claims_study.append(path, row(other))
  assert list(claims_study.read(path, s)) == [cell, other]
  more = {**s.runs, 'new': claims_runs.Run('new', VIDEOS, 3)}
  # Another arm leaves what is done as it is.
  assert list(claims_study.read(path, dataclasses.replace(s, runs=more))) == [cell, other]
  longer = dataclasses.replace(s.runs['first_stage'], steps=21)  # the start of one of the two
  with pytest.raises(UserError, match="line 1 is of a run 'seeded_videos' with other settings"):
    claims_study.read(path, dataclasses.replace(s, runs={**s.runs, 'first_stage': longer}))
  with pytest.raises(UserError, match="line 2 is of a run 'uniform'"):
    claims_study.read(path, dataclasses.replace(s, runs={n: run for n, run in s.runs.items() if n != 'uniform'}))


def test_a_remedy_changes_all_arms_alike():
  runs = claims_runs.study(600, 60, whole=True)
  for name in ('alone_long/objects', 'alone_long/motions', 'alone_long/moments', 'videos', 'videos_images'):
    plain, cropped, longer = runs[name], runs[f'crops/{name}'], runs[f'longer/crops/{name}']
    config, changed = plain.config(1e-3), cropped.config(1e-3)
    assert config.optimizer.warmup_steps == 50
    config.optimizer.warmup_steps = 100
    assert config.to_dict() == runs[f'warmup/{name}'].config(1e-3).to_dict()
    assert all(source.crop_scale == (0.6, 1.0) for source in changed.sources.values())
    for source in config.sources.values():
      source.crop_scale = (0.6, 1.0)
    assert config.to_dict() == changed.to_dict()
    assert longer.rate_of == cropped.name and longer.steps == 3 * plain.steps
    config.total_steps *= 3
    assert longer.config(1e-3).to_dict() == config.to_dict()
  assert runs['crops/videos>motions'].start == 'crops/videos'
  assert runs['crops/seeded_videos'].start == runs['longer/crops/seeded_videos'].start == 'first_stage'


def test_difference_is_the_paired_t_interval():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0.5, 0.1, 5), rng.normal(0.3, 0.1, 5)
  d = claims_report.difference(dict(enumerate(a)), {**dict(enumerate(b)), 7: 0.9})
  low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
  np.testing.assert_allclose((d.mean - d.half, d.mean + d.half), (low, high))
  assert d.pairs == 5
  verdict = lambda *values: claims_report.difference(dict(enumerate(values)), dict.fromkeys(range(5), 0.0)).verdict
  assert verdict(0.1, 0.11, 0.12) == 'better' and verdict(-0.1, -0.11, -0.12) == 'worse'
  assert verdict(-0.1, 0.2, 0.1) == 'open' and verdict(0.1) == 'open'


@pytest.mark.slow
def test_report_fills_the_document_and_keeps_its_words(tmp_path):
  s = study()
  results, _ = run_all(s, tmp_path)
  final = [row for cell, row in results.items() if cell.seed in s.seeds]
  doc = tmp_path / 'claims.md'
  doc.write_text(f'# Words\n\n{documents.BEGIN}\nold\n{documents.END}\n\nMore words.\n')
  text = claims_report.write(str(tmp_path / 'claims'), str(doc), final, {'videos': 0.2}, list(results.values()), 0.4)
  written = doc.read_text()
  assert 'not finished: 40%' in written
  assert written.startswith('# Words\n') and written.endswith('\nMore words.\n') and 'old' not in written
  assert text in written and (tmp_path / 'claims.png').stat().st_size > 10_000
  accuracy = claims_report.accuracies(final)
  expected = claims_report.difference(accuracy('videos', 'motions'), accuracy('alone/motions', 'motions'))
  row = next(row for row in text.split('\n') if row.startswith('| co-trained on videos - alone, as many passes'))
  assert str(expected) in row
  sizes = [size for size, _ in claims_report.points(final, 'objects', 'crops/alone_long')]
  shares = (claims_runs.SHARES['objects'], *claims_runs.sweep_shares('objects'))
  assert sizes == sorted(round(1000 * share) for share in shares)
  # "It transfers", by hand: the mean over all A and B of each seed, then the interval over seeds.
  top1 = lambda run, b, seed: accuracy(f'crops/{run}>{b}', b)[seed]
  of = lambda seed: [
    top1('videos', b, seed) - top1(f'alone_long/{a}', b, seed) for a in VIDEOS for b in VIDEOS if a != b
  ]
  d = claims_report.difference({seed: np.mean(of(seed)) for seed in s.seeds}, dict.fromkeys(s.seeds, 0.0))
  rows = {row.split(' | ')[0]: row.split(' | ') for row in text.split('\n')}
  assert rows['| it transfers: videos, then B - A, then B (A not B)'][3] == str(d)
  longer, plain = accuracy('longer/crops/seeded_videos', 'mean'), accuracy('longer/crops/videos', 'mean')
  last = rows['| the first stage helps: videos with it - without'][4]
  assert last == f'{claims_report.difference(longer, plain)} |'
  # --quick has no such runs, and no section for them.
  short = [row for row in final if not row['run'].startswith('longer/')]
  quick = claims_report.write(str(tmp_path / 'quick'), '', short, {}, short, 1.0)
  assert '### What was tried: 3 x' in text and '### What was tried: 3 x' not in quick


def test_arms_see_the_target_as_often_or_train_as_long():
  runs = claims_runs.study(700, 150, whole=False)
  for source in VIDEOS:
    assert runs[f'alone_long/{source}'].steps == runs['videos'].steps == runs['videos_images'].steps
  assert sum(runs[f'alone/{source}'].steps for source in VIDEOS) == pytest.approx(700, abs=len(VIDEOS))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one_source_a_step', 'seeded_videos_images'])
def test_a_run_trains_from_its_start_and_is_judged(tmp_path, name, monkeypatch):
  monkeypatch.setattr(claims, '_drawn', lambda source, split: _few(source, split))
  runs = claims_runs.study(2, 1, whole=False)
  small = {'model.width': 16, 'model.num_heads': 2, 'model.mlp_dim': 16, 'model.depth': 1, 'model.scan_unroll': 1}
  runs = {n: dataclasses.replace(r, changes={**r.changes, **small}) for n, r in runs.items()}
  start = ''
  if runs[name].start:
    start = str(tmp_path / 'start.flax')
    claims.train_cell(runs[runs[name].start], Cell('first_stage', 0, 1e-3, None), '', start, 'validation')
  row = claims.train_cell(runs[name], Cell(name, 0, 1e-3, 1e-3), start, '', 'test')
  assert set(row['test']) == set(runs[name].sources) and 'validation' not in row
  assert np.isfinite(list(row['loss'].values())).all() and row['steps'] == 2
  assert json.loads(json.dumps(row)) == row


def test_a_search_that_diverges_loses_and_a_run_that_counts_says_so(monkeypatch):
  monkeypatch.setattr(claims, '_drawn', lambda source, split: _few(source, split))

  def diverge(*args):
    raise in_memory.Diverged('A loss was not finite')

  monkeypatch.setattr(in_memory, 'train', diverge)
  run = claims_runs.study(2, 1, whole=False)['alone/objects']
  row = claims.train_cell(run, Cell(run.name, 100, 1.0, None), '', '', 'validation')
  assert row['validation'] == {'objects': 0.0} and row['loss'] is None
  with pytest.raises(in_memory.Diverged):
    claims.train_cell(run, Cell(run.name, 0, 1.0, None), '', '', 'test')


@pytest.mark.slow
def test_runs_are_repeated_on_the_test_split_and_ideas_tried_on_the_other(tmp_path, monkeypatch, capsys):
  s = study(search_seeds=(100,))
  results, _ = run_all(s, tmp_path)
  trained = []

  def train(run, cell, start, keep, split):
    trained.append((run.name, cell.seed, cell.learning_rate, start, keep, split, run.changes.get('model.width')))
    return {split: dict.fromkeys(run.sources, 0.5)}

  monkeypatch.setattr(claims, 'train_cell', train)
  claims.again(s, results, ['videos>motions'], {}, str(tmp_path))
  files = [t[4] for t in trained[::2]]
  assert [t[:2] + t[5:] for t in trained] == [
    (name, seed, split, None)
    for seed in (0, 1)
    for name, split in (('videos', 'validation'), ('videos>motions', 'test'))
  ]
  assert [t[3] for t in trained[1::2]] == files and len(set(files)) == 2
  assert {t[2] for t in trained} == {s.rate('videos', results), s.rate('videos>motions', results)}
  of_seed = lambda seed: next(
    100 * r['test']['motions'] for c, r in results.items() if (c.run, c.seed) == ('videos>motions', seed)
  )
  said = capsys.readouterr().out.splitlines()
  both = f'{of_seed(0):.1f}, {of_seed(1):.1f}'
  assert said[1] == f'videos>motions, motions, seed 1: test 50.0; recorded: {of_seed(1):.1f}, of all seeds {both}'
  trained.clear()
  claims.again(s, results, ['videos>motions'], {'model.width': 16}, str(tmp_path))
  assert [t[:2] + t[5:] for t in trained] == [
    ('videos', 100, 'validation', 16),
    ('videos>motions', 100, 'validation', 16),
  ]
  for names, changes, message in (
    (['vidoes'], {}, 'has vidoes: expected some of'),
    (['videos'], {'modle.width': 16}, 'does not fit the config of videos'),
    (['videos'], {'model.width': 'wide'}, 'does not fit the config of videos'),
  ):
    with pytest.raises(UserError, match=message):
      claims.again(s, results, names, changes, str(tmp_path))
  with pytest.raises(UserError, match='whose search is not over'):
    claims.again(s, {}, ['videos'], {}, str(tmp_path))


def _few(source, split):
  return in_memory.draw(source, split, 90)
