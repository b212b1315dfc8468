"""Files and folders by their path: on a disk, or objects in a bucket (`gs://`). Everything that may lie in either goes
through here and through `durable`, which writes.

A path is a string. On a disk these functions are those of `os`. Elsewhere they are the file systems of `etils.epath`:
TensorFlow's where it is installed, else fsspec's (`EPATH_USE_TF=false` chooses that; `pip install gcsfs` brings it). A
bucket has no folders, links or renames: a folder is there while an object lies below it. Whatever a file system raises
is an OSError with a `strerror`.
"""

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from data_pipelines.contract import UserError

SIDE_BY_SIDE = 16  # requests to a bucket: one alone waits for the network most of its time


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is of a bucket."""
  return '://' in os.fspath(path)


def absolute(path: str) -> str:
  """The path from any working directory; `os.path.abspath` takes the path of a bucket for a local one."""
  return path.rstrip('/') if is_remote(path) else os.path.abspath(path)


def exists(path: str) -> bool:
  """Whether there is a file or folder."""
  if not is_remote(path):
    return os.path.exists(path)
  with told(path):
    return bool(_system(path).exists(path))


def is_folder(path: str) -> bool:
  if not is_remote(path):
    return os.path.isdir(path)
  with told(path):
    return bool(_system(path).isdir(path.rstrip('/')))


def is_file(path: str) -> bool:
  return exists(path) and not is_folder(path) if is_remote(path) else os.path.isfile(path)


def size(path: str) -> int:
  """Bytes of a file."""
  if not is_remote(path):
    return os.path.getsize(path)
  with told(path):
    return int(_system(path).stat(path).length)


def names(folder: str) -> list[str]:
  """The names in a folder; [] where there is none."""
  if not is_remote(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []
  try:
    with told(folder):
      found = _system(folder).listdir(folder.rstrip('/'))
  except FileNotFoundError:
    return []
  own = os.path.basename(folder.rstrip('/'))  # an object of this name and '/' marks a folder
  return sorted({name for f in found if (name := f.rstrip('/')) and (f.rstrip('/') != own or not f.endswith('/'))})


def files_below(folder: str) -> list[str]:
  """The files in a folder and in those below, as paths from it."""
  if not is_remote(folder):
    found = [os.path.join(below, name) for below, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in found)
  start = folder.rstrip('/') + '/'
  with told(folder):
    walked = [(os.fspath(b), list(files)) for b, _, files in _system(folder).walk(folder.rstrip('/'))]
  found = []
  for below, files in walked:
    below = below if is_remote(below) else f'{folder.partition("://")[0]}://{below}'  # fsspec leaves it out
    found += [f'{below.rstrip("/")}/{name}'.removeprefix(start) for name in files if name]
  return sorted(found)


def open_binary(path: str) -> IO[bytes]:
  """A file for reading, as a context manager."""
  return open(path, 'rb') if not is_remote(path) else _open_remote(path)


@contextlib.contextmanager
def _open_remote(path: str) -> Iterator[IO[bytes]]:
  with told(path), _system(path).open(path, 'rb') as f:
    yield f


def read(path: str) -> bytes:
  """All of a file."""
  if not is_remote(path):
    with open(path, 'rb') as f:
      return f.read()
  with told(path):
    if (fs := _fsspec(path)) is not None:
      return fs.cat_file(path)
    with _system(path).open(path, 'rb') as f:
      return f.read()


def read_span(path: str, start: int, length: int) -> bytes:
  """Bytes of a file from `start` on, fewer where it ends before: of a bucket in one request.

  TensorFlow's file system asks for whole blocks (GCS_READ_CACHE_BLOCK_SIZE_MB) that hold them.
  """
  with told(path):
    if (fs := _fsspec(path)) is not None:
      try:
        return fs.cat_file(path, start, start + length)
      except Exception as error:
        if _is_behind_the_end(error):
          return b''
        raise
    with _system(path).open(path, 'rb') as f:
      try:
        f.seek(start)
        return f.read(length)
      except Exception as error:
        if _is_behind_the_end(error):
          return b''
        raise


def write_object(path: str, data: bytes) -> None:
  """Puts an object, whole, in place of what has its path. Of a bucket; files are written by `durable`."""
  with told(path):
    if (fs := _fsspec(path)) is not None:
      fs.pipe_file(path, data)
      return
    with _system(path).open(path, 'wb') as f:
      f.write(data)


def make_folder(folder: str) -> None:
  """Makes a folder, and those that it is in, if they are missing; a bucket needs none."""
  if not is_remote(folder):
    os.makedirs(folder, exist_ok=True)


def remove(path: str) -> None:
  """Removes a file, or a folder with all that is in it; nothing where there is none."""
  if is_remote(path):
    with told(path), contextlib.suppress(FileNotFoundError):
      (_system(path).rmtree if is_folder(path) else _system(path).remove)(path)
  elif os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.lexists(path):
    os.remove(path)


def copy_objects(folder: str, target: str, last: str = '') -> None:
  """Copies the files of a folder of a bucket into another one, side by side.

  Args:
    folder: that is copied.
    target: that it is copied to.
    last: name of the file that is copied when all others are there.
  """
  found = files_below(folder)
  copy = lambda name: write_object(f'{target}/{name}', read(f'{folder}/{name}'))
  with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
    list(pool.map(copy, [name for name in found if name != last]))
  if last in found:
    copy(last)


def upload(folder: str, target: str) -> None:
  """Copies a local folder into a folder of a bucket; what describes the rest (`.json`) is copied last."""
  found = files_below(folder)
  put = lambda name: write_object(f'{target}/{name}', read(os.path.join(folder, name)))
  with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
    list(pool.map(put, [name for name in found if not name.endswith('.json')]))
  for name in found:
    if name.endswith('.json'):
      put(name)


@contextlib.contextmanager
def local(path: str) -> Iterator[str]:
  """The path of a file for those who read disks only: itself, or of a copy that is there within the block.

  Raises:
    UserError: it cannot be fetched. What the block says of the copy in a UserError is said of the file.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='cover_jax-') as folder:
    copy = os.path.join(folder, os.path.basename(path))
    try:
      with open(copy, 'wb') as to, open_binary(path) as f:
        while block := f.read(1 << 24):
          to.write(block)
    except OSError as error:
      raise UserError(f'{path} cannot be fetched ({error.strerror}).') from error
    try:
      yield copy
    except UserError as error:
      error.args = tuple(arg.replace(copy, path) if isinstance(arg, str) else arg for arg in error.args)
      raise


