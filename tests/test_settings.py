"""What a config may say: each key's type and range, keys that there are not, and mistakes in a config file."""

import copy
import functools
import json
import pathlib
import random

import jax
import ml_collections
import numpy as np
import pytest

from configs import defaults, digits_cover
from cover_jax import command_line, export, main, plan, predict
from cover_jax.experiment import build as experiment
from cover_jax.experiment import settings, state
from cover_jax.jobs import resume
from cover_jax.models import encoder as encoders
from cover_jax.training import step as stepping
from data_pipelines import build as build_command
from data_pipelines import declared, flags, inspect
from data_pipelines.clips.settings import SOURCE
from data_pipelines.contract import SourceInfo, UserError

CONFIGS = [
  f'{path}:k400' if path.stem == 'transfer' else str(path)
  for path in sorted(pathlib.Path(defaults.__file__).parent.glob('*.py'))
  if path.stem not in ('__init__', 'defaults')
]
NAN, INF = float('nan'), float('inf')


def changed(**changes) -> ml_collections.ConfigDict:
  """The debug config with keys ('__' for dots) set to anything."""
  values = copy.deepcopy(digits_cover.get_config('debug').to_dict())
  for path, value in changes.items():
    *parents, last = path.split('__')
    functools.reduce(lambda node, key: node[key], parents, values)[last] = value
  return ml_collections.ConfigDict(values, type_safe=False)


def infos(config) -> list[SourceInfo]:
  return [
    SourceInfo(name, 'image' if name == 'digits' else 'video', 400 + i, tuple(f'{name} {k}' for k in range(3 + i)))
    for i, name in enumerate(config.sources)
  ]


def build(config, with_state: bool = True) -> None:
  """As far as a run can be made without data: its parts, the optimizer and the shapes of its state."""
  run = experiment.build(config, infos(config))
  optimizer, schedule = stepping.make_optimizer(run)
  assert np.isfinite(schedule(0)) and np.isfinite(schedule(run.total_steps - 1))
  if with_state:
    jax.eval_shape(lambda: state.init_state(run, optimizer, jax.random.key(config.seed)))
  stepping.abstract_batch(run)


