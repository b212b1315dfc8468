"""The engine of the builders of local files: what goes in comes out, what does not is told, and a kill costs little."""

import csv
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from PIL import features as pillow

from data_pipelines import build, inspect, sources
from data_pipelines.builders import shards
from data_pipelines.builders.image_folder import ImageFolder
from data_pipelines.builders.listing import Clip, Listing
from data_pipelines.builders.media import MediaBuilder, MediaConfig
from data_pipelines.builders.video_folder import VideoFolder
from data_pipelines.contract import UserError
from data_pipelines.media.transcode import Interrupted, Settings
from data_pipelines.sources import open_tfds
from tests.test_video_files import write

SETTINGS = Settings('video', 256, 0, 85)


def make(root, splits, kind=VideoFolder, manual='manual', config=None, **download):
  """Builds a dataset of `manual` in `root`; gives the builder."""
  config = config or MediaConfig(name='mine')
  builder = kind(data_dir=root / 'tfds', config=config)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root / manual, **download))
  assert {s: i.num_examples for s, i in builder.info.splits.items()} == splits
  return builder


def folder_of(root, manual='manual', **counts):
  """Videos of 3 to 5 frames: {split: how many}, in two classes."""
  for split, count in counts.items():
    for i in range(count):
      path = root / manual / split / 'ab'[i % 2] / f'{i:03}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      write(path, 3 + i % 3)
  return root


def tfrecords(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob('*.tfrecord-*')}


def failures(builder):
  with open(f'{builder.data_dir}/failures.csv', newline='') as f:
    return list(csv.DictReader(f))


# ---- What goes in comes out.


@pytest.fixture(scope='module')
def kit(media, tmp_path_factory):
  """A dataset of real files, good and bad: the builder's root."""
  root = tmp_path_factory.mktemp('kit')
  files = {
    'train/a': ['rot_90.mov', 'unordered_pts.mov', 'odd_66x50_60fps.mov', 'corrupted.mp4'],
    'train/b': ['hevc.mp4', 'h264_10bit.mp4', 'tiny_carphone.mp4'],
    'val/a': ['no_duration.webm', 'av1.mkv', 'rot_0.mov'],
  }
  for folder, names in files.items():
    (root / 'manual' / folder).mkdir(parents=True)
    for name in names:
      (root / 'manual' / folder / name).write_bytes((media / 'video_edge' / name).read_bytes())
  (root / 'manual/val/b').mkdir()
  (root / 'manual/val/b/empty.mp4').write_bytes(b'')
  (root / 'manual/val/b/text.avi').write_text('404 not found')
  os.mkfifo(root / 'manual/val/b/pipe.mp4')
  with av.open(root / 'manual/val/b/sound.mp4', 'w') as file:
    stream = file.add_stream('aac', rate=8000)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono')
    silence.rate = 8000
    for packet in (*stream.encode(silence), *stream.encode(None)):
      file.mux(packet)
  make(root, {'train': 6, 'val': 3})
  return root


def opened(root, split, dataset='video_folder/mine'):
  return open_tfds.open_source('x', {'dataset': dataset, 'data_dir': str(root / 'tfds'), 's': split}, 's')


def test_found_expected_and_failed_are_told(kit):
  builder = tfds.builder('video_folder/mine', data_dir=kit / 'tfds')
  rows = failures(builder)
  assert [(r['split'], r['id'], r['line']) for r in rows] == [
    ('train', 'a/corrupted.mp4', ''),
    ('val', 'b/empty.mp4', ''),
    ('val', 'b/pipe.mp4', ''),
    ('val', 'b/sound.mp4', ''),
    ('val', 'b/text.avi', ''),
  ]
  assert all(r['path'] == str(kit / 'manual' / r['split'] / r['id']) for r in rows)
  assert '28 of 50' in rows[0]['reason'] and 'empty' in rows[1]['reason'] and 'not a video' in rows[4]['reason']
  assert 'not a regular file' in rows[2]['reason'] and 'no video' in rows[3]['reason']
  assert [opened(kit, s).expected for s in ('train', 'val', 'train+val', 'all')] == [7, 7, 14, 14]
  assert [opened(kit, s).expected for s in ('train[:50%]', 'train+val[:1]')] == [None, None]
  assert not (kit / 'tfds/video_folder/mine/1.0.0.unfinished').exists()


