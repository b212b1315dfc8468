"""Checkpoints of one host, written by `clu.checkpoint`: `ckpt-<n>.flax`, msgpack of the whole tree.

CLU writes into a folder beside, `.saving`; what it wrote is on disk before it gets the name of a checkpoint. So a file
of that name was whole once, and its last entry, 'sha256', tells whether it still is. The newest one is that of the
highest number. TensorFlow's own files (the pointer `checkpoint`, `.index`, `.data-*`) are there for CLU's and
TensorFlow's readers: nothing here needs them, and reading needs no TensorFlow.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import flax.serialization
import msgpack
from absl import logging

from data_pipelines import durable, paths

SUFFIX = '.flax'
STAGING = '.saving'
_POINTER = 'checkpoint'
_NUMBERED = re.compile(r'ckpt-(\d+)\.')
_FILE = re.compile(r'ckpt-(\d+)\.(?:flax|index|data-\d+-of-\d+)')

# The last entry of a file holds two SHA-256: of what comes before 'state', and of all that comes before itself. The key
# and the head of the value, as msgpack writes them:
_KEY, _DIGEST = 'sha256', 32
_MARK = msgpack.packb(_KEY) + b'\xc4' + bytes([2 * _DIGEST])


class Saver:
  """Saves at once: `save` returns when the checkpoint is whole and on disk. Continues the numbering that it finds."""

  def __init__(self, folder: str, keep: int):
    from clu import checkpoint as clu_checkpoint  # imports TensorFlow

    self._clu, self._folder, self._keep = clu_checkpoint, folder, keep
    with self._staging():  # can be written
      pass
    _say_if_astray(folder)

  def save(self, tree: Mapping[str, Any]) -> str:
    """Writes {'about': JSON text, 'state', 'interval'} and returns the path; what fails leaves nothing behind."""
    # Files that a resume refused have numbers, too.
    number = max((int(m.group(1)) for m in map(_NUMBERED.match, os.listdir(self._folder)) if m), default=0)
    with self._staging() as staging:
      if number:
        durable.write(os.path.join(staging, _POINTER), _pointer([number]))
      clu = self._clu.Checkpoint(staging, max_to_keep=1)
      clu.tf_checkpoint.save_counter.assign(number)
      staged = clu.save({**tree, _KEY: bytes(2 * _DIGEST)})
      _seal(staged + SUFFIX)
      self._publish(staging)
    return os.path.join(self._folder, os.path.basename(staged) + SUFFIX)

  def wait(self) -> None:
    """Nothing is ever under way."""

  @contextlib.contextmanager
  def _staging(self) -> Iterator[str]:
    staging = os.path.join(self._folder, STAGING)
    os.mkdir(staging)
    try:
      yield staging
    finally:
      shutil.rmtree(staging, ignore_errors=True)

  def _publish(self, staging: str) -> None:
    """Gives what CLU wrote its place, says so in the pointer, and lets the oldest go."""
    staged = [path for path, _ in _files(staging)]
    for path in staged:
      durable.flush(path)
    for path in sorted(staged, key=lambda p: p.endswith(SUFFIX)):  # our own file last: then it is a checkpoint
      os.replace(path, os.path.join(self._folder, os.path.basename(path)))
    durable.flush_folder(self._folder)
    numbers = sorted(number for path, number in _files(self._folder) if path.endswith(SUFFIX))[-self._keep :]
    durable.write(os.path.join(self._folder, _POINTER), _pointer(numbers))
    for path, number in _files(self._folder):
      if number < numbers[0]:
        os.remove(path)


def _files(folder: str) -> list[tuple[str, int]]:
  """(path, number) of each file of a checkpoint."""
  names = paths.names(folder)
  return [(os.path.join(folder, m.group()), int(m.group(1))) for m in map(_FILE.fullmatch, names) if m]


def _pointer(numbers: list[int]) -> str:
  """TensorFlow's text file that names the checkpoints of a folder, the newest last."""
  lines = [
    f'model_checkpoint_path: "ckpt-{numbers[-1]}"',
    *(f'all_model_checkpoint_paths: "ckpt-{n}"' for n in numbers),
  ]
  return '\n'.join(lines) + '\n'


