"""TFDS builders of datasets that lie in a local folder as video or image files.

A builder lists its clips (`_list`); this engine decodes and stores them. What cannot be stored, it counts and says so
in `failures.csv`; nothing is replaced. Finished shards outlive a build that is killed, and the next one goes on with
the others.
"""

import contextlib
import csv
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from data_pipelines import durable
from data_pipelines.builders import shards
from data_pipelines.builders.listing import Clip as Clip
from data_pipelines.builders.listing import Listing as Listing
from data_pipelines.builders.lists import SPLITS
from data_pipelines.contract import UserError
from data_pipelines.media.transcode import Interrupted, Settings

FAILURES = 'failures.csv'
_BREAKS = ('Cc', 'Zl', 'Zp')  # Unicode's control characters and separators of lines
_STORED = ('short_side', 'fps', 'jpeg_quality', 'storage')


@dataclasses.dataclass(eq=False, kw_only=True)
class MediaConfig(tfds.core.BuilderConfig):
  """How a dataset is stored.

  Attributes:
    short_side: pixels of the shorter side of frames, which are never enlarged; 0: as they are.
    fps: frames a second of videos, resampled by time; 0: as they are.
    jpeg_quality: 1 to 95.
    storage: of videos; 'jpeg': every frame a JPEG, read fast; 'mp4': one small video each, a seventh of the disk and
      several times the CPU a clip (`data_pipelines.media.compact`).
    labels: of an example: 'one', or 'several', from none to all of the classes.
  """

  short_side: int = 256
  fps: float = 0
  jpeg_quality: int = 85
  storage: str = 'jpeg'
  labels: str = 'one'


