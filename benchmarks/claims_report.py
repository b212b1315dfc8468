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
    return 'better' if self.mean > 0 else 'worse'

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


def levels(cells: Cells, arms: Sequence[str]) -> str:
  """Test top-1 of arms, and how well they fit what they were trained on."""
  accuracy, rows = accuracies(cells), []
  for arm in arms:
    runs = (arm, *(f'{arm}/{source}' for source in VIDEOS))
    losses = [c['loss']['video'] for c in cells if c['run'] in runs]
    loss = f'{np.median(losses):.3f} ({max(losses):.3f})' if losses else '-'
    rows.append([words(arm), *(spread(top1(accuracy, arm, s).values()) for s in COLUMNS), loss])
  return 'Test top-1, %, mean ± standard deviation over the seeds.\n\n' + markdown(
    ['trained', *COLUMNS, 'training loss, videos: median (greatest)'], rows
  )


def differences(accuracy: Accuracy, pairs: Sequence[tuple[str, str]]) -> str:
  """Paired differences of arms."""
  of = lambda a, b, s: str(difference(top1(accuracy, a, s), top1(accuracy, b, s)))
  rows = [[f'{words(a)} - {words(b)}', *(of(a, b, s) for s in COLUMNS)] for a, b in pairs]
  return 'Paired differences, points ± half of the 95 % interval.\n\n' + markdown(['difference', *COLUMNS], rows)


SAME, OTHER = [(b, b) for b in VIDEOS], [(a, b) for a in VIDEOS for b in VIDEOS if a != b]
FIRST_STAGE = [('seeded_videos', 'videos'), ('seeded_videos_images', 'videos_images')]


def study1(cells: Cells) -> str:
  """Alone against co-trained, and the ways of mixing."""
  accuracy, arms = accuracies(cells), ('alone', 'alone_long', 'videos', 'videos_images')
  pairs = [(co, alone) for co in arms[2:] for alone in arms[:2]]
  ways = ('one_source_a_step', 'square_root', 'uniform')
  return '\n\n'.join(
    [
      '### Study 1: co-training',
      levels(cells, arms),
      differences(accuracy, [*pairs, ('videos_images', 'videos')]),
      'How sources are mixed: in proportion to their sizes ("co-trained on videos") against three other ways.',
      levels(cells, ways),
      differences(accuracy, [('videos', way) for way in ways]),
    ]
  )


def study2(accuracy: Accuracy, regime: str = '') -> str:
  """Transfer A -> B."""
  starts, co = tuple(f'{regime}alone_long/{a}' for a in VIDEOS), [f'{regime}videos', f'{regime}videos_images']
  then = lambda start, b: accuracy(f'{regime}{start.removeprefix(regime)}>{b}', b)
  rows = [['B alone, no fine-tuning', *(spread(accuracy(f'{regime}alone_long/{b}', b).values()) for b in VIDEOS)]]
  rows += [[f'{s.rpartition("/")[2]}, then B', *(spread(then(s, b).values()) for b in VIDEOS)] for s in starts]
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
      'Test top-1 on B, %, mean ± standard deviation over the seeds. All are fine-tuned for as many steps, each row '
      'with a learning rate of its own search.',
      markdown(['trained on', *header], rows),
      'Paired differences, points ± half of the 95 % interval.',
      markdown(['difference', *header], changes),
    ]
  )


def first_stage(cells: Cells, regime: str) -> list[str]:
  """Test top-1 with a first stage, and what it is better by than co-training from nothing."""
  pairs = [(regime + a, regime + b) for a, b in FIRST_STAGE]
  return [levels(cells, [a for a, _ in pairs]), differences(accuracies(cells), pairs)]


