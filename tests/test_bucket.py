"""A workdir in a bucket (`benchmarks/bucket_server.py`): training, going on, kills, one writer at a time."""

import json
import os
import re
import threading
import time

import jax
import numpy as np
import pytest

import cover_jax
from cover_jax import checkpoints, export
from cover_jax.checkpoints import bucket as buckets
from cover_jax.checkpoints import lease
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.training import loop as training
from cover_jax.training import metrics
from data_pipelines import durable, paths
from data_pipelines.contract import UserError
from tests import tiny
from tests.test_checkpoints import SOURCES


def train(workdir, stop_at=None, **changes):
  """Trains the tiny run in a workdir, as the job does; returns its state, or None if it was stopped."""
  config = tiny.config(**{'total_steps': 3, 'checkpoint_every': 2, 'log_every': 1, 'ema_decay': 0.0} | changes)
  experiment, mesh, batches, _ = tiny.build(config, jax.devices()[:1])
  calls = iter(range(1, 100))
  workdirs.prepare(workdir)
  try:
    with workdirs.hold(workdir):
      return training.train(experiment, batches, workdir, mesh, stop=lambda: next(calls) == stop_at)
  except training.Preempted:
    return None


def test_a_run_in_a_bucket_trains_goes_on_and_is_loaded(bucket, bucket_server, tmp_path):
  assert train(bucket, stop_at=2) is None
  names = bucket_server.names()
  assert 'folder/config.json' in names and 'folder/.lock' not in names
  rows = [json.loads(line) for line in bucket_server.data('folder/metrics.jsonl').splitlines()]
  assert [row['step'] for row in rows] == [1, 2]
  assert len([n for n in names if 'tfevents' in n]) == 1
  assert checkpoints.latest(bucket) == f'{bucket}/checkpoints/ckpt_2'

  state = train(bucket)
  assert [row['step'] for row in metrics.read_jsonl(f'{bucket}/metrics.jsonl')] == [1, 2, 3]
  assert len([n for n in bucket_server.names() if 'tfevents' in n]) == 2
  assert checkpoints.describe(bucket)['about']['step'] == 3
  model = cover_jax.load(bucket)
  jax.tree.map(np.testing.assert_array_equal, model.params, jax.device_get({k: state.params[k] for k in model.params}))
  assert model.path == f'{bucket}/checkpoints/ckpt_3' and not os.path.exists('gs:')


@pytest.fixture
def saver(bucket):
  return checkpoints.Saver(bucket, 2)


def tree(step):
  noise = np.random.default_rng(step).normal(size=(64, 8)).astype(np.float32)
  state = {'step': np.int32(step), 'params': {'w': jax.numpy.asarray(noise)}}
  return {'about': checkpoints.about({'a': 1}, SOURCES, step), 'state': state, 'interval': {'n': np.float32(step)}}


def save(saver, step):
  path = saver.save(tree(step))
  saver.wait()
  return path


def assert_is(loaded, step):
  assert loaded['about']['step'] == int(loaded['state']['step']) == step
  np.testing.assert_array_equal(loaded['state']['params']['w'], tree(step)['state']['params']['w'])


def steps(bucket_server):
  return sorted({int(m[1]) for n in bucket_server.names() if (m := re.search(r'/ckpt_(\d+)/', n))})


def test_the_last_ones_stay_and_those_with_names(bucket, bucket_server, saver):
  save(saver, 1)
  assert saver.keep('step-1') == f'{bucket}/checkpoints/step-1'
  save(saver, 2)
  saver.keep_if_best('test/mean/top1', 0.5, 2)
  for step in (3, 4, 5):
    save(saver, step)
    saver.keep_if_best('test/mean/top1', 0.4, step)
  assert steps(bucket_server) == [1, 2, 4, 5]
  assert_is(checkpoints.load(f'{bucket}/checkpoints/step-1'), 1)
  assert_is(checkpoints.load(f'{bucket}/checkpoints/best'), 2)
  saver.keep_if_best('test/mean/top1', 0.6, 5)
  save(saver, 6)
  assert steps(bucket_server) == [1, 5, 6]
  assert_is(checkpoints.load(f'{bucket}/checkpoints/best'), 5)
  assert_is(checkpoints.load(bucket), 6)


def test_a_kill_at_any_request_of_a_save_leaves_one_whole_checkpoint(bucket, bucket_server, saver):
  """What lies in the bucket after each request that changes it is what a kill would leave just then."""
  save(saver, 1)
  save(saver, 2)
  bucket_server.history = []
  save(saver, 3)  # and the first one goes
  history = bucket_server.history
  assert len(history) > 10
  found = []
  for left in history:
    bucket_server.wipe(left)
    found.append(checkpoints.describe(bucket)['about']['step'])
  assert found == sorted(found) and set(found) == {2, 3}
  whole = found.index(3)
  for left, step in ((history[whole - 1], 2), (history[whole], 3)):
    bucket_server.wipe(left)
    assert_is(checkpoints.load(bucket), step)
    again = checkpoints.Saver(bucket, 2)  # what is half there goes when the run goes on
    assert steps(bucket_server)[-1] == step and 'folder/checkpoints/saving.json' not in bucket_server.names()
    save(again, 4)
    assert_is(checkpoints.load(bucket), 4)


