"""Saving into a workdir: the last checkpoints, and those that are kept under a name."""

import json
import math
import os
import re
import shutil
import types
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from cover_jax.checkpoints import bucket, clu_file, orbax_folder
from cover_jax.checkpoints.finding import FOLDER, is_whole, latest, lying, reason
from cover_jax.runtime import processes
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

_BEST = 'best.json'
# What a kill leaves of CLU, TensorFlow, Orbax, and of versions before `durable`.
_LEFT = re.compile(
  re.escape(clu_file.STAGING) + r'|checkpoint\.tmp[0-9a-f]{32}|ckpt-\d+(?:_temp|\.\S+\.tempstate\d+)'
  r'|ckpt_\d+\.orbax-checkpoint-tmp\S*|(?:best|step-\d+)(?:\.flax|\.json)?\.tmp'
)


class Saver:
  """Saves into one workdir; keeps the last `keep` checkpoints, and those that `keep` gave a name.

  Made before the first step, it finds what could not be saved, and it removes what killed savers left.
  """

  def __init__(self, workdir: str, keep: int):
    """Opens the folder of checkpoints. All processes must call it.

    Args:
      workdir: of the run; no other process may save there.
      keep: how many to keep, at least 1.

    Raises:
      UserError: if nothing can be saved there.
    """
    if keep < 1:
      raise UserError(f'config.keep_checkpoints is {keep}: expected 1 or more.')
    if not workdir.isprintable():
      raise UserError(
        f'--workdir={workdir!r} has characters that cannot be printed, and TensorFlow cannot save there: '
        'choose another folder.'
      )
    self._folder = os.path.join(workdir, FOLDER)
    self._keep, self._saves = keep, 0
    self._kind, self._other = (orbax_folder, clu_file) if paths.is_remote(workdir) else _kinds()
    self._guarded(lambda: paths.make_folder(self._folder))
    if jax.process_index() == 0:
      self._guarded(lambda: _tidy(self._folder))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('checkpoints are tidy')
    self._saver = self._guarded(lambda: self._kind.Saver(self._folder, keep))
    self._best()

  def save(self, tree: Mapping[str, Any]) -> str:
    """Saves and returns where. What several processes save may not be whole before `wait` returns.

    Args:
      tree: {'about', 'state', 'interval'}.

    Raises:
      UserError: if this checkpoint, or the one before, cannot be written; the previous ones are whole.
    """
    self.wait()
    path = self._guarded(lambda: self._saver.save(tree))
    self._saves += 1
    if jax.process_index() == 0 and self._saves > self._keep:
      # Enough of this kind are whole: those of a time when the run had another number of processes go.
      for old in self._other.leftovers(self._folder):
        paths.remove(old)
    return path

  def wait(self) -> None:
    """Returns when what was saved is whole on disk; raises UserError if it could not be written."""
    self._guarded(self._saver.wait)

  def keep(self, name: str) -> str:
    """Keeps the newest checkpoint for good under a name, replacing one of that name; returns its path.

    Its files are linked where the file system can, so that this takes no time and, at first, no room. In a bucket the
    name is an object that says which checkpoint it is.
    """
    self.wait()
    newest = latest(os.path.dirname(self._folder))
    target = os.path.join(self._folder, name)
    if paths.is_folder(newest):
      path, other = target, target + clu_file.SUFFIX
    else:
      path, other = target + clu_file.SUFFIX, target
    if jax.process_index() == 0:
      self._guarded(lambda: link(newest, path))
      self._guarded(lambda: paths.remove(other))
    return path

  def keep_if_best(self, metric: str, value: float, step: int) -> None:
    """Keeps the newest checkpoint as 'best', if its metric is better than that in `best.json`.

    Less loss is better; what is not a number never is.
    """
    self.wait()
    if not math.isfinite(value):
      logging.warning('%s is %s at step %d: it is not kept as the best checkpoint.', metric, value, step)
      return
    best = self._best()
    sign = -1 if metric.endswith('loss') else 1
    if best.get('metric') == metric and sign * value <= sign * best['value']:
      return
    self.keep('best')
    if jax.process_index() == 0:
      record = json.dumps({'metric': metric, 'value': value, 'step': step}) + '\n'
      self._guarded(lambda: durable.write(os.path.join(self._folder, _BEST), record))

  def _best(self) -> dict[str, Any]:
    """What `keep_if_best` wrote, or {}."""
    path = os.path.join(self._folder, _BEST)
    try:
      best = json.loads(paths.read(path))
      if not isinstance(best['metric'], str) or math.isinf(best['value']):
        raise ValueError(f'it holds {best}')
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{path} does not say how good the best checkpoint is ({reason(error)}): put a copy back, or remove it; '
        'the next evaluation then chooses the best anew.'
      ) from error
    return {} if math.isnan(best['value']) else best  # earlier versions took NaN for a number

  def _guarded(self, write):
    try:
      return write()
    except UserError:
      raise
    except Exception as error:  # OSError, or one of TensorFlow's or TensorStore's, by file system
      if processes.lost_peer(error):
        raise
      before = next(filter(is_whole, lying(os.path.dirname(self._folder))), None)
      kept = f'the last whole checkpoint is {before}' if before else 'there is no earlier one'
      raise UserError(f'Could not save a checkpoint in {self._folder} ({reason(error)}); {kept}.') from error


def _kinds() -> tuple[types.ModuleType, types.ModuleType]:
  """What writes on a disk, and what does not."""
  return (clu_file, orbax_folder) if jax.process_count() == 1 else (orbax_folder, clu_file)


def _tidy(folder: str) -> None:
  """Removes what killed savers left half-written."""
  if paths.is_remote(folder):
    bucket.tidy(folder)
    return
  durable.sweep(folder)
  for name in os.listdir(folder):
    if _LEFT.fullmatch(name):
      paths.remove(os.path.join(folder, name))


def link(source: str, target: str) -> None:
  """Makes the target another name of a checkpoint, or a copy of it."""
  if paths.is_remote(target):
    bucket.give_name(source, target)
  elif os.path.isdir(source):
    with durable.replacing_folder(target) as folder:
      shutil.copytree(source, folder, copy_function=durable.link, dirs_exist_ok=True)
  else:
    durable.link(source, target)
