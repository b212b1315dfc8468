"""Makes the page of an evaluated run again, or compares two runs on the same test examples.

    python -m cover_jax.report RUN [RUN2] [--output=FILE]

RUN is a workdir that was evaluated (training ends with it; `--mode=evaluate` does it again). Of one run the page is
RUN/evaluation/index.html, of two RUN2/evaluation/compared_with_<name of RUN>.html: one file, which needs no network.
Neither the model nor the data sets are opened.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from data_pipelines import durable, flags
from data_pipelines.contract import UserError


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.report', __doc__)
  to.add_argument('run', metavar='RUN', help='workdir of an evaluated run')
  to.add_argument('run2', metavar='RUN2', nargs='?', help='another one, to compare with it')
  to.add_argument(
    '--output', metavar='FILE', help='HTML file to write (default: in the folder evaluation of the last run)'
  )
  return to


def run(options: argparse.Namespace) -> None:
  """Does what the flags ask for."""
  # Imported here so that --help and a mistyped flag answer at once.
  from cover_jax.evaluation import comparison, page, runs

  first = runs.read(options.run)
  if options.run2 is None:
    name, text = 'index.html', page.of_run(first)
  else:
    second = runs.read(options.run2)
    compared = comparison.compare(first, second)
    if compared:
      print(comparison.table(compared, options.run, options.run2))
    print(comparison.table_of_several(first, second), end='')
    name, text = f'compared_with_{first.name[:200]}.html', page.of_two(first, second, compared)
  output = options.output or os.path.join(options.run2 or options.run, runs.FOLDER, name)
  try:
    durable.write(output, text)
  except OSError as error:
    raise UserError(
      f'{output} cannot be written ({error.strerror}): choose another place with --output=FILE.'
    ) from error
  print(f'Page: {output} ({len(text.encode()) / 1e6:.1f} MB)')


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: run(flags.parse(parser(), argv)))


if __name__ == '__main__':
  sys.exit(main())
