"""Which example stands at which position: sampling as arithmetic, without state.

The training examples of a stream are an infinite sequence. Position p of it is a pure function of (seed, p),
so any number of processes agree on the data without talking, and the whole state of the input is the step.

Sampling sources in proportion to their sizes is uniform sampling over their union. Other weightings
(uniform, temperature, explicit) give each source a *virtual* size and go through the same scheme.

Only numpy is used here. Random numbers are raw bits (see `philox`): bit generators are stable across numpy versions,
the methods of `np.random.Generator` that shuffle and sample are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from data_pipelines.contract import UserError
from data_pipelines.philox import PERMUTATION, philox
from data_pipelines.storage.layout import MERGED


def _permutation(size: int, seed: int, stream: int, deck: int, epoch: int) -> np.ndarray:
  return _shuffled(philox(PERMUTATION, seed, stream, deck, epoch), size).astype(_index_dtype(size))


def _shuffled(rng: np.random.Generator, size: int) -> np.ndarray:
  # The stable sort of raw bits, not Generator.permutation: that may change between numpy versions, and with it
  # the data order of every resumed run.
  return np.argsort(rng.bit_generator.random_raw(size), kind='stable')


def _index_dtype(size: int) -> type:
  return np.int32 if size < 2**31 else np.int64


def _merge(lengths: tuple[int, ...], seed: int, stream: int, deck: int, epoch: int) -> np.ndarray:
  """A shuffle of examples that lie in runs, which keeps the order within each run.

  The runs are shuffled and merged at random, MERGED at a time: of a group, each next example comes from a run drawn
  with a chance proportional to what is left of it. So a reader goes through each run once, forwards.
  """
  rng = philox(PERMUTATION, seed, stream, deck, epoch)
  lengths = np.array(lengths)
  starts = np.cumsum(lengths) - lengths
  runs = _shuffled(rng, len(lengths))
  merged = []
  for group in (runs[i : i + MERGED] for i in range(0, len(runs), MERGED)):
    turns = np.repeat(group, lengths[group])[_shuffled(rng, int(lengths[group].sum()))]
    example = np.empty(len(turns), np.int64)
    for run in group:
      example[turns == run] = starts[run] + np.arange(lengths[run])
    merged.append(example)
  return np.concatenate(merged).astype(_index_dtype(lengths.sum()))


def _apportion(weights: np.ndarray, total: int) -> np.ndarray:
  """Splits `total` units by largest remainder; a positive weight gets at least one unit, zero gets none."""
  exact = weights / weights.sum() * total
  units = np.where(weights > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
  while (missing := total - units.sum()) != 0:
    if missing > 0:
      units[np.argmax(np.where(weights > 0, exact - units, -np.inf))] += 1
    else:  # many tiny weights were lifted to one unit: who is most over its share gives
      units[np.argmax(np.where(units > 1, units - exact, -np.inf))] -= 1
  return units


def sampling_weights(
  sizes: Mapping[str, int], temperature: float = 1.0, explicit: Mapping[str, float] | None = None
) -> dict[str, float]:
  """The share of each source in a stream's examples.

  Args:
    sizes: number of examples of each source.
    temperature: weight = size ** (1 / temperature): 1 is proportional to size, infinity is uniform.
    explicit: a weight for every source, in any unit; replaces sizes and temperature. Zero leaves a source out.

  Returns:
    {source: share}, summing to 1.

  Raises:
    UserError: a source without examples, temperature <= 0, explicit weights that are negative, not finite, all
      zero, or that do not name exactly the sources of `sizes`.
  """
  for name, size in sizes.items():
    if size <= 0:
      raise UserError(f'Source {name!r} has no examples: take it out of the config or choose another split.')
  if explicit is not None:
    if set(explicit) != set(sizes):
      unknown, missing = (
        ', '.join(sorted(d)) or 'none' for d in (set(explicit) - set(sizes), set(sizes) - set(explicit))
      )
      raise UserError(
        f'Sampling weights (config.mixture.weights) must name every source, in any unit, 0 to leave one out; '
        f'unknown: {unknown}; missing: {missing}.'
      )
    weights = np.array([explicit[name] for name in sizes], np.float64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() == 0:
      raise UserError(
        f'Sampling weights must be finite, not negative and not all zero; got {dict(explicit)}: correct them.'
      )
  else:
    if not temperature > 0:
      raise UserError(f'Sampling temperature is {temperature}; expected > 0 (1: proportional to size, inf: uniform).')
    weights = np.array(list(sizes.values()), np.float64)
    weights = (weights / weights.max()) ** (1 / temperature)
  return dict(zip(sizes, (weights / weights.sum()).tolist(), strict=True))


def epoch_examples(sizes: Sequence[int], weights: Sequence[float]) -> int:
  """Examples of an epoch: as many as the sources hold that are drawn at all, however often each of them is drawn."""
  return int(np.array(sizes, np.int64)[np.array(weights, np.float64) > 0].sum())


@dataclass(frozen=True)
class Mixture:
  """The order in which a stream's examples are drawn from its sources.

  An epoch of the mixture is as many positions as the drawn sources have examples; each source fills its virtual
  size of them, in an order shuffled anew each epoch. The draws of a source are numbered through all epochs, and
  the running number walks through a permutation of the source's own examples, drawn anew for each pass. So each
  example is seen exactly once per pass over its source, whatever the weights; with weights proportional to size
  a pass and an epoch are the same thing. (Our choice.)

  With blocks, all this holds of blocks: `block` positions in a row are of one source, drawn as one.

  Attributes:
    sizes: number of examples of each source.
    weights: share of each source, in any unit; zero is never drawn.
    seed: of the run.
    stream: a number of the stream's own, so that streams over the same source are shuffled differently.
    runs: for each source, None, or the lengths of the runs (files) that can only be read in order: then its passes
      keep the order within each run (`_merge`). Empty: None for all.
    block: positions in a row that one source fills: 1, or the batch size, so that each step trains one source.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...]
  seed: int
  stream: int = 0
  runs: tuple[tuple[int, ...] | None, ...] = ()
  block: int = 1

  @cached_property
  def _blocks(self) -> np.ndarray:
    """int64 [S]: blocks of each source in an epoch."""
    weights, examples = np.array(self.weights, np.float64), epoch_examples(self.sizes, self.weights)
    return _apportion(weights, max(round(examples / self.block), np.count_nonzero(weights)))

  @cached_property
  def virtual_sizes(self) -> np.ndarray:
    """int64 [S]: draws of each source in an epoch; the sizes themselves for proportional weights and blocks of 1."""
    return self._blocks * self.block

  @cached_property
  def epoch_size(self) -> int:
    """The number of positions in an epoch."""
    return int(self.virtual_sizes.sum())

  @cached_property
  def _permutations(self):
    # Deck 0 shuffles the epoch, deck 1 + s the examples of source s. Neighbouring positions share an epoch or
    # straddle two, so a few permutations of each deck are enough.
    decks = [(self._epoch, int(self._blocks.sum())), *((_permutation, size) for size in self.sizes)]
    for source, runs in enumerate(self.runs):
      if runs is not None:
        decks[1 + source] = (_merge, runs)
    return [
      lru_cache(maxsize=3)(partial(shuffle, cards, self.seed, self.stream, deck))
      for deck, (shuffle, cards) in enumerate(decks)
    ]

  def _epoch(self, *deck_and_epoch: int) -> np.ndarray:
    """The blocks of an epoch, shuffled; those of a source with runs stand in their order."""
    drawn = _permutation(*deck_and_epoch)
    ends = np.cumsum(self._blocks)
    for runs, begin, end in zip(self.runs, ends - self._blocks, ends, strict=False):
      if runs is not None:
        drawn[(begin <= drawn) & (drawn < end)] = np.arange(begin, end)
    return drawn

  def _shuffle(self, deck: int, number: np.ndarray) -> np.ndarray:
    size = (int(self._blocks.sum()), *self.sizes)[deck]
    epoch, place = np.divmod(number, size)
    shuffled = np.empty_like(number)
    for e in np.unique(epoch):
      shuffled[epoch == e] = self._permutations[deck](int(e))[place[epoch == e]]
    return shuffled

  def locate(self, position: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which example stands at a position.

    Args:
      position: int >= 0, or an integer array of any shape. Far positions cost what near ones do.

    Returns:
      (source, example), int64 of position's shape: index into `sizes`, index in [0, sizes[source]).
    """
    position = np.asarray(position, np.int64)
    flat = position.ravel()
    turn, place = np.divmod(flat, self.block)
    drawn = self._shuffle(0, turn)
    ends = np.cumsum(self._blocks)
    source = np.searchsorted(ends, drawn, side='right')
    block = turn // self._blocks.sum() * self._blocks[source] + drawn - (ends - self._blocks)[source]
    number = block * self.block + place
    example = np.empty_like(flat)
    for s in np.unique(source):
      example[source == s] = self._shuffle(1 + s, number[source == s])
    return source.reshape(position.shape)[()], example.reshape(position.shape)[()]


def quotas(weights: Mapping[str, float], batch_size: int, multiple: int = 1) -> dict[str, int]:
  """Splits a step's batch between streams in proportion to their weights.

  Rounding to `multiple` makes the shares of the batch slightly wrong. Sum the streams' mean losses with their
  exact shares, `sum_k weight_k / sum(weights) * mean_k`, not with the shares of the batch: then the expected
  gradient is exactly that of sampling in proportion to the weights.

  Args:
    weights: positive weight of each stream, usually its number of examples.
    batch_size: examples a step over all streams and processes.
    multiple: what every stream's batch must divide by (devices on the batch axis of the mesh).

  Returns:
    {stream: examples a step}: positive multiples of `multiple` that sum to batch_size.

  Raises:
    UserError: batch_size is no multiple of `multiple` or too small to give each stream one; a weight <= 0.
  """
  for name, weight in weights.items():
    if not 0 < weight < float('inf'):
      raise UserError(f'The weight of stream {name!r} is {weight}; expected a finite number > 0.')
  if batch_size % multiple or batch_size < multiple * len(weights):
    raise UserError(
      f'batch_size is {batch_size}; expected a multiple of {multiple} (config.batch_multiple) and at least '
      f'{multiple * len(weights)} for {len(weights)} streams: {", ".join(weights)}.'
    )
  units = _apportion(np.array(list(weights.values()), np.float64), batch_size // multiple)
  return {name: int(u) * multiple for name, u in zip(weights, units, strict=True)}
