"""The rows of `benchmarks.media_matrix` that are videos: containers x codecs x what is odd about files of people."""

import functools
import os
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from benchmarks.media_recordings import (
  FRAMES,
  RATE,
  SIZE,
  Recorded,
  film,
  grey_film,
  note_matrix,
  scene,
  thumbnail,
  write,
  write_sound,
)

_MS = Fraction(1, 1000)


class Row(NamedTuple):
  """A file of the matrix.

  Attributes:
    name: of the file.
    what: is in it, in words.
    make: writes the file and says what it holds.
    refuse: why it may be refused; '': it must be read.
    coarse: mean error (0 to 255) that its codec makes.
    still: whether it is a picture, which builds of pictures read.
  """

  name: str
  what: str
  make: Callable[[Path], Recorded]
  refuse: str = ''
  coarse: float = 3.0
  still: bool = False


def video_rows(ffmpeg: str | None) -> Iterator[Row]:
  """All rows; those that PyAV cannot write need the program `ffmpeg`, and are left out where it is None."""
  yield from _codecs()
  yield from _colours()
  yield from _orientations()
  yield from _times()
  yield from _shapes()
  yield from _streams()
  yield from _damage()
  yield from _others()
  if ffmpeg is not None:
    yield from _by_program(ffmpeg)


def _written(*arguments, **options) -> Callable[[Path], Recorded]:
  return lambda path: write(path, *arguments, **options)


