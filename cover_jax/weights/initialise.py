"""Starting from weights that exist: `config.init_from` seeds the parameters of step 0. Resuming is another thing.

What a ViT has, a TimeSformer takes as it is; its temporal parts are derived (arXiv 2102.05095, appendix A, and the
released code): temporal attention is a copy of spatial attention, `temporal_fc` is zero and so is, unless
`config.model.time_init_std` says otherwise, the time embedding: the model is at first the image model that it was
seeded from. CoVeR seeds "all non-temporal parameters".
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from cover_jax import checkpoints
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.optim import parameter_name
from cover_jax.experiment.state import TrainState, around, create, init_params
from cover_jax.models import encoder as encoders
from cover_jax.models.encoder import Encoder
from cover_jax.models.timesformer import resize_position_embedding, resize_time_embedding
from cover_jax.runtime import sharding
from cover_jax.weights import files
from cover_jax.weights.common import Weights
from cover_jax.weights.huggingface import TEMPORAL, split_heads
from data_pipelines.contract import UserError

TEMPORAL_ATTENTION = ('copy', 'random', 'zero')
# Of other transformers, and with other axes in their files.
_SHAPED_OTHERWISE = ('blocks/layers/attention/', 'patch_embedding/projection/')
# What to do about arrays of a file that the model has no place for.
_HOMELESS = {
  'timesformer': 'set config.model.attention to that of the file ("divided" if it has temporal attention)',
}


class Row(NamedTuple):
  """One line of the table that says what became of every parameter and of every array of the file."""

  parameter: str
  shape: tuple[int, ...] | None
  name: str
  file_shape: tuple[int, ...] | None
  action: str  # begins with loaded, resized, derived, fresh or skipped


def start(
  experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh, placed: TrainState
) -> TrainState:
  """The state at step 0 on the mesh, seeded from `config.init_from.path` if there is one.

  Raises:
    UserError: if the weights cannot be read or do not fit.
  """
  config = experiment.config
  options = config.init_from
  if not options.path:
    return create(experiment, optimizer, mesh, placed)

  def draw(rng):
    return nn.meta.unbox(init_params(experiment, rng))

  key = jax.random.key(config.seed)
  model_size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(draw, key)))
  weights = files.read(options.path, options.params, model_size)
  check_encoder(weights, encoders.name_of(config.model), encoders.options_of(experiment.model))
  with sharding.use(mesh, config.logical_axis_rules):
    fresh = jax.jit(draw, out_shardings=placed.params)(key)
    params, rows = seed(
      fresh,
      weights,
      class_names={s.name: s.class_names for s in experiment.sources},
      temporal_attention=options.temporal_attention,
      heads=options.heads.to_dict(),
      first_bias={name: experiment.heads.first_bias(name) for name, _ in experiment.heads.class_counts},
    )
    if jax.process_index() == 0:
      logging.info('\n%s', table(rows, weights))
      for note in notes(weights, experiment.model):
        logging.warning('%s', note)
    params = sharding.put(params, placed.params)
    return jax.jit(functools.partial(around, experiment, optimizer), out_shardings=placed)(params)


def seed(
  params: Mapping[str, Any],
  weights: Weights,
  *,
  class_names: Mapping[str, Sequence[str]],
  temporal_attention: str = 'copy',
  heads: Mapping[str, str] | None = None,
  first_bias: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], list[Row]]:
  """Replaces parameters by those of a file.

  Position embeddings are resized bilinearly in two dimensions (ViT's way), time embeddings linearly.

  Args:
    params: {'encoder', 'heads', 'objectives'} of a fresh model; leaves need a shape only.
    weights: what a file holds.
    class_names: of each of our heads, in label order.
    temporal_attention: what the temporal attention and its LayerNorm become where the file has none: 'copy' of the
      spatial ones; 'random', as they are in `params`; or 'zero': a copy whose output projection is zero, as ViViT
      starts it. `temporal_fc` is zero then, but the identity for 'zero': of two zero factors in a row neither ever
      gets a gradient.
    heads: {our head: head of the file}: takes the columns of the classes that both know by the same name, and starts
      the others as `first_bias` says. A head that the file names as we do, with the same classes, is kept anyway;
      others of the file are dropped.
    first_bias: {our head: what the bias of a class starts at}; 0 for others, as all of their kernel does.

  Returns:
    (the same tree, with float32 numpy arrays where something came from the file or was derived from it, and the
    leaves of `params` elsewhere; the table's rows).

  Raises:
    UserError: if the file has another depth, width, patch size, ... than the model, lacks a parameter of the encoder
      that cannot be derived, holds one that the model has no place for, or a head cannot be mapped.
  """
  if temporal_attention not in TEMPORAL_ATTENTION:
    choices = ', '.join(TEMPORAL_ATTENTION)
    raise UserError(f'config.init_from.temporal_attention is {temporal_attention!r}: expected one of {choices}.')
  shapes = {name: tuple(x.shape) for name, x in checkpoints.flatten(params['encoder']).items()}
  _check_dimensions(weights, shapes)
  if homeless := sorted(set(weights.encoder) - set(shapes)):
    raise UserError(
      f'{weights.path} has {weights.encoder[homeless[0]].name!r} and {len(homeless) - 1} other arrays that this model '
      f'has no place for: {_HOMELESS.get(weights.model, "set the fields of config.model to those of the file")}.'
    )
  values: dict[str, np.ndarray] = {}
  rows = []
  for name, shape in shapes.items():
    made = _of_file(weights, name, shape) or _derived(weights, name, shape, temporal_attention)
    if made is None:
      raise UserError(
        f'{weights.path} ({weights.layout}) has no array {weights.expected.get(name, name)!r} for the parameter '
        f'encoder/{name}, which cannot be derived: the file is incomplete or not of this kind of model.'
      )
    value, action = made
    found = weights.encoder.get(name)
    rows.append(Row(f'encoder/{name}', shape, found.name if found else '', found.shape if found else None, action))
    if value is not None:
      values[f'encoder/{name}'] = value
  head_values, head_rows = _heads(params['heads'], weights, class_names, heads or {}, first_bias or {})
  values |= head_values
  others = checkpoints.flatten(params.get('objectives', {}))
  rows += [*head_rows, *(Row(f'objectives/{n}', tuple(x.shape), '', None, 'fresh') for n, x in others.items())]
  rows += [Row('', None, name, None, f'skipped: {why} ({n} arrays)') for name, n, why in weights.skipped]
  return jax.tree_util.tree_map_with_path(lambda path, x: values.get(parameter_name(path), x), params), rows


def table(rows: Sequence[Row], weights: Weights) -> str:
  """The rows as text, with a count of each action at the end."""
  show = lambda shape: '' if shape is None else 'x'.join(map(str, shape)) or 'scalar'
  lines = [('parameter', 'shape', 'in the file', 'shape there', 'action')]
  lines += [(r.parameter, show(r.shape), r.name, show(r.file_shape), r.action) for r in rows]
  widths = [max(len(line[i]) for line in lines) for i in range(4)]
  text = ['  '.join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]) for line in lines]
  actions = [row.action.split(':')[0].split()[0] for row in rows]
  counts = ', '.join(f'{actions.count(a)} {a}' for a in ('loaded', 'resized', 'derived', 'fresh', 'skipped'))
  return '\n'.join([f'Initialised from {weights.path} ({weights.layout})', *text, counts])


def notes(weights: Weights, model: Encoder) -> list[str]:
  """Sentences on what the shapes do not tell and what may change the function of the weights."""
  found = []
  if hasattr(model, 'gelu_approximate') and weights.gelu_approximate not in (None, model.gelu_approximate):
    form = 'tanh approximation' if weights.gelu_approximate else 'exact form'
    found.append(
      f'These weights were trained with the {form} of GELU: for their exact function set '
      f'config.model.gelu_approximate={weights.gelu_approximate}.'
    )
  if weights.num_heads is None and 'num_heads' not in weights.fields and hasattr(model, 'num_heads'):
    found.append(
      f'The file does not tell the number of attention heads: it is read as config.model.num_heads = {model.num_heads} '
      f'heads of {model.width // model.num_heads} features (those of ViT have 64).'
    )
  return found


def check_encoder(weights: Weights, ours: str, fields: Mapping[str, Any]) -> None:
  """Raises UserError if a file's weights are not of the encoder `config.model.name` with these fields."""
  if weights.model != ours:
    raise UserError(
      f'{weights.path} ({weights.layout}) holds the weights of the encoder {weights.model!r}, but config.model.name is '
      f'{ours!r}: set config.model.name and its fields to those of the file, or take another file.'
    )
  _check_fields(weights, fields)


def _check_fields(weights: Weights, fields: Mapping[str, Any]) -> None:
  said = {name: value for name, value in weights.fields.items() if name in fields}
  if wrong := [name for name, value in said.items() if value != fields[name]]:
    theirs, ours = (', '.join(f'{name} {of[name]}' for name in wrong) for of in (said, fields))
    raise UserError(
      f'{weights.path} ({weights.layout}) does not fit config.model: the file has {theirs}, the model {ours}; '
      'set the values of the file or take another file.'
    )


def _check_dimensions(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError that names every size in which file and model differ."""
  file = {name: found.array.shape for name, found in weights.encoder.items()}
  sizes = {
    'depth': ('blocks/norm_space/scale', 0),
    'width': ('norm/scale', 0),
    'mlp_dim': ('blocks/mlp/hidden/bias', 1),
    'patch_size': ('patch_embedding/kernel', 0),
  }
  pairs = {
    field: (file[name][axis], shapes[name][axis])
    for field, (name, axis) in sizes.items()
    if name in shapes and len(file.get(name, ())) == len(shapes[name])
  }
  if weights.num_heads and 'blocks/attention_space/query/kernel' in shapes:
    pairs['num_heads'] = weights.num_heads, shapes['blocks/attention_space/query/kernel'][2]
  if wrong := {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}:
    theirs, ours = (', '.join(f'{field} {pair[i]}' for field, pair in wrong.items()) for i in (0, 1))
    raise UserError(
      f'{weights.path} ({weights.layout}) does not fit config.model: the file has {theirs}, the model {ours}; '
      'set the values of the file or take another file.'
    )


def _of_file(weights: Weights, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str] | None:
  """A parameter that the file holds, at our size."""
  if name not in weights.encoder:
    return None
  array, theirs, _ = weights.encoder[name]
  where = f'{weights.path}: {theirs!r}'
  action = 'loaded'
  if name.startswith('blocks/attention_') and array.size == math.prod(shape):
    array = split_heads(name, array, shape[2] if name.endswith('kernel') and '/out/' not in name else shape[1])
  elif array.ndim != len(shape) and array.size == math.prod(shape) and name.startswith(_SHAPED_OTHERWISE):
    # Other transformers: projections lie head after head, the embedding of a tubelet is a convolution.
    array = array.reshape(shape)
  if name == 'position_embedding' and array.ndim == 3 and array.shape[::2] == shape[::2]:
    side, stored = math.isqrt(array.shape[1] - 1), array.shape[1] - 1
    if side * side != stored:
      raise UserError(
        f'{where} has {stored} positions beside the class token, not a square number: only square grids of '
        'patches can be resized.'
      )
    if array.shape != shape:
      new = math.isqrt(shape[1] - 1)
      array = np.asarray(resize_position_embedding(jnp.asarray(array), (new, new)))
      action = f'resized: {side} x {side} to {new} x {new}, bilinear'
  if name == 'time_embedding' and array.ndim == 3 and array.shape[::2] == shape[::2] and array.shape != shape:
    action = f'resized: {array.shape[1]} to {shape[1]} frames, linear'
    array = np.asarray(resize_time_embedding(jnp.asarray(array), shape[1]))
  if array.shape != shape:
    raise UserError(f'{where} gives encoder/{name} the shape {array.shape}, but the model has {shape} there.')
  return array, action


def _derived(
  weights: Weights, name: str, shape: tuple[int, ...], temporal_attention: str
) -> tuple[np.ndarray | None, str] | None:
  """A parameter that the file lacks because its model does; None where there is no rule for that."""
  if weights.model != 'timesformer':
    return None
  if name == 'class_token' and weights.pooled:
    return None, "fresh: the file's model has no class token"
  if any(theirs.startswith(TEMPORAL) for theirs in weights.encoder):
    return None  # a video model: what it lacks is lost, not to be derived
  if name == 'time_embedding':
    return None, 'fresh: zero, unless config.model.time_init_std is set'
  if not name.startswith(TEMPORAL):
    return None
  if name.startswith('blocks/temporal_fc'):
    if temporal_attention == 'zero' and name.endswith('kernel'):
      return np.broadcast_to(np.eye(shape[1], dtype=np.float32), shape), 'derived: identity'
    return np.zeros(shape, np.float32), 'derived: zero'
  if temporal_attention == 'random':
    return None, 'fresh: as config.init_from.temporal_attention says'
  if temporal_attention == 'zero' and '/out/' in name:
    return np.zeros(shape, np.float32), 'derived: zero'
  spatial = name.replace('_time', '_space')
  copied = _of_file(weights, spatial, shape)
  return copied and (copied[0], f'derived: copy of encoder/{spatial}')


def _heads(
  params: Mapping[str, Any],
  weights: Weights,
  class_names: Mapping[str, Sequence[str]],
  mapped: Mapping[str, str],
  first_bias: Mapping[str, float],
) -> tuple[dict[str, np.ndarray], list[Row]]:
  """Heads that are kept or mapped, and rows for all heads of the model and of the file."""
  for ours, theirs in mapped.items():
    where = f'config.init_from.heads.{ours} = {theirs!r}'
    if ours not in params:
      raise UserError(f'{where}: the run has no head {ours!r}; it has {sorted(params)}.')
    if theirs not in weights.heads:
      raise UserError(f'{where}: {weights.path} has no such head; it has {sorted(weights.heads) or "none"}.')
    if theirs not in weights.class_names:
      raise UserError(f'{where}: {weights.path} does not name its classes, so that they cannot be mapped to ours.')
    if not set(weights.class_names[theirs]) & set(class_names[ours]):
      raise UserError(f'{where}: no class of that head has the name of one of ours, e.g. {class_names[ours][0]!r}.')
  values, rows, used = {}, [], set()
  for ours, parts in params.items():
    theirs = mapped.get(ours, ours)
    names = {k: tuple(v) for k, v in weights.class_names.items()}
    same = theirs in weights.heads and names.get(theirs) == tuple(class_names[ours])
    ours_flat = checkpoints.flatten(parts)
    if (same or ours in mapped) and set(weights.heads[theirs]) != set(ours_flat):
      raise UserError(
        f'{weights.path}: its head {theirs!r} is of another kind than config.heads says of {ours!r} (it has '
        f'{", ".join(sorted(weights.heads[theirs]))}): take that kind, or name the source otherwise.'
      )
    for part, leaf in ours_flat.items():
      shape = tuple(leaf.shape)
      if not same and ours not in mapped:
        rows.append(Row(f'heads/{ours}/{part}', shape, '', None, 'fresh'))
        continue
      found = weights.heads[theirs][part]
      first = first_bias.get(ours, 0.0) if part == 'bias' else 0.0
      if '/' in part:
        value, common = found.array, len(class_names[ours])
      else:
        where = f'{weights.path}: {found.name!r}'
        value, common = _columns(found.array, names[theirs], class_names[ours], where, first)
      if value.shape != shape:
        raise UserError(
          f'{weights.path}: {found.name!r} gives heads/{ours}/{part} the shape {value.shape}, not {shape}.'
        )
      values[f'heads/{ours}/{part}'] = value
      used.add(theirs)
      others = f'{first:.3g}' if first else 'zero'
      mapping = f'loaded: {common} of {len(class_names[ours])} classes by name, the others {others}'
      action = 'loaded' if same else mapping
      rows.append(Row(f'heads/{ours}/{part}', shape, found.name, found.shape, action))
  for head, parts in weights.heads.items():
    if head not in used:
      why = 'its classes are not ours' if head in params and head in weights.class_names else 'head'
      rows += [Row('', None, found.name, found.shape, f'skipped: {why}') for found in parts.values()]
  return values, rows


def _columns(
  array: np.ndarray, theirs: Sequence[str], ours: Sequence[str], where: str, first: float
) -> tuple[np.ndarray, int]:
  """Columns [..., K] of our classes from [..., K'] of theirs by name, `first` for one that they lack; how many."""
  if array.shape[-1] != len(theirs):
    raise UserError(f'{where} has {array.shape[-1]} classes, but {len(theirs)} names are given for them.')
  column = {name: k for k, name in enumerate(theirs)}
  value = np.full((*array.shape[:-1], len(ours)), first, np.float32)
  both = [k for k, name in enumerate(ours) if name in column]
  value[..., both] = array[..., [column[ours[k]] for k in both]]
  return value, len(both)
