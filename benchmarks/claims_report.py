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
COLUMNS = (*VIDEOS, 'mean')


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


def top1(accuracy: Accuracy, arm: str, source: str) -> dict[int, float]:
  """Of an arm, by seed. '...alone' and '...alone_long' are a run for each source."""
  if not arm.rpartition('/')[2].startswith('alone'):
    return accuracy(arm, source)
  if source != 'mean':
    return accuracy(f'{arm}/{source}', source)
  return _mean([accuracy(f'{arm}/{s}', s) for s in VIDEOS])


def _mean(of: Sequence[Mapping[int, float]]) -> dict[int, float]:
  """By seed, over the seeds that all have."""
  return {seed: float(np.mean([o[seed] for o in of])) for seed in set.intersection(*(set(o) for o in of))}


WORDS = {
  'alone': 'alone, as many passes',
  'alone_long': 'alone, as many steps',
  'videos': 'co-trained on videos',
  'videos_images': 'co-trained on videos and images',
  'one_source_a_step': 'one source a step',
  'square_root': 'by the square root of size',
  'uniform': 'uniform',
  'seeded_videos': 'videos, first stage on images',
  'seeded_videos_images': 'videos and images, first stage on images',
}


def words(arm: str) -> str:
  """What tables call an arm; whether it has crops, the section says."""
  longer = f', {claims_runs.LONGER} x the steps' if arm.startswith('longer/') else ''
  return WORDS[arm.rpartition('/')[2]] + longer


def levels(accuracy: Accuracy, arms: Sequence[str]) -> str:
  """Test top-1 of arms."""
  rows = [[words(arm), *(spread(top1(accuracy, arm, s).values()) for s in COLUMNS)] for arm in arms]
  return 'Test top-1, %.\n\n' + markdown(['trained', *COLUMNS], rows)


def differences(accuracy: Accuracy, pairs: Sequence[tuple[str, str]]) -> str:
  """Paired differences of arms."""
  of = lambda a, b, s: str(difference(top1(accuracy, a, s), top1(accuracy, b, s)))
  rows = [[f'{words(a)} - {words(b)}', *(of(a, b, s) for s in COLUMNS)] for a, b in pairs]
  return 'Paired differences, points.\n\n' + markdown(['difference', *COLUMNS], rows)


def study1(accuracy: Accuracy) -> str:
  """Alone against co-trained, and the ways of mixing."""
  arms = ('alone', 'alone_long', 'videos', 'videos_images')
  pairs = [('videos', 'alone'), ('videos', 'alone_long'), ('videos_images', 'alone'), ('videos_images', 'alone_long')]
  return '\n\n'.join(
    [
      '### Study 1: co-training',
      levels(accuracy, arms),
      differences(accuracy, [*pairs, ('videos_images', 'videos')]),
      'How sources are mixed: in proportion to their sizes ("co-trained on videos") against three other ways.',
      differences(accuracy, [('videos', way) for way in ('one_source_a_step', 'square_root', 'uniform')]),
      '### Study 3: first stage\n\nA ViT on the images, then co-training, against co-training from nothing.',
      differences(accuracy, FIRST_STAGE),
    ]
  )


FIRST_STAGE = [('seeded_videos', 'videos'), ('seeded_videos_images', 'videos_images')]


def study2(accuracy: Accuracy, regime: str = '') -> str:
  """Transfer A -> B."""
  starts, co = tuple(f'{regime}alone_long/{a}' for a in VIDEOS), [f'{regime}videos', f'{regime}videos_images']
  then = lambda start, b: accuracy(f'{regime}{start.removeprefix(regime)}>{b}', b)
  rows = [[f'{s.rpartition("/")[2]}, then B', *(spread(then(s, b).values()) for b in VIDEOS)] for s in starts]
  rows += [[f'{words(s)}, then B', *(spread(then(s, b).values()) for b in VIDEOS)] for s in co]
  rows += [[f'{words(s)}, no fine-tuning', *(spread(accuracy(s, b).values()) for b in VIDEOS)] for s in co]
  changes = []
  for c in co:
    for a in starts:
      for label, mine in (('then B', then), ('no fine-tuning', accuracy)):
        cells = (str(difference(mine(c, b), then(a, b))) for b in VIDEOS)
        changes.append([f'{words(c)}, {label} - {a.rpartition("/")[2]}, then B', *cells])
  header = [f'B = {b}' for b in VIDEOS]
  return '\n\n'.join(
    [
      'Test top-1 on B, %. Fine-tuning is the same for every row.',
      markdown(['trained on', *header], rows),
      'Paired differences, points.',
      markdown(['difference', *header], changes),
    ]
  )


