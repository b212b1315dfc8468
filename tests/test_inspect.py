"""Tests of the look into a prepared dataset."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import inspect
from data_pipelines.contract import UserError
from tests import tiny_datasets


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  tiny_datasets.build(folder)
  return str(folder)


def test_text_says_what_is_there(data_dir, capsys):
  assert inspect.main(['tiny_test_clips', f'--data_dir={data_dir}']) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[:4] == [
    'train: 20 examples',
    '  1 to 7 frames of 32 x 24 pixels, 12.5 frames a second',
    '  3 of 3 classes have examples, 6 to 7 each, median 7',
    '        7  a',
  ]
  assert 'validation: 11 examples' in out


def test_found_of_expected_and_empty_classes(data_dir):
  source = inspect.open_splits('tiny_test_clips', data_dir)['train']
  names = tuple(f'class {i}' for i in range(30))
  label = np.where(np.arange(20) < 4, -1, 29).astype(np.int32)
  source = dataclasses.replace(source, expected=25, class_names=names, label=label)
  lines = inspect.describe(source)
  assert lines[0] == 'train: 20 examples of 25 expected' and '  4 without a label' in lines
  assert any(x.strip() == '1 of 30 classes have examples, 0 to 16 each, median 0' for x in lines)
  assert lines[-10].split() == ['16', 'class', '29'] and len(lines) == 14
  assert len(inspect.describe(source, all_classes=True)) == 34


def test_sheet_shows_the_stored_frames(data_dir, tmp_path):
  source = inspect.open_splits('tiny_test_clips', data_dir)['train']
  inspect.contact_sheet([source], str(tmp_path / 'sheet.png'), rows=20, columns=3, height=24)
  sheet = np.asarray(Image.open(tmp_path / 'sheet.png')).astype(int)
  strip = 24 + 18 + 4
  assert sheet.shape[0] == 20 * strip
  for example in range(20):  # rows are in the order of the examples: red tells the video, green the frame
    video = int(source.ids[example].split()[1])
    count = tiny_datasets.num_frames(video)
    numbers = np.unique(np.linspace(0, count - 1, 3).round().astype(int))
    for column, number in enumerate(numbers):
      pixel = sheet[example * strip + 18 + 12, column * 34 + 16]
      stored = np.asarray(Image.open(io.BytesIO(tiny_datasets.frame(video, int(number)))))[12, 16]
      assert np.abs(pixel - stored).max() <= 1


def test_images_and_mistakes(data_dir, tmp_path, capsys):
  out = tmp_path / 'sheet.png'
  arguments = ['tiny_test_pictures', f'--data_dir={data_dir}']
  assert inspect.main([*arguments, f'--out={out}']) == 2
  assert 'label_key' in capsys.readouterr().err  # two labels: which one is the user's to say
  assert inspect.main([*arguments, '--label_key=fine', f'--out={out}']) == 0
  assert Image.open(out).size[1] == 6 * (120 + 22)
  assert inspect.main(['tiny_test_clips', f'--data_dir={data_dir}', f'--out={tmp_path}/no/sheet.png']) == 2
  assert 'cannot be written' in capsys.readouterr().err
  assert inspect.main(['tiny_test_clips', f'--data_dir={data_dir}', '--rows=0']) == 2
  assert 'expected at least 1' in capsys.readouterr().err
  assert inspect.main(['tiny_test_clip', f'--data_dir={data_dir}']) == 2
  assert 'close matches: tiny_test_clips' in capsys.readouterr().err


def test_odd_names_are_drawn_and_what_cannot_be_drawn_costs_no_other_row(data_dir, tmp_path, capsys, monkeypatch):
  source = inspect.open_splits('tiny_test_clips', data_dir)['train']
  ids = source.ids.copy()
  ids[:3] = [b'$', b'line\nbreak', b'caf\xe9']
  names = ('$\\frac$', 'a\nb' * 200, 'c\udce9')
  odd = dataclasses.replace(source, ids=ids.astype(object), class_names=names)
  assert inspect.contact_sheet([odd], str(tmp_path / 'odd.png'), rows=20, columns=2, height=24) == []
  width, height = Image.open(tmp_path / 'odd.png').size
  assert height == 20 * (24 + 18 + 4) and width < 2000

  whole, frames = inspect._frames, []

  def broken(source, example, columns, height):
    if example == 7 and source.num_examples == 20:
      raise UserError('Frame 0 of example 7 cannot be decoded.')
    frames.append(example)
    return whole(source, example, columns, height)

  monkeypatch.setattr(inspect, '_frames', broken)
  out = tmp_path / 'sheet.png'
  arguments = ['tiny_test_clips', f'--data_dir={data_dir}', f'--out={out}', '--rows=20']
  assert inspect.main(arguments) == 1
  told = capsys.readouterr()
  assert told.err == 'Frame 0 of example 7 cannot be decoded.\n' and f'Contact sheet: {out}' in told.out
  assert sorted(frames) == sorted([*range(7), *range(8, 20), *range(11)])
  assert Image.open(out).size[1] == 31 * (120 + 22)


def test_a_frame_of_any_shape_is_drawn(data_dir, tmp_path):
  source = inspect.open_splits('tiny_test_clips', data_dir)['train']
  for size in ((60_000, 1), (1, 60_000)):
    file = io.BytesIO()
    Image.new('RGB', size, 'red').save(file, 'JPEG')
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(inspect.sources, 'read', lambda *_: [file.getvalue()])  # noqa: B023
      assert inspect.contact_sheet([source], str(tmp_path / 'sheet.png'), rows=1, columns=1) == []
    assert Image.open(tmp_path / 'sheet.png').size[0] <= 8 * 120 + 2
