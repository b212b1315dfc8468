"""A trained checkpoint for tests: three steps of the tiny run, once a process."""

import atexit
import functools
import shutil
import tempfile

from cover_jax.training import loop as training
from tests import tiny


@functools.cache
def trained(attention: str = 'divided') -> str:
  """The workdir of a run of the tiny config."""
  workdir = tempfile.mkdtemp(prefix='cover_jax_tiny_')
  atexit.register(shutil.rmtree, workdir, ignore_errors=True)
  # A rate at which three steps leave heads and temporal attention clearly away from zero.
  config = tiny.config(model__attention=attention, total_steps=3, log_every=1, optimizer__learning_rate=0.05)
  experiment, mesh, batches, _ = tiny.build(config)
  training.train(experiment, batches, workdir, mesh)
  return workdir
