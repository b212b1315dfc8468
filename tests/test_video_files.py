"""Frames and windows of files: real ones of every container and codec, and generated ones whose content is known."""

import itertools
import pathlib
import struct
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.clips import sampling
from data_pipelines.contract import UserError
from data_pipelines.media import video_files, video_writing
from data_pipelines.media.video_files import BrokenOff, Cut, Damaged

# Frames that each file of the media folder decodes to, and its upright (height, width).
MEDIA = {
  'video/k400_arm_wrestling.mp4': (280, (256, 340)),
  'video/k400_test.mp4': (300, (256, 340)),
  'video/kinetics_pancake.mkv': (310, (240, 426)),
  'video/lowfps_6.mp4': (57, (256, 340)),
  'video/short_32frames.mp4': (32, (256, 340)),
  'video/ssv2_166766.mp4': (49, (240, 427)),
  'video/ucf_like_example.avi': (131, (240, 320)),
  'video/ucf_like_test.avi': (164, (240, 320)),
  'video_edge/av1.mkv': (125, (360, 640)),
  'video_edge/h264_10bit.mp4': (30, (200, 200)),
  'video_edge/hevc.mp4': (10, (128, 128)),
  'video_edge/no_duration.webm': (74, (720, 1280)),
  'video_edge/odd_66x50_60fps.mov': (82, (50, 66)),
  'video_edge/rot_0.mov': (3, (320, 568)),
  'video_edge/rot_90.mov': (3, (568, 320)),
  'video_edge/rot_180.mov': (3, (320, 568)),
  'video_edge/rot_270.mov': (3, (568, 320)),
  'video_edge/tiny_carphone.mp4': (120, (144, 176)),
  'video_edge/unordered_pts.mov': (4, (50, 50)),
  'video_edge/vp8_1s.webm': (24, (720, 1280)),
  'images/bird.jpg': (1, (500, 403)),
  'images/dog.jpg': (1, (374, 500)),
  'images/frame_320x240.jpg': (1, (240, 320)),
}


def grey(number):
  """The brightness that numbers a frame; steps of 8 survive the encoder."""
  return 16 + 8 * (number % 28)


def write(path, count, size=(32, 48), fps=10, codec='mpeg4', picture=None, **options):
  """A video whose frame i has brightness `grey(i)`."""
  with av.open(str(path), 'w', options=options) as container:
    stream = container.add_stream(codec, rate=fps)
    stream.height, stream.width = size
    stream.pix_fmt, stream.bit_rate = 'yuv420p', 2_000_000
    for i in range(count):
      pixels = np.full((*size, 3), grey(i), np.uint8) if picture is None else picture
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
    container.mux(stream.encode())
  return str(path)


def write_at(path, milliseconds, codec='mpeg4', sound=None, size=(32, 48), noise=False, options=None):
  """A video whose frame i is shown at a time, in noise or of brightness `grey(i)`; its sound begins at 0."""
  rng = np.random.default_rng(0)
  with av.open(path, 'w') as container:
    quick = {'deadline': 'realtime', 'cpu-used': '8'} if codec == 'libvpx' else {}
    video = container.add_stream(codec, rate=25, options=options or quick)
    video.height, video.width = size
    video.pix_fmt, video.bit_rate = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p', 400_000
    fine = Fraction(1, 1000) if codec.startswith('libvpx') or codec == 'libx264' else Fraction(1, 25)
    video.codec_context.time_base = fine
    audio = container.add_stream(sound, rate=48000, layout='stereo') if sound else None
    for i in range(int(milliseconds[-1] / 40) if audio else 0):
      samples = np.zeros((1, 2 * 1920), np.int16)
      part = av.AudioFrame.from_ndarray(samples, format='s16', layout='stereo')
      part.sample_rate, part.pts, part.time_base = 48000, 1920 * i, Fraction(1, 48000)
      container.mux(audio.encode(part))
    for i, at in enumerate(milliseconds):
      pixels = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
      frame = av.VideoFrame.from_ndarray(pixels if noise else np.full((*size, 3), grey(i), np.uint8), format='rgb24')
      frame.pts, frame.time_base = round(int(at) / 1000 / fine), fine
      container.mux(video.encode(frame))
    for stream in container.streams:
      container.mux(stream.encode())