def _codecs() -> Iterator[Row]:
  """(name, codec, options of `write`, coarse) of every family of containers."""
  vp8 = {'sound': 'libopus'}
  wide = film(size=(576, 720))
  for name, what, codec, options, *coarse in (
    ('h264.mp4', 'MP4, H.264, AAC', 'libx264', {'sound': 'aac'}),
    ('faststart.mp4', 'MP4, index first, H.264', 'libx264', {'muxer': {'movflags': 'faststart'}}),
    ('fragments.mp4', 'MP4 in fragments, H.264', 'libx264', {'muxer': {'movflags': 'frag_keyframe+empty_moov'}}),
    ('dash.mp4', 'MP4 in fragments with `sidx`, H.264', 'libx264', {'muxer': {'movflags': 'dash+frag_every_frame'}}),
    ('bframes.mp4', 'MP4, H.264 with B-frames', 'libx264', {'options': {'preset': 'medium', 'bf': '3'}}),
    ('hevc.mp4', 'MP4, HEVC', 'libx265', {}),
    ('av1.mp4', 'MP4, AV1', 'libsvtav1', {}),
    ('vp9.mp4', 'MP4, VP9', 'libvpx-vp9', {}),
    ('mpeg4.mp4', 'MP4, MPEG-4', 'mpeg4', {}),
    ('mpeg2.mp4', 'MP4, MPEG-2', 'mpeg2video', {'rate': 25, 'recorded': _at(25)}),
    ('h264.mov', 'QuickTime, H.264, PCM', 'libx264', {'sound': 'pcm_s16le'}),
    ('mjpeg.mov', 'QuickTime, MJPEG', 'mjpeg', {'pixels': 'yuvj420p', 'full': True}),
    ('prores.mov', 'QuickTime, ProRes 422', 'prores_ks', {'pixels': 'yuv422p10le'}),
    (
      'dnxhr.mov',
      'QuickTime, DNxHR',
      'dnxhd',
      {'pixels': 'yuv422p', 'options': {'profile': 'dnxhr_hq'}, 'matrix': '709', 'recorded': film(size=(128, 256))},
    ),
    ('qtrle.mov', 'QuickTime, Animation (RLE)', 'qtrle', {'pixels': 'rgb24'}),
    ('cinepak.mov', 'QuickTime, Cinepak', 'cinepak', {'pixels': 'rgb24'}),
    ('h264.mkv', 'Matroska, H.264', 'libx264', {}),
    ('ffv1.mkv', 'Matroska, FFV1', 'ffv1', {}),
    ('hevc.mkv', 'Matroska, HEVC', 'libx265', {}),
    ('mpeg4.mkv', 'Matroska, MPEG-4', 'mpeg4', {}),
    ('vp8.webm', 'WebM, VP8, Opus', 'libvpx', vp8),
    ('vp9.webm', 'WebM, VP9', 'libvpx-vp9', {}),
    ('av1.webm', 'WebM, AV1', 'libsvtav1', {}),
    ('live.webm', 'WebM, live: nothing says how long it is', 'libvpx', {'muxer': {'live': '1'}}),
    ('mpeg4.avi', 'AVI, MPEG-4, MP2', 'mpeg4', {'sound': 'mp2'}),
    ('xvid.avi', 'AVI, MPEG-4 with B-frames', 'mpeg4', {'options': {'bf': '2'}}),
    ('msmpeg4.avi', 'AVI, MS MPEG-4 (DivX 3)', 'msmpeg4', {}),
    ('mjpeg.avi', 'AVI, MJPEG', 'mjpeg', {'pixels': 'yuvj422p', 'full': True}),
    ('h264.avi', 'AVI, H.264', 'libx264', {}),
    ('raw.avi', 'AVI, not compressed', 'rawvideo', {'pixels': 'bgr24'}),
    ('huffyuv.avi', 'AVI, HuffYUV', 'huffyuv', {'pixels': 'yuv422p'}),
    ('utvideo.avi', 'AVI, Ut Video', 'utvideo', {'pixels': 'gbrp'}),
    ('dv.avi', 'AVI, DV', 'dvvideo', {'rate': 25, 'recorded': _at(25, wide)}),
    ('h264.ts', 'MPEG-TS, H.264', 'libx264', {}),
    ('hevc.ts', 'MPEG-TS, HEVC', 'libx265', {}),
    ('mpeg2.ts', 'MPEG-TS, MPEG-2, MP2', 'mpeg2video', {'rate': 25, 'recorded': _at(25), 'sound': 'mp2'}),
    ('h264.m2ts', 'M2TS (AVCHD), H.264', 'libx264', {'container': 'mpegts', 'muxer': {'mpegts_m2ts_mode': '1'}}),
    ('mpeg1.mpg', 'MPEG-PS, MPEG-1', 'mpeg1video', {'rate': 25, 'recorded': _at(25)}),
    ('mpeg2.vob', 'VOB, MPEG-2', 'mpeg2video', {'rate': 25, 'recorded': _at(25), 'container': 'vob'}),
    ('mpeg2.mxf', 'MXF, MPEG-2', 'mpeg2video', {'rate': 25, 'recorded': _at(25)}),
    ('flv1.flv', 'FLV, Sorenson H.263', 'flv', {}),
    ('h264.flv', 'FLV, H.264', 'libx264', {}),
    ('vp8.ogv', 'Ogg, VP8', 'libvpx', {'container': 'ogg'}),
    ('wmv1.wmv', 'WMV/ASF, WMV 7', 'wmv1', {}),
    ('wmv2.wmv', 'WMV/ASF, WMV 8', 'wmv2', {}),
    ('h263.3gp', '3GP, H.263', 'h263', {'recorded': film(size=(144, 176))}),
    ('h264.3gp', '3GP, H.264', 'libx264', {}),
    ('rv20.rm', 'RealMedia, RV 20', 'rv20', {'recorded': film(size=(96, 128))}),
    ('vp8.ivf', 'IVF, VP8', 'libvpx', {}),
    ('raw.y4m', 'Y4M, not compressed', 'rawvideo', {'container': 'yuv4mpegpipe'}),
    ('ffv1.nut', 'NUT, FFV1', 'ffv1', {}),
    ('h264.h264', 'no container, H.264', 'libx264', {'rate': 25, 'recorded': _at(25)}),
    ('gif.gif', 'GIF of several pictures', 'gif', {'pixels': 'rgb8'}, 25.0),
    ('apng.png', 'PNG of several pictures', 'apng', {'pixels': 'rgb24', 'container': 'apng', 'muxer': {'plays': '0'}}),
  ):
    yield Row(name, what, _written(codec, **options), '', *coarse)


def _at(rate: int, recorded: Recorded | None = None) -> Recorded:
  recorded = recorded or film()
  return Recorded(recorded.pictures, [i / rate for i in range(len(recorded.pictures))])


