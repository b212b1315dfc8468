"""What is on disk survives: half-written files, a full disk, strangers' files."""

import resource
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax import checkpoints
from data_pipelines.contract import SourceInfo, UserError

SOURCES = (SourceInfo('acts', 'video', 10, ('run', 'jump')),)


def tree(value: float, size: int = 4):
  text = checkpoints.about({'a': {'b': (1, 2)}}, SOURCES, int(value))
  return {'about': text, 'state': {'w': jnp.full(size, value)}, 'interval': {'n': np.zeros(())}}


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
    'sources': [{'name': 'acts', 'modality': 'video', 'num_examples': 10, 'class_names': ['run', 'jump']}],
  }
  np.testing.assert_array_equal(loaded['state']['w'], np.full(4, 3.0))
  assert len(list((tmp_path / checkpoints.FOLDER).glob('*.flax'))) == 2
  # A new process goes on with the numbering.
  assert checkpoints.Saver(str(tmp_path), keep=2).save(tree(4.0)).endswith('ckpt-4.flax')
  assert checkpoints.load(str(tmp_path))['about']['step'] == 4


def test_half_written_checkpoint_is_not_loaded(tmp_path):
  saver = checkpoints.Saver(str(tmp_path), keep=2)
  whole = saver.save(tree(1.0))
  # What a kill in the middle of the second save leaves.
  half = whole.replace('ckpt-1', 'ckpt-2')
  with open(whole, 'rb') as source, open(half, 'wb') as target:
    target.write(source.read()[:-7])
  assert checkpoints.latest(str(tmp_path)) == whole
  assert checkpoints.load(str(tmp_path))['about']['step'] == 1
  assert checkpoints.Saver(str(tmp_path), keep=2).save(tree(2.0)) == half
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
