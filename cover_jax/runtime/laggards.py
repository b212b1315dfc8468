"""Which process of a run is behind, while the others wait for it: every step needs all of them.

Each process notes its step in the store of JAX's coordination service, which lives in process 0, from a thread of its
own: the loop neither waits nor reads anything of a device. A process that hangs or is slow is at an earlier step than
those that wait; one that is gone is no longer heard of.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from cover_jax.runtime import processes

_FOLDER = 'cover_jax/steps/'
_LEAST_PATIENCE = 5  # seconds


class Note(NamedTuple):
  """What a process says of itself: where it runs, its step, since when (seconds since 1970), and when it said so."""

  host: str
  pid: int
  step: int
  since: float
  said: float


class Watch:
  """Notes the steps of one process, and says who is behind when it waits for long.

  Attributes:
    patience: seconds at one step after which it looks at the others.
    interval: seconds between two notes.
  """

  def __init__(self, store: Any, number: int, patience: float, clock: Callable[[], float] = time.time):
    """`store`: the client of the coordination service; `number`: of this process."""
    self._store, self._number, self.patience, self._clock = store, number, patience, clock
    self.interval = patience / 4
    self._at = (0, clock())
    self._told: set[tuple[int, int]] = set()

  def step(self, step: int) -> None:
    """This process has started a step."""
    self._at = (step, self._clock())

  def look(self) -> None:
    """Notes the step; says who is behind, once for each step of theirs, if this process waits for long."""
    self._note()
    step, since = self._at
    if self._clock() - since < self.patience:
      return
    notes = self._notes()
    behind = {number: note for number, note in notes.items() if note.step < step}
    if self._number != min((n for n in notes if n not in behind), default=self._number):
      return  # one of those that wait is enough
    for number, note in behind.items():
      if (number, note.step) not in self._told:
        self._told.add((number, note.step))
        logging.warning('Step %d waits for %s', step, _words(number, note))

  def last_words(self, wait: Callable[[float], Any] = time.sleep) -> None:
    """Says of each process that has fallen silent where it was; `wait` for the others' next notes."""
    with contextlib.suppress(Exception):  # the store may have gone with process 0
      before = self._notes()
      wait(2 * self.interval)
      for number, note in self._notes().items():
        if number != self._number and note.said == before[number].said:
          logging.error('Gone: %s', _words(number, note))

  def _note(self) -> None:
    note = Note(socket.gethostname(), os.getpid(), *self._at, self._clock())
    self._store.key_value_set(f'{_FOLDER}{self._number}', json.dumps(note), allow_overwrite=True)

  def _notes(self) -> dict[int, Note]:
    found = self._store.key_value_dir_get(_FOLDER)
    return dict(sorted((int(key.rsplit('/', 1)[1]), Note(*json.loads(text))) for key, text in found))


def _words(number: int, note: Note) -> str:
  clock = lambda seconds: time.strftime('%H:%M:%S', time.localtime(seconds))
  return (
    f'process {number} ({note.host}, pid {note.pid}): at step {note.step} since {clock(note.since)}, last heard of at '
    f'{clock(note.said)}.'
  )


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], None]]:
  """Within the block, processes that are behind are named in the log; gives the function that is told of each step.

  One that is behind is named after a third of the seconds after which a silent one counts as dead.
  """
  if jax.process_count() == 1:
    yield lambda step: None
    return
  from jax._src import distributed  # the store has no public name

  patience = max(processes.heartbeat_seconds() / 3, _LEAST_PATIENCE)
  watched = Watch(distributed.global_state.client, jax.process_index(), patience)
  ended = threading.Event()

  def run():
    while not ended.wait(watched.interval):
      with contextlib.suppress(Exception):  # the end of the run is told by who waits for the others
        watched.look()

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  try:
    yield watched.step
  except Exception as error:
    if processes.lost_peer(error):
      watched.last_words()
    raise
  finally:
    ended.set()
    thread.join(1)
