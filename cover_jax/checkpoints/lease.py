"""The lock of a workdir in a bucket: an object that one process at a time can have written last.

A bucket has no locks that end with their process. It has writes that are done only where the object is still the one
that was read: so of two runs one gets the lock. Its holder writes it again every ten seconds. A lock that nobody wrote
again for half a minute, or whose process is gone from this machine, is that of a killed run, and is taken over; the run
that lost it finds out at its next save, at the latest.
"""

import contextlib
import datetime
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from data_pipelines.contract import UserError

NAME = '.lock'
BEAT = 10.0  # seconds
PATIENCE = 35.0  # seconds without a beat after which a holder counts as dead
_held: dict[str, 'Lease'] = {}


def signature() -> dict[str, Any]:
  """Who holds a lock: what other runs are told of this process."""
  now = datetime.datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')
  return {'host': socket.gethostname(), 'pid': os.getpid(), 'since': now, 'command': shlex.join(sys.orig_argv)}


def told(signed: str | bytes) -> str:
  """What a signature says, in one line."""
  try:
    by = json.loads(signed)
    who = f'process {by["pid"]} on {by["host"]} has been writing into it since {by["since"]} ({by["command"]})'
  except (ValueError, KeyError, TypeError):  # it has only just taken the lock
    who = 'another run is writing into it'
  return ' '.join(who.split())


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Within the block this process alone writes into a workdir in a bucket.

  Raises:
    UserError: another run holds it; says which.
    OSError: the bucket cannot be read or written.
  """
  lease = Lease(workdir)
  lease.take()
  _held[workdir] = lease
  try:
    yield
  finally:
    del _held[workdir]
    lease.give_back()


def check(workdir: str) -> None:
  """Raises a UserError if this process held a workdir in a bucket and lost it to another run."""
  lease = _held.get(workdir)
  if lease is not None and lease.lost:
    raise UserError(
      f'{workdir} was taken over by another run, since this one could not be heard for {PATIENCE:.0f} seconds: nothing '
      'more is written there. Stop one of the two.'
    )


class Lease:
  """The lock of one workdir.

  Attributes:
    lost: another run has taken it over.
  """

  def __init__(self, workdir: str):
    import tensorstore as ts  # comes with Orbax; its conditional writes are those of the service

    bucket, _, folder = workdir.removeprefix('gs://').partition('/')
    folder = f'{folder.rstrip("/")}/' if folder else ''
    self._workdir, self.lost = workdir, False
    with _as_os_errors(workdir):
      self._store = ts.KvStore.open({'driver': 'gcs', 'bucket': bucket, 'path': folder}).result()
    self._signature = signature() | {'machine': _machine(), 'beat': 0}
    self._generation = b''
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)

  def take(self) -> None:
    """Takes the lock, waiting as long as it takes to tell a dead holder from a living one."""
    with _as_os_errors(self._workdir):
      self._take()
    self._thread.start()

  def _take(self) -> None:
    seen, since = None, time.monotonic()
    while True:
      there = self._store.read(NAME).result()
      dead = there.state == 'missing' or _is_of_the_dead(there.value)
      if not dead and seen is not None and there.value == seen.value and time.monotonic() > since + PATIENCE:
        logging.warning('%s: taken over from a run that ended without giving it back', self._workdir)
        dead = True
      if dead:
        if self._write(there.stamp.generation):
          return
        seen = None  # somebody was faster
      elif seen is None:
        seen, since = there, time.monotonic()
        logging.info('%s: %s; waiting to see whether it lives', self._workdir, told(there.value))
      elif there.value != seen.value:  # each beat is another
        raise UserError(
          f'{self._workdir} is in use: {told(there.value)}. Wait for it or stop it, or take another --workdir.'
        )
      time.sleep(min(1.0, PATIENCE / 10))

  def _write(self, generation: bytes) -> bool:
    """Writes the lock if it is still of a generation; says whether it was."""
    self._signature['beat'] += 1
    stamp = self._store.write(NAME, json.dumps(self._signature).encode(), if_equal=generation).result()
    if stamp.generation:
      self._generation = stamp.generation
    return bool(stamp.generation)

  def _beat(self) -> None:
    while not self._ended.wait(BEAT):
      try:
        if not self._write(self._generation) and not self._is_mine():
          self.lost = True
          logging.error('%s was taken over by another run', self._workdir)
          return
      except Exception as error:  # TensorStore tries again for a while itself; the next beat may be heard
        logging.warning('The lock of %s could not be renewed: %s', self._workdir, str(error).splitlines()[0])

  def _is_mine(self) -> bool:
    """Whether the lock is this process's: a write whose answer was lost has been done, and is refused when repeated."""
    there = self._store.read(NAME).result()
    with contextlib.suppress(ValueError, KeyError, TypeError):
      by = json.loads(there.value)
      if (by['machine'], by['pid'], by['since']) == tuple(self._signature[k] for k in ('machine', 'pid', 'since')):
        self._generation = there.stamp.generation
        return True
    return False

  def give_back(self) -> None:
    self._ended.set()
    self._thread.join()
    if not self.lost:
      try:
        self._store.write(NAME, None, if_equal=self._generation).result()
      except Exception as error:  # it is as if this process had been killed now
        logging.warning('The lock of %s could not be given back: %s', self._workdir, str(error).splitlines()[0])


def _machine() -> str:
  """What tells whether a process id means something here: this boot of this machine, and its space of ids."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as f:
      return f'{f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _is_of_the_dead(signed: bytes) -> bool:
  """Whether a lock is of a process that was on this machine and is gone."""
  try:
    by = json.loads(signed)
    if not by['machine'] or by['machine'] != _machine():
      return False
    os.kill(int(by['pid']), 0)
  except ProcessLookupError:
    return True
  except (ValueError, KeyError, TypeError, OSError):
    return False
  return False


@contextlib.contextmanager
def _as_os_errors(workdir: str) -> Iterator[None]:
  try:
    yield
  except (OSError, UserError):
    raise
  except Exception as error:  # TensorStore raises ValueError and others, by what the service says
    raise OSError(5, str(error).splitlines()[0], workdir) from error
