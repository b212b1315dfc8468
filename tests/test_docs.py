"""README and docs do what they say: every code block is run, or its commands are parsed and the reason stands below.

Python blocks are executed. Commands are executed by `:debug` in a folder of their own (those of long pages only with
`pytest -m slow`); what cannot run here is parsed: the config loads, every flag exists. A new block that is neither
makes a test red.
"""

import ast
import importlib
import itertools
import pathlib
import re
import shlex
import shutil
from typing import NamedTuple

import ml_collections
import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core import constants as tfds_constants

from configs import cotrain_folders, defaults, digits_cover, timesformer_k400
from cover_jax import command_line
from cover_jax.experiment import build, settings
from cover_jax.models import encoder as encoders
from data_pipelines import declared, flags
from data_pipelines.clips.settings import SOURCE
from data_pipelines.contract import SourceInfo
from tests import miniature
from tests.test_video_files import write

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]}
CONFIGS = {p.stem: p.read_text() for p in sorted(ROOT.glob('configs/*.py')) if p.stem not in ('__init__', 'defaults')}

# Commands that do not run here, by how they begin, and why. Their flags are looked at where that can be done.
NOT_RUN = {
  'make': 'installs an environment; tests/test_main.py runs what it starts',
  'pip install': 'installs',
  'python3.12 -m venv': 'installs',
  '.venv/bin/pip': 'installs',
  '.venv/bin/python -c': 'runs in what was installed before',
  'xprof': 'a viewer, which is another package',
  'tensorboard': 'a viewer',
  'gcloud': 'needs a cloud; tests/test_launch.py has a stand-in',
  'launch/tpu_vm.sh': 'needs a cloud; tests/test_launch.py runs it with a stand-in',
  'export': 'sets a variable for what follows',
  'echo': 'shows the exit code of the line before',
  'ls': 'shows what the line before wrote',
}
# Modules whose commands are parsed and not run, and why.
PARSED = {
  'cover_jax.plan': 'minutes of the TPU compiler; tests/test_plan.py',
  'benchmarks.block_cost': 'minutes of the TPU compiler; tests/test_block_cost.py',
  'benchmarks.train_step': 'minutes, and PyTorch',
  'benchmarks.claims': 'hours; tests/test_claims.py',
  'benchmarks.vtdl': 'hours; tests/test_benchmark_vtdl.py',
  'benchmarks.ssl': 'hours',
  'benchmarks.objective_cost': 'minutes',
  'benchmarks.input': 'an hour; tests/test_benchmark_input.py',
  'benchmarks.first_stage': 'an hour',
  'benchmarks.stored_bits': 'minutes; tests/test_stored_bits.py',
  'benchmarks.media_matrix': 'another decoder, which is a package of its own; tests/test_media_matrix.py',
}
# What stands for something of the reader's, and what stands for it here.
PLACEHOLDERS = {
  'CONFIG': 'configs/digits_cover.py',
  '--config=...': '--config=configs/digits_cover.py',
  '--workdir=...': '--workdir=/tmp/run',
  'DIR': 'dir',
  'WEIGHTS': '/tmp/run',
  '--config.init_from.path=FILE': '--config.init_from.path=/tmp/run',
  'FILE': 'clip.mp4',
  'CHECKPOINT': '/tmp/run',
  'WORKDIR': '/tmp/run',
  'RUN': '/tmp/run',
  'RUN2': '/tmp/run2',
  'FOLDER': 'motions_hf',
  'NAME': 'motions',
  'FRAMES': '8',
  'videos/test/a_class/a_video.mp4': 'videos/test/cat/3.mp4',
}


class Block(NamedTuple):
  page: str
  line: int
  language: str
  text: str


def blocks(page: str) -> list[Block]:
  """The fenced blocks of a page."""
  found, lines = [], enumerate(PAGES[page].splitlines(), 1)
  for number, line in lines:
    if line.startswith('```'):
      inside = [text for _, text in itertools.takewhile(lambda numbered: numbered[1] != '```', lines)]
      found.append(Block(page, number, line[3:], '\n'.join(inside)))
  return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of_language(*languages: str) -> list:
  return [pytest.param(b, id=f'{b.page}:{b.line}') for b in BLOCKS if b.language in languages]


