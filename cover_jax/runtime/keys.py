"""Random keys by name: what is drawn for a stream, a view or an augmentation does not depend on what else there is."""

import zlib

import jax


def of(rng: jax.Array, name: str) -> jax.Array:
  """The key that `name` has under `rng`; the same on every machine and in every run."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))
