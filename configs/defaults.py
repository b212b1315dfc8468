"""Every key that an experiment can set, with its meaning. Experiments start from `get_config()` and change it.

Not an experiment itself.
"""

import ml_collections

from cover_jax import sharding
from data_pipelines.contract import UserError


def get_config() -> ml_collections.ConfigDict:
  """A config without sources and streams; a run needs at least one of each."""
  config = ml_collections.ConfigDict()

  config.seed = 0
  # Sources by name: see `source` below. The name is that of the head, too.
  config.sources = ml_collections.ConfigDict()
  # Streams by name: see `stream` below.
  config.streams = ml_collections.ConfigDict()
  # How often a source is drawn: size ** (1 / temperature). 1 is proportional to size (CoVeR), float('inf') uniform.
  # `weights` {source: weight}, naming every source, in any unit, overrides it; 0 leaves a source out of training.
  config.mixture = ml_collections.ConfigDict({'temperature': 1.0, 'weights': {}})
  # Examples a step over all streams and devices, split between the streams in proportion to their sources'
  # weights, rounded to `batch_multiple`: a multiple of the devices, and the same number gives the same data on
  # any of its divisors.
  config.batch_size = 64
  config.batch_multiple = 8
  # Length of the run: steps, or (if 0) epochs, in which as many examples pass as the sources hold.
  config.total_steps = 0
  config.total_epochs = 0.0

  # Weights to start from, at step 0 only (resuming does not look at them); see docs/weights.md.
  config.init_from = ml_collections.ConfigDict(
    {
      'path': '',  # .npz, .safetensors, .pyth, .flax or a workdir; '' starts from random weights
      'params': 'raw',  # or 'ema', of a checkpoint of this project
      'temporal_attention': 'copy',  # of the spatial one, or 'random' or 'zero'; where the file has none
      'heads': {},  # {our head: head of the file} maps classes by name
    }
  )

  # Fields of cover_jax.models.timesformer.TimeSformer.
  config.model = ml_collections.ConfigDict()
  config.dtype = 'float32'  # of the computation; 'bfloat16' on TPU and GPU. Parameters are float32.
  config.pixel_mean = (0.5, 0.5, 0.5)  # of pixels in [0, 1]; AugReg ViT's. TimeSformer's release: 0.45 and 0.225.
  config.pixel_std = (0.5, 0.5, 0.5)

  config.optimizer = ml_collections.ConfigDict(
    {
      'name': 'adam',  # 'adam', 'sgd' or 'lion'
      'options': {},  # of optax.scale_by_adam, optax.trace or optax.scale_by_lion
      'learning_rate': 1e-3,
      'schedule': 'cosine',  # or 'constant', or 'steps' with decay_epochs and decay_factor
      'final_fraction': 0.0,  # of the learning rate, where the cosine ends
      'warmup_steps': 0,
      'warmup_epochs': 0.0,
      'decay_epochs': (),
      'decay_factor': 0.1,
      'clip_norm': 1.0,  # 0 for none
      'weight_decay': 0.0,  # decoupled: times the learning rate
      # (regex, factor) tables; the first regex found in a parameter's name ('encoder/blocks/...') counts.
      'weight_decay_rules': (('kernel$', 1.0), ('.*', 0.0)),
      'learning_rate_rules': (('.*', 1.0),),
    }
  )
  config.ema_decay = 0.0  # 0 keeps no moving average of the parameters

  config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})  # -1: all remaining devices
  config.logical_axis_rules = sharding.DEFAULT_RULES

  config.log_every = 50
  config.checkpoint_every = 500  # and at the end, and on SIGTERM
  config.keep_checkpoints = 2
  config.eval_every = 0  # steps; always at the end
  config.eval_batch_size = 64
  config.eval_params = 'raw'  # or 'ema'
  config.profile_at_step = 0  # 0 for no profile
  return config


def is_debug(variant: str) -> bool:
  """Whether a config is asked for as `FILE:debug`; an unknown variant is an error, not the full run."""
  if variant not in ('', 'debug'):
    raise UserError(f'The config has no variant {variant!r}: give FILE or FILE:debug.')
  return variant == 'debug'


def source(dataset: str, **changes) -> ml_collections.ConfigDict:
  """One dataset: what TFDS calls it, which splits, and how clips are cut from it.

  Args:
    dataset: a TFDS name with config and version as needed, e.g. 'moving_digits/objects'.
    **changes: to the values below.
  """
  config = ml_collections.ConfigDict(
    {
      'dataset': dataset,
      'data_dir': '',  # TFDS's default folder if empty
      'train': 'train',  # TFDS split strings
      'test': 'test',  # '' if there is none
      'sampler': 'dense',  # `num_frames` frames `stride` apart; or 'segments': one of each of `num_frames` parts
      'stride': 1,
      'crop_scale': (1.0, 1.0),  # random resized crop in training: share of the area, aspect ratio
      'crop_ratio': (1.0, 1.0),
      'flip': False,  # mirror half of the training clips
    }
  )
  config.update(changes)
  return config


def stream(sources: tuple[str, ...], **changes) -> ml_collections.ConfigDict:
  """Sources that share a clip geometry and an objective.

  Args:
    sources: keys of `config.sources`.
    **changes: to the values below.
  """
  config = ml_collections.ConfigDict(
    {
      'sources': tuple(sources),
      'num_frames': 8,
      'size': 224,  # pixels, or (height, width)
      'objective': {'name': 'classification'},
      'batch_size': 0,  # 0: in proportion to the sources' weights
      'loss_weight': None,  # None: the exact share of the sources' weights
    },
    type_safe=False,
  )
  config.update(changes)
  return config
