"""Going on with another config: what makes another run is refused before anything happens, the rest is said."""

import json
import os

import numpy as np
import pytest

from configs import defaults, digits_cover
from cover_jax import checkpoints
from cover_jax.experiment import build as experiments
from cover_jax.jobs import resume
from cover_jax.jobs import train as train_job
from data_pipelines.contract import SourceInfo, UserError
from tests.test_train_loop import run, saved  # noqa: F401  a fixture

SOURCES = ('objects', 'motions', 'moments', 'digits')
OTHER_RUNS = {
  'heads.all.name': 'attentive',
  'seed': 1,
  'batch_size': 24,
  'batch_multiple': 16,
  'pixel_mean': (0.45, 0.45, 0.45),
  'mixture.temperature': 2.0,
  'mixture.one_source_a_step': True,
  'mixture.weights': {'objects': 1.0, 'motions': 1.0, 'moments': 1.0, 'digits': 2.0},
  'optimizer.name': 'sgd',
  'init_from.path': 'other.npz',
  'model.width': 32,
  'model.drop_path': 0.1,
  'model.attention': 'joint',
  'sources.objects.dataset': 'moving_digits/motions',
  'sources.objects.train': 'train[:50%]',
  'sources.objects.label_fraction': 0.5,
  'sources.objects.flip': True,
  'sources.objects.exclude': ('list.txt',),
  'streams.video.num_frames': 4,
  'streams.video.size': 16,
  'streams.video.loss_weight': 0.5,
  'streams.video.augment': {'mixup': 0.8},
  'streams.video.objective': {'name': 'classification', 'label_smoothing': 0.1},
}
SAME_RUN = {
  'total_steps': 100,
  'total_epochs': 3.0,
  'optimizer.learning_rate': 1.0,
  'optimizer.options': {'b2': 0.9},
  'optimizer.learning_rate_rules': (('.*', 0.5),),
  'ema_decay': 0.5,
  'model.remat': 'full',
  'model.scan_unroll': 2,
  'model.tokens_together': 128,
  'dtype': 'bfloat16',
  'accumulation_steps': 2,
  'mesh.fsdp': 2,
  'logical_axis_rules': (('batch', 'data'),),
  'log_every': 7,
  'checkpoint_every': 7,
  'keep_checkpoints': 7,
  'keep_every': 7,
  'keep_best': 'test/digits/top1',
  'eval_every': 7,
  'eval_batch_size': 8,
  'eval_missing': 'wrong',
  'eval_params': 'ema',
  'profile_at_step': 7,
  'wandb.project': 'mine',
  'allow_overlap': True,
  'sources.objects.data_dir': 'elsewhere',
  'sources.objects.test': 'test[:50%]',
  'sources.objects.test_crops': 3,
  'frozen.clips': 3,
}


def config(**changes):
  c = digits_cover.get_config('debug')
  with c.unlocked():
    for key, value in changes.items():
      c.update_from_flattened_dict({key: value})
  return c.to_dict()


def stored(c):
  return json.loads(json.dumps(c, sort_keys=True))


@pytest.mark.parametrize('key', OTHER_RUNS)
def test_what_makes_another_run_is_refused(key):
  refused, said = resume.compare(stored(config()), config(**{key: OTHER_RUNS[key]}))
  assert said == [] and refused
  assert all(line.startswith(key) and ' -> ' in line for line in refused)


@pytest.mark.parametrize('key', SAME_RUN)
def test_what_a_run_may_change_is_said(key):
  refused, said = resume.compare(stored(config()), config(**{key: SAME_RUN[key]}))
  assert refused == [] and said
  assert all(line.startswith(key) and ' -> ' in line for line in said)


def test_every_key_is_in_one_of_the_two_tables():
  """Whoever adds a key decides what it is: else it is refused, which is safe."""
  tables = {**OTHER_RUNS, **SAME_RUN}
  groups = ('sources', 'streams', 'model', 'init_from', 'frozen', 'mesh', 'optimizer', 'mixture', 'heads', 'wandb')
  missing = [key for key in defaults.get_config() if key not in groups and key not in (*tables, 'pixel_std')]
  assert missing == []


def test_lines_name_both_values_and_all_keys():
  changes = {'seed': 3, 'batch_size': 24, 'log_every': 9}
  assert resume.compare(stored(config()), config(**changes)) == (
    ['batch_size: 32 -> 24', 'seed: 0 -> 3'],
    ['log_every: 1 -> 9'],
  )
  assert resume.compare(stored(config()), config()) == ([], [])


