"""Every experiment on real data sets: from folders in their official formats to two steps of training and a report."""

import io
import json
import tarfile

import pytest

from configs import (
  cover_b16,
  cover_l16,
  cover_r2plus1d,
  cover_videomae_b,
  cover_videoprism_b,
  cover_vjepa2_l,
  defaults,
  finetune_folder,
  hdc_ucf101,
  modist_ucf101,
  statistics_ucf101,
  timesformer_k400,
  timesformer_k600,
  timesformer_ssv2,
  transfer,
)
from data_pipelines.contract import UserError
from tests import miniature

_FULL = {
  'timesformer_k400': (timesformer_k400, 'hr', 'l'),
  'timesformer_k600': (timesformer_k600,),
  'timesformer_ssv2': (timesformer_ssv2, 'hr'),
  'cover_b16': (cover_b16, 'k600', 'k700'),
  'cover_l16': (cover_l16, 'k700'),
  'cover_videoprism_b': (cover_videoprism_b, 'frozen', 'videoglue', 'l', 'videoglue,l', 'k600'),
  'cover_videomae_b': (cover_videomae_b, 'frozen', 'l', 'k700'),
  'cover_vjepa2_l': (cover_vjepa2_l, 'frozen'),
  'cover_r2plus1d': (cover_r2plus1d, 'frozen'),
  'transfer': (transfer,),
  'hdc_ucf101': (hdc_ucf101,),
  'modist_ucf101': (modist_ucf101,),
  'statistics_ucf101': (statistics_ucf101, 'released'),
}


def _tar(path, files):
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def _imagenet(media, folder):
  """ILSVRC2012's two archives, as TFDS's own builder wants them: one archive a class in the one of training."""
  folder.mkdir(parents=True)
  jpegs = [(media / f'images/{name}.jpg').read_bytes() for name in ('bird', 'dog', 'frame_320x240')]
  synsets = ('n01440764', 'n01443537', 'n01484850')
  train = {}
  for synset, jpeg in zip(synsets, jpegs, strict=True):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode='w') as tar:
      for i in range(3):
        info = tarfile.TarInfo(f'{synset}_{i}.JPEG')
        info.size = len(jpeg)
        tar.addfile(info, io.BytesIO(jpeg))
    train[f'{synset}.tar'] = inner.getvalue()
  _tar(folder / 'ILSVRC2012_img_train.tar', train)
  _tar(folder / 'ILSVRC2012_img_val.tar', {f'ILSVRC2012_val_{i + 1:08d}.JPEG': jpeg for i, jpeg in enumerate(jpegs)})


@pytest.fixture(scope='module')
def prepared(media, tmp_path_factory):
  """A TFDS folder with a miniature of every data set that the configs name."""
  import tensorflow_datasets as tfds

  import data_pipelines.builders  # noqa: F401  registers the builders

  root = tmp_path_factory.mktemp('real')
  makers = {
    'kinetics/400': lambda folder: miniature.kinetics(media, folder, '400'),
    'kinetics/600': lambda folder: miniature.kinetics(media, folder, '600'),
    'kinetics/700': lambda folder: miniature.kinetics(media, folder, '700'),
    'something_something_v2': lambda folder: miniature.something_something_v2(media, folder),
    'moments_in_time/v1': lambda folder: miniature.moments_in_time(media, folder, 'v1'),
    'imagenet2012': lambda folder: _imagenet(media, folder),
  }
  for dataset, make in makers.items():
    folder = root / 'manual' / dataset.replace('/', '_')
    make(folder)
    builder = tfds.builder(dataset, data_dir=root / 'tfds')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=folder))
  return root / 'tfds'