REFUSED = [
  ('seed', 99999999999999999999), ('seed', -1), ('seed', 2**32), ('seed', True), ('seed', 1.0), ('seed', None),
  ('optimizer__learning_rate', NAN), ('optimizer__learning_rate', INF), ('optimizer__learning_rate', -1e-3),
  ('optimizer__learning_rate', 0.0), ('optimizer__learning_rate', 1e39), ('optimizer__learning_rate', 10**400),
  ('optimizer__clip_norm', -1.0), ('optimizer__weight_decay', NAN), ('optimizer__weight_decay', -1.0),
  ('optimizer__options', {'b2': 2.0}), ('optimizer__options', {'beta2': 0.9}), ('optimizer__options', 3),
  ('optimizer__learning_rate_rules', (('.*', -1.0),)), ('optimizer__learning_rate_rules', (('(', 1.0),)),
  ('optimizer__learning_rate_rules', ()), ('optimizer__weight_decay_rules', (('.*', NAN),)),
  ('optimizer__final_fraction', 7.0), ('optimizer__warmup_steps', -5), ('optimizer__warmup_epochs', -0.5),
  ('optimizer__schedule', 'linear'), ('optimizer__name', 'adamm'), ('optimizer__layer_decay', 0.0),
  ('optimizer__layer_decay', 1.5), ('optimizer__decay_epochs', (-1.0,)), ('optimizer__decay_factor', NAN),
  ('ema_decay', 1.0), ('ema_decay', 2.0), ('ema_decay', -0.5), ('ema_decay', NAN), ('ema_decay', True),
  ('total_epochs', NAN), ('total_epochs', INF), ('total_epochs', -1.0), ('total_steps', -1), ('total_steps', 2**31),
  ('batch_size', 0), ('batch_size', -8), ('batch_size', 8.0), ('batch_size', np.int64(8)), ('batch_multiple', 0),
  ('batch_multiple', -8), ('accumulation_steps', 0), ('eval_batch_size', 0), ('log_every', 0), ('log_every', -1),
  ('checkpoint_every', -1), ('keep_every', -1), ('eval_every', -1), ('profile_at_step', -1), ('keep_checkpoints', 0),
  ('keep_best', 'test/k400/top1'), ('keep_best', 'test/objects/top2'), ('eval_missing', 'ignore'),
  ('eval_params', 'both'), ('eval_params', 'ema'), ('allow_overlap', 1), ('dtype', 'float99'), ('dtype', None),
  ('pixel_std', (0.5, 0.5, 0.0)), ('pixel_std', (1e-300,) * 3), ('pixel_mean', (0.5, 0.5)),
  ('pixel_mean', ('a', 'b', 'c')), ('pixel_mean', 0.5),
  ('model__depth', 0), ('model__init_std', NAN), ('model__widht', 16), ('model__remat', 'some'), ('model', None),
  ('mixture__weights', {'objects': 'a'}), ('mixture__weights', {'objects': -1.0}), ('mixture__temperature', 0.0),
  ('mixture__temperature', NAN), ('mixture__one_source_a_step', 'yes'), ('mixture__weigths', {}),
  ('init_from__params', 'best'), ('init_from__temporal_attention', 'twice'), ('init_from__path', None),
  ('init_from__heads', {'objects': 1}), ('mesh__fsdp', 0), ('mesh__data', -2), ('mesh__fdsp', 1),
  ('logical_axis_rules', (('embed', 'model'),)), ('logical_axis_rules', None), ('total_step', 5),
  ('streams__video__size', 0), ('streams__video__size', -32), ('streams__video__size', (32,)),
  ('streams__video__num_frames', 0), ('streams__video__batch_size', -8), ('streams__video__loss_weight', -1.0),
  ('streams__video__loss_weight', NAN), ('streams__video__sources', ('objects', 'motions', 'moments', 'objects')),
  ('streams__video__sources', 'objects'), ('streams__video__sources', ()), ('streams__video__num_frame', 4),
  ('streams__video__sources', ('objects', 'motoins', 'moments')), ('streams__video__sources', ('objects', 'moments')),
  ('streams__video__objective', {'name': 'classify'}), ('streams__video__objective', {}),
  ('streams__video__objective', {'name': 'classification', 'smoothing': 0.1}),
  ('streams__video__objective', {'name': 'classification', 'label_smoothing': 1.0}),
  ('streams__video__objective', {'name': 'classification', 'mixup': -1}),
  ('streams__video__objective', {'name': 'vtdl', 'momentum': NAN}), ('streams__video__objective', 'vtdl'),
  ('streams__video__augment', {'colour': {}}), ('streams__video__augment', {'mixup': NAN}),
  ('streams__video__augment', {'color_jitter': {'hue': 0.6}}), ('streams__video', None), ('streams', {}),
  ('sources__objects__sampler', 'random'), ('sources__objects__sampeler', 'dense'), ('sources__objects__stride', 1.5),
  ('sources__objects__fps', -1.0), ('sources__objects__fps', INF), ('sources__objects__crop_scale', (0.5, 2.0)),
  ('sources__objects__crop_ratio', (0.0, 1.0)), ('sources__objects__short_side', (20, 16)),
  ('sources__objects__rotation', 181.0), ('sources__objects__flip', 'yes'), ('sources__objects__flip', None),
  ('sources__objects__test_clips', 0), ('sources__objects__test_crops', 2), ('sources__objects__loop', 0),
  ('sources__objects__test_crop_fraction', 0.0), ('sources__objects__label_fraction', 5.0),
  ('sources__objects__exclude', 'kinetics/400:validation'), ('sources__objects__dataset', ''),
  ('sources__objects__train', None), ('sources__objects', 1), ('sources', {}), ('sources', {1: {}}),
  ('sources', {'a b': {}}), ('sources', {'a' * 101: {}}), ('streams__video__num_frames', 10**9),
  ('frozen__pool', 'max'), ('frozen__clips', 0), ('frozen__held_out', 1.0), ('frozen__label_fractions', (5,)),
  ('frozen__recall_at', ()), ('frozen__penalties', (0.0,)), ('frozen__temperature', 0.0), ('frozen__neighbours', 0),
]  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), REFUSED, ids=[f'{key}={value!r:.40}' for key, value in REFUSED])
def test_refused_before_any_data_is_opened(key, value):
  with pytest.raises(UserError) as error:
    settings.check(changed(**{key: value}))
  words = str(error.value)
  assert '\n' not in words and words.endswith(('.', '?'))
  assert key.split('__')[-1] in words


