"""Checkpoints: `Saver` (`save`, `wait`, `keep`), `latest`, `load`, `restore`.

A checkpoint is one tree {'about': JSON text, 'state': TrainState, 'interval': metrics being summed} in
`<workdir>/checkpoints`. One process writes it with `clu.checkpoint` (`checkpoints_clu.py`), several with Orbax
(`checkpoints_orbax.py`); reading finds out which. Either way a killed or failed save leaves the previous checkpoint as
it was, and reading needs no TensorFlow.
"""

import json
import os
import shutil
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np

from cover_jax import checkpoints_clu, checkpoints_orbax, processes, sharding
from data_pipelines.contract import SourceInfo, UserError

FOLDER = 'checkpoints'


def about(config: Mapping[str, Any], sources: tuple[SourceInfo, ...], step: int) -> str:
  """What must be known to use a checkpoint: the config, the sources with their class names, the step."""
  described = [
    {
      'name': s.name,
      'modality': s.modality,
      'num_examples': s.num_examples,
      'class_names': list(s.class_names),
      'fps': s.fps,
    }
    for s in sources
  ]
  return json.dumps({'step': step, 'sources': described, 'config': config}, sort_keys=True)


def sources_of(loaded: Mapping[str, Any]) -> tuple[SourceInfo, ...]:
  """The sources that a checkpoint was trained on, in their order; see `about`."""
  return tuple(
    SourceInfo(s['name'], s['modality'], s['num_examples'], tuple(s['class_names']), s.get('fps', 0.0))
    for s in loaded['about']['sources']
  )


class Saver:
  """Saves into one workdir; keeps the last `keep` checkpoints, and those that `keep` gave a name."""

  def __init__(self, workdir: str, keep: int):
    self._folder = os.path.join(workdir, FOLDER)
    self._keep, self._saves = keep, 0
    self._kind, self._other = _kinds()
    self._guarded(lambda: os.makedirs(self._folder, exist_ok=True))
    self._saver = self._guarded(lambda: self._kind.Saver(self._folder, keep))

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
      for old in self._other.kept(self._folder):
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
    path = target if os.path.isdir(newest) else target + checkpoints_clu.SUFFIX
    if jax.process_index() == 0:
      self._guarded(lambda: _link(newest, path + '.tmp'))
      for old in (target, target + checkpoints_clu.SUFFIX):
        if old != path or os.path.isdir(old):  # os.replace replaces files only
          _remove(old)
      os.replace(path + '.tmp', path)
    return path

  def keep_if_best(self, metric: str, value: float, step: int) -> None:
    """Keeps the newest checkpoint as 'best', if its metric is better than that in `best.json`; less loss is better."""
    self.wait()
    record = os.path.join(self._folder, 'best.json')
    sign = -1 if metric.endswith('loss') else 1
    best = {}
    if os.path.exists(record):
      with open(record, encoding='utf-8') as f:
        best = json.load(f)
    if best.get('metric') == metric and sign * value <= sign * best['value']:
      return
    self.keep('best')
    if jax.process_index() == 0:
      self._guarded(lambda: _write(record, json.dumps({'metric': metric, 'value': value, 'step': step}) + '\n'))

  def _guarded(self, write):
    try:
      return write()
    except Exception as error:  # OSError, or one of TensorFlow's or TensorStore's, by file system
      if processes.lost_peer(error):
        raise
      before = latest(os.path.dirname(self._folder))
      kept = f'the last whole checkpoint is {before}' if before else 'there is no earlier one'
      raise UserError(f'Could not save a checkpoint in {self._folder} ({_reason(error)}); {kept}.') from error


def _kinds() -> tuple[types.ModuleType, types.ModuleType]:
  """What writes here, and what does not."""
  return (checkpoints_clu, checkpoints_orbax) if jax.process_count() == 1 else (checkpoints_orbax, checkpoints_clu)


def _write(path: str, text: str) -> None:
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.write(text)
  os.replace(path + '.tmp', path)


def _remove(path: str) -> None:
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.exists(path):
    os.remove(path)


def _link(source: str, target: str) -> None:
  _remove(target)
  if os.path.isdir(source):
    shutil.copytree(source, target, copy_function=_link)
    return
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)


def latest(path: str) -> str | None:
  """The newest whole checkpoint of a workdir (or the checkpoint itself, if `path` is one), or None."""
  if os.path.isfile(path) or checkpoints_orbax.is_checkpoint(path):
    return path
  if os.path.isfile(path + checkpoints_clu.SUFFIX):
    return path + checkpoints_clu.SUFFIX
  for folder in (os.path.join(path, FOLDER), path):
    found = [newest for kind in (checkpoints_clu, checkpoints_orbax) if (newest := kind.newest(folder))]
    if len(found) == 2:  # the run had one process at one time and several at another
      found.sort(key=lambda p: describe(p)['about']['step'])
    if found:
      return found[-1]
  return None


def describe(path: str) -> dict[str, Any]:
  """{'about': dict, 'path': str} of a checkpoint, as `load` gives them, without reading its arrays."""
  found = _found(path)
  return {'about': _reading(found, _kind(found).read_about), 'path': found}