def test_examples_say_what_they_are(kit):
  source = opened(kit, 'train')
  facts = {
    i.decode(): (n, h, w, label, round(float(fps), 1))
    for i, n, h, w, label, fps in zip(
      source.ids, source.num_frames, source.height, source.width, source.label, source.fps, strict=True
    )
  }
  assert facts == {
    'a/rot_90.mov': (3, 454, 256, 0, 30.0),
    'a/unordered_pts.mov': (4, 50, 50, 0, 32.0),
    'a/odd_66x50_60fps.mov': (82, 50, 66, 0, 60.0),
    'b/hevc.mp4': (10, 128, 128, 1, 10.0),
    'b/h264_10bit.mp4': (30, 200, 200, 1, 30.0),
    'b/tiny_carphone.mp4': (120, 144, 176, 1, 30.0),
  }
  assert source.class_names == ('a', 'b') and source.video_names.tolist() == [b'train/' + i for i in source.ids]
  files = [(kit / 'manual/train' / i.decode()).read_bytes() for i in source.ids]
  assert [s.decode() for s in source.file_sha256] == [hashlib.sha256(f).hexdigest() for f in files]


def test_tfds_reads_the_pixels_that_our_loader_reads(kit):
  source = opened(kit, 'val')
  builder = tfds.builder('video_folder/mine', data_dir=kit / 'tfds')
  assert builder.info.features['label'].names == ['a', 'b'] and 'expected' in builder.info.metadata
  seen = 0
  for example in builder.as_dataset(split='val').as_numpy_iterator():
    number = source.ids.tolist().index(example['id'])
    frames = sources.read(source, number, np.arange(source.num_frames[number]))
    np.testing.assert_array_equal(example['video'], [tf.io.decode_jpeg(f).numpy() for f in frames])
    assert example['fps'] == example['original_fps'] == source.fps[number]
    assert example['num_frames'] == len(frames)
    assert example['duration'] == pytest.approx(len(frames) / example['fps'])
    seen += 1
  assert seen == source.num_examples == 3


def test_values_of_the_config_reach_the_frames(tmp_path):
  root = folder_of(tmp_path, train=2)
  write(root / 'manual/train/a/long.mp4', 20, size=(64, 96))
  config = MediaConfig(name='small', short_side=24, fps=5, jpeg_quality=20)
  make(root, {'train': 3}, config=config)
  small = opened(root, 'train', 'video_folder/small')
  n = small.ids.tolist().index(b'a/long.mp4')
  assert (small.num_frames[n], small.height[n], small.width[n], small.fps[n]) == (10, 24, 36, 5)
  make(root, {'train': 3})
  fine = opened(root, 'train')
  n = fine.ids.tolist().index(b'a/long.mp4')
  assert (fine.num_frames[n], fine.height[n], fine.width[n], fine.fps[n]) == (20, 64, 96, 10)


def test_images(tmp_path):
  for name, orientation in (('train/x/a.jpg', 1), ('train/y/b.jpg', 6), ('test/x/c.png', 1), ('test/y/d.jpg', 1)):
    path = tmp_path / 'manual' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
  path.write_bytes(path.read_bytes()[:500])
  builder = make(tmp_path, {'train': 2, 'test': 1}, ImageFolder, config=MediaConfig(name='mine', short_side=16))
  assert [r['id'] for r in failures(builder)] == ['y/d.jpg']
  source = opened(tmp_path, 'train', 'image_folder/mine')
  assert source.modality == 'image' and source.expected == 2
  sizes = dict(zip(source.ids.tolist(), zip(source.height.tolist(), source.width.tolist(), strict=True), strict=True))
  assert sizes == {b'x/a.jpg': (16, 24), b'y/b.jpg': (24, 16)}
  (example,) = builder.as_dataset(split='test').as_numpy_iterator()
  assert example['image'].shape == (16, 24, 3) and example['label'] == 0


