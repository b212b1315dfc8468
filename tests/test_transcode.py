"""Files to JPEG frames, in a child process that no file can take down with it."""

import dataclasses
import io
import itertools
import random
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.media import compact, transcode, video_files
from data_pipelines.media.transcode import Decoder, Failure, Interrupted, Settings
from tests.test_video_files import packet_places, write, write_at

NATIVE = Settings('video', short_side=256, fps=0, jpeg_quality=85)
PICTURE = Settings('image', short_side=64, fps=0, jpeg_quality=85)

# What a broken decoder does, by the name of the file; the child reads this module before its own.
_SABOTAGE = """
import os, signal, time
from data_pipelines.media import video_files
real, before = video_files.frames, 0
def frames(path, threads=0):
  global before
  before += 1
  if 'hang' in path:
    yield next(real(path, threads))
    time.sleep(1000)
  if 'segfault' in path or ('wreck' in path and before > 1):
    os.kill(os.getpid(), signal.SIGSEGV)
  if 'stop' in path:
    os.kill(os.getpid(), signal.SIGTERM)
  if 'bomb' in path:
    bytearray(1 << 40)
  if 'quit' in path:
    os._exit(3)
  print('a library says something')
  yield from real(path, threads)
video_files.frames = frames
"""


def decoded(frames):
  return [np.asarray(Image.open(io.BytesIO(f))) for f in frames]


def numbers(frames):
  """The numbers of frames written by `write`."""
  return [round((float(pixels.mean()) - 16) / 8) for pixels in decoded(frames)]


@pytest.fixture
def sabotaged(tmp_path, monkeypatch):
  """A function: name -> path of a good video on which the decoder does as the name says."""
  (tmp_path / 'python').mkdir()
  (tmp_path / 'python/sitecustomize.py').write_text(_SABOTAGE)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'python'))
  return lambda name: write(tmp_path / f'{name}.mp4', 8)


def test_native_frames_are_those_of_the_file(tmp_path):
  path = write(tmp_path / 'v.mp4', 12)
  with Decoder() as decode:
    media = decode(path, NATIVE)
  assert numbers(media.frames) == list(range(12))
  assert (media.fps, media.original_fps, media.duration) == pytest.approx((10, 10, 1.2)) and media.num_frames == 12
  assert {pixels.shape for pixels in decoded(media.frames)} == {(32, 48, 3)}  # never enlarged


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 27), st.sampled_from([5, 10, 12, 24]), st.sampled_from([1, 2, 3.7, 5, 10, 15, 24, 29.97]))
def test_resampling_is_by_time(tmp_path_factory, count, fps, target):
  """Frame k is the original one nearest to k / fps; as many as the duration holds, by the definition."""
  path = write(tmp_path_factory.mktemp('v') / 'v.mp4', count, fps=fps)
  times = []
  at = Settings('video', 0, target, 85)
  found = numbers(transcode.video(path, at, times))
  np.testing.assert_allclose(times, np.arange(count) / fps, atol=1e-3)
  last = (count - 1) / fps + (0.5 / fps if count > 1 else 0)
  wanted = np.arange(0, max(last * target - 1e-5, 0.5)) / target
  assert len(found) == len(wanted)
  distance = np.abs(wanted[:, None] - np.arange(count) / fps)
  for k, number in enumerate(found):
    assert distance[k, number] <= distance[k].min() + 1e-4
  assert abs(len(found) - count / fps * target) <= 1 + target / fps / 2


def test_a_frame_that_repeats_is_encoded_once(tmp_path):
  path = write(tmp_path / 'v.mp4', 6, fps=2)
  frames = list(transcode.video(path, Settings('video', 0, 8, 85), []))
  assert numbers(frames) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
  assert len({id(f) for f in frames}) == 6


@pytest.mark.parametrize(
  ('size', 'side', 'expected'),
  [
    ((256, 340), 256, (256, 340)),
    ((720, 1280), 256, (256, 455)),
    ((1280, 720), 256, (455, 256)),
    ((100, 50), 256, (100, 50)),
    ((500, 500), 256, (256, 256)),
    ((720, 1280), 0, (720, 1280)),
    ((300, 100000), 10, (10, 3333)),
  ],
)
def test_the_short_side_is_fitted_and_never_enlarged(size, side, expected):
  assert transcode.fitted(size, side) == expected