def commands(block: Block) -> list[list[str]]:
  """The commands of a block of shell, as lists of words."""
  text = block.text
  if block.language == 'console':  # commands with their output
    text = '\n'.join(line[2:] for line in text.splitlines() if line.startswith('$ '))
  found, pending = [], ''
  for line in re.sub(r'\\\n\s*', ' ', text).splitlines():
    pending = f'{pending}\n{line}' if pending else line
    try:
      words = shlex.split(pending, comments=True)
    except ValueError:  # a quote that ends on a later line
      continue
    if line.startswith(' ') and found and not words[0].startswith(('python', 'pip')):
      found[-1] += words  # a synopsis goes on, indented
    elif words:
      found.append(words)
    pending = ''
  assert not pending, pending
  return found


def plain(words: list[str]) -> list[str]:
  """A command without what a synopsis adds: [--optional], a|b, FILE...; with placeholders filled in."""
  found = []
  for word in words:
    word = PLACEHOLDERS.get(word, word)
    if "'" not in word and '"' not in word and '{' not in word:
      word = re.sub(r'\|\w+', '', word.replace('[', '').replace(']', ''))
    word = word.removesuffix('...')
    key, equals, value = word.rpartition('=')
    word = f'{key}={PLACEHOLDERS.get(value, value)}' if equals else PLACEHOLDERS.get(word, word)
    if word:
      found.append(word)
  return found


def not_run(words: list[str]) -> str | None:
  line = ' '.join(words)
  return next((start for start in NOT_RUN if line == start or line.startswith(f'{start} ')), None)


# Parsing.


class Parsed(Exception):
  pass


def at_root(arguments: list[str]) -> list[str]:
  """The arguments with configs where they lie, whatever folder a test is in."""
  return [re.sub(r'^--config=configs/', f'--config={ROOT}/configs/', a) for a in arguments]


def read_config(arguments: list[str]) -> ml_collections.ConfigDict:
  """The config that a command names, with its --config.key=value."""
  to = flags.parser('of a test', '')
  command_line.add_config(to)
  return command_line.parse(to, at_root([a for a in arguments if a.startswith('--config')])).config


def parse(module: str, arguments: list[str]) -> None:
  """Raises UserError if a module does not take these arguments; runs nothing of it."""
  parser = importlib.import_module(module).parser()
  takes_config = '--config' in parser.format_help()
  (command_line if takes_config else flags).parse(parser, at_root(arguments))


def test_every_block_says_what_it_is():
  for block in BLOCKS:
    assert block.language in ('python', 'bash', 'console', 'text', 'bibtex'), block
  for page, text in PAGES.items():
    outside = re.sub(r'(?ms)^```.*?^```', '', text)
    assert not re.search(r'\n\n    \S', outside), f'{page} has an indented block: fence it and say what it is'


@pytest.mark.parametrize('block', of_language('bash', 'console'))
def test_every_command_of_a_block_can_be_given(block):
  for words in commands(block):
    words = plain(words)
    if start := not_run(words):
      assert NOT_RUN[start]
      if start == 'make':
        assert f'\n{words[1]}:' in (ROOT / 'Makefile').read_text()
      if start == 'launch/tpu_vm.sh':
        script = (ROOT / words[0]).read_text()
        assert all(word.partition('=')[0] in script for word in words[1:] if word.startswith('--') and word != '--')
      continue
    assert words[:2] == ['python', '-m'], f'{block.page}, line {block.line}: nobody runs {words}'
    parse(words[2], words[3:])


def inline_commands() -> list:
  found = {}
  for page, text in PAGES.items():
    for number, line in enumerate(text.splitlines(), 1):
      for command in re.findall(r'`(python -m [a-z_.]+(?: [^`]*)?)`', line):
        found[f'{page}:{number}: {command[:60]}'] = command
  for name, text in CONFIGS.items():
    docstring = re.sub(r'\\\\?\n\s*', ' ', ast.get_docstring(ast.parse(text), clean=False) or '')
    for i, command in enumerate(re.findall(r'(?m)^ {4}(python -m .*)$', docstring)):
      found[f'configs/{name}.py:{i}'] = command
  return [pytest.param(command, id=where) for where, command in found.items()]


