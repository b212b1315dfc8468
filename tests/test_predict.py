"""The predict command over good, odd and broken files: what it prints, writes, returns and holds in memory."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cover_jax import api, predict
from cover_jax.evaluation import visualise
from tests import tiny_checkpoint
from tests.test_video_files import MEDIA, write

ROOT = pathlib.Path(__file__).parent.parent


def run(capsys, output, *arguments, checkpoint=None):
  """(exit code, stdout, stderr) of the command."""
  code = predict.main([checkpoint or tiny_checkpoint.trained(), *map(str, arguments), f'--output={output}'])
  out, err = capsys.readouterr()
  return code, out, err


def results(output):
  about = json.loads((output / 'predictions.json').read_text())
  return about, {pathlib.Path(entry['file']).name: entry for entry in about['files']}


@pytest.mark.slow
def test_every_file_of_the_media_folder(media, tmp_path, capsys):
  broken = media / 'video_edge/corrupted.mp4'
  code, out, err = run(capsys, tmp_path, *(media / name for name in MEDIA), broken, '--top=2', '--features')
  assert code == predict.EXIT_FAILED
  last = f'{len(MEDIA) + 1} files, 1 failed. Written to {tmp_path}; look at {tmp_path}/predictions.html'
  assert out.strip().endswith(last)
  assert (
    err
    == f'{broken} breaks off: 28 of 50 declared frames could be decoded (Invalid data found when processing input).\n'
  )
  about, entries = results(tmp_path)
  assert about['step'] == 3 and about['params'] == 'raw' and about['checkpoint'].endswith('.flax')
  for name in [*MEDIA, broken]:
    entry = entries[pathlib.Path(name).name]
    assert list(entry['top']) == ['acts', 'moves', 'things'] and f'{media / name}' in out
    for head, ranking in entry['top'].items():
      assert len(ranking) == 2 and ranking[0][1] >= ranking[1][1] > 0
      assert all(len(window['top']) == 2 for window in entry['windows'][head])
  assert entries['corrupted.mp4']['trouble'] + '\n' == err
  ten_seconds = entries['k400_test.mp4']
  assert [round(w['start']) for w in ten_seconds['windows']['things']] == list(range(10))
  assert len(ten_seconds['windows']['acts']) == 75
  rows = np.load(tmp_path / 'features.npz')
  counts = {n: len(e['windows']['acts']) + len(e['windows']['things']) for n, e in entries.items()}
  assert rows['feature'].shape == (sum(counts.values()), 16) and np.isfinite(rows['feature']).all()
  assert set(rows['sources']) == {'acts+moves', 'things'}
  assert (rows['path'] == str(media / 'video/k400_test.mp4')).sum() == counts['k400_test.mp4']


def test_pictures_are_written_where_they_say_something(tmp_path, capsys):
  long, short = write(tmp_path / 'long.mp4', 30, size=(48, 64)), write(tmp_path / 'short.avi', 3)
  Image.new('RGB', (30, 20), 'red').save(tmp_path / 'photo.jpg')
  output = tmp_path / 'out'
  code, _, err = run(capsys, output, long, short, tmp_path / 'photo.jpg', '--attention', '--annotate')
  assert (code, err) == (0, '')
  _, entries = results(output)
  written = {name: sorted(os.path.basename(p) for p in entry['written']) for name, entry in entries.items()}
  assert written == {
    'long.mp4': ['long.mp4.annotated.mp4', 'long.mp4.attention.png', 'long.mp4.timeline.png'],
    'short.avi': ['short.avi.annotated.mp4', 'short.avi.attention.png'],
    'photo.jpg': ['photo.jpg.annotated.png', 'photo.jpg.attention.png'],
  }
  for entry in entries.values():
    for path in entry['written']:
      if path.endswith('.png'):
        assert np.asarray(Image.open(path).convert('L')).std() > 5
  page = (output / 'predictions.html').read_text()
  # Of each file a clip for the heads of videos and one for that of images; a timeline, and three times attention.
  assert page.count('data:image/webp') == 6 and page.count('data:image/png') == 4
  with av.open(str(output / 'long.mp4.annotated.mp4')) as container:
    frames = [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]
  assert len(frames) == 30 and frames[0].shape == (240, 320, 3)
  # Text on the left, the picture as it was on the right.
  assert frames[5][:, 10:100].std() > 20 > frames[5][:, 250:].std()
  assert not np.array_equal(frames[0], frames[-1])


@pytest.mark.parametrize('size', [(1, 3000), (3000, 1), (1, 1)])
@pytest.mark.parametrize('name', ['strip.png', 'strip.gif'])
def test_a_strip_of_one_pixel_is_annotated(tmp_path, name, size):
  first, *rest = [Image.fromarray(np.full((*size, 3), 40 * i, np.uint8)) for i in range(3)]
  first.save(tmp_path / name, **({'save_all': True, 'append_images': rest} if name == 'strip.gif' else {}))
  windows = {'k': [{'start': 0.0, 'end': 1.0, 'top': [['run', 0.9]]}]}
  written = predict.write_annotated(predict.Report(str(tmp_path / name), windows=windows), str(tmp_path / 'out'), 1)
  with av.open(written) as container:
    pictures = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
  assert len(pictures) == (3 if name == 'strip.gif' else 1)
  assert max(pictures[0].shape) <= 3840 and pictures[0].shape[0] >= 240 and pictures[0].std() > 1


def test_annotation_shows_the_window_of_its_time(tmp_path):
  path = write(tmp_path / 'v.mp4', 30)
  report = predict.Report(path)
  report.windows['acts'] = [
    {'start': 0.0, 'end': 0.9, 'top': [('first', 0.5), ('x', 0.1)]},
    {'start': 2.0, 'end': 2.9, 'top': [('second', 0.5), ('x', 0.1)]},
  ]
  shown = []
  picture = lambda image, lines: shown.append(lines) or image
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('cover_jax.evaluation.visualise.annotate', picture)
    assert predict.write_annotated(report, str(tmp_path / 'out'), 1).endswith('out.mp4')
  assert shown[:20] == [['acts', '  50% first']] * 20 and shown[20:] == [['acts', '  50% second']] * 10


def test_broken_files_do_not_stop_the_others(tmp_path, capsys):
  (tmp_path / 'broken.mp4').write_bytes(b'\0' * 999)
  good = write(tmp_path / 'good.mp4', 5)
  code, out, err = run(capsys, tmp_path / 'o', tmp_path / 'broken.mp4', tmp_path / 'absent.mp4', good)
  assert code == predict.EXIT_FAILED and len(err.splitlines()) == 2
  assert 'broken.mp4 is not a video' in err and 'absent.mp4 does not exist' in err
  assert '3 files, 2 failed.' in out.splitlines()[-1] and good in out
  _, entries = results(tmp_path / 'o')
  assert 'top' not in entries['broken.mp4'] and entries['good.mp4']['trouble'] == ''


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path, capsys):
  for folder in 'ab':
    (tmp_path / folder).mkdir()
    write(tmp_path / folder / 'v.mp4', 3)
  code, *_ = run(capsys, tmp_path / 'o', tmp_path / 'a/v.mp4', tmp_path / 'b/v.mp4', '--attention')
  assert code == 0 and {p.name for p in (tmp_path / 'o').iterdir()} == {
    'predictions.html', 'predictions.json', 'v.mp4.attention.png', 'v.mp4-2.attention.png',
  }  # fmt: skip


NAMES = ['$$.mp4', '$\\frac$.mp4', f'{"n" * 246}.mp4', f'{"ü" * 120}.mp4', os.fsdecode(b'caf\xe9 \xff.mp4'), 'a\nb.mp4']


@pytest.mark.slow
def test_names_of_any_kind_are_predicted_drawn_and_written(tmp_path, capsys):
  paths = [write(tmp_path / 'v.mp4', 12)]
  for name in NAMES:
    paths.append(str(tmp_path / name))
    shutil.copyfile(paths[0], paths[-1])
  code, out, err = run(capsys, tmp_path / 'o', *paths, '--attention', '--annotate', '--features')
  assert (code, err) == (0, '')
  assert 'caf\\udce9 \\udcff.mp4' in out
  about = json.loads((tmp_path / 'o/predictions.json').read_text())
  assert [entry['file'] for entry in about['files']] == paths
  for entry in about['files']:
    assert len(entry['written']) == 3 and all(os.path.exists(path) for path in entry['written'])
  assert len({path for entry in about['files'] for path in entry['written']}) == 3 * len(paths)
  assert set(np.load(tmp_path / 'o/features.npz')['path']) == set(paths)


def test_class_names_of_any_kind_are_drawn(tmp_path):
  names = ['$', '$$', r'$\frac$', '_hidden', 'a\nb', 'caf\udce9', '舞う', 'n' * 10_000, r'\N{DEGREE}', '%s {} {0}']
  rows = {name: [(float(i), other, 0.5) for i, other in enumerate(names)] for name in names[:3]}
  frames = np.zeros((2, 16, 16, 3), np.uint8)
  for name, draw in {
    'timeline': lambda path: visualise.timeline(rows, 10.0, '$'.join(names), path),
    'attention': lambda path: visualise.attention_maps([(n, frames, np.ones((2, 2, 2))) for n in names], path),
    'neighbours': lambda path: visualise.neighbours([[(n, frames, True) for n in names]], path),
    'predictions': lambda path: visualise.predictions(
      [{'clip': frames, 'source': n, 'label': n, 'predicted': [(n, 0.5)] * 2} for n in names], path
    ),
    'confusion': lambda path: visualise.confusion_matrix(
      np.ones((10, 10), int), names, [(i, 9 - i, 1) for i in range(10)], '$x$', path
    ),
    'curves': lambda path: visualise.training_curves(
      [{'step': i, **{f'train/s/{n}/loss': 1.0 for n in ('$\\frac$', '_x')}} for i in range(3)], path
    ),
  }.items():
    draw(str(tmp_path / f'{name}.png'))
    width, height = Image.open(tmp_path / f'{name}.png').size
    assert max(width, height) < 6000, name
  lines = [f'  50% {name}' for name in names]
  assert visualise.annotate(np.zeros((240, 320, 3), np.uint8), lines).std() > 5
  # Math would be drawn as a fraction or not at all: each letter of it is on the picture.
  assert [visualise._drawn(n) for n in ('$\\frac$', '_x', 'a\nb', 'x\udce9')] == ['$\\frac$', ' _x', 'a b', 'x?']


def test_a_picture_that_fails_costs_no_number_and_no_other_picture(tmp_path, capsys, monkeypatch):
  paths = [write(tmp_path / f'{i}.mp4', 12) for i in range(2)]
  real = visualise.attention_maps

  def fails_once(rows, path, **options):
    if '0.mp4' in path:
      raise ValueError('Parse error')
    real(rows, path, **options)

  monkeypatch.setattr(visualise, 'attention_maps', fails_once)
  code, out, err = run(capsys, tmp_path / 'o', *paths, '--attention', '--annotate', '--features')
  assert code == predict.EXIT_FAILED and '2 files, 1 failed' in out
  assert err == f'{paths[0]} was predicted; its attention picture could not be made (Parse error).\n'
  _, entries = results(tmp_path / 'o')
  assert entries['0.mp4']['trouble'] + '\n' == err and entries['1.mp4']['trouble'] == ''
  assert len(entries['0.mp4']['top']['acts']) == 5 and len(entries['1.mp4']['written']) == 3
  assert [os.path.basename(p) for p in entries['0.mp4']['written']] == ['0.mp4.timeline.png', '0.mp4.annotated.mp4']
  assert set(np.load(tmp_path / 'o/features.npz')['path']) == set(paths)

  def stopped(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(visualise, 'attention_maps', stopped)
  with pytest.raises(KeyboardInterrupt):
    run(capsys, tmp_path / 'stopped', *paths, '--attention')
  assert results(tmp_path / 'stopped')[1]['0.mp4']['top']['acts']


def test_stride_makes_windows_overlap(tmp_path, capsys):
  path = write(tmp_path / 'v.mp4', 12)
  run(capsys, tmp_path / 'o', path, '--stride=2')
  _, entries = results(tmp_path / 'o')
  windows = entries['v.mp4']['windows']
  assert [round(w['start'], 1) for w in windows['acts']] == [0, 0.2, 0.4, 0.6, 0.8]
  assert [round(w['start'], 1) for w in windows['things']] == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_averaged_parameters_predict_otherwise(tmp_path, capsys):
  path = write(tmp_path / 'v.mp4', 4)
  tops = []
  for params in ('raw', 'ema'):
    run(capsys, tmp_path / params, path, f'--params={params}')
    tops.append(results(tmp_path / params)[1]['v.mp4']['top'])
  assert tops[0] != tops[1]
  model = api.load(tiny_checkpoint.trained(), 'ema')
  assert dict(model.predict(path)['acts']) == pytest.approx(dict(map(tuple, tops[1]['acts'])), rel=1e-5)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--top=0'], '--top=0: expected'),
    (['--stride=-3'], '--stride=-3: expected'),
    (['--output=/proc/nothing'], '--output=/proc/nothing cannot be made'),
  ],
)
def test_mistakes_in_the_command_are_one_sentence(tmp_path, capsys, arguments, words):
  code = predict.main([tiny_checkpoint.trained(), 'v.mp4', f'--output={tmp_path}', *arguments])
  out, err = capsys.readouterr()
  assert code == 2 and err.startswith('Error: ' + words) and err.count('\n') == 1 and not out
  assert not list(tmp_path.iterdir())


def test_only_the_heads_that_are_asked(tmp_path, capsys):
  code, out, _ = run(capsys, tmp_path / 'o', write(str(tmp_path / 'v.mp4'), count=12, fps=10), '--heads=moves')
  assert code == 0 and 'moves' in out and 'acts' not in out
  (entry,) = json.loads((tmp_path / 'o' / 'predictions.json').read_text())['files']
  assert list(entry['top']) == list(entry['windows']) == ['moves']
  code, _, err = run(capsys, tmp_path / 'o', 'v.mp4', '--heads=moves,cats')
  assert code == 2 and "has no head 'cats': its heads are acts, moves, things." in err


def test_absent_checkpoint_is_a_mistake_in_the_command(tmp_path, capsys):
  code, _, err = run(capsys, tmp_path / 'o', 'v.mp4', checkpoint=str(tmp_path))
  assert code == 2 and err.startswith('Error: No checkpoint in')
  assert predict.main([str(tmp_path)]) == 2


def peak_mb(checkpoint, path, output):
  """Peak memory of the command in a process of its own."""
  command = [sys.executable, '-m', 'cover_jax.predict', checkpoint, path, f'--output={output}', '--features']
  env = os.environ | {'XLA_FLAGS': ''}
  with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  assert process.returncode == 0
  return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_is_flat_over_the_length_of_a_video(tmp_path):
  # 20 minutes at a low rate, which count by their frames: what would pile up are decoded frames.
  short = write(tmp_path / 'short.mp4', 100, size=(240, 320))
  long = write(tmp_path / 'long.mp4', 3000, size=(240, 320), fps=Fraction(5, 2))
  first, second = (peak_mb(tiny_checkpoint.trained(), path, tmp_path / 'o') for path in (short, long))
  # 3,000 frames of 230 KB are 690 MB.
  assert second < first + 60, (first, second)
