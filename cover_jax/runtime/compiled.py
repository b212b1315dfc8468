"""Programs that were compiled once are not compiled again: JAX's persistent cache, in the user's cache folder."""

import argparse
import os
import pathlib
import platform
import re
import zlib

import jax
from absl import logging

from data_pipelines import paths


def add_flag(to: argparse.ArgumentParser) -> None:
  """Adds --compilation_cache, whose value is what `keep` takes."""
  what = "compiled programs are kept there; empty: nowhere (default: in the user's cache folder)"
  to.add_argument('--compilation_cache', metavar='DIR', help=what)


def default_folder() -> str:
  """$XDG_CACHE_HOME/cover_jax/compiled (~/.cache where that is not set), a folder in it for this kind of machine.

  Programs for a CPU hold its instructions, and homes are shared between machines.
  """
  home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  return os.path.join(home, 'cover_jax', 'compiled', _machine())


def keep(folder: str | None) -> None:
  """Reads compiled programs from a folder, and writes new ones there; with several hosts process 0 writes.

  What cannot be read or written there is compiled, and a warning says so. Results are the same to the bit.

  Args:
    folder: made if missing; '' for none, None for `default_folder`. What $JAX_COMPILATION_CACHE_DIR names is used
      instead of the default.
  """
  if folder is None:
    if os.environ.get('JAX_COMPILATION_CACHE_DIR') is not None:
      return
    folder = default_folder()
  if folder:
    folder = os.path.expanduser(folder)
    try:
      paths.make_folder(folder)
    except OSError as error:
      logging.warning('Compiled programs are not kept: %s cannot be made (%s).', folder, error.strerror)
      folder = ''
  jax.config.update('jax_compilation_cache_dir', folder or None)
  # A run compiles dozens of small programs, too; each takes longer to compile than to read.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _machine() -> str:
  try:
    flags = re.search(r'^(?:flags|Features)\s*:(.*)$', pathlib.Path('/proc/cpuinfo').read_text(), re.M)
  except OSError:
    flags = None
  kind = flags[1] if flags else platform.processor()
  return f'{platform.machine()}-{zlib.crc32(kind.encode()):08x}'
