"""Checkpoints of several hosts, written by Orbax's `CheckpointManager`: folders `ckpt_<step>`.

Each process writes the shards that it holds, in the background, into a folder that gets its name (or, where folders
cannot be renamed, a commit file) once every process is done. The workdir must be on a file system that all share.
Reading needs no TensorFlow, and works on any number of devices and processes.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
from absl import logging

_PREFIX = 'ckpt'


class Saver:
  """Saves in the background: `save` returns when the arrays are copied off the devices."""

  def __init__(self, folder: str, keep: int):
    import orbax.checkpoint as ocp  # takes a second

    self._folder, self._ocp = folder, ocp
    self._manager = ocp.CheckpointManager(
      os.path.abspath(folder),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, step_prefix=_PREFIX, cleanup_tmp_directories=True, save_root_metadata=False
      ),
    )

  def save(self, tree: Mapping[str, Any]) -> str:
    """Starts to write {'about': JSON text, 'state', 'interval'}; returns where. All processes must call it."""
    args, about = self._ocp.args, json.loads(tree['about'])
    # The same nested dicts as in the other kind of checkpoint.
    arrays = flax.serialization.to_state_dict({key: tree[key] for key in ('state', 'interval')})
    step = about['step']
    saved = self._manager.save(
      step, args=args.Composite(about=args.JsonSave(about), arrays=args.PyTreeSave(arrays)), force=True
    )
    if not saved:
      raise OSError(f'Orbax refused to save step {step}')
    return os.path.join(self._folder, f'{_PREFIX}_{step}')

  def wait(self) -> None:
    """Returns when the last `save` is whole on disk; raises what went wrong with it."""
    self._manager.wait_until_finished()


def newest(folder: str) -> str | None:
  """The newest whole checkpoint of a folder, or None."""
  return next((path for path in kept(folder) if is_checkpoint(path)), None)


def kept(folder: str) -> list[str]:
  """All checkpoints of this kind, the newest first."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  steps = sorted(int(m.group(1)) for m in (re.fullmatch(rf'{_PREFIX}_(\d+)', name) for name in names) if m)
  return [os.path.join(folder, f'{_PREFIX}_{step}') for step in reversed(steps)]


def is_checkpoint(path: str) -> bool:
  """Whether a folder is a whole checkpoint."""
  if not os.path.isdir(os.path.join(path, 'arrays')) or not os.path.isdir(os.path.join(path, 'about')):
    return False
  import orbax.checkpoint as ocp

  return ocp.path.step.is_checkpoint_finalized(os.path.abspath(path))


def read_about(path: str) -> dict[str, Any]:
  """The 'about' of a checkpoint."""
  with open(os.path.join(path, 'about', 'metadata'), encoding='utf-8') as f:
    return json.load(f)


def read(path: str) -> dict[str, Any]:
  """{'about': dict, 'state', 'interval'} as nested dicts of numpy arrays."""
  return {**_restore(path, lambda ocp, _: ocp.RestoreArgs(restore_type=np.ndarray)), 'about': read_about(path)}


def read_shapes(path: str) -> dict[str, Any]:
  """{'state', 'interval'} as nested dicts of what has a shape, without reading an array."""
  with _reader() as (_, reader):
    return reader.metadata(_arrays(path)).item_metadata.tree


def read_onto(path: str, placed: Any) -> dict[str, Any]:
  """{'state', 'interval'} as nested dicts of arrays on the mesh; a process reads only what its devices hold.

  Args:
    path: of the checkpoint.
    placed: the same nested dicts with a `NamedSharding` for each array.
  """
  by_name = {jax.tree_util.keystr(k): s for k, s in jax.tree_util.tree_leaves_with_path(placed)}
  return _restore(path, lambda ocp, name: ocp.ArrayRestoreArgs(sharding=by_name[name]))


def _arrays(path: str) -> str:
  return os.path.join(os.path.abspath(path), 'arrays')


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


def _restore(path, args_of):
  with _reader() as (ocp, reader):
    tree = reader.metadata(_arrays(path)).item_metadata.tree
    restore_args = jax.tree_util.tree_map_with_path(lambda k, _: args_of(ocp, jax.tree_util.keystr(k)), tree)
    return reader.restore(_arrays(path), args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))