def _say_if_astray(folder: str) -> None:
  pointer, newest = os.path.join(folder, _POINTER), kept(folder)[:1]
  try:
    with open(pointer, 'rb') as f:
      named = re.search(rb'^model_checkpoint_path: "(?:.*/)?(.*)"', f.read(), re.MULTILINE)
    named = named.group(1).decode('utf-8', 'replace') + SUFFIX if named else 'nothing'
  except OSError as error:
    named = f'nothing ({error.strerror})'
  if newest and named != os.path.basename(newest[0]):
    logging.warning(
      '%s names %s, and the newest checkpoint that lies there is %s: going by what lies there; '
      'the next save writes the pointer anew.',
      pointer,
      named,
      newest[0],
    )


def kept(folder: str) -> list[str]:
  """All checkpoints of this kind, the newest first; some may be damaged."""
  found = sorted((number, path) for path, number in _files(folder) if path.endswith(SUFFIX))
  return [path for _, path in reversed(found)]


def leftovers(folder: str) -> list[str]:
  """What has no use once there is no checkpoint of this kind any more."""
  found = [os.path.join(folder, _POINTER), *(path for path, _ in _files(folder))]
  return [path for path in found if paths.exists(path)]


def write(path: str, tree: Mapping[str, Any]) -> None:
  """Writes one file {'about': JSON text, 'state': ...} with its checksum, durably."""
  data = flax.serialization.to_bytes({**tree, _KEY: bytes(2 * _DIGEST)})
  digests = _digests(io.BytesIO(data), len(data))
  with durable.replacing(path) as f:
    f.write(memoryview(data)[: -2 * _DIGEST])
    f.write(digests)


def _seal(path: str) -> None:
  """Fills in the checksum of a file that was just written."""
  with open(path, 'r+b') as f:
    size = f.seek(0, os.SEEK_END)
    digests = _digests(f, size)
    f.seek(size - 2 * _DIGEST)
    f.write(digests)


def _digests(f: BinaryIO, size: int) -> bytes:
  """What the last bytes of a file of this size should be."""
  end = _read_head(f)[1]
  f.seek(0)
  running = hashlib.sha256(f.read(end))
  of_head = running.digest()
  left = size - 2 * _DIGEST - end
  while left > 0 and (block := f.read(min(left, 1 << 20))):
    running.update(block)
    left -= len(block)
  running.update(of_head)
  return of_head + running.digest()


def _read_head(f: BinaryIO) -> tuple[Any, int]:
  """(what is under 'about', the number of bytes up to its end). It is written first, so this reads no array."""
  f.seek(0)
  unpacker = msgpack.Unpacker(f)
  if unpacker.read_map_header() == 0 or unpacker.unpack() != 'about':
    raise ValueError('it does not begin with a description')
  return unpacker.unpack(), unpacker.tell()


def _stored_digests(f: BinaryIO) -> bytes | None:
  """The last entry of a file, or None where there is none: it is of a version before checksums, or cut off."""
  size = f.seek(0, os.SEEK_END)
  f.seek(max(0, size - 2 * _DIGEST - len(_MARK)))
  end = f.read()
  return end[len(_MARK) :] if end.startswith(_MARK) else None


def is_whole(path: str) -> bool:
  """Whether a file has an end; only `read` tells whether each bit is what it was."""
  if paths.is_remote(path):
    size, tail = paths.size(path), 2 * _DIGEST + len(_MARK)
    if _stored_digests(io.BytesIO(paths.read_span(path, max(0, size - tail), tail))):
      return True
  else:
    with open(path, 'rb') as f:
      if _stored_digests(f):
        return True
  try:
    read(path)  # of a version before checksums
  except Exception:  # of many classes, by what is wrong
    return False
  return True


def read(path: str) -> dict[str, Any]:
  """{'about': what JSON gives, 'state', 'interval'} as nested dicts of numpy arrays; ValueError if a bit is wrong."""
  data = paths.read(path)
  stored = _stored_digests(io.BytesIO(data))
  if stored and stored != _digests(io.BytesIO(data), len(data)):
    raise ValueError('its checksum is wrong: it is not what was written')
  tree = flax.serialization.msgpack_restore(data)
  if stored:
    del tree[_KEY]
  return {**tree, 'about': json.loads(tree['about'])}


def read_about(path: str) -> Any:
  """What JSON gives of 'about', reading none of the arrays; ValueError if a bit of it is wrong."""
  with paths.open_binary(path) as f:
    text, end = _read_head(f)
    stored = _stored_digests(f)
    f.seek(0)
    if stored and stored[:_DIGEST] != hashlib.sha256(f.read(end)).digest():
      raise ValueError('its checksum is wrong: it is not what was written')
  return json.loads(text)
