"""Lists every option of a config with its default, what it may be and, where its function says so, its meaning.

    python -m cover_jax.options [--output=FILE]

Prints Markdown, made of what the code declares; docs/options.md is its output.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import declared, durable, flags
from data_pipelines.contract import UserError
from data_pipelines.declared import OPTIONAL, REQUIRED, Key, Keys

_WORDS = {
  'Objectives': "`config.streams.<stream>.objective = {'name': NAME, OPTION: VALUE}`; of several, each takes the first "
  'table, too.',
  'Augmentation': '`config.streams.<stream>.augment = {NAME: {OPTION: VALUE}}`; see [clips.md](clips.md).',
  'Heads': "`config.heads.all = {'name': NAME, OPTION: VALUE}`, or `config.heads.only.<source>` for one.",
  'Encoders': "`config.model = {'name': NAME, FIELD: VALUE}`.",
  'Optimizers': '`config.optimizer.options`, for each `config.optimizer.name`.',
  'Streams': '`config.streams.<stream>`; meanings: `cover_jax/experiment/settings.py`.',
  'Sources': '`config.sources.<source>`; meanings: `data_pipelines/clips/settings.py`.',
  'Run': '`config`; meanings: `cover_jax/experiment/settings.py`.',
}


def sections() -> dict[str, dict[str, tuple[Keys, Mapping[str, str]]]]:
  """{title: {name: (declared options, {option: meaning})}} of all that a config can set."""
  from cover_jax import objectives
  from cover_jax.augment import photometric
  from cover_jax.experiment import optim, settings
  from cover_jax.models import encoder, heads
  from cover_jax.objectives import several
  from data_pipelines.clips.settings import SOURCE

  of = lambda function: (declared.options_of(function), meanings(function))
  objective = {name: of(objectives.maker(name)) for name in objectives.names()}
  classes = {name: encoder.encoder_class({'name': name}) for name in encoder.ENCODERS}
  return {
    'Objectives': {'each of several': (several.ENTRY, {})} | objective,
    'Augmentation': {
      name: (keys if not isinstance(keys, Key) else {name: keys}, meanings(getattr(photometric, name, None)))
      for name, keys in photometric.OPTIONS.items()
    },
    'Heads': {name: of(kind) for name, kind in heads.KINDS.items()},
    'Encoders': {name: of(kind) for name, kind in classes.items()},
    'Optimizers': {name: (scaler.options, {}) for name, scaler in optim.SCALERS.items()},
    'Streams': {'': (settings.STREAM, {})},
    'Sources': {'': (SOURCE, {})},
    'Run': {'': (settings.RUN, {})},
  }


def meanings(function: Callable[..., Any] | None) -> dict[str, str]:
  """{parameter: what its docstring says of it}, from the lines under 'Args:' or 'Attributes:'."""
  text = inspect.getdoc(function) or ''
  block = re.search(r'(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)', text)
  found = {}
  for entry in re.split(r'(?m)^  (?=\S)', block[1]) if block else ():
    names, colon, said = entry.partition(': ')
    if colon and re.fullmatch(r'\*{0,2}\w+(, \w+)*', names):
      found |= dict.fromkeys(names.split(', '), ' '.join(said.split()))
  return found


def markdown() -> str:
  """The page."""
  lines = [
    '# Every option',
    '',
    'Made of what the code declares by `python -m cover_jax.options --output=docs/options.md`; a test compares.',
    'A value that an option may not have is refused before any data is opened. A star marks what the published code or',
    'text has, where it is known; all else is ours.',
  ]
  for title, parts in sections().items():
    lines += ['', f'## {title}', '', _WORDS[title]]
    for name, (keys, said) in parts.items():
      lines += ['', f'### {title}: {name}'] if name else []
      rows = list(_rows(keys, said))
      if not rows:
        lines += ['', 'No options.']
        continue
      meant = any(row[3] for row in rows)
      lines += ['', '| option | default | may be |' + ' meaning |' * meant, '| --- | --- | --- |' + ' --- |' * meant]
      lines += ['| ' + ' | '.join(row if meant else row[:3]) + ' |' for row in rows]
  return '\n'.join(lines) + '\n'


def _rows(keys: Keys, said: Mapping[str, str], before: str = '') -> Iterator[tuple[str, str, str, str]]:
  for name, key in keys.items():
    if not isinstance(key, Key):
      yield from _rows(key, said, f'{before}{name}.')
      continue
    default = {REQUIRED: 'must be given', OPTIONAL: 'not set'}.get(key.default) if _is_mark(key) else repr(key.default)
    cells = (
      f'`{before}{name}`',
      f'`{default}`' if not _is_mark(key) else default,
      key.kind.expected,
      said.get(name, ''),
    )
    yield tuple(re.sub(r'([|<>*])', r'\\\1', cell) if i > 1 else cell for i, cell in enumerate(cells))


def _is_mark(key: Key) -> bool:
  return key.default is REQUIRED or key.default is OPTIONAL


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.options', __doc__)
  to.add_argument('--output', metavar='FILE', help='Markdown file to write (default: print it)')
  return to


def run(options: argparse.Namespace) -> None:
  """Does what the flags ask for."""
  text = markdown()
  if not options.output:
    print(text, end='')
    return
  try:
    durable.write(options.output, text)
  except OSError as error:
    raise UserError(f'--output={options.output} cannot be written ({error.strerror}): choose another place.') from error


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: run(flags.parse(parser(), argv)))


if __name__ == '__main__':
  sys.exit(main())
