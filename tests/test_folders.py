"""Folders of one's own: every layout that is promised, and a sentence for those that are none."""

import csv
import os
import re
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.builders import listing
from data_pipelines.builders.folders import list_folder
from data_pipelines.builders.listing import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Listing
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
@given(
  st.sampled_from(['train.txt', 'train.csv', 'classes.csv', 'labels.txt']),
  st.binary(max_size=60) | st.text('a.mp4 ,;\t\n\r"0123-', max_size=60).map(str.encode),
)
def test_any_bytes_are_a_listing_or_one_sentence(tmp_path, name, data):
  for path in tmp_path.iterdir():
    path.unlink()
  (tmp_path / 'train.txt').write_bytes(b'a.mp4 0\n')
  (tmp_path / name).write_bytes(data)
  if name == 'train.csv':
    (tmp_path / 'train.txt').unlink()
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


# ---- Which files are lists.

LINES = 'videos/a.mp4 0\nvideos/b.mp4 1\n'


@pytest.mark.parametrize(
  ('name', 'split'),
  [
    ('training.csv', 'training'),
    ('trainlist01.txt', 'train'),
    ('trainingSet.csv', 'training'),
    ('TRAIN_videos.tsv', 'train'),
    ('my-test-split-1.txt', 'test'),
    ('eval.csv', 'eval'),
    ('validate.csv', 'validate'),
    ('devset.txt', 'dev'),
  ],
)
def test_a_list_is_known_by_any_usual_word_for_its_split(tmp_path, name, split):
  lay(tmp_path, 'videos/a.mp4', 'videos/b.mp4')
  (tmp_path / name).write_text(LINES.replace(' ', '\t'))
  assert listed(tmp_path) == ({split: {'videos/a.mp4': '0', 'videos/b.mp4': '1'}}, ('0', '1'))


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('train_test.csv', 'its name has the splits train and test'),
    ('annotations/train.txt', 'lists are read in .* itself'),
    ('train.json', 'a list is a .txt, .csv, .tsv file'),
    ('labels.json', 'a list is a .txt, .csv, .tsv file'),
    ('val.parquet', 'a list is a .txt, .csv, .tsv file'),
    ('annotations.csv', 'a list has the name of its split, such as train.csv'),
    ('videos/metadata.jsonl', 'a list is a .txt, .csv, .tsv file'),
    ('train.ndjson', 'a list is a .txt, .csv, .tsv file'),
    ('split1_train.psv', 'a list is a .txt, .csv, .tsv file'),
    ('trainlist01', 'a list is a .txt, .csv, .tsv file'),
    ('val.arrow', 'a list is a .txt, .csv, .tsv file'),
  ],
)
@pytest.mark.parametrize('beside', ['folders', 'lists'])
def test_what_looks_like_annotations_and_is_not_read_is_refused_by_name(tmp_path, name, words, beside):
  lay(tmp_path, 'videos/a.mp4', 'videos/b.mp4', name)
  if beside == 'lists':
    lay(tmp_path, test_csv='videos/a.mp4 0\n')
  with pytest.raises(UserError, match=words) as caught:
    listed(tmp_path)
  assert f'{tmp_path / name} looks like annotations' in str(caught.value)
  (tmp_path / name).rename((tmp_path / name).with_name(f'.{os.path.basename(name)}'))
  listed(tmp_path)


def test_what_looks_like_no_annotations_is_passed_over(tmp_path):
  lay(tmp_path, 'run/a.mp4', 'sit/train.mp4', 'README.md', 'LICENSE.txt', 'trainer.log', 'notes.json', 'LICENSE')
  assert listed(tmp_path)[0] == {'train': {'run/a.mp4': 'run', 'sit/train.mp4': 'sit'}}


# ---- Endings.


def test_what_is_no_file_to_read_is_left_over_by_name(tmp_path):
  lay(tmp_path, 'a/x.mp4', 'a/x.srt', 'b/y.MTS', 'b/z.gif', 'c/only.heic', 'README.md')
  found = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  assert [c.id for c in found.splits['train']] == ['a/x.mp4', 'b/y.MTS', 'b/z.gif'] and found.class_names == ('a', 'b')
  assert found.left_over == (f'{tmp_path}/a/x.srt', f'{tmp_path}/c/only.heic')
  with pytest.raises(UserError, match=r'has no image file .*; it has 3 x \.jpx2'):
    lay(tmp_path / 'other', 'a/x.jpx2', 'a/y.jpx2', 'b/z.jpx2')
    list_folder(tmp_path / 'other', IMAGE_EXTENSIONS, 'image')


