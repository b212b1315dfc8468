"""Tests of the builders of real datasets: miniatures in the official formats, built by the real engine."""

import csv
import io
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import data_pipelines.builders
from data_pipelines import build, inspect, sources
from data_pipelines.builders import listing
from data_pipelines.contract import UserError
from data_pipelines.sources import open_tfds
from tests import miniature

BUILT = (
  'kinetics/400',
  'kinetics/700_2020',
  'something_something_v2',
  'moments_in_time/v2',
  'ucf101_videos/split1',
  'hmdb51/split3',
)


@pytest.fixture(scope='module', params=BUILT)
def built(request, media, tmp_path_factory):
  """(dataset, data_dir, what its manual_dir had)."""
  dataset, root = request.param, tmp_path_factory.mktemp('real')
  made = miniature.DATASETS[dataset](media, root / 'manual')
  config = tfds.download.DownloadConfig(manual_dir=root / 'manual')
  tfds.builder(dataset, data_dir=root / 'tfds').download_and_prepare(download_config=config)
  return dataset, root / 'tfds', made


def test_whole_clips_are_there_and_the_others_are_told(built):
  dataset, data_dir, made = built
  builder = tfds.builder(dataset, data_dir=data_dir)
  whole = {s: [i for i in items if i.state == 'whole'] for s, items in made.items()}
  assert {s: v.num_examples for s, v in builder.info.splits.items()} == {s: len(v) for s, v in whole.items()}
  with open(f'{builder.data_dir}/failures.csv', newline='') as f:
    failures = {(r['split'], r['id']): r for r in csv.DictReader(f)}
  lost = {(s, i.id): i for s, items in made.items() for i in items if i.state != 'whole'}
  assert failures.keys() == lost.keys() and len(lost) >= 2
  for key, item in lost.items():
    row = failures[key]
    assert bool(row['path']) == (item.state == 'corrupt') and row['line'] and row['reason']
  config = {'dataset': dataset, 'data_dir': str(data_dir), 'all': '+'.join(made)}
  for split, items in whole.items():
    source = open_tfds.open_source('x', config | {'split': split}, 'split')
    assert source.expected == len(made[split])
    found = {i.decode(): n for n, i in enumerate(source.ids)}
    assert found.keys() == {i.id for i in items}
    for item in items:
      n = found[item.id]
      assert source.video_names[n].decode() == item.video_id and source.label[n] == item.label
      numbers = np.arange(source.num_frames[n])
      sizes = {Image.open(io.BytesIO(frame)).size for frame in sources.read(source, n, numbers)}
      assert sizes == {(source.width[n], source.height[n])} and min(*sizes.pop()) <= 256
  assert open_tfds.open_source('x', config, 'all').expected == sum(map(len, made.values()))


def test_classes_are_the_official_ones(built):
  dataset, data_dir, _ = built
  name = {'kinetics/700_2020': 'kinetics_700', 'ucf101_videos/split1': 'ucf101', 'hmdb51/split3': 'hmdb51'}
  names = listing.official_names(name.get(dataset, dataset.replace('/', '_')))
  assert tuple(tfds.builder(dataset, data_dir=data_dir).info.features['label'].names) == names


def test_frames_are_those_of_the_files(built):
  """Frame numbers and rate of the stored clips are those of the files they were made from."""
  dataset, data_dir, made = built
  # {frames: frames a second} of the whole files that miniatures use in turn; the first one has a gap of one frame.
  rate = {32: 31 * 30 / 32, 49: 12.0, 57: 6.0, 120: 30.0, 131: 25.0}
  for split in made:
    source = open_tfds.open_source('x', {'dataset': dataset, 'data_dir': str(data_dir), 'split': split}, 'split')
    assert np.allclose([rate[n] for n in source.num_frames.tolist()], source.fps, rtol=0.01)


def test_contact_sheet(built, tmp_path, capsys):
  dataset, data_dir, made = built
  out = tmp_path / 'sheet.png'
  assert inspect.main([dataset, f'--data_dir={data_dir}', f'--out={out}', '--rows=2', '--columns=3']) == 0
  text = capsys.readouterr().out
  for split, items in made.items():
    assert f'{split}: {sum(i.state == "whole" for i in items)} examples of {len(items)} expected' in text
  assert Image.open(out).size[1] == 2 * len(made) * 142


def test_every_builder_is_registered_under_its_own_name():
  assert data_pipelines.builders is not None
  for dataset in miniature.DATASETS:
    builder = tfds.builder(dataset)
    assert type(builder).__module__.startswith('data_pipelines.builders.')
    assert (
      builder.info.description
      and builder.info.homepage.startswith('http')
      and builder.info.as_proto.redistribution_info.license
    )
  assert not type(tfds.builder('ucf101')).__module__.startswith('data_pipelines')


def test_a_bucket_is_no_place_to_build_in():
  with pytest.raises(UserError, match=r'^--data_dir=gs://bucket/tfds is not a folder: build on a disk'):
    build.make_builder('kinetics/400', 'gs://bucket/tfds', None, {})


def test_lists_that_are_not_whole_are_told(media, tmp_path, capsys):
  miniature.DATASETS['hmdb51/split1'](media, tmp_path / 'manual')
  build.main(['hmdb51/split1', f'--manual_dir={tmp_path}/manual', f'--data_dir={tmp_path}/tfds', '--workers=1'])
  assert re.search(
    r'^train: your annotations list \d+ clips; the official ones list 3,570\.$', capsys.readouterr().out, re.M
  )


def test_a_single_config_needs_no_name(tmp_path):
  builder = build.make_builder('something_something_v2', str(tmp_path), None, {})
  assert builder.builder_config.name == tfds.builder('something_something_v2').builder_config.name
  for dataset in ('kinetics', 'video_folder', 'something_something_v2/mine'):
    with pytest.raises(UserError, match='is not a dataset of'):
      build.make_builder(dataset, str(tmp_path), None, {})
