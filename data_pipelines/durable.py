"""Files that are whole or not there, whatever kills the process or the machine while they are written.

Everything that a run, a build or an export leaves goes through here: a temporary name, flush to disk, rename, flush the
folder. A kill leaves at most hidden files `.<random>.tmp`, which `sweep` removes.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import IO

_SUFFIX = '.tmp'


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'wb') -> Iterator[IO]:
  """A file to write that takes the place of `path` when the block ends; if the block raises, `path` stays as it was.

  Several processes may replace one path at a time: the last wins, whole.

  Args:
    path: of the file; its folder must exist.
    mode: 'wb', or 'w' for UTF-8 text.

  Raises:
    OSError: if it cannot be written; nothing is left behind.
  """
  path = os.fspath(path)
  # Not made from the name, which may be as long as the file system allows.
  temporary = os.path.join(os.path.dirname(path), f'.{uuid.uuid4().hex}{_SUFFIX}')
  try:
    with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8') as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
  flush_folder(os.path.dirname(path))


def write(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes a whole file, text as UTF-8; see `replacing`."""
  with replacing(path, 'w' if isinstance(data, str) else 'wb') as f:
    f.write(data)


def flush_folder(folder: str | os.PathLike) -> None:
  """Makes the names in a folder last through a power cut, where the file system can."""
  with contextlib.suppress(OSError):  # some network file systems refuse; they order renames themselves
    handle = os.open(os.fspath(folder) or '.', os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def sweep(folder: str | os.PathLike) -> int:
  """Removes what killed processes left of `replacing` in a folder (not below it); returns how many files it was.

  Only for a folder that no other process writes into at the time.
  """
  left = [entry.path for entry in os.scandir(folder) if _is_temporary(entry.name)]
  for path in left:
    os.remove(path)
  return len(left)


def _is_temporary(name: str) -> bool:
  return len(name) == 33 + len(_SUFFIX) and name.startswith('.') and name.endswith(_SUFFIX)
