"""Where the numbers of a run are written, and how they are read again: `metrics.jsonl`, TensorBoard, the log."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from cover_jax.checkpoints import workdir as workdirs
from cover_jax.runtime import processes
from cover_jax.training import mirror, wandb_run
from data_pipelines import durable, paths
from data_pipelines.contract import UserError

FILE = 'metrics.jsonl'
DAMAGED = '.damaged'  # behind its name: what no row could be made of
TOP1 = ('top1', 'classification_top1')  # the second: of classification in a list of objectives


def summary(scalars: Mapping[str, float]) -> str:
  """One line: the total loss, and of each source its loss and, where there is one, its top-1 (in tests: or mAP)."""
  parts = [f'loss {scalars["train/loss"]:.4f}'] if 'train/loss' in scalars else []
  for key, loss in scalars.items():
    where = key.split('/')  # train/<stream>/<source>/loss, test/<source>/loss
    if where[-1] == 'loss' and len(where) == {'train': 4, 'test': 3}.get(where[0]):
      top1 = [scalars[k] for name in (*TOP1, 'mAP') if (k := key.removesuffix('loss') + name) in scalars]
      split = 'test ' if where[0] == 'test' else ''
      parts.append(f'{split}{where[-2]} {loss:.3f}' + (f' ({top1[0]:.1%})' if top1 else ''))
  return ' | '.join(parts)


class Writer:
  """Writes scalars on process 0 to `metrics.jsonl`, TensorBoard and the log; a context manager.

  `metrics.jsonl` has one object a line: {"step": 100, "train/loss": 1.2, ...}. After a resume the lines past the
  restored step are dropped first, so the file is that of an uninterrupted run; TensorBoard is told to forget its points
  past that step. Lines that are no such object are moved to `metrics.jsonl.damaged`. Where there is nothing to drop or
  to move, the file is left as it is. In a bucket lies a copy of local files (`mirror.py`).

  What cannot be written raises a UserError, from the next call at the latest.
  """

  def __init__(self, workdir: str, *, first_step: int, tests_again: bool):
    """Opens the files, in process 0; every process must make one.

    Args:
      workdir: where they lie.
      first_step: the restored step, 0 for a new run.
      tests_again: whether that step is evaluated again, so that its lines of tests are dropped, too.
    """
    self._workdir, self._first_step = workdir, first_step
    self._file, self._events, self._wandb, self._mirror = None, None, None, None
    processes.first(lambda: self._open(first_step, tests_again))

  def _open(self, first_step: int, tests_again: bool) -> None:
    with workdirs.writing(self._workdir, FILE):
      self._mirror = mirror.Mirror(self._workdir, (FILE, FILE + DAMAGED))
      path = os.path.join(self._mirror.folder, FILE)
      rows = _cut_back(path, first_step, tests_again)
      self._file = open(path, 'ab', buffering=0)  # noqa: SIM115  held for the run
    try:
      from clu import metric_writers  # imports TensorFlow
    except ImportError:
      logging.warning('TensorFlow is not installed: metrics go to metrics.jsonl and the log only.')
      return
    with self._writing_events():
      self._events = _Events(metric_writers.SummaryWriter(self._mirror.folder))
      # TensorBoard forgets all tags of a step or none: where the tests of this step come again, so must the rest.
      self._events.begin(first_step if tests_again else first_step + 1)
      for row in rows if tests_again else ():
        if row['step'] == first_step:
          self._events.write(first_step, {key: float(value) for key, value in row.items() if key != 'step'})

  def describe(self, config: Mapping[str, Any]) -> None:
    """Shows the config in TensorBoard: as text, and its keys as hyper-parameters to compare runs by.

    Where it names a project of Weights & Biases, a run begins there, too.
    """
    project = config.get('wandb', {}).get('project')
    if project and self._file is not None:
      self._wandb = wandb_run.Run(project, self._workdir, config)
    if self._events is not None:
      with self._writing_events():
        self._events.describe(self._first_step, config)

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except UserError as also:
      if kind is None:
        raise
      logging.error('%s', also)  # the first one is what the run ends with

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step; safe to call on every process."""
    if self._file is None:
      return
    line = {'step': step} | {k: (v if math.isfinite(v) else str(v)) for k, v in scalars.items()}
    with workdirs.writing(self._workdir, FILE):
      _append(self._file, (json.dumps(line) + '\n').encode())
    logging.info('Step %d: %s', step, summary(scalars))
    if self._events is not None:
      with self._writing_events():
        self._events.write(step, dict(scalars))
    if self._wandb is not None:
      self._wandb.write(step, scalars)
    self._mirror.send_sometimes()

  def flush(self) -> None:
    """Returns when the lines of `metrics.jsonl` are on disk, to outlast what is saved after them.

    TensorBoard's events are in its files by then, to outlast this process.
    """
    if self._file is not None:
      with workdirs.writing(self._workdir, FILE):
        os.fsync(self._file.fileno())
    if self._events is not None:
      with self._writing_events():
        self._events.flush()
    self._send()

  def close(self) -> None:
    try:
      if self._file is not None:
        self._file.close()
      if self._events is not None:
        with self._writing_events():
          self._events.close()
      if self._wandb is not None:
        self._wandb.close()
      self._send()
    finally:
      if self._mirror is not None:
        self._mirror.close()

  def _send(self) -> None:
    if self._mirror is not None:
      with workdirs.writing(self._workdir, 'metrics'):
        self._mirror.send()

  def _writing_events(self) -> contextlib.AbstractContextManager:
    return workdirs.writing(self._workdir, 'TensorBoard events', Exception)  # TensorFlow raises its own


