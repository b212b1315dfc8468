"""Several objectives of one stream, which share a pass of the encoder where they show it the same clips.

    config.streams.video.objective = (
      {'name': 'v3s', 'weight': 1.0},
      {'name': 'statistics', 'weight': 0.5},
    )

The stream's loss is the weighted sum of theirs. Each keeps its parameters and its state under its own name, and its
measures are '<name>_<measure>'; 'loss' is the weighted sum of each example's losses.

**Views.** An example has the views of all. Two objectives may name the same view if they choose the same frames for
it. An objective that chooses none (classification, statistics) looks at 'clip', or at what `'view': 'anchor'` names: a
clip that another objective shows the encoder, as that one shows it (the first in the list that shows a clip of that
name), or else a view as the batch has it. So above the statistics are told of the clips that V3S sampled, and their
labels made of the same pixels. What is there to be taken:

| objective | clips | of which view, and what was done |
| --- | --- | --- |
| V3S | clip | rows and columns taken out |
| VTDL | anchor, negative | perhaps mixed with a still frame |
| HDC | anchor, negative, shuffled | as it is; strong colours; the anchor in another order |
| MoDist | first | every `motion_per_frame`-th frame |
| order and geometry | both, or order and geometry, and before | in another order, warped, or both |

Mixed clips (mixup, cutmix) and parts of clips (order and geometry with `parts='apart'`) are of use to nobody else.

**A pass is shared** by objectives that show the very same clips: each has a pass of its own, unless all of its clips
are in that of another, which it then reads. A pass is computed once, forwards and backwards, exactly as its owner alone
would: no clip of another objective is put into it, since batch statistics would then be others. Its random draws
(dropped paths) are the owner's. So VTDL with statistics of the anchor has one pass, that of VTDL, in any order.

A loss in a list is the one that the objective alone has of the same sub-batch and random key. Two things differ for one
that reads a pass of more clips than its own: paths are dropped as the pass drops them, and an encoder with batch
statistics normalises by those of the whole pass.

**It is not shared** by objectives that change the same view each in their own way, by one that is not written in
`Stages`, and by averaged teachers.

The first objective draws as if it were alone, so that a list of one is that objective to the bit; the others have
random numbers of their own. Colours that the stream changes are drawn once for all. The encoder's statistics are the
mean of those after each pass, weighted as the losses that are made of it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax import objectives
from cover_jax.objectives import LossOutput, Objective, Shown, stages
from cover_jax.runtime import keys
from data_pipelines import contract, declared
from data_pipelines.contract import UserError

# What an entry of the list takes beside the objective's own options.
ENTRY = {
  'weight': declared.Key(1.0, declared.number(above=0)),  # of its loss
  'view': declared.Key(declared.OPTIONAL, declared.nonempty),  # or a clip of another: what it takes for 'clip'
}

# Of videos for which samplers are compared: all short ones, where samplers differ, and one with room for every view.
_LENGTHS = (*range(1, 65), 1 << 16)


class _Member(NamedTuple):
  """One objective of the list; `view` is what it takes for 'clip', '' where it has views of its own."""

  name: str
  objective: Objective
  weight: float
  view: str


def check(options: Sequence[Any], where: str) -> None:
  """Raises UserError unless `options` are objectives with `ENTRY`, no two of one name; `where` is the config key."""
  declared.check_value(options, declared.several(declared.named(), least=1), where)
  names = []
  for i, entry in enumerate(options):
    declared.check({key: entry[key] for key in ENTRY if key in entry}, ENTRY, f'{where}[{i}]')
    objectives.check(entry, f'{where}[{i}]', ENTRY)
    if entry['name'] in names:
      raise UserError(f'{where} has {entry["name"]!r} twice: take one out, or put it into a stream of its own.')
    names.append(entry['name'])


def with_mixing(options: Any, mixing: Mapping[str, float], where: str) -> tuple[dict[str, Any], ...]:
  """The list with mixup and cutmix as options of those that take them; if none does, of the first, which refuses.

  Raises:
    UserError: as `check`, of the list as it is given.
  """
  check(options, where)
  takes = [set(mixing) <= inspect.signature(objectives.maker(e['name'])).parameters.keys() for e in options]
  taker = lambda i: takes[i] or (i == 0 and not any(takes))
  return tuple({**entry, **(mixing if taker(i) else {})} for i, entry in enumerate(options))


def make_all(options: Sequence[Mapping[str, Any]], of_run: Mapping[str, Any], where: str) -> Objective:
  """One objective of a list of them.

  Args:
    options: that `check` allows.
    of_run: what objectives may ask for; see `objectives.make`.
    where: the config key, for messages.

  Raises:
    UserError: if they cannot have their views together, or one of them cannot be made.
  """
  members = [_named(functools.partial(_member, entry, of_run), where, i) for i, entry in enumerate(options)]
  sampling = _samplers(members, where)
  lengths = {view: len(frames) for m in sampling for view, frames in _frames(m, _LENGTHS[-1]).items()}
  lengths = lengths or {'clip': of_run['num_frames']}
  batch = _abstract_batch(members, lengths, of_run['size'])
  offered = jax.eval_shape(lambda batch, rng: _offer(members, batch, rng)[1], batch, jax.random.key(0))
  _check_views(members, lengths, offered, of_run['num_frames'], where)
  members = [_fitted(m, entry, offered, of_run, where) for m, entry in zip(members, options, strict=True)]
  stream = of_run['stream']

  def views(video_frames, rng):
    return {view: frames for m in sampling for view, frames in m.objective.views(video_frames, rng).items()}

  return Objective(
    loss=jax.named_call(_loss(members, of_run['encode'], stream), name='several'),
    init_params=lambda rng: {m.name: m.objective.init_params(_rng_of(rng, i, m)) for i, m in enumerate(members)},
    init_state=lambda params: {m.name: m.objective.init_state(_params_of(params, stream, m)) for m in members},
    views=views if sampling else None,
    after_update=lambda params, state: {
      m.name: m.objective.after_update(_params_of(params, stream, m), state[m.name]) for m in members
    },
    targets=tuple(sorted({name for m in members for name in m.objective.targets})),
    encoded=_encoded(members, batch, of_run['num_frames'], of_run['size']),
  )


def _own(entry):
  return {key: value for key, value in entry.items() if key not in ENTRY}


def _member(entry, of_run):
  objective = objectives.make_one(_own(entry), of_run)
  view = entry.get('view', '' if objective.views is not None else 'clip')
  return _Member(entry['name'], objective, float(entry.get('weight', 1.0)), view)


def _named(make: Callable[[], _Member], where: str, i: int) -> _Member:
  """What `make` gives; where it refuses, the sentence names the key by its place in the list."""
  try:
    return make()
  except UserError as error:
    raise UserError(str(error).replace(f'{where}.', f'{where}[{i}].').replace(f'{where} ', f'{where}[{i}] ')) from error


def _fitted(member, entry, offered, of_run, where):
  """The objective, made for clips of the size of the one that it takes from another."""
  if not member.view or member.view not in offered or offered[member.view][0].shape[2:4] == tuple(of_run['size']):
    return member
  frames, height, width = offered[member.view][0].shape[1:4]
  try:
    return _member(entry, {**of_run, 'size': (height, width)})
  except UserError as error:
    raise UserError(
      f'{where} shows {member.name!r} the clip {member.view!r} of another objective, {frames} frames of {height} x '
      f'{width} pixels: {error}'
    ) from error


def _abstract_batch(members, lengths, size):
  """Shapes of a sub-batch of one example."""
  targets = sorted({name for m in members for name in m.objective.targets})
  tree = contract.shapes(1, lengths, size, targets)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(*leaf), tree, is_leaf=lambda x: isinstance(x, tuple))


def _offer(members, batch, rng):
  """What the objectives that choose frames show.

  Returns:
    ({objective: Shown}, {name of a clip: (it, the same before colours were changed)}: the first of each name).
  """
  shown, offered = {}, {}
  for i, m in enumerate(members):
    if not m.view and m.objective.stages is not None:
      shown[m.name] = made = m.objective.stages.show(batch, _rng_of(rng, i, m))
      for name, clip in made.clips.items():
        if name not in offered:
          offered[name] = (clip, made.raw[name]() if name in made.raw else objectives.raw(batch, name))
  return shown, offered


def _show(members, batch, rng):
  """({objective: the sub-batch as it sees it}, {objective in stages: what it shows})."""
  # One array a view, of the type that most objectives make of it: two casts would be two clips.
  views = {name: jnp.asarray(clip, jnp.float32) for name, clip in batch['views'].items()}
  batch = {**batch, 'views': views, 'raw': batch.get('raw', batch['views'])}
  shown, offered = _offer(members, batch, rng)
  seen = {m.name: _batch_of(batch, m, offered) for m in members}
  for i, m in enumerate(members):
    if m.view and m.objective.stages is not None:
      shown[m.name] = m.objective.stages.show(seen[m.name], _rng_of(rng, i, m))
  return seen, {m.name: shown[m.name] for m in members if m.name in shown}


def _passes(shown: Mapping[str, Shown]) -> dict[str, list[str]]:
  """{whose pass: those who read it, itself first}: a pass for each whose clips are not all in that of another."""
  clips = {name: {id(clip) for clip in made.clips.values()} for name, made in shown.items()}
  passes = {}
  for name in sorted(shown, key=lambda name: -len(clips[name])):  # in the order of the list among equals
    owner = next((o for o in passes if clips[name] <= clips[o]), name)
    passes.setdefault(owner, []).append(name)
  return passes


def _loss(members, encode, stream):
  by_name = {m.name: m for m in members}

  def judged(name, params, state, seen, shown, encoded):
    m = by_name[name]
    own = {mine: encoded[id(clip)] for mine, clip in shown.clips.items()}
    with jax.named_scope(name):
      return m.objective.stages.judge(_params_of(params, stream, m), state[name], seen, own, shown.made)

  def loss(params, state, batch, rng):
    seen, shown = _show(members, batch, rng)
    outputs, moved = {}, []
    for owner, readers in _passes(shown).items():
      levels = tuple(dict.fromkeys(level for name in readers for level in by_name[name].objective.stages.levels))
      encoded, statistics = stages.run_pass(encode, params['encoder'], shown[owner], levels)
      moved.append((sum(by_name[name].weight for name in readers), statistics))
      encoded = {id(clip): encoded[name] for name, clip in shown[owner].clips.items()}
      outputs |= {name: judged(name, params, state, seen[name], shown[name], encoded) for name in readers}
    for i, m in enumerate(members):
      if m.name not in outputs:
        out = m.objective.loss(_params_of(params, stream, m), state[m.name], seen[m.name], _rng_of(rng, i, m))
        moved.append((m.weight, out.statistics))
        outputs[m.name] = out
    measures = {f'{m.name}_{key}': value for m in members for key, value in outputs[m.name].measures.items()}
    measures['loss'] = sum(m.weight * outputs[m.name].measures['loss'] for m in members)
    total = sum(m.weight * outputs[m.name].loss for m in members)
    return LossOutput(total, {m.name: outputs[m.name].state for m in members}, measures, _mean_statistics(moved))

  return loss


def _rng_of(rng, i, member):
  return keys.of(rng, f'objective {member.name}') if i else rng


def _params_of(params, stream, member):
  """The run's parameters as an objective that is alone in its stream finds them; the encoder's are the same object."""
  return {**params, 'objectives': {**params['objectives'], stream: params['objectives'][stream][member.name]}}


def _batch_of(batch, member, offered):
  """The sub-batch as this objective sees it: where it has no views of its own, what it takes is 'clip'."""
  if not member.view:
    return batch
  clip, plain = offered.get(member.view) or (batch['views'][member.view], batch['raw'][member.view])
  of_views = lambda tree: {**tree, 'clip': tree[member.view]} if member.view in tree else tree
  return {
    **batch,
    'views': {**batch['views'], 'clip': clip},
    'raw': {**batch['raw'], 'clip': plain},
    'targets': {name: of_views(of_view) for name, of_view in batch.get('targets', {}).items()},
  }


def _mean_statistics(moved):
  """The encoder's statistics after the sub-batch, of (weight, statistics after a pass); None if nothing moved them."""
  moved = [(weight, statistics) for weight, statistics in moved if statistics is not None]
  if len(moved) < 2:
    return moved[0][1] if moved else None
  total = sum(weight for weight, _ in moved)
  mean = lambda *values: sum(w * x for (w, _), x in zip(moved, values, strict=True)) / total
  return jax.tree.map(mean, *(statistics for _, statistics in moved))


