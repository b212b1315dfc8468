"""Does VTDL teach anything? Its ablation on the embedded motions, with few labels, from several seeds.

    python -m benchmarks.vtdl --output=DIR [--seeds=0,1,2] [--doc=docs/lab/vtdl.md] [--quick]

Each seed pre-trains one encoder a row of the table, without labels but for the last two rows, and then judges each in
the same way: fine-tuning on a few labels, looked at on its way, and frozen features (retrieval, linear probe). Every
result is kept as a JSON file in DIR, so that a run that was stopped goes on where it was; delete a file to do it again.
Data is rendered in memory: no TensorFlow, nothing is written but results. Nothing is chosen on the test split:
`--split` is the one that is reported, and settings were tried with `--split=validation`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import documents, in_memory
from benchmarks.documents import spread
from configs import finetune_digits, semi_supervised_digits, vtdl_digits
from cover_jax.evaluation import frozen
from cover_jax.experiment import wire
from cover_jax.experiment.build import Experiment
from cover_jax.experiment.state import TrainState
from data_pipelines import flags
from data_pipelines.builders import digits_rendering as rendering
from data_pipelines.contract import UserError
from data_pipelines.sources import Source

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed


_ABLATION = ('baseline', 'augmented', 'temporal', 'vtdl')
_PLAIN = {'crop_scale': (1.0, 1.0), 'crop_ratio': (1.0, 1.0), 'rotation': 0.0}
# Of 1e-3, which the config has for its larger model, and this one the better on validation: docs/vtdl.md.
_LEARNING_RATE = 2e-3


def get_vtdl(*, augmented: bool, **objective) -> ml_collections.ConfigDict:
  """The pre-training of a row."""
  config = vtdl_digits.get_config()
  stream = config.streams.unlabelled
  stream.objective.update(objective)
  stream.objective.update({k: json.loads(v) for k, v in (s.split('=', 1) for s in _OPTIONS.set)})
  if not augmented:
    stream.augment = {}
    config.sources.motions_unlabelled.update(_PLAIN)
  config.optimizer.learning_rate = _LEARNING_RATE
  config.total_steps = _OPTIONS.steps
  return config


def labelled() -> ml_collections.ConfigDict:
  """Fine-tuning, with clips of consecutive frames as in pre-training: in the release, too, both span as many frames.

  `--clips=segments` spreads the frames over the whole video, which is another speed than that of pre-training.
  """
  config = finetune_digits.get_config()
  config.sources.motions.sampler = _OPTIONS.clips
  return config


def get_supervised(fraction: float) -> ml_collections.ConfigDict:
  """Pre-training with labels, for as many steps, with the same augmentation."""
  config = labelled()
  config.sources.motions.label_fraction = fraction
  config.total_steps = _OPTIONS.steps
  return config


def get_semi() -> ml_collections.ConfigDict:
  config = semi_supervised_digits.get_config()
  config.total_steps = _OPTIONS.steps
  return config


# Row -> (what it is, its pre-training). The first four VTDL rows are those of the release's own table.
ROWS: Mapping[str, tuple[str, Callable[[], ml_collections.ConfigDict] | None]] = {
  'random': ('random initialisation', None),
  'baseline': (
    'contrast with other videos, no augmentation',
    lambda: get_vtdl(augmented=False, temporal_discrimination=False, tca_alpha=0.0),
  ),
  'augmented': (
    '+ basic augmentation',
    lambda: get_vtdl(augmented=True, temporal_discrimination=False, tca_alpha=0.0),
  ),
  'temporal': ('+ temporal discrimination', lambda: get_vtdl(augmented=True, tca_alpha=0.0)),
  'vtdl': ('+ temporal consistent augmentation (VTDL)', lambda: get_vtdl(augmented=True)),
  'supervised_few': ('supervised pre-training on the same 5 % of the labels', lambda: get_supervised(0.05)),
  'supervised_all': ('supervised pre-training on all labels', lambda: get_supervised(1.0)),
}


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The size that two CPU cores can afford; the same for every row."""
  config.model.update({'width': 64, 'depth': 2, 'mlp_dim': 128, 'scan_unroll': 2})
  config.eval_batch_size = 320
  for stream in config.streams.values():
    stream.batch_size = 32
  config.batch_size = 32 * len(config.streams)
  if _OPTIONS.quick:
    config.model.update({'width': 16, 'num_heads': 2, 'mlp_dim': 32})
    config.total_steps = 3
    config.optimizer.warmup_steps = 1
  return config


def draw() -> dict[str, in_memory.Drawn]:
  """All motions: those to train on and those that are reported."""
  limit = 48 if _OPTIONS.quick else None
  return {
    'train': in_memory.draw('motions', 'train', limit),
    'report': in_memory.draw('motions', _OPTIONS.split, limit),
  }


def make_sources(config: ml_collections.ConfigDict, data: in_memory.Drawn) -> list[Source]:
  """The sources of a config, all of them parts of the same videos."""
  return [in_memory.make_source(name, c, data) for name, c in config.sources.items()]


def train(config: ml_collections.ConfigDict, data: in_memory.Drawn, encoder: Any = None, watch: Any = None):
  return in_memory.train(config, make_sources(config, data), config.seed, encoder, watch)


