"""docs/options.md lists every option that a config can set, as the code declares it."""

import pathlib

import pytest

from cover_jax import objectives, options
from cover_jax.augment import photometric
from cover_jax.experiment import optim, settings
from cover_jax.models import encoder, heads
from data_pipelines.clips.settings import SOURCE
from data_pipelines.declared import Key, options_of

PAGE = pathlib.Path(__file__).parent.parent / 'docs/options.md'


def rows(title):
  """{option: line} below a heading of the page."""
  _, found, rest = PAGE.read_text().partition(f'\n{title}\n')
  assert found, title
  lines = rest.split('\n#')[0].splitlines()
  return {line.split('`')[1]: line for line in lines if line.startswith('| `')}


def test_the_page_is_what_the_code_declares():
  again = 'python -m cover_jax.options --output=docs/options.md'
  assert PAGE.read_text() == options.markdown(), f'an option has changed: run `{again}`'


@pytest.mark.parametrize('name', objectives.names())
def test_every_option_of_an_objective_is_there(name):
  assert set(rows(f'### Objectives: {name}')) == set(options_of(objectives.maker(name)))


def test_every_other_option_is_there():
  flat = lambda keys, before='': {
    p for k, v in keys.items() for p in ([before + k] if isinstance(v, Key) else flat(v, f'{before}{k}.'))
  }
  assert set(rows('## Run')) == flat(settings.RUN)
  assert set(rows('## Streams')) == flat(settings.STREAM) and set(rows('## Sources')) == flat(SOURCE)
  for name in encoder.ENCODERS:
    assert set(rows(f'### Encoders: {name}')) == set(options_of(encoder.encoder_class({'name': name})))
  for name in heads.KINDS:
    assert set(rows(f'### Heads: {name}')) == set(options_of(heads.KINDS[name]))
  for name, scaler in optim.SCALERS.items():
    assert set(rows(f'### Optimizers: {name}')) == set(scaler.options)
  for name, keys in photometric.OPTIONS.items():
    assert set(rows(f'### Augmentation: {name}')) == ({name} if isinstance(keys, Key) else set(keys))


def test_a_line_has_default_kind_and_meaning():
  line = rows('### Objectives: classification')['label_smoothing']
  assert line == '| `label_smoothing` | `0.0` | a number of at least 0 and below 1 | in [0, 1). |'
  assert rows('## Sources')['dataset'] == '| `dataset` | must be given | text that is not empty |'
  assert '`optimizer.name`' in rows('## Run')['optimizer.name']


def test_meanings_come_from_docstrings():
  def function(a, b, c, rest):
    """Does.

    Args:
      a: the first,
        on two lines: with a colon.
      b, c: two at once.

    Returns:
      rest: nothing.
    """

  assert options.meanings(function) == {
    'a': 'the first, on two lines: with a colon.', 'b': 'two at once.', 'c': 'two at once.'
  }  # fmt: skip
  assert options.meanings(None) == {} and options.meanings(lambda: 0) == {}


def test_the_command_prints_and_writes(tmp_path, capsys):
  assert options.main([]) == 0 and capsys.readouterr().out == options.markdown()
  assert options.main([f'--output={tmp_path}/x.md']) == 0 and (tmp_path / 'x.md').read_text() == options.markdown()
  assert options.main([f'--output={tmp_path}/none/x.md']) == 2
