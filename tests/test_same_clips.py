"""One description of clips: a video is seen alike in a built data set, by evaluation, and as a file, by prediction."""

import itertools
import pathlib

import av
import numpy as np
import pytest

from cover_jax import api
from cover_jax.experiment import build as experiment
from cover_jax.experiment import wire
from data_pipelines import build, sources
from data_pipelines.clips import sampling
from data_pipelines.contract import UserError
from data_pipelines.media import video_files
from data_pipelines.sources import open_tfds
from tests import tiny
from tests.test_video_files import cut_of, grey

SIZE = (36, 60)  # of the files


def picture(number):
  """Red tells the frame, green the column, blue the row."""
  pixels = np.empty((*SIZE, 3), np.uint8)
  pixels[..., 0] = grey(number)
  pixels[..., 1] = np.linspace(20, 235, SIZE[1])
  pixels[..., 2] = np.linspace(20, 235, SIZE[0])[:, None]
  return pixels


def write(path, count, fps):
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mpeg4', rate=fps)
    (stream.height, stream.width), stream.pix_fmt, stream.bit_rate = SIZE, 'yuv420p', 8_000_000
    for i in range(count):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format='rgb24')))
    container.mux(stream.encode())


# {case: (frames, frames a second, settings of the source, frame numbers of evaluation's clips)}
CASES = {
  'a file of twice the rate': (15, 60, {'fps': 30.0, 'test_clips': 2}, [[0, 2, 4, 6], [8, 10, 12, 14]]),
  'a rate that is no multiple': (
    45, 25, {'fps': 12.0, 'stride': 3, 'test_clips': 2}, [[0, 6, 13, 19], [25, 31, 38, 44]]),
  'a slower file repeats frames': (6, 10, {'fps': 30.0, 'stride': 2, 'test_clips': 2}, [[0, 1, 1, 2], [3, 4, 4, 5]]),
  'a short video begins again': (5, 25, {'stride': 2, 'loop': True}, [[0, 2, 4, 1]]),
  'and at another rate': (4, 60, {'fps': 20.0, 'loop': True}, [[0, 3, 2, 1]]),
  'a short video stands still': (5, 25, {'stride': 2}, [[0, 2, 4, 4]]),
  'and at another rate, too': (8, 60, {'fps': 20.0}, [[0, 3, 6, 7]]),
  'part of the short side': (4, 25, {'test_crop_fraction': 0.6}, [[0, 1, 2, 3]]),
  'segments': (10, 60, {'sampler': 'segments', 'fps': 20.0, 'test_crop_fraction': 0.8}, [[1, 3, 6, 8]]),
}  # fmt: skip


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """(the folder of the files, that of the data sets): all files as they are, and one stored at 10 frames a second."""
  root = tmp_path_factory.mktemp('same')
  for case, (count, fps, *_) in CASES.items():
    write(root / f'all/train/a/{case}.mp4', count, fps)
  write(root / 'slow/train/a/long.mp4', 61, 30)
  for name, *options in (('all',), ('slow', '--fps=10')):
    arguments = [f'video_folder/{name}', f'--manual_dir={root / name}', f'--data_dir={root}/tfds', '--workers=1']
    build.main([*arguments, *options])
  return root


def evaluated_and_predicted(root, name, file, **settings):
  """The clips uint8 [V, T, H, W, 3] of evaluation, those of prediction [n, T, H, W, 3], and evaluation's source."""
  config = tiny.config()
  options = {'dataset': f'video_folder/{name}', 'data_dir': f'{root}/tfds', 'test': 'train', **settings}
  config.sources = {'s': {**tiny.config().sources.acts.to_dict(), 'sampler': 'dense', **options}}
  del config.streams['image']
  config.streams.video.sources = ('s',)
  source = open_tfds.open_source('s', config.sources.s.to_dict(), 'test')
  run = experiment.build(config, [source.info])
  (example,) = (i for i, found in enumerate(source.ids) if pathlib.Path(found.decode()).stem == file)
  (batch,) = wire.test_set(run, sources.select(source, np.array([example]))).batches()
  model = api.Model(run, {}, 'nowhere', 0)
  (view,) = model.views
  path = root / name / f'train/a/{file}.mp4'
  return batch['views']['clip'][0], np.stack([w.clip for w in video_files.windows(str(path), [view.cut])]), source


