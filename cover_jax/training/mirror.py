"""A local folder for files that grow, whose copy is in a bucket: an object there is written whole or not at all.

`open('a')` on an object would replace it. So what a run appends to (`metrics.jsonl`, TensorBoard's events) is on a disk
of process 0 and goes to the bucket when a checkpoint is saved, when the run ends, and once a minute in between.
"""

import concurrent.futures
import os
import shutil
import tempfile
import time
from collections.abc import Sequence

from absl import logging

from data_pipelines import paths

EVERY = 60.0  # seconds


class Mirror:
  """The files of a workdir that grow.

  Attributes:
    folder: where they are written: the workdir itself if it is on a disk.
  """

  def __init__(self, workdir: str, names: Sequence[str]):
    """Fetches the files of these names, those that there are; raises OSError if that cannot be done."""
    self._workdir, self._remote = workdir, paths.is_remote(workdir)
    self.folder = tempfile.mkdtemp(prefix='cover_jax-') if self._remote else workdir
    self._sent: dict[str, tuple[int, int]] = {}
    self._last = time.monotonic()
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._sending: concurrent.futures.Future | None = None
    for name in names if self._remote else ():
      if paths.exists(os.path.join(workdir, name)):
        with open(os.path.join(self.folder, name), 'wb') as f:
          f.write(paths.read(os.path.join(workdir, name)))
        self._sent[name] = self._state(name)

  def send(self) -> None:
    """Returns when the copy is what the folder holds; raises OSError if it cannot be."""
    if self._remote:
      self._last = time.monotonic()
      self._thread.submit(self._send).result()

  def send_sometimes(self) -> None:
    """Begins to send if the last time was a minute ago; what goes wrong then is tried again by the next `send`."""
    if self._remote and time.monotonic() > self._last + EVERY and (self._sending is None or self._sending.done()):
      if self._sending is not None and (error := self._sending.exception()):
        logging.warning('Metrics did not get to %s: %s', self._workdir, error)
      self._last = time.monotonic()
      self._sending = self._thread.submit(self._send)

  def close(self) -> None:
    """Removes the local folder, if it is not the workdir."""
    self._thread.shutdown()
    if self._remote:
      shutil.rmtree(self.folder, ignore_errors=True)

  def _send(self) -> None:
    for name in paths.files_below(self.folder):
      state = self._state(name)
      if self._sent.get(name) != state:
        with open(os.path.join(self.folder, name), 'rb') as f:
          paths.write_object(f'{self._workdir}/{name}', f.read())
        self._sent[name] = state

  def _state(self, name: str) -> tuple[int, int]:
    stat = os.stat(os.path.join(self.folder, name))
    return stat.st_size, stat.st_mtime_ns
