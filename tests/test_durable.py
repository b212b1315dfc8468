"""Files that are whole or not there."""

import os

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
