"""Trains or evaluates the experiment of a config file.

    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR [--config.key=value ...]
    python -m cover_jax.main --config=configs/digits_cover.py --workdir=DIR --mode=evaluate

Exit codes: 0 done; 2 a mistake in the command, config or files (one sentence says which); 3 the loss is not
finite; 75 SIGTERM came and the state was saved: run the same command again.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines.contract import UserError

EXIT_USER_ERROR, EXIT_NON_FINITE, EXIT_PREEMPTED = 2, 3, 75

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; see configs/.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for checkpoints, metrics and pictures; made if missing.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'What to do.')


def run(argv: list[str]) -> None:
  """Does what the flags ask for."""
  if len(argv) > 1:
    raise UserError(f'Unexpected argument {argv[1]!r}: give settings as --config.key=value.')
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise UserError('--config and --workdir are needed: see `python -m cover_jax.main --help`.')
  try:
    _CONFIG.value.keys()  # a file that could not be read is reported on first use
  except OSError as error:
    name = config_flags.get_config_filename(flags.FLAGS['config'])
    raise UserError(
      f'--config={name} cannot be read: give the path of a config file, such as those in configs/.'
    ) from error
  # Imported here so that --help and a mistyped flag answer at once.
  from cover_jax import jobs

  logging.info('JAX %s on %d x %s', jax.__version__, jax.device_count(), jax.devices()[0].device_kind)
  {'train': jobs.train, 'evaluate': jobs.evaluate}[_MODE.value](_CONFIG.value, _WORKDIR.value)


def _fail(code: int, message: str) -> None:
  print(f'\n{message}', file=sys.stderr)
  sys.exit(code)


def main() -> None:
  """The command line."""
  from cover_jax.train import NonFiniteLoss, Preempted

  try:
    app.run(run, flags_parser=_parse)
  except UserError as error:
    _fail(EXIT_USER_ERROR, f'Error: {error}')
  except NonFiniteLoss as error:
    _fail(EXIT_NON_FINITE, f'Error: {error}')
  except Preempted as stop:
    _fail(EXIT_PREEMPTED, f'{stop} Run the same command again to continue (exit code {EXIT_PREEMPTED}).')


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; ml_collections raises what Python raises inside the config file or for an unknown key."""
  try:
    return flags.FLAGS(argv)
  except UserError:
    raise
  except flags.Error as error:
    raise UserError(f'{_one_line(error)}; see --help and configs/defaults.py.') from error
  except (KeyError, AttributeError) as error:
    raise UserError(
      f'The command or the config file uses a key that the config lacks: {_one_line(error)}; see configs/defaults.py.'
    ) from error
  except (TypeError, ValueError) as error:
    raise UserError(f'The config cannot be set as the command asks: {_one_line(error)}.') from error


def _one_line(error: Exception) -> str:
  # A KeyError of a KeyError shows its text with escapes.
  text = str(error.args[0] if error.args else error).replace('\\n', ', ').replace("\\'", "'")
  return ' '.join(text.split()).removesuffix('?')


if __name__ == '__main__':
  main()
