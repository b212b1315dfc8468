"""Official lists of several labels a clip, and lists of one's own: read as they are, built, refused in one sentence."""

import csv

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import build, contract, inspect
from data_pipelines.builders import annotations_of_several as readers
from data_pipelines.builders import crowds_rendering, folders
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.views import Stream
from data_pipelines.sources import label_sets, open_tfds
from tests import miniature
from tests.test_video_files import write

READERS = {
  'charades/v1': readers.charades,
  'multi_moments_in_time/v1': lambda d: readers.multi_moments_in_time(d, 'v1'),
  'multi_moments_in_time/v2': lambda d: readers.multi_moments_in_time(d, 'v2'),
}


@pytest.mark.parametrize('dataset', READERS)
def test_miniature_is_read_as_it_was_made(dataset, media, tmp_path):
  made = miniature.OF_SEVERAL[dataset](media, tmp_path)
  read = READERS[dataset](tmp_path)
  assert list(read.splits) == list(made)
  for split, items in made.items():
    for item, clip in zip(items, read.splits[split], strict=True):
      assert (clip.id, clip.video_id, clip.label) == (item.id, item.video_id, item.label)
      assert (clip.path is None) == (item.state == 'missing')
      name, _, line = clip.line.partition(':')
      (file,) = tmp_path.rglob(name)
      assert item.id in file.read_text().splitlines()[int(line) - 1]
  assert len(read.class_names) == {'charades/v1': 157, 'multi_moments_in_time/v1': 313}.get(dataset, 292)
  if dataset == 'charades/v1':
    train = 'Charades_v1_train.csv: 2 clips have none of the classes; 1 actions are of a class that their clip has'
    assert read.notes[0].startswith(train)
  else:
    assert read.notes == () and read.class_names[7] == ('cooking' if dataset.endswith('v1') else 'thing 7')


