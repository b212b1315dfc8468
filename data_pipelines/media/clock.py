"""Times of a video on one line: timestamps that go back, leap ahead or are missing are repaired, and it is said where.

Two recordings joined byte by byte start their clock twice; a receiver's clock wraps around; a camera that was paused
leaps ahead by hours. Packets come in the order of their decoding times, which never go back within one recording: that
is where breaks are seen. Frames come in the order in which they are shown.
"""

from fractions import Fraction
from typing import NamedTuple

# Our choice. A screen recording may show one picture for most of a minute; a leap beyond that is no picture's length.
LONGEST_STEP = 60.0
_LONGEST_REST = 2  # packets; a clock that stands still for more does not run


class Break(NamedTuple):
  """A place where a clock was set right.

  Attributes:
    packet: number of the first packet after it.
    seconds: by which the timestamps leapt; negative: back.
  """

  packet: int
  seconds: float


class PacketClock:
  """Gives packets' timestamps without their breaks: after a break time goes on by the step before it.

  Args:
    time_base: seconds of one unit of the timestamps.
    rate: frames a second, for the step of a break right at the start.
    presented: whether presentation times are given on; else they become None.

  Attributes:
    breaks: found so far.
  """

  def __init__(self, time_base: Fraction, rate: float | None, presented: bool = True):
    self.breaks: list[Break] = []
    self._seconds, self._presented = float(time_base), presented
    self._step = max(round(1 / ((rate or 25.0) * self._seconds)), 1)
    self._longest = LONGEST_STEP / self._seconds
    self._offset, self._last, self._count, self._rest = 0, None, 0, 0

  def __call__(self, dts: int | None, pts: int | None) -> tuple[int | None, int | None]:
    """(dts, pts) of the next packet, repaired; None stays None."""
    if dts is not None:
      step = self._step if self._last is None else dts - self._last
      self._rest = 0 if step > 0 else self._rest + 1
      # Writers round, so the smallest steps back are none.
      if not -self._step <= step <= self._longest or self._rest > _LONGEST_REST:
        self._offset += self._step - step
        self.breaks.append(Break(self._count, step * self._seconds))
      elif step > 0:
        self._step = step
      self._last = dts
    if not self._presented:
      pts = None
    elif dts is not None and pts is not None and abs(pts - dts) > self._longest:
      pts = None  # one of the two is wrong, and decoding times are the ones that were looked at
    self._count += 1
    if self._offset:
      dts, pts = (None if t is None else t + self._offset for t in (dts, pts))
    return dts, pts


class FrameClock:
  """Seconds since the first frame; never decreasing, and never by more than `LONGEST_STEP` at a time.

  Of the two times that a decoder gives a frame, the one that went wrong less often counts: XviD's presentation times
  are out of order in AVI files, and decoding times are missing elsewhere.
  """

  def __init__(self, rate: float | None):
    self._step = 1 / (rate or 25.0)
    self._faults, self._last = [0, 0], [None, None]
    self._first, self._seconds, self._count = None, 0.0, 0

  def __call__(self, presented: float | None, decoded: float | None) -> float:
    """The time of the next frame, of its two times in seconds."""
    for i, time in enumerate((presented, decoded)):
      last = self._last[i]
      if time is None or (last is not None and time <= last):
        self._faults[i] += 1
      if time is not None:
        self._last[i] = time
    time = presented if self._faults[0] <= self._faults[1] else decoded
    if time is None:
      time = presented if presented is not None else decoded
    if time is None:
      self._seconds += self._step if self._count else 0.0
    else:
      if self._first is None:
        self._first = time - self._seconds - (self._step if self._count else 0.0)
      if time - self._first - self._seconds > LONGEST_STEP:
        self._first = time - self._seconds - self._step
      later = time - self._first - self._seconds
      if later > 0:
        self._step = later if self._count else self._step
        self._seconds += later
    self._count += 1
    return self._seconds
