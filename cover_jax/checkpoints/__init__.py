"""Checkpoints: `Saver` (`save`, `wait`, `keep`), `latest`, `describe`, `load`, `restore`.

A checkpoint is one tree {'about': JSON text, 'state': TrainState, 'interval': metrics being summed} in
`<workdir>/checkpoints`; see `contents.py`. One process writes it with `clu.checkpoint`
(`clu_file.py`), several with Orbax (`orbax_folder.py`); reading finds out which. Either way a killed or
failed save leaves the previous checkpoint as it was, every bit is checked when it is read, and reading needs no
TensorFlow.

Which checkpoints a workdir has is told by what lies there. A damaged one is passed over, with a warning, for the newest
whole one before it; where none is whole nothing is started anew. One that is named itself is taken or refused.
"""

import json
import math
import os
import re
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.serialization
import jax
from absl import logging
from jax.experimental import multihost_utils

from cover_jax.checkpoints import clu_file, orbax_folder
from cover_jax.checkpoints.clu_file import write as write  # of an export
from cover_jax.checkpoints.contents import Misfit as Misfit
from cover_jax.checkpoints.contents import about as about
from cover_jax.checkpoints.contents import check_about, check_sources, check_tree, difference, fit, rename, renaming
from cover_jax.checkpoints.contents import flatten as flatten
from cover_jax.checkpoints.contents import sources_of as sources_of
from cover_jax.runtime import processes, sharding
from data_pipelines import durable
from data_pipelines.contract import SourceInfo, UserError

FOLDER = 'checkpoints'
_BEST = 'best.json'
_REFUSED = '.refused'
_NAMED = re.compile(r'(?:best|step-\d+)(?:\.flax)?')
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
    self._kind, self._other = _kinds()
    self._guarded(lambda: os.makedirs(self._folder, exist_ok=True))
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
        _remove(old)
    return path

  def wait(self) -> None:
    """Returns when what was saved is whole on disk; raises UserError if it could not be written."""
    self._guarded(self._saver.wait)

  def keep(self, name: str) -> str:
    """Keeps the newest checkpoint for good under a name, replacing one of that name; returns its path.

    Its files are linked where the file system can, so that this takes no time and, at first, no room.
    """
    self.wait()
    newest = latest(os.path.dirname(self._folder))
    target = os.path.join(self._folder, name)
    if os.path.isdir(newest):
      path, other = target, target + clu_file.SUFFIX
    else:
      path, other = target + clu_file.SUFFIX, target
    if jax.process_index() == 0:
      self._guarded(lambda: _link(newest, path))
      self._guarded(lambda: _remove(other))
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
      with open(path, encoding='utf-8') as f:
        best = json.load(f)
      if not isinstance(best['metric'], str) or math.isinf(best['value']):
        raise ValueError(f'it holds {best}')
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{path} does not say how good the best checkpoint is ({_reason(error)}): put a copy back, or remove it; '
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
      before = next(filter(_is_whole, _lying(os.path.dirname(self._folder))), None)
      kept = f'the last whole checkpoint is {before}' if before else 'there is no earlier one'
      raise UserError(f'Could not save a checkpoint in {self._folder} ({_reason(error)}); {kept}.') from error


def _kinds() -> tuple[types.ModuleType, types.ModuleType]:
  """What writes here, and what does not."""
  return (clu_file, orbax_folder) if jax.process_count() == 1 else (orbax_folder, clu_file)


def _tidy(folder: str) -> None:
  """Removes what killed savers left half-written."""
  durable.sweep(folder)
  for name in os.listdir(folder):
    if _LEFT.fullmatch(name):
      _remove(os.path.join(folder, name))


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.lexists(path):
    os.remove(path)


def _link(source: str, target: str) -> None:
  """Makes the target another name of a checkpoint, or a copy of it."""
  if os.path.isdir(source):
    with durable.replacing_folder(target) as folder:
      shutil.copytree(source, folder, copy_function=durable.link, dirs_exist_ok=True)
  else:
    durable.link(source, target)


def latest(path: str) -> str | None:
  """The newest checkpoint of a workdir that has an end (or the checkpoint itself, if `path` is one), or None.

  It reads no array: only `load` and `restore` tell whether every bit is what it was.

  Raises:
    UserError: if there are checkpoints and all are cut off.
  """
  if own := _itself(path):
    return own
  lying = _lying(path)
  whole = next(filter(_is_whole, lying), None)
  if lying and not whole:
    raise UserError(f'{lying[0]} is cut off and {_NO_OTHER.format(path)}')
  return whole


