"""Going back to an older checkpoint of a run, such as the last one before it diverged. Nothing is deleted for it."""

import json
import os

from absl import logging

from cover_jax.checkpoints import clu_file, orbax_folder, put_aside
from cover_jax.checkpoints.finding import FOLDER, lying, step_of
from cover_jax.checkpoints.saver import link
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

_MARKER = 'went_back.json'


def steps(workdir: str) -> list[int]:
  """The steps of all checkpoints of a workdir that can be gone back to, the newest first."""
  return sorted({step for step, _ in _all(workdir)}, reverse=True)


def go_back(workdir: str, step: int) -> None:
  """Makes the checkpoint of a step the newest of its workdir. Later ones get `.refused` behind their names.

  It is done once: the same command goes on from the newest checkpoint when it is started again, by hand or after a
  preemption, until `went_back.json` beside the checkpoints is removed. For one process of a run that holds the workdir.

  Args:
    workdir: of the run.
    step: of a checkpoint, among the last ones or those that the run keeps for good.

  Raises:
    UserError: if there is no whole one of that step; names those that there are.
  """
  folder = os.path.join(workdir, FOLDER)
  marker = os.path.join(folder, _MARKER)
  if _marked(marker) == step:
    logging.warning('%s went back to step %d already: it goes on from its newest checkpoint. ', workdir, step)
    logging.warning('To go back to that step once more, remove %s.', marker)
    return
  all_of_them = _all(workdir)
  found = [path for of, path in all_of_them if of == step]
  if not found:
    have = ', '.join(map(str, steps(workdir))) or 'none'
    raise UserError(f'--resume_from={step}: {workdir} has no whole checkpoint of that step; those that it has: {have}.')
  numbered = [path for kind in (clu_file, orbax_folder) for path in kind.kept(folder)]
  if not set(found) & set(numbered):  # kept for good under a name: it gets a number again
    largest = max((int(n.split('-')[1].split('.')[0]) for n in paths.names(folder) if n.startswith('ckpt-')), default=0)
    name = f'ckpt_{step}' if paths.is_folder(found[0]) else f'ckpt-{largest + 1}{clu_file.SUFFIX}'
    link(found[0], os.path.join(folder, name))
  later = [path for of, path in all_of_them if of > step and path in numbered]
  logging.warning('%s goes back to step %d; %d later checkpoints are moved aside.', workdir, step, len(later))
  put_aside(later)
  durable.write(marker, json.dumps({'step': step, 'moved_aside': [os.path.basename(path) for path in later]}) + '\n')


def _all(workdir: str) -> list[tuple[int, str]]:
  found = [(step_of(path), path) for path in lying(workdir)]
  return [(step, path) for step, path in found if step >= 0]


def _marked(marker: str) -> int | None:
  try:
    return json.loads(paths.read(marker))['step']
  except (OSError, ValueError, KeyError, TypeError):
    return None
