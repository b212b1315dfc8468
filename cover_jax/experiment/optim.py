"""The optimizer: an optax chain made from the config's numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from flax import traverse_util

from cover_jax.models.encoder import STATISTICS, Encoder
from data_pipelines.contract import UserError
from data_pipelines.declared import OPTIONAL, REQUIRED, Key, Keys, either, flag, none, number, one_of

_DECAY = Key(OPTIONAL, number(0, below=1))
_EPS = Key(OPTIONAL, number(0))
_DTYPE = Key(OPTIONAL, either(none, one_of('float32', 'bfloat16')))


class Scaler(NamedTuple):
  """An optimizer's update direction, before weight decay and learning rate.

  Attributes:
    make: options -> optax transformation.
    options: those of optax, which has their defaults.
  """

  make: Callable[..., optax.GradientTransformation]
  options: Keys


SCALERS: Mapping[str, Scaler] = {
  'adam': Scaler(
    optax.scale_by_adam,
    {
      'b1': _DECAY,
      'b2': _DECAY,
      'eps': _EPS,
      'eps_root': _EPS,
      'mu_dtype': _DTYPE,
      'nesterov': Key(OPTIONAL, flag),
    },
  ),
  'sgd': Scaler(
    optax.trace,
    {'decay': Key(REQUIRED, _DECAY.kind), 'nesterov': Key(OPTIONAL, flag), 'accumulator_dtype': _DTYPE},
  ),
  'lion': Scaler(optax.scale_by_lion, {'b1': _DECAY, 'b2': _DECAY, 'mu_dtype': _DTYPE}),
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

  return jax.tree_util.tree_map_with_path(lambda path, _: _value(rules, parameter_name(path)), tree)


def _value(rules: Sequence[tuple[str, float]], name: str) -> float:
  for pattern, value in rules:
    if re.search(pattern, name):
      return float(value)
  raise UserError(
    f'No rule matches parameter {name!r}: end the (regex, value) table with (".*", value). Rules: {rules}.'
  )


def is_statistic(name: str) -> bool:
  """Whether a parameter is one of the encoder's batch statistics, which no gradient moves."""
  return name.startswith(f'encoder/{STATISTICS}/')


def split(rules: Sequence[tuple[str, float]], params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The parameters that learn and those that do not, as two nested dicts.

  A learning-rate factor of 0 freezes; the encoder's batch statistics are moved by the clips, not by a gradient.

  Gradients and optimizer state are kept for the first only.

  Raises:
    UserError: if all are frozen, or one matches no rule.
  """
  flat = traverse_util.flatten_dict(params, keep_empty_nodes=True, sep='/')
  arrays = {name: x for name, x in flat.items() if x is not traverse_util.empty_node}
  frozen = {name: x for name, x in arrays.items() if is_statistic(name) or _value(rules, name) == 0}
  if not frozen:
    return params, {}
  if len(frozen) == len(arrays):
    raise UserError(
      f'config.optimizer.learning_rate_rules gives every parameter a factor of 0, so nothing would learn: {rules}.'
    )
  learning = {name: x for name, x in flat.items() if name not in frozen}
  return traverse_util.unflatten_dict(learning, sep='/'), traverse_util.unflatten_dict(frozen, sep='/')


def join(learning: Mapping[str, Any], frozen: Mapping[str, Any]) -> Mapping[str, Any]:
  """The inverse of `split`."""
  if not frozen:
    return learning
  flat = [traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep='/') for tree in (learning, frozen)]
  return traverse_util.unflatten_dict(flat[0] | flat[1], sep='/')


def layer_factors(decay: float, encoder: Encoder, params: Any) -> Any:
  """A tree of learning-rate factors that fall from the last layer to the first (BEiT, arXiv 2106.08254).

  Args:
    decay: the factor from one layer to the one before it.
    encoder: says in which layer a parameter stands.
    params: parameters, or a part of them.

  Returns:
    decay^(L - l) for layer l of 0 .. L, L being the encoder's `num_layers`: a float, or float32 [blocks, 1, ...] where
    blocks are stacked; 1 for the heads and the objectives.
  """

  def factor(path, x):
    name = parameter_name(path)
    if not name.startswith('encoder/'):
      return 1.0
    behind = encoder.num_layers - encoder.layer(name.removeprefix('encoder/'))
    if np.ndim(behind):
      return np.power(decay, behind).astype(np.float32).reshape(-1, *[1] * (x.ndim - 1))
    return decay**behind

  return jax.tree_util.tree_map_with_path(factor, params)


def make_schedule(config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
  """The learning rate: linear warm-up, then cosine or steps down.

  Args:
    config: `config.optimizer`: `learning_rate`, `warmup_steps` or `warmup_epochs`, `schedule`
      ('cosine', 'constant' or 'steps'), and for 'steps' `decay_epochs` and `decay_factor`.
    total_steps: steps in the run.
    steps_per_epoch: steps in which as many examples pass as the sources hold that are drawn.

  Returns:
    step -> learning rate.

  Raises:
    UserError: for a warm-up longer than the run.
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
    boundaries = {}
    for epoch in config.decay_epochs:  # two may fall on one step
      step = round(epoch * steps_per_epoch) - warmup
      boundaries[step] = boundaries.get(step, 1.0) * config.decay_factor
    main = optax.piecewise_constant_schedule(peak, boundaries)
  else:
    raise ValueError(config.schedule)
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), main], [warmup])


def make_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule, encoder: Encoder
) -> optax.GradientTransformation:
  """Clip, scale (Adam, momentum, Lion), add decoupled weight decay, multiply by the learning rate.

  `clip_norm` is of the gradients that this is given: of the whole batch, of the parameters that learn, since frozen
  ones have none (see `split`), and before any learning-rate factor. Factors of the learning rate scale the decay, too.

  Args:
    config: `config.optimizer`.
    schedule: step -> learning rate.
    encoder: whose layers `layer_decay` counts.

  Returns:
    An optax transformation whose update is to be added to the parameters.
  """
  scaler = SCALERS[config.name].make(**config.options)
  rules = tuple(config.weight_decay_rules)

  def scale_rates(updates, params):
    rates = by_rule(tuple(config.learning_rate_rules), params)
    if config.layer_decay != 1:
      rates = jax.tree.map(lambda rate, f: rate * f, rates, layer_factors(config.layer_decay, encoder, params))
    return jax.tree.map(lambda u, rate: u * rate, updates, rates)

  def decay(updates, params):
    factors = by_rule(rules, params)
    return jax.tree.map(lambda u, p, f: u + config.weight_decay * f * p, updates, params, factors)

  chain = [('clip', optax.clip_by_global_norm(config.clip_norm))] if config.clip_norm else []
  chain.append(('scale', scaler))
  if config.weight_decay:
    chain.append(('decay', optax.stateless(decay)))
  chain += [('factors', optax.stateless(scale_rates)), ('rate', optax.scale_by_learning_rate(schedule))]
  # By name, not by position, which would move with those that come and go as a run goes on with another config. Those
  # that hold arrays stand in `contents.OPTIMIZER`, for checkpoints of before they had names.
  return _plain(optax.named_chain(*chain))


def _plain(chain: optax.GradientTransformation) -> optax.GradientTransformation:
  """A named chain whose state is a dict: Flax does not serialize optax's OrderedDict."""

  def update(updates, state, params=None):
    updates, state = chain.update(updates, state, params)
    return updates, dict(state)

  return optax.GradientTransformation(lambda params: dict(chain.init(params)), update)
