"""Does each self-supervised objective learn its task, and what is that worth? Seven systems on the embedded motions.

    python -m benchmarks.ssl --output=DIR [--seeds=0,1,2] [--rows=v3s,hdc] [--doc=docs/ssl.md] [--quick]

A cell is a row of the table and a seed. It pre-trains one small TimeSformer without labels (row `cover`: with those of
other data), judges the pretext task on held-out videos beside weights that were not trained, then the frozen features
by linear probes of four labels, and fine-tunes on 5 % of the labels. A row `<row>_static` is the control: the same, on
videos whose frames are all the first one, so that nothing about motion can be learnt. Every cell is kept as a JSON file
in DIR, so that a run that was stopped goes on where it was, and two commands with different seeds may share the folder;
delete a file to do it again. Data is rendered in memory: no TensorFlow. Settings were tried on the validation split
with `--split=validation`, and on another seed.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks import documents, in_memory
from benchmarks.documents import spread
from configs import (
  digits_cover,
  finetune_digits,
  hdc_digits,
  modist_digits,
  order_geometry_digits,
  statistics_digits,
  v3s_digits,
  vtdl_digits,
)
from cover_jax.evaluation import frozen, pretext, protocols
from cover_jax.experiment import wire
from cover_jax.objectives import hdc
from data_pipelines import durable, flags
from data_pipelines.builders import digits_rendering as rendering
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed

# The size that two CPU cores can afford: half the width of docs/vtdl.md.
ENCODER = {'width': 32, 'depth': 2, 'num_heads': 2, 'mlp_dim': 64, 'scan_unroll': 2}
LAST_LEVEL = 'block2'
PENALTIES = (0.01, 0.1, 1.0, 10.0)
STATIC = '_static'


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    words: what it is.
    config: gives its pre-training; None for none.
    steps: of it. Cheap steps are given more: none of the rows is a copy of another's schedule.
    shown: {what the pretext task asks: (measure, measure that it is a share of or '', chance or None)}.
  """

  words: str
  config: Callable[[], ml_collections.ConfigDict] | None = None
  steps: int = 0
  shown: Mapping[str, tuple[str, str, float | None]] = {}


def changed(module: Any, **objective: Any) -> Callable[[], ml_collections.ConfigDict]:
  """The config of a module with other options of its one stream's objective."""

  def get() -> ml_collections.ConfigDict:
    config = module.get_config()
    config.streams.unlabelled.objective.update(objective)
    return config

  return get


def cover() -> ml_collections.ConfigDict:
  """CoVeR on the other three data sets, with their labels."""
  config = digits_cover.get_config()
  del config.sources['motions']
  config.streams.video.sources = ('objects', 'moments')
  return config


_REGION, _DIRECTION = 'normal_flow_region_top1', 'normal_flow_direction_top1'
_MOVES = 'normal_flow_moves'
_SPATIAL = {'the clip of the same video': ('spatial_top1', '', None)}
_TEMPORAL = {'the same motion': ('temporal_top1', '', None)}
_ORDER = {'order': ('top1', 'moving', 1 / 12)}
_GEOMETRY = {'rotation, degrees wrong': ('rotation_error', '', 60 / 2)}
_VISUAL = {'the other clip': ('visual_top1', '', None)}

ROWS: Mapping[str, Row] = {
  'random': Row('random weights'),
  'cover': Row('CoVeR: labels of objects, moments and digits', cover, 600),
  'vtdl': Row('VTDL', vtdl_digits.get_config, 600, {'the same clip': ('top1', '', None)}),
  'hdc': Row('HDC-style', hdc_digits.get_config, 400, _SPATIAL | _TEMPORAL),
  'hdc_spatial': Row('- its spatial task alone', changed(hdc_digits, temporal_weight=0.0), 400, _SPATIAL),
  'hdc_temporal': Row('- its temporal task alone', changed(hdc_digits, spatial_weight=0.0), 400, _TEMPORAL),
  'statistics': Row(
    'statistics',
    statistics_digits.get_config,
    600,
    {
      'region of most motion': (_REGION, _MOVES, None),
      'its direction': (_DIRECTION, _MOVES, 1 / 8),
      'colour': ('appearance_colour_top1', '', 1 / 8),
    },
  ),
  'order_geometry': Row('order + geometry', order_geometry_digits.get_config, 1000, _ORDER | _GEOMETRY),
  'order': Row('- order alone', changed(order_geometry_digits, geometry_weight=0.0), 1000, _ORDER),
  'geometry': Row('- geometry alone', changed(order_geometry_digits, order_weight=0.0), 1000, _GEOMETRY),
  'v3s': Row(
    'V3S-style', v3s_digits.get_config, 1500, {'space': ('space_top1', '', 1 / 7), 'time': ('time_top1', '', 1 / 4)}
  ),
  'modist': Row(
    'MoDist-style',
    modist_digits.get_config,
    400,
    {**_VISUAL, 'its motion': ('visual_to_motion_top1', '', None)},
  ),
  'modist_visual': Row(
    '- RGB contrast alone', changed(modist_digits, cross_weight=0.0, motion_weight=0.0), 400, _VISUAL
  ),
}
CONTROLS = tuple(f'{row}{STATIC}' for row in ('hdc', 'statistics', 'order_geometry', 'v3s', 'modist'))


