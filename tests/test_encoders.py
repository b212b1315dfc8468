"""Every encoder keeps its contract (`cover_jax/models/encoder.py`) and trains, resumes, shards and exports like any."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest

import cover_jax
from configs import defaults
from cover_jax import checkpoints, export
from cover_jax.experiment import build as experiments
from cover_jax.experiment import optim, settings, state, wire
from cover_jax.jobs import evaluate as evaluate_job
from cover_jax.jobs import resume
from cover_jax.models import LOGICAL_AXES
from cover_jax.models import encoder as encoders
from cover_jax.models.heads import Head
from cover_jax.objectives import LossOutput
from cover_jax.runtime import sharding
from cover_jax.training import loop as training
from cover_jax.training import step as stepping
from cover_jax.weights import initialise
from data_pipelines import declared
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.loading import arrays

# Clips of the tests: long enough for the encoders that pool time.
FRAMES = {'s3d': 8, 'c3d': 8}
SIZE = 32
ONE, EIGHT = {'data': 1, 'fsdp': 1, 'tensor': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}
OPTIONS = {'s3d': {'gating': True}, 'timesformer': {'tokens_together': 0}}


# S3D at its smallest compiles longer than all others together.
BUT_S3D = [pytest.param(n, marks=pytest.mark.slow if n == 's3d' else ()) for n in encoders.ENCODERS]


def each(fast):
  """All encoders: the whole matrix takes minutes, so one stands for the others and these are slow."""
  return [pytest.param(name, marks=() if name == fast else pytest.mark.slow) for name in encoders.ENCODERS]


def model(name, **changes):
  """A tiny encoder; one whose batches of 4 would be too small to compare float32 sums in is told by the caller."""
  options = {'name': name, **encoders.encoder_class({'name': name}).DEBUG, **OPTIONS.get(name, {}), **changes}
  return encoders.make(options, 'float32')


def clip_of(name, batch=2, frames=None):
  shape = batch, frames or FRAMES.get(name, 4), SIZE, SIZE, 3
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.cache
def initial(name):
  return nn.meta.unbox(jax.jit(model(name).init)(jax.random.key(0), clip_of(name)))


# ---- The contract.


@pytest.mark.parametrize('name', BUT_S3D)
def test_shapes_are_as_promised(name):
  encoder, clip = model(name), clip_of(name)
  run = functools.partial(encoder.apply, levels=encoder.level_names)
  encoded = jax.eval_shape(run, initial(name), clip)
  assert encoded.feature_BxD.shape == (2, encoder.width) and encoded.statistics is None
  batch, frames, rows, columns, width = encoded.tokens_BxTxHxWxD.shape
  assert (batch, width) == (2, encoder.width) and frames <= clip.shape[1] and max(rows, columns) < SIZE
  assert tuple(encoded.levels) == encoder.level_names and all(x.ndim == 5 for x in encoded.levels.values())
  last = encoded.levels[encoder.level_names[-1]]
  assert last.shape == encoded.tokens_BxTxHxWxD.shape
  with pytest.raises(ValueError, match='has no level'):
    jax.eval_shape(functools.partial(encoder.apply, levels=('another',)), initial(name), clip)


@pytest.mark.parametrize('name', BUT_S3D)
def test_levels_do_not_change_the_rest_and_an_image_is_finite_or_refused(name):
  encoder = model(name)
  plain = jax.jit(encoder.apply)(initial(name), clip_of(name))
  kept = jax.jit(functools.partial(encoder.apply, levels=encoder.level_names[-1:]))(initial(name), clip_of(name))
  np.testing.assert_allclose(kept.feature_BxD, plain.feature_BxD, atol=1e-5)
  assert np.isfinite(plain.feature_BxD).all() and np.std(plain.tokens_BxTxHxWxD) > 0
  sentence = encoder.limits(1, (SIZE, SIZE))
  if sentence:
    assert 'an image has one' in sentence
  else:
    image = jax.jit(encoder.apply)(initial(name), clip_of(name, frames=1))
    assert np.isfinite(image.feature_BxD).all() and image.tokens_BxTxHxWxD.shape[1] == 1


@pytest.mark.parametrize('name', encoders.ENCODERS)
def test_every_parameter_has_named_axes_and_a_layer(name):
  encoder = model(name)
  boxed = jax.eval_shape(encoder.init, jax.random.key(0), clip_of(name))['params']
  layers = set()
  for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
    assert isinstance(leaf, nn.LogicallyPartitioned), path
    assert set(leaf.names) <= LOGICAL_AXES | {None}, (path, leaf.names)
    layer = encoder.layer(optim.parameter_name(path))
    if np.ndim(layer):
      assert len(layer) == leaf.value.shape[0]
    layers |= set(np.atleast_1d(layer).tolist())
  assert min(layers) == 0 and max(layers) <= encoder.num_layers
  # None in between is left out; what stands last may be the heads themselves.
  assert layers >= set(range(encoder.num_layers))


@pytest.mark.parametrize('name', BUT_S3D)
def test_batch_statistics_can_be_frozen(name):
  encoder, clip = model(name), clip_of(name)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), clip)
  frozen = 'freeze_statistics' in declared.options_of(type(encoder))
  assert frozen == ('batch_stats' in shapes)
  if frozen:
    train = functools.partial(model(name, freeze_statistics=True).apply, train=True, mutable=['batch_stats'])
    run = jax.jit(lambda variables, clip: train(variables, clip, rngs={'drop_path': jax.random.key(0)}))
    _, after = run(initial(name), clip)
    jax.tree.map(np.testing.assert_array_equal, after['batch_stats'], initial(name)['batch_stats'])


@pytest.mark.parametrize('name', encoders.ENCODERS)
def test_products_are_those_of_the_compiled_program(name):
  encoder, clip = model(name), clip_of(name, batch=1)
  counted = encoder.products(clip.shape[1], (SIZE, SIZE))
  traced = encoders.Encoder.products(encoder, clip.shape[1], (SIZE, SIZE))
  assert 0.7 < traced / counted < 1.5  # the formulas leave out what is padded and what pools


@pytest.mark.parametrize('name', encoders.ENCODERS)
def test_options_are_declared_and_their_defaults_hold(name):
  kind = encoders.encoder_class({'name': name})
  declared_options = declared.options_of(kind)
  fields = {f.name for f in dataclasses.fields(kind)} - {'parent', 'name', 'dtype'}
  assert set(declared_options) == fields
  encoders.check({'name': name} | {key: option.default for key, option in declared_options.items()}, 'here')
  assert all(key in fields for key in kind.DEBUG) and all(key in fields for key in kind.DEPTHS)
  with pytest.raises(UserError, match=r"config\.model has no key 'dept'"):
    encoders.make({'name': name, 'dept': 3}, 'float32')


def test_an_unknown_encoder_is_refused():
  with pytest.raises(UserError, match=r'config\.model\.name'):
    encoders.make({'name': 'timeformer'}, 'float32')


# ---- A run.


@functools.cache
def sources(frames):
  rng = np.random.default_rng(0)
  whole = {'crop_scale': (1.0, 1.0), 'crop_ratio': (1.0, 1.0), 'sampler': 'segments'}

  def make(name, count, classes):
    videos = [rng.integers(0, 256, (frames, SIZE, SIZE, 3), np.uint8) for _ in range(count)]
    names = tuple(f'{name} {k}' for k in range(classes))
    return arrays.array_source(name, videos, rng.integers(0, classes, count), names, 'video', **whole)

  return make('acts', 12, 3), make('moves', 12, 2)


def config(name, **changes) -> ml_collections.ConfigDict:
  frames = FRAMES.get(name, 4)
  c = defaults.get_config()
  c.sources = {s.name: defaults.source(f'memory/{s.name}') for s in sources(frames)}
  c.streams = {'video': defaults.stream(('acts', 'moves'), num_frames=frames, size=SIZE)}
  c.batch_size = c.batch_multiple = 8
  c.total_steps, c.log_every, c.checkpoint_every = 4, 1, 2
  c.model = {'name': name, **encoders.encoder_class({'name': name}).DEBUG}
  c.heads.only = {'moves': {'name': 'attentive', 'num_heads': 2}}
  c.optimizer.learning_rate, c.optimizer.weight_decay, c.optimizer.layer_decay = 1e-3, 0.01, 0.9
  c.ema_decay = 0.5
  c.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
  settings.check(c)
  return c


def build(c, devices=1):
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
  mine = sources(c.streams.video.num_frames)
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in mine]
  run = experiments.build(c, infos, batch_divisor=sharding.batch_divisor(mesh))
  return run, mesh, wire.training_batches(run, mine, mesh)


def run_steps(name, steps=3, mesh=ONE, **changes):
  run, devices, batches = build(config(name, mesh=mesh, **changes), int(np.prod(list(mesh.values()))))
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, devices)
  current = state.create(run, optimizer, devices, placed)
  step = stepping.compile_step(run, optimizer, devices)
  losses = []
  for batch in itertools.islice(batches(0), steps):
    current, report = step(current, sharding.to_global(batch, devices))
    losses.append(float(report['scalars']['loss']))
  return np.array(losses), jax.device_get(current)


def near(a, b, atol):
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-3, err_msg=jax.tree_util.keystr(path)), a, b
  )


@pytest.mark.parametrize('name', each('resnet3d'))
def test_sharded_is_unsharded(name):
  """Batch statistics, too, are those of the global batch. SGD: Adam would make a rounding error a step."""
  sgd = {'optimizer__name': 'sgd', 'optimizer__options': {'decay': 0.9}}
  losses, one = run_steps(name, **sgd)
  sharded_losses, eight = run_steps(name, mesh=EIGHT, **sgd)
  np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
  near(eight.params, one.params, 1e-4)
  near(eight.ema, one.ema, 1e-4)
  if encoders.STATISTICS in one.params['encoder']:
    moved = one.params['encoder'][encoders.STATISTICS]
    assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(jax.tree.map(lambda x: x - np.round(x), moved)))
    averaged = one.ema['encoder'][encoders.STATISTICS]
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(*map(jax.tree.leaves, (moved, averaged)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('name', encoders.ENCODERS)
def test_accumulation_is_the_large_batch_where_statistics_are_frozen(name):
  sgd = {'optimizer__name': 'sgd', 'optimizer__options': {'decay': 0.9}}
  if 'freeze_statistics' in declared.options_of(encoders.encoder_class({'name': name})):
    sgd['model__freeze_statistics'] = True
  losses, one = run_steps(name, steps=2, **sgd)
  more_losses, more = run_steps(name, steps=2, accumulation_steps=2, **sgd)
  np.testing.assert_allclose(more_losses, losses, rtol=1e-4)
  near(more.params, one.params, 1e-4)


@pytest.mark.slow
def test_statistics_go_through_the_microbatches():
  """The running statistics of a step of two microbatches have moved twice."""
  _, one = run_steps('resnet3d', steps=1, optimizer__learning_rate=1e-9)
  _, two = run_steps('resnet3d', steps=1, optimizer__learning_rate=1e-9, accumulation_steps=2)
  first = lambda s: s.params['encoder'][encoders.STATISTICS]['stem']['space']['norm']['mean']
  # From 0 the mean moves by 0.1 of the batch's, then by 0.1 of the rest: 0.1 and 0.19 of much the same.
  ratio = np.linalg.norm(first(two)) / np.linalg.norm(first(one))
  assert ratio == pytest.approx(1.9, rel=0.1)


def test_statistics_of_several_streams_are_weighted_as_their_losses():
  streams = {'video': SimpleNamespace(loss_weight=3.0), 'image': SimpleNamespace(loss_weight=1.0)}
  output = lambda value: LossOutput(0.0, {}, {}, {'mean': np.array([value])})
  mean = stepping._mean_statistics(
    SimpleNamespace(streams=streams), {'video': output(2.0), 'image': output(10.0)}, None
  )
  assert mean['mean'].tolist() == [4.0]  # (3 x 2 + 1 x 10) / 4


def test_the_average_of_a_run_averages_statistics():
  """One step: what moved are the clips', not a gradient's, and the average goes a share of the way there."""
  run, mesh, batches = build(config('resnet3d', optimizer__name='sgd', optimizer__options={'decay': 0.9}))
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, mesh)
  before = state.create(run, optimizer, mesh, placed)
  old = jax.device_get(before.params)
  batch = next(batches(0))
  after, _ = stepping.compile_step(run, optimizer, mesh)(before, sharding.to_global(batch, mesh))
  seen = run.encode(old['encoder'], batch['video']['views']['clip'], rng=jax.random.key(0)).statistics
  near(after.params['encoder'][encoders.STATISTICS], seen, 1e-5)
  kept = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)]
  assert any('stem' in name for name in kept) and not any(encoders.STATISTICS in name for name in kept)  # no moments
  decay = min(0.5, 2 / 11)
  averaged = jax.tree.map(
    lambda a, b: decay * a + (1 - decay) * b, old['encoder'][encoders.STATISTICS], jax.device_get(seen)
  )
  near(after.ema['encoder'][encoders.STATISTICS], averaged, 1e-5)


def test_an_attentive_head_looks_at_every_token():
  encoded = encoders.Encoded(np.zeros((1, 8), np.float32), np.random.default_rng(0).normal(size=(1, 2, 2, 2, 8)))
  encoded = encoded.replace(tokens_BxTxHxWxD=encoded.tokens_BxTxHxWxD.astype(np.float32))
  head = Head(3, (('name', 'attentive'), ('num_heads', 2)))
  params = nn.meta.unbox(head.init(jax.random.key(0), encoded))
  params['params']['kernel'] = np.random.default_rng(1).normal(size=params['params']['kernel'].shape)
  logits = lambda tokens: head.apply(params, encoded.replace(tokens_BxTxHxWxD=tokens)).sum()
  slope = jax.grad(logits)(encoded.tokens_BxTxHxWxD)
  assert (np.abs(slope).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize('name', each('resnet3d'))
def test_resumed_is_uninterrupted_and_exported_is_the_same_model(name, tmp_path):
  mixed = {'streams__video__augment': {'mixup': 0.8}}
  run, mesh, batches = build(config(name, **mixed))
  whole = training.train(run, batches, str(tmp_path / 'whole'), mesh)
  stopped = iter([False, False, True])
  (tmp_path / 'parts').mkdir(exist_ok=True)
  with pytest.raises(training.Preempted):
    training.train(run, batches, str(tmp_path / 'parts'), mesh, stop=lambda: next(stopped))
  resumed = training.train(run, batches, str(tmp_path / 'parts'), mesh)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

  export.export(str(tmp_path / 'whole'), str(tmp_path / 'model.flax'), 'flax')
  loaded, own = cover_jax.load(str(tmp_path / 'model.flax')), cover_jax.load(str(tmp_path / 'whole'))
  clip = next(batches(0))['video']['views']['clip'][:2]
  jax.tree.map(np.testing.assert_array_equal, loaded.encode(clip), own.encode(clip))
  expected = run.encode(jax.device_get(whole.params)['encoder'], clip).feature_BxD
  np.testing.assert_allclose(loaded.encode(clip).feature_BxD, expected, rtol=1e-4, atol=1e-5)
  assert set(loaded.predict(clip[0])) == {'acts', 'moves'}
  about = checkpoints.describe(str(tmp_path / 'whole'))['about']
  assert resume.compare(about['config'], run.config.to_dict()) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet3d', pytest.param('videomae', marks=pytest.mark.slow)])
def test_vtdl_trains_on_it(name):
  objective = {'name': 'vtdl', 'stride': 1, 'queue_size': 16, 'dim': 8, 'momentum': 0.5}
  losses, end = run_steps(name, streams__video__objective=objective, heads__only={})
  assert np.isfinite(losses).all()
  teacher = end.objectives['video']['teacher']['encoder']
  assert jax.tree.structure(teacher) == jax.tree.structure(end.params['encoder'])
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), teacher, end.params['encoder'])
  assert max(jax.tree.leaves(moved)) > 0
  if encoders.STATISTICS in teacher:
    assert max(jax.tree.leaves(moved[encoders.STATISTICS])) > 0


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet3d', 'timesformer'])
def test_a_frozen_encoder_costs_no_backward_pass(name):
  """Nothing of it gets a gradient, and the step keeps none of its activations."""
  frozen = {'optimizer__learning_rate_rules': (('^encoder/', 0.0), ('.*', 1.0))}
  if name == 'resnet3d':
    frozen['model__freeze_statistics'] = True

  def compiled(**changes):
    run, mesh, _ = build(config(name, heads__all={'name': 'attentive', 'num_heads': 2}, **changes))
    optimizer, _ = stepping.make_optimizer(run)
    abstract, _ = state.state_shardings(run, optimizer, mesh)
    step = stepping.jit_step(run, optimizer, mesh)
    with sharding.use(mesh, run.config.logical_axis_rules):
      program = step.lower(abstract, stepping.abstract_batch(run)).compile()
    gradient = sum(
      x.size for x in jax.tree.leaves(optim.split(tuple(run.config.optimizer.learning_rate_rules), abstract.params)[0])
    )
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()['flops'], gradient

  (memory, flops, learning), (tuned_memory, tuned_flops, all_learn) = compiled(**frozen), compiled()
  assert memory < 0.6 * tuned_memory and flops < 0.6 * tuned_flops and learning < all_learn


def test_frozen_encoder_stays_to_the_bit():
  frozen = {'optimizer__learning_rate_rules': (('^encoder/', 0.0), ('.*', 1.0)), 'model__freeze_statistics': True}
  _, none = run_steps('resnet3d', steps=0, **frozen)
  _, end = run_steps('resnet3d', steps=2, **frozen)
  jax.tree.map(np.testing.assert_array_equal, end.params['encoder'], none.params['encoder'])
  assert np.any(
    end.params['heads']['moves']['pooling']['out']['kernel']
    != none.params['heads']['moves']['pooling']['out']['kernel']
  )


# ---- Refusals.


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('s3d', {'streams__video__num_frames': 4}, 'at least 5 frames'),
    ('videomae', {'streams__video__num_frames': 3}, 'multiple of tubelet_size'),
    ('videoprism', {'streams__video__size': 20}, 'multiples of patch_size'),
    ('resnet3d', {'model__depths': (1, 1, 1)}, 'not equally long'),
    ('timesformer', {'heads__all': {'name': 'attention'}}, r'config\.heads\.all\.name'),
    ('timesformer', {'heads__all': {'name': 'attentive', 'heads': 2}}, r"config\.heads\.all has no key 'heads'"),
    ('timesformer', {'heads__all': {'name': 'attentive', 'num_heads': 5}}, r'config\.heads does not fit.*num_heads 5'),
    ('timesformer', {'heads__all': {'name': 'attentive'}}, 'num_heads 12'),
    ('videomae', {'heads__all': {'name': 'attentive_blocks', 'num_heads': 32, 'mlp_dim': 8}}, 'num_heads 32'),
    ('videomae', {'model__num_heads': 3}, r'config\.model does not make a model: 16 features.*num_heads 3'),
    ('videoprism', {'model__num_heads': 3}, 'num_heads 3'),
    ('vjepa2', {'model__num_heads': 4}, 'positions need at least 6'),
    (
      'timesformer',
      {'heads__only': {'acts': 'attentive'}},
      r"config\.heads\.only\.acts is 'attentive': expected a dict",
    ),
    ('timesformer', {'heads__only': {'act': {'name': 'linear'}}}, "config.heads.only names 'act'"),
  ],
)
def test_what_cannot_be_is_refused_before_any_data_is_read(name, changes, message):
  with pytest.raises(UserError, match=message):
    build(config(name, **changes))


@pytest.mark.slow
def test_attention_is_only_shown_where_there_is_some(tmp_path):
  run, mesh, batches = build(config('resnet3d', total_steps=1))
  training.train(run, batches, str(tmp_path), mesh)
  with pytest.raises(UserError, match='no attention to show'):
    cover_jax.load(str(tmp_path)).attention(next(batches(0))['video']['views']['clip'][0])
  with pytest.raises(UserError, match='only a TimeSformer'):
    export.export(str(tmp_path), str(tmp_path / 'hf'), 'huggingface', head='acts')


def test_an_encoder_that_is_frozen_but_for_its_statistics_is_refused(tmp_path):
  run, mesh, batches = build(config('resnet3d', optimizer__learning_rate_rules=(('^encoder/', 0.0), ('.*', 1.0))))
  with pytest.raises(UserError, match='freeze_statistics=True'):
    training.train(run, batches, str(tmp_path), mesh)


def test_a_head_of_an_unlabelled_source_is_refused():
  c = config('resnet3d')
  infos = [SourceInfo('acts', 'video', 12, ('a', 'b')), SourceInfo('moves', 'video', 12, ())]
  with pytest.raises(UserError, match="names 'moves', which has no classes"):
    experiments.build(c, infos)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a videomae with one attentive head, after a step."""
  folder = str(tmp_path_factory.mktemp('videomae'))
  run, mesh, batches = build(config('videomae', total_steps=1))
  training.train(run, batches, folder, mesh)
  return folder


