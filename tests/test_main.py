"""The command line as a user meets it: training, kill -9, SIGTERM, evaluation, and every kind of bad input."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import ml_collections
import pytest

import cover_jax
from configs import digits_cover
from cover_jax import checkpoints
from cover_jax import main as command_line
from cover_jax.jobs import evaluate as evaluate_job
from cover_jax.jobs import train as train_job
from data_pipelines.contract import UserError

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = 'configs/digits_cover.py:debug'


def command(workdir, *flags, config=CONFIG):
  return [sys.executable, '-m', 'cover_jax.main', f'--config={config}', f'--workdir={workdir}', *flags]


def start(workdir, *flags, config=CONFIG):
  env = os.environ | {'XLA_FLAGS': ''}
  return subprocess.Popen(
    command(workdir, *flags, config=config),
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, timeout=1200):
  output, _ = process.communicate(timeout=timeout)
  return process.returncode, output


LONG = ('--config.total_steps=120', '--config.checkpoint_every=10', '--config.log_every=5')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, embedded_data):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  code, output = finish(start(workdir, *LONG))
  assert code == 0, output
  return workdir, output


def params_bits(workdir):
  state = checkpoints.load(str(workdir))['state']
  return {k: v.tobytes() for k, v in checkpoints.flatten(state).items()}


def wait_for_checkpoint(workdir, number, process):
  deadline = time.monotonic() + 240
  while not (workdir / checkpoints.FOLDER / f'ckpt-{number}.flax').exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_run_leaves_what_it_says(uninterrupted):
  workdir, output = uninterrupted
  report = json.loads((workdir / 'evaluation' / 'report.json').read_text())
  assert report['step'] == 120
  assert set(report['sources']) == {'objects', 'motions', 'moments', 'digits'}
  for name, result in report['sources'].items():
    assert result['examples'] > 300
    assert f'{name} ' in output
    for file in (f'per_class_{name}.csv', f'confusion_{name}.png'):
      assert (workdir / 'evaluation' / file).stat().st_size > 100
  for file in ('training_curves.png', 'predictions.png', 'metrics.jsonl', 'config.json'):
    assert str(workdir / file) in output or file in ('metrics.jsonl', 'config.json')
    assert (workdir / file).stat().st_size > 100
  assert 'steps/s' in output and 'ETA' in output
  assert list(workdir.glob('events.out.tfevents.*'))


@pytest.mark.slow
def test_kill_9_then_the_same_command_is_bit_equal(uninterrupted, tmp_path):
  expected, _ = uninterrupted
  chance = random.Random(0)
  process = start(tmp_path, *LONG)
  wait_for_checkpoint(tmp_path, 3, process)
  time.sleep(chance.uniform(0, 0.3))
  process.kill()
  process.communicate()
  stopped_at = checkpoints.load(str(tmp_path))['about']['step']
  code, output = finish(start(tmp_path, *LONG))
  assert code == 0, output
  assert f'(step {stopped_at})' in output and 0 < stopped_at < 120
  assert params_bits(tmp_path) == params_bits(expected)
  assert (tmp_path / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_75(uninterrupted, tmp_path):
  expected, _ = uninterrupted
  process = start(tmp_path, *LONG)
  wait_for_checkpoint(tmp_path, 2, process)
  process.send_signal(signal.SIGTERM)
  code, output = finish(process)
  assert code == command_line.EXIT_PREEMPTED == 75, output
  assert 'Run the same command again' in output and 'Traceback' not in output
  code, output = finish(start(tmp_path, *LONG))
  assert code == 0, output
  assert params_bits(tmp_path) == params_bits(expected)
  assert (tmp_path / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()


@pytest.mark.slow
def test_evaluate_gives_what_training_ended_with(uninterrupted):
  workdir, _ = uninterrupted
  path = workdir / 'evaluation' / 'report.json'
  trained = json.loads(path.read_text())
  path.unlink()
  code, output = finish(start(workdir, *LONG, '--mode=evaluate', '--config.eval_batch_size=40'))
  assert code == 0, output
  evaluated = json.loads(path.read_text())
  for name, result in trained['sources'].items():
    again = evaluated['sources'][name]
    assert {k: again[k] for k in ('top1', 'top5', 'examples', 'mean_class_accuracy')} == {
      k: result[k] for k in ('top1', 'top5', 'examples', 'mean_class_accuracy')
    }
    assert again['loss'] == pytest.approx(result['loss'], rel=1e-5)


@pytest.mark.slow
def test_a_second_start_is_told_of_the_first_which_goes_on(embedded_data, tmp_path):
  first = start(tmp_path, *LONG)
  wait_for_checkpoint(tmp_path, 1, first)
  first.send_signal(signal.SIGSTOP)  # or it might be done before the second one looks
  line = one_sentence(start(tmp_path, *LONG))
  first.send_signal(signal.SIGCONT)
  assert f'{tmp_path} is in use: process {first.pid} on ' in line and 'cover_jax.main' in line
  wait_for_checkpoint(tmp_path, 2, first)
  first.kill()
  first.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(('kilobytes', 'what'), [(2, 'config.json'), (8, r'metrics.jsonl|TensorBoard events')])
def test_a_full_disk_is_one_sentence(tmp_path, kilobytes, what):
  """No file may grow beyond a size, which is what a full disk is to a writer."""
  options = {'changes': {'mesh__data': 1, 'total_steps': 200, 'checkpoint_every': 1000, 'log_every': 1}}
  own = {'TINY_RUN': json.dumps(options), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  env = os.environ | own | {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  run = f'ulimit -f {kilobytes}; exec {sys.executable} -m tests.process_worker --workdir={tmp_path}'
  done = subprocess.run(['bash', '-c', run], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
  assert done.returncode == command_line.EXIT_USER_ERROR, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('Error: ')]
  assert re.search(f'Could not write ({what}) in {tmp_path} .*File too large.*there is no checkpoint yet', line)
  assert 'Traceback' not in done.stderr, done.stderr


@pytest.mark.slow
def test_twenty_random_kills_are_bit_equal(uninterrupted, tmp_path):
  """`pytest -m slow -s tests/test_main.py -k kills`"""
  expected, _ = uninterrupted
  chance = random.Random(1)
  kills = last_step = 0
  while kills < 20:
    process = start(tmp_path, *LONG)
    if kills % 2:  # anywhere: while it starts, restores, compiles or trains
      time.sleep(chance.uniform(0, 12))
    else:  # about when it saves
      wait_for_checkpoint(tmp_path, last_step // 10 + 1, process)
      time.sleep(chance.uniform(0, 0.3))
    if process.poll() is not None:
      break
    process.kill()
    process.communicate()
    kills += 1
    step = checkpoints.load(str(tmp_path))['about']['step'] if checkpoints.latest(str(tmp_path)) else 0
    assert step >= last_step  # nothing that was saved is lost
    last_step = step
    if step == 120:
      break
  code, output = finish(start(tmp_path, *LONG))
  assert code == 0, output
  assert kills >= 10
  print(f'{kills} kills, the last at step {last_step}')
  assert params_bits(tmp_path) == params_bits(expected)
  assert (tmp_path / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()


def one_sentence(process):
  code, output = finish(process)
  assert code == command_line.EXIT_USER_ERROR, output
  assert 'Traceback' not in output, output
  (line,) = [line for line in output.splitlines() if line.startswith('Error: ')]
  return line


def test_unknown_config_key(tmp_path):
  line = one_sentence(start(tmp_path / 'w', '--config.optimiser.learning_rate=1'))
  assert 'optimiser' in line
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('flag', 'message'),
  [('--config.optimizer.learning_rate=abc', 'learning_rate'), ('--mode=eval', 'train'), ('--flag=1', 'flag')],
)
def test_wrong_flag_value(tmp_path, flag, message):
  assert message in one_sentence(start(tmp_path / 'w', flag))


def test_unknown_variant(tmp_path):
  assert 'debgu' in one_sentence(start(tmp_path, config='configs/digits_cover.py:debgu'))


def test_missing_config_file_and_missing_workdir(tmp_path):
  assert 'nowhere.py' in one_sentence(start(tmp_path, config='configs/nowhere.py'))
  process = subprocess.Popen(
    [sys.executable, '-m', 'cover_jax.main', f'--config={CONFIG}'],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  assert '--workdir' in one_sentence(process)


def test_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    train_job.train(digits_cover.get_config('debug'), str(tmp_path / 'file' / 'workdir'))


def changed(**changes) -> ml_collections.ConfigDict:
  config = digits_cover.get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
  return config


BAD_CONFIGS = {
  'unknown source in a stream': (
    {'streams__video__sources': ('objects', 'motoins', 'moments')}, "motoins.*config.sources"),
  'unused source': ({'streams__video__sources': ('objects', 'moments')}, 'motions'),
  'unknown data set': ({'sources__objects__dataset': 'moving_digitz/objects'}, 'moving_digitz.*objects'),
  'unknown split': ({'sources__objects__train': 'trian'}, 'trian'),
  'weights that sum to zero': (
    {'mixture__weights': dict.fromkeys(('objects', 'motions', 'moments', 'digits'), 0.0)}, 'all zero'),
  'weight for no source': ({'mixture__weights': {'objetcs': 1.0}}, 'objetcs'),
  'batch that the mesh cannot divide': ({'batch_size': 36}, 'batch_size.*36'),
  'stream batch that the mesh cannot divide': ({'streams__video__batch_size': 12}, 'video.batch_size = 12'),
  'mesh that does not fit': ({'mesh__data': 3}, 'mesh.*8'),
  'unknown model field': ({'model__widht': 16}, 'widht'),
  'size that patches do not divide': ({'streams__video__size': 30}, 'size.*patch'),
  'unknown objective': ({'streams__video__objective': {'name': 'classify'}}, 'classify.*classification'),
  'unknown objective option': (
    {'streams__video__objective': {'name': 'classification', 'smoothing': 0.1}}, 'smoothing'),
  'unknown optimizer': ({'optimizer__name': 'adamm'}, 'adamm'),
  'no length': ({'total_steps': 0}, 'total_steps'),
  'images in a stream of clips': (
    {'streams__image__num_frames': 8}, 'digits.*(frames|padded)'),
  'number of heads': ({'model__num_heads': 3}, 'config.model.*num_heads'),
  'unknown attention': ({'model__attention': 'axial'}, 'config.model.*axial'),
  'unknown dtype': ({'dtype': 'float99'}, 'float99'),
  'unknown kind of parameters': ({'eval_params': 'raww'}, 'eval_params.*raww'),
  'average that is not kept': ({'eval_params': 'ema'}, 'ema_decay'),
  'unknown augmentation': ({'streams__video__augment': {'colour': {}}}, 'streams.video.augment has .*colour'),
  'way to count what is missing': ({'eval_missing': 'ignore'}, 'eval_missing.*leave_out'),
  'crops of no protocol': ({'sources__motions__test_crops': 2}, 'motions.test_crops is 2'),
  'rate of unknown videos': ({'sources__motions__fps': 5.0}, 'fps of source .motions.'),
  'best by an unknown measure': ({'keep_best': 'test/digit/top1'}, "keep_best is 'test/digit/top1'.*test/digits/top1"),
  'evaluation batch': ({'eval_batch_size': 30}, 'eval_batch_size'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD_CONFIGS)
def test_bad_config_is_one_sentence(case, tmp_path, embedded_data):
  changes, pattern = BAD_CONFIGS[case]
  with pytest.raises(UserError, match=f'(?s){pattern}') as error:
    train_job.train(changed(**changes), str(tmp_path))
  assert '\n' not in str(error.value)
  assert not (tmp_path / checkpoints.FOLDER).exists()


def test_checkpoint_of_another_architecture(uninterrupted):
  workdir, _ = uninterrupted
  before = params_bits(workdir), (workdir / 'config.json').read_text()
  with pytest.raises(UserError, match=r'at step 120.*: model\.width: 16 -> 32; seed: 0 -> 1\. ') as error:
    train_job.train(changed(model__width=32, seed=1), str(workdir))
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=r'ema/.* is nothing in the checkpoint'):  # may change, but not in the middle
    train_job.train(changed(ema_decay=0.9), str(workdir))
  assert (params_bits(workdir), (workdir / 'config.json').read_text()) == before


def test_data_set_whose_class_count_changed(uninterrupted):
  workdir, _ = uninterrupted
  loaded = checkpoints.load(str(workdir))
  from data_pipelines.contract import SourceInfo

  now = [SourceInfo(s['name'], s['modality'], 1, tuple(s['class_names'])) for s in loaded['about']['sources']]
  checkpoints.check_sources(loaded, tuple(now))
  fewer = SourceInfo(now[0].name, now[0].modality, 1, now[0].class_names[:-1])
  with pytest.raises(UserError, match=f'{now[0].name}.*classes now'):
    checkpoints.check_sources(loaded, (fewer, *now[1:]))


def test_no_checkpoint_to_evaluate(tmp_path):
  with pytest.raises(UserError, match='No checkpoint'):
    evaluate_job.evaluate(digits_cover.get_config('debug'), str(tmp_path))


def test_import_needs_no_tensorflow():
  code = (
    'import sys; import cover_jax, cover_jax.training.loop, cover_jax.evaluation.classify, cover_jax.checkpoints; '
    'import cover_jax.jobs.train; '
    "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' not in sys.modules"
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_a_folder_of_that_name_does_not_hide_the_package(tmp_path):
  """As from the folder above a checkout: the installed package is found, not an empty namespace."""
  (tmp_path / 'cover_jax' / 'cover_jax').mkdir(parents=True)
  environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  code = 'import cover_jax, configs.defaults, data_pipelines; print(cover_jax.__version__, cover_jax.load)'
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.startswith(cover_jax.__version__), done.stderr


def test_missing_config_file_with_settings_is_one_sentence(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'cover_jax.main', '--config=configs/nothing.py', f'--workdir={tmp_path}', '--config.seed=1'],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and 'configs/nothing.py cannot be read' in done.stderr
  assert 'Traceback' not in done.stderr.split('Error:')[-1]
