"""Tables and pictures of the study of CoVeR's claims: paired differences with their 95 % intervals."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import claims_runs, documents
from benchmarks.documents import markdown, spread
from configs.claims_digits import VIDEOS
from data_pipelines.builders import digits_rendering as rendering

Cells = Sequence[Mapping[str, Any]]
Accuracy = Callable[[str, str], dict[int, float]]  # (run, source) -> {seed: test top-1}


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of paired differences, and half the width of its 95 % interval (Student's t over the seeds)."""

  mean: float
  half: float
  pairs: int

  @property
  def verdict(self) -> str:
    """Whether the interval excludes zero."""
    if not self.half < abs(self.mean):
      return 'open'
    return 'yes' if self.mean > 0 else 'no'

  def __str__(self) -> str:
    if not self.pairs:
      return '-'
    half = f' ± {100 * self.half:.1f}' if np.isfinite(self.half) else ''
    return f'{100 * self.mean:+.1f}{half} ({self.verdict})'


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
  """a - b over the seeds that both have."""
  seeds = sorted(set(a) & set(b))
  d = np.array([a[seed] - b[seed] for seed in seeds])
  if len(d) < 2:
    return Difference(float(d.mean()) if len(d) else float('nan'), float('inf'), len(d))
  half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
  return Difference(float(d.mean()), float(half), len(d))


def accuracies(cells: Cells, split: str = 'test') -> Accuracy:
  """Looks up top-1 by run and source, seed by seed; 'mean' is the mean over the video sources."""

  def look_up(run: str, source: str) -> dict[int, float]:
    names = VIDEOS if source == 'mean' else (source,)
    rows = [c for c in cells if c['run'] == run and all(n in c.get(split, {}) for n in names)]
    return {c['seed']: float(np.mean([c[split][n] for n in names])) for c in rows}

  return look_up


def alone(accuracy: Accuracy, kind: str) -> Accuracy:
  """The same for 'alone' and 'alone_long', which are a run for each source."""

  def look_up(_: str, source: str) -> dict[int, float]:
    if source != 'mean':
      return accuracy(f'{kind}/{source}', source)
    of = [accuracy(f'{kind}/{s}', s) for s in VIDEOS]
    return {seed: float(np.mean([o[seed] for o in of])) for seed in set.intersection(*(set(o) for o in of))}

  return look_up


def study1(accuracy: Accuracy) -> str:
  """Alone against co-trained, and the ways of mixing."""
  columns = (*VIDEOS, 'mean')
  short, long = alone(accuracy, 'alone'), alone(accuracy, 'alone_long')
  arms = (
    ('alone, as many passes', short),
    ('alone, as many steps', long),
    ('co-trained on videos', lambda _, s: accuracy('videos', s)),
    ('co-trained on videos and images', lambda _, s: accuracy('videos_images', s)),
  )
  rows = [[name, *(spread(arm('', s).values()) for s in columns)] for name, arm in arms]
  pairs = ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
  changes = [
    [f'{arms[a][0]} - {arms[b][0]}', *(str(difference(arms[a][1]('', s), arms[b][1]('', s))) for s in columns)]
    for a, b in pairs
  ]
  ways = [
    [
      f'videos, mixed in proportion - {words}',
      *(str(difference(accuracy('videos', s), accuracy(run, s))) for s in columns),
    ]
    for run, words in (
      ('one_source_a_step', 'one source a step'),
      ('square_root', 'by the square root of size'),
      ('uniform', 'uniform'),
    )
  ]
  first = [
    [
      f'{words}, first stage on images - none',
      *(str(difference(accuracy(f'seeded_{run}', s), accuracy(run, s))) for s in columns),
    ]
    for run, words in (('videos', 'videos'), ('videos_images', 'videos and images'))
  ]
  return '\n\n'.join(
    [
      '### Study 1: co-training\n\nTest top-1, %.',
      markdown(['trained', *columns], rows),
      'Paired differences, points.',
      markdown(['difference', *columns], changes),
      'How sources are mixed (all of them co-trained on the videos, for as many steps).',
      markdown(['difference', *columns], ways),
      '### Study 3: first stage\n\nA ViT on the images, then co-training, against co-training from nothing.',
      markdown(['difference', *columns], first),
    ]
  )


def study2(accuracy: Accuracy) -> str:
  """Transfer A -> B."""
  starts = tuple(f'alone_long/{a}' for a in VIDEOS)
  co = ('videos', 'videos_images')
  words = {'videos': 'co-trained on videos', 'videos_images': 'co-trained on videos and images'}
  rows = [[f'{s.split("/")[1]}, then B', *(spread(accuracy(f'{s}>{b}', b).values()) for b in VIDEOS)] for s in starts]
  rows += [[f'{words[s]}, then B', *(spread(accuracy(f'{s}>{b}', b).values()) for b in VIDEOS)] for s in co]
  rows += [[f'{words[s]}, no fine-tuning', *(spread(accuracy(s, b).values()) for b in VIDEOS)] for s in co]
  changes = []
  for c in co:
    for a in starts:
      from_a = {b: accuracy(f'{a}>{b}', b) for b in VIDEOS}
      for label, mine in (('then B', lambda b: accuracy(f'{c}>{b}', b)), ('no fine-tuning', lambda b: accuracy(c, b))):  # noqa: B023
        changes.append(
          [f'{words[c]}, {label} - {a.split("/")[1]}, then B', *(str(difference(mine(b), from_a[b])) for b in VIDEOS)]
        )
  header = [f'B = {b}' for b in VIDEOS]
  return '\n\n'.join(
    [
      '### Study 2: transfer A to B\n\nTest top-1 on B, %. Fine-tuning is the same for every row.',
      markdown(['trained on', *header], rows),
      'Paired differences, points.',
      markdown(['difference', *header], changes),
    ]
  )


