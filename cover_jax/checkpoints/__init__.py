"""Checkpoints: `Saver` (`save`, `wait`, `keep`), `latest`, `describe`, `load`, `restore`.

A checkpoint is one tree {'about': JSON text, 'state': TrainState, 'interval': metrics being summed} in
`<workdir>/checkpoints`; see `contents.py`. One process writes it with `clu.checkpoint`
(`clu_file.py`), several, or one in a bucket, with Orbax (`orbax_folder.py`); reading finds out which. Either way a
killed or failed save leaves the previous checkpoint as it was, every bit is checked when it is read, and reading needs
no TensorFlow.

Which checkpoints a workdir has is told by what lies there. A damaged one is passed over, with a warning, for the newest
whole one before it; where none is whole nothing is started anew. One that is named itself is taken or refused.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np
from absl import logging

from cover_jax.checkpoints import bucket, clu_file, orbax_folder
from cover_jax.checkpoints.bucket import meant as meant
from cover_jax.checkpoints.clu_file import write as write  # of an export
from cover_jax.checkpoints.contents import Misfit as Misfit
from cover_jax.checkpoints.contents import about as about
from cover_jax.checkpoints.contents import check_sources, check_tree, difference, fit, rename, renaming
from cover_jax.checkpoints.contents import flatten as flatten
from cover_jax.checkpoints.contents import sources_of as sources_of
from cover_jax.checkpoints.finding import FOLDER as FOLDER
from cover_jax.checkpoints.finding import REFUSED, kind_of, newest, read_about, reading
from cover_jax.checkpoints.finding import latest as latest
from cover_jax.checkpoints.finding import lie_in as lie_in
from cover_jax.checkpoints.finding import traces as traces
from cover_jax.checkpoints.finding import unfinished as unfinished
from cover_jax.checkpoints.saver import Saver as Saver
from cover_jax.runtime import processes, sharding
from data_pipelines import paths
from data_pipelines.contract import SourceInfo, UserError


def describe(path: str) -> dict[str, Any]:
  """{'about': dict, 'path': str} of a checkpoint, as `load` gives them, without reading its arrays."""
  found, about, _ = newest(path, read_about)
  return {'about': about, 'path': found}


def load(path: str) -> dict[str, Any]:
  """Reads a checkpoint as nested dicts of numpy arrays; runs no code from the file. All processes must call it.

  Args:
    path: a workdir (its newest whole checkpoint), or a checkpoint: a `.flax` file, or a folder that Orbax wrote.

  Returns:
    {'about': dict, 'state': {...}, 'interval': {...}, 'path': str}, checked by `contents.check_tree`; what an export
    stored in half precision is float32 again.

  Raises:
    UserError: if there is none, or it is damaged or not one of this project.
  """
  found, tree, _ = newest(path, lambda p: check_tree(kind_of(p).read(p)), processes.everywhere)
  if tree['about'].get('half'):
    tree['state'] = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, tree['state'])
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
  found, opened, refused = newest(path, _open, processes.everywhere)
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
  if paths.is_folder(found):  # these were shapes
    onto = rename(flax.serialization.to_state_dict(where), {name: position for position, name in names.items()})
    fitted = fit(loaded, rename(reading(found, orbax_folder.read_onto, onto), names), want)
  else:
    fitted = sharding.put(fitted, where)
  if jax.process_index() == 0:
    put_aside(refused)
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
  part = {'raw': 'params', 'ema': 'ema'}[which]
  loaded = _restore_part(path, part, template, placed)
  if loaded is None:
    raise UserError(f'{path} holds no moving average of the parameters: set config.eval_params to "raw".')
  return {'about': loaded['about'], 'path': loaded['path'], 'params': loaded[part]}


def restore_objectives(path: str, template: Any, placed: Any) -> Any:
  """As `restore_params`, of what the objectives keep beside the parameters: queues, averaged encoders."""
  loaded = _restore_part(path, 'objectives', template, placed) if jax.tree.leaves(template) else None
  return template if loaded is None else loaded['objectives']


def _restore_part(path: str, part: str, template: Any, placed: Any) -> dict[str, Any] | None:
  """{'about', 'path', part: its arrays on the mesh} of a part of the state; None if the checkpoint lacks it."""
  found, opened, _ = newest(path, _open, processes.everywhere)
  if not opened['state'].get(part):
    return None
  loaded = {'about': opened['about'], 'path': found}
  arrays = fit(loaded, opened['state'][part], template)
  if paths.is_folder(found):  # these were shapes
    where = {'state': {part: flax.serialization.to_state_dict(placed)}}
    arrays = fit(loaded, reading(found, orbax_folder.read_onto, where)['state'][part], template)
  else:
    arrays = sharding.put(arrays, placed)
  return loaded | {part: arrays}


def put_aside(checkpoints: Sequence[str]) -> None:
  for path in checkpoints:
    aside = path + REFUSED
    while os.path.lexists(aside) or paths.exists(aside):
      aside += REFUSED
    try:
      (bucket.move if paths.is_remote(path) else os.rename)(path, aside)
    except OSError as error:
      raise UserError(f'{path} is damaged and cannot be renamed ({error.strerror}): move it away.') from error
    logging.warning('%s is now %s, which nothing here reads or removes.', path, aside)


def _open(path: str) -> dict[str, Any]:
  """What is needed to tell whether a checkpoint is whole and fits: of a `.flax` file all, of a folder the shapes."""
  if not paths.is_folder(path):
    return check_tree(clu_file.read(path))
  orbax_folder.check(path)
  return {**orbax_folder.read_shapes(path), 'about': read_about(path)}
