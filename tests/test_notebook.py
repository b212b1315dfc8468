"""The notebook's cells run from the first to the last, as a user of Colab would run them."""

import json
import pathlib
import re
import shutil

import pytest
from PIL import Image

from tests import tiny_checkpoint
from tests.test_video_files import write

NOTEBOOK = pathlib.Path(__file__).parent.parent / 'colab/cover_jax.ipynb'


def cells():
  notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
  assert notebook['nbformat'] == 4
  return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def execute(parameters):
  """Runs every code cell but the installation, with other parameters; returns the names that they leave."""
  import matplotlib.pyplot as plt

  names = {}
  for number, cell in enumerate(cells()):
    tags, text = cell['metadata'].get('tags', []), ''.join(cell['source'])
    if 'install' in tags:
      assert all(line.startswith(('%pip install', '#')) for line in text.splitlines())
      continue
    exec(compile(text, f'{NOTEBOOK.name}, code cell {number}', 'exec'), names)
    if 'parameters' in tags:
      assert set(parameters) <= set(names), 'the parameters cell names other parameters'
      names |= parameters
    if 'plt' in names:
      names['figures'] = names.get('figures', []) + [plt.figure(n) for n in plt.get_fignums()]
      plt.close('all')
  return names


@pytest.mark.parametrize('name', ['clip.mp4', 'photo.png'])
def test_runs(tmp_path, capsys, monkeypatch, name):
  monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)
  write(tmp_path / 'clip.mp4', 40, size=(48, 64))
  Image.new('RGB', (64, 48), 'red').save(tmp_path / 'photo.png')
  names = execute({'CHECKPOINT': tiny_checkpoint.trained(), 'CLIP': str(tmp_path / name)})
  out = capsys.readouterr().out
  assert 'acts: 5 classes' in out and re.search(r'^things things \d \d+\.\d%', out, re.MULTILINE)
  assert set(names['predictions']) == {'acts', 'moves', 'things'}
  attention, metrics = names['figures']
  assert len(attention.axes) == 2 * (4 if name == 'clip.mp4' else 1)  # a photo is seen as the image source sees it
  curves = {line.get_label(): len(line.get_xdata()) for line in metrics.axes[0].lines}
  assert curves['video/acts'] == curves['image/things'] == 3


def test_an_export_has_no_metrics_and_runs(tmp_path, monkeypatch):
  monkeypatch.setattr('matplotlib.pyplot.show', lambda: None)
  path = next(pathlib.Path(tiny_checkpoint.trained()).glob('checkpoints/*.flax'))
  shutil.copy(path, tmp_path / 'model.flax')
  names = execute({'CHECKPOINT': str(tmp_path / 'model.flax'), 'CLIP': write(tmp_path / 'clip.mp4', 10)})
  assert names['rows'] == []


def test_is_committed_without_outputs():
  assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in cells())