def test_a_source_that_came_or_went_is_one_line():
  old, new = config(), config()
  new['sources']['more'] = new['sources'].pop('digits')
  refused, said = resume.compare(stored(old), new)
  assert refused == ['sources.digits: there -> (absent)', 'sources.more: (absent) -> there'] and not said


def test_keys_that_one_version_lacks_have_their_defaults():
  old = stored(config())
  for path in ('accumulation_steps', 'model.drop_path', 'sources.digits.short_side', 'streams.video.augment', 'frozen'):
    *folders, key = path.split('.')
    inner = old
    for folder in folders:
      inner = inner[folder]
    inner.pop(key, None)
  assert resume.compare(old, config()) == ([], [])
  assert resume.compare(config(), old) == ([], [])
  refused, _ = resume.compare(old, config(**{'model.drop_path': 0.1}))
  assert refused == ['model.drop_path: 0.0 -> 0.1']
  new = config()
  new['sources']['digits']['new_key'] = 1
  refused, _ = resume.compare(old, new)
  assert refused == ['sources.digits.new_key: (absent) -> 1']


def files(folder):
  return {p.name: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != '.lock'}


def test_another_seed_in_a_finished_workdir_is_refused_before_anything(tmp_path, monkeypatch):
  c = digits_cover.get_config('debug')
  saver = checkpoints.Saver(str(tmp_path), 2)
  tree = {'state': {'w': 1}, 'interval': {}}
  saver.save({'about': checkpoints.about(c.to_dict(), (), 4), **tree})
  (tmp_path / 'config.json').write_text(c.to_json_best_effort())
  (tmp_path / 'metrics.jsonl').write_text('{"step": 4}\n')
  before = files(tmp_path)
  opened = []
  monkeypatch.setattr(train_job, 'open_experiment', lambda *_: opened.append(1) or 1 / 0)
  c.seed, c.batch_size = 1, 24
  with pytest.raises(
    UserError, match=r'at step 4, .*: batch_size: 32 -> 24; seed: 0 -> 1\. Take another --workdir'
  ) as e:
    train_job.train(c, str(tmp_path))
  assert '\n' not in str(e.value) and not opened
  assert files(tmp_path) == before
  c.seed, c.batch_size, c.total_steps = 0, 32, 8
  with pytest.raises(ZeroDivisionError):  # it goes on to the data
    train_job.train(c, str(tmp_path))


def test_a_checkpoint_that_does_not_fit_leaves_config_json(run, tmp_path, monkeypatch):  # noqa: F811
  run(total_steps=5)
  before = (tmp_path / 'config.json').read_bytes()

  def misfit(*_):
    raise UserError('does not fit')

  monkeypatch.setattr('cover_jax.training.loop.start_state', misfit)
  with pytest.raises(UserError, match='does not fit'):
    run(total_steps=7)
  assert (tmp_path / 'config.json').read_bytes() == before and saved(tmp_path)[0] == 5


