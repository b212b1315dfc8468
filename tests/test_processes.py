"""Several processes are one run: the same numbers, one log, one checkpoint, and an end that all share.

A start of two processes takes 10 s where the machine is free; `pytest -m slow tests/test_processes.py` has more.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cover_jax import checkpoints
from cover_jax.evaluation import classify as evaluation
from cover_jax.runtime import processes
from cover_jax.training import loop as training
from cover_jax.training import metrics
from data_pipelines.contract import UserError
from tests import tiny
from tests.test_main import ROOT

# SGD: Adam would hide a gradient of the wrong size, and makes a whole step of one that is nothing but rounding.
CHANGES = {
  'log_every': 1,
  'checkpoint_every': 4,
  'total_steps': 12,
  'mesh__data': 2,
  'optimizer__name': 'sgd',
  'optimizer__options': {'decay': 0.9},
  'optimizer__learning_rate': 0.03,
}
DEVICES = 2
PATIENCE = 1200  # seconds that anything may take: the machine may be crowded


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def spawn(module, flags, env):
  """Starts `python -m module flags` with these variables, its errors among its output."""
  return subprocess.Popen(
    [sys.executable, '-m', module, *flags],
    cwd=ROOT,
    env=os.environ | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start(workdir, count=2, step_seconds=0.0, **changes):
  """Starts `count` processes that share two devices a run, or have one each."""
  flags = f'--xla_force_host_platform_device_count={max(DEVICES // count, 1)} --xla_backend_optimization_level=0'
  options = {'changes': CHANGES | changes, 'step_seconds': step_seconds}
  env = {'XLA_FLAGS': flags, 'TINY_RUN': json.dumps(options)}
  address = f'127.0.0.1:{free_port()}'
  several = lambda i: [f'--coordinator={address}', f'--num_processes={count}', f'--process_id={i}']
  own = [f'--workdir={workdir}', '--heartbeat_seconds=30']
  return [spawn('tests.process_worker', [*own, *several(i)], env) for i in range(count)]


def finish(workers, timeout=PATIENCE):
  """[(exit code, output)] of each process."""
  try:
    outputs = [w.communicate(timeout=timeout)[0] for w in workers]
  finally:
    for worker in workers:
      worker.kill()
  return [(w.returncode, o) for w, o in zip(workers, outputs, strict=True)]


def run(workdir, count=2, **changes):
  ended = finish(start(workdir, count, **changes))
  assert [code for code, _ in ended] == [0] * count, '\n'.join(o for _, o in ended)
  return [output for _, output in ended]


def in_one_process(workdir, **changes):
  """The same run in this process on two devices; {source: confusion matrix}."""
  workdir.mkdir(exist_ok=True)
  config = tiny.config(**(CHANGES | changes))
  count = int(np.prod([n for n in config.mesh.values() if n > 0]))
  experiment, mesh, batches, tests = tiny.build(config, jax.devices()[:count])
  evaluate, results = evaluation.make_evaluate(experiment, tests, mesh), {}

  def evaluate_now(state):
    results.update(evaluate(state.params))
    return evaluation.scalars(results)

  training.train(experiment, batches, str(workdir), mesh, evaluate_now)
  return {name: r.confusion_KxK for name, r in results.items()}


def losses(workdir):
  rows = metrics.read_jsonl(str(workdir / 'metrics.jsonl'))
  return {row['step']: row['train/loss'] for row in rows if 'train/loss' in row}


def state_of(workdir):
  return checkpoints.flatten(checkpoints.load(str(workdir))['state'])


def bits(workdir):
  return {name: value.tobytes() for name, value in state_of(workdir).items()}


def assert_same_run(workdir, expected, rtol=1e-5):
  assert list(losses(workdir)) == list(losses(expected))
  np.testing.assert_allclose(list(losses(workdir).values()), list(losses(expected).values()), rtol=rtol)
  a, b = state_of(workdir), state_of(expected)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=2e-4, err_msg=name)


def assert_confusion(workdir, count, expected):
  for i in range(count):
    with np.load(workdir / f'confusion-{i}.npz') as found:
      assert {name: found[name].tolist() for name in found} == {n: m.tolist() for n, m in expected.items()}


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """A run in one process."""
  workdir = tmp_path_factory.mktemp('one')
  return workdir, in_one_process(workdir)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """The same run in two processes."""
  workdir = tmp_path_factory.mktemp('two')
  return workdir, run(workdir)


def test_two_processes_equal_one(one, two):
  workdir, outputs = two
  expected, confusion = one
  assert_same_run(workdir, expected)
  assert_confusion(workdir, 2, confusion)
  assert sum(m.sum() for m in confusion.values()) == sum(s.num_examples for s in tiny.sources())
  # Only the first one writes.
  assert 'Step 12: loss' in outputs[0] and 'Step 12: loss' not in outputs[1]
  assert outputs[1].count('\n') < 20, outputs[1]
  assert len(metrics.read_jsonl(str(workdir / 'metrics.jsonl'))) == 13
  assert len(list(workdir.glob('events.out.tfevents.*'))) == 1
  assert checkpoints.latest(str(workdir)).endswith('ckpt_12')


@pytest.mark.slow
def test_one_process_continues_two_and_two_continue_one(two, tmp_path):
  """12 steps in two processes, 3 in one of four devices, 9 in two whose `tensor` axis spans them."""
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  longer = {'total_steps': 24, 'checkpoint_every': 6, 'optimizer__schedule': 'constant'}
  in_one_process(whole, **longer, mesh__data=1)
  run(parts, **longer | {'total_steps': 12})
  assert checkpoints.latest(str(parts)).endswith('ckpt_12')
  in_one_process(parts, **longer | {'total_steps': 15}, mesh__fsdp=2)
  assert checkpoints.latest(str(parts)).endswith('ckpt-1.flax')
  run(parts, **longer, mesh__data=1, mesh__tensor=2)
  assert_same_run(parts, whole)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step(two, tmp_path):
  expected, _ = two
  workers = start(tmp_path, step_seconds=0.3)
  wait_for_step(tmp_path, 3, workers)
  workers[1].send_signal(signal.SIGTERM)
  ended = finish(workers)
  assert [code for code, _ in ended] == [75, 75], '\n'.join(o for _, o in ended)
  step = checkpoints.describe(str(tmp_path))['about']['step']
  assert 3 <= step < 12
  for _, output in ended:
    assert f'at step {step} of 12. Run the same command again' in output and 'Traceback' not in output
  run(tmp_path)
  assert bits(tmp_path) == bits(expected)
  assert (tmp_path / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()


@pytest.mark.slow
def test_ctrl_c_to_one_saves_in_all(tmp_path):
  workers = start(tmp_path, step_seconds=0.3)
  wait_for_step(tmp_path, 3, workers)
  workers[0].send_signal(signal.SIGINT)
  ended = finish(workers)
  assert [code for code, _ in ended] == [130, 75], '\n'.join(o for _, o in ended)
  step = checkpoints.describe(str(tmp_path))['about']['step']
  assert 3 <= step < 12
  assert f'Ctrl-C: saved {tmp_path}/checkpoints/ckpt_{step} at step {step} of 12. Run the same' in ended[0][1]


def one_process(workdir, step_seconds):
  """The tiny run in one process of its own; its saves are far apart."""
  options = {'changes': CHANGES | {'mesh__data': 1, 'checkpoint_every': 100}, 'step_seconds': step_seconds}
  env = {'XLA_FLAGS': '--xla_backend_optimization_level=0', 'TINY_RUN': json.dumps(options)}
  return spawn('tests.process_worker', [f'--workdir={workdir}'], env)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
  worker = one_process(tmp_path, step_seconds=0.5)
  wait_for_step(tmp_path, 2, [worker])
  worker.send_signal(signal.SIGINT)
  ((code, output),) = finish([worker])
  assert code == 130 and 'Traceback' not in output, output
  step = checkpoints.describe(str(tmp_path))['about']['step']
  assert 2 <= step < 12 and 'Ctrl-C again ends it at once' in output
  assert f'Ctrl-C: saved {tmp_path}/checkpoints/ckpt-1.flax at step {step} of 12. Run the same command again' in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
  """Also in a call that Python's own handlers would wait for: here a step that takes a minute."""
  worker = one_process(tmp_path, step_seconds=60)
  wait_until(lambda: any(tmp_path.glob('events.out*')), [worker])
  time.sleep(3)
  worker.send_signal(signal.SIGINT)
  time.sleep(1)
  began = time.monotonic()
  worker.send_signal(signal.SIGINT)
  ((code, output),) = finish([worker])
  assert code == 130 and time.monotonic() - began < 10, output
  assert checkpoints.latest(str(tmp_path)) is None