def seeded(folder, **changes):
  run, mesh, _ = build(config('videomae', init_from__path=folder, **changes))
  optimizer, _ = stepping.make_optimizer(run)
  _, placed = state.state_shardings(run, optimizer, mesh)
  return initialise.start(run, optimizer, mesh, placed)


def test_another_run_seeds_from_it_and_is_the_same_function(trained):
  loaded = cover_jax.load(trained)
  start = jax.device_get(seeded(trained).params)
  jax.tree.map(np.testing.assert_array_equal, start['encoder'], jax.device_get(loaded.params['encoder']))
  jax.tree.map(np.testing.assert_array_equal, start['heads'], jax.device_get(loaded.params['heads']))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'heads__only': {}}, "its head 'moves' is of another kind than config.heads says"),
    ({'heads__all': {'name': 'attentive', 'num_heads': 2}}, "its head 'acts' is of another kind"),
    ({'model__num_heads': 4}, 'the file has num_heads 2, the model num_heads 4'),
    ({'model__patch_size': 4, 'model__tubelet_size': 8}, 'patch_size 8, tubelet_size 2, the model patch_size 4'),
    ({'model__epsilon': 1e-3}, 'the file has epsilon 1e-12'),
  ],
)
def test_another_function_of_the_same_weights_is_refused(trained, changes, message):
  frames = {'streams__video__num_frames': 8} if 'model__tubelet_size' in changes else {}
  with pytest.raises(UserError, match=message):
    seeded(trained, **changes, **frames)


