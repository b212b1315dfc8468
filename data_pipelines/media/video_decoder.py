"""The frames of a video file, by PyAV: the stream that players choose, upright, and what the decoder says of damage."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData

from data_pipelines.contract import UserError
from data_pipelines.media import clock, container_streams, containers

# These decoders conceal what is damaged and flag the frame. The others pass over some damage without a word unless
# they are told to fail of it.
_FLAG_DAMAGE = frozenset(
  {'h264', 'mpeg4', 'mpeg2video', 'mpeg1video', 'mpegvideo', 'h263', 'flv', 'msmpeg4', 'msmpeg4v2', 'rv10', 'rv20'}
)
# These make frames from nothing where there is no key frame; the others wait for one.
_NEED_KEY = _FLAG_DAMAGE - {'h264'} | {'msmpeg4v3', 'wmv1', 'wmv2'}
# Every packet of these is one frame that is shown. (VP8 hides some; MPEG-4 in AVI has packets that say "as before".)
_FRAME_A_PACKET = frozenset({'h264', 'hevc', 'vp9', 'libdav1d', 'av1', 'mjpeg', 'ffv1', 'prores', 'png'})
# Demuxers whose index lists every packet, as soon as the file is open or was read.
_FULL_INDEX = frozenset({'mov', 'avi'})
# Demuxers of streams without a container, and what the first bytes are, but for zeros. They look for it anywhere.
_RAW = dict.fromkeys(('h264', 'hevc', 'vvc', 'm4v', 'mpegvideo', 'cavsvideo', 'vc1'), (b'\1',))
_RAW |= {'h263': (b'\x80', b'\x81', b'\x82', b'\x83'), 'mjpeg': (b'\xff\xd8',)}
_JOINT = 3  # packets around the place where two recordings were joined, of which a demuxer says that they are damaged
_FASTEST = 1e-5  # seconds of a frame; our choice, there are cameras of 25,000 frames a second
_IDENTITY = (1, 0, 0, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
  """One frame of a file.

  Attributes:
    seconds: since the first frame; never decreasing.
    size: (H, W), upright.
    pixels: gives uint8 [H, W, 3], upright, or [*size, 3] if called with a size: bicubic, antialiased. A function,
      because most frames are decoded and not looked at. It raises a UserError where they cannot be made RGB.
  """

  seconds: float
  size: tuple[int, int]
  pixels: Callable[..., np.ndarray]


@dataclasses.dataclass
class Findings:
  """What came to light while a video was decoded.

  Attributes:
    declared: packets that the file's index lists; None where it has none.
    packets: that were read.
    damaged: numbers of the frames, from 0, that the decoder says are damaged.
    breaks: of the timestamps.
  """

  declared: int | None = None
  packets: int = 0
  damaged: list[int] = dataclasses.field(default_factory=list)
  breaks: list[clock.Break] = dataclasses.field(default_factory=list)


def survey(path: str) -> tuple[float | None, int | None]:
  """Reads a video's packets without decoding them.

  Returns:
    Frames a second, by the timestamps; and the number of frames that the file's index lists, None where it has none.

  Raises:
    UserError: if it is no video that can be read.
  """
  with _open(path) as container:
    stream = _stream(path, container)
    rate = _nominal_rate(stream)
    packet_clock = _packet_clock(container, stream, rate)
    count, first, last = 0, None, None
    span = [0, 0]  # numbers of the first and the last packet that have a time
    try:
      for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
          continue
        time = next((t for t in reversed(packet_clock(packet.dts, packet.pts)) if t is not None), None)
        count += 1
        if time is not None:
          span = [span[0] or count, count]
          first, last = (time, time) if first is None else (min(first, time), max(last, time))
    except av.FFmpegError:  # a broken end: the packets before it tell the rate
      pass
    if span[1] > span[0] and last > first:
      measured = float((span[1] - span[0]) / ((last - first) * stream.time_base))
      # Timestamps are rounded to milliseconds in some containers; what they state is not.
      if not rate or abs(measured / rate - 1) > 0.01:
        rate = measured
    return rate, _indexed(container, stream)


def frames(path: str, threads: int, findings: Findings) -> Iterator[Frame]:
  """Decodes a video from its first frame to its last, in the order in which they are shown.

  Args:
    path: of the file.
    threads: of the decoder; 0: as many as it likes.
    findings: is filled in on the way.

  Raises:
    UserError: if it is no video that can be read. PyAV raises its own errors on broken bytes.
  """
  given = 0
  try:
    for frame in _decoded(path, threads, findings, strict=True):
      yield frame
      given += 1
    return
  except _Passable as error:
    damaged = error.args[0]
  # Once more, as a player does: what cannot be decoded is passed over, and the rest is shown.
  again = Findings()
  for number, frame in enumerate(_decoded(path, threads, again, strict=False)):
    if number >= given:
      yield frame
  again.damaged = sorted({damaged, *again.damaged})
  vars(findings).update(vars(again))


class _Passable(Exception):
  """A strict decoder failed at the frame of this number; another one may not."""


def _decoded(path: str, threads: int, findings: Findings, strict: bool) -> Iterator[Frame]:
  with _open(path) as container:
    stream = _stream(path, container)
    name = stream.codec_context.name
    strict = strict and name not in _FLAG_DAMAGE
    if strict:
      stream.codec_context.options = {'err_detect': 'crccheck+explode'}
    stream.thread_type = 'AUTO'
    stream.thread_count = threads
    rate = _nominal_rate(stream)
    packet_clock, frame_clock = _packet_clock(container, stream, rate), clock.FrameClock(rate)
    findings.breaks, findings.declared = packet_clock.breaks, _indexed(container, stream)
    unit = float(stream.time_base)
    due, corrupt, number, count, keyed = _Due(name in _FRAME_A_PACKET), {}, 0, 0, False
    early = matrix = rotation = None
    blind, first_key = name in _NEED_KEY, None
    slices = {}  # of FFV1: number of the frame -> whether its checksums are right
    for packet in container.demux(stream):
      if packet.size:
        packet.dts, packet.pts = packet_clock(packet.dts, packet.pts)
        findings.packets += not packet.is_discard
        if packet.is_keyframe and not keyed:
          keyed, first_key = True, _time(packet)
        if packet.is_corrupt:
          corrupt[count] = due.place(number, packet), packet.pos
        if name == 'ffv1':
          slices[count] = container_streams.whole_slices(bytes(packet))
        due.add(packet)
        count += 1
      try:
        found = packet.decode()
      except av.FFmpegError as error:
        if not keyed:  # a recording may begin between two key frames; players wait for the first one
          due.forget(packet)
          early = error
          continue
        if strict:
          # With several threads the packet at hand is not the one that failed.
          raise _Passable(due.place(number, packet) if threads == 1 else number) from None
        findings.declared = _indexed(container, stream)
        raise
      for frame in found:
        blind = blind and not frame.key_frame
        if blind:
          # An index or a packet says that there is one.
          if findings.declared or (first_key is not None and (_time(frame) or 0) >= first_key):
            findings.damaged.append(number)
          continue
        due.come(number, frame)
        if frame.is_corrupt:
          findings.damaged.append(number)
        if matrix is None or frame.key_frame or frame.rotation != rotation:  # side data is slow to look at
          found_matrix, rotation = _matrix(frame), frame.rotation
          # A message of the stream holds until the next key frame (H.264, D.2.27); FFmpeg notes it at its own frame.
          if matrix is None or frame.key_frame or found_matrix is not None:
            matrix = found_matrix or _IDENTITY
        yield Frame(
          frame_clock(frame.time, None if frame.dts is None else frame.dts * unit),
          (frame.width, frame.height) if matrix[0] == 0 else (frame.height, frame.width),
          functools.partial(_upright, frame, matrix, path),
        )
        number += 1
    if early and not number:
      raise early
    findings.damaged += due.lost(number)
    if any(slices.values()):  # else the stream has no checksums
      findings.damaged += [i for i, whole in slices.items() if not whole]
    # A demuxer sees a gap where two recordings were joined; there is none.
    joints = [b.packet for b in packet_clock.breaks]
    torn = {i: place for i, place in corrupt.items() if not any(0 <= j - i <= _JOINT for j in joints)}
    counted = container_streams.counter_breaks(path, stream.id) if torn else []
    for place, byte in torn.values():
      joined = next((joined for at, joined in counted if byte is not None and at > byte), False)
      findings.damaged += [] if joined else [place]
    findings.declared = _indexed(container, stream)  # of a film in fragments it grew on the way


class _Due:
  """Presentation times of packets whose frames have not come yet: a decoder may drop a frame without a word.

  Args:
    counts: whether each packet is one frame.
  """

  def __init__(self, counts: bool):
    self._counts, self._passed, self._started = counts, {}, False

  def add(self, packet: av.Packet) -> None:
    if packet.pts is not None and not packet.is_discard:
      self._passed[packet.pts] = None

  def forget(self, packet: av.Packet) -> None:
    self._passed.pop(packet.pts, None)

  def place(self, number: int, packet: av.Packet) -> int:
    """The number of a packet's frame, where `number` frames have come."""
    waiting = (time for time, passed in self._passed.items() if passed is None)
    return number + (0 if packet.pts is None else sum(time < packet.pts for time in waiting))

  def come(self, number: int, frame: av.VideoFrame) -> None:
    """Notes that a frame has come, the one of this number."""
    if frame.pts is None:
      return
    self._passed.pop(frame.pts, None)
    # Two packets may be the two fields of a frame.
    self._counts = self._counts and not frame.interlaced_frame
    pts = frame.pts
    for time in [time for time, passed in self._passed.items() if time < pts and passed is None]:
      if self._started:
        self._passed[time] = number  # it may come yet: presentation times are wrong in some files
      else:
        del self._passed[time]  # what was recorded before the first key frame cannot be shown
    self._started = True

  def lost(self, number: int) -> list[int]:
    """At the end, after `number` frames: those before which one did not come."""
    if not self._counts or not self._started:
      return []
    return sorted({number if passed is None else passed for passed in self._passed.values()})


