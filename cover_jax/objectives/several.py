"""Several objectives of one stream, which share a pass of the encoder where they show it the same clip.

    config.streams.video.objective = (
      {'name': 'v3s', 'weight': 1.0},
      {'name': 'vtdl', 'weight': 0.5},
    )

The stream's loss is the weighted sum of theirs. Each keeps its parameters and its state under its own name, and its
measures are '<name>_<measure>'; 'loss' is the weighted sum of each example's losses.

**Views.** An example has the views of all. Two objectives may name the same view if they choose the same frames for
it. An objective that chooses none (classification) looks at 'clip': the source's sampler draws it, or another objective
of the list that names it. Beside objectives that name other views, `'view': 'anchor'` says which it takes for 'clip'.

**A pass is shared** by objectives that give the encoder the very same view, unchanged, with the run's own parameters
and both in training mode or both not; the levels that one asks for later must be among those of the first. It is
computed once, forwards and backwards, with the random draws of the objective that comes first in the list (dropped
paths are then the same for all). Colours that the stream changes are drawn once for all.

That is so for classification without mixup and for statistics.

**It is not shared** by objectives that change their clips (V3S, order and geometry, mixup) or put several into one
batch (VTDL, HDC, MoDist): these run the encoder for themselves, and an averaged teacher always does. So V3S and VTDL
in one list cost as much as apart; what they have in common is the batch. `Objective.as_given` says who shares.

The first objective draws as if it were alone, so that a list of one is that objective to the bit; the others have
random numbers of their own. The encoder's statistics are the mean of those after each objective, weighted as the
losses.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cover_jax import objectives
from cover_jax.models.encoder import Encoded
from cover_jax.objectives import Encode, LossOutput, Objective, Params
from cover_jax.runtime import keys
from data_pipelines import declared
from data_pipelines.contract import UserError

# What an entry of the list takes beside the objective's own options.
ENTRY = {
  'weight': declared.Key(1.0, declared.number(above=0)),  # of its loss
  'view': declared.Key(declared.OPTIONAL, declared.nonempty),  # of another objective: what it takes for 'clip'
}

# Of videos for which samplers are compared: all short ones, where samplers differ, and one with room for every view.
_LENGTHS = (*range(1, 65), 1 << 16)

_passes: contextvars.ContextVar[list['_Pass'] | None] = contextvars.ContextVar('passes of the encoder', default=None)


class _Pass(NamedTuple):
  """A pass of the encoder: what it was given, so that it stays alive and is the same by identity, and what came out."""

  params: Params
  clip: jax.Array
  trains: bool
  levels: frozenset[str]
  encoded: Encoded


class _Member(NamedTuple):
  """One objective of the list; `view` is what it takes for 'clip', '' where it looks at its own views."""

  name: str
  objective: Objective
  weight: float
  view: str

  def place(self, view: str) -> str:
    """What the stream calls a view of this objective."""
    return self.view if self.view and view == 'clip' else view


def check(options: Sequence[Any], where: str) -> None:
  """Raises UserError unless `options` are objectives with `ENTRY`, no two of one name; `where` is the config key."""
  declared.check_value(options, declared.several(declared.named(), least=1), where)
  names = []
  for i, entry in enumerate(options):
    declared.check({key: entry[key] for key in ENTRY if key in entry}, ENTRY, f'{where}[{i}]')
    objectives.check(_own(entry), f'{where}[{i}]')
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
  of_run = {**of_run, 'encode': _sharing(of_run['encode'])}
  members = [
    _Member(e['name'], objectives.make_one(_own(e), of_run), float(e.get('weight', 1.0)), e.get('view', ''))
    for e in options
  ]
  sampling = _samplers(members, where)
  lengths = {view: len(frames) for m in sampling for view, frames in _frames(m, _LENGTHS[-1]).items()}
  _check_views(members, lengths, of_run['num_frames'], where)
  stream = of_run['stream']

  def views(video_frames, rng):
    return {view: frames for m in sampling for view, frames in m.objective.views(video_frames, rng).items()}

  return Objective(
    loss=jax.named_call(_loss(members, stream), name='several'),
    init_params=lambda rng: {m.name: m.objective.init_params(_rng_of(rng, i, m)) for i, m in enumerate(members)},
    init_state=lambda params: {m.name: m.objective.init_state(_params_of(params, stream, m)) for m in members},
    views=views if sampling else None,
    after_update=lambda params, state: {
      m.name: m.objective.after_update(_params_of(params, stream, m), state[m.name]) for m in members
    },
    targets=tuple(sorted({name for m in members for name in m.objective.targets})),
    encoded=_encoded(members, lengths or {'clip': of_run['num_frames']}),
    as_given=all(m.objective.as_given for m in members),
  )


def _own(entry):
  return {key: value for key, value in entry.items() if key not in ENTRY}


def _sharing(encode: Encode) -> Encode:
  """`encode`, which within `_shared_passes` computes each pass once."""

  def shared(encoder_params, clip_BxTxHxWx3, *, rng=None, levels=()):
    made, trains, wanted = _passes.get(), rng is not None, frozenset(levels)
    for p in made or ():
      if p.params is encoder_params and p.clip is clip_BxTxHxWx3 and p.trains == trains and wanted <= p.levels:
        return p.encoded
    encoded = encode(encoder_params, clip_BxTxHxWx3, rng=rng, levels=levels)
    if made is not None:
      made.append(_Pass(encoder_params, clip_BxTxHxWx3, trains, wanted, encoded))
    return encoded

  return shared


@contextlib.contextmanager
def _shared_passes() -> Iterator[None]:
  """Passes within are shared with each other, and with none before or after."""
  token = _passes.set([])
  try:
    yield
  finally:
    _passes.reset(token)


def _loss(members, stream):
  def loss(params, state, batch, rng):
    # One array a view, of the type that most objectives make of it: two casts would be two clips.
    views = {name: jnp.asarray(clip, jnp.float32) for name, clip in batch['views'].items()}
    batch = {**batch, 'views': views, 'raw': batch.get('raw', batch['views'])}
    with _shared_passes():
      outputs = {
        m.name: m.objective.loss(_params_of(params, stream, m), state[m.name], _batch_of(batch, m), _rng_of(rng, i, m))
        for i, m in enumerate(members)
      }
    measures = {f'{name}_{key}': value for name, out in outputs.items() for key, value in out.measures.items()}
    measures['loss'] = sum(m.weight * outputs[m.name].measures['loss'] for m in members)
    total = sum(m.weight * outputs[m.name].loss for m in members)
    states = {name: out.state for name, out in outputs.items()}
    return LossOutput(total, states, measures, _mean_statistics(members, outputs))

  return loss


def _rng_of(rng, i, member):
  return keys.of(rng, f'objective {member.name}') if i else rng


def _params_of(params, stream, member):
  """The run's parameters as an objective that is alone in its stream finds them; the encoder's are the same object."""
  return {**params, 'objectives': {**params['objectives'], stream: params['objectives'][stream][member.name]}}


def _batch_of(batch, member):
  """The sub-batch with the views as this objective names them."""
  if not member.view:
    return batch
  named = lambda tree: {**tree, 'clip': tree[member.view]}
  targets = {name: named(of_view) for name, of_view in batch.get('targets', {}).items()}
  return {**batch, 'views': named(batch['views']), 'raw': named(batch['raw']), 'targets': targets}


def _mean_statistics(members, outputs):
  """The encoder's statistics after the sub-batch; None if no objective moved them."""
  moved = [(m.weight, outputs[m.name].statistics) for m in members if outputs[m.name].statistics is not None]
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


