"""Processes that were told different things say so, all of them, and end before anything is computed."""

import dataclasses
import json

import pytest

from configs import digits_cover
from cover_jax.runtime import agreement, processes
from data_pipelines.contract import UserError
from tests import tiny
from tests.test_processes import finish, free_port, spawn


@pytest.fixture
def others(monkeypatch):
  """others(change, ...): from here on further processes tell what this one does, but for these changes."""

  def set_others(*changes):
    def gather(text):
      return [text, *(json.dumps(change(json.loads(text))) for change in changes)]

    monkeypatch.setattr(processes, 'gather_texts', gather)

  return set_others


def facts(**changes):
  config = digits_cover.get_config('debug')
  config.update(changes)
  return agreement.of_command('train', None, config.to_dict())


def test_what_is_the_same_is_not_told(others):
  others(lambda told: told, lambda told: told)
  agreement.check('The command', facts())


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('--mode', 'evaluate', '--mode is train in process 0, 2 and evaluate in process 1'),
    ('config.batch_size', '7', 'config.batch_size is 32 in process 0, 2 and 7 in process 1'),
    ('config.optimizer.learning_rate', '0.5', 'config.optimizer.learning_rate is'),
    ('the version of jax', '0.1', 'the version of jax is'),
    ('the code of cover_jax (SHA-256)', 'abc', 'the code of cover_jax (SHA-256) is'),
  ],
)
def test_what_differs_is_named(others, key, value, words):
  others(lambda told: {**told, key: value}, lambda told: told)
  assert key in facts()
  with pytest.raises(UserError, match=r'^The command is not the same in the processes of this run') as error:
    agreement.check('The command', facts())
  assert words in str(error.value) and str(error.value).count(' in process ') == 2


def test_a_key_that_one_lacks_and_many_differences(others):
  others(lambda told: {key: value for key, value in told.items() if key != '--mode'})
  with pytest.raises(UserError, match='--mode is train in process 0 and missing in process 1'):
    agreement.check('The command', facts())
  others(lambda told: dict.fromkeys(told, 'x'))
  with pytest.raises(UserError, match=r', and [0-9]+ more\. Start every process'):
    agreement.check('The command', facts())


def test_every_entry_of_the_config_is_a_fact():
  told = facts()
  flat = digits_cover.get_config('debug').to_dict()
  assert told['config.sources.motions.dataset'] == repr(flat['sources']['motions']['dataset'])
  leaves = lambda tree: sum(leaves(v) if isinstance(v, dict) and v else 1 for v in tree.values())
  assert sum(key.startswith('config.') for key in told) == leaves(flat) > 100
  assert facts(batch_size=3) != told and facts() == told


def test_the_code_is_a_fact(tmp_path):
  (tmp_path / 'inner').mkdir()
  file = tmp_path / 'inner' / 'a.py'
  file.write_text('x = 1\n')
  before = agreement._code([str(tmp_path)])
  (tmp_path / 'notes.txt').write_text('not code')
  assert agreement._code([str(tmp_path)]) == before
  file.write_text('x = 2\n')
  changed = agreement._code([str(tmp_path)])
  file.rename(tmp_path / 'inner' / 'b.py')
  assert len({before, changed, agreement._code([str(tmp_path)])}) == 3


def test_data_are_told_by_their_content():
  first, second = tiny.sources()[:2]
  told = agreement.of_data([first, second])
  assert len(told) == 2 and told == agreement.of_data(tiny.sources()[:2])
  label = first.label.copy()
  label[0] = (label[0] + 1) % 2
  changed = agreement.of_data([dataclasses.replace(first, label=label), second])
  assert [key for key in told if told[key] != changed[key]] == [f'source {first.name!r}']


@pytest.mark.parametrize('index', [0, 1])
def test_a_mistake_in_one_process_is_told_in_all(monkeypatch, index):
  """Process 0 first; the other, which is never told of its mistake by this stand-in, before or after it."""
  log = []
  monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes.jax, 'process_index', lambda: index)
  replies = [lambda text: [text, ''], lambda text: ['', text]]
  monkeypatch.setattr(processes, 'gather_texts', lambda text: (log.append('gather'), replies[index](text))[1])
  assert processes.together(lambda: log.append('do') or 5) == 5
  assert log == (['do', 'gather', 'gather'] if index == 0 else ['gather', 'do', 'gather'])

  def wrong():
    raise UserError('it is not there')

  with pytest.raises(UserError, match=f'^In process {index} of 2: it is not there'):
    processes.together(wrong)


def told_to(workdirs, flags, patience=4):
  """Exit codes and outputs of two processes with workdirs and further flags of their own."""
  address = f'127.0.0.1:{free_port()}'
  env = {
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'TINY_RUN': json.dumps({'changes': {'mesh__data': 2, 'total_steps': 2}, 'patience': patience}),
  }
  several = lambda i: [f'--coordinator={address}', '--num_processes=2', f'--process_id={i}', '--heartbeat_seconds=30']
  both = zip(workdirs, flags, strict=True)
  return finish(
    [spawn('tests.process_worker', [f'--workdir={w}', *f, *several(i)], env) for i, (w, f) in enumerate(both)]
  )


def test_two_processes_of_two_commands_end_with_one_sentence(tmp_path):
  ended = told_to([tmp_path] * 2, [[], ['--config.batch_size=8']])
  for code, output in ended:
    assert code == 2 and 'Traceback' not in output, output
    assert 'Error: The command is not the same' in output and 'config.batch_size is 32 in process 0 and 8' in output
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_workdirs_are_told(tmp_path):
  for code, output in told_to([tmp_path / 'a', tmp_path / 'b'], [[], []]):
    assert code == 2 and 'Traceback' not in output, output
    assert 'is not one folder: what process 0 wrote there was not found by process 1 (' in output
  assert not list((tmp_path / 'a').iterdir())


@pytest.mark.slow
def test_two_names_of_one_workdir_are_one(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').symlink_to(tmp_path / 'a')
  assert [code for code, _ in told_to([tmp_path / 'a', tmp_path / 'b'], [[], []])] == [0, 0]
  assert not (tmp_path / 'a' / '.process-0').exists()