@pytest.mark.parametrize(
  'experiment',
  [
    pytest.param('timesformer_k400', marks=pytest.mark.slow),
    pytest.param('timesformer_k600', marks=pytest.mark.slow),
    'timesformer_ssv2',
    pytest.param('cover_b16', marks=pytest.mark.slow),
    pytest.param('cover_b16:k600', marks=pytest.mark.slow),
    pytest.param('cover_l16', marks=pytest.mark.slow),
    pytest.param('cover_l16:k700', marks=pytest.mark.slow),
    pytest.param('cover_b16:k700', marks=pytest.mark.slow),
    pytest.param('transfer:mit', marks=pytest.mark.slow),
    pytest.param('transfer:ssv2', marks=pytest.mark.slow),
    pytest.param('cover_videoprism_b:videoglue', marks=pytest.mark.slow),
    pytest.param('cover_videoprism_b', marks=pytest.mark.slow),
    pytest.param('cover_videomae_b', marks=pytest.mark.slow),
    pytest.param('cover_videomae_b:frozen', marks=pytest.mark.slow),
    pytest.param('cover_vjepa2_l', marks=pytest.mark.slow),
    pytest.param('cover_vjepa2_l:frozen', marks=pytest.mark.slow),
    pytest.param('cover_r2plus1d', marks=pytest.mark.slow),
    pytest.param('cover_r2plus1d:frozen', marks=pytest.mark.slow),
  ],
)
def test_trains_two_steps_on_the_official_formats(experiment, prepared, tmp_path):
  from cover_jax.jobs import train as train_job

  name, _, variant = experiment.partition(':')
  config = _FULL[name][0].get_config(f'{variant},debug')
  for source in config.sources.values():
    source.data_dir = str(prepared)
  train_job.train(config, str(tmp_path))
  report = json.loads((tmp_path / 'evaluation/report.json').read_text())
  assert report['step'] == 2 and report['sources'].keys() == set(config.sources)
  for source, result in report['sources'].items():
    if source != 'imagenet':
      # One of the three validation clips that each miniature lists has no file.
      assert (result['examples'], result['expected']) == (2, 3), source
      assert '3 crops' in result['protocol']


@pytest.mark.slow
def test_my_own_videos_as_the_docs_say(media, tmp_path):
  """The four commands of docs/datasets.md, with `:debug` for `:tiny`."""
  from cover_jax import predict
  from cover_jax.jobs import train as train_job
  from data_pipelines import build, inspect

  miniature.folder(media, tmp_path / 'videos')
  data_dir = f'--data_dir={tmp_path}/tfds'
  build.main(['video_folder/mine', f'--manual_dir={tmp_path}/videos', data_dir])
  assert inspect.main(['video_folder/mine', data_dir, f'--out={tmp_path}/sheet.png']) == 0
  config = finetune_folder.get_config('debug')
  config.sources.videos.data_dir = f'{tmp_path}/tfds'
  train_job.train(config, str(tmp_path / 'run'))
  report = json.loads((tmp_path / 'run/evaluation/report.json').read_text())
  assert report['sources']['videos']['classes'] == 2
  video = next((tmp_path / 'videos/test').rglob('*.mp4'))
  assert predict.main([f'{tmp_path}/run', str(video), f'--output={tmp_path}/out']) == 0


def _all_variants():
  for name, (module, *words) in _FULL.items():
    for variant in ['mit', 'ssv2'] if module is transfer else ['', *words]:
      yield pytest.param(module, variant, id=f'{name}:{variant}')


@pytest.mark.parametrize(('module', 'variant'), _all_variants())
def test_full_size_configs_build(module, variant):
  """What a config says at full size makes a run: models, streams, batch sizes; nothing is computed."""
  from cover_jax.experiment import build as experiments
  from cover_jax.experiment import settings
  from data_pipelines.contract import SourceInfo

  config = module.get_config(variant)
  settings.check(config)
  sizes = {'ssv2': (168_913, 174), 'mit': (791_297, 339), 'imagenet': (1_281_167, 1000)}
  infos = []
  for source in config.sources:
    count, classes = sizes.get(source, (240_000, 400))
    modality = 'image' if source == 'imagenet' else 'video'
    infos.append(SourceInfo(source, modality, count, tuple(f'{source} {k}' for k in range(classes))))
  run = experiments.build(config, infos, batch_divisor=config.mesh.fsdp)
  assert sum(s.batch_size for s in run.streams.values()) == config.batch_size
  assert run.total_steps > 1000


def test_unknown_variants_are_refused():
  for module, *_ in _FULL.values():
    with pytest.raises(UserError, match='no variant'):
      module.get_config('k9,debug')
  with pytest.raises(UserError, match='name one of'):
    transfer.get_config('debug')
  with pytest.raises(UserError, match='word,word'):
    defaults.variants('hr')


@pytest.mark.parametrize(
  'module', [cover_b16, cover_l16, cover_r2plus1d, cover_videomae_b, cover_videoprism_b, cover_vjepa2_l]
)
def test_images_can_be_left_out_or_be_ones_own(module):
  whole, videos, own = (module.get_config(word) for word in ('', 'noimages', 'image_folder'))
  assert list(videos.sources) == [name for name in whole.sources if name != 'imagenet']
  assert list(videos.streams) == ['video'] and videos.streams.video == own.streams.video == whole.streams.video
  assert [name for name in own.sources if name not in videos.sources] == ['images']
  assert own.sources.images.dataset == 'image_folder/mine' and own.streams.image.sources == ('images',)
  assert own.streams.image.size == whole.streams.image.size
  with pytest.raises(UserError, match='one of these words'):
    module.get_config('noimages,image_folder')