def remedies(accuracy: Accuracy) -> str:
  """What was tried where a claim failed."""
  arms = [f'crops/{arm}' for arm in ('alone_long', 'videos', 'videos_images')]
  alone, videos, both = arms
  longer = [f'longer/{arm}' for arm in ('videos', 'videos_images')]
  longer_crops = [f'longer/{arm}' for arm in arms]
  scale = ' to '.join(f'{x:g}' for x in claims_runs.CROP_SCALE)
  return '\n\n'.join(
    [
      f'### What was tried: crops\n\nEvery arm with random crops ({scale} of the area, the same for all frames of a '
      'clip) and a warm-up of a sixth of the steps, its learning rate searched again.',
      levels(accuracy, arms),
      differences(accuracy, [(videos, alone), (both, alone), (both, videos)]),
      'First stage, with crops.',
      differences(accuracy, [(f'crops/{a}', f'crops/{b}') for a, b in FIRST_STAGE]),
      '### What was tried: crops, transfer A to B',
      study2(accuracy, 'crops/'),
      f'### What was tried: more steps\n\n{claims_runs.LONGER} times the steps: a co-trained model then sees its three '
      'sources together as often as three models of their own. Without crops:',
      levels(accuracy, longer),
      differences(accuracy, [*((arm, 'alone_long') for arm in longer), (longer[1], longer[0])]),
      'With crops:',
      levels(accuracy, longer_crops),
      differences(
        accuracy,
        [
          *((arm, alone) for arm in longer_crops),
          *((arm, longer_crops[0]) for arm in longer_crops[1:]),
          (longer_crops[2], longer_crops[1]),
        ],
      ),
    ]
  )


def summary(accuracy: Accuracy) -> str:
  """A row a claim, a column a regime; means over the video sources."""

  def transfer(regime: str, fine_tuned: bool) -> str:
    c, pairs = f'{regime}videos', [(a, b) for a in VIDEOS for b in VIDEOS]
    mine = _mean([accuracy(f'{c}>{b}' if fine_tuned else c, b) for _, b in pairs])
    return str(difference(mine, _mean([accuracy(f'{regime}alone_long/{a}>{b}', b) for a, b in pairs])))

  def of(a: str, b: str) -> str:
    return str(difference(top1(accuracy, a, 'mean'), top1(accuracy, b, 'mean')))

  def row(claim: str, a: str, b: str) -> list[str]:
    longer = [of(f'longer/{regime}{a}', f'{regime}{b}') for regime in ('', 'crops/')]
    return [claim, of(a, b), longer[0], of(f'crops/{a}', f'crops/{b}'), longer[1]]

  images = [
    'images help: videos and images - videos',
    *(of(f'{regime}videos_images', f'{regime}videos') for regime in ('', 'longer/', 'crops/', 'longer/crops/')),
  ]
  rows = [
    row('co-training helps: videos - alone', 'videos', 'alone_long'),
    row('with images: videos and images - alone', 'videos_images', 'alone_long'),
    images,
  ]
  for claim, fine_tuned in (('then B', True), ('no fine-tuning', False)):
    cells = [transfer(regime, fine_tuned) for regime in ('', 'crops/')]
    rows.append([f'it transfers: co-trained on videos, {claim} - A, then B', cells[0], '-', cells[1], '-'])
  for (a, b), of_what in zip(FIRST_STAGE, ('videos', 'videos and images'), strict=True):
    rows.append([f'the first stage helps: {of_what}', of(a, b), '-', of(f'crops/{a}', f'crops/{b}'), '-'])
  n = claims_runs.LONGER
  header = ['claim', 'as configured', f'{n} x the steps', 'crops', f'crops, {n} x the steps']
  return (
    '### The claims\n\nPaired differences of the mean over the three video sources, points; "it transfers": over all '
    f'A and B. "alone" has as many steps as the co-trained model in columns one and three, 1/{n} of them in the '
    'other two, where both have seen each source about as often.\n\n' + markdown(header, rows)
  )


