"""The optimizer: an optax chain made from the config's numbers."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import optax

from data_pipelines.contract import UserError

# Each maps options to the update direction, before weight decay and learning rate.
SCALERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
  'adam': optax.scale_by_adam,
  'sgd': optax.trace,
  'lion': optax.scale_by_lion,
}


def parameter_name(path: tuple[Any, ...]) -> str:
  """'encoder/blocks/mlp/out/kernel' for a tree path, with or without Linen's metadata boxes."""
  return '/'.join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def by_rule(rules: Sequence[tuple[str, float]], tree: Any) -> Any:
  """A tree of floats: for each parameter the value of the first regex that its name contains.

  Args:
    rules: (regex, value) pairs, searched in order, e.g. (('bias$', 0.0), ('.*', 1.0)).
    tree: parameters.

  Returns:
    A tree of the same structure.

  Raises:
    UserError: if a parameter matches no rule.
  """

  def value(path, _):
    name = parameter_name(path)
    for pattern, number in rules:
      if re.search(pattern, name):
        return float(number)
    raise UserError(
      f'No rule matches parameter {name!r}: end the (regex, value) table with (".*", value). Rules: {rules}.'
    )

  return jax.tree_util.tree_map_with_path(value, tree)


def make_schedule(config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
  """The learning rate: linear warm-up, then cosine or steps down.

  Args:
    config: `config.optimizer`: `learning_rate`, `warmup_steps` or `warmup_epochs`, `schedule`
      ('cosine', 'constant' or 'steps'), and for 'steps' `decay_epochs` and `decay_factor`.
    total_steps: steps in the run.
    steps_per_epoch: steps in which as many examples pass as the run's sources hold.

  Returns:
    step -> learning rate.

  Raises:
    UserError: for an unknown schedule or a warm-up longer than the run.
  """
  peak = float(config.learning_rate)
  warmup = round(config.warmup_steps + config.warmup_epochs * steps_per_epoch)
  if warmup >= total_steps and warmup > 0:
    raise UserError(
      f'config.optimizer: a warm-up of {warmup} steps does not fit in a run of {total_steps}: shorten it.'
    )
  after = total_steps - warmup
  if config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
  elif config.schedule == 'constant':
    main = optax.constant_schedule(peak)
  elif config.schedule == 'steps':
    boundaries = {round(e * steps_per_epoch) - warmup: config.decay_factor for e in config.decay_epochs}
    main = optax.piecewise_constant_schedule(peak, boundaries)
  else:
    raise UserError(f'config.optimizer.schedule is {config.schedule!r}: expected "cosine", "constant" or "steps".')
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), main], [warmup])


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Clip, scale (Adam, momentum, Lion), add decoupled weight decay, multiply by the learning rate.

  Args:
    config: `config.optimizer`.
    schedule: step -> learning rate.

  Returns:
    An optax transformation whose update is to be added to the parameters.

  Raises:
    UserError: for an unknown optimizer or options that it does not take.
  """
  if config.name not in SCALERS:
    raise UserError(f'config.optimizer.name is {config.name!r}: expected one of {sorted(SCALERS)}.')
  try:
    inspect.signature(SCALERS[config.name]).bind(**config.options)
  except TypeError as error:
    raise UserError(f'config.optimizer.options does not fit {config.name!r}: {error}.') from error
  scaler = SCALERS[config.name](**config.options)
  rules = tuple(config.weight_decay_rules)

  def scale_rates(updates, params):
    rates = by_rule(tuple(config.learning_rate_rules), params)
    return jax.tree.map(lambda u, rate: u * rate, updates, rates)

  def decay(updates, params):
    factors = by_rule(rules, params)
    return jax.tree.map(lambda u, p, f: u + config.weight_decay * f * p, updates, params, factors)

  chain = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  chain.append(scaler)
  if config.weight_decay:
    chain.append(optax.stateless(decay))
  chain += [optax.stateless(scale_rates), optax.scale_by_learning_rate(schedule)]
  return optax.chain(*chain)
