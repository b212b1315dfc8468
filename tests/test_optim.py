"""The optimizer and the step around it against the same arithmetic written out in numpy, and against optax's own.

The reference knows nothing of `cover_jax.experiment.optim`: no regexes, no trees, float64. What decays and how fast
each parameter learns is said once as the config says it and once as a function of the parameter's name.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, traverse_util

from cover_jax.experiment import optim, state
from cover_jax.models.timesformer import TimeSformer
from cover_jax.objectives import LossOutput, Objective
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from tests import tiny

DEPTH = 2


class Reference:
  """SGD with momentum, Adam and Lion with all that the config can ask for, one array after the other.

  Args:
    params: {name: array} at the start.
    options: the fields of `config.optimizer` that change the update.
    learning_rate: number of earlier updates -> learning rate.
    decays: name -> factor of the weight decay.
    rate: name -> factor of the learning rate, a number or one that broadcasts to the parameter; 0 for frozen.
    ema_decay: of the average of the parameters; 0 for none.
  """

  def __init__(self, params, options, learning_rate, decays, rate, ema_decay=0.0):
    self.params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    self.ema = dict(self.params)
    self.first = {name: np.zeros_like(p) for name, p in self.params.items()}
    self.second = dict(self.first)
    self.options, self.learning_rate, self.decays, self.rate = options, learning_rate, decays, rate
    self.ema_decay, self.updates, self.norms = ema_decay, 0, []

  def step(self, gradients):
    frozen = {name for name in self.params if np.all(np.asarray(self.rate(name)) == 0)}
    learning = [name for name in self.params if name not in frozen]
    norm = math.sqrt(sum(np.sum(np.asarray(gradients[name], np.float64) ** 2) for name in learning))
    clip = self.options['clip_norm']
    shrink = clip / norm if clip and norm > clip else 1.0
    self.norms.append(norm)
    speed = self.learning_rate(self.updates)
    self.updates += 1
    average = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
    for name in learning:
      p = self.params[name]
      direction = self._direction(name, shrink * np.asarray(gradients[name], np.float64))
      direction = direction + self.options['weight_decay'] * self.decays(name) * p
      self.params[name] = p - speed * self.rate(name) * direction
      self.ema[name] = average * self.ema[name] + (1 - average) * self.params[name]

  def _direction(self, name, g):
    chosen, options = self.options['name'], self.options['options']
    if chosen == 'sgd':
      self.first[name] = g + options['decay'] * self.first[name]
      return g + options['decay'] * self.first[name] if options.get('nesterov') else self.first[name]
    if chosen == 'adam':
      b1, b2 = options.get('b1', 0.9), options.get('b2', 0.999)
      self.first[name] = b1 * self.first[name] + (1 - b1) * g
      self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
      mean, square = self.first[name] / (1 - b1**self.updates), self.second[name] / (1 - b2**self.updates)
      return mean / (np.sqrt(square + options.get('eps_root', 0.0)) + options.get('eps', 1e-8))
    assert chosen == 'lion'
    b1, b2 = options.get('b1', 0.9), options.get('b2', 0.99)
    direction = np.sign(b1 * self.first[name] + (1 - b1) * g)
    self.first[name] = b2 * self.first[name] + (1 - b2) * g
    return direction


def cosine(step, *, peak, warmup, total, final=0.0):
  if step < warmup:
    return peak * step / warmup
  return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))


def kernels(name):
  """The weight decay of `defaults`."""
  return 1.0 if name.endswith('kernel') else 0.0


def every(name):
  del name
  return 1.0


def layered(decay, name, shape):
  """Layer-wise decay by hand: blocks are stacked along the first axis."""
  if name.startswith('encoder/blocks/'):
    return np.array([decay ** (DEPTH - i) for i in range(DEPTH)]).reshape(DEPTH, *[1] * (len(shape) - 1))
  if name.startswith('encoder/') and not name.startswith('encoder/norm/'):
    return decay ** (DEPTH + 1)
  return 1.0


def flat(tree):
  return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree, sep='/').items()}


def nested(arrays):
  return traverse_util.unflatten_dict(arrays, sep='/')


def assert_near(found, expected, rtol=5e-5, atol=2e-5):
  found = flat(found)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=rtol, atol=atol, err_msg=name)


def optimizer_config(**changes):
  config = tiny.config(**{f'optimizer__{key}': value for key, value in changes.items()})
  return config.optimizer


# Plain trees.

SHAPES = {
  'encoder/class_token': (1, 1, 4),
  'encoder/patch_embedding/kernel': (3, 4),
  'encoder/patch_embedding/bias': (4,),
  'encoder/blocks/mlp/out/kernel': (DEPTH, 4, 3),
  'encoder/blocks/mlp/out/bias': (DEPTH, 3),
  'encoder/norm/scale': (4,),
  'heads/acts/kernel': (4, 5),
  'heads/acts/bias': (5,),
  'heads/moves/kernel': (4, 3),
  'objectives/video/projection/kernel': (4, 4),
}


def arrays(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def updates(config, schedule, gradients):
  """The parameters after each of some updates from `arrays(0)` by the optimizer of a config."""
  optimizer = optim.make_optimizer(config, schedule, TimeSformer(depth=DEPTH))
  return _updates(optimizer, gradients)


def _updates(optimizer, gradients):
  params = nested(arrays(0))

  @jax.jit
  def update(params, opt_state, gradients):
    change, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, change), opt_state

  opt_state, found = optimizer.init(params), []
  for g in gradients:
    params, opt_state = update(params, opt_state, nested(g))
    found.append(params)
  return found


# Norms of about 0.8 and 80: clipping at 5 changes every second one.
GRADIENTS = [arrays(1 + i, scale=0.1 if i % 2 else 10.0) for i in range(7)]


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('sgd', {'decay': 0.0}),
    ('sgd', {'decay': 0.9}),
    ('sgd', {'decay': 0.9, 'nesterov': True}),
    ('adam', {}),
    ('adam', {'b1': 0.7, 'b2': 0.9, 'eps': 1e-2, 'eps_root': 1e-3}),
    ('lion', {}),
    ('lion', {'b1': 0.5, 'b2': 0.8}),
  ],
)
def test_chain_is_what_is_written_out(name, options):
  """Clipping, direction, decay, rates and schedule together, in this order, over seven updates."""
  config = optimizer_config(
    name=name,
    options=options,
    clip_norm=5.0,
    weight_decay=0.3,
    layer_decay=0.6,
    learning_rate_rules=(('^heads/', 3.0), ('bias$', 2.0), ('.*', 1.0)),
    learning_rate=0.1,
    warmup_steps=3,
    final_fraction=0.1,
  )

  def rate(name):
    rule = 3.0 if name.startswith('heads/') else 2.0 if name.endswith('bias') else 1.0
    return rule * layered(0.6, name, SHAPES[name])

  expected = Reference(
    arrays(0), config.to_dict(), functools.partial(cosine, peak=0.1, warmup=3, total=9, final=0.1), kernels, rate
  )
  found = updates(config, optim.make_schedule(config, 9, 3.0), GRADIENTS)
  for params, gradient in zip(found, GRADIENTS, strict=True):
    expected.step(gradient)
    assert_near(params, expected.params)
  assert min(expected.norms) < 2.0 < 5.0 < 40.0 < max(expected.norms)
  assert_near(found[0], arrays(0), rtol=0, atol=0)  # the warm-up begins at a rate of 0


@pytest.mark.parametrize(
  ('name', 'theirs'),
  [
    ('adam', functools.partial(optax.adamw, b1=0.8, b2=0.95, eps=1e-6)),
    ('lion', functools.partial(optax.lion, b1=0.8, b2=0.95)),
  ],
)
@pytest.mark.parametrize('decays', ['kernels', 'all'])
def test_chain_is_optaxs(name, theirs, decays):
  options = {'b1': 0.8, 'b2': 0.95} | ({'eps': 1e-6} if name == 'adam' else {})
  rules = {'kernels': (('kernel$', 1.0), ('.*', 0.0)), 'all': (('.*', 1.0),)}[decays]
  config = optimizer_config(name=name, options=options, clip_norm=5.0, weight_decay=0.3, weight_decay_rules=rules)
  schedule = lambda step: 0.1 / (1 + step)
  mask = nested({n: decays == 'all' or n.endswith('kernel') for n in SHAPES})
  reference = optax.chain(optax.clip_by_global_norm(5.0), theirs(schedule, weight_decay=0.3, mask=mask))
  for ours, expected in zip(updates(config, schedule, GRADIENTS), _updates(reference, GRADIENTS), strict=True):
    assert_near(ours, flat(expected), rtol=1e-6, atol=1e-7)


def change(config, gradient):
  """What one update at a learning rate of 1 adds to the parameters."""
  optimizer = optim.make_optimizer(config, lambda step: 1.0, TimeSformer(depth=DEPTH))
  params = nested(arrays(0))
  return flat(jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(nested(gradient), params))


def test_clipping_is_by_the_norm_of_all_gradients_and_leaves_short_ones_to_the_bit():
  config = optimizer_config(name='sgd', options={'decay': 0.0}, clip_norm=5.0, weight_decay=0.0)
  short, long = arrays(1, scale=0.1), arrays(2, scale=100.0)
  norm = lambda tree: math.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in tree.values()))
  assert norm(short) < 5 < norm(long)
  for name, x in change(config, short).items():
    np.testing.assert_array_equal(x, -short[name])
  clipped = change(config, long)
  assert norm(clipped) == pytest.approx(5.0, rel=1e-5)
  for name, x in clipped.items():
    np.testing.assert_allclose(x, -long[name] * 5.0 / norm(long), rtol=1e-5, err_msg=name)
  config.clip_norm = 0.0
  for name, x in change(config, long).items():
    np.testing.assert_array_equal(x, -long[name])


@pytest.mark.parametrize('name', ['sgd', 'adam', 'lion'])
def test_a_gradient_of_zero_leaves_the_decay_alone(name):
  options = {'decay': 0.9} if name == 'sgd' else {}
  config = optimizer_config(name=name, options=options, clip_norm=1.0, weight_decay=0.25)
  params = arrays(0)
  for key, x in change(config, {key: np.zeros_like(x) for key, x in params.items()}).items():
    np.testing.assert_allclose(x, -0.25 * params[key] if key.endswith('kernel') else 0 * x, rtol=1e-6, err_msg=key)


# Schedules.


def learning_rates(total, steps_per_epoch=10.0, **changes):
  schedule = optim.make_schedule(optimizer_config(**changes), total, steps_per_epoch)
  return np.array([float(schedule(step)) for step in range(total)])


@pytest.mark.parametrize('final', [0.0, 0.25])
@pytest.mark.parametrize(
  'warmup',
  [{}, {'warmup_steps': 1}, {'warmup_steps': 6}, {'warmup_epochs': 0.4}, {'warmup_steps': 2, 'warmup_epochs': 0.4}],
)
def test_cosine(final, warmup):
  """Its first step after the warm-up is the peak, and the step after the last one would be the final fraction."""
  found = learning_rates(20, learning_rate=2.0, final_fraction=final, **warmup)
  steps = warmup.get('warmup_steps', 0) + round(10 * warmup.get('warmup_epochs', 0))
  expected = [cosine(step, peak=2.0, warmup=steps, total=20, final=final) for step in range(20)]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert found[steps] == 2.0 and found[0] == (2.0 if steps == 0 else 0.0) and found[-1] > 2.0 * final
  schedule = optim.make_schedule(optimizer_config(learning_rate=2.0, final_fraction=final, **warmup), 20, 10.0)
  assert float(schedule(20)) == pytest.approx(2.0 * final, abs=1e-6)


def test_constant():
  found = learning_rates(8, learning_rate=0.5, schedule='constant', warmup_steps=4)
  np.testing.assert_allclose(found, [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5])
  np.testing.assert_allclose(learning_rates(3, learning_rate=0.5, schedule='constant'), 0.5)


def test_steps_down_at_whole_epochs_whatever_the_warmup():
  options = {'learning_rate': 1.0, 'schedule': 'steps', 'decay_epochs': (1.0, 2.5), 'decay_factor': 0.5}
  expected = np.array([1.0] * 10 + [0.5] * 15 + [0.25] * 5)
  np.testing.assert_allclose(learning_rates(30, **options), expected)
  found = learning_rates(30, warmup_steps=4, **options)
  np.testing.assert_allclose(found[4:], expected[4:])
  np.testing.assert_allclose(found[:4], [0, 0.25, 0.5, 0.75])


def test_two_steps_down_that_fall_on_one_step_both_count():
  """As in a short trial of a long run, with few steps an epoch."""
  options = {'learning_rate': 1.0, 'schedule': 'steps', 'decay_epochs': (4.0, 5.0), 'decay_factor': 0.1}
  found = learning_rates(4, steps_per_epoch=0.4, **options)
  np.testing.assert_allclose(found, [1.0, 1.0, 0.01, 0.01], rtol=1e-5)


def test_a_warmup_longer_than_the_run_is_refused():
  with pytest.raises(UserError, match='warm-up of 20 steps does not fit in a run of 20'):
    learning_rates(20, warmup_epochs=2.0)


# The step of several streams. The objective is one whose gradient is plain: half the squared distance of every
# parameter from a pattern that is as strong as the clip is bright, but for a constant.

BATCH = {'video': 16, 'image': 8}


def distance(pattern, strength):
  """The objective of a stream; its gradient by one example is params - strength * brightness * pattern."""

  def loss(params, own, batch, rng):
    del rng
    bright_B = strength * jnp.mean(batch['views']['clip'] / 255.0, axis=(1, 2, 3, 4))
    params = traverse_util.flatten_dict(params, sep='/')
    length = sum(0.5 * jnp.sum(x * x) for x in params.values())
    along = sum(jnp.sum(x * pattern[name]) for name, x in params.items())
    far_B = length - bright_B * along
    return LossOutput(jnp.mean(far_B, where=batch['mask']), own, {'loss': far_B})

  return Objective(loss=loss)


def batches(count, padded):
  rng = np.random.default_rng(11)

  def one(stream, size):
    frames = 4 if stream == 'video' else 1
    level = rng.integers(0, 256, (size, 1, 1, 1, 1))
    mask = rng.random(size) < 0.4 if padded else np.ones(size, bool)
    mask[3] = True
    return {
      'views': {'clip': np.broadcast_to(level, (size, frames, 2, 2, 3)).astype(np.uint8)},
      'targets': {},
      'label': np.zeros(size, np.int32),
      'source': np.full(size, 0 if stream == 'video' else 2, np.int32),
      'mask': mask,
    }

  return [{stream: one(stream, size) for stream, size in BATCH.items()} for _ in range(count)]


FREEZE = (('patch_embedding|^heads/moves/|blocks/mlp/out', 0.0), ('^heads/', 5.0), ('.*', 1.0))


def freeze(name):
  if 'patch_embedding' in name or name.startswith('heads/moves/') or 'blocks/mlp/out' in name:
    return 0.0
  return 5.0 if name.startswith('heads/') else 1.0


STEPS = {
  'adam, shares of the mixture': {'optimizer__weight_decay': 0.2, 'ema_decay': 0.9},
  'sgd, weighted streams': {
    'optimizer__name': 'sgd',
    'optimizer__options': {'decay': 0.9, 'nesterov': True},
    'streams__video__loss_weight': 0.25,
    'streams__image__loss_weight': 2.0,
    'optimizer__weight_decay': 0.1,
    'optimizer__layer_decay': 0.5,
    'ema_decay': 0.25,
  },
  'frozen parts and padding': {
    'optimizer__name': 'sgd',
    'optimizer__options': {'decay': 0.5},
    'optimizer__learning_rate_rules': FREEZE,
    'optimizer__weight_decay': 0.1,
    'ema_decay': 0.9,
  },
  'accumulation, frozen parts and padding': {
    'accumulation_steps': 4,
    'optimizer__name': 'lion',
    'optimizer__learning_rate_rules': FREEZE,
    'streams__video__loss_weight': 0.25,
    'streams__image__loss_weight': 2.0,
    'optimizer__weight_decay': 0.2,
  },
}


@pytest.mark.parametrize('case', STEPS)
def test_step_is_what_is_written_out(case):
  """Six steps: the streams' weighted gradient, clipped once and over what learns, the update, the average."""
  common = {'batch_size': 24, 'streams__video__batch_size': 16, 'mesh__data': 1, 'optimizer__learning_rate': 0.05}
  common |= {'optimizer__warmup_steps': 1, 'total_steps': 8, 'optimizer__clip_norm': 3.0}
  changes = common | STEPS[case]
  config = tiny.config(**changes)
  experiment = tiny.build(config, jax.devices()[:1])[0]
  pattern = arrays(7)
  strength = {'video': 3.0, 'image': -1.0}
  tasks = {name: distance(pattern, strength[name]) for name in experiment.streams}
  experiment = dataclasses.replace(experiment, objectives=tasks)
  optimizer, _ = stepping.make_optimizer(experiment)
  step = jax.jit(stepping.make_train_step(experiment, optimizer))

  decay, frozen = config.optimizer.layer_decay, 'learning_rate_rules' in ' '.join(changes)
  rate = freeze if frozen else lambda name: layered(decay, name, SHAPES[name])
  start = arrays(0)
  schedule = functools.partial(cosine, peak=0.05, warmup=1, total=8)
  expected = Reference(start, config.optimizer.to_dict(), schedule, kernels, rate, config.ema_decay)
  weights = {'video': 0.5, 'image': 0.5}  # 40 and 24 videos, 64 images
  weights = {n: changes.get(f'streams__{n}__loss_weight', w) for n, w in weights.items()}

  now = state.around(experiment, optimizer, nested(start))
  for batch in batches(6, padded='padding' in case):
    now, report = step(now, batch)
    gradients = dict.fromkeys(SHAPES, 0.0)
    for stream, sub in batch.items():
      bright = strength[stream] * np.mean(sub['views']['clip'][sub['mask']] / 255.0)
      for name, p in expected.params.items():
        gradients[name] = gradients[name] + weights[stream] * (p - bright * pattern[name].astype(np.float64))
    expected.step(gradients)
    assert_near(now.params, expected.params)
    if config.ema_decay:
      assert_near(now.ema, expected.ema)
    assert float(report['scalars']['gradient_norm']) == pytest.approx(expected.norms[-1], rel=1e-5)
  assert min(expected.norms) > 3.0 and int(now.step) == 6
  if not config.ema_decay:
    assert now.ema == {}
  if frozen:
    still = [name for name in SHAPES if freeze(name) == 0]
    assert len(still) == 5
    for name in still:
      np.testing.assert_array_equal(flat(now.params)[name], start[name], err_msg=name)
    moments = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(now.opt_state)]
    assert moments and not any('patch_embedding' in path or 'moves' in path for path in moments)