_NO_OTHER = (
  'no other checkpoint in {} is whole: put a copy of one back, or take another workdir; '
  'nothing is started anew over them.'
)


def lie_in(workdir: str) -> bool:
  """Whether there are checkpoints in a workdir, whole or not: then a run goes on from one, or not at all."""
  return bool(_lying(workdir))


def traces(workdir: str) -> list[str]:
  """Files of a workdir that are there only once a checkpoint was saved; a kill in the first save leaves none."""
  folder = os.path.join(workdir, FOLDER)
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(os.path.join(folder, n) for n in names if n == 'checkpoint' or n.endswith(_REFUSED))


def unfinished(workdir: str) -> bool:
  """Whether a save was cut off there before its checkpoint had a name."""
  folder = os.path.join(workdir, FOLDER)
  return os.path.isdir(folder) and any('.orbax-checkpoint-tmp' in name for name in os.listdir(folder))


def describe(path: str) -> dict[str, Any]:
  """{'about': dict, 'path': str} of a checkpoint, as `load` gives them, without reading its arrays."""
  found, about, _ = _newest(path, _read_about)
  return {'about': about, 'path': found}


def load(path: str) -> dict[str, Any]:
  """Reads a checkpoint as nested dicts of numpy arrays; runs no code from the file. All processes must call it.

  Args:
    path: a workdir (its newest whole checkpoint), or a checkpoint: a `.flax` file, or a folder that Orbax wrote.

  Returns:
    {'about': dict, 'state': {...}, 'interval': {...}, 'path': str}, checked by `contents.check_tree`.

  Raises:
    UserError: if there is none, or it is damaged or not one of this project.
  """
  found, tree, _ = _newest(path, lambda p: check_tree(_kind(p).read(p)), processes.everywhere)
  return {**tree, 'path': found}


def restore(path: str, template: Mapping[str, Any], placed: Mapping[str, Any], sources: tuple[SourceInfo, ...]) -> Any:
  """Puts the checkpoint that a run goes on from on its mesh, whatever number of devices and processes wrote it.

  Newer ones that are damaged get `.refused` behind their names: they are not overwritten, not counted, not taken again
  and not removed. Metrics that were being summed and are not those of the run start anew, with a warning. Nothing in
  the workdir changes before it is sure that the checkpoint fits. All processes must call it.

  Args:
    path: as for `load`; no other process may save there.
    template: the run's {'state', 'interval'} as arrays or ShapeDtypeStructs; 'interval' is arrays with nothing summed.
    placed: the same with the `NamedSharding` of each array.
    sources: the run's sources.

  Returns:
    The template's structure with the checkpoint's arrays, and its 'about' and 'path'.

  Raises:
    UserError: as `load`; or if classes, architecture or optimizer differ, naming the first difference.
  """
  found, opened, refused = _newest(path, _open, processes.everywhere)
  loaded = {'about': opened['about'], 'path': found}
  check_sources(loaded, sources)
  names = renaming(opened, template)
  opened = rename(opened, names)
  parts = ['state', 'interval']
  if differs := difference({'interval': opened.get('interval', {})}, {'interval': template['interval']}):
    logging.warning(
      '%s was summing other metrics than this run (%s): they start anew, so the first averages are of fewer steps.',
      found,
      differs,
    )
    parts = ['state']
  have, want, where = ({p: tree.get(p, {}) for p in parts} for tree in (opened, template, placed))
  fitted = fit(loaded, have, want)
  if os.path.isdir(found):  # these were shapes
    onto = rename(flax.serialization.to_state_dict(where), {name: position for position, name in names.items()})
    fitted = fit(loaded, rename(_reading(found, orbax_folder.read_onto, onto), names), want)
  else:
    fitted = sharding.put(fitted, where)
  if jax.process_index() == 0:
    _put_aside(refused)
  return loaded | {'interval': sharding.put(template['interval'], placed['interval'])} | fitted