def points(cells: Cells, source: str, arm: str) -> list[tuple[int, dict[int, float]]]:
  """(labelled examples of the source, test top-1 by seed) over the sweep, in order of size."""
  own, accuracy = f'{arm}/{source}' if arm.startswith('alone') else arm, accuracies(cells)
  names = [own, *(f'{own}@{source}={share:g}' for share in claims_runs.sweep_shares(source))]
  labelled = {c['run']: c['examples'][source] for c in cells if source in c['examples']}
  found = [(labelled[name], accuracy(name, source)) for name in names if name in labelled]
  return sorted(((size, top1) for size, top1 in found if top1), key=lambda point: point[0])


def sweep(cells: Cells) -> str:
  """The size of the target's training set."""
  rows = []
  for source in VIDEOS:
    longs, co = (dict(points(cells, source, arm)) for arm in ('alone_long', 'videos_images'))
    for size in sorted(set(longs) & set(co)):
      rows.append(
        [
          source,
          str(size),
          spread(longs[size].values()),
          spread(co[size].values()),
          str(difference(co[size], longs[size])),
        ]
      )
  return '\n\n'.join(
    [
      '### How much the target has of its own\n\nTest top-1, %; all others keep their labels; steps are the same.',
      markdown(['target', 'labelled examples', 'alone', 'co-trained on videos and images', 'difference'], rows),
    ]
  )


def searched_rates(rates: Mapping[str, float | None]) -> str:
  """Which learning rate the search chose."""
  found = {rate: sorted(n for n, r in rates.items() if r == rate) for rate in set(rates.values()) if rate is not None}
  rows = [[f'{rate:g}', ', '.join(found[rate])] for rate in sorted(found)]
  return '### Learning rates that the search chose\n\n' + markdown(['rate', 'runs'], rows)


def picture(cells: Cells, path: str) -> None:
  """Top-1 by arm for each source (bars: means, dots: seeds), and over the size of the target's training set."""
  from cover_jax import visualise  # noqa: F401  sets matplotlib's backend
  import matplotlib.pyplot as plt  # isort: skip

  accuracy = accuracies(cells)
  figure, axes = plt.subplots(2, len(VIDEOS), figsize=(12, 7), layout='constrained')
  arms = ('alone', 'alone_long', 'videos', 'videos_images')
  labels = ('alone,\npasses', 'alone,\nsteps', 'videos', 'videos,\nimages')
  for column, source in enumerate(VIDEOS):
    top, bottom = axes[:, column]
    for i, arm in enumerate(arms):
      values = accuracy(f'{arm}/{source}' if arm.startswith('alone') else arm, source)
      if values:
        y = 100 * np.array(list(values.values()))
        top.bar(i, y.mean(), color='tab:grey' if i < 2 else 'tab:blue')
        top.plot([i] * len(y), y, 'k.', markersize=5)
    top.set(title=source, xticks=range(len(arms)), xticklabels=labels)
    chance = 100 / len(rendering.class_names(source))
    for arm, words, colour in (('alone_long', 'alone', 'tab:grey'), ('videos_images', 'co-trained', 'tab:blue')):
      line = points(cells, source, arm)
      x = [size for size, _ in line]
      y = np.array([100 * np.mean(list(a.values())) for _, a in line])
      sd = np.array([100 * np.std(list(a.values()), ddof=1) if len(a) > 1 else 0.0 for _, a in line])
      bottom.plot(x, y, 'o-', color=colour, label=words)
      bottom.fill_between(x, y - sd, y + sd, color=colour, alpha=0.2)
    bottom.axhline(chance, color='tab:red', linewidth=1, label='chance')
    bottom.set(xscale='log', xlabel=f'labelled examples of {source}')
  axes[0, 0].set_ylabel('test top-1, %')
  axes[1, 0].set_ylabel('test top-1, %')
  axes[1, 0].legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def write(base: str, doc: str, final: Cells, rates: Mapping[str, float | None], everything: Cells, done: float) -> str:
  """Draws `base`.png, puts the tables between the two markers of `doc` if there is one, and returns the tables.

  Args:
    base: path of the pictures, without its ending.
    doc: Markdown file, or ''.
    final: cells of the seeds that count.
    rates: what the search chose for each run.
    everything: all cells.
    done: share of the study, 0 to 1.
  """
  accuracy = accuracies(final)
  seeds = sorted({c['seed'] for c in final})
  seconds = sum(c['seconds'] for c in everything)
  devices = sorted({c['device'] for c in everything})
  unfinished = [] if done > 0.999 else [f'**The study is not finished: {done:.0%} of its steps are run.**']
  parts = [
    *unfinished,
    f'{len(everything)} runs, {seconds / 3600:.1f} hours of one core or device ({", ".join(devices)}); seeds '
    f'{", ".join(map(str, seeds)) or "none yet, the search is on"}. Differences are over the seeds that both arms '
    'have: mean ± half of the 95 % interval (Student\'s t); "yes" and "no" exclude zero.',
  ]
  if final:
    picture(final, base + '.png')
    parts += [study1(accuracy), study2(accuracy), sweep(final), searched_rates(rates)]
    parts.append(f'![top-1 by arm, and over the size of the training set]({os.path.basename(base)}.png)')
  text = '\n\n'.join(parts)
  if doc:
    documents.fill(doc, text, "CoVeR's claims, in miniature")
  return text
