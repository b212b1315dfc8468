"""Installs cover_jax, data_pipelines and configs. Tested versions are pinned in constraints/.

A plain install loads models, predicts, encodes and exports; `[train]` is all the rest.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.*)'", (ROOT / 'cover_jax/__init__.py').read_text()).group(1)

# The CPU wheel of TensorFlow is small and never touches the accelerator that JAX uses; it exists for Linux x86-64.
TENSORFLOW = [
  'tensorflow-cpu>=2.21; platform_system=="Linux" and platform_machine=="x86_64"',
  'tensorflow>=2.21; platform_system!="Linux" or platform_machine!="x86_64"',
]

# What makes data and trains on it: `data_pipelines/installed.py` asks for it in a sentence where it is missing.
TRAIN = [
  'clu>=0.0.12',
  'tensorflow-datasets>=4.9.9',
  *TENSORFLOW,
  'importlib_resources',  # TFDS imports it and does not declare it
  'tensorboard>=2.19',  # clu.metric_writers imports it; TensorFlow no longer brings it
  'scikit-learn>=1.5',  # carries the scans that the embedded data sets are drawn from
]

setuptools.setup(
  name='cover_jax',
  version=VERSION,
  description='Train one action-recognition model on many video and image datasets at once, in JAX/Flax.',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11,<3.14',
  # Named, so that an editable install is a line on the path: with a finder of its own, `import cover_jax` beside a
  # checkout of that name would find the checkout's folder, an empty namespace.
  package_dir={'': '.'},
  packages=setuptools.find_packages(include=['cover_jax*', 'data_pipelines*', 'configs*']),
  package_data={
    'data_pipelines.builders': ['labels/*'],
    'cover_jax.evaluation': ['page_files/*'],
    'cover_jax': ['demo/*'],
  },
  install_requires=[
    'jax>=0.10,<0.13',
    'flax>=0.12',
    'optax>=0.2.5',
    'absl-py>=2.1',
    'orbax-checkpoint>=0.12',  # checkpoints of several hosts; Flax needs it, too
    'msgpack>=1.0',
    'ml-collections>=1.0',
    'einops>=0.8',
    'etils[epath]>=1.12',  # paths of buckets; TFDS and Orbax need it, too
    'matplotlib>=3.9',
    'numpy>=2.0',
    'pillow>=10.1',
    'av>=18',  # decodes and encodes video files
    'safetensors>=0.4.4',
  ],
  extras_require={
    'train': TRAIN,
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'cuda': ['jax[cuda13]>=0.10,<0.13'],
    # Beam runs builds on a cluster. The command `tfds` of tfds 4.9.10 does not start without either.
    'beam': [*TRAIN, 'apache-beam>=2.77', 'mlcroissant'],
    'wandb': ['wandb>=0.19'],
    'plan': [*TRAIN, 'libtpu'],
    'torch': ['torch', 'transformers'],
    # The peers of benchmarks/input.py, and the other decoder of benchmarks/media_matrix.py.
    'bench': [*TRAIN, 'torch', 'decord', 'torchcodec', 'opencv-python-headless', 'imageio-ffmpeg>=0.6'],
    # Buckets without TensorFlow's file systems, or with EPATH_USE_TF=false.
    'gcs': ['gcsfs>=2026.9'],
    'test': [*TRAIN, 'pytest', 'pytest-xdist', 'hypothesis', 'ruff', 'gcsfs>=2026.9', 'gcp-storage-emulator>=2026.7'],
  },
)
