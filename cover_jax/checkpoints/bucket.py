"""What is different where the checkpoints of a run are objects in a bucket: there are no renames and no links.

A folder that is being written has the name of a checkpoint at once, so `saving.json` says which one that is, before the
first object of it is there. Its list of checksums, `sha256.json`, is its last object but Orbax's own: a folder that has
it is whole. A checkpoint that a run keeps for good (`best`, `step-100`) stays where it is; an object of that name says
which one it is.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data_pipelines import durable, paths

MANIFEST = 'sha256.json'
_SAVING = 'saving.json'
_NAME = re.compile(r'best|step-\d+')


def begin(folder: str, checkpoint: str) -> None:
  """Says that a checkpoint of a folder is going to be written."""
  durable.write(os.path.join(folder, _SAVING), json.dumps({'checkpoint': os.path.basename(checkpoint)}) + '\n')


def unfinished(folder: str) -> str | None:
  """The checkpoint of a folder whose writing was begun and not finished, if any; it may not have an object yet."""
  try:
    name = json.loads(paths.read(os.path.join(folder, _SAVING)))['checkpoint']
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None
  checkpoint = os.path.join(folder, os.path.basename(str(name)))
  return None if paths.exists(os.path.join(checkpoint, MANIFEST)) else checkpoint


def tidy(folder: str) -> None:
  """Removes what a killed save left."""
  if left := unfinished(folder):
    remove(left)
  paths.remove(os.path.join(folder, _SAVING))


def remove(checkpoint: str) -> None:
  """Removes a checkpoint: first what says that it is whole, so that a kill leaves none that seems to be."""
  paths.remove(os.path.join(checkpoint, MANIFEST))
  paths.remove(checkpoint)


def give_name(checkpoint: str, name: str) -> None:
  """Makes the path `name` stand for a checkpoint of the same folder."""
  durable.write(name, os.path.basename(checkpoint) + '\n')


def meant(path: str) -> str:
  """The checkpoint that a path stands for, where it is a name in a bucket; else the path."""
  if not paths.is_remote(path) or not _NAME.fullmatch(os.path.basename(path)) or not paths.is_file(path):
    return path
  return os.path.join(os.path.dirname(path), os.path.basename(paths.read(path).decode('utf-8', 'replace').strip()))


def named(folder: str) -> Iterator[str]:
  """The checkpoints of a folder that have names."""
  names = [os.path.join(folder, name) for name in paths.names(folder) if _NAME.fullmatch(name)]
  with ThreadPoolExecutor(paths.SIDE_BY_SIDE) as pool:
    found = list(pool.map(meant, names))
  return (checkpoint for checkpoint, name in zip(found, names, strict=True) if checkpoint != name)


def prune(folder: str, kept: Sequence[str], keep: int) -> None:
  """Removes the checkpoints of a folder, the newest first in `kept`, but for the last `keep` and those with names."""
  if len(kept) > keep:
    stay = set(named(folder))
    for checkpoint in kept[keep:]:
      if checkpoint not in stay:
        remove(checkpoint)


def move(checkpoint: str, target: str) -> None:
  """Gives a checkpoint another path, by copies; a kill on the way leaves it where it was."""
  paths.copy_objects(checkpoint, target, last=MANIFEST)
  remove(checkpoint)