def _colours() -> Iterator[Row]:
  for name, what, codec, options in (
    ('709.mp4', 'H.264, BT.709', 'libx264', {'matrix': '709'}),
    ('601_full.mp4', 'H.264, BT.601, full range', 'libx264', {'pixels': 'yuvj420p', 'full': True}),
    ('709_full.mp4', 'H.264, BT.709, full range', 'libx264', {'pixels': 'yuvj420p', 'matrix': '709', 'full': True}),
    ('422.mp4', 'H.264, 4:2:2', 'libx264', {'pixels': 'yuv422p'}),
    ('444.mp4', 'H.264, 4:4:4, BT.709', 'libx264', {'pixels': 'yuv444p', 'matrix': '709'}),
    ('10bit.mp4', 'H.264, 10 bits, 4:2:0', 'libx264', {'pixels': 'yuv420p10le', 'matrix': '709'}),
    ('422_10bit.mkv', 'H.264, 10 bits, 4:2:2', 'libx264', {'pixels': 'yuv422p10le'}),
    ('rgb.mp4', 'H.264, RGB', 'libx264rgb', {'pixels': 'rgb24'}),
    ('hevc_10bit.mp4', 'HEVC, 10 bits, BT.2020', 'libx265', {'pixels': 'yuv420p10le', 'matrix': '2020'}),
    ('hevc_12bit.mkv', 'HEVC, 12 bits, 4:4:4', 'libx265', {'pixels': 'yuv444p12le', 'matrix': '709'}),
    ('vp9_444.webm', 'VP9, 4:4:4', 'libvpx-vp9', {'pixels': 'yuv444p'}),
    ('vp9_alpha.webm', 'VP9 with transparency', 'libvpx-vp9', {'pixels': 'yuva420p'}),
    ('av1_10bit.mkv', 'AV1, 10 bits', 'libsvtav1', {'pixels': 'yuv420p10le', 'matrix': '709'}),
    ('prores_4444.mov', 'ProRes 4444 with transparency', 'prores_ks', {'pixels': 'yuva444p10le', 'matrix': '709'}),
    ('ffv1_16bit.mkv', 'FFV1, 16 bits, 4:4:4', 'ffv1', {'pixels': 'yuv444p16le'}),
    ('ffv1_411.mkv', 'FFV1, 4:1:1', 'ffv1', {'pixels': 'yuv411p'}),
    ('ffv1_alpha.mkv', 'FFV1, RGB with transparency', 'ffv1', {'pixels': 'bgra'}),
    ('png.mov', 'PNG pictures in QuickTime', 'png', {'pixels': 'rgba'}),
    ('grey.mp4', 'H.264, grey', 'libx264', {'pixels': 'gray', 'full': True, 'recorded': grey_film()}),
    ('grey.mkv', 'FFV1, grey of 16 bits', 'ffv1', {'pixels': 'gray16le', 'full': True, 'recorded': grey_film()}),
  ):
    yield Row(name, what, _written(codec, **options))


# The 2 x 2 part (a, b, c, d) of a display matrix, and how a scene is stored that it sets right (ISO 14496-12).
_MATRICES = {
  'turned 90': ((0, 1, -1, 0), lambda p: np.rot90(p)),
  'turned 180': ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
  'turned 270': ((0, -1, 1, 0), lambda p: np.rot90(p, 3)),
  'mirrored': ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
  'flipped': ((1, 0, 0, -1), lambda p: p[::-1]),
  'transposed': ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
  'transposed the other way': ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
  'flat, so ignored': ((0, 0, 0, 0), lambda p: p),
}


def _orientations() -> Iterator[Row]:
  def noted(path: Path, entries, stored) -> Recorded:
    recorded = write(path, 'libx264', stored=stored)
    note_matrix(path, entries)
    return recorded

  for what, (entries, stored) in _MATRICES.items():
    name = what.replace(', so ignored', '').replace(' ', '_')
    ending = 'mov' if 'turned' in what else 'mp4'
    yield Row(f'{name}.{ending}', f'display matrix: {what}', functools.partial(noted, entries=entries, stored=stored))
  # The message is counterclockwise; the flip comes before the turn (H.264, D.2.27).
  for name, what, words, stored in (
    ('sei.ts', 'H.264 message in MPEG-TS: turned 90', 'rotate=90', lambda p: np.rot90(p, -1)),
    ('sei_mirrored.ts', 'H.264 message in MPEG-TS: mirrored', 'flip=horizontal', lambda p: p[:, ::-1]),
  ):
    filters = ('h264_metadata', f'display_orientation=insert:{words}')
    yield Row(name, what, _written('libx264', stored=stored, filters=filters))


