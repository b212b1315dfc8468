"""Makes what the notebook shows: the clip that comes with the package, and the notebook's stored outputs.

    python -m colab.make clip       # cover_jax/demo/clip.mp4, a clip of the embedded test data, enlarged
    python -m colab.make outputs    # runs the cells and stores in the notebook what they print and draw

The outputs carry a fingerprint of cells, model and clip: tests/test_notebook.py says when to make them again.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

import cover_jax
from cover_jax import api
from data_pipelines import durable, flags

NOTEBOOK = pathlib.Path(__file__).parent / 'cover_jax.ipynb'
SHOWN = ('motions', 31)  # the embedded data set and the number of its test example in the clip
_ENLARGED, _FPS = 4, 10
_DPI = 80  # of stored pictures


def read() -> dict[str, Any]:
  """The notebook."""
  return json.loads(NOTEBOOK.read_text(encoding='utf-8'))


def code_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Its cells of code, but for the installation."""
  return [c for c in notebook['cells'] if c['cell_type'] == 'code' and 'install' not in c['metadata'].get('tags', ())]


def fingerprint(notebook: Mapping[str, Any]) -> str:
  """SHA-256 of what the outputs come from: the cells' code, the model, the clip and its curves."""
  digest = hashlib.sha256(json.dumps([''.join(cell['source']) for cell in code_cells(notebook)]).encode())
  for path in (
    pathlib.Path(api.DEMO),
    pathlib.Path(api.DEMO).with_name('metrics.jsonl'),
    pathlib.Path(cover_jax.DEMO_CLIP),
  ):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def execute(
  cells: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[Any]]]:
  """Runs cells one after the other, in one namespace.

  Args:
    cells: of code.
    parameters: names that are set after the cell tagged 'parameters'.

  Returns:
    (the names that they leave, the outputs of each cell as a notebook stores them).
  """
  import matplotlib.pyplot as plt

  names, outputs = {}, []
  for number, cell in enumerate(cells):
    printed, drawn = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
      exec(compile(''.join(cell['source']), f'{NOTEBOOK.name}, code cell {number}', 'exec'), names)
    if 'parameters' in cell['metadata'].get('tags', ()):
      assert set(parameters) <= set(names), 'the parameters cell names other parameters'
      names |= parameters
    for figure in map(plt.figure, plt.get_fignums()):
      names.setdefault('figures', []).append(figure)
      rendered = io.BytesIO()
      figure.savefig(rendered, dpi=_DPI, format='png', bbox_inches='tight')
      drawn.append(base64.b64encode(rendered.getvalue()).decode())
    plt.close('all')
    of_cell = [{'data': {'image/png': image}, 'metadata': {}, 'output_type': 'display_data'} for image in drawn]
    if printed.getvalue():
      lines = printed.getvalue().splitlines(keepends=True)
      of_cell.insert(0, {'name': 'stdout', 'output_type': 'stream', 'text': lines})
    outputs.append(of_cell)
  return names, outputs


def make_clip() -> None:
  """Writes the clip that comes with the package."""
  from data_pipelines.builders import digits_rendering as rendering
  from data_pipelines.media import video_writing

  config, number = SHOWN
  frames = rendering.render(config, 'test', number).frames
  size = (_ENLARGED * rendering.SIZE,) * 2
  large = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
  print(video_writing.write_video(cover_jax.DEMO_CLIP.removesuffix('.mp4'), large, _FPS))


def make_outputs() -> None:
  """Runs the notebook and stores its outputs in it."""
  notebook = read()
  cells = code_cells(notebook)
  _, outputs = execute(cells, {})
  for number, (cell, of_cell) in enumerate(zip(cells, outputs, strict=True), 1):
    cell |= {'outputs': of_cell, 'execution_count': number}
  notebook['metadata']['cover_jax'] = {'outputs_of': fingerprint(notebook)}
  durable.write(str(NOTEBOOK), json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
  print(NOTEBOOK)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('colab.make', __doc__)
  to.add_argument('what', choices=('clip', 'outputs'))
  return to


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run({'clip': make_clip, 'outputs': make_outputs}[flags.parse(parser(), argv).what])


if __name__ == '__main__':
  sys.exit(main())