def restore_params(path: str, which: str, template: Any, placed: Any) -> dict[str, Any]:
  """Puts the parameters of a checkpoint on a mesh, and nothing else of it. All processes must call it.

  Args:
    path: as for `load`.
    which: 'raw', or 'ema' for their moving average.
    template: the run's parameters as arrays or ShapeDtypeStructs.
    placed: the `NamedSharding` of each.

  Returns:
    {'about': dict, 'path': str, 'params': the template's structure with the checkpoint's arrays}.

  Raises:
    UserError: as `load`; or if the checkpoint holds no such parameters, or others than the template.
  """
  found, opened, _ = _newest(path, _open, processes.everywhere)
  loaded, part = {'about': opened['about'], 'path': found}, {'raw': 'params', 'ema': 'ema'}[which]
  if not opened['state'].get(part):
    raise UserError(f'{found} holds no moving average of the parameters: set config.eval_params to "raw".')
  params = fit(loaded, opened['state'][part], template)
  if os.path.isdir(found):  # these were shapes
    where = {'state': {part: flax.serialization.to_state_dict(placed)}}
    params = fit(loaded, _reading(found, orbax_folder.read_onto, where)['state'][part], template)
  else:
    params = sharding.put(params, placed)
  return loaded | {'params': params}


def _put_aside(paths: Sequence[str]) -> None:
  for path in paths:
    aside = path + _REFUSED
    while os.path.lexists(aside):
      aside += _REFUSED
    try:
      os.rename(path, aside)
    except OSError as error:
      raise UserError(f'{path} is damaged and cannot be renamed ({error.strerror}): move it away.') from error
    logging.warning('%s is now %s, which nothing here reads or removes.', path, aside)


def _open(path: str) -> dict[str, Any]:
  """What is needed to tell whether a checkpoint is whole and fits: of a `.flax` file all, of a folder the shapes."""
  if not os.path.isdir(path):
    return check_tree(clu_file.read(path))
  orbax_folder.check(path)
  return {**orbax_folder.read_shapes(path), 'about': _read_about(path)}


def _read_about(path: str) -> dict[str, Any]:
  return check_about(_kind(path).read_about(path))


def _step(path: str) -> int:
  """The step of a checkpoint; -1 if it cannot be told."""
  try:
    return _reading(path, _read_about)['step']
  except UserError:
    return -1


def _itself(path: str) -> str | None:
  """The checkpoint that a path names, if it names one."""
  named = [p for p in (path, path + clu_file.SUFFIX) if os.path.isfile(p) or orbax_folder.is_whole(p)]
  # A kill between a file and a folder of one name leaves both: see `Saver.keep`.
  return max(named, key=_step) if len(named) > 1 else next(iter(named), None)


def _lying(path: str) -> list[str]:
  """All checkpoints of a workdir, or of its folder of checkpoints: the newest first, those with names last."""
  for folder in (os.path.join(path, FOLDER), path):
    numbered = [kind.kept(folder) for kind in (clu_file, orbax_folder)]
    found = [path for paths in numbered for path in paths]
    if all(numbered):  # the run had one process at one time and several at another
      found.sort(key=_step, reverse=True)
    names = [n for n in os.listdir(folder) if _NAMED.fullmatch(n)] if os.path.isdir(folder) else []
    found += sorted((os.path.join(folder, n) for n in names), key=_step, reverse=True)
    if found:
      return found
  return []


def _newest(
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
  for candidate in [own] if own else _lying(path):
    result, refusal, damaged = None, f'Another process of the run cannot read {candidate}.', True
    try:
      result = _reading(candidate, read)
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
    raise UserError(f'{next(iter(refused.values())).removesuffix(".")}, and {_NO_OTHER.format(path)}')
  raise UserError(f'No checkpoint in {path}: expected a workdir of a run, a .flax file or a folder that Orbax wrote.')


def _is_damage(error: BaseException | None) -> bool:
  """Whether it is the checkpoint that is at fault, and not the machine: its memory, its disk, its rights."""
  gone = FileNotFoundError | NotADirectoryError | IsADirectoryError
  return isinstance(error, gone) or not isinstance(error, OSError | MemoryError)


def _kind(path: str) -> types.ModuleType:
  return orbax_folder if os.path.isdir(path) else clu_file


def _is_whole(path: str) -> bool:
  return _reading(path, _kind(path).is_whole)


def _reading(path: str, read: Callable[..., Any], *args: Any) -> Any:
  try:
    return read(path, *args)
  except Exception as error:  # OSError, ValueError, KeyError, or one of msgpack's or TensorStore's
    if processes.lost_peer(error):
      raise
    raise UserError(f'{path} is not a readable checkpoint of this project ({_reason(error)}).') from error


def _reason(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__
