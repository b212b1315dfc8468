"""The trainings of the study of CoVeR's claims, as data; `claims.py` runs them, `claims_report.py` reads them."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import claims_digits, defaults
from configs.claims_digits import SHARES, VIDEOS
from data_pipelines.builders import digits_rendering as rendering

LEARNING_RATES = (1e-3, 2e-3, 4e-3)
SWEEP = (1 / 4, 4)  # times the target's labels that the config has
LONGER = 3  # times the steps: each of three sources is then seen about as often as by a model of its own
CROP_SCALE = (0.6, 1.0)  # share of the area
ALL = (*VIDEOS, 'digits')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training, but for its seed and learning rate.

  Attributes:
    name: of the run.
    sources: which it learns from.
    steps: how many.
    start: the run whose weights it starts from; '' for random ones.
    changes: dotted keys of the config and their values.
    shares: of each source's labels.
    rate_of: the run whose search decides the learning rate; '' for its own.
  """

  name: str
  sources: tuple[str, ...]
  steps: int
  start: str = ''
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  shares: Mapping[str, float] = dataclasses.field(default_factory=lambda: SHARES)
  rate_of: str = ''

  def config(self, learning_rate: float) -> ml_collections.ConfigDict:
    config = claims_digits.make(self.sources, self.shares)
    config.total_steps = self.steps
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, self.steps // 4)
    config.update_from_flattened_dict(self.changes)
    return config

  @property
  def cost(self) -> float:
    """About how long it takes, in frames."""
    frames = {'video': 8 * claims_digits.BATCH['video'], 'image': claims_digits.BATCH['image']}
    return self.steps * sum(frames[m] for m in {'image' if s == 'digits' else 'video' for s in self.sources})


def sweep_shares(source: str) -> tuple[float, ...]:
  """The shares of a source's labels that the sweep tries, beside the config's."""
  return tuple(factor * SHARES[source] for factor in SWEEP if factor * SHARES[source] <= 1)


def study(steps: int, finetuning_steps: int, whole: bool) -> dict[str, Run]:
  """All runs of a seed, each after the one that it starts from.

  Args:
    steps: of every co-trained run.
    finetuning_steps: of study 2.
    whole: whether to vary the size of the target's training set and to train longer, too.

  Returns:
    {name: run}.
  """
  size = {s: SHARES[s] * rendering.num_examples(s, 'train') for s in VIDEOS}
  passes = {s: math.ceil(steps * size[s] / sum(size.values())) for s in VIDEOS}
  runs = [
    # Study 1. Alone: as many passes over the target as a co-trained run makes, and as many steps.
    *(Run(f'alone/{s}', (s,), passes[s]) for s in VIDEOS),
    *(Run(f'alone_long/{s}', (s,), steps) for s in VIDEOS),
    Run('videos', VIDEOS, steps),
    Run('videos_images', ALL, steps),
    Run('one_source_a_step', VIDEOS, steps, changes={'mixture.one_source_a_step': True}),
    Run('square_root', VIDEOS, steps, changes={'mixture.temperature': 2.0}),
    Run('uniform', VIDEOS, steps, changes={'mixture.temperature': float('inf')}),
    # Study 3. The first stage is a ViT on the images; the temporal attention then starts as a copy of the spatial one.
    Run('first_stage', ('digits',), steps, changes={'model.attention': 'space'}),
    Run('seeded_videos', VIDEOS, steps, start='first_stage'),
    Run('seeded_videos_images', ALL, steps, start='first_stage'),
  ]
  # What was tried where a claim failed, one change after the other: a longer warm-up, with it crops, and more steps.
  warmed = [_warmed(run, steps // 6) for run in runs if run.name.startswith(('alone_long/', 'videos', 'seeded_'))]
  cropped, transfers = [_cropped(run) for run in warmed], _transfers(finetuning_steps)
  runs += [*transfers, *(run for run in warmed if not run.start), *cropped, *(_cropped(run) for run in transfers)]
  if whole:
    runs += [_longer(run) for run in cropped]
    named = {run.name: run for run in runs}
    for s in VIDEOS:
      for share in sweep_shares(s):
        for arm in (f'crops/alone_long/{s}', 'crops/videos_images'):
          name, shares = f'{arm}@{s}={share:g}', {**SHARES, s: share}
          runs.append(dataclasses.replace(named[arm], name=name, shares=shares, rate_of=arm))
  return {run.name: run for run in runs}


def _transfers(steps: int) -> list[Run]:
  """Study 2: to each video source from each model trained on one of them, and from the co-trained ones."""
  starts = (*(f'alone_long/{s}' for s in VIDEOS), 'videos', 'videos_images')
  return [Run(f'{a}>{b}', (b,), steps, start=a) for b in VIDEOS for a in starts]


def _warmed(run: Run, steps: int) -> Run:
  """The same with a longer warm-up."""
  changes = {**run.changes, 'optimizer.warmup_steps': steps}
  return dataclasses.replace(run, name=f'warmup/{run.name}', changes=changes)


def _cropped(run: Run) -> Run:
  """The same with random crops; what a transfer starts from has them, too."""
  changes = {**run.changes, **{f'sources.{s}.crop_scale': CROP_SCALE for s in run.sources}}
  start = f'crops/{run.start}' if '>' in run.name else run.start
  return dataclasses.replace(run, name=f'crops/{run.name.removeprefix("warmup/")}', start=start, changes=changes)


def _longer(run: Run) -> Run:
  """The same for more steps, with the learning rate that was found for fewer."""
  return dataclasses.replace(run, name=f'longer/{run.name}', steps=LONGER * run.steps, rate_of=run.name)


def fingerprint(runs: Mapping[str, Run], name: str) -> str:
  """Of a run's config where it differs from the defaults, and of the run that it starts from; not of the code."""
  start = fingerprint(runs, runs[name].start) if runs[name].start else ''
  config, known = runs[name].config(0.0), defaults.get_config()
  known.sources = {s: defaults.source('-') for s in config.sources}
  known.streams = {s: defaults.stream(('-',)) for s in config.streams}
  said = _differing(config.to_dict(), known.to_dict())
  return hashlib.sha256(json.dumps([said, start], sort_keys=True).encode()).hexdigest()[:12]


def _differing(ours: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
  """What another mapping does not have, or has another value for."""
  below = lambda key, value: _differing(value, known.get(key, {})) if isinstance(value, Mapping) else value
  return {key: below(key, value) for key, value in ours.items() if key not in known or known[key] != value}