def flat_shapes(experiment):
  boxed = jax.eval_shape(functools.partial(state.init_params, experiment), jax.random.key(0))
  return traverse_util.flatten_dict(linen.meta.unbox(boxed), sep='/')


# The model itself.

REAL = {
  'mesh__data': 1,
  'model__drop_path': 0.0,
  'model__attention': 'space',
  'model__remat': 'none',
  'optimizer__name': 'sgd',
  'optimizer__options': {'decay': 0.9},
  'optimizer__learning_rate': 0.05,
  'optimizer__weight_decay': 0.5,
  'optimizer__layer_decay': 0.8,
  'optimizer__clip_norm': 0.4,
  'total_steps': 6,
  'streams__video__loss_weight': 1.5,
}


@pytest.fixture(scope='module')
def written_out():
  """(start, batches, references without and with the decay negated) after five steps of the tiny model in float32."""
  config = tiny.config(**REAL)
  experiment, _, data, _ = tiny.build(config, jax.devices()[:1])
  shapes = {name: x.shape for name, x in flat_shapes(experiment).items()}
  rng = np.random.default_rng(3)
  start = {name: (rng.normal(size=shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}
  weights = {'video': 1.5, 'image': 0.5}

  def entropies(params, sub, sources):
    """Mean over the sub-batch, each example under the softmax of its own source's head; no masked columns."""
    token_BxD = experiment.encode(params['encoder'], sub['views']['clip']).feature_BxD
    total = 0.0
    for source in sources:
      head = params['heads'][tiny.sources()[source].name]
      log_BxK = jax.nn.log_softmax(token_BxD @ head['kernel'] + head['bias'])
      own_B = sub['source'] == source
      label_B = jnp.where(own_B, sub['label'], 0)
      total -= jnp.sum(jnp.where(own_B, log_BxK[jnp.arange(len(label_B)), label_B], 0.0))
    return total / len(sub['source'])

  @jax.jit
  @jax.grad
  def gradient(params, batch):
    members = {'video': (0, 1), 'image': (2,)}
    return sum(w * entropies(params, batch[name], members[name]) for name, w in weights.items())

  some = [batch for batch, _ in zip(data(0), range(5), strict=False)]
  rate = lambda name: layered(0.8, name, shapes[name])
  schedule = functools.partial(cosine, peak=0.05, warmup=0, total=6)
  references = []
  for sign in (1.0, -1.0):
    options = config.optimizer.to_dict()
    options['weight_decay'] *= sign
    reference = Reference(start, options, schedule, kernels, rate)
    for batch in some:
      now = {name: p.astype(np.float32) for name, p in reference.params.items()}
      reference.step(flat(gradient(nested(now), batch)))
    references.append(reference)
  return start, some, *references


def trained(start, some, **changes):
  experiment = tiny.build(tiny.config(**REAL, **changes), jax.devices()[:1])[0]
  optimizer, _ = stepping.make_optimizer(experiment)
  step = jax.jit(stepping.make_train_step(experiment, optimizer))
  now = state.around(experiment, optimizer, nested(start) | {'objectives': {name: {} for name in experiment.streams}})
  for batch in some:
    now, _ = step(now, batch)
  return now


def apart(found, expected, start):
  """How far two ends of a path from `start` are from each other, by the length of the path."""
  square = lambda a, b: sum(np.sum((a[name].astype(np.float64) - b[name]) ** 2) for name in start)
  return math.sqrt(square(found, expected) / square(expected, start))


def test_model_in_float32_is_what_is_written_out(written_out):
  start, some, reference, negated = written_out
  now = trained(start, some)
  assert min(reference.norms) > 0.4  # clipped
  assert_near(now.params, reference.params, rtol=1e-3, atol=2e-5)
  assert apart(flat(now.params), reference.params, start) < 1e-4
  assert apart(negated.params, reference.params, start) > 0.5


def test_model_in_bfloat16_is_near_to_what_is_written_out(written_out):
  start, some, reference, negated = written_out
  now = trained(start, some, dtype='bfloat16')
  found = flat(now.params)
  assert all(x.dtype == np.float32 for x in found.values())
  off = apart(found, reference.params, start)
  assert 1e-4 < off < 0.03
  assert apart(negated.params, reference.params, start) > 10 * 0.03
