"""Reads weights from a file of any kind that we know; which layout it has is told by its names."""

import dataclasses
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cover_jax import checkpoints
from cover_jax.models import encoder as encoders
from cover_jax.weights.common import Found, Weights, convert, detect
from data_pipelines import paths
from data_pipelines.contract import UserError

# Numbers that a file may hold: optimizer states, a tower for text and a head of 21,000 classes are skipped.
_FACTOR, _SLACK = 8, 1 << 26
# Fields of an encoder and their names in a Hugging Face config, of encoders whose arrays do not tell them.
_HF_FIELDS = {
  'videomae': {'num_heads': 'num_attention_heads', 'patch_size': 'patch_size', 'tubelet_size': 'tubelet_size'},
  'vjepa2': {'num_heads': 'num_attention_heads', 'patch_size': 'patch_size', 'tubelet_size': 'tubelet_size'},
}
# And in a config of this project: two models of the same shapes that differ in one of them compute something else.
_OWN_FIELDS = ('num_heads', 'patch_size', 'tubelet_size', 'logit_cap', 'epsilon', 'kind', 'factoring', 'gating')
_TANH_GELU = ('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'gelu_python_tanh')


def is_own(path: str) -> bool:
  """Whether a path names what this project writes, by its form: a workdir or a `.flax` file."""
  path = checkpoints.meant(path)
  if paths.is_folder(path):
    return not paths.is_file(os.path.join(path, 'model.safetensors'))
  return path.lower().endswith('.flax')


def read(path: str, which: str = 'raw', model_size: int | None = None) -> Weights:
  """Reads the weights of a file, without running any code that it may hold.

  Args:
    path: `.npz` of google-research ViT or big_vision; `.safetensors`, or a folder with `model.safetensors`, of timm or
      Hugging Face; `.pyth`, `.pth`, `.pt` or `.bin` of PyTorch, which needs PyTorch; a `.flax` file or a workdir of
      this project.
    which: 'raw' or 'ema', of a checkpoint of this project; the others hold one set of parameters.
    model_size: parameters of the model that the weights are for; a compressed file that would grow to far more is
      refused before it does. None: of any size that is there.

  Returns:
    The weights in the common form.

  Raises:
    UserError: if the file is missing, damaged, holds Python objects, is far larger than the model, or has a layout that
      we do not know.
  """
  if which not in ('raw', 'ema'):
    raise UserError(f'config.init_from.params is {which!r}: expected "raw" or "ema".')
  try:
    there = paths.exists(path)
  except OSError as error:
    raise UserError(f'The weights {path} cannot be looked for ({error.strerror}).') from error
  if not there:
    where = 'a path of your bucket' if paths.is_remote(path) else 'a local path'
    raise UserError(f'The weights {path} do not exist: give {where}; docs/weights.md says how to fetch files.')
  if not (paths.is_file(path) or paths.is_folder(path)):  # a pipe would be waited for
    raise UserError(f'{path} is not a regular file: give the path of a file of weights.')
  if is_own(path):
    return _read_own(path, which)
  if paths.is_folder(path):
    path = os.path.join(path, 'model.safetensors')
  extension = os.path.splitext(path)[1].lower()
  if which == 'ema':
    raise UserError(f'{path} holds one set of parameters, no moving average: set config.init_from.params=raw.')
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors}
  readers |= dict.fromkeys(('.pyth', '.pth', '.pt', '.bin'), _read_torch)
  if extension not in readers:
    raise UserError(f'{path} is of no kind that is known: expected a workdir, .flax, {", ".join(readers)}.')
  with paths.local(path) as file:
    arrays = readers[extension](file, model_size)
  weights = convert(path, arrays, detect(path, arrays))
  return _with_config(weights, os.path.join(os.path.dirname(path), 'config.json'))


def _damaged(path: str, error: Exception) -> UserError:
  reason = ' '.join(str(error).split()) or type(error).__name__
  return UserError(f'{path} cannot be read as weights ({reason[:200]}): the file is damaged or of another kind.')


def _check_size(path: str, numbers: int, model_size: int | None) -> None:
  """Raises a UserError if a file of so many numbers cannot be meant for the model."""
  if model_size is not None and numbers > (most := _FACTOR * model_size + _SLACK):
    raise UserError(
      f'{path} holds {numbers:,} numbers; the model has {model_size:,} parameters, for which at most {most:,} are '
      'read: are these the weights of this model?'
    )


def _check_headers(path: str, model_size: int | None) -> None:
  """Raises a UserError if an .npz, by the headers of its arrays, is damaged or would grow far beyond the model."""
  if not zipfile.is_zipfile(path):
    return  # NumPy says what it is instead
  numbers = 0
  try:
    with zipfile.ZipFile(path) as file:
      for member in file.infolist():
        with file.open(member) as f:
          version = np.lib.format.read_magic(f)
          read_header = getattr(np.lib.format, f'read_array_header_{min(version[0], 2)}_0')
          shape, _, dtype = read_header(f)
        if math.prod(shape) * dtype.itemsize > member.file_size and not dtype.hasobject:
          raise ValueError(f'{member.filename!r} is said to be of shape {shape}, and has {member.file_size:,} bytes')
        numbers += math.prod(shape)
  except Exception as error:  # of a damaged header NumPy's parsers raise anything
    raise _damaged(path, error) from error
  _check_size(path, numbers, model_size)