def shrink(config: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
  """A config with the study's encoder, batch and learning rate, which are the same for every row, and some steps."""
  config.model.update(dict(ENCODER, width=16, mlp_dim=32) if _OPTIONS.quick else ENCODER)
  config.eval_batch_size = 160
  for source in config.sources.values():
    source.rotation = 0.0  # done by the host, it costs more than the step
  for stream in config.streams.values():
    stream.batch_size = None if len(config.streams) > 1 else _OPTIONS.batch_size
  config.batch_size = _OPTIONS.batch_size
  config.batch_multiple = 1
  config.total_steps = 2 if _OPTIONS.quick else steps
  config.optimizer.learning_rate = _OPTIONS.learning_rate
  config.optimizer.warmup_steps = config.total_steps // 20
  return config


class Data(NamedTuple):
  """Rendered videos: {data set: to train on}, and the motions that are reported."""

  train: dict[str, in_memory.Drawn]
  report: in_memory.Drawn


def draw() -> Data:
  limit = 48 if _OPTIONS.quick else None
  train = {name: in_memory.draw(name, 'train', limit) for name in ('motions', 'objects', 'moments', 'digits')}
  return Data(train, in_memory.draw('motions', _OPTIONS.split, limit))


def standing(drawn: in_memory.Drawn) -> in_memory.Drawn:
  """The same videos, standing still."""
  return [np.repeat(frames[:1], len(frames), axis=0) for frames in drawn[0]], drawn[1]


def labels_of(drawn: in_memory.Drawn) -> dict[str, tuple[np.ndarray, int]]:
  """{label: (int [N], number of classes)} of motions: what moves how, in which colour.

  The hue is which of red, green and blue the brightest pixel has most of, and which least: six classes.
  """
  frames, motion = drawn
  brightest = [f.reshape(-1, 3)[f.reshape(-1, 3).sum(axis=1).argmax()].astype(int) for f in frames]
  hue = [3 * int(c.argmax()) + int(c.argmin()) for c in brightest]
  names = {value: i for i, value in enumerate((1, 2, 3, 5, 6, 7))}
  digit = np.arange(len(motion)) // len(rendering.MOTIONS) % 10
  return {
    'motion': (np.array(motion), len(rendering.MOTIONS)),
    'hue': (np.array([names[h] for h in hue]), 6),
    'digit': (digit, 10),
  }


def turned(drawn: in_memory.Drawn, seed: int) -> tuple[in_memory.Drawn, np.ndarray]:
  """Each video by a number of quarter turns, and these numbers, int [N]."""
  quarters = np.random.default_rng(seed).integers(0, 4, len(drawn[0]))
  return ([np.rot90(f, q, axes=(1, 2)).copy() for f, q in zip(drawn[0], quarters, strict=True)], drawn[1]), quarters


def features(encoder: Any, drawn: in_memory.Drawn, level: str = '') -> np.ndarray:
  """Features [N, D] of an encoder, one clip of segments a video: they cover it whole.

  Args:
    encoder: its parameters.
    drawn: the videos.
    level: of which the map is averaged; '' for the tokens.
  """
  config = shrink(finetune_digits.get_config(), 1)
  config.sources.motions.label_fraction = 1.0
  source = in_memory.make_source('motions', config.sources.motions, drawn)
  experiment, mesh = in_memory.build(config, [source])
  test = wire.test_set(experiment, source)
  if not level:
    return frozen.encode(experiment, encoder, test.batches(), mesh, 'mean').feature_NxD
  encode = jax.jit(lambda params, clip: experiment.encode(params, clip, levels=(level,)).levels[level].mean((1, 2, 3)))
  rows = [(np.asarray(encode(encoder, b['views']['clip'][:, 0])), b['mask']) for b in test.batches()]
  return np.concatenate([x[mask] for x, mask in rows])


def probe(train_NxD: np.ndarray, test_NxD: np.ndarray, train_N: np.ndarray, test_N: np.ndarray, classes: int) -> float:
  """Accuracy of a linear probe; its penalty is chosen on a fifth of the training videos."""
  held = np.arange(len(train_N)) % 5 == 4
  penalty = protocols.choose_penalty(
    train_NxD, train_N, np.flatnonzero(~held), np.flatnonzero(held), classes, PENALTIES
  )
  (fitted,) = protocols.fit_probe(train_NxD, train_N, classes, [penalty])
  return float(np.mean(fitted.predict(test_NxD) == test_N))


def _probes(train_NxD: np.ndarray, test_NxD: np.ndarray, train: Mapping, test: Mapping) -> dict[str, float]:
  return {k: probe(train_NxD, test_NxD, train[k][0], test[k][0], train[k][1]) for k in train}


def probes(encoder: Any, data: Data) -> dict[str, float]:
  """{label: accuracy of a linear probe of it} of an encoder's features of motions."""
  pair = data.train['motions'], data.report
  found = _probes(*(features(encoder, drawn) for drawn in pair), *map(labels_of, pair))
  turns = [turned(drawn, seed) for seed, drawn in enumerate(pair, 1)]
  (train_N, test_N), both = (quarters for _, quarters in turns), [features(encoder, drawn) for drawn, _ in turns]
  return {**found, 'orientation': probe(*both, train_N, test_N, 4)}


def heads_of_hdc(config: ml_collections.ConfigDict, params: Any, data: Data) -> dict[str, dict[str, float]]:
  """{task: probes} of the vectors that HDC's heads make of the last level."""
  options = config.streams.unlabelled.objective
  tasks = tuple(params['objectives']['unlabelled']['heads'][LAST_LEVEL])
  head = hdc.LevelHead(tuple(t for t in tasks if t in hdc.TASKS), 128, 2, options.head_hidden)
  own = {'params': params['objectives']['unlabelled']['heads'][LAST_LEVEL]}

  def encode(drawn: in_memory.Drawn) -> dict[str, np.ndarray]:
    seen = features(params['encoder'], drawn, LAST_LEVEL)[:, None, None, None]  # a head averages a map
    return jax.device_get(head.apply(own, seen))

  train, test = encode(data.train['motions']), encode(data.report)
  labels = labels_of(data.train['motions']), labels_of(data.report)
  return {task: _probes(train[task], test[task], *labels) for task in head.tasks}


def judge_pretext(run: in_memory.Run, drawn: in_memory.Drawn) -> dict[str, dict[str, float]]:
  """{'trained', 'untrained': measures} of the run's stream on other videos."""
  config = run.experiment.config
  source = in_memory.make_source('motions_unlabelled', config.sources.motions_unlabelled, drawn)
  judged = pretext.held_out(run.experiment, ['unlabelled'], [source], 1)
  judge = pretext.make_judge(judged, [source], run.mesh)
  fresh = in_memory.initial(config, [source], config.seed)
  short = lambda found: {key.rsplit('/', 1)[1]: value for key, value in found.items()}
  return {
    'trained': short(judge(run.state.params, run.state.objectives)),
    'untrained': short(judge(fresh.params, fresh.objectives)),
  }


def finetuned(seed: int, encoder: Any, data: Data) -> float:
  """Top-1 of fine-tuning on 5 % of the labels, after the last step."""
  config = shrink(finetune_digits.get_config(), _OPTIONS.finetuning_steps)
  config.optimizer.learning_rate = 1e-3
  config.seed = seed
  source = in_memory.make_source('motions', config.sources.motions, data.train['motions'])
  run = in_memory.train(config, [source], seed, encoder)
  settings = ml_collections.ConfigDict({**config.sources.motions.to_dict(), 'label_fraction': 1.0})
  test = in_memory.make_source('motions', settings, data.report)
  return in_memory.make_top1(run.experiment, run.mesh, [test])(run.state.params)['motions']


def run_cell(name: str, seed: int, data: Data) -> dict[str, Any]:
  """Pre-training, then everything that judges it."""
  start = time.monotonic()
  row = ROWS[name.removesuffix(STATIC)]
  out: dict[str, Any] = {'row': name, 'seed': seed, 'steps': row.steps}
  if row.config is None:
    config = shrink(finetune_digits.get_config(), 1)
    source = in_memory.make_source('motions', config.sources.motions, data.train['motions'])
    encoder = jax.device_get(in_memory.initial(config, [source], seed).params['encoder'])
  else:
    config = shrink(row.config(), row.steps)
    config.seed = seed
    drawn = {k: standing(v) if name.endswith(STATIC) else v for k, v in data.train.items()}
    of = lambda c: drawn[c.dataset.removeprefix('moving_digits/')]
    run = in_memory.train(config, [in_memory.make_source(n, c, of(c)) for n, c in config.sources.items()], seed)
    encoder = jax.device_get(run.state.params['encoder'])
    out['losses'] = [sum(r.values()) for r in run.losses][:: max(len(run.losses) // 20, 1)]
    if row.shown and not name.endswith(STATIC):
      out['pretext'] = judge_pretext(run, data.report)
    if name == 'hdc':
      out['heads'] = heads_of_hdc(config, jax.device_get(run.state.params), data)
  out['seconds'] = {'pretraining': time.monotonic() - start}
  start = time.monotonic()
  out['probes'] = probes(encoder, data)
  if not name.endswith(STATIC):
    out['finetuned'] = finetuned(seed, encoder, data)
  out['seconds']['judging'] = time.monotonic() - start
  return out


# ---- The document.


def _words(row: str) -> str:
  base = ROWS[row.removesuffix(STATIC)].words
  return f'{base}, of videos that stand still (control)' if row.endswith(STATIC) else base


def pretext_table(cells: Sequence[Mapping[str, Any]]) -> str:
  """A line for each thing that a row's pretext task asks, on held-out videos."""
  lines = []
  for name, row in ROWS.items():
    found = [c['pretext'] for c in cells if c['row'] == name and 'pretext' in c]
    for what, (measure, of, chance) in row.shown.items() if found else ():
      show = spread if chance is None or chance <= 1 else _plain
      sides = [show([_quotient(f[side], measure, of) for f in found]) for side in ('trained', 'untrained')]
      lines.append([row.words, what, *sides, '' if chance is None else show([chance]), str(len(found))])
  return documents.markdown(['objective', 'asked', 'trained', 'untrained', 'chance', 'seeds'], lines)


def _quotient(measures: Mapping[str, float], measure: str, of: str) -> float:
  return measures[measure] / (measures[of] if of else 1.0)


def _plain(values: Sequence[float]) -> str:
  return f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else f'{values[0]:.1f}'


def probe_table(cells: Sequence[Mapping[str, Any]]) -> str:
  """A line a row: linear probes of frozen features, then fine-tuning."""
  columns = ('motion', 'hue', 'digit', 'orientation')
  lines = []
  for name in (*ROWS, *CONTROLS):
    found = [c for c in cells if c['row'] == name]
    if found:
      tuned = spread(c['finetuned'] for c in found if 'finetuned' in c)
      values = [spread(c['probes'][k] for c in found) for k in columns]
      steps = str(ROWS[name.removesuffix(STATIC)].steps)
      lines.append([_words(name), steps, *values, tuned, str(len(found))])
  return documents.markdown(['pre-training', 'steps', *columns, 'fine-tuned on 5 %', 'seeds'], lines)


def head_table(cells: Sequence[Mapping[str, Any]]) -> str:
  """Probes of what HDC's two heads give."""
  found = [c['heads'] for c in cells if 'heads' in c]
  if not found:
    return ''
  columns = tuple(next(iter(found[0].values())))
  lines = [[f'the {task} head', *(spread(f[task][k] for f in found) for k in columns)] for task in found[0]]
  return documents.markdown(['vectors of HDC', *columns], lines)


# (what is expected, row, row that it is compared with, probe)
SIGNS = (
  ('statistics raise motion', 'statistics', 'random', 'motion'),
  ('statistics: more than of still videos', 'statistics', 'statistics_static', 'motion'),
  ('V3S raises motion', 'v3s', 'random', 'motion'),
  ('V3S: more than of still videos', 'v3s', 'v3s_static', 'motion'),
  ('spatial HDC raises hue', 'hdc_spatial', 'random', 'hue'),
  ('hue: spatial HDC above temporal', 'hdc_spatial', 'hdc_temporal', 'hue'),
  ('motion: temporal HDC above spatial', 'hdc_temporal', 'hdc_spatial', 'motion'),
  ('HDC: more motion than of still videos', 'hdc', 'hdc_static', 'motion'),
  ('geometry raises orientation', 'geometry', 'random', 'orientation'),
  ('order + geometry raise orientation', 'order_geometry', 'random', 'orientation'),
  ('geometry: more orientation than order alone', 'order_geometry', 'order', 'orientation'),
  ('order raises motion', 'order', 'random', 'motion'),
  ('order + geometry: more motion than of still videos', 'order_geometry', 'order_geometry_static', 'motion'),
  ('MoDist: more motion than RGB contrast alone', 'modist', 'modist_visual', 'motion'),
  ('MoDist: more motion than of still videos', 'modist', 'modist_static', 'motion'),
)


def sign_table(cells: Sequence[Mapping[str, Any]]) -> str:
  """What was expected before, and what came, seed by seed."""
  value = {(c['row'], c['seed']): c['probes'] for c in cells}
  lines = []
  for words, row, other, label in SIGNS:
    seeds = [s for r, s in value if r == row and (other, s) in value]
    if not seeds:
      continue
    gains = [100 * (value[row, s][label] - value[other, s][label]) for s in seeds]
    held = sum(g > 0 for g in gains)
    verdict = (
      'holds in each seed' if held == len(gains) else 'refuted in each' if not held else f'{held} of {len(gains)}'
    )
    lines.append([words, ', '.join(f'{g:+.1f}' for g in gains), f'{np.mean(gains):+.1f}', verdict])
  return documents.markdown(['expected', 'points, by seed', 'mean', 'so'], lines)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.ssl', __doc__)
  to.add_argument('--output', required=True, help='folder for the results')
  to.add_argument('--seeds', type=flags.words, default=['0', '1', '2'], help='seeds, each a whole column of runs')
  to.add_argument('--split', choices=('test', 'validation'), default='test', help='what to report on')
  to.add_argument('--rows', type=flags.words, default=[], help='only these rows; all of them if empty')
  to.add_argument('--finetuning_steps', type=int, default=150, help='of fine-tuning')
  to.add_argument('--batch_size', type=int, default=32, help='videos a step')
  to.add_argument('--learning_rate', type=float, default=3e-3, help='of pre-training')
  to.add_argument('--doc', default='', help='Markdown file to write the tables to')
  to.add_argument('--quick', action='store_true', help='two steps of everything, to see that it runs')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  every = (*ROWS, *CONTROLS)
  if unknown := sorted(set(_OPTIONS.rows) - set(every)):
    raise UserError(f'--rows has {unknown}: expected some of {", ".join(every)}.')
  os.makedirs(_OPTIONS.output, exist_ok=True)
  # The same few programs are compiled for every seed.
  jax.config.update('jax_compilation_cache_dir', os.path.join(os.path.abspath(_OPTIONS.output), 'compiled'))
  settings = {k: getattr(_OPTIONS, k) for k in ('split', 'finetuning_steps', 'batch_size', 'learning_rate', 'quick')}
  data, cells = None, []
  for seed in map(int, _OPTIONS.seeds):
    for row in _OPTIONS.rows or every:
      path = os.path.join(_OPTIONS.output, f'{_OPTIONS.split}_{row}_{seed}.json')
      if not os.path.exists(path):
        data = data or draw()
        print(f'{row}, seed {seed} ...', flush=True)
        durable.write(path, json.dumps({**run_cell(row, seed, data), 'settings': settings}, indent=1) + '\n')
      with open(path, encoding='utf-8') as f:
        cells.append(json.load(f))
      if cells[-1]['settings'] != settings:
        raise UserError(f'{path} has the settings {cells[-1]["settings"]}: use one folder for each.')
  minutes = sum(sum(c['seconds'].values()) for c in cells) / 60
  tables = [pretext_table(cells), probe_table(cells), head_table(cells), sign_table(cells)]
  text = '\n\n'.join(filter(None, tables))
  text += (
    f'\n\nPer cent, mean ± sample standard deviation over seeds, {_OPTIONS.split} split; {minutes:.0f} minutes in all.'
  )
  print(f'\n{text}')
  if _OPTIONS.doc:
    documents.fill(_OPTIONS.doc, text, 'Self-supervised objectives')


if __name__ == '__main__':
  flags.run(main)