class MediaBuilder(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
  """Builds a dataset of the video or image files in `manual_dir`.

  Subclasses set VERSION, BUILDER_CONFIGS and the constants below, and say in `_list` which clips there are. They are
  stored in an order that looks random, so a subsplit such as train[:90%] is a fair sample.

  Attributes:
    workers: processes that decode; None: one a CPU core.
  """

  MODALITY = 'video'  # or 'image'
  DESCRIPTION = ''
  HOMEPAGE = ''
  LICENSE = ''
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'Put the files and their annotations into one folder and name it with --manual_dir.'

  workers: int | None = None

  def _list(self, manual_dir: Path) -> Listing:
    """The clips that the annotations in `manual_dir` list, found or not."""
    raise NotImplementedError

  def _class_names(self) -> tuple[str, ...] | None:
    """The official names where they are fixed; None: `_list` finds them when the dataset is built."""
    return None

  def _official_counts(self) -> Mapping[str, int]:
    """{split: clips of the official list}, where that is fixed."""
    return {}

  def _info(self) -> tfds.core.DatasetInfo:
    # Without names, those of the listing are set when it is built, and TFDS reads them back from then on.
    config = self.builder_config
    features = shards.features(self.MODALITY, self._class_names(), config.storage, config.labels)
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=(self.MODALITY, shards.LABEL_KEY[config.labels]),
      homepage=self.HOMEPAGE,
      license=self.LICENSE,
      metadata=tfds.core.MetadataDict(),
    )

  @property
  def _label(self) -> tfds.features.ClassLabel:
    feature = self.info.features[shards.LABEL_KEY[self.builder_config.labels]]
    return feature if self.builder_config.labels == 'one' else feature.feature

  @property
  def unfinished(self) -> Path:
    """Where finished shards wait for the others."""
    return Path(self._data_dir_root, self.name, self.builder_config_name or '', f'{self.version}.unfinished')

  def download_and_prepare(self, **kwargs) -> None:
    check_data_dir(os.fspath(self._data_dir_root))
    super().download_and_prepare(**kwargs)
    shutil.rmtree(self.unfinished, ignore_errors=True)  # its shards have second names in the data by now
    for split, expected in self.info.metadata.get('expected', {}).items():
      failed = self.info.metadata['failed'][split]
      rest = f'; {failed:,} are not, see {self.data_path / FAILURES}' if failed else ''
      print(f'{split}: {expected - failed:,} of {expected:,} examples are in the data{rest}')
    if expected_by_split := self.info.metadata.get('expected'):
      classes = self._label.num_classes
      missing = '' if expected_by_split.keys() & (SPLITS - {'train', 'training'}) else '; there is no split to test on'
      print(f'{classes:,} classes{missing}' if classes else f'No classes: the examples have no labels{missing}')
    for line in self.info.metadata.get('left_over', []):
      print(line)

  def _download_and_prepare(self, dl_manager, download_config=None) -> None:
    config = download_config or tfds.download.DownloadConfig()
    if self.info.file_format.value != 'tfrecord':
      raise UserError(
        f'The file format of {self.info.full_name} is {self.info.file_format.value}; expected tfrecord, whose frames '
        f'can be read one by one: leave --file_format out.'
      )
    settings = _settings(self.MODALITY, self.builder_config)
    if not config.manual_dir:
      raise UserError(f'{self.name} is built from files of your own: name their folder with --manual_dir.')
    listing = self._list(Path(config.manual_dir).expanduser().absolute())
    _check(self.name, listing, self.builder_config.labels)
    for split, count in self._official_counts().items():
      if split in listing.splits and (listed := len(listing.splits[split])) != count:
        print(f'{split}: your annotations list {listed:,} clips; the official ones list {count:,}.')
    if self._label.num_classes is None:
      self._label.names = list(listing.class_names)
    if (most := config.max_examples_per_split) is not None:
      listed = {s: [clip for _, clip in shards.ordered(clips)[:most]] for s, clips in listing.splits.items()}
      listing = listing._replace(splits=listed)
    with _locked(self.unfinished):
      _claim(self.unfinished, settings)
      self._remove_leftovers()
      paths = self._write(listing, settings, config)
      self._finish(listing, settings, paths)

  def _write(self, listing: Listing, settings: Settings, config) -> dict[str, list[str]]:
    """Writes the shards that are not there; returns {split: its shards}."""
    paths: dict[str, list[str]] = {}
    todo, count, total = [], 0, 0
    for split, clips in listing.splits.items():
      dealt = shards.assign(clips, settings.modality, config.num_shards)
      template = self._get_filename_template(split).replace(data_dir=self.unfinished)
      names = [template.sharded_filepath(shard_index=i, num_shards=len(dealt)) for i in range(len(dealt))]
      paths[split] = [os.fspath(n) for n in names]
      for path, part in zip(paths[split], dealt, strict=True):
        if not shards.write_spec(path, part, settings):
          todo.append(path)
          count += len(part)
      total += len(clips)
    if count < total:
      print(f'{total - count:,} of {total:,} clips are in {self.unfinished} from a build before; the others follow.')
    if config.beam_runner or config.beam_options:
      _run_with_beam(todo, config)
    else:
      _run_here(todo, count, self.workers or len(os.sched_getaffinity(0)))
    return paths

  def _finish(self, listing: Listing, settings: Settings, paths: Mapping[str, Sequence[str]]) -> None:
    """Moves the shards into TFDS's folder and writes down what they hold."""
    outcomes = {split: [shards.read_outcome(p) for p in ps] for split, ps in paths.items()}
    lost = {split: list(itertools.chain(*(o.lost for o in os_))) for split, os_ in outcomes.items()}
    failures = self.unfinished / FAILURES
    with open(failures, 'w', newline='', encoding='utf-8', errors='backslashreplace') as f:
      rows = csv.writer(f)
      rows.writerow(['split', 'id', 'path', 'line', 'reason'])
      rows.writerows([split, *row] for split in lost for row in sorted(lost[split]))
      # They are of no split: nobody can know whether they were meant as examples.
      rows.writerows(['', '', path, '', f'no file {_ending(path)} is read'] for path in listing.left_over)
      rows.writerows(['', '', path, '', 'no list names it'] for path in listing.unlisted)
    for split, clips in listing.splits.items():
      if len(lost[split]) == len(clips):
        raise UserError(
          f'None of the {len(clips):,} clips of split {split!r} could be stored, the first one because: '
          f'{lost[split][0].reason} ({failures} has all): correct the files or take the split out of the annotations.'
        )
    notes = Path(self.data_dir, shards.NOTES)
    notes.mkdir()
    for path in (self.unfinished / shards.NOTES).iterdir():
      _link(path, notes / path.name)
    for path in [*itertools.chain(*paths.values()), failures]:
      _link(path, Path(self.data_dir, Path(path).name))
    infos = [
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[o.num_examples for o in os_],
        num_bytes=sum(o.num_bytes for o in os_),
        filename_template=self._get_filename_template(split),
      )
      for split, os_ in outcomes.items()
    ]
    self.info.set_splits(tfds.core.splits.SplitDict(infos))
    self.info.metadata.update(
      expected={split: len(clips) for split, clips in listing.splits.items()},
      failed={split: len(rows) for split, rows in lost.items()},
      stored=dataclasses.asdict(settings),
      **({'left_over': lines} if (lines := _left_over(listing)) else {}),
    )

  def _remove_leftovers(self) -> None:
    # TFDS's folders of builds that were killed in their last second: links that would keep old data on the disk.
    for folder in self.unfinished.parent.glob(f'incomplete.*_{self.version}'):
      if folder != Path(self.data_dir):
        shutil.rmtree(folder, ignore_errors=True)


