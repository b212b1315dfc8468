"""The loop around the step: what is saved, said and written when something goes wrong. Its step is an addition."""

import errno
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax import checkpoints
from cover_jax.checkpoints import going_back
from cover_jax.checkpoints import workdir as workdirs
from cover_jax.evaluation import visualise
from cover_jax.experiment.state import TrainState
from cover_jax.training import loop as training
from cover_jax.training import metrics
from cover_jax.training.finite import NonFiniteLoss
from data_pipelines import durable
from data_pipelines.contract import UserError
from tests import tiny

EVALUATED = {'test/acts/loss': 1.0, 'test/acts/top1': 0.5}


def start_state(experiment, optimizer, mesh, workdir):
  del experiment, optimizer, mesh
  path = checkpoints.latest(workdir)
  step, w = 0, np.ones(3, np.float32)
  if path:
    loaded = checkpoints.load(path)
    step, w = int(loaded['state']['step']), loaded['state']['params']['encoder']['w']
  state = TrainState(jnp.asarray(step, jnp.int32), {'encoder': {'w': jnp.asarray(w)}}, {}, {}, {})
  return state, {}, {}


def add(state, batch):
  """Adds the batch's 'gradient' to the parameters; losses are the batch's own."""
  number = {name: jnp.max(x) for name, x in batch.items()}
  params = jax.tree.map(lambda w: w + number['gradient'] + number['leap'], state.params)
  report = {
    'losses': {'image': number['image'], 'video': number['video']},
    'scalars': {'loss': number['image'] + number['video'], 'gradient_norm': jnp.abs(number['gradient'])},
    'measures': {},
  }
  return state.replace(step=state.step + 1, params=params), report


@pytest.fixture
def run(monkeypatch, tmp_path):
  """run(strange={step: {'gradient': nan}}, evaluate=..., stop_at=..., **changes of the config) -> state."""
  monkeypatch.setattr(training, 'start_state', start_state)
  monkeypatch.setattr(training, 'compile_step', lambda *_: jax.jit(add))

  def go(strange=None, evaluate=None, stop_at=None, **changes):
    options = {'total_steps': 10, 'checkpoint_every': 5, 'log_every': 1, 'mesh__data': 1}
    experiment, mesh, _, _ = tiny.build(tiny.config(**options | changes), jax.devices()[:1])

    def batches(first):
      for step in itertools.count(first + 1):
        numbers = {'image': 1.0, 'video': 2.0, 'gradient': 0.5, 'leap': 0.0} | (strange or {}).get(step, {})
        yield {name: np.full(8, value, np.float32) for name, value in numbers.items()}

    asked = itertools.count(1)
    stop = lambda: next(asked) == stop_at
    return training.train(experiment, batches, str(tmp_path), mesh, evaluate, stop)

  return go


def saved(folder):
  """(step, parameters) of the newest checkpoint, None where there is none."""
  if checkpoints.latest(str(folder)) is None:
    return None
  loaded = checkpoints.load(str(folder))
  return int(loaded['state']['step']), loaded['state']['params']['encoder']['w'].tolist()


BAD = {'gradient': np.nan}


@pytest.mark.parametrize(
  ('step', 'options'),
  [
    (7, {}),  # between saves: read once step 8 is under way
    (10, {}),  # the last one
    (8, {'keep_every': 4}),
    (7, {'stop_at': 7}),  # SIGTERM comes with it
    (7, {'stop_at': 8}),  # SIGTERM comes while it is not read yet
    (7, {'eval_every': 7, 'evaluate': lambda _: EVALUATED}),
  ],
)
@pytest.mark.parametrize('kind', [np.nan, np.inf])
def test_nothing_of_a_step_with_a_bad_gradient_is_saved(run, tmp_path, step, options, kind):
  message = rf'gradient is not finite.* at step {step}\. Nothing of that step .*ckpt-\d\.flax'
  with pytest.raises(NonFiniteLoss, match=message) as error:
    run({step: {'gradient': kind}}, **options)
  assert 'image' not in str(error.value) and 'no stream can be named' in str(error.value)
  found, w = saved(tmp_path)
  assert found == 5 and np.isfinite(w).all()
  assert [row['step'] for row in metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))][-1] == step - 1
  # The same command can go on once the cause is gone.
  assert int(run().step) == 10