def test_message_names_key_value_and_what_was_expected():
  with pytest.raises(UserError) as error:
    settings.check(changed(optimizer__learning_rate=NAN))
  assert str(error.value) == 'config.optimizer.learning_rate is nan: expected a finite number above 0.'
  with pytest.raises(UserError) as error:
    settings.check(changed(streams__video__size=-32))
  assert str(error.value) == (
    'config.streams.video.size is -32: expected a whole number of at least 1, or a tuple of 2 values, each a whole '
    'number of at least 1.'
  )


ALLOWED = [
  ('mixture__temperature', INF), ('mixture__temperature', 2), ('streams__video__size', (16, 32)),
  ('streams__video__size', [16, 32]), ('streams__video__loss_weight', 1), ('streams__video__loss_weight', 0.5),
  ('sources__objects__flip', 'labels'), ('sources__objects__flip', True), ('sources__objects__short_side', (40, 50)),
  ('sources__objects__short_side', None), ('sources__motions__label_key', None), ('sources__motions__label_key', 'y'),
  ('sources__objects__exclude', ['kinetics/400:validation']), ('total_epochs', 1), ('checkpoint_every', 0),
  ('optimizer__clip_norm', 0), ('optimizer__learning_rate_rules', [['encoder/', 0], ['.*', 1.0]]),
  ('optimizer__options', {'b1': 0.8, 'b2': 0.9, 'eps': 1e-6, 'nesterov': True, 'mu_dtype': 'bfloat16'}),
  ('seed', 2**32 - 1), ('keep_best', 'test/objects/top1'), ('optimizer__schedule', 'constant'),
  ('logical_axis_rules', json.loads(json.dumps(defaults.get_config().logical_axis_rules))),
]  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), ALLOWED, ids=[f'{key}={value!r:.40}' for key, value in ALLOWED])
def test_allowed(key, value):
  settings.check(changed(**{key: value}))


def test_every_kind_refuses_what_is_nothing_like_it():
  """All keys of all tables: None, a function, a dict of a dict, a NaN are accepted where their kind says so."""
  odd = (None, print, {'a': {'b': object()}}, NAN, INF, -INF, [[]], b'x', 1j, np.float32(1), 10**30, {1: 2}, '\0')

  def walk(keys, where):
    for name, key in keys.items():
      if isinstance(key, declared.Key):
        for value in odd:
          assert key.kind.holds(value) in (True, False), (where, name, value)
        if key.default not in (declared.REQUIRED, declared.OPTIONAL) and name not in ('sources', 'streams'):
          assert key.kind.holds(key.default), (where, name)
      else:
        walk(key, f'{where}.{name}')

  walk(settings.RUN, 'config')
  walk(settings.STREAM, 'stream')
  walk(SOURCE, 'source')


def leaves(values, path=()):
  for key, value in values.items():
    yield (*path, key)
    if isinstance(value, dict):
      yield from leaves(value, (*path, key))


def odd_value(chance: random.Random):
  """Something that somebody might set, or not."""
  numbers = (0, 1, 2, 3, 8, 16, -1, -8, 0.0, 0.5, 1.0, 8.0, -0.5, 1e-40, 1e30, 1e300, 2**31, 10**25, NAN, INF, -INF)
  words = ('', 'a', '.*', '(', 'adam', 'sgd', 'lion', 'constant', 'steps', 'cls', 'raw', 'ema', 'labels', 'objects',
           'segments', 'full', 'joint', 'space', 'bfloat16', 'float32', 'train', 'test/objects/top1')  # fmt: skip
  return chance.choice([
    lambda: chance.choice(numbers),
    lambda: chance.choice(numbers),
    lambda: chance.choice(words),
    lambda: chance.choice((None, True, False)),
    lambda: chance.choice((np.int64(3), np.float32(0.5), np.float64(0.5), np.array([1, 2]), np.bool_(True), 2j, b'x')),
    lambda: tuple(chance.choice(numbers) for _ in range(chance.randrange(4))),
    lambda: [chance.choice(words) for _ in range(chance.randrange(3))],
    lambda: ((chance.choice(words), chance.choice(numbers)),),
    lambda: {chance.choice(words): chance.choice(numbers)},
    dict,
    lambda: {'name': chance.choice(('classification', 'vtdl', 'other'))},
    lambda: print,
  ])()  # fmt: skip