def _times() -> Iterator[Row]:
  uneven = film(times=np.cumsum([0, 0.033, 0.033, 0.033, 0.4, 0.9, 0.15, 0.7, 0.033, 1.2]).round(3).tolist())
  ntsc = Fraction(30000, 1001)
  for name, what, codec, options in (
    ('variable.mp4', 'variable rate, MP4', 'libx264', {'recorded': uneven, 'unit': _MS}),
    ('variable.webm', 'variable rate, WebM', 'libvpx', {'recorded': uneven, 'unit': _MS}),
    ('ntsc.mp4', '29.97 frames a second', 'libx264', {'recorded': _at(ntsc), 'rate': ntsc}),
    ('slow.mp4', 'a frame every 5 s', 'libx264', {'recorded': _at(Fraction(1, 5)), 'rate': Fraction(1, 5)}),
    ('fast.mp4', '240 frames a second', 'libx264', {'recorded': _at(240), 'rate': 240}),
    ('late.mkv', 'begins 3 s after its sound, Matroska', 'mpeg4', {'begin': 3.0, 'sound': 'mp2'}),
    ('late.mp4', 'begins 3 s after its sound, MP4', 'libx264', {'begin': 3.0, 'sound': 'aac'}),
    ('late.ts', 'begins 3 s after its sound, MPEG-TS', 'libx264', {'begin': 3.0, 'sound': 'mp2'}),
  ):
    yield Row(name, what, _written(codec, **options))
  yield Row('joined.ts', 'two recordings joined, MPEG-TS', functools.partial(_joined, codec='libx264'))
  yield Row('joined.mpg', 'two recordings joined, MPEG-PS', functools.partial(_joined, codec='mpeg2video', rate=25))
  yield Row('wraps.ts', 'a clock that wraps around, MPEG-TS', _wrapping)
  yield Row('edited.mp4', 'an edit list that hides the first 4 frames', _edited)


def _joined(path: Path, codec: str, rate: int = RATE) -> Recorded:
  one = _at(rate)
  parts = []
  for i in range(2):
    write(path, codec, Recorded([scene(FRAMES * i + j) for j in range(FRAMES)], one.seconds), rate=rate)
    parts.append(path.read_bytes())
  path.write_bytes(b''.join(parts))
  return Recorded([scene(i) for i in range(2 * FRAMES)], [i / rate for i in range(2 * FRAMES)])


def _wrapping(path: Path) -> Recorded:
  """The clock of 33 bits and 90 kHz passes its end in the middle."""
  return write(path, 'libx264', begin=(1 << 33) / 90000 - 0.5, unit=Fraction(1, 90000))