def _read_npz(path: str, model_size: int | None) -> dict[str, np.ndarray]:
  _check_headers(path, model_size)
  try:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, Mapping):
      raise ValueError('it is one array, not an archive')
    with file:
      arrays = {name: file[name] for name in file.files}
  except (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
    raise _damaged(path, error) from error
  if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
    raise _damaged(path, ValueError(f'{strange[0]!r} is not an array'))
  return arrays


def _read_safetensors(path: str, model_size: int | None) -> dict[str, np.ndarray]:
  import ml_dtypes  # noqa: F401  comes with JAX; with it safetensors reads bfloat16
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  _check_size(path, os.path.getsize(path) // 4, model_size)  # it is not compressed
  try:
    return load_file(path)
  except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise _damaged(path, error) from error


def _read_torch(path: str, model_size: int | None) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'{path} is a PyTorch file, and PyTorch is not installed: `pip install torch`, or take a .safetensors file.'
    ) from error
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as file:
      _check_size(path, sum(member.file_size for member in file.infolist()) // 4, model_size)
  try:
    tree = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # of many classes, by what is wrong
    raise _damaged(path, error) from error
  for wrapper in ('model_state', 'model', 'module', 'state_dict'):
    if isinstance(tree, Mapping) and isinstance(tree.get(wrapper), Mapping):
      tree = tree[wrapper]
  if not isinstance(tree, Mapping) or not all(isinstance(v, torch.Tensor) for v in tree.values()):
    raise UserError(f'{path} is not a state dict: expected tensors by name, or below "model_state" or "model".')
  _check_size(path, sum(tensor.numel() for tensor in tree.values()), model_size)  # one may repeat what is stored once
  return {name: tensor.detach().float().numpy() for name, tensor in tree.items()}


def _with_config(weights: Weights, path: str) -> Weights:
  """Adds what a Hugging Face `config.json` beside the weights tells and the weights do not."""
  transformer = weights.model in _HF_FIELDS
  if not (weights.layout.startswith('Hugging Face') or transformer) or not paths.exists(path):
    return weights
  try:
    config = json.loads(paths.read(path))
    names = config.get('id2label') or {}
    class_names = tuple(str(names[str(k)]) for k in range(len(names)))
    num_heads = config.get('num_attention_heads')
    activation = config.get('hidden_act', 'gelu')
    said = {ours: config[theirs] for ours, theirs in _HF_FIELDS.get(weights.model, {}).items() if theirs in config}
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{path} is not a Hugging Face config ({error}): fetch it again.') from error
  if activation not in ('gelu', *_TANH_GELU):
    raise UserError(f'{path} says hidden_act = {activation!r}: expected a GELU, the only activation of our model.')
  if transformer and activation != 'gelu':
    raise UserError(f'{path} says hidden_act = {activation!r}: expected gelu, the only activation of this encoder.')
  return dataclasses.replace(
    weights,
    num_heads=None if transformer else num_heads,
    gelu_approximate=activation in _TANH_GELU,
    fields={**weights.fields, **said},
    class_names=dict.fromkeys(weights.heads, class_names) if class_names else {},
  )


def _own_fields(about: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
  """(name of the encoder, fields that its shapes do not tell) of a checkpoint's config."""
  options = about['config'].get('model')
  try:
    options = {**encoders.defaults(options), **options}
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path} names no encoder that this version has: use the version that wrote it.') from error
  return encoders.name_of(options), {name: options[name] for name in _OWN_FIELDS if name in options}


def _read_own(path: str, which: str) -> Weights:
  loaded: dict[str, Any] = checkpoints.load(path)
  path, state, about = loaded['path'], loaded['state'], loaded['about']
  params = state.get({'raw': 'params', 'ema': 'ema'}[which])
  if not params:
    raise UserError(f'{path} holds no {which} parameters: set config.init_from.params to the other of raw and ema.')
  found = {name: Found(np.asarray(x), name, np.shape(x)) for name, x in checkpoints.flatten(params).items()}
  encoder = {name.removeprefix('encoder/'): f for name, f in found.items() if name.startswith('encoder/')}
  own = sorted(name for name in found if name.startswith('objectives/'))
  query = encoder.get('blocks/attention_space/query/kernel')
  name, fields = _own_fields(about, path)
  return Weights(
    path=path,
    layout=f'checkpoint of this project, {which} parameters',
    encoder=encoder,
    heads={
      h: {part: found[f'heads/{h}/{part}'] for part in checkpoints.flatten(head)}
      for h, head in params.get('heads', {}).items()
    },
    expected={name: f'encoder/{name}' for name in encoder},
    skipped=(('objectives/*', len(own), "an objective's own parameters"),) if own else (),
    class_names={s['name']: tuple(s['class_names']) for s in about['sources']},
    num_heads=query.array.shape[2] if query else None,
    gelu_approximate=about['config']['model'].get('gelu_approximate', False),
    model=name,
    fields=fields if name != 'timesformer' else {},  # whose shapes tell all
  )
