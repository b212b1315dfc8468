"""Evaluation counts each example once, whatever the batch size and the devices, and its numbers are right."""

import csv
import json
import pathlib

import jax
import matplotlib.axes
import numpy as np
import pytest
from PIL import Image

from cover_jax.evaluation import classify, visualise
from cover_jax.experiment import build, state
from cover_jax.jobs import train as train_job
from cover_jax.training import step as stepping
from data_pipelines.contract import SourceInfo
from tests import tiny


def results_with(mesh, batch_size, eval_missing='leave_out', **protocol):
  count = int(np.prod(list(mesh)))
  sizes = dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True))
  config = tiny.config(mesh=sizes, eval_batch_size=batch_size, eval_missing=eval_missing)
  run, devices, _, tests = tiny.build(config, jax.devices()[:count], **protocol)
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, devices)
  params = state.create(run, optimizer, devices, placed).params
  # Zero heads say nothing; random ones do.
  key = jax.random.key(1)
  heads = {n: {k: jax.random.normal(key, v.shape) for k, v in h.items()} for n, h in params['heads'].items()}
  params = {**params, 'heads': jax.device_put(heads, placed.params['heads'])}
  return run, params, tests, classify.make_evaluate(run, tests, devices)(params)


@pytest.fixture(scope='module')
def reference():
  return results_with((1, 1, 1), 16)


def test_against_numpy(reference):
  run, params, tests, results = reference
  for name, source in zip(('acts', 'moves', 'things'), tiny.sources(), strict=True):
    seen, right, top5, loss = [], 0, 0, 0.0
    for batch in tests[name].batches():
      probabilities = np.asarray(classify.predict(run, params, name, batch['views']['clip']), np.float64)
      for p_K, label, used, example in zip(
        probabilities, batch['label'], batch['mask'], batch['example_id'], strict=True
      ):
        if used:
          seen.append(example)
          order = np.argsort(-p_K, kind='stable')
          right += order[0] == label
          top5 += label in order[:5]
          loss -= np.log(p_K[label])
    assert sorted(seen) == list(range(source.num_examples))
    result = results[name]
    assert result.examples == source.num_examples == result.confusion_KxK.sum()
    assert result.top1 == pytest.approx(right / len(seen))
    assert result.top5 == pytest.approx(top5 / len(seen))
    assert result.loss == pytest.approx(loss / len(seen), rel=1e-4)
    assert np.array_equal(
      result.confusion_KxK.sum(axis=1), np.bincount(source.label, minlength=len(source.class_names))
    )


@pytest.mark.parametrize(
  ('mesh', 'batch_size'),
  [
    pytest.param((1, 1, 1), 7, marks=pytest.mark.slow),
    pytest.param((8, 1, 1), 24, marks=pytest.mark.slow),
    ((2, 2, 2), 16),
  ],
)
def test_batch_size_and_devices_do_not_matter(reference, mesh, batch_size):
  expected = reference[3]
  for name, result in results_with(mesh, batch_size)[3].items():
    assert np.array_equal(result.confusion_KxK, expected[name].confusion_KxK)
    assert result.loss == pytest.approx(expected[name].loss, rel=1e-5)


MANY_VIEWS = {'test_clips': 3, 'test_crops': 3, 'crop_scale': (0.5, 1.0), 'test_crop_fraction': 0.75}


@pytest.fixture(scope='module')
def of_many_views():
  return results_with((1, 1, 1), 36, **MANY_VIEWS)