def test_weights_are_tested_as_the_function_that_was_trained(trained):
  run, mesh, _ = build(config('videomae', pixel_std=(5.0, 5.0, 5.0)))
  with pytest.raises(UserError, match=r'another function.*pixel_std'):
    evaluate_job.load_params(run, trained, mesh)
  run, mesh, _ = build(config('videomae', model__remat='full', batch_size=16, eval_every=3))
  evaluate_job.load_params(run, trained, mesh)


def test_a_config_of_another_version_is_one_sentence(trained):
  about = checkpoints.describe(trained)['about']
  for model_config in (None, 3, {'name': 'swin'}, {'name': 5}):
    strange = {'config': about['config'] | {'model': model_config}}
    with pytest.raises(UserError, match='config that this version cannot read'):
      resume.check_function(strange, config('videomae').to_dict(), 'here')


def test_weights_that_are_no_numbers_are_not_used(trained, tmp_path):
  export.export(trained, str(tmp_path / 'model.flax'), 'flax')
  loaded = checkpoints.load(str(tmp_path / 'model.flax'))
  loaded['state']['params']['encoder']['norm']['scale'] = np.full(16, np.nan, np.float32)
  with pytest.raises(UserError, match='numbers that are not finite'):
    export.to_flax(loaded, 'raw')
