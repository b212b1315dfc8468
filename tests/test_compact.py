"""The compact tier: the right frames of small mp4s, and decoders that fail without taking the run with them."""

import io
import os
import shutil
import signal
import time

import av
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines import build, sources
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.views import Stream
from data_pipelines.media import compact
from data_pipelines.sources import open_tfds

H, W = 48, 66
CONFIG = {'dataset': 'tiny_test_compact', 'train': 'train'}


def frames(video: int, count: int = 30) -> np.ndarray:
  """Flat frames: red tells the video, green the frame number."""
  pixels = np.empty((count, H, W, 3), np.uint8)
  pixels[..., 0], pixels[..., 1], pixels[..., 2] = 40 + 20 * video, (8 * np.arange(count))[:, None, None], 128
  return pixels


class TinyTestCompact(tfds.core.GeneratorBasedBuilder):
  """Four stored videos of 30 to 33 frames."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {**compact.features(), 'label': tfds.features.ClassLabel(num_classes=4)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(4):
      yield i, compact.values(*compact.encode(frames(i, 30 + i), 25.0)) | {'label': i}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('data')
  tfds.builder('tiny_test_compact', data_dir=path).download_and_prepare()
  return str(path)


@pytest.fixture(scope='module')
def pool():
  return compact.Decoders(1)


def pixels(picture: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(picture)).convert('RGB')).astype(int)


def green(pictures) -> list[int]:
  return [round(pixels(p)[..., 1].mean() / 8) for p in pictures]


@pytest.mark.parametrize('encoder', list(compact._ENCODERS))
def test_any_frames_are_found(encoder, monkeypatch):
  monkeypatch.setattr(compact, '_encoder', lambda: encoder)
  stored, shape = compact.encode(frames(0), 29.97)
  assert shape == (30, H, W)
  rng = np.random.default_rng(0)
  for _ in range(20):
    numbers = np.sort(rng.choice(30, rng.integers(1, 9), replace=False))
    assert green(compact.decode(stored, numbers)) == numbers.tolist()
  assert green(compact.decode(stored, range(30))) == list(range(30))


def test_every_eighth_frame_is_a_key_frame():
  stored, _ = compact.encode(frames(0), 25.0)
  with av.open(io.BytesIO(stored)) as container:
    keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
  assert keys == [i % compact.KEY_GAP == 0 for i in range(30)]


def test_odd_sizes_lose_a_row_and_a_column():
  stored, shape = compact.encode(frames(0)[:, : H - 1, : W - 1], 25.0)
  assert shape == (30, H - 2, W - 2)
  assert pixels(compact.decode(stored, [0])[0]).shape == (H - 2, W - 2, 3)


SIZES = [(1, 1), (1, 64), (64, 1), (3, 3), (2, 5000), (5000, 2), (17, 31)]


@pytest.mark.parametrize('encoder', list(compact._ENCODERS))
@pytest.mark.parametrize('size', SIZES)
def test_frames_of_any_size_are_stored(encoder, size, monkeypatch):
  """A lone row or column is doubled, as encoders want even sides."""
  monkeypatch.setattr(compact, '_encoder', lambda: encoder)
  pictures = (np.full((*size, 3), 30 + 20 * i, np.uint8) for i in range(9))
  stored, shape = compact.encode(pictures, 25.0)
  assert shape == (9, *(max(side // 2 * 2, 2) for side in size))
  for number, picture in zip((0, 5, 8), compact.decode(stored, [0, 5, 8]), strict=True):
    found = pixels(picture)
    assert found.shape == (*shape[1:], 3) and np.abs(found - 30 - 20 * number).max() < 12


def test_a_size_that_no_encoder_takes_is_told():
  with pytest.raises(ValueError, match='cannot encode frames of 70000 x 8 pixels'):
    compact.encode([np.zeros((8, 70000, 3), np.uint8)], 25.0)


@pytest.mark.parametrize('encoder', list(compact._ENCODERS))
@pytest.mark.parametrize('fps', [0, 0.017, 1, 14.9797, 29.97, 119.88, 250.3, 1e-9, 90000.0])
def test_any_rate_can_be_encoded(encoder, fps, monkeypatch):
  """Rates are measured, so they are no round numbers."""
  monkeypatch.setattr(compact, '_encoder', lambda: encoder)
  stored, shape = compact.encode(frames(0)[:3], fps)
  assert shape[0] == 3 and len(compact.decode(stored, [0, 2])) == 2
  if 1 <= fps <= 300:
    assert float(compact.rate(fps)) == pytest.approx(fps, rel=2e-3)


@pytest.mark.parametrize('width', [1, 2, 3, 4, 5])
def test_pictures_are_exact_for_both_readers(width):
  image = np.random.default_rng(width).integers(0, 256, (3, width, 3), np.uint8)
  picture = compact._bmp(image[..., ::-1])
  assert np.array_equal(pixels(picture), image)
  assert np.array_equal(tf.io.decode_image(picture, expand_animations=False).numpy(), image)


def test_real_video_keeps_its_quality(media):
  with av.open(str(media / 'video' / 'k400_arm_wrestling.mp4')) as container:
    original = [f.to_ndarray(format='rgb24') for f, _ in zip(container.decode(video=0), range(40), strict=False)]
  stored, _ = compact.encode(original, 28.0)
  for number, picture in zip((0, 7, 8, 39), compact.decode(stored, [0, 7, 8, 39]), strict=True):
    error = np.mean((pixels(picture) - original[number].astype(int)) ** 2)
    assert 10 * np.log10(255**2 / error) > 33  # dB


def test_a_source_of_stored_videos_gives_the_planned_frames(data_dir):
  source = open_tfds.open_source('c', CONFIG | {'data_dir': data_dir, 'crop_scale': (1, 1)}, 'train')
  assert source.modality == 'video' and sorted(source.num_frames) == [30, 31, 32, 33]
  assert set(source.height) == {H} and set(source.width) == {W}
  streams = {'v': Stream((0,), 4, (H, W), 4)}
  (batch,) = loader.train_batches([source], streams, 0, num_steps=1)
  clip_BxT = batch['v']['views']['clip'][:, :, 8:-8, 8:-8].mean((2, 3))
  assert np.array_equal(np.rint((clip_BxT[..., 0] - 40) / 20), np.repeat(batch['v']['label'][:, None], 4, 1))
  assert (np.diff(np.rint(clip_BxT[..., 1] / 8), axis=1) == 1).all()
  (again,) = loader.train_batches([source], streams, 0, num_steps=1)
  assert np.array_equal(again['v']['views']['clip'], batch['v']['views']['clip'])


def test_tfds_reads_the_same_bytes(data_dir):
  source = open_tfds.open_source('c', CONFIG | {'data_dir': data_dir}, 'train')
  videos = {e['label']: e['video'] for e in tfds.builder('tiny_test_compact', data_dir=data_dir).as_dataset('train')
            .as_numpy_iterator()}  # fmt: skip
  for row, label in zip(source.rows, source.label, strict=True):
    assert source.frames.storage.read(source.frames, row, [0]) == [videos[label]]


def test_a_build_stores_what_the_decoder_finds(media, tmp_path):
  folder = tmp_path / 'mine'
  for name in ('tiny_carphone.mp4', 'odd_66x50_60fps.mov'):
    (folder / 'train' / name.split('_')[0]).mkdir(parents=True)
    shutil.copy(media / 'video_edge' / name, folder / 'train' / name.split('_')[0] / name)
  opened = {}
  for storage in ('jpeg', 'mp4'):
    options = [f'--manual_dir={folder}', f'--data_dir={tmp_path}', f'--storage={storage}', '--workers=1']
    build.main([f'video_folder/{storage}', *options])
    config = {'dataset': f'video_folder/{storage}', 'data_dir': str(tmp_path), 'train': 'train'}
    opened[storage] = open_tfds.open_source(storage, config, 'train')
  frames, whole = opened['jpeg'], opened['mp4']
  for key in ('ids', 'label', 'num_frames', 'height', 'width', 'fps'):
    assert np.array_equal(getattr(frames, key), getattr(whole, key)), key
  for example, count in enumerate(frames.num_frames):
    numbers = np.array([0, count // 2, count - 1])
    pairs = zip(sources.read(frames, example, numbers), sources.read(whole, example, numbers), strict=True)
    assert max(np.abs(pixels(a) - pixels(b)).mean() for a, b in pairs) < 8
  reach = lambda source: sum(os.path.getsize(f) for f in source.frames.files)
  assert reach(whole) < reach(frames) / 3


# What goes wrong.


def test_broken_videos_and_missing_frames_are_told(pool):
  stored, _ = compact.encode(frames(0), 25.0)
  with pytest.raises(compact.BrokenVideo, match='holds 30 frames, frame 30'):
    pool(stored, [0, 30])
  for broken in (b'', b'no video', stored[: len(stored) // 2]):
    with pytest.raises(compact.BrokenVideo):
      pool(broken, [0])
  assert green(pool(stored, [3])) == [3]  # the same process goes on


def test_a_crash_or_a_hang_costs_one_clip(monkeypatch):
  pool = compact.Decoders(1, timeout=20)
  stored, _ = compact.encode(frames(0), 25.0)
  assert green(pool(stored, [5])) == [5]
  process = pool._idle.queue[0]._process
  process.send_signal(signal.SIGSEGV)
  process.wait()
  with pytest.raises(compact.BrokenVideo, match='crashed'):
    pool(stored, [5])
  assert green(pool(stored, [6])) == [6]  # a new process

  process = pool._idle.queue[0]._process
  process.send_signal(signal.SIGSTOP)
  pool._timeout = 0.2
  begin = time.monotonic()
  with pytest.raises(compact.BrokenVideo, match=r'no answer in 0\.2 s'):
    pool(stored, [5])
  assert time.monotonic() - begin < 5 and process.poll() is not None
  pool._timeout = 20
  assert green(pool(stored, [7])) == [7]


def test_a_broken_example_ends_the_run_with_its_name(data_dir, tmp_path):
  source = open_tfds.open_source('c', CONFIG | {'data_dir': data_dir}, 'train')

  def fail(video, numbers):
    raise compact.BrokenVideo('its decoder crashed (exit code -11)')

  object.__setattr__(source, 'decode', fail)
  with pytest.raises(UserError, match=r"example \d of source 'c' cannot be decoded \(its decoder crashed"):
    next(loader.train_batches([source], {'v': Stream((0,), 2, 16, 4)}, 0))


def test_decoders_end_with_their_owner(pool):
  stored, _ = compact.encode(frames(0), 25.0)
  own = compact.Decoders(1)
  own(stored, [0])
  process = own._idle.queue[0]
  process._connection.close()
  assert process._process.wait(timeout=20) == 0
  assert os.getpid() != process._process.pid
