"""What the commands that take a config share: its flag, and mistakes in it told in one sentence."""

import argparse
import ast
import linecache
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags
from ml_collections.config_flags import config_flags as config_files

from data_pipelines import flags
from data_pipelines.contract import UserError

_KEYS = 'see cover_jax/experiment/settings.py for all keys'


def add_config(to: argparse.ArgumentParser) -> None:
  """Adds --config, with --config.key=value for its keys."""
  what = 'the experiment, see configs/; --config.key=value sets a key'
  to.add_argument('--config', required=True, metavar='FILE[:VARIANT]', help=what)


def parse(of: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Parses the command line of a command that takes a config.

  Args:
    of: its parser, of `flags.parser` and `add_config`.
    argv: arguments of the command; None: the process's.

  Returns:
    The flags; `config` is the ConfigDict, checked (`settings.check`), its model fitting (`settings.fit_model`).

  Raises:
    UserError: for a mistake in the flags, or the first key of the config that is unknown, missing or of a value that it
      may not have.
  """
  options, rest = of.parse_known_args(sys.argv[1:] if argv is None else list(argv))
  flags.check_known(of, [word for word in rest if not re.match(r'--?(no)?config\.', word)])
  options.config = _read(options.config, rest)
  return options


def _read(path: str, settings_: Sequence[str]) -> ml_collections.ConfigDict:
  """The config of a file with --config.key=value, checked."""
  argv = ['', f'--config={path}', *settings_]
  values = absl_flags.FlagValues()  # of this command line alone
  config_flags.DEFINE_config_file('config', None, '', values, lock_config=True, sys_argv=argv)
  values['config'].parser = _ConfigFile('config', settings_)
  unexpected = _set(values, argv)
  if len(unexpected) > 1:
    raise UserError(f'Unexpected argument {unexpected[1]!r}: give settings as --config.key=value.')
  from cover_jax.experiment import settings  # here, so that --help answers at once

  config = values['config'].value
  settings.check(config)
  settings.fit_model(config)
  return config


def _set(values: absl_flags.FlagValues, argv: list[str]) -> list[str]:
  """Sets a config's keys; ml_collections raises what Python raises for an unknown one."""
  try:
    return values(argv)
  except UserError:
    raise
  except absl_flags.Error as error:
    raise UserError(f'{_one_line(error)}; {_KEYS}.') from error
  except (KeyError, AttributeError) as error:
    said = _one_line(error)
    raise UserError(f'The command sets a key that the config lacks: {_unknown_key(said) or said}; {_KEYS}.') from error
  except (TypeError, ValueError) as error:
    raise UserError(f'The config cannot be set as the command asks: {_one_line(error)}.') from error


def _add_free(config: ml_collections.ConfigDict, settings_: Sequence[str]) -> None:
  """Adds keys that flags set where names are free (`--config.mixture.weights.videos=2.0`); a lock refuses new ones."""
  from cover_jax.experiment import settings

  for word in settings_:
    setting = re.fullmatch(r'(?s)--?config\.([\w.-]+)\.([\w-]+)=(.*)', word)
    holder: Any = config if setting else None
    for part in setting[1].split('.') if setting else ():
      holder = holder.get(part) if isinstance(holder, ml_collections.ConfigDict) else None
    if not isinstance(holder, ml_collections.ConfigDict) or setting[2] in holder:
      continue
    if settings.has_free_names(setting[1]):
      with holder.unlocked():
        holder[setting[2]] = _literal(setting[3])


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


class _ConfigFile(config_files.ConfigFileFlagParser):
  """Runs a config file; whatever goes wrong in it is a UserError that names the line."""

  def __init__(self, name: str, settings_: Sequence[str]):
    super().__init__(name, lock_config=True)
    self._settings = settings_

  def parse(self, path: str) -> ml_collections.ConfigDict:
    try:
      config = super().parse(path)
    except UserError:
      raise
    except Exception as error:
      raise UserError(_in_file(path.partition(':')[0], error)) from error
    try:
      config.is_locked  # noqa: B018  a file that could not be read is reported on first use
    except OSError as error:
      raise UserError(
        f'--config={path} cannot be read: give the path of a config file, such as those in configs/.'
      ) from error
    except AttributeError:
      raise UserError(
        f'get_config of {path} gives a {type(config).__name__}: expected what configs.defaults.get_config() makes.'
      ) from None
    _add_free(config, self._settings)
    return config


def _in_file(file: str, error: Exception) -> str:
  """What went wrong in a config file, and in which line."""
  if isinstance(error, TypeError | ValueError) and error.__context__:
    error = error.__context__  # ml_collections has put a traceback into the message
  frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
  if isinstance(error, SyntaxError) and error.filename:
    frames.append((error.filename, error.lineno))
  folder = lambda path: os.path.dirname(os.path.abspath(path))
  where, line = next((f for f in reversed(frames) if folder(f[0]) == folder(file)), (file, None))
  said = _unknown_key(_one_line(error)) or f'{type(error).__name__}: {_one_line(error)}'
  text = linecache.getline(where, line).strip() if line else ''
  return f'{os.path.relpath(where)}' + (f', line {line}, `{text}`' if text else '') + f': {said}.'


def _unknown_key(said: str) -> str:
  """What a locked config says of a key that it lacks, without the list of those that it has; '' for other errors."""
  unknown = re.search(r'Key "([^"]*)" does not exist and cannot be added', said)
  close = re.search(r'Did you mean "([^"]*)"', said)
  if unknown is None:
    return ''
  return f'there is no key {unknown[1]!r}' + (f', did you mean {close[1]!r}' if close else f'; {_KEYS}')


def _one_line(error: Exception) -> str:
  # A KeyError of a KeyError shows its text with escapes.
  text = str(error.args[0] if error.args else error).replace('\\n', ', ').replace("\\'", "'")
  return ' '.join(text.split()).removesuffix('?')
