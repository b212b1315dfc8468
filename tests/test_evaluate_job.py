"""`--mode=evaluate` needs a checkpoint and the test splits; no training data, no optimizer, no batches of training."""

import json
import os
import re

import flax.serialization
import jax
import numpy as np
import pytest

from configs import digits_cover
from cover_jax import checkpoints
from cover_jax.checkpoints import orbax_folder
from cover_jax.evaluation import frozen
from cover_jax.experiment import state
from cover_jax.jobs import evaluate as evaluate_job
from cover_jax.jobs import frozen as frozen_job
from cover_jax.jobs import train as train_job
from cover_jax.runtime import sharding
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from data_pipelines.sources import open_tfds
from tests import tiny


def config_of(**changes):
  config = digits_cover.get_config('debug')
  del config.sources['objects'], config.sources['moments']
  config.streams.video.sources = ('motions',)
  config.total_steps, config.batch_size, config.ema_decay = 2, 16, 0.5
  with config.unlocked():
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return config


@pytest.fixture(scope='module')
def trained(embedded_data, tmp_path_factory):
  """(workdir, the report that training ended with)."""
  workdir = str(tmp_path_factory.mktemp('trained'))
  train_job.train(config_of(), workdir)
  return workdir, report_of(workdir)


def report_of(workdir):
  with open(os.path.join(workdir, 'evaluation', 'report.json'), encoding='utf-8') as f:
    return json.load(f)


def test_without_training_data(trained, monkeypatch, caplog):
  """The training splits are gone; the report says so, and is otherwise what training ended with."""
  workdir, before = trained
  open_source, opened = open_tfds.open_source, []

  def without_training(name, config, split_key):
    opened.append(split_key)
    if split_key == 'train':
      raise UserError('It is not here.')
    return open_source(name, config, split_key)

  monkeypatch.setattr(open_tfds, 'open_source', without_training)
  with caplog.at_level('WARNING'):
    evaluate_job.evaluate(config_of(sources__motions__train='gone'), workdir)
  (line,) = [r.getMessage() for r in caplog.records if 'cannot be compared' in r.getMessage()]
  assert re.search(r': (motions, digits|digits, motions) of .*; why not (motions|digits): It is not here\.$', line)
  report = report_of(workdir)
  assert report['params_sha256'] == before['params_sha256'] and report['step'] == before['step'] == 2
  for name, result in before['sources'].items():
    same = ('top1', 'top5', 'examples', 'mean_class_accuracy', 'data_sha256', 'protocol')
    assert {k: report['sources'][name][k] for k in same} == {k: result[k] for k in same}
  assert opened.count('test') == 2 and len(report['leaks']['not_compared']) == 2
  assert before['leaks']['not_compared'] != report['leaks']['not_compared']


def test_on_devices_that_training_could_not_use(trained):
  """Of the eight devices here, no batch of training is a multiple; the optimizer is another one, too."""
  workdir, before = trained
  evaluate_job.evaluate(
    config_of(batch_size=12, batch_multiple=2, accumulation_steps=2, optimizer__name='lion'), workdir
  )
  assert report_of(workdir)['sources']['motions']['top1'] == before['sources']['motions']['top1']
  with pytest.raises(UserError, match='eval_batch_size = 12 cannot be divided over 8 devices'):
    evaluate_job.evaluate(config_of(eval_batch_size=12), workdir)


def test_averaged_parameters(trained):
  workdir, before = trained
  evaluate_job.evaluate(config_of(eval_params='ema'), workdir)
  assert report_of(workdir)['params_sha256'] != before['params_sha256']


def test_test_splits_of_other_classes_and_none(trained, monkeypatch):
  workdir, _ = trained
  with pytest.raises(UserError, match='nothing to evaluate'):
    evaluate_job.evaluate(config_of(sources__motions__test='', sources__digits__test=''), workdir)
  with pytest.raises(UserError, match=r"source 'motions' has \d+ classes now but its head in .* has \d+"):
    evaluate_job.evaluate(config_of(sources__motions__dataset='moving_digits/objects'), workdir)
  config = config_of()
  with config.unlocked():
    config.sources.other = config.sources.motions
  config.streams.video.sources = ('motions', 'other')
  with pytest.raises(UserError, match=r"has no head for the source 'other': it was trained on .*digits.*motions"):
    evaluate_job.evaluate(config, workdir)


@pytest.mark.parametrize('kind', ['one process', 'several'])
@pytest.mark.parametrize('which', ['raw', 'ema'])
def test_only_parameters_are_read_and_placed(tmp_path, monkeypatch, kind, which):
  run, mesh, _, _ = tiny.build(tiny.config())
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, mesh)
  whole = state.create(run, optimizer, mesh, placed)
  whole = whole.replace(ema=jax.tree.map(lambda x: x + 1, whole.params))
  tree = {'about': checkpoints.about(run.config.to_dict(), run.sources, 0), 'state': whole, 'interval': {}}
  if kind == 'several':
    monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: (orbax_folder, checkpoints.clu_file))
  saver = checkpoints.Saver(str(tmp_path), 1)
  path = saver.save(tree)
  saver.wait()
  assert os.path.isdir(path) == (kind == 'several')
  read, put = [], []
  restore, place = orbax_folder._restore, sharding.put
  monkeypatch.setattr(orbax_folder, '_restore', lambda p, tree, *a: read.append(tree) or restore(p, tree, *a))
  monkeypatch.setattr(sharding, 'put', lambda tree, *a: put.append(tree) or place(tree, *a))
  template, where = state.params_shardings(run, mesh)
  found = checkpoints.restore_params(str(tmp_path), which, template, where)
  expected = whole.params if which == 'raw' else whole.ema
  jax.tree.map(np.testing.assert_array_equal, found['params'], expected)
  assert jax.tree.map(lambda x: x.sharding, found['params']) == where
  part = 'params' if which == 'raw' else 'ema'
  if kind == 'several':
    assert [set(tree['state']) for tree in read] == [{part}] and not put
  else:
    names = lambda tree: set(checkpoints.flatten(flax.serialization.to_state_dict(tree)))
    assert [names(tree) for tree in put] == [names(expected)] and not read


def test_a_fault_while_drawing_costs_no_number_of_frozen_features(trained, monkeypatch, capsys):
  workdir, _ = trained
  rng = np.random.default_rng(0)
  features = frozen.Features(
    rng.normal(size=(40, 8)).astype(np.float32), np.arange(40, dtype=np.int32) % 4, np.arange(40, dtype=np.int32)
  )
  monkeypatch.setattr(frozen, 'cached', lambda *_: features)

  def fails(*_):
    raise ValueError('Parse error')

  monkeypatch.setattr(frozen_job, '_nearest', fails)
  with pytest.raises(ValueError, match='Parse error'):
    frozen_job.judge_frozen(config_of(frozen__penalties=(1.0,), frozen__label_fractions=(1.0,)), workdir)
  with open(os.path.join(workdir, 'frozen', 'report.json'), encoding='utf-8') as f:
    assert set(json.load(f)['sources']) == {'digits', 'motions'}
  out = capsys.readouterr().out
  assert 'digits' in out and 'motions' in out and 'report.json' in out
