"""Numbers that are none: found before anything of them is saved, and named."""

from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax import checkpoints
from cover_jax.runtime import processes
from data_pipelines.contract import UserError


class NonFiniteLoss(Exception):
  """The loss or its gradient is not a number any more; nothing was saved since."""


def trouble(losses: Mapping[str, Any], loss: Any, gradient_norm: Any) -> str | None:
  """What of a step is NaN or infinite, or None.

  Args:
    losses: {stream: scalar on the host}.
    loss: their weighted sum.
    gradient_norm: of all streams together.
  """
  bad = sorted(name for name, value in losses.items() if not np.isfinite(value))
  if bad:
    return f'The loss of stream {", ".join(bad)} is not finite'
  if not np.isfinite(loss):
    return 'The weighted sum of the losses is not finite, though each of them is,'
  if not np.isfinite(gradient_norm):
    return 'The gradient is not finite, though the loss of every stream is (so no stream can be named),'
  return None


# No weight and no average of one is as large in a network that learns: it has diverged, finite as it is.
ABSURD = 1e12


def diverged(state: Any) -> list[str]:
  """'NAME up to 6.8e+34' of each parameter of a train state, or average of one, whose largest number is absurd.

  Waits for the device. Every process must call it.
  """
  arrays = checkpoints.flatten(flax.serialization.to_state_dict({'params': state.params, 'ema': state.ema}))
  arrays = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating) and x.size}
  if not arrays:
    return []
  largest_N = processes.gather(_largest(list(arrays.values())))
  return [f'{name} up to {x:.2g}' for name, x in zip(arrays, largest_N, strict=True) if x > ABSURD]


def bad_arrays(state: Any) -> list[str]:
  """The names of the arrays of a train state, or of a part of one, that hold NaN or infinity.

  Waits for the device. Every process must call it.
  """
  arrays = {
    name: x
    for name, x in checkpoints.flatten(flax.serialization.to_state_dict(state)).items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }
  good_N = processes.gather(_finite(list(arrays.values())))
  return [name for name, good in zip(arrays, good_N, strict=True) if not good]


def check(params: Any, where: str) -> None:
  """Raises UserError if weights that are to be used hold numbers that are none; every process must call it."""
  if bad := bad_arrays(params):
    raise UserError(
      f'{where} holds numbers that are not finite ({", ".join(bad[:3])}, {len(bad)} arrays): take another checkpoint.'
    )


@jax.jit
def _largest(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in arrays])


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])