def near(chance: random.Random, value):
  """Another value of the same type, which may be one that the key may have."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return chance.choice((0, 1, 2, 3, 4, 5, 16, 24, 32, 48, 64, 100, 1000, 10**6, 2**31 - 1, 2 * value, value - 1))
  if isinstance(value, float):
    return chance.choice((0.0, 1e-30, 0.01, 0.3, 0.999, 1.0, 1.5, 9.0, 1e6, 1e38, 2 * value, -value, round(value)))
  if isinstance(value, tuple | list):
    return chance.choice((value[::-1], value * 2, value[:1], value[1:], list(value), ()))
  return odd_value(chance)


def fuzzed(chance: random.Random) -> tuple[str, ml_collections.ConfigDict]:
  values = copy.deepcopy(digits_cover.get_config('debug').to_dict())
  path = chance.choice(list(leaves(values)))
  node = functools.reduce(lambda node, key: node[key], path[:-1], values)
  key, what = path[-1], chance.random()
  if what < 0.5:
    node[key] = odd_value(chance)
  elif what < 0.9:
    node[key] = near(chance, node[key])
  elif what < 0.95:
    del node[key]
  else:
    node[f'{key}s'] = node[key]
  config = ml_collections.ConfigDict(values, type_safe=False, allow_dotted_keys=True)
  return f'{".".join(path)} = {node.get(key, "(deleted)")!r}', config


def fuzz(seeds, monkeypatch) -> tuple[int, int]:
  """(accepted, tried); the same model is traced once."""
  known, check = set(), experiment._check_model

  def once(*parts):
    if repr(parts) not in known:
      check(*parts)
      known.add(repr(parts))

  monkeypatch.setattr(experiment, '_check_model', once)
  accepted = 0
  for seed in seeds:
    what, config = fuzzed(random.Random(seed))
    try:
      settings.check(config)
      build(config, with_state=what.split('.')[0] in ('model', 'optimizer', 'streams', 'ema_decay = '))
      accepted += 1
    except UserError as error:
      assert '\n' not in str(error), (seed, what)
    except Exception as error:
      raise AssertionError(f'seed {seed}, {what}: {type(error).__name__}: {error}') from error
  return accepted, len(seeds)


def test_random_values_of_random_types_build_a_run_or_are_one_sentence(monkeypatch):
  accepted, tried = fuzz(range(250), monkeypatch)
  assert tried / 20 < accepted < tried / 2


@pytest.mark.slow
def test_many_random_values(monkeypatch):
  """`pytest -m slow -s tests/test_settings.py`"""
  accepted, tried = fuzz(range(1000, 4000), monkeypatch)
  print(f'{accepted} of {tried} accepted, seeds 1000 to 3999')


# Config files and flags.

FILE = """
from configs import defaults, digits_cover

def get_config(variant=''):
  config = digits_cover.get_config('debug')
  {line}
  return config
