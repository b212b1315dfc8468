"""What the commands that take a config share: its flag, and mistakes in it told in one sentence.

`--config.KEY=VALUE` sets a key that the config has; an entry of a dict whose names are free (`optimizer.options.b2`,
`streams.video.augment.mixup`); a field of the encoder, also one that the config leaves at its default
(`model.scan_unroll`). A dict for VALUE is merged into a section of keys that are declared (`mesh`, `optimizer`,
`sources.NAME`, the `model` of the same name), and takes the place of a dict whose names are free: the log then says
what went.
"""

import argparse
import ast
import json
import linecache
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags as absl_flags
from absl import logging
from ml_collections import config_flags
from ml_collections.config_flags import config_flags as config_files

from data_pipelines import flags, paths
from data_pipelines.contract import UserError
from data_pipelines.declared import OPTIONAL, Key

_KEYS = 'see cover_jax/experiment/settings.py for all keys'


def add_config(to: argparse.ArgumentParser) -> None:
  """Adds --config, with --config.key=value for its keys."""
  what = "the experiment, see configs/, or a run's config.json; --config.key=value sets a key"
  to.add_argument('--config', required=True, type=flags.path, metavar='FILE[:VARIANT]', help=what)


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
  others, dicts = _apart(settings_)
  argv = ['', f'--config={path}', *others]
  values = absl_flags.FlagValues()  # of this command line alone
  config_flags.DEFINE_config_file('config', None, '', values, lock_config=True, sys_argv=argv)
  values['config'].parser = _ConfigFile(others, dicts)
  unexpected = _set(values, argv)
  if len(unexpected) > 1:
    raise UserError(f'Unexpected argument {unexpected[1]!r}: give settings as --config.key=value.')
  from cover_jax.experiment import settings  # here, so that --help answers at once

  config = values['config'].value
  settings.check(config)
  settings.fit_model(config)
  return _at_home(config)


def _at_home(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with '~' in its paths as the home."""
  config.init_from.path = flags.path(config.init_from.path)
  for source in config.sources.values():
    source.data_dir = flags.path(source.data_dir)
    source.exclude = tuple(map(flags.path, source.exclude))
  return config


def _apart(settings_: Sequence[str]) -> tuple[list[str], list[tuple[list[str], dict[str, Any]]]]:
  """(the settings whose value is no dict, (words of its path, value) of each that is one)."""
  others, dicts = [], []
  for word in settings_:
    if others and word.startswith('{') and re.fullmatch(r'--?config\.[^=]+', others[-1]):
      word = f'{others.pop()}={word}'
    path, _, text = word.partition('=')
    try:
      value = ast.literal_eval(text) if text.startswith('{') else None
    except (SyntaxError, ValueError):
      value = None
    if isinstance(value, dict):
      dicts.append((path.partition('.')[2].split('.'), value))
    else:
      others.append(word)
  return others, dicts


def _make_room(config: ml_collections.ConfigDict, path: Sequence[str]) -> None:
  """Adds an entry to a config, for a flag to set it, if it may have one there; what it is is checked later."""
  from cover_jax.experiment import settings

  key = settings.declared_at(path)
  free = isinstance(key, Key) and key.kind.free
  if not free and not (isinstance(key, Key) and key.default is OPTIONAL):
    return
  holder = config
  for word in path[:-1]:
    if not isinstance(holder, ml_collections.ConfigDict) or (word not in holder and not free):
      return
    if word not in holder:
      with holder.unlocked():
        holder[word] = {}
    holder = holder[word]
  if isinstance(holder, ml_collections.ConfigDict) and path[-1] not in holder:
    with holder.unlocked():
      holder[path[-1]] = ml_collections.FieldReference(None, field_type=object)


def _set_dict(config: ml_collections.ConfigDict, path: Sequence[str], value: Mapping[str, Any]) -> None:
  """Merges a dict into a section, or replaces what has entries of free names; raises KeyError if there is no such."""
  from cover_jax.experiment import settings

  _make_room(config, path)
  holder = config
  for word in path[:-1]:
    holder = holder[word]
  old, name = holder[path[-1]], '.'.join(path)
  was = dict(old.items()) if isinstance(old, ml_collections.ConfigDict) else {}
  other = 'name' in value and value['name'] != was.get('name', 'timesformer')
  merges = not isinstance(settings.declared_at(path), Key) or (list(path) == ['model'] and not other)
  if merges and isinstance(old, ml_collections.ConfigDict):
    for key, one in value.items():
      if isinstance(one, dict) and isinstance(was.get(key), ml_collections.ConfigDict):
        _set_dict(config, [*path, key], one)
      else:
        with old.unlocked():  # a key that there is not is named when all of it is checked
          old[key] = one
    return
  if (gone := [key for key in was if key not in value]) and not other:
    logging.warning(
      '--config.%s replaces all of its entries: %s went. To change one of them: --config.%s.%s=...',
      name,
      ', '.join(f'{key}={was[key]!r}' for key in gone),
      name,
      gone[0],
    )
  with holder.unlocked():
    del holder[path[-1]]  # it may be a placeholder, which would keep the dict as it is
    holder[path[-1]] = ml_collections.ConfigDict(dict(value))


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


class _ConfigFile(config_files.ConfigFileFlagParser):
  """Runs a config file and makes it ready for flags; what goes wrong in it is a UserError that names the line."""

  def __init__(self, settings_: Sequence[str], dicts: Sequence[tuple[list[str], dict[str, Any]]]):
    super().__init__('config', lock_config=True)
    self._paths = [m[1].split('.') for m in (re.match(r'--?(?:no)?config\.([\w.-]+)', s) for s in settings_) if m]
    self._dicts = dicts

  def parse(self, path: str) -> ml_collections.ConfigDict:
    config = self._load(path)
    for words, value in self._dicts:
      _set_dict(config, words, value)
    for words in self._paths:
      _make_room(config, words)
    return config

  def _load(self, path: str) -> ml_collections.ConfigDict:
    if _apart_from_variant(path)[0].endswith('.json'):
      return _of_json(path)
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
    return config


def _apart_from_variant(path: str) -> tuple[str, str | None]:
  """FILE and VARIANT of FILE:VARIANT; of 'gs://...' the first colon is a part of the path."""
  file, variant = re.fullmatch(r'((?:\w+://)?[^:]*)(?::(.*))?', path, re.DOTALL).groups()
  return file, variant


def _of_json(path: str) -> ml_collections.ConfigDict:
  """The config that a run wrote."""
  from cover_jax.experiment import settings

  path, variant = _apart_from_variant(path)
  if variant is not None:
    raise UserError(f'--config={path} has no variants: it is the config of one run. Leave out what follows the name.')
  try:
    values = json.loads(paths.read(path))
  except (OSError, ValueError) as error:
    said = getattr(error, 'strerror', None) or f'it is no JSON: {_one_line(error)}'
    raise UserError(f'--config={path} cannot be read ({said}): give the config.json of a workdir.') from error
  config = settings.from_json(values, path)
  config.lock()
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
