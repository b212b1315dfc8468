"""Compiled programs are kept between processes, where the user says."""

import os
import subprocess
import sys

import jax
import pytest

from cover_jax.runtime import compiled

PROGRAM = """
import sys, jax, jax.numpy as jnp
from cover_jax.runtime import compiled
compiled.keep(eval(sys.argv[1]))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
x = jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x) @ x.T)[1])(jnp.arange(12.0).reshape(3, 4))
print(x.tobytes().hex())
"""


def run(folder, **env):
  env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')} | {'JAX_PLATFORMS': 'cpu', **env}
  done = subprocess.run([sys.executable, '-c', PROGRAM, repr(folder)], env=env, capture_output=True, text=True)
  assert not done.returncode, done.stderr
  return done.stdout, done.stderr


def entries(folder):
  return sorted(p for p in folder.rglob('*-cache') if p.is_file())


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
  first, _ = run(None, XDG_CACHE_HOME=str(tmp_path))
  kept = entries(tmp_path / 'cover_jax/compiled')
  before = [p.read_bytes() for p in kept]
  assert kept
  second, _ = run(None, XDG_CACHE_HOME=str(tmp_path), JAX_EXPLAIN_CACHE_MISSES='1')
  assert second == first and [p.read_bytes() for p in entries(tmp_path)] == before
  for path in kept:  # damage is compiled again
    path.write_bytes(path.read_bytes()[:40])
  assert run(None, XDG_CACHE_HOME=str(tmp_path))[0] == first


def test_no_cache_where_none_is_wanted_or_none_can_be_written(tmp_path):
  first, _ = run('', XDG_CACHE_HOME=str(tmp_path))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  second, said = run(str(tmp_path / 'file/cache'))
  assert second == first and 'Compiled programs are not kept' in said


@pytest.mark.parametrize('folder', [None, 'own'])
def test_the_environment_says_it_unless_the_flag_does(tmp_path, monkeypatch, folder):
  changed = {}
  monkeypatch.setattr(jax.config, 'update', changed.__setitem__)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
  compiled.keep(folder and str(tmp_path / folder))
  assert changed.get('jax_compilation_cache_dir') == (folder and str(tmp_path / folder))