def wait_for_step(workdir, step, workers):
  """Returns when a step is in the log."""
  log = workdir / 'metrics.jsonl'
  wait_until(lambda: log.exists() and any(row['step'] >= step for row in metrics.read_jsonl(str(log))), workers)


def wait_until(done, workers):
  deadline = time.monotonic() + PATIENCE
  while not done():
    assert all(w.poll() is None for w in workers), [w.communicate()[0] for w in workers if w.poll() is not None]
    assert time.monotonic() < deadline
    time.sleep(0.02)


def kill(workdir, victim):
  """Kills one of two processes after step 6; (exit code, output, seconds until it ended) of the other."""
  workers = start(workdir, step_seconds=0.2)
  wait_for_step(workdir, 6, workers)
  workers[victim].kill()
  killed_at = time.monotonic()
  code, output = finish(workers)[1 - victim]
  return code, output, time.monotonic() - killed_at


def assert_ended_by_the_other(code, output, seconds):
  assert code in (75, -signal.SIGABRT), output  # JAX aborts where it notices before a collective does
  assert seconds < 120
  assert 'Another process of the run died' in output or 'another task died' in output


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path):
  assert_ended_by_the_other(*kill(tmp_path, victim=1))
  assert checkpoints.describe(str(tmp_path))['about']['step'] == 4


