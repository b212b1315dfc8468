"""Files that are whole or not there."""

import os
import subprocess
import sys

import pytest

from data_pipelines import durable


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
  path = tmp_path / 'a'
  durable.write(path, 'first')
  durable.write(path, b'second')
  assert path.read_bytes() == b'second'
  assert os.listdir(tmp_path) == ['a']


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
  path = tmp_path / 'a'
  durable.write(path, 'first')
  with pytest.raises(RuntimeError), durable.replacing(path) as f:
    f.write(b'half')
    raise RuntimeError
  assert path.read_text() == 'first'
  assert os.listdir(tmp_path) == ['a']


def test_data_reach_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
  order = []
  for name in ('fsync', 'replace'):
    real = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (order.append(name), real(*args)))
  durable.write(tmp_path / 'a', 'text')
  assert order == ['fsync', 'replace', 'fsync']


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
  path = tmp_path / ('n' * 255)
  durable.write(path, 'text')
  assert path.read_text() == 'text'


def test_sweep_removes_what_a_kill_left_and_nothing_else(tmp_path):
  durable.write(tmp_path / 'kept.tmp', 'text')
  with durable.replacing(tmp_path / 'a') as f:
    left = f.name
  open(left, 'w').close()  # as if killed before the rename
  assert durable.sweep(tmp_path) == 1
  assert sorted(os.listdir(tmp_path)) == ['a', 'kept.tmp']


def folder_of(path, text):
  """Writes two files that say the same, as two files of one export do."""
  with durable.replacing_folder(path) as folder:
    for name in ('a', 'b'):
      durable.write(os.path.join(folder, name), text)


def texts(path):
  return {name: (path / name).read_text() for name in sorted(os.listdir(path))}


@pytest.mark.parametrize('exchange', [True, False])
def test_a_folder_is_replaced_whole_and_nothing_else_is_left(tmp_path, monkeypatch, exchange):
  if not exchange:  # as on a file system that cannot
    monkeypatch.setattr(durable, '_exchange', lambda a, b: False)
  path = tmp_path / 'x'
  for text in ('first', 'second'):
    folder_of(path, text)
    assert texts(path) == {'a': text, 'b': text}
  with pytest.raises(RuntimeError), durable.replacing_folder(path) as folder:
    durable.write(os.path.join(folder, 'a'), 'half')
    raise RuntimeError
  assert texts(path) == {'a': 'second', 'b': 'second'}
  assert os.listdir(tmp_path) == ['x']


KILLED = """
import os, sys
from data_pipelines import durable
exchange, last, path = sys.argv[1] == 'True', int(sys.argv[2]), sys.argv[3]
if not exchange:
  durable._exchange = lambda a, b: False
else:
  real = durable._exchange
  durable._exchange = lambda a, b: (sys.audit('exchange'), real(a, b), sys.audit('exchanged'))[1]
calls = 0
def count(event, args):
  global calls
  if event in ('open', 'exchange', 'exchanged') or event.startswith(('os.', 'shutil.')):
    calls += 1
    if calls > last:
      os._exit(9)
sys.addaudithook(count)
with durable.replacing_folder(path) as folder:
  for name in ('a', 'b'):
    durable.write(os.path.join(folder, name), 'new')
os._exit(0)
"""


@pytest.mark.parametrize('exchange', [True, False])
def test_a_folder_is_the_old_or_the_new_one_wherever_its_replacing_is_killed(tmp_path, exchange):
  path = tmp_path / 'x'
  seen = set()
  for last in range(100):
    folder_of(path, 'old')
    done = subprocess.run([sys.executable, '-c', KILLED, str(exchange), str(last), str(path)], check=False)
    if not path.exists():
      assert not exchange
      seen.add('absent')
      (old,) = tmp_path.glob('.*.old')  # it is kept, wholly
      assert texts(old) == {'a': 'old', 'b': 'old'}
      assert durable.sweep(tmp_path) == 1 and old.exists()
      old.rename(path)
    else:
      content = texts(path)
      assert content in ({'a': 'old', 'b': 'old'}, {'a': 'new', 'b': 'new'})
      seen.add(content['a'])
    durable.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith('.old')] == ['x']
    if done.returncode == 0:
      break
    assert done.returncode == 9
  assert done.returncode == 0 and content == {'a': 'new', 'b': 'new'}
  assert seen == ({'old', 'new'} if exchange else {'old', 'new', 'absent'})
