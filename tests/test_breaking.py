"""Runs that are broken on purpose, at random: `pytest -m slow -s tests/test_breaking.py` (about ten minutes).

30 kills and two double starts of a run, 60 damages to the checkpoints of another. Nothing may be lost, nothing may be
silently wrong, nobody may see a traceback. 3,000 random configs are in test_settings.py. Every test prints its seed.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest

from cover_jax import checkpoints
from data_pipelines.contract import UserError
from tests.test_processes import spawn

pytestmark = pytest.mark.slow

SEED = int(os.environ.get('BREAKING_SEED', '0'))
STEPS = 60
CHANGES = {'total_steps': STEPS, 'checkpoint_every': 3, 'log_every': 3, 'keep_checkpoints': 3, 'eval_every': 20}


def start(workdir, step_seconds=0.0):
  """The tiny run in a process of its own."""
  options = {'changes': CHANGES, 'step_seconds': step_seconds}
  return spawn('tests.process_worker', [f'--workdir={workdir}'], {'TINY_RUN': json.dumps(options)})


def steps_in(workdir):
  """The steps of `metrics.jsonl` that lie there, as training wrote them."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def holds(workdir, pid):
  """Whether a process has signed the lock of a workdir: until then another may be first."""
  lock = pathlib.Path(workdir) / '.lock'
  return lock.exists() and f'"pid": {pid},' in lock.read_text()


def whole_steps(workdir):
  return checkpoints.load(str(workdir))['about']['step'] if checkpoints.lie_in(str(workdir)) else 0


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """The workdir of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  worker = start(workdir)
  output = worker.communicate(timeout=300)[0]
  assert worker.returncode == 0, output
  return workdir


def test_thirty_kills_and_two_double_starts_end_as_if_nothing_had_been(uninterrupted, tmp_path):
  print(f'seed {SEED}')
  rng, workdir = random.Random(SEED), tmp_path / 'run'
  reached, doubles = 0, 0
  for attempt in range(30):
    worker = start(workdir, step_seconds=0.3)
    deadline = time.monotonic() + 120
    goal = reached + rng.choice((0, 0, 1, 2))  # of steps that are to be saved before the kill
    while time.monotonic() < deadline and whole_steps(workdir) < goal and worker.poll() is None:
      time.sleep(0.05)
    if attempt in (9, 19):
      while time.monotonic() < deadline and not holds(workdir, worker.pid):
        time.sleep(0.05)
      second = start(workdir)
      output = second.communicate(timeout=120)[0]
      assert second.returncode == 2 and 'is in use' in output and str(worker.pid) in output, output
      assert 'Traceback' not in output
      doubles += 1
    time.sleep(rng.uniform(0, 4))
    worker.send_signal(signal.SIGKILL)
    output = worker.communicate()[0]
    assert 'Traceback' not in output, (attempt, output)
    now = whole_steps(workdir)
    assert now >= reached, f'attempt {attempt}: {reached} steps were saved, {now} are left'
    reached = now
  print(f'{doubles} double starts were refused; 30 kills, {reached} of {STEPS} steps were saved by then')
  worker = start(workdir)
  output = worker.communicate(timeout=300)[0]
  assert worker.returncode == 0 and 'Traceback' not in output, output
  ours, theirs = (checkpoints.load(str(w)) for w in (workdir, uninterrupted))
  for kind in ('state', 'interval'):
    a, b = checkpoints.flatten(ours[kind]), checkpoints.flatten(theirs[kind])
    assert set(a) == set(b)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  assert steps_in(workdir) == steps_in(uninterrupted)


def damage(rng: random.Random, files: list[pathlib.Path]) -> str:
  """Breaks one file; says how."""
  file = rng.choice(files)
  data = bytearray(file.read_bytes())
  how = rng.choice(('flip a bit', 'cut', 'empty', 'lengthen', 'zero a block', 'lose', 'exchange'))
  if how == 'flip a bit' and data:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif how == 'cut':
    del data[rng.randrange(len(data) + 1) :]
  elif how == 'empty':
    data.clear()
  elif how == 'lengthen':
    data += rng.randbytes(rng.randrange(1, 100))
  elif how == 'zero a block' and data:
    at = rng.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
  elif how == 'exchange':
    data = bytearray(rng.choice(files).read_bytes())
  if how == 'lose':
    file.unlink()
  else:
    file.write_bytes(data)
  return f'{how}: {file.name}'


def test_sixty_damages_to_checkpoints_are_noticed(uninterrupted, tmp_path):
  """What is read is the state of a step that was saved, to the bit; or nothing is, and nothing is touched."""
  print(f'seed {SEED}')
  truth = {}
  for path in sorted((uninterrupted / 'checkpoints').glob('ckpt-*.flax')):
    loaded = checkpoints.load(str(path))
    truth[loaded['about']['step']] = checkpoints.flatten(loaded['state'])
  assert len(truth) == 3
  read = refused = 0
  for i in range(60):
    rng = random.Random(SEED * 1000 + i)
    workdir = tmp_path / str(i)
    shutil.copytree(uninterrupted, workdir)
    how = [
      damage(rng, sorted(p for p in (workdir / 'checkpoints').iterdir() if p.is_file()))
      for _ in range(rng.randint(1, 4))
    ]
    before = {p.name: p.read_bytes() for p in (workdir / 'checkpoints').iterdir()}
    try:
      loaded = checkpoints.load(str(workdir))
    except UserError as error:
      assert '\n' not in str(error)
      assert {p.name: p.read_bytes() for p in (workdir / 'checkpoints').iterdir()} == before, how
      refused += 1
      continue
    state = checkpoints.flatten(loaded['state'])
    for name, array in truth[loaded['about']['step']].items():
      np.testing.assert_array_equal(state[name], array, err_msg=f'{how}: {name}')
    read += 1
    shutil.rmtree(workdir)
  print(f'{read} went on from a whole checkpoint, {refused} were refused')
  assert read > 30


def test_a_run_with_damaged_checkpoints_ends_as_if_nothing_had_been_or_with_one_sentence(uninterrupted, tmp_path):
  """Through the command line: the damaged run trains on to the same end."""
  print(f'seed {SEED}')
  expected = checkpoints.flatten(checkpoints.load(str(uninterrupted))['state'])
  for i in range(6):
    rng, workdir = random.Random(SEED * 1000 + 100 + i), tmp_path / str(i)
    shutil.copytree(uninterrupted, workdir)
    newest = checkpoints.latest(str(workdir))
    how = damage(rng, [pathlib.Path(newest), workdir / 'checkpoints' / 'checkpoint', workdir / 'metrics.jsonl'])
    worker = start(workdir)
    output = worker.communicate(timeout=300)[0]
    assert 'Traceback' not in output, (how, output)
    assert worker.returncode == 0, (how, output)
    state = checkpoints.flatten(checkpoints.load(str(workdir))['state'])
    for name, array in expected.items():
      np.testing.assert_array_equal(state[name], array, err_msg=f'{how}: {name}')