@pytest.mark.slow
def test_a_killed_coordinator_ends_the_other(two, tmp_path):
  assert_ended_by_the_other(*kill(tmp_path, victim=0))
  run(tmp_path)
  assert bits(tmp_path) == bits(two[0])


@pytest.mark.slow
def test_twenty_random_kills_of_two_processes_are_bit_equal(tmp_path):
  """`pytest -m slow -s tests/test_processes.py -k twenty`"""
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  longer = {'total_steps': 400, 'checkpoint_every': 10, 'log_every': 10, 'eval_every': 50}
  run(whole, **longer)
  chance, kills, last_step = random.Random(2), 0, 0
  while kills < 20:
    saved, workers = checkpoints.latest(str(parts)), start(parts, step_seconds=0.1, **longer)
    # Most while they train or save, the first save being done, else a slow machine gets nowhere; some while they start.
    if chance.random() < 0.8:
      wait_until(lambda: checkpoints.latest(str(parts)) != saved, workers)  # noqa: B023
    time.sleep(chance.uniform(0, 2))
    if any(w.poll() is not None for w in workers):
      break
    workers[chance.randrange(2)].kill()
    kills += 1
    finish(workers)
    if checkpoints.latest(str(parts)):
      step = checkpoints.describe(str(parts))['about']['step']
      assert step >= last_step  # nothing that was saved is lost
      last_step = step
  assert kills >= 15 and last_step >= 50
  run(parts, **longer)
  print(f'{kills} kills, the last at step {last_step} of 400')
  assert bits(parts) == bits(whole)
  assert (parts / 'metrics.jsonl').read_text() == (whole / 'metrics.jsonl').read_text()


@pytest.mark.slow
def test_four_processes_equal_one(one, tmp_path):
  workdir, confusion = one
  run(tmp_path, count=4, mesh__data=4)
  assert_same_run(tmp_path, workdir)
  assert_confusion(tmp_path, 4, confusion)


@pytest.mark.slow
def test_a_second_start_in_the_workdir_ends_in_all_its_processes(two, tmp_path):
  expected, _ = two
  first = start(tmp_path, step_seconds=0.3)
  wait_for_step(tmp_path, 2, first)
  for code, output in finish(start(tmp_path)):
    assert code == 2 and 'Traceback' not in output, output
    assert f' is in use: process {first[0].pid} on ' in output and 'tests.process_worker' in output
  assert [code for code, _ in finish(first)] == [0, 0]
  assert bits(tmp_path) == bits(expected)
  assert (tmp_path / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()


def test_a_mistake_in_one_process_ends_all(tmp_path):
  """All notice a mistake in the config; each says so and none waits for the others."""
  ended = finish(start(tmp_path, batch_size=3))
  for code, output in ended:
    assert code == 2 and 'Error: config.batch_size' in output, output


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'coordinator': 'host:1'}, 'Only some of the flags'),
    ({'coordinator': 'host:1', 'num_processes': 2, 'process_id': 2}, 'is not a process of a run'),
    ({'coordinator': 'host', 'num_processes': 2, 'process_id': 0}, 'is not a process of a run'),
  ],
)
def test_wrong_flags_are_one_sentence(flags, message):
  with pytest.raises(UserError, match=message):
    processes.start(**flags)


def test_one_process_needs_no_flags(monkeypatch):
  joined = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **_: joined.append(args))
  monkeypatch.setattr(processes, '_on_tpu_vm', lambda: False)
  processes.start()
  processes.start('localhost:1', 1, 0)
  assert joined == []
  monkeypatch.setenv('SLURM_NTASKS', '4')  # of an allocation, in which this is not yet a task
  processes.start()
  assert joined == []
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  processes.start()
  assert joined == [(None, None, None)]
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '4')
  monkeypatch.setenv('JAX_PROCESS_ID', '3')
  processes.start()
  assert joined[1:] == [('host:1', 4, 3)]
  monkeypatch.setenv('JAX_PROCESS_ID', 'three')
  with pytest.raises(UserError, match='JAX_PROCESS_ID'):
    processes.start()


def test_sigterm_is_noticed_in_one_process():
  before = signal.getsignal(signal.SIGTERM)
  try:
    stop = processes.watch_preemption()
    assert not stop() and not processes.interrupted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    signal.set_wakeup_fd(-1)  # as an event loop does that closes
    processes.leave_interrupts()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGTERM, before)