def remedies(cells: Cells) -> str:
  """What was tried where a claim failed."""
  accuracy, names = accuracies(cells), ('alone_long', 'videos', 'videos_images')
  pairs = (('videos', 'alone_long'), ('videos_images', 'alone_long'), ('videos_images', 'videos'))
  regime = lambda prefix: [
    levels(cells, [prefix + name for name in names]),
    differences(accuracy, [(prefix + a, prefix + b) for a, b in pairs]),
  ]
  scale = ' to '.join(f'{x:g}' for x in claims_runs.CROP_SCALE)
  longer = [
    f'### What was tried: {claims_runs.LONGER} x the steps\n\nWith crops, as many steps of warm-up and the rates that '
    'were found for fewer steps. The last three differences are to models alone of fewer steps.',
    *regime('longer/crops/'),
    differences(accuracy, [(f'longer/crops/{n}', 'crops/alone_long') for n in names]),
    'The first stage is the one without crops, of fewer steps. The last two differences are to models alone of as many '
    'steps.',
    *first_stage(cells, 'longer/crops/'),
    differences(accuracy, [(f'longer/crops/{a}', 'longer/crops/alone_long') for a, _ in FIRST_STAGE]),
  ]
  return '\n\n'.join(
    [
      '### What was tried: a longer warm-up\n\nA sixth of the steps for every arm, its learning rate searched again.',
      *regime('warmup/'),
      f'### What was tried: crops\n\nWith that warm-up, random crops of {scale} of the area, the same for all '
      'frames of a clip, in every arm; learning rates searched again.',
      *regime('crops/'),
      'The first stage is the one without crops.',
      *first_stage(cells, 'crops/'),
      '### What was tried: crops, transfer A to B',
      study2(accuracy, 'crops/'),
      *(longer if any(c['run'].startswith('longer/') for c in cells) else []),
    ]
  )


def transfer(accuracy: Accuracy, run: str, against: str, pairs: Sequence[tuple[str, str]]) -> Difference:
  """Of two runs, whose names say {a} and {b}, on b: the mean over the pairs (a, b)."""
  on_b = lambda name: _mean([accuracy(name.format(a=a, b=b), b) for a, b in pairs])
  return difference(on_b(run), on_b(against))