class _Events:
  """Scalars for TensorBoard, written in a thread: a slow disk does not hold up a step."""

  def __init__(self, writer: Any):
    self._writer = writer
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._writing: list[concurrent.futures.Future] = []

  def begin(self, step: int) -> None:
    """Makes TensorBoard forget the points from this step on that earlier runs wrote into the folder."""
    # Not part of TensorFlow's documented interface, which has nothing that writes an event of a session.
    from tensorflow.core.util import event_pb2
    from tensorflow.python.ops import summary_ops_v2

    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    event = event_pb2.Event(wall_time=time.time(), step=step, session_log=session).SerializeToString()
    with self._writer._summary_writer.as_default():
      for _ in range(2):  # TensorBoard takes the first one that it ever sees in a folder for the start of all
        summary_ops_v2.import_event(event)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Raises what went wrong with an earlier call, too."""
    self._writing.append(self._thread.submit(self._writer.write_scalars, step, scalars))
    self._raise([w for w in self._writing if w.done()])

  def describe(self, step: int, config: Mapping[str, Any]) -> None:
    """As `Writer.describe`; raises what went wrong with an earlier call, too."""
    text = '```\n' + json.dumps(config, indent=2, default=str) + '\n```'
    self._writing.append(self._thread.submit(self._writer.write_texts, step, {'config': text}))
    self._writing.append(self._thread.submit(self._writer.write_hparams, flat(config)))
    self._raise([w for w in self._writing if w.done()])

  def flush(self) -> None:
    """Returns when all is in the file; raises what went wrong with an earlier call, too."""
    self._writing.append(self._thread.submit(self._writer.flush))
    self._raise(self._writing)

  def close(self) -> None:
    self._thread.shutdown()
    try:
      self._raise(self._writing)
    finally:
      self._writer.close()

  def _raise(self, done: Sequence[concurrent.futures.Future]) -> None:
    self._writing = [w for w in self._writing if w not in done]
    for written in done:
      written.result()


def flat(config: Mapping[str, Any], before: str = '') -> dict[str, bool | int | float | str]:
  """{'optimizer.learning_rate': 0.001, ...}: what TensorBoard takes for hyper-parameters; other values as text."""
  found: dict[str, bool | int | float | str] = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      found |= flat(value, f'{before}{key}.')
    else:
      found[f'{before}{key}'] = value if isinstance(value, bool | int | float | str) else str(value)
  return found


def write_pictures(workdir: str, step: int, pictures: Mapping[str, str], config: Mapping[str, Any]) -> None:
  """Shows pictures in TensorBoard, and in Weights & Biases where the config names a project.

  Args:
    workdir: of the run.
    step: that they are of.
    pictures: {name: path of a PNG}.
    config: of the run.

  Raises:
    UserError: if they cannot be written.
  """
  if project := config.get('wandb', {}).get('project'):
    run = wandb_run.Run(project, workdir, config)
    run.pictures(step, pictures)
    run.close()
  try:
    from clu import metric_writers  # imports TensorFlow
  except ImportError:  # the writer of metrics has said so
    return
  with workdirs.writing(workdir, 'TensorBoard events', Exception):
    copied = mirror.Mirror(workdir, ())
    try:
      writer = metric_writers.SummaryWriter(copied.folder)
      for name, path in pictures.items():
        with Image.open(io.BytesIO(paths.read(path))) as picture:
          writer.write_images(step, {name: np.asarray(picture.convert('RGB'))[None]})
      writer.close()
      copied.send()
    finally:
      copied.close()


def _append(file: IO[bytes], line: bytes) -> None:
  """Appends a line to an unbuffered file, or leaves the file as it was."""
  before = os.fstat(file.fileno()).st_size
  try:
    while line:
      line = line[file.write(line) :]
  except OSError:
    with contextlib.suppress(OSError):
      file.truncate(before)
    raise


class _Line(NamedTuple):
  number: int
  text: bytes
  row: dict[str, Any] | None  # None: it is no row


def read_jsonl(path: str) -> list[dict[str, Any]]:
  """The rows of a metrics file, [] if there is none; lines that are no rows are left out, and named in the log."""
  if not paths.exists(path):
    return []
  lines = _lines(paths.read(path))
  _report_damage(path, lines, 'left out')
  return [line.row for line in lines if line.row is not None]


def _lines(text: bytes) -> list[_Line]:
  return [_Line(number, line, _row(line)) for number, line in enumerate(text.split(b'\n'), 1) if line.strip()]


def _row(line: bytes) -> dict[str, Any] | None:
  """{'step': int, ...}, or None."""
  try:
    row = json.loads(line.decode())
  except (ValueError, RecursionError):
    return None
  step = row.get('step') if isinstance(row, dict) else None
  return row if type(step) is int and 0 <= step < 2**31 else None


def _report_damage(path: str, lines: Sequence[_Line], fate: str) -> None:
  if numbers := [str(line.number) for line in lines if line.row is None]:
    logging.warning(
      '%s: %d of %d lines cannot be read and are %s: line %s. A kill or a full disk cuts the last line off; other '
      'lines were changed by something else.',
      path,
      len(numbers),
      len(lines),
      fate,
      ', '.join(numbers[:20]) + (', ...' if len(numbers) > 20 else ''),
    )


def _cut_back(path: str, step: int, tests_again: bool) -> list[dict[str, Any]]:
  """Makes a metrics file that of a run which has come to `step`; returns its rows."""
  text = paths.read(path) if os.path.exists(path) else b''
  lines = _lines(text)
  if damaged := [line for line in lines if line.row is None]:
    beside = path + DAMAGED
    _report_damage(path, lines, f'moved to {beside}')
    earlier = paths.read(beside) if os.path.exists(beside) else b''
    durable.write(beside, earlier + _joined(damaged))
  rows = [line for line in lines if line.row is not None]
  if back := [b.number for a, b in itertools.pairwise(rows) if b.row['step'] < a.row['step']]:
    logging.warning('%s: steps go back at line %d, as if two runs had written: all are kept', path, back[0])
  kept = [line for line in rows if not _is_past(line.row, step, tests_again)]
  if len(kept) < len(rows):
    logging.info('%s: dropped %d rows of what is done again from step %d', path, len(rows) - len(kept), step)
  if damaged or len(kept) < len(rows) or (text and not text.endswith(b'\n')):
    durable.write(path, _joined(kept))
  return [line.row for line in kept]


def _is_past(row: Mapping[str, Any], step: int, tests_again: bool) -> bool:
  is_test = any(key.startswith('test/') for key in row)
  return row['step'] > step or (row['step'] == step and is_test and tests_again)


def _joined(lines: Sequence[_Line]) -> bytes:
  return b''.join(line.text + b'\n' for line in lines)