def evaluation(experiment: Experiment, mesh: Any, data: Mapping[str, in_memory.Drawn]) -> Callable[[TrainState], float]:
  """state -> top-1 on the split that is reported."""
  settings = ml_collections.ConfigDict({**experiment.config.sources.motions.to_dict(), 'label_fraction': 1.0})
  top1 = in_memory.make_top1(experiment, mesh, [in_memory.make_source('motions', settings, data['report'])])
  return lambda state: top1(state.params)['motions']


def finetuned(seed: int, fraction: float, encoder: Any, data: Mapping[str, Any]) -> dict[str, float]:
  """Top-1 by the number of steps after which it is measured: a third, two thirds, all of them."""
  config = labelled()
  config.total_steps = _OPTIONS.finetuning_steps
  config = shrink(config)
  config.seed, config.sources.motions.label_fraction = seed, fraction
  looks, found, kept = [round(config.total_steps * i / 3) for i in (1, 2, 3)], {}, []

  def watch(step, experiment, mesh, state):
    if step in looks:
      if not kept:
        kept.append(evaluation(experiment, mesh, data))
      found[str(step)] = kept[0](state)

  train(config, data['train'], encoder, watch)
  return found


def frozen_features(encoder: Any, data: Mapping[str, Any]) -> dict[str, Any]:
  """Retrieval, k-NN and linear probe, one clip of segments a video (they cover it whole)."""
  config = shrink(finetune_digits.get_config())
  config.sources.motions.label_fraction = 1.0
  pair = [make_sources(config, data[split])[0] for split in ('train', 'report')]
  experiment, mesh = in_memory.build(config, pair[:1])
  sets = [wire.test_set(experiment, source) for source in pair]
  features = [frozen.encode(experiment, encoder, s.batches(), mesh, config.frozen.pool) for s in sets]
  return frozen.judge(*features, len(rendering.MOTIONS), config.frozen.to_dict())


