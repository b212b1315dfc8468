"""The common form that every kind of file is brought to: our names, our axes, blocks stacked."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cover_jax.weights.convolution_layouts import CONVOLUTION_LAYOUTS
from cover_jax.weights.layouts import LAYOUTS, Layout, Rule
from cover_jax.weights.video_layouts import VIDEO_LAYOUTS
from data_pipelines.contract import UserError


class Found(NamedTuple):
  """A parameter that a file holds.

  Attributes:
    array: float32, with our axes. The projections of attention are [depth, D, D] and [depth, D] where the file does
      not tell the number of heads, else [depth, D, H, K] (out: [depth, H, K, D]) and [depth, H, K].
    name: in the file, with '*' for the number of the block.
    shape: in the file, of one block where blocks are separate arrays.
  """

  array: np.ndarray
  name: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a file holds, in our names.

  Attributes:
    path: of the file.
    layout: the kind of file.
    encoder: parameters by their name below 'encoder/', e.g. 'blocks/mlp/hidden/kernel'.
    heads: {head: {'kernel': [D, K], 'bias': [K]}}.
    expected: the file's name of each of our parameters that such a file may hold.
    skipped: (arrays, number of arrays, why) of what has no use here.
    class_names: of those heads whose classes the file names, in label order.
    pooled: such files may lack a class token, because their model pools its patches.
    num_heads: of attention, where the file or the config beside it tells.
    gelu_approximate: the form of GELU that the weights were trained with, where it is known.
    model: `config.model.name` of the encoder.
    fields: of the encoder that the file or the config beside it tells, and that must be the model's.
  """

  path: str
  layout: str
  encoder: Mapping[str, Found]
  heads: Mapping[str, Mapping[str, Found]]
  expected: Mapping[str, str]
  skipped: tuple[tuple[str, int, str], ...] = ()
  class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  pooled: bool = False
  num_heads: int | None = None
  gelu_approximate: bool | None = None
  model: str = 'timesformer'
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def detect(path: str, arrays: Mapping[str, np.ndarray]) -> Layout:
  """The layout of a file, told by its names.

  Raises:
    UserError: if it is none of those known.
  """
  layouts = (*CONVOLUTION_LAYOUTS, *VIDEO_LAYOUTS, *LAYOUTS)
  for layout in layouts:
    if any(prefix + layout.signature in arrays for prefix in layout.prefixes):
      return layout
  some = ', '.join(sorted(arrays)[:3])
  raise UserError(
    f'{path} holds weights of an unknown layout (its arrays are {some}, ...): expected one of '
    f'{", ".join(layout.name for layout in layouts)}.'
  )


