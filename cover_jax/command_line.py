"""What the commands that take a config share: its flag, and mistakes in it told in one sentence."""

import functools

import ml_collections
from absl import flags
from ml_collections import config_flags

from data_pipelines.contract import UserError


@functools.cache  # several commands may be imported by one process
def define_config() -> flags.FlagHolder:
  """Defines --config, with --config.key=value for its keys."""
  return config_flags.DEFINE_config_file('config', None, 'The experiment; see configs/.', lock_config=True)


def read(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The config that the flag names.

  Raises:
    UserError: if its file cannot be read.
  """
  try:
    flag.value.keys()  # a file that could not be read is reported on first use
  except OSError as error:
    raise _unreadable(config_flags.get_config_filename(flags.FLAGS['config'])) from error
  return flag.value


def _unreadable(name: str) -> UserError:
  return UserError(f'--config={name} cannot be read: give the path of a config file, such as those in configs/.')


def parse(argv: list[str]) -> list[str]:
  """Parses flags; ml_collections raises what Python raises inside the config file or for an unknown key."""
  try:
    return flags.FLAGS(argv)
  except UserError:
    raise
  except OSError as error:  # where a --config.key=value follows a file that is not there
    name = next((arg.partition('=')[2] for arg in argv if arg.startswith('--config=')), '')
    raise _unreadable(name) from error
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
