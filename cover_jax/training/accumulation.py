"""Gradient accumulation: one optimizer step from several small batches, for the memory of one of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cover_jax.objectives import LossOutput

# (params, objective states, encoder statistics, batch, rng, {stream: share of its batch})
#   -> ((loss, ({stream: output}, encoder statistics)), gradients)
LossAndGradient = Callable[..., tuple[tuple[jax.Array, tuple[Mapping[str, LossOutput], Any]], Any]]


def accumulate(
  loss_and_gradient: LossAndGradient,
  params: Any,
  states: Mapping[str, Any],
  statistics: Any,
  batch: Mapping[str, Mapping[str, jax.Array]],
  rng: jax.Array,
  steps: int,
) -> tuple[tuple[jax.Array, tuple[dict[str, LossOutput], Any]], Any]:
  """Runs a batch as `steps` microbatches, one after the other, and adds up losses and gradients.

  A stream's loss is a mean over its examples (`mask`), so a microbatch counts with its share of them: loss and
  gradient are those of the large batch. What an objective does across the examples of a batch (mixing two clips)
  stays within a microbatch, and so do batch statistics by which an encoder normalises; an objective's state and running
  statistics go from one to the next, so a queue already holds the keys of the microbatches before. Random draws differ
  from those of the large batch.

  Args:
    loss_and_gradient: see `LossAndGradient`. Each stream's loss is to be multiplied by its share before they are added.
    params: what the gradients are taken for.
    states: {stream: state of its objective}.
    statistics: of the encoder; None where it has none.
    batch: {stream: {name: [B, ...]}}; `steps` divides each B.
    rng: a key; microbatch j uses fold_in(rng, j).
    steps: 1 runs the batch as it is, with `rng` itself.

  Returns:
    As `loss_and_gradient` of the whole batch; per-example measures [B] in the order of the batch.
  """
  if steps == 1:
    return loss_and_gradient(params, states, statistics, batch, rng, dict.fromkeys(batch, 1.0))
  micro = jax.tree.map(lambda x: microbatches(x, steps), batch)
  count = {name: jnp.sum(sub['mask'], axis=1, dtype=jnp.float32) for name, sub in micro.items()}
  share = {name: n / jnp.maximum(jnp.sum(n), 1) for name, n in count.items()}

  def body(carry, x):
    states, statistics, total, gradients = carry
    j, sub_batches, shares = x
    (loss, (outputs, statistics)), more = loss_and_gradient(
      params, states, statistics, sub_batches, jax.random.fold_in(rng, j), shares
    )
    states = {name: out.state for name, out in outputs.items()}
    losses = {name: shares[name] * out.loss for name, out in outputs.items()}
    measures = {name: out.measures for name, out in outputs.items()}
    return (states, statistics, total + loss, jax.tree.map(jnp.add, gradients, more)), (losses, measures)

  start = dict(states), statistics, jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
  (states, statistics, total, gradients), (losses, measures) = jax.lax.scan(
    body, start, (jnp.arange(steps), micro, share)
  )
  outputs = {
    name: LossOutput(jnp.sum(losses[name]), states[name], {k: _joined(v) for k, v in measures[name].items()})
    for name in batch
  }
  return (total, (outputs, statistics)), gradients


def microbatches(x_BxR: jax.Array, steps: int) -> jax.Array:
  """[B, ...] to [steps, B / steps, ...]: microbatch j has the rows j, j + steps, j + 2 steps, ...

  Not the first rows, then the next: a device holds neighbouring rows of the batch, and has some of each microbatch.
  """
  return x_BxR.reshape(-1, steps, *x_BxR.shape[1:]).swapaxes(0, 1)


def _joined(x_KxM: jax.Array) -> jax.Array:
  """The inverse of `microbatches`."""
  return x_KxM.swapaxes(0, 1).reshape(-1, *x_KxM.shape[2:])