"""


def reader(path):
  """(text of the file, flags) -> its config, as a command reads it."""
  parser = flags.parser('of a test', '')
  command_line.add_config(parser)

  def run(text, *settings_):
    path.write_text(text)
    return command_line.parse(parser, [f'--config={path}', *(f'--config.{s}' for s in settings_)]).config

  return run


@pytest.fixture
def read(tmp_path, monkeypatch):
  """`reader` of a config file."""
  monkeypatch.syspath_prepend(str(tmp_path))
  return reader(tmp_path / 'experiment.py')


@pytest.fixture
def read_json(tmp_path):
  """`reader` of a run's config.json."""
  return reader(tmp_path / 'config.json')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (
      'config.total_step = 5',
      r"experiment\.py, line 6, `config.total_step = 5`: there is no key 'total_step', did you "
      "mean 'total_steps'",
    ),
    ("config.mixture.weigths = {'objects': 1.0}", "'weigths', did you mean 'weights'"),
    ('config.streams.video.num_frame = 4', "'num_frame', did you mean 'num_frames'"),
    ('config.sources.objects.sampeler = 1', "'sampeler', did you mean 'sampler'"),
    ("config.optimizer.update({'learning_rte': 1.0})", "'learning_rte', did you mean 'learning_rate'"),
    ("defaults.source('x', sampeler='dense')", r"source\('x'\) has no key 'sampeler': did you mean 'sampler'"),
    ("defaults.stream(('x',), num_frame=2)", r"stream\(\('x',\)\) has no key 'num_frame': did you mean 'num_frames'"),
    ("defaults.stream('x')", r"stream\('x'\).sources is 'x': expected a tuple"),
    ("defaults.source('x', stride=0)", r"source\('x'\).stride is 0: expected a whole number of at least 1"),
    ("config.sources = {'objects': {'dataset': 'x'}}", "config.sources.objects lacks 'data_dir', .*begin with"),
    ("config.sources = {'objects': {'dataset': 'x', 'sampeler': 1}}", "objects has no key 'sampeler'"),
    ("config.optimizer = {'name': 'sgd'}", "config.optimizer lacks 'options', 'learning_rate'"),
    ("config.seed = 'a'", 'line 6, `config.seed = .a.`: TypeError: .*seed'),
    ('config.seed = {}', 'seed'),
    ('config.optimizer.learning_rate = 10**400', 'OverflowError'),
    ('config.seed = (', "line 6, .*SyntaxError: '\\(' was never closed"),
    ('nothing.at_all()', "line 6, .*NameError: name 'nothing' is not defined"),
    ('return config.to_dict()', 'gives a dict: expected what configs.defaults.get_config'),
    ('return None', 'gives a NoneType'),
    ("config.model = {'widht': 16}", "config.model has no key 'widht': did you mean 'width'"),
    (
      "config.model = {'name': 'resnet3d', 'depth': 2}",
      "key 'depth', which is of timesformer, .* and not of 'resnet3d'",
    ),
  ],
)
def test_mistakes_in_a_config_file_are_one_sentence(read, line, message):
  with pytest.raises(UserError, match=message) as error:
    read(FILE.format(line=line))
  assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_a_config_of_ones_own_is_checked_the_same_way(read):
  own = 'import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({})\n'
  with pytest.raises(UserError, match="config has no key 'sorces': did you mean 'sources'"):
    read(own.format("{'sorces': 1}"))
  with pytest.raises(UserError, match="config lacks 'sources', 'streams'"):
    read(own.format("{'seed': 1}"))
  values = digits_cover.get_config('debug').to_dict()
  assert read(own.format(repr(values))).to_dict() == values


def test_what_a_file_may_assign(read):
  line = """config.sources = {'a': defaults.source('digits', flip='labels', fps=30), 'b': defaults.source('digits')}
  config.streams = {}
  config.streams.image = defaults.stream(['a'], num_frames=1, size=(32, 40), loss_weight=1)
  config.streams.more = defaults.stream(('b',), num_frames=1, size=32, augment={'mixup': 0.8})
  config.streams.more.augment.color_jitter = {'hue': 0.1}
  config.streams.more.objective.label_smoothing = 0.1
  config.sources.b.short_side = (256, 320)
  config.model = {'patch_size': 8, 'width': 16}
  config.model.depth = 2
  config.mixture.weights = {'a': 2.0, 'b': 1}
  config.optimizer.options = {'b2': 0.9}"""
  config = read(FILE.format(line=line))
  assert config.sources.a.flip == 'labels' and config.sources.a.fps == 30.0 and config.sources.b.flip is False
  assert config.streams.image.size == (32, 40) and config.sources.b.short_side == (256, 320)