# ---- The names of classes.


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('classes.csv', 'id,name\n0,zebra\n1,"ape, great"\n'),
    ('classes.csv', 'name,id\n"ape, great",1\nzebra,0\n'),
    ('classes.csv', '0,zebra\n1,"ape, great"\n'),
    ('classes.csv', 'id;name\n0;zebra\n1;ape, great\n'),
    ('classes.csv', 'name\nzebra\n"ape, great"\n'),
    ('labels.tsv', 'class_name\nzebra\nape, great\n'),
    ('labels.tsv', 'label\tname\n0\tzebra\n1\tape, great\n'),
    ('classes.txt', 'zebra\nape, great\n'),
    ('classes.txt', '0 zebra\n1 ape, great\n'),
  ],
)
@pytest.mark.parametrize('layout', ['lists', 'folders'])
def test_a_table_of_classes_with_and_without_numbers_and_heading(tmp_path, name, text, layout):
  lay(tmp_path, 'ape, great/a.mp4', 'zebra/b.mp4')
  (tmp_path / name).write_text(text)
  if layout == 'lists':
    lay(tmp_path, train_txt='ape, great/a.mp4\t1\nzebra/b.mp4\t0\n')
  splits, names = listed(tmp_path)
  assert names == ('zebra', 'ape, great')
  assert splits == {'train': {'ape, great/a.mp4': 'ape, great', 'zebra/b.mp4': 'zebra'}}


@pytest.mark.parametrize(
  ('name', 'text', 'words'),
  [
    ('classes.csv', 'id,name\n1,a\n2,b\n', 'classes.csv:2: the 2 classes have the numbers 1 to 2. Number them from 0'),
    ('classes.csv', '0,a\n0,b\n', 'classes.csv:1: the 2 classes have the numbers 0 to 0'),
    ('classes.csv', 'id,name\n0,a\n1,\n', 'classes.csv:3: the class has no name'),
    ('classes.csv', 'n014,a\nn015,b\n', "classes.csv:1: 'n014,a' is not one class"),
    ('labels.csv', 'a/x.mp4,0\nb/y.mp4,1\n', "labels.csv:1: 'a/x.mp4' is a file"),
    ('classes.txt', 'a\n', "classes.txt does not name the class of the folder 'b'"),
  ],
)
def test_a_table_that_does_not_name_the_classes_is_refused(tmp_path, name, text, words):
  lay(tmp_path, 'a/x.mp4', 'b/y.mp4')
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=words):
    listed(tmp_path)


@pytest.mark.parametrize('dialect', [{}, {'quoting': csv.QUOTE_ALL}, {'delimiter': ';'}, {'delimiter': '\t'}])
@pytest.mark.parametrize('heading', [[], [['filename', 'label']]])
def test_tables_with_quotes_as_programs_write_them(tmp_path, dialect, heading):
  rows = [['x/a.mp4', 'tench, Tinca tinca'], ['x/b; c, d.mp4', 'a "great" ape; x'], ['x/e.mp4', 'plain']]
  lay(tmp_path, *(path for path, _ in rows))
  with open(tmp_path / 'train.csv', 'w', newline='') as f:
    csv.writer(f, **dialect).writerows(heading + rows)
  assert listed(tmp_path)[0] == {'train': dict(rows)}
  (clip, *_) = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']
  assert clip.line == f'train.csv:{1 + len(heading)}'


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
  composed, decomposed = (unicodedata.normalize(form, 'caf\xe9') for form in ('NFC', 'NFD'))
  assert composed != decomposed
  lay(tmp_path / 'folders', f'train/{composed}/a.mp4', f'train/{decomposed}/b.mp4', f'val/{decomposed}/a.mp4')
  splits, names = listed(tmp_path / 'folders')
  assert names == (composed,) and {len(clips) for clips in splits.values()} == {1, 2}
  lay(tmp_path / 'lists', f'{decomposed}.mp4', 'b.mp4', train_txt='', classes_txt='')
  (tmp_path / 'lists/classes.txt').write_text(f'x\n{decomposed}\n')
  (tmp_path / 'lists/train.txt').write_text(f'{composed}.mp4\t{composed}\nb.mp4\t{decomposed}\n')
  found = list_folder(tmp_path / 'lists', VIDEO_EXTENSIONS, 'video')
  assert found.class_names == ('x', composed)
  assert [(c.label, os.path.exists(c.path or '')) for c in found.splits['train']] == [(1, True), (1, True)]


