"""Protocols against brute force; subsets of labels; features counted once, on any number of devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from cover_jax.evaluation import classify, frozen, protocols
from cover_jax.experiment import build, state
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from data_pipelines import sources
from data_pipelines.contract import UserError
from data_pipelines.loading import arrays, views
from data_pipelines.sources import open_tfds, subsets
from tests import tiny, tiny_datasets


def clustered(seed, count=60, classes=4, width=6):
  """Features with a centre a class, and their labels."""
  rng = np.random.default_rng(seed)
  label = np.arange(count) % classes
  return rng.normal(size=(count, width)) + 2 * rng.normal(size=(classes, width))[label], label


# ---- Retrieval and neighbours.


@pytest.mark.parametrize('chunk', [3, 1024])
def test_retrieval_against_brute_force(monkeypatch, chunk):
  monkeypatch.setattr(protocols, '_CHUNK', chunk)
  gallery, of_gallery = clustered(0)
  queries, of_queries = clustered(1, count=17)
  gallery[5] *= 1000  # a long vector is not a near one
  found, cosine = protocols.neighbours(queries, gallery, 50)
  recalls = protocols.recall_at(of_gallery[found], of_queries, (1, 5, 10, 20, 50))
  hits = dict.fromkeys(recalls, 0)
  for q in range(17):  # every query counts
    similar = [float(queries[q] @ g / np.linalg.norm(queries[q]) / np.linalg.norm(g)) for g in gallery]
    order = sorted(range(60), key=lambda i: -similar[i])[:50]
    np.testing.assert_allclose(cosine[q], [similar[i] for i in order], atol=1e-6)
    for k in hits:
      hits[k] += any(of_gallery[i] == of_queries[q] for i in order[:k])
  assert recalls == {k: pytest.approx(n / 17) for k, n in hits.items()}
  values = list(recalls.values())
  assert values == sorted(values)


def test_small_galleries():
  gallery, label = clustered(0, count=7)
  found, _ = protocols.neighbours(gallery, gallery, 200)
  assert found.shape == (7, 7) and found[:, 0].tolist() == list(range(7))  # each is nearest to itself
  assert set(protocols.recall_at(label[found], label, (1, 5, 10))) == {1, 5}  # R@10 of 7 would be another thing
  zero, _ = protocols.neighbours(np.zeros((2, 6)), gallery, 3)
  assert zero.tolist() == [[0, 1, 2]] * 2


def test_knn_against_brute_force():
  gallery, of_gallery = clustered(2)
  queries, _ = clustered(3, count=9)
  found, cosine = protocols.neighbours(queries, gallery, 13)
  predicted = protocols.knn_predict(of_gallery[found], cosine, 4, 0.07)
  for q in range(9):
    votes = np.zeros(4)
    for i, c in zip(found[q], cosine[q], strict=True):
      votes[of_gallery[i]] += np.exp(float(c) / 0.07)
    assert predicted[q] == np.argmax(votes)
  # Weights matter: one near neighbour outweighs two far ones.
  assert protocols.knn_predict(np.array([[1, 0, 0]]), np.array([[0.9, 0.1, 0.1]]), 2, 0.07).tolist() == [1]


# ---- Linear probe.


def test_probe_is_ridge_regression():
  x, label = clustered(4)
  x[:, 2] = 7.0  # a feature that never changes
  (probe,) = protocols.fit_probe(x, label, 4, [0.3])
  z = (x - probe.mean_D) / probe.scale_D
  reference = Ridge(alpha=0.3 * len(x)).fit(z, np.eye(4)[label])
  np.testing.assert_allclose(probe.kernel_DxK, reference.coef_.T, atol=1e-8)
  np.testing.assert_allclose(probe.bias_K, reference.intercept_, atol=1e-8)
  assert probe.predict(x).tolist() == np.argmax(reference.predict(z), axis=1).tolist()


def test_probe_learns_and_fewer_examples_than_features_are_fine():
  x, label = clustered(5, count=200, width=12)
  (probe,) = protocols.fit_probe(x[:100], label[:100], 4, [0.01])
  assert np.mean(probe.predict(x[100:]) == label[100:]) > 0.9
  (probe,) = protocols.fit_probe(x[:4], label[:4], 4, [1e-4])
  assert np.all(np.isfinite(probe.kernel_DxK)) and probe.predict(x[:4]).tolist() == label[:4].tolist()


def test_penalty_is_chosen_on_what_is_held_out():
  rng = np.random.default_rng(6)
  x, label = clustered(6, count=40, width=30)
  x[:, 4:] = 30 * rng.normal(size=(40, 26))  # noise that a weak penalty fits
  kept, held_out = np.arange(24), np.arange(24, 40)
  penalties = (1e-4, 1e-2, 1.0, 100.0)
  chosen = protocols.choose_penalty(x, label, kept, held_out, 4, penalties)
  right = [
    np.mean(p.predict(x[held_out]) == label[held_out]) for p in protocols.fit_probe(x[kept], label[kept], 4, penalties)
  ]
  assert right[penalties.index(chosen)] == max(right)
  assert protocols.choose_penalty(x, label, kept, held_out[:0], 4, penalties) == 1.0  # nothing to choose on
  everyone_right = protocols.choose_penalty(10 * np.eye(4)[label], label, kept, held_out, 4, penalties)
  assert everyone_right == 100.0  # of equals the strongest


# ---- Few labels, held-out parts.

labels = st.lists(st.integers(-1, 4), min_size=1, max_size=80).map(np.array)


@settings(max_examples=60, deadline=None)
@given(label=labels, seed=st.integers(0, 5))
def test_few_labels_are_stratified_and_nested(label, seed):
  smaller = None
  for fraction in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0):
    chosen = subsets.choose_few(label, fraction, seed)
    assert len(set(chosen.tolist())) == len(chosen) and np.all(label[chosen] >= 0)
    assert chosen.tolist() == subsets.choose_few(label, fraction, seed).tolist()
    for k in set(label.tolist()) - {-1}:
      count = int(np.sum(label == k))
      assert np.sum(label[chosen] == k) == max(int(np.floor(fraction * count + 0.5)), 1)
    assert smaller is None or set(smaller) <= set(chosen.tolist())
    smaller = chosen.tolist()
  assert smaller == np.flatnonzero(label >= 0).tolist()


@settings(max_examples=60, deadline=None)
@given(label=labels, videos=st.integers(1, 30), fraction=st.floats(0.05, 0.9), seed=st.integers(0, 5))
def test_hold_out_cuts_no_video_in_two(label, videos, fraction, seed):
  video = np.random.default_rng(seed).integers(0, videos, len(label))
  kept, held_out = subsets.hold_out(label, video, fraction, seed)
  assert sorted([*kept, *held_out]) == np.flatnonzero(label >= 0).tolist()
  assert not set(video[kept].tolist()) & set(video[held_out].tolist())


def test_hold_out_takes_its_share_of_each_class():
  label = np.repeat(np.arange(5), 20)
  kept, held_out = subsets.hold_out(label, np.arange(100), 0.2)
  assert np.bincount(label[held_out]).tolist() == [4] * 5 and len(kept) == 80
  alone, none = subsets.hold_out(np.arange(3), np.arange(3), 0.2)  # one example a class: all of it trains
  assert alone.tolist() == [0, 1, 2] and none.tolist() == []


def test_few_labels_of_a_source():
  source = tiny.sources()[0]
  few = subsets.few_labels(source, 0.25)
  assert few.num_examples == len(subsets.choose_few(source.label, 0.25)) < source.num_examples
  assert set(few.label.tolist()) == set(source.label.tolist())
  assert subsets.few_labels(source, 1.0) is source
  unlabelled = arrays.array_source('u', [np.zeros((2, 4, 4, 3), np.uint8)])
  with pytest.raises(UserError, match='no labels'):
    subsets.few_labels(unlabelled, 0.5)
  with pytest.raises(UserError, match='label_fraction is 5'):
    subsets.few_labels(source, 5)


# ---- Features of a run.


def features_on(mesh_sizes, batch_size, **protocol):
  count = int(np.prod(mesh_sizes))
  c = tiny.config(mesh=dict(zip(sharding.AXES, mesh_sizes, strict=True)), eval_batch_size=batch_size)
  run, mesh, _, tests = tiny.build(c, jax.devices()[:count], **protocol)
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, mesh)
  encoder = state.create(run, optimizer, mesh, placed).params['encoder']
  return run, encoder, tests, frozen.encode(run, encoder, tests['acts'].batches(), mesh, 'cls')


@pytest.mark.slow
def test_features_are_means_over_views_each_example_once():
  run, encoder, tests, found = features_on((1, 1, 1), 16, test_clips=3)
  assert len(found.label_N) == 40 and found.label_N.tolist() == tiny.sources()[0].label.tolist()
  assert found.video_id_N.tolist() == list(range(40))
  batch = next(iter(tests['acts'].batches()))
  assert batch['views']['clip'].shape[1] == 3
  tokens = [np.asarray(run.encode(encoder, batch['views']['clip'][:2, v]).feature_BxD) for v in range(3)]
  np.testing.assert_allclose(found.feature_NxD[:2], np.mean(tokens, axis=0), atol=1e-5)
  many = features_on((8, 1, 1), 24, test_clips=3)[3]
  np.testing.assert_allclose(many.feature_NxD, found.feature_NxD, atol=1e-5)
  assert many.label_N.tolist() == found.label_N.tolist()


def test_features_are_cached_for_the_same_weights_and_views(tmp_path):
  run, encoder, tests, _ = features_on((1, 1, 1), 16)
  _, mesh, _, _ = tiny.build(run.config, jax.devices()[:1])
  first = frozen.cached(str(tmp_path), run, encoder, 'weights a', 'acts', tests['acts'], mesh, 'cls')
  assert len(list((tmp_path / 'features').glob('*.npz'))) == 1

  def never():
    raise AssertionError('these features are known')

  known = dataclasses.replace(tests['acts'], batches=never)
  again = frozen.cached(str(tmp_path), run, encoder, 'weights a', 'acts', known, mesh, 'cls')
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  for sha, pool in (('weights b', 'cls'), ('weights a', 'mean')):
    with pytest.raises(AssertionError, match='known'):
      frozen.cached(str(tmp_path), run, encoder, sha, 'acts', known, mesh, pool)


def keys_of(changes=None, source_changes=None, frames=None):
  """The key of the features of 'acts' in a run with changes."""
  source = dataclasses.replace(tiny.sources()[0], **(source_changes or {}))
  if frames is not None:
    source = dataclasses.replace(source, frames=frames)
  run = build.build(tiny.config(**(changes or {})), [s.info for s in tiny.sources()])
  plan = run.stream_of('acts')
  test_set = views.make_test_set(source, views.Stream((0,), plan.num_frames, plan.size, 8), iter)
  return frozen._key(run, 'weights', test_set, 'cls')


def test_features_are_known_by_all_that_they_depend_on():
  videos = tiny.sources()[0].frames
  other = [videos[0], *(v.copy() for v in videos[1:])]
  other[5][1, 2, 3, 0] ^= 1
  labels = tiny.sources()[0].label.copy()
  labels[3] = (labels[3] + 1) % 5
  known = {
    'as it is': keys_of(),
    'pixel mean': keys_of({'pixel_mean': (0.45, 0.45, 0.45)}),
    'pixel deviation': keys_of({'pixel_std': (0.225, 0.225, 0.225)}),
    'a default of the model': keys_of({'model__gelu_approximate': True}),
    'attention': keys_of({'model__attention': 'joint'}),
    'dtype': keys_of({'dtype': 'bfloat16'}),
    'frames': keys_of({'streams__video__num_frames': 2}),
    'size': keys_of({'streams__video__size': 8}),
    'share of the short side': keys_of(source_changes={'test_crop_fraction': 0.87501}),
    'nearly the same share': keys_of(source_changes={'test_crop_fraction': 0.87502}),
    'sampler': keys_of(source_changes={'sampler': 'dense'}),
    'clips': keys_of(source_changes={'test_clips': 2}),
    'one bit of a picture': keys_of(frames=other),
    'a label': keys_of(source_changes={'label': labels}),
    'the original videos': keys_of(source_changes={'video_names': np.array([b'v%d' % (i // 2) for i in range(40)])}),
  }
  assert len(set(known.values())) == len(known)
  assert keys_of(frames=[v.copy() for v in videos]) == known['as it is']


def test_stored_data_is_known_by_what_it_holds(tmp_path):
  """A data set that was built anew under the same name, with the same ids and labels."""
  contents = []
  for folder, count in (('one', 11), ('same', 11), ('other', 10)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tiny_datasets, 'num_frames', lambda video, count=count: 1 + video % count)
      tfds.builder('tiny_test_clips', data_dir=tmp_path / folder).download_and_prepare()
    config = {'dataset': 'tiny_test_clips', 'data_dir': str(tmp_path / folder)}
    whole = open_tfds.open_source('s', config | {'split': 'validation'}, 'split')
    part = open_tfds.open_source('s', config | {'split': 'validation[:50%]'}, 'split')
    contents.append((sources.fingerprint(whole), sources.content(whole), sources.content(part)))
  (shown, one, part), same, other = contents
  assert same == (shown, one, part) and other[0] == shown
  assert len({one, part, other[1], other[2]}) == 4


@pytest.mark.parametrize(
  'damage',
  [
    'cut',
    'a bit',
    *(
      pytest.param(d, marks=pytest.mark.slow)
      for d in ('empty', 'no archive', 'fewer rows', 'other width', 'an array less')
    ),
  ],
)
def test_damaged_features_are_made_again_and_that_is_said(tmp_path, damage, caplog):
  run, encoder, tests, _ = features_on((1, 1, 1), 16)
  _, mesh, _, _ = tiny.build(run.config, jax.devices()[:1])
  arguments = str(tmp_path), run, encoder, 'weights', 'acts', tests['acts'], mesh, 'cls'
  first = frozen.cached(*arguments)
  (path,) = (tmp_path / 'features').glob('*.npz')
  whole = path.read_bytes()
  arrays = first._asdict()
  if damage in ('cut', 'a bit', 'empty', 'no archive'):
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 4
    contents = {'cut': whole[:-100], 'a bit': bytes(flipped), 'empty': b'', 'no archive': b'features'}
    path.write_bytes(contents[damage])
  else:
    changed = {
      'fewer rows': {k: v[:-1] for k, v in arrays.items()},
      'other width': arrays | {'feature_NxD': first.feature_NxD[:, :-1]},
      'an array less': {k: v for k, v in arrays.items() if k != 'video_id_N'},
    }
    np.savez(path, **changed[damage])
  with caplog.at_level('WARNING'):
    again = frozen.cached(*arguments)
  assert f'{path} is damaged' in caplog.text and 'made again' in caplog.text
  jax.tree.map(np.testing.assert_array_equal, again, first)
  caplog.clear()
  frozen.cached(*arguments)
  assert not [r for r in caplog.records if r.levelname == 'WARNING']
  assert sorted(p.name for p in (tmp_path / 'features').iterdir()) == ['.lock', path.name]


@pytest.mark.slow
def test_evaluations_tell_how_far_they_are(monkeypatch, caplog, tmp_path):
  """In training, in --mode=evaluate and for frozen features: they share `classify.reported`."""
  monkeypatch.setattr(classify, 'REPORT_EVERY', 0.0)
  with caplog.at_level('INFO'):
    run, encoder, tests, _ = features_on((1, 1, 1), 16)
    _, mesh, _, _ = tiny.build(run.config, jax.devices()[:1])
    frozen.cached(str(tmp_path), run, encoder, 'weights', 'frozen', tests['acts'], mesh, 'cls')
    optimizer, _ = stepping.make_optimizer(run)
    params = state.create(run, optimizer, mesh, state.state_shardings(run, optimizer, mesh)[1]).params
    classify.make_evaluate(run, tests, mesh)(params)
  lines = [r.getMessage() for r in caplog.records]
  for name, count in (('acts', 40), ('moves', 24), ('things', 64), ('frozen', 40)):
    told = [line for line in lines if line.startswith(f'{name}: ')]
    assert [line.split(' (')[0] for line in told[:-1]] == [
      f'{name}: {min(done, count)} of {count} examples' for done in range(16, count + 16, 16)
    ]
    assert told[-1].startswith(f'{name}: all {count} examples in ')


def test_a_lost_or_doubled_example_is_an_error():
  run, encoder, tests, _ = features_on((1, 1, 1), 16)
  _, mesh, _, _ = tiny.build(run.config, jax.devices()[:1])
  batches = list(tests['acts'].batches())
  for wrong in (batches[:1] + batches[2:], [*batches, batches[0]]):
    with pytest.raises(UserError, match='once each'):
      frozen.encode(run, encoder, wrong, mesh, 'cls')


OPTIONS = {
  'recall_at': (1, 5, 50),
  'neighbours': 200,
  'temperature': 0.07,
  'label_fractions': (0.01, 0.2, 1.0),
  'held_out': 0.2,
  'penalties': (1e-3, 1e-1, 10.0),
}


def test_judge():
  x, label = clustered(7, count=120)
  train = frozen.Features(x[:80].astype(np.float32), label[:80].astype(np.int32), np.arange(80, dtype=np.int32))
  test = frozen.Features(x[80:].astype(np.float32), label[80:].astype(np.int32), np.arange(40, dtype=np.int32))
  result = frozen.judge(train, test, 4, OPTIONS)
  assert [row['examples'] for row in result['labels']] == [4, 16, 80]
  assert [row['neighbours'] for row in result['labels']] == [4, 16, 80]  # capped, and said
  assert [row['held_out'] for row in result['labels']] == [0, 4, 16]
  assert result['labels'][-1]['probe'] > 0.8 > result['chance'] == 0.25
  assert (result['gallery'], result['queries']) == (80, 40)
  # Test labels have no influence on what is fitted: with other ones the penalties are the same.
  other = frozen.judge(train, test._replace(label_N=np.zeros(40, np.int32)), 4, OPTIONS)
  assert [r['penalty'] for r in other['labels']] == [r['penalty'] for r in result['labels']]
  text = frozen.table({'acts': {**result, 'protocol': '1 clip'}})
  assert 'missing' not in text
  lacking = frozen.table({'acts': {**result, 'protocol': '1 clip', 'missing': {'train': 0, 'test': 3}}})
  assert '3 of the test split: listed' in lacking and 'train split' not in lacking
  assert 'R@1' in text and 'too few labels' in text and '20%' in text
  unlabelled = train._replace(label_N=np.full(80, -1, np.int32))
  with pytest.raises(UserError, match='no labelled'):
    frozen.judge(unlabelled, test, 4, OPTIONS)


def test_command_leaves_a_report_and_a_picture(embedded_data, tmp_path, capsys):
  """The job as the command line runs it; R@1 is computed again from the features that it keeps."""
  from configs import frozen_digits
  from cover_jax.jobs import frozen as frozen_job

  config = frozen_digits.get_config('debug')
  config.frozen.clips = 2
  frozen_job.judge_frozen(config, str(tmp_path))
  assert 'random weights' in capsys.readouterr().out
  report = json.loads((tmp_path / 'frozen' / 'report.json').read_text())
  assert report['sources']['motions']['queries'] == 320 and report['sources']['motions']['gallery'] == 560
  assert '2 clips' in report['sources']['motions']['protocol']
  assert report['sources']['motions']['missing'] == {'train': 0, 'test': 0}
  assert (tmp_path / 'frozen' / 'neighbours.png').stat().st_size > 10_000
  stored = {f.name.split('_')[1]: np.load(f) for f in (tmp_path / 'features').glob('*.npz')}
  unit = {k: f['feature_NxD'] / np.linalg.norm(f['feature_NxD'], axis=1, keepdims=True) for k, f in stored.items()}
  nearest = np.argmax(unit['test'] @ unit['train'].T, axis=1)
  r1 = np.mean(stored['train']['label_N'][nearest] == stored['test']['label_N'])
  assert report['sources']['motions']['retrieval']['R@1'] == pytest.approx(r1, abs=1 / 320)  # a tie may fall otherwise


@pytest.mark.slow
def test_commands_from_pretraining_to_few_labels(embedded_data, tmp_path):
  """VTDL, then fine-tuning on 5 % of the labels and frozen features of it, as docs/vtdl.md has them."""
  from configs import finetune_digits, frozen_digits, vtdl_digits
  from cover_jax import checkpoints
  from cover_jax.jobs import frozen as frozen_job
  from cover_jax.jobs import train as train_job

  train_job.train(vtdl_digits.get_config('debug'), str(tmp_path / 'vtdl'))
  pretrained = checkpoints.load(str(tmp_path / 'vtdl'))['state']
  assert int(pretrained['objectives']['unlabelled']['queue']['filled']) == 4 * 16
  assert not pretrained['params']['heads']
  finetune = finetune_digits.get_config('debug')
  finetune.init_from.path = str(tmp_path / 'vtdl')
  train_job.train(finetune, str(tmp_path / 'finetuned'))
  report = json.loads((tmp_path / 'finetuned' / 'evaluation' / 'report.json').read_text())
  assert report['sources']['motions']['examples'] == 320
  judged = frozen_digits.get_config('debug')
  judged.frozen.clips = 1
  hashes = []
  for name in ('vtdl', 'finetuned'):
    judged.init_from.path = str(tmp_path / name)
    frozen_job.judge_frozen(judged, str(tmp_path / f'frozen_{name}'))
    hashes.append(json.loads((tmp_path / f'frozen_{name}' / 'frozen' / 'report.json').read_text())['encoder_sha256'])
  assert len(set(hashes)) == 2


@pytest.mark.slow
def test_semi_supervised_command(embedded_data, tmp_path):
  """A labelled and an unlabelled stream train one encoder; only the labelled source is tested."""
  from configs import semi_supervised_digits
  from cover_jax.jobs import train as train_job
  from cover_jax.training import metrics

  train_job.train(semi_supervised_digits.get_config('debug'), str(tmp_path))
  (last,) = [
    row for row in metrics.read_jsonl(str(tmp_path / 'metrics.jsonl')) if row['step'] == 4 and 'train/loss' in row
  ]
  assert {'train/labelled/motions/loss', 'train/unlabelled/motions_unlabelled/negative'} <= last.keys()
  report = json.loads((tmp_path / 'evaluation' / 'report.json').read_text())
  assert list(report['sources']) == ['motions']