def _check_views(members, lengths, num_frames, where):
  """Raises UserError unless each objective that chooses no frames finds the view that it looks at."""
  names = ', '.join(map(repr, lengths)) or "'clip'"
  for m in members:
    if m.objective.views is not None:
      if m.view:
        raise UserError(f'{where} gives {m.name!r} the view {m.view!r}, but it has views of its own: take `view` out.')
      continue
    view = m.place('clip')
    if view not in (lengths or ('clip',)):
      raise UserError(
        f'{where} has {m.name!r}, which looks at the view {view!r}, but others name {names}: give it one of these as '
        '`view`, or put it into a stream of its own.'
      )
    if lengths.get(view, num_frames) != num_frames:
      raise UserError(
        f'{where} has {m.name!r}, which looks at {num_frames} frames, but the view {view!r} has {lengths[view]}: give '
        'it another `view`, or put it into a stream of its own.'
      )


def _encoded(members, lengths):
  """{pass: frames}, a shared one once: named as its view, others '<view> of <objective>' beside other objectives."""
  passes = {}
  for m in members:
    own = m.objective.encoded
    if own is None:
      own = {v: lengths[v] for v in ([m.place('clip')] if m.objective.views is None else _frames(m, _LENGTHS[-1]))}
    shared = m.objective.as_given or len(members) == 1
    passes |= {view if shared else f'{view} of {m.name}': frames for view, frames in own.items()}
  return passes