def check_data_dir(path: str) -> None:
  """Raises a UserError if that is no folder: shards are written and linked where they end."""
  if '://' in path:
    raise UserError(
      f'--data_dir={path} is not a folder: build on a disk that every worker sees, or mount the bucket; what was built '
      'can be copied to the bucket then, and training reads it there.'
    )


def _settings(modality: str, config: MediaConfig) -> Settings:
  name = f'of config {config.name!r}'
  if not (isinstance(config.short_side, int) and config.short_side >= 0):
    raise UserError(f'short_side {name} is {config.short_side!r}; expected pixels, or 0 to leave frames as they are.')
  if not 0 <= config.fps <= 1000:
    raise UserError(f'fps {name} is {config.fps!r}; expected frames a second, or 0 to leave them as they are.')
  if config.jpeg_quality not in range(1, 96):
    raise UserError(f'jpeg_quality {name} is {config.jpeg_quality!r}; expected 1 to 95.')
  if config.storage not in (('jpeg',) if modality == 'image' else ('jpeg', 'mp4')):
    raise UserError(f"storage {name} is {config.storage!r}; expected 'jpeg', or 'mp4' for videos.")
  return Settings(modality, **{key: getattr(config, key) for key in _STORED})


def _check(name: str, listing: Listing, labels: str) -> None:
  """Raises UserError where the engine could not keep its promises."""
  if not listing.splits:
    raise UserError(f'{name} has no split: its annotations list nothing.')
  for label in listing.class_names:
    if not label.strip() or label != label.strip() or any(unicodedata.category(c) in _BREAKS for c in label):
      raise UserError(
        f'{name} has a class named {label!r}; expected a name without line breaks, and without spaces at its ends.'
      )
  for split, clips in listing.splits.items():
    if not clips:
      raise UserError(f'Split {split!r} of {name} lists no clip: correct its annotations, or take them away.')
    if all(clip.path is None for clip in clips):
      raise UserError(
        f'None of the {len(clips):,} files of split {split!r} of {name} is there ({clips[0].line or clips[0].id} lists '
        f'the first): put them below --manual_dir, or take the annotations of that split away.'
      )
    lines: dict[str, str] = {}
    for clip in clips:
      if clip.id in lines:
        both = f' ({lines[clip.id]} and {clip.line})' if clip.line else ''
        raise UserError(f'Split {split!r} of {name} has two clips named {clip.id!r}{both}: remove one of them.')
      lines[clip.id] = clip.line
      of_clip = (clip.label,) if labels == 'one' else clip.label
      if not all(-1 <= label < len(listing.class_names) for label in of_clip):
        raise UserError(
          f'Clip {clip.id!r} of {name} ({clip.line}) has label {clip.label}; expected -1 to '
          f'{len(listing.class_names) - 1}.'
        )


