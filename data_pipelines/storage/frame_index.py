"""Where each encoded frame lies in TFDS's TFRecord files, so that a clip reads its own frames and no others.

The index is built once, by one process, and cached beside the data. Each record is read whole and checked then
(`reading`), so that labels and ids are those that were written; of each frame the index keeps a checksum, with which
every clip compares what it reads.

An Example is `{1: {1: {1: key, 2: feature} ...}}`; a feature is one of `{1: bytes list}`, `{2: float list}` or
`{3: int64 list}`, and the frames of a video are the values of one bytes list, one behind the other.
"""

import contextlib
import hashlib
import io
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from PIL import Image

from data_pipelines import paths
from data_pipelines.contract import UserError
from data_pipelines.storage import array_cache, reading
from data_pipelines.storage.layout import FrameIndex, Malformed, Storage

_VERSION = 2  # of what is cached: raise it when the arrays below change
_NO_EXAMPLE = 'the record is no tf.train.Example'
_LONGEST_TEXT = 1024  # bytes features beyond this are payloads, not annotations, and get no column


def load_or_build(
  files: Sequence[str],
  frames_key: str,
  cache_dir: str | None = None,
  *,
  pictures: bool = True,
  list_key: str | None = None,
) -> FrameIndex:
  """The index of TFDS's files, from the cache where that is up to date.

  Args:
    files: TFRecord files (plain or gzipped) or ArrayRecord files of tf.train.Example, in the order of their records;
      those in a bucket are read as `data_pipelines.paths` does.
    frames_key: the feature that holds the encoded frames: a video's list or one image.
    cache_dir: where the index is kept; the directory of the files if None. If it cannot be written, the user's
      cache directory ($XDG_CACHE_HOME or ~/.cache) is used; if that cannot either, nothing is kept.
    pictures: what the feature holds are pictures, whose size is noted; else height and width are 0.
    list_key: a feature of any number of integers, such as labels; None for none.

  Raises:
    UserError: a file is missing, truncated or of no such kind, or lacks a feature.
  """
  files = tuple(os.fspath(f) for f in files)
  # Without a list, caches of versions that knew none stay good.
  keys = [frames_key] if list_key is None else [frames_key, list_key]
  key = _key(files, keys)
  storage = reading.storage_of(files)
  names = [os.path.basename(f) for f in files]
  digest = hashlib.sha256(json.dumps([*keys, names]).encode()).hexdigest()[:12]
  beside = cache_dir or os.path.dirname(paths.absolute(files[0]))
  home = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'cover_jax')
  # The user's cache serves many datasets, whose files may have equal names.
  caches = [
    os.path.join(beside, f'frame_index-{digest}.npz'),
    os.path.join(home, hashlib.sha256(beside.encode()).hexdigest()[:12], f'frame_index-{digest}.npz'),
  ]
  if (arrays := _cached(caches, key)) is None:
    with array_cache.locked(caches):
      if (arrays := _cached(caches, key)) is None:  # no other process has made it in the meantime
        logging.info('Indexing the frames of %d files in %s, once', len(files), beside)
        arrays = _build(files, keys, storage, _image_size if pictures else lambda *_: (0, 0))
        _keep(caches, key, arrays)
  fields = {k: v for k, v in arrays.items() if '/' not in k}
  columns = {k.removeprefix('column/'): v for k, v in arrays.items() if k.startswith('column/')}
  lists = {} if list_key is None else {list_key: (arrays['list/pointer'], arrays['list/values'])}
  return FrameIndex(files, columns=columns, storage=storage, lists=lists, **fields)


def _key(files: Sequence[str], keys: Sequence[str]) -> str:
  """What tells whether an index is of these files: their names, sizes, times of change, and one file's last bytes.

  TFRecord files end with a checksum: so a dataset is told from another one of the same names and sizes.
  """
  with ThreadPoolExecutor(paths.SIDE_BY_SIDE if paths.is_remote(files[0]) else 1) as pool:
    stats = list(pool.map(_size_and_time, files))
  first = next((i for i, (size, _) in enumerate(stats) if size), None)  # TFDS writes empty shards
  end = b'' if first is None else _end(files[first], stats[first][0])
  names = [os.path.basename(f) for f in files]
  return json.dumps([_VERSION, *keys, end.hex(), [(n, *s) for n, s in zip(names, stats, strict=True)]])


