"""What a run is, from its config and its sources: lengths, epochs, shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from cover_jax.experiment import build as experiment
from cover_jax.experiment import wire
from cover_jax.objectives import LossOutput, Objective
from cover_jax.planning import costs
from cover_jax.training import step as stepping
from data_pipelines.contract import UserError
from data_pipelines.loading import mixture
from tests import tiny


def build(**changes):
  return experiment.build(tiny.config(**changes), [source.info for source in tiny.sources()])


def test_an_epoch_holds_the_sources_that_are_drawn():
  sizes = {'acts': 40, 'moves': 24, 'things': 64}
  assert {s.name: s.num_examples for s in tiny.sources()} == sizes
  whole = build(total_steps=0, total_epochs=10.0)
  assert (whole.steps_per_epoch, whole.total_steps) == (128 / 16, 80)
  weights = {'acts': 1.0, 'moves': 0.0, 'things': 1.0}
  without = build(total_steps=0, total_epochs=10.0, mixture__weights=weights)
  assert (without.steps_per_epoch, without.total_steps) == (104 / 16, 65)
  # Streams of 24 and 8 examples a step, whatever the weights.
  uneven = build(
    total_steps=0, total_epochs=10.0, mixture__weights={**weights, 'things': 7.0}, streams__video__batch_size=24,
    streams__image__batch_size=8,
  )  # fmt: skip
  assert uneven.steps_per_epoch == 104 / 32


def test_the_order_of_examples_has_epochs_of_the_same_length():
  sizes, weights = (40, 24, 64), (1.0, 0.0, 5.0)
  assert mixture.Mixture(sizes, weights, 0).epoch_size == mixture.epoch_examples(sizes, weights) == 104


def test_the_schedule_counts_the_same_epochs():
  weights = {'acts': 1.0, 'moves': 0.0, 'things': 1.0}
  run = build(total_steps=0, total_epochs=10.0, mixture__weights=weights, optimizer__warmup_epochs=2.0)
  schedule = stepping.make_optimizer(run)[1]
  rates = [float(schedule(step)) for step in range(run.total_steps)]
  assert int(np.argmax(rates)) == 13  # 2 x 6.5


def test_views_have_the_lengths_that_the_objective_says():
  def views(video_frames, rng):
    return {'short': np.arange(2), 'long': np.arange(6) % video_frames}

  def loss(params, state, batch, rng):
    features = [
      experiment_run.encode(params['encoder'], batch['views'][name], rng=rng).feature_BxD for name in ('short', 'long')
    ]
    loss_B = sum(f.mean(axis=1) for f in features)
    return LossOutput(loss_B.mean(), state, {'loss': loss_B})

  config = tiny.config()
  experiment_run, mesh, _, _ = tiny.build(config, jax.devices()[:1])
  objectives = {**experiment_run.objectives, 'video': Objective(loss, views=views, targets=('frames', 'flip'))}
  run = dataclasses.replace(experiment_run, objectives=objectives)
  assert run.view_lengths('video') == {'short': 2, 'long': 6} and run.view_lengths('image') == {'clip': 1}
  batch = next(wire.training_batches(run, tiny.sources(), mesh)(0))
  shapes = lambda tree: jax.tree.map(lambda x: (tuple(x.shape), x.dtype), tree)
  assert shapes(stepping.abstract_batch(run)) == shapes(dict(batch))
  assert batch['video']['targets'].keys() == {'frames', 'flip'} and batch['image']['targets'] == {}
  optimizer, _ = stepping.make_optimizer(run)
  abstract, shaped = costs._abstract(run, mesh)
  _, report = jax.eval_shape(stepping.make_train_step(run, optimizer), abstract, shaped)
  assert set(report['losses']) == {'video', 'image'}


def test_views_of_every_length_of_video_are_alike():
  config = tiny.config()
  config.streams.video.objective = {'name': 'vtdl', 'stride': 2, 'queue_size': 16}
  run = experiment.build(config, [source.info for source in tiny.sources()])
  assert run.view_lengths('video') == dict.fromkeys(('anchor', 'positive', 'negative'), 4)
  for length in (2, 9, 500):
    assert {k: len(v) for k, v in run.objectives['video'].views(length, None).items()} == run.view_lengths('video')


def test_an_epoch_of_no_source_is_refused():
  with pytest.raises(UserError, match='all zero'):
    build(mixture__weights=dict.fromkeys(('acts', 'moves', 'things'), 0.0))
