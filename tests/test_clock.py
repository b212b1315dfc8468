"""Times of videos whose timestamps go back, leap, wrap around, stand still or are missing."""

import logging
import pathlib
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.contract import UserError
from data_pipelines.media import container_streams, transcode, video_files
from data_pipelines.media.clock import LONGEST_STEP, FrameClock, PacketClock
from tests.test_video_files import grey, numbers, write

MILLISECOND = Fraction(1, 1000)


def packet_times(decoding, rate=25, lead=80):
  clock = PacketClock(MILLISECOND, rate)
  return [clock(dts, dts + lead) for dts in decoding], clock.breaks


@pytest.mark.parametrize('base', [0, -5000, 1 << 33])
def test_a_clock_that_runs_is_left_alone(base):
  times = base + np.cumsum([0, 40, 33, 1, 5000, 59_000, 40, 0, 40, 40, -1, 40])
  found, breaks = packet_times(times.tolist())
  assert found == [(t, t + 80) for t in times] and not breaks


@pytest.mark.parametrize('leap', [-400, -(1 << 33), 61_000, 3 * 3600 * 1000])
def test_a_leap_becomes_one_step(leap):
  before = 40 * np.arange(10)
  found, breaks = packet_times([*before, *(before[-1] + leap + 20 * np.arange(1, 11))])
  dts = [d for d, _ in found]
  assert np.diff(dts).tolist() == [40] * 10 + [20] * 9
  assert all(pts == d + 80 for d, pts in found)
  assert [(b.packet, round(b.seconds)) for b in breaks] == [(10, round((leap + 20) / 1000))]


def test_a_clock_that_stands_still_is_none():
  found, _ = packet_times([0] * 20)
  assert (np.diff([d for d, _ in found][3:]) == 40).all()


def test_a_presentation_time_far_from_its_packet_is_left_out():
  clock = PacketClock(MILLISECOND, 25)
  assert [clock(40 * i, 40 * i + (10**9 if i == 3 else 0))[1] for i in range(6)] == [0, 40, 80, None, 160, 200]


def test_frames_take_the_times_that_are_in_order():
  clock = FrameClock(25)
  presented = [1, 2, 4, 3, 5, 7, 6, 8, 10, 9]
  times = [clock(p / 25, (i + 1) / 25) for i, p in enumerate(presented)]
  assert (np.diff(times) >= 0).all() and times[-1] == pytest.approx(9 / 25)
  assert np.abs(np.array(times) - np.arange(10) / 25).max() < 0.05


def test_frames_without_times_follow_the_rate():
  clock = FrameClock(10)
  assert [clock(None, None) for _ in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
  assert clock(100.0, None) == pytest.approx(0.4)
  assert clock(100.0 + 10 * LONGEST_STEP, None) == pytest.approx(0.5)


# ---- Files.


def shifted(path, shift, count=40, fps=25, codec='libx264', **options):
  """A video of `count` frames whose packet i has its two timestamps shifted by shift(i) seconds; None: taken out."""
  with av.open(str(path), 'w', options=options) as container:
    stream = container.add_stream(codec, rate=fps)
    stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 32, 48, 'yuv420p', 500_000
    frames = (av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey(i), np.uint8), format='rgb24') for i in range(count))
    packets = [p for frame in [*frames, None] for p in stream.encode(frame)]
    for i, packet in enumerate(packets):
      ticks = round(shift(i) / packet.time_base)
      packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
      container.mux(packet)
  return str(path)


def test_joined_recordings_go_on(tmp_path, caplog):
  """`cat a.ts b.ts`: the second one's clock starts again."""
  first, second = (write(tmp_path / name, 20, codec='libx264', fps=25) for name in ('a.ts', 'b.ts'))
  path = tmp_path / 'joined.ts'
  path.write_bytes((tmp_path / 'a.ts').read_bytes() + (tmp_path / 'b.ts').read_bytes())
  with caplog.at_level(logging.WARNING):
    frames = list(video_files.frames(str(path)))
  assert numbers([f.pixels() for f in frames]) == [*range(20), *range(20)]
  np.testing.assert_allclose([f.seconds for f in frames], np.arange(40) / 25, atol=1e-3)
  assert video_files.header(str(path)).fps == pytest.approx(25)
  (record,) = caplog.records
  assert 'joined.ts: its timestamps leap by -0.8 s after frame 20' in record.getMessage()
  caplog.clear()
  times = []
  stored = list(transcode.video(str(path), transcode.Settings('video', 0, 5, 85), times))
  assert len(stored) == 8 and len(times) == 40  # 1.6 s
  list(video_files.frames(first)), list(video_files.frames(second))
  assert len(caplog.records) == 1  # of the joined one


