"""Files that were cut short or have a hole are told from whole ones, in each family of containers."""

import contextlib
import pathlib
import re
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.contract import UserError
from data_pipelines.media import chained, container_bytes, container_streams, transcode
from data_pipelines.media.containers import damage
from data_pipelines.media.video_files import frames, header
from tests.test_video_files import write

PICTURE = transcode.Settings('image', short_side=0, fps=0, jpeg_quality=95)
# Name: (codec, container or None for the name's, options of the muxer).
CONTAINERS = {
  'a.avi': ('mpeg4', None, {}),
  'a.mkv': ('mpeg4', None, {}),
  'a.webm': ('libvpx', None, {}),
  'a.mp4': ('mpeg4', None, {}),
  'first.mp4': ('mpeg4', None, {'movflags': 'faststart'}),
  'a.mov': ('mjpeg', None, {'movflags': 'faststart'}),
  'fragments.mp4': ('libx264', None, {'movflags': 'frag_keyframe+empty_moov'}),
  'dash.mp4': ('libx264', None, {'movflags': 'dash+frag_keyframe+empty_moov'}),
  'a.3gp': ('mpeg4', None, {}),
  'a.flv': ('flv', None, {}),
  'a.ogv': ('libvpx', 'ogg', {}),
  'a.wmv': ('wmv2', None, {}),
  'a.ts': ('mpeg2video', None, {}),
  'a.m2ts': ('mpeg2video', 'mpegts', {'mpegts_m2ts_mode': '1'}),
  'a.mpg': ('mpeg2video', None, {}),
  'a.vob': ('mpeg2video', 'vob', {}),
  'a.mxf': ('mpeg2video', None, {}),
  'a.ivf': ('libvpx', None, {}),
  'a.y4m': ('rawvideo', 'yuv4mpegpipe', {}),
}
# Where a cut passes for the end, and why it must.
CANNOT_KNOW = {
  'live.mkv': ('mpeg4', 'matroska', {'live': '1'}),  # of unknown length: a cut between two blocks
  'a.h264': ('libx264', None, {}),  # no container: a cut between two frames
}


def noise(path, codec, container, options, count=30):
  rng = np.random.default_rng(0)
  with av.open(str(path), 'w', format=container, options=options) as out:
    quick = {'deadline': 'realtime', 'cpu-used': '8'} if codec == 'libvpx' else {}
    stream = out.add_stream(codec, rate=25, options=quick)
    stream.width, stream.height, stream.bit_rate, stream.gop_size = 176, 144, 400_000, 10
    stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
    for _ in range(count):
      picture = rng.integers(0, 256, (18, 22, 3), np.uint8).repeat(8, 0).repeat(8, 1)
      out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    out.mux(stream.encode())
  return path.read_bytes()


def accepted(path, data):
  """The number of frames, or None if the file is refused."""
  path.write_bytes(data)
  try:
    return len(list(frames(str(path), threads=1)))
  except UserError:
    return None


