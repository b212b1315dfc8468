"""Tests of the readers of official annotation files: against the official files, and against broken ones."""

import csv
import json
import os
import random
import re
import shutil
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipelines.builders import annotations, folders, listing
from data_pipelines.contract import UserError
from tests import miniature

READERS = {
  'kinetics/400': lambda d: annotations.kinetics(d, '400'),
  'kinetics/600': lambda d: annotations.kinetics(d, '600'),
  'kinetics/700': lambda d: annotations.kinetics(d, '700'),
  'kinetics/700_2020': lambda d: annotations.kinetics(d, '700_2020'),
  'something_something_v2': annotations.something_something_v2,
  'moments_in_time/v1': lambda d: annotations.moments_in_time(d, 'v1'),
  'moments_in_time/v2': lambda d: annotations.moments_in_time(d, 'v2'),
  'ucf101_videos/split1': lambda d: annotations.ucf101(d, 1),
  'ucf101_videos/split2': lambda d: annotations.ucf101(d, 2),
  'ucf101_videos/split3': lambda d: annotations.ucf101(d, 3),
  'hmdb51/split1': lambda d: annotations.hmdb51(d, 1),
  'hmdb51/split2': lambda d: annotations.hmdb51(d, 2),
  'hmdb51/split3': lambda d: annotations.hmdb51(d, 3),
}


@pytest.mark.parametrize('dataset', READERS)
def test_miniature_is_read_as_it_was_made(dataset, media, tmp_path):
  made = miniature.DATASETS[dataset](media, tmp_path)
  read = READERS[dataset](tmp_path)
  assert list(read.splits) == list(made)
  for split, items in made.items():
    clips = {c.id: c for c in read.splits[split]}
    assert sorted(clips) == sorted(i.id for i in items) and len(clips) == len(read.splits[split])
    for item in items:
      clip = clips[item.id]
      assert (clip.video_id, clip.label) == (item.video_id, item.label)
      assert (clip.path is None) == (item.state == 'missing')
      name, _, line = clip.line.partition(':')
      (file,) = tmp_path.rglob(name)
      if line.startswith('entry'):
        assert json.loads(file.read_text())[int(line.split()[1])]['id'] == clip.id
      else:
        assert item.id.split('/')[-1][:11] in file.read_text().splitlines()[int(line) - 1]
  if dataset.startswith('kinetics'):
    names = {p.rsplit('/', 1)[-1] for p in listing.scan(tmp_path, lambda _, stem: stem).videos.values()}
    assert names == {f'{i.id}.mp4' for items in made.values() for i in items if i.state != 'missing'}


@pytest.mark.parametrize('make', [miniature.folder, miniature.images])
def test_miniature_of_a_folder_of_ones_own(make, media, tmp_path):
  made = make(media, tmp_path)
  read = folders.list_folder(tmp_path, {'.mp4', '.jpg'}, 'video')
  assert read.class_names == ('cat', 'dog')
  for split, items in made.items():
    clips = sorted((c.id, c.video_id, c.label) for c in read.splits[split])
    assert clips == sorted(i[:3] for i in items) and {i.state for i in made['train']} == {'whole', 'corrupt'}


def test_class_names_are_the_known_ones_in_their_order(media):
  for ours, theirs in (
    ('kinetics_400', 'k400'),
    ('kinetics_600', 'k600'),
    ('kinetics_700', 'k700'),
    ('something_something_v2', 'sthv2'),
    ('moments_in_time_v1', 'mit_v1'),
    ('moments_in_time_v2', 'mit_v2'),
    ('ucf101', 'ucf101'),
    ('hmdb51', 'hmdb51'),
  ):
    assert listing.official_names(ours) == tuple((media / f'labels/{theirs}.txt').read_text().splitlines())
  # Sorted, as all users of Kinetics number the classes; and no two names that folders could confuse.
  for name in ('kinetics_400', 'kinetics_600', 'kinetics_700', 'hmdb51', 'something_something_v2'):
    names = listing.official_names(name)
    assert list(names) == sorted(names) and len({listing.plain(n) for n in names}) == len(names)


