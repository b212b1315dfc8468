"""Hugging Face's TimeSformer: its weights as our parameters, and ours as its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cover_jax.weights.common import convert
from cover_jax.weights.layouts import HF_TIMESFORMER, Rule
from data_pipelines.contract import UserError

TEMPORAL = ('blocks/norm_time', 'blocks/attention_time', 'blocks/temporal_fc')


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
  weights = convert('The state dict', {k: np.asarray(v) for k, v in state_dict.items()}, HF_TIMESFORMER)
  divided = any(name.startswith(TEMPORAL) for name in weights.encoder)
  for name, theirs in weights.expected.items():
    optional = name == 'time_embedding' or (name.startswith(TEMPORAL) and not divided)
    if name not in weights.encoder and not optional:
      raise UserError(
        f'The weights have no array {theirs!r}: expected those of a Hugging Face TimeSformer; '
        'check that the file is one and that it is complete.'
      )
  encoder = {name: split_heads(name, found.array, num_heads) for name, found in weights.encoder.items()}
  classifier = {part: found.array for part, found in weights.heads.get('classifier', {}).items()}
  return {'encoder': nest(encoder), 'heads': {head: classifier} if classifier else {}}


def to_hf_timesformer(encoder: Mapping[str, np.ndarray], head: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The weights that transformers' `TimesformerForVideoClassification` loads; the inverse of `from_hf_timesformer`.

  Args:
    encoder: parameters by their name below 'encoder/'; position and time embedding of the sizes that its config says.
    head: {'kernel': [D, K], 'bias': [K]}.

  Returns:
    Contiguous float32 arrays by name.
  """
  parts: dict[str, list[np.ndarray]] = {}  # those of a joint projection come in the order of their thirds

  def add(rule: Rule, name: str, array: np.ndarray):
    if 'attention' in rule.ours:
      array = array.reshape(-1) if rule.ours.endswith('bias') else array.reshape(_square(array))
    parts.setdefault(name, []).append(array if rule.axes is None else array.transpose(np.argsort(rule.axes)))

  for rule in (rule for rule in HF_TIMESFORMER.rules if rule.ours in encoder):
    array = np.asarray(encoder[rule.ours], np.float32)
    if '{}' in rule.theirs:
      for i, one in enumerate(array):
        add(rule, 'timesformer.' + rule.theirs.format(i), one)
    else:
      add(rule, 'timesformer.' + rule.theirs, array)
  for rule in HF_TIMESFORMER.head:
    add(rule, rule.theirs, np.asarray(head[rule.ours], np.float32))
  return {name: np.ascontiguousarray(np.concatenate(arrays)) for name, arrays in parts.items()}


def _square(array: np.ndarray) -> tuple[int, int]:
  """[D, H, K] and [H, K, D] are both D x D."""
  side = round(array.size**0.5)
  return side, side


def split_heads(name: str, array: np.ndarray, num_heads: int) -> np.ndarray:
  """Gives a projection of attention its axes of heads: [depth, D, D] -> [depth, D, H, K] (out: [depth, H, K, D]).

  Rows of a projection are head after head. Arrays of other names, and those that have the axes, stay as they are.

  Raises:
    UserError: if the number of heads does not divide the width.
  """
  *_, module, which, part = ('', '', *name.split('/'))
  if (
    not module.startswith('attention_')
    or (which, part) == ('out', 'bias')
    or array.ndim == (4 if part == 'kernel' else 3)
  ):
    return array
  depth, width = array.shape[0], array.shape[-1]
  if width % num_heads:
    raise UserError(f'num_heads is {num_heads}, which does not divide the width {width} of the weights.')
  by_head = (num_heads, width // num_heads)
  shape = (width,) if part == 'kernel' else ()
  return array.reshape(depth, *((*by_head, *shape) if which == 'out' else (*shape, *by_head)))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/b': x} -> {'a': {'b': x}}."""
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *folders, leaf = name.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = value
  return tree
