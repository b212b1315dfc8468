"""The flags of commands: argparse, with mistakes told in one sentence."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence

from data_pipelines import paths
from data_pipelines.contract import UserError


class _Parser(argparse.ArgumentParser):
  """Raises a UserError where argparse would print its usage and end the process."""

  def error(self, message: str) -> None:
    raise UserError(f'{message[0].upper()}{message[1:]}; see `{self.prog} --help`.')


def parser(module: str, doc: str) -> argparse.ArgumentParser:
  """A parser of a command's flags, whose --help is the docstring of its module.

  Args:
    module: that is run, such as 'cover_jax.main'.
    doc: its docstring.
  """
  layout = argparse.RawDescriptionHelpFormatter
  return _Parser(f'python -m {module}', description=doc, formatter_class=layout, allow_abbrev=False)


def words(text: str) -> list[str]:
  """The type of a flag that takes several values with commas between them."""
  return [word for word in text.split(',') if word]


def path(text: str) -> str:
  """The type of a flag that names a file or folder: '~' is the home, also where a shell leaves it (`--workdir=~/x`)."""
  return os.path.expanduser(text)


def whole(least: int) -> Callable[[str], int]:
  """The type of a flag that takes whole numbers from `least` on."""

  def number(text: str) -> int:
    if not re.fullmatch(r'\d+', text) or int(text) < least:
      raise argparse.ArgumentTypeError(f'{text} is no whole number of at least {least}')
    return int(text)

  return number


def parse(
  of: argparse.ArgumentParser, argv: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
  """Parses a command line.

  Args:
    of: the command's parser.
    argv: arguments of the command; None: the process's.
    namespace: that is filled; None: a new one.

  Raises:
    UserError: for a mistake in it.
  """
  options, rest = of.parse_known_args(sys.argv[1:] if argv is None else list(argv), namespace)
  check_known(of, rest)
  if rest:
    raise UserError(f'Unexpected argument {rest[0]!r}; see `{of.prog} --help`.')
  return options


def check_known(of: argparse.ArgumentParser, rest: Sequence[str]) -> None:
  """Raises a UserError if a flag is among what a parser has left over; a negative number is none."""
  for word in rest:
    if word.startswith('-') and not re.fullmatch(r'-[\d.]+(e[+-]?\d+)?', word):
      name = word.partition('=')[0]
      close = difflib.get_close_matches(name, of._option_string_actions, 1)
      meant = f', did you mean {close[0]}' if close else ''
      raise UserError(f'There is no flag {name}{meant}; see `{of.prog} --help`.')


def run(command: Callable[[], int | None]) -> int:
  """Runs a command and gives its exit code: 2, and one sentence, where it raises a UserError."""
  try:
    return command() or 0
  except UserError as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  except OSError as error:
    if not (told := paths.unreachable(error)):
      raise
    print(f'Error: {told}', file=sys.stderr)
    return 2
