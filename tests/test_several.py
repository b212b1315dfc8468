"""Several objectives of one stream: their losses are summed, what is the same for them is done once."""

import json
import re

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from configs import defaults
from cover_jax import objectives
from cover_jax.experiment import settings
from cover_jax.experiment.state import init_params
from cover_jax.jobs import resume
from cover_jax.models.products import product_flops
from cover_jax.planning import costs
from cover_jax.runtime import keys
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from tests import tiny
from tests.pretext_runs import built, check_resumes, check_shards
from tests.test_settings import FILE, read  # noqa: F401  a fixture
from tests.test_train import bits

VTDL = {'name': 'vtdl', 'stride': 1, 'queue_size': 16, 'dim': 8, 'momentum': 0.9}
TABLE = {'time': {'plain': (1, 1)}, 'space': {'left': (1, 1, 2, 1), 'plain': (1, 1, 1, 1)}}
V3S = {'name': 'v3s', 'classes': TABLE, 'output': 8}
STATISTICS = {'name': 'statistics', 'motion_source': 'frame_difference'}
CLASSES = {'name': 'classification', 'label_smoothing': 0.1}
ORDER = {'name': 'order_geometry', 'gap': 1, 'hidden': 8, 'parts': 'apart'}
HDC = {'name': 'hdc', 'queue_size': 8, 'dim': 8, 'stride': 1}
RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 4, 8, 8), 'kind': 'r3d'}

# An objective of a file of its own that looks at its clip as it is: the mean brightness is to be told.
BRIGHTNESS = """
import jax.numpy as jnp
from cover_jax.objectives import Encode, LossOutput, Objective, Shown, Stages, pretext, raw
from cover_jax.objectives.stages import staged

def make(*, encode: Encode, stream: str, width: int) -> Objective:
  head = {'out': pretext.Linear(1)}

  def judge(params, state, batch, encoded, made):
    said_B = head['out'].apply({'params': params['objectives'][stream]['out']}, encoded['clip'].feature_BxD)[:, 0]
    loss_B = (said_B - raw(batch, 'clip').mean(axis=(1, 2, 3, 4)) / 255) ** 2
    return LossOutput(jnp.mean(loss_B), {'seen': state['seen'] + 1}, {'loss': loss_B})

  return staged(
    'brightness', encode, Stages(lambda batch, rng: Shown({'clip': batch['views']['clip']}, rng), judge),
    init_params=lambda rng: pretext.init(head, rng, {'out': (width,)}),
    init_state=lambda params: {'seen': jnp.zeros((), jnp.int32)},
    after_update=lambda params, state: {'seen': state['seen'] + 10}, targets=('flip',),
  )
"""


@pytest.fixture
def brightness(tmp_path, monkeypatch):
  """The objective above, where objectives are looked for."""
  (tmp_path / 'brightness.py').write_text(BRIGHTNESS)
  monkeypatch.setattr(objectives, '__path__', [*objectives.__path__, str(tmp_path)])
  return {'name': 'brightness'}


def config(objective, **changes):
  model = changes.pop('model', None)
  c = tiny.config(**{'model__depth': 1, **changes})
  if model:
    c.model = model
  c.streams.video.objective = objective
  return c


def parts(objective, **changes):
  """(the video stream's batch, params, state of its objective, a jitted gradient of its loss)."""
  experiment, _, batches, _ = tiny.build(config(objective, **changes), jax.devices()[:1])
  task = experiment.objectives['video']

  @jax.jit
  def init(rng):
    params = nn.meta.unbox(init_params(experiment, rng))  # heads start at 0, where no gradient goes on
    params = {**params, 'heads': jax.tree.map(lambda x: jax.random.normal(rng, x.shape), params['heads'])}
    return params, task.init_state(params)

  def loss(params, own, batch):
    out = task.loss(params, own, batch, jax.random.key(5))
    return out.loss, out

  return next(batches(0))['video'], *init(jax.random.key(0)), jax.jit(jax.value_and_grad(loss, has_aux=True))


