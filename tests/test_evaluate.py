"""Evaluation counts each example once, whatever the batch size and the devices, and its numbers are right."""

import csv
import json
import pathlib

import jax
import numpy as np
import pytest

from cover_jax import evaluate, experiment, state
from cover_jax import train as training
from data_pipelines.contract import SourceInfo
from tests import tiny


def results_with(mesh, batch_size):
  count = int(np.prod(list(mesh)))
  config = tiny.config(mesh=dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True)), eval_batch_size=batch_size)
  run, devices, _, tests = tiny.build(config, jax.devices()[:count])
  optimizer, _ = training.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, devices)
  params = state.create(run, optimizer, devices, placed).params
  # Zero heads say nothing; random ones do.
  key = jax.random.key(1)
  heads = {n: {k: jax.random.normal(key, v.shape) for k, v in h.items()} for n, h in params['heads'].items()}
  params = {**params, 'heads': jax.device_put(heads, placed.params['heads'])}
  return run, params, tests, evaluate.make_evaluate(run, tests, devices)(params)


@pytest.fixture(scope='module')
def reference():
  return results_with((1, 1, 1), 16)


def test_against_numpy(reference):
  run, params, tests, results = reference
  for name, source in zip(('acts', 'moves', 'things'), tiny.sources(), strict=True):
    seen, right, top5, loss = [], 0, 0, 0.0
    for batch in tests[name]():
      probabilities = np.asarray(evaluate.predict(run, params, name, batch['clip']), np.float64)
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


@pytest.mark.parametrize(('mesh', 'batch_size'), [((1, 1, 1), 7), ((8, 1, 1), 24), ((2, 2, 2), 16)])
def test_batch_size_and_devices_do_not_matter(reference, mesh, batch_size):
  expected = reference[3]
  for name, result in results_with(mesh, batch_size)[3].items():
    assert np.array_equal(result.confusion_KxK, expected[name].confusion_KxK)
    assert result.loss == pytest.approx(expected[name].loss, rel=1e-5)


def test_report_files(reference, tmp_path):
  run, _, _, results = reference
  path = evaluate.write_report(results, run, str(tmp_path), about={'step': 3})
  report = json.loads(pathlib.Path(path).read_text())
  assert report['step'] == 3
  assert report['sources']['acts']['examples'] == 40
  assert 'frames' in report['sources']['acts']['protocol']
  with open(tmp_path / 'per_class_acts.csv', newline='', encoding='utf-8') as f:
    rows = list(csv.DictReader(f))
  assert [row['class'] for row in rows] == list(tiny.sources()[0].class_names)
  assert sum(int(row['examples']) for row in rows) == 40
  assert sum(int(row['correct']) for row in rows) == np.trace(results['acts'].confusion_KxK)
  assert (tmp_path / 'confusion_acts.png').read_bytes()[:4] == b'\x89PNG'
  for line, name in zip(evaluate.table(results).splitlines()[2:], results, strict=True):
    assert line.startswith(name)


def test_class_without_examples_is_not_a_zero():
  result = evaluate.SourceResult(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), 0.5, 1.0, '')
  np.testing.assert_allclose(result.class_accuracy_K, [0.75, 1.0, np.nan])
  assert result.summary()['mean_class_accuracy'] == pytest.approx(0.875)
  assert result.top1 == pytest.approx(5 / 6)


def test_temperature_and_explicit_weights_reach_the_run():
  config = tiny.config(mixture__temperature=float('inf'))
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  run = experiment.build(config, infos)
  assert run.weights == pytest.approx(dict.fromkeys(('acts', 'moves', 'things'), 1 / 3))
  assert run.streams['image'].loss_weight == pytest.approx(1 / 3)
