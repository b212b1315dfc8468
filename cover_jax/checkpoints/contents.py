"""What a checkpoint holds: its description, its arrays, and whether they are those of a run.

The tree is {'about': JSON text, 'state': TrainState, 'interval': metrics being summed}; an export has no 'interval' and
of the state only 'params'. What is read is checked here, once: who has it from `checkpoints.load` need not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.contract import LABELS, SourceInfo, UserError

# What is learnt, and the average of it; the rest of a state may hold integers.
_PARAMETERS = ('params', 'ema')
# The parts of an optimizer that hold arrays, in their order; see `cover_jax.experiment.optim.make_optimizer`.
OPTIMIZER = ('scale', 'rate')


def about(config: Mapping[str, Any], sources: tuple[SourceInfo, ...], step: int) -> str:
  """What must be known to use a checkpoint: the config, the sources with their class names, the step."""
  described = [
    {
      'name': s.name,
      'modality': s.modality,
      'num_examples': s.num_examples,
      'class_names': list(s.class_names),
      'fps': s.fps,
      **({'labels': s.labels} if s.labels != 'one' else {}),
    }
    for s in sources
  ]
  return json.dumps({'step': step, 'sources': described, 'config': config}, sort_keys=True)


def sources_of(loaded: Mapping[str, Any], names: Sequence[str] | None = None) -> tuple[SourceInfo, ...]:
  """The sources that a checkpoint was trained on.

  Args:
    loaded: of `checkpoints.load` or `describe`.
    names: which, in their order; all, in the order of the run, if None.

  Raises:
    UserError: for a name that it does not have.
  """
  known = {
    s['name']: SourceInfo(
      s['name'],
      s['modality'],
      s['num_examples'],
      tuple(s['class_names']),
      s.get('fps', 0.0),
      s.get('labels', 'one'),
    )
    for s in loaded['about']['sources']
  }
  names = list(known) if names is None else names
  if unknown := next((name for name in names if name not in known), None):
    raise UserError(f'{loaded["path"]} has no head for the source {unknown!r}: it was trained on {sorted(known)}.')
  return tuple(known[name] for name in names)


def check_about(read: Any) -> dict[str, Any]:
  """Returns a description as it was read; raises ValueError naming the first thing that is not as `about` writes it."""
  _expect(isinstance(read, dict), 'it has no description')
  step = read.get('step')
  _expect(_is_count(step), f'its step is {step!r}')
  _expect(isinstance(read.get('config'), dict), 'it has no config')
  _expect(isinstance(read.get('sources'), list), 'it has no sources')
  for source in read['sources']:
    _expect(isinstance(source, dict), 'a source of it has no description')
    name, names = source.get('name'), source.get('class_names')
    _expect(isinstance(name, str), f'a source of it has the name {name!r}')
    _expect(source.get('modality') in ('video', 'image'), f'its source {name!r} is {source.get("modality")!r}')
    _expect(_is_count(source.get('num_examples')), f'its source {name!r} has {source.get("num_examples")!r} examples')
    _expect(
      isinstance(names, list) and all(isinstance(n, str) for n in names), f'its source {name!r} has no class names'
    )
    _expect(isinstance(source.get('fps', 0.0), int | float), f'its source {name!r} has {source.get("fps")!r} fps')
    labels = source.get('labels', 'one')
    _expect(labels in LABELS, f'its source {name!r} has {labels!r} labels, which this version does not know')
  return read


def check_tree(read: Any) -> dict[str, Any]:
  """Returns a tree as it was read, 'about' as a dict; raises ValueError naming the first thing that no run saves."""
  _expect(isinstance(read, dict), 'it has no entries')
  unknown = set(read) - {'about', 'state', 'interval'}
  _expect(not unknown, f'it has an entry {min(unknown, default="", key=str)!r}')
  check_about(read.get('about'))
  state = read.get('state')
  _expect(isinstance(state, dict), 'it has no state')
  _expect(isinstance(state.get('params'), dict) and state['params'], 'it has no parameters')
  for part in ('state', 'interval'):
    for name, leaf in _leaves(read.get(part, {}), part):
      _expect(
        isinstance(leaf, np.ndarray | np.generic | jax.Array) and _is_real(leaf.dtype),
        f'{name} is {_kind_of(leaf)}: expected an array of real numbers',
      )
  for part in _PARAMETERS:
    for name, leaf in _leaves(state.get(part, {}), part):
      _expect(jnp.issubdtype(leaf.dtype, np.floating), f'{name} is {_kind_of(leaf)}: expected floating-point numbers')
  step = state.get('step', read['about']['step'])
  _expect(np.ndim(step) == 0 and int(step) == read['about']['step'], f'its state is of the step {step}')
  return read


def _expect(condition: Any, otherwise: str) -> None:
  if not condition:
    raise ValueError(otherwise)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_real(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, np.bool_) or (
    jnp.issubdtype(dtype, np.number) and not jnp.issubdtype(dtype, np.complexfloating)
  )


def _kind_of(leaf: Any) -> str:
  return f'an array of {leaf.dtype}' if hasattr(leaf, 'dtype') else f'of the type {type(leaf).__name__}'


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
  if not isinstance(tree, dict):
    yield name, tree
    return
  for key, value in tree.items():
    _expect(isinstance(key, str), f'{name} has an entry {key!r}')
    yield from _leaves(value, f'{name}/{key}')


def renaming(have: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, str]:
  """{position: name} of the parts of an optimizer, for a checkpoint that has the former and a run that has the latter.

  {} for checkpoints since the parts have names.

  Args:
    have: {'state': ...} of the checkpoint.
    template: {'state': ...} of the run.
  """
  old = have['state'].get('opt_state')
  new = flax.serialization.to_state_dict(template['state']).get('opt_state')
  if not isinstance(old, Mapping) or not isinstance(new, Mapping) or not set(OPTIMIZER) <= set(new):
    return {}
  if not all(key.isdigit() for key in old):
    return {}
  positions = [key for key in sorted(old, key=int) if jax.tree.leaves(old[key])]
  return dict(zip(positions, OPTIMIZER, strict=True)) if len(positions) == len(OPTIMIZER) else {}


def rename(tree: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
  """A tree with a 'state' of nested dicts, the parts of its optimizer by other names; as it is for no names."""
  if not names:
    return tree
  parts = {new: tree['state']['opt_state'][old] for old, new in names.items()}
  return {**tree, 'state': {**tree['state'], 'opt_state': parts}}


class Misfit(UserError):
  """The arrays of a checkpoint are not those of the run."""


def fit(loaded: Mapping[str, Any], have: Any, template: Any) -> Any:
  """Gives a loaded subtree the template's structure.

  Args:
    loaded: of `checkpoints.load`, for its path.
    have: nested dicts of arrays.
    template: what they should be, of arrays or ShapeDtypeStructs.

  Raises:
    Misfit: naming the first array that is missing, superfluous, or of another shape or dtype.
  """
  if differs := difference(have, template):
    raise Misfit(
      f'{loaded["path"]} does not fit this config: {differs}; '
      'use the config of the checkpoint (config.json beside it) or another --workdir.'
    )
  have = flatten(have)
  # From the template's own dict, since a checkpoint may have lost dicts without an array.
  want = flax.serialization.to_state_dict(template)
  filled = jax.tree_util.tree_map_with_path(lambda path, _: have[_name(path)], want)
  return flax.serialization.from_state_dict(template, filled)


def difference(have: Any, template: Any) -> str | None:
  """'NAME is ... in the checkpoint and ... in the run' of the first array that differs, or None; see `fit`."""
  want = flatten(flax.serialization.to_state_dict(template))
  have = flatten(have)
  # A parameter says more than the optimizer's copy of it.
  for name in sorted(set(want) | set(have), key=lambda n: ('params/' not in n, n)):
    found, wanted = (_form(tree, name, other) for tree, other in ((have, want), (want, have)))
    if wanted != found:
      return f'{name} is {found} in the checkpoint and {wanted} in the run'
  return None


def _form(tree: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> str:
  if name not in tree:
    return 'nothing'
  shape, dtype = f'shape {tuple(np.shape(tree[name]))}', jnp.dtype(tree[name].dtype)
  same = name in other and jnp.dtype(other[name].dtype) == dtype
  return shape if same or name not in other else f'{dtype.name} of {shape}'


def check_sources(loaded: Mapping[str, Any], sources: tuple[SourceInfo, ...]) -> None:
  """Raises a UserError if a source's classes are not those that the checkpoint's head was trained on."""
  for source, saved in zip(sources, sources_of(loaded, [s.name for s in sources]), strict=True):
    if saved.class_names != source.class_names:
      raise UserError(
        f'The source {source.name!r} has {len(source.class_names)} classes now but its head in '
        f'{loaded["path"]} has {len(saved.class_names)}, or their names differ: '
        'use the data set version that the checkpoint was trained on, or start a new --workdir.'
      )
    if saved.labels != source.labels:
      raise UserError(
        f'The source {source.name!r} has {source.labels} label(s) an example now, and its head in {loaded["path"]} was '
        f'trained for {saved.labels}: use the data set that the checkpoint was trained on, or start a new --workdir.'
      )


def flatten(tree: Any) -> dict[str, Any]:
  """{'params/encoder/...': array} of nested dicts."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
  return '/'.join(str(k.key) for k in path)
