"""`metrics.jsonl` whatever lies in it: readable rows stay, the rest is moved aside and named."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from cover_jax.evaluation import visualise
from cover_jax.training import metrics

GOOD = [b'{"step": 4, "train/loss": 1.5}', b'{"step": 8, "train/loss": 1.25}', b'{"step": 8, "test/acts/top1": 0.5}']
BAD = {
  'garbage': b'\x00\x01garbage',
  'zeros': b'\x00' * 600,
  'not UTF-8': b'{"step": 4, "a": "\xff\xfe"}',
  'half': b'{"step": 12, "train/lo',
  'no object': b'[1, 2]',
  'a number': b'7',
  'null': b'null',
  'no step': b'{"train/loss": 1.0}',
  'step of text': b'{"step": "4"}',
  'step of truth': b'{"step": true}',
  'negative step': b'{"step": -4}',
  'fraction': b'{"step": 4.5}',
  'huge step': b'{"step": ' + b'9' * 400 + b'}',
  'more digits than Python reads': b'{"step": ' + b'9' * 5000 + b'}',
  'deep': b'[' * 100_000,
}


def cut(path, step, tests_again=False):
  metrics.Writer(str(path.parent), first_step=step, tests_again=tests_again).close()


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('place', [0, 2, 3])
def test_a_damaged_line_costs_no_other(tmp_path, caplog, kind, place):
  path = tmp_path / metrics.FILE
  lines = [*GOOD[:place], BAD[kind], *GOOD[place:]]
  path.write_bytes(b'\n'.join(lines) + b'\n')
  before = path.read_bytes()
  assert metrics.read_jsonl(str(path)) == [json.loads(line) for line in GOOD]
  assert f'1 of 4 lines cannot be read and are left out: line {place + 1}.' in caplog.text
  assert path.read_bytes() == before  # reading changes nothing
  caplog.clear()
  cut(path, 8)
  assert path.read_bytes() == b'\n'.join(GOOD) + b'\n'
  assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == BAD[kind] + b'\n'
  assert f'moved to {path}.damaged: line {place + 1}.' in caplog.text
  cut(path, 4)  # a second time adds nothing
  assert path.read_bytes() == GOOD[0] + b'\n'
  assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == BAD[kind] + b'\n'


def shown(workdir):
  """{tag: [(step, value)]} as TensorBoard shows it."""
  from tensorboard.backend.event_processing import plugin_event_accumulator
  from tensorboard.util import tensor_util

  events = plugin_event_accumulator.EventAccumulator(str(workdir)).Reload()
  points = lambda tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
  return {tag: points(tag) for tag in events.Tags()['tensors']}


def killed(workdir, first, tests_again, rows, saved_at):
  """A writer that wrote rows, was flushed before the save at a row, and was never closed."""
  writer = metrics.Writer(str(workdir), first_step=first, tests_again=tests_again)
  for i, (step, scalars) in enumerate(rows):
    writer.write(step, scalars)
    if i == saved_at:
      writer.flush()
  return writer


@pytest.mark.parametrize('tests_again', [False, True])
@pytest.mark.parametrize('lost', [False, True])
def test_tensorboard_has_no_point_twice_and_none_is_lost(tmp_path, tests_again, lost):
  """Killed at step 12 behind the save of step 8, whose tests are done again or were not due."""
  train = lambda step: (step, {'train/loss': 16.0 - step})
  tests = [(8, {'test/a/top1': 0.5, 'test/a/loss': 1.0})] if tests_again else []
  rows = [train(4), train(8), *tests, train(12)]
  first = killed(tmp_path, 0, False, rows, saved_at=1 if lost else len(rows) - 1)
  if lost:  # what had not been flushed never came to the file
    (file,) = tmp_path.glob('events.out*')
    before = file.read_bytes()
    first.close()
    file.write_bytes(before)
  time.sleep(1.1)  # TensorBoard reads files in the order of the seconds in their names
  metrics_writer = metrics.Writer(str(tmp_path), first_step=8, tests_again=tests_again)
  for row in (*tests, train(12), train(16)):
    metrics_writer.write(*row)
  metrics_writer.close()
  written = metrics.read_jsonl(str(tmp_path / metrics.FILE))
  found = shown(tmp_path)
  assert found['train/loss'] == [(r['step'], r['train/loss']) for r in written if 'train/loss' in r]
  assert [step for step, _ in found['train/loss']] == [4, 8, 12, 16]
  assert found.get('test/a/top1', []) == [(8, 0.5)] * tests_again


def test_tensorboard_has_no_point_twice_of_a_run_that_saved_nothing(tmp_path):
  killed(tmp_path, 0, False, [(1, {'train/loss': 1.0}), (2, {'train/loss': 2.0})], saved_at=1)
  time.sleep(1.1)
  killed(tmp_path, 0, False, [(1, {'train/loss': 1.0})], saved_at=0)
  assert shown(tmp_path) == {'train/loss': [(1, 1.0)]}


def test_damage_of_several_times_is_kept(tmp_path):
  path = tmp_path / metrics.FILE
  for line in (b'one', b'two'):
    path.write_bytes(GOOD[0] + b'\n' + line)
    cut(path, 4)
  assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == b'one\ntwo\n'


def test_a_line_cut_by_a_kill_is_said(tmp_path, caplog):
  path = tmp_path / metrics.FILE
  path.write_bytes(b'\n'.join([*GOOD, BAD['half']]))
  cut(path, 4)
  assert path.read_bytes() == GOOD[0] + b'\n'
  assert 'line 4' in caplog.text and 'cuts the last line off' in caplog.text


def test_a_whole_last_line_without_its_end_is_a_row(tmp_path):
  path = tmp_path / metrics.FILE
  path.write_bytes(b'\n'.join(GOOD[:2]))
  assert [row['step'] for row in metrics.read_jsonl(str(path))] == [4, 8]
  cut(path, 8)
  assert path.read_bytes() == b'\n'.join(GOOD[:2]) + b'\n'  # and what is added begins on a line of its own


def test_what_needs_no_change_is_not_written(tmp_path, monkeypatch):
  path = tmp_path / metrics.FILE
  path.write_bytes(b'\n' + GOOD[0] + b'\n\n' + b'{"step":8}' + b'\r\n \n')
  before = path.read_bytes(), path.stat().st_ino
  monkeypatch.setattr(metrics.durable, 'write', lambda *_: 1 / 0)
  cut(path, 8)
  assert (path.read_bytes(), path.stat().st_ino) == before


def test_rows_past_the_restored_step_go(tmp_path):
  path = tmp_path / metrics.FILE
  for tests_again, kept in ((False, 3), (True, 2)):
    path.write_bytes(b'\n'.join([*GOOD, b'{"step": 12}']) + b'\n')
    cut(path, 8, tests_again)
    assert path.read_bytes() == b'\n'.join(GOOD[:kept]) + b'\n'


def test_steps_that_go_back_are_said_and_kept(tmp_path, caplog):
  path = tmp_path / metrics.FILE
  path.write_bytes(b'\n'.join([GOOD[1], GOOD[0], GOOD[0]]) + b'\n')
  cut(path, 8)
  assert len(metrics.read_jsonl(str(path))) == 3
  assert 'steps go back at line 2' in caplog.text


def test_curves_of_strange_rows(tmp_path):
  values = ['nan', 'inf', float('nan'), float('inf'), 10**400, None, True, [1], {'a': 1}, 0.5]
  keys = (
    'train/video/acts/loss',
    'train/video/acts/top1',
    'test/acts/top1',
    'test/x',
    'test',
    'learning_rate',
    '',
    '/',
  )
  rows = [{'step': i % 4} | dict.fromkeys(keys, value) for i, value in enumerate(values)]
  visualise.training_curves(rows, str(tmp_path / 'a.png'))
  visualise.training_curves([], str(tmp_path / 'b.png'))
  assert all((tmp_path / name).read_bytes()[:4] == b'\x89PNG' for name in ('a.png', 'b.png'))


def test_the_line_of_the_log_names_every_loss():
  scalars = {
    'train/video/acts/loss': 1.5, 'train/video/acts/top1': 0.25, 'train/video/mine/loss': 2.0,
    'train/video/mine/classification_top1': 0.5, 'train/video/mine/classification_loss': 3.0,
    'train/free/wild/loss': 4.0, 'train/loss': 9.0, 'test/acts/loss': 1.0, 'test/acts/top1': 0.125,
    'learning_rate': 1.0,
  }  # fmt: skip
  assert metrics.summary(scalars) == (
    'loss 9.0000 | acts 1.500 (25.0%) | mine 2.000 (50.0%) | wild 4.000 | test acts 1.000 (12.5%)'
  )


def test_tensorboard_shows_the_config_and_pictures(tmp_path):
  from tensorboard.backend.event_processing import plugin_event_accumulator
  from tensorboard.plugins.hparams import plugin_data_pb2
  from tensorboard.util import tensor_util

  picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / 'a.png')
  config = {'seed': 3, 'optimizer': {'learning_rate': 0.5, 'rules': (('a', 0.0),)}, 'init_from': {}}
  with metrics.Writer(str(tmp_path), first_step=2, tests_again=False) as writer:
    writer.describe(config)
  metrics.write_pictures(str(tmp_path), 5, {'confusion/acts': str(tmp_path / 'a.png')}, config)
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
  (text,) = events.Tensors('config')
  assert text.step == 2 and json.loads(tensor_util.make_ndarray(text.tensor_proto).item().strip(b'`\n'))['seed'] == 3
  (image,) = events.Tensors('confusion/acts')
  width, height, png = tensor_util.make_ndarray(image.tensor_proto)
  assert (image.step, int(width), int(height)) == (5, 30, 20)
  np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), picture)
  (start,) = events.PluginTagToContent('hparams').values()
  said = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
  assert said['optimizer.learning_rate'].number_value == 0.5 and said['seed'].number_value == 3
  assert said['optimizer.rules'].string_value == "(('a', 0.0),)"