def _time(of: av.Packet | av.VideoFrame) -> int | None:
  return of.dts if of.pts is None else of.pts


def _open(path: str):
  others = UserError(f'{path} stands for other files, which are not read in its place: give the paths of these files.')
  if containers.names_others(path):
    raise others
  try:
    container = av.open(f'file:{path}')  # or 'a:b.mp4' would be the protocol a
  except Exception as error:
    damage = containers.damage(path)  # an MP4 whose end is lost has lost its index, and FFmpeg says no more
    if damage:
      raise incomplete(path, damage) from error
    raise UserError(f'{path} is not a video or image that can be read ({reason(error)}).') from error
  if container.format.name == 'image2':
    container.close()
    if '%' in os.path.basename(path):  # a number in the name, %03d, stands for many
      raise others
    raise UserError(f'{path} is not a video or image that can be read (Pillow does not know it as a picture).')
  if (marks := _RAW.get(container.format.name)) and not containers.begins(path, marks):
    container.close()
    raise UserError(f'{path} is not a video or image that can be read (its beginning is damaged).')
  if container.format.name == 'tty':  # any text passes for a recording of a terminal
    container.close()
    raise UserError(f'{path} is a text file: give the path of a video or an image.')
  return container


def incomplete(path: str, why: str) -> UserError:
  """The error of a file that was cut or damaged so that no frame of it can be decoded; `why`: `containers.damage`."""
  return UserError(f'{path} holds no frame that can be decoded ({why}): is it complete? Fetch or copy it again.')