@contextlib.contextmanager
def filling(path: str) -> Iterator[str]:
  """The path of a file for those who write to disks only: itself, or one whose file is put there after the block.

  The name may get an ending in the block.
  """
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='cover_jax-') as folder:
    yield os.path.join(folder, os.path.basename(path))
    upload(folder, os.path.dirname(path))


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
  """Makes what a file system raises an OSError that says what is wrong, as those of a disk do."""
  try:
    yield
  except OSError as error:
    if error.strerror is not None:
      raise
    if isinstance(error, FileNotFoundError):
      raise FileNotFoundError(errno.ENOENT, 'there is none', path) from error
    raise OSError(errno.EIO, _said(error), path) from error
  except Exception as error:
    of = type(error).__module__.split('.')[0]
    if of not in ('tensorflow', 'gcsfs', 'fsspec', 'aiohttp', 'google') and 'Bad Request' not in str(error):
      raise
    if type(error).__name__ == 'NotFoundError':
      raise FileNotFoundError(errno.ENOENT, 'there is none', path) from error
    raise OSError(errno.EIO, _said(error), path) from error


def unreachable(error: OSError) -> str:
  """What to tell of an error that came of a bucket, such as one that may not be read; '' of another one."""
  return f'{error.filename} cannot be used ({error.strerror}).' if is_remote(str(error.filename or '')) else ''


def _said(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def _is_behind_the_end(error: Exception) -> bool:
  """TensorFlow raises OutOfRangeError for a seek behind the end; a bucket answers 416 to such a request."""
  return type(error).__name__ == 'OutOfRangeError' or getattr(error, 'code', None) == 416 or '416' in str(error)


def _system(path: str) -> Any:
  """What epath takes for a path of a bucket; for the schemes that it does not know, TensorFlow's file systems."""
  from etils.epath import backend

  return _known(path.partition('://')[0]) or backend.tf_backend


def _known(scheme: str) -> Any:
  from etils import epath
  from etils.epath import backend

  try:
    path = epath.Path(f'{scheme}://bucket/object')
  except KeyError:
    return None
  chosen = path._backend  # epath has no public name for its choice, and no reading of a part
  if chosen is backend.fsspec_backend:
    _forget_listings(scheme)
  return chosen


@functools.cache
def _forget_listings(scheme: str) -> None:
  """fsspec keeps what it listed, and would not see what another process wrote since."""
  from etils.epath import backend

  fs = backend.fsspec_backend.fs(f'{scheme}://bucket')
  fs.invalidate_cache()
  fs.dircache.use_listings_cache = False


def _fsspec(path: str) -> Any:
  """fsspec's file system of a path, where epath takes that; else None."""
  from etils.epath import backend

  system = _system(path)
  return system.fs(path) if system is backend.fsspec_backend else None
