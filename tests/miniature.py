"""Small folders in the official format of each dataset, of real clips: what a user has before the build.

Each split has its fixed few clips: whole ones, and in training one that is listed without a file and one whose file is
corrupt. The annotations are complete in form (headers, line ends, brackets, trailing spaces as the official ones).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Whole files: small ones of what the datasets hold (H.264, VP9 in WebM, XviD), cheap to decode.
_VIDEOS = ('video/short_32frames.mp4', 'video/ssv2_166766.mp4', 'video/lowfps_6.mp4', 'video_edge/tiny_carphone.mp4')
_CORRUPT = 'video_edge/corrupted.mp4'
_IMAGES = ('images/bird.jpg', 'images/dog.jpg', 'images/frame_320x240.jpg')
_PLAN = {
  'train': ('whole', 'whole', 'missing', 'whole', 'corrupt', 'whole'),
  'validation': ('whole', 'missing', 'whole'),
  'test': ('whole', 'whole'),
}


class Item(NamedTuple):
  """One listed clip.

  Attributes:
    id, video_id: as the reader should give them.
    label: index of the class; -1 if unlabelled. Of several labels all of them, ascending.
    state: 'whole', 'missing' or 'corrupt'.
  """

  id: str
  video_id: str
  label: int | tuple[int, ...]
  state: str


Miniature = dict[str, list[Item]]  # {split: its clips, in the order of the annotations}


def _place(media: Path, state: str, number: int, path: Path, files: tuple[str, ...] | None = None) -> None:
  """Puts a file where the dataset has it, unless it is to be missing."""
  if state == 'missing':
    return
  files = files or _VIDEOS
  path.parent.mkdir(parents=True, exist_ok=True)
  if state == 'corrupt' and files is _IMAGES:
    path.write_bytes((media / files[0]).read_bytes()[:2000])
  elif state == 'corrupt':
    shutil.copyfile(media / _CORRUPT, path)
  else:
    # With a box at the end that decoders skip: no two clips are the same file, as those of a dataset are not.
    name = path.name.encode()
    data = (media / files[number % len(files)]).read_bytes()
    path.write_bytes(data + (8 + len(name)).to_bytes(4) + b'free' + name)


def _write(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode())


def kinetics(media: Path, root: Path, variant: str = '400') -> Miniature:
  """Training videos in class folders, validation videos flat in val/, no label in the test table."""
  names = (media / f'labels/k{variant[:3]}.txt').read_text().splitlines()
  made = {}
  for split, folder, states in zip(_PLAN, ('train', 'val', 'test'), _PLAN.values(), strict=True):
    rows, items = [], []
    for i, state in enumerate(states):
      label = -1 if split == 'test' else 7 + 5 * (i % 3)
      video = f'{variant[:3]}{split[:4]}-{i:02d}_'[:11]
      clip = f'{video}_{10 * i:06d}_{10 * i + 10:06d}'
      rows.append(([names[label]] if label >= 0 else []) + [video, str(10 * i), str(10 * i + 10), folder])
      parent = root / folder / names[label].replace(' ', '_') if split == 'train' else root / folder
      _place(media, state, i, parent / f'{clip}.mp4')
      items.append(Item(clip, video, label, state))
    header = ['label'] * (split != 'test') + ['youtube_id', 'time_start', 'time_end', 'split']
    if variant == '400' and split != 'test':
      header, rows = [*header, 'is_cc'], [[*row, '0'] for row in rows]
    table = '\n'.join(','.join(row) for row in [header, *rows]) + '\n'
    _write(root / f'annotations/kinetics-{variant}_{folder}.csv', table)
    made[split] = items
  return made


def something_something_v2(media: Path, root: Path) -> Miniature:
  """WebM files named by number; the test list has ids alone."""
  names = (media / 'labels/sthv2.txt').read_text().splitlines()
  # Three of direction, and one whose name ends in 'something else' inside the brackets.
  classes = [names.index(n) for n in names if 'left' in n or 'similar to other things' in n]
  made = {}
  for s, (split, states) in enumerate(_PLAN.items()):
    entries, items = [], []
    for i, state in enumerate(states):
      label = -1 if split == 'test' else classes[i % len(classes)]
      entry = {'id': str(1000 * s + i)}
      if label >= 0:
        template = names[label].replace('something', '[something]')
        entry |= {'label': names[label].lower(), 'template': template, 'placeholders': ['a cup']}
      entries.append(entry)
      _place(media, state, i, root / f'20bn-something-something-v2/{entry["id"]}.webm')
      items.append(Item(entry['id'], entry['id'], label, state))
    _write(root / f'labels/{split}.json', json.dumps(entries, indent=0))
    made[split] = items
  shutil.copyfile(media / 'ann/ssv2/labels.json', root / 'labels/labels.json')
  return made


def moments_in_time(media: Path, root: Path, version: str = 'v1') -> Miniature:
  """`training/<class>/<file>.mp4` and `validation/`; there is no public test split."""
  names = (media / f'labels/mit_{version}.txt').read_text().splitlines()
  classes = [0, 2, names.index('adult+female+singing')]
  made = {}
  for split, folder in (('train', 'training'), ('validation', 'validation')):
    rows, items = [], []
    for i, state in enumerate(_PLAN[split]):
      label = classes[i % 3]
      youtube = f'{split[:5]}mit{i:06d}'[-11:]
      stem, video = ((f'yt-{youtube}_{i}', youtube), (f'getty-{split}-id{i}_4', f'getty-{split}-id{i}'))[i % 2]
      rows.append(f'{names[label]}/{stem}.mp4,{names[label]},3,0\n')
      _place(media, state, i, root / folder / names[label] / f'{stem}.mp4')
      items.append(Item(f'{names[label]}/{stem}', video, label, state))
    _write(root / f'{folder}Set.csv', ''.join(rows))
    made[split] = items
  _write(root / 'moments_categories.txt', ''.join(f'{name},{i}\n' for i, name in enumerate(names)))
  return made


def ucf101(media: Path, root: Path, split: int = 1) -> Miniature:
  """AVI files in class folders, lists with CRLF."""
  made = {}
  # HandstandPushups: the class whose videos are spelt otherwise than their folder.
  classes = (
    ('ApplyEyeMakeup', 0, 'ApplyEyeMakeup'),
    ('HandstandPushups', 36, 'HandStandPushups'),
    ('YoYo', 100, 'YoYo'),
  )
  for part in ('train', 'test'):
    lines, items = [], []
    for i, state in enumerate(_PLAN[part]):
      folder, label, spelt = classes[i % 3]
      group = f'v_{spelt}_g{i + (1 if part == "test" else 8):02d}'
      clip = f'{group}_c01'
      lines.append(f'{folder}/{clip}.avi' + (f' {label + 1}' if part == 'train' else '') + '\r\n')
      _place(media, state, i, root / f'UCF-101/{folder}/{clip}.avi', ('video/ucf_like_example.avi', *_VIDEOS[:2]))
      items.append(Item(clip, group, label, state))
    _write(root / f'ucfTrainTestlist/{part}list0{split}.txt', ''.join(lines))
    made[part] = items
  shutil.copyfile(media / 'ann/ucf101/classInd.txt', root / 'ucfTrainTestlist/classInd.txt')
  return made


def hmdb51(media: Path, root: Path, split: int = 1) -> Miniature:
  """51 lists, of which three have videos of ours; marks 1, 2 and 0, a space at the end of each line."""
  names = (media / 'labels/hmdb51.txt').read_text().splitlines()
  made = {'train': [], 'test': []}
  for label, name in enumerate(names):
    lines = [f'unused_{name}_h_nm_np1_ba_goo_0.avi 0 \n']
    for part, mark in (('train', 1), ('test', 2)):
      for i, state in enumerate(_PLAN[part]):
        if (10, 20, 50)[i % 3] == label:
          video = f'My_{part}_Film_#{i}_{name}_f_cm_np1_fr_bad'
          lines.append(f'{video}_{i}.avi {mark} \n')
          _place(media, state, i, root / f'hmdb51_org/{name}/{video}_{i}.avi')
          made[part].append(Item(f'{video}_{i}', video, label, state))
    _write(root / f'testTrainMulti_7030_splits/{name}_test_split{split}.txt', ''.join(lines))
  return made


def charades(media: Path, root: Path) -> Miniature:
  """Tables of intervals, with CRLF, quoted scripts that hold commas, and clips without an action."""
  header = 'id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length'
  actions = (
    ('c092 11.90 21.20;c147 0.00 12.60', (92, 147)),
    ('', ()),
    ('c156 0.00 3.00;c000 2.50 9.10;c156 5.00 6.00', (0, 156)),
    ('c011 0.00 30.42', (11,)),
  )
  made = {}
  for split in ('train', 'test'):
    rows, items = [header], []
    for i, state in enumerate(_PLAN[split]):
      name, (written, labels) = f'{split[:2].upper()}{i}Q9', actions[i % 4]
      script = '"A person sits, then ""eats"" something."'
      rows.append(f'{name},HR43,Kitchen,6,7,Yes,{script},food;table,"Sits; eats, drinks",{written},30.42')
      _place(media, state, i, root / 'Charades_v1_480' / f'{name}.mp4')
      items.append(Item(name, name, labels, state))
    _write(root / f'Charades/Charades_v1_{split}.csv', '\r\n'.join(rows) + '\r\n')
    made[split] = items
  _write(root / 'Charades/Charades_v1_classes.txt', ''.join(f'c{i:03d} Doing thing {i}\n' for i in range(157)))
  return made


def multi_moments_in_time(media: Path, root: Path, version: str = 'v1') -> Miniature:
  """Rows of a file and the numbers of its classes; there is no public test split."""
  count = {'v1': 313, 'v2': 292}[version]
  made = {}
  for split, folder in (('train', 'training'), ('validation', 'validation')):
    rows, items = [], []
    for i, state in enumerate(_PLAN[split]):
      labels = ((0, count - 1), (7,), (3, 150, 200))[i % 3]
      stem = f'0-3-6-2-9-1-2-6-1460{i}{split}_5'
      rows.append(f'{stem}.mp4,{",".join(map(str, reversed(labels)))}\n')
      _place(media, state, i, root / f'videos/{stem}.mp4')
      items.append(Item(stem, stem.removesuffix('_5'), labels, state))
    _write(root / f'{folder}Set.csv', ''.join(rows))
    made[split] = items
  if version == 'v2':
    _write(root / 'moments_categories.txt', ''.join(f'thing {i},{i}\n' for i in range(count)))
  return made


def folder(media: Path, root: Path, files: tuple[str, ...] = _VIDEOS) -> Miniature:
  """`<split>/<class>/<file>`: a user's own videos. What is missing cannot be known here."""
  made = {}
  for split in ('train', 'test'):
    items = []
    for i, state in enumerate(s for s in _PLAN[split] if s != 'missing'):
      name = f'{"cat" if i % 2 else "dog"}/{split} {i}{Path(files[0]).suffix}'
      _place(media, state, i, root / split / name, files)
      items.append(Item(name, f'{split}/{name}', 1 - i % 2, state))
    made[split] = items
  return made


