"""Writes a trained model for others: one file for this project, or a folder for Hugging Face transformers.

    python -m cover_jax.export CHECKPOINT --format=flax --output=model.flax [--params=ema] [--half]
    python -m cover_jax.export CHECKPOINT --format=huggingface --output=FOLDER --head=NAME [--params=ema]

CHECKPOINT is a workdir (its newest checkpoint) or a file. Class names travel with the weights. Exit codes: 0 done; 2 a
mistake in the command or the files (one sentence says which).
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cover_jax import checkpoints
from cover_jax.experiment import build as experiments
from cover_jax.experiment.build import Experiment, StreamPlan
from cover_jax.models import encoder as encoders
from cover_jax.models.timesformer import resize_position_embedding, resize_time_embedding
from cover_jax.training import finite
from cover_jax.weights import huggingface
from data_pipelines import durable, flags, paths
from data_pipelines.contract import UserError

_FILES = ('config.json', 'preprocessor_config.json', 'model.safetensors')
_ATTENTION = {'divided': 'divided_space_time', 'joint': 'joint_space_time', 'space': 'space_only'}


def to_flax(loaded: Mapping[str, Any], params: str = 'raw', half: bool = False) -> dict[str, Any]:
  """What a file for `cover_jax.load` and `checkpoints.load` holds: parameters and nothing else of the train state.

  Args:
    loaded: of `checkpoints.load`.
    params: 'raw' or 'ema'; in the file they are the raw ones.
    half: stores float32 numbers as float16, to 3 digits; who loads the file gets float32.

  Returns:
    {'about': JSON text with config, sources, class names and step; 'state': {'params': ...}}, for `checkpoints.write`.

  Raises:
    UserError: if there is no moving average, or a number is too large for half precision.
  """
  # There is one set of parameters now, so an evaluation must not look for another.
  about = {**loaded['about'], 'config': {**loaded['about']['config'], 'eval_params': 'raw'}}
  chosen = _chosen(loaded, params)
  about.pop('half', None)  # of an export that is exported again
  if half:
    about['half'] = True
    with np.errstate(over='ignore'):
      chosen = jax.tree.map(lambda x: x.astype(np.float16) if x.dtype == np.float32 else x, chosen)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(chosen)):
      raise UserError(
        f'{loaded["path"]} has numbers beyond 65,504, which half precision cannot hold: leave out --half.'
      )
  return {'about': json.dumps(about, sort_keys=True), 'state': {'params': chosen}}


def to_huggingface(
  loaded: Mapping[str, Any], head: str | None = None, params: str = 'raw'
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
  """What transformers' `TimesformerForVideoClassification` needs to give the logits of one of our heads.

  Its sizes are fixed by its config, so position and time embedding are resized to the clips of the head's stream.
  Dropping paths only matters in training, and transformers accepts whole rates only, so its rate is 0.

  Args:
    loaded: of `checkpoints.load`.
    head: name of a head; may be left out where there is only one.
    params: 'raw' or 'ema'.

  Returns:
    (float32 arrays by name, config.json, preprocessor_config.json).

  Raises:
    UserError: if there is no such head, or transformers' model cannot compute what ours does.
  """
  experiment = experiments.of_checkpoint(loaded)
  chosen = _chosen(loaded, params)
  head = _named_head(loaded, chosen, head)
  _check_huggingface(loaded, experiment, chosen, head)
  stream, model = experiment.stream_of(head), experiment.model
  encoder = checkpoints.flatten(chosen['encoder'])
  grid = stream.size[0] // model.patch_size
  encoder['position_embedding'] = resize_position_embedding(np.asarray(encoder['position_embedding']), (grid, grid))
  if 'time_embedding' in encoder:
    encoder['time_embedding'] = resize_time_embedding(np.asarray(encoder['time_embedding']), stream.num_frames)
  arrays = huggingface.to_hf_timesformer(encoder, chosen['heads'][head])
  class_names = experiment.sources[experiment.source_id(head)].class_names
  config = _hf_config(model, stream, class_names)
  if head in experiment.heads.several_labels:
    config['problem_type'] = (
      'multi_label_classification'  # sigmoids, not a softmax, are what its logits were trained for
    )
  return arrays, config, _hf_preprocessor(experiment.config, stream.size[0])


def _named_head(loaded: Mapping[str, Any], chosen: Mapping[str, Any], head: str | None) -> str:
  heads = sorted(chosen['heads'])
  if head is None and len(heads) == 1:
    head = heads[0]
  if head not in heads:
    asked = f'no head {head!r}' if head else 'several heads or none'
    raise UserError(f'{loaded["path"]} has {asked}: choose one with --head, of {heads}.')
  return head


def _check_huggingface(loaded: Mapping[str, Any], experiment: Experiment, chosen: Mapping[str, Any], head: str) -> None:
  """Raises a UserError for what transformers' model cannot compute."""
  stream, model = experiment.stream_of(head), experiment.model
  if (name := encoders.name_of(experiment.config.model)) != 'timesformer':
    raise UserError(
      f'{loaded["path"]} has the encoder {name!r}: only a TimeSformer can be written for Hugging Face; '
      'take --format=flax.'
    )
  if 'pooling' in chosen['heads'][head]:
    raise UserError(
      f'{loaded["path"]}: the head {head!r} looks at tokens, and only linear ones can be written for Hugging Face; '
      'take --format=flax.'
    )
  frames, (height, width) = stream.num_frames, stream.size
  heads = sorted(chosen['heads'])
  where = f'{loaded["path"]} cannot be written for Hugging Face'
  if height != width:
    raise UserError(f"{where}: its clips are {height} x {width}, and transformers' TimeSformer takes squares only.")
  if model.attention == 'space' and frames > 1:
    raise UserError(
      f'{where}: with config.model.attention="space" transformers scores each frame and we score their mean; '
      'only a head of single images has the same meaning there.'
    )
  if model.attention == 'divided' and model.image_temporal == 'skip' and frames == 1:
    raise UserError(
      f'{where}: config.model.image_temporal="skip" has no counterpart there; choose a head of videos, of {heads}.'
    )


