"""Data in a bucket (`benchmarks/bucket_server.py`): built on a disk, copied with its index, read a clip a request."""

import re

import numpy as np
import pytest

from data_pipelines import paths, sources
from data_pipelines.contract import UserError
from data_pipelines.loading import loader
from data_pipelines.loading.views import Stream
from data_pipelines.sources import open_tfds
from data_pipelines.storage import frame_index
from tests import tiny_datasets
from tests.test_reading import CLIPS, by_id, opened, same_batches


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """Data sets on a disk, with the index of one of them."""
  data_dir = tmp_path_factory.mktemp('built')
  tiny_datasets.build(data_dir)
  opened(data_dir)
  return data_dir


@pytest.fixture
def copied(built, bucket, monkeypatch):
  """The same in a bucket; the index may not be built again."""
  paths.upload(str(built), f'{bucket}/tfds')
  monkeypatch.setattr(frame_index, '_build', None)
  return f'{bucket}/tfds'


def spans(server):
  """The parts of data files that were asked for, and how many requests for more than a part there were."""
  asked = [(path, part) for method, path, part in server.requests if method == 'GET' and '.tfrecord' in path]
  return [part for _, part in asked if part], len([path for path, part in asked if not part and 'alt=media' in path])


def test_a_clip_is_one_request_and_the_index_is_the_copied_one(copied, built, bucket_server):
  bucket_server.forget()
  source = opened(copied)
  parts, whole = spans(bucket_server)
  assert len(parts) == 2 and not whole  # what kind of file it is, and the end of the first one
  example = int(np.argmax(source.num_frames))
  bucket_server.forget()
  frames = sources.read(source, example, np.array([5, 2, 3]))
  offset, length = source.frames.frames(source.rows[example])
  assert [r[2] for r in bucket_server.requests] == [f'bytes={offset[2]}-{offset[5] + length[5] - 1}']
  assert frames == sources.read(opened(built), example, np.array([5, 2, 3]))


def test_batches_from_a_bucket_are_those_of_the_disk(copied, built, bucket_server):
  streams = {'v': Stream((0,), 3, 16, 8)}
  remote = opened(copied)
  bucket_server.forget()
  stored = list(loader.train_batches([remote], streams, 3, num_steps=4))
  parts, whole = spans(bucket_server)
  assert len(parts) == 4 * 8 == len(bucket_server.requests) and not whole
  assert same_batches(stored, loader.train_batches([opened(built)], streams, 3, num_steps=4))


def test_several_clips_are_asked_for_at_a_time(copied, bucket_server):
  streams = {'v': Stream((0,), 3, 16, 16)}
  remote = opened(copied)
  bucket_server.forget()
  bucket_server.delay = 0.5
  list(loader.train_batches([remote], streams, 3, num_steps=1))
  assert len(bucket_server.requests) == 16 and bucket_server.most > 8


def test_an_index_that_was_not_copied_is_built_once_and_kept_there(copied, bucket_server, monkeypatch):
  monkeypatch.undo()  # of the index that may not be built; the bucket stays, as the session knows it
  monkeypatch.setenv('EPATH_USE_TF', 'false')
  name = next(n for n in bucket_server.names() if n.endswith('.npz') and 'clips' in n)
  paths.remove(f'gs://tests/{name}')
  source = opened(copied)
  assert name in bucket_server.names() and source.num_examples == 20
  monkeypatch.setattr(frame_index, '_build', None)
  assert by_id(opened(copied), 3) == by_id(source, 3)


def test_changed_and_missing_objects_are_named(copied, bucket_server):
  source = opened(copied)
  file = source.frames.files[source.frames.shard[source.rows[0]]]
  name = file.removeprefix('gs://tests/')
  bucket_server.put(name, bucket_server.data(name)[:40])
  with pytest.raises(UserError, match=f'^{re.escape(file)} has been damaged or changed'):
    by_id(source, 0)
  paths.remove(file)
  with pytest.raises(UserError, match=r'has been damaged or changed: .* it cannot be read \(there is none\)'):
    by_id(source, 0)
  with pytest.raises(UserError, match=f'Cannot read {re.escape(file)}: there is none'):
    opened(copied)


def test_a_data_set_that_is_not_there_is_one_sentence(bucket):
  with pytest.raises(UserError, match=r"Dataset 'tiny_test_clips' .* is not prepared in gs://tests/folder/none"):
    open_tfds.open_source('clips', CLIPS | {'data_dir': f'{bucket}/none'}, 'train')
  with pytest.raises(UserError, match='is built on a disk only'):
    open_tfds.open_source('digits', CLIPS | {'dataset': 'digits', 'data_dir': f'{bucket}/none'}, 'train')
