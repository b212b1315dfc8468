"""Who is behind is named: a process that hangs, one that is slow, one that is gone."""

import signal
import time

import pytest

from cover_jax.runtime import laggards
from tests.test_processes import finish, start, wait_for_step


class Store:
  """What the coordination service keeps, for watches in one process."""

  def __init__(self):
    self.kept = {}

  def key_value_set(self, key, value, allow_overwrite):
    assert allow_overwrite
    self.kept[key] = value

  def key_value_dir_get(self, folder):
    return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]


@pytest.fixture
def run(monkeypatch):
  """(watches of three processes with a patience of 20 s, function that sets the time, what was logged)."""
  now, said = [1000.0], []
  for level in ('warning', 'error'):
    monkeypatch.setattr(laggards.logging, level, lambda text, *args: said.append(text % args))
  store = Store()
  watches = [laggards.Watch(store, number, 20.0, lambda: now[0]) for number in range(3)]
  return watches, lambda seconds: now.__setitem__(0, 1000.0 + seconds), said


def test_one_that_hangs_is_named_once_and_by_one(run):
  watches, at, said = run
  for one in watches:
    one.step(4)
    one.look()
  at(10)
  for one in (watches[0], watches[2]):
    one.step(5)
    one.look()
  at(29)
  for one in (watches[0], watches[2]):
    one.look()
  assert said == []  # not long enough
  at(31)
  for _ in range(3):
    for one in (watches[0], watches[2]):
      one.look()
  assert len(said) == 1 and said[0].startswith('Step 5 waits for process 1 (')
  clock = lambda seconds: time.strftime('%H:%M:%S', time.localtime(seconds))
  assert f'at step 4 since {clock(1000)}, last heard of at {clock(1000)}.' in said[0]


def test_the_first_process_can_be_the_one(run):
  watches, at, said = run
  watches[0].step(1)
  watches[0].look()
  for one in watches[1:]:
    one.step(2)
    one.look()
  at(25)
  for one in watches:
    one.look()
  assert len(said) == 1 and 'Step 2 waits for process 0 (' in said[0]


def test_a_long_step_of_all_is_nobodys_fault(run):
  watches, at, said = run
  for one in watches:
    one.step(7)
  at(500)
  for one in watches:
    one.look()
    one.look()
  assert said == []


def test_the_silent_are_gone(run):
  watches, at, said = run
  for one in watches:
    one.step(3)
    one.look()

  def wait(seconds):
    at(seconds)
    watches[2].look()  # another that waits

  at(1)
  watches[0].last_words(wait)
  assert len(said) == 1 and said[0].startswith('Gone: process 1 (') and 'at step 3 since' in said[0]


def test_one_process_watches_nothing():
  with laggards.watch() as started:
    started(1)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_and_may_go_on(tmp_path):
  workers = start(tmp_path, step_seconds=0.3)
  wait_for_step(tmp_path, 3, workers)
  workers[1].send_signal(signal.SIGSTOP)
  time.sleep(20)
  workers[1].send_signal(signal.SIGCONT)
  ended = finish(workers)
  assert [code for code, _ in ended] == [0, 0], ended
  assert 'waits for process 1 (' in ended[0][1] and f'pid {workers[1].pid}): at step ' in ended[0][1]


@pytest.mark.slow
def test_a_killed_process_is_named(tmp_path):
  workers = start(tmp_path, step_seconds=0.3)
  wait_for_step(tmp_path, 3, workers)
  time.sleep(6)
  workers[1].kill()
  code, output = finish(workers)[0]
  assert code in (75, -signal.SIGABRT), output
  assert f'pid {workers[1].pid})' in output or 'another task died' in output