def summary(accuracy: Accuracy) -> str:
  """A row a claim, a column a regime; means over the video sources."""
  regimes = ('', 'warmup/', 'crops/', 'longer/crops/')

  of = lambda a, b: str(difference(top1(accuracy, a, 'mean'), top1(accuracy, b, 'mean')))
  row = lambda claim, a, b: [claim, *(of(regime + a, regime + b) for regime in regimes)]
  passes = lambda a: [of(a, 'alone'), '-', '-', of(f'longer/crops/{a}', 'crops/alone_long')]
  rows = [
    row('co-training helps: videos - alone', 'videos', 'alone_long'),
    ['the same, alone with fewer steps', *passes('videos')],
    row('with images: videos and images - alone', 'videos_images', 'alone_long'),
    ['the same, alone with fewer steps', *passes('videos_images')],
    row('images help: videos and images - videos', 'videos_images', 'videos'),
  ]
  for co, name in (('videos', 'videos'), ('videos_images', 'videos and images')):
    for label, run, against, pairs in (
      ('then B - A, then B (A not B)', co + '>{b}', 'alone_long/{a}>{b}', OTHER),
      ('then B - B, then B', co + '>{b}', 'alone_long/{a}>{b}', SAME),
      ('then B - B alone', co + '>{b}', 'alone_long/{a}', SAME),
      ('no fine-tuning - A, then B (A not B)', co, 'alone_long/{a}>{b}', OTHER),
    ):
      plain, crops = (transfer(accuracy, regime + run, regime + against, pairs) for regime in ('', 'crops/'))
      rows.append([f'it transfers: {name}, {label}', str(plain), '-', str(crops), '-'])
  for label, a, b in (
    ('videos with it - without', 'seeded_videos', 'videos'),
    ('videos with it - videos and images without', 'seeded_videos', 'videos_images'),
    ('videos and images with it - without', 'seeded_videos_images', 'videos_images'),
    ('videos with it - alone', 'seeded_videos', 'alone_long'),
    ('videos and images with it - alone', 'seeded_videos_images', 'alone_long'),
  ):
    later = [of(regime + a, regime + b) for regime in ('crops/', 'longer/crops/')]
    rows.append([f'the first stage helps: {label}', of(a, b), '-', *later])
  header = ['claim', 'as configured', 'longer warm-up', 'with crops, too', f'and {claims_runs.LONGER} x the steps']
  return (
    '### The claims\n\nPaired differences of the mean over the three video sources (of the pairs A, B), points ± half '
    'of the 95 % interval. Both sides have as many steps, but for "fewer": as configured, a model alone then sees its '
    f'source about as often as the co-trained one; in the last column it has 1 / {claims_runs.LONGER} of the steps. '
    'Co-trained models have seen labels of B, A has not. What was not run has a dash.\n\n' + markdown(header, rows)
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
      '### How much the target has of its own\n\nTest top-1, %, with crops, mean ± standard deviation over the seeds, '
      'and its difference ± half of the 95 % interval; all other sources keep their labels; steps are the same.',
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
  """Top-1 by arm for each source and over the size of the target's training set; means, and dots for seeds."""
  from cover_jax.evaluation import visualise  # noqa: F401  sets matplotlib's backend
  import matplotlib.pyplot as plt  # isort: skip

  accuracy = accuracies(cells)
  figure, axes = plt.subplots(2, len(VIDEOS), figsize=(14, 8), layout='constrained')
  short = {
    'alone': 'alone,\npasses',
    'alone_long': 'alone,\nsteps',
    'videos': 'videos',
    'videos_images': 'videos,\nimages',
  }
  longer = f'crops, {claims_runs.LONGER} x the steps'
  regimes = {'': 'as configured', 'warmup/': 'longer warm-up', 'crops/': 'crops', 'longer/crops/': longer}
  for column, source in enumerate(VIDEOS):
    top, bottom = axes[:, column]
    for r, regime in enumerate(regimes):
      for i, arm in enumerate(short):
        y = 100 * np.array(list(top1(accuracy, regime + arm, source).values()))
        if len(y):
          x = i + 0.2 * (r - 1.5)
          top.bar(x, y.mean(), 0.18, color=f'C{r}', label=regimes[regime] if arm == 'videos' else None)
          top.plot([x] * len(y), y, 'k.', markersize=3)
    top.set(title=source, xticks=range(len(short)), xticklabels=short.values())
    for colour, arm, label in zip(('C7', 'C2'), SWEPT, ('alone', 'co-trained on videos and images'), strict=True):
      for size, of in (line := points(cells, source, arm)):
        bottom.plot([size] * len(of), [100 * value for value in of.values()], '.', color=colour, markersize=4)
      x, y = [size for size, _ in line], [100 * np.mean(list(of.values())) for _, of in line]
      bottom.plot(x, y, '-', color=colour, label=label)
    bottom.axhline(100 / len(rendering.class_names(source)), color='k', linewidth=0.5, label='chance')
    bottom.set(xscale='log', xlim=(10, 2000), xlabel=f'labelled examples of {source}, with crops')
  for row in axes:
    row[0].set_ylabel('test top-1, %')
    row[0].legend()
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
  tables = []
  if final:
    picture(final, base + '.png')
    tables = [summary(accuracy), study1(final), '### Study 2: transfer A to B', study2(accuracy)]
    tables += [
      '### Study 3: first stage\n\nA ViT on the images, then co-training, against co-training from nothing.',
      *first_stage(final, ''),
    ]
    tables += [remedies(final), sweep(final), searched_rates(rates)]
    tables.append(f'![top-1 by arm, and over the size of the training set]({os.path.basename(base)}.png)')
  verdicts = ', '.join(f'{sum(t.count(f"({word})") for t in tables)} {word}' for word in ('better', 'worse', 'open'))
  head = (
    f'{len(everything)} runs, {len(everything) - len(final)} of them of the search for learning rates; '
    f'{seconds / 3600:.1f} hours (wall-clock, of one core or device: {", ".join(devices)}); seeds '
    f'{", ".join(map(str, seeds)) or "none yet, the search is on"}. Differences are over the seeds that both '
    'arms have: mean ± half of the 95 % interval (Student\'s t); "better" and "worse" say that it excludes zero, '
    f'"open" that it does not ({verdicts}, with those that are in two tables). One difference in twenty that is none '
    'is expected to exclude zero.'
  )
  unfinished = [] if done > 0.999 else [f'**The study is not finished: {done:.0%} of its steps are run.**']
  text = '\n\n'.join([*unfinished, head, *tables])
  if doc:
    documents.fill(doc, text, "CoVeR's claims, in miniature")
  return text