def reason(error: Exception) -> str:
  """The first line of what an error says."""
  text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
  return text.splitlines()[0]


def _stream(path: str, container):
  """The video stream that players choose, which is not always the first; cover art is none."""
  disposition = av.stream.Disposition
  pictures = disposition.attached_pic | disposition.timed_thumbnails
  streams = [s for s in container.streams.video if not s.disposition & pictures]
  if not streams:
    if damage := containers.damage(path):
      raise incomplete(path, damage)
    raise UserError(f'{path} has no video in it.')
  best = container.streams.best('video')
  stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
  if stream.codec_context is None:
    raise UserError(f'{path} is in a format that no decoder here can read.')
  # An AVI has no times: a frame lasts as long as its head says.
  if container.format.name == 'avi' and not _FASTEST <= stream.time_base <= clock.LONGEST_STEP:
    raise UserError(
      f'{path} states {1 / float(stream.time_base):g} frames a second, at which it was not recorded: write its rate '
      'anew (ffmpeg -r 25 -i).'
    )
  for other in container.streams:
    if other.index != stream.index:
      other.discard = av.stream.Discard.all
  return stream


def _indexed(container, stream) -> int | None:
  if not _FULL_INDEX & set(container.format.name.split(',')):
    return None
  return sum(not entry.is_discard for entry in stream.index_entries) or None


def _nominal_rate(stream) -> float | None:
  rate = stream.average_rate or stream.guessed_rate
  return float(rate) if rate and 1 <= rate <= 300 else None


def _packet_clock(container, stream, rate: float | None) -> Callable:
  # GXF has decoding times alone, in fields; FFmpeg's guess of the last presentation time is one field short.
  return clock.PacketClock(stream.time_base, rate, presented=container.format.name != 'gxf')


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
  """What takes stored (x, y), y down, to shown (a x + c y, b x + d y): the nearest of the 8 turns and mirrorings.

  None where a frame does not say.
  """
  try:
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
      return None
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
  except ValueError:  # PyAV does not know all kinds of side data
    quarter = round(frame.rotation / 90) % 4
    if not quarter:
      return None
    a, b, c, d = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][quarter]
  if a * d == b * c:  # it would flatten the picture; players leave such a one alone
    return _IDENTITY
  sign = lambda value: -1 if value < 0 else 1
  return (sign(a), 0, 0, sign(d)) if abs(a) + abs(d) >= abs(b) + abs(c) else (0, sign(b), sign(c), 0)


def _upright(
  frame: av.VideoFrame, matrix: tuple[int, int, int, int], path: str, size: tuple[int, int] | None = None
) -> np.ndarray:
  a, b, c, d = matrix
  turned = a == 0
  shape = {}
  if size is not None:
    height, width = reversed(size) if turned else size
    if (height, width) != (frame.height, frame.width):
      # Scaled before it becomes RGB, which costs a third of scaling the RGB (measured).
      shape = {'height': height, 'width': width, 'interpolation': 'BICUBIC'}
  try:
    pixels_HxWx3 = frame.to_ndarray(format='rgb24', **shape)
  except (av.FFmpegError, ValueError) as error:  # a header may name colours that there are none of
    raise UserError(f'{path} has pixels that cannot be made RGB ({reason(error)}).') from None
  if turned:
    pixels_HxWx3 = pixels_HxWx3.swapaxes(0, 1)
  return np.ascontiguousarray(pixels_HxWx3[:: b + d, :: a + c])
