"""One's own videos and images, from folders to a model of both, and from that to one of the videos alone."""

import json

import numpy as np
import pytest
from absl import logging
from PIL import Image
from tensorflow_datasets.core import constants

from configs import cotrain_folders, finetune_folder
from cover_jax import api, main
from cover_jax.experiment import build as experiments
from cover_jax.experiment import settings
from cover_jax.models import encoder
from data_pipelines import build
from data_pipelines.contract import SourceInfo
from data_pipelines.sources import open_tfds
from tests.test_video_files import write

CLASSES = {'videos': ('wave_left', 'wave_right'), 'photos': ('cat', 'dog', 'owl')}


@pytest.fixture
def folders(tmp_path, monkeypatch):
  """Folders of videos and photos, in a folder to work in, and an empty one for built data sets."""
  rng = np.random.default_rng(0)
  for kind, classes in CLASSES.items():
    for split, name, number in ((s, c, n) for s in ('train', 'test') for c in classes for n in range(4)):
      folder = tmp_path / kind / split / name
      folder.mkdir(parents=True, exist_ok=True)
      picture = rng.integers(0, 256, (32, 48, 3), np.uint8)
      if kind == 'videos':
        write(folder / f'{number}.mp4', 9 + number, picture=picture)
      else:
        Image.fromarray(picture).save(folder / f'{number}.png')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, 'DATA_DIR', str(tmp_path / 'tfds'))  # TFDS_DATA_DIR was read when TFDS was imported
  return tmp_path


def path_of(module, variant='debug'):
  return f'--config={module.__file__}:{variant}'


@pytest.mark.slow
def test_folders_are_cotrained_and_fine_tuned(folders, monkeypatch):
  open_tfds._say_once.cache_clear()
  lines, said = [], logging.info
  monkeypatch.setattr(logging, 'info', lambda text, *args: lines.append(text % args) or said(text, *args))
  build.main(['video_folder/mine', '--manual_dir=videos'])
  build.main(['image_folder/mine', '--manual_dir=photos'])
  weights = ('--config.mixture.weights.videos=2.0', '--config.mixture.weights.photos=1.0')
  main.run([path_of(cotrain_folders), '--workdir=both', *weights])
  report = json.loads((folders / 'both/evaluation/report.json').read_text())
  assert {name: r['classes'] for name, r in report['sources'].items()} == {'videos': 2, 'photos': 3}
  assert {name: r['examples'] for name, r in report['sources'].items()} == {'videos': 8, 'photos': 12}
  assert (folders / 'both/evaluation/index.html').stat().st_size > 10_000
  assert json.loads((folders / 'both/config.json').read_text())['mixture']['weights'] == {'videos': 2.0, 'photos': 1.0}
  flips = [line for line in lines if 'flip=auto' in line]
  assert len(flips) == 2 and any('videos, flip=auto: 2 classes change their label' in line for line in flips)
  assert any('photos, flip=auto: no class names a side' in line for line in flips)

  main.run([path_of(finetune_folder), '--workdir=videos_only', '--config.init_from.path=both'])
  model = api.load('videos_only')
  assert set(model.heads) == {'videos'} and set(api.load('both').heads) == {'videos', 'photos'}
  best = model.predict('videos/test/wave_left/0.mp4')['videos']
  assert {name for name, _ in best} == set(CLASSES['videos'])
  assert any('Initialised from' in line and 'both' in line for line in lines)


@pytest.mark.parametrize(('module', 'streams'), [(cotrain_folders, ('video', 'image')), (finetune_folder, ('videos',))])
@pytest.mark.parametrize(('variant', 'size'), [('', 224), ('tiny', 64)])
def test_sizes_of_the_model_follow_from_the_streams(module, streams, variant, size):
  config = module.get_config(variant)
  config.streams[streams[0]].num_frames = 4
  for stream in streams:
    config.streams[stream].size = (size // 2, size)
  settings.fit_model(config)
  assert (config.model.image_size, config.model.num_frames) == (size, 4)
  settings.check(config)
  infos = [SourceInfo(name, 'image' if name == 'photos' else 'video', 100, ('a', 'b')) for name in config.sources]
  assert experiments.build(config, infos).model.image_size == size


def test_sizes_that_are_set_and_encoders_without_any_stay():
  config = cotrain_folders.get_config('tiny')
  config.model.image_size = 32
  settings.fit_model(config)
  assert (config.model.image_size, config.model.num_frames) == (32, 8)
  config.model = {'name': 'resnet3d', **encoder.encoder_class({'name': 'resnet3d'}).DEBUG}
  before = config.model.to_dict()
  settings.fit_model(config)
  assert config.model.to_dict() == before