BROKEN = {
  'class beyond': ('charades', 'Charades_v1_train.csv', 'c147 0.00', 'c157 0.00', r"train.csv:2: 'c157 .*c000 to c156"),
  'no interval': (
    'charades',
    'Charades_v1_test.csv',
    'c147 0.00 12.60',
    'c147',
    r"test.csv:2: 'c147' is not an action",
  ),
  'backwards': ('charades', 'Charades_v1_test.csv', '11.90 21.20', '21.20 11.90', 'ends before it starts'),
  'column': (
    'charades',
    'Charades_v1_train.csv',
    ',actions,',
    ',action,',
    'train.csv:1: .*expected actions among them',
  ),
  'twice': ('charades', 'Charades_v1_train.csv', 'TR1Q9', 'TR0Q9', 'lists the clip .TR0Q9. twice'),
  'other classes': (
    'charades',
    'Charades_v1_classes.txt',
    'c156 Doing thing 156\n',
    '',
    'names 156 classes; expected 157',
  ),
  'renumbered': (
    'charades',
    'Charades_v1_classes.txt',
    'c003',
    'c033',
    r'classes.txt:4: .*is not class 3; expected c003',
  ),
  'label beyond': (
    'mmit',
    'trainingSet.csv',
    '312,0',
    '313,0',
    r'Set.csv:1: label .313. is no class; expected 0 to 312',
  ),
  'a name': ('mmit', 'trainingSet.csv', ',7\n', ',cooking\n', "Set.csv:2: label 'cooking' is no class"),
  'no label': ('mmit', 'validationSet.csv', ',7\n', '\n', 'Set.csv:2: .*is not a clip; expected file.mp4 and'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_list_is_refused_in_one_sentence(name, media, tmp_path):
  kind, file, before, after, message = BROKEN[name]
  if kind == 'charades':
    miniature.charades(media, tmp_path)
  else:
    miniature.multi_moments_in_time(media, tmp_path)
  (path,) = tmp_path.rglob(file)
  text = path.read_bytes().decode()
  assert before in text
  path.write_bytes(text.replace(before, after, 1).encode())
  with pytest.raises(UserError, match=message):
    READERS['charades/v1' if kind == 'charades' else 'multi_moments_in_time/v1'](tmp_path)


def test_a_class_list_of_another_version_and_labels_that_come_twice(media, tmp_path):
  miniature.multi_moments_in_time(media, tmp_path, 'v2')
  with pytest.raises(UserError, match=r'moments_categories.txt names 292 classes; expected 313'):
    READERS['multi_moments_in_time/v1'](tmp_path)
  (tmp_path / 'moments_categories.txt').unlink()
  with pytest.raises(UserError, match=r'has no moments_categories\.txt'):
    READERS['multi_moments_in_time/v2'](tmp_path)
  path = tmp_path / 'trainingSet.csv'
  path.write_text(path.read_text().replace('200,150,3', '200,150,3,150', 1))
  read = READERS['multi_moments_in_time/v1'](tmp_path)
  assert read.notes == ('trainingSet.csv: 1 labels come twice in a row, and count once',)
  assert read.splits['train'][2].label == (3, 150, 200)


@pytest.fixture(scope='module')
def built(media, tmp_path_factory):
  root = tmp_path_factory.mktemp('charades')
  made = miniature.charades(media, root / 'manual')
  build.main(['charades/v1', f'--manual_dir={root / "manual"}', f'--data_dir={root / "tfds"}', '--workers=2'])
  return root / 'tfds', made


def test_what_is_built_is_what_the_lists_say(built, capsys):
  data_dir, made = built
  for split, items in made.items():
    config = {'dataset': 'charades/v1', 'data_dir': str(data_dir), 's': split}
    source = open_tfds.open_source('x', config, 's')
    assert source.info.labels == 'several' and len(source.class_names) == 157 and set(source.label) == {-1}
    whole = {i.id: i.label for i in items if i.state == 'whole'}
    assert source.expected == len(items) and source.num_examples == len(whole) and () in whole.values()
    found = {i.decode(): tuple(label_sets.of(source.labels, n).tolist()) for n, i in enumerate(source.ids)}
    assert found == whole and source.labelled_N.all()
    unlabelled = open_tfds.open_source('x', config | {'label_key': None}, 's')
    assert unlabelled.class_names == () and unlabelled.info.labels == 'one'
  # What TensorFlow Datasets itself makes of it.
  read = tfds.builder('charades/v1', data_dir=data_dir).as_dataset(
    'train', decoders={'video': tfds.decode.SkipDecoding()}
  )
  assert {e['id'].decode(): tuple(e['labels'].tolist()) for e in tfds.as_numpy(read)} == {
    i.id: i.label for i in made['train'] if i.state == 'whole'
  }
  (described, *_) = inspect.open_splits('charades/v1', str(data_dir)).values()
  text = '\n'.join(inspect.describe(described))
  assert 'labels an example' in text and 'none of the classes' in text
  assert 'Doing thing 92, Doing thing 147' in {inspect._caption(described, i).split(' | ')[2] for i in range(4)}


# ---- Lists of one's own.


def folder_of(root, text, name='train.txt', classes=None):
  root.mkdir(parents=True, exist_ok=True)
  for stem in ('a', 'b b', 'c'):
    write(root / f'{stem}.mp4', 3)
  (root / name).write_text(text)
  if classes:
    (root / 'classes.txt').write_text(classes)
  return root


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('train.txt', 'a.mp4 dog cat\nb b.mp4\nc.mp4 -1\n'),
    ('train.csv', 'path,labels\na.mp4,dog,cat\nb b.mp4\nc.mp4,-1\n'),
    ('train.csv', '"a.mp4",dog,cat\n"b b.mp4",,\nc.mp4,-1,\n'),
    ('train.tsv', 'a.mp4\tcat\tdog\nb b.mp4\nc.mp4\t-1\n'),
    ('train.txt', 'a.mp4;cat;dog\nb b.mp4\nc.mp4;-1\n'),
  ],
)
def test_lists_of_several_labels(name, text, tmp_path):
  listing = folders.list_folder(folder_of(tmp_path, text, name), {'.mp4'}, 'video', 'several')
  assert listing.class_names == ('cat', 'dog')
  assert [(c.id, c.label) for c in listing.splits['train']] == [('a.mp4', (0, 1)), ('b b.mp4', ()), ('c.mp4', (-1,))]
  assert all(c.path for c in listing.splits['train'])
  assert listing.notes == ('train: of 3 files 1 have none of the classes, 1 are unlabelled',)


