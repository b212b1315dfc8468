"""What is on disk survives: half-written files, a full disk, strangers' files."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax import checkpoints
from cover_jax.checkpoints import clu_file, orbax_folder
from cover_jax.runtime import sharding
from data_pipelines.contract import SourceInfo, UserError

SOURCES = (SourceInfo('acts', 'video', 10, ('run', 'jump')),)


def tree(value: float, size: int = 4):
  text = checkpoints.about({'a': {'b': (1, 2)}}, SOURCES, int(value))
  return {'about': text, 'state': {'params': {'w': jnp.full(size, float(value))}}, 'interval': {'n': np.zeros(())}}


def test_round_trip(tmp_path):
  saver = checkpoints.Saver(str(tmp_path), keep=2)
  assert checkpoints.latest(str(tmp_path)) is None
  for value in (1.0, 2.0, 3.0):
    path = saver.save(tree(value))
    assert checkpoints.latest(str(tmp_path)) == path
  loaded = checkpoints.load(str(tmp_path))
  assert loaded['about'] == {
    'step': 3,
    'config': {'a': {'b': [1, 2]}},
    'sources': [{'name': 'acts', 'modality': 'video', 'num_examples': 10, 'class_names': ['run', 'jump'], 'fps': 0.0}],
  }
  np.testing.assert_array_equal(loaded['state']['params']['w'], np.full(4, 3.0))
  assert len(list((tmp_path / checkpoints.FOLDER).glob('*.flax'))) == 2
  # A new process goes on with the numbering.
  assert checkpoints.Saver(str(tmp_path), keep=2).save(tree(4.0)).endswith('ckpt-4.flax')
  assert checkpoints.load(str(tmp_path))['about']['step'] == 4


def test_half_written_checkpoint_is_not_loaded(tmp_path):
  saver = checkpoints.Saver(str(tmp_path), keep=2)
  whole = saver.save(tree(1.0))
  # As a kill in the middle of the second save left it before files got their names when they were whole.
  half = whole.replace('ckpt-1', 'ckpt-2')
  with open(whole, 'rb') as source, open(half, 'wb') as target:
    target.write(source.read()[:-7])
  assert checkpoints.latest(str(tmp_path)) == whole
  assert checkpoints.load(str(tmp_path))['about']['step'] == 1
  saved = checkpoints.Saver(str(tmp_path), keep=2).save(tree(2.0))
  assert saved == whole.replace('ckpt-1', 'ckpt-3')
  assert checkpoints.load(str(tmp_path))['about']['step'] == 2


def test_full_disk_leaves_the_previous_one_whole(tmp_path):
  saver = checkpoints.Saver(str(tmp_path), keep=2)
  whole = saver.save(tree(1.0))
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails as on a full disk
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    with pytest.raises(UserError, match=r'Could not save.*ckpt-1\.flax') as error:
      saver.save(tree(2.0, size=1 << 16))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
  assert '\n' not in str(error.value)
  assert checkpoints.load(str(tmp_path))['path'] == whole
  assert not list((tmp_path / checkpoints.FOLDER).glob('ckpt-2*'))  # the room is given back
  saver.save(tree(3.0))
  assert checkpoints.load(str(tmp_path))['about']['step'] == 3


@pytest.mark.parametrize('content', [b'', b'not msgpack', b'\x81\xa1a\x01'])
def test_strange_file_is_one_sentence(tmp_path, content):
  path = tmp_path / 'ckpt-1.flax'
  path.write_bytes(content)
  with pytest.raises(UserError, match='not a readable checkpoint') as error:
    checkpoints.load(str(path))
  assert '\n' not in str(error.value)


def test_fit_names_a_parameter_before_the_optimizer(tmp_path):
  checkpoints.Saver(str(tmp_path), keep=2).save(
    tree(1.0) | {'state': {'opt_state': {'w': np.zeros(2)}, 'params': {'w': np.zeros(2)}}}
  )
  loaded = checkpoints.load(str(tmp_path))
  template = {'opt_state': {'w': np.zeros(3)}, 'params': {'w': np.zeros(3)}}
  with pytest.raises(UserError, match=r'params/w is shape \(2,\)'):
    checkpoints.fit(loaded, loaded['state'], template)


KINDS = [clu_file, orbax_folder]


@pytest.fixture(params=['clu', 'orbax'])
def make_saver(request, monkeypatch):
  """Makes savers of either kind in this one process."""
  monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: KINDS if request.param == 'clu' else KINDS[::-1])
  return checkpoints.Saver


@pytest.fixture
def make_orbax_saver(monkeypatch):
  monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: KINDS[::-1])
  return checkpoints.Saver


def nested(value: float, mesh_sizes=(1, 1, 1), spec=()):
  """A tree as training saves it, with dicts without arrays, on a mesh."""
  count = int(np.prod(mesh_sizes))
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, mesh_sizes, strict=True)), jax.devices()[:count])
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  array = jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, placed)
  state = {
    'params': {'w': array},
    'ema': {},
    'opt_state': ({}, {'count': sharding.put(np.int32(value), sharding.replicated(mesh))}),
  }
  return tree(value) | {'state': state, 'interval': {}}, placed


def of_kind(path):
  return 'orbax' if os.path.isdir(path) else 'clu'


def test_both_kinds_load_alike(make_saver, tmp_path):
  saver = make_saver(str(tmp_path), keep=2)
  for value in (1.0, 2.0, 3.0):
    path = saver.save(nested(value, (2, 2, 2), (('data', 'fsdp'), 'tensor'))[0])
  saver.wait()
  assert checkpoints.latest(str(tmp_path)) == path == checkpoints.latest(path)
  assert checkpoints.describe(str(tmp_path))['about'] == checkpoints.load(path)['about']
  for where in (str(tmp_path), path, str(tmp_path / checkpoints.FOLDER)):
    loaded = checkpoints.load(where)
    assert loaded['about']['step'] == 3 and loaded['path'] == path
    arrays = checkpoints.flatten(loaded['state'])
    assert sorted(arrays) == ['opt_state/1/count', 'params/w']
    assert all(isinstance(a, np.ndarray) for a in arrays.values())
    np.testing.assert_array_equal(arrays['params/w'], np.arange(64.0).reshape(8, 8) + 3)
  assert (
    len([p for p in (tmp_path / checkpoints.FOLDER).glob('ckpt*') if of_kind(p) == 'orbax' or p.suffix == '.flax']) == 2
  )


@pytest.mark.parametrize(
  ('mesh', 'spec'), [((1, 1, 1), ()), ((2, 2, 2), ('tensor', ('data', 'fsdp'))), ((1, 8, 1), ('fsdp',))]
)
def test_restore_on_another_mesh(make_saver, tmp_path, mesh, spec):
  saver = make_saver(str(tmp_path), keep=2)
  saver.save(nested(1.0, (8, 1, 1), ('data',))[0])
  saver.wait()
  like, placed = nested(0.0, mesh, spec)
  template = {key: jax.tree.map(jnp.zeros_like, like[key]) for key in ('state', 'interval')}
  where = jax.tree.map(lambda x: x.sharding, {key: like[key] for key in ('state', 'interval')})
  restored = checkpoints.restore(str(tmp_path), template, where, SOURCES)
  assert restored['state']['params']['w'].sharding == placed
  assert isinstance(restored['state']['opt_state'], tuple) and restored['state']['ema'] == {}
  np.testing.assert_array_equal(restored['state']['params']['w'], np.arange(64.0).reshape(8, 8) + 1)
  template['state']['params']['w'] = jnp.zeros((8, 4))
  with pytest.raises(UserError, match=r'params/w is shape \(8, 8\) in the checkpoint and shape \(8, 4\)'):
    checkpoints.restore(str(tmp_path), template, where, SOURCES)


def test_kept_by_name(make_saver, tmp_path):
  saver = make_saver(str(tmp_path), keep=1)
  value_of = lambda name: checkpoints.load(str(tmp_path / checkpoints.FOLDER / name))['about']['step']
  top1 = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.6, 6: 0.1}
  for step, value in top1.items():
    saver.save(tree(step))
    if step % 2 == 0:
      saver.keep(f'step-{step}')
    saver.keep_if_best('test/acts/top1', value, step)
    best = max(list(top1)[:step], key=lambda s: (top1[s], -s))
    assert value_of('best') == best
  assert [value_of(f'step-{s}') for s in (2, 4, 6)] == [2, 4, 6]
  assert checkpoints.load(str(tmp_path))['about']['step'] == 6
  record = json.loads((tmp_path / checkpoints.FOLDER / 'best.json').read_text())
  assert record == {'metric': 'test/acts/top1', 'value': 0.6, 'step': 5}
  make_saver(str(tmp_path), keep=1).keep_if_best('test/acts/loss', 9.0, 6)  # another metric starts afresh
  assert value_of('best') == 6
  for value, best in ((9.5, 6), (8.0, 8)):
    saver.save(tree(best + (value > 9)))
    saver.keep_if_best('test/acts/loss', value, best)
    assert value_of('best') == best


def test_runs_of_either_kind_continue_each_other(tmp_path, monkeypatch):
  step = 0
  for chosen in (KINDS, KINDS[::-1], KINDS, KINDS[::-1]):
    monkeypatch.setattr(checkpoints.saver, '_kinds', lambda chosen=chosen: chosen)
    saver = checkpoints.Saver(str(tmp_path), keep=2)
    for _ in range(3):
      step += 1
      saver.save(tree(step))
      saver.wait()
      assert checkpoints.load(str(tmp_path))['about']['step'] == step
    saver.keep('best')
    assert checkpoints.load(str(tmp_path / checkpoints.FOLDER / 'best'))['about']['step'] == step
  left = sorted(os.listdir(tmp_path / checkpoints.FOLDER))
  assert left == ['best', 'ckpt_11', 'ckpt_12']  # nothing of the other kind, nothing half-written


def test_half_written_folder_is_not_loaded(make_orbax_saver, tmp_path):
  """Orbax writes into a folder of another name; a folder whose parts lack is none of ours."""
  saver = make_orbax_saver(str(tmp_path), keep=2)
  whole = saver.save(tree(1.0))
  saver.wait()
  shutil.copytree(whole, whole.replace('ckpt_1', 'ckpt_2.orbax-checkpoint-tmp'))
  half = pathlib.Path(whole.replace('ckpt_1', 'ckpt_3'))
  shutil.copytree(whole, half)
  shutil.rmtree(half / 'arrays')
  assert checkpoints.latest(str(tmp_path)) == whole
  shutil.rmtree(half)
  saver = make_orbax_saver(str(tmp_path), keep=2)
  saver.save(tree(2.0))
  saver.wait()
  assert checkpoints.load(str(tmp_path))['about']['step'] == 2
  damaged = half.parent / 'ckpt_2'
  (damaged / 'arrays' / 'manifest.ocdbt').write_bytes(b'?')
  with pytest.raises(UserError, match='not a readable checkpoint') as error:
    checkpoints.load(str(damaged))
  assert '\n' not in str(error.value)


def test_full_disk_in_the_background_leaves_the_previous_one_whole(make_orbax_saver, tmp_path):
  saver = make_orbax_saver(str(tmp_path), keep=2)
  whole = saver.save(tree(1.0))
  saver.wait()
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  noise = {'w': jnp.asarray(np.random.default_rng(0).normal(size=1 << 16))}  # does not compress
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    with pytest.raises(UserError, match=r'Could not save.*ckpt_1') as error:
      saver.save(tree(2.0) | {'state': {'params': noise}})
      saver.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
  assert '\n' not in str(error.value)
  assert checkpoints.load(str(tmp_path))['path'] == whole
  again = make_orbax_saver(str(tmp_path), keep=2)
  again.save(tree(3.0))
  again.wait()
  assert checkpoints.load(str(tmp_path))['about']['step'] == 3
  assert not list((tmp_path / checkpoints.FOLDER).glob('*tmp*'))


def test_reading_needs_no_tensorflow(make_saver, tmp_path):
  saver = make_saver(str(tmp_path), keep=2)
  saver.save(tree(1.0))
  saver.wait()
  code = (
    f'import sys; from cover_jax import checkpoints; loaded = checkpoints.load({str(tmp_path)!r}); '
    "print(loaded['state']['params']['w'].sum()); assert 'tensorflow' not in sys.modules"
  )
  done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
  assert done.stdout == '4.0\n'