@pytest.mark.parametrize('name', CONTAINERS)
def test_no_cut_passes_for_a_shorter_video(tmp_path, name):
  """FFmpeg reads most of these files without a word, as if the last frames had never been."""
  path = tmp_path / name
  data = noise(path, *CONTAINERS[name])
  assert accepted(path, data) == 30 and damage(str(path)) == ''
  cuts = [len(data) * i // 20 for i in range(1, 20)] + [len(data) - 9, len(data) - 100]
  if name.endswith('ts'):  # a cut between two packets cannot be known
    cuts = [cut - (cut % (192 if name == 'a.m2ts' else 188) == 0) for cut in cuts]
  if name == 'fragments.mp4':  # the last bytes are an index, which is another box than the pictures
    cuts = cuts[:-2]
  assert {cut: n for cut in cuts if (n := accepted(path, data[:cut]))} == {}


@pytest.mark.parametrize('name', CANNOT_KNOW)
def test_what_does_not_say_its_length_may_be_cut_at_a_seam(tmp_path, name):
  path = tmp_path / name
  data = noise(path, *CANNOT_KNOW[name])
  assert accepted(path, data) == 30
  with av.open(str(path)) as container:
    seams = [p.pos for p in container.demux(video=0) if p.size and p.pos]
  for seam in seams[5:25:5]:
    found = accepted(path, data[:seam])
    assert found is None or found < 30


@pytest.mark.parametrize('name', [n for n in CONTAINERS if n != 'a.y4m'])
def test_no_hole_passes_unseen(tmp_path, name):
  """Bytes that were lost on the way, anywhere behind the header."""
  path = tmp_path / name
  data = noise(path, *CONTAINERS[name])
  for i in range(4, 19, 2):
    at = len(data) * i // 20
    assert accepted(path, data[:at] + data[at + 500 :]) is None, i


def test_an_avi_that_lost_the_head_of_its_packets_is_told(tmp_path):
  """FFmpeg finds the packets behind the hole by their names, and says nothing of those in it."""
  path = tmp_path / 'a.avi'
  data = noise(path, *CONTAINERS['a.avi'])
  at = data.index(b'movi') - 8
  second = data.index(b'00dc', data.index(b'00dc', at) + 4)
  assert accepted(path, data[:at] + bytes(second - at) + data[second:]) is None


@pytest.mark.parametrize('name', [n for n in CONTAINERS if n not in ('a.ivf', 'a.y4m')])
def test_junk_behind_the_end_is_no_damage(tmp_path, name):
  path = tmp_path / name
  data = noise(path, *CONTAINERS[name])
  for junk in (b'junk behind the end', bytes(1000), np.random.default_rng(0).bytes(3000)):
    assert accepted(path, data + junk) == 30


@pytest.mark.parametrize('name', ['a.gif', 'a.webp', 'a.png'])
def test_animations_are_whole_or_refused(tmp_path, name):
  rng = np.random.default_rng(0)
  pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(6)]
  path = tmp_path / name
  pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
  data = path.read_bytes()
  assert accepted(path, data) == 6
  assert {i: n for i in range(1, 20) if (n := accepted(path, data[: len(data) * i // 20]))} == {}
  for i in range(20):
    path.write_bytes(data[: len(data) * i // 20])
    with contextlib.suppress(UserError):  # nothing else may come: predictions ask for the header first
      header(str(path))


@pytest.mark.parametrize('name', ['a.avi', 'a.mkv', 'first.mp4', 'a.flv', 'a.mpg', 'a.ts'])
def test_a_file_says_how_much_of_it_is_missing(tmp_path, name):
  path = tmp_path / name
  data = noise(path, *CONTAINERS[name])
  for cut in (9, 100, len(data) // 2 + 1):
    path.write_bytes(data[:-cut])
    (missing,) = [int(word.replace(',', '')) for word in damage(str(path)).split() if word[0].isdigit()]
    assert 0 < missing <= cut


def test_checksums_are_held_against_what_they_cover(tmp_path):
  """No decoder of VP8 notices that its bytes were changed."""
  for name in ('a.mkv', 'a.ogv'):
    path = tmp_path / name
    data = bytearray(noise(path, 'libvpx', *CONTAINERS[name][1:]))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert 'checksum' in damage(str(path))


def test_the_head_of_a_matroska_file_is_checked(tmp_path):
  path = tmp_path / 'a.mkv'
  data = noise(path, *CONTAINERS['a.mkv'])
  height = data.index(bytes.fromhex('BA8190'))  # the element for the height, of one byte: 144
  path.write_bytes(data[: height + 2] + b'\x80' + data[height + 3 :])
  assert damage(str(path)).startswith('the checksum at its byte ')


def test_lengths_in_the_head_of_a_webm_file_are_held_against_each_other(tmp_path):
  """It has no checksums there; and an element that leads out of the file would hide all behind it."""
  path = tmp_path / 'a.webm'
  data = noise(path, *CONTAINERS['a.webm'])
  height = data.index(bytes.fromhex('BA8190'))
  assert damage(str(path)) == ''
  path.write_bytes(data[: height + 1] + b'\xbf' + data[height + 2 :])  # as if it had 63 bytes
  assert damage(str(path)) == f'its structure breaks at byte {height}'
  void = data.index(b'\xec\x01\0\0\0\0')
  path.write_bytes(data[: void + 4] + b'\x4f' + data[void + 5 :])
  assert damage(str(path)) == f'its structure breaks at byte {void}'


def test_a_place_that_no_file_has_is_damage(tmp_path):
  path = tmp_path / 'a.wmv'
  data = bytearray(noise(path, *CONTAINERS['a.wmv']))
  data[16:24] = b'\xff' * 7 + b'\x7f'  # the length of the header
  path.write_bytes(data)
  assert damage(str(path)) == 'its structure breaks at byte 16'
  for at in (1 << 63, (1 << 63) - 1):
    with open(path, 'rb') as f, pytest.raises(container_bytes.Damage, match='makes no sense'):
      container_bytes.bytes_at(f, at, 4)


def test_bytes_too_many_in_the_last_packet_of_a_wmv_are_noticed(tmp_path):
  path = tmp_path / 'a.wmv'
  data = noise(path, *CONTAINERS['a.wmv'])
  at = data.rindex(bytes.fromhex('90080033B1E5CF11A6D900AA0062CE6C')[:8]) - 400  # before the index
  path.write_bytes(data[:at] + bytes(range(1, 118)) + data[at:])
  assert damage(str(path)).startswith('its structure breaks at byte ')


@pytest.mark.parametrize('animated', [False, True])
def test_a_changed_byte_of_a_png_is_noticed(tmp_path, animated):
  """Pillow passes over the checksums, and the pixels behind the byte are other ones."""
  y, x = np.mgrid[:128, :192]
  first, *rest = [Image.fromarray((x * y // (i + 40)).astype(np.uint8)) for i in range(3)]
  path = tmp_path / 'a.png'
  first.save(path, save_all=animated, append_images=rest if animated else [])
  data = path.read_bytes()
  transcode.image(str(path), PICTURE)
  missed = 0
  for at in range(data.index(b'IDAT') + 8, len(data) - 100, len(data) // 30):
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(UserError) as predicted:
      list(frames(str(path)))
    with contextlib.suppress(transcode.Failure):  # it takes the first picture of an animation, and all of the file
      transcode.image(str(path), PICTURE)
      pytest.fail('a build takes it')
    missed += 'the checksum at its byte' in str(predicted.value)
  assert missed > 2  # by Pillow
  text = data.index(b'IDAT') - 4  # a note whose checksum is wrong hides no pixel
  path.write_bytes(data[:text] + struct.pack('>I', 3) + b'tEXta\0b' + bytes(4) + data[text:])
  assert damage(str(path)) == ''
  path.write_bytes(data[:-12])
  assert damage(str(path)) == 'its last 12 bytes are missing'


def test_bytes_too_many_in_an_avi_are_noticed(tmp_path):
  """The length of the file is right for a part of it, as if junk stood behind the end; but packets are out of place."""
  path = tmp_path / 'a.avi'
  data = noise(path, *CONTAINERS['a.avi'])
  for at in (data.index(b'movi') - 4, len(data) // 3, len(data) // 2):
    path.write_bytes(data[:at] + bytes(range(1, 118)) + data[at:])
    with pytest.raises(UserError, match='its structure breaks at byte'):
      list(frames(str(path)))


def test_an_avi_may_keep_free_places_and_leave_padding_out(tmp_path):
  path = tmp_path / 'a.avi'
  chunk = lambda name, data: name + struct.pack('<I', len(data)) + data
  for packets in (
    chunk(b'00dc', b'odd') + chunk(b'01wb', bytes(4)),
    chunk(b'00dc', b'odd') + b'\0' + chunk(b'01wb', bytes(4)),
    chunk(b'00dc', bytes(4)) + bytes(100),
  ):
    path.write_bytes(chunk(b'RIFF', b'AVI ' + chunk(b'LIST', b'movi' + packets) + chunk(b'idx1', bytes(16))))
    assert damage(str(path)) == ''


def test_bytes_too_many_before_a_picture_of_a_gif_are_noticed(tmp_path):
  path = tmp_path / 'a.gif'
  first, *rest = [Image.fromarray((np.arange(1024) // (i + 4)).astype(np.uint8).reshape(32, 32)) for i in range(3)]
  first.save(path, save_all=True, append_images=rest)
  data = path.read_bytes()
  for at in (100, data.rindex(b'!\xf9\x04')):
    path.write_bytes(data[:at] + b'\x01' * 5 + data[at:])
    with pytest.raises(UserError, match='its structure breaks at byte'):
      list(frames(str(path)))


def test_the_checksum_of_ogg_is_the_one_of_its_standard():
  """RFC 3533: polynomial 0x04c11db7, begun with zero, highest bit first; computed here bit by bit."""
  for data in (b'', b'\1', b'OggS and what follows', bytes(range(256))):
    register = 0
    for byte in data:
      register ^= byte << 24
      for _ in range(8):
        register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    assert container_streams.checksum(data) == register
  assert zlib.crc32(b'OggS') != container_streams.checksum(b'OggS')


def test_live_recordings_do_not_say_how_long_they_are(tmp_path):
  """Written to a pipe, a Matroska segment has the length "not known" and an AVI all ones."""
  path = write(tmp_path / 'live.mkv', 12, codec='mpeg4', live='1')
  assert damage(path) == ''
  riff = tmp_path / 'live.avi'
  riff.write_bytes(b'RIFF\xff\xff\xff\xffAVI ' + bytes(50))
  assert damage(str(riff)) == ''


def test_a_large_avi_is_several_parts(tmp_path):
  path = tmp_path / 'a.avi'
  part = lambda kind, size: b'RIFF' + struct.pack('<I', size) + kind + bytes(size - 4)
  whole = part(b'AVI ', 1000) + part(b'AVIX', 500)
  path.write_bytes(whole)
  assert damage(str(path)) == ''
  path.write_bytes(whole[:-100])
  assert 'missing' in damage(str(path))


STARTS = [
  b'',
  b'RIFF',
  b'\x1a\x45\xdf\xa3',
  b'\x1a\x45\xdf\xa3\x01',
  b'\0\0\0\1ftyp',
  b'GIF',
  b'GIF89a',
  b'FLV\1',
  b'OggS',
]
STARTS += [
  b'YUV4MPEG2 W H\n',
  b'YUV4MPEG2 Wx\nFRAME\n',
  b'DKIF',
  b'\0\0\1\xba',
  bytes.fromhex('060E2B34020501010D01020101'),
]
STARTS += [b'\0\0\0\x10sidx', bytes.fromhex('3026B2758E66CF11A6D900AA0062CE6C'), b'G' + bytes(187) + b'G']


@pytest.mark.parametrize('start', STARTS)
def test_odd_starts_are_no_error(tmp_path, start):
  for rest in (b'', bytes(600), b'\xff' * 600, np.random.default_rng(0).bytes(600)):
    (tmp_path / 'x').write_bytes(start + rest)
    assert '\n' not in damage(str(tmp_path / 'x'))


def test_every_whole_file_of_the_kit_is_whole(media):
  files = [p for p in media.glob('video*/*') if p.suffix != '.txt']
  assert len(files) > 15
  assert {p.name: found for p in files if (found := damage(str(p)))} == {}
  assert all(av.open(str(p)).streams.video for p in files)


@pytest.mark.parametrize(
  ('name', 'data'),
  [
    ('a.mp4', b'ffconcat version 1.0\nfile secret.mp4\n'),
    ('a.mp4', b'\xef\xbb\xbf\n#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n'),
    ('a.mp4', b'<?xml version="1.0"?>\n<MPD><BaseURL>secret.mp4</BaseURL></MPD>'),
    ('a%03d.jpg', b'junk'),
  ],
)
def test_a_file_that_stands_for_others_is_refused(tmp_path, name, data):
  write(tmp_path / 'secret.mp4', 3)
  Image.new('RGB', (32, 32)).save(tmp_path / 'a000.jpg')
  (tmp_path / name).write_bytes(data)
  for read in (lambda path: list(frames(path)), header):
    with pytest.raises(UserError, match='stands for other files, which are not read in its place'):
      read(str(tmp_path / name))


def test_ogg_files_one_behind_the_other_are_refused_by_name(tmp_path):
  parts = [pathlib.Path(write(tmp_path / name, 6, codec='libvpx')).read_bytes() for name in ('a.ogg', 'b.ogg')]
  path = tmp_path / 'c.ogv'
  path.write_bytes(b''.join(parts))
  for read in (header, lambda name: list(frames(name))):
    with pytest.raises(UserError, match=r'c\.ogv is several Ogg files one behind the other.*join them'):
      read(str(path))
  assert len(list(frames(str(tmp_path / 'a.ogg')))) == 6


@pytest.mark.parametrize('name', ['a.mp4', 'a.3gp', 'fragments.mp4', 'a.wmv', 'a.mkv', 'live.mkv', 'a.webm', 'a.mxf'])
def test_files_one_behind_the_other_are_refused_where_readers_show_the_first(tmp_path, name):
  path = tmp_path / name
  data = noise(path, *(CONTAINERS | CANNOT_KNOW)[name])
  assert accepted(path, data) == 30
  path.write_bytes(data + data)
  for read in (header, lambda name: list(frames(name))):
    with pytest.raises(
      UserError, match=rf'{name} is several (MP4|WMV|Matroska|MXF) files one behind the other.*join them'
    ):
      read(str(path))


@pytest.mark.parametrize('name', ['a.rm', 'a.swf', 'a.wtv', 'a.gif', 'a.webp'])
def test_so_are_others(tmp_path, name):
  """They are written by libraries that need not have each; what was not written is skipped."""
  path = tmp_path / name
  if name in ('a.gif', 'a.webp'):
    pictures = [Image.new('RGB', (32, 32), (9 * i, 0, 99)) for i in range(6)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
  else:
    codec = {'a.rm': 'rv20', 'a.swf': 'flv'}.get(name, 'mpeg2video')
    write(path, 6, codec=codec, fps=25)
  data = path.read_bytes()
  assert len(list(frames(str(path)))) == 6
  path.write_bytes(data + b'junk behind the end')
  assert chained.kind(str(path)) == ''
  path.write_bytes(data + data)
  for read in (header, lambda name: list(frames(name))):
    with pytest.raises(UserError, match=rf'{name} is several (RealMedia|SWF|WTV|GIF|WebP) files one behind the other'):
      read(str(path))


@pytest.mark.parametrize('slice_checksums', ['0', '1'])
def test_checksums_of_ffv1_slices_are_held_against_them(tmp_path, slice_checksums):
  """FFmpeg conceals such a slice, and flags no frame. Without checksums nothing can be known."""
  path = tmp_path / 'a.avi'
  with av.open(str(path), 'w') as out:
    stream = out.add_stream('ffv1', rate=25, options={'level': '3', 'slicecrc': slice_checksums})
    stream.width, stream.height, stream.pix_fmt = 96, 64, 'yuv420p'
    for i in range(5):
      pixels = np.random.default_rng(i).integers(0, 256, (64, 96, 3), np.uint8)
      out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
    out.mux(stream.encode())
  data = bytearray(path.read_bytes())
  assert len(list(frames(str(path)))) == 5
  with av.open(str(path)) as container:
    third = [packet for packet in container.demux(video=0) if packet.size][2]
    data[third.pos + 8 + third.size // 2] ^= 4
  path.write_bytes(data)
  if slice_checksums == '0':
    assert len(list(frames(str(path)))) == 5
  else:
    with pytest.raises(UserError, match=r'a\.avi is damaged: its decoder says so of frame 2 of 5, counted from 0'):
      list(frames(str(path)))


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.mp4', 3)
  denied = PermissionError(13, 'Permission denied')
  monkeypatch.setattr('builtins.open', lambda *_, **__: (_ for _ in ()).throw(denied))  # root may read all
  for read in (header, lambda name: list(frames(name))):
    with pytest.raises(UserError, match=r'a\.mp4 cannot be opened \(Permission denied\)'):
      read(path)


def test_fragments_that_bring_their_head_again_are_one_file(tmp_path):
  path = tmp_path / 'a.mp4'
  data = noise(path, 'libx264', None, {'movflags': 'frag_keyframe+empty_moov+default_base_moof'})
  data = data[: data.rindex(b'mfra') - 4]  # the places of the fragments, which will be others
  fragments = [found.start() - 4 for found in re.finditer(b'moof', data)]
  assert accepted(path, data[: fragments[1]] + data[: fragments[0]] + data[fragments[1] :]) == 30


@pytest.mark.parametrize(('cut', 'words'), [(0.4, 'its index, the box moov, is missing, and'), (0.9, 'of its index')])
def test_half_an_mp4_says_what_is_missing_and_what_to_do(tmp_path, cut, words):
  path = tmp_path / 'a.mp4'
  data = pathlib.Path(write(path, 30, codec='libx264', fps=25)).read_bytes()
  path.write_bytes(data[: int(len(data) * cut)])
  said = rf'a\.mp4 holds no frame that can be decoded \(.*{words}.*\): is it complete\? Fetch or copy it again\.'
  for read in (header, lambda name: list(frames(name))):
    with pytest.raises(UserError, match=said):
      read(str(path))


def test_a_picture_in_boxes_has_an_index_of_another_name(tmp_path):
  Image.new('RGB', (64, 48)).save(tmp_path / 'a.avif')
  assert damage(str(tmp_path / 'a.avif')) == ''


@pytest.mark.parametrize('name', ['a.mp4', 'a.avi', 'a.mkv', 'a.webm', 'a.png'])
def test_builds_and_predictions_say_the_same_of_damage(tmp_path, name):
  path = tmp_path / name
  if name == 'a.png':
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
  else:
    codec = {'a.mp4': 'libx264', 'a.avi': 'mpeg4', 'a.mkv': 'libx264', 'a.webm': 'libvpx'}[name]
    write(path, 30, codec=codec, fps=25, **({'movflags': 'faststart'} if name == 'a.mp4' else {}))
  data = path.read_bytes()
  for share in (0.1, 0.5, 0.9):
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError) as predicted:
      list(frames(str(path)))
    settings = PICTURE if name == 'a.png' else transcode.Settings('video', 0, 0, 85)
    with pytest.raises((UserError, transcode.Failure)) as built:
      transcode.image(str(path), settings) if name == 'a.png' else list(transcode.video(str(path), settings, []))
    assert str(predicted.value).removeprefix(f'{path} ') == str(built.value).removeprefix(f'{path} ')
