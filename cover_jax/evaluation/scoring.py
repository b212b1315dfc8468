"""What a head says of test examples that show several views, before it is judged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cover_jax.experiment.build import Experiment


def views(
  experiment: Experiment,
  name: str,
  params: Any,
  clip_BxVxTxHxWx3: jax.Array,
  of_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits,
) -> jax.Array:
  """What one source's head says of every view, f32 [B, V, K].

  At most `config.eval_batch_size` clips (or B, where that is more) are in the encoder at once: memory does not grow
  with the number of views.

  Args:
    experiment: the run.
    name: of the source.
    params: of the run.
    clip_BxVxTxHxWx3: uint8.
    of_logits: what is made of the logits [N, K] of some clips.
  """
  heads = experiment.heads.only(name)
  batch, count = clip_BxVxTxHxWx3.shape[:2]

  def said(clip_NxTxHxWx3):
    encoded = experiment.encode(params['encoder'], clip_NxTxHxWx3)
    return of_logits(heads.apply({'params': params['heads']}, encoded))

  if batch * count <= experiment.config.eval_batch_size:
    folded = said(clip_BxVxTxHxWx3.reshape(batch * count, *clip_BxVxTxHxWx3.shape[2:]))
    return folded.reshape(batch, count, -1)
  return jnp.moveaxis(jax.lax.map(said, jnp.moveaxis(clip_BxVxTxHxWx3, 1, 0)), 0, 1)


def log_odds(views_BxVxK: jax.Array) -> jax.Array:
  """f32 [B, K]: log(p / (1 - p)) of p, the probability under a sigmoid averaged over the views.

  It orders examples as p does, and tells apart what float32 rounds to a p of 1.
  """
  yes_BxK = jax.nn.logsumexp(jax.nn.log_sigmoid(views_BxVxK), axis=1)
  return yes_BxK - jax.nn.logsumexp(jax.nn.log_sigmoid(-views_BxVxK), axis=1)