LEAPS = {
  'wrap.ts': lambda i: (1 << 33) / 90_000 - 0.8,  # 33 bits of a transport stream wrap around in the middle
  'gap.mkv': lambda i: 3 * 3600 if i >= 20 else 0,
  'gap.mp4': lambda i: 3 * 3600 if i >= 20 else 0,
  'gap.ts': lambda i: 3 * 3600 if i >= 20 else 0,
  'start.mkv': lambda i: 500,
  'start.ts': lambda i: 50_000,
  'plain.mp4': lambda i: 0,
  'plain.avi': lambda i: 0,
  'plain.flv': lambda i: 0,
}


@pytest.mark.parametrize('name', LEAPS)
def test_times_of_files_run_from_zero_without_leaps(tmp_path, name):
  """With B-frames, so that decoding and presentation times differ."""
  path = shifted(tmp_path / name, LEAPS[name])
  frames = list(video_files.frames(path))
  assert numbers([f.pixels() for f in frames]) == [i % 28 for i in range(40)]
  np.testing.assert_allclose([f.seconds for f in frames], np.arange(40) / 25, atol=2e-3)
  assert video_files.header(path).fps == pytest.approx(25, rel=1e-3)


def test_a_negative_start_is_zero(tmp_path):
  path = shifted(tmp_path / 'a.mkv', lambda i: -0.4, avoid_negative_ts='disabled')
  assert [round(25 * f.seconds) for f in video_files.frames(path)] == list(range(40))


def test_a_raw_stream_has_the_rate_that_is_assumed(tmp_path):
  path = write(tmp_path / 'a.h264', 12, codec='libx264', fps=25)
  frames = list(video_files.frames(path))
  assert [round(25 * f.seconds) for f in frames] == list(range(12))
  assert numbers([f.pixels() for f in frames]) == list(range(12))


def test_the_shipped_files_need_no_repair(media, caplog):
  for path in sorted([*media.glob('video/*.m*'), *media.glob('video_edge/*.m*'), *media.glob('video/*.avi')]):
    with caplog.at_level(logging.WARNING):
      try:
        assert all(f.seconds >= 0 for f in video_files.frames(str(path)))
      except video_files.BrokenOff:
        assert path.name == 'corrupted.mp4'
    assert not caplog.records, path


def part(path, first, count, codec):
  """A transport stream of its own whose frames go on in number and time after `first` others."""
  with av.open(str(path), 'w', format='mpegts') as container:
    stream = container.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 32, 48, 'yuv420p', 500_000
    for i in range(first, first + count):
      frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), grey(i), np.uint8), format='rgb24')
      frame.pts = i
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path.read_bytes()


@pytest.mark.parametrize('codec', ['libx264', 'mpeg2video'])
def test_segments_whose_clock_goes_on_are_whole(tmp_path, codec):
  """`cat seg0.ts seg1.ts seg2.ts`: packets are counted anew in each, which a demuxer takes for a loss."""
  parts = [part(tmp_path / 'part.ts', 20 * i, 20, codec) for i in range(3)]
  path = tmp_path / 'joined.ts'
  path.write_bytes(b''.join(parts))
  assert numbers([f.pixels() for f in video_files.frames(str(path))]) == [i % 28 for i in range(60)]
  breaks = container_streams.counter_breaks(str(path), 256)
  assert breaks and all(joined for _, joined in breaks)


@pytest.mark.parametrize('codec', ['libx264', 'mpeg2video'])
def test_packets_lost_within_a_segment_are_damage(tmp_path, codec):
  parts = [part(tmp_path / 'part.ts', 20 * i, 20, codec) for i in range(3)]
  path, missed = tmp_path / 'torn.ts', []
  for at in range(9 * 188, len(parts[1]) - 9 * 188, 7 * 188):
    path.write_bytes(parts[0] + parts[1][:at] + parts[1][at + 188 :] + parts[2])
    if all(joined for _, joined in container_streams.counter_breaks(str(path), 256)):
      missed.append(at)  # a table of programs
      continue
    with pytest.raises(video_files.Damaged):
      list(video_files.frames(str(path)))
  assert len(missed) < len(parts[1]) / 188 / 7 / 2


def test_the_times_of_gxf_are_those_of_its_frames(tmp_path):
  path = write(tmp_path / 'a.gxf', 30, codec='mpeg2video', fps=25, size=(576, 720))
  assert [round(50 * f.seconds) for f in video_files.frames(path)] == list(range(0, 60, 2))
  assert video_files.header(path).fps == pytest.approx(25)


@pytest.mark.parametrize(('scale', 'rate', 'said'), [(1_000_000, 1000, '0.001'), (1, 0x7FFFFFFF, r'2\.14748e\+09')])
def test_an_avi_of_an_impossible_rate_is_refused(tmp_path, scale, rate, said):
  path = tmp_path / 'a.avi'
  data = bytearray(pathlib.Path(write(path, 8)).read_bytes())
  struct.pack_into('<II', data, data.index(b'strh') + 28, scale, rate)
  path.write_bytes(data)
  for read in (video_files.header, lambda name: list(video_files.frames(name))):
    with pytest.raises(UserError, match=f'states {said} frames a second'):
      read(str(path))
