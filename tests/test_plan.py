"""Plans: what is counted is right, what does not fit is a result, and the whole tool runs on fake devices."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cover_jax import plan
from cover_jax.models.products import product_flops
from cover_jax.models.timesformer import TimeSformer
from cover_jax.planning import chips, collectives, hlo, report
from cover_jax.planning import costs as plan_costs
from cover_jax.planning.costs import Memory, OutOfMemory
from cover_jax.planning.schedule import Schedule
from cover_jax.runtime import sharding
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.sources import sizes
from tests import tiny

GiB = 2**30
SIZES = '--sizes=objects=800/10,motions=400/4,moments=400/4,digits=1000/10'  # which need not be built here


def planner(count=8, **changes):
  """A planner of the tiny run on fake CPU devices."""
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  return plan.Planner(tiny.config(**changes), infos, chips.Slice(f'cpu:{count}', chips.CPU, jax.devices()[:count]))


# Communication.


def test_data_parallel_step_reduces_its_gradients_and_nothing_large_else():
  run, mesh = planner().build()
  compiled = plan_costs.compile_step(run, mesh)
  params = plan_costs.memory(compiled, run, mesh, None).parameters
  by_kind = {c.kind: c for c in plan_costs.communication(compiled, mesh)}
  # The gradients of both streams, which the CPU's compiler reduces one by one before it adds them.
  assert 0.9 * params < by_kind['all-reduce'].result_bytes < 2.1 * params
  assert by_kind['all-reduce'].sent_bytes == pytest.approx(2 * 7 / 8 * by_kind['all-reduce'].result_bytes)
  assert sum(c.result_bytes for c in by_kind.values()) < 2.2 * params


# Memory.


def test_memory_by_kind():
  one, eight = planner(mesh__fsdp=1), planner(mesh__data=1, mesh__fsdp=8)
  found = {}
  for name, p in {'whole': one, 'split': eight}.items():
    run, mesh = p.build()
    compiled = plan_costs.compile_step(run, mesh)
    found[name] = plan_costs.memory(compiled, run, mesh, None)
    assert plan_costs.memory(compiled, run, mesh, found[name].total) == found[name]
    refused = plan_costs.memory(compiled, run, mesh, found[name].total - 1)
    assert isinstance(refused, OutOfMemory) and refused.needed == found[name].total
  whole, split = found['whole'], found['split']
  arrays = plan_costs._abstract(*one.build())[0]
  params = sum(4 * x.size for x in jax.tree.leaves(arrays.params))
  assert whole.parameters == whole.ema == params
  assert 2 * params <= whole.optimizer < 2 * params + 100  # Adam's two moments and counters
  assert whole.batch == 8 / 8 * (4 + 1) * 16 * 16 * 3 + 2 * (4 + 4 + 1 + 4 + 4)
  assert split.batch == whole.batch and split.parameters < 0.3 * whole.parameters
  assert whole.temporaries > 0 and whole.total > 4 * params


class _Refused:
  def __init__(self, text):
    self.text = text

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.text)


@pytest.mark.parametrize(
  ('text', 'needed', 'available'),
  [
    ('RESOURCE_EXHAUSTED: ... memory space hbm. Used 19.30G of 15.75G hbm. Exceeded by 3.55G.', 19.30, 15.75),
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.50T) exceeds '
     'available HBM (95.74G).', 2560, 95.74),
  ],
)  # fmt: skip
def test_out_of_memory_is_a_result(text, needed, available):
  found = plan_costs._compile(_Refused(text))
  assert (found.needed / GiB, found.available / GiB) == pytest.approx((needed, available))
  found = dataclasses.replace(found, kinds={'parameters': GiB})
  for remat, advised in (('dots', True), ('full', False), (None, False)):  # None: of an encoder that has no such field
    result = {'memory': found, 'chip': {'hbm_bytes': found.available}, 'remat': remat}
    assert f'needs {needed:.2f} of {available:.2f} GiB' in report.verdict(result)
    assert ('remat=full' in report.verdict(result)) == advised
  with pytest.raises(jax.errors.JaxRuntimeError):
    plan_costs._compile(_Refused('INTERNAL: something else'))


# The search.


class _Linear:
  """A planner whose memory is linear in the batch; counts compilations."""

  def __init__(self, fixed, slope, limit, **changes):
    self.fixed, self.slope, self.limit, self.compiled = fixed, slope, limit, 0
    self.real = planner(**changes)

  def build(self):
    return self.real.build()

  def memory(self, **changes):
    self.compiled += 1
    batch = sum(changes.values()) if changes else sum(s.batch_size for s in self.build()[0].streams.values())
    needed = self.fixed + self.slope * batch
    return OutOfMemory(needed, self.limit) if needed > self.limit else Memory(0, 0, 0, 0, 0, 0, needed, 0)


@settings(max_examples=25, deadline=None)
@given(fixed=st.floats(0, 90), slope=st.floats(0.01, 10))
def test_search_finds_the_largest_batch(fixed, slope):
  fake = _Linear(fixed, slope, 100.0)
  found = plan.largest_batch(fake, fake.memory(), 100.0)
  sizes_tried = [sum(t['batch_sizes'].values()) for t in found['tried']]
  assert sizes_tried == sorted(sizes_tried) and fake.compiled <= 7
  if fixed + slope * 16 > 100:
    assert found['batch_sizes'] is None
    return
  total = sum(found['batch_sizes'].values())
  assert all(b % 8 == 0 and b > 0 for b in found['batch_sizes'].values())
  assert fixed + slope * total <= 100
  # Not exact to the example, but no more than a few units below the limit.
  assert fixed + slope * (total + 24 + total / 16) > 100


def test_no_limit_no_search():
  assert plan.largest_batch(planner(), Memory(0, 0, 0, 0, 0, 0, 1, 0), None) is None


# Costs.


@pytest.mark.parametrize(
  ('fields', 'frames', 'gmac'),
  [
    # TimeSformer-B, HR and L as published: 196, 1703 and 2380; and CoVeR's 17.62 T in 3 views.
    ({}, 8, 195.8),
    ({}, 16, None),
    ({'image_size': 448}, 16, 1702.7),
    ({'num_frames': 96}, 96, 2379.9),
    ({'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096, 'image_size': 448}, 16, 5872.7),
  ],
)
def test_products_of_the_published_models(fields, frames, gmac):
  model = TimeSformer(**fields)
  size = (model.image_size, model.image_size)
  counted = model.products(frames, size)
  if gmac is not None:
    assert counted / 1e9 == pytest.approx(gmac, rel=1e-3)
  clip = jax.ShapeDtypeStruct((1, frames, *size, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), clip)
  # The model may do somewhat more than the paper's products, never less.
  assert 0.999 * counted < product_flops(model.apply, params, clip) / 2 < 1.15 * counted


@pytest.mark.parametrize('fields', [{'attention': 'joint'}, {'attention': 'space'}, {'image_temporal': 'skip'}, {}])
@pytest.mark.parametrize('frames', [1, 4])
def test_products_of_the_variants(fields, frames):
  model = TimeSformer(depth=2, **fields)
  clip = jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), clip)
  counted = model.products(frames, (224, 224))
  assert 0.999 * counted < product_flops(model.apply, params, clip) / 2 < 1.15 * counted


@pytest.mark.slow
def test_a_loop_costs_what_its_blocks_cost():
  """A loop over 6 blocks against the program without one. The loop also moves its stacks."""
  loop, unrolled = (
    plan_costs.step_costs(plan_costs.compile_step(run, mesh), run, mesh)
    for run, mesh in (
      planner(1, mesh__data=1, model__depth=6, model__drop_path=0.0, model__scan_unroll=n).build() for n in (1, 6)
    )
  )
  assert loop.product_flops == unrolled.product_flops and loop.model_flops == unrolled.model_flops
  assert unrolled.schedule.hbm_bytes < loop.schedule.hbm_bytes < 2 * unrolled.schedule.hbm_bytes
  assert loop.schedule.cycles is None  # the CPU's compiler estimates none


def test_recomputation_costs_products():
  plain, full = (
    plan_costs.step_products(planner(1, mesh__data=1, model__depth=6, model__remat=r).build()[0])
    for r in ('none', 'full')
  )
  assert 1.2 < full / plain < 1.4  # a third more, less what the backward pass does not need again


def test_accumulation_does_not_change_products():
  plain, micro = (planner(2, mesh__data=2, accumulation_steps=n).build() for n in (1, 2))
  refused = OutOfMemory(2 * GiB, GiB)
  plain, micro = (plan_costs.step_costs(refused, *built) for built in (plain, micro))
  assert plain.model_flops == micro.model_flops
  assert plain.product_flops == pytest.approx(micro.product_flops, rel=1e-3)


def test_a_frozen_encoder_counts_its_way_forward_alone():
  refused = OutOfMemory(2 * GiB, GiB)
  model = lambda *rules: (
    plan_costs.step_costs(refused, *planner(1, optimizer__learning_rate_rules=rules).build()).model_flops
  )
  learns = model(('.*', 1.0))
  third = {name: flops / 3 for name, flops in learns.items()}
  assert model(('^encoder/', 0.0), ('.*', 1.0)) == third
  assert model(('^encoder/patch_embedding', 0.0), ('.*', 1.0)) == learns  # a part of it is looked through


@pytest.mark.parametrize(('cycles', 'estimate'), [(None, 2.0 + 3.0 + 0.2), (4e9, 4.0 + 0.2), (1e9, 3.0 + 0.2)])
def test_time_from_the_schedule_and_the_data_sheet(cycles, estimate):
  run, mesh = planner().build()
  of_one = 8e12 / sum(s.batch_size for s in run.streams.values())
  costs = plan_costs.StepCosts(dict.fromkeys(run.streams, of_one), 2e12, Schedule(cycles, 3e11, 0))
  links = [collectives.Collective('all-reduce', 1, 1e9, 2e9)]
  chip = dataclasses.replace(chips.CPU, clock=1e9)
  time = plan_costs.step_time(costs, links, chip, run, mesh)
  assert (time['products'], time['memory'], time['links']) == pytest.approx((2.0, 3.0, 0.2))
  assert (time['at_least'], time['estimate']) == pytest.approx((3.0, estimate))
  assert time['mfu'] == pytest.approx(8e12 / (8 * 1e12 * estimate))
  assert time['days'] == pytest.approx(20 * estimate / 86400)


# Slices and sizes.


@pytest.mark.parametrize('name', ['v9:2x2', 'v5e', 'v5e:', 'cpu:0', 'cpu:x', 'gpu:8', ''])
def test_unknown_slices_are_refused(name):
  with pytest.raises(UserError, match='expected a generation'):
    chips.open_slice(name)


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'pip install -e "\.\[plan\]"'):
    chips.open_slice('v5e:2x2')


def test_sizes():
  config = {'dataset': 'kinetics/400:1.0.0', 'data_dir': '/nonexistent', 'train': 'train'}
  assert sizes.size_of('k', config, {})[:3] == ('video', 240_000, 400)
  known = sizes.parse('k=12/3', {'k': config})
  assert sizes.size_of('k', config, known)[1:] == (12, 3, '--sizes', 'one')
  assert sizes.info('k', known['k']) == SourceInfo('k', 'video', 12, ('class 0', 'class 1', 'class 2'))
  for unknown in (config | {'train': 'train[:10%]'}, config | {'dataset': 'no_such_data'}):
    with pytest.raises(UserError, match='--sizes=k=EXAMPLES/CLASSES'):
      sizes.size_of('k', unknown, {})
  for text in ('k=12', 'other=1/2', 'k=0/3', 'k=a/b'):
    with pytest.raises(UserError, match='expected SOURCE=EXAMPLES/CLASSES'):
      sizes.parse(text, {'k': config})


# All of it.


def test_levers_that_change_nothing_or_cannot_be_are_said(monkeypatch):
  seen, saved = [], []
  monkeypatch.setattr(plan_costs, 'compile_step', lambda run, mesh: 'of a lever')
  monkeypatch.setattr(
    plan,
    '_lever',
    lambda planner, run, mesh, compiled: (
      seen.append(compiled) or {'memory': Memory(0, 0, 0, 0, 0, 0, 1, 0), 'product_flops': 1.0}
    ),
  )
  p = planner(2, mesh__data=2, model__remat='full')
  rows = plan.levers(p, 'of the config', lambda rows: saved.append(len(rows)))
  assert seen == ['of the config'] + ['of a lever'] * (len(seen) - 1)  # which is not compiled again
  assert len(saved) == len(seen) and saved[-1] == len(rows)
  names = [row['lever'] for row in rows]
  assert names[0] == 'as configured' and 'remat full' not in names and 'fsdp 1' not in names
  refused = {row['lever']: row['refused'] for row in rows if 'refused' in row}
  assert 'fsdp 8' in refused and 'devices' in refused['fsdp 8']
  assert 'fsdp 8' in report._levers(rows)


def test_config_for_fewer_devices_says_what_to_change(monkeypatch):
  monkeypatch.setattr(plan_costs, 'compile_step', lambda run, mesh: OutOfMemory(2 * GiB, GiB))
  options = {'with_search': False, 'with_levers': False}
  result = plan.plan(planner(8, batch_multiple=4, batch_size=64), **options)
  assert 'set config.batch_multiple=8' in report.slice_report(result)
  assert not result['fits'] and '| the rest |' in report.slice_report(result)
  assert '| cpu:8 | 8 | 2.00 | no |' in report.comparison([result, result])


def test_a_schedule_that_cannot_be_read_is_told(monkeypatch):
  def unreadable(text):
    raise hlo.Unreadable('it is not known how often the loop while.1 runs')

  monkeypatch.setattr(plan_costs.schedules, 'read', unreadable)
  costs = plan_costs.step_costs(types.SimpleNamespace(as_text=lambda: ''), *planner(1).build())
  assert costs.schedule is None
  assert 'no time of a step: it is not known how often the loop while.1 runs.' in report._costs({'costs': costs})


@pytest.mark.slow
def test_a_program_whose_communication_cannot_be_read_keeps_the_rest(monkeypatch):
  def unreadable(compiled, mesh):
    raise hlo.Unreadable('all-gather in a loop')

  monkeypatch.setattr(plan_costs, 'compile_step', lambda run, mesh: 'compiled')
  monkeypatch.setattr(plan_costs, 'memory', lambda *_: Memory(0, 0, 0, 0, 0, 0, 1, 0))
  monkeypatch.setattr(plan_costs, 'step_costs', lambda *_: plan_costs.StepCosts({}, 1.0, Schedule(1.0, 1.0, 0)))
  monkeypatch.setattr(plan_costs, 'communication', unreadable)
  result = plan.plan(planner(8), with_search=False, with_levers=True)
  assert result['fits'] and 'time' not in result and len(result['levers']) > 3
  assert 'cannot be counted, so there is no time of a step: all-gather in a loop.' in report.slice_report(result)


@pytest.mark.slow
def test_what_is_known_is_saved_at_once(monkeypatch):
  """A plan takes long: where it is killed, all that came before is in the file."""
  monkeypatch.setattr(plan_costs, 'compile_step', lambda run, mesh: OutOfMemory(2 * GiB, GiB))
  seen = []
  save = lambda result: seen.append(set(result))
  result = plan.plan(planner(8), with_search=True, with_levers=True, save=save)
  first, second, third, *levers = seen
  assert {'memory', 'fits'} <= first and 'costs' not in first
  assert second - first == {'costs'} and third - second == {'largest_batch'}
  assert len(levers) > 3 and all(keys == set(result) for keys in levers)


def command(*args):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  return subprocess.run(
    [sys.executable, '-m', 'cover_jax.plan', *args], capture_output=True, text=True, env=environment, timeout=300
  )


def test_command_line(tmp_path):
  path = tmp_path / 'plan.json'
  flags = f'--output={path}', '--dollars_per_chip_hour=2'
  done = command('--config=configs/digits_cover.py:debug', '--topology=cpu:2', SIZES, *flags)
  assert done.returncode == 0, done.stderr
  expected = '## cpu:2 (data 2 x fsdp 1 x tensor 1)', '--sizes', 'temporaries', 'all-reduce', 'MFU'
  assert all(part in done.stdout for part in expected)
  saved = json.loads(path.read_text())
  assert saved['sources']['objects'][1:3] == [800, 10]
  (two,) = saved['slices']
  assert two['price']['chip_hours'] == pytest.approx(two['time']['days'] * 48)
  assert two['price']['dollars'] == pytest.approx(2 * two['price']['chip_hours'])
  assert 'core hours to build' in done.stdout and 'chip hours' in done.stdout
  assert two['fits'] and two['memory']['total'] > 0 and two['time']['days'] > 0
  assert set(two['costs']['model_flops']) == {'video', 'image'}


def test_mistakes_on_the_command_line_are_one_sentence():
  done = command('--config=configs/digits_cover.py:debug', SIZES, '--topology=v9:2x2')
  assert done.returncode == 2 and 'Error: --topology=v9:2x2' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_slice_that_cannot_be_does_not_stop_the_others(tmp_path):
  path = tmp_path / 'plan.json'
  args = '--config=configs/digits_cover.py:debug', SIZES, '--nosearch', f'--output={path}'
  done = command(*args, '--topology=cpu:1,cpu:2', '--config.mesh.fsdp=2')
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'Error: --topology=cpu:1: config.mesh asks for' in done.stderr
  assert '## cpu:2 (data 1 x fsdp 2 x tensor 1)' in done.stdout
  assert [s['topology'] for s in json.loads(path.read_text())['slices']] == ['cpu:2']


def test_local_is_for_a_gpu_that_is_there(monkeypatch):
  with pytest.raises(UserError, match='sees no GPU here, only a CPU'):
    chips.open_slice('local')

  def refuse():
    raise RuntimeError("Unknown backend: 'cuda' requested\nmore")

  monkeypatch.setattr(jax, 'devices', refuse)
  with pytest.raises(UserError, match=r"cannot start here: Unknown backend: 'cuda' requested\.$"):
    chips.open_slice('local')
  fake = lambda platform, kind: types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=dict)
  monkeypatch.setattr(jax, 'devices', lambda: [fake('gpu', 'NVIDIA H100 80GB HBM3')] * 2)
  found = chips.open_slice('local')
  assert found.chip.name == 'H100' and len(found.devices) == 2
  monkeypatch.setattr(jax, 'devices', lambda: [fake('tpu', 'TPU v5 lite')])
  with pytest.raises(UserError, match='name the TPU slice'):
    chips.open_slice('local')
  monkeypatch.setattr(jax, 'devices', lambda: [fake('gpu', 'Tesla T4')])
  with pytest.raises(UserError, match='limits of Tesla T4 are not known'):
    chips.open_slice('local')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu: pip install -e .[plan]')
def test_tpu_compiler(tmp_path):
  """The real compiler of a v5e slice, in a process of its own: a step that fits, and a batch that does not."""
  path = tmp_path / 'plan.json'
  args = '--config=configs/digits_cover.py:debug', '--topology=v5e:2x2', SIZES, '--nosearch'
  done = command(*args, f'--output={path}')
  assert done.returncode == 0, done.stderr
  (found,) = json.loads(path.read_text())['slices']
  assert found['fits'] and 0 < found['memory']['total'] < 0.1 * GiB
  assert {c['kind'] for c in found['collectives']} == {'all-reduce'}
  done = command(*args, '--config.batch_size=4000000', f'--output={path}')
  assert done.returncode == 0, done.stderr
  assert '**Does not fit**: needs ' in done.stdout and ' of 15.75 GiB' in done.stdout
  (found,) = json.loads(path.read_text())['slices']
  assert not found['fits'] and found['memory']['needed'] > found['memory']['available']


REAL_SLICES = """
import numpy as np
from jax.experimental import topologies
from cover_jax.planning import chips
from cover_jax.runtime import sharding
sizes = {'data': -1, 'fsdp': 8, 'tensor': 1}
chips.prepare([])
for name in ('v5p:4x4x4', 'v6e:8x8', 'v4:2x2x4'):  # the torus has no axis of 8, or none left of the other size
  print(list(sharding.make_mesh(sizes, chips.open_slice(name).devices).shape.values()))
devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4', num_slices=2).devices
print(np.vectorize(lambda d: d.slice_index)(sharding.make_mesh(sizes, devices).devices).reshape(2, 8).tolist())
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu: pip install -e .[plan]')
def test_meshes_of_real_slices():
  """On libtpu's own description of their devices: any size of an axis is possible, and only `data` spans slices."""
  done = subprocess.run([sys.executable, '-c', REAL_SLICES], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  found = [json.loads(line) for line in done.stdout.splitlines()]
  assert found == [[8, 8, 1], [8, 8, 1], [2, 8, 1], [[0] * 8, [1] * 8]]


def test_sharding_of_plans_is_that_of_runs():
  """The abstract arguments lie where a run puts them."""
  run, mesh = planner(8, mesh__data=2, mesh__fsdp=4).build()
  abstract_state, batch = plan_costs._abstract(run, mesh)
  kernel = abstract_state.params['encoder']['blocks']['mlp']['hidden']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  clip = batch['video']['views']['clip']
  assert clip.sharding.spec == sharding.BATCH
  assert np.prod(clip.sharding.shard_shape(clip.shape)) == 1 * 4 * 16 * 16 * 3
