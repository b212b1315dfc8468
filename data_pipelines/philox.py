"""Random streams that are pure functions of what they are for: nothing is passed on, and nothing has to be saved."""

import numpy as np

# The domains: what a random stream is for.
PERMUTATION, AUGMENTATION, SUBSET = 0, 1, 2


def philox(domain: int, seed: int, *ids: int) -> np.random.Generator:
  """A random stream that is a pure function of its arguments.

  Domain and seed are the key of the Philox cipher and the ids (three at most) the upper words of its counter,
  so no two different argument lists ever share numbers (within 2**66 draws).

  Args:
    domain: what the numbers are for, so that uses with equal ids stay independent.
    seed: any integer; taken modulo 2**64.
    *ids: up to three integers in [0, 2**64).
  """
  counter = np.array([0, *ids, *[0] * (3 - len(ids))], np.uint64)
  key = np.array([seed % 2**64, domain], np.uint64)
  return np.random.Generator(np.random.Philox(counter=counter, key=key))
