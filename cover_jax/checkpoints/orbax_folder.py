"""Checkpoints of several hosts, and of any in a bucket, written by Orbax's `CheckpointManager`: folders `ckpt_<step>`.

Each process writes the shards that it holds, in the background, into a folder that gets its name once every process is
done. Before that process 0 reads it all once and leaves the SHA-256 of each file in `sha256.json`; in a bucket, where
folders cannot be renamed, this is what makes it a checkpoint (`bucket.py`). The workdir must be on a file system that
all share. Reading needs no TensorFlow, and works on any number of devices and processes.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.serialization
import jax
import numpy as np
from absl import logging

from cover_jax.checkpoints import bucket
from cover_jax.checkpoints.bucket import MANIFEST as _MANIFEST
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

_PREFIX = 'ckpt'
_ABOUT = os.path.join('about', 'metadata')
_SEALED = 'sealed'  # in the description: there is a list of checksums, and where it is missing it was lost
_PARTS = ('about', 'arrays')


class Saver:
  """Saves in the background: `save` returns when the arrays are copied off the devices."""

  def __init__(self, folder: str, keep: int):
    import orbax.checkpoint as ocp  # takes a second

    if set(paths.absolute(folder)) & set('*?[]\\'):
      raise UserError(
        f'{paths.absolute(folder)} has one of * ? [ ] \\ in its name, and Orbax, which saves for several processes '
        'and in buckets, takes it for a pattern: choose another --workdir.'
      )
    self._folder, self._ocp, self._step, self._saved = folder, ocp, None, False
    self._keep = keep if paths.is_remote(folder) else None  # where Orbax does not know which ones have names
    self._manager = ocp.CheckpointManager(
      paths.absolute(folder),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if self._keep else keep,
        step_prefix=_PREFIX,
        cleanup_tmp_directories=not self._keep,
        save_root_metadata=False,
        # Orbax calls it in process 0, in the background, when all have written and before the folder gets its name.
        async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
      ),
    )

  def save(self, tree: Mapping[str, Any]) -> str:
    """Starts to write {'about': JSON text, 'state', 'interval'}; returns where. All processes must call it."""
    args, about = self._ocp.args, json.loads(tree['about'])
    # The same nested dicts as in the other kind of checkpoint.
    arrays = flax.serialization.to_state_dict({key: tree[key] for key in ('state', 'interval')})
    self._step = about['step']
    if self._keep and jax.process_index() == 0:
      bucket.begin(self._folder, self._path())
    saved = self._manager.save(
      self._step,
      args=args.Composite(about=args.JsonSave(about | {_SEALED: True}), arrays=args.PyTreeSave(arrays)),
      force=True,
    )
    if not saved:
      raise OSError(f'Orbax refused to save step {self._step}')
    self._saved = True
    return self._path()

  def wait(self) -> None:
    """Returns when the last `save` is whole on disk; raises what went wrong with it."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0 and not self._keep:
      durable.flush_folder(self._folder)
    elif jax.process_index() == 0 and self._saved:
      bucket.prune(self._folder, kept(self._folder), self._keep)
    self._saved = False

  def _path(self) -> str:
    return os.path.join(self._folder, f'{_PREFIX}_{self._step}')

  def _seal(self) -> None:
    """Leaves the checksums in the folder that is being written, and has all of it on disk."""
    if self._keep:
      names = _content(self._path())
      with ThreadPoolExecutor(paths.SIDE_BY_SIDE) as pool:
        found = list(pool.map(lambda name: _sha256(os.path.join(self._path(), name)), names))
      durable.write(os.path.join(self._path(), _MANIFEST), _table(dict(zip(names, found, strict=True))))
      return
    (folder,) = glob.glob(glob.escape(self._path()) + '.orbax-checkpoint-tmp*') or [self._path()]
    digests = {}
    for name in _content(folder):
      path = os.path.join(folder, name)
      durable.flush(path)
      digests[name] = _sha256(path)
    for below, _, _ in os.walk(folder):
      durable.flush_folder(below)
    durable.write(os.path.join(folder, _MANIFEST), _table(digests))


def _table(digests: Mapping[str, str]) -> str:
  return json.dumps(digests, indent=1) + '\n'


def _content(folder: str) -> list[str]:
  """The names of all files that are read, the largest first: processes that share them get about as much each."""
  names = sorted(os.path.join(part, n) for part in _PARTS for n in paths.files_below(os.path.join(folder, part)))
  with ThreadPoolExecutor(paths.SIDE_BY_SIDE) as pool:
    sizes = dict(zip(names, pool.map(lambda name: paths.size(os.path.join(folder, name)), names), strict=True))
  return sorted(names, key=lambda name: -sizes[name])


