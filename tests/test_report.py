"""The page of what a model gets wrong: whole, small enough, without anything of the network, safe with any name."""

import base64
import csv
import hashlib
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from cover_jax import report
from cover_jax.evaluation import answers, classify, comparison, curves, page, runs
from cover_jax.evaluation.significance import mcnemar
from data_pipelines.contract import TestSet, UserError
from tests import tiny
from tests.test_evaluate import results_with

EVIL = '</script><img src=x onerror=alert(1)>{{data}}<!--'


class Parsed(html.parser.HTMLParser):
  """The elements of a page, and the text of each kind."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.texts, self.open = [], {}, []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in ('meta', 'link', 'img', 'input'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.setdefault(self.open[-1] if self.open else '', []).append(data)

  def data(self):
    return json.loads(self.texts['script'][0])


def answers_of(label, best, probability):
  return answers.Answers(
    np.arange(len(label), dtype=np.int32), np.array(label), np.array(best), np.array(probability, np.float32)
  )


def clip(value=0, size=24):
  rng = np.random.default_rng(value)
  return rng.integers(0, 256, (4, size, size + 8, 3), np.uint8)


def set_of(count, sha='s', names=(), size=24):
  """A test set of clips that are told apart by their pixels."""

  def some(examples):
    for example in examples:
      yield {
        'views': {'clip': np.stack([clip(9, size), clip(int(example), size), clip(9, size)])[None]},
        'mask': np.array([True]),
      }

  return TestSet(lambda: iter(()), count, 0, 'by hand', sha, lambda: '', lambda: names, some)


def write_run(folder, heads, rows=(), config=None, **summary):
  """A workdir with heads {name: (class names, Answers, TestSet)}."""
  inside = folder / 'evaluation'
  inside.mkdir(parents=True)
  sources = {}
  for name, (classes, given, test) in heads.items():
    right = int(given.right_N.sum())
    sources[name] = {
      'top1': right / len(given.label_N), 'top5': 1.0, 'mean_class_accuracy': 0.5, 'loss': 1.0, 'missing': 'leave_out',
      'examples': len(given.label_N), 'expected': len(given.label_N), 'classes': len(classes), 'protocol': 'by hand',
      'chance': 1 / len(classes), 'data_sha256': test.fingerprint, 'most_confused': [],
    }  # fmt: skip
    with open(inside / f'per_class_{name}.csv', 'w', newline='') as f:
      lines = csv.writer(f)
      lines.writerow(['class', 'examples', 'correct', 'accuracy', 'most confused with'])
      for k, word in enumerate(classes):
        lines.writerow(
          [word, int((given.label_N == k).sum()), int((given.right_N & (given.label_N == k)).sum()), 0, '']
        )
    answers.write_csv(given, classes, test.names(), str(inside / f'predictions_{name}.csv'))
  answers.write_clips({n: g for n, (_, g, _) in heads.items()}, {n: t for n, (_, _, t) in heads.items()}, str(inside))
  about = {'step': 7, 'params': 'raw', 'params_sha256': 'p', 'leaks': {}, 'sources': sources}
  (inside / 'report.json').write_text(json.dumps(about))
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (folder / 'config.json').write_text(json.dumps(config or {'seed': 0}))
  return folder


LABEL, BEST = [0, 0, 0, 1, 1, 1], [[0, 1], [1, 0], [1, 0], [1, 0], [0, 1], [1, 0]]
SURE = [[0.9, 0.1], [0.6, 0.4], [0.99, 0.01], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5]]


@pytest.fixture
def evil(tmp_path):
  rows = [{'step': 0, f'test/{EVIL.replace("/", "")}/top1': 0.5}, {'step': 9, 'learning_rate': 0.1}]
  heads = {'acts': ((EVIL, 'b "&\u2028'), answers_of(LABEL, BEST, SURE), set_of(6, names=[EVIL] * 6))}
  return write_run(tmp_path / 'run', heads, rows, {'sources': {EVIL: {'dataset': EVIL}}})


def test_any_name_stays_text(evil):
  text = page.of_run(runs.read(str(evil))._replace(name=EVIL))
  parsed = Parsed(text)
  kinds = [tag for tag, _ in parsed.elements]
  assert 'img' not in kinds and kinds.count('script') == 2 and not parsed.open
  data = parsed.data()
  assert data['runs'] == [EVIL] and data['heads'][0]['classes'] == [EVIL, 'b "&\u2028']
  assert data['heads'][0]['clips'][0]['n'] == EVIL
  assert EVIL in parsed.texts['h1'] and any(EVIL in t for t in parsed.texts['pre'])
  assert any(EVIL.replace('/', '') in t for t in parsed.texts['li'])
  handlers = [a for _, attributes in parsed.elements for a in attributes if a.startswith('on') or a == 'style']
  assert not handlers


def test_nothing_is_fetched_and_only_our_script_may_run(evil):
  parsed = Parsed(page.of_run(runs.read(str(evil))))
  for _, attributes in parsed.elements:
    assert not {'src', 'srcset', 'action', 'data'} & attributes.keys()
    assert attributes.get('href', '#').startswith('#')
  policy = next(a['content'] for t, a in parsed.elements if t == 'meta' and 'http-equiv' in a)
  assert policy.startswith("default-src 'none'; img-src data:;") and 'unsafe' not in policy
  for kind, name in (('style', 'style'), ('script', 'script')):
    digest = base64.b64encode(hashlib.sha256(parsed.texts[kind][-1].encode()).digest()).decode()
    assert f"{name}-src 'sha256-{digest}'" in policy
  ids = {a['id'] for _, a in parsed.elements if 'id' in a}
  assert {a['href'][1:] for t, a in parsed.elements if t == 'a'} <= ids
  script = parsed.texts['script'][-1]
  assert set(re.findall(r"at\('([\w-]+)'\)", script)) <= ids
  assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|fetch\(|XMLHttp|https?://', script)


@pytest.mark.skipif(not shutil.which('node'), reason='without node nothing here reads JavaScript')
def test_the_script_can_be_parsed(tmp_path):
  (tmp_path / 'page.js').write_text(page.asset('page.js'))
  subprocess.run(['node', '--check', str(tmp_path / 'page.js')], check=True)


def test_the_page_tells_what_the_files_do(evil):
  data = Parsed(page.of_run(runs.read(str(evil)))).data()
  (head,) = data['heads']
  assert head['rows'] == [[0, 3, 1, 0.0615, 0.7923], [1, 3, 2, 0.2077, 0.9385]]
  assert sorted(map(tuple, head['cells'])) == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)]
  assert head['judged'] == 6 and len(head['clips']) == 6
  assert [c['e'] for c in head['clips']] == [2, 4, 1, 0, 3, 5]  # errors first, the surest of them ahead
  assert head['clips'][0]['a'] == [[1, 0.99], [0, 0.01]]
  assert 'view 2 of the 3' in head['views']
  shown = Image.open(io.BytesIO(base64.b64decode(head['clips'][0]['i'])))
  assert shown.format == 'WEBP' and shown.n_frames == 4 and shown.size == (32, 24)
  difference = [np.abs(np.asarray(shown.convert('RGB'), int) - clip(seed)[0]).mean() for seed in (2, 9)]
  assert difference[0] < 0.8 * difference[1]  # it is the middle view, of this example


def test_a_page_has_room_for_some_clips_and_says_so(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  label = rng.integers(0, 3, 40)
  best = np.stack([rng.permutation(3) for _ in label])
  given = answers_of(label, best, np.sort(rng.random((40, 3)))[:, ::-1])
  heads = {name: (('a', 'b', 'c'), given, set_of(40, size=100)) for name in ('one', 'two')}
  run = runs.read(str(write_run(tmp_path / 'run', heads)))
  whole = page.of_run(run)
  limit = len(whole.encode()) * 2 // 3
  monkeypatch.setattr(page, 'MOST_BYTES', limit)
  text = page.of_run(run)
  assert limit * 0.7 < len(text.encode()) <= limit
  counts = [len(head['clips']) for head in Parsed(text).data()['heads']]
  assert all(0 < count < 40 for count in counts) and abs(counts[0] - counts[1]) <= 1
  monkeypatch.setattr(page, 'MOST_BYTES', 1000)
  assert [head['clips'] for head in Parsed(page.of_run(run)).data()['heads']] == [[], []]


def test_kept_clips_have_a_bound(tmp_path, monkeypatch):
  monkeypatch.setattr(answers, 'MOST_BYTES', 3 * len(answers.moving(clip(1, 100))))
  heads = {'acts': (('a', 'b'), answers_of(LABEL, BEST, SURE), set_of(6, size=100))}
  run = runs.read(str(write_run(tmp_path / 'run', heads)))
  assert 1 <= len(run.heads[0].clips) < 6
  assert answers.moving(np.zeros((3, 224, 300, 3), np.uint8))
  assert Image.open(io.BytesIO(answers.moving(np.zeros((3, 224, 300, 3), np.uint8)))).size == (150, 112)
  assert Image.open(io.BytesIO(answers.moving(np.zeros((1, 32, 32, 3), np.uint8)))).size == (32, 32)


def test_chosen_are_errors_of_every_kind_and_right_ones_of_every_class():
  rng = np.random.default_rng(0)
  label = rng.integers(0, 10, 1000)
  best = np.where(rng.random(1000) < 0.8, label, rng.integers(0, 10, 1000))[:, None]
  given = answers_of(label, best, rng.random((1000, 1)))
  chosen = answers.choose(given, 100)
  assert len(chosen) == len(set(chosen)) == 100 and list(chosen) == sorted(chosen)
  wrong = chosen[~given.right_N[chosen]]
  assert len(wrong) == 50 and len({(label[i], best[i, 0]) for i in wrong}) == 50
  assert set(label[chosen[given.right_N[chosen]]]) == set(range(10))
  surest = np.flatnonzero(~given.right_N)[np.argmax(given.probability_NxM[~given.right_N, 0])]
  assert surest in chosen
  assert len(answers.choose(given, 5000)) == 1000
  few = answers_of(label, label[:, None], np.ones((1000, 1)))
  assert len(answers.choose(few, 30)) == 30  # where nothing is wrong, the right ones have all places
  assert len(answers.choose(answers_of([0], [[0]], [[1.0]]), 5)) == 1


def test_answers_are_those_of_the_model(tmp_path):
  """Of the run in arrays: what evaluation keeps is what `predict` says, and the clips are the clips."""
  run, params, tests, results = results_with((2, 2, 2), 16)
  folder = tmp_path / 'run' / 'evaluation'
  classify.write_report(results, run, str(folder), about={'step': 3}, test_sets=tests)
  read = runs.read(str(tmp_path / 'run'))
  assert [head.name for head in read.heads] == ['acts', 'moves', 'things'] and read.report['step'] == 3
  for head in read.heads:
    rows = {row.example: row for row in head.rows}
    seen = 0
    for batch in tests[head.name].batches():
      probabilities = np.asarray(classify.predict(run, params, head.name, batch['views']['clip']))
      for p_K, label, used, example in zip(
        probabilities, batch['label'], batch['mask'], batch['example_id'], strict=True
      ):
        if used:
          seen, row = seen + 1, rows[int(example)]
          order = np.argsort(-p_K, kind='stable')[:5]
          assert row.label == label and [k for k, _ in row.best] == order.tolist()
          np.testing.assert_allclose([p for _, p in row.best], p_K[order], atol=1e-4)
    assert seen == len(rows) == head.summary['examples'] == len(head.clips)
    batch = next(tests[head.name].batches())
    shown = np.asarray(Image.open(head.clips[1]).convert('RGB'), int)
    assert np.abs(shown - batch['views']['clip'][1, 0, 0]).mean() < 60  # noise, which WebP keeps badly
  sources = [s for s in tiny.sources() if s.name == 'acts']
  assert rows and len(sources[0].class_names) == len(read.heads[0].class_names)


def test_what_cannot_be_drawn_costs_no_number(tmp_path, monkeypatch):
  run, _, tests, results = results_with((1, 1, 1), 16)

  def fails(*_):
    raise ValueError('no codec')

  monkeypatch.setattr(answers, 'moving', fails)
  folder, made = tmp_path / 'run' / 'evaluation', []
  with pytest.raises(ValueError, match='no codec'):
    classify.write_report(
      results, run, str(folder), about={'step': 3}, test_sets=tests, last={'last': lambda: made.append(1)}
    )
  assert made == [1] and not (folder / 'clips').exists()
  head = runs.read(str(tmp_path / 'run')).heads[0]
  assert len(head.rows) == 40 and head.clips == {}
  assert Parsed(page.of_run(runs.read(str(tmp_path / 'run')))).data()['heads'][0]['clips'] == []


def test_clips_of_another_evaluation_are_not_shown(evil):
  path = evil / 'evaluation/report.json'
  path.write_text(path.read_text().replace('"data_sha256": "s"', '"data_sha256": "t"'))
  assert runs.read(str(evil)).heads[0].clips == {}


def test_the_command_makes_the_page_again(evil, capsys, tmp_path):
  assert report.main([str(evil)]) == 0
  assert 'index.html (0.' in capsys.readouterr().out
  assert (evil / 'evaluation/index.html').read_text() == page.of_run(runs.read(str(evil)))
  assert report.main([str(evil), f'--output={tmp_path}/nowhere/x.html']) == 2
  assert 'choose another place with --output=FILE' in capsys.readouterr().err
  assert report.main([str(tmp_path / 'none')]) == 2
  assert '--mode=evaluate` first' in capsys.readouterr().err
  (evil / 'evaluation/predictions_acts.csv').write_text('example,name,true\n')
  assert report.main([str(evil)]) == 2
  assert 'cannot be read' in capsys.readouterr().err


# Two runs.


def two(tmp_path, second_best, sha='s', names=('v0', 'v1', 'v2', 'v3', 'v4', 'v5'), other_names=None):
  classes = ('a', 'b')
  first = write_run(tmp_path / 'A', {'acts': (classes, answers_of(LABEL, BEST, SURE), set_of(6, 's', names))})
  test = set_of(6, sha, other_names or names)
  second = write_run(
    tmp_path / 'B', {'acts': (classes, answers_of(LABEL, second_best, SURE), test)}, config={'seed': 1}
  )
  return runs.read(str(first)), runs.read(str(second))


BETTER = [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]  # 1 and 2 are right now, 3 is wrong


def test_two_runs_are_compared_on_the_same_examples(tmp_path, capsys):
  first, second = two(tmp_path, BETTER)
  (compared,) = comparison.compare(first, second)
  assert compared.whole == (6, 3, 4, 1, 2, 1.0) and compared.unmatched == (0, 0)
  assert compared.of_classes[0] == (3, 1, 3, 0, 2, 1.0)  # exact p is 0.5, corrected for two classes 1
  assert compared.of_classes[1] == (3, 2, 1, 1, 0, 1.0)
  assert mcnemar(0, 2) == 0.5
  assert report.main([str(tmp_path / 'A'), str(tmp_path / 'B')]) == 0
  assert re.search(r'acts +6 +50.0% +66.7% +1 +2 +1\n', capsys.readouterr().out)
  parsed = Parsed((tmp_path / 'B/evaluation/compared_with_A.html').read_text())
  data = parsed.data()
  assert data['runs'] == ['A', 'B'] and data['heads'][0]['rows'] == [[0, 3, 1, 3, 0, 2, 1.0], [1, 3, 2, 1, 1, 0, 1.0]]
  changed = [c['e'] for c in data['heads'][0]['clips'] if (c['a'][0][0] == c['t']) != (c['b'][0][0] == c['t'])]
  assert changed == [c['e'] for c in data['heads'][0]['clips'][:3]] and set(changed) == {1, 2, 3}
  assert 'seed' in parsed.texts['th'] and {'0', '1'} <= set(parsed.texts['td'])


def test_other_splits_are_matched_by_name_and_class_with_counts(tmp_path):
  names = ('v2', 'v1', 'new', 'v4', 'v3', 'v0')  # v0 is of class a in the one and of class b in the other
  first, second = two(tmp_path, BETTER, 't', other_names=names)
  (compared,) = comparison.compare(first, second)
  assert [(a.name, a.example, b.example) for a, b in compared.pairs] == [
    ('v1', 1, 1), ('v2', 2, 0), ('v3', 3, 4), ('v4', 4, 3)
  ]  # fmt: skip
  assert compared.unmatched == (2, 2) and compared.whole.examples == 4
  assert 'of 6 and 6 examples' in comparison.table([compared], 'A', 'B')
  text = page.of_two(first, second, [compared])
  assert 'Of 6 and 6 examples 4 are in both' in text


@pytest.mark.parametrize('names', [('', '', '', '', '', ''), ('x', 'x', 'x', 'y', 'y', 'y')])
def test_other_examples_without_names_are_refused(tmp_path, names):
  first, second = two(tmp_path, BETTER, 't', names=names)
  with pytest.raises(UserError, match=r"Head 'acts' was tested on other examples in A \(6\) than in B \(6\)"):
    comparison.compare(first, second)


def test_runs_with_other_heads_or_classes_are_refused(tmp_path):
  first, second = two(tmp_path, BETTER)
  head = second.heads[0]
  with pytest.raises(UserError, match='A has the heads acts, B has other: none is in both'):
    comparison.compare(first, second._replace(heads=[head._replace(name='other')]))
  with pytest.raises(UserError, match=r"Head 'acts' has 2 classes in A and 2, which are not all the same, in B"):
    comparison.compare(first, second._replace(heads=[head._replace(class_names=('a', 'c'))]))


def test_classes_in_another_order_are_compared_by_name(tmp_path):
  first, second = two(tmp_path, BETTER)
  swap = lambda k: 1 - k
  rows = [r._replace(label=swap(r.label), best=tuple((swap(k), p) for k, p in r.best)) for r in second.heads[0].rows]
  head = second.heads[0]._replace(class_names=('b', 'a'), rows=rows, summary={'data_sha256': 'u'})
  (compared,) = comparison.compare(first, second._replace(heads=[head]))
  assert compared.whole == (6, 3, 4, 1, 2, 1.0)


# Curves.


def test_curves_have_an_axis_of_their_own():
  rows = [
    {'step': s, 'train/video/acts/loss': 3.0 - s / 500, 'train/video/acts/top1': s / 1000, 'test/acts/top1': 0.5,
     'learning_rate': 1e-3, 'train/gradient_norm': 12.0, 'train/loss': float('nan'), 'other': 'NaN'}
    for s in range(1000)
  ]  # fmt: skip
  panels = curves.panels(rows)
  assert [p.title for p in panels] == [
    'Loss in training', 'Top-1 in training', 'Top-1 on the test split', 'Learning rate', 'Norm of the gradient'
  ]  # fmt: skip
  text = curves.svg(panels[0])
  points = [tuple(map(float, p.split(','))) for p in re.search(r'points="([^"]+)"', text)[1].split()]
  assert len(points) == 300 and points[0][1] < points[-1][1] and points[0][0] < points[-1][0]  # loss falls: y grows
  assert all(0 <= x <= 460 and 0 <= y <= 240 for x, y in points)
  assert 'acts: 1.002 at step 999' in text
  assert Parsed(text).open == []


@pytest.mark.parametrize('values', [[0.0], [0.0, 0.0], [-2.0, 5.0], [1e-30, 3e-30], [1e300], [7, 7]])
def test_any_values_have_an_axis(values):
  text = curves.svg(curves.Panel('x', [curves.Line('y', list(enumerate(values)))]))
  assert 'nan' not in text and 'inf' not in text


def test_an_empty_run_has_no_curves():
  assert curves.panels([]) == [] and curves.panels([{'step': 0, 'test/a/top1': float('inf')}]) == []


def test_a_page_that_was_found_is_packaged():
  setup = (pathlib.Path(__file__).parent.parent / 'setup.py').read_text()
  folder = pathlib.Path(os.path.dirname(page.__file__)) / 'page_files'
  assert sorted(p.name for p in folder.iterdir()) == [
    'page.css',
    'page.html',
    'page.js',
    'predictions.css',
    'predictions.html',
  ]
  assert "'cover_jax.evaluation': ['page_files/*']" in setup