def convert(path: str, arrays: Mapping[str, np.ndarray], layout: Layout) -> Weights:
  """Brings a file's arrays to the common form.

  Args:
    path: of the file, for messages.
    arrays: by name, any number format that holds floats.
    layout: of `detect`.

  Returns:
    The weights. A parameter that the file does not hold at all is left out; see `expected`.

  Raises:
    UserError: if a block lacks an array that others have, an array has a shape that the layout does not allow, or one
      is left that is not known to be of no use.
  """
  prefix = next((p for p in layout.prefixes if p + layout.signature in arrays), '')
  arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
  pattern = layout.block_pattern()
  depth = len({match[1] for name in arrays if (match := pattern.match(name))})
  used: set[str] = set()

  def find(rule: Rule) -> Found | None:
    names = [rule.theirs.format(i) for i in range(depth)] if '{}' in rule.theirs else [rule.theirs]
    missing = [name for name in names if name not in arrays]
    if not names or len(missing) == len(names):
      return None
    if missing:
      raise UserError(
        f'{path} has no array {missing[0]!r} although other blocks have theirs: the file is incomplete, fetch it again.'
      )
    used.update(names)
    shape = arrays[names[0]].shape
    try:
      parts = [_ours(rule, _floats(arrays[name])) for name in names]
      array = np.stack(parts) if '{}' in rule.theirs else parts[0]
    except ValueError as error:
      raise UserError(
        f'{path}: the arrays {rule.theirs.format("*")!r} are not those of a {layout.name} (shape {shape}: {error}).'
      ) from error
    return Found(array, rule.theirs.format('*'), shape)

  encoder = {rule.ours: found for rule in layout.rules if (found := find(rule))}
  head = {rule.ours: _matrix(found) for rule in layout.head if (found := find(rule))}
  position = encoder.get('position_embedding')
  if position and not layout.class_row and layout.encoder == 'timesformer':
    if position.array.ndim != 3:
      raise UserError(f'{path}: {position.name!r} has shape {position.shape}, expected [1, N, D].')
    # The class token of such models gets no position embedding.
    with_class_row = np.concatenate([np.zeros_like(position.array[:, :1]), position.array], axis=1)
    encoder['position_embedding'] = position._replace(array=with_class_row)

  skipped: dict[str, list[str]] = {}
  unknown = []
  for name in sorted(set(arrays) - used):
    reason = next((why for regex, why in layout.skippable if re.match(regex, name)), None)
    skipped.setdefault(reason, []).append(name) if reason else unknown.append(name)
  if unknown:
    raise UserError(
      f'{path} has {len(unknown)} arrays that a {layout.name} has no place for ({", ".join(unknown[:3])}): its model '
      'is another one, and loading the rest would change its function silently.'
    )
  query = encoder.get('blocks/attention_space/query/kernel')
  return Weights(
    path=path,
    layout=layout.name,
    encoder=encoder,
    heads={layout.head_name: head} if len(head) == len(layout.head) else {},
    expected={rule.ours: rule.theirs.format('*') for rule in layout.rules},
    skipped=tuple((_summary(names), len(names), why) for why, names in skipped.items()),
    pooled=not layout.class_row,
    num_heads=query.array.shape[2] if query and query.array.ndim == 4 else None,
    gelu_approximate=layout.gelu_approximate,
    model=layout.encoder,
    fields=_fields(encoder),
  )


def _fields(encoder: Mapping[str, Found]) -> dict[str, int]:
  """What the shapes of another video transformer's arrays tell of its fields."""
  found: dict[str, int] = {}
  query = next((f for name, f in encoder.items() if name.endswith('/attention/query/kernel')), None)
  if query is not None and query.array.ndim == 4:
    found['num_heads'] = query.array.shape[2]
  tubelet = encoder.get('patch_embedding/projection/kernel')
  if tubelet is not None and tubelet.array.ndim == 5:
    found |= {'tubelet_size': tubelet.array.shape[0], 'patch_size': tubelet.array.shape[1]}
  return found


def _matrix(found: Found) -> Found:
  """A classifier that is a convolution of 1 x 1 x 1 as a matrix."""
  array = found.array
  return found._replace(array=array.reshape(-1, array.shape[-1])) if array.ndim > 2 else found


def _ours(rule: Rule, array: np.ndarray) -> np.ndarray:
  if rule.third is not None:
    array = np.split(array, 3)[rule.third]
  array = array if rule.axes is None else array.transpose(rule.axes)
  return array + np.float32(rule.add) if rule.add else array


def _floats(array: np.ndarray) -> np.ndarray:
  """Any real number format as float32; big_vision's files hold bfloat16 as two bytes without a type."""
  if array.dtype.kind == 'V' and array.dtype.itemsize == 2:
    import ml_dtypes  # comes with JAX

    array = array.view(ml_dtypes.bfloat16)
  elif array.dtype.kind not in 'fiu':
    raise ValueError(f'dtype {array.dtype} is not a number')
  return np.asarray(array, np.float32)


def _summary(names: list[str]) -> str:
  """'head/*' for names that begin alike."""
  if len(names) == 1:
    return names[0]
  first, last = names[0], names[-1]  # sorted, so what these share all share
  same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
  return first[:same] + '*'
