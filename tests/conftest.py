"""Shared set-up: eight fake CPU devices, no network, embedded data built once per session."""

import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile

import pytest
from absl import logging

# Before JAX starts: tests make meshes of 1 to 8 of these devices. Compiling takes longer than running such small
# programs, so they are compiled without optimisation, and their fusions by the older emitter: a third of the time.
# Later releases of jaxlib (0.12) have no older emitter, and end on a flag that they do not know.
_OLDER_EMITTER = importlib.metadata.version('jaxlib').startswith('0.10.')
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false' if _OLDER_EMITTER else '',
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Subprocesses and workers compile the same tiny programs: once is enough.
_CACHE = os.path.join(tempfile.gettempdir(), f'cover_jax_test_cache_{os.getuid()}')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(_CACHE, 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
# The embedded data sets are built here, by the first test that opens them, and found here by the others.
os.environ.setdefault('TFDS_DATA_DIR', os.path.join(_CACHE, 'tfds'))


@pytest.fixture(autouse=True)
def _everything_is_logged() -> None:
  """What other tests, and the libraries that they use, did to absl's verbosity does not matter."""
  logging.set_verbosity(logging.INFO)


@pytest.fixture(scope='session')
def embedded_data() -> None:
  """Builds the embedded data sets."""
  from configs import digits_cover
  from data_pipelines.sources import open_tfds

  for name, config in digits_cover.get_config('debug').sources.items():
    open_tfds.open_source(name, config.to_dict() | {'data_dir': None}, 'train')


@pytest.fixture(scope='session')
def bucket_server():
  """A bucket on this machine; see `benchmarks/bucket_server.py`."""
  for module in ('gcp_storage_emulator', 'gcsfs'):
    if importlib.util.find_spec(module) is None:
      pytest.skip(f"{module} is not installed: pip install '.[test]'")
  from benchmarks import bucket_server

  with bucket_server.serving() as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment().items():
      patch.setenv(name, value)  # before gcsfs is imported
    yield server


@pytest.fixture
def bucket(bucket_server, monkeypatch):
  """The path of an empty folder in that bucket, which this process and those that it starts can reach."""
  from etils.epath import gpath

  monkeypatch.setenv('EPATH_USE_TF', 'false')  # TensorFlow's file system knows the real address only
  gpath._is_tf_installed.cache_clear()  # it asked the environment once
  bucket_server.wipe()
  yield 'gs://tests/folder'
  monkeypatch.undo()
  gpath._is_tf_installed.cache_clear()


@pytest.fixture(scope='session')
def media() -> pathlib.Path:
  """The folder of real videos, images and annotation files that some tests read."""
  folder = os.environ.get('COVER_JAX_TEST_MEDIA')
  if not folder:
    pytest.skip('COVER_JAX_TEST_MEDIA is not set: it names a folder of test videos')
  return pathlib.Path(folder)