def test_a_jpeg_that_training_could_not_decode_is_counted_as_broken(tmp_path):
  """Pillow takes one with a stray marker in its data; the loader does not."""
  for i, name in enumerate(('train/x/a.jpg', 'train/y/b.jpg', 'train/y/stray.jpg')):
    path = tmp_path / 'manual' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 80, 3), np.uint8)).save(path)
  whole = path.read_bytes()
  place = whole.index(b'\xff\xda') + 6 * (len(whole) - whole.index(b'\xff\xda')) // 10
  path.write_bytes(whole[:place] + b'\xff\xff\xff' + whole[place:])
  with Image.open(path) as picture:
    picture.load()
  builder = make(tmp_path, {'train': 2}, ImageFolder)
  (row,) = failures(builder)
  assert row['id'] == 'y/stray.jpg' and 'its JPEG data are damaged: TensorFlow' in row['reason']
  source = opened(tmp_path, 'train', 'image_folder/mine')
  for number in range(source.num_examples):
    name = source.ids[number].decode()
    (frame,) = sources.read(source, number, np.arange(1))
    assert frame == (tmp_path / 'manual/train' / name).read_bytes()  # kept byte for byte
    tf.io.decode_jpeg(frame)


def test_pictures_of_every_ending_are_read_and_what_is_left_over_is_told(tmp_path, capsys):
  pixels = np.full((24, 32, 3), (200, 100, 50), np.uint8)
  formats = {'a.jfif': 'JPEG', 'b.jpe': 'JPEG', 'c.ppm': 'PPM', 'd.GIF': 'GIF', 'e.jp2': 'JPEG2000', 'f.tga': 'TGA'}
  formats |= {'g.avif': 'AVIF'} if pillow.check('avif') else {}
  for name, kind in formats.items():
    path = tmp_path / 'manual' / f'of {name[0]}' / name
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path, kind)
  for name in ('of a/x.heic', 'of a/notes.txt', 'gone/x.heic'):
    (tmp_path / 'manual' / name).parent.mkdir(exist_ok=True)
    (tmp_path / 'manual' / name).write_bytes(b'x')
  (tmp_path / 'manual/README.md').write_text('mine')
  builder = make(tmp_path, {'train': len(formats)}, ImageFolder)
  assert builder.info.features['label'].names == sorted(f'of {name[0]}' for name in formats)
  source = opened(tmp_path, 'train', 'image_folder/mine')
  for number in range(source.num_examples):
    (frame,) = sources.read(source, number, np.arange(1))
    colour = tf.io.decode_jpeg(frame).numpy().reshape(-1, 3).mean(0)
    np.testing.assert_allclose(colour, (200, 100, 50), atol=4)
  said = capsys.readouterr().out
  assert 'Not read, by its ending: 2 .heic, 1 .txt, such as ' in said
  assert f'Not a class, since no file in it is read: {tmp_path}/manual/gone\n' in said
  assert [(r['split'], r['path'][len(str(tmp_path)) + 8 :], r['reason']) for r in failures(builder)] == [
    ('', 'gone/x.heic', 'no file .heic is read'),
    ('', 'of a/notes.txt', 'no file .txt is read'),
    ('', 'of a/x.heic', 'no file .heic is read'),
  ]


