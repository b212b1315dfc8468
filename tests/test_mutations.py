"""The tests notice when the arithmetic is wrong: each fault of three tables, put into a copy, must turn its test red.

`pytest -m slow tests/test_mutations.py` runs them all, some minutes; `-k` takes one by its name in the table. The fast
tests only hold the table to the code: each text stands there once, and each test exists.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import mutations, mutations_of_costs, mutations_of_objectives

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ('cover_jax', 'data_pipelines', 'configs', 'tests')
MUTATIONS = {**mutations.MUTATIONS, **mutations_of_objectives.MUTATIONS, **mutations_of_costs.MUTATIONS}


@pytest.mark.parametrize('name', MUTATIONS)
def test_the_table_fits_the_code(name):
  mutation = MUTATIONS[name]
  count = (ROOT / mutation.file).read_text().count(mutation.text)
  assert count == 1, f'{mutation.file} has {mutation.text!r} {count} times, expected once: bring the table up to date'
  assert mutation.mutated != mutation.text
  file, test = mutation.test.split('::')
  found = re.search(rf'^def {test.split("[")[0]}\(', (ROOT / 'tests' / file).read_text(), re.MULTILINE)
  assert found, f'tests/{file} has no test {test}: bring the table up to date'


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTATIONS)
def test_a_fault_turns_its_test_red(name, tmp_path):
  mutation = MUTATIONS[name]
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  file = tmp_path / mutation.file
  text = file.read_text()
  assert text.count(mutation.text) == 1
  file.write_text(text.replace(mutation.text, mutation.mutated))
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'pytest',
      '-m',
      'slow or not slow',
      '-x',
      '-q',
      '-p',
      'no:cacheprovider',
      f'tests/{mutation.test}',
    ],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path), 'PYTHONDONTWRITEBYTECODE': '1'},
    capture_output=True,
    text=True,
  )
  # 1: tests failed. Anything else would be a test that is not there, or a copy that does not even start.
  assert done.returncode == 1, f'{mutation.test} does not notice: {name}\n{done.stdout[-3000:]}{done.stderr[-2000:]}'
  assert re.search(r'^FAILED ', done.stdout, re.MULTILINE), done.stdout[-3000:]