def _hf_config(model: Any, stream: StreamPlan, class_names: tuple[str, ...]) -> dict[str, Any]:
  return {
    'architectures': ['TimesformerForVideoClassification'],
    'model_type': 'timesformer',
    'attention_type': _ATTENTION[model.attention],
    'num_frames': stream.num_frames,
    'image_size': stream.size[0],
    'patch_size': model.patch_size,
    'num_channels': 3,
    'hidden_size': model.width,
    'num_hidden_layers': model.depth,
    'num_attention_heads': model.num_heads,
    'intermediate_size': model.mlp_dim,
    'hidden_act': 'gelu_pytorch_tanh' if model.gelu_approximate else 'gelu',
    'hidden_dropout_prob': 0.0,
    'attention_probs_dropout_prob': 0.0,
    'layer_norm_eps': 1e-6,
    'qkv_bias': True,
    'drop_path_rate': 0,
    'id2label': {str(k): name for k, name in enumerate(class_names)},
    'label2id': {name: k for k, name in enumerate(class_names)},
    'dtype': 'float32',
  }


def _hf_preprocessor(config: Any, side: int) -> dict[str, Any]:
  return {
    'image_processor_type': 'VideoMAEImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': side},
    'resample': 2,  # bilinear
    'do_center_crop': True,
    'crop_size': {'height': side, 'width': side},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(config.pixel_mean),
    'image_std': list(config.pixel_std),
  }


def _chosen(loaded: Mapping[str, Any], params: str) -> Mapping[str, Any]:
  chosen = loaded['state'].get({'raw': 'params', 'ema': 'ema'}[params])
  if not chosen:
    raise UserError(f'{loaded["path"]} holds no moving average of the parameters: export it with --params=raw.')
  finite.check(chosen, loaded['path'])
  return chosen


def export(
  checkpoint: str, output: str, file_format: str, head: str | None = None, params: str = 'raw', half: bool = False
) -> None:
  """Writes `output` in the format 'flax' or 'huggingface'; see `to_flax` and `to_huggingface`.

  What was there is replaced at once: a kill leaves the old export or the new one, never files of both; see
  `durable.replacing_folder`.

  Raises:
    UserError: if the checkpoint cannot be read or has no such form, or `output` cannot be written or holds other files.
  """
  if file_format == 'flax' and head is not None:
    raise UserError('--head is for --format=huggingface: a .flax file holds all heads.')
  if file_format == 'huggingface' and half:
    raise UserError('--half is for --format=flax: leave it out.')
  output = output.rstrip(os.sep) or os.sep
  if file_format == 'huggingface':
    _check_folder(output)
  elif paths.is_folder(output):
    raise UserError(f'--output={output} is a folder: name the .flax file to write.')
  loaded = checkpoints.load(checkpoint)
  try:
    paths.make_folder(os.path.dirname(paths.absolute(output)))
    if file_format == 'flax':
      checkpoints.write(output, to_flax(loaded, params, half))
      written = [output]
    else:
      written = _write_folder(output, *to_huggingface(loaded, head, params))
  except OSError as error:
    raise UserError(f'--output={output} cannot be written ({error.strerror}): choose another place.') from error
  for path in written:
    print(f'Wrote {path} ({paths.size(path) / 1e6:.1f} MB)')


def _check_folder(output: str) -> None:
  """Refuses to replace what is not an export."""
  if paths.is_folder(output):
    others = sorted(set(paths.names(output)) - set(_FILES))
  elif os.path.lexists(output) or paths.exists(output):
    raise UserError(f'--output={output} is a file: name a folder for --format=huggingface.')
  else:
    return
  if others:
    raise UserError(
      f'--output={output} holds {others[0]!r}, which is not part of an export, and a folder is replaced whole: '
      'choose a new folder.'
    )


def _write_folder(
  output: str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> list[str]:
  from safetensors.numpy import save

  contents = (json.dumps(config, indent=2), json.dumps(preprocessor, indent=2), save(arrays, metadata={'format': 'pt'}))
  with durable.replacing_folder(output) as folder:
    for name, content in zip(_FILES, contents, strict=True):
      durable.write(os.path.join(folder, name), content)
  return [os.path.join(output, name) for name in _FILES]


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.export', __doc__)
  to.add_argument('checkpoint', type=flags.path, help='workdir of a run, checkpoint or export')
  to.add_argument('--output', required=True, type=flags.path, help='file (flax) or folder (huggingface) to write')
  to.add_argument('--format', choices=('flax', 'huggingface'), default='flax', help='what to write (default: flax)')
  to.add_argument('--head', help='the head to write; needed for huggingface where there are several')
  to.add_argument('--params', choices=('raw', 'ema'), default='raw', help='ema: the moving average (default: raw)')
  what = 'store numbers in half precision: half the size, 3 digits (flax only)'
  to.add_argument('--half', action='store_true', help=what)
  return to


def run(options: argparse.Namespace) -> None:
  """Does what the flags ask for."""
  export(options.checkpoint, options.output, options.format, options.head, options.params, options.half)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: run(flags.parse(parser(), argv)))


if __name__ == '__main__':
  sys.exit(main())