def _size_and_time(file: str) -> tuple[int, int]:
  """Copies into object storage get a new time of change: there it is 0."""
  with _refusing(file):
    if paths.is_remote(file):
      return paths.size(file), 0
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def _end(file: str, size: int) -> bytes:
  with _refusing(file):
    if paths.is_remote(file):
      return paths.read_span(file, max(size - 8, 0), 8)
    with open(file, 'rb') as f:
      f.seek(max(size - 8, 0))
      return f.read(8)


@contextlib.contextmanager
def _refusing(file: str) -> Iterator[None]:
  try:
    yield
  except OSError as e:
    reason = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).splitlines()[0]
    raise UserError(f'Cannot read {file}: {reason}; build the dataset again or correct data_dir.') from None


def _cached(caches: Sequence[str], key: str) -> dict[str, np.ndarray] | None:
  for cache in caches:
    found = array_cache.load(cache)
    if found and _without_times(found[0], cache) == _without_times(key, cache):
      return found[1]
  return None


def _without_times(key: str, path: str) -> str:
  """The key as it is compared: an index that was copied into object storage with its data stays good."""
  if not paths.is_remote(path):
    return key
  *others, files = json.loads(key)
  return json.dumps([*others, [file[:2] for file in files]])


def _keep(caches: Sequence[str], key: str, arrays: dict[str, np.ndarray]) -> None:
  for cache in caches:
    try:
      return array_cache.save(cache, key, arrays)
    except OSError as e:
      logging.warning('The frame index cannot be kept in %s: %s', os.path.dirname(cache), e)
  return None


class _Part:
  """The index of one file, as it grows."""

  def __init__(self):
    self.start, self.height, self.width = array('q'), array('i'), array('i')
    self.count, self.length, self.checksum = array('q'), array('I'), array('I')
    self.columns: dict[str, list] = {}
    self.list_count, self.list_values = array('q'), array('q')


def _build(
  files: tuple[str, ...], keys: Sequence[str], storage: Storage, size_of: Callable[..., tuple[int, int]]
) -> dict[str, np.ndarray]:
  with ThreadPoolExecutor(reading.READERS) as pool:
    parts = []
    for part in pool.map(lambda file: _walk(file, keys, storage, size_of), files):
      parts.append(part)
      logging.log_every_n_seconds(logging.INFO, 'Indexed %d of %d files', 30, len(parts), len(files))
  joined = lambda field, dtype: np.concatenate([np.array(getattr(part, field), dtype) for part in parts])
  num_records = sum(len(part.start) for part in parts)
  columns = {name: [v for part in parts for v in part.columns.get(name, [])] for part in parts for name in part.columns}
  kinds = {int: np.int64, float: np.float32, bytes: np.bytes_}
  lists = {}
  if len(keys) > 1:
    pointer = np.cumsum(np.concatenate([[0], joined('list_count', np.int64)]), dtype=np.int64)
    lists = {'list/pointer': pointer, 'list/values': joined('list_values', np.int64)}
  return (
    lists
    | {
      'shard': np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.start) for part in parts]),
      'start': joined('start', np.int64),
      'pointer': np.cumsum(np.concatenate([[0], joined('count', np.int64)]), dtype=np.int64),
      'length': joined('length', np.uint32),
      'checksum': joined('checksum', np.uint32),
      'height': joined('height', np.int32),
      'width': joined('width', np.int32),
    }
    | {
      f'column/{name}': np.array(values, kinds[type(values[0])])
      for name, values in columns.items()
      if len(values) == num_records and len({type(v) for v in values}) == 1
    }
  )


def _walk(file: str, keys: Sequence[str], storage: Storage, size_of: Callable[..., tuple[int, int]]) -> _Part:
  part = _Part()
  base = 0
  try:
    for record in storage.records(file):
      if isinstance(record, Malformed):
        raise record
      data, base = record
      _add(part, data, base, keys, size_of)
      base = 0  # what is wrong between records has its own place
  except (Malformed, IndexError, OverflowError) as e:  # the latter two from lengths that are none
    byte, what = e.args if isinstance(e, Malformed) else (0, _NO_EXAMPLE)
    raise UserError(
      f'{file}, record {len(part.start)}, byte {base + byte}: {what}; expected a TFRecord or ArrayRecord file of '
      f'tf.train.Example as TFDS writes them: fetch the file or build the dataset again (`python -m '
      f'data_pipelines.inspect DATASET --verify` lists all that is damaged).'
    ) from None
  except Exception as e:  # a disk raises OSError, ArrayRecord RuntimeError, TensorFlow's file systems their own
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise UserError(f'{file} cannot be read ({reason}): fetch it or build the dataset again.') from e
  return part


