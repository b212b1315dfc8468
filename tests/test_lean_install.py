"""A plain install loads and predicts; what needs more says so. What setup.py does not declare is not there."""

import importlib.metadata
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from data_pipelines import installed

ROOT = pathlib.Path(__file__).parent.parent


def declared(monkeypatch):
  """What setup.py says."""
  said = {}
  monkeypatch.setattr('setuptools.setup', said.update)
  runpy.run_path(str(ROOT / 'setup.py'))
  return said


def closure(requirements):
  """The names of the distributions that a list of requirements brings, as pip would find them here."""
  found, waiting = {}, [(Requirement(r), '') for r in requirements]
  while waiting:
    requirement, extra = waiting.pop()
    if requirement.marker and not requirement.marker.evaluate({'extra': extra}):
      continue
    name = re.sub(r'[-_.]+', '-', requirement.name).lower()
    for wanted in {'', *requirement.extras} - found.get(name, set()):
      found.setdefault(name, set()).add(wanted)
      waiting += [(Requirement(r), wanted) for r in importlib.metadata.distribution(name).requires or ()]
  return set(found)


@pytest.fixture
def lean(tmp_path, monkeypatch):
  """Runs Python with the plain install's packages alone."""
  folder = tmp_path / 'packages'
  folder.mkdir()
  names = closure(declared(monkeypatch)['install_requires'])
  assert not names & {'tensorflow', 'tensorflow-cpu', 'tensorflow-datasets', 'clu', 'scikit-learn', 'keras', 'pytest'}
  for name in names:
    distribution = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ('..', '__pycache__')}:
      if not (folder / top).exists():
        (folder / top).symlink_to(distribution.locate_file(top))
  environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(folder)])

  def run(*argv):
    command = [sys.executable, '-S', *argv]  # without site-packages
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  return run


def test_it_loads_predicts_and_draws(lean, tmp_path):
  code = f"""
import importlib.util, numpy as np, cover_jax
assert not any(map(importlib.util.find_spec, {installed.TRAIN}))
model, clip = cover_jax.load('demo', heads=['motions']), np.zeros([8, 32, 32, 3], np.uint8)
print(len(model.predict(clip)['motions']))
import cover_jax.export, cover_jax.predict, cover_jax.report
from cover_jax.evaluation import visualise
visualise.attention_maps([('a clip', clip, np.ones([8, 4, 4], np.float32))], 'attention.png')
"""
  done = lean('-c', code)
  assert done.returncode == 0, done.stderr
  assert done.stdout == '5\n' and (tmp_path / 'attention.png').stat().st_size > 1000


def test_the_rest_says_what_to_install(lean, tmp_path):
  code = f"""
from cover_jax import main, plan
from data_pipelines import build, flags, inspect
config = '--config={ROOT}/configs/digits_cover.py:debug'
for command, argv in (
  (main.run, [config, '--workdir=run']),
  (main.run, [config, '--workdir=run', '--mode=evaluate']),
  (plan.main, [config]),
  (build.main, ['video_folder/mine', '--manual_dir=videos']),
  (inspect.main, ['video_folder/mine']),
):
  print(flags.run(lambda: command(argv)))
"""
  done = lean('-c', code)
  assert done.stdout.split() == ['2'] * 5, done.stderr
  errors = [line for line in done.stderr.splitlines() if line.startswith('Error: ')]
  assert [error.split()[1] for error in errors] == ['--mode=train', '--mode=evaluate', 'A', 'Building', 'Looking']
  for error in errors:
    assert 'needs tensorflow, tensorflow_datasets, clu, tensorboard, sklearn, which' in error and '".[train]"' in error
  assert not (tmp_path / 'run').exists()


def test_what_trains_and_tests_is_in_its_extra(monkeypatch):
  extras = declared(monkeypatch)['extras_require']
  for name in ('test', 'plan', 'beam', 'bench'):
    assert set(extras['train']) <= set(extras[name])
  distributions = importlib.metadata.packages_distributions()
  brought = {re.sub(r'[-_.]+', '-', Requirement(r).name).lower() for r in extras['train']}
  for module in installed.TRAIN:
    assert brought & {re.sub(r'[-_.]+', '-', name).lower() for name in distributions[module]}
