"""The matrix of files (docs/files.md): some of its rows, read as all are; and that its verdicts can be other ones."""

import pathlib
import re

import numpy as np
import pytest

from benchmarks import media_matrix
from benchmarks.media_picture_rows import picture_rows
from benchmarks.media_recordings import Recorded
from benchmarks.media_rows import video_rows
from data_pipelines.contract import UserError
from data_pipelines.media import video_files

# With the name of a program all rows are listed; none is made by that.
ROWS = {row.name: row for row in (*video_rows('ffmpeg'), *picture_rows('ffmpeg'))}
RIGHT = [
  *('h264.mp4', 'mjpeg.mov', 'prores.mov', 'vp8.webm', 'xvid.avi', 'mpeg2.vob', 'h264.m2ts', 'wmv2.wmv', 'raw.y4m'),
  *('709_full.mp4', '10bit.mp4', 'grey.mkv', 'transposed.mp4', 'sei.ts', 'sei_mirrored.ts', 'variable.webm'),
  *('late.mkv', 'joined.ts', 'wraps.ts', 'edited.mp4', 'one.mkv', 'cover.mkv', 'seam.ts', 'junk.avi'),
  *('exif_7.jpg', 'cmyk.jpg', 'rgb_16.png', 'grey_16.tif', 'moving.webp'),
]
REFUSED = ['sound.mp4', 'half.webm', 'hole.ts', 'bytes.mov', 'pieces.mp4', 'half.gif', 'floats.tif', 'bytes.png']


@pytest.mark.parametrize('name', RIGHT)
def test_a_row_is_right(tmp_path, name):
  result = media_matrix.judge(ROWS[name], tmp_path / name, media_matrix.program())
  assert result.cells[-1] == 'right' and not result.wrong


@pytest.mark.parametrize('name', REFUSED)
def test_a_row_is_refused(tmp_path, name):
  result = media_matrix.judge(ROWS[name], tmp_path / name, None)
  assert result.cells[-1].startswith('refused: ') and not result.wrong


# What a reader might get wrong, as what was recorded is changed: (row, change, the verdict's words).
LIES = {
  'frames': ('h264.mp4', lambda r: Recorded(r.pictures[:-1], r.seconds[:-1]), '10 frames for 9'),
  'order': ('h264.mp4', lambda r: Recorded(r.pictures[::-1], r.seconds), 'other pictures'),
  'turned': ('h264.mp4', lambda r: Recorded([p[::-1, ::-1] for p in r.pictures], r.seconds), 'upside down'),
  'mirrored': ('exif_1.jpg', lambda r: Recorded([p[:, ::-1] for p in r.pictures], r.seconds), 'mirrored'),
  'size': ('h264.mp4', lambda r: Recorded([p[:-2] for p in r.pictures], r.seconds), 'another size'),
  'times': ('h264.mp4', lambda r: Recorded(r.pictures, [1.1 * t for t in r.seconds]), 'times off by 0.09 s'),
  'none': ('still.bmp', lambda r: Recorded([], []), '1 frames of what is no video'),
}


@pytest.mark.parametrize('lie', LIES)
def test_what_is_wrong_is_called_so(tmp_path, lie):
  name, change, words = LIES[lie]
  row = ROWS[name]
  result = media_matrix.judge(row._replace(make=lambda path: change(row.make(path))), tmp_path / name, None)
  assert result.wrong and words in result.cells[-1] and result.cells[-1].startswith('WRONG: ')


@pytest.mark.parametrize('name', ['h264.mp4', '709_full.mp4'])
def test_wrong_colours_are_seen(tmp_path, monkeypatch, name):
  """A reader that takes every video for BT.601 of limited range is right about one of these."""
  real = video_files.frames

  def careless(path, threads=0):
    for frame in real(path, threads):
      raw = frame.pixels.args[0]
      raw.colorspace, raw.color_range = 5, 1
      yield frame

  monkeypatch.setattr(video_files, 'frames', careless)
  result = media_matrix.judge(ROWS[name], tmp_path / name, None)
  assert result.cells[-1] == ('right' if name == 'h264.mp4' else 'WRONG: other pictures')


def test_a_refusal_without_a_reason_is_wrong(tmp_path):
  result = media_matrix.judge(ROWS['half.webm']._replace(refuse=''), tmp_path / 'a.webm', None)
  assert result.wrong and result.cells[-1].startswith('WRONG: refused: ')


def test_a_build_that_sees_something_else_is_wrong(tmp_path, monkeypatch):
  blind = lambda path, still: [np.zeros((128, 192, 3), np.uint8)] * 10
  monkeypatch.setattr(media_matrix, 'built', blind)
  assert 'see different pictures' in media_matrix.judge(ROWS['h264.mp4'], tmp_path / 'a.mp4', None).cells[-1]
  assert media_matrix.judge(ROWS['half.webm'], tmp_path / 'a.webm', None).wrong


def test_the_other_decoder_counts_where_it_is_right_itself(tmp_path, monkeypatch):
  shown = {}

  def another(path, ffmpeg):
    read = media_matrix.ours(path)
    return read._replace(pictures=[p + np.uint8(shown['more']) for p in read.pictures])

  monkeypatch.setattr(media_matrix, 'theirs', another)
  row = ROWS['qtrle.mov']
  for more, cell, verdict in ((0, '0.0', 'right'), (3, '3.0', 'WRONG: other colours'), (20, '(20.0)', 'right')):
    shown['more'] = more
    cells = media_matrix.judge(row, tmp_path / 'a.mov', 'ffmpeg').cells
    assert cells[5] == cell and cells[-1].startswith(verdict)


def test_the_document_has_the_table_of_these_rows():
  text = (pathlib.Path(__file__).parent.parent / 'docs/files.md').read_text()
  begin, end = '<!-- tables: begin -->', '<!-- tables: end -->'
  table = text[text.index(begin) : text.index(end)]
  written = [line.strip('| ').split(' | ') for line in table.splitlines() if line.startswith('| ')][2:]
  assert [cells[:2] for cells in written] == [[row.name, row.what] for row in ROWS.values()] and len(written) >= 60
  refused = [cells for cells in written if cells[-1].startswith('refused: ')]
  right = [cells for cells in written if cells[-1] == 'right']
  assert len(refused) + len(right) == len(written)
  assert all(ROWS[cells[0]].refuse for cells in refused)
  said = re.search(r'(\d+) files: (\d+) right, (\d+) refused, 0 wrong', table)
  assert [int(n) for n in said.groups()] == [len(written), len(right), len(refused)]


def test_the_command_needs_the_other_decoder(monkeypatch):
  monkeypatch.setattr(media_matrix, 'program', lambda: None)
  with pytest.raises(UserError, match='imageio-ffmpeg'):
    media_matrix.main([])
