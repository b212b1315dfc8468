"""The embedded datasets: determinism, honest splits, balance, and the symmetry of the pairs of `motions`."""

import collections
import subprocess
import sys
import zlib

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from data_pipelines.builders import digits_drawing as drawing
from data_pipelines.builders import digits_rendering as rendering
from data_pipelines.contract import UserError

CONFIGS = ('digits', 'objects', 'motions', 'moments')
N_PAIRS = len(rendering.MOTIONS) // 2


def middles(n, segments=8):
  """Frame numbers at the middle of equal segments."""
  return (np.arange(segments) + 0.5) * n // segments


def middle_frames(frames, segments=8):
  return frames[middles(len(frames), segments).astype(int)]


# ---- Every config.


# Hashes of pixels before JPEG: any Pillow gives these, and so must any NumPy.
@pytest.mark.parametrize(
  ('config', 'split', 'index', 'n', 'crc'),
  [
    ('digits', 'train', 1234, 1, 793584400),
    ('objects', 'train', 32, 20, 3743434904),
    ('motions', 'test', 77, 12, 122903087),
    ('moments', 'validation', 145, 12, 957692722),
  ],
)
def test_golden_pixels(config, split, index, n, crc):
  frames = rendering.render(config, split, index).frames
  assert len(frames) == n
  assert zlib.crc32(frames.tobytes()) == crc


@pytest.mark.parametrize('config', CONFIGS)
def test_an_example_depends_on_nothing_but_its_name(config):
  forwards = [rendering.render(config, 'train', i) for i in range(12)]
  backwards = [rendering.render(config, 'train', i) for i in reversed(range(12))]
  for a, b in zip(forwards, reversed(backwards), strict=True):
    assert a.label == b.label and a.digits == b.digits
    np.testing.assert_array_equal(a.frames, b.frames)
  other_split = rendering.render(config, 'test', 0).frames
  pictures = {e.frames.tobytes() for e in forwards} | {other_split.tobytes()}
  assert len(pictures) == 13


@pytest.mark.parametrize('config', CONFIGS)
def test_shapes_and_lengths(config):
  lengths = set()
  for index in range(60):
    example = rendering.render(config, 'validation', index)
    n, *shape = example.frames.shape
    assert shape == [32, 32, 3] and example.frames.dtype == np.uint8
    assert 0 <= example.label < len(rendering.class_names(config))
    assert np.ptp(example.frames) > 60  # something is to be seen
    lengths.add(n)
  if config == 'digits':
    assert lengths == {1}
  else:
    assert lengths <= set(range(12, 25, 2)) and len(lengths) >= 5


def test_the_scans_of_the_splits_are_disjoint_and_stratified():
  per_split = {s: drawing.scan_numbers(s) for s in rendering.SPLITS}
  everything = np.concatenate([np.concatenate(numbers) for numbers in per_split.values()])
  np.testing.assert_array_equal(np.sort(everything), np.arange(1797))
  assert [len(n) for n in per_split['test']] == [35] * 10
  assert [len(n) for n in per_split['validation']] == [28] * 10
  assert min(len(n) for n in per_split['train']) >= 110
  targets = drawing.load_digits().target
  for numbers in per_split.values():
    for digit in range(10):
      assert set(targets[numbers[digit]]) == {digit}


@pytest.mark.parametrize('config', CONFIGS)
def test_a_split_is_drawn_from_its_own_scans_only(config, monkeypatch):
  asked = []
  original = drawing.scan_numbers
  monkeypatch.setattr(drawing, 'scan_numbers', lambda split: asked.append(split) or original(split))
  rendering.render(config, 'test', 3)
  assert set(asked) == {'test'}


def test_evaluation_of_digits_shows_each_scan_once():
  for split in ('validation', 'test'):
    n_scans = sum(map(len, drawing.scan_numbers(split)))
    assert rendering.num_examples('digits', split) == n_scans


@pytest.mark.parametrize('config', CONFIGS)
def test_classes_are_balanced(config, monkeypatch):
  monkeypatch.setattr(drawing, 'film', lambda n, *_: np.zeros((n, 1, 1, 3), np.uint8))  # labels need no pixels
  monkeypatch.setattr(rendering, '_clutter', lambda *_: None)
  n_classes = len(rendering.class_names(config))
  for split in rendering.SPLITS:
    n_examples = rendering.num_examples(config, split)
    labels = [rendering.render(config, split, i).label for i in range(n_examples)]
    counts = np.bincount(labels, minlength=n_classes)
    assert len(counts) == n_classes
    assert np.ptp(counts) <= (1 if split == 'train' else 0)


def test_sizes_are_as_those_of_the_datasets_they_stand_for():
  sizes = [rendering.num_examples(c, 'train') for c in ('objects', 'motions', 'moments', 'digits')]
  np.testing.assert_allclose(np.array(sizes) / sizes[0], [1, 0.7, 3, 5])


