"""What benchmarks put into documents: a file's words are people's, what lies between its two markers a command's."""

import os
from collections.abc import Iterable, Sequence

import numpy as np

BEGIN, END = '<!-- tables: begin -->', '<!-- tables: end -->'


def fill(path: str, text: str, title: str, begin: str = BEGIN, end: str = END) -> None:
  """Puts `text` between the two markers of a Markdown file; one that is not there, or has none, becomes title and text.

  Args:
    path: of the file.
    text: Markdown.
    title: of a new file.
    begin, end: the markers; a file with the tables of several commands has a pair for each.
  """
  before, after = f'# {title}\n\n', '\n'
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      old = f.read()
    if begin in old and end in old:
      before, after = old.split(begin)[0], old.split(end)[1]
  with open(path, 'w', encoding='utf-8') as f:
    f.write(f'{before}{begin}\n{text}\n{end}{after}')


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table."""
  line = lambda cells: f'| {" | ".join(cells)} |'
  return '\n'.join([line(header), line(['---'] * len(header)), *map(line, rows)])


def spread(values: Iterable[float]) -> str:
  """'mean ± sample standard deviation' of shares, in percent; '-' of none."""
  x = 100 * np.array(list(values))
  if not len(x):
    return '-'
  return f'{x.mean():.1f} ± {x.std(ddof=1):.1f}' if len(x) > 1 else f'{x.mean():.1f}'