def numbers(clip_TxHxWx3):
  """The numbers of frames written by `write`."""
  return [round((float(frame.mean()) - 16) / 8) for frame in clip_TxHxWx3]


def cut_of(length, sampler='dense', stride=1, size=(16, 16)):
  return Cut(length, size, sampler, stride)


def clips_of(path, cut, **options):
  return [numbers(w.clip) for w in video_files.windows(path, [cut], **options)]


@pytest.mark.parametrize('name', MEDIA)
def test_reads_every_good_file(media, name):
  count, shape = MEDIA[name]
  last = (-1.0, None)
  decoded = 0
  for frame in video_files.frames(str(media / name)):
    assert frame.seconds >= last[0]
    last = frame.seconds, frame
    if decoded == 0:
      first = frame.pixels()
      assert frame.seconds == 0 and first.shape == (*shape, 3) and first.dtype == np.uint8
    decoded += 1
  assert decoded == count
  assert last[1].pixels().shape == (*shape, 3)
  declared = video_files.header(str(media / name)).declared
  assert declared is None or abs(declared - count) <= 1


def test_partly_broken_file_gives_its_good_frames_and_says_so(media):
  decoded = 0
  with pytest.raises(BrokenOff, match='28 of 50 declared frames'):
    for _ in video_files.frames(str(media / 'video_edge/corrupted.mp4')):
      decoded += 1
  assert decoded == 28


def test_rotated_recordings_are_upright(media):
  """Keys on a keyboard, one lit from the upper right; seen upright by eye once, its red light pinned here."""
  frame = next(video_files.frames(str(media / 'video_edge/rot_180.mov'))).pixels().astype(int)
  red_HxW = frame[..., 0] - frame[..., 1:].mean(axis=-1)
  row, column = np.unravel_index(red_HxW.argmax(), red_HxW.shape)
  assert row < 160 and column > 284


# The 2 x 2 part [a, b, c, d] of a matrix takes stored (x, y), y down, to shown (a x + c y, b x + d y) (ISO 14496-12).
# Beside each: how the scene is stored so that it is shown upright. FFmpeg's own player shows all of them so.
MATRICES = {
  (1, 0, 0, 1): lambda scene: scene,
  (0, 1, -1, 0): lambda scene: np.rot90(scene),
  (-1, 0, 0, -1): lambda scene: np.rot90(scene, 2),
  (0, -1, 1, 0): lambda scene: np.rot90(scene, 3),
  (-1, 0, 0, 1): lambda scene: scene[:, ::-1],  # a selfie
  (1, 0, 0, -1): lambda scene: scene[::-1],
  (0, 1, 1, 0): lambda scene: scene.swapaxes(0, 1),
  (0, -1, -1, 0): lambda scene: np.rot90(scene, 2).swapaxes(0, 1),
  (0, 0, 0, 0): lambda scene: scene,  # these flatten the picture, so players leave it alone
  (0, 1, 0, 0): lambda scene: scene,
  (1, 0, 0, 0): lambda scene: scene,
}