def test_ucf101_official_lists(media):
  sizes = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
  for split, (train, test) in sizes.items():
    read = annotations.ucf101(media / 'ann/ucf101', split)
    assert [len(c) for c in read.splits.values()] == [train, test]
    videos = [{c.video_id for c in clips} for clips in read.splits.values()]
    assert not videos[0] & videos[1]  # groups are the unit that the splits never divide
    assert {c.label for c in read.splits['train']} == {c.label for c in read.splits['test']} == set(range(101))
    for clip in read.splits['test']:  # names that differ in case alone: HandstandPushups
      assert read.class_names[clip.label].lower() == clip.id.split('_')[1].lower()


def test_hmdb51_official_lists(media):
  for split in (1, 2, 3):
    read = annotations.hmdb51(media / 'ann/hmdb51', split)
    assert {k: len(v) for k, v in read.splits.items()} == {'train': 3570, 'test': 1530}
    for part, count in (('train', 70), ('test', 30)):
      assert all(sum(c.label == k for c in read.splits[part]) == count for k in range(51))
    videos = [{c.video_id for c in clips} for clips in read.splits.values()]
    assert not videos[0] & videos[1]


def test_kinetics_official_tables(media, tmp_path):
  shutil.copyfile(media / 'ann/kinetics/kinetics-400_val_head.csv', tmp_path / 'val.csv')
  shutil.copyfile(media / 'ann/kinetics/kinetics-400_test_head.csv', tmp_path / 'test.csv')
  (tmp_path / 'anywhere').mkdir()
  (tmp_path / 'anywhere/0wR5jVB-WPk_000417_000427.mkv').touch()
  (tmp_path / 'anywhere/3caPS4FHFF8_36_46.mp4').touch()  # a crawler that did not pad the numbers
  (tmp_path / 'anywhere/.3caPS4FHFF8_36_46.mp4').touch()
  read = annotations.kinetics(tmp_path, '400')
  assert list(read.splits) == ['validation', 'test']
  rows = list(csv.DictReader((tmp_path / 'val.csv').open()))
  clips = read.splits['validation']
  assert [read.class_names[c.label] for c in clips] == [r['label'] for r in rows] and len(clips) == 200
  assert [c.video_id for c in clips] == [r['youtube_id'] for r in rows]
  assert clips[0] == listing.Clip(
    '0wR5jVB-WPk_000417_000427', '0wR5jVB-WPk', str(tmp_path / 'anywhere/0wR5jVB-WPk_000417_000427.mkv'), 0, 'val.csv:2'
  )
  assert clips[1].path == str(tmp_path / 'anywhere/3caPS4FHFF8_36_46.mp4')
  assert len(read.splits['test']) == 50 and {c.label for c in read.splits['test']} == {-1}
  shutil.copyfile(media / 'ann/kinetics/kinetics-600_val_head.csv', tmp_path / 'kinetics-600_val.csv')
  assert annotations.kinetics(tmp_path, '600').splits['validation'][0].video_id == 'yq_M1PMw2hY'
  assert annotations.kinetics(tmp_path, '400') == read  # each takes its own
  table = annotations.kinetics(tmp_path, '600').splits['validation']
  (tmp_path / 'kinetics-600_val.csv').rename(tmp_path / 'kinetics-600_val.txt')  # as one mirror calls it
  as_text = annotations.kinetics(tmp_path, '600').splits['validation']
  assert len(table) == 200 and [c[:4] for c in as_text] == [c[:4] for c in table]


def test_kinetics_same_clip_in_two_classes_and_two_places(tmp_path):
  rows = ['label,youtube_id,time_start,time_end,split', *(f'{c},dMzycn1d3qU,0,10,val' for c in ('abseiling', 'yoga'))]
  (tmp_path / 'validate.csv').write_text('\n'.join(rows))
  for folder in ('a', 'val', 'train', 'val/yoga'):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'dMzycn1d3qU_000000_000010.mp4').touch()
  first, second = annotations.kinetics(tmp_path, '600').splits['validation']
  assert (first.id, second.id) == ('dMzycn1d3qU_000000_000010', 'dMzycn1d3qU_000000_000010:yoga')
  assert first.video_id == second.video_id and first.label != second.label
  assert first.path == str(tmp_path / 'val/dMzycn1d3qU_000000_000010.mp4')
  for line in ('yoga,dMzycn1d3qU,0,10,val', 'abseiling,dMzycn1d3qU,0,10,val'):
    (tmp_path / 'validate.csv').write_text('\n'.join([*rows, line]))
    with pytest.raises(
      UserError, match=r'validate\.csv lists the clip .* twice \(validate\.csv:\d and validate\.csv:4'
    ):
      annotations.kinetics(tmp_path, '600')


