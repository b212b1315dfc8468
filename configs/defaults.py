"""What experiments start from: `get_config()` with every key at its default, and `source` and `stream` for its parts.

What each key means and may be stands beside its default: in `cover_jax/experiment/settings.py`, for sources in
`data_pipelines/clips/settings.py`. A key that is not there cannot be set. Not an experiment itself.
"""

import ml_collections

from cover_jax.experiment import settings
from cover_jax.models import encoder as encoders
from data_pipelines.clips.settings import SOURCE
from data_pipelines.contract import UserError


def get_config() -> ml_collections.ConfigDict:
  """A config without sources and streams; a run needs at least one of each."""
  return settings.new(settings.RUN, {}, 'config')


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
  encoder = encoders.encoder_class(config.model)
  config.model.update(encoder.DEBUG)
  for stream_config in config.streams.values():
    stream_config.size = 32
    stream_config.num_frames = min(stream_config.num_frames, 4)
  if 'num_frames' in encoder.DEBUG:
    config.model.num_frames = max(s.num_frames for s in config.streams.values())
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
    **changes: to the defaults in `data_pipelines.clips.settings.SOURCE`, which explains them.

  Raises:
    UserError: for a key that there is not (the nearest is named) or a value that it may not have.
  """
  return settings.new(SOURCE, {'dataset': dataset, **changes}, f'source({dataset!r})')


def stream(sources: tuple[str, ...], **changes) -> ml_collections.ConfigDict:
  """Sources that share a clip geometry and an objective.

  Args:
    sources: keys of `config.sources`.
    **changes: to the defaults in `cover_jax.experiment.settings.STREAM`, which explains them.

  Raises:
    UserError: for a key that there is not (the nearest is named) or a value that it may not have.
  """
  return settings.new(
    settings.STREAM,
    {'sources': sources if isinstance(sources, str) else tuple(sources), **changes},
    f'stream({sources!r})',
  )
