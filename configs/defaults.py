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
  # `one_source_a_step` fills a stream's whole sub-batch from one source, drawn with these weights (PolyViT's way);
  # else every sub-batch mixes them (CoVeR's).
  config.mixture = ml_collections.ConfigDict({'temperature': 1.0, 'weights': {}, 'one_source_a_step': False})
  # Examples a step over all streams and devices, split between the streams in proportion to their sources'
  # weights, rounded to `batch_multiple`: a multiple of the devices, and the same number gives the same data on
  # any of its divisors.
  config.batch_size = 64
  config.batch_multiple = 8
  # A step's batch runs as this many microbatches, one after the other: the same gradient for less memory. Each
  # stream's batch size must be a multiple of it times the devices.
  config.accumulation_steps = 1
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

  # Fields of cover_jax.models.timesformer.TimeSformer, which explains them and has their defaults. The command line can
  # change those that the config file sets.
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
      # (regex, factor) tables; the first regex found in a parameter's name ('encoder/blocks/...') counts. As a flag:
      # --config.optimizer.learning_rate_rules="(('encoder/', 0.0), ('.*', 1.0))"
      'weight_decay_rules': (('kernel$', 1.0), ('.*', 0.0)),
      # A learning rate factor of 0 freezes: no gradient, no optimizer state, the weights stay to the bit.
      'learning_rate_rules': (('.*', 1.0),),
      'layer_decay': 1.0,  # of the learning rate, from each block to the one before it; see optim.layer_factors
    }
  )
  config.ema_decay = 0.0  # 0 keeps no moving average of the parameters

  config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})  # -1: all remaining devices
  config.logical_axis_rules = sharding.DEFAULT_RULES

  # Train on original videos that a test split has too. Such results are not comparable: the report says how many.
  config.allow_overlap = False

  config.log_every = 50
  config.checkpoint_every = 500  # and at the end, and on SIGTERM
  config.keep_checkpoints = 2  # the last ones
  config.keep_every = 0  # steps; these are kept for good, as checkpoints/step-<n>
  config.keep_best = ''  # such as 'test/k400/top1': the best evaluated one is kept as checkpoints/best
  config.eval_every = 0  # steps; always at the end
  config.eval_batch_size = 64  # clips on all devices at once; an example of V views counts as V
  config.eval_missing = 'leave_out'  # test examples that the data set lacks; or 'wrong': count them as wrong
  config.eval_params = 'raw'  # or 'ema'
  config.profile_at_step = 0  # 0 for no profile

  # What `--mode=frozen` does with an encoder's features; see cover_jax.frozen and cover_jax.protocols.
  config.frozen = ml_collections.ConfigDict(
    {
      'pool': 'cls',  # or 'mean' of the patch tokens
      'clips': 10,  # a video, evenly over its length; their features are averaged
      'recall_at': (1, 5, 10, 20, 50),  # retrieval, cosine, from the training split
      'neighbours': 200,  # of k-NN, at most as many as there are
      'temperature': 0.07,  # of their votes
      'label_fractions': (0.01, 0.05, 0.1, 0.2, 1.0),  # of the training labels for k-NN and the linear probe
      'held_out': 0.2,  # of these labels, to choose the probe's penalty on
      'penalties': (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
    }
  )
  return config


def variants(variant: str, *known: str) -> set[str]:
  """The words of `FILE:word,word`; an unknown one is an error, not the full run. Every config knows 'debug'."""
  words = {w for w in variant.split(',') if w}
  if unknown := sorted(words - {'debug', *known}):
    raise UserError(
      f'The config has no variant {", ".join(unknown)}: give FILE or FILE:word,word with words of '
      f'{", ".join((*known, "debug"))}.'
    )
  return words


def is_debug(variant: str) -> bool:
  """Whether a config without other variants is asked for as `FILE:debug`."""
  return 'debug' in variants(variant)


def shrink(config: ml_collections.ConfigDict) -> None:
  """Makes an experiment run two steps on a laptop: the same sources and streams, a tiny model, short small clips."""
  config.model.update({'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_dim': 32, 'patch_size': 8, 'remat': 'none'})
  for stream_config in config.streams.values():
    stream_config.size = 32
    stream_config.num_frames = min(stream_config.num_frames, 4)
  config.model.update({'image_size': 32, 'num_frames': max(s.num_frames for s in config.streams.values())})
  config.dtype = 'float32'
  config.init_from.path = ''
  config.batch_size = config.eval_batch_size = 8 * len(config.streams)
  config.batch_multiple = 8
  config.total_steps, config.total_epochs = 2, 0.0
  config.optimizer.update({'warmup_steps': 0, 'warmup_epochs': 0.0})
  config.log_every = 1
  config.eval_every = 0


def source(dataset: str, **changes) -> ml_collections.ConfigDict:
  """One dataset: what TFDS calls it, which splits, and how clips are cut from it.

  Args:
    dataset: a TFDS name with config and version as needed, e.g. 'moving_digits/objects'.
    **changes: to the values below. 'frames_key' and 'label_key' name the features to use where the dataset has several;
      label_key=None leaves its labels out.
  """
  config = ml_collections.ConfigDict(
    {
      'dataset': dataset,
      'data_dir': '',  # TFDS's default folder if empty
      'train': 'train',  # TFDS split strings
      'test': 'test',  # '' if there is none
      # Original videos never to train on: 'dataset:split' ('kinetics/400:validation') or files that name them.
      'exclude': (),
      # Train on this share of the examples of each class (at least one of each): 0.05 is the 5 % label protocol.
      'label_fraction': 1.0,
      'sampler': 'dense',  # `num_frames` frames `stride` apart; or 'segments': one of each of `num_frames` parts
      'stride': 1,
      'fps': 0.0,  # at which `stride` counts, whatever the rate of a video; 0: its stored frames
      'loop': False,  # begin a video again that is too short for a dense clip; else its last frame stands still
      'crop_scale': (1.0, 1.0),  # random resized crop in training: share of the area, aspect ratio
      'crop_ratio': (1.0, 1.0),
      'short_side': None,  # (low, high) pixels, such as (256, 320) for a crop of 224, in place of the two above
      'rotation': 0.0,  # of training clips, in +- degrees
      # Mirror half of the training clips; 'labels': and where a class names left or right, its label becomes that of
      # the class that names the other side (a class without such a counterpart is never mirrored).
      'flip': False,
      'test_clips': 1,  # clips an evaluated video, evenly over its length
      'test_crops': 1,  # 1, 3 along the long side, 5 or 10; probabilities are averaged over clips x crops
      'test_crop_fraction': 1.0,  # share of the short side that a test crop shows; 224 / 256 is ImageNet's
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
      # On the device, the same for all frames of a clip; see `cover_jax.augment.make`: {'color_jitter': {'hue': 0.1},
      # 'rand_augment': {'num_ops': 2, 'magnitude': 9}, 'random_erasing': {}, 'mixup': 0.8, 'cutmix': 1.0, ...}
      'augment': {},
      'batch_size': 0,  # 0: in proportion to the sources' weights
      'loss_weight': None,  # None: the exact share of the sources' weights
    },
    type_safe=False,
  )
  config.update(changes)
  return config