def test_a_kill_in_the_first_save_starts_anew(bucket, bucket_server, saver):
  bucket_server.history = []
  save(saver, 1)
  history = bucket_server.history
  whole = [checkpoints.latest(bucket) for left in history if not bucket_server.wipe(left)]
  assert whole[0] is None and whole[-1] and whole.count(None) > 5
  bucket_server.wipe(history[whole.count(None) - 1])
  assert not checkpoints.lie_in(bucket) and checkpoints.unfinished(bucket)


def test_a_damaged_checkpoint_is_passed_over_and_moved_aside(bucket, bucket_server, saver):
  for step in (1, 2):
    save(saver, step)
  arrays = bucket_server.names('folder/checkpoints/ckpt_2/arrays')
  name = max(arrays, key=lambda name: len(bucket_server.data(name)))
  data = bytearray(bucket_server.data(name))
  data[len(data) // 2] ^= 1
  bucket_server.put(name, bytes(data))
  assert_is(checkpoints.load(bucket), 1)
  with pytest.raises(UserError, match='checksum'):
    checkpoints.load(f'{bucket}/checkpoints/ckpt_2')
  checkpoints.put_aside([f'{bucket}/checkpoints/ckpt_2'])
  assert bucket_server.data(name.replace('ckpt_2', 'ckpt_2.refused')) == data
  assert not bucket_server.names('folder/checkpoints/ckpt_2/')
  save(checkpoints.Saver(bucket, 2), 2)
  assert_is(checkpoints.load(bucket), 2)


def test_what_was_copied_from_a_disk_is_taken(bucket, bucket_server, tmp_path):
  one = checkpoints.Saver(str(tmp_path), 2)  # clu's file
  one.save(tree(1))
  paths.upload(str(tmp_path), bucket)
  assert_is(checkpoints.load(bucket), 1)
  assert checkpoints.latest(bucket).endswith('ckpt-1.flax')
  saver = checkpoints.Saver(bucket, 1)
  for step in (2, 3):
    save(saver, step)
  assert steps(bucket_server) == [3] and not [n for n in bucket_server.names() if n.endswith('.flax')]


# One writer at a time.


def test_a_second_run_is_told_of_the_first(bucket, bucket_server, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  monkeypatch.setattr(lease, '_is_of_the_dead', lambda signed: False)
  with workdirs.hold(bucket):
    assert json.loads(bucket_server.data('folder/.lock'))['pid'] == os.getpid()
    with pytest.raises(UserError, match=rf'in use: process {os.getpid()} on .* since') as error, workdirs.hold(bucket):
      pass
    assert '\n' not in str(error.value)
    workdirs.check_held(bucket)
  assert not bucket_server.names()
  with workdirs.hold(bucket):  # it was given back
    pass


def test_the_lock_of_a_killed_run_is_taken_over(bucket, bucket_server, monkeypatch):
  dead = lease.signature() | {'pid': 2**22 + 1, 'machine': lease._machine(), 'beat': 3}
  bucket_server.put('folder/.lock', json.dumps(dead).encode())
  began = time.monotonic()
  with workdirs.hold(bucket):  # of this machine: at once
    assert time.monotonic() - began < 10
  monkeypatch.setattr(lease, 'PATIENCE', 0.3)
  for text in (json.dumps(dead | {'machine': 'another'}).encode(), b'anything'):
    bucket_server.put('folder/.lock', text)
    with workdirs.hold(bucket):
      assert json.loads(bucket_server.data('folder/.lock'))['pid'] == os.getpid()


def test_a_run_that_lost_its_workdir_saves_nothing_more(bucket, bucket_server, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  with workdirs.hold(bucket):
    bucket_server.put('folder/.lock', b'{"pid": 1}')  # of a run that took this one for dead
    deadline = time.monotonic() + 10
    while not lease._held[bucket].lost and time.monotonic() < deadline:
      time.sleep(0.01)
    with pytest.raises(UserError, match='was taken over by another run'):
      workdirs.check_held(bucket)
  assert bucket_server.data('folder/.lock') == b'{"pid": 1}'  # which stays the other's


def test_of_runs_that_start_together_one_gets_the_lock(bucket, bucket_server, monkeypatch):
  monkeypatch.setattr(lease, 'BEAT', 0.05)
  monkeypatch.setattr(lease, '_is_of_the_dead', lambda signed: False)
  got, refused = [], []

  def start():
    one = lease.Lease(bucket)
    try:
      one.take()
      got.append(one)
    except UserError:
      refused.append(one)

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 1 and len(refused) == 3
  got[0].give_back()


# Files.


def test_files_of_a_bucket_are_those_of_a_disk(bucket, bucket_server, tmp_path):
  for root in (str(tmp_path), bucket):
    durable.write(f'{root}/text', 'one\n')
    with durable.replacing(f'{root}/bytes') as f:
      f.write(b'0123456789')
    with pytest.raises(RuntimeError), durable.replacing(f'{root}/bytes') as f:
      raise RuntimeError
    with durable.replacing_folder(f'{root}/folder') as new:
      os.mkdir(f'{new}/below')
      durable.write(f'{new}/below/a', 'a')
      durable.write(f'{new}/about.json', '{}')
    with durable.replacing_folder(f'{root}/folder') as new:
      durable.write(f'{new}/b', 'b')
    assert paths.names(root) == sorted(paths.names(root)) == ['bytes', 'folder', 'text'] or not paths.is_remote(root)
    assert paths.files_below(root) == ['bytes', 'folder/b', 'text']
    assert paths.names(f'{root}/none') == [] and not paths.exists(f'{root}/none')
    assert paths.is_folder(f'{root}/folder') and paths.is_file(f'{root}/text') and not paths.is_file(f'{root}/folder')
    assert paths.size(f'{root}/bytes') == 10 and paths.read(f'{root}/text') == b'one\n'
    with paths.open_binary(f'{root}/bytes') as f:
      f.seek(3)
      assert f.read(2) == b'34'
    with paths.local(f'{root}/bytes') as copy:
      assert os.path.basename(copy) == 'bytes' and os.path.getsize(copy) == 10
    with pytest.raises(FileNotFoundError) as error:
      paths.read(f'{root}/none')
    assert error.value.strerror
    paths.remove(f'{root}/folder')
    paths.remove(f'{root}/none')
    assert not paths.exists(f'{root}/folder')
  bucket_server.forget()
  assert paths.read_span(f'{bucket}/bytes', 2, 3) == b'234'
  assert [r[2] for r in bucket_server.requests] == ['bytes=2-4']  # one request, and of these bytes
  assert paths.read_span(f'{bucket}/bytes', 8, 5) == b'89' and paths.read_span(f'{bucket}/bytes', 99, 5) == b''
  assert buckets.meant(str(tmp_path / 'best')) == str(tmp_path / 'best')


def test_a_bucket_that_cannot_be_used_is_one_sentence(bucket, capsys):
  with pytest.raises(UserError, match=r'--workdir=gs://none/run cannot be written \(there is none\)'):
    workdirs.prepare('gs://none/run')
  assert export.main(['gs://none/run', '--output=gs://none/x.flax']) == 2
  assert capsys.readouterr().err == (
    'Error: No checkpoint in gs://none/run: expected a workdir of a run, a .flax file or a folder that Orbax wrote.\n'
  )
  refused = PermissionError(13, 'Forbidden', 'gs://none/x')
  assert paths.unreachable(refused) == 'gs://none/x cannot be used (Forbidden).'
  assert paths.unreachable(PermissionError(13, 'no', '/x')) == ''


def test_tensorflows_file_systems_do_the_same():
  """Those of buckets are of its kind; the one in memory needs no bucket, but folders."""
  root = 'ram://paths'
  paths._system(root).makedirs(f'{root}/folder', exist_ok=True)
  durable.write(f'{root}/text', 'one\n')
  durable.write(f'{root}/folder/b', '0123456789')
  assert paths.names(root) == ['folder', 'text'] and paths.files_below(root) == ['folder/b', 'text']
  assert paths.is_folder(f'{root}/folder') and paths.is_file(f'{root}/text') and not paths.is_file(f'{root}/folder')
  assert paths.size(f'{root}/folder/b') == 10 and paths.read(f'{root}/text') == b'one\n'
  assert paths.read_span(f'{root}/folder/b', 8, 5) == b'89' and paths.read_span(f'{root}/folder/b', 99, 5) == b''
  assert paths.names(f'{root}/none') == [] and not paths.exists(f'{root}/none')
  with pytest.raises(FileNotFoundError) as error:
    paths.read(f'{root}/none')
  assert error.value.strerror == 'there is none'
  paths.remove(f'{root}/folder')
  paths.remove(f'{root}/none')
  assert paths.files_below(root) == ['text']


@pytest.mark.parametrize('path', ['s3://bucket/x', 'az://bucket/x'])
def test_other_clouds_are_refused_as_workdirs(path):
  with pytest.raises(UserError, match='neither a folder nor in a bucket of Google Cloud'):
    workdirs.prepare(path)