def _frames(member, video_frames, seed=None):
  """{view: frame numbers} that an objective chooses; the message where it can choose none."""
  rng = None if seed is None else np.random.default_rng(seed)
  try:
    return {view: np.asarray(frames).tolist() for view, frames in member.objective.views(video_frames, rng).items()}
  except UserError as error:
    return {'': str(error)}


def _samplers(members, where):
  """The members whose samplers are asked: each that chooses frames, but those that choose the same as one before.

  Raises:
    UserError: if two choose different frames for one view.
  """
  asked, owner = [], {}
  for m in members:
    if m.objective.views is None:
      continue
    own = _frames(m, _LENGTHS[-1])
    others = {owner[view].name: owner[view] for view in own if view in owner}
    for other in others.values():
      same = own.keys() == _frames(other, _LENGTHS[-1]).keys() and all(
        _frames(m, n, seed) == _frames(other, n, seed) for n in _LENGTHS for seed in (None, 0, 1)
      )
      if not same:
        view = next(view for view in own if owner.get(view) is other)
        raise UserError(
          f'{where} has {other.name!r} and {m.name!r}, which choose different frames for the view {view!r}: put one of '
          'them into a stream of its own.'
        )
    if not others:
      asked.append(m)
      owner |= dict.fromkeys(own, m)
  return asked


