"""Weights & Biases gets the curves, pictures and config of a run: by its own library offline, where it is installed."""

import importlib.util
import sys
import types

import pytest
from PIL import Image

from cover_jax.training import metrics
from data_pipelines.contract import UserError

CONFIG = {'seed': 3, 'wandb': {'project': 'mine'}}


def write_run(folder, first, steps):
  with metrics.Writer(str(folder), first_step=first, tests_again=False) as writer:
    writer.describe(CONFIG)
    for step in steps:
      writer.write(step, {'train/loss': 1 / step})


@pytest.fixture
def stand_in(monkeypatch):
  """A library that notes what it is asked for."""
  done = []
  run = types.SimpleNamespace(
    define_metric=lambda name, step_metric: done.append(('axis', name, step_metric)),
    log=lambda values: done.append(('log', values)),
    finish=lambda: done.append(('finish',)),
  )
  module = types.SimpleNamespace(
    init=lambda **how: done.append(('init', how)) or run,
    Image=lambda path: ('image', path),
  )
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return done


def test_a_run_that_goes_on_is_the_same_run(stand_in, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  write_run(folder, 0, (1, 2))
  write_run(folder, 2, (3,))
  begun = [how for what, *rest in stand_in if what == 'init' for how in rest]
  assert len(begun) == 2 and len({how['id'] for how in begun}) == 1 and {how['resume'] for how in begun} == {'allow'}
  assert begun[0]['project'] == 'mine' and begun[0]['name'] == 'run' and begun[0]['config'] == CONFIG
  logged = [values for what, *rest in stand_in if what == 'log' for values in rest]
  assert logged == [{'step': s, 'train/loss': 1 / s} for s in (1, 2, 3)]
  assert stand_in.count(('finish',)) == 2 and ('axis', '*', 'step') in stand_in
  Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
  metrics.write_pictures(str(folder), 3, {'confusion/acts': str(tmp_path / 'a.png')}, CONFIG)
  assert ('log', {'step': 3, 'confusion/acts': ('image', str(tmp_path / 'a.png'))}) in stand_in


def test_without_a_project_it_is_not_asked(stand_in, tmp_path):
  with metrics.Writer(str(tmp_path), first_step=0, tests_again=False) as writer:
    writer.describe({'wandb': {'project': ''}})
    writer.write(1, {'train/loss': 1.0})
  assert stand_in == []


def test_without_the_library_the_run_does_not_begin(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r"config.wandb.project is 'mine', and wandb is not installed.*\[wandb\]"):
    write_run(tmp_path, 0, ())


@pytest.mark.skipif(not importlib.util.find_spec('wandb'), reason='needs the extra [wandb]')
def test_its_own_library_takes_it_offline(monkeypatch, tmp_path):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  write_run(tmp_path, 0, (1, 2))
  (file,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
  assert b'train/loss' in file.read_bytes() and (tmp_path / 'wandb_run').read_text().strip() in file.name
