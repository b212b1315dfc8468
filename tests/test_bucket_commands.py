"""Every command with a bucket for its paths, real kills in the middle of uploads, and two processes.

`pytest -m slow -s tests/test_bucket_commands.py`: minutes, so all of it is slow; `test_bucket.py` is the quick part.
"""

import io
import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import cover_jax
from cover_jax import checkpoints
from cover_jax.training import metrics
from data_pipelines import paths
from data_pipelines.sources import open_tfds
from tests import test_processes as several
from tests.test_main import ROOT, finish, start

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get('COUNT', '20'))


def command(module, *arguments):
  """Runs `python -m module ...` and gives its output."""
  line = [sys.executable, '-m', module, *arguments]
  done = subprocess.run(
    line, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True, text=True, timeout=1200
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def bits(workdir):
  return {name: value.tobytes() for name, value in checkpoints.flatten(checkpoints.load(workdir)['state']).items()}


def test_every_command(bucket, bucket_server, embedded_data, tmp_path):
  # The data set of one source lies in the bucket, with its index; those of the others on the disk.
  local = open_tfds.open_source('moments', {'dataset': 'moving_digits/moments', 'train': 'train'}, 'train')
  folder = os.path.dirname(local.frames.files[0])
  where = '/'.join(folder.split(os.sep)[-3:])
  paths.upload(folder, f'{bucket}/tfds/{where}')
  data = f'--config.sources.moments.data_dir={bucket}/tfds'
  run = f'{bucket}/run'
  code, output = finish(start(run, data))
  assert code == 0, output
  assert f'{run}/predictions.png' in output and 'Indexing the frames' not in output
  assert finish(start(tmp_path / 'disk'))[0] == 0
  assert bits(run) == bits(str(tmp_path / 'disk'))
  rows = metrics.read_jsonl(f'{run}/metrics.jsonl')
  assert rows == metrics.read_jsonl(str(tmp_path / 'disk' / 'metrics.jsonl')) and rows

  reported = bucket_server.data('folder/run/evaluation/report.json')
  assert reported == (tmp_path / 'disk/evaluation/report.json').read_bytes()
  code, output = finish(start(run, data, '--mode=evaluate'))
  assert code == 0 and bucket_server.data('folder/run/evaluation/report.json') == reported, output
  for _ in range(2):
    code, output = finish(start(run, data, '--mode=frozen'))
    assert code == 0 and f'{run}/frozen/neighbours.png' in output, output
  assert 'read from gs://' in output  # the features of the first time
  assert 'Page: gs://' in command('cover_jax.report', run)
  page = bucket_server.data('folder/run/evaluation/index.html')
  assert b'moments' in page and len([n for n in bucket_server.names('folder/run/evaluation/clips') if 'webp' in n]) > 3

  command('cover_jax.export', run, f'--output={bucket}/model.flax')
  picture = io.BytesIO()
  Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(picture, 'PNG')
  bucket_server.put('folder/one.png', picture.getvalue())
  wanted = ('--annotate', '--features', '--attention', f'--output={bucket}/predicted')
  said = command('cover_jax.predict', f'{bucket}/model.flax', f'{bucket}/one.png', *wanted)
  assert f'{bucket}/one.png' in said and '1 file, 0 failed' in said
  written = ['features.npz', 'one.png.annotated.png', 'one.png.attention.png', 'predictions.json']
  assert bucket_server.names('folder/predicted') == [f'folder/predicted/{name}' for name in written]
  model, same = cover_jax.load(f'{bucket}/model.flax'), cover_jax.load(str(tmp_path / 'disk'))
  jax.tree.map(np.testing.assert_array_equal, model.params, same.params)
  (predicted,) = json.loads(bucket_server.data('folder/predicted/predictions.json'))['files']
  for name, ranking in model.predict(f'{bucket}/one.png').items():
    assert [word for word, _ in ranking] == [word for word, _ in predicted['top'][name]]

  code, output = finish(start(f'{bucket}/next', f'--config.init_from.path={run}'))
  assert code == 0 and 'Continuing' not in output, output
  code, output = finish(start(f'{bucket}/again', config=f'{run}/config.json'))
  assert code == 0 and bits(f'{bucket}/again') == bits(run), output
  assert not os.path.exists(ROOT / 'gs:')


def test_random_kills_in_the_middle_of_uploads_are_bit_equal(bucket, bucket_server, tmp_path):
  """`COUNT=20 pytest -m slow -s tests/test_bucket_commands.py -k kills`"""
  changes = {'checkpoint_every': 1, 'keep_every': 4, 'total_steps': 40}
  several.run(tmp_path / 'disk', 1, **changes)
  chance = random.Random(0)
  kills, stopped = 0, []
  while kills < KILLS:
    (process,) = several.start(bucket, 1, **changes)
    left = chance.randint(1, 120)

    def kill(name, process=process):
      nonlocal left
      left -= 1
      if left == 0:
        process.kill()
      if left <= 0:
        raise ConnectionAbortedError  # nothing that it sends any more is written

    bucket_server.before_write = kill
    output = process.communicate(timeout=several.PATIENCE)[0]
    if process.returncode == 0:
      break
    assert process.returncode == -9, output
    kills += 1
    found = checkpoints.latest(bucket)
    stopped.append(checkpoints.load(bucket)['about']['step'] if found else 0)
  bucket_server.before_write = lambda name: None
  print(f'{kills} kills; newest whole checkpoint after each: {stopped}')
  assert stopped == sorted(stopped) and kills >= min(KILLS, 3)
  several.run(bucket, 1, **changes)
  assert bits(bucket) == bits(str(tmp_path / 'disk'))
  assert bucket_server.data('folder/metrics.jsonl') == (tmp_path / 'disk/metrics.jsonl').read_bytes()


def test_two_processes_equal_one(bucket, bucket_server, tmp_path):
  expected = several.in_one_process(tmp_path / 'one')
  several.run(bucket)
  a, b = (checkpoints.flatten(checkpoints.load(w)['state']) for w in (bucket, str(tmp_path / 'one')))
  for name in b:
    np.testing.assert_allclose(a[name], b[name], atol=2e-4, err_msg=name)
  for i in range(2):
    with paths.local(f'{bucket}/confusion-{i}.npz') as file, np.load(file) as found:
      assert {name: found[name].tolist() for name in found} == {n: m.tolist() for n, m in expected.items()}
  assert 'folder/.lock' not in bucket_server.names() and 'folder/.process-0' not in bucket_server.names()
  several.run(bucket, 1, total_steps=14)  # one process goes on from two
  assert checkpoints.describe(bucket)['about']['step'] == 14