@pytest.mark.parametrize('text', ['', '{"architectures": ["TimesformerForVideoClassification"]}', '[1]', '\xff'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, text):
  (tmp_path / 'config.json').write_text(text, encoding='latin-1')
  with pytest.raises(UserError, match=r'config\.json is not the config of a run'):
    resume.check(str(tmp_path), config())
  assert os.listdir(tmp_path) == ['config.json']


def test_a_run_that_saved_nothing_starts_anew_with_any_config(tmp_path, caplog):
  (tmp_path / 'config.json').write_text(json.dumps(config()))
  resume.check(str(tmp_path), config(seed=1))
  assert 'saved no checkpoint: it starts anew' in caplog.text


@pytest.mark.parametrize('trace', ['checkpoint', 'ckpt-3.flax.refused'])
def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(tmp_path, trace):
  (tmp_path / 'config.json').write_text(json.dumps(config()))
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints' / trace).write_text('model_checkpoint_path: "ckpt-3"')
  with pytest.raises(UserError, match=f'{trace} shows that one was saved.*nothing is started anew'):
    resume.check(str(tmp_path), config())
  assert sorted(os.listdir(tmp_path)) == ['checkpoints', 'config.json']


def test_damaged_checkpoints_alone_are_said_to_be_all_there_is(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints' / 'ckpt-1.flax').write_bytes(bytes(1000))
  with pytest.raises(UserError, match=r'no other checkpoint in .* is whole: put a copy of one back'):
    resume.check(str(tmp_path), config())


@pytest.mark.parametrize('with_config', [True, False])
def test_a_run_whose_folder_of_checkpoints_is_gone_is_not_started_anew(tmp_path, with_config):
  """Its metrics tell: they go on behind the step of the first save."""
  c = config(checkpoint_every=4)
  if with_config:
    (tmp_path / 'config.json').write_text(json.dumps(c))
  rows = [{'step': step, 'train/loss': 1.0} for step in (2, 4, 6)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  before = files(tmp_path)
  with pytest.raises(UserError, match=r'goes on to step 6, and the run saved first at step 4.*nothing is started anew'):
    resume.check(str(tmp_path), c)
  assert files(tmp_path) == before
  (tmp_path / 'checkpoints' / 'ckpt_4.orbax-checkpoint-tmp').mkdir(parents=True)  # killed within its first save
  resume.check(str(tmp_path), c)


def test_a_run_that_was_killed_before_its_first_save_starts_anew(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 2}\n{"step": 4}\n')
  resume.check(str(tmp_path), config(checkpoint_every=4))


def test_harmless_changes_are_said(tmp_path, caplog):
  c = digits_cover.get_config('debug')
  saver = checkpoints.Saver(str(tmp_path), 2)
  saver.save({'about': checkpoints.about(c.to_dict(), (), 4), 'state': {'w': 1}, 'interval': {}})
  c.log_every = 7
  resume.check(str(tmp_path), c.to_dict())
  assert 'The config changed since the checkpoint: log_every: 1 -> 7' in caplog.text


def at_step(folder, step, **changes):
  """A checkpoint of the debug config in a folder."""
  sources = tuple(SourceInfo(name, 'video' if name != 'digits' else 'image', 400, ('a', 'b')) for name in SOURCES)
  text = checkpoints.about(config(**changes), sources, step)
  checkpoints.Saver(str(folder), 2).save({'about': text, 'state': {'w': 1}, 'interval': {}})


def rate_said(tmp_path, caplog, **changes):
  """What is said of the learning rate of a run of 100 steps, 10 of them warm-up, that goes on at step 90."""
  base = {'total_steps': 100, 'optimizer.warmup_steps': 10, 'optimizer.learning_rate': 1e-3}
  at_step(tmp_path, 90, **base)
  c = digits_cover.get_config('debug')
  c.update_from_flattened_dict(base | changes)
  described = checkpoints.describe(str(tmp_path))
  going_on = experiments.build(c, checkpoints.sources_of(described))
  caplog.clear()
  resume.say_rate(str(tmp_path), going_on, resume.check(str(tmp_path), c.to_dict()))
  return [record.getMessage() for record in caplog.records if 'learning rate jumps' in record.getMessage()]


def test_another_length_says_how_the_learning_rate_jumps(tmp_path, caplog):
  (said,) = rate_said(tmp_path, caplog, total_steps=200)
  old, new = (1e-3 * (1 + np.cos(np.pi * 80 / after)) / 2 for after in (90, 190))
  assert f'at step 91: {new:.4g}, where the schedule of the checkpoint had {old:.4g}, {new / old:.3g} times' in said
  assert 'total_steps: 100 -> 200' in said


@pytest.mark.parametrize('changes', [{}, {'optimizer.weight_decay': 0.1}, {'log_every': 7}])
def test_a_learning_rate_that_stays_is_not_said(tmp_path, caplog, changes):
  assert rate_said(tmp_path, caplog, **changes) == []


def test_a_checkpoint_that_does_not_fit_lists_what_changed(tmp_path, monkeypatch):
  at_step(tmp_path, 4)
  c = digits_cover.get_config('debug')
  c.ema_decay, c.log_every = 0.9, 7

  def misfit(*_):
    checkpoints.contents.fit({'path': 'ckpt-1.flax'}, {}, {'ema': {'w': np.zeros(2)}})

  monkeypatch.setattr(train_job, 'open_experiment', misfit)
  with pytest.raises(
    UserError, match=r'ckpt-1\.flax does not fit.*Changed .*: ema_decay: 0.0 -> 0.9; log_every: 1 -> 7'
  ):
    train_job.train(c, str(tmp_path))
