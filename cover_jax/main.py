"""Trains or evaluates the experiment of a config file.

    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR [--config.key=value ...]
    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR --mode=evaluate
    python -m cover_jax.main --config=configs/frozen_digits.py --workdir=DIR --mode=frozen
    python -m cover_jax.main --config=configs/v3s_digits.py --workdir=DIR --mode=pretext

A run of several processes (hosts) is the same command on each; see docs/scale.md.

Exit codes: 0 done; 2 a mistake in the command, config or files, another run in the workdir, a full disk (one sentence
says which); 3 the loss or its gradient is not finite; 75 SIGTERM came and the state was saved, or another process of
the run died: run the same command again; 130 Ctrl-C came: the first while it trains saves the state as SIGTERM does, a
second one ends the process at once; the same command goes on. (JAX itself ends a process with 134 where it notices the
death first.)
"""

import argparse
import sys
import traceback
from collections.abc import Sequence

import jax
from absl import logging

from cover_jax import command_line
from cover_jax.runtime import compiled
from data_pipelines import flags, installed, paths
from data_pipelines.contract import UserError

EXIT_USER_ERROR, EXIT_NON_FINITE, EXIT_PREEMPTED = 2, 3, 75


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.main', __doc__)
  command_line.add_config(to)
  what = 'folder for checkpoints, metrics and pictures; made if missing'
  to.add_argument('--workdir', required=True, type=flags.path, help=what)
  to.add_argument(
    '--mode',
    choices=('train', 'evaluate', 'frozen', 'pretext'),
    default='train',
    help='train; evaluate heads; judge a frozen encoder; judge objectives on held-out videos (default: train)',
  )
  what = 'train on from the checkpoint of this step, such as the last before a divergence; later ones are moved aside'
  to.add_argument('--resume_from', type=flags.whole(1), metavar='STEP', help=what)
  compiled.add_flag(to)
  several = to.add_argument_group('several processes', 'on Cloud TPU slices and under SLURM JAX finds these itself')
  several.add_argument('--coordinator', metavar='HOST:PORT', help='address of the first process')
  several.add_argument('--num_processes', type=int, help='number of processes in the run')
  several.add_argument('--process_id', type=int, help='number of this one, from 0')
  several.add_argument(
    '--heartbeat_seconds', type=flags.whole(2), default=100, help='a process silent for so long is dead (default: 100)'
  )
  return to


def run(argv: Sequence[str] | None = None) -> None:
  """Does what a command line asks for."""
  options = command_line.parse(parser(), argv)
  if options.resume_from is not None and options.mode != 'train':
    raise UserError(f'--resume_from={options.resume_from} is for --mode=train: leave it out.')
  installed.need_train(f'--mode={options.mode}')
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  # Imported here so that --help and a mistyped flag answer at once.
  from cover_jax.checkpoints import workdir
  from cover_jax.jobs import evaluate, frozen, pretext, train
  from cover_jax.runtime import agreement, processes

  compiled.keep(options.compilation_cache)
  processes.start(
    options.coordinator, options.num_processes, options.process_id, heartbeat_seconds=options.heartbeat_seconds
  )
  logging.info('JAX %s on %d x %s', jax.__version__, jax.device_count(), jax.devices()[0].device_kind)
  if jax.process_count() > 1:
    agreement.check('The command', agreement.of_command(options.mode, options.resume_from, options.config.to_dict()))
    workdir.check_shared(options.workdir)
  if options.resume_from is not None:
    train.train(options.config, options.workdir, resume_from=options.resume_from)
    return
  job = {
    'train': train.train,
    'evaluate': evaluate.evaluate,
    'frozen': frozen.judge_frozen,
    'pretext': pretext.judge_pretext,
  }[options.mode]
  job(options.config, options.workdir)


def _fail(code: int, message: str) -> None:
  from cover_jax.runtime import processes

  print(f'\n{message}', file=sys.stderr)
  processes.leave(code)


def main() -> None:
  """The command line."""
  from cover_jax.runtime.processes import EXIT_INTERRUPTED, interrupted, leave, lost_peer
  from cover_jax.training.finite import NonFiniteLoss
  from cover_jax.training.loop import Preempted

  try:
    run()
  except UserError as error:
    _fail(EXIT_USER_ERROR, f'Error: {error}')
  except NonFiniteLoss as error:
    _fail(EXIT_NON_FINITE, f'Error: {error}')
  except Preempted as stop:
    code = EXIT_INTERRUPTED if interrupted() else EXIT_PREEMPTED
    _fail(code, f'{stop} Run the same command again to continue (exit code {code}).')
  except KeyboardInterrupt:
    _fail(EXIT_INTERRUPTED, 'Interrupted: the same command goes on from the newest checkpoint.')
  except Exception as error:
    if isinstance(error, OSError) and (told := paths.unreachable(error)):
      _fail(EXIT_USER_ERROR, f'Error: {told}')
    if lost_peer(error):
      _fail(EXIT_PREEMPTED, f'Another process of the run died: start all of them again ({str(error).splitlines()[0]}).')
    traceback.print_exc()
    leave(1)


if __name__ == '__main__':
  main()
