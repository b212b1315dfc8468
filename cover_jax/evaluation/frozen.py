"""Judges a frozen encoder on labelled sources: features once, then every protocol on them; see `protocols.py`.

The gallery and the training set of the classifiers is a source's training split, the queries are its test split, each
example once, as evaluation reads them. A video's feature is the mean over its test views (`config.frozen.clips` clips).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import classify as evaluation
from cover_jax.evaluation import protocols
from cover_jax.experiment.build import Experiment
from cover_jax.models import encoder as encoders
from cover_jax.objectives import contrastive
from cover_jax.runtime import processes, sharding
from data_pipelines import durable, paths
from data_pipelines.contract import SubBatch, TestSet, UserError
from data_pipelines.sources import subsets


class Features(NamedTuple):
  """The features of a split, on the host, in the order of its examples.

  Attributes:
    feature_NxD: float32, mean over the views.
    label_N: int32.
    video_id_N: int32, the original video within the split.
  """

  feature_NxD: np.ndarray
  label_N: np.ndarray
  video_id_N: np.ndarray


def encode(experiment: Experiment, params: Any, batches: Iterable[SubBatch], mesh: Mesh, pool: str) -> Features:
  """Runs the encoder over evaluation batches (clips uint8 [B, V, T, H, W, 3]); the same on every process.

  Raises:
    UserError: if an example is missing or comes twice: retrieval would be over another gallery than it says.
  """

  def step(params, batch):
    clip_BxVxTxHxWx3 = batch['views']['clip']

    def features(clip_NxTxHxWx3):
      encoded = experiment.encode(params, clip_NxTxHxWx3)
      return contrastive.pool(jax.tree.map(lambda x: x.astype(jnp.float32), encoded), pool)

    # View by view, so that memory does not grow with their number.
    feature_VxBxD = jax.lax.map(features, jnp.moveaxis(clip_BxVxTxHxWx3, 1, 0))
    kept = {key: batch[key] for key in ('label', 'video_id', 'example_id', 'mask')}
    return {'feature': jnp.mean(feature_VxBxD, axis=0), **kept}

  run = jax.jit(step, out_shardings=sharding.replicated(mesh))
  found = []
  with sharding.use(mesh, experiment.config.logical_axis_rules):
    for batch in batches:
      row = jax.device_get(run(params, sharding.to_global(batch, mesh)))
      found.append({key: value[row['mask']] for key, value in row.items()})
  joined = {key: np.concatenate([row[key] for row in found]) for key in found[0]}
  order = np.argsort(joined['example_id'], kind='stable')
  if not np.array_equal(joined['example_id'][order], np.arange(len(order))):
    raise UserError('The examples of an evaluation did not come once each: this is a mistake of the data pipeline.')
  return Features(*(joined[key][order] for key in ('feature', 'label', 'video_id')))


def cached(
  folder: str, experiment: Experiment, params: Any, params_sha256: str, name: str, split: TestSet, mesh: Mesh, pool: str
) -> Features:
  """`encode`, or what it gave before for the same model, weights and clips; kept in `<folder>/features`.

  A file there that is damaged is written anew, with a warning.
  """
  key = _key(experiment, params_sha256, split, pool)
  path = os.path.join(folder, 'features', f'{name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz')
  stored = _read(path, (split.examples, experiment.model.width))
  # All processes read or all encode, which they do together: one that does not see the file may not be left alone.
  if processes.gather(np.array([stored is not None])).all():
    logging.info('Features of %s: read from %s', name, path)
    return stored
  features = encode(experiment, params, evaluation.reported(name, split, mesh), mesh, pool)
  if jax.process_index() == 0:
    with workdirs.writing(folder, path), workdirs.turn(os.path.dirname(path)), durable.replacing(path) as f:
      np.savez(f, **features._asdict())
  return features


def _key(experiment: Experiment, params_sha256: str, split: TestSet, pool: str) -> str:
  """Everything that features depend on, as JSON."""
  config = experiment.config
  parts = {
    'params': params_sha256,
    'model': {'name': encoders.name_of(config.model), **encoders.options_of(experiment.model)},
    'normalisation': [config.pixel_mean, config.pixel_std],
    'pool': pool,
    'clips': split.identity(),
  }
  return json.dumps(parts, sort_keys=True, default=str)


def _read(path: str, shape: tuple[int, int]) -> Features | None:
  """The features of a file, if it is there and whole."""
  if not paths.exists(path):
    return None
  try:
    with paths.local(path) as file, np.load(file, allow_pickle=False) as stored:
      features = Features(*(stored[field] for field in Features._fields))
    shapes, expected = [x.shape for x in features], [shape, shape[:1], shape[:1]]
    if shapes != expected:
      raise ValueError(f'its arrays are {shapes}, not {expected}')
  except Exception as error:  # zipfile's, NumPy's and zlib's, by where it is damaged
    reason = (str(error) or type(error).__name__).splitlines()[0]
    logging.warning('%s is damaged (%s): these features are made again', path, reason)
    return None
  return features


def judge(train: Features, test: Features, classes: int, options: Mapping[str, Any]) -> dict[str, Any]:
  """All protocols on one source.

  Args:
    train: labelled; the classifiers' examples and the gallery.
    test: labelled; the queries.
    classes: K.
    options: `config.frozen`.

  Returns:
    {'retrieval': {'R@1': ...}, 'labels': [{'fraction', 'examples', 'probe', 'penalty', 'held_out', 'knn',
    'neighbours'}, ...], 'gallery', 'queries', 'chance'}; accuracies are top-1 in [0, 1]. Unlabelled examples are in
    none of it. The probe's penalty is chosen on a part held out of the labels that are used.
  """
  train = Features(*(x[train.label_N >= 0] for x in train))
  test = Features(*(x[test.label_N >= 0] for x in test))
  if not len(train.label_N) or not len(test.label_N):
    raise UserError('The training or the test split has no labelled example: the protocols need labels in both.')
  found_QxK, _ = protocols.neighbours(test.feature_NxD, train.feature_NxD, max(5, *options['recall_at']))
  recalls = protocols.recall_at(train.label_N[found_QxK], test.label_N, options['recall_at'])
  rows = []
  for fraction in options['label_fractions']:
    few = Features(*(x[subsets.choose_few(train.label_N, fraction)] for x in train)) if fraction < 1 else train
    rows.append({'fraction': fraction, 'examples': len(few.label_N), **_classify(few, test, classes, options)})
  return {
    'retrieval': {f'R@{k}': value for k, value in recalls.items()},
    'labels': rows,
    'gallery': len(train.label_N),
    'queries': len(test.label_N),
    'chance': 1 / classes,
    'nearest': found_QxK[:, :5].tolist(),
  }


def _classify(few: Features, test: Features, classes: int, options: Mapping[str, Any]) -> dict[str, Any]:
  """Linear probe and k-NN from some labelled examples."""
  penalties = options['penalties']
  kept, held_out = subsets.hold_out(few.label_N, few.video_id_N, options['held_out'])
  penalty = protocols.choose_penalty(few.feature_NxD, few.label_N, kept, held_out, classes, penalties)
  (probe,) = protocols.fit_probe(few.feature_NxD, few.label_N, classes, [penalty])
  found_QxK, cosine_QxK = protocols.neighbours(test.feature_NxD, few.feature_NxD, options['neighbours'])
  voted_Q = protocols.knn_predict(few.label_N[found_QxK], cosine_QxK, classes, options['temperature'])
  return {
    'probe': float(np.mean(probe.predict(test.feature_NxD) == test.label_N)),
    'penalty': float(penalty),
    'held_out': len(held_out),
    'knn': float(np.mean(voted_Q == test.label_N)),
    'neighbours': found_QxK.shape[1],
  }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """The results as text."""
  lines = []
  for name, r in results.items():
    recalls = '  '.join(f'{k} {v:.1%}' for k, v in r['retrieval'].items())
    lines.append(
      f'{name}: {r["queries"]:,} test examples, {r["gallery"]:,} training examples, chance {r["chance"]:.1%}'
    )
    if lacking := {split: count for split, count in r.get('missing', {}).items() if count}:
      words = ' and '.join(f'{count:,} of the {split} split' for split, count in lacking.items())
      lines.append(
        f'  missing       {words}: listed by the annotations, absent from the data set, in none of the figures'
      )
    lines.append(f'  retrieval     {recalls}')
    lines.append(f'  {"labels":>8}{"examples":>10}{"probe":>9}{"k-NN":>9}{"k":>6}  penalty, chosen on')
    for row in r['labels']:
      chosen = f'{row["held_out"]} held out' if row['held_out'] else 'nothing: too few labels to hold any out'
      lines.append(
        f'  {row["fraction"]:>8.0%}{row["examples"]:>10,}{row["probe"]:>9.1%}{row["knn"]:>9.1%}{row["neighbours"]:>6}'
        f'  {row["penalty"]:g}, {chosen}'
      )
  return '\n'.join(lines)


def write_report(results: Mapping[str, Mapping[str, Any]], folder: str, about: Mapping[str, Any]) -> str:
  """Writes `report.json`, without times and paths, into a folder that is there, and gives its path."""
  path = os.path.join(folder, 'report.json')
  shown = {name: {k: v for k, v in r.items() if k != 'nearest'} for name, r in results.items()}
  durable.write(path, json.dumps({**about, 'sources': shown}, indent=2, sort_keys=True) + '\n')
  return path
