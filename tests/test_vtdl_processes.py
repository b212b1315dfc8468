"""VTDL and the protocols in two processes are what they are in one."""

import json

import jax
import numpy as np
import pytest

from cover_jax.training import loop as training
from tests import test_processes as processes
from tests import tiny

# Without normalisation by gradients' sizes, which would make much of a rounding, a difference stays as small as it is.
VTDL = {
  'total_steps': 6,
  'checkpoint_every': 3,
  'optimizer__name': 'sgd',
  'optimizer__options': {'decay': 0.9},
  'streams__video__objective': {'name': 'vtdl', 'stride': 1, 'queue_size': 20, 'dim': 8, 'momentum': 0.9},
}


@pytest.mark.slow
def test_vtdl_in_two_processes_equals_one(tmp_path):
  """Losses, averaged encoder and queue; the queue's order as well, which says whose keys were pushed when."""
  two, one = tmp_path / 'two', tmp_path / 'one'
  processes.run(two, **VTDL)
  one.mkdir()
  experiment, mesh, batches, _ = tiny.build(tiny.config(**(processes.CHANGES | VTDL)), jax.devices()[:2])
  training.train(experiment, batches, str(one), mesh)
  losses = [list(processes.losses(folder).values()) for folder in (one, two)]
  assert len(losses[0]) == 6
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  expected, found = processes.state_of(one), processes.state_of(two)
  own = [name for name in expected if 'objectives/video/' in name]
  queue = {name.split('/')[-1]: name for name in own if '/queue/' in name}
  assert len(queue) == 5 and any('/teacher/encoder/' in name for name in own)
  for name in own:
    np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
  assert expected[queue['filled']] == 20
  assert len(set(zip(expected[queue['source_K']].tolist(), expected[queue['video_K']].tolist(), strict=True))) > 10


def judge(workdir, count):
  """`--mode=frozen` in `count` processes that have two devices in all; the bytes of its report and its features."""
  env = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={2 // count}'}
  flags = ['--config=configs/frozen_digits.py:debug', '--mode=frozen', f'--workdir={workdir}']
  if count > 1:
    flags += [f'--coordinator=127.0.0.1:{processes.free_port()}', f'--num_processes={count}']
  of = lambda i: flags + [f'--process_id={i}'] * (count > 1)
  ended = processes.finish([processes.spawn('cover_jax.main', of(i), env) for i in range(count)])
  assert [code for code, _ in ended] == [0] * count, '\n'.join(output for _, output in ended)
  features = {}
  for path in (workdir / 'features').glob('*.npz'):
    with np.load(path) as stored:
      features[path.name] = dict(stored)
  return json.loads((workdir / 'frozen' / 'report.json').read_text()), features, [output for _, output in ended]


@pytest.mark.slow
def test_frozen_in_two_processes_gives_the_same_report(embedded_data, tmp_path):
  report, features, outputs = judge(tmp_path / 'two', 2)
  expected, wanted, _ = judge(tmp_path / 'one', 1)
  assert features.keys() == wanted.keys() and len(features) == 2
  for name, fields in wanted.items():
    for key, value in fields.items():
      np.testing.assert_allclose(features[name][key], value, atol=1e-5, err_msg=f'{name} {key}')
  assert report == expected
  assert report['sources']['motions']['queries'] == 320
  assert 'R@1' in outputs[0] and 'R@1' not in outputs[1]  # the first one reports
  again, _, _ = judge(tmp_path / 'two', 2)  # from the features that are kept
  assert again == report
