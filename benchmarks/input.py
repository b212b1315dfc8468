"""How fast are clips read? Our input pipeline against PyTorch DataLoaders, video decoders and TFDS.

    python -m benchmarks.input --output=DIR [--video=FILE] [--quick] [--demand=CLIPS_PER_SECOND]

The same clips for all (8 frames, 32 apart, a random box resized to 224 x 224, uint8), from videos of 10 and of 60 s
that are made first: from a video of yours, or drawn. Each contestant is a process of its own with all cores; they take
turns, a few seconds each, for some rounds, while the others stand still. The table has medians over the rounds; ratios
are medians of the ratios within each round. On a machine that others use as well, compare CPU a clip: clips a second
then depend on how many threads fight for the cores. CPU is that of the contestant's processes and its workers'; bytes
are what they asked the system for (pipes between them too, mapped files not), from a warm page cache. A peer that is
not installed is reported as absent: `pip install '.[bench]'`, or --peer_python names an interpreter that has them.

Writes DIR/input.json, DIR/input.md and DIR/input.png; Linux only. --quick is a trial: few videos, two peers.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import input_contestants as contestants
from benchmarks import input_media
from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed


_LATE = 1_000_000  # step of the restart
_HEAD_START = 6  # batches that a loader has ready when its turn begins, about
_TICKS = os.sysconf('SC_CLK_TCK')


def _short(first: str) -> str:
  """Label of our pipeline over the shortest videos among the contestants over longer ones."""
  return f'ours_on_{first}_s'


class Absent(Exception):
  """Why a contestant cannot run."""


class Contestant:
  """A process that reads clips when told to, and stands still otherwise."""

  def __init__(self, name: str, folder: Path, python: str, start_step: int = 0):
    command = [python, '-m', 'benchmarks.input_contestants', name, str(folder), str(start_step)]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    root = str(Path(__file__).parent.parent)
    # A session of its own: so all its processes are known.
    self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115  closed with the process
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=root, env=env,
      start_new_session=True,
    )  # fmt: skip
    self.name = name
    answer = self._answer()
    if 'absent' in answer:
      self.close()
      raise Absent(answer['absent'])
    self.first_batch = answer['first_batch']
    self._rate = 1 / self._read(2 * _HEAD_START)['seconds'] * 2 * _HEAD_START  # batches a second, about

  def turn(self, seconds: float) -> dict[str, float]:
    """Reads for about some seconds; gives clips_per_second, cpu_ms and bytes of a clip."""
    self._pause(signal.SIGCONT)
    self._read(_HEAD_START)
    count = max(round(self._rate * seconds), 2)
    cpu, read = self._usage()
    taken = self._read(count)['seconds']
    cpu_after, read_after = self._usage()
    self._pause(signal.SIGSTOP)
    self._rate = count / taken
    n = count * contestants.BATCH
    return {'clips_per_second': n / taken, 'cpu_ms': (cpu_after - cpu) / n * 1e3, 'bytes': (read_after - read) / n}

  def memory(self) -> float:
    """Highest resident memory of all its processes together, in MB."""
    return (
      sum(int(s.split()[1]) for p in self._processes() for s in _lines(p, 'status') if s.startswith('VmHWM')) / 1024
    )

  def stop(self) -> None:
    self._pause(signal.SIGSTOP)

  def close(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.communicate()
    self._errors.close()

  def _read(self, batches: int) -> dict[str, float]:
    self._process.stdin.write(f'{batches}\n')
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict[str, float]:
    line = self._process.stdout.readline()
    if not line:
      self._errors.seek(0)
      why = self._errors.read().strip().splitlines()
      raise UserError(f'The contestant {self.name} ended: {why[-1] if why else "no reason given"}.')
    return json.loads(line)

  def _pause(self, how: signal.Signals) -> None:
    os.killpg(self._process.pid, how)

  def _processes(self) -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir('/proc')):
      with contextlib.suppress(OSError):
        if os.getsid(int(pid)) == self._process.pid:
          yield pid

  def _usage(self) -> tuple[float, int]:
    """(CPU seconds, bytes read) of all its processes so far."""
    cpu = read = 0
    for pid in self._processes():
      fields = ' '.join(_lines(pid, 'stat')).rpartition(')')[2].split()
      cpu += (int(fields[11]) + int(fields[12])) / _TICKS
      read += sum(int(line.split()[1]) for line in _lines(pid, 'io') if line.startswith('rchar'))
    return cpu, read


def _lines(pid: str, name: str) -> list[str]:
  with contextlib.suppress(OSError):
    return Path(f'/proc/{pid}/{name}').read_text(encoding='utf-8').splitlines()
  return []


def measure(entries: Mapping[str, tuple[str, Path]], rounds: int, turn: float) -> tuple[dict, dict]:
  """Lets the contestants take turns.

  Args:
    entries: {label: (contestant, folder of videos)}.
    rounds, turn: how many turns each has, of how many seconds.

  Returns:
    {label: {'rounds': [of `Contestant.turn`], 'first_batch', 'memory_mb'}},
    {absent label: why}.
  """
  ours = {c.__name__ for c in contestants.OURS}
  running, absent, results = [], {}, {}
  try:
    for label, (name, folder) in entries.items():
      python = sys.executable if name in ours or name == 'tfds_skip_decoding' else _OPTIONS.peer_python
      try:
        contestant = Contestant(name, folder, python)
      except Absent as e:
        absent[label] = str(e)
        continue
      contestant.stop()
      contestant.name = label
      running.append(contestant)
      results[label] = {'rounds': [], 'first_batch': contestant.first_batch}
    for number in range(rounds):
      for contestant in running if number % 2 == 0 else reversed(running):
        results[contestant.name]['rounds'].append(contestant.turn(turn))
    for contestant in running:
      results[contestant.name]['memory_mb'] = contestant.memory()
  finally:
    for contestant in running:
      contestant.close()
  return results, absent


def restart(folder: Path, repeats: int) -> dict[str, float]:
  """Seconds to the first batch of step 0 and of step 1,000,000, each a process of its own."""
  starts = {'0': [], str(_LATE): []}
  for _ in range(repeats):
    for step, seconds in starts.items():
      contestant = Contestant('ours', folder, sys.executable, int(step))
      seconds.append(contestant.first_batch)
      contestant.close()
  return {step: float(np.median(seconds)) for step, seconds in starts.items()}


def median(result: Mapping, key: str) -> float:
  return float(np.median([r[key] for r in result['rounds']]))


def ratio(a: Mapping, b: Mapping, key: str) -> dict[str, float]:
  """Of a to b: median, lowest and highest over the rounds."""
  ratios = [x[key] / y[key] for x, y in zip(a['rounds'], b['rounds'], strict=True)]
  return {'median': float(np.median(ratios)), 'low': min(ratios), 'high': max(ratios)}


def goals(results: Mapping[str, Mapping[str, Mapping]], starts: Mapping[str, float]) -> dict[str, dict]:
  """What the pipeline is held to; only what was measured."""
  found = {}
  first = next(iter(results))
  for length, of_length in results.items():
    for peer, least in (('decord', 13.0), ('jpeg_folder', 1.3)):
      if peer in of_length:
        found[f'clips/s of {peer}, {length} s'] = ratio(of_length['ours'], of_length[peer], 'clips_per_second') | {
          'at least': least
        }
    if 'ours_eight_sources' in of_length:
      eight = ratio(of_length['ours_eight_sources'], of_length['ours'], 'clips_per_second')
      found[f'clips/s of eight sources to one, {length} s'] = eight | {'at least': 0.95}
  for length in list(results)[1:]:
    flat = ratio(results[length]['ours'], results[length][_short(first)], 'cpu_ms')
    found[f'CPU a clip, {length} s to {first} s videos'] = flat | {'at most': 1.1}
  late = starts[str(_LATE)] - starts['0']
  found['seconds that step 1,000,000 takes longer to start than step 0'] = {'median': late, 'at most': 1.0}
  return found


def table(report: Mapping) -> str:
  """The report as Markdown."""
  lines = []
  for length, of_length in report['videos'].items():
    lines += [
      f'Videos of {length} s:', '',
      '| contestant | clips/s (lowest-highest) | ours / it | CPU ms a clip | it / ours | kB a clip | first s | MB |',
      '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]  # fmt: skip
    for name, result in of_length.items():
      rates = [r['clips_per_second'] for r in result['rounds']]
      faster = ratio(of_length['ours'], result, 'clips_per_second')['median']
      cheaper = ratio(result, of_length['ours'], 'cpu_ms')['median']
      lines.append(
        f'| {name} | {np.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f}) | {faster:.2f} | '
        f'{median(result, "cpu_ms"):.1f} | {cheaper:.2f} | {median(result, "bytes") / 1e3:.0f} | '
        f'{result["first_batch"]:.1f} | {result["memory_mb"]:.0f} |'
      )
    sizes = ', '.join(f'{form} {size / 1e6:.2f}' for form, size in report['bytes'][length].items())
    lines += ['', f'MB a video: {sizes}.', '']
  lines += [f'Absent: {name} ({why}).' for name, why in report['absent'].items()]
  lines += ['', '| goal | measured (lowest-highest) | wanted | met |', '| --- | --- | --- | --- |']
  for name, goal in report['goals'].items():
    spread = f' ({goal["low"]:.2f}-{goal["high"]:.2f})' if 'low' in goal else ''
    bound = 'at least' if 'at least' in goal else 'at most'
    met = goal['median'] >= goal[bound] if bound == 'at least' else goal['median'] <= goal[bound]
    lines.append(f'| {name} | {goal["median"]:.2f}{spread} | {bound} {goal[bound]} | {"yes" if met else "NO"} |')
  if report['demand']:
    lines += ['', '| an accelerator that takes | is fed by |', '| --- | --- |']
    for clips_per_second, cores in report['demand'].items():
      lines.append(f'| {clips_per_second} clips/s | {cores:.1f} cores like these |')
  return '\n'.join([*lines, '', f'{report["machine"]}; {report["command"]}'])


def draw(report: Mapping, path: Path) -> None:
  """Clips a second and CPU a clip, as bars with the spread over the rounds."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(12, 0.6 + 0.5 * sum(map(len, report['videos'].values()))))
  for axis, key, title in zip(axes, ('clips_per_second', 'cpu_ms'), ('clips a second', 'CPU ms a clip'), strict=True):
    rows = [
      (f'{n}, {s} s', [r[key] for r in v['rounds']], n) for s, of in report['videos'].items() for n, v in of.items()
    ]
    for y, (_, values, name) in enumerate(reversed(rows)):
      middle = np.median(values)
      spread = [[middle - min(values)], [max(values) - middle]]
      axis.barh(y, middle, xerr=spread, color='tab:blue' if name.startswith('ours') else 'tab:gray')
      axis.text(max(values), y, f' {middle:.0f}' if middle >= 20 else f' {middle:.1f}', va='center')
    axis.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)] if axis is axes[0] else [])
    axis.set_title(title)
    axis.margins(x=0.15)
  figure.tight_layout()
  figure.savefig(path, dpi=100)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.input', __doc__)
  to.add_argument('--output', required=True, help='folder for the videos and the results')
  to.add_argument('--video', help='a video to take the content from; drawn if absent')
  to.add_argument('--quick', action='store_true', help='few videos, short turns, two rounds, two peers')
  to.add_argument('--seconds', type=flags.words, help='lengths of the videos; 10,60')
  to.add_argument('--count', type=int, default=0, help='videos of each length; 12, or 4 if quick')
  to.add_argument('--rounds', type=int, default=0, help='turns of each contestant; 7, or 2 if quick')
  to.add_argument('--turn', type=float, default=0, help='seconds of a turn; 4, or 1 if quick')
  to.add_argument('--peers', type=flags.words, help='peers to compare with; all')
  to.add_argument('--peer_python', default=sys.executable, help='interpreter that runs the peers')
  to.add_argument(
    '--demand',
    type=flags.words,
    default=[],
    help='clips a second that an accelerator takes: prints the cores that feed it',
  )
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  quick = _OPTIONS.quick
  known = [p.__name__ for p in contestants.PEERS]
  peers = [p for p in _OPTIONS.peers or [] if p] if _OPTIONS.peers is not None else known[:2] if quick else known
  if unknown := set(peers) - set(known):
    raise UserError(f'--peers has {", ".join(sorted(unknown))}; expected some of {", ".join(known)}.')
  output = Path(_OPTIONS.output)
  rounds, turn = _OPTIONS.rounds or (2 if quick else 7), _OPTIONS.turn or (1.0 if quick else 4.0)
  videos, sizes, absent, folders = {}, {}, {}, {}
  for seconds in _OPTIONS.seconds or ('10', '60'):
    folder = folders[seconds] = (output / f'videos_{seconds}s').resolve()
    sizes[seconds] = input_media.prepare(folder, int(seconds), _OPTIONS.count or (4 if quick else 12), _OPTIONS.video)
    entries = {n: (n, folder) for n in [c.__name__ for c in contestants.OURS] + [p for p in peers if p not in absent]}
    if videos:
      entries[_short(next(iter(videos)))] = ('ours', next(iter(folders.values())))
    print(f'Videos of {seconds} s: {", ".join(entries)}', flush=True)
    videos[seconds], more = measure(entries, rounds, turn)
    absent |= more
  starts = restart(next(iter(folders.values())), 1 if quick else 3)
  cpu = median(next(iter(videos.values()))['ours'], 'cpu_ms')
  model = next(
    (s.split(':')[1].strip() for s in _lines('', 'cpuinfo') if s.startswith('model name')), platform.machine()
  )
  report = {
    'videos': videos,
    'bytes': sizes,
    'absent': absent,
    'restart': starts,
    'goals': goals(videos, starts),
    'demand': {demand: float(demand) * cpu / 1e3 for demand in _OPTIONS.demand},
    'machine': f'{len(os.sched_getaffinity(0))} cores of {model}',
    'command': f'{rounds} rounds of {turn:g} s',
  }
  (output / 'input.json').write_text(json.dumps(report, indent=1), encoding='utf-8')
  (output / 'input.md').write_text(table(report) + '\n', encoding='utf-8')
  draw(report, output / 'input.png')
  print(table(report))


if __name__ == '__main__':
  sys.exit(flags.run(main))