def test_an_objects_label_names_the_digit_that_is_shown():
  for index in range(60):
    example = rendering.render('objects', 'test', index)
    assert rendering.class_names('objects')[example.label].startswith(f'{example.digits[0]} ')


def test_digits_are_legible():
  def pixels_and_labels(split, n):
    examples = [rendering.render('digits', split, i) for i in range(n)]
    grey = np.stack([e.frames[0] for e in examples]).astype(np.float32).mean(-1)
    pixels = grey.reshape(n, 16, 2, 16, 2).mean((2, 4)).reshape(n, -1)
    pixels = (pixels - pixels.mean(1, keepdims=True)) / pixels.std(1, keepdims=True)
    return pixels, [e.label for e in examples]

  model = SVC(C=10).fit(*pixels_and_labels('train', 1200))
  assert model.score(*pixels_and_labels('test', 350)) > 0.92


@pytest.mark.parametrize(
  ('call', 'words'),
  [
    (lambda: rendering.render('motion', 'train', 0), ("'motion'", 'motions')),
    (lambda: rendering.render('motions', 'val', 0), ("'val'", 'validation')),
    (lambda: rendering.num_examples('mnist', 'train'), ("'mnist'", 'digits')),
    (lambda: rendering.class_names('mnist'), ("'mnist'", 'digits')),
  ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(call, words):
  with pytest.raises(UserError) as error:
    call()
  assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize('index', [-1, 320])
def test_there_is_no_example_beyond_the_last(index):
  with pytest.raises(IndexError, match='320 examples'):
    rendering.render('motions', 'test', index)


def test_rendering_needs_no_tensorflow():
  code = (
    "import sys; sys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None\n"
    'from data_pipelines.builders import digits_rendering as r\n'
    "print(r.render('moments', 'train', 0).frames.shape)"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip().endswith('32, 32, 3)')


# ---- motions: what no frame and no bag of frames can tell.


@pytest.mark.parametrize('pair', range(N_PAIRS))
def test_a_pair_shows_the_same_frames_in_another_order(pair):
  for index in range(6):
    first = rendering.render_motion(2 * pair, digit=index, split='train', index=index)
    second = rendering.render_motion(2 * pair + 1, digit=index, split='train', index=index)
    assert (first.label, second.label) == (2 * pair, 2 * pair + 1)
    jpegs, jpegs_of_second = ([rendering.encode_jpeg(f) for f in e.frames] for e in (first, second))
    assert jpegs != jpegs_of_second
    assert collections.Counter(jpegs) == collections.Counter(jpegs_of_second)
    # What an evaluation at the middles of 8 or 4 segments sees is the same set as well.
    for segments in (8, 4):
      seen, seen_of_second = (middle_frames(e.frames, segments) for e in (first, second))
      assert sorted(f.tobytes() for f in seen) == sorted(f.tobytes() for f in seen_of_second)
      assert not np.array_equal(seen, seen_of_second)


def test_a_dataset_example_is_a_motion_of_its_own_label():
  for index in (0, 17, 200):
    example = rendering.render('motions', 'train', index)
    again = rendering.render_motion(example.label, example.digits[0], 'train', index)
    np.testing.assert_array_equal(example.frames, again.frames)


@pytest.mark.parametrize('split', rendering.SPLITS)
def test_a_motion_says_nothing_about_the_digit(split, monkeypatch):
  monkeypatch.setattr(drawing, 'film', lambda n, *_: np.zeros((n, 1, 1, 3), np.uint8))  # needs no pixels
  n_examples = rendering.num_examples('motions', split)
  examples = [rendering.render('motions', split, i) for i in range(n_examples)]
  table = np.zeros((16, 10), int)
  np.add.at(table, ([e.label for e in examples], [e.digits[0] for e in examples]), 1)
  assert table.min() > 0
  assert (table == table[0]).all()


def frame_features(frames_nxHxWx3):
  """Per frame: a coarse picture, row and column profiles, brightness histogram, orientation: float [n, f]."""
  grey = frames_nxHxWx3.astype(np.float32).mean(-1) / 255
  grey = grey - np.median(grey)
  n = len(grey)
  coarse = grey.reshape(n, 8, 4, 8, 4).mean((2, 4)).reshape(n, -1)
  ink = np.maximum(grey - 0.15, 0) + 1e-6
  mass = ink.sum((1, 2))
  pixel = np.arange(32) / 32
  x, y = (ink.sum(1) * pixel).sum(1) / mass, (ink.sum(2) * pixel).sum(1) / mass
  dx, dy = pixel[None, None] - x[:, None, None], pixel[None, :, None] - y[:, None, None]
  moments = [(ink * m).sum((1, 2)) / mass for m in (dx**2, dy**2, dx * dy)]
  histogram = np.stack([np.histogram(g, bins=8, range=(-0.2, 1))[0] / g.size for g in grey])
  return np.concatenate([coarse, histogram, np.stack([mass / 100, x, y, *moments], 1)], axis=1)


def unordered(features_nxF):
  ordered_in_value = np.sort(features_nxF, axis=0)
  return np.concatenate([ordered_in_value.ravel(), features_nxF.mean(0), features_nxF.std(0)])


def ordered(features_nxF):
  return np.concatenate([features_nxF.ravel(), features_nxF.mean(0), features_nxF.std(0)])


@pytest.fixture(scope='module')
def motion_features():
  """Features at the 8 segment middles: (train [N, 8, F], labels, test [M, 8, F], labels); no two share a scene."""

  def of_split(split, n_examples):
    examples = [rendering.render_motion(i % 16, i // 16 % 10, split, i) for i in range(n_examples)]
    features = np.stack([frame_features(middle_frames(e.frames)) for e in examples])
    return features, np.array([e.label for e in examples])

  return *of_split('train', 1600), *of_split('test', 800)


@pytest.mark.parametrize(
  'model',
  [
    pytest.param(
      lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=60, tol=1e-2)),
      marks=pytest.mark.slow,
    ),
    pytest.param(lambda: ExtraTreesClassifier(60, min_samples_leaf=2, random_state=0), marks=pytest.mark.slow),
  ],
  ids=['linear', 'trees'],
)
def test_shuffled_frames_leave_a_model_at_chance_within_a_pair(motion_features, model):
  train, train_labels, test, test_labels = motion_features
  accuracy = {}
  for view in (unordered, ordered):
    train_view, test_view = (np.stack([view(f) for f in features]) for features in (train, test))
    right = 0
    for pair in range(N_PAIRS):
      chosen, asked = train_labels // 2 == pair, test_labels // 2 == pair
      fitted = model().fit(train_view[chosen], train_labels[chosen])
      right += (fitted.predict(test_view[asked]) == test_labels[asked]).sum()
    accuracy[view] = right / len(test_labels)
  chance_interval = 3.29 * np.sqrt(0.25 / len(test_labels))  # 99.9 % of a fair coin's outcomes
  assert abs(accuracy[unordered] - 0.5) < chance_interval, accuracy
  assert accuracy[ordered] > 0.75, accuracy


def test_shuffled_frames_do_tell_the_pairs_apart(motion_features):
  """The features above are not blind: without order they name the pair, if not which of the two."""
  train, train_labels, test, test_labels = motion_features
  model = ExtraTreesClassifier(60, min_samples_leaf=2, random_state=0)
  model.fit(np.stack([unordered(f) for f in train]), train_labels // 2)
  assert model.score(np.stack([unordered(f) for f in test]), test_labels // 2) > 0.6


# ---- The TFDS builders.


@pytest.mark.parametrize('config', CONFIGS)
def test_a_built_dataset_holds_the_rendered_jpegs(config, tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  import data_pipelines.builders  # noqa: F401  registers the builders

  builder = tfds.builder('digits' if config == 'digits' else f'moving_digits/{config}', data_dir=tmp_path)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(max_examples_per_split=40))
  assert tuple(builder.info.features['label'].names) == rendering.class_names(config)
  pixels = 'image' if config == 'digits' else 'video'
  for split in rendering.SPLITS:
    stored = list(tfds.as_numpy(builder.as_dataset(split, decoders={pixels: tfds.decode.SkipDecoding()})))
    assert len(stored) == 40
    for index, record in enumerate(stored):
      example = rendering.render(config, split, index)
      assert record['label'] == example.label
      assert list(np.atleast_1d(record[pixels])) == [rendering.encode_jpeg(f) for f in example.frames]
  decoded = next(iter(tfds.as_numpy(builder.as_dataset('test'))))[pixels]
  rendered = rendering.render(config, 'test', 0).frames.reshape(decoded.shape)
  # Faithful but for JPEG's rounding.
  assert np.abs(decoded.astype(int) - rendered).mean() < 8


@pytest.mark.parametrize('config', CONFIGS)
def test_a_builder_generates_every_example_of_a_split(config, monkeypatch, tmp_path):
  tfds = pytest.importorskip('tensorflow_datasets')
  import data_pipelines.builders  # noqa: F401  registers the builders

  blank = rendering.Example(np.zeros((1, 32, 32, 3), np.uint8), 0, (0,))
  monkeypatch.setattr(rendering, 'render', lambda *_: blank)
  monkeypatch.setattr(rendering, 'encode_jpeg', lambda _: b'')
  builder = tfds.builder('digits' if config == 'digits' else f'moving_digits/{config}', data_dir=tmp_path)
  for split, examples in builder._split_generators(None).items():
    assert [key for key, _ in examples] == list(range(rendering.num_examples(config, split)))


def test_the_video_sets_are_configs_of_one_builder():
  tfds = pytest.importorskip('tensorflow_datasets')
  import data_pipelines.builders  # noqa: F401  registers the builders

  configs = tfds.builder_cls('moving_digits').builder_configs
  assert set(configs) == {'objects', 'motions', 'moments'}
  for config in configs:
    assert tfds.builder(f'moving_digits/{config}').info.features['label'].num_classes == len(
      rendering.class_names(config)
    )