def numbers(clips_VxTxHxWx3):
  return [[round((frame[..., 0].mean() - 16) / 8) for frame in clip] for clip in clips_VxTxHxWx3]


@pytest.mark.parametrize('case', CASES)
def test_evaluation_and_prediction_see_the_same(built, case):
  *_, settings, expected = CASES[case]
  evaluated, predicted, _ = evaluated_and_predicted(built, 'all', case, **settings)
  expected = [[n % 28 for n in clip] for clip in expected]  # as `grey` does
  assert numbers(evaluated) == expected and numbers(predicted) == expected
  # JPEG lies between them; a box that is off by two pixels differs by more.
  assert np.abs(evaluated.astype(int) - predicted).mean() < 3


def test_a_rate_at_which_the_training_videos_were_stored_counts_too(built):
  evaluated, predicted, source = evaluated_and_predicted(built, 'slow', 'long', stride=2, test_clips=3)
  assert source.info.fps == 10 and source.num_frames.tolist() == [21]
  # Evaluation's clips start anywhere in the video, those of prediction follow each other: the first is the same.
  assert numbers(evaluated[:1]) == numbers(predicted[:1]) == [[0, 6, 12, 18]]
  assert np.abs(evaluated[0].astype(int) - predicted[0]).mean() < 3


def test_rates_that_differ_are_no_rate(built):
  _, _, source = evaluated_and_predicted(built, 'all', 'segments')
  assert source.info.fps == 0 and len(set(np.round(source.fps))) > 2


@pytest.mark.parametrize('seed', range(40))
def test_every_window_is_a_dense_clip_from_its_start(monkeypatch, seed):
  """Whatever the rate, windows are the clips that evaluation cuts there, cover the file, and end with it."""
  rng = np.random.default_rng(seed)
  count, length, stride = rng.integers(1, 90), rng.integers(2, 9), rng.integers(1, 5)
  fps, target = rng.choice([10.0, 24.0, 25.0, 29.97, 30.0, 60.0]), rng.choice([0.0, 8.0, 12.0, 25.0, 30.0])
  loop, hop = bool(rng.integers(2)), [None, int(rng.integers(1, 40))][rng.integers(2)]
  step = sampling.step_of(stride, fps, target)
  span = int(sampling.offsets(length, step)[-1])

  def frames(path):
    for i in range(count):
      yield video_files.Frame(i / fps, (2, 2), lambda i=i: np.full((2, 2, 3), i, np.uint8))

  monkeypatch.setattr(video_files, 'frames', frames)
  monkeypatch.setattr(video_files, 'header', lambda path: video_files.Header(fps, count))
  cut = cut_of(length, stride=int(stride), size=(2, 2))._replace(fps=target, loop=loop)
  found = [w.clip[:, 0, 0, 0].tolist() for w in video_files.windows('v', [cut], hop)]
  starts = [clip[0] for clip in found]
  if count <= span + 1:
    assert found == [sampling.dense(count, length, step, loop=loop).tolist()]
    return
  for clip in found:
    assert clip == (clip[0] + sampling.offsets(length, step)).tolist() and clip[-1] < count
  assert starts == sorted(set(starts)) and starts[0] == 0
  # It ends as near to the video's end as a clip can that starts on the grid of the stride.
  assert count - 1 - found[-1][-1] <= int(np.ceil(step))
  wanted = np.floor(step * (max(round(hop / step), 1) if hop else length) + 0.5)
  assert all(b - a <= max(wanted, 1) + 1 for a, b in itertools.pairwise(starts))


def test_a_video_that_says_no_rate_is_refused_where_the_rate_counts(monkeypatch, tmp_path):
  write(tmp_path / 'v.mp4', 6, 25)
  monkeypatch.setattr(video_files, 'header', lambda path: video_files.Header(None, None))
  cut = cut_of(6)._replace(fps=25.0)
  with pytest.raises(UserError, match=r'v\.mp4 does not say at how many frames a second .* looks at 25 a second'):
    list(video_files.windows(str(tmp_path / 'v.mp4'), [cut]))
  for other in (cut_of(6), cut._replace(sampler='segments')):
    assert len(list(video_files.windows(str(tmp_path / 'v.mp4'), [other]))) == 1
  monkeypatch.setattr(video_files, 'header', lambda path: video_files.Header(None, 1))  # a picture has no rate
  assert len(list(video_files.windows(str(tmp_path / 'v.mp4'), [cut]))) == 1
