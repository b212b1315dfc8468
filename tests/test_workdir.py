"""One run in a workdir at a time, and nothing half-written of those that were killed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from configs import digits_cover
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.jobs import train as train_job
from data_pipelines import durable
from data_pipelines.contract import UserError
from data_pipelines.sources import open_tfds
from tests.test_main import ROOT

HOLDER = """
import sys, time
from cover_jax.checkpoints import workdir
with workdir.hold(sys.argv[1]):
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds the workdir until it is killed."""
  command = [sys.executable, '-c', HOLDER, str(tmp_path)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def test_a_second_run_is_told_who_is_first_and_a_killed_one_holds_nothing(holder, tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  with pytest.raises(UserError, match=r' is in use: process \d+ on .* since \d{4}-\d\d-\d\d .*python') as error:
    train_job.train(digits_cover.get_config('debug'), str(tmp_path))
  assert f'process {holder.pid} on {os.uname().nodename}' in str(error.value)
  assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  with workdirs.hold(str(tmp_path)):
    assert json.loads((tmp_path / workdirs.LOCK).read_text())['pid'] == os.getpid()
    (tmp_path / 'link').symlink_to(tmp_path)
    for same in (str(tmp_path / 'link'), os.path.relpath(tmp_path)):
      with pytest.raises(UserError, match='is in use'), workdirs.hold(same):
        pass


def test_a_lock_file_of_anything_is_taken_over(tmp_path):
  for text in (b'', b'\xff\x00', b'[]', b'{"pid": 1}', b'x' * 10_000):
    (tmp_path / workdirs.LOCK).write_bytes(text)
    with workdirs.hold(str(tmp_path)):
      (tmp_path / workdirs.LOCK).write_bytes(text)
      with pytest.raises(UserError, match='another run is writing into it'), workdirs.hold(str(tmp_path)):
        pass
  with workdirs.hold(str(tmp_path)):
    pass
  assert json.loads((tmp_path / workdirs.LOCK).read_text())['host'] == os.uname().nodename


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, code):
  def refuses(*_):
    raise OSError(code, os.strerror(code))

  left = tmp_path / f'.{uuid.uuid4().hex}.tmp'
  left.touch()
  monkeypatch.setattr(fcntl, 'flock', refuses)
  with workdirs.hold(str(tmp_path)), workdirs.hold(str(tmp_path)):
    assert 'has no locks' in caplog.text
  assert left.exists()  # it may be of a run that is writing


def test_what_kills_left_goes_when_the_next_run_starts(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'evaluation').mkdir()
  left = [tmp_path / folder / f'.{uuid.uuid4().hex}.tmp' for folder in ('', 'checkpoints', 'evaluation')]
  mine = tmp_path / 'notes.tmp'
  for path in (*left, mine):
    path.touch()
  with workdirs.hold(str(tmp_path)):
    assert [path.exists() for path in left] == [False, False, True]
  with workdirs.turn(str(tmp_path / 'evaluation')):
    assert not left[2].exists()
  assert mine.exists()


def test_two_reports_do_not_mix(tmp_path):
  order = []

  def second():
    with workdirs.turn(str(tmp_path)):
      order.append('second')

  with workdirs.turn(str(tmp_path)):
    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.2)
    order.append('first')
  thread.join()
  assert order == ['first', 'second']


def test_workdirs_that_cannot_be(tmp_path):
  (tmp_path / 'file').touch()
  for path in ('file', 'file/below'):
    with pytest.raises(UserError, match=r'cannot be written \('):
      workdirs.prepare(str(tmp_path / path))
  with pytest.raises(UserError, match='neither a folder nor in a bucket of Google Cloud'):
    workdirs.prepare('s3://bucket/x')
  workdirs.prepare(str(tmp_path / 'new' / 'one'))
  assert os.listdir(tmp_path / 'new' / 'one') == []


def test_a_full_disk_at_the_lock_is_one_sentence(tmp_path, monkeypatch):
  def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(workdirs.json, 'dump', no_room)
  full = pytest.raises(UserError, match=r'Could not write the lock .*No space left.*there is no checkpoint yet')
  with full, workdirs.hold(str(tmp_path)):
    pass
  monkeypatch.undo()
  with workdirs.hold(str(tmp_path)):  # what failed holds nothing
    pass


def test_errors_within_the_block_are_their_own(tmp_path):
  with pytest.raises(OSError, match='mine'), workdirs.hold(str(tmp_path)):
    raise OSError('mine')
  with workdirs.hold(str(tmp_path)):
    pass


def test_what_a_killed_build_left_goes_with_the_next_one(tmp_path):

  left = tmp_path / 'digits' / 'incomplete.ABCDEF_1.0.0'  # as TFDS names it
  left.mkdir(parents=True)
  (left / 'digits-train.tfrecord').write_bytes(b'half')
  builder = open_tfds.prepared_builder('digits', 'digits', str(tmp_path))
  assert sorted(os.listdir(tmp_path / 'digits')) == ['.1.0.0.lock', builder.data_path.name] == ['.1.0.0.lock', '1.0.0']


WRITERS = """
import os, sys, time
sys.path.insert(0, '.')
import numpy as np
from cover_jax.evaluation import visualise
from data_pipelines import durable
count = 0
while True:
  count += 1
  visualise.training_curves([{'step': i, 'learning_rate': 1.0} for i in range(count)], sys.argv[1] + '/a.png')
  durable.write(sys.argv[1] + '/b.json', '[' + ', '.join(['1'] * 200_000) + ']')
  print(count, flush=True)
"""


def test_a_kill_leaves_whole_pictures_or_none(tmp_path):
  """A real process that draws again and again, killed at five moments."""
  from PIL import Image

  for delay in (0.0, 0.03, 0.06, 0.1, 0.15):
    command = [sys.executable, '-c', WRITERS, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(delay)
    process.kill()
    process.communicate()
    Image.open(tmp_path / 'a.png').load()
    assert len(json.loads((tmp_path / 'b.json').read_text())) == 200_000
  durable.sweep(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['a.png', 'b.json']
