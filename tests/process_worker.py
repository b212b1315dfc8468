"""One process of several: the command line, with the tiny run of arrays in memory as its job.

    python -m tests.process_worker --workdir=DIR [--coordinator=... --num_processes=N --process_id=I]

The environment variable TINY_RUN holds JSON: {'changes': of the tiny config, 'step_seconds': a delay of each batch,
'patience': seconds until a folder that is not shared is told}.
"""

import dataclasses
import json
import os
import signal
import sys
import time

import numpy as np

from cover_jax import main
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.jobs import train as train_job
from cover_jax.runtime import processes
from cover_jax.training import loop as training
from data_pipelines import durable
from tests import tiny


def train(_, workdir):
  """What `train_job.train` does, on arrays in memory; leaves the confusion matrices that each process got."""
  workdirs.prepare(workdir)
  with workdirs.hold(workdir):
    _train(workdir)


def _train(workdir):
  options = json.loads(os.environ['TINY_RUN'])
  experiment, mesh, batches, tests = tiny.build(tiny.config(**options['changes']))
  stop = processes.watch_preemption()
  watched = {n: dataclasses.replace(t, batches=training.stoppable(t.batches, stop)) for n, t in tests.items()}
  evaluate = evaluation.make_evaluate(experiment, watched, mesh)
  results = {}

  def evaluate_now(state):
    results.update(evaluate(state.params))
    return evaluation.scalars(results)

  def delayed(start):
    for batch in batches(start):
      time.sleep(options.get('step_seconds', 0))
      yield batch

  state = training.train(experiment, delayed, workdir, mesh, evaluate_now, stop)
  processes.leave_interrupts()
  processes.gather(state.params)
  matrices = {name: r.confusion_KxK for name, r in results.items()}
  with durable.replacing(os.path.join(workdir, f'confusion-{processes.jax.process_index()}.npz')) as f:
    np.savez(f, **matrices)


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
  train_job.train = train
  workdirs._PATIENCE = json.loads(os.environ['TINY_RUN']).get('patience', workdirs._PATIENCE)
  sys.argv.append('--config=configs/digits_cover.py:debug')
  main.main()
