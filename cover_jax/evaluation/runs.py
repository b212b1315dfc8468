"""A run as its workdir tells of it: results, answers, clips, metrics, config. No model and no data set is opened."""

import csv
import io
import json
import math
import os
from typing import Any, NamedTuple

from cover_jax.evaluation import answers
from cover_jax.training import metrics
from data_pipelines import paths
from data_pipelines.contract import UserError

FOLDER = 'evaluation'


class Head(NamedTuple):
  """What a head does on its source's test split.

  Attributes:
    name: of the source.
    summary: what `report.json` says of it.
    class_names: K names.
    examples_K, right_K: test examples of each class, and those that are right.
    rows: an answer for each example.
    clips: {example: path of its clip}, of those that are kept.
    about_clips: 'views' and 'shown' (which of them is kept, from 1); empty where there are no clips.
  """

  name: str
  summary: dict[str, Any]
  class_names: tuple[str, ...]
  examples_K: tuple[int, ...]
  right_K: tuple[int, ...]
  rows: list[answers.Row]
  clips: dict[int, str]
  about_clips: dict[str, Any]


class SeveralHead(NamedTuple):
  """What a head of several labels an example does on its source's test split.

  Attributes:
    name: of the source.
    summary: what `report.json` says of it.
    rows: of each class its name, examples that have it, their share, and average precision; None where there is none.
  """

  name: str
  summary: dict[str, Any]
  rows: list[tuple[str, int, float, float | None]]


class Run(NamedTuple):
  """An evaluated run.

  Attributes:
    name: of its folder.
    report: of `report.json`, without its sources.
    heads: of one label an example, in the order of their names.
    metrics: lines of `metrics.jsonl`; [] where there is none.
    config: of `config.json`; {} where there is none.
    several: the heads of several labels an example.
  """

  name: str
  report: dict[str, Any]
  heads: list[Head]
  metrics: list[dict[str, Any]]
  config: dict[str, Any]
  several: list[SeveralHead] = []  # noqa: RUF012  never changed


def read(workdir: str) -> Run:
  """Reads an evaluated run.

  Raises:
    UserError: if it was not evaluated, or a file of its evaluation cannot be read.
  """
  folder = os.path.join(workdir, FOLDER)
  path = os.path.join(folder, 'report.json')
  try:
    report = json.loads(paths.read(path))
    sources = report.pop('sources')
    several = [name for name in sorted(sources) if sources[name].get('labels') == 'several']
    heads = [_head(folder, name, sources[name]) for name in sorted(sources) if name not in several]
    of_several = [_several_head(folder, name, sources[name]) for name in several]
  except FileNotFoundError as error:
    raise UserError(
      f'{error.filename} is not there: name the workdir of a run, and evaluate it with '
      f'`python -m cover_jax.main --config=CONFIG --workdir={workdir} --mode=evaluate` first.'
    ) from None
  except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
    raise UserError(
      f'The evaluation in {folder} cannot be read ({type(error).__name__}: {error}): evaluate the run again with '
      f'`python -m cover_jax.main --config=CONFIG --workdir={workdir} --mode=evaluate`.'
    ) from None
  name = os.path.basename(paths.absolute(workdir))
  lines = metrics.read_jsonl(os.path.join(workdir, metrics.FILE))
  return Run(name, report, heads, lines, _config(workdir), of_several)


def _head(folder: str, name: str, summary: dict[str, Any]) -> Head:
  table = io.StringIO(paths.read(os.path.join(folder, f'per_class_{name}.csv')).decode(), newline='')
  lines = [(line['class'], int(line['examples']), int(line['correct'])) for line in csv.DictReader(table)]
  class_names, examples, right = zip(*lines, strict=True)
  rows = answers.read_csv(os.path.join(folder, f'predictions_{name}.csv'), class_names)
  if len(rows) != sum(examples):
    raise ValueError(f'of {name}, {len(rows)} predictions are there for {sum(examples)} examples')
  clips, about = answers.clips_of(folder, name, summary['data_sha256'])
  return Head(name, summary, class_names, examples, right, rows, clips, about)


def _several_head(folder: str, name: str, summary: dict[str, Any]) -> SeveralHead:
  per_class = csv.DictReader(
    io.StringIO(paths.read(os.path.join(folder, f'per_class_{name}.csv')).decode(), newline='')
  )
  rows = [
    (line['class'], int(line['positives']), float(line['share']), float(line['average precision'] or 'nan'))
    for line in per_class
  ]
  return SeveralHead(name, summary, [(*row[:3], None if math.isnan(row[3]) else row[3]) for row in rows])


def _config(workdir: str) -> dict[str, Any]:
  try:
    config = json.loads(paths.read(os.path.join(workdir, 'config.json')))
  except (OSError, ValueError):
    return {}
  return config if isinstance(config, dict) else {}