def test_flags_set_what_may_be_of_several_types(read):
  config = read(
    FILE.format(line='pass'),
    'sources.motions.flip=labels',
    'sources.objects.flip=true',
    'sources.motions.short_side=(256, 320)',
    'sources.objects.short_side=None',
    'streams.video.size=(32, 40)',
    'streams.image.size=48',
    'streams.video.loss_weight=0.5',
    'optimizer.learning_rate_rules=(("encoder/", 0.0), (".*", 1.0))',
  )
  assert (config.sources.motions.flip, config.sources.objects.flip) == ('labels', True)
  assert (config.sources.motions.short_side, config.sources.objects.short_side) == ((256, 320), None)
  assert (config.streams.video.size, config.streams.image.size) == ((32, 40), 48)
  assert (config.streams.video.loss_weight, config.streams.image.loss_weight) == (0.5, None)


@pytest.mark.parametrize(
  ('setting', 'value'),
  [
    ('model.drop_path=0.2', 0.2),  # the config file leaves these at their defaults
    ('model.attention=joint', 'joint'),
    ('model.gelu_approximate', True),
    ('nomodel.gelu_approximate', False),
    ('sources.objects.label_key=None', None),
    ('sources.objects.frames_key=video', 'video'),
    ('optimizer.options.b1=0.5', 0.5),
    ('streams.video.augment.color_jitter.hue=0.1', 0.1),
    ('streams.video.objective.label_smoothing=0.1', 0.1),
    ('mixture.weights.objects=2', 2),
    ('heads.only.objects.name=attentive', 'attentive'),
  ],
)
def test_flags_set_keys_that_the_file_does_not(read, setting, value):
  if setting.startswith('no'):
    setting = setting.removeprefix('no') + '=False'
  config = read(FILE.format(line='pass'), setting).to_dict()
  path = setting.partition('=')[0].split('.')
  assert functools.reduce(lambda node, key: node[key], path, config) == value
  assert functools.reduce(lambda node, key: node[key], path[:-1], config).keys() >= {path[-1]}


def test_every_field_of_every_encoder_can_be_set_by_flag(read):
  for name in encoders.ENCODERS:
    fields = {key: value for key, value in encoders.defaults({'name': name}).items() if key != 'name'}
    line = f"config.model = {{'name': {name!r}}}"
    assert fields and dict(read(FILE.format(line=line), *(f'model.{k}={v}' for k, v in fields.items())).model) == {
      'name': name,
      **fields,
    }


def test_a_dict_by_flag_is_merged_into_a_section(read):
  config = read(
    FILE.format(line='pass'),
    'mesh={"fsdp": 2}',
    'optimizer={"learning_rate": 1, "options": {"b1": 0.5}}',
    'sources.objects={"stride": 2}',
    'model={"width": 32}',
    'model.depth=1',
  )
  assert config.mesh.to_dict() == {'data': -1, 'fsdp': 2, 'tensor': 1}
  assert config.optimizer.learning_rate == 1.0 and config.optimizer.weight_decay == 0.05
  assert (config.sources.objects.stride, config.sources.objects.sampler) == (2, 'segments')
  assert (config.model.width, config.model.depth, config.model.patch_size) == (32, 1, 8)
  with pytest.raises(UserError, match=r"config\.mesh has no key 'fdsp': did you mean 'fsdp'"):
    read(FILE.format(line='pass'), 'mesh={"fdsp": 2}')
  with pytest.raises(UserError, match="key that the config lacks: 'meshes'"):
    read(FILE.format(line='pass'), 'meshes={"fsdp": 2}')


