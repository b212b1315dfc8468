"""What a run reports: one CLU collection per source, and where its numbers are written."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from clu import metrics as clu_metrics

from data_pipelines.contract import SourceInfo

Collections = Mapping[str, clu_metrics.Collection]


def collection(names: Sequence[str]) -> type[clu_metrics.Collection]:
  """A CLU collection class of averages of per-example values with these names."""
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


def summary(scalars: Mapping[str, float]) -> str:
  """One line: the total loss, and loss and top-1 of each source."""
  parts = [f'loss {scalars["train/loss"]:.4f}'] if 'train/loss' in scalars else []
  for key, top1 in scalars.items():
    if key.endswith('/top1'):
      *where, source, _ = key.split('/')
      split = 'test ' if where[0] == 'test' else ''
      parts.append(f'{split}{source} {scalars[key.removesuffix("top1") + "loss"]:.3f} ({top1:.1%})')
  return ' | '.join(parts)


class Writer:
  """Writes scalars on process 0 to `metrics.jsonl`, TensorBoard and the log.

  `metrics.jsonl` has one object a line: {"step": 100, "train/loss": 1.2, ...}. After a resume the
  lines past the restored step are dropped first, so the file is that of an uninterrupted run.
  """

  def __init__(self, workdir: str, *, first_step: int, active: bool):
    self._file = None
    self._summary = None
    if not active:
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    _drop_after(path, first_step)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  held for the run
    try:
      from clu import metric_writers  # imports TensorFlow

      self._summary = metric_writers.AsyncWriter(metric_writers.SummaryWriter(workdir))
    except ImportError:
      logging.warning('TensorFlow is not installed: metrics go to metrics.jsonl and the log only.')

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step; safe to call on every process."""
    if self._file is None:
      return
    line = {'step': step} | {k: (v if math.isfinite(v) else str(v)) for k, v in scalars.items()}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    logging.info('Step %d: %s', step, summary(scalars))
    if self._summary is not None:
      self._summary.write_scalars(step, dict(scalars))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    if self._summary is not None:
      self._summary.close()


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """The lines of a metrics file; a last line cut short by a kill is dropped."""
  if not os.path.exists(path):
    return []
  rows = []
  with open(path, encoding='utf-8') as f:
    for line in f:
      if not line.endswith('\n'):
        break
      rows.append(json.loads(line))
  return rows


def _is_test(row: Mapping[str, Any]) -> bool:
  return any(key.startswith('test/') for key in row)


def _drop_after(path: str, step: int) -> None:
  # The evaluation of the restored step came after its save, if it came at all: it is done again.
  rows = read_jsonl(path)
  kept = [row for row in rows if row['step'] < step or (row['step'] == step and not _is_test(row))]
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(row) + '\n' for row in kept)
  os.replace(path + '.tmp', path)
