"""The notebook's cells run from the first to the last, as a user of Colab would run them; its outputs are theirs."""

import base64
import io
import json
import pathlib
import re
import shutil

import pytest
from PIL import Image

import cover_jax
from colab import make
from tests import tiny_checkpoint
from tests.test_video_files import write


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
  monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)


def execute(parameters):
  return make.execute(make.code_cells(make.read()), parameters)


def printed(outputs):
  """What cells print, as the notebook stores it."""
  return ''.join(line for cell in outputs for output in cell for line in output.get('text', ()))


def pictures(outputs):
  """Sizes of what cells draw."""
  stored = [output['data']['image/png'] for cell in outputs for output in cell if 'data' in output]
  return [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in stored]


def test_installation_is_nothing_but_that():
  (cell,) = (c for c in make.read()['cells'] if 'install' in c['metadata'].get('tags', ()))
  assert all(line.startswith(('%pip install', '#')) for line in ''.join(cell['source']).splitlines())


@pytest.mark.parametrize('name', ['clip.mp4', 'photo.png'])
def test_runs(tmp_path, name):
  write(tmp_path / 'clip.mp4', 40, size=(48, 64))
  Image.new('RGB', (64, 48), 'red').save(tmp_path / 'photo.png')
  names, outputs = execute({'CHECKPOINT': tiny_checkpoint.trained(), 'CLIP': str(tmp_path / name)})
  out = printed(outputs)
  assert 'acts: 5 classes' in out and re.search(r'^things +things \d \d+%', out, re.MULTILINE)
  assert set(names['predictions']) == {'acts', 'moves', 'things'}
  attention, metrics = names['figures']
  assert len(attention.axes) == 2 * (4 if name == 'clip.mp4' else 1)  # a photo is seen as the image source sees it
  curves = {line.get_label(): len(line.get_xdata()) for line in metrics.axes[0].lines}
  assert curves['video/acts'] == curves['image/things'] == 3


def test_an_export_has_no_metrics_and_runs(tmp_path):
  path = next(pathlib.Path(tiny_checkpoint.trained()).glob('checkpoints/*.flax'))
  shutil.copy(path, tmp_path / 'model.flax')
  parameters = {'CHECKPOINT': str(tmp_path / 'model.flax'), 'CLIP': write(tmp_path / 'clip.mp4', 10)}
  names, outputs = execute(parameters)
  assert names['rows'] == [] and len(pictures(outputs)) == 1


def test_stored_outputs_are_of_these_cells_this_model_and_this_clip():
  notebook = make.read()
  assert notebook['nbformat'] == 4
  assert notebook['metadata']['cover_jax']['outputs_of'] == make.fingerprint(notebook), 'python -m colab.make outputs'
  outputs = [cell['outputs'] for cell in make.code_cells(notebook)]
  assert len(pictures(outputs)) == 2 and 'motions' in printed(outputs)
  assert make.NOTEBOOK.stat().st_size < 300_000
  curves = pathlib.Path(cover_jax.DEMO_CLIP).with_name('metrics.jsonl').read_text().splitlines()
  table = json.loads(pathlib.Path(cover_jax.DEMO_CLIP).with_name('table.json').read_text())['top1']
  tested = json.loads(curves[-1])
  assert {name: round(tested[f'test/{name}/top1'], 6) for name in table} == table  # they are of one run


@pytest.mark.slow
def test_stored_outputs_are_what_running_it_gives():
  """Other processors round otherwise: to 2 in a hundred."""
  cells = make.code_cells(make.read())
  _, outputs = make.execute(cells, {})
  stored = [cell['outputs'] for cell in cells]
  number = re.compile(r'\d+(?:\.\d+)?')
  assert number.sub('N', printed(outputs)) == number.sub('N', printed(stored))
  values = lambda text: list(map(float, number.findall(text)))
  assert values(printed(outputs)) == pytest.approx(values(printed(stored)), abs=2)
  assert len(pictures(outputs)) == len(pictures(stored))


def test_the_clip_is_what_it_is_said_to_be():
  """Its frames are those of a test example that the model was never trained on, enlarged."""
  import numpy as np

  from data_pipelines.builders import digits_rendering as rendering
  from data_pipelines.media import video_files

  expected = rendering.render(*[make.SHOWN[0], 'test', make.SHOWN[1]]).frames.astype(float)
  frames = [Image.fromarray(frame.pixels()) for frame in video_files.frames(cover_jax.DEMO_CLIP)]
  small = np.array([np.asarray(f.resize((32, 32), Image.Resampling.BOX)) for f in frames], float)
  assert small.shape == expected.shape and np.abs(small - expected).mean() < 12