def load(path: str) -> dict[str, Any]:
  """Reads a checkpoint as nested dicts of numpy arrays; runs no code from the file.

  Args:
    path: a workdir (its newest checkpoint), or a checkpoint: a `.flax` file, or a folder that Orbax wrote.

  Returns:
    {'about': dict, 'state': {...}, 'interval': {...}, 'path': str}.

  Raises:
    UserError: if there is none or it cannot be read.
  """
  found = _found(path)
  return {**_reading(found, _kind(found).read), 'path': found}


def _found(path: str) -> str:
  found = latest(path)
  if found is None:
    raise UserError(f'No checkpoint in {path}: expected a workdir of a run, a .flax file or a folder that Orbax wrote.')
  return found


def _kind(path: str) -> types.ModuleType:
  return checkpoints_orbax if os.path.isdir(path) else checkpoints_clu


def _reading(path: str, read: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
  try:
    return read(path, *args)
  except Exception as error:  # OSError, ValueError, KeyError, or one of msgpack's or TensorStore's
    if processes.lost_peer(error):
      raise
    raise UserError(f'{path} is not a readable checkpoint of this project ({_reason(error)}).') from error


def _reason(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else type(error).__name__


def restore(path: str, template: Any, placed: Any, sources: tuple[SourceInfo, ...]) -> Any:
  """Puts a checkpoint on the mesh of a run, whatever number of devices and processes wrote it.

  Args:
    path: as for `load`.
    template: the run's {'state', 'interval'} as arrays or ShapeDtypeStructs.
    placed: the same with the `NamedSharding` of each array.
    sources: the run's sources.

  Returns:
    The template's structure with the checkpoint's arrays.

  Raises:
    UserError: if classes, architecture or optimizer differ, naming the first difference.
  """
  found = _found(path)
  if not os.path.isdir(found):
    loaded = load(found)
    check_sources(loaded, sources)
    return sharding.put(fit(loaded, {key: loaded[key] for key in template}, template), placed)
  loaded = describe(found)
  check_sources(loaded, sources)
  fit(loaded, _reading(found, checkpoints_orbax.read_shapes), template)
  arrays = _reading(found, checkpoints_orbax.read_onto, flax.serialization.to_state_dict(placed))
  return fit(loaded, arrays, template)


def fit(loaded: Mapping[str, Any], have: Any, template: Any) -> Any:
  """Gives a loaded subtree the template's structure.

  Raises:
    UserError: naming the first array that is missing, superfluous or of another shape.
  """
  want, have = flax.serialization.to_state_dict(template), flatten(have)
  want_shapes, have_shapes = _shapes(flatten(want)), _shapes(have)
  # A parameter says more than the optimizer's copy of it.
  for name in sorted(set(want_shapes) | set(have_shapes), key=lambda n: ('params/' not in n, n)):
    wanted, found = (f'shape {s[name]}' if name in s else 'nothing' for s in (want_shapes, have_shapes))
    if wanted != found:
      raise UserError(
        f'{loaded["path"]} does not fit this config: {name} is {found} in the checkpoint and {wanted} in the run; '
        'use the config of the checkpoint (config.json beside it) or another --workdir.'
      )
  # From the template's own dict, since a checkpoint may have lost dicts without an array.
  filled = jax.tree_util.tree_map_with_path(lambda path, _: have[_name(path)], want)
  return flax.serialization.from_state_dict(template, filled)


def check_sources(loaded: Mapping[str, Any], sources: tuple[SourceInfo, ...]) -> None:
  """Raises a UserError if a source's classes are not those that the checkpoint's head was trained on."""
  saved = {s['name']: s['class_names'] for s in loaded['about']['sources']}
  for source in sources:
    if source.name not in saved:
      raise UserError(
        f'{loaded["path"]} has no head for the source {source.name!r}: it was trained on {sorted(saved)}.'
      )
    if saved[source.name] != list(source.class_names):
      raise UserError(
        f'The source {source.name!r} has {len(source.class_names)} classes now but its head in '
        f'{loaded["path"]} has {len(saved[source.name])}, or their names differ: '
        'use the data set version that the checkpoint was trained on, or start a new --workdir.'
      )


def changed_config(loaded: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
  """'key: old -> new' for every config value that differs from the checkpoint's."""
  old, new = _flat(loaded['about']['config']), _flat(json.loads(json.dumps(config)))
  absent = '(absent)'
  return [
    f'{key}: {old.get(key, absent)} -> {new.get(key, absent)}'
    for key in sorted(set(old) | set(new))
    if old.get(key, absent) != new.get(key, absent)
  ]


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  return {k: v for key, value in tree.items() for k, v in _flat(value, f'{prefix}.{key}'.lstrip('.')).items()}


def flatten(tree: Any) -> dict[str, Any]:
  """{'params/encoder/...': array} of nested dicts."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
  return '/'.join(str(k.key) for k in path)


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(np.shape(leaf)) for name, leaf in arrays.items()}
