"""Files of before there were several encoders and rooms (be4bf80): they load, predict as they did, and are continued.

data/before_encoders holds a checkpoint and an export of three steps of the tiny run, and what that version gave for
`CLIP` (one x86-64 core, jax 0.10.2).
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import cover_jax
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