def _add(part: _Part, data: bytes, base: int, keys: Sequence[str], size_of: Callable[..., tuple[int, int]]) -> None:
  frames_key, *list_keys = keys
  start, lengths, checksums, listed = None, array('I'), array('I'), None
  for name, kind, a, b in _features(data, 0, len(data)):
    if name == frames_key and kind == 1:
      start, (lengths, checksums) = a, _frames(data, a, b)
    elif name in list_keys and kind == 3:
      listed = _integers(data, a, b)
    elif (value := _scalar(data, kind, a, b)) is not None:
      part.columns.setdefault(name, []).append(value)
  if start is None:
    raise Malformed(0, f'a record without the feature {frames_key!r}')
  if list_keys and listed is None:
    raise Malformed(0, f'a record without the feature {list_keys[0]!r}')
  if listed is not None:
    part.list_count.append(len(listed))
    part.list_values.extend(listed)
  height, width = size_of(data, start, lengths) if lengths else (0, 0)
  part.start.append(base + start)
  part.count.append(len(lengths))
  part.length.extend(lengths)
  part.checksum.extend(checksums)
  part.height.append(height)
  part.width.append(width)


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """(value, byte behind it)."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 0x7F) << shift
    at += 1
    if byte < 0x80:
      return value, at
    shift += 7


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
  """Yields (field number, first byte, end) of each field's value in a proto message."""
  while at < end:
    tag, value = _varint(data, at)
    wire = tag & 7
    if wire == 2:
      size, value = _varint(data, value)
      stop = value + size
    elif wire == 0:
      stop = _varint(data, value)[1]
    elif wire in (1, 5):
      stop = value + (8 if wire == 1 else 4)
    else:
      stop = end + 1
    if stop > end:
      raise Malformed(at, _NO_EXAMPLE)
    yield tag >> 3, value, stop
    at = stop


def _features(data: bytes, at: int, end: int) -> Iterator[tuple[str, int, int, int]]:
  """Yields (name, kind, first byte, end) of each feature's list; kind 1: bytes, 2: float, 3: int64."""
  for _, a, b in _fields(data, at, end):
    for _, entry, entry_end in _fields(data, a, b):
      parts = {number: (x, y) for number, x, y in _fields(data, entry, entry_end)}
      if 1 in parts and 2 in parts:
        for kind, x, y in _fields(data, *parts[2]):
          yield data[slice(*parts[1])].decode(errors='replace'), kind, x, y


def _frames(data: bytes, at: int, end: int) -> tuple[array, array]:
  """(length, checksum) of each frame in a list."""
  # The hot loop: it runs once for every frame of a dataset.
  lengths, checksums, view = array('I'), array('I'), memoryview(data)
  while at < end:
    if data[at] != 0x0A:
      raise Malformed(at, 'the list of frames is no list of bytes')
    size, at = _varint(data, at + 1)
    lengths.append(size)
    checksums.append(zlib.crc32(view[at : at + size]))
    at += size
  if at != end:
    raise Malformed(end, 'a frame is longer than its record')
  return lengths, checksums


def _scalar(data: bytes, kind: int, at: int, end: int) -> int | float | bytes | None:
  """The value of a feature that has exactly one; None for lists, empty features and long payloads."""
  field = next(_fields(data, at, end), None)
  if field is None or field[2] != end:
    return None
  _, a, b = field
  if kind == 1:
    return data[a:b] if b - a <= _LONGEST_TEXT else None
  if kind == 2:
    return float(np.frombuffer(data[a:b], '<f4')[0]) if b - a == 4 else None
  value, stop = _varint(data, a)
  return _signed(value) if stop == b else None


def _integers(data: bytes, at: int, end: int) -> array:
  """The values of a list of integers, packed or not."""
  found = array('q')
  for _, a, b in _fields(data, at, end):
    while a < b:
      value, a = _varint(data, a)
      found.append(_signed(value))
  return found


def _signed(value: int) -> int:
  return value - (1 << 64) if value >= 1 << 63 else value


def _image_size(data: bytes, at: int, lengths: array) -> tuple[int, int]:
  first = _varint(data, at + 1)[1]
  try:
    with Image.open(io.BytesIO(data[first : first + lengths[0]])) as image:  # reads the header only
      return image.height, image.width
  except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, ... on damaged headers
    raise Malformed(first, f'the first frame of a record is no image ({e})') from None
