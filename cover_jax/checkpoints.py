"""Checkpoints: `save`, `latest`, `load`, `restore`.

A checkpoint is one tree {'about': JSON text, 'state': TrainState, 'interval': metrics being summed}
written by `clu.checkpoint`: `<workdir>/checkpoints/ckpt-<n>.flax` (msgpack) beside TensorFlow's index.
The text file `checkpoint` is replaced, atomically, only after the data is whole, so a killed or failed
save leaves the previous checkpoint as it was. Reading needs no TensorFlow.
"""

import contextlib
import glob
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np

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
    }
    for s in sources
  ]
  return json.dumps({'step': step, 'sources': described, 'config': config}, sort_keys=True)


class Saver:
  """Saves into one workdir; keeps the last `keep` checkpoints."""

  def __init__(self, workdir: str, keep: int):
    from clu import checkpoint as clu_checkpoint  # imports TensorFlow

    self._folder = os.path.join(workdir, FOLDER)
    self._clu = clu_checkpoint.Checkpoint(self._folder, max_to_keep=keep)
    if self._clu.latest_checkpoint:
      # Continue the numbering; CLU would start over and delete what is there.
      self._clu.tf_checkpoint.restore(self._clu.latest_checkpoint)

  def save(self, tree: Mapping[str, Any]) -> str:
    """Writes a checkpoint and returns its path.

    Args:
      tree: {'about', 'state', 'interval'}.

    Raises:
      UserError: if it cannot be written; the previous checkpoint is whole.
    """
    before = latest(os.path.dirname(self._folder))
    try:
      return self._clu.save(tree) + '.flax'
    except Exception as error:  # OSError or one of TensorFlow's own, by file system
      kept = f'the last whole checkpoint is {before}' if before else 'there is no earlier one'
      self._remove_partial(before)
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise UserError(f'Could not save a checkpoint in {self._folder} ({reason}); {kept}.') from error

  def _remove_partial(self, whole: str | None) -> None:
    number = _number(whole) if whole else 0
    for path in glob.glob(os.path.join(self._folder, f'ckpt-{number + 1}.*')):
      with contextlib.suppress(OSError):
        os.remove(path)


def _number(path: str) -> int:
  return int(re.search(r'ckpt-(\d+)\.flax$', path).group(1))


def latest(path: str) -> str | None:
  """The newest whole checkpoint of a workdir (or the file itself, if `path` is one), or None."""
  if os.path.isfile(path):
    return path
  for folder in (os.path.join(path, FOLDER), path):
    pointer = os.path.join(folder, 'checkpoint')
    if os.path.exists(pointer):
      with open(pointer, encoding='utf-8') as f:
        match = re.search(r'^model_checkpoint_path: "(.*)"', f.read(), re.MULTILINE)
      if match:
        return os.path.join(folder, os.path.basename(match.group(1)) + '.flax')
  return None


def load(path: str) -> dict[str, Any]:
  """Reads a checkpoint as nested dicts of numpy arrays; runs no code from the file.

  Args:
    path: a workdir (its newest checkpoint) or a `.flax` file.

  Returns:
    {'about': dict, 'state': {...}, 'interval': {...}, 'path': str}.

  Raises:
    UserError: if there is none or it cannot be read.
  """
  found = latest(path)
  if found is None:
    raise UserError(f'No checkpoint in {path}: expected a workdir of a run or a .flax file.')
  try:
    with open(found, 'rb') as f:
      tree = flax.serialization.msgpack_restore(f.read())
    return {**tree, 'about': json.loads(tree['about']), 'path': found}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{found} is not a readable checkpoint of this project ({error}).') from error


def restore(loaded: Mapping[str, Any], template: Any, sources: tuple[SourceInfo, ...]) -> Any:
  """Fits a loaded checkpoint to a run.

  Args:
    loaded: what `load` gave.
    template: the run's {'state', 'interval'} as arrays or ShapeDtypeStructs.
    sources: the run's sources.

  Returns:
    The template's structure with the checkpoint's numpy arrays.

  Raises:
    UserError: if classes, architecture or optimizer differ, naming the first difference.
  """
  check_sources(loaded, sources)
  return fit(loaded, {key: loaded[key] for key in template}, template)


def fit(loaded: Mapping[str, Any], have: Any, template: Any) -> Any:
  """Gives a loaded subtree the template's structure.

  Raises:
    UserError: naming the first array that is missing, superfluous or of another shape.
  """
  want_shapes, have_shapes = _shapes(flax.serialization.to_state_dict(template)), _shapes(have)
  # A parameter says more than the optimizer's copy of it.
  for name in sorted(set(want_shapes) | set(have_shapes), key=lambda n: ('params/' not in n, n)):
    want, found = (f'shape {s[name]}' if name in s else 'nothing' for s in (want_shapes, have_shapes))
    if want != found:
      raise UserError(
        f'{loaded["path"]} does not fit this config: {name} is {found} in the checkpoint and {want} in the run; '
        'use the config of the checkpoint (config.json beside it) or another --workdir.'
      )
  return flax.serialization.from_state_dict(template, have)


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
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(str(k.key) for k in path): leaf for path, leaf in leaves}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(np.shape(leaf)) for name, leaf in flatten(tree).items()}