# ---- One file, one label.


@pytest.mark.parametrize('other', ['./x/a.mp4', 'x/../x/a.mp4', 'ROOT/x/a.mp4', 'y/link.mp4', 'z/a.mp4', 'x/a.mp4'])
def test_one_file_with_two_labels_is_refused_whatever_it_is_called(tmp_path, other):
  lay(tmp_path, 'x/a.mp4', 'y/b.mp4')
  (tmp_path / 'y/link.mp4').symlink_to(tmp_path / 'x/a.mp4')
  (tmp_path / 'z').symlink_to(tmp_path / 'x')
  other = other.replace('ROOT', str(tmp_path))
  (tmp_path / 'train.txt').write_text(f'x/a.mp4 0\ny/b.mp4 1\n{other} 1\n')
  with pytest.raises(UserError, match=r'a\.mp4 of split .train. has two labels, as x/a\.mp4 \(train\.txt:1\) and as '):
    listed(tmp_path)
  (tmp_path / 'train.txt').write_text(f'x/a.mp4 0\ny/b.mp4 1\n{other} 0\n')
  assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train'][2].label == 0


def test_a_link_into_another_class_is_a_second_label(tmp_path):
  lay(tmp_path, 'x/a.mp4', 'y/b.mp4')
  (tmp_path / 'y/link.mp4').symlink_to(tmp_path / 'x/a.mp4')
  with pytest.raises(UserError, match=r'has two labels, as x/a\.mp4 and as y/link\.mp4'):
    listed(tmp_path)


def test_a_list_stays_in_its_folder_unless_it_says_so(tmp_path):
  lay(tmp_path, 'outside/a.mp4', 'root/..b/c.mp4')
  root = tmp_path / 'root'
  for path in ('../outside/a.mp4', '..b/../../outside/a.mp4'):
    (root / 'train.txt').write_text(f'..b/c.mp4 1\n{path} 0\n')
    with pytest.raises(UserError, match=r'train\.txt:2: .*leads out of --manual_dir. Write the path .* from / on'):
      listed(root)
  (root / 'train.txt').write_text(f'..b/c.mp4 1\n{tmp_path}/outside/a.mp4 0\n')
  assert [c.path for c in list_folder(root, VIDEO_EXTENSIONS, 'video').splits['train']] == [
    str(root / '..b/c.mp4'), str(tmp_path / 'outside/a.mp4'),
  ]  # fmt: skip


# ---- Files that are none.


@pytest.mark.parametrize('name', ['val.csv', 'classes.txt'])
@pytest.mark.parametrize('kind', ['pipe', 'device', 'nothing', 'large', 'latin-1'])
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, name, kind):
  lay(tmp_path, 'a.mp4', train_txt='a.mp4 0\n')
  path = tmp_path / name
  if kind == 'pipe':
    os.mkfifo(path)
  elif kind == 'large':
    with open(path, 'wb') as f:
      f.truncate(listing.LARGEST_TEXT + 1)  # no block of it is on the disk
  elif kind == 'latin-1':
    path.write_bytes(b'caf\xe9.mp4 0\n')
  else:
    path.symlink_to('/dev/zero' if kind == 'device' else tmp_path / 'gone')
  words = {
    'pipe': 'is not a regular file',
    'device': 'is not a regular file',
    'nothing': 'cannot be read',
    'large': 'has 536,870,913 bytes; expected annotations of at most 536,870,912',
    'latin-1': 'byte 0xe9 is not UTF-8 text',
  }
  with pytest.raises(UserError, match=words[kind]) as caught:
    listed(tmp_path)
  assert str(path) in str(caught.value) and 'official' not in str(caught.value)


# ---- What a new user's folder had.