def _check_views(members, lengths, offered, num_frames, where):
  """Raises UserError unless each objective that chooses no frames finds what it looks at."""
  frames = {**lengths, **{name: clip.shape[1] for name, (clip, _) in offered.items()}}
  for m in members:
    if m.objective.views is not None:
      if m.view:
        raise UserError(f'{where} gives {m.name!r} the view {m.view!r}, but it has views of its own: take `view` out.')
      continue
    if m.view not in frames:
      raise UserError(
        f'{where} has {m.name!r}, which looks at the view {m.view!r}, but others name {", ".join(map(repr, frames))}: '
        'give it one of these as `view`, or put it into a stream of its own.'
      )
    if frames[m.view] != num_frames:
      raise UserError(
        f'{where} has {m.name!r}, which looks at {num_frames} frames, but the view {m.view!r} has {frames[m.view]}: '
        'give it another `view`, or put it into a stream of its own.'
      )
    if m.objective.targets and m.view not in lengths:
      raise UserError(
        f'{where} has {m.name!r}, which asks how its clip was cut ({", ".join(m.objective.targets)}), but {m.view!r} '
        f'is made on the device: give it one of {", ".join(map(repr, lengths))} as `view`.'
      )


def _encoded(members, batch, num_frames, size):
  """{clip: (frames, height, width)} that the encoder sees, those of a shared pass once.

  If there are several objectives, clips are named '<clip> of <objective>'.
  """
  read = set()  # (objective, clip) that it reads from a pass of another

  def look(batch, rng):
    shown = _show(members, batch, rng)[1]
    for owner, readers in _passes(shown).items():
      read.update((name, clip) for name in readers if name != owner for clip in shown[name].clips)
    return {}

  jax.eval_shape(look, batch, jax.random.key(0))
  found = {}
  for m in members:
    views = {'clip': [None] * num_frames} if m.view else _frames(m, _LENGTHS[-1])
    as_they_are = {view: (len(frames), *size) for view, frames in views.items()}
    for view, shape in (m.objective.encoded or as_they_are).items():
      if (m.name, view) not in read:
        found[view if len(members) == 1 else f'{m.view or view} of {m.name}'] = shape
  return found
