"""Checkpoints of one host, written by `clu.checkpoint`: `ckpt-<n>.flax`, msgpack of the whole tree.

TensorFlow's text file `checkpoint` is replaced, atomically, only after the data is whole, so a killed or failed save
leaves the previous checkpoint as it was. Reading needs no TensorFlow.
"""

import contextlib
import glob
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import msgpack

SUFFIX = '.flax'


class Saver:
  """Saves at once: `save` returns when the checkpoint is whole. Continues the numbering that it finds."""

  def __init__(self, folder: str, keep: int):
    from clu import checkpoint as clu_checkpoint  # imports TensorFlow

    self._folder = folder
    self._clu = clu_checkpoint.Checkpoint(folder, max_to_keep=keep)
    if self._clu.latest_checkpoint:
      # CLU would start over and delete what is there.
      self._clu.tf_checkpoint.restore(self._clu.latest_checkpoint)

  def save(self, tree: Mapping[str, Any]) -> str:
    """Writes {'about': JSON text, 'state', 'interval'} and returns the path; what fails leaves nothing behind."""
    before = newest(self._folder)
    try:
      return self._clu.save(tree) + SUFFIX
    except Exception:
      number = int(re.search(r'ckpt-(\d+)', os.path.basename(before)).group(1)) if before else 0
      for path in glob.glob(os.path.join(glob.escape(self._folder), f'ckpt-{number + 1}.*')):
        with contextlib.suppress(OSError):
          os.remove(path)
      raise

  def wait(self) -> None:
    """Nothing is ever under way."""


def newest(folder: str) -> str | None:
  """The newest whole checkpoint of a folder, or None."""
  pointer = os.path.join(folder, 'checkpoint')
  if not os.path.exists(pointer):
    return None
  with open(pointer, encoding='utf-8') as f:
    match = re.search(r'^model_checkpoint_path: "(.*)"', f.read(), re.MULTILINE)
  return os.path.join(folder, os.path.basename(match.group(1)) + SUFFIX) if match else None


def kept(folder: str) -> list[str]:
  """The files of all checkpoints of this kind, the pointer first."""
  files = [os.path.join(folder, 'checkpoint'), *glob.glob(os.path.join(glob.escape(folder), 'ckpt-*'))]
  return [f for f in files if os.path.exists(f)]


def read(path: str) -> dict[str, Any]:
  """{'about': dict, 'state', 'interval'} as nested dicts of numpy arrays."""
  with open(path, 'rb') as f:
    tree = flax.serialization.msgpack_restore(f.read())
  return {**tree, 'about': json.loads(tree['about'])}


def read_about(path: str) -> dict[str, Any]:
  """The 'about' of a checkpoint. It is written first, so this reads none of the arrays."""
  with open(path, 'rb') as f:
    unpacker = msgpack.Unpacker(f)
    for _ in range(unpacker.read_map_header()):
      if unpacker.unpack() == 'about':
        return json.loads(unpacker.unpack())
      unpacker.skip()
  raise KeyError('about')
