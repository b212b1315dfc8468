"""The curves, pictures and config of a run for Weights & Biases, by its own library (the extra [wandb])."""

import io
import os
import secrets
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cover_jax.checkpoints import workdir as workdirs
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

_ID = 'wandb_run'  # the file with the run's id there: a run that goes on adds to its curves


class Run:
  """A run of a project, for one process. Steps that are done again after a kill appear again, with the same values."""

  def __init__(self, project: str, workdir: str, config: Mapping[str, Any]):
    """Opens the run, or the same one again.

    Args:
      project: where it appears; `WANDB_MODE=offline` keeps it in the workdir.
      workdir: of the run, whose name it gets.
      config: of the run.

    Raises:
      UserError: if the library is not installed, or cannot begin.
    """
    try:
      import wandb
    except ImportError:
      raise UserError(
        f"config.wandb.project is {project!r}, and wandb is not installed: pip install -e '.[wandb]', or leave it ''."
      ) from None
    self._wandb, self._workdir = wandb, workdir
    with self._writing():
      name = os.path.basename(paths.absolute(workdir))
      self._run = wandb.init(
        project=project,
        name=name,
        id=_id(workdir),
        resume='allow',
        dir=None if paths.is_remote(workdir) else workdir,
        config=dict(config),
      )
      self._run.define_metric('*', step_metric='step')

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a point to curves."""
    with self._writing():
      self._run.log({'step': step, **scalars})

  def pictures(self, step: int, pictures: Mapping[str, str]) -> None:
    """Adds pictures, {name: path of a PNG}."""
    opened = lambda path: Image.open(io.BytesIO(paths.read(path))) if paths.is_remote(path) else path
    with self._writing():
      self._run.log({'step': step} | {name: self._wandb.Image(opened(path)) for name, path in pictures.items()})

  def close(self) -> None:
    """Returns when all of it is on its way, or on disk."""
    with self._writing():
      self._run.finish()

  def _writing(self):
    return workdirs.writing(self._workdir, 'for Weights & Biases', Exception)  # it raises its own


def _id(workdir: str) -> str:
  path = os.path.join(workdir, _ID)
  if not paths.exists(path):
    durable.write(path, secrets.token_hex(4) + '\n')
  return paths.read(path).decode().strip()