def points(cells: Cells, source: str, arm: str) -> list[tuple[int, dict[int, float]]]:
  """(labelled examples of the source, test top-1 by seed) over the sweep, in order of size."""
  own, accuracy = f'{arm}/{source}' if 'alone' in arm else arm, accuracies(cells)
  names = [own, *(f'{own}@{source}={share:g}' for share in claims_runs.sweep_shares(source))]
  labelled = {c['run']: c['examples'][source] for c in cells if source in c['examples']}
  found = [(labelled[name], accuracy(name, source)) for name in names if name in labelled]
  return sorted(((size, top1) for size, top1 in found if top1), key=lambda point: point[0])


def sweep(cells: Cells) -> str:
  """The size of the target's training set."""
  rows = []
  for source in VIDEOS:
    longs, co = (dict(points(cells, source, arm)) for arm in SWEPT)
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
      '### How much the target has of its own\n\nTest top-1, %, with crops; all other sources keep their labels; steps '
      'are the same.',
      markdown(['target', 'labelled examples', 'alone', 'co-trained on videos and images', 'difference'], rows),
    ]
  )


def searched_rates(rates: Mapping[str, float | None]) -> str:
  """Which learning rate the search chose."""
  found = {rate: sorted(n for n, r in rates.items() if r == rate) for rate in set(rates.values()) if rate is not None}
  rows = [[f'{rate:g}', ', '.join(found[rate])] for rate in sorted(found)]
  return '### Learning rates that the search chose\n\n' + markdown(['rate', 'runs'], rows)


SWEPT = ('crops/alone_long', 'crops/videos_images')


def picture(cells: Cells, path: str) -> None:
  """Top-1 by arm for each source (bars: means, dots: seeds), and over the size of the target's training set."""
  from cover_jax import visualise  # noqa: F401  sets matplotlib's backend
  import matplotlib.pyplot as plt  # isort: skip

  accuracy = accuracies(cells)
  figure, axes = plt.subplots(2, len(VIDEOS), figsize=(14, 8), layout='constrained')
  short = {
    'alone': 'alone,\npasses',
    'alone_long': 'alone,\nsteps',
    'videos': 'videos',
    'videos_images': 'videos,\nimages',
  }
  regimes = {'': 'tab:grey', 'crops/': 'tab:blue', 'longer/crops/': 'tab:green'}
  names = {'': 'no crops', 'crops/': 'crops', 'longer/crops/': f'crops, {claims_runs.LONGER} x the steps'}
  for column, source in enumerate(VIDEOS):
    top, bottom = axes[:, column]
    for r, (regime, colour) in enumerate(regimes.items()):
      for i, arm in enumerate(short):
        y = 100 * np.array(list(top1(accuracy, regime + arm, source).values()))
        if len(y):
          x = i + 0.27 * (r - 1)
          top.bar(x, y.mean(), 0.25, color=colour, label=names[regime] if i == len(short) - 1 else None)
          top.plot([x] * len(y), y, 'k.', markersize=4)
    top.set(title=source, xticks=range(len(short)), xticklabels=short.values())
    chance = 100 / len(rendering.class_names(source))
    for arm, label, colour in zip(
      SWEPT, ('alone', 'co-trained on videos and images'), ('tab:grey', 'tab:blue'), strict=True
    ):
      line = points(cells, source, arm)
      x = [size for size, _ in line]
      y = np.array([100 * np.mean(list(a.values())) for _, a in line])
      sd = np.array([100 * np.std(list(a.values()), ddof=1) if len(a) > 1 else 0.0 for _, a in line])
      bottom.plot(x, y, 'o-', color=colour, label=label)
      bottom.fill_between(x, y - sd, y + sd, color=colour, alpha=0.2)
    bottom.axhline(chance, color='tab:red', linewidth=1, label='chance')
    bottom.set(xscale='log', xlabel=f'labelled examples of {source} (crops)')
  axes[0, 0].set_ylabel('test top-1, %')
  axes[1, 0].set_ylabel('test top-1, %')
  axes[0, -1].legend()
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
    transfer = '### Study 2: transfer A to B\n\n' + study2(accuracy)
    parts += [summary(accuracy), study1(accuracy), transfer, sweep(final), remedies(accuracy), searched_rates(rates)]
    parts.append(f'![top-1 by arm, and over the size of the training set]({os.path.basename(base)}.png)')
  text = '\n\n'.join(parts)
  if doc:
    documents.fill(doc, text, "CoVeR's claims, in miniature")
  return text
