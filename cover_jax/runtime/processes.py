"""A run of several processes: how they find each other, stop together and notice that one of them died.

Each host runs the same command. Process 0 is the coordinator and the only one that writes logs, metrics and reports.
"""

import contextlib
import glob
import importlib.util
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.contract import UserError

# Set by `srun` and `mpirun` in the processes that they start, and not by `salloc`.
_LAUNCHERS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_FLAGS = '--coordinator=HOST:PORT, --num_processes=N and --process_id=0..N-1'
# What collectives and the coordination service say when the other end is gone.
_LOST = re.compile(r'gloo|nccl|coordination.?service|heartbeat|barrier|DEADLINE_EXCEEDED', re.IGNORECASE)
# Bytes of a message that process 0 sends to the others.
_MESSAGE = 8192
_heartbeat_seconds = 100  # as `start` was told


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_seconds: int = 100,
) -> None:
  """Joins the other processes of the run, if there are any. Call it before anything that touches a device.

  What is not given comes from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what
  a Cloud TPU VM, SLURM or Open MPI says. Where none of them says anything the run is one process.

  Args:
    coordinator: 'host:port' of process 0.
    num_processes: of the run.
    process_id: of this process.
    heartbeat_seconds: a process that is silent for so long counts as dead, and the others stop. Where one has not come
      after three times as long, JAX aborts the others (exit code 134).

  Raises:
    UserError: if only some of the three are given, or they cannot be.
  """
  environ = os.environ
  coordinator = coordinator or environ.get('JAX_COORDINATOR_ADDRESS') or None
  num_processes = _number(num_processes, 'JAX_NUM_PROCESSES')
  process_id = _number(process_id, 'JAX_PROCESS_ID')
  given = [coordinator, num_processes, process_id]
  if given == [None] * 3:
    if not _launched_as_one_of_many(environ):
      return
  elif None in given:
    raise UserError(f'Only some of the flags for several processes are given: give all of {_FLAGS}, or none.')
  elif not 0 <= process_id < num_processes or ':' not in coordinator:
    raise UserError(
      f'--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id} is not a process of a '
      f'run: give {_FLAGS}.'
    )
  elif num_processes == 1:
    return
  global _heartbeat_seconds
  _heartbeat_seconds = heartbeat_seconds
  patience = 3 * heartbeat_seconds
  # The last line before JAX's own, which does not say what it waited for.
  others = f'the other processes at {coordinator}' if coordinator else 'the other processes'
  logging.info('Waiting for %s, up to %d seconds', others, patience)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=patience,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f'The processes of the run did not find each other ({str(error).splitlines()[0]}): give {_FLAGS}.'
    ) from error
  # Connects the devices while all are here: later a process that compiles longer than another might be given up.
  multihost_utils.sync_global_devices('start')
  if jax.process_index() != 0:
    logging.set_verbosity(logging.WARNING)
  logging.info('Process %d of %d, %d devices each', jax.process_index(), jax.process_count(), jax.local_device_count())


def heartbeat_seconds() -> int:
  """After how many seconds of silence a process of this run counts as dead."""
  return _heartbeat_seconds


def _number(value: int | None, name: str) -> int | None:
  text = os.environ.get(name)
  if value is not None or not text:
    return value
  if not text.isdigit():
    raise UserError(f'The environment variable {name} is {text!r}: expected a number.')
  return int(text)


def _launched_as_one_of_many(environ: Mapping[str, str]) -> bool:
  """Whether this process was started as one of several by something that JAX knows how to ask."""
  if any(int(environ.get(name) or 1) > 1 for name in _LAUNCHERS):
    return True
  return _on_tpu_vm() and environ.get('JAX_PLATFORMS', 'tpu').startswith('tpu')


def _on_tpu_vm() -> bool:
  """Whether there are TPU chips here. The metadata server then tells JAX the hosts of the slice, one or many."""
  chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


EXIT_INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended
_interrupted = threading.Event()
_pipes: list[int] = []  # the end that is written to, while Ctrl-C is watched


def watch_preemption() -> Callable[[], bool]:
  """Makes `stop() -> bool`: whether the run was asked to stop, by SIGTERM or Ctrl-C to any of its processes.

  A second Ctrl-C ends the process at once, whatever it is doing (exit code 130). `leave_interrupts` gives Ctrl-C back
  its usual meaning.

  All processes must call it equally often; it turns true at the same call in each, at most a few calls after the
  signal. No call waits for a device or another process: JAX's preemption service agrees on the call in the background.
  """
  if jax.process_count() == 1:
    event = threading.Event()
    _watch_interrupts(event.set)
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event.is_set
  _watch_interrupts(lambda: os.kill(os.getpid(), signal.SIGTERM))  # which the preemption service is told of
  calls, reached = itertools.count(1), False

  def stop() -> bool:
    nonlocal reached
    # It is true at one call only; and JAX has its own handler of SIGTERM, which ours would replace.
    reached = multihost_utils.reached_preemption_sync_point(next(calls)) or reached
    return reached

  return stop


