"""Arrays that took long to make, kept in a file: what is read back is what was written, or nothing.

A file is a .npz with two more members: a key, which says what the arrays were made from, and a checksum of everything
else. NumPy alone would take a damaged length in a member's header for a shorter array.
"""

import contextlib
import fcntl
import io
import os
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from data_pipelines import durable, paths

_KEY, _CHECKSUM = '.key', '.checksum'  # members that are no arrays of the caller's


def load(path: str) -> tuple[str, dict[str, np.ndarray]] | None:
  """(key, arrays) as they were saved; None where there is no such file or, which the log says, none that is whole."""
  try:
    with io.BytesIO(paths.read(path)) if paths.is_remote(path) else open(path, 'rb') as f:
      stored = np.load(f, allow_pickle=False)
      arrays = {name: stored[name] for name in stored.files}
    checksum = arrays.pop(_CHECKSUM, None)
    if checksum is None:
      logging.info('%s has no checksum, as those of earlier versions, and is made again', path)
      return None
    if int(checksum) != _checksum(arrays):
      raise ValueError('its checksum does not match')
    return str(arrays.pop(_KEY)), arrays
  except FileNotFoundError:
    return None
  except Exception as e:  # NumPy and zipfile raise ValueError, BadZipFile, EOFError, NotImplementedError, ...
    logging.warning('%s cannot be read and is made again: %s', path, e)
    return None


def save(path: str, key: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes arrays under names that do not begin with a dot; the folder is made.

  Raises:
    OSError: it cannot be written.
  """
  arrays = arrays | {_KEY: np.array(key)}
  arrays[_CHECKSUM] = np.array(_checksum(arrays), np.uint32)
  paths.make_folder(os.path.dirname(path))
  with durable.replacing(path) as f:
    np.savez(f, **arrays)


def _checksum(arrays: dict[str, np.ndarray]) -> int:
  checksum = 0
  for name, array in sorted(arrays.items()):
    checksum = zlib.crc32(f'{name} {array.dtype.str} {array.shape};'.encode(), checksum)
    checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
  return checksum


@contextlib.contextmanager
def locked(beside: Sequence[str]) -> Iterator[None]:
  """Lets one process at a time into the block, by a lock beside the first of some paths where one can be.

  Where there can be none (all are remote or in folders that cannot be written, or their file system has no locks),
  everybody gets in. The lock of a process that dies is free at once. Processes on several hosts wait for each other
  as far as their file system shares locks: NFS does, unless it is mounted with nolock or local_lock.
  """
  lock = next(filter(None, (_lock(f'{path}.lock') for path in beside if not paths.is_remote(path))), None)
  try:
    yield
  finally:
    if lock is not None:
      path, handle = lock
      with contextlib.suppress(OSError):
        os.remove(path)  # while it is still locked: who waits for it looks whether it is still there
      os.close(handle)


def _lock(path: str) -> tuple[str, int] | None:
  """(path, open file) when this process alone holds it; None where that cannot be."""
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
      handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
      try:
        try:
          fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          logging.info('Another process holds %s: waiting for what it makes', path)
          fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
          if os.path.samestat(os.fstat(handle), os.stat(path)):
            return path, handle
      except BaseException:
        os.close(handle)
        raise
      os.close(handle)  # of a file that its holder removed: the next in line may have a new one
  except OSError:
    return None