def test_something_something_names_of_both_releases_and_test_answers(media, tmp_path):
  miniature.something_something_v2(media, tmp_path)
  read = annotations.something_something_v2(tmp_path)
  names = [read.class_names[c.label] for c in read.splits['train']]
  assert 'Pulling something from left to right' in names
  assert 'Putting something similar to other things that are already on the table' in names
  for path in list((tmp_path / 'labels').iterdir()):
    path.rename(path.with_name(f'something-something-v2-{path.name}'))
  renamed = annotations.something_something_v2(tmp_path)
  strip = lambda splits: {k: [c._replace(line='') for c in v] for k, v in splits.items()}
  assert strip(renamed.splits) == strip(read.splits)
  ids = [c.id for c in read.splits['test']]
  answers = tmp_path / 'labels/test-answers.csv'
  answers.write_text(
    f'{ids[0]};{read.class_names[4]}\r\n{ids[1]};Putting something, something and something on the table'
  )
  labels = [c.label for c in annotations.something_something_v2(tmp_path).splits['test']]
  assert labels == [4, read.class_names.index('Putting something, something and something on the table')]
  answers.write_text(f'{ids[0]};{read.class_names[4]}\n')
  with pytest.raises(UserError, match=f'no answer for {ids[1]}'):
    annotations.something_something_v2(tmp_path)


def test_something_something_official_entries(media, tmp_path):
  for source in ('mini_train', 'fewshot_5shot_train'):
    shutil.copyfile(media / f'ann/ssv2/{source}.json', tmp_path / 'train.json')
    entries = json.loads((tmp_path / 'train.json').read_text())
    read = annotations.something_something_v2(tmp_path)
    official = json.loads((media / 'ann/ssv2/labels.json').read_text())
    for clip, entry in zip(read.splits['train'], entries, strict=True):
      assert clip.label == int(official[re.sub(r'[][]', '', entry['template'])])
  # Names of a task of its own: classes would not be those of published weights.
  shutil.copyfile(media / 'ann/ssv2/fewshot_labels.json', tmp_path / 'labels.json')
  with pytest.raises(UserError, match=r'labels\.json is not the official labels file .*video_folder'):
    annotations.something_something_v2(tmp_path)


def test_moments_category_file_decides_the_order(media, tmp_path):
  miniature.moments_in_time(media, tmp_path, 'v2')
  names = (media / 'labels/mit_v2.txt').read_text().splitlines()
  file = tmp_path / 'moments_categories.txt'
  read = annotations.moments_in_time(tmp_path, 'v2')
  assert read.class_names == tuple(names)
  file.write_text('\r\n'.join(f'{n},{len(names) - 1 - i}' for i, n in enumerate(names)))
  turned = annotations.moments_in_time(tmp_path, 'v2')
  assert turned.class_names == tuple(names[::-1])
  assert [c.label for c in turned.splits['train']] == [304 - c.label for c in read.splits['train']]
  file.write_text('\n'.join(names))
  assert annotations.moments_in_time(tmp_path, 'v2') == read
  file.unlink()
  assert annotations.moments_in_time(tmp_path, 'v2') == read
  with pytest.raises(UserError, match='expected 339 for Moments in Time v1'):
    file.write_text('\n'.join(names))
    annotations.moments_in_time(tmp_path, 'v1')


