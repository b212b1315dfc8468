"""A loss in two stages around one pass of the encoder: what objectives are written in that can share the pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from cover_jax.models.encoder import Encoded
from cover_jax.objectives import Encode, Objective, Params, Shown, Stages, pairs


def staged(name: str, encode: Encode, stages: Stages, **others: Any) -> Objective:
  """The objective of a loss in stages.

  Args:
    name: of what it computes, in profiles.
    encode: the run's encoder.
    stages: the halves of its loss.
    **others: fields of `Objective` but `loss` and `stages`.
  """

  def loss(params, state, batch, rng):
    shown = stages.show(batch, rng)
    encoded, statistics = run_pass(encode, params['encoder'], shown, stages.levels)
    return stages.judge(params, state, batch, encoded, shown.made)._replace(statistics=statistics)

  return Objective(jax.named_call(loss, name=name), stages=stages, **others)


def run_pass(
  encode: Encode, encoder_params: Params, shown: Shown, levels: Sequence[str]
) -> tuple[Mapping[str, Encoded], Any]:
  """Encodes what an objective shows, in training mode.

  Returns:
    ({name of a clip: Encoded}, without statistics; the encoder's statistics after the pass, None if it has none).
  """
  together = pairs.side_by_side(list(shown.clips.values()))
  encoded = encode(encoder_params, together, rng=shown.rng, levels=levels)
  maps, statistics = encoded.replace(statistics=None), encoded.statistics
  if len(shown.clips) == 1:
    return dict.fromkeys(shown.clips, maps), statistics
  maps_BxVx = jax.tree.map(lambda x: pairs.apart(x, len(shown.clips)), maps)
  of_clip = lambda v: jax.tree.map(lambda x: x[:, v], maps_BxVx)
  return {name: of_clip(v) for v, name in enumerate(shown.clips)}, statistics