def note_matrix(path, entries):
  """Writes a display matrix into the header of an mp4."""
  a, b, c, d = entries
  data = bytearray(path.read_bytes())
  matrix = data.index(b'tkhd') + 4 + 40
  assert struct.unpack_from('>9i', data, matrix) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
  struct.pack_into('>9i', data, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
  path.write_bytes(data)


@pytest.mark.parametrize('entries', MATRICES)
def test_what_the_header_says_of_orientation_is_done(tmp_path, entries):
  """A camera that was turned or mirrors notes it in the track header; the frames come out as the scene was."""
  scene = np.zeros((32, 64, 3), np.uint8)
  scene[:16, :16] = 255, 0, 0  # a red corner, upper left
  scene[16:, 48:] = 0, 0, 255  # a blue one, lower right
  stored = np.ascontiguousarray(MATRICES[entries](scene))
  path = tmp_path / 'phone.mp4'
  write(path, 3, stored.shape[:2], picture=stored)
  note_matrix(path, entries)
  frame = next(video_files.frames(str(path)))
  shown = frame.pixels()
  assert shown.shape == scene.shape and frame.size == scene.shape[:2]
  assert np.abs(shown.astype(int) - scene).mean() < 12
  small = frame.pixels((16, 32)).astype(int)
  assert small.shape == (16, 32, 3) and small[3, 3, 0] > 150 and small[12, 28, 2] > 150


def test_phone_photograph_is_upright(tmp_path):
  image = Image.new('RGB', (40, 20))
  exif = image.getexif()
  exif[0x0112] = 6  # orientation: turn 90 degrees clockwise
  image.save(tmp_path / 'photo.jpg', exif=exif)
  (frame,) = video_files.frames(str(tmp_path / 'photo.jpg'))
  assert frame.pixels().shape == (40, 20, 3)


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1', 'I;16'])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
  ending = 'tiff' if mode == 'CMYK' else 'png'
  Image.new(mode, (9, 7)).save(tmp_path / f'x.{ending}')
  (frame,) = video_files.frames(str(tmp_path / f'x.{ending}'))
  assert frame.pixels().shape == (7, 9, 3) and frame.pixels().dtype == np.uint8


def test_animated_gif_is_a_video(tmp_path):
  pictures = [Image.new('RGB', (16, 16), (grey(i),) * 3) for i in range(5)]
  pictures[0].save(tmp_path / 'a.gif', save_all=True, append_images=pictures[1:], duration=200)
  path = str(tmp_path / 'a.gif')
  assert video_files.header(path) == (5.0, 5)
  assert [round(f.seconds, 3) for f in video_files.frames(path)] == [0, 0.2, 0.4, 0.6, 0.8]
  assert clips_of(path, cut_of(5)) == [[0, 1, 2, 3, 4]]


def test_dense_windows_cover_the_video_and_the_last_ends_with_it(tmp_path):
  path = write(tmp_path / 'v.mp4', 11)
  assert clips_of(path, cut_of(4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [7, 8, 9, 10]]
  assert clips_of(path, cut_of(4), hop=2) == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [7, 8, 9, 10]]
  assert clips_of(path, cut_of(3, stride=2)) == [[0, 2, 4], [6, 8, 10]]
  starts = [(round(w.start, 2), round(w.end, 2)) for w in video_files.windows(path, [cut_of(4)])]
  assert starts == [(0, 0.3), (0.4, 0.7), (0.7, 1.0)]


@pytest.mark.parametrize(('count', 'length', 'stride'), [(1, 4, 1), (3, 4, 1), (5, 4, 2), (6, 2, 9), (7, 4, 2)])
def test_a_short_video_gives_the_frames_that_evaluation_takes(tmp_path, count, length, stride):
  path = write(tmp_path / 'v.avi', count)
  assert clips_of(path, cut_of(length, stride=stride)) == [sampling.dense(count, length, stride).tolist()]
  segments = [sampling.segments(count, length).tolist()]
  assert clips_of(path, cut_of(length, 'segments')) == segments


def test_segments_of_a_long_video_are_several_windows(tmp_path):
  path = write(tmp_path / 'v.mkv', 24)
  expected = [start + sampling.segments(10, 4) for start in (0, 10, 14)]
  assert clips_of(path, cut_of(4, 'segments'), length=10) == [e.tolist() for e in expected]
  overlapping = [start + sampling.segments(10, 4) for start in (0, 7, 14)]
  assert clips_of(path, cut_of(4, 'segments'), length=10, hop=7) == [e.tolist() for e in overlapping]


def test_image_heads_see_a_frame_a_second_and_cuts_share_one_pass(tmp_path):
  path = write(tmp_path / 'v.mp4', 25, fps=10)
  cuts = [cut_of(8), cut_of(1, size=(8, 24))]
  found = list(video_files.windows(path, cuts))
  images = [w for w in found if w.cut == 1]
  assert [numbers(w.clip) for w in images] == [[0], [10], [20]]
  assert images[0].clip.shape == (1, 8, 24, 3)
  assert [w.clip.shape for w in found if w.cut == 0] == [(8, 16, 16, 3)] * 4


def test_memory_holds_one_window_however_long_the_video(tmp_path):
  def peak(count):
    path = write(tmp_path / f'{count}.mp4', count)
    tracemalloc.start()
    for window in video_files.windows(path, [cut_of(4, stride=3), cut_of(8, size=(64, 64))]):
      assert window.clip.any()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found

  peak(40)  # imports and caches
  assert peak(800) < 1.2 * peak(100)


@pytest.mark.parametrize('shape', [(50, 66), (200, 200), (37, 41), (16, 16), (8, 5), (1, 1)])
@pytest.mark.parametrize('size', [(16, 16), (32, 24)])
def test_fit_gives_the_pixels_of_the_training_pipeline(shape, size):
  tf = pytest.importorskip('tensorflow')
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  top, left, height, width = sampling.center_crop(*shape, size)
  expected = tf.image.resize(image[top : top + height, left : left + width], size)
  expected = tf.cast(tf.round(expected), tf.uint8).numpy()
  found = video_files.fit(image, size)
  difference = np.abs(found.astype(int) - expected)
  # A value that lies halfway between two integers may be rounded either way.
  assert found.shape == (*size, 3) and difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_what_is_no_video_is_refused_in_one_sentence(tmp_path):
  (tmp_path / 'text.mp4').write_text('not a video\n' * 50)
  (tmp_path / 'empty.mp4').write_bytes(b'')
  (tmp_path / 'noise.avi').write_bytes(np.random.default_rng(0).bytes(5000))
  with av.open(str(tmp_path / 'sound.wav'), 'w') as container:
    stream = container.add_stream('pcm_s16le', rate=8000)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
    sound.sample_rate = 8000
    container.mux(stream.encode(sound))
  image = tmp_path / 'cut.jpg'
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(image)
  image.write_bytes(image.read_bytes()[:900])
  names = ['text.mp4', 'empty.mp4', 'noise.avi', 'sound.wav', 'cut.jpg', 'absent.mp4', '.']
  for name in names:
    with pytest.raises(UserError) as caught:
      list(video_files.frames(str(tmp_path / name)))
    assert not isinstance(caught.value, BrokenOff)
    assert str(tmp_path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_truncated_download_is_noticed(tmp_path):
  """Matroska simply ends, without an error; the lengths of its parts still say how long it was."""
  whole = write(tmp_path / 'whole.mkv', 100, codec='mpeg4')
  data = (tmp_path / 'whole.mkv').read_bytes()
  cut = tmp_path / 'cut.mkv'
  cut.write_bytes(data[: len(data) // 2])
  assert len(list(video_files.frames(whole))) == 100
  decoded = []
  with pytest.raises(BrokenOff, match=r'its last .* bytes are missing'):
    decoded.extend(numbers([f.pixels() for f in [frame]])[0] for frame in video_files.frames(str(cut)))
  windows = []
  with pytest.raises(BrokenOff):
    windows.extend(video_files.windows(str(cut), [cut_of(8)]))
  assert len(windows) >= 4  # what was decoded is given before the error


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('plain.mp4', 3)
  (tmp_path / 'plain.mp4').rename(tmp_path / 'a:b.mp4')
  assert len(list(video_files.frames('a:b.mp4'))) == 3


@pytest.mark.parametrize('encoders', [('libx264', 'mpeg4'), ('mpeg4',), ()])
def test_written_videos_can_be_read(tmp_path, monkeypatch, encoders):
  monkeypatch.setattr(video_writing, '_ENCODERS', encoders)
  pictures = (np.full((33, 47, 3), grey(i), np.uint8) for i in range(6))
  path = video_writing.write_video(str(tmp_path / 'out'), pictures, 12.5)
  assert path.endswith('.mp4' if encoders else '.gif')
  frames = list(video_files.frames(path))
  assert numbers([f.pixels() for f in frames]) == [0, 1, 2, 3, 4, 5]
  assert video_files.header(path).fps == pytest.approx(12.5)


# ---- What is missing is known, not guessed.


def test_the_rate_is_that_of_the_timestamps(tmp_path):
  """A rate that a container names or FFmpeg guesses from the first frames says little of a video of variable rate."""
  path = str(tmp_path / 'screen.webm')
  milliseconds = np.cumsum([0, 33, 33, 33, 33, *np.random.default_rng(0).integers(100, 900, 65)])
  write_at(path, milliseconds, codec='libvpx')
  assert [round(1000 * f.seconds) for f in video_files.frames(path)] == milliseconds.tolist()
  assert video_files.header(path).fps == pytest.approx(69 / (milliseconds[-1] / 1000), rel=1e-3)


@pytest.mark.parametrize('name', ['late.mkv', 'late.webm', 'late.mp4', 'late.ts'])
def test_a_video_may_begin_after_its_sound(tmp_path, name):
  path = str(tmp_path / name)
  codec, sound = ('libvpx', 'libopus') if name.endswith('webm') else ('mpeg4', 'mp2')
  write_at(path, 3000 + 40 * np.arange(50), codec=codec, sound=sound)
  times = [f.seconds for f in video_files.frames(path)]
  assert len(times) == 50 and times[0] == 0
  assert times[-1] == pytest.approx(49 * 0.04, abs=0.002)
  assert video_files.header(path).fps == pytest.approx(25)


def test_empty_packets_of_an_avi_hold_the_frame_before(tmp_path):
  """AVI has no timestamps: a recorder that drops frames writes packets of no bytes in their place."""
  path = str(tmp_path / 'a.avi')
  write_at(path, 40 * np.array([0, 1, 2, 9, 10, 30, 31]))
  assert [round(25 * f.seconds) for f in video_files.frames(path)] == [0, 1, 2, 9, 10, 30, 31]
  assert video_files.header(path).fps == pytest.approx(6 / (31 / 25))


def test_a_hole_is_noticed(tmp_path):
  """FFmpeg goes on at the next piece that makes sense, which in a short WebM is the end."""
  path = tmp_path / 'a.webm'
  write_at(str(path), 40 * np.arange(24), codec='libvpx', sound='libopus', size=(144, 176), noise=True)
  data = path.read_bytes()
  assert len(list(video_files.frames(str(path)))) == 24
  for start, stop in itertools.product([0.05, 0.3, 0.7], [200, 3000]):
    at = int(len(data) * start)
    path.write_bytes(data[:at] + data[at + stop :])
    with pytest.raises(BrokenOff):
      list(video_files.frames(str(path)))
  path.write_bytes(data)
  for at, _ in packet_places(path)[3:20:4]:  # bytes overwritten where a frame begins, so that no length is wrong
    path.write_bytes(data[: at - 6] + bytes(600) + data[at + 594 :])
    with pytest.raises(BrokenOff, match='its structure breaks at byte'):
      list(video_files.frames(str(path)))


def test_a_hole_in_a_file_that_says_little_is_noticed(media, tmp_path):
  """It has sound and states no number of frames; where a frame's head is overwritten FFmpeg finds nothing more."""
  data = (media / 'video_edge/vp8_1s.webm').read_bytes()
  path = tmp_path / 'a.webm'
  for at, _ in packet_places(media / 'video_edge/vp8_1s.webm')[1:20:6]:
    path.write_bytes(data[: at - 6] + bytes(600) + data[at + 594 :])
    with pytest.raises(BrokenOff, match='its structure breaks at byte'):
      list(video_files.frames(str(path)))


@pytest.mark.parametrize('codec', ['libx264', 'mpeg2video'])
def test_a_recording_may_begin_between_two_key_frames(tmp_path, codec):
  """As broadcast is recorded. What was before the first key frame cannot be shown, by any player."""
  path = tmp_path / 'a.ts'
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=25, options={'bf': '0', 'g': '10', 'sc_threshold': '0'})
    stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 144, 176, 'yuv420p', 500_000
    for i in range(40):
      picture = np.full((144, 176, 3), grey(i), np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    container.mux(stream.encode())
  data, packets = (
    path.read_bytes(),
    [data[i : i + 188] for data in [path.read_bytes()] for i in range(0, len(data), 188)],
  )
  begins = [i for i, p in enumerate(packets) if p[1] & 0x40 and p[1:3] == b'\x41\x00']  # of the video's frames
  assert len(begins) == 40
  path.write_bytes(data[: 188 * begins[0]] + b''.join(packets[begins[3] :]))
  shown = [f.pixels() for f in video_files.frames(str(path))]
  assert numbers(shown)[-30:] == [i % 28 for i in range(10, 40)] and len(shown) <= 37


def test_the_video_is_the_stream_that_players_choose(tmp_path):
  """A thumbnail may come first; the video is flagged as the default."""
  path = str(tmp_path / 'a.mkv')
  with av.open(path, 'w') as container:
    thumbnail, video = container.add_stream('mjpeg', rate=10), container.add_stream('mpeg4', rate=10)
    for stream, size, pixels in ((thumbnail, 16, 'yuvj420p'), (video, 32, 'yuv420p')):
      stream.width, stream.height, stream.pix_fmt = size, size, pixels
    thumbnail.disposition, video.disposition = 0, av.stream.Disposition.default
    for i in range(8):
      for stream, size in ((thumbnail, 16), (video, 32)):
        if i == 0 or stream is video:
          picture = np.full((size, size, 3), grey(i), np.uint8)
          container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    container.mux(thumbnail.encode())
    container.mux(video.encode())
  found = list(video_files.frames(path))
  assert numbers([f.pixels() for f in found]) == list(range(8)) and found[0].size == (32, 32)
  assert video_files.header(path).fps == 10


# ---- The decoder's own word.


def packet_places(path):
  """(first byte, length) of each packet of a video in a file."""
  with av.open(str(path)) as container:
    return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


@pytest.mark.parametrize('codec', ['libx264', 'mpeg4', 'mpeg2video', 'mjpeg', 'libx265'])
@pytest.mark.parametrize('threads', [1, 0])
def test_a_damaged_frame_is_named(tmp_path, codec, threads):
  path = tmp_path / 'a.mov'
  options = {'libx265': {'x265-params': 'log-level=none:bframes=0'}, 'mjpeg': {}}.get(codec, {'bf': '0'})
  write_at(str(path), 40 * np.arange(30), codec=codec, size=(144, 176), noise=True, options=options)
  assert len(list(video_files.frames(str(path), threads))) == 30
  data = bytearray(path.read_bytes())
  at, size = packet_places(path)[17]
  # HEVC's arithmetic decoder takes nearly anything, but not this; what no decoder notices cannot be known.
  start, stop = (at + size // 3, at + size) if codec == 'libx265' else (at + size // 2, at + size // 2 + 40)
  data[start:stop] = bytes(stop - start) if codec == 'libx265' else np.random.default_rng(1).bytes(stop - start)
  path.write_bytes(data)
  frames = video_files.frames(str(path), threads)
  found = []
  with pytest.raises(Damaged, match=r'frame 17\b') if threads == 1 else pytest.raises(Damaged):
    found.extend(frames)
  assert len(found) in (29, 30)  # what can be shown is shown


def test_a_frame_that_the_decoder_drops_is_missed(tmp_path):
  """An AV1 decoder drops what it cannot read, without a word."""
  path = tmp_path / 'a.mp4'
  write_at(str(path), 40 * np.arange(30), codec='libsvtav1', size=(144, 176), noise=True, options={'preset': '12'})
  data = path.read_bytes()
  seen = 0
  for at, size in packet_places(path)[5:25]:
    path.write_bytes(data[: at + 2] + bytes(size - 2) + data[at + size :])
    with pytest.raises(UserError):
      list(video_files.frames(str(path)))
    seen += 1
  assert seen == 20


def test_frames_before_the_first_key_frame_are_none(tmp_path):
  """Some decoders make them from grey and say nothing; here the first key frame is gone, and nobody can know of it."""
  path = tmp_path / 'a.vob'
  options = {'g': '12', 'bf': '0', 'sc_threshold': '1000000000'}
  write_at(str(path), 40 * np.arange(28), codec='mpeg2video', size=(144, 176), options=options)
  data = path.read_bytes()
  assert numbers([f.pixels() for f in video_files.frames(str(path))]) == list(range(28))
  at = data.index(b'\0\0\1\xb8')  # the head of its group
  path.write_bytes(data[:at] + bytes(64) + data[at + 64 :])
  assert numbers([f.pixels() for f in video_files.frames(str(path))]) == list(range(12, 28))


def test_a_key_frame_that_is_none_is_damage(tmp_path):
  """The index of an AVI says which frames are; the decoder finds another kind of frame there."""
  path = tmp_path / 'a.avi'
  options = {'g': '12', 'sc_threshold': '1000000000'}
  write_at(str(path), 40 * np.arange(28), codec='mpeg4', size=(144, 176), noise=True, options=options)
  data = bytearray(path.read_bytes())
  at = data.index(b'\0\0\1\xb6') + 4
  assert data[at] >> 6 == 0  # a picture of its own
  data[at] |= 0x40  # one that builds on another
  path.write_bytes(data)
  with pytest.raises(BrokenOff):
    list(video_files.frames(str(path)))


def test_a_file_whose_beginning_is_lost_is_no_raw_stream(tmp_path):
  """FFmpeg looks for a raw H.263 stream anywhere in a file, and finds one in what was a 3GP."""
  path = tmp_path / 'a.3gp'
  write_at(str(path), 40 * np.arange(30), codec='h263', size=(144, 176))
  data = path.read_bytes()
  path.write_bytes(bytes(64) + data[64:])
  for read in (video_files.header, lambda p: list(video_files.frames(p))):
    with pytest.raises(UserError, match='its beginning is damaged'):
      read(str(path))


def test_colours_that_there_are_none_of_are_one_sentence(tmp_path):
  """A changed bit of a header may say so."""
  path = write(tmp_path / 'a.mkv', 3, codec='ffv1')
  frame = next(video_files.frames(path))
  frame.pixels.args[0].colorspace = 14  # ICtCp, which FFmpeg's conversion does not know
  with pytest.raises(UserError, match='pixels that cannot be made RGB') as caught:
    frame.pixels()
  assert str(caught.value).startswith(path)


# ---- What breaking it found.


def test_boxes_of_unknown_kinds_are_skipped(tmp_path):
  """As ISO 14496-12 has it; junk that is no box still is damage."""
  data = pathlib.Path(write(tmp_path / 'whole.mp4', 8)).read_bytes()
  at = data.index(b'moov') - 4
  for name in (b'meco', b'SEFT', b'idat'):
    (tmp_path / 'more.mp4').write_bytes(data[:at] + struct.pack('>I', 20) + name + bytes(12) + data[at:])
    assert len(list(video_files.frames(str(tmp_path / 'more.mp4')))) == 8
  (tmp_path / 'junk.mp4').write_bytes(data[:at] + bytes(range(20)) + data[at:])
  with pytest.raises(UserError, match='structure breaks'):
    list(video_files.frames(str(tmp_path / 'junk.mp4')))


def test_a_file_that_goes_while_it_is_read_is_one_sentence(tmp_path):
  path = pathlib.Path(write(tmp_path / 'gone.mp4', 8))
  with pytest.raises(UserError, match='No such file'):
    for _ in video_files.frames(str(path)):
      path.unlink(missing_ok=True)


def test_what_is_no_picture_says_so_whatever_its_ending(tmp_path):
  for name, content in (('page.jpg', b'<html>no</html>'), ('zeros.png', bytes(4000)), ('half.mp4', None)):
    content = content or pathlib.Path(write(tmp_path / 'whole.mp4', 8)).read_bytes()[:-400]
    (tmp_path / name).write_bytes(content)
    half = 'the last 400 bytes of its index, the box moov, are missing.*is it complete'
    with pytest.raises(UserError, match=half if name == 'half.mp4' else 'is not a video or image that can be read'):
      list(video_files.frames(str(tmp_path / name)))


def test_half_floats_are_refused_by_name(tmp_path):
  Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / 'x.tif')
  data = bytearray((tmp_path / 'x.tif').read_bytes())
  place = data.index(struct.pack('<HHI', 258, 3, 1)) + 8  # bits of a sample
  data[place : place + 2] = struct.pack('<H', 24)
  (tmp_path / 'x.tif').write_bytes(data)
  with pytest.raises(UserError, match='is a TIFF of a kind that is not read'):
    list(video_files.frames(str(tmp_path / 'x.tif')))
