"""One wiring of a run and its sources: the batches that it trains on, the test sets that it is judged by.

Jobs, benchmarks and tests use it, on data sets and on arrays in memory alike.
"""

from collections.abc import Callable, Mapping, Sequence

from jax.sharding import Mesh

from cover_jax.experiment.build import Experiment
from cover_jax.runtime import sharding
from data_pipelines import contract
from data_pipelines.contract import BatchIterator, TestSet, UserError
from data_pipelines.loading import arrays, loader, views
from data_pipelines.sources import Source, select


def training_batches(
  experiment: Experiment, sources: Sequence[Source], mesh: Mesh, seed: int | None = None
) -> Callable[[int], BatchIterator]:
  """step -> this process's training batches from that step on, up to the run's last one.

  Args:
    experiment: the run.
    sources: the training splits of the run's sources, in their order.
    mesh: the devices.
    seed: of the order of the data and of the clips; None: the config's.

  Raises:
    UserError: if a stream cannot be fed as the config says.
  """
  streams = training_streams(experiment)
  for name, stream in streams.items():  # the loader asks, too, but only when something has been written
    for i in stream.sources:
      views.check(sources[i], stream, f'stream {name!r}')
  part, parts = sharding.data_part(mesh)
  seed = experiment.config.seed if seed is None else seed
  read = arrays.array_batches if all(source.in_memory for source in sources) else loader.train_batches

  def batches(start_step: int) -> BatchIterator:
    steps = experiment.total_steps - start_step
    how = {'start_step': start_step, 'num_steps': steps, 'process_index': part, 'process_count': parts}
    return read(sources, streams, seed, **how)

  return batches


def training_streams(experiment: Experiment) -> dict[str, views.Stream]:
  """What the input must know of each stream."""
  named = lambda members: {experiment.sources[i].name: experiment.weights[experiment.sources[i].name] for i in members}
  return {
    name: views.Stream(
      sources=stream.sources,
      num_frames=stream.num_frames,
      size=stream.size,
      batch_size=stream.batch_size,
      weights=named(stream.sources),
      one_source_a_step=experiment.config.mixture.one_source_a_step,
      views=experiment.objectives[name].views,
      targets=experiment.objectives[name].targets,
      label_width=experiment.label_width(name),
      rand_augment=stream.rand_augment,
    )
    for name, stream in experiment.streams.items()
  }


def test_sets(experiment: Experiment, sources: Sequence[Source], mesh: Mesh) -> Mapping[str, TestSet]:
  """{source: its test set} of test splits.

  Raises:
    UserError: if a batch cannot be divided over the devices.
  """
  batch_size = experiment.config.eval_batch_size
  if batch_size % sharding.batch_divisor(mesh):
    raise UserError(
      f'config.eval_batch_size = {batch_size} cannot be divided over {sharding.batch_divisor(mesh)} devices '
      '(mesh axes data x fsdp): use a multiple.'
    )
  return {source.name: test_set(experiment, source, mesh) for source in sources}


def test_set(experiment: Experiment, source: Source, mesh: Mesh | None = None) -> TestSet:
  """All examples of a source, whichever split it is, with its test views; without a mesh, all in this process."""
  source_id, plan = experiment.source_id(source.name), experiment.stream_of(source.name)
  part, parts = sharding.data_part(mesh) if mesh else (0, 1)
  multiple = sharding.batch_divisor(mesh) if mesh else 1
  examples = views.examples_per_step(source, experiment.config.eval_batch_size, multiple)
  stream = views.Stream(
    plan.sources, plan.num_frames, plan.size, examples, label_width=contract.label_width([source.info])
  )
  read = arrays.array_eval_batches if source.in_memory else loader.eval_batches
  how = {'process_index': part, 'process_count': parts}
  return views.make_test_set(
    source,
    stream,
    lambda: read(source, source_id, stream, examples, **how),
    lambda chosen: read(select(source, chosen), source_id, stream, examples),
  )