@pytest.mark.parametrize('mesh', [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_every_source_is_traced_once(mesh, monkeypatch):
  traced = []
  whole = classify._log_probabilities
  monkeypatch.setattr(
    classify, '_log_probabilities', lambda run, name, *args: traced.append(name) or whole(run, name, *args)
  )
  _, _, tests, _ = results_with(mesh, 8)
  assert all(len(list(test.batches())) > 1 for test in tests.values())
  assert sorted(traced) == sorted(tests)


def test_views_are_averaged_as_probabilities(of_many_views, reference):
  run, params, tests, results = of_many_views
  batch = next(tests['acts'].batches())
  assert batch['views']['clip'].shape == (4, 9, 4, 16, 16, 3)  # 36 clips at once
  view_by_view = [classify.predict(run, params, 'acts', batch['views']['clip'][:, v : v + 1]) for v in range(9)]
  assert np.ptp(view_by_view, axis=0).max() > 1e-3
  averaged = classify.predict(run, params, 'acts', batch['views']['clip'])
  np.testing.assert_allclose(averaged, np.mean(view_by_view, axis=0), rtol=1e-4)
  assert results['acts'].protocol == (
    '3 clips x 3 crops, 4 frames, one a segment, 16x16 of 0.75 of the short side, softmax averaged'
  )
  assert results['things'].protocol == '1 clip x 1 crop, 1 frame, 16x16'
  assert results['acts'].examples == 40 and results['acts'].loss != reference[3]['acts'].loss
  loss = [-np.log(np.asarray(classify.predict(run, params, 'acts', b['views']['clip']))[np.arange(4), b['label']])
          for b in tests['acts'].batches()]  # fmt: skip
  assert results['acts'].loss == pytest.approx(np.mean(loss), rel=1e-4)  # 40 examples: no padding


@pytest.mark.parametrize(
  ('mesh', 'batch_size'),
  [
    pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
    ((8, 1, 1), 8),
    pytest.param((4, 2, 1), 96, marks=pytest.mark.slow),
  ],
)
def test_batch_size_and_devices_do_not_matter_with_many_views(of_many_views, mesh, batch_size):
  """Also where all views of a step are more clips than may be encoded at once."""
  for name, result in results_with(mesh, batch_size, **MANY_VIEWS)[3].items():
    assert np.array_equal(result.confusion_KxK, of_many_views[3][name].confusion_KxK)
    assert result.top5_correct == of_many_views[3][name].top5_correct
    assert result.loss == pytest.approx(of_many_views[3][name].loss, rel=1e-5)


def test_missing_examples_are_counted():
  confusion = np.array([[6, 1, 1], [2, 4, 0], [0, 1, 5]])
  out, wrong = (classify.SourceResult(confusion, 0.5, 18, 'p', 5, missing_wrong) for missing_wrong in (False, True))
  assert (out.examples, out.expected, wrong.expected) == (20, 25, 25)
  assert (out.top1, out.top5, wrong.top1, wrong.top5) == (0.75, 0.9, 0.6, 0.72)
  assert out.summary()['mean_class_accuracy'] == wrong.summary()['mean_class_accuracy']
  assert (out.summary()['missing'], wrong.summary()['missing']) == ('leave_out', 'wrong')
  table = classify.table({'a': out, 'b': wrong})
  assert '20 of 25 (the missing left out)' in table and '20 of 25 (the missing wrong)' in table
  large = classify.SourceResult(np.array([[19761]]), 0.5, 19761, 'p', 35)
  assert '19,761 of 19,796' in classify.table({'kinetics': large})
  assert ' of ' not in classify.table({'a': classify.SourceResult(confusion, 0.5, 18, 'p')})


def test_expected_travels_from_the_source_to_the_report():
  results = results_with((1, 1, 1), 16, eval_missing='wrong', expected=50)[3]
  assert (results['acts'].examples, results['acts'].expected) == (40, 50)
  assert (results['things'].examples, results['things'].expected) == (64, 64)
  assert results['acts'].top1 == np.trace(results['acts'].confusion_KxK) / 50


def test_two_reports_differ_only_in_what_differs(reference, tmp_path):
  run, params, _, results = reference
  about = {'step': 3, 'params': 'raw', 'params_sha256': classify.params_sha256(jax.device_get(params))}
  texts = []
  for folder in ('one', 'another'):
    path = classify.write_report(dict(reversed(results.items())), run, str(tmp_path / folder), about=about)
    texts.append(pathlib.Path(path).read_text())
    results = dict(reversed(results.items()))
  assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
  other = {**params, 'heads': jax.tree.map(lambda x: x + 1e-6, params['heads'])}
  assert classify.params_sha256(jax.device_get(other)) != about['params_sha256']
  same = {k: params[k] for k in reversed(params)}
  assert classify.params_sha256(jax.device_get(same)) == about['params_sha256']


def test_most_confused_pairs():
  confusion = np.array([[9, 3, 0], [1, 7, 0], [0, 5, 2]])
  assert classify.most_confused(confusion) == [(2, 1, 5), (0, 1, 3), (1, 0, 1)]
  assert classify.most_confused(confusion, 1) == [(2, 1, 5)]
  assert classify.most_confused(np.eye(3, dtype=int)) == []


@pytest.mark.parametrize('classes', [3, 400])
def test_confusion_picture(classes, tmp_path):
  rng = np.random.default_rng(0)
  confusion = np.diag(rng.integers(20, 50, classes)) + (rng.random((classes, classes)) < 0.002) * 9
  names = [f'a class with quite a long name, number {k}' for k in range(classes)]
  for count, kind in ((20, 'some'), (0, 'none')):  # without confusions there is no enlarged part
    path = tmp_path / f'{kind}.png'
    visualise.confusion_matrix(confusion, names, classify.most_confused(confusion, count), 'title', str(path))
    width, height = Image.open(path).size
    assert 300 < height < 2000 and 600 < width < 4000


def test_report_files(reference, tmp_path):
  run, _, _, results = reference
  path = classify.write_report(results, run, str(tmp_path), about={'step': 3})
  report = json.loads(pathlib.Path(path).read_text())
  assert report['step'] == 3
  assert report['sources']['acts']['examples'] == 40
  assert report['sources']['acts']['protocol'] == '1 clip x 1 crop, 4 frames, one a segment, 16x16'
  with open(tmp_path / 'per_class_acts.csv', newline='', encoding='utf-8') as f:
    rows = list(csv.DictReader(f))
  assert [row['class'] for row in rows] == list(tiny.sources()[0].class_names)
  assert sum(int(row['examples']) for row in rows) == 40
  assert sum(int(row['correct']) for row in rows) == np.trace(results['acts'].confusion_KxK)
  worst = report['sources']['acts']['most_confused'][0]
  assert worst['times'] == classify.most_confused(results['acts'].confusion_KxK)[0][2] and 0 < worst['share'] <= 1
  assert (tmp_path / 'confusion_acts.png').read_bytes()[:4] == b'\x89PNG'
  for line, name in zip(classify.table(results).splitlines()[2:], results, strict=True):
    assert line.startswith(name)


def test_class_without_examples_is_not_a_zero():
  result = classify.SourceResult(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), 0.5, 6, '')
  np.testing.assert_allclose(result.class_accuracy_K, [0.75, 1.0, np.nan])
  assert result.summary()['mean_class_accuracy'] == pytest.approx(0.875)
  assert result.top1 == pytest.approx(5 / 6)


def test_temperature_and_explicit_weights_reach_the_run():
  config = tiny.config(mixture__temperature=float('inf'))
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  run = build.build(config, infos)
  assert run.weights == pytest.approx(dict.fromkeys(('acts', 'moves', 'things'), 1 / 3))
  assert run.streams['image'].loss_weight == pytest.approx(1 / 3)


def test_samples_are_errors_and_right_answers_with_the_clips_that_were_judged(reference, tmp_path, monkeypatch):
  run, _, tests, results = reference
  samples = train_job.sample_predictions(run, results, tests, most=4)
  assert [s['source'] for s in samples] == [name for name in results for _ in range(4)]
  clips = {}
  for name, test in tests.items():
    for batch in test.batches():
      shown = zip(batch['example_id'], batch['views']['clip'], strict=True)
      clips |= {(name, int(e)): views[len(views) // 2] for e, views in shown}
  for name, result in results.items():
    given, classes = result.answers, run.sources[run.source_id(name)].class_names
    mine = [s for s in samples if s['source'] == name]
    errors = sum(s['predicted'][0][0] != s['label'] for s in mine)
    wrong = int((~given.right_N).sum())
    assert errors == min(wrong, max(2, 4 - int(given.right_N.sum())))
    for sample in mine:
      (row,) = [r for r, e in enumerate(given.example_N) if np.array_equal(clips[name, int(e)], sample['clip'])]
      assert classes[given.label_N[row]] == sample['label']
      assert classes[given.best_NxM[row, 0]] == sample['predicted'][0][0]
  written = []
  text = matplotlib.axes.Axes.text
  monkeypatch.setattr(
    matplotlib.axes.Axes,
    'text',
    lambda self, x, y, s, **how: written.append((s, how['color'])) or text(self, x, y, s, **how),
  )
  visualise.predictions(samples, str(tmp_path / 'predictions.png'))
  assert len(written) == len(samples)
  for sample, (said, colour) in zip(samples, written, strict=True):
    right = sample['predicted'][0][0] == sample['label']
    assert said.startswith(f'{sample["source"]}: {sample["label"]}\n{"✓" if right else "✗"} ')
    assert colour == ('darkgreen' if right else 'firebrick')


def test_strips_are_packed_side_by_side_where_they_have_room():
  assert visualise._packed([1, 1, 1, 8, 1, 4]) == [[(0, 0), (4, 1)], [(0, 2)], [(0, 3)], [(0, 4), (4, 5)]]