def test_a_dict_by_flag_replaces_what_has_names_of_its_own_and_says_what_went(read, caplog):
  config = read(FILE.format(line='pass'), 'optimizer.options={"b1": 0.5}', 'model={"name": "c3d"}')
  assert config.optimizer.options.to_dict() == {'b1': 0.5} and config.model.to_dict() == {'name': 'c3d'}
  assert 'b2=0.98 went. To change one of them: --config.optimizer.options.b2=...' in caplog.text
  caplog.clear()
  read(FILE.format(line='pass'), 'streams.video.objective={"name": "vtdl"}', 'streams.video.augment={"mixup": 0.5}')
  assert not caplog.text


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ('model.widht=16', "config.model has no key 'widht': did you mean 'width'"),
    ('model.width=a', 'width'),
    ('optimizer.options.beta=0.5', "config.optimizer.options has no key 'beta'"),
    ('streams.video.augment.mixpu=0.5', "augment has no key 'mixpu': did you mean 'mixup'"),
    ('sources.nothing.label_key=a', 'nothing'),
    ('sources.objects.label_keys=a', 'label_keys'),
    ('seed=99999999999999999999', 'config.seed is 99999999999999999999'),
    ('optimizer.learning_rate=nan', 'learning_rate is nan: expected a finite number above 0'),
    ('sources.motions.flip=both', "flip is 'both': expected True or False, or 'labels'"),
    ('streams.video.size=a', "size is 'a'"),
    ('log_every=0', 'log_every is 0'),
    ('seeds=1', 'seed'),
    ('sources.nothing.flip=1', 'nothing'),
  ],
)
def test_mistakes_in_flags_are_one_sentence(read, setting, message):
  with pytest.raises(UserError, match=message) as error:
    read(FILE.format(line='pass'), setting)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('path', CONFIGS, ids=[pathlib.Path(path).stem for path in CONFIGS])
def test_the_config_json_of_a_run_is_a_config(path, tmp_path):
  """What a run wrote gives the same run, by whichever config file it was."""
  parser = flags.parser('of a test', '')
  command_line.add_config(parser)
  config = command_line.parse(parser, [f'--config={path}']).config
  (tmp_path / 'config.json').write_text(config.to_json_best_effort(indent=2))
  again = command_line.parse(parser, [f'--config={tmp_path}/config.json']).config
  assert again.to_dict() == config.to_dict()
  assert resume.compare(config.to_dict(), again.to_dict()) == ([], [])


def test_a_config_json_can_be_changed_by_flags(read_json):
  values = digits_cover.get_config('debug').to_dict()
  config = read_json(json.dumps(values), 'seed=3', 'streams.video.loss_weight=0.5', 'sources.objects.flip=labels')
  assert (config.seed, config.streams.video.loss_weight, config.sources.objects.flip) == (3, 0.5, 'labels')
  del values['frozen'], values['sources']['digits']['flip']  # of a version that had no such keys
  assert read_json(json.dumps(values)).frozen.clips == 10


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"architectures": []}', r'config\.json is not the config of a run'),
    ('[1]', r'config\.json is not the config of a run'),
    ('{', r'config\.json cannot be read \(it is no JSON'),
    ('{"sources": {}, "streams": {}, "sed": 1}', "config.json has no key 'sed': did you mean 'seed'"),
    (
      '{"sources": {"a": {"dataset": "x", "flp": 1}}, "streams": {}}',
      "sources.a has no key 'flp': did you mean 'flip'",
    ),
  ],
)
def test_mistakes_in_a_config_json_are_one_sentence(read_json, text, message):
  with pytest.raises(UserError, match=message) as error:
    read_json(text)
  assert '\n' not in str(error.value)


def test_flags_add_keys_where_names_are_free(read):
  config = read(
    FILE.format(line='pass'),
    *(f'mixture.weights.{name}={weight}' for name, weight in zip(names_of(), ('2.0', '1', '0', '1e-1'), strict=True)),
    'model.drop_path=0.2',
    'streams.video.augment.mixup=0.8',
    'streams.video.objective.label_smoothing=0.1',
    'optimizer.options.b1=0.8',
    'streams.video.augment.color_jitter={"hue": 0.1}',
    'init_from.heads.motions=a head',
  )
  assert config.mixture.weights.to_dict() == dict(zip(names_of(), (2.0, 1, 0, 0.1), strict=True))
  assert (config.model.drop_path, config.streams.video.augment.mixup, config.optimizer.options.b1) == (0.2, 0.8, 0.8)
  assert config.streams.video.augment.color_jitter.hue == 0.1
  assert config.streams.video.objective.label_smoothing == 0.1 and config.init_from.heads.motions == 'a head'
  assert experiment.build(config, infos(config)).weights[list(names_of())[2]] == 0.0
  for setting, message in {
    'model.widht=16': "config.model has no key 'widht': did you mean 'width'",
    'mixture.weights.objects=a': "config.mixture.weights is {'objects': 'a'}: expected a dict",
    'streams.video.augment.mixpu=0.8': "has no key 'mixpu': did you mean 'mixup'",
    'optimizer.options.momentum=0.9': "config.optimizer.options has no key 'momentum'",
    'frozen.nothing=1': "there is no key 'nothing'|lacks",
  }.items():
    with pytest.raises(UserError, match=message):
      read(FILE.format(line='pass'), setting)


