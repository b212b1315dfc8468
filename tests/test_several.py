"""Several objectives of one stream: their losses are summed, what is the same for them is done once."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import defaults
from cover_jax import objectives
from cover_jax.experiment import settings
from cover_jax.experiment.state import init_params
from cover_jax.jobs import resume
from cover_jax.models.products import product_flops
from cover_jax.objectives import several
from cover_jax.planning import costs
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
RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 4, 8, 8), 'kind': 'r3d'}

# An objective of a file of its own that looks at its clip as it is: the mean brightness is to be told.
BRIGHTNESS = """
import jax.numpy as jnp
from cover_jax.objectives import Encode, LossOutput, Objective, pretext, raw

def make(*, encode: Encode, stream: str, width: int) -> Objective:
  head = {'out': pretext.Linear(1)}

  def loss(params, state, batch, rng):
    encoded = encode(params['encoder'], batch['views']['clip'].astype(jnp.float32), rng=rng)
    said_B = head['out'].apply({'params': params['objectives'][stream]['out']}, encoded.feature_BxD)[:, 0]
    loss_B = (said_B - raw(batch, 'clip').mean(axis=(1, 2, 3, 4)) / 255) ** 2
    return LossOutput(jnp.mean(loss_B), {'seen': state['seen'] + 1}, {'loss': loss_B}, encoded.statistics)

  return Objective(
    loss, lambda rng: pretext.init(head, rng, {'out': (width,)}), lambda params: {'seen': jnp.zeros((), jnp.int32)},
    after_update=lambda params, state: {'seen': state['seen'] + 10}, targets=('flip',), as_given=True,
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


def test_statistics_of_two_passes_are_their_mean_by_weight():
  """V3S changes the clip, so that there are two passes; V3S is the first and draws as if it were alone."""
  entries = ({**V3S, 'weight': 3.0}, CLASSES)
  batch, params, own, gradient = parts(entries, model=RESNET)
  (_, out), _ = gradient(params, own, batch)

  def alone(entry, rng):
    inner = {**params, 'objectives': {'video': params['objectives']['video'][entry['name']]}}
    task = built(config(entry, model=RESNET)).objectives['video']
    return jax.jit(task.loss)(inner, {}, batch, rng).statistics

  first, second = alone(V3S, jax.random.key(5)), alone(CLASSES, jax.random.key(6))  # no dropped paths: any key
  mean = lambda total, a, b: np.testing.assert_allclose(total, (3 * a + b) / 4, rtol=1e-4, atol=1e-6)
  jax.tree.map(mean, out.statistics, first, second)
  assert any(np.any(np.abs(a - b) > 1e-3) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_objectives_draw_numbers_of_their_own(brightness):
  """The head of an objective does not depend on those beside it, but on whether it is the first."""
  init = lambda *entries: init_params(built(config(entries)), jax.random.key(0))['objectives']['video']
  brightness['view'] = 'anchor'
  both, turned = init(VTDL, brightness), init(brightness, VTDL)
  assert bits(init(VTDL, {**CLASSES, 'view': 'anchor'}, brightness)['brightness']) == bits(both['brightness'])
  assert bits(both['vtdl']) == bits(init(VTDL)['vtdl']) != bits(turned['vtdl'])


# ---- The pass.


@pytest.mark.parametrize(('augment', 'model'), [({}, None), ({'color_jitter': {'hue': 0.1}}, RESNET)])
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


def test_levels_and_modes_of_a_pass():
  calls = []
  encode = several._sharing(lambda params, clip, **options: calls.append(options) or len(calls))
  params, clip, rng = {}, jnp.zeros(3), jax.random.key(0)
  with several._shared_passes():
    first = encode(params, clip, rng=rng, levels=('a', 'b'))
    assert encode(params, clip, rng=jax.random.key(1), levels=('b',)) == encode(params, clip, rng=rng) == first
    others = [
      encode(params, clip), encode(params, clip + 0, rng=rng), encode({}, clip, rng=rng),
      encode(params, clip, rng=rng, levels=('c',)),
    ]  # fmt: skip
    assert others == [2, 3, 4, 5]
  assert encode(params, clip) == 6 and encode(params, clip) == 7  # outside nothing is kept
  with several._shared_passes():
    assert encode(params, clip) == 8


def test_what_says_that_it_takes_its_views_as_given_does(brightness):
  """`as_given`, of every kind of objective: all clips that the encoder is given are views of the batch."""
  for entry in (
    CLASSES,
    {**CLASSES, 'mixup': 0.5},
    VTDL,
    V3S,
    STATISTICS,
    {**STATISTICS, 'released': ('frames',)},
    brightness,
  ):
    c, found = config(entry), []
    run = built(c)

    def trace(params, own, batch, found=found, run=run, c=c):
      views = {name: clip.astype(jnp.float32) for name, clip in batch['views'].items()}

      def encode(params, clip, **options):
        found.append(any(clip is view for view in views.values()))
        return run.encode(params, clip, **options)

      of_run = {'num_frames': 4, 'size': (16, 16), 'width': 16, 'model': run.model, 'stream': 'video', 'where': ''}
      made = objectives.make(
        c.streams.video.objective.to_dict(), encode=encode, heads=run.heads, sources=run.sources, **of_run
      )
      return made.loss(params, own, {**batch, 'views': views, 'raw': batch['views']}, jax.random.key(0)).loss

    task = run.objectives['video']
    params = jax.eval_shape(lambda run=run: init_params(run, jax.random.key(0)))
    jax.eval_shape(trace, params, jax.eval_shape(task.init_state, params), stepping.abstract_batch(run)['video'])
    assert found and all(found) == task.as_given, entry


def test_costs_count_a_shared_pass_once(brightness):
  def products(*entries):
    run = built(config(entries))
    return sum(run.model.products(t, (16, 16)) for t in run.encoded_lengths('video').values())

  one = products(CLASSES)
  assert products(CLASSES, brightness) == one
  assert products(V3S, CLASSES, brightness) == 2 * one
  assert products(VTDL, {**CLASSES, 'view': 'anchor'}) == 4 * one
  run = built(config((VTDL, {**CLASSES, 'view': 'anchor'})))
  assert run.encoded_lengths('video') == {f'{v} of vtdl': 4 for v in ('anchor', 'positive', 'negative')} | {'anchor': 4}
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
  assert not run.objectives['video'].as_given
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
  (({**VTDL, 'wieght': 1.0},), r"objective\[0\] has no key 'wieght'"),
  (({**VTDL, 'stride': 0},), r'objective\[0\].stride is 0'),
  ({**VTDL, 'weight': 1.0}, "objective has no key 'weight'"),
  ((VTDL, CLASSES), "'classification', which looks at the view 'clip', but others name 'anchor', 'positive'"),
  ((VTDL, {**CLASSES, 'view': 'ankor'}), "looks at the view 'ankor', but others name 'anchor'"),
  (({**CLASSES, 'view': 'anchor'},), "looks at the view 'anchor', but others name 'clip'"),
  (({**VTDL, 'view': 'anchor'},), "gives 'vtdl' the view 'anchor', but it has views of its own"),
  ((V3S, {'name': 'order_geometry', 'gap': 2, 'hidden': 8}), "different frames for the view 'clip'"),
  ((VTDL, {'name': 'hdc', 'queue_size': 8, 'dim': 8}), "'vtdl' and 'hdc', which choose different frames for the view"),
])  # fmt: skip
def test_mistakes_are_one_sentence(entries, message):
  with pytest.raises(UserError, match=message) as error:
    built(config(entries))
  assert '\n' not in str(error.value) and len(str(error.value)) < 500
  if not re.search('different|looks at|of its own', message):  # seen before any data is opened
    with pytest.raises(UserError, match=message):
      settings.check(config(entries))


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
