"""Weights of other codebases as our parameters, in numpy only."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.contract import UserError

# Hugging Face's module names within a layer -> ours within a block.
_HF_NORMS = {'temporal_layernorm': 'norm_time', 'layernorm_before': 'norm_space', 'layernorm_after': 'norm_mlp'}
_HF_ATTENTIONS = {'temporal_attention': 'attention_time', 'attention': 'attention_space'}


def from_hf_timesformer(
  state_dict: Mapping[str, np.ndarray], *, num_heads: int, head: str = 'classifier'
) -> dict[str, Any]:
  """Converts the weights of transformers' `TimesformerForVideoClassification` or `TimesformerModel`.

  Args:
    state_dict: arrays by name, with or without the prefix 'timesformer.'; any of the three attention types.
    num_heads: `num_attention_heads` of the model's config, which the weights do not tell.
    head: name that the classifier gets among our heads.

  Returns:
    {'encoder': ..., 'heads': {head: ...}}, float32, in the layout of `TimeSformer` (blocks stacked on a leading axis)
    and `Heads`; no heads where there is no classifier.

  Raises:
    UserError: if an array is missing or one is left over.
  """
  arrays = {name.removeprefix('timesformer.'): np.asarray(x, np.float32) for name, x in state_dict.items()}

  def take(name: str) -> np.ndarray:
    if name not in arrays:
      raise UserError(
        f'The weights have no array {name!r}: expected those of a Hugging Face TimeSformer; '
        'check that the file is one and that it is complete.'
      )
    return arrays.pop(name)

  def norm(name: str) -> dict[str, np.ndarray]:
    return {'scale': take(f'{name}.weight'), 'bias': take(f'{name}.bias')}

  def dense(name: str) -> dict[str, np.ndarray]:
    return {'kernel': take(f'{name}.weight').T, 'bias': take(f'{name}.bias')}

  def attention(name: str) -> dict[str, Any]:
    qkv, out = dense(f'{name}.attention.qkv'), dense(f'{name}.output.dense')
    width = len(out['bias'])
    if width % num_heads:
      raise UserError(f'num_heads is {num_heads}, which does not divide the width {width} of the weights.')
    by_head = (num_heads, width // num_heads)
    # Rows of the joint projection: all of query, then key, then value, each head after head.
    kernels = np.split(qkv['kernel'], 3, axis=1)
    biases = np.split(qkv['bias'], 3)
    projections = {
      which: {'kernel': kernel.reshape(width, *by_head), 'bias': bias.reshape(by_head)}
      for which, kernel, bias in zip(('query', 'key', 'value'), kernels, biases, strict=True)
    }
    return {**projections, 'out': {'kernel': out['kernel'].reshape(*by_head, width), 'bias': out['bias']}}

  def block(prefix: str) -> dict[str, Any]:
    divided = f'{prefix}.temporal_dense.weight' in arrays
    params = {ours: norm(f'{prefix}.{hf}') for hf, ours in _HF_NORMS.items() if divided or ours != 'norm_time'}
    params |= {
      ours: attention(f'{prefix}.{hf}') for hf, ours in _HF_ATTENTIONS.items() if divided or ours != 'attention_time'
    }
    if divided:
      params['temporal_fc'] = dense(f'{prefix}.temporal_dense')
    return {
      **params,
      'mlp': {'hidden': dense(f'{prefix}.intermediate.dense'), 'out': dense(f'{prefix}.output.dense')},
    }

  depth = len({name.split('.')[2] for name in arrays if name.startswith('encoder.layer.')})
  blocks = [block(f'encoder.layer.{i}') for i in range(depth)]
  patch = 'embeddings.patch_embeddings.projection'
  encoder = {
    'patch_embedding': {'kernel': take(f'{patch}.weight').transpose(2, 3, 1, 0), 'bias': take(f'{patch}.bias')},
    'class_token': take('embeddings.cls_token'),
    'position_embedding': take('embeddings.position_embeddings'),
    'blocks': _stack(blocks),
    'norm': norm('layernorm'),
  }
  if 'embeddings.time_embeddings' in arrays:
    encoder['time_embedding'] = take('embeddings.time_embeddings')
  heads = {head: dense('classifier')} if 'classifier.weight' in arrays else {}
  if arrays:
    raise UserError(f'The weights have arrays that a Hugging Face TimeSformer does not: {sorted(arrays)}.')
  return {'encoder': encoder, 'heads': heads}


def _stack(trees: list[Any]) -> Any:
  """Stacks nested dicts of equal structure leaf by leaf on a new leading axis."""
  if isinstance(trees[0], dict):
    return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
  return np.stack(trees)
