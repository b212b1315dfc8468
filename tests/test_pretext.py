"""Objectives judged on held-out videos: the encoder as in evaluation, full queues, nothing learnt."""

import json

import jax
import numpy as np
import pytest

from configs import digits_cover, v3s_digits, vtdl_digits
from cover_jax.evaluation import pretext
from cover_jax.experiment import build as experiments
from cover_jax.jobs import pretext as job
from cover_jax.jobs import train as train_job
from cover_jax.objectives import contrastive
from cover_jax.runtime import keys, sharding
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny
from tests.test_v3s import config as v3s_config
from tests.test_vtdl import start

NET = {'name': 'resnet3d', 'depths': (1, 1), 'widths': (8, 8)}
VTDL = {'name': 'vtdl', 'stride': 1, 'min_gap': 1, 'queue_size': 32, 'momentum': 0.5}


def held_out(c, devices=None):
  """(the judged run of the video stream, its sources, the mesh, the first state)."""
  experiment, mesh, _, state, _ = start(c, devices)
  videos = [s for s in tiny.sources() if s.modality == 'video']
  judged = pretext.held_out(experiment, ['video'], videos, sharding.batch_divisor(mesh))
  return judged, videos, mesh, state


@pytest.mark.slow
def test_the_encoder_runs_as_in_evaluation():
  """As training does with statistics that are frozen, and not as with those of the batch."""
  losses = {}
  infos = [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]
  _, _, batches, state, _ = start(v3s_config(model=NET))
  batch = next(batches(0))['video']
  for name, frozen, judged in (('judged', False, True), ('frozen', True, False), ('training', False, False)):
    c = v3s_config(model={**NET, 'freeze_statistics': frozen})
    experiment = experiments.build(c, infos, judged=judged)
    losses[name] = float(experiment.objectives['video'].loss(state.params, {}, batch, jax.random.key(3)).loss)
  assert losses['judged'] == pytest.approx(losses['frozen'], rel=1e-6)
  assert abs(losses['judged'] - losses['training']) > 1e-4


@pytest.mark.parametrize(
  'changes',
  [{}, pytest.param({'mixture__temperature': float('inf')}, marks=pytest.mark.slow)],
)
def test_every_held_out_clip_counts_once(changes):
  """The mean over one pass is that over batches computed one by one, whatever divides and however sources are mixed."""
  judged, videos, mesh, state = held_out(
    v3s_config(model=NET, batch_size=56, batch_multiple=1, **changes), jax.devices()[:1]
  )
  size = judged.streams['video'].batch_size
  assert all(source.num_examples % size for source in videos)
  found = pretext.make_judge(judged, videos, mesh)(state.params, state.objectives)
  for index, source in enumerate(videos):
    seen, losses = [], []
    for number, batch in enumerate(pretext._pass(judged, 'video', index, source, mesh)()):
      rng = keys.of(jax.random.fold_in(jax.random.key(judged.config.seed), number), 'video')
      loss_B = np.asarray(judged.objectives['video'].loss(state.params, {}, batch, rng).measures['loss'])
      seen += batch['example_id'][batch['mask']].tolist()
      losses += loss_B[batch['mask']].tolist()
      assert set(batch['source'][batch['mask']]) == {index} and set(batch['label'][~batch['mask']]) <= {-1}
    assert sorted(seen) == list(range(source.num_examples))
    assert found[f'video/{source.name}/loss'] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_contrast_is_judged_with_a_queue_of_these_videos():
  """What the queue held does not matter, and the first pass fills it."""
  c = tiny.config()
  c.streams.video.objective = VTDL
  judged, videos, mesh, state = held_out(c)
  judge = pretext.make_judge(judged, videos, mesh)
  found = judge(state.params, state.objectives)
  assert judge(state.params, state.objectives) == found
  queue = state.objectives['video']['queue']
  ids = np.arange(32, dtype=np.int32)
  other = contrastive.push(queue, jax.random.normal(jax.random.key(0), queue.key_KxD.shape), ids % 2, ids + 500)
  assert judge(state.params, {'video': {**state.objectives['video'], 'queue': other}}) == found
  # A queue that starts empty: the loss of chance of the first examples would be near log(1 + 1).
  state = jax.device_get(state.objectives['video'])
  assert found['video/acts/loss'] > 1.2 and int(state['queue'].filled) == 0


@pytest.mark.slow
def test_devices_do_not_matter():
  one, eight = v3s_config(model=NET), v3s_config(model=NET)
  eight.mesh = dict(zip(sharding.AXES, (4, 2, 1), strict=True))
  found = []
  for c, count in ((one, 1), (eight, 8)):
    judged, videos, mesh, state = held_out(c, jax.devices()[:count])
    found.append(pretext.make_judge(judged, videos, mesh)(state.params, state.objectives))
  assert found[0].keys() == found[1].keys()
  for key, value in found[0].items():
    assert found[1][key] == pytest.approx(value, rel=2e-3, abs=2e-3), key


def test_a_config_without_such_streams_is_told_before_anything_is_looked_for(tmp_path):
  with pytest.raises(UserError, match=r'No stream of config\.streams has an objective other than'):
    job.judge_pretext(digits_cover.get_config('debug'), str(tmp_path))


def test_streams_that_can_be_judged():
  c = v3s_digits.get_config('debug')
  assert pretext.streams_of(c) == ['unlabelled']
  c.streams.unlabelled.objective = ({'name': 'classification', 'weight': 1.0}, c.streams.unlabelled.objective)
  assert pretext.streams_of(c) == ['unlabelled']
  c.streams.unlabelled.objective = {'name': 'classification'}
  assert pretext.streams_of(c) == []
  c = v3s_digits.get_config('debug')
  c.sources.motions_unlabelled.test = ''
  assert pretext.streams_of(c) == []


@pytest.mark.slow
@pytest.mark.parametrize('module', [v3s_digits, vtdl_digits])
def test_the_mode_judges_a_run(embedded_data, module, tmp_path):
  c = module.get_config('debug')
  train_job.train(c, str(tmp_path))
  before = {p.name: p.read_bytes() for p in (tmp_path / 'checkpoints').iterdir() if p.is_file()}
  job.judge_pretext(c, str(tmp_path))
  report = json.loads((tmp_path / 'pretext/report.json').read_text())
  assert report['step'] == c.total_steps and report['clips']['unlabelled'] == 320
  sides = report['measures']['unlabelled/motions_unlabelled/loss']
  assert all(np.isfinite(x) for x in sides.values()) and sides['trained'] != sides['untrained']
  assert before == {p.name: p.read_bytes() for p in (tmp_path / 'checkpoints').iterdir() if p.is_file()}
  c.sources.motions_unlabelled.test = ''
  with pytest.raises(UserError, match=r'--config\.sources\.<source>\.test=test'):
    job.judge_pretext(c, str(tmp_path))
