"""Files that were cut short are told from whole ones, in each family of containers."""

import av
import numpy as np
import pytest

from data_pipelines.containers import missing_bytes
from data_pipelines.contract import UserError
from data_pipelines.video_files import frames
from tests.test_video_files import write

CONTAINERS = {'a.avi': {}, 'a.mkv': {}, 'a.mp4': {'movflags': 'faststart'}, 'a.mov': {'movflags': 'faststart'}}


@pytest.mark.parametrize('name', CONTAINERS)
def test_a_file_says_how_much_of_it_is_missing(tmp_path, name):
  path = tmp_path / name
  write(path, 12, codec='mpeg4', **CONTAINERS[name])
  data = path.read_bytes()
  assert missing_bytes(str(path)) == 0
  for cut in (9, 100, len(data) // 2):
    path.write_bytes(data[:-cut])
    assert 0 < missing_bytes(str(path)) <= cut
  path.write_bytes(data + b'junk behind the end')
  assert missing_bytes(str(path)) == 0


@pytest.mark.parametrize('name', CONTAINERS)
def test_no_cut_passes_for_a_shorter_video(tmp_path, name):
  """FFmpeg reads most of these files without a word, as if the last frames had never been."""
  path = tmp_path / name
  write(path, 30, codec='mpeg4', **CONTAINERS[name])
  data = path.read_bytes()
  assert len(list(frames(str(path)))) == 30
  for cut in np.linspace(len(data) - 9, len(data) * 0.4, 12).astype(int):
    path.write_bytes(data[:cut])
    with pytest.raises(UserError):
      list(frames(str(path)))


def test_live_recordings_do_not_say_how_long_they_are(tmp_path):
  """Written to a pipe, a Matroska segment has the length "not known" and an AVI all ones."""
  path = write(tmp_path / 'live.mkv', 12, codec='mpeg4', live='1')
  assert missing_bytes(path) == 0
  riff = tmp_path / 'live.avi'
  riff.write_bytes(b'RIFF\xff\xff\xff\xffAVI ' + bytes(50))
  assert missing_bytes(str(riff)) == 0


@pytest.mark.parametrize('start', [b'', b'RIFF', b'\x1a\x45\xdf\xa3', b'\x1a\x45\xdf\xa3\x01', b'\0\0\0\1ftyp', b'GIF'])
def test_odd_starts_are_no_error(tmp_path, start):
  (tmp_path / 'x').write_bytes(start)
  assert missing_bytes(str(tmp_path / 'x')) >= 0


def test_every_whole_file_of_the_kit_is_whole(media):
  files = [p for p in media.glob('video*/*') if p.suffix != '.txt']
  assert len(files) > 15
  assert {p.name: n for p in files if (n := missing_bytes(str(p)))} == {}
  assert all(av.open(str(p)).streams.video for p in files)
