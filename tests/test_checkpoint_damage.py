"""Checkpoints that are damaged, strange or lost in part: noticed, said, and never a reason to start anew in silence."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import random
import shutil

import flax.serialization
import jax
import msgpack
import numpy as np
import pytest

from cover_jax import checkpoints
from cover_jax.checkpoints import clu_file, orbax_folder
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from cover_jax.training import metrics
from data_pipelines import durable
from data_pipelines.contract import UserError
from tests import tiny
from tests.test_checkpoints import KINDS, SOURCES, nested
from tests.test_processes import finish, free_port, spawn

DATA = pathlib.Path(__file__).parent / 'data'


@pytest.fixture(params=['clu', 'orbax'])
def make_saver(request, monkeypatch):
  """Makes savers of either kind in this one process."""
  monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: KINDS if request.param == 'clu' else KINDS[::-1])
  return checkpoints.Saver


def tree(step, **parts):
  """A tree of a run of one parameter whose numbers do not compress, as those of a trained model do not."""
  noise = np.random.default_rng(step).normal(size=(8, 16)).astype(np.float32)
  state = {'step': np.int32(step), 'params': {'w': noise}, 'ema': {}, 'opt_state': {'m': noise}}
  about = checkpoints.about({'a': {'b': (1, 2)}}, SOURCES, step)
  return {'about': about, 'state': state, 'interval': {'n': np.float32(step)}} | parts


def save(make_saver, workdir, *steps, keep=3):
  """Saves these steps; the paths of the checkpoints."""
  saver, paths = make_saver(str(workdir), keep), []
  for step in steps:
    paths.append(saver.save(tree(step)))
    saver.wait()
  return paths


def content(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in pathlib.Path(folder).rglob('*') if p.is_file()}


def step_of(path):
  return checkpoints.load(str(path))['about']['step']


@functools.cache
def replicated():
  return sharding.replicated(sharding.make_mesh(tiny.config().mesh))


def restore(workdir):
  like = {'state': tree(0)['state'], 'interval': tree(0)['interval']}
  where = jax.tree.map(lambda _: replicated(), like)
  return checkpoints.restore(str(workdir), like, where, SOURCES)


# How a newest checkpoint may be damaged: what becomes of the bytes of its (largest) file.
DAMAGE = {
  'cut off': lambda data: data[:-7],
  'empty': lambda data: b'',
  'bytes too many': lambda data: data + b'\0',
  'a flipped bit': lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
}


def damage(path, how):
  files = [p for p in pathlib.Path(path).rglob('*') if p.is_file()] or [pathlib.Path(path)]
  file = max((f for f in files if f.name != 'sha256.json'), key=lambda f: f.stat().st_size)
  file.write_bytes(DAMAGE[how](file.read_bytes()))


@pytest.mark.parametrize('how', DAMAGE)
def test_the_newest_whole_checkpoint_is_gone_on_from_and_the_damaged_one_put_aside(make_saver, tmp_path, caplog, how):
  *_, before, newest = save(make_saver, tmp_path, 1, 2, 3)
  damage(newest, how)
  with pytest.raises(UserError, match='not a readable checkpoint'):
    checkpoints.load(newest)  # it is asked for itself
  for read in (checkpoints.load, restore):
    assert os.path.exists(newest)
    caplog.clear()
    found = read(str(tmp_path))
    assert found['path'] == before and found['about']['step'] == 2
    assert newest in caplog.text and f'Taking {before} instead' in caplog.text
  assert int(found['state']['step']) == 2
  assert f'{newest} is now {newest}.refused' in caplog.text and not os.path.exists(newest)
  saver = make_saver(str(tmp_path), 2)
  assert checkpoints.latest(str(tmp_path)) == before
  saver.save(tree(3))
  saver.wait()
  assert np.array_equal(checkpoints.load(str(tmp_path))['state']['params']['w'], tree(3)['state']['params']['w'])
  saver.save(tree(4))
  saver.wait()
  assert step_of(tmp_path) == 4 and os.path.exists(newest + '.refused')
  kept = clu_file.kept(str(tmp_path / 'checkpoints')) + orbax_folder.kept(str(tmp_path / 'checkpoints'))
  assert [step_of(path) for path in kept] == [4, 3]


@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error'), PermissionError(13, 'no'), MemoryError()])
def test_a_machine_that_cannot_read_is_no_reason_to_go_back(make_saver, tmp_path, monkeypatch, error):
  save(make_saver, tmp_path, 1, 2)
  before = content(tmp_path)

  def fails(path):
    raise error

  monkeypatch.setattr(clu_file, 'read', fails)
  monkeypatch.setattr(orbax_folder, 'check', fails)
  for read in (checkpoints.load, restore):
    with pytest.raises(UserError, match='try again'):
      read(str(tmp_path))
  assert content(tmp_path) == before


def test_where_none_is_whole_nothing_is_started_anew_and_nothing_touched(make_saver, tmp_path):
  for path in save(make_saver, tmp_path, 1, 2):
    damage(path, 'a flipped bit')
  before = content(tmp_path)
  for read in (checkpoints.load, restore):
    with pytest.raises(UserError, match=r'no other checkpoint in .* is whole') as error:
      read(str(tmp_path))
    assert '\n' not in str(error.value)
  assert content(tmp_path) == before


def test_a_kept_checkpoint_is_gone_on_from_where_no_other_is_whole(make_saver, tmp_path, monkeypatch):
  (path,) = save(make_saver, tmp_path, 2)
  monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError()))  # a file system without links
  kept = make_saver(str(tmp_path), 3).keep('step-2')
  damage(path, 'cut off')
  assert checkpoints.load(str(tmp_path))['path'] == kept == restore(tmp_path)['path']
  assert checkpoints.latest(str(tmp_path)) == kept


POINTERS = {
  'missing': None,
  'empty': b'',
  'NUL bytes': bytes(64),
  'not UTF-8': b'model_checkpoint_path: "\xff\xfe"\n',
  'a checkpoint that is gone': b'model_checkpoint_path: "ckpt-9"\n',
  'a folder': 'a folder',
}


@pytest.mark.parametrize('case', POINTERS)
def test_the_pointer_file_is_not_needed(tmp_path, caplog, case):
  *_, newest = save(checkpoints.Saver, tmp_path, 1, 2)
  pointer = tmp_path / 'checkpoints' / 'checkpoint'
  pointer.unlink()
  if case == 'a folder':
    pointer.mkdir()
  elif POINTERS[case] is not None:
    pointer.write_bytes(POINTERS[case])
  assert checkpoints.latest(str(tmp_path)) == newest == checkpoints.describe(str(tmp_path))['path']
  assert step_of(tmp_path) == 2 and int(restore(tmp_path)['state']['step']) == 2
  saver = checkpoints.Saver(str(tmp_path), 2)
  assert 'going by what lies there' in caplog.text and newest in caplog.text
  if case == 'a folder':
    return
  assert saver.save(tree(3)).endswith('ckpt-3.flax')
  assert clu_file.kept(str(tmp_path / 'checkpoints')) == [newest.replace('ckpt-2', 'ckpt-3'), newest]
  assert 'model_checkpoint_path: "ckpt-3"' in pointer.read_text()


@pytest.mark.parametrize('lost', ['index', 'data-00000-of-00001'])
def test_tensorflows_own_files_are_not_needed(tmp_path, lost):
  save(checkpoints.Saver, tmp_path, 1, 2)
  for path in (tmp_path / 'checkpoints').glob(f'*.{lost}'):
    path.unlink()
  saver = checkpoints.Saver(str(tmp_path), 2)
  assert saver.save(tree(3)).endswith('ckpt-3.flax') and step_of(tmp_path) == 3


def test_clu_and_tensorflow_still_read_the_folder(tmp_path):
  import tensorflow as tf
  from clu import checkpoint as clu_checkpoint

  *_, newest = save(checkpoints.Saver, tmp_path, 1, 2, 3, keep=2)
  folder = str(tmp_path / 'checkpoints')
  read = clu_checkpoint.load_state_dict(folder)
  np.testing.assert_array_equal(read['state']['params']['w'], tree(3)['state']['params']['w'])
  assert tf.train.latest_checkpoint(folder) + '.flax' == newest
  counted = tf.train.Checkpoint()
  counted.restore(tf.train.latest_checkpoint(folder)).expect_partial()
  assert int(counted.save_counter) == 3


PATTERNS = ['run[1]', 'a\\b', 'a*b', 'a?', '[']


@pytest.mark.parametrize('name', ['sp ace', 'q\'"x', 'é', '%20', '{a}', '~', *PATTERNS])
def test_a_workdir_may_have_any_name_that_can_be_printed(make_saver, tmp_path, request, name):
  workdir = tmp_path / name
  workdir.mkdir()
  if name in PATTERNS and 'orbax' in request.node.name:
    with pytest.raises(UserError, match='takes it for a pattern') as error:
      make_saver(str(workdir), 2)
    assert '\n' not in str(error.value)
    return
  save(make_saver, workdir, 1, 2, 3, keep=2)
  make_saver(str(workdir), 2).keep('best')
  assert step_of(workdir) == 3 == step_of(workdir / 'checkpoints' / 'best')
  folder = str(workdir / 'checkpoints')
  assert len(clu_file.kept(folder) + orbax_folder.kept(folder)) == 2
  assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize('name', ['a\nb', 'a\x01b', 'a\udcffb'])
def test_a_workdir_that_tensorflow_cannot_name_is_refused_before_the_first_step(tmp_path, name):
  with pytest.raises(UserError, match='cannot be printed') as error:
    checkpoints.Saver(str(tmp_path / name), 2)
  assert '\n' not in str(error.value) and not os.listdir(tmp_path)


def test_keeping_none_is_refused_before_the_first_step(make_saver, tmp_path):
  with pytest.raises(UserError, match='keep_checkpoints is 0: expected 1 or more'):
    make_saver(str(tmp_path), 0)


def test_a_flipped_bit_of_a_file_is_noticed_wherever_it_is(tmp_path):
  (path,) = save(checkpoints.Saver, tmp_path, 1)
  data = pathlib.Path(path).read_bytes()
  copy = tmp_path / 'copy.flax'
  copy.write_bytes(data)
  assert step_of(copy) == 1
  for bit in [*range(8 * 40), *range(3, 8 * len(data), 13), *range(8 * (len(data) - 75), 8 * len(data))]:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    copy.write_bytes(flipped)
    with pytest.raises(UserError, match='not a readable checkpoint'):
      checkpoints.load(str(copy))


def test_a_flipped_bit_of_a_description_is_noticed_without_reading_the_arrays(tmp_path):
  (path,) = save(checkpoints.Saver, tmp_path, 1)
  data = pathlib.Path(path).read_bytes()
  for bit in range(0, 8 * (data.index(b'state') - 1), 5):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    pathlib.Path(path).write_bytes(flipped)
    with pytest.raises(UserError, match='not a readable checkpoint'):
      checkpoints.describe(path)


def test_a_flipped_bit_of_a_folder_is_noticed(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: KINDS[::-1])
  (path,) = save(checkpoints.Saver, tmp_path, 1)
  files = [p for part in ('about', 'arrays', 'sha256.json') for p in sorted({*pathlib.Path(path, part).rglob('*')})]
  files = [p for p in [*files, pathlib.Path(path, 'sha256.json')] if p.is_file()]
  assert len(files) > 8
  chance = random.Random(0)
  for file in files:
    data = file.read_bytes()
    for _ in range(20):
      flipped = bytearray(data)
      flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
      file.write_bytes(flipped)
      try:
        loaded = checkpoints.load(path)
      except UserError:
        continue
      # Of the list of checksums itself a flip of a letter's case is left.
      assert file.name == 'sha256.json' and loaded['about']['step'] == 1
      np.testing.assert_array_equal(loaded['state']['params']['w'], tree(1)['state']['params']['w'])
    file.write_bytes(data)
  assert step_of(path) == 1
  shutil.rmtree(pathlib.Path(path, 'arrays', 'ocdbt.process_0'))  # lost in a copy
  with pytest.raises(UserError, match='not a readable checkpoint'):
    checkpoints.load(path)


def test_a_lost_list_of_checksums_is_noticed(tmp_path, monkeypatch):
  """Without it a checkpoint would be taken for one of before there were checksums."""
  monkeypatch.setattr(checkpoints.saver, '_kinds', lambda: KINDS[::-1])
  (path,) = save(checkpoints.Saver, tmp_path, 1)
  assert 'sealed' not in checkpoints.load(path)['about']
  pathlib.Path(path, 'sha256.json').unlink()
  for read in (checkpoints.load, checkpoints.describe):
    with pytest.raises(UserError, match=r'sha256\.json.*is missing'):
      read(path)


@pytest.mark.parametrize('kind', ['clu', 'orbax'])
def test_checkpoints_of_before_there_were_checksums_load_and_are_continued(tmp_path, kind):
  shutil.copytree(DATA / f'checkpoints_{kind}', tmp_path / 'checkpoints')
  loaded = checkpoints.load(str(tmp_path))
  np.testing.assert_array_equal(loaded['state']['params']['w'], np.arange(6.0).reshape(2, 3))
  assert loaded['about']['step'] == 3 and loaded['interval']['n'] == 0.5
  like = {'step': np.int32(0), 'params': {'w': np.zeros((2, 3), np.float32)}, 'ema': {}}
  like = {'state': like | {'opt_state': ({}, {'count': np.int32(0)})}, 'interval': {'n': np.float32(0)}}
  where = jax.tree.map(lambda _: replicated(), like)
  restored = checkpoints.restore(str(tmp_path), like, where, SOURCES)
  assert int(restored['state']['opt_state'][1]['count']) == 3 and float(restored['interval']['n']) == 0.5
  checkpoints.Saver(str(tmp_path), 2).save(tree(4))
  assert step_of(tmp_path) == 4
  shutil.rmtree(tmp_path / 'checkpoints')
  shutil.copytree(DATA / 'checkpoints_clu', tmp_path / 'checkpoints')
  file = tmp_path / 'checkpoints' / 'ckpt-1.flax'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(UserError, match='cut off'):
    checkpoints.latest(str(tmp_path))


def test_data_are_on_disk_before_anything_names_them(make_saver, tmp_path, monkeypatch):
  saver, order = make_saver(str(tmp_path), 2), []
  saver.save(tree(1))
  saver.wait()
  name = lambda path: os.path.relpath(path, tmp_path / 'checkpoints')

  def noted(call, real):
    def noting(*args, **kwargs):
      order.append((call, name(os.readlink(f'/proc/self/fd/{args[0]}') if call == 'fsync' else str(args[1]))))
      return real(*args, **kwargs)

    return noting

  for call in ('fsync', 'replace', 'rename'):
    monkeypatch.setattr(os, call, noted(call, getattr(os, call)))
  path = saver.save(tree(2))
  saver.wait()
  at = lambda *call: order.index(call)
  final = name(path)
  assert len([c for c in order if c[0] != 'fsync' and c[1] == final]) == 1
  if os.path.isfile(path):
    named = at('replace', final)
    assert at('fsync', f'.saving/{final}') < named < at('fsync', '.') < at('replace', 'checkpoint')
    assert ('fsync', '.') in order[at('replace', 'checkpoint') :]
  else:
    (named,) = (i for i, c in enumerate(order) if c[0] != 'fsync' and c[1] == final)
    written = {c[1].split('/', 1)[-1] for c in order[:named] if c[0] == 'fsync'}
    files = {str(p.relative_to(path)) for part in ('about', 'arrays') for p in pathlib.Path(path, part).rglob('*')}
    assert files <= written
    assert any(c[0] == 'replace' and c[1].endswith('/sha256.json') for c in order[:named])
    assert ('fsync', '.') in order[named:]


def test_wherever_a_save_is_killed_the_old_or_the_new_one_is_loaded(tmp_path, monkeypatch):
  """What lies on the disk before each change of it, as a kill would leave it."""
  workdir = tmp_path / 'run'
  saver = checkpoints.Saver(str(workdir), 1)
  saver.save(tree(1))
  saver.keep('best')
  snapshots = []

  def noted(real):
    def call(*args, **kwargs):
      if not copying:
        copying.append(True)
        snapshots.append(tmp_path / f'{len(snapshots)}')
        shutil.copytree(workdir, snapshots[-1])
        copying.clear()
      return real(*args, **kwargs)

    return call

  copying = []
  with monkeypatch.context() as patched:
    for name in ('replace', 'remove', 'rename', 'mkdir', 'link', 'fsync'):
      patched.setattr(os, name, noted(getattr(os, name)))
    saver.save(tree(2))
    saver.keep('best')
  assert len(snapshots) > 10
  steps = set()
  for snapshot in snapshots:
    step = step_of(snapshot)
    steps.add((step, step_of(snapshot / 'checkpoints' / 'best')))
    checkpoints.Saver(str(snapshot), 1).save(tree(3))
    assert step_of(snapshot) == 3
    left = {n for n in os.listdir(snapshot / 'checkpoints') if not n.endswith(('.index', '.data-00000-of-00001'))}
    assert {n for n in left if n.startswith('ckpt')} <= {'ckpt-2.flax', 'ckpt-3.flax'} and len(left) == 3
    assert left >= {'best.flax', 'checkpoint'}
  assert steps == {(1, 1), (2, 1)} or steps == {(1, 1), (2, 1), (2, 2)}


def test_what_killed_savers_left_is_removed_and_nothing_else(make_saver, tmp_path):
  save(make_saver, tmp_path, 1)
  folder = tmp_path / 'checkpoints'
  with durable.replacing(folder / 'x') as f:
    shutil.copyfile(f.name, folder / 'copy')
    left = os.path.basename(f.name)
  os.rename(folder / 'x', folder / left)
  theirs = ['notes.tmp', 'my.flax', 'ckpt-1.flax.bak', 'incomplete.txt', 'copy']
  for name in theirs:
    (folder / name).write_text('a stranger')
  ours = ['best.flax.tmp', 'step-4.flax.tmp', 'best.json.tmp', 'checkpoint.tmp' + 32 * 'a', left]
  for name in ours:
    (folder / name).write_text('')
  for name in ('.saving', 'ckpt-7_temp', 'ckpt_7.orbax-checkpoint-tmp', 'ckpt_7.orbax-checkpoint-tmp-17', 'best.tmp'):
    (folder / name).mkdir()
    (folder / name / 'x').write_text('')
  before = set(os.listdir(folder))
  make_saver(str(tmp_path), 2)
  gone = before - set(os.listdir(folder))
  assert gone == {*ours, '.saving', 'ckpt-7_temp', 'ckpt_7.orbax-checkpoint-tmp', 'ckpt_7.orbax-checkpoint-tmp-17'} | {
    'best.tmp'
  }
  assert all((folder / name).read_text() == 'a stranger' for name in theirs)


def test_keeping_twice_leaves_nothing(make_saver, tmp_path):
  save(make_saver, tmp_path, 1)
  saver = make_saver(str(tmp_path), 2)
  before = {*os.listdir(tmp_path / 'checkpoints')}
  kept = saver.keep('best')
  assert saver.keep('best') == kept and step_of(kept) == 1
  assert {*os.listdir(tmp_path / 'checkpoints')} == before | {os.path.basename(kept)}


@pytest.mark.parametrize(
  'text', ['', 'garbage', '{}', '[]', '{"metric": 3, "value": 1}', '{"metric": "a", "value": "b"}']
)
def test_a_damaged_record_of_the_best_is_refused_before_the_first_step(make_saver, tmp_path, text):
  save(make_saver, tmp_path, 1)
  (tmp_path / 'checkpoints' / 'best.json').write_text(text)
  with pytest.raises(UserError, match=r'best\.json does not say how good') as error:
    make_saver(str(tmp_path), 2)
  assert '\n' not in str(error.value)


def test_what_is_not_a_number_is_never_the_best(make_saver, tmp_path, caplog):
  save(make_saver, tmp_path, 1)
  saver = make_saver(str(tmp_path), 2)
  saver.keep_if_best('test/acts/top1', 0.5, 1)
  saver.save(tree(2))
  for value in (float('nan'), float('inf')):
    saver.keep_if_best('test/acts/top1', value, 2)
  assert step_of(tmp_path / 'checkpoints' / 'best') == 1 and 'is not kept as the best' in caplog.text


def test_other_metrics_start_a_new_interval_and_other_parameters_do_not(make_saver, tmp_path, caplog):
  save(make_saver, tmp_path, 1)
  like, where = nested(0.0)
  like = {'state': tree(0)['state'], 'interval': {'n': np.zeros((), np.float32), 'top5': np.zeros((), np.float32)}}
  placed = jax.tree.map(lambda _: where, like)
  restored = checkpoints.restore(str(tmp_path), like, placed, SOURCES)
  assert 'interval/top5 is nothing in the checkpoint' in caplog.text and 'start anew' in caplog.text
  assert jax.tree.map(float, restored['interval']) == {'n': 0.0, 'top5': 0.0}
  np.testing.assert_array_equal(restored['state']['params']['w'], tree(1)['state']['params']['w'])
  assert float(restore(tmp_path)['interval']['n']) == 1
  like['state']['params'] = {'w': np.zeros((8, 16), np.int8)}
  with pytest.raises(UserError, match=r'params/w is float32 of shape \(8, 16\) in the checkpoint and int8 of shape'):
    checkpoints.restore(str(tmp_path), like, placed, SOURCES)


def write(path, about, state, interval):
  """A file as a version before checksums would have written it, whatever it holds."""
  path.write_bytes(msgpack.packb({'about': about, 'state': state, 'interval': interval}, default=_packed))


def _packed(leaf):
  return flax.serialization._msgpack_ext_pack(leaf)


SAID = json.loads(tree(1)['about'])
STRANGE = {
  'no state': {'state': {}},
  'no parameters': {'state': {'params': {}}},
  'the state is a list': {'state': [1, 2]},
  'int8 parameters': {'state': {'params': {'w': np.zeros(2, np.int8)}}},
  'complex parameters': {'state': {'params': {'w': np.zeros(2, np.complex64)}}},
  'an object for a parameter': {'state': {'params': {'w': 'x'}}},
  'text for parameters': {'state': {'params': {'w': np.array(['a', 'b'])}}},
  'a shape that is not a number': {
    'state': {'params': {'w': msgpack.ExtType(1, msgpack.packb(((float('nan'),), 'float32', bytes(8))))}}
  },
  'an object array': {'state': {'params': {'w': msgpack.ExtType(1, msgpack.packb(((1,), 'object', bytes(8))))}}},
  'a number for a name': {'state': {'params': {3: np.zeros(2, np.float32)}}},
  'another step in the state': {'state': {'step': np.int32(5), 'params': {'w': np.zeros(2, np.float32)}}},
  'a negative step': {'about': json.dumps(SAID | {'step': -1})},
  'a step that is true': {'about': json.dumps(SAID | {'step': True})},
  'a step of NaN': {'about': json.dumps(SAID | {'step': float('nan')})},
  'no config': {'about': json.dumps({k: v for k, v in SAID.items() if k != 'config'})},
  'a config that is null': {'about': json.dumps(SAID | {'config': None})},
  'no sources': {'about': json.dumps({k: v for k, v in SAID.items() if k != 'sources'})},
  'class names that are null': {'about': json.dumps(SAID | {'sources': [SAID['sources'][0] | {'class_names': None}]})},
  'a source without a name': {'about': json.dumps(SAID | {'sources': [{}]})},
  'no JSON': {'about': 'garbage'},
  'JSON of a list': {'about': '[]'},
  'a number for the description': {'about': 3},
  'complex sums': {'interval': {'n': np.complex64(1)}},
}


@pytest.mark.parametrize('case', STRANGE)
def test_strange_content_is_one_sentence_before_anything_is_touched(tmp_path, case):
  (tmp_path / 'checkpoints').mkdir()
  parts = tree(1) | STRANGE[case]
  write(tmp_path / 'checkpoints' / 'ckpt-1.flax', **parts)
  before = content(tmp_path)
  for path in (tmp_path, tmp_path / 'checkpoints' / 'ckpt-1.flax'):
    for read in (checkpoints.load, restore):
      with pytest.raises(UserError, match='not a readable checkpoint') as error:
        read(str(path))
      assert '\n' not in str(error.value)
  assert content(tmp_path) == before


def test_mutated_checkpoints_load_or_are_refused(tmp_path):
  """Structure and bytes at random, 250 of each; the seed is 0."""
  chance = random.Random(0)
  path = tmp_path / 'x.flax'
  values = [None, True, -1, 3, 'x', b'x', [], {}, float('nan'), np.zeros(2, np.int8), np.complex64(1), 1j, 2**70, [[]]]

  def mutated(value, depth=0):
    if isinstance(value, dict) and value and (depth == 0 or chance.random() < 0.8):
      key = chance.choice(list(value))
      kind = chance.random()
      if kind < 0.15:
        return {k: v for k, v in value.items() if k != key}
      if kind < 0.25:
        return value | {chance.choice([3, 'new', '', 'params/w']): chance.choice(values)}
      return value | {key: mutated(value[key], depth + 1)}
    if isinstance(value, list) and value and chance.random() < 0.7:
      return [mutated(value[0], depth + 1), *value[1:]]
    return chance.choice(values)

  loaded = 0
  for number in range(500):
    whole = tree(1) | {'about': json.loads(tree(1)['about'])}
    if number % 2:
      whole = mutated(whole)
    if isinstance(whole.get('about'), dict):
      with contextlib.suppress(TypeError):  # bytes in it: they stay for msgpack
        whole['about'] = json.dumps(whole['about'])
    try:
      data = bytearray(msgpack.packb(whole, default=_packed))
    except (ValueError, TypeError, OverflowError):
      continue
    for _ in range(0 if number % 2 else chance.randint(1, 4)):
      at = chance.randrange(len(data))
      kind = chance.random()
      if kind < 0.6:
        data[at] = chance.randrange(256)
      elif kind < 0.8:
        del data[at : at + chance.randint(1, 9)]
      else:
        data[at:at] = bytes(chance.randint(1, 9))
    path.write_bytes(data)
    for read in (checkpoints.describe, checkpoints.load, restore):
      try:
        read(str(path))
        loaded += 1
      except UserError as error:
        assert '\n' not in str(error)
  assert loaded > 50  # some hit an array's content only: such a file has no checksum


def train_in(workdir, **changes):
  workdir.mkdir(exist_ok=True)
  experiment, mesh, batches, _ = tiny.build(tiny.config(**changes), jax.devices()[:1])
  return training.train(experiment, batches, str(workdir), mesh)


def test_a_run_goes_on_from_the_newest_whole_checkpoint_as_if_it_were_the_newest(tmp_path):
  options = {'checkpoint_every': 2, 'log_every': 2, 'total_steps': 6, 'keep_checkpoints': 3, 'mesh__data': 1}
  train_in(tmp_path / 'whole', **options)
  shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
  folder = tmp_path / 'parts' / 'checkpoints'
  (folder / 'checkpoint').write_bytes(b'')
  damage(folder / 'ckpt-3.flax', 'a flipped bit')
  train_in(tmp_path / 'parts', **options)
  states = [checkpoints.load(str(tmp_path / part)) for part in ('whole', 'parts')]
  assert states[1]['path'].endswith('ckpt-4.flax') and (folder / 'ckpt-3.flax.refused').exists()
  jax.tree.map(np.testing.assert_array_equal, *(s['state'] for s in states))
  rows = [metrics.read_jsonl(str(tmp_path / part / 'metrics.jsonl')) for part in ('whole', 'parts')]
  assert rows[0] == rows[1] and [row['step'] for row in rows[0]] == [2, 4, 6]
  for path in folder.glob('*.flax'):
    damage(path, 'empty')
  before = content(tmp_path / 'parts')
  with pytest.raises(UserError, match=r'no other checkpoint in .* is whole'):
    train_in(tmp_path / 'parts', **options)
  assert content(tmp_path / 'parts') == before


def test_what_cannot_be_saved_is_found_before_the_first_step_and_before_the_files_of_the_run(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file')
  with pytest.raises(UserError, match='Could not save a checkpoint'):
    train_in(tmp_path, mesh__data=1)
  assert os.listdir(tmp_path) == ['checkpoints']


def test_several_processes_agree_on_the_newest_whole_checkpoint(tmp_path):
  """Only the process whose share of the check has the damaged file sees it."""
  address = f'127.0.0.1:{free_port()}'
  env = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  ended = finish([spawn('tests.checkpoint_worker', [str(tmp_path), address, '2', str(i)], env) for i in range(2)])
  assert [code for code, _ in ended] == [0, 0], '\n'.join(output for _, output in ended)
  for i, (_, output) in enumerate(ended):
    assert f'process {i} went on from {tmp_path}/checkpoints/ckpt_2' in output
    assert 'is nothing in the checkpoint and shape () in the run): they start anew' in output
  assert sum('the checksum of arrays/' in output for _, output in ended) == 1
  assert sum('Another process of the run cannot read' in output for _, output in ended) == 1