@pytest.mark.parametrize('name', ['clips.csv', 'a/index.tsv', 'notes.txt'])
def test_a_list_of_any_name_is_not_passed_over(tmp_path, name):
  lay(tmp_path, 'a/x.mp4', 'b/y.mkv')
  separator = {'.csv': ',', '.tsv': '\t', '.txt': ' '}[name[-4:]]
  (tmp_path / name).write_text(f'path{separator}label\na/x.mp4{separator}walk\nb/y.mkv{separator}say, you\n')
  with pytest.raises(UserError, match=f'{name} looks like annotations and is not read'):
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  (tmp_path / name).write_text('Made with a phone in May.\nx.mp4 is the best.\nAsk me for the rest.\n')
  assert len(list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']) == 2


def test_files_that_no_list_names_are_told(tmp_path):
  lay(tmp_path, 'a/x.mp4', 'a/y.mp4', 'b/z.mkv', 'b/z.srt')
  (tmp_path / 'train.csv').write_text('a/x.mp4,walk\n')
  found = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  assert found.unlisted == (f'{tmp_path}/a/y.mp4', f'{tmp_path}/b/z.mkv') and len(found.splits['train']) == 1


def test_a_flat_folder_tells_what_is_not_read(tmp_path):
  lay(tmp_path, 'x.mp4', 'y.mkv', 'thumb.jfif')
  assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').left_over == (f'{tmp_path}/thumb.jfif',)


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    ('thumb.jfif,walk', r"train.csv:4: 'thumb.jfif,walk' is not .*\(.jfif is no ending"),
    ('z.mp4,walk,note', 'train.csv:4:'),
  ],
)
def test_the_line_at_fault_is_named_in_a_table_with_quotes(tmp_path, line, said):
  lay(tmp_path, 'x.mp4', 'y.mkv', 'z.mp4')
  (tmp_path / 'train.csv').write_text(f'path,label\nx.mp4,walk\ny.mkv,"say, you"\n{line}\n')
  with pytest.raises(UserError, match=said):
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')


def test_a_path_of_a_list_may_be_none(tmp_path):
  lay(tmp_path, 'a/x.mp4')
  (tmp_path / 'train.txt').write_bytes(b'a/x.mp4 0\na\0b/y.mp4 0\n')
  assert [c.path is None for c in list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']] == [False, True]


def test_a_long_ending_is_cut_in_the_message(tmp_path):
  lay(tmp_path, 'a/x.mp4')
  (tmp_path / 'train.txt').write_text(f'a/x.mp4 0\na/y.{"9" * 5000} 0\n')
  with pytest.raises(UserError, match='is not `path label`') as caught:
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')
  assert len(str(caught.value)) < 600


def test_a_label_of_a_thousand_million_is_refused(tmp_path):
  lay(tmp_path, 'a.mp4', 'b.mp4')
  (tmp_path / 'train.csv').write_text('a.mp4,1\nb.mp4,999999999\n')
  with pytest.raises(UserError, match='label 999999999, which would make as many classes'):
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')


def test_class_folders_without_a_file_are_told(tmp_path):
  lay(tmp_path, 'x/a.mp4', 'y/b.mp4', 'hidden/.c.mp4')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'z').symlink_to(tmp_path / 'x')
  assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').empty == tuple(
    f'{tmp_path}/{n}' for n in ('empty', 'hidden', 'z')
  )


@pytest.mark.parametrize('heading', ['action', 'activity', 'Action Name', 'classes', 'labels'])
def test_a_heading_of_the_classes_is_no_class(tmp_path, heading):
  lay(tmp_path, 'run/a.mp4', 'sit/b.mp4')
  (tmp_path / 'classes.csv').write_text(f'{heading}\nsit\nrun\n')
  assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').class_names == ('sit', 'run')


def test_one_split_spelt_in_two_ways_is_refused(tmp_path):
  lay(tmp_path, 'train/run/a.mp4', 'Train/sit/b.mp4')
  with pytest.raises(UserError, match=r"has the splits '[tT]rain' and '[tT]rain': give both folders one name"):
    list_folder(tmp_path, VIDEO_EXTENSIONS, 'video')