def test_names_of_any_bytes_are_built_and_shown(tmp_path, capsys):
  classes = ['$$', r'$\frac$', os.fsdecode(b'caf\xe9'), 'n' * 250, '_x', '%s']
  for name in classes:
    for file in (os.fsdecode(b'\xff.png'), f'{"m" * 250}.png', '$.png', 'a\nb.png'):
      path = tmp_path / 'manual' / name / file
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (24, 16), 'red').save(path)
  builder = make(tmp_path, {'train': 24}, ImageFolder)
  expected = sorted('caf\\udce9' if name.startswith('caf') else name for name in classes)
  assert builder.info.features['label'].names == expected
  assert opened(tmp_path, 'train', 'image_folder/mine').class_names == tuple(expected)
  assert inspect.main(['image_folder/mine', f'--data_dir={tmp_path}/tfds', f'--out={tmp_path}/sheet.png']) == 0
  assert '       4  $$' in capsys.readouterr().out and (tmp_path / 'sheet.png').exists()


def test_videos_of_every_ending_are_read(tmp_path):
  names = {
    'a.MTS': 'mpeg2video',
    'b.m2ts': 'mpeg2video',
    'c.vob': 'mpeg2video',
    'd.mxf': 'mpeg2video',
    'e.nut': 'mpeg4',
  }
  for name, codec in names.items():
    path = tmp_path / 'manual' / name[0] / name
    path.parent.mkdir(parents=True)
    write(path, 8, fps=25, codec=codec)
  (tmp_path / 'manual/f').mkdir()
  grey = [Image.new('L', (48, 32), 30 * i) for i in range(8)]
  grey[0].save(tmp_path / 'manual/f/f.gif', save_all=True, append_images=grey[1:], duration=100)
  make(tmp_path, {'train': 6})
  source = opened(tmp_path, 'train')
  assert dict(zip(source.ids.tolist(), source.num_frames.tolist(), strict=True)) == {
    **{f'{name[0]}/{name}'.encode(): 8 for name in names},
    b'f/f.gif': 8,
  }
  number = source.ids.tolist().index(b'f/f.gif')
  brightness = [tf.io.decode_jpeg(f).numpy().mean() for f in sources.read(source, number, np.arange(8))]
  np.testing.assert_allclose(brightness, 30 * np.arange(8), atol=3)


def test_unlabelled_clips(tmp_path):
  write(tmp_path / 'a.mp4', 3)
  make(tmp_path, {'train': 1}, manual='.')
  source = opened(tmp_path, 'train')
  assert source.label.tolist() == [-1] and source.class_names == ()


def test_a_subsplit_is_a_fair_sample(tmp_path):
  """Clips lie in an order that does not follow the folders."""
  root = folder_of(tmp_path, train=40)
  make(root, {'train': 40})
  ids = [int(i[2:5]) for i in opened(root, 'train[:50%]').ids]
  assert len(ids) == 20 and 4 <= sum(i < 20 for i in ids) <= 16
  assert {int(i[2:5]) for i in opened(root, 'train[50%:]').ids} == set(range(40)) - set(ids)


# ---- Shards.


def clips_of(count):
  return [Clip(f'{i}', f'{i}', None, 0, '') for i in range(count)]


@pytest.mark.parametrize(('count', 'expected'), [(1, 1), (16, 1), (17, 2), (1000, 64), (9537, 64), (20_000, 128)])
def test_clips_are_dealt_out_evenly_and_once(count, expected):
  dealt = shards.assign(clips_of(count), 'video')
  assert len(dealt) == expected
  assert sorted(int(c.id) for shard in dealt for c in shard) == list(range(count))
  if count > 1000:
    sizes = [len(shard) for shard in dealt]
    assert max(sizes) < 1.6 * count / expected and min(sizes) > 0.5 * count / expected


