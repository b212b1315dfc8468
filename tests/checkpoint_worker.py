"""One process of several that save, find a damaged checkpoint and go on: what `test_checkpoint_damage.py` starts.

python -m tests.checkpoint_worker WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from cover_jax import checkpoints
from cover_jax.runtime import processes, sharding
from tests.test_checkpoints import SOURCES


def main(workdir: str, coordinator: str, count: str, index: str) -> None:
  processes.start(coordinator, int(count), int(index), heartbeat_seconds=60)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': jax.device_count(), 'tensor': 1})
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))

  def tree(step, measures=('n',)):
    noise = np.random.default_rng(step).normal(size=(8, 512)).astype(np.float32)
    state = {'step': np.int32(step), 'params': {'w': noise}}
    where = {'step': sharding.replicated(mesh), 'params': {'w': rows}}
    interval = {name: np.float32(step) for name in measures}
    return (
      {'state': state, 'interval': interval},
      {'state': where, 'interval': jax.tree.map(lambda _: sharding.replicated(mesh), interval)},
    )

  def save(saver, step):
    text = checkpoints.about({'a': 1}, SOURCES, step)
    path = saver.save({'about': text, **sharding.put(*tree(step))})
    saver.wait()
    return path

  saver = checkpoints.Saver(workdir, 3)
  paths = [save(saver, step) for step in (1, 2, 3)]
  if jax.process_index() == 0:
    # The data of one process: only one of the two that share the check finds it.
    files = [p for p in pathlib.Path(paths[-1], 'arrays').rglob('*') if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  multihost_utils.sync_global_devices('damaged')
  template, placed = tree(0, ('n', 'top5'))
  restored = checkpoints.restore(workdir, template, placed, SOURCES)
  assert restored['path'] == paths[1] and int(restored['state']['step']) == 2
  assert jax.tree.map(float, restored['interval']) == {'n': 0.0, 'top5': 0.0}
  for shard in restored['state']['params']['w'].addressable_shards:
    np.testing.assert_array_equal(shard.data, tree(2)[0]['state']['params']['w'][shard.index])
  saver = checkpoints.Saver(workdir, 3)
  assert save(saver, 3) == paths[2] and os.path.exists(paths[2] + '.refused')
  assert int(checkpoints.load(workdir)['state']['step']) == 3
  print(f'process {jax.process_index()} went on from {restored["path"]}', flush=True)
  processes.leave(0)


if __name__ == '__main__':
  main(*sys.argv[1:])
