"""The folder of a run: one run writes into it at a time, and what cannot be written is told in one sentence.

Locks are the kernel's (`flock`) on files named `.lock`: they end with the process, however that ends. Where a file
system has none, that is logged and nothing is locked; gcsfuse has them within one host only. In a bucket the lock is an
object (`lease.py`).
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import IO

from absl import logging

from cover_jax import checkpoints
from cover_jax.checkpoints import lease
from cover_jax.runtime import processes
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

LOCK = lease.NAME
_WORD = '.process-0'  # there only while a run of several processes starts
_PATIENCE = 40  # seconds


def prepare(workdir: str) -> None:
  """Makes the folder if it is missing; one in a bucket (`gs://`) needs no making.

  Raises:
    UserError: if it is no folder, or cannot be written.
  """
  if paths.is_remote(workdir) and not workdir.startswith('gs://'):
    raise UserError(
      f'--workdir={workdir} is neither a folder nor in a bucket of Google Cloud (gs://): checkpoints and locks are '
      'made for these. Mount it, on every host, and name its folder.'
    )
  try:
    if paths.is_remote(workdir):
      probe = os.path.join(workdir, f'.{uuid.uuid4().hex}')
      durable.write(probe, b'')
      paths.remove(probe)
      return
    os.makedirs(workdir, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):  # it has no name, so a kill leaves none
      pass
  except OSError as error:
    raise UserError(f'--workdir={workdir} cannot be written ({error.strerror}): choose another folder.') from error


def check_shared(workdir: str) -> None:
  """Finds out whether all processes of the run name one folder. Every process must call it.

  Process 0 leaves a random word there, which the others must read; a network file system may show it late.

  Raises:
    UserError: in every process, if some do not find it in `_PATIENCE` seconds; says which.
  """
  word = processes.first(lambda: _leave_word(workdir))
  told = processes.gather_texts(word or '')[0]
  found, deadline = False, time.monotonic() + _PATIENCE
  while not (found := _word(workdir) == told) and time.monotonic() < deadline:
    time.sleep(0.5)
  seen = processes.gather_texts('' if found else f'{paths.absolute(workdir)} on {socket.gethostname()}')
  if word:
    with contextlib.suppress(OSError):
      paths.remove(os.path.join(workdir, _WORD))
  if strangers := [f'{number} ({where})' for number, where in enumerate(seen) if where]:
    raise UserError(
      f'--workdir={workdir} is not one folder: what process 0 wrote there was not found by process '
      f'{", ".join(strangers)}. All processes of a run need the same folder, on a file system or a mounted bucket that '
      'they share.'
    )


def _leave_word(workdir: str) -> str:
  prepare(workdir)
  word = uuid.uuid4().hex
  with writing(workdir, 'a word for the other processes'):
    durable.write(os.path.join(workdir, _WORD), word)
  return word


def _word(workdir: str) -> str | None:
  """What process 0 left. The folder is listed first: some file systems then look again for what was not there."""
  try:
    paths.names(workdir)
    return paths.read(os.path.join(workdir, _WORD)).decode()
  except (OSError, UnicodeDecodeError):
    return None


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Within the block no other run trains in this workdir. What killed runs left half-written there is removed first.

  Process 0 holds the lock, for all processes of the run; every process must enter.

  Raises:
    UserError: in every process, if another run holds it; says which.
  """
  lock = processes.first(lambda: _take(workdir))
  try:
    yield
  finally:
    if lock:
      lock.close()


def check_held(workdir: str) -> None:
  """Raises UserError, in every process, if the workdir is in a bucket and another run took it over meanwhile.

  Every process must call it.
  """
  if paths.is_remote(workdir):
    processes.first(lambda: lease.check(workdir))


def _take(workdir: str) -> IO[str] | contextlib.ExitStack:
  """The open lock, whose closing gives the workdir free."""
  with contextlib.ExitStack() as failed:
    if paths.is_remote(workdir):
      with writing(workdir, 'the lock of the workdir'):
        failed.enter_context(lease.hold(workdir))
      return failed.pop_all()
    with writing(workdir, 'the lock of the workdir'):
      lock = failed.enter_context(open(os.path.join(workdir, LOCK), 'a+', encoding='utf-8', errors='replace'))
      try:
        locked = _lock(lock, wait=False)
      except BlockingIOError as error:
        raise UserError(
          f'{workdir} is in use: {lease.told(_signed(lock))}. Wait for it or stop it, or take another --workdir.'
        ) from error
      _sign(lock)
      if locked:
        _sweep(workdir)
        _sweep(os.path.join(workdir, checkpoints.FOLDER))
    failed.pop_all()
  return lock


def _sign(lock: IO[str]) -> None:
  """Says in the lock file who holds it. The file stays: whoever removed it might remove another's."""
  lock.truncate(0)
  json.dump(lease.signature(), lock)
  lock.flush()


def _signed(lock: IO[str]) -> str:
  lock.seek(0)
  return lock.read()


@contextlib.contextmanager
def turn(folder: str) -> Iterator[None]:
  """Waits for the turn to write into a folder, so that the files of two reports do not mix; makes it if missing.

  What killed processes left half-written there is removed first. For one process of a run. In a bucket nobody waits:
  each object of a report is whole, and the last one to write has the last word.
  """
  if paths.is_remote(folder):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, LOCK), 'a', encoding='utf-8') as lock:
    if _lock(lock, wait=True):
      _sweep(folder)
    yield


def _lock(file: IO[str], *, wait: bool) -> bool:
  """Locks an open file, and says whether the file system can; raises BlockingIOError if another has it locked."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise
  except OSError as error:
    logging.warning(
      'The file system has no locks (%s: %s): nothing keeps two runs from writing into one folder.',
      file.name,
      error.strerror,
    )
    return False
  return True


def _sweep(folder: str) -> None:
  left = durable.sweep(folder) if os.path.isdir(folder) else 0
  if left:
    logging.info('Removed %d files that killed processes left half-written in %s', left, folder)


@contextlib.contextmanager
def writing(workdir: str, what: str, kind: type[Exception] = OSError) -> Iterator[None]:
  """Makes a failure to write, such as a full disk, a UserError that names what a later run goes on from.

  Args:
    workdir: of the run.
    what: is written.
    kind: of exception that says so.
  """
  try:
    yield
  except kind as error:
    try:
      newest = checkpoints.latest(workdir)
      kept = f'the last whole checkpoint is {newest}' if newest else 'there is no checkpoint yet'
    except OSError:  # of a bucket that cannot be reached
      kept = 'its checkpoints cannot be listed now'
    # TensorFlow puts the name of its function before what it says.
    reason = getattr(error, 'strerror', None) or re.sub(r'\{\{.*?\}\} *', '', str(error)) or type(error).__name__
    reason = reason.splitlines()[0]
    raise UserError(
      f'Could not write {what} in {workdir} ({reason}); {kept}. Mend that (is the disk full?), then run the same '
      'command again.'
    ) from error