def test_a_bad_gradient_at_the_first_save_leaves_no_checkpoint(run, tmp_path):
  with pytest.raises(NonFiniteLoss, match=r'at step 5\. Nothing .*checkpoint is none'):
    run({5: BAD})
  assert saved(tmp_path) is None


def test_a_bad_loss_names_its_streams(run):
  with pytest.raises(NonFiniteLoss, match=r'loss of stream image is not finite at step 6\. '):
    run({6: {'image': np.nan, 'gradient': np.nan}})
  with pytest.raises(NonFiniteLoss, match=r'loss of stream image, video is not finite at step 9\. '):
    run({9: {'image': np.inf, 'video': -np.inf}})
  with pytest.raises(NonFiniteLoss, match=r'weighted sum .* at step 7\. '):
    run({7: {'image': 3e38, 'video': 3e38}})


def test_a_bad_state_behind_a_finite_gradient_is_not_saved(run, tmp_path):
  with pytest.raises(NonFiniteLoss, match=r'state is not \(params/encoder/w, 1 arrays\) at step 10\. '):
    run({8: {'leap': np.inf}})
  assert saved(tmp_path) == (5, [3.5] * 3)


def test_a_checkpoint_of_bad_numbers_is_not_gone_on_from(run, tmp_path, monkeypatch):
  monkeypatch.setattr(training.finite, 'bad_arrays', lambda state: [])  # as a version without the check saved it
  run({8: {'leap': np.nan}})
  monkeypatch.undo()
  monkeypatch.setattr(training, 'start_state', start_state)
  with pytest.raises(UserError, match=r'ckpt-2\.flax holds numbers that are not finite \(params/encoder/w'):
    run(total_steps=20)


def test_the_host_reads_a_step_after_it_has_dispatched_the_next(run, monkeypatch):
  """Between saves, no step is read before the one after it is under way: the checks cost no wait."""
  order = []
  monkeypatch.setattr(
    training, 'compile_step', lambda *_: lambda state, batch: order.append('dispatch') or jax.jit(add)(state, batch)
  )
  trouble = training.finite.trouble
  monkeypatch.setattr(training.finite, 'trouble', lambda *args: order.append('read') or trouble(*args))
  run(total_steps=4, checkpoint_every=100)
  assert order == ['dispatch', 'dispatch', 'read', 'dispatch', 'read', 'dispatch', 'read', 'read']


def no_room(*_, **__):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
  """A file that takes half of what it is given and then nothing more."""

  def __init__(self, file, limit):
    self._file, self._limit = file, limit

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, data):
    room = self._limit - os.fstat(self._file.fileno()).st_size
    if room <= 0:
      no_room()
    return self._file.write(data[:room])


def test_full_disk_at_config_json(run, tmp_path, monkeypatch):
  run(total_steps=5)
  before = (tmp_path / 'config.json').read_bytes()
  monkeypatch.setattr(durable, 'write', no_room)
  with pytest.raises(UserError, match=r'Could not write config\.json .*No space left.*checkpoint is .*ckpt-1\.flax'):
    run()
  assert (tmp_path / 'config.json').read_bytes() == before
  assert saved(tmp_path)[0] == 5


def test_full_disk_at_metrics(run, tmp_path, monkeypatch):
  append = metrics._append
  monkeypatch.setattr(metrics, '_append', lambda file, line: append(FullDisk(file, 750), line))
  with pytest.raises(UserError, match=r'Could not write metrics\.jsonl .*No space left.*ckpt-1\.flax') as error:
    run()
  assert '\n' not in str(error.value)
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert 600 < len(text) < 750 and text.endswith('}\n')  # no half line
  monkeypatch.setattr(metrics, '_append', append)
  run()
  assert [row['step'] for row in metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))] == list(range(1, 11))
  assert not (tmp_path / 'metrics.jsonl.damaged').exists()


