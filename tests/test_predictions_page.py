"""The page of predictions: what stands in it, what has no room, and that nothing in it is run or fetched."""

import base64
import hashlib
import io

import numpy as np
from PIL import Image

from cover_jax.evaluation import answers, page, predictions_page
from cover_jax.evaluation.predictions_page import Shown
from tests.test_report import EVIL, Parsed


def picture():
  encoded = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(encoded, 'PNG')
  return encoded.getvalue()


CLIP = answers.moving(np.random.default_rng(1).integers(0, 255, (4, 24, 32, 3), np.uint8))
FILES = [
  Shown(f'/{EVIL}.mp4', 8.9, {'acts': [(EVIL, 0.75), ('b', 0.25)]}, {'acts': 5}, [(EVIL, CLIP)], *[picture()] * 2),
  Shown('photo.jpg', 0.0, {'things': [('x', 1.0)]}, {'things': 1}, [('things: x', CLIP)]),
  Shown('none.mp4', trouble='none.mp4 cannot be read.'),
]


def test_every_file_is_there_with_its_pictures_and_what_failed():
  parsed = Parsed(predictions_page.of_files('A model.', FILES))
  images = [a['src'] for tag, a in parsed.elements if tag == 'img']
  kind, _, data = images[0].partition(';base64,')
  assert (kind, base64.b64decode(data)) == ('data:image/webp', CLIP)
  assert [src.partition(';')[0] for src in images] == ['data:image/webp', *['data:image/png'] * 2, 'data:image/webp']
  assert [float(a['value']) for tag, a in parsed.elements if tag == 'meter'] == [0.75, 0.25, 1.0]
  assert '5 windows' in parsed.texts['small'] and '1 window' in parsed.texts['small']
  assert 'none.mp4 cannot be read.' in parsed.texts['p'] and parsed.texts['h1'] == ['What a model says of 3 files']
  cells = parsed.texts['td']
  assert cells == [f'{EVIL} 75%', '-', '-', 'x 100%', '-', '-']  # a line a file, a column a head
  links = [a['href'][1:] for tag, a in parsed.elements if tag == 'a']
  assert links == [a['id'] for tag, a in parsed.elements if tag == 'section'] and len(links) == 3


def test_names_are_text_and_nothing_is_run_or_fetched():
  text = predictions_page.of_files(EVIL, [Shown('bytes\udcff.mp4'), *FILES])
  parsed = Parsed(text)
  kinds = {tag for tag, _ in parsed.elements}
  assert 'script' not in kinds and not parsed.open and any(EVIL in t for t in parsed.texts['span'])
  assert not [a for _, given in parsed.elements for a in given if a.startswith('on') or a == 'style']
  policy = next(a['content'] for tag, a in parsed.elements if tag == 'meta' and 'http-equiv' in a)
  digest = base64.b64encode(hashlib.sha256(parsed.texts['style'][0].encode()).digest()).decode()
  assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"


def test_pictures_without_room_are_counted(monkeypatch):
  many = [Shown(f'{i}.mp4', 1.0, {'acts': [('a', 1.0)]}, {'acts': 1}, [('a', CLIP)]) for i in range(50)]
  whole = predictions_page.of_files('A model.', many)
  assert whole.count('data:image/webp') == 50 and 'no room' not in whole
  monkeypatch.setattr(page, 'MOST_BYTES', 60_000)
  part = predictions_page.of_files('A model.', many)
  kept = part.count('data:image/webp')
  assert 0 < kept < 50 and f'{50 - kept} pictures have no room' in part and len(part.encode()) <= 60_000
  assert part.count('<section') == 50
