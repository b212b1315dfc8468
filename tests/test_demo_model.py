"""The model that comes with the package is what its table says, and is found without a path."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

import cover_jax
from benchmarks import in_memory
from cover_jax import api, predict
from cover_jax.evaluation import classify
from cover_jax.experiment import wire
from cover_jax.runtime import sharding
from data_pipelines.builders import digits_rendering as rendering
from tests.test_video_files import write

FOLDER = pathlib.Path(api.DEMO).parent
TABLE = json.loads((FOLDER / 'table.json').read_text())


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path_factory.mktemp('no_folder_of_that_name'))
    return cover_jax.load('demo')


def test_it_is_small_and_knows_its_classes(model):
  assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 3_000_000
  assert model.heads == {name: tuple(rendering.class_names(name)) for name in TABLE['top1']}
  assert model.step == 1000


@pytest.mark.parametrize('name', ['motions', *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(TABLE['top1']))])
def test_its_table_is_true(model, name):
  """To one clip, since other processors round otherwise and the weights have half precision."""
  run, mesh = (
    model.experiment,
    sharding.make_mesh(ml_collections.ConfigDict({'data': 1, 'fsdp': 1, 'tensor': 1}), jax.devices()[:1]),
  )
  source = in_memory.make_source(name, run.config.sources[name], in_memory.draw(name, 'test'))
  tests = wire.test_sets(run, [source], mesh)
  top1 = classify.make_evaluate(run, tests, mesh)(model.params)[name].top1
  assert top1 == pytest.approx(TABLE['top1'][name], abs=1.01 / source.num_examples)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'demo').mkdir()
  with pytest.raises(cover_jax.api.UserError, match='No checkpoint in demo'):
    cover_jax.load('demo')


def test_it_predicts_from_the_command_line(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  video = write(str(tmp_path / 'v.mp4'), count=20, fps=10)
  assert predict.main(['demo', video, '--heads=motions', '--output=out']) == 0
  (entry,) = json.loads((tmp_path / 'out/predictions.json').read_text())['files']
  assert entry['top']['motions'][0][0] in rendering.MOTIONS and 'motions' in capsys.readouterr().out


@pytest.mark.slow
def test_what_it_sees_matters(model):
  """Each of two test clips that are each other's reverse gets its own class."""
  right = [
    model.predict(np.asarray(rendering.render('motions', 'test', i).frames))['motions'][0][0]
    == rendering.MOTIONS[rendering.render('motions', 'test', i).label]
    for i in range(16)
  ]
  assert sum(right) >= 11
