"""What is counted in a step: one CLU collection of averages per source, summed on the device."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from data_pipelines.contract import SourceInfo

if TYPE_CHECKING:
  from clu.metrics import Collection

Collections = Mapping[str, 'Collection']


def collection(names: Sequence[str]) -> type['Collection']:
  """A CLU collection class of averages of per-example values with these names."""
  from clu import metrics as clu_metrics  # not there where models are only read

  return clu_metrics.Collection.create(**{n: clu_metrics.Average.from_output(n) for n in names})


def per_source(
  measures: Mapping[str, jax.Array],
  source_B: jax.Array,
  mask_B: jax.Array,
  sources: Sequence[SourceInfo],
  members: Sequence[int],
) -> Collections:
  """Averages per-example values over the examples of each source.

  Args:
    measures: {name: [B]}; cast to f32, since CLU accumulates in the dtype it is given.
    source_B: int32, index into `sources`.
    mask_B: bool, False for padding.
    sources: the run's sources.
    members: the indices that occur in this stream.

  Returns:
    {source name: collection}. A source without an example in the batch has count 0.
  """
  kind = collection(sorted(measures))
  values = {name: value.astype(jnp.float32) for name, value in measures.items()}
  result = {}
  for index in members:
    mask = mask_B & (source_B == index)
    for name, value in values.items():
      if value.shape != mask.shape:  # CLU would ignore such a mask with a log line
        raise ValueError(f'measure {name!r} has shape {value.shape}, expected {mask.shape}')
    result[sources[index].name] = kind.single_from_model_output(**values, mask=mask)
  return result


@jax.jit
def merge(a: Any, b: Any) -> Any:
  """Merges two trees of collections."""
  from clu import metrics as clu_metrics

  is_leaf = lambda x: isinstance(x, clu_metrics.Collection)
  return jax.tree.map(lambda x, y: x.merge(y), a, b, is_leaf=is_leaf)


def compute(collections: Mapping[str, Collections]) -> dict[str, float]:
  """Reads collections into '<stream>/<source>/<measure>' scalars; averages over nothing are left out."""
  scalars = {}
  for stream, by_source in jax.device_get(collections).items():
    for source, value in by_source.items():
      for name in type(value).__annotations__:
        average = getattr(value, name)
        if average.count > 0:
          scalars[f'{stream}/{source}/{name}'] = float(average.total) / float(average.count)
  return scalars