def names_of():
  return tuple(digits_cover.get_config('debug').sources)


def test_no_two_configs_share_a_setting():
  one, two = (defaults.source('digits') for _ in range(2))
  one.flip = 'labels'
  assert two.flip is False and defaults.source('digits').flip is False
  one, two = defaults.get_config(), defaults.get_config()
  one.mixture.weights = {'a': 1.0}
  one.optimizer.options.b2 = 0.5
  assert not two.mixture.weights and not two.optimizer.options


def test_a_config_of_an_older_checkpoint_builds():
  """JSON, keys missing that came later, one that is gone, values that are refused now."""
  values = json.loads(json.dumps(digits_cover.get_config('debug').to_dict()))
  for stream in values['streams'].values():
    del stream['augment']
  for source in values['sources'].values():
    del source['flip']
  del values['frozen']
  config = ml_collections.ConfigDict(values | {'total_step': 3, 'ema_decay': 2.0})
  with pytest.raises(UserError):
    settings.check(config)
  assert experiment.build(config, infos(config)).total_steps == 4


@pytest.mark.parametrize('seconds', ['1', '0', '-5', '2.5', 'a', ''])
def test_flags_of_the_command_have_bounds(seconds):
  argv = [f'--config={digits_cover.__file__}:debug', '--workdir=run', f'--heartbeat_seconds={seconds}']
  with pytest.raises(UserError, match=r'heartbeat_seconds: .* is no whole number of at least 2; see'):
    command_line.parse(main.parser(), argv)


def test_a_home_is_a_home_in_every_path(monkeypatch, tmp_path, read):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'mine.py').write_text(FILE.format(line="config.sources.motions.exclude = ('~/list.txt', 'a:test')"))
  setting = ['--config.init_from.path=~/w.npz', '--config.sources.objects.data_dir=~/tfds']
  options = command_line.parse(main.parser(), ['--config=~/mine.py', '--workdir=~/run', *setting])
  assert options.workdir == f'{tmp_path}/run' and options.config.init_from.path == f'{tmp_path}/w.npz'
  sources = options.config.sources
  assert sources.objects.data_dir == f'{tmp_path}/tfds' and sources.digits.data_dir == ''
  assert sources.motions.exclude == (f'{tmp_path}/list.txt', 'a:test')
  for module, argv in (
    (export, ['~/run', '--output=~/m.flax']),
    (predict, ['~/run', '~/a.mp4', '--output=~/out']),
    (inspect, ['x', '--data_dir=~/tfds', '--out=~/sheet.png']),
    (build_command, ['x', '--manual_dir=~/raw', '--data_dir=~/tfds']),
  ):
    given = vars(flags.parse(module.parser(), argv))
    assert '~' not in str(given) and str(given).count(f'{tmp_path}/') == sum('~' in word for word in argv), given
  assert vars(plan.parser().parse_args(['--config=x', '--output=~/p.json']))['output'] == f'{tmp_path}/p.json'


def test_flags_that_do_not_exist_are_named_with_the_nearest():
  argv = [f'--config={digits_cover.__file__}:debug', '--workdir=run', '--config.seed=3']
  assert command_line.parse(main.parser(), argv).config.seed == 3
  with pytest.raises(UserError, match='There is no flag --wokdir, did you mean --workdir'):
    command_line.parse(main.parser(), [*argv, '--wokdir=x'])
  with pytest.raises(UserError, match="Unexpected argument 'more'"):
    command_line.parse(main.parser(), [*argv, 'more'])
  with pytest.raises(UserError, match='required: --workdir'):
    command_line.parse(main.parser(), argv[:1])
