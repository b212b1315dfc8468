"""A run whose stream mixes sources of one label a clip and of several: trained, evaluated, predicted, exported."""

import csv
import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import cover_jax
from configs import defaults
from cover_jax import checkpoints, export
from cover_jax.checkpoints.contents import check_about, check_sources, sources_of
from cover_jax.evaluation import classify, comparison, page, runs
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings, wire
from cover_jax.experiment.state import create, state_shardings
from cover_jax.jobs import frozen
from cover_jax.jobs.train import sample_predictions
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from cover_jax.training import metrics
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays
from data_pipelines.sources import label_sets, subsets
from tests import tiny

TAGS = tuple(f'tag {k}' for k in range(6))
SHAPE = (3, 16, 16, 3)


@functools.cache
def sources(seed=0):
  """One label, several (none and unlabelled among them); nobody has 'tag 5'."""
  rng = np.random.default_rng(seed)
  clips = lambda count: [rng.integers(0, 256, SHAPE, np.uint8) for _ in range(count)]
  lists = [tuple(np.flatnonzero(rng.random(5) < 0.4)) for _ in range(22)]
  lists[3], lists[4] = (), (-1,)
  whole = {'sampler': 'segments', 'test_clips': 2}
  acts = arrays.array_source('acts', clips(18), rng.integers(0, 3, 18), ('a', 'b', 'c'), **whole)
  return acts, arrays.array_source('tags', clips(22), lists, TAGS, **whole)


