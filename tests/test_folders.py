"""Folders of one's own: every layout that is promised, and a sentence for those that are none."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.builders.folders import list_folder
from data_pipelines.builders.listing import VIDEO_EXTENSIONS, Listing
from data_pipelines.contract import UserError


def lay(root, *files, **lists):
  """Empty files, and lists {name with _ for the last dot: text}."""
  for file in files:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(b'')
  for name, text in lists.items():
    (root / '.'.join(name.rsplit('_', 1))).write_text(text)


def listed(root):
  """{split: {id: class name}}, and the classes."""
  found = list_folder(root, VIDEO_EXTENSIONS, 'video')
  names = (*found.class_names, None)
  return {s: {c.id: names[c.label] for c in clips} for s, clips in found.splits.items()}, found.class_names


def test_a_folder_for_each_split_and_class(tmp_path):
  lay(tmp_path, 'train/run/a.mp4', 'train/jump/b c.webm', 'val/run/a.MP4', 'val/sit/x.avi')
  lay(tmp_path, 'README.md', 'train/run/notes.txt', 'train/run/._a.mp4', '.cache/x/y.mp4')
  splits, names = listed(tmp_path)
  assert names == ('jump', 'run', 'sit')
  assert splits == {
    'train': {'run/a.mp4': 'run', 'jump/b c.webm': 'jump'},
    'val': {'run/a.MP4': 'run', 'sit/x.avi': 'sit'},
  }
  clip = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['val'][1]
  assert clip.path == str(tmp_path / 'val/sit/x.avi') and clip.video_id == 'val/sit/x.avi' and clip.line == ''


def test_class_folders_alone_are_all_training(tmp_path):
  lay(tmp_path, 'train/a.mp4', 'car/b.mp4', 'car/c.mp4')  # trains and cars
  splits, names = listed(tmp_path)
  assert names == ('car', 'train')
  assert splits == {'train': {'car/b.mp4': 'car', 'car/c.mp4': 'car', 'train/a.mp4': 'train'}}


def test_files_without_class_folders_are_unlabelled(tmp_path):
  lay(tmp_path, 'train/a.mp4', 'test/b.mp4')
  assert listed(tmp_path) == ({'train': {'a.mp4': None}, 'test': {'b.mp4': None}}, ())
  lay(tmp_path / 'flat', 'a.mp4', 'b.mp4')
  assert listed(tmp_path / 'flat') == ({'train': {'a.mp4': None, 'b.mp4': None}}, ())


@pytest.mark.parametrize('separator', ['\t', ',', ' ', ', ', '  '])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_lists_as_other_codebases_have_them(tmp_path, separator, end):
  lay(tmp_path, 'x/a.mp4', 'a b, c.mp4')
  rows = [('x/a.mp4', '1'), ('a b, c.mp4', '0'), ('x/gone.mp4', '2')]
  (tmp_path / 'kinetics_train_list_videos.txt').write_bytes(
    ''.join(f'{path}{separator}{label}{end}' for path, label in rows).encode()
  )
  lay(tmp_path, val_csv='x/a.mp4 1\n', classes_txt='zebra\nape\ncat\n')
  splits, names = listed(tmp_path)
  assert names == ('zebra', 'ape', 'cat')
  assert splits['train'] == {'x/a.mp4': 'ape', 'a b, c.mp4': 'zebra', 'x/gone.mp4': 'cat'}
  clips = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']
  assert [c.path and c.path[len(str(tmp_path)) + 1 :] for c in clips] == ['x/a.mp4', 'a b, c.mp4', None]
  assert [c.line for c in clips] == [f'kinetics_train_list_videos.txt:{n}' for n in (1, 2, 3)]


def test_labels_may_be_names_with_spaces(tmp_path):
  lay(
    tmp_path, 'a.mp4', train_csv='path,label\n"a.mp4",arm wrestling\nb.mp4,yoga\n', test_tsv='c.mp4\tclimbing a rope\n'
  )
  splits, names = listed(tmp_path)
  assert names == ('arm wrestling', 'climbing a rope', 'yoga')
  assert splits['test'] == {'c.mp4': 'climbing a rope'}


def test_numbers_without_names_are_their_own_names(tmp_path):
  lay(tmp_path, train_txt='a.mp4 0\nb.mp4 3\n', val_txt='c.mp4 1\nd.mp4 -1\n')
  splits, names = listed(tmp_path)
  assert names == ('0', '1', '2', '3') and splits['val'] == {'c.mp4': '1', 'd.mp4': None}


def test_paths_may_be_absolute_and_labels_missing(tmp_path):
  lay(tmp_path, 'else where/a.mp4')
  path = tmp_path / 'else where/a.mp4'
  lay(tmp_path, train_txt=f'{path}\nelse where/b.mp4\n')
  (clips,) = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits.values()
  assert [(c.path, c.label) for c in clips] == [(str(path), -1), (None, -1)]


def test_the_name_of_a_video_is_the_path_of_its_file(tmp_path):
  lay(tmp_path, 'pool/a.mp4', 'train/x/b.mp4', 'test/x/c.mp4')
  (tmp_path / 'test/x/d.mp4').symlink_to(tmp_path / 'pool/a.mp4')
  (tmp_path / 'elsewhere').symlink_to(tmp_path / 'train')
  names = lambda root, split: [c.video_id for c in list_folder(root, VIDEO_EXTENSIONS, 'video').splits[split]]
  lay(tmp_path, train_txt='./pool/a.mp4\ntest/x/d.mp4\nelsewhere/x/b.mp4\nno/../pool/a.mp4\ngone/x.mp4\n')
  assert names(tmp_path, 'train') == ['pool/a.mp4', 'pool/a.mp4', 'train/x/b.mp4', 'pool/a.mp4', 'gone/x.mp4']
  (tmp_path / 'train.txt').unlink()
  (tmp_path / 'elsewhere').unlink()
  (tmp_path / 'top').mkdir()
  for split in ('train', 'test'):
    (tmp_path / 'top' / split).symlink_to(tmp_path / split)
  assert names(tmp_path / 'top', 'test') == [str(tmp_path / 'test/x/c.mp4'), str(tmp_path / 'pool/a.mp4')]


MISTAKES = {
  'no video file': ((), {}),
  'at different depths.*b.mp4': (('train/x/a.mp4', 'train/x/c.mp4', 'train/b.mp4'), {}),
  'neither splits nor classes': (('x/y/a.mp4', 'z/y/b.mp4'), {}),
  'files at different depths, or folders': (('train/a/b/c.mp4',), {}),
  'train.txt:2:.*is not `path label`': ((), {'train_txt': 'a.mp4 1\nb.mp4\n'}),
  'train.txt:1:.*is not `path label`': ((), {'train_txt': 'a.mp4 1 2 3\n'}),
  'train.csv:2:.*is not `path label`': ((), {'train_csv': 'a.mp4,1\nb.xyz,1\n'}),
  "val.txt:1: label '9' is none of the 2": ((), {'val_txt': 'a.mp4 9\n', 'classes_txt': 'a\nb\n'}),
  "label 'dog' is none of": ((), {'train_txt': 'a.mp4 dog\n', 'labels_txt': 'ape\ncat\n'}),
  "classes.txt:3: class 'a' comes twice|classes.txt:1": ((), {'train_txt': 'a.mp4 0\n', 'classes_txt': 'a\nb\na\n'}),
  'could be the list of split': ((), {'my_train_txt': 'a.mp4 0\n', 'your_train_txt': 'a.mp4 0\n'}),
  'could name the classes': ((), {'train_txt': 'a.mp4 0\n', 'classes_txt': 'a\n', 'labels_txt': 'a\n'}),
  'is empty': ((), {'train_txt': '\n'}),
}


@pytest.mark.parametrize('message', MISTAKES)
def test_a_mistake_is_told_with_its_place(tmp_path, message):
  files, lists = MISTAKES[message]
  lay(tmp_path, *files, **lists)
  with pytest.raises(UserError, match=message) as caught:
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(UserError, match='not a directory'):
    list_folder(tmp_path / 'absent', VIDEO_EXTENSIONS, 'video')


def test_links_in_circles_end(tmp_path):
  lay(tmp_path, 'train/x/a.mp4')
  (tmp_path / 'train/x/loop').symlink_to(tmp_path)
  assert listed(tmp_path)[0] == {'train': {'x/a.mp4': 'x'}}


def test_names_of_any_bytes(tmp_path):
  lay(tmp_path, 'train/x/raw\udcff.mp4')
  (clip,) = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']
  assert clip.id == 'x/raw\\udcff.mp4' and clip.path.endswith('raw\udcff.mp4')


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text('a.mp4 ,\t\n\r"0123-', max_size=60).map(str.encode))
def test_any_bytes_are_a_listing_or_one_sentence(tmp_path, data):
  (tmp_path / 'train.txt').write_bytes(data)
  try:
    found = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  except UserError as error:
    assert '\n' not in str(error)
  else:
    assert isinstance(found, Listing) and all(-1 <= c.label < len(found.class_names) for c in found.splits['train'])


@pytest.mark.parametrize(
  ('labels', 'words'),
  [
    (('0', 'run', 'run'), r"train\.txt:1: label '0' is a number, most are not"),
    (('0', '1', 'run'), r"train\.txt:3: label 'run' is a name, most are not"),
    (('0', '1', '-7'), r"train\.txt:3: label '-7' is no class"),
  ],
)
def test_labels_of_two_kinds_are_a_mistake(tmp_path, labels, words):
  (tmp_path / 'train.txt').write_text(''.join(f'{i}.mp4 {label}\n' for i, label in enumerate(labels)))
  with pytest.raises(UserError, match=words):
    list_folder(tmp_path, {'.mp4'}, 'video')