@pytest.mark.parametrize('command', inline_commands())
def test_commands_in_sentences_and_in_configs_can_be_given(command):
  words = plain(shlex.split(command))
  if len(words) == 3 or command.endswith((' --help', ' ...')):
    importlib.import_module(words[2])  # and nothing that could be parsed
  else:
    parse(words[2], words[3:])


# Executing.


def start_in(folder: pathlib.Path) -> None:
  """What a reader has at the start: a video, a picture, videos and photos of two classes."""
  write(folder / 'clip.mp4', 12)
  Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(folder / 'photo.jpg')
  each = itertools.product(('train', 'test'), ('cat', 'dog'), range(4))
  for seed, (split, name, count) in enumerate(each):  # no two alike, or a test split would leak
    (folder / 'videos' / split / name).mkdir(parents=True, exist_ok=True)
    shade = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), np.uint8)
    write(folder / 'videos' / split / name / f'{count}.mp4', 9 + count, picture=shade)
    (folder / 'photos' / split / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(255 - shade).save(folder / 'photos' / split / name / f'{count}.png')


def by_debug(word: str, folder: pathlib.Path) -> str:
  """An argument for a run that takes seconds, with all its files in a folder."""
  name, equals, value = word.rpartition('=')
  if name == '--config':
    path, _, variant = value.partition(':')
    words = [w for w in variant.split(',') if w and w != 'debug'] + ['debug']
    return f'--config={ROOT}/{path}:{",".join(words)}'
  return f'{name}{equals}{folder}{value}' if value.startswith(('/tmp/', '/data/')) else word


def execute(module: str, arguments: list[str], folder: pathlib.Path) -> None:
  """Runs a command in this process."""
  arguments = [by_debug(a, folder) for a in arguments]
  loaded = importlib.import_module(module)
  code = loaded.run(arguments) if module == 'cover_jax.main' else loaded.main(arguments)  # main ends the process
  assert not code, (module, arguments)


def run_page(page: str, folder: pathlib.Path, monkeypatch, runs: int | None = None) -> list[str]:
  """The commands of a page, in order, but of `cover_jax.main` only the first `runs`; gives what was executed."""
  monkeypatch.chdir(folder)
  done = []
  for block in blocks(page):
    own = re.search(r'(?m)^export TFDS_DATA_DIR=\$PWD/(\w+)', block.text)  # TFDS has read it when it was imported
    data_dir = str(folder / own[1]) if own else tfds_constants.get_default_data_dir()
    monkeypatch.setattr(tfds_constants, 'DATA_DIR', data_dir)
    for words in commands(block) if block.language == 'bash' else ():
      words = plain([word for word in words if not word.startswith('[')])
      if not_run(words) or words[2] in PARSED:
        continue
      line = ' '.join(w for w in words if not w.startswith('--workdir=')).replace(':debug', '')
      enough = words[2] == 'cover_jax.main' and runs == sum('cover_jax.main' in other for other in done)
      if line not in done and not enough:  # with :debug two may be the same
        execute(words[2], words[3:], folder)
        done.append(line)
  return done


def run_python(block: Block, **scope) -> dict:
  exec(compile(block.text, f'{block.page}, line {block.line}', 'exec'), scope)
  return scope


def python_of(page: str) -> list[Block]:
  return [b for b in blocks(page) if b.language == 'python']


@pytest.mark.slow
def test_readme_is_run(embedded_data, tmp_path, monkeypatch):
  """The first example, one training of the demo's, and all that is done with them."""
  start_in(tmp_path)
  done = run_page('README.md', tmp_path, monkeypatch, runs=3)
  assert len(done) == 11, done
  assert (tmp_path / 'tfds/image_folder/mine').is_dir() and (tmp_path / 'finetuned/evaluation/index.html').exists()
  for file in ('tmp/run/evaluation/report.json', 'tmp/out/predictions.json', 'model.flax', 'sheet.png'):
    assert (tmp_path / file).exists()
  assert (tmp_path / 'motions_hf/model.safetensors').exists()
  (load,) = (b for b in python_of('README.md') if 'cover_jax.load' in b.text)
  model = run_python(load)['model']
  assert set(model.heads) == {'objects', 'motions', 'moments', 'digits'}
  shutil.copytree(tmp_path / 'tmp/run', tmp_path / 'demo')
  (load,) = python_of('docs/predict.md')
  assert set(run_python(load)['model'].heads) == set(model.heads)


def check_and_build(config) -> build.Experiment:
  """A config is whole, and makes a run of sources that are made up."""
  settings.check(config)
  info = lambda name: SourceInfo(name, 'image' if name == 'imagenet' else 'video', 1000, ('left', 'right'))
  return build.build(config, [info(name) for name in config.sources])


def test_readmes_config_is_one():
  (block,) = (b for b in python_of('README.md') if 'config.streams = {' in b.text)
  config = defaults.get_config()
  run_python(block, config=config, defaults=defaults)
  config.model = timesformer_k400.base_model(16, 224)
  config.total_epochs = 1.0
  run = check_and_build(config)
  assert config.sources.ssv2.flip == 'labels' and run.streams['video'].num_frames == 16
  for line in re.findall(r'`(config(?:\.\w+)+ = [^`.]*(?:\.\d[^`.]*)*)`', PAGES['README.md']):
    exec(line.replace(', ...', ''), {'config': config})
  config.mixture.weights = dict.fromkeys(config.sources, 1.0)
  check_and_build(config)


def test_a_third_source_of_readme_is_one():
  (block,) = (b for b in python_of('README.md') if 'dances' in b.text)
  config = cotrain_folders.get_config('tiny')
  run_python(block, config=config, defaults=defaults)
  settings.check(config)
  info = lambda name: SourceInfo(name, 'image' if name == 'photos' else 'video', 100, ('left', 'right'))
  run = build.build(config, [info(name) for name in config.sources])
  assert [run.sources[i].name for i in run.streams['video'].sources] == ['videos', 'dances']


SETTINGS = [b for b in BLOCKS if b.language == 'python' and b.page != 'README.md' and b.text.startswith('config.')]


@pytest.mark.parametrize('block', SETTINGS, ids=[f'{b.page}:{b.line}' for b in SETTINGS])
def test_settings_in_docs_are_allowed(block):
  config = digits_cover.get_config('debug')
  before = set(config.sources)
  run_python(block, config=config, defaults=defaults)
  config.streams.video.sources += tuple(set(config.sources) - before)
  check_and_build(config)


def test_every_python_block_is_run_by_a_test_of_this_file():
  rest = [b.page for b in BLOCKS if b.language == 'python' and b not in SETTINGS]
  assert rest == ['README.md', 'README.md', 'README.md', 'docs/datasets.md', 'docs/predict.md', 'docs/weights.md']


@pytest.mark.slow
def test_all_of_readme_and_the_page_on_weights_are_run(embedded_data, tmp_path, monkeypatch):
  start_in(tmp_path)
  assert len(run_page('README.md', tmp_path, monkeypatch)) == 13
  assert len(run_page('docs/weights.md', tmp_path, monkeypatch)) == 5
  pytest.importorskip('transformers')
  (block,) = python_of('docs/weights.md')
  text = block.text.replace('FOLDER', PLACEHOLDERS['FOLDER'])
  assert run_python(block._replace(text=text))['model'].config.num_labels == 16


@pytest.mark.slow
def test_page_on_vtdl_is_run(embedded_data, tmp_path, monkeypatch):
  assert len(run_page('docs/vtdl.md', tmp_path, monkeypatch)) == 5


@pytest.mark.slow
def test_page_on_data_sets_is_run(media, tmp_path, monkeypatch):
  from tests.test_real_configs import _imagenet

  start_in(tmp_path)
  for folder, make in {
    'k400': miniature.kinetics,
    'ssv2': miniature.something_something_v2,
    'moments': miniature.moments_in_time,
    'ucf101': miniature.ucf101,
    'hmdb51': miniature.hmdb51,
    'multi_moments': miniature.multi_moments_in_time,
    'charades': miniature.charades,
  }.items():
    make(media, tmp_path / 'data' / folder)
  assert len(run_page('docs/datasets.md', tmp_path, monkeypatch)) >= 9
  _imagenet(media, tmp_path / 'data/imagenet')
  (block,) = (b for b in python_of('docs/datasets.md') if 'tfds.builder' in b.text)
  run_python(block._replace(text=block.text.replace("'/data/", f"'{tmp_path}/data/")))
  assert (tmp_path / 'data/tfds/imagenet2012').is_dir()


# Links, tables and keys.


def anchors(text: str) -> set[str]:
  """The anchors of a page's headings, as GitHub makes them."""
  headings = re.findall(r'(?m)^#+ (.*)$', re.sub(r'(?ms)^```.*?^```$', '', text))
  bare = [
    re.sub(r'[^\w\- ]', '', re.sub(r'\[(.*?)\]\(.*?\)', r'\1', h)).strip().lower().replace(' ', '-') for h in headings
  ]
  return set(bare)


@pytest.mark.parametrize('page', PAGES)
def test_every_link_leads_somewhere(page):
  links = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'(?ms)^```.*?^```$', '', PAGES[page]))
  for link in links:
    path, _, anchor = link.partition('#')
    if '://' in path:
      continue
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists(), f'{page} links to {link}, which is not there'
    if anchor:
      assert anchor in anchors(target.read_text()), f'{page} links to {link}, which has no such heading'