def test_one_more_clip_changes_one_shard():
  before = shards.assign(clips_of(1000), 'video')
  after = shards.assign(clips_of(1001), 'video')
  assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_an_example_is_what_tfds_would_write():
  from tensorflow_datasets.core import example_serializer

  features = tfds.features.FeaturesDict(shards.features('video', ['x', 'y', 'z']))
  numbers = {'label': 2, 'fps': 1.5, 'original_fps': 2.5, 'duration': 3.0, 'num_frames': 7}
  values = numbers | {'id': 'ü', 'video_id': 'b', 'file_sha256': 'c0ffee'}
  frames = [b'one', b'two']
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  expected = serializer.get_tf_example(features.encode_example(values | {'video': frames}))
  clip = Clip('ü', 'b', '', 2, '')
  found = shards._serialized(
    shards._example(
      clip, shards.Media(frames, fps=1.5, original_fps=2.5, duration=3.0, num_frames=7), 'c0ffee', SETTINGS
    )
  )
  assert found == expected.SerializeToString(deterministic=True)


def test_a_shard_may_lose_all_its_clips(tmp_path):
  """With few clips for each shard some are empty; TFDS and the index must cope."""
  root = folder_of(tmp_path, train=6)
  for i in (0, 1, 2):
    (root / f'manual/train/{"ab"[i % 2]}/{i:03}.mp4').write_bytes(b'junk')
  builder = make(root, {'train': 3}, num_shards=8)
  assert 0 in builder.info.splits['train'].shard_lengths
  source = opened(root, 'train')
  assert sorted(source.ids.tolist()) == [b'a/004.mp4', b'b/003.mp4', b'b/005.mp4']
  assert len(list(builder.as_dataset(split='train'))) == 3
  assert [opened(root, f'train[{i}:{i + 1}]').num_examples for i in range(3)] == [1, 1, 1]


# ---- A build that is killed.


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
  """kill -9 after the first shards: they stay as they are, and the result is that of an uninterrupted build."""
  root = folder_of(tmp_path, train=40, val=3)
  (root / 'manual/train/a/bad.mp4').write_bytes(b'junk')
  config = MediaConfig(name='mine', short_side=16)
  whole = make(tmp_path / 'whole', {'train': 40, 'val': 3}, manual=root / 'manual', config=config)
  # The killed one decodes slowly, so that the kill comes in its middle.
  (tmp_path / 'python').mkdir()
  (tmp_path / 'python/sitecustomize.py').write_text(
    'import time\nfrom data_pipelines.media import video_files\nreal = video_files.frames\n'
    'def frames(path, threads=0):\n  time.sleep(0.05)\n  return real(path, threads)\n'
    'video_files.frames = frames\n'
  )
  command = ['video_folder/mine', '--short_side=16', '--workers=2', f'--manual_dir={root}/manual']
  log = open(tmp_path / 'log', 'w')  # noqa: SIM115  the child holds it
  child = subprocess.Popen(
    [sys.executable, '-m', 'data_pipelines.build', *command, f'--data_dir={root}/tfds'],
    env=os.environ | {'PYTHONPATH': f'{tmp_path}/python{os.pathsep}{os.getcwd()}'},
    stdout=log,
    stderr=log,
  )
  unfinished = root / 'tfds/video_folder/mine/1.0.0.unfinished'
  for _ in range(600):
    finished = list((unfinished / 'shards').glob('*.outcome.json'))
    if finished:
      break
    assert child.poll() is None, (tmp_path / 'log').read_text()
    time.sleep(0.1)
  child.send_signal(signal.SIGKILL)
  child.wait()
  log.close()
  before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in unfinished.glob('*.tfrecord-*[0-9]')}
  finished = {p.name.removesuffix('.outcome.json') for p in (unfinished / 'shards').glob('*.outcome.json')}
  assert 1 <= len(finished) < 5
  (unfinished / 'train.tfrecord.0.tmp').write_bytes(b'a file that was being written')
  builder = make(root, {'train': 40, 'val': 3}, config=config)
  folder, reference = Path(builder.data_dir), Path(whole.data_dir)
  after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob('*.tfrecord-*')}
  assert all(after[name] == before[name] for name in finished)
  assert tfrecords(folder) == tfrecords(reference) and len(after) == 5
  assert json.loads((folder / 'metadata.json').read_text()) == json.loads((reference / 'metadata.json').read_text())
  assert (folder / 'failures.csv').read_text() == (reference / 'failures.csv').read_text()
  assert not unfinished.exists() and not list(folder.glob('*.tmp'))


