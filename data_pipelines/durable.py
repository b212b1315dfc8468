"""Files that are whole or not there, whatever kills the process or the machine while they are written.

Everything that a run, a build or an export leaves goes through here: a temporary name, flush to disk, rename, flush the
folder. A kill leaves at most hidden files and folders `.<random>.tmp`, which `sweep` removes.

An object in a bucket (`paths`) is whole or not there by itself: it is written at once, when all of it is known.
"""

import contextlib
import ctypes
import errno
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO

from data_pipelines import paths

_SUFFIX = '.tmp'
# Of Linux's renameat2(2): paths as they are, and the two names change places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
  if paths.is_remote(path):
    whole = io.BytesIO() if 'b' in mode else io.StringIO(newline='')
    yield whole
    data = whole.getvalue()
    paths.write_object(path, data.encode() if isinstance(data, str) else data)
    return
  temporary = _beside(path, _SUFFIX)
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


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[str]:
  """A folder to fill that takes the place of `path` when the block ends; if the block raises, `path` stays as it was.

  On Linux, where the file system can exchange two names, whoever looks at `path` finds the old folder or the new one,
  wholly, at any time. Elsewhere there is a moment in which it finds neither; a kill just then leaves the old folder
  beside it as `.<random>.old`, which nothing removes.

  In a bucket the old objects go before the new ones come, those that describe the others (`.json`) last: a kill leaves
  a part of one of them, never files of both.

  Args:
    path: of the folder, which may be there or not; the folder that it is in must exist.

  Raises:
    OSError: if it cannot be written; nothing is left behind.
  """
  if paths.is_remote(path):
    with tempfile.TemporaryDirectory(prefix='cover_jax-') as filled:
      yield filled
      paths.remove(path)
      paths.upload(filled, os.fspath(path))
    return
  path = os.path.realpath(path)  # the exchange of a link would leave what it points at as it was
  temporary = _beside(path, _SUFFIX)
  try:
    os.mkdir(temporary)
    yield temporary
    for folder, _, names in os.walk(temporary):
      for name in names:
        flush(os.path.join(folder, name))
      flush_folder(folder)
    if not os.path.lexists(path):
      os.rename(temporary, path)
    elif not _exchange(temporary, path):
      old = _beside(path, '.old')
      os.rename(path, old)
      try:
        os.rename(temporary, path)
      except BaseException:
        os.rename(old, path)
        raise
      temporary = old
    flush_folder(os.path.dirname(path))
  finally:
    shutil.rmtree(temporary, ignore_errors=True)  # half of the new folder, or the old one


def link(source: str | os.PathLike, path: str | os.PathLike) -> None:
  """Makes `path` another name of a file (a copy of it, where the file system has no links), replacing what is there.

  Raises:
    OSError: if it cannot be written; nothing is left behind.
  """
  if os.path.exists(path) and os.path.samefile(source, path):
    return  # a rename between two names of one file does nothing, and leaves both
  temporary = _beside(os.fspath(path), _SUFFIX)
  try:
    try:
      os.link(source, temporary)
    except OSError:
      shutil.copyfile(source, temporary)
      flush(temporary)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise
  flush_folder(os.path.dirname(path))


def flush(path: str | os.PathLike) -> None:
  """Makes the content of a file last through a power cut."""
  with open(path, 'rb') as f:
    os.fsync(f.fileno())


def flush_folder(folder: str | os.PathLike) -> None:
  """Makes the names in a folder last through a power cut, where the file system can."""
  with contextlib.suppress(OSError):  # some network file systems refuse; they order renames themselves
    handle = os.open(os.fspath(folder) or '.', os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def sweep(folder: str | os.PathLike) -> int:
  """Removes what killed processes left of `replacing` and `replacing_folder` in a folder; returns how many it was.

  Only for a folder that no other process writes into at the time.
  """
  left = [entry for entry in os.scandir(folder) if _is_temporary(entry.name)]
  for entry in left:
    if entry.is_dir(follow_symlinks=False):
      shutil.rmtree(entry.path)
    else:
      os.remove(entry.path)
  return len(left)


def _beside(path: str, suffix: str) -> str:
  # Not made from the name, which may be as long as the file system allows.
  return os.path.join(os.path.dirname(path), f'.{uuid.uuid4().hex}{suffix}')


def _exchange(a: str, b: str) -> bool:
  """Lets two names change places, at once; False where the system or the file system cannot."""
  renameat2 = getattr(ctypes.CDLL(None, use_errno=True), 'renameat2', None)
  if renameat2 is None:
    return False
  if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
    return True
  code = ctypes.get_errno()
  if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
    return False
  raise OSError(code, os.strerror(code), b)


def _is_temporary(name: str) -> bool:
  return len(name) == 33 + len(_SUFFIX) and name.startswith('.') and name.endswith(_SUFFIX)