def images(media: Path, root: Path) -> Miniature:
  """`<split>/<class>/<file>.jpg`: a user's own pictures."""
  return folder(media, root, _IMAGES)


# {dataset as `tfds.builder` takes it: (media, manual_dir) -> what was put there}
DATASETS: dict[str, Callable[[Path, Path], Miniature]] = {
  'kinetics/400': kinetics,
  'kinetics/600': lambda media, root: kinetics(media, root, '600'),
  'kinetics/700': lambda media, root: kinetics(media, root, '700'),
  'kinetics/700_2020': lambda media, root: kinetics(media, root, '700_2020'),
  'something_something_v2': something_something_v2,
  'moments_in_time/v1': moments_in_time,
  'moments_in_time/v2': lambda media, root: moments_in_time(media, root, 'v2'),
  'ucf101_videos/split1': ucf101,
  'ucf101_videos/split2': lambda media, root: ucf101(media, root, 2),
  'ucf101_videos/split3': lambda media, root: ucf101(media, root, 3),
  'hmdb51/split1': hmdb51,
  'hmdb51/split2': lambda media, root: hmdb51(media, root, 2),
  'hmdb51/split3': lambda media, root: hmdb51(media, root, 3),
}

# The same, of clips with several labels.
OF_SEVERAL: dict[str, Callable[[Path, Path], Miniature]] = {
  'charades/v1': charades,
  'multi_moments_in_time/v1': multi_moments_in_time,
  'multi_moments_in_time/v2': lambda media, root: multi_moments_in_time(media, root, 'v2'),
}