def stopped(root, after, config=None, **download):
  """A build that ends with an exception after some shards."""
  done = []
  real = shards.write_shard

  def write_shard(path, note):
    if len(done) >= after:
      raise OSError('no space left on device')
    done.append(path)
    return real(path, note)

  builder = VideoFolder(data_dir=root / 'tfds', config=config or MediaConfig(name='mine'))
  builder.workers = 1
  with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match='no space'):
    patch.setattr(shards, 'write_shard', write_shard)
    config = tfds.download.DownloadConfig(manual_dir=root / 'manual', num_shards=4, **download)
    builder.download_and_prepare(download_config=config)
  return builder.unfinished


@pytest.fixture
def written(monkeypatch):
  """Paths of the shards that are written from now on."""
  paths, real = [], shards.write_shard
  monkeypatch.setattr(
    shards, 'write_shard', lambda path, note: paths.append(os.path.basename(path)) or real(path, note)
  )
  return paths


def test_only_what_is_missing_or_changed_is_done_again(tmp_path, written, capsys):
  root = folder_of(tmp_path, train=24)
  unfinished = stopped(root, 3)
  done = sorted(written)
  assert len(done) == 3
  # A clip of a finished shard is downloaded again.
  spec = json.loads((unfinished / 'shards' / f'{done[0]}.spec.json').read_text())
  write(spec['clips'][0][2], 9)
  written.clear()
  make(root, {'train': 24}, num_shards=4)
  rest = [f'video_folder-train.tfrecord-0000{i}-of-00004' for i in range(4)]
  assert sorted(written) == sorted({done[0]} | set(rest) - set(done))
  assert 'from a build before' in capsys.readouterr().out
  source = opened(root, 'train')
  assert source.num_frames[source.ids.tolist().index(spec['clips'][0][0].encode())] == 9


def test_shards_of_a_version_that_wrote_other_features_are_done_again(tmp_path, written, monkeypatch):
  root = folder_of(tmp_path, train=8)
  features = shards.features
  with monkeypatch.context() as patch:
    patch.setattr(shards, 'features', lambda *args: {k: v for k, v in features(*args).items() if k != 'file_sha256'})
    stopped(root, 3)
  written.clear()
  make(root, {'train': 8}, num_shards=4)
  assert len(written) == 4


@pytest.mark.parametrize('damage', ['shard', 'outcome'])
def test_a_shard_without_its_half_is_done_again(tmp_path, written, damage):
  root = folder_of(tmp_path, train=8)
  unfinished = stopped(root, 4 - 1)
  first = sorted(written)[0]
  path = unfinished / first if damage == 'shard' else unfinished / 'shards' / f'{first}.outcome.json'
  path.unlink()
  written.clear()
  make(root, {'train': 8}, num_shards=4)
  assert first in written and len(written) == 2


def test_other_settings_do_not_mix_with_what_is_there(tmp_path):
  root = folder_of(tmp_path, train=8)
  unfinished = stopped(root, 2)
  with pytest.raises(UserError, match=r'short_side=256 \(now 128\).*delete that folder') as caught:
    make(root, {}, config=MediaConfig(name='mine', short_side=128))
  assert str(unfinished) in str(caught.value) and len(tfrecords(unfinished)) == 2
  make(root, {'train': 8}, config=MediaConfig(name='other', short_side=128))
  make(root, {'train': 8}, num_shards=4)