def _sha256(path: str) -> str:
  if paths.is_remote(path):
    return hashlib.sha256(paths.read(path)).hexdigest()
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def check(path: str) -> None:
  """Raises ValueError if a file of a checkpoint is not what was written.

  Several processes share the work: each checks every n-th file, and they must tell each other. Checkpoints of a version
  before checksums are not checked.
  """
  if (digests := _digests(path)) is None:
    return
  names = list(digests)[jax.process_index() :: jax.process_count()]
  with ThreadPoolExecutor(paths.SIDE_BY_SIDE if paths.is_remote(path) else 1) as pool:
    list(pool.map(lambda name: _check_file(path, name, digests), names))


def _digests(path: str) -> dict[str, str] | None:
  manifest = os.path.join(path, _MANIFEST)
  if not paths.exists(manifest):
    if _raw_about(path).get(_SEALED):
      raise ValueError(f'{_MANIFEST}, the list of its checksums, is missing')
    return None
  return json.loads(paths.read(manifest))


def _check_file(path: str, name: str, digests: Mapping[str, str]) -> None:
  if _sha256(os.path.join(path, name)) != digests[name]:
    raise ValueError(f'the checksum of {name} is wrong: it is not what was written')


def kept(folder: str) -> list[str]:
  """All checkpoints of this kind, the newest first; some may be damaged."""
  names = paths.names(folder)
  steps = sorted(int(m.group(1)) for m in (re.fullmatch(rf'{_PREFIX}_(\d+)', name) for name in names) if m)
  found = [os.path.join(folder, f'{_PREFIX}_{step}') for step in reversed(steps)]
  if found and paths.is_remote(folder):  # where one that is being written has its name already
    left = bucket.unfinished(folder)
    found = [path for path in found if path != left]
  return found


leftovers = kept  # what has no use once there is no checkpoint of this kind any more


def is_whole(path: str) -> bool:
  """Whether a folder is a checkpoint that was finished; only `check` tells whether each bit is what it was."""
  if not all(paths.is_folder(os.path.join(path, part)) for part in _PARTS):
    return False
  if paths.is_remote(path) and paths.exists(os.path.join(path, _MANIFEST)):
    return True
  import orbax.checkpoint as ocp

  return ocp.path.step.is_checkpoint_finalized(paths.absolute(path))


def read_about(path: str) -> Any:
  """What JSON gives of 'about'; ValueError if a bit of it is wrong."""
  if (digests := _digests(path)) is not None:
    _check_file(path, _ABOUT, digests)
  about = _raw_about(path)
  about.pop(_SEALED, None)
  return about


def _raw_about(path: str) -> dict[str, Any]:
  about = json.loads(paths.read(os.path.join(path, _ABOUT)))
  if not isinstance(about, dict):
    raise ValueError('its description is no table')
  return about


def read(path: str) -> dict[str, Any]:
  """{'about': dict, 'state', 'interval'} as nested dicts of numpy arrays; ValueError if a bit is wrong."""
  check(path)
  numpy = lambda ocp, _: ocp.RestoreArgs(restore_type=np.ndarray)
  return {**_restore(path, read_shapes(path), numpy), 'about': read_about(path)}


def read_shapes(path: str) -> dict[str, Any]:
  """{'state', 'interval'} as nested dicts of what has a shape, without reading an array."""
  with _reader() as (_, reader):
    return reader.metadata(_arrays(path)).item_metadata.tree


def read_onto(path: str, placed: Any) -> dict[str, Any]:
  """Nested dicts of arrays on the mesh; a process reads only what its devices hold.

  Args:
    path: of the checkpoint.
    placed: nested dicts with a `NamedSharding` for each array that is wanted: all of {'state', 'interval'}, or a part.
  """
  by_name = {jax.tree_util.keystr(k): s for k, s in jax.tree_util.tree_leaves_with_path(placed)}
  tree = _part(read_shapes(path), placed)
  return _restore(path, tree, lambda ocp, name: ocp.ArrayRestoreArgs(sharding=by_name[name]))


def _part(tree: Any, like: Any) -> Any:
  """The entries of nested dicts that another one has."""
  return {k: _part(v, like[k]) for k, v in tree.items() if k in like} if isinstance(tree, dict) else tree


def _arrays(path: str) -> str:
  return os.path.join(paths.absolute(path), 'arrays')


@contextlib.contextmanager
def _reader():
  import orbax.checkpoint as ocp

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # it warns of metadata that only a whole checkpoint has, and this is a part
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      yield ocp, reader
  finally:
    logging.set_verbosity(verbosity)


def _restore(path, tree, args_of):
  with _reader() as (ocp, reader):
    restore_args = jax.tree_util.tree_map_with_path(lambda k, _: args_of(ocp, jax.tree_util.keystr(k)), tree)
    args = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True)
    return reader.restore(_arrays(path), args=args)