@pytest.mark.parametrize('method', ['write_scalars', 'close'])
def test_full_disk_at_tensorboard(run, tmp_path, monkeypatch, caplog, method):
  from clu.metric_writers import SummaryWriter

  def fails(*_, **__):  # what TensorFlow says
    raise RuntimeError('{{function_node x}} w/events.out; No space left on device\n\tFailed to flush 11 events')

  monkeypatch.setattr(SummaryWriter, method, fails)
  with pytest.raises(
    UserError, match=r'write TensorBoard events .*\(w/events.out; No space left on device\);'
  ) as error:
    run()
  assert '\n' not in str(error.value)
  assert 'Traceback' not in caplog.text
  assert (method == 'close') == (saved(tmp_path) is not None and saved(tmp_path)[0] == 10)


def test_full_disk_does_not_hide_what_came_before_it(run, monkeypatch, caplog):
  from clu.metric_writers import SummaryWriter

  monkeypatch.setattr(SummaryWriter, 'close', no_room)
  with pytest.raises(NonFiniteLoss):
    run({6: BAD})
  assert 'Could not write TensorBoard events' in caplog.text


def test_a_fault_in_an_evaluation_costs_no_step(run, tmp_path, caplog):
  def broken(_):
    raise UserError('tests/x.mp4 cannot be read.')

  with pytest.raises(UserError, match=r'x\.mp4'):
    run(evaluate=broken, eval_every=7)
  assert saved(tmp_path) == (7, [4.5] * 3)
  assert 'Stopped at step 7. The last whole checkpoint: ' in caplog.text and 'ckpt-2.flax' in caplog.text


def test_a_fault_in_the_data_names_the_last_checkpoint(run, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(training.sharding, 'to_global', no_room)
  with pytest.raises(OSError):
    run()
  assert 'The last whole checkpoint: none' in caplog.text


def test_stopped_in_the_final_evaluation_it_evaluates_when_started_again(run, tmp_path, caplog):
  def stopped(_):
    raise training.Preempted

  with pytest.raises(training.Preempted, match=r'saved .*ckpt-2\.flax at step 10 of 10'):
    run(evaluate=stopped)
  with pytest.raises(training.Preempted, match=r'saved .*ckpt-2\.flax at step 10 of 10'):  # and again
    run(evaluate=stopped)
  caplog.clear()
  caplog.set_level('INFO', logger='absl')
  state = run(evaluate=lambda _: EVALUATED)
  assert int(state.step) == 10
  assert 'nothing is trained' not in caplog.text and 'workdir?' not in caplog.text
  assert 'what is left is to evaluate and to report' in caplog.text
  tested = lambda: [row for row in metrics.read_jsonl(str(tmp_path / 'metrics.jsonl')) if 'test/acts/top1' in row]
  assert [row['step'] for row in tested()] == [10]
  run(evaluate=lambda _: EVALUATED)  # finished: the same numbers again, once
  assert [row['step'] for row in tested()] == [10]


def test_a_run_past_its_last_step_says_the_step_that_it_is_at(run, tmp_path, caplog):
  run(evaluate=lambda _: EVALUATED)
  state = run(evaluate=lambda _: EVALUATED, total_steps=6)
  assert int(state.step) == 10 and 'is at step 10, past its last one, 6' in caplog.text
  rows = metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in rows] == [*range(1, 11), 10]


def test_an_evaluation_that_is_not_repeated_keeps_its_row(run, tmp_path):
  """The last row of a run of 5 steps, which is then made longer and is not evaluated there again."""
  run(evaluate=lambda _: EVALUATED, total_steps=5)
  run(evaluate=lambda _: EVALUATED, total_steps=10)
  rows = metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in rows if 'test/acts/top1' in row] == [5, 10]


def test_a_nan_is_never_the_best(run, tmp_path):
  top1 = {2: 0.5, 4: np.nan, 6: 0.4, 8: 0.6, 10: np.nan}
  best = lambda: json.loads((tmp_path / checkpoints.FOLDER / 'best.json').read_text())
  options = {'eval_every': 2, 'keep_best': 'test/acts/top1', 'checkpoint_every': 100}
  run(evaluate=lambda s: EVALUATED | {'test/acts/top1': top1[int(s.step)]}, **options)
  assert (best()['step'], best()['value']) == (8, 0.6)
  kept = checkpoints.load(str(tmp_path / checkpoints.FOLDER / 'best'))
  assert int(kept['state']['step']) == 8


