"""Files of before there were several encoders and rooms (be4bf80): they load, predict as they did, and are continued.

data/before_encoders holds a checkpoint and an export of three steps of the tiny run, and what that version gave for
`CLIP` (one x86-64 core, jax 0.10.2).
"""

import json
import pathlib
import shutil

import flax.serialization
import jax
import numpy as np
import pytest

import cover_jax
from cover_jax import checkpoints
from cover_jax.checkpoints import orbax_folder
from cover_jax.jobs import resume
from cover_jax.training import loop as training
from cover_jax.training import step as stepping
from tests import tiny

DATA = pathlib.Path(__file__).parent / 'data' / 'before_encoders'
CLIP = (np.arange(4 * 16 * 16 * 3) * 37 % 251).reshape(4, 16, 16, 3).astype(np.uint8)
CHANGES = {'total_steps': 3, 'log_every': 1, 'optimizer__learning_rate': 0.05, 'model__drop_path': 0.0}


@pytest.fixture
def workdir(tmp_path):
  shutil.copytree(DATA / 'checkpoints', tmp_path / 'checkpoints')
  return str(tmp_path)


@pytest.mark.parametrize('kind', ['checkpoint', 'export'])
def test_predicts_as_it_did(workdir, kind):
  model = cover_jax.load(workdir if kind == 'checkpoint' else str(DATA / 'model.flax'))
  expected = json.loads((DATA / 'expected.json').read_text())
  found = model.predict(CLIP)
  assert found.keys() == expected['predictions'].keys()
  for head, ranking in expected['predictions'].items():
    assert [name for name, _ in found[head]] == [name for name, _ in ranking]
    np.testing.assert_allclose([p for _, p in found[head]], [p for _, p in ranking], atol=1e-5)
  np.testing.assert_allclose(model.encode(CLIP).feature_BxD.ravel()[:8], expected['feature'], atol=1e-5)


def test_is_continued(workdir):
  config = tiny.config(**CHANGES | {'total_steps': 5})
  resume.check(workdir, config.to_dict())
  run, mesh, _, _ = tiny.build(config, jax.devices()[:1])
  optimizer, _ = stepping.make_optimizer(run)
  state, _, _ = training.start_state(run, optimizer, mesh, workdir)
  assert int(state.step) == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def start_state(workdir, **changes):
  """What a run goes on from in a folder, with these changes to its config: (its state, its experiment)."""
  config = tiny.config(**CHANGES | {'total_steps': 5} | changes)
  resume.check(workdir, config.to_dict())
  run, mesh, _, _ = tiny.build(config, jax.devices()[:1])
  optimizer, _ = stepping.make_optimizer(run)
  state, _, _ = training.start_state(run, optimizer, mesh, workdir)
  return state, run


def saved_again(kind, workdir, folder):
  """A folder of the same checkpoint, as one process or as several write it; or of the version that is tested."""
  if kind == 'named':
    state, run = start_state(workdir)
    tree = {'about': checkpoints.about(run.config.to_dict(), run.sources, 3), 'state': state, 'interval': {}}
    checkpoints.Saver(str(folder), 1).save(tree)
  else:
    loaded = checkpoints.load(workdir)
    (folder / checkpoints.FOLDER).mkdir(parents=True)
    saver = orbax_folder.Saver(str(folder / checkpoints.FOLDER), 1)
    saver.save({'about': json.dumps(loaded['about']), 'state': loaded['state'], 'interval': loaded['interval']})
    saver.wait()
  return str(folder)


@pytest.mark.parametrize(
  ('kind', 'clip_norm', 'weight_decay'),
  [('clu', 1.0, 0.01), ('clu', 0.0, 0.0), ('orbax', 0.0, 0.01), ('named', 0.0, 0.0)],
)
def test_is_continued_with_other_parts_of_the_optimizer(workdir, tmp_path, kind, clip_norm, weight_decay):
  """Its moments, which had a position in a chain once, are taken whatever stands beside them now."""
  expected = checkpoints.flatten(checkpoints.load(workdir)['state']['opt_state'])
  where = workdir if kind == 'clu' else saved_again(kind, workdir, tmp_path / 'again')
  changes = {'optimizer__clip_norm': clip_norm, 'optimizer__weight_decay': weight_decay}
  state, _ = start_state(where, **changes)
  found = checkpoints.flatten(flax.serialization.to_state_dict(state.opt_state))
  assert {name.partition('/')[0] for name in found} == {'scale', 'rate'}
  by_end = {name.partition('/')[2]: value for name, value in expected.items() if name != '4/count'}
  assert len(by_end) == len(found) - 1 and int(found.pop('rate/count')) == int(expected['4/count']) == 3
  for name, value in found.items():
    np.testing.assert_array_equal(value, by_end[name.removeprefix('scale/')], err_msg=name)