def _watch_interrupts(ask: Callable[[], object]) -> None:
  """Calls `ask` at the first Ctrl-C, and ends the process at the second.

  A thread of its own does, since Python's handlers wait for the end of what the main thread calls: a compilation takes
  minutes. A process that was started to ignore Ctrl-C (in the background of a script) does so.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  _interrupted.clear()
  came, write = os.pipe()
  os.set_blocking(write, False)

  def watch():
    while number := os.read(came, 1):
      if number[0] != signal.SIGINT:
        continue
      if _interrupted.is_set():
        os._exit(EXIT_INTERRUPTED)
      _interrupted.set()
      os.write(2, b'\nCtrl-C: the run ends when the state is saved, after this step. Ctrl-C again ends it at once.\n')
      ask()

  threading.Thread(target=watch, daemon=True).start()
  signal.signal(signal.SIGINT, lambda *_: None)  # without a handler nothing is written to the pipe
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  _pipes.append(write)


def leave_interrupts() -> None:
  """From here on Ctrl-C interrupts as everywhere in Python: there is nothing left to save."""
  if threading.current_thread() is threading.main_thread() and _pipes:
    if (now := signal.set_wakeup_fd(-1)) not in (-1, _pipes[-1]):  # of an event loop that began since
      signal.set_wakeup_fd(now)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(_pipes.pop())  # ends the thread


def interrupted() -> bool:
  """Whether Ctrl-C came to this process since `watch_preemption`."""
  return _interrupted.is_set()


def lost_peer(error: BaseException) -> bool:
  """Whether an error says that another process of the run is gone."""
  return jax.distributed.is_initialized() and bool(_LOST.search(f'{type(error).__name__}: {error}'))


def leave(code: int) -> NoReturn:
  """Ends this process. One of several waits five seconds for the others to end as well, and not for ever."""
  sys.stdout.flush()
  sys.stderr.flush()
  if not jax.distributed.is_initialized():
    sys.exit(code)
  farewell = threading.Thread(target=_shutdown, daemon=True)
  farewell.start()
  farewell.join(5)
  os._exit(code)  # Python's own exit would wait for processes that wait for this one


def _shutdown() -> None:
  with contextlib.suppress(Exception):
    jax.distributed.shutdown()


def first(do: Callable[[], Any]) -> Any:
  """Does something in process 0 alone. Every process must call it.

  Returns:
    What `do` returns; None in the other processes.

  Raises:
    UserError: in every process, if `do` raises one, so that none waits for one that has ended.
  """
  if jax.process_count() == 1:
    return do()
  result, message = None, b''
  if jax.process_index() == 0:
    try:
      result = do()
    except UserError as error:
      message = str(error).encode()[:_MESSAGE]
  padded = np.frombuffer(message.ljust(_MESSAGE, b'\0'), np.uint8)
  message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b'\0')
  if message:
    raise UserError(message.decode(errors='replace'))
  return result


def gather(tree: Any) -> Any:
  """Arrays of all processes as numpy arrays, in every process. Every process must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def gather_texts(text: str) -> list[str]:
  """The text of each process, by its number, in every process. Every process must call it."""
  own = np.frombuffer(text.encode(), np.uint8)
  if jax.process_count() == 1:
    return [text]
  lengths = gather(np.array([len(own)]))
  padded = np.zeros(max(lengths), np.uint8)
  padded[: len(own)] = own
  rows = gather(padded).reshape(len(lengths), -1)
  return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def together(do: Callable[[], Any]) -> Any:
  """Does something in every process, process 0 before the others, so that what it leaves in a cache is there for them.

  Returns:
    What `do` returns.

  Raises:
    UserError: in every process, if `do` raises one in any of them; says in which.
  """
  if jax.process_count() == 1:
    return do()
  result, message = None, ''
  for mine in (jax.process_index() == 0, jax.process_index() != 0):
    try:
      result = do() if mine else result
    except UserError as error:
      message = str(error)
    told = gather_texts(message)
    if faults := {number: text for number, text in enumerate(told) if text}:
      number, text = next(iter(faults.items()))
      where = '' if len(set(told)) == 1 else f'In process {number} of {len(told)}: '
      raise UserError(where + text)
  return result


def everywhere(ok: bool) -> bool:
  """Whether something is true in all processes. Every process must call it."""
  return bool(np.all(gather(np.array([ok]))))