def run_row(row: str, seed: int, data: Mapping[str, Any]) -> dict[str, Any]:
  """One cell: pre-training, then everything that judges it."""
  start = time.monotonic()
  pretraining = ROWS[row][1]
  if pretraining is None:
    config = shrink(finetune_digits.get_config())
    config.seed = seed
    encoder = jax.device_get(in_memory.initial(config, make_sources(config, data['train']), seed).params['encoder'])
    losses, found = [], {}
  else:
    config = shrink(pretraining())
    config.seed = seed
    run = train(config, data['train'])
    encoder, losses, found = jax.device_get(run.state.params['encoder']), run.losses, run.measures
  pretrained = time.monotonic()
  judged = frozen_features(encoder, data)
  fine = {fraction: finetuned(seed, float(fraction), encoder, data) for fraction in _OPTIONS.fractions}
  return {
    'row': row,
    'seed': seed,
    'finetuned': fine,
    'retrieval': judged['retrieval'],
    'labels': judged['labels'],
    'measures': found,
    'losses': [sum(r.values()) for r in losses][:: max(len(losses) // 20, 1)],
    'seconds': {'pretraining': pretrained - start, 'judging': time.monotonic() - pretrained},
  }


def run_semi(seed: int, data: Mapping[str, Any]) -> dict[str, Any]:
  """Co-training of 5 % of the labels with VTDL on all videos, and the labelled stream alone for as many steps."""
  start, out = time.monotonic(), {'row': 'semi', 'seed': seed}
  for name, drop in (('semi', None), ('labelled_alone', 'unlabelled')):
    config = shrink(get_semi())
    config.seed = seed
    if drop:
      del config.streams[drop], config.sources.motions_unlabelled
      config.batch_size = config.streams.labelled.batch_size
    run = train(config, data['train'])
    out[name] = evaluation(run.experiment, run.mesh, data)(run.state)
  return {**out, 'seconds': {'pretraining': time.monotonic() - start, 'judging': 0.0}}


def measures(cell: Mapping[str, Any]) -> dict[str, float]:
  """The columns of the table."""
  full = cell['labels'][-1]
  return {
    **{
      f'fine-tuned on {float(fraction):.0%}, {step} steps': top1
      for fraction, by_step in cell['finetuned'].items()
      for step, top1 in by_step.items()
    },
    'R@1': cell['retrieval']['R@1'],
    'R@5': cell['retrieval']['R@5'],
    'probe, 100%': full['probe'],
    'k-NN, 100%': full['knn'],
  }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
  """Markdown: a line a row of the ablation, mean and spread over the seeds; then the semi-supervised runs."""
  rows = {row: [measures(c) for c in cells if c['row'] == row] for row in ROWS}
  rows = {row: found for row, found in rows.items() if found}
  columns = list(next(iter(rows.values()))[0])
  lines = [
    [ROWS[row][0], *(spread(f[c] for f in found) for c in columns), str(len(found))] for row, found in rows.items()
  ]
  text = documents.markdown(['pre-training', *columns, 'seeds'], lines)
  semi = [c for c in cells if c['row'] == 'semi']
  if semi:
    arms = {'labelled stream alone': 'labelled_alone', 'co-trained with VTDL on all videos': 'semi'}
    lines = [[words, spread(c[key] for c in semi), str(len(semi))] for words, key in arms.items()]
    text += '\n\n' + documents.markdown(['trained from nothing with 5 % of the labels', 'top-1', 'seeds'], lines)
  return text


def picture(cells: Sequence[Mapping[str, Any]], path: str) -> None:
  """Fine-tuned top-1 and R@1 of every row: bars are means over the seeds, dots are seeds."""
  from cover_jax.evaluation import visualise  # noqa: F401  sets matplotlib's backend
  import matplotlib.pyplot as plt  # isort: skip

  rows = [row for row in ROWS if any(c['row'] == row for c in cells)]
  columns = [name for name in measures(cells[0]) if name.startswith('fine-tuned')]
  columns = [*columns[:: max(len(columns) - 1, 1)], 'R@1']  # the shortest fine-tuning, the longest, none
  figure, axes = plt.subplots(1, len(columns), figsize=(13, 0.5 * len(rows) + 1.2), sharey=True, layout='constrained')
  for ax, column in zip(axes, columns, strict=True):
    for i, row in enumerate(rows):
      values = [100 * measures(c)[column] for c in cells if c['row'] == row]
      ax.barh(i, np.mean(values), color='tab:blue' if row in _ABLATION else 'tab:grey')
      ax.plot(values, [i] * len(values), 'k.', markersize=5)
    ax.axvline(100 / len(rendering.MOTIONS), color='tab:red', linewidth=1)
    ax.set(title=column, xlabel='top-1, % (red line: chance)')
    ax.set_yticks(range(len(rows)), [ROWS[row][0] for row in rows], fontsize=8)
  axes[0].invert_yaxis()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.vtdl', __doc__)
  to.add_argument('--output', required=True, help='folder for the results')
  to.add_argument('--seeds', type=flags.words, default=['0', '1', '2'], help='seeds, each a whole column of runs')
  to.add_argument('--split', choices=('test', 'validation'), default='test', help='what to report on')
  to.add_argument('--rows', type=flags.words, default=[], help='only these rows; all of them if empty')
  to.add_argument('--steps', type=int, default=1200, help='of pre-training')
  to.add_argument('--finetuning_steps', type=int, default=200, help='of fine-tuning; it is looked at after each third')
  to.add_argument('--fractions', type=flags.words, default=['0.05'], help='shares of the labels to fine-tune on')
  to.add_argument(
    '--clips', choices=('dense', 'segments'), default='dense', help='what clips show in fine-tuning: see `labelled`'
  )
  to.add_argument('--doc', default='', help='Markdown file to write the table to, with a picture beside it')
  to.add_argument('--quick', action='store_true', help='a few steps of everything, to see that it runs')
  to.add_argument('--set', action='append', default=[], help='key=JSON value of the VTDL objective, to try settings')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  if unknown := sorted(set(_OPTIONS.rows) - {*ROWS, 'semi'}):
    raise UserError(f'--rows has {unknown}: expected some of {", ".join((*ROWS, "semi"))}.')
  os.makedirs(_OPTIONS.output, exist_ok=True)
  # The same few programs are compiled for every seed.
  jax.config.update('jax_compilation_cache_dir', os.path.join(_OPTIONS.output, 'compiled'))
  data: dict[str, Any] = {}
  cells = []
  for seed in map(int, _OPTIONS.seeds):
    for row in _OPTIONS.rows or (*ROWS, 'semi'):
      path = os.path.join(_OPTIONS.output, f'{_OPTIONS.split}_{row}_{seed}.json')
      if not os.path.exists(path):
        data = data or draw()
        print(f'{row}, seed {seed} ...', flush=True)
        cell = run_semi(seed, data) if row == 'semi' else run_row(row, seed, data)
        cell['settings'] = {
          name: getattr(_OPTIONS, name)
          for name in ('split', 'steps', 'finetuning_steps', 'fractions', 'clips', 'set', 'quick')
        }
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
          json.dump(cell, f, indent=1)
        os.replace(path + '.tmp', path)
      with open(path, encoding='utf-8') as f:
        cells.append(json.load(f))
  settings = {json.dumps(c['settings']) for c in cells}
  if len(settings) > 1:
    raise UserError(
      f'{_OPTIONS.output} holds results of different settings: {sorted(settings)}; use one folder for each.'
    )
  seconds = sum(sum(c['seconds'].values()) for c in cells)
  ablation = [c for c in cells if c['row'] != 'semi']
  text = table(cells) if ablation else json.dumps(cells, indent=1)
  text += f'\n\nTop-1 and recall on the {_OPTIONS.split} split, %; {seconds / 60:.0f} minutes in all.'
  print(f'\n{text}')
  if _OPTIONS.doc and ablation:
    image = os.path.splitext(_OPTIONS.doc)[0] + '.png'
    picture(ablation, image)
    documents.fill(_OPTIONS.doc, f'{text}\n\n![top-1 by row]({os.path.basename(image)})', 'VTDL')


if __name__ == '__main__':
  sys.exit(flags.run(main))