@pytest.mark.parametrize('name', ['rot_0', 'rot_90', 'rot_180', 'rot_270'])
def test_rotated_recordings_are_stored_upright(media, name):
  path = str(media / f'video_edge/{name}.mov')
  frames = decoded(transcode.video(path, NATIVE, []))
  for frame, original in zip(frames, video_files.frames(path), strict=True):
    height, width = transcode.fitted(original.size, 256)
    assert frame.shape == (height, width, 3)
    expected = np.asarray(Image.fromarray(original.pixels()).resize((width, height), Image.Resampling.BICUBIC))
    error = np.mean((frame.astype(float) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 32  # dB


def test_good_files_of_every_kind(media):
  """(frames, height, width, frames a second)."""
  expected = {
    'video/ssv2_166766.mp4': (49, 240, 427, 12),
    'video/lowfps_6.mp4': (57, 256, 340, 6),
    'video_edge/av1.mkv': (125, 256, 455, 25),
    'video_edge/h264_10bit.mp4': (30, 200, 200, 30),
    'video_edge/hevc.mp4': (10, 128, 128, 10),
    'video_edge/no_duration.webm': (74, 256, 455, 14.98),
    'video_edge/odd_66x50_60fps.mov': (82, 50, 66, 60),
    'video_edge/tiny_carphone.mp4': (120, 144, 176, 29.97),
    'video_edge/unordered_pts.mov': (4, 50, 50, 32),
    'video_edge/vp8_1s.webm': (24, 256, 455, 24.0),
  }
  with Decoder() as decode:
    for name, (count, height, width, fps) in expected.items():
      found = decode(str(media / name), NATIVE)
      assert len(found.frames) == found.num_frames == count, name
      assert {f.shape for f in decoded(found.frames)} == {(height, width, 3)}
      assert found.fps == found.original_fps == pytest.approx(fps, rel=1e-3)
      assert found.duration == pytest.approx(count / fps, rel=1e-3)


def test_what_is_no_whole_video_is_refused_with_its_reason(media, tmp_path):
  (tmp_path / 'empty.mp4').write_bytes(b'')
  (tmp_path / 'text.mp4').write_text('<html>404</html>\n' * 30)
  (tmp_path / 'noise.avi').write_bytes(random.Random(0).randbytes(4000))
  half = (media / 'video/ucf_like_test.avi').read_bytes()
  (tmp_path / 'half.avi').write_bytes(half[: len(half) // 2])
  reasons = {
    str(media / 'video_edge/corrupted.mp4'): '28 of 50 declared frames',
    str(tmp_path / 'empty.mp4'): 'is not a video',
    str(tmp_path / 'text.mp4'): 'is not a video',
    str(tmp_path / 'noise.avi'): 'is not a video',
    str(tmp_path / 'half.avi'): 'bytes are missing',
    str(tmp_path / 'absent.mp4'): 'does not exist',
    str(tmp_path): 'is not a file',
  }
  with Decoder() as decode:
    for path, reason in reasons.items():
      with pytest.raises(Failure, match=reason) as caught:
        decode(path, NATIVE)
      assert path not in str(caught.value) and '\n' not in str(caught.value)
    assert decode(str(media / 'video_edge/hevc.mp4'), NATIVE).num_frames == 10


def test_a_damaged_video_is_refused_with_the_frame(tmp_path):
  path = tmp_path / 'v.mov'
  write_at(str(path), 40 * np.arange(30), size=(144, 176), noise=True)
  data = bytearray(path.read_bytes())
  at, size = packet_places(path)[17]
  data[at + size // 2 : at + size // 2 + 40] = random.Random(0).randbytes(40)
  path.write_bytes(data)
  with Decoder() as decode:
    for storage in ('jpeg', 'mp4'):
      with pytest.raises(Failure, match='is damaged: its decoder says so of frame 17'):
        decode(str(path), dataclasses.replace(NATIVE, storage=storage))


@pytest.mark.parametrize('storage', ['jpeg', 'mp4'])
@pytest.mark.parametrize('size', [(1, 64), (64, 1), (1, 1), (3, 5)])
def test_tiny_videos_are_stored(tmp_path, storage, size):
  path = tmp_path / 'v.mov'
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('png', rate=25)
    stream.height, stream.width, stream.pix_fmt = *size, 'rgb24'
    for i in range(5):
      picture = np.full((*size, 3), 40 * i, np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    container.mux(stream.encode())
  with Decoder() as decode:
    found = decode(str(path), dataclasses.replace(NATIVE, storage=storage))
  assert found.num_frames == 5 and found.fps == pytest.approx(25)
  stored = decoded(found.frames if storage == 'jpeg' else compact.decode(found.frames[0], range(5)))
  expected = size if storage == 'jpeg' else found.shape[1:]
  for i, pixels in enumerate(stored):
    assert pixels.shape == (*expected, 3) and np.abs(pixels.astype(int) - 40 * i).max() < 14


@pytest.mark.parametrize(
  ('storage', 'reason'), [('jpeg', 'larger than a JPEG can be'), ('mp4', 'cannot encode frames of')]
)
def test_a_size_that_cannot_be_stored_is_a_failure(tmp_path, storage, reason):
  path = tmp_path / 'v.mkv'
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('ffv1', rate=25)
    stream.height, stream.width, stream.pix_fmt = 2, 70_000, 'yuv420p'
    picture = np.zeros((2, 70_000, 3), np.uint8)
    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
    container.mux(stream.encode())
  with Decoder() as decode, pytest.raises(Failure, match=reason):
    decode(str(path), dataclasses.replace(NATIVE, storage=storage))


def test_odd_file_names(tmp_path):
  with Decoder() as decode:
    for name in ('a b.mp4', 'ü,"x".mp4', 'a:b.mp4', '-x.mp4', 'new\nline.mp4', 'raw\udcff.mp4'):
      path = tmp_path / name
      write(tmp_path / 'v.mp4', 3)
      (tmp_path / 'v.mp4').rename(path)
      assert decode(str(path), NATIVE).num_frames == 3


# ---- Images.


def test_an_upright_jpeg_of_the_right_size_keeps_its_bytes(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'a.jpg', quality=70)
  assert transcode.image(str(tmp_path / 'a.jpg'), PICTURE) == (tmp_path / 'a.jpg').read_bytes()


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', '1', 'I;16', 'LA'])
def test_images_of_any_mode_become_rgb_jpegs(tmp_path, mode):
  ending = 'jpg' if mode in ('L', 'CMYK') else 'png'
  Image.new(mode, (300, 128)).save(tmp_path / f'a.{ending}')
  with Decoder() as decode:
    (encoded,) = decode(str(tmp_path / f'a.{ending}'), PICTURE).frames
  picture = Image.open(io.BytesIO(encoded))
  assert (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', (150, 64))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_phone_photographs_are_upright(tmp_path, orientation):
  """The eight orientations of EXIF, built from what the standard says the stored rows and columns are."""
  scene = np.zeros((24, 40, 3), np.uint8)
  scene[:12, :20] = 255, 0, 0
  scene[12:, 20:] = 0, 0, 255
  stored = {1: scene, 2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1]}
  transposed = scene.transpose(1, 0, 2)
  stored |= {5: transposed, 6: transposed[::-1], 7: transposed[::-1, ::-1], 8: transposed[:, ::-1]}
  picture = Image.fromarray(np.ascontiguousarray(stored[orientation]))
  exif = picture.getexif()
  exif[0x0112] = orientation
  picture.save(tmp_path / 'a.jpg', exif=exif, quality=95)
  found = np.asarray(Image.open(io.BytesIO(transcode.image(str(tmp_path / 'a.jpg'), PICTURE))))
  assert found.shape == scene.shape
  assert np.abs(found.astype(int) - scene).mean() < 12


def test_half_an_image_is_refused(tmp_path):
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / 'a.jpg')
  data = (tmp_path / 'a.jpg').read_bytes()
  for cut in (0, 10, 300, len(data) // 2, len(data) - 30):
    (tmp_path / 'a.jpg').write_bytes(data[:cut])
    with pytest.raises(Failure):
      transcode.image(str(tmp_path / 'a.jpg'), PICTURE)


# ---- The child.


def test_a_file_that_breaks_the_decoder_is_a_failure_and_the_next_one_is_none(sabotaged):
  reasons = {
    'segfault': 'the decoder crashed .SIGSEGV',
    'quit': 'the decoder crashed .exit code 3',
    'bomb': 'memory',
    'hang': 'no frame for 1.5 s',
  }
  with Decoder(timeout=1.5) as decode:
    for name, reason in reasons.items():
      start = time.monotonic()
      with pytest.raises(Failure, match=reason):
        decode(sabotaged(name), Settings('video', 0, 10, 85))
      assert time.monotonic() - start < 20
      assert numbers(decode(sabotaged('good'), NATIVE).frames) == list(range(8))


def test_a_crash_after_other_files_is_tried_again_alone(sabotaged):
  with Decoder() as decode:
    decode(sabotaged('good'), NATIVE)
    assert decode(sabotaged('wreck'), NATIVE).num_frames == 8


def test_a_stopped_child_is_no_failure_of_the_file(sabotaged):
  with Decoder() as decode, pytest.raises(Interrupted):
    decode(sabotaged('stop'), NATIVE)


def test_slow_but_steady_decoding_is_no_hang(tmp_path, monkeypatch):
  """The limit is on the time without a frame, not on the length of a video; and not on a slow reader."""
  (tmp_path / 'sitecustomize.py').write_text(
    'import time\nfrom data_pipelines.media import video_files\nreal = video_files.frames\n'
    'def frames(path, threads=0):\n  for frame in real(path, threads):\n    time.sleep(0.3)\n    yield frame\n'
    'video_files.frames = frames\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  with Decoder(timeout=2) as decode:
    assert decode(write(tmp_path / 'v.mp4', 10), NATIVE).num_frames == 10


def test_a_child_ends_with_its_parent(tmp_path):
  code = (
    'import os, sys\nfrom data_pipelines.media.transcode import Decoder, Settings\n'
    'd = Decoder().__enter__()\nd(sys.argv[1], Settings("video", 0, 0, 85))\n'
    'print(d._child.pid, flush=True)\nos.kill(os.getpid(), 9)\n'
  )
  path = write(tmp_path / 'v.mp4', 3)
  done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True, timeout=60)
  assert done.returncode == -signal.SIGKILL
  for _ in range(100):
    state = subprocess.run(['ps', '-o', 'stat=', '-p', done.stdout.strip()], capture_output=True, text=True).stdout
    if not state.strip() or state.startswith('Z'):
      return
    time.sleep(0.1)
  pytest.fail('the child lives on')


def test_the_child_needs_no_tensorflow():
  code = (
    'import sys, data_pipelines.media.transcode; print(sorted(m for m in sys.modules if m in ("tensorflow", "jax")))'
  )
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'


def mutations(data, rng):
  """Broken variants of a file: cut, bytes flipped, a stretch zeroed, doubled or taken out, often in the header."""
  while True:
    found, kind = bytearray(data), rng.randrange(5)
    at = int(len(data) * rng.random() ** 3)
    if kind == 0:
      del found[at:]
    elif kind == 1:
      for _ in range(rng.randrange(1, 9)):
        found[int(len(data) * rng.random() ** 2)] = rng.randrange(256)
    elif kind == 2:
      found[at : at + 64] = bytes(len(found[at : at + 64]))
    elif kind == 3:
      found[at:at] = found[at : at + rng.randrange(1, 400)]
    else:
      del found[at : at + rng.randrange(1, 400)]
    yield bytes(found)


def test_two_hundred_broken_files(media, tmp_path):
  """Each gives whole frames of one size or a reason of one line, in bounded time, and none stops the next."""
  rng = random.Random(7)
  names = ('unordered_pts.mov', 'tiny_carphone.mp4', 'rot_90.mov', 'hevc.mp4', 'odd_66x50_60fps.mov', 'av1.mkv')
  originals = [(media / f'video_edge/{n}').read_bytes() for n in names]
  originals.append((media / 'video/ucf_like_example.avi').read_bytes()[:60_000])
  sources = [mutations(data, rng) for data in originals]
  reasons, whole, slowest = set(), 0, 0.0
  with Decoder(timeout=10) as decode:
    for number, source in zip(range(200), itertools.cycle(sources), strict=False):
      path = tmp_path / f'{number}.mp4'
      path.write_bytes(next(source))
      start = time.monotonic()
      try:
        found = decode(str(path), Settings('video', 64, 5, 85))
      except Failure as failure:
        assert str(failure) and '\n' not in str(failure)
        reasons.add(str(failure))
      else:
        assert len({pixels.shape for pixels in decoded(found.frames)}) == 1
        assert found.fps == 5 and found.original_fps > 0 and found.duration > 0 and found.num_frames > 0
        whole += 1
      slowest = max(slowest, time.monotonic() - start)
    assert decode(str(media / 'video_edge/hevc.mp4'), NATIVE).num_frames == 10
  assert whole > 10 and len(reasons) > 10 and slowest < 30