KINETICS_HEADER = 'label,youtube_id,time_start,time_end,split\n'
MISTAKES = {
  'no label column': ('train.csv', 'youtube_id,time_start,time_end,split\n', r'train\.csv:1: .* expected label'),
  'no header': ('train.csv', 'yoga,dMzycn1d3qU,0,10,train\n', r'train\.csv:1: .* expected youtube_id'),
  'unknown class': (
    'val.csv',
    f'{KINETICS_HEADER}sleep,dMzycn1d3qU,0,10,val\n',
    r"val\.csv:2: 'sleep' is none of the 400",
  ),
  'short row': ('val.csv', f'{KINETICS_HEADER}yoga,dMzycn1d3qU\n', r'val\.csv:2: 2 columns; expected the 5'),
  'swapped columns': ('val.csv', f'{KINETICS_HEADER}yoga,0,10,dMzycn1d3qU,val\n', r"val\.csv:2: youtube_id is '0'"),
  'time': ('val.csv', f'{KINETICS_HEADER}yoga,dMzycn1d3qU,0,1e9,val\n', r"val\.csv:2: time_end is '1e9'"),
  'wrong split': ('val.csv', f'{KINETICS_HEADER}yoga,dMzycn1d3qU,0,10,train\n', r"val\.csv:2: a clip of split 'train'"),
  'header alone': ('val.csv', KINETICS_HEADER, r'val\.csv has a header and no clip'),
  'quote': ('val.csv', f'{KINETICS_HEADER}yoga,"dMzycn1d3qU,0,10,val\n', r'val\.csv:2: not a row of a table'),
  'nothing in quotes': ('val.csv', '""\n', r'val\.csv:1: .* expected youtube_id'),
  'empty': ('val.csv', ' \n\n', r'val\.csv is empty'),
  'latin-1': ('val.csv', f'{KINETICS_HEADER}\ncaf\udce9,dMzycn1d3qU', r'val\.csv:3: byte 0xe9 is not UTF-8'),
  'utf-16': ('val.csv', '\udcff\udcfey\0', r'val\.csv:1: byte 0xff is not UTF-8'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_kinetics_are_told_by_line(mistake, tmp_path):
  name, text, message = MISTAKES[mistake]
  (tmp_path / name).write_bytes(text.encode('utf-8', 'surrogateescape'))
  with pytest.raises(UserError, match=message):
    annotations.kinetics(tmp_path, '400')


def test_mistakes_elsewhere_are_told(media, tmp_path):
  def fails(dataset, file, text, message):
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    miniature.DATASETS[dataset](media, root)
    (path,) = root.rglob(file)
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      READERS[dataset](root)

  ssv2, ucf, hmdb = 'something_something_v2', 'ucf101_videos/split1', 'hmdb51/split1'
  fails(
    ssv2, 'train.json', '[{"id": "1", "template": "Yawning"}]', r"train\.json:entry 0: 'Yawning' is none of the 174"
  )
  fails(ssv2, 'train.json', '[{"id": "1"}]', r'train\.json:entry 0: template is')
  fails(ssv2, 'train.json', '[\n{"id": ]', r'train\.json:2: not JSON')
  fails(ssv2, 'train.json', '{}', 'holds no list of clips')
  fails(ssv2, 'train.json', '[' * 100_000, 'not a JSON file that can be read')
  fails(ssv2, 'test.json', '[{"id": 1}, {"id": "1"}]', r'lists the clip .1. twice .*entry 0 and test\.json:entry 1')
  fails(ssv2, 'labels.json', '{"Yawning": 1, "Yawning": 2}', "the key 'Yawning' comes twice")
  fails('moments_in_time/v1', 'trainingSet.csv', 'clapping,clapping/a.mp4', r'trainingSet\.csv:1: .* is not a clip')
  fails('moments_in_time/v1', 'trainingSet.csv', 'clapping/a.mp4,12', r"trainingSet\.csv:1: '12' is none of the 339")
  fails(
    ucf, 'trainlist01.txt', 'YoYo/v_YoYo_g08_c01.avi 1', r'trainlist01\.txt:1: label 1 for class YoYo; expected 101'
  )
  fails(ucf, 'trainlist01.txt', 'YoYo/v_YoYo_g08_c01 101', r'trainlist01\.txt:1: .* is not a clip')
  fails(ucf, 'classInd.txt', '1 YoYo', r'classInd\.txt:1: .* is not the official number')
  fails(hmdb, 'wave_test_split1.txt', 'a_wave_0.avi 3', r'wave_test_split1\.txt:1: .* expected file\.avi and 0, 1 or 2')


def test_moments_folder_and_cell_agree(tmp_path):
  rows = 'dropping/a_1.mp4,dropping,3,0\nadult+female+speaking/b_1.mp4,adult+female+speaking\n'
  (tmp_path / 'trainingSet.csv').write_text(rows)
  names = annotations.moments_in_time(tmp_path, 'v1')
  assert [names.class_names[c.label] for c in names.splits['train']] == ['dropping', 'adult+female+speaking']
  (tmp_path / 'trainingSet.csv').write_text('dropping/a_1.mp4,dropping,3,0\ndropping/b_1.mp4,praying,3,0\n')
  with pytest.raises(UserError, match=r"trainingSet\.csv:2: the folder 'dropping' is one class and 'praying' another"):
    annotations.moments_in_time(tmp_path, 'v1')


@pytest.mark.parametrize('kind', ['pipe', 'device'])
def test_annotations_are_regular_files(tmp_path, kind):
  os.mkfifo(tmp_path / 'val.csv') if kind == 'pipe' else (tmp_path / 'val.csv').symlink_to('/dev/zero')
  with pytest.raises(UserError, match=r'val\.csv is not a regular file'):
    annotations.kinetics(tmp_path, '400')


def test_what_is_absent_or_ambiguous_is_told(media, tmp_path):
  for dataset, reader in READERS.items():
    with pytest.raises(UserError, match='is not a directory'):
      reader(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'annotation file; expected .*(csv|json|txt)|0 of the 51 files'):
      reader(tmp_path)
    root = tmp_path / dataset.replace('/', '_')
    miniature.DATASETS[dataset](media, root)
    shutil.copytree(root, root / 'copy')
    reader(root)  # the less deep ones are taken
    shutil.move(root / 'copy', root.with_name('copy'))
    root.rename(root.with_name('one'))
    with pytest.raises(UserError, match='has 2 files for the same annotations'):
      reader(tmp_path)
    shutil.rmtree(tmp_path / 'one')
    shutil.rmtree(tmp_path / 'copy')
  (tmp_path / 'climb_test_split1.txt').write_text('a_climb_0.avi 1')
  with pytest.raises(UserError, match=r'1 of the 51 files of split 1.*brush_hair_test_split1\.txt is not there'):
    annotations.hmdb51(tmp_path, 1)


def test_links_in_a_circle_and_hidden_files(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'real/a.mp4').touch()
  (tmp_path / 'real/up').symlink_to(tmp_path)
  (tmp_path / 'linked.webm').symlink_to(tmp_path / 'real/a.mp4')
  (tmp_path / '._linked.webm').touch()
  (tmp_path / '.cache').mkdir()
  (tmp_path / '.cache/b.mp4').touch()
  assert sorted(listing.scan(tmp_path, lambda _, stem: stem).videos) == ['a', 'linked']


def test_a_large_folder_is_walked_once(tmp_path, monkeypatch):
  """50,000 rows in seconds; no file is looked at one by one."""
  rows = [f'yoga,{i:011d},0,10,train' for i in range(50_000)]
  (tmp_path / 'train.csv').write_text(KINETICS_HEADER + '\n'.join(rows))
  (tmp_path / 'train').mkdir()
  for i in range(0, 2000, 2):
    (tmp_path / f'train/{i:011d}_000000_000010.mp4').touch()
  walked = []
  monkeypatch.setattr(listing.os.path, 'exists', walked.append)
  start = time.monotonic()
  clips = annotations.kinetics(tmp_path, '400').splits['train']
  assert time.monotonic() - start < 20 and not walked
  assert [i for i, c in enumerate(clips) if c.path] == list(range(0, 2000, 2))


def mutate(data: bytes, rng: random.Random) -> bytes:
  """One of the ways in which files break."""
  lines = data.split(b'\n')
  at = rng.randrange(len(data))
  kind = rng.randrange(9)
  if kind == 0:
    return data[:at]
  if kind == 1:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 5, 50))):
      flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)
  if kind == 2:
    return data.decode().encode(rng.choice(('utf-16', 'utf-32', 'utf-8-sig', 'utf-7', 'cp037')))
  if kind == 3:
    return b''
  if kind == 4:  # columns swapped
    return b'\n'.join(re.sub(rb'([^, :]+)([, :]+)([^, :]+)', rb'\3\2\1', x, count=1) for x in lines)
  if kind == 5:  # lines swapped and repeated
    return b'\n'.join(rng.choices(lines, k=len(lines)))
  if kind == 6:
    return (
      data[:at] + rng.choice((b'\0', b'"', b"'", b'[', b'\r', b'\xe2\x80\xa8', b'9' * 5000, b'\\ud800')) + data[at:]
    )
  if kind == 7:  # a column lost
    return b'\n'.join(x.partition(b',')[2] for x in lines)
  return rng.randbytes(200)