@pytest.mark.parametrize('by', ['folders', 'list'])
def test_two_names_of_one_file_on_the_disk_are_one_file(tmp_path, by):
  lay(tmp_path, 'a/x.mp4', 'b/z.mp4')
  (tmp_path / 'a/x.mp4').write_bytes(b'x')
  os.link(tmp_path / 'a/x.mp4', tmp_path / 'b/y.mp4')
  if by == 'list':
    (tmp_path / 'train.txt').write_text('a/x.mp4 0\nb/z.mp4 1\nb/y.mp4 1\n')
  with pytest.raises(UserError, match=r'The file a/x\.mp4 of split .train. has two labels, as a/x\.mp4.* as b/y\.mp4'):
    listed(tmp_path)
  if by == 'list':
    (tmp_path / 'train.txt').write_text('a/x.mp4 0\nb/z.mp4 1\nb/y.mp4 0\n')
    found = list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').splits['train']
    assert [c.video_id for c in found] == ['a/x.mp4', 'b/z.mp4', 'a/x.mp4']


@pytest.mark.parametrize(
  'heading', ['class', 'class_name', 'Labels', '# classes', 'Classes:', 'id name', 'number,class']
)
def test_a_heading_in_a_text_of_classes_is_no_class(tmp_path, heading):
  lay(tmp_path, 'run/a.mp4', 'sit/b.mp4')
  rows = {'id name': '0 sit\n1 run\n', 'number,class': '0,sit\n1,run\n'}.get(heading, 'sit\nrun\n')
  (tmp_path / 'classes.txt').write_text(f'{heading}\n{rows}')
  assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').class_names == ('sit', 'run')


@pytest.mark.parametrize('name', ['classes.pbtxt', 'label_map.pbtxt', 'ava_action_list_v2.2.pbtxt', 'classes.txt'])
@pytest.mark.parametrize('word', ['item', 'label'])
def test_a_label_map_is_refused_by_name(tmp_path, name, word):
  lay(tmp_path, 'run/a.mp4', 'sit/b.mp4')
  (tmp_path / name).write_text(f'{word} {{\n  name: "run"\n  id: 1\n}}\n{word} {{\n  name: "sit"\n  id: 2\n}}\n')
  with pytest.raises(UserError, match=rf'{re.escape(name)} .*it is a label map .*write a classes\.txt'):
    listed(tmp_path)


def test_a_table_of_names_without_endings_is_refused(tmp_path):
  lay(tmp_path, 'run/a1.mp4', 'sit/b1.mp4')
  (tmp_path / 'info.csv').write_text('clip,what\na1,run\nb1,sit\n')
  with pytest.raises(UserError, match=r'info\.csv looks like annotations and is not read'):
    listed(tmp_path)
  (tmp_path / 'info.csv').write_text('camera,height\nnorth,3\nsouth,4\n')
  listed(tmp_path)


def test_lists_in_folders_of_folders_are_refused_and_texts_beside_clips_are_not(tmp_path):
  lay(tmp_path, 'train/run/a.mp4', 'train/sit/b.mp4', 'train/run/label.txt')
  listed(tmp_path)
  lay(tmp_path, 'splits/01/train.txt')
  with pytest.raises(UserError, match=rf'splits/01/train\.txt looks like .* lists are read in {tmp_path} itself'):
    listed(tmp_path)


@pytest.mark.parametrize('ending', ['.gz', '.zip', '.bak', '.old', '~', '.BAK'])
@pytest.mark.parametrize('stem', ['train.csv', 'classes.txt', 'annotations.json'])
def test_packed_lists_and_copies_are_refused_or_told(tmp_path, stem, ending):
  lay(tmp_path, 'run/a.mp4', 'sit/b.mp4', f'{stem}{ending}')
  why = 'it is packed' if ending in ('.gz', '.zip') else f'it is called a copy, and {re.escape(stem)} is not there'
  with pytest.raises(
    UserError, match=rf'{re.escape(stem + ending)} looks like annotations and is not read, since {why}'
  ):
    listed(tmp_path)
  if stem == 'train.csv' and 'copy' in why:
    (tmp_path / stem).write_text('run/a.mp4,0\nsit/b.mp4,1\n')
    assert list_folder(tmp_path, VIDEO_EXTENSIONS, 'video').left_over == (str(tmp_path / f'{stem}{ending}'),)