def configs_of_readme() -> dict[str, set[str]]:
  """{config: words of its variants}, from the table."""
  found = {}
  words_of = {'TARGET': ('k400', 'k600', 'k700', 'ssv2', 'mit'), 'SOURCES': ('objects', 'motions,digits')}
  for row in re.findall(r'(?m)^\| (`\w+\.py.*?) \|', PAGES['README.md']):
    names, variants = [], []
    for word in re.findall(r'`([^`]+)`', row):
      name, _, variant = word.partition(':')
      if name:
        names.append(names[0].rpartition('_')[0] + name if name.startswith('_') else name)
      if variant:
        variants += words_of.get(variant, (variant,))
    found |= {name.removesuffix('.py'): set(variants) for name in names}
  return found


def test_readme_names_every_config_and_each_of_its_variants_loads():
  named = configs_of_readme()
  assert set(named) == set(CONFIGS)
  for name, variants in named.items():
    module = importlib.import_module(f'configs.{name}')
    for variant in {'', *variants} - ({''} if name == 'transfer' else set()):
      for words in (variant, ','.join(w for w in (variant, 'debug') if w)):
        settings.check(module.get_config(words))


def test_every_key_that_is_named_exists():
  for page, text in PAGES.items():
    for path in re.findall(r'`(?:--)?config\.(?!json)([a-z_0-9.]+)', text):
      keys = settings.RUN
      parts = path.rstrip('.').split('.')
      for i, part in enumerate(parts):
        if parts[0] in ('sources', 'streams') and i:
          keys = {1: keys, 2: SOURCE if parts[0] == 'sources' else settings.STREAM}.get(i, {})
          if i == 1:
            continue
        if parts[0] == 'model' and i:
          keys = {key: {} for name in encoders.ENCODERS for key in encoders.defaults({'name': name})}
        assert part in keys, f'{page} names config.{path}'
        free = isinstance(keys[part], declared.Key) and keys[part].kind.free
        if free and parts[0] not in ('sources', 'streams', 'model'):
          break  # names of the reader's own follow
        keys = keys[part] if not isinstance(keys[part], declared.Key) else {}


def test_no_reason_stands_for_nothing():
  given = [plain(words) for b in BLOCKS if b.language in ('bash', 'console') for words in commands(b)]
  assert {not_run(words) for words in given} - {None} == set(NOT_RUN)
  named = {words[2] for words in given if not not_run(words)} | {p.values[0].split()[2] for p in inline_commands()}
  assert set(PARSED) <= named