# ---- The sum.


@pytest.mark.parametrize(('one', 'changes'), [
  pytest.param(VTDL, {}, marks=pytest.mark.slow),
  (CLASSES, {'streams__video__augment': {'color_jitter': {'hue': 0.1}}}),
  pytest.param(V3S, {'model': RESNET}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_list_of_one_is_that_objective_to_the_bit(one, changes):
  batch, params, own, gradient = parts(one, **changes)
  same, nested, nested_own, nested_gradient = parts((one,), **changes)
  name = one['name']
  assert bits(batch) == bits(same)
  assert bits(params['encoder']) == bits(nested['encoder'])
  assert bits(params['objectives']['video']) == bits(nested['objectives']['video'][name])
  assert bits(own) == bits(nested_own[name])
  (loss, out), by = gradient(params, own, batch)
  (nested_loss, nested_out), nested_by = nested_gradient(nested, nested_own, batch)
  assert float(loss) == float(nested_loss) and np.isfinite(loss) and loss != 0
  assert bits(by['encoder']) == bits(nested_by['encoder']) and any(np.any(x) for x in jax.tree.leaves(by['encoder']))
  assert bits(by['objectives']['video']) == bits(nested_by['objectives']['video'][name])
  assert bits(out.state) == bits(nested_out.state[name]) and bits(out.statistics) == bits(nested_out.statistics)
  assert nested_out.measures.keys() == {'loss', *(f'{name}_{key}' for key in out.measures)}
  assert bits(out.measures['loss']) == bits(nested_out.measures['loss'])


def test_two_losses_are_summed_by_weight_and_so_are_gradients_and_statistics(brightness):
  """A shared pass in training mode, of an encoder with batch statistics; against each objective alone."""
  run = lambda *weights: parts(
    tuple({**o, 'weight': w} for o, w in zip((CLASSES, brightness), weights, strict=True)), model=RESNET
  )
  batch, params, own, gradient = run(2.0, 0.5)
  (loss, out), by = gradient(params, own, batch)
  *_, alone_gradient = parts(CLASSES, model=RESNET)
  (class_loss, class_out), class_by = alone_gradient(params, {}, batch)
  *_, alone_gradient = parts(brightness, model=RESNET)
  inner = {**params, 'objectives': {**params['objectives'], 'video': params['objectives']['video']['brightness']}}
  (bright_loss, bright_out), bright_by = alone_gradient(inner, own['brightness'], batch)
  np.testing.assert_allclose(loss, 2 * class_loss + 0.5 * bright_loss, rtol=1e-5)
  close = lambda total, a, b: np.testing.assert_allclose(total, 2 * a + 0.5 * b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, by['encoder'], class_by['encoder'], bright_by['encoder'])
  close(out.measures['loss'], class_out.measures['loss'], bright_out.measures['loss'])
  np.testing.assert_allclose(out.measures['brightness_loss'], bright_out.measures['loss'], rtol=1e-5)
  close_to = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close_to, out.statistics, class_out.statistics)
  assert out.state['classification'] == {} and int(out.state['brightness']['seen']) == 1


@pytest.mark.slow
def test_statistics_of_two_passes_are_their_mean_by_weight():
  """Order and geometry changes the clip, so that there are two passes; it is the first and draws as if alone."""
  entries = ({**ORDER, 'weight': 3.0}, CLASSES)
  batch, params, own, gradient = parts(entries, model=RESNET)
  (_, out), _ = gradient(params, own, batch)

  def alone(entry, rng):
    inner = {**params, 'objectives': {'video': params['objectives']['video'][entry['name']]}}
    task = built(config(entry, model=RESNET)).objectives['video']
    return jax.jit(task.loss)(inner, {}, batch, rng).statistics

  first, second = alone(ORDER, jax.random.key(5)), alone(CLASSES, jax.random.key(6))  # no dropped paths: any key
  mean = lambda total, a, b: np.testing.assert_allclose(total, (3 * a + b) / 4, rtol=1e-4, atol=1e-6)
  jax.tree.map(mean, out.statistics, first, second)
  assert any(np.any(np.abs(a - b) > 1e-3) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


@pytest.mark.slow
def test_objectives_draw_numbers_of_their_own(brightness):
  """The head of an objective does not depend on those beside it, but on whether it is the first."""
  init = lambda *entries: init_params(built(config(entries)), jax.random.key(0))['objectives']['video']
  brightness['view'] = 'anchor'
  both, turned = init(VTDL, brightness), init(brightness, VTDL)
  assert bits(init(VTDL, {**CLASSES, 'view': 'anchor'}, brightness)['brightness']) == bits(both['brightness'])
  assert bits(both['vtdl']) == bits(init(VTDL)['vtdl']) != bits(turned['vtdl'])


# ---- The pass.


@pytest.mark.parametrize(('augment', 'model'), [
  ({}, None), pytest.param({'color_jitter': {'hue': 0.1}}, RESNET, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_pass_over_the_same_clip_is_one_pass(brightness, augment, model):
  def flops(*entries):
    c = config(entries if len(entries) > 1 else entries[0], streams__video__augment=augment, model=model)
    run = built(c)
    params = jax.eval_shape(lambda: init_params(run, jax.random.key(0)))
    own = jax.eval_shape(run.objectives['video'].init_state, params)
    batch = stepping.abstract_batch(run)['video']
    loss = lambda params, own, batch: run.objectives['video'].loss(params, own, batch, jax.random.key(0)).loss
    encoder = run.model.products(4, (16, 16)) * 2 * run.streams['video'].batch_size
    return product_flops(jax.grad(loss, allow_int=True), params, own, batch) / encoder

  one, other, both = flops(CLASSES), flops(brightness), flops(CLASSES, brightness)
  assert 2 < one < 3.1 and 2 < other < 3.1  # forwards and twice backwards, but for the pixels
  assert both < max(one, other) + 0.1
  assert flops(CLASSES, STATISTICS) < one + flops(STATISTICS) - 2  # its labels and heads cost products, too
  mixed = flops({**CLASSES, 'mixup': 0.5}, brightness)  # changes its clips
  assert mixed > one + other - 0.1


def traced(objective, **changes):
  """([(shape, levels) of each training pass of the encoder], the same of teachers', the experiment)."""
  training, teachers, run = [], [], built(config(objective, **changes))
  of_run = {'num_frames': 4, 'size': (16, 16), 'width': run.model.width, 'model': run.model, 'stream': 'video'}

  def encode(params, clip, *, rng=None, levels=()):
    (teachers if rng is None else training).append((clip.shape[:3], levels))
    return run.encode(params, clip, rng=rng, levels=levels)

  given = run.config.streams.video.objective
  given = given if isinstance(given, tuple) else given.to_dict()
  task = objectives.make(given, encode=encode, heads=run.heads, sources=run.sources, where='here', **of_run)
  params = jax.eval_shape(lambda: init_params(run, jax.random.key(0)))
  own, batch = jax.eval_shape(task.init_state, params), stepping.abstract_batch(run)['video']
  training.clear()  # nothing is encoded to make an objective
  jax.eval_shape(lambda *given: task.loss(*given, jax.random.key(0)), params, own, batch)
  return training, teachers, run


def at(view, entry):
  return {**entry, 'view': view}


@pytest.mark.parametrize(('entries', 'passes'), [
  ((V3S, STATISTICS), [(8, 4, 8)]),  # the clips that V3S sampled
  ((CLASSES, STATISTICS, V3S), [(8, 4, 8)]),
  ((VTDL, at('anchor', STATISTICS)), [(16, 4, 16)]),  # anchor and negative, as of VTDL alone
  ((at('negative', CLASSES), at('anchor', STATISTICS), VTDL), [(16, 4, 16)]),
  ((VTDL, at('positive', STATISTICS)), [(16, 4, 16), (8, 4, 16)]),  # which VTDL does not show to the student
  ((HDC, at('anchor', CLASSES), at('shuffled', STATISTICS)), [(24, 4, 16)]),
  (({'name': 'modist', 'stride': 2, 'queue_size': 8, 'min_shift': 1}, at('first', CLASSES)), [(8, 4, 16)]),
  ((ORDER, CLASSES), [(32, 1, 16), (8, 4, 16)]),  # parts of clips are of no use to others
  (({**ORDER, 'parts': 'together'}, at('both', STATISTICS)), [(8, 4, 16)]),
  (({**ORDER, 'parts': 'together'}, CLASSES), [(8, 4, 16), (8, 4, 16)]),  # 'clip' is as the batch has it
  (({**CLASSES, 'mixup': 0.5}, STATISTICS), [(8, 4, 16), (8, 4, 16)]),
])  # fmt: skip
def test_passes_of_the_encoder(entries, passes):
  training, _, _ = traced(entries)
  assert [shape for shape, _ in training] == passes


def primitives(jaxpr):
  """Names of all that a program does, loops within it included once."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in jaxprs_in_params(eqn.params):
      yield from primitives(inner)


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'primitive'), [
  (None, 'scan'), pytest.param(RESNET, 'conv_general_dilated', marks=pytest.mark.slow),
])  # fmt: skip
def test_a_gradient_holds_as_many_passes_as_the_dearest_objective(model, primitive):
  """Counted in its jaxpr: what an encoder has, a loop over layers or convolutions, and nothing beside it has here."""
  maps_of_motion = {**STATISTICS, 'appearance_weight': 0.0}

  def count(*entries):
    run = built(config(entries if len(entries) > 1 else entries[0], model=model))
    params = jax.eval_shape(lambda: nn.meta.unbox(init_params(run, jax.random.key(0))))
    own = jax.eval_shape(run.objectives['video'].init_state, params)
    loss = lambda params, own, batch: run.objectives['video'].loss(params, own, batch, jax.random.key(0)).loss
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, own, stepping.abstract_batch(run)['video'])
    return list(primitives(jaxpr.jaxpr)).count(primitive)

  assert count(V3S, maps_of_motion) == count(V3S) > 0
  assert count(VTDL, at('anchor', maps_of_motion)) == count(VTDL) > count(V3S)  # VTDL has a teacher, too
  apart = count(VTDL, at('positive', maps_of_motion))  # the control
  assert apart - count(VTDL) == count(maps_of_motion) > 0


def test_levels_of_all_readers_are_asked_for(tmp_path, monkeypatch):
  (tmp_path / 'leveled.py').write_text(BRIGHTNESS.replace(', judge)', ", judge, ('block1',))").replace(
    "encoded['clip'].feature_BxD", "encoded['clip'].levels['block1'].mean(axis=(1, 2, 3))"
  ))  # fmt: skip
  monkeypatch.setattr(objectives, '__path__', [*objectives.__path__, str(tmp_path)])
  training, _, _ = traced((CLASSES, {'name': 'leveled'}))
  assert training == [((8, 4, 16), ('block1',))]
  training, _, _ = traced((at('anchor', {'name': 'leveled'}), HDC))
  assert len(training) == 1 and 'block1' in training[0][1]


# ---- What each is given.


def loss_of(entry, batch, params, own, key=5, **changes):
  """The output of one objective alone on a sub-batch."""
  task = built(config(entry, **changes)).objectives['video']
  return jax.jit(task.loss)(params, own, batch, key if isinstance(key, jax.Array) else jax.random.key(key))


def same_each_time(model):
  """Changes of the config for an encoder without random draws."""
  return {'model': model} if model else {'model__drop_path': 0.0}


def inner(params, name):
  return {**params, 'objectives': {**params['objectives'], 'video': params['objectives']['video'][name]}}


@pytest.mark.slow
@pytest.mark.parametrize('model', [None, pytest.param(RESNET, marks=pytest.mark.slow)])
def test_statistics_beside_v3s_are_those_of_the_sampled_clips(model):
  """Both losses are those of the objectives alone: statistics on a batch whose clips are V3S's, raw ones included."""
  entries, changes = (V3S, {**STATISTICS, 'weight': 0.5}), same_each_time(model)
  batch, params, own, gradient = parts(entries, **changes)
  (_, out), _ = gradient(params, own, batch)
  alone = loss_of(V3S, batch, inner(params, 'v3s'), {}, **changes)
  np.testing.assert_allclose(out.measures['v3s_loss'], alone.measures['loss'], rtol=1e-5, atol=1e-6)
  shown = built(config(V3S, **changes)).objectives['video'].stages.show(batch, jax.random.key(5))
  clip, raw = np.asarray(shown.clips['clip']), np.asarray(shown.raw['clip']())
  assert clip.shape == raw.shape == (8, 4, 8, 8, 3) and np.array_equal(clip, raw) and raw.dtype == np.uint8
  sampled = {**batch, 'views': {'clip': clip}, 'raw': {'clip': raw}}
  statistics = loss_of(STATISTICS, sampled, inner(params, 'statistics'), {}, 6, **changes)
  for name in ('loss', 'frame_difference_loss', 'appearance_loss', 'appearance_colour_top1'):
    np.testing.assert_allclose(out.measures[f'statistics_{name}'], statistics.measures[name], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out.loss, alone.loss + 0.5 * statistics.loss, rtol=1e-5)
  if model:
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, out.statistics, alone.statistics)  # one pass moves them once


@pytest.mark.slow
@pytest.mark.parametrize('model', [None, RESNET])
def test_statistics_beside_vtdl_are_those_of_its_anchor(model):
  """VTDL's loss is its own to the rounding. With batch statistics the anchor is normalised as VTDL does it."""
  entries, changes = (at('anchor', STATISTICS), VTDL), same_each_time(model)
  batch, params, own, gradient = parts(entries, **changes)
  (_, out), _ = gradient(params, own, batch)
  key = keys.of(jax.random.key(5), 'objective vtdl')  # it is the second of the list
  alone = loss_of(VTDL, batch, inner(params, 'vtdl'), own['vtdl'], key, **changes)
  np.testing.assert_allclose(out.measures['vtdl_loss'], alone.measures['loss'], rtol=1e-4, atol=1e-5)
  shown = built(config(VTDL, **changes)).objectives['video'].stages.show(batch, key)
  anchor = np.asarray(shown.clips['anchor'])
  assert np.any(np.abs(anchor - batch['views']['anchor']) > 1)  # a still frame is mixed in
  seen = {**batch, 'views': {'clip': anchor}, 'raw': {'clip': batch['views']['anchor']}}
  statistics = loss_of(STATISTICS, seen, inner(params, 'statistics'), {}, **changes)
  same = np.allclose(out.measures['statistics_loss'], statistics.measures['loss'], rtol=1e-4, atol=1e-5)
  assert same == (model is None)
  moves = 'frame_difference_moves'  # labels are the same whatever the pass
  assert bits(out.measures[f'statistics_{moves}']) == bits(statistics.measures[moves])
  if model:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), out.statistics, alone.statistics)


@pytest.mark.parametrize('entry', [
  V3S, {**HDC, 'still_frame': 0.0}, {**ORDER, 'parts': 'together'}, ORDER,
  {**ORDER, 'parts': 'together', 'strategy': 'parallel', 'transform_target': 'aet'},
  {'name': 'modist', 'stride': 2, 'queue_size': 8, 'min_shift': 1}, VTDL, CLASSES,
])  # fmt: skip
def test_raw_pixels_are_those_that_are_shown(entry):
  """Where an objective changes frames, rows or columns, `raw` goes with it: without colours the two are the same."""
  plain = {'order_geometry': {'part_colours': 0.0}, 'vtdl': {'tca_alpha': 0.0}, 'hdc': {'appearance': {}}}
  experiment, _, batches, _ = tiny.build(config({**entry, **plain.get(entry['name'], {})}), jax.devices()[:1])
  task, batch = experiment.objectives['video'], next(batches(0))['video']
  shown = task.stages.show(batch, jax.random.key(3))
  for name, clip in shown.clips.items():
    raw = shown.raw[name]() if name in shown.raw else batch['views'][name]
    assert raw.shape == clip.shape and raw.dtype == np.uint8
    np.testing.assert_allclose(raw, clip, atol=0.51)


@pytest.mark.parametrize(
  'entry',
  [STATISTICS, CLASSES, *(pytest.param(e, marks=pytest.mark.slow) for e in (VTDL, V3S, ORDER, HDC))],
  ids=lambda e: e['name'],
)
def test_examples_that_pad_are_in_no_loss(entry):
  c = config(entry, model__drop_path=0.0)
  experiment, _, batches, _ = tiny.build(c, jax.devices()[:1])
  task, mask = experiment.objectives['video'], np.arange(8) % 3 > 0

  @jax.jit
  def out_of(batch):
    params = nn.meta.unbox(init_params(experiment, jax.random.key(0)))
    return task.loss(params, task.init_state(params), batch, jax.random.key(5))

  out = out_of({**next(batches(0))['video'], 'mask': mask})
  counted = np.asarray(out.measures['loss'])
  assert float(out.loss) == pytest.approx(counted[mask].mean(), rel=1e-5) != pytest.approx(counted.mean(), rel=1e-5)


@pytest.mark.slow
def test_costs_count_a_shared_pass_once(brightness):
  def products(*entries):
    run = built(config(entries))
    return sum(run.model.products(t, tuple(size)) for t, *size in run.encoded_clips('video').values())

  one = products(CLASSES)
  assert products(CLASSES, brightness) == one
  assert products(V3S, CLASSES, brightness) == products(V3S) < one  # the encoder sees the smaller, sampled clip
  assert products({**CLASSES, 'mixup': 0.5}, brightness) == 2 * one
  assert products(VTDL, at('anchor', CLASSES)) == products(at('negative', CLASSES), VTDL) == 3 * one
  run = built(config((VTDL, at('positive', CLASSES))))
  of_vtdl = {f'{v} of vtdl': (4, 16, 16) for v in ('anchor', 'positive', 'negative')}
  assert run.encoded_clips('video') == of_vtdl | {'positive of classification': (4, 16, 16)}
  assert run.view_lengths('video') == dict.fromkeys(('anchor', 'positive', 'negative'), 4)
  assert costs.step_products(built(config((CLASSES, brightness)))) < 1.1 * costs.step_products(built(config(CLASSES)))


# ---- The run.


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path, brightness):
  c = config((CLASSES, {**brightness, 'weight': 2.0}), total_steps=6, checkpoint_every=3, log_every=2)
  text = check_resumes(c, tmp_path)
  for measure in ('loss', 'classification_top1', 'brightness_loss'):
    assert f'train/video/acts/{measure}' in text


@pytest.mark.slow
def test_resumed_with_a_teacher_and_a_queue(tmp_path, brightness):
  entries = ({**VTDL, 'weight': 0.5}, {**CLASSES, 'view': 'anchor'}, {**brightness, 'view': 'anchor'})
  text = check_resumes(config(entries, total_steps=6, checkpoint_every=3, log_every=2), tmp_path)
  assert 'train/video/acts/vtdl_positive' in text


@pytest.mark.slow
def test_sharded_is_unsharded(brightness):
  entries = ({**VTDL, 'weight': 0.5}, {**CLASSES, 'view': 'anchor'}, {**brightness, 'view': 'anchor'})
  check_shards(lambda **changes: config(entries, **changes))


def test_states_views_and_targets_are_those_of_all(brightness):
  run = built(config((VTDL, {**brightness, 'view': 'positive'})))
  task = run.objectives['video']
  params = init_params(run, jax.random.key(0))
  state = task.init_state(params)
  moved = task.after_update(params, state)
  assert int(moved['brightness']['seen']) == 10 and set(state['vtdl']) == {'teacher', 'queue'}
  assert set(task.views(40, np.random.default_rng(0))) == {'anchor', 'positive', 'negative'}
  alone = built(config(VTDL)).objectives['video'].views
  drawn = [jax.tree.map(np.ndarray.tolist, views(40, np.random.default_rng(3))) for views in (task.views, alone)]
  assert drawn[0] == drawn[1] and task.targets == ('flip',)
  assert built(config((V3S, brightness))).objectives['video'].targets == ('flip', 'frames', 'num_frames')
  assert built(config((CLASSES, brightness))).objectives['video'].views is None
  abstract = stepping.abstract_batch(run)['video']
  assert set(abstract['targets']['flip']) == {'anchor', 'positive', 'negative'}


# ---- The config.


ENTRIES = ({'name': 'vtdl', 'weight': 1.0}, {'name': 'classification', 'view': 'anchor', 'weight': 0.5})


def test_a_config_takes_a_list_and_gives_it_back(read):  # noqa: F811
  line = f"""config.sources = {{'a': defaults.source('digits')}}
  config.streams = {{'x': defaults.stream(('a',)), 'y': defaults.stream(('a',), objective={ENTRIES})}}
  config.streams.z = defaults.stream(('a',), objective={{'name': 'vtdl'}})
  config.streams.x.objective = {list(ENTRIES)}
  config.model = {{'patch_size': 8, 'width': 16}}"""
  given = read(FILE.format(line=line))
  assert given.streams.x.objective == given.streams.y.objective == ENTRIES
  text = json.loads(given.to_json())
  again = ml_collections.ConfigDict(text)  # as a checkpoint has it
  assert again.streams.y.objective == list(ENTRIES)
  settings.check(again)
  assert resume.compare(text, given.to_dict()) == ([], [])
  changed, _ = resume.compare(text, read(FILE.format(line=line), 'streams.y.objective[1].weight=0.25').to_dict())
  assert len(changed) == 1 and changed[0].startswith('streams.y.objective')
  flags = [
    "streams.x.objective={'name': 'vtdl', 'stride': 2}", "streams.z.objective=({'name': 'vtdl'}, {'name': 'v3s'})",
    'streams.y.objective[1].weight=0.25',
  ]  # fmt: skip
  by_flag = read(FILE.format(line=line), *flags).streams
  assert by_flag.x.objective.to_dict() == {'name': 'vtdl', 'stride': 2}
  assert by_flag.z.objective == ({'name': 'vtdl'}, {'name': 'v3s'})
  assert by_flag.y.objective[1]['weight'] == 0.25
  by_flag.x.objective.stride = 3
  line += '\n  config.streams.x.objective = {"name": "vtdl", "stride": 4}'
  assert read(FILE.format(line=line), 'streams.x.objective.stride=5').streams.x.objective.stride == 5


def test_mixing_is_for_those_that_have_labels():
  augment = {'mixup': 0.4}
  run = built(config(ENTRIES, streams__video__augment=augment))
  assert 'anchor of classification' in run.encoded_clips('video')  # mixed clips have a pass of their own
  with pytest.raises(UserError, match=r"objective\[0\] has no key 'mixup'"):
    built(config((VTDL,), streams__video__augment=augment))


@pytest.mark.parametrize(('entries', 'message'), [
  ((), r'objective is \(\): expected .*tuple of at least'),
  ((VTDL, {'name': 'vtdl2'}), r"objective\[1\].name is 'vtdl2': expected 'classification', "),
  ((VTDL, {'weight': 1.0}), r"objective\[1\] lacks 'name'"),
  ((VTDL, 'v3s'), 'objective is .*: expected .*tuple of at least'),
  ((VTDL, VTDL), "has 'vtdl' twice"),
  (({**VTDL, 'weight': 0},), r'objective\[0\].weight is 0: expected a finite number above 0'),
  (({**VTDL, 'weight': '1'},), r"objective\[0\].weight is '1'"),
  (({**VTDL, 'wieght': 1.0},), r"objective\[0\] has no key 'wieght': did you mean 'weight'"),
  (({**VTDL, 'stride': 0},), r'objective\[0\].stride is 0'),
  ({**VTDL, 'weight': 1.0}, "objective has no key 'weight'"),
  ((VTDL, CLASSES), "'classification', which looks at the view 'clip', but others name 'anchor', 'positive'"),
  ((VTDL, {**CLASSES, 'view': 'ankor'}), "looks at the view 'ankor', but others name 'anchor'"),
  (({**CLASSES, 'view': 'anchor'},), "looks at the view 'anchor', but others name 'clip'"),
  ((V3S, {**CLASSES, 'view': 'v3s'}), "looks at the view 'v3s', but others name 'clip'"),
  ((ORDER, at('both 0', CLASSES)), "looks at 4 frames, but the view 'both 0' has 1"),
  (({**ORDER, 'parts': 'together'}, at('both', {**STATISTICS, 'motion_source': 'flow', 'released': ('flip',)})),
   "asks how its clip was cut .flip., but 'both' is made on the device"),
  (({**VTDL, 'view': 'anchor'},), "gives 'vtdl' the view 'anchor', but it has views of its own"),
  ((V3S, {'name': 'order_geometry', 'gap': 2, 'hidden': 8}), "different frames for the view 'clip'"),
  ((VTDL, {'name': 'hdc', 'queue_size': 8, 'dim': 8}), "'vtdl' and 'hdc', which choose different frames for the view"),
])  # fmt: skip
def test_mistakes_are_one_sentence(entries, message):
  with pytest.raises(UserError, match=message) as error:
    built(config(entries))
  assert '\n' not in str(error.value) and len(str(error.value)) < 500
  if not re.search('different|looks at|of its own|made on', message):  # seen before any data is opened
    with pytest.raises(UserError, match=message):
      settings.check(config(entries))


def test_a_mistake_that_is_seen_late_is_named_by_its_place_in_the_list():
  with pytest.raises(UserError, match=r'^config\.streams\.video\.objective\[1\]\.output is 999 x 999'):
    built(config((CLASSES, {**V3S, 'output': 999})))


def test_two_that_choose_the_same_frames_share_the_view(tmp_path, monkeypatch):
  """Also where they draw at random: each view is sampled once."""
  sampler = """
import numpy as np
from data_pipelines.contract import UserError
from cover_jax.objectives import Objective
def make(*, stride: int = 1):
  def views(n, rng):
    if n < 3: raise UserError('too short')
    return {'clip': (int(rng.random() * n) if rng is not None else 0) + STRIDE * np.arange(4) % n}
  return Objective(lambda *a: None, views=views)
"""
  monkeypatch.setattr(objectives, '__path__', [*objectives.__path__, str(tmp_path)])
  for name, stride in (('one', 1), ('same', 1), ('quick', 2)):
    (tmp_path / f'{name}.py').write_text(sampler.replace('STRIDE', str(stride)))
  views = built(config(({'name': 'one'}, {'name': 'same'}))).objectives['video'].views
  alone = built(config({'name': 'one'})).objectives['video'].views
  for n in (4, 9, 200):
    a, b = (v(n, np.random.default_rng(n)) for v in (views, alone))
    assert a.keys() == b.keys() and a['clip'].tolist() == b['clip'].tolist()
  with pytest.raises(UserError, match="'one' and 'quick', which choose different frames"):
    built(config(({'name': 'one'}, {'name': 'quick'})))


def test_a_default_stream_keeps_what_it_was():
  stream = defaults.stream(('a',), objective={'label_smoothing': 0.1})
  assert stream.objective.to_dict() == {'name': 'classification', 'label_smoothing': 0.1}
  stream.update({'objective': ENTRIES})
  assert stream.objective == ENTRIES
  stream.update(objective={'name': 'vtdl'})
  stream.objective.stride = 2
  assert stream.objective.to_dict() == {'name': 'vtdl', 'stride': 2}
  with pytest.raises(TypeError):
    stream.num_frames = (1, 2)
