"""Which checkpoints lie in a workdir, which of them are whole, and the newest one that can be read."""

import os
import re
import types
from collections.abc import Callable
from typing import Any

from absl import logging

from cover_jax.checkpoints import bucket, clu_file, orbax_folder
from cover_jax.checkpoints.contents import check_about
from cover_jax.runtime import processes
from data_pipelines import paths
from data_pipelines.contract import UserError

FOLDER = 'checkpoints'
REFUSED = '.refused'
_NAMED = re.compile(r'(?:best|step-\d+)(?:\.flax)?')
NO_OTHER = (
  'no other checkpoint in {} is whole: put a copy of one back, or take another workdir; '
  'nothing is started anew over them.'
)


def latest(path: str) -> str | None:
  """The newest checkpoint of a workdir that has an end (or the checkpoint itself, if `path` is one), or None.

  It reads no array: only `load` and `restore` tell whether every bit is what it was.

  Raises:
    UserError: if there are checkpoints and all are cut off.
  """
  if own := _itself(path):
    return own
  found = lying(path)
  whole = next(filter(is_whole, found), None)
  if found and not whole:
    raise UserError(f'{found[0]} is cut off and {NO_OTHER.format(path)}')
  return whole


def lie_in(workdir: str) -> bool:
  """Whether there are checkpoints in a workdir, whole or not: then a run goes on from one, or not at all."""
  return bool(lying(workdir))


def traces(workdir: str) -> list[str]:
  """Files of a workdir that are there only once a checkpoint was saved; a kill in the first save leaves none."""
  folder = os.path.join(workdir, FOLDER)
  names = paths.names(folder)
  return sorted(os.path.join(folder, n) for n in names if n == 'checkpoint' or n.endswith(REFUSED))


def unfinished(workdir: str) -> bool:
  """Whether a save was cut off there before its checkpoint had a name."""
  folder = os.path.join(workdir, FOLDER)
  if paths.is_remote(folder):
    return bucket.unfinished(folder) is not None
  return any('.orbax-checkpoint-tmp' in name for name in paths.names(folder))


def read_about(path: str) -> dict[str, Any]:
  return check_about(kind_of(path).read_about(path))


def step_of(path: str) -> int:
  """The step of a checkpoint; -1 if it cannot be told."""
  try:
    return reading(path, read_about)['step']
  except UserError:
    return -1


def _itself(path: str) -> str | None:
  """The checkpoint that a path names, if it names one."""
  path = bucket.meant(path)
  named = [p for p in (path, path + clu_file.SUFFIX) if paths.is_file(p) or orbax_folder.is_whole(p)]
  # A kill between a file and a folder of one name leaves both: see `Saver.keep`.
  return max(named, key=step_of) if len(named) > 1 else next(iter(named), None)


def lying(path: str) -> list[str]:
  """All checkpoints of a workdir, or of its folder of checkpoints: the newest first, those with names last."""
  for folder in (os.path.join(path, FOLDER), path):
    numbered = [kind.kept(folder) for kind in (clu_file, orbax_folder)]
    found = [path for paths in numbered for path in paths]
    if all(numbered):  # the run had one process at one time and several at another
      found.sort(key=step_of, reverse=True)
    named = [os.path.join(folder, n) for n in paths.names(folder) if _NAMED.fullmatch(n)]
    # What is only the name of one that has a number was found.
    found += sorted((path for path in named if bucket.meant(path) == path), key=step_of, reverse=True)
    if found:
      return found
  return []


def newest(
  path: str, read: Callable[[str], Any], agree: Callable[[bool], bool] = bool
) -> tuple[str, dict[str, Any], list[str]]:
  """Reads the checkpoint that `path` is, or a workdir's newest one that is not damaged.

  Args:
    path: as for `load`.
    read: raises an exception if the checkpoint is not whole.
    agree: whether it could be read in this process -> whether in all.

  Returns:
    (which one, what `read` gave, the newer ones, which are damaged).

  Raises:
    UserError: if there is none, or one cannot be read for another reason than damage.
  """
  own = _itself(path)
  refused = {}
  for candidate in [own] if own else lying(path):
    result, refusal, damaged = None, f'Another process of the run cannot read {candidate}.', True
    try:
      result = reading(candidate, read)
    except UserError as error:
      refusal, damaged = str(error), _is_damage(error.__cause__)
    if agree(result is not None):
      if refused:
        logging.warning('%s Taking %s instead, the newest whole checkpoint.', ' '.join(refused.values()), candidate)
      return candidate, result, list(refused)
    if not agree(damaged):
      raise UserError(f'{refusal} That need not be the fault of the file: try again.')
    refused[candidate] = refusal
  if own:
    raise UserError(refused[own])
  if refused:
    raise UserError(f'{next(iter(refused.values())).removesuffix(".")}, and {NO_OTHER.format(path)}')
  raise UserError(f'No checkpoint in {path}: expected a workdir of a run, a .flax file or a folder that Orbax wrote.')


def _is_damage(error: BaseException | None) -> bool:
  """Whether it is the checkpoint that is at fault, and not the machine: its memory, its disk, its rights."""
  gone = FileNotFoundError | NotADirectoryError | IsADirectoryError
  return isinstance(error, gone) or not isinstance(error, OSError | MemoryError)


def kind_of(path: str) -> types.ModuleType:
  return orbax_folder if paths.is_folder(path) else clu_file


def is_whole(path: str) -> bool:
  return reading(path, kind_of(path).is_whole)


def reading(path: str, read: Callable[..., Any], *args: Any) -> Any:
  try:
    return read(path, *args)
  except Exception as error:  # OSError, ValueError, KeyError, or one of msgpack's or TensorStore's
    if processes.lost_peer(error):
      raise
    raise UserError(f'{path} is not a readable checkpoint of this project ({reason(error)}).') from error


def reason(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__