# (dataset, annotation file): 9 files times 25 mutations
FUZZED = [
  ('kinetics/400', 'kinetics-400_train.csv'),
  ('kinetics/600', 'kinetics-600_test.csv'),
  ('something_something_v2', 'train.json'),
  ('something_something_v2', 'labels.json'),
  ('moments_in_time/v1', 'trainingSet.csv'),
  ('moments_in_time/v2', 'moments_categories.txt'),
  ('ucf101_videos/split1', 'classInd.txt'),
  ('ucf101_videos/split2', 'testlist02.txt'),
  ('hmdb51/split3', 'draw_sword_test_split3.txt'),
]


def _is_sane(read: listing.Listing) -> None:
  assert len(set(read.class_names)) == len(read.class_names) > 1
  for clips in read.splits.values():
    assert len({c.id for c in clips}) == len(clips)
    for clip in clips:
      assert clip.id.isprintable() and clip.video_id.isprintable() and clip.id and clip.video_id
      assert -1 <= clip.label < len(read.class_names) and clip.line


@pytest.mark.parametrize(('dataset', 'file'), FUZZED)
def test_broken_annotations_never_crash(dataset, file, media, tmp_path):
  miniature.DATASETS[dataset](media, tmp_path)
  (path,) = tmp_path.rglob(file)
  whole = path.read_bytes()
  refused = 0
  start = time.monotonic()
  for seed in range(25):
    path.write_bytes(mutate(whole, random.Random(f'{file}{seed}')))
    try:
      _is_sane(READERS[dataset](tmp_path))
    except UserError as e:
      assert '\n' not in str(e) and len(str(e)) < 1000 and str(tmp_path) in str(e)
      refused += 1
  assert time.monotonic() - start < 20
  assert refused > 5


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200) | st.from_regex(r'(YoYo/v_YoYo_g[0-9]{1,2}_c[0-9]{1,2}\.avi( 101)?\r?\n){1,4}'))
@example(text='YoYo/v_YoYo_g01_c01.avi 101\x0cYoYo/v_YoYo_g01_c02.avi')
def test_any_text_is_read_or_refused(text, tmp_path):
  (tmp_path / 'trainlist01.txt').write_text(text, encoding='utf-8', newline='')
  try:
    read = annotations.ucf101(tmp_path, 1)
  except UserError:
    return
  _is_sane(read)
  lines = [line for line in re.split(r'\r\n|\r|\n', text) if line.strip()]
  assert len(read.splits['train']) == len(lines)  # nothing is lost


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  rows=st.lists(
    st.tuples(st.integers(0, 399), st.from_regex(r'[A-Za-z0-9_-]{11}', fullmatch=True), st.integers(0, 99_999)),
    min_size=1, max_size=20, unique_by=lambda r: r[1:],
  ),
  newline=st.sampled_from(['\n', '\r\n', '\r']),
  quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
  bom=st.booleans(),
)  # fmt: skip
def test_any_kinetics_table_comes_back_whole(rows, newline, quoting, bom, tmp_path):
  names = listing.official_names('kinetics_400')
  with open(tmp_path / 'train.csv', 'w', encoding='utf-8-sig' if bom else 'utf-8', newline='') as f:
    table = csv.writer(f, quoting=quoting, lineterminator=newline)
    table.writerow(KINETICS_HEADER.strip().split(','))
    table.writerows([names[k], y, t, t + 10, 'train'] for k, y, t in rows)
  clips = annotations.kinetics(tmp_path, '400').splits['train']
  assert [(c.label, c.video_id, c.id) for c in clips] == [(k, y, f'{y}_{t:06d}_{t + 10:06d}') for k, y, t in rows]
  assert [c.line for c in clips] == [f'train.csv:{n}' for n in range(2, len(rows) + 2)]
