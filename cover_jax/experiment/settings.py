"""Every key that an experiment can set, with its default, what it may be and its meaning; those of a source stand in
`data_pipelines/clips/settings.py`, options of objectives and augmentations with their functions.

`configs/defaults.py` makes configs of these tables. `check` looks at a whole config before any data is opened.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from cover_jax import objectives
from cover_jax.augment import photometric
from cover_jax.experiment import optim
from cover_jax.models import encoder as encoders
from cover_jax.models import heads
from cover_jax.runtime import sharding
from data_pipelines import declared
from data_pipelines.clips.settings import SOURCE
from data_pipelines.contract import UserError
from data_pipelines.declared import (
  OPTIONAL,
  REQUIRED,
  Key,
  Keys,
  Kind,
  either,
  flag,
  named,
  none,
  nonempty,
  number,
  one_of,
  several,
  text,
  whole,
)

_BEGIN = 'begin with get_config(), source(...) and stream(...) of configs/defaults.py and change keys of what they give'
_DEVICES = either(whole(1), one_of(-1))


def _is_pattern(value: Any) -> bool:
  try:
    return isinstance(value, str) and bool(re.compile(value))
  except re.error:
    return False


def _by_name(factor: Kind) -> Kind:
  """A table of (regex, factor)."""
  row = lambda r: isinstance(r, tuple | list) and len(r) == 2 and _is_pattern(r[0]) and factor.holds(r[1])
  return several(Kind(f'(regex, {factor.expected})', row), least=1)


def _is_axis_rule(value: Any) -> bool:
  if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str)):
    return False
  axes = value[1] if isinstance(value[1], tuple | list) else (value[1],)
  return value[1] is None or all(isinstance(axis, str) and axis in sharding.AXES for axis in axes)


# Of a source's test split, as metrics: by how many labels an example has (`SourceInfo.labels`).
MEASURES = {
  'one': ('top1', 'top5', 'mean_class_accuracy', 'loss'),
  'several': ('mAP', 'precision_at_1', 'precision_at_5', 'loss'),
}

RUN = {
  # Of the order of the data, the initial weights and the augmentation.
  'seed': Key(0, whole(0, 2**32 - 1)),
  'sources': Key({}, named(least=1)),  # by name; a source's name is that of its head, too: see `SOURCE`
  'streams': Key({}, named(least=1)),  # by name: see `STREAM` below
  'mixture': {
    # How often a source is drawn: size ** (1 / temperature). 1 is proportional to size (CoVeR), float('inf') uniform.
    'temperature': Key(1.0, number(above=0, infinite=True)),
    # {source: weight}, naming every source, in any unit, overrides it; 0 leaves a source out of training.
    'weights': Key({}, named(number(0))),
    # Fill a stream's whole sub-batch from one source, drawn with these weights (PolyViT's way); else every sub-batch
    # mixes them (CoVeR's).
    'one_source_a_step': Key(False, flag),
  },
  # Examples a step over all streams and devices, split between the streams in proportion to their sources'
  # weights, rounded to `batch_multiple`: a multiple of the devices, and the same number gives the same data on
  # any of its divisors.
  'batch_size': Key(64, whole(1)),
  'batch_multiple': Key(8, whole(1)),
  # A step's batch runs as this many microbatches, one after the other: the same gradient for less memory. Each
  # stream's batch size must be a multiple of it times the devices.
  'accumulation_steps': Key(1, whole(1)),
  # Length of the run: steps, or (if 0) epochs. In an epoch as many examples pass, over all streams, as the sources hold
  # that are drawn at all (weight > 0), whatever the weights and the streams' batch sizes.
  'total_steps': Key(0, whole(0)),
  'total_epochs': Key(0.0, number(0)),
  # Weights to start from, at step 0 only (resuming does not look at them); see docs/weights.md.
  'init_from': {
    'path': Key('', text),  # .npz, .safetensors, .pyth, .flax or a workdir; '' starts from random weights
    'params': Key('raw', one_of('raw', 'ema')),  # of a checkpoint of this project
    # What temporal attention starts as where the file has none; 'copy': of the spatial one.
    'temporal_attention': Key('copy', one_of('copy', 'random', 'zero')),
    'heads': Key({}, named(nonempty)),  # {our head: head of the file} maps classes by name
  },
  # {'name': 'timesformer', ...}: an encoder of cover_jax.models.encoder.ENCODERS and fields of it, which its file
  # explains and has the defaults of; the command line can set each of them, whatever the config file sets. num_frames
  # and image_size follow from the streams where a command's config leaves them out: see `fit_model`.
  'model': Key({}, named()),
  # Classifiers, one for each labelled source: {'name': 'linear'} on the encoder's feature, or 'attentive' or
  # 'attentive_blocks' on its tokens, with options; see cover_jax.models.heads.KINDS.
  'heads': {
    'all': Key({'name': 'linear'}, named()),
    'only': Key({}, named()),  # {source: the same}, of these sources instead
  },
  # Of the computation; 'bfloat16' on TPU and GPU. Parameters are float32.
  'dtype': Key('float32', one_of('float32', 'bfloat16')),
  # Of pixels in [0, 1]: AugReg ViT's. TimeSformer's release has 0.45 and 0.225.
  'pixel_mean': Key((0.5, 0.5, 0.5), several(number(), count=3)),
  'pixel_std': Key((0.5, 0.5, 0.5), several(number(above=0), count=3)),
  'optimizer': {
    'name': Key('adam', one_of(*optim.SCALERS)),
    'options': Key({}, named()),  # of optax.scale_by_adam, optax.trace or optax.scale_by_lion: `optim.SCALERS`
    'learning_rate': Key(1e-3, number(above=0)),
    'schedule': Key('cosine', one_of('cosine', 'constant', 'steps')),  # 'steps' has decay_epochs and decay_factor
    'final_fraction': Key(0.0, number(0, 1)),  # of the learning rate, where the cosine ends
    'warmup_steps': Key(0, whole(0)),
    'warmup_epochs': Key(0.0, number(0)),
    'decay_epochs': Key((), several(number(above=0))),
    'decay_factor': Key(0.1, number(above=0)),
    'clip_norm': Key(1.0, number(0)),  # 0 for none
    'weight_decay': Key(0.0, number(0)),  # decoupled: times the learning rate
    # (regex, factor) tables; the first regex found in a parameter's name ('encoder/blocks/...') counts. As a flag:
    # --config.optimizer.learning_rate_rules="(('encoder/', 0.0), ('.*', 1.0))"
    'weight_decay_rules': Key((('kernel$', 1.0), ('.*', 0.0)), _by_name(number(0))),
    # A learning rate factor of 0 freezes: no gradient, no optimizer state, the weights stay to the bit.
    'learning_rate_rules': Key((('.*', 1.0),), _by_name(number(0))),
    # Of the learning rate, from each block to the one before it; see optim.layer_factors.
    'layer_decay': Key(1.0, number(above=0, high=1)),
  },
  'ema_decay': Key(0.0, number(0, below=1)),  # 0 keeps no moving average of the parameters
  # Devices along each axis; -1: all that remain.
  'mesh': {'data': Key(-1, _DEVICES), 'fsdp': Key(1, _DEVICES), 'tensor': Key(1, _DEVICES)},
  'logical_axis_rules': Key(
    sharding.DEFAULT_RULES,
    several(Kind(f'(logical axis, mesh axis, axes or None), of {", ".join(sharding.AXES)}', _is_axis_rule), least=1),
  ),
  # Train on original videos that a test split has too. Such results are not comparable: the report says how many.
  'allow_overlap': Key(False, flag),
  'log_every': Key(50, whole(1)),
  'checkpoint_every': Key(500, whole(0)),  # and before evaluations, at the end, and on SIGTERM; 0: then only
  'keep_checkpoints': Key(2, whole(1)),  # the last ones
  'keep_every': Key(0, whole(0)),  # steps; these are kept for good, as checkpoints/step-<n>
  'keep_best': Key('', text),  # such as 'test/k400/top1': the best evaluated one is kept as checkpoints/best
  'eval_every': Key(0, whole(0)),  # steps; always at the end
  'eval_batch_size': Key(64, whole(1)),  # clips on all devices at once; an example of V views counts as V
  # Test examples that the data set lacks: leave them out, or count them as wrong.
  'eval_missing': Key('leave_out', one_of('leave_out', 'wrong')),
  'eval_params': Key('raw', one_of('raw', 'ema')),
  'profile_at_step': Key(0, whole(0)),  # 0 for no profile
  'wandb': {
    'project': Key('', text),  # of Weights & Biases, for the same curves and pictures there; '' for none
  },
  # What `--mode=frozen` does with an encoder's features; see cover_jax/evaluation/frozen.py and protocols.py there.
  'frozen': {
    'pool': Key('cls', one_of('cls', 'mean')),  # 'mean' of the patch tokens
    'clips': Key(10, whole(1)),  # a video, evenly over its length; their features are averaged
    'recall_at': Key((1, 5, 10, 20, 50), several(whole(1), least=1)),  # retrieval, cosine, from the training split
    'neighbours': Key(200, whole(1)),  # of k-NN, at most as many as there are
    'temperature': Key(0.07, number(above=0)),  # of their votes
    # Of the training labels for k-NN and the linear probe.
    'label_fractions': Key((0.01, 0.05, 0.1, 0.2, 1.0), several(number(above=0, high=1), least=1)),
    'held_out': Key(0.2, number(above=0, below=1)),  # of these labels, to choose the probe's penalty on
    'penalties': Key((1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0), several(number(above=0), least=1)),
  },
}

_OBJECTIVES = several(named(), least=1)
_OBJECTIVE = Kind(
  f'{named().expected}, or a tuple of at least one such dict',
  lambda value: named().holds(value) or _OBJECTIVES.holds(value),
  free=True,
)

STREAM = {
  'sources': Key(REQUIRED, several(nonempty, least=1, distinct=True)),  # keys of `config.sources`
  'num_frames': Key(8, whole(1, 65536)),
  'size': Key(224, either(whole(1), several(whole(1), count=2))),  # pixels, or (height, width)
  # A file of cover_jax.objectives, and its options; or several such with weights: see cover_jax.objectives.several.
  'objective': Key({'name': 'classification'}, _OBJECTIVE),
  # On the device, the same for all frames of a clip; see `cover_jax.augment.photometric.make`:
  # {'color_jitter': {'hue': 0.1}, 'rand_augment': {'num_ops': 2, 'magnitude': 9}, 'random_erasing': {}, 'mixup': 0.8,
  # 'cutmix': 1.0, ...}
  'augment': Key({}, named()),
  'batch_size': Key(0, whole(0)),  # 0: in proportion to the sources' weights
  'loss_weight': Key(None, either(none, number(0))),  # None: the exact share of the sources' weights
}


def new(keys: Keys, changes: Mapping[str, Any], what: str) -> ml_collections.ConfigDict:
  """A config of a table's defaults with changes, locked but for dicts whose names are free.

  Settings that may be of several types, as `flip`, can be set to any of them in a file and by a flag.

  Raises:
    UserError: that names `what`, for a key that there is not or a value that it may not have.
  """
  declared.check(changes, keys, what)
  config = _defaults(keys)
  config.update(changes)
  return _lock(config, keys)


def _defaults(keys: Keys) -> ml_collections.ConfigDict:
  config = StreamConfig() if keys is STREAM else ml_collections.ConfigDict()
  for name, key in keys.items():
    if not isinstance(key, Key):
      config[name] = _defaults(key)
    elif key.kind.mixed and key.default is not OPTIONAL:
      config[name] = ml_collections.FieldReference(key.default, field_type=object)
    elif key.default is not REQUIRED and key.default is not OPTIONAL:
      config[name] = key.default
  return config


def _lock(config: ml_collections.ConfigDict, keys: Keys) -> ml_collections.ConfigDict:
  config.lock()
  for name, key in keys.items():
    if not isinstance(key, Key):
      _lock(config[name], key)
    elif key.kind.free and isinstance(config[name], ml_collections.ConfigDict):
      config[name].unlock()
  return config


def declared_at(path: Sequence[str]) -> Key | Keys | None:
  """What is declared of a key of a config.

  Args:
    path: such as ('streams', 'video', 'size').

  Returns:
    Its `Key`; the table of a section; for a key within a dict whose names are free, the `Key` of that dict; None if
    there is no such key.
  """
  first, *rest = path
  named_ = {'sources': SOURCE, 'streams': STREAM}
  found, rest = (named_[first], rest[1:]) if first in named_ and rest else (RUN, path)
  for word in rest:
    if isinstance(found, Key):
      return found if found.kind.free else None
    found = found.get(word)
    if found is None:
      return None
  return found


def from_json(values: Any, where: str) -> ml_collections.ConfigDict:
  """The config that a run wrote to its config.json, as a config file would give it.

  Args:
    values: what JSON gives of the file; lists stand for tuples, and keys that came later have their defaults.
    where: of the file, for messages.

  Raises:
    UserError: if it is no config of a run, or one of a key or value that there is not any more.
  """
  if not isinstance(values, Mapping) or not all(isinstance(values.get(k), Mapping) for k in ('sources', 'streams')):
    raise UserError(f'{where} is not the config of a run: expected what a run writes to config.json in its workdir.')
  values = _tuples(values)
  config = new(RUN, {key: value for key, value in values.items() if key not in ('sources', 'streams')}, where)
  for kind, keys in (('sources', SOURCE), ('streams', STREAM)):
    config[kind] = {name: new(keys, one, f'{where}: {kind}.{name}') for name, one in values[kind].items()}
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _tuples(v) for key, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def fit_model(config: ml_collections.ConfigDict) -> None:
  """Sets sizes of the encoder that the config leaves out and the streams determine.

  `num_frames` is that of the longest clips, `image_size` the longest side of the largest, where the encoder has them.
  Commands call it on the config that they read; what a checkpoint says stays as it is.

  Args:
    config: allowed by `check`.
  """
  streams = config.streams.values()
  longest_side = lambda size: size if isinstance(size, int) else max(size)
  fitting = {
    'num_frames': max(stream.num_frames for stream in streams),
    'image_size': max(longest_side(stream.size) for stream in streams),
  }
  known = encoders.defaults(config.model)
  with config.model.unlocked():
    config.model.update({key: value for key, value in fitting.items() if key in known and key not in config.model})


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for the first key of a config that there is not, that is missing, or of a wrong value.

  What needs the data to be known, such as whether batches can be divided as asked, is left to `experiment.build`.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'The config is a {type(config).__name__}: expected what configs.defaults.get_config() makes.')
  try:
    values = config.to_dict()
  except (TypeError, ValueError) as error:  # keys of several types, a required value that was not given
    raise UserError(f'The config cannot be read: {error}.') from error
  declared.check(values, RUN, 'config', complete=_BEGIN)
  for name, source in values['sources'].items():
    declared.check(source, SOURCE, f'config.sources.{name}', complete=_BEGIN)
  for name, stream in values['streams'].items():
    where = f'config.streams.{name}'
    declared.check(stream, STREAM, where, complete=_BEGIN)
    objectives.check(stream['objective'], f'{where}.objective')
    declared.check(stream['augment'], photometric.OPTIONS, f'{where}.augment')
  encoders.check(values['model'], 'config.model')
  heads.check(values['heads']['all'], 'config.heads.all')
  for name, head in values['heads']['only'].items():
    heads.check(head, f'config.heads.only.{name}')
  optimizer = values['optimizer']
  declared.check(optimizer['options'], optim.SCALERS[optimizer['name']].options, 'config.optimizer.options')
  _check_together(values)


def _check_together(values: Mapping[str, Any]) -> None:
  """Raises UserError for keys that contradict each other."""
  names = list(values['sources'])
  for stream, options in values['streams'].items():
    for member in options['sources']:
      if member not in names:
        raise UserError(f'config.streams.{stream}.sources names {member!r}, which is not in config.sources: {names}.')
  if unused := sorted(set(names) - {m for options in values['streams'].values() for m in options['sources']}):
    raise UserError(f'config.sources has {unused}, which no stream in config.streams uses: add or remove them.')
  if unknown := sorted(set(values['heads']['only']) - set(names)):
    raise UserError(f'config.heads.only names {unknown[0]!r}, which is not in config.sources: {names}.')
  if values['eval_params'] == 'ema' and not values['ema_decay']:
    raise UserError('config.eval_params is "ema" but config.ema_decay is 0, so there is no average: set one of them.')
  tested = [n for n, source in values['sources'].items() if source['test'] and source.get('label_key', '') is not None]
  # Which kind a source is only its data set tells: `classify.check_keep_best`.
  measures = dict.fromkeys(m for of_kind in MEASURES.values() for m in of_kind)
  best = [f'test/{name}/{measure}' for name in tested for measure in measures]
  if values['keep_best'] and values['keep_best'] not in best:
    choices = f'one of {", ".join(best)}' if best else "'', since no source is tested"
    raise UserError(f'config.keep_best is {values["keep_best"]!r}: expected {choices}.')


class StreamConfig(ml_collections.ConfigDict):
  """A stream, whose objective may be set to a dict and to a tuple of them, whichever it is; also by a flag."""

  def __setitem__(self, key, value):
    if key != 'objective' or key not in self:
      super().__setitem__(key, value)
      return
    if isinstance(value, tuple | list):  # ml_collections would leave ConfigDicts in it as they are
      value = tuple(v.to_dict() if isinstance(v, ml_collections.ConfigDict) else v for v in value)
    elif isinstance(value, dict):
      value = ml_collections.ConfigDict(value)
    with self.ignore_type():
      super().__setitem__(key, value)

  def update(self, *other, **kwargs):
    for changes in (*other, kwargs):
      changes = dict(changes.items())
      if isinstance(changes.get('objective'), tuple | list):  # a dict is merged
        self['objective'] = changes.pop('objective')
      super().update(changes)

  def get_type(self, key):
    return object if key == 'objective' else super().get_type(key)