def _left_over(listing: Listing) -> list[str]:
  """Lines on the files that are not read, on folders that have no other, on files that no list names, and notes."""
  lines = []
  if listing.unlisted:
    count, first = len(listing.unlisted), listing.unlisted[0]
    lines = [
      f'Not read, since no list names it: {count:,} file{"s" * (count > 1)}, such as {first}; {FAILURES} has all'
    ]
  lines += _of_other_endings(listing) if listing.left_over else []
  if listing.empty:
    more = f' and {len(listing.empty) - 5:,} more' if len(listing.empty) > 5 else ''
    lines.append(f'Not a class, since it is empty or a link to another: {", ".join(listing.empty[:5])}{more}')
  return [line.encode('utf-8', 'backslashreplace').decode() for line in [*lines, *listing.notes]]


def _of_other_endings(listing: Listing) -> list[str]:
  files = listing.left_over
  kinds = ', '.join(f'{count:,} {ending}' for ending, count in Counter(map(_ending, files)).most_common())
  lines = [f'Not read, by its ending: {kinds}, such as {files[0]}; {FAILURES} has all']
  used = {os.path.dirname(c.path) for clips in listing.splits.values() for c in clips if c.path}
  if unused := sorted({os.path.dirname(path) for path in files} - used):
    more = f' and {len(unused) - 5:,} more' if len(unused) > 5 else ''
    lines.append(f'Not a class, since no file in it is read: {", ".join(unused[:5])}{more}')
  return lines


def _ending(path: str) -> str:
  return os.path.splitext(path)[1].lower() or 'without an ending'


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Makes the folder and keeps other builds out of it; the kernel unlocks it even after kill -9."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT)
  except OSError as e:
    raise UserError(f'{folder} cannot be written ({e.strerror}): choose another --data_dir.') from None
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f'Another process is building in {folder}: wait for it or stop it.') from None
    yield
  finally:
    os.close(lock)


def _claim(folder: Path, settings: Settings) -> None:
  """Refuses to mix shards that are stored in different ways, or to throw away hours of work unasked."""
  note = folder / shards.NOTES / 'settings.json'
  note.parent.mkdir(exist_ok=True)
  now = dataclasses.asdict(settings)
  if note.exists():
    before = json.loads(note.read_text())
    differing = [f'{k}={before.get(k)} (now {now.get(k)})' for k in before | now if before.get(k) != now.get(k)]
    if differing:
      raise UserError(
        f'{folder} holds a part of this dataset, built with {", ".join(differing)}: build with these values to go on, '
        f'delete that folder to start anew, or give the other variant a name of its own (--name).'
      )
  for rest in folder.glob('**/*.tmp'):
    rest.unlink()
  durable.write(note, json.dumps(now))


def _link(source: str | os.PathLike, target: Path) -> None:
  # A second name, not a move: whenever the build is killed, no shard is lost.
  try:
    os.link(source, target)
  except OSError:  # a file system without links
    os.replace(source, target)


def _run_here(paths: Sequence[str], count: int, workers: int) -> None:
  """Writes shards in threads, each of which has a decoding process of its own."""
  stop = threading.Event()
  failed = itertools.count(1)
  with (
    tqdm(total=count, unit='clip', smoothing=0, disable=not count) as bar,
    futures.ThreadPoolExecutor(workers) as pool,
  ):

    def note(lost: shards.Lost | None) -> None:
      if stop.is_set():
        raise Interrupted
      bar.update()
      if lost is not None:
        logging.warning('Left out: %s %s: %s', lost.line, lost.path or lost.id, lost.reason)
        bar.set_postfix(failed=next(failed))

    running = [pool.submit(shards.write_shard, path, note) for path in paths]
    try:
      for done in futures.as_completed(running):
        done.result()
    except BaseException:
      stop.set()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _run_with_beam(paths: Sequence[str], config) -> None:
  """Writes shards wherever the Beam runner puts them; files and data_dir must be mounted there, too."""
  import apache_beam as beam

  with beam.Pipeline(options=config.beam_options, runner=config.beam_runner) as pipeline:
    _ = pipeline | beam.Create(list(paths)) | beam.Reshuffle() | beam.Map(_write_shard)


def _write_shard(path: str) -> int:
  return shards.write_shard(path).num_examples