def build(devices, **changes):
  c = tiny.config()
  c.sources = {s.name: defaults.source(f'memory/{s.name}', sampler='segments') for s in sources()}
  c.streams = {'video': defaults.stream(('acts', 'tags'), num_frames=2, size=16)}
  c.model.update({'depth': 1, 'width': 8, 'mlp_dim': 16, 'num_frames': 2, 'drop_path': 0.0})
  c.mesh.data = devices
  c.total_steps, c.checkpoint_every, c.log_every = 4, 2, 2
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
  run = experiments.build(c, [s.info for s in sources()], batch_divisor=sharding.batch_divisor(mesh))
  return run, mesh, wire.training_batches(run, sources(), mesh), wire.test_sets(run, sources(), mesh)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(workdir, run, its parameters, its test sets, mesh) of an uninterrupted run on one device."""
  workdir = tmp_path_factory.mktemp('several')
  run, mesh, batches, tests = build(1)
  state = training.train(run, batches, str(workdir), mesh)
  return workdir, run, state, tests, mesh


def test_a_batch_is_as_it_was_said(trained):
  run, _, batches, _ = build(1)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  batch = next(batches(0))
  assert shapes(stepping.abstract_batch(run)) == shapes(dict(batch)) and batch['video']['labels'].shape == (16, 6)
  assert set(batch['video']['source']) == {0, 1}
  rows = metrics.read_jsonl(str(trained[0] / 'metrics.jsonl'))
  assert 0 < rows[0]['train/video/acts/loss'] < 2 and 0 < rows[0]['train/video/tags/loss'] < 6
  assert 0 < rows[0]['train/video/tags/top5'] <= 1  # two of six classes on average: one of them is among five


def test_eight_devices_are_one(trained):
  run, mesh, batches, tests = build(8)
  optimizer, _ = stepping.make_optimizer(run)
  state = create(run, optimizer, mesh, state_shardings(run, optimizer, mesh)[1])
  step = stepping.compile_step(run, optimizer, mesh)
  for batch in itertools.islice(batches(0), 4):
    state, _ = step(state, sharding.to_global(batch, mesh))
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
  jax.tree.map(close, jax.device_get(state.params), jax.device_get(trained[2].params))
  found = classify.make_evaluate(run, {'tags': tests['tags']}, mesh)(state.params)['tags']
  one = classify.make_evaluate(trained[1], {'tags': trained[3]['tags']}, trained[4])(trained[2].params)['tags']
  np.testing.assert_array_equal(found.example_N, one.example_N)
  np.testing.assert_array_equal(found.label_NxK, one.label_NxK)
  np.testing.assert_allclose(found.score_NxK, one.score_NxK, atol=5e-3)


def test_a_resumed_run_is_bit_equal(trained, tmp_path):
  run, mesh, batches, _ = build(1)
  asked = itertools.count(1)
  with pytest.raises(training.Preempted):
    training.train(run, batches, str(tmp_path), mesh, stop=lambda: next(asked) == 3)
  resumed = training.train(run, batches, str(tmp_path), mesh)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(trained[2].params))
  assert (tmp_path / 'metrics.jsonl').read_text() == (trained[0] / 'metrics.jsonl').read_text()


def test_evaluation_prediction_export_and_report_say_the_same(trained, tmp_path):
  workdir, run, state, tests, mesh = trained
  results = classify.make_evaluate(run, tests, mesh)(state.params)
  found, source = results['tags'], sources()[1]
  # What a user's three lines give of the same clips, view by view.
  export.export(str(workdir), str(tmp_path / 'model.flax'), 'flax')
  model = cover_jax.load(tmp_path / 'model.flax')
  logits, label, known = [], [], source.labelled_N
  for batch in tests['tags'].batches():
    views = batch['views']['clip']
    by_view = [model.run_clips(views[:, v])['probabilities']['tags'] for v in range(2)]
    logits += list(np.mean(by_view, axis=0)[batch['mask']])
    said = model.predict(views[0, 0], top=6)['tags']
    np.testing.assert_allclose([p for _, p in said], sorted(by_view[0][0], reverse=True), rtol=1e-4)
  probability = np.array(logits)[known]
  label = np.array([[k in label_sets.of(source.labels, i) for k in range(6)] for i in np.flatnonzero(known)])
  assert found.examples == 21 and found.example_N.tolist() == np.flatnonzero(known).tolist()
  np.testing.assert_array_equal(found.label_NxK, label)
  np.testing.assert_allclose(1 / (1 + np.exp(-found.score_NxK)), probability, rtol=1e-4)
  each = [average_precision_score(label[:, k], found.score_NxK[:, k]) for k in range(5)]
  summary = found.summary()
  assert summary['mAP'] == pytest.approx(np.mean(each), abs=1e-6)
  assert summary['classes_without_positives'] == ['tag 5'] and summary['protocol'].endswith('sigmoid averaged')
  entropy = -(label * np.log(probability) + ~label * np.log(1 - probability)).sum(axis=1)
  assert found.loss == pytest.approx(entropy.mean(), rel=1e-4)
  best = np.argsort(-found.score_NxK, axis=1, kind='stable')[:, :1]
  assert summary['precision_at_1'] == np.take_along_axis(label, best, axis=1).mean()

  table = classify.table(results).splitlines()
  assert table[0].split()[:9] == ['source', 'top-1', 'top-5', 'class', 'acc', 'mAP', 'P@1', 'P@5', 'chance']
  assert table[2].startswith('acts') and table[3].startswith('tags') and 'tag 5' in table[4]
  scalars = classify.scalars(results)
  assert {k.split('/')[-1] for k in scalars if '/tags/' in k} == set(settings.MEASURES['several'])
  assert {k.split('/')[-1] for k in scalars if '/acts/' in k} == set(settings.MEASURES['one'])
  classify.check_keep_best('test/tags/mAP', run, tests)
  for wrong in ('test/tags/top1', 'test/acts/mAP'):
    with pytest.raises(UserError, match=f"keep_best is '{wrong}': expected one of"):
      classify.check_keep_best(wrong, run, tests)

  folder = tmp_path / 'run' / runs.FOLDER
  classify.write_report(results, run, str(folder), about={'step': 4, 'params': 'raw'}, test_sets=tests)
  report = json.loads((folder / 'report.json').read_text())['sources']
  assert report['tags']['labels'] == 'several' and report['tags']['mAP'] == round(summary['mAP'], 6)
  assert (folder / 'precision_recall_tags.png').stat().st_size > 5000 and (folder / 'confusion_acts.png').exists()
  with open(folder / 'per_class_tags.csv', newline='') as f:
    rows = list(csv.DictReader(f))
  assert [float(r['average precision']) for r in rows[:5]] == pytest.approx(each, abs=1e-6)
  assert rows[5] == {'class': 'tag 5', 'positives': '0', 'share': '0.000000', 'average precision': ''}
  with open(folder / 'predictions_tags.csv', newline='') as f:
    lines = {int(r['example']): r for r in csv.DictReader(f)}
  assert lines.keys() == set(np.flatnonzero(known)) and lines[3]['labels'] == ''
  want = '; '.join(TAGS[k] for k in label_sets.of(source.labels, 0))
  assert lines[0]['labels'] == want and float(lines[0]['probability 1']) == pytest.approx(
    probability[0].max(), abs=1e-4
  )
  read = runs.read(str(tmp_path / 'run'))
  assert [h.name for h in read.heads] == ['acts'] and [h.name for h in read.several] == ['tags']
  html = page.of_run(read)
  assert 'Classes of tags: 6, 1 without an example, so not in mAP' in html
  compared = comparison.table_of_several(read, read)
  assert compared.startswith('tags: mAP') and 'on the same 21 examples' in compared
  assert 'tags' in page.of_run(read._replace(heads=[]))  # of several labels alone

  samples = sample_predictions(run, state.params, tests, 5)
  of_tags = [s['label'] for s in samples if s['source'] == 'tags']
  assert (
    of_tags[3] == () and of_tags[4] is None and of_tags[0] == tuple(TAGS[k] for k in label_sets.of(source.labels, 0))
  )


def test_a_checkpoint_knows_how_many_labels_and_refuses_another_data_set(trained):
  loaded = checkpoints.load(str(trained[0]))
  assert [s.labels for s in sources_of(loaded)] == ['one', 'several']
  acts, tags = (s.info for s in sources())
  check_sources(loaded, (acts, tags))
  with pytest.raises(UserError, match=r"source 'tags' has one label\(s\) an example now"):
    check_sources(loaded, (acts, tags.__class__(tags.name, tags.modality, 22, tags.class_names)))
  about = json.loads(json.dumps(loaded['about']))
  about['sources'][1]['labels'] = 'boxes'
  with pytest.raises(ValueError, match="'boxes' labels, which this version does not know"):
    check_about(about)
  assert 'labels' not in about['sources'][0]  # a file of one label is as it was
  kinds = [export.to_huggingface(loaded, head)[1].get('problem_type') for head in ('acts', 'tags')]
  assert kinds == [None, 'multi_label_classification']


def test_frozen_protocols_say_which_sources_they_leave_out(trained, capsys):
  _, run, _, tests, _ = trained
  assert list(frozen._with_one_label(run, tests)) == ['acts']
  assert 'of one label a clip: tags' in capsys.readouterr().out
  with pytest.raises(UserError, match=r'All tested sources \(tags\) have several labels'):
    frozen._with_one_label(run, {'tags': tests['tags']})


def test_a_label_that_the_head_lacks_ends_the_run(trained, tmp_path):
  run, mesh, batches, _ = build(1)

  def spoiled(start):
    for batch in batches(start):
      labels = np.concatenate([batch['video']['labels'], np.zeros((16, 1), np.int8)], axis=1)
      yield {'video': {**batch['video'], 'labels': labels}}

  with pytest.raises(training.finite.NonFiniteLoss, match='stream video is not finite at step 1'):
    training.train(run, spoiled, str(tmp_path), mesh)


def test_few_labels_are_nested_and_show_every_class():
  rng = np.random.default_rng(0)
  sets = label_sets.of_lists([(-1,) if i % 7 == 0 else tuple(np.flatnonzero(rng.random(9) < 0.1)) for i in range(200)])
  small, large = (subsets.choose_few_of_several(sets, f) for f in (0.02, 0.2))
  assert set(small) < set(large) and 3 <= len(small) <= 3 + 9 and 34 <= len(large) <= 34 + 9
  assert sets.known_N[large].all()
  assert (label_sets.counts(label_sets.select(sets, small), 9) > 0).all()
  few = subsets.few_labels(sources()[1], 0.2)
  assert few.labelled_N.all() and few.num_examples < 22


def test_a_class_that_a_mapped_head_lacks_starts_as_a_new_head_does(trained):
  workdir = trained[0]
  run, mesh, _, _ = build(1, init_from__path=str(workdir), init_from__heads__tags='tags')
  renamed = dataclasses.replace(run.sources[1], class_names=(*TAGS[:5], 'new'))
  run = dataclasses.replace(run, sources=(run.sources[0], renamed))
  optimizer, _ = stepping.make_optimizer(run)
  head = initialise.start(run, optimizer, mesh, state_shardings(run, optimizer, mesh)[1]).params['heads']['tags']
  saved = checkpoints.load(str(workdir))['state']['params']['heads']['tags']
  np.testing.assert_array_equal(head['bias'][:5], saved['bias'][:5])
  assert head['bias'][5] == pytest.approx(-np.log(5)) and not np.any(head['kernel'][:, 5])
