"""Trains or evaluates the experiment of a config file.

    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR [--config.key=value ...]
    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR --mode=evaluate
    python -m cover_jax.main --config=configs/frozen_digits.py --workdir=DIR --mode=frozen

A run of several processes (hosts) is the same command on each; see docs/scale.md.

Exit codes: 0 done; 2 a mistake in the command, config or files, another run in the workdir, a full disk (one sentence
says which); 3 the loss or its gradient is not finite; 75 SIGTERM came and the state was saved, or another process of
the run died: run the same command again; 130 Ctrl-C. (JAX itself ends a process with 134 where it notices the death
first.)
"""

import sys
import traceback

import jax
from absl import app, flags, logging

from cover_jax import command_line
from data_pipelines.contract import UserError

EXIT_USER_ERROR, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 3, 75, 130

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics and pictures; made if missing.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'Of several processes: host:port of the first.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Of several processes: how many.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Of several processes: which one this is, from 0.')
_HEARTBEAT = flags.DEFINE_integer('heartbeat_seconds', 100, 'A process silent for so long is dead.', lower_bound=2)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'frozen'], 'What to do.')


def run(argv: list[str]) -> None:
  """Does what the flags ask for."""
  if len(argv) > 1:
    raise UserError(f'Unexpected argument {argv[1]!r}: give settings as --config.key=value.')
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise UserError('--config and --workdir are needed: see `python -m cover_jax.main --help`.')
  config = command_line.read(_CONFIG)
  # Imported here so that --help and a mistyped flag answer at once.
  from cover_jax.jobs import evaluate, frozen, train
  from cover_jax.runtime import processes

  processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, heartbeat_seconds=_HEARTBEAT.value)
  logging.info('JAX %s on %d x %s', jax.__version__, jax.device_count(), jax.devices()[0].device_kind)
  {'train': train.train, 'evaluate': evaluate.evaluate, 'frozen': frozen.judge_frozen}[_MODE.value](
    config, _WORKDIR.value
  )


def _fail(code: int, message: str) -> None:
  from cover_jax.runtime import processes

  print(f'\n{message}', file=sys.stderr)
  processes.leave(code)


def main() -> None:
  """The command line."""
  from cover_jax.runtime.processes import leave, lost_peer
  from cover_jax.training.finite import NonFiniteLoss
  from cover_jax.training.loop import Preempted

  try:
    app.run(run, flags_parser=command_line.parse)
  except UserError as error:
    _fail(EXIT_USER_ERROR, f'Error: {error}')
  except NonFiniteLoss as error:
    _fail(EXIT_NON_FINITE, f'Error: {error}')
  except Preempted as stop:
    _fail(EXIT_PREEMPTED, f'{stop} Run the same command again to continue (exit code {EXIT_PREEMPTED}).')
  except KeyboardInterrupt:
    _fail(EXIT_INTERRUPTED, 'Interrupted: the same command goes on from the newest checkpoint.')
  except Exception as error:
    if lost_peer(error):
      _fail(EXIT_PREEMPTED, f'Another process of the run died: start all of them again ({str(error).splitlines()[0]}).')
    traceback.print_exc()
    leave(1)


if __name__ == '__main__':
  main()