def test_two_builds_at_once_are_refused(tmp_path):
  root = folder_of(tmp_path, train=2)
  unfinished = root / 'tfds/video_folder/mine/1.0.0.unfinished'
  unfinished.mkdir(parents=True)
  with open(unfinished / '.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='Another process is building'):
      make(root, {})
  make(root, {'train': 2})


def test_a_decoder_that_is_told_to_stop_leaves_no_failures(tmp_path, monkeypatch):
  """Ctrl-C or a cluster's SIGTERM reaches the decoders first; the videos are not to blame."""
  root = folder_of(tmp_path, train=2)
  (tmp_path / 'sitecustomize.py').write_text(
    'import os, signal\nfrom data_pipelines.media import video_files\n'
    'video_files.frames = lambda path, threads=0: os.kill(os.getpid(), signal.SIGTERM)\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  with pytest.raises(Interrupted):
    make(root, {})
  monkeypatch.delenv('PYTHONPATH')
  make(root, {'train': 2})


def test_what_is_killed_in_its_last_second_leaves_nothing_behind(tmp_path):
  root = folder_of(tmp_path, train=2)
  unfinished = stopped(root, 1)
  old = unfinished.parent / 'incomplete.ABCDEF_1.0.0'  # as TFDS names it
  old.mkdir()
  os.link(next(unfinished.glob('*.tfrecord-*')), old / 'x')
  make(root, {'train': 2}, num_shards=4)
  assert {p.name for p in unfinished.parent.iterdir()} == {'1.0.0'}


# ---- Mistakes.


class TestListed(MediaBuilder, skip_registration=True):
  """Lists what the test says."""

  __test__ = False
  VERSION = tfds.core.Version('1.0.0')
  listing: Listing

  def _list(self, manual_dir):
    return self.listing


GOOD = Clip('a', 'a', 'a.mp4', 0, 'train.txt:1')
LISTINGS = {
  'has no split': Listing(('x',), {}),
  'lists no clip': Listing(('x',), {'train': []}),
  'None of the 1 files of split .val': Listing(('x',), {'train': [GOOD], 'val': [GOOD._replace(path=None)]}),
  r'two clips named .a. \(train.txt:1 and train.txt:2\)': Listing(
    ('x',), {'train': [GOOD, GOOD._replace(line='train.txt:2')]}
  ),
  'has label 1; expected -1 to 0': Listing(('x',), {'train': [GOOD._replace(label=1)]}),
  "class named ' x'": Listing((' x',), {'train': [GOOD]}),
}


@pytest.mark.parametrize('message', LISTINGS)
def test_listings_that_cannot_be_built_are_refused_before_any_decoding(tmp_path, message):
  builder = TestListed(data_dir=tmp_path / 'tfds', config=MediaConfig(name='mine'))
  builder.listing = LISTINGS[message]
  with pytest.raises(UserError, match=message) as caught:
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'short_side': -1}, 'short_side'),
    ({'short_side': 25.5}, 'short_side'),
    ({'fps': -2}, 'fps'),
    ({'fps': float('nan')}, 'fps'),
    ({'jpeg_quality': 100}, 'jpeg_quality'),
  ],
)
def test_impossible_settings_are_refused(tmp_path, values, message):
  with pytest.raises(UserError, match=message):
    make(folder_of(tmp_path, train=1), {}, config=MediaConfig(name='mine', **values))


def test_a_split_of_broken_files_is_an_error_that_can_be_mended(tmp_path):
  root = folder_of(tmp_path, train=2, val=1)
  (root / 'manual/val/a/000.mp4').write_bytes(b'junk')
  with pytest.raises(UserError, match=r"None of the 1 clips of split 'val'.*failures.csv"):
    make(root, {})
  write(root / 'manual/val/a/000.mp4', 3)
  make(root, {'train': 2, 'val': 1})


def test_a_folder_is_needed_and_array_records_are_refused(tmp_path):
  with pytest.raises((UserError, AssertionError), match='manual_dir'):
    VideoFolder(data_dir=tmp_path, config='default').download_and_prepare()
  builder = VideoFolder(data_dir=tmp_path, config='default', file_format='array_record')
  with pytest.raises(UserError, match='tfrecord'):
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path))