def test_a_nan_that_an_earlier_version_kept_is_replaced(run, tmp_path):
  (tmp_path / checkpoints.FOLDER).mkdir()
  record = tmp_path / checkpoints.FOLDER / 'best.json'
  record.write_text('{"metric": "test/acts/top1", "value": NaN, "step": 1}')
  run(evaluate=lambda _: EVALUATED, keep_best='test/acts/top1')
  assert json.loads(record.read_text()) == {'metric': 'test/acts/top1', 'value': 0.5, 'step': 10}


def test_each_picture_is_tried_alone(tmp_path, caplog):
  def wrong():
    raise IndexError('no such class')

  drawn = []
  with pytest.raises(IndexError):  # a mistake of ours, though the disk is full as well
    visualise.each({'a.png': no_room, 'b.png': wrong, 'c.png': lambda: drawn.append('c')})
  assert drawn == ['c']
  assert 'a.png could not be made: OSError' in caplog.text and 'b.png could not be made: IndexError' in caplog.text
  full = pytest.raises(UserError, match=r'Could not write the report .*No space left')
  with full, workdirs.writing(str(tmp_path), 'the report'):
    visualise.each({'a.png': no_room, 'c.png': lambda: drawn.append('c')})
  assert drawn == ['c', 'c']


def profiles(folder):
  return list(folder.glob('plugins/profile/*/*.xplane.pb'))


def test_a_profile_that_the_end_of_the_run_cuts_is_written(run, tmp_path):
  run(total_steps=4, checkpoint_every=0, profile_at_step=3)
  assert len(profiles(tmp_path)) == 1
  shutil.rmtree(tmp_path / 'plugins')  # a profile is named by the second
  run(total_steps=8, checkpoint_every=0, profile_at_step=6)  # another one can be taken
  assert len(profiles(tmp_path)) == 1


def test_a_profile_that_a_stop_cuts_is_written(run, tmp_path):
  with pytest.raises(training.Preempted):
    run(total_steps=10, checkpoint_every=0, profile_at_step=2, stop_at=3)
  assert len(profiles(tmp_path)) == 1


def test_weights_that_are_finite_and_absurd_are_not_saved(run, tmp_path):
  with pytest.raises(NonFiniteLoss, match=r'such weights \(params/encoder/w up to 6\.8e\+34\) at step 10\.') as error:
    run(strange={7: {'leap': 6.8e34}})
  assert saved(tmp_path)[0] == 5 and f'checkpoint is {checkpoints.latest(str(tmp_path))}' in str(error.value)


def test_a_run_goes_back_to_an_older_checkpoint_once(run, tmp_path, caplog):
  """As after a divergence; the later ones stay, under another name, and the bits are those of the first time."""
  run(checkpoint_every=2, keep_checkpoints=5)
  expected, folder = saved(tmp_path), tmp_path / checkpoints.FOLDER
  assert going_back.steps(str(tmp_path)) == [10, 8, 6, 4, 2]
  with pytest.raises(UserError, match=r'--resume_from=5: .* that it has: 10, 8, 6, 4, 2\.'):
    going_back.go_back(str(tmp_path), 5)
  later = {name: (folder / name).read_bytes() for name in ('ckpt-4.flax', 'ckpt-5.flax')}
  going_back.go_back(str(tmp_path), 6)
  assert saved(tmp_path)[0] == 6 and 'ckpt-5.flax.refused' in caplog.text
  assert {name: (folder / f'{name}.refused').read_bytes() for name in later} == later
  run(checkpoint_every=2, keep_checkpoints=5)
  assert saved(tmp_path) == expected
  going_back.go_back(str(tmp_path), 6)  # the command is given again, as after a preemption
  assert saved(tmp_path) == expected and 'went back to step 6 already' in caplog.text


def test_a_run_goes_back_to_a_checkpoint_that_is_kept_for_good(run, tmp_path):
  run(checkpoint_every=2, keep_checkpoints=1, keep_every=4)
  expected = saved(tmp_path)
  assert going_back.steps(str(tmp_path)) == [10, 8, 4]
  going_back.go_back(str(tmp_path), 4)
  assert saved(tmp_path)[0] == 4
  run(checkpoint_every=2, keep_checkpoints=1, keep_every=4)
  assert saved(tmp_path) == expected
