"""Whether a run may go on in a workdir with another config than the one its checkpoint was trained with."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from configs import defaults
from cover_jax import checkpoints
from cover_jax.experiment import build as experiments
from cover_jax.experiment import optim
from cover_jax.experiment.build import Experiment
from cover_jax.models import encoder as encoders
from cover_jax.training import metrics
from data_pipelines import paths
from data_pipelines.contract import UserError

# Regexes of whole keys that a run may change as it goes on: how long it is, how it is optimised, what it costs, what it
# reports. Any other key says which data in which order train which function: changing it would be another run.
MAY_CHANGE = (
  'total_(steps|epochs)',
  r'optimizer\.(?!name$).*',
  'ema_decay',
  r'model\.(remat|scan_unroll|tokens_together)',
  'dtype',
  'accumulation_steps',
  r'mesh\..*',
  'logical_axis_rules',
  '(log|checkpoint|keep|eval)_.*',
  'profile_at_step',
  r'wandb\..*',
  r'sources\.[^.]+\.(data_dir|test.*)',
  'allow_overlap',
  r'frozen\..*',
)
_ABSENT = '(absent)'


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """What differs between two configs, as lines 'key: old -> new'.

  Args:
    old: the config of a checkpoint, as JSON gives it.
    new: the config of the command, as nested dicts.

  Returns:
    (changes that would make another run, changes that a run may make). A key that one of them lacks has its default:
    versions of this project differ in their keys.
  """
  old, new = (json.loads(json.dumps(config)) for config in (old, new))
  for kind in ('sources', 'streams'):  # one line for a whole one that came or went
    here, there = old.setdefault(kind, {}), new.setdefault(kind, {})
    for name in here.keys() ^ there.keys():
      group = here if name in here else there
      group[name] = 'there'
  old, new = _complete(old), _complete(new)
  changed = [key for key in sorted(set(old) | set(new)) if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
  lines = {key: f'{key}: {old.get(key, _ABSENT)} -> {new.get(key, _ABSENT)}' for key in changed}
  allowed = {key for key in changed if any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE)}
  return [lines[key] for key in changed if key not in allowed], [lines[key] for key in changed if key in allowed]


def check(workdir: str, config: Mapping[str, Any]) -> list[str]:
  """Says what changed since the workdir's checkpoint; to be called before any data is opened and anything written.

  Returns:
    The changes that a run may make, as lines 'key: old -> new'.

  Raises:
    UserError: if the config would make another run; it names every such key.
  """
  newest = checkpoints.latest(workdir)
  if newest is None:
    _check_folder(workdir, config)
    return []
  about = checkpoints.describe(workdir)['about']
  if not isinstance(about.get('config'), Mapping):
    logging.warning('%s does not say with which config it was trained: nothing can be compared with it.', newest)
    return []
  refused, said = _compare(about, config, newest)
  if refused:
    raise UserError(
      f'{workdir} holds another run, at step {about["step"]}, and going on with this config would report its weights '
      f'as those of this one: {"; ".join(refused)}. Take another --workdir (--config.init_from.path={workdir} starts '
      'from its weights), or give these keys their old values.'
    )
  for line in said:
    logging.warning('The config changed since the checkpoint: %s', line)
  return said


@contextlib.contextmanager
def naming(changes: Sequence[str]) -> Iterator[None]:
  """Adds what changed in the config (of `check`) to the error of a checkpoint that does not fit the run."""
  try:
    yield
  except checkpoints.Misfit as error:
    if not changes:
      raise
    raise UserError(f'{str(error).removesuffix(".")}. Changed since the checkpoint: {"; ".join(changes)}.') from error


# Regexes of keys that the learning rate of a step depends on.
_RATE = r'total_(steps|epochs)|optimizer\.(learning_rate|schedule|final_fraction|warmup_.*|decay_(epochs|factor))'


def say_rate(workdir: str, experiment: Experiment, changes: Sequence[str]) -> None:
  """Says how the learning rate jumps where a run goes on with another length or schedule.

  Args:
    workdir: of the run.
    experiment: the run as it goes on.
    changes: of `check`.
  """
  changed = [line for line in changes if re.fullmatch(_RATE, line.split(':')[0])]
  if not changed:
    return
  described = checkpoints.describe(workdir)
  step = described['about']['step']
  try:
    before = experiments.of_checkpoint(described)
  except UserError as error:
    logging.warning('The learning rate cannot be compared with that of the checkpoint (%s)', error)
    return
  old, new = (_rate(run, step) for run in (before, experiment))
  if abs(old - new) > 1e-6 * max(old, new):
    what = 'The learning rate jumps at step %d: %.4g, where the schedule of the checkpoint had %.4g%s (%s).'
    times = f', {new / old:.3g} times as much' if old > 0 else ''
    logging.warning(what, step + 1, new, old, times, '; '.join(changed))


def _rate(run: Experiment, step: int) -> float:
  options = run.config.optimizer
  return float(optim.make_schedule(options, run.total_steps, run.steps_per_epoch)(step))


# Regexes of keys that say which function the weights are: one that was trained with other values gives other answers.
_FUNCTION = (
  r'model\.(?!remat|scan_unroll|tokens_together|drop_path|freeze_statistics).*',
  r'heads\..*',
  'pixel_(mean|std)',
)


def check_function(about: Mapping[str, Any], config: Mapping[str, Any], path: str) -> None:
  """Raises UserError if weights that are only tested would be another function than the one that was trained."""
  refused, _ = _compare(about, config, path)
  if other := [line for line in refused if any(re.fullmatch(key, line.split(':')[0]) for key in _FUNCTION)]:
    raise UserError(
      f'{path} was trained as another function of clips than this config makes of its weights: {"; ".join(other)}. '
      'Give these keys their old values.'
    )


def _compare(about: Mapping[str, Any], config: Mapping[str, Any], path: str) -> tuple[list[str], list[str]]:
  try:
    return compare(about['config'], config)
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} holds a config that this version cannot read ({type(error).__name__}: {error}): use the version that '
      'wrote it, or take another --workdir.'
    ) from error


def _check_folder(workdir: str, config: Mapping[str, Any]) -> None:
  """Of a workdir without a checkpoint: a run that saved nothing is started anew, all else is left alone."""
  if left := checkpoints.traces(workdir):
    raise UserError(
      f'{workdir} has no checkpoint, but {left[0]} shows that one was saved: put a copy of it back, or take another '
      '--workdir; nothing is started anew over that run.'
    )
  path = os.path.join(workdir, 'config.json')
  before = _config_in(path)
  _check_metrics(workdir, before or config)
  if not paths.exists(path):
    return
  if before is None:
    raise UserError(
      f'{path} is not the config of a run, so {workdir} may hold something else, such as an exported model: take '
      'another --workdir, or remove that file.'
    )
  logging.warning('The run in %s saved no checkpoint: it starts anew, and its config.json is replaced.', workdir)


def _config_in(path: str) -> dict[str, Any] | None:
  """The config of a run in a file; None if there is none."""
  try:
    config = json.loads(paths.read(path))
  except (OSError, ValueError):
    return None
  return config if isinstance(config, dict) and 'streams' in config else None


def _check_metrics(workdir: str, config: Mapping[str, Any]) -> None:
  """Raises UserError if metrics go on behind the step at which a run of this config saves first."""
  steps = [config.get(key) for key in ('checkpoint_every', 'keep_every', 'eval_every')]
  first = min((step for step in steps if isinstance(step, int) and step > 0), default=None)
  path = os.path.join(workdir, metrics.FILE)
  last = max((row['step'] for row in metrics.read_jsonl(path)), default=0)
  # Several processes save in the background: they may be killed some steps behind the first save, before it is whole.
  if first is not None and last > first and not checkpoints.unfinished(workdir):
    raise UserError(
      f'{workdir} has no checkpoint, but {path} goes on to step {last}, and the run saved first at step {first}: put '
      'the checkpoints back, or take another --workdir; nothing is started anew over that run.'
    )


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """'key.key': value for all keys, those with their defaults included that the config lacks."""
  model = json.loads(json.dumps(encoders.defaults(config['model'])))
  known = _flat(json.loads(defaults.get_config().to_json()))
  known |= _flat(model, 'model')
  for kind, one in (('sources', defaults.source('-')), ('streams', defaults.stream(('-',)))):
    for name, value in config[kind].items():
      if isinstance(value, Mapping):
        known |= _flat(json.loads(one.to_json()), f'{kind}.{name}')
  return known | _flat(config)


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  return {k: v for key, value in tree.items() for k, v in _flat(value, f'{prefix}.{key}'.lstrip('.')).items()}