def test_numbers_as_labels(tmp_path):
  text = 'a.mp4 2 0\nb b.mp4\nc.mp4 -1\n'
  listing = folders.list_folder(folder_of(tmp_path, text), {'.mp4'}, 'video', 'several')
  assert listing.class_names == ('0', '1', '2')
  assert [c.label for c in listing.splits['train']] == [(0, 2), (), (-1,)]


@pytest.mark.parametrize(
  ('text', 'classes', 'message'),
  [
    ('a.mp4 cat\nc.mp4 dog cat dog\n', None, "train.txt:2: label 'dog' comes twice"),
    ('a.mp4 cat -1\n', None, 'train.txt:1: label -1, for an unlabelled clip, stands beside others'),
    ('a.mp4 cat\nc.mp4 bird cat\n', 'cat\ndog\n', "train.txt:2: label 'bird' is none of the 2 classes"),
    ('a.mp4 0 3\n', 'cat\ndog\n', "train.txt:1: label '3' is none of the 2 classes"),
    ('a.mp4 cat\nc.mp4 3\n', None, "train.txt:2: label '3' is a number, most are not|label 'cat' is a name"),
    ('a.mp4 cat\nnothing here\n', None, r"train.txt:2: 'nothing here' is not `path label label ...`"),
  ],
)
def test_lists_that_are_refused(text, classes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    folders.list_folder(folder_of(tmp_path, text, classes=classes), {'.mp4'}, 'video', 'several')


def test_several_labels_must_be_asked_for_and_need_a_list(tmp_path):
  root = folder_of(tmp_path / 'lists', 'a.mp4 dog cat\n')
  with pytest.raises(UserError, match=r'no third column|is not `path label`'):
    folders.list_folder(folder_of(tmp_path / 'more', 'a.mp4,dog,cat\nc.mp4,dog,cat\n'), {'.mp4'}, 'video')
  (root / 'train.txt').unlink()
  with pytest.raises(UserError, match='folders cannot say several labels'):
    folders.list_folder(root, {'.mp4'}, 'video', 'several')
  with pytest.raises(UserError, match='--labels is for folders of your own'):
    build.make_builder('kinetics/400', None, 'mine', {'labels': 'several'})


def test_a_folder_of_ones_own_is_built(tmp_path, capsys):
  root = folder_of(tmp_path / 'manual', 'a.mp4 dog cat\nb b.mp4\nc.mp4 -1\n')
  where = [f'--manual_dir={root}', f'--data_dir={tmp_path / "tfds"}', '--workers=1']
  build.main(['video_folder/tags', '--labels=several', *where])
  assert 'of 3 files 1 have none of the classes, 1 are unlabelled' in capsys.readouterr().out
  source = open_tfds.open_source(
    'x', {'dataset': 'video_folder/tags', 'data_dir': str(tmp_path / 'tfds'), 's': 'train'}, 's'
  )
  found = {i.decode(): label_sets.of(source.labels, n).tolist() for n, i in enumerate(source.ids)}
  assert found == {'a.mp4': [0, 1], 'b b.mp4': [], 'c.mp4': [-1]} and source.class_names == ('cat', 'dog')
  assert source.labelled_N.sum() == 2
  with open(next((tmp_path / 'tfds').rglob('failures.csv')), newline='') as f:
    assert list(csv.DictReader(f)) == []


# ---- The embedded data, and what TensorFlow Datasets gives.


def test_crowds_are_drawn_again_and_have_the_digits_that_they_say():
  examples = [crowds_rendering.render('test', i) for i in range(40)]
  again = crowds_rendering.render('test', 7)
  assert np.array_equal(again.frames, examples[7].frames) and again.labels == examples[7].labels
  assert [len(e.labels) for e in examples] == [i % 5 for i in range(40)]
  assert all(len(set(e.labels)) == len(e.labels) and e.frames.shape[1:] == (32, 32, 3) for e in examples)
  count = np.bincount([k for e in examples for k in e.labels], minlength=10)
  assert (count > 0).all()
  ink = lambda e: np.mean(e.frames.max(axis=(0, 3)) > 120)
  assert max(ink(e) for e in examples if not e.labels) < 0.02 < min(ink(e) for e in examples if e.labels)
  with pytest.raises(IndexError, match='320 examples'):
    crowds_rendering.render('test', 320)
  with pytest.raises(UserError, match="Unknown split 'val'"):
    crowds_rendering.render('val', 0)


class TinyTestTags(tfds.core.GeneratorBasedBuilder):
  """Three features of several labels, of which one has a label twice and one a -1 beside others."""

  VERSION = tfds.core.Version('1.0.0')
  LISTS = ((2, 0), (), (1,), (1, 2, 1), (-1,))

  def _info(self):
    of = lambda: tfds.features.Sequence(tfds.features.ClassLabel(names=['a', 'b', 'c']))
    features = {'image': tfds.features.Image(shape=(4, 4, 3)), 'tags': of(), 'others': of(), 'label': np.int64}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, tags in enumerate(self.LISTS):
      image = np.full((4, 4, 3), i, np.uint8)
      yield i, {'image': image, 'tags': tags, 'others': (0, -1) if i == 2 else tags, 'label': i}


def test_features_of_any_number_of_labels(tmp_path, caplog):
  tfds.builder('tiny_test_tags', data_dir=tmp_path).download_and_prepare()
  config = {'dataset': 'tiny_test_tags', 'data_dir': str(tmp_path), 's': 'train'}
  with caplog.at_level('INFO'):
    source = open_tfds.open_source('x', config | {'label_key': 'tags'}, 's')
  assert '1 labels twice' in caplog.text
  order = source.frames.columns['label'][source.rows]
  found = {int(i): tuple(label_sets.of(source.labels, n).tolist()) for n, i in enumerate(order)}
  assert found == {i: tuple(sorted(set(tags))) for i, tags in enumerate(TinyTestTags.LISTS)}
  assert open_tfds.open_source('x', config | {'s': 'train[:2]', 'label_key': 'tags'}, 's').labelled_N.shape == (2,)
  with pytest.raises(UserError, match="1 examples whose 'others' hold -1, for unlabelled, beside other labels"):
    open_tfds.open_source('x', config | {'label_key': 'others'}, 's')
  with pytest.raises(UserError, match=r"ClassLabel features tags, others; label_key is ''"):
    open_tfds.open_source('x', config, 's')


def test_batches_of_the_loader_say_every_label(tmp_path):
  tfds.builder('tiny_test_tags', data_dir=tmp_path).download_and_prepare()
  config = {'dataset': 'tiny_test_tags', 'data_dir': str(tmp_path), 's': 'train', 'label_key': 'tags'}
  source = open_tfds.open_source('x', config, 's')
  stream = Stream((0,), 1, 4, 5, label_width=3)
  (batch,) = loader.train_batches([source], {'v': stream}, 0, num_steps=1)
  shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape(batch['v']) == contract.shapes(5, {'clip': 1}, (4, 4), labels=3)
  evaluated = list(loader.eval_batches(source, 0, stream, 4))
  assert [b['mask'].tolist() for b in evaluated] == [[True] * 4, [True] + [False] * 3]
  for sub in (batch['v'], *evaluated):
    for example, mask, label, labels in zip(*(sub[k] for k in ('example_id', 'mask', 'label', 'labels')), strict=True):
      classes = label_sets.of(source.labels, example) if mask else [-1]
      want = [-1] * 3 if -1 in classes else [int(k in classes) for k in range(3)]
      assert label == -1 and labels.tolist() == want