def test_a_part_of_each_split_for_a_trial(tmp_path):
  make(folder_of(tmp_path, train=9, val=2), {'train': 4, 'val': 2}, max_examples_per_split=4)
  assert opened(tmp_path, 'train').expected == 4


# ---- The command.


def test_the_command_builds_once_and_again_where_files_have_changed(tmp_path, written, capsys):
  root = folder_of(tmp_path, train=24)
  bad = root / 'manual/train/a/000.mp4'
  bad.write_bytes(b'junk')
  command = ['video_folder/mine', f'--manual_dir={root}/manual', f'--data_dir={root}/tfds']
  build.main(command)
  assert 'train: 23 of 24 examples are in the data; 1 are not' in capsys.readouterr().out
  assert opened(root, 'train').num_examples == 23 and len(written) == 2
  written.clear()
  build.main(command)
  assert 'built already' in capsys.readouterr().out and not written
  write(bad, 3)
  build.main([*command, '--again'])
  assert 'train: 24 of 24 examples' in capsys.readouterr().out and len(written) == 1
  source = opened(root, 'train')
  assert source.num_examples == source.expected == 24


def test_a_variant_needs_a_name_of_its_own(tmp_path):
  root = folder_of(tmp_path, train=1)
  paths = [f'--manual_dir={root}/manual', f'--data_dir={root}/tfds']
  with pytest.raises(UserError, match='--name'):
    build.main(['video_folder/default', '--fps=5', *paths])
  with pytest.raises(UserError, match='is taken'):
    build.main(['video_folder/default', '--name=default', '--fps=5', *paths])
  build.main(['video_folder/default', '--name=slow', '--fps=5', *paths])
  assert opened(root, 'train', 'video_folder/slow').fps.tolist() == [5]
  builder = build.make_builder('kinetics/400', str(root), '400_10fps', {'fps': 10.0})
  assert (builder.builder_config.variant, builder.builder_config.fps) == ('400', 10)


@pytest.mark.parametrize(
  ('dataset', 'message'),
  [
    ('video_foldr/mine', 'close matches: video_folder'),
    ('mnist', 'expected one of'),
    ('kinetics/300', 'kinetics/400'),
    ('kinetics', 'kinetics/400'),
    ('video_folder', 'a name of your own'),
    ('video_folder/a/b', 'other characters'),
  ],
)
def test_unknown_datasets_are_told(tmp_path, dataset, message):
  with pytest.raises(UserError, match=message):
    build.main([dataset, f'--manual_dir={tmp_path}', f'--data_dir={tmp_path}'])


def test_a_source_that_is_not_built_names_the_command(tmp_path):
  for dataset in ('video_folder/default', 'kinetics/600'):
    with pytest.raises(UserError, match=f'python -m data_pipelines.build {dataset} --data_dir='):
      opened(tmp_path, 'train', dataset)
  with pytest.raises(UserError, match=r'is not in .*which has of video_folder: nothing: correct .*build it'):
    opened(tmp_path, 'train')
  for built in ('mime', 'dances'):
    (tmp_path / 'tfds/video_folder' / built).mkdir(parents=True)
  with pytest.raises(UserError, match=r'has of video_folder: dances, mime \(did you mean mime\?\): correct'):
    opened(tmp_path, 'train')
  with pytest.raises(UserError, match=r'has of video_folder: dances, mime: correct'):  # nothing is close
    opened(tmp_path, 'train', 'video_folder/zebra')


def test_beam_runs_the_same_function(tmp_path):
  beam = pytest.importorskip('apache_beam')
  root = folder_of(tmp_path, train=6, val=1)
  here = make(root, {'train': 6, 'val': 1}, num_shards=3)
  config = MediaConfig(name='beam')
  there = make(root, {'train': 6, 'val': 1}, config=config, num_shards=3, beam_runner=beam.runners.DirectRunner())
  assert tfrecords(Path(here.data_dir)) == tfrecords(Path(there.data_dir))