def _edited(path: Path) -> Recorded:
  write(path, 'libx264', options={'bf': '0', 'g': '50'}, muxer={'movflags': 'faststart', 'use_editlist': '1'})
  data = bytearray(path.read_bytes())
  at = data.index(b'elst')
  (unit,) = struct.unpack_from('>I', data, data.index(b'mvhd') + 16)
  (scale,) = struct.unpack_from('>I', data, data.index(b'mdhd') + 16)
  hidden = 4
  shown = FRAMES - hidden
  struct.pack_into('>II', data, at + 12, shown * unit // RATE, hidden * scale // RATE)
  path.write_bytes(data)
  return Recorded([scene(i) for i in range(hidden, FRAMES)], [i / RATE for i in range(shown)])


def _shapes() -> Iterator[Row]:
  for name, what, codec, size, pixels in (
    ('odd.mp4', 'odd sides, 113 x 67, H.264 4:4:4', 'libx264', (67, 113), 'yuv444p'),
    ('odd.webm', 'odd sides, 113 x 67, VP9', 'libvpx-vp9', (67, 113), 'yuv420p'),
    ('odd.avi', 'odd sides, 113 x 67, MJPEG', 'mjpeg', (67, 113), 'yuvj420p'),
    ('one_high.mkv', '1 pixel high', 'ffv1', (1, 64), 'yuv444p'),
    ('one_wide.mov', '1 pixel wide', 'png', (64, 1), 'rgb24'),
    ('one.mkv', '1 x 1 pixel', 'ffv1', (1, 1), 'yuv444p'),
    ('wide.mkv', '8 x 4000 pixels', 'ffv1', (8, 4000), 'yuv444p'),
  ):
    make = _written(codec, film(size=size), pixels=pixels, full=pixels.startswith('yuvj'))
    yield Row(name, what, make)
  yield Row('one_frame.mp4', 'one frame, MP4', _written('libx264', film(1)))
  yield Row('one_frame.webm', 'one frame, WebM', _written('libvpx', film(1)))
  yield Row('one_frame.avi', 'one frame, AVI', _written('mpeg4', film(1)))
  interlaced = _written('mpeg2video', _at(25), rate=25, options={'flags': '+ildct+ilme'})
  yield Row('interlaced.ts', 'interlaced MPEG-2: whole frames are shown', interlaced)
  yield Row('aspect.mp4', 'pixels twice as wide as high: shown square', _written('libx264', aspect=Fraction(2)))


def _streams() -> Iterator[Row]:
  disposition = av.stream.Disposition
  yield Row(
    'cover.mkv',
    'a larger thumbnail as stream 0, the video flagged as the default',
    _written('libx264', before=thumbnail(0)),
  )
  yield Row('cover.mp4', 'cover art as stream 0', _written('libx264', before=thumbnail(disposition.attached_pic)))
  yield Row('two.mkv', 'two videos, the second flagged as the default', _two_videos)
  yield Row('sound.mp4', 'sound only, MP4', write_sound, 'it has no video')
  yield Row('sound.mp3', 'sound only, MP3', functools.partial(write_sound, codec='libmp3lame'), 'it has no video')


def _two_videos(path: Path) -> Recorded:
  recorded = film()
  with av.open(os.fspath(path), 'w') as out:
    streams = [out.add_stream('mpeg4', rate=RATE) for _ in range(2)]
    for stream, flags in zip(streams, (0, av.stream.Disposition.default), strict=True):
      stream.height, stream.width = SIZE
      stream.pix_fmt, stream.bit_rate, stream.disposition = 'yuv420p', 4_000_000, flags
    for picture in recorded.pictures:
      for stream, pixels in zip(streams, (255 - picture, picture), strict=True):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24')))
    for stream in streams:
      out.mux(stream.encode())
  return recorded


def _damage() -> Iterator[Row]:
  """What is missing or changed must be noticed, or must not matter."""
  half = lambda data: data[: len(data) * 11 // 20]
  hole = lambda data: data[: len(data) // 2] + data[len(data) // 2 + 700 :]
  end = lambda data: data[:-1]
  for kind, what, codec, options in (
    ('mp4', 'MP4, index first', 'libx264', {'muxer': {'movflags': 'faststart'}}),
    (
      'frag.mp4',
      'MP4 in fragments',
      'libx264',
      {'muxer': {'movflags': 'frag_keyframe+empty_moov'}, 'options': {'g': '3'}},
    ),
    ('mkv', 'Matroska', 'mpeg4', {}),
    ('webm', 'WebM', 'libvpx', {'sound': 'libopus'}),
    ('avi', 'AVI', 'mpeg4', {}),
    ('ts', 'MPEG-TS', 'libx264', {}),
    ('mpg', 'MPEG-PS', 'mpeg2video', {'rate': 25, 'recorded': _at(25)}),
    ('flv', 'FLV', 'flv', {}),
    ('wmv', 'WMV/ASF', 'wmv2', {}),
    ('ogv', 'Ogg', 'libvpx', {'container': 'ogg'}),
    ('gif', 'GIF', 'gif', {'pixels': 'rgb8'}),
  ):
    make = _written(codec, **options)
    yield Row(f'half.{kind}', f'{what}, cut in the middle', _changed(make, half), 'it is cut')
    if kind in ('mkv', 'webm', 'avi', 'ts', 'wmv'):
      yield Row(f'hole.{kind}', f'{what}, 700 bytes missing', _changed(make, hole), 'it has a hole')
    if kind in ('mp4', 'avi', 'flv'):
      yield Row(f'end.{kind}', f'{what}, the last byte missing', _changed(make, end), 'it is cut')
  for name, what, codec in (
    ('bytes.mov', 'QuickTime, 40 bytes of a frame changed, H.264', 'libx264'),
    ('bytes.avi', 'AVI, 40 bytes of a frame changed, MPEG-4', 'mpeg4'),
    ('bytes.mkv', 'Matroska, 40 bytes of a frame changed, FFV1', 'ffv1'),
  ):
    yield Row(name, what, functools.partial(_overwritten, codec=codec), 'its bytes are changed')
  yield Row('seam.ts', 'MPEG-TS, cut between two packets: nothing says what is missing', _cut_at_a_seam)
  junk = lambda data: data + b'<html>' * 300
  yield Row('junk.mp4', 'MP4 with junk behind its end', _changed(_written('libx264'), junk))
  yield Row('junk.avi', 'AVI with junk behind its end', _changed(_written('mpeg4'), junk))


def _changed(make: Callable[[Path], Recorded], change: Callable[[bytes], bytes]) -> Callable[[Path], Recorded]:
  def changed(path: Path) -> Recorded:
    recorded = make(path.with_name(f'whole{path.suffix}'))
    path.write_bytes(change(path.with_name(f'whole{path.suffix}').read_bytes()))
    return recorded

  return changed


def _cut_at_a_seam(path: Path) -> Recorded:
  recorded = write(path, 'libx264')
  with av.open(os.fspath(path)) as container:
    at = [p.pos for p in container.demux(video=0) if p.size][6]
  path.write_bytes(path.read_bytes()[:at])
  return Recorded(recorded.pictures[:6], recorded.seconds[:6])


def _overwritten(path: Path, codec: str) -> Recorded:
  recorded = write(path, codec, options={'g': '50'})
  with av.open(os.fspath(path)) as container:
    at, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][FRAMES // 2]
  data = bytearray(path.read_bytes())
  changed = min(40, size // 2)
  data[at + size // 2 : at + size // 2 + changed] = np.random.default_rng(1).bytes(changed)
  path.write_bytes(data)
  return recorded


def _others() -> Iterator[Row]:
  """What is no video, whatever it is called."""
  for name, what, data in (
    ('empty.mp4', 'no bytes', b''),
    ('page.mp4', "a web page: 'video not found'", b'<!DOCTYPE html><html><body>Not found</body></html>\n'),
    ('text.avi', 'a text', b'A text is not a video.\n' * 20),
    ('zeros.mkv', 'zeros', bytes(5000)),
    ('pieces.mp4', 'a list of other files (`ffconcat`)', b"ffconcat version 1.0\nfile 'h264.mp4'\n"),
    ('playlist.mp4', 'an HLS playlist', b'#EXTM3U\n#EXTINF:1,\nh264.ts\n#EXT-X-ENDLIST\n'),
  ):
    yield Row(name, what, functools.partial(_as_bytes, data=data), 'it is no video')

  def archive(path: Path) -> Recorded:
    with zipfile.ZipFile(path, 'w') as out:
      out.writestr('video.mp4', bytes(1000))
    return Recorded([], [])

  yield Row('zip.mp4', 'a ZIP archive', archive, 'it is no video')


def _as_bytes(path: Path, data: bytes) -> Recorded:
  path.write_bytes(data)
  return Recorded([], [])


def _by_program(ffmpeg: str) -> Iterator[Row]:
  """PyAV has no encoder of these, and writes no turn into Matroska."""

  def converted(path: Path, *arguments: str, source: Callable[[Path], Recorded], before: tuple[str, ...] = ()):
    original = path.with_name('original.mkv')
    recorded = source(original)
    command = [ffmpeg, '-v', 'error', '-nostdin', '-y', *before, '-i', original, *arguments, path]
    subprocess.run(command, check=True, timeout=120)
    return recorded

  plain = _written('ffv1')
  at_25 = _written('ffv1', _at(25), rate=25)
  for name, what, arguments in (
    ('theora.ogv', 'Ogg, Theora', ('-c:v', 'libtheora', '-q:v', '10')),
    ('xvid_lib.avi', 'AVI, Xvid', ('-c:v', 'libxvid', '-q:v', '1')),
    ('snow.avi', 'AVI, Snow', ('-c:v', 'snow', '-q:v', '1')),
    ('jpeg2000.mxf', 'MXF, JPEG 2000', ('-c:v', 'jpeg2000', '-pix_fmt', 'yuv444p', '-q:v', '1')),
    ('kvazaar.mp4', 'MP4, HEVC by Kvazaar', ('-c:v', 'libkvazaar')),
  ):
    source = at_25 if name.endswith('mxf') else plain
    yield Row(name, what, functools.partial(_run, converted, arguments, source))
  turned = _written('libx264', stored=lambda p: np.rot90(p))
  yield Row(
    'turned.mkv',
    'Matroska that says it is turned 90',
    lambda path: converted(path, '-c', 'copy', source=turned, before=('-display_rotation', '-90')),
  )


def _run(convert, arguments, source, path):
  return convert(path, *arguments, source=source)
