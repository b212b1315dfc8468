"""The input benchmark runs from end to end, tiny; its figures are of no use here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import input as benchmark
from benchmarks import input_media

ROOT = Path(__file__).parent.parent


def rounds(*rates):
  return {'rounds': [{'clips_per_second': r, 'cpu_ms': 1e3 / r, 'bytes': 10.0} for r in rates]}


def test_ratios_are_taken_within_rounds():
  # A machine that slows down by half does not change what is faster.
  ours, peer = rounds(100, 50, 20), rounds(50, 25, 10)
  assert benchmark.ratio(ours, peer, 'clips_per_second') == {'median': 2, 'low': 2, 'high': 2}


def test_goals_say_when_they_are_missed():
  videos = {
    '10': {'ours': rounds(100), 'decord': rounds(10)},
    '60': {'ours': rounds(50), 'ours_on_10_s': rounds(100)},
  }
  goals = benchmark.goals(videos, {'0': 1.0, '1000000': 3.0})
  assert goals['clips/s of decord, 10 s']['median'] == 10
  assert goals['CPU a clip, 60 s to 10 s videos']['median'] == 2
  report = {'videos': {}, 'bytes': {}, 'absent': {'decord': 'why'}, 'goals': goals, 'demand': {}, 'machine': 'm'}
  text = benchmark.table(report | {'command': 'c'})
  assert text.count('| NO |') == 3 and 'Absent: decord (why).' in text


def test_the_drawn_scene_weighs_what_a_video_does():
  frames = [frame for frame, _ in zip(input_media.scene(), range(30), strict=False)]
  assert frames[0].shape == (256, 340, 3) and frames[0].dtype == np.uint8
  assert 10_000 < len(input_media._jpeg(frames[0])) < 22_000
  assert np.abs(frames[0].astype(int) - frames[20]).mean() > 2


@pytest.mark.slow
def test_it_runs(tmp_path):
  """pytest tests/test_benchmark_input.py -m slow"""
  flags = ['--seconds=1,2', '--count=2', '--rounds=1', '--turn=0.2', '--peers=pyav', '--quick', '--demand=100']
  command = [sys.executable, '-m', 'benchmarks.input', f'--output={tmp_path}', *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  report = json.loads((tmp_path / 'input.json').read_text())
  found = report['videos']['1'].keys() | report['absent'].keys()
  assert found == {'ours', 'ours_eight_sources', 'ours_compact', 'pyav'}
  assert all(r['rounds'][0]['cpu_ms'] > 0 and r['memory_mb'] > 0 for r in report['videos']['1'].values())
  assert 'is fed by' in (tmp_path / 'input.md').read_text() and (tmp_path / 'input.png').stat().st_size > 1000
