"""What is in a prepared dataset, as text and as a picture: look at it before you train on it.

    python -m data_pipelines.inspect kinetics/400 --data_dir=DIR --out=sheet.png

prints each split with its examples found and expected and its classes, and draws a contact sheet: a row an example,
frames from its beginning to its end, with its id and class.

    python -m data_pipelines.inspect kinetics/400 --data_dir=DIR --verify

reads every byte instead, compares each record with its checksum, and lists those that are damaged.

It ends with 0; with 1 if --verify has found damage or an example could not be drawn; with 2 if the dataset cannot be
opened or an argument is wrong.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines import durable, flags, installed, sources
from data_pipelines.contract import UserError
from data_pipelines.media import still_images
from data_pipelines.sources import Source, label_sets, open_tfds
from data_pipelines.storage import reading
from data_pipelines.storage.layout import Malformed

_CAPTION = 18  # pixels
_WIDEST = 8  # times the height of a frame
_LONGEST_NAME = 100  # characters of one in a caption
_RARE = 5  # classes shown of the largest and the smallest
_DAMAGED = 20  # places shown of a split
_PROGRESS = 10  # seconds between two words on how far it is


def open_splits(dataset: str, data_dir: str | None = None, **keys: str) -> dict[str, Source]:
  """All splits of a prepared dataset; `keys` are 'frames_key' and 'label_key', where `open_source` needs them.

  Raises:
    UserError: it is not prepared, or its frames cannot be read one by one.
  """
  import tensorflow_datasets as tfds

  config = {'dataset': dataset, 'data_dir': data_dir, **keys}
  first = open_tfds.open_source(dataset, config | {'split': 'all'}, 'split')  # one clear error, if any
  splits = tfds.builder(dataset, data_dir=data_dir).info.splits
  found = {s: open_tfds.open_source(s, config | {'split': s}, 'split') for s in splits if splits[s].num_examples}
  assert sum(s.num_examples for s in found.values()) == first.num_examples
  return found


def describe(source: Source, all_classes: bool = False) -> list[str]:
  """Lines of text: how many examples of how many expected, their frames, their classes."""
  expected = '' if source.expected is None else f' of {source.expected:,} expected'
  lines = [f'{source.name}: {source.num_examples:,} examples{expected}']
  frames, width, height = (_span(n) for n in (source.num_frames, source.width, source.height))
  rate = '' if source.fps is None else f', {_span(source.fps)} frames a second'
  lines.append(f'  {frames} frames of {width} x {height} pixels{rate}')
  if source.video_names is not None:
    lines.append(f'  {len(np.unique(source.video_names)):,} original videos')
  unlabelled = int(np.sum(~source.labelled_N))
  if unlabelled:
    lines.append(f'  {unlabelled:,} without a label')
  if source.labels is not None:
    count = np.diff(source.labels.pointer)[source.labelled_N]
    mean = count.mean() if len(count) else 0
    lines.append(f'  {mean:.3g} labels an example; {np.sum(count == 0):,} have none of the classes')
  if source.class_names:
    lines += [f'  {line}' for line in _classes(source, all_classes)]
  return lines


def _span(values: np.ndarray) -> str:
  low, high = (f'{v:,.5g}' if isinstance(v, float) else f'{v:,}' for v in (values.min().item(), values.max().item()))
  return low if low == high else f'{low} to {high}'


def _classes(source: Source, every: bool) -> list[str]:
  classes = len(source.class_names)
  count = np.bincount(source.label[source.label >= 0], minlength=classes)
  if source.labels is not None:
    count = label_sets.counts(source.labels, classes)
  order = np.argsort(-count, kind='stable')
  lines = [
    f'{np.sum(count > 0)} of {len(count)} classes have examples, {_span(count)} each, median {np.median(count):g}'
  ]
  shown = order if every or len(order) <= 2 * _RARE else np.concatenate([order[:_RARE], order[-_RARE:]])
  return lines + [f'{count[i]:7,}  {source.class_names[i]}' for i in shown]


def verify(dataset: str, data_dir: str | None = None) -> dict[str, tuple[int, list[str]]]:
  """Compares every record of a prepared dataset with its checksum. How far it is goes to stderr.

  Returns:
    {split: (whole examples, what is damaged, each with its file and byte)}.

  Raises:
    UserError: the dataset is not prepared.
  """
  splits = open_tfds.prepared_builder('verify', dataset, data_dir).info.splits
  found, said = {}, time.monotonic()
  with ThreadPoolExecutor(reading.READERS) as pool:
    for split in splits:
      files = [os.fspath(p) for p in splits[split].filepaths]
      whole, damage = 0, []
      for done, (count, places) in enumerate(pool.map(_check, files, splits[split].shard_lengths), 1):
        whole, damage = whole + count, damage + places
        if time.monotonic() > said + _PROGRESS:
          said = time.monotonic()
          print(f'{split}: {done:,} of {len(files):,} files, {len(damage):,} places damaged', file=sys.stderr)
      found[split] = whole, damage
  return found


def _check(file: str, expected: int) -> tuple[int, list[str]]:
  """(whole records, what is damaged) of one file."""
  whole, damage, number = 0, [], 0
  try:
    for number, record in enumerate(reading.storage_of([file]).records(file), 1):
      if isinstance(record, Malformed):
        damage.append(f'{file}, record {number - 1}, byte {record.args[0]}: {record.args[1]}')
      else:
        whole += 1
    if number != expected:
      damage.append(f'{file}: {number} records; dataset_info.json says {expected}')
  except Malformed as e:
    damage.append(f'{file}, record {number}, byte {e.args[0]}: {e.args[1]}; nothing behind it can be read')
  except Exception as e:  # a disk raises OSError, ArrayRecord RuntimeError, TensorFlow's file systems their own
    damage.append(f'{file} cannot be read: {(str(e) or type(e).__name__).splitlines()[0]}')
  return whole, damage


def contact_sheet(splits: Sequence[Source], path: str, rows: int = 6, columns: int = 6, height: int = 120) -> list[str]:
  """Draws a random choice of examples of each split, one in each row.

  Args:
    splits: the sources.
    path: PNG to write.
    rows: examples of each split, at most.
    columns: frames of an example, from its first to its last; an image has one.
    height: of a frame in pixels; its shape is kept, unless it is wider than eight times that.

  Returns:
    What could not be drawn, a sentence for each example; its row has the caption alone.

  Raises:
    OSError, ValueError: the picture cannot be written there.
  """
  kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
  if kind is None:
    raise ValueError(f'{os.path.splitext(path)[1]!r} is no ending of a picture')
  strips, faults = [], []
  for source in splits:
    # By chance, but always the same: evenly spaced examples would all be of one class where classes alternate.
    chosen = np.random.default_rng(0).permutation(source.num_examples)[:rows]
    for example in map(int, np.sort(chosen)):
      frames = []
      try:
        frames = _frames(source, example, columns, height)
      except UserError as error:
        faults.append(str(error))
      strips.append(_strip(frames, _caption(source, example), height))
  sheet = Image.new('RGB', (max(s.width for s in strips), sum(s.height for s in strips)), 'white')
  top = 0
  for strip in strips:
    sheet.paste(strip, (0, top))
    top += strip.height
  rendered = io.BytesIO()
  sheet.save(rendered, kind)
  durable.write(path, rendered.getvalue())
  return faults


def _frames(source: Source, example: int, columns: int, height: int) -> list[Image.Image]:
  """Some frames of an example, small."""
  numbers = np.unique(np.linspace(0, source.num_frames[example] - 1, columns).round().astype(int))
  frames = []
  for number, encoded in zip(numbers, sources.read(source, example, numbers), strict=True):
    try:
      frame = Image.open(io.BytesIO(encoded)).convert('RGB')
    except (OSError, ValueError, Image.DecompressionBombError) as e:
      raise UserError(
        f'Frame {number} of example {example} of {source.name!r} cannot be decoded ({e}): build the dataset again.'
      ) from None
    width = min(max(1, round(frame.width * height / frame.height)), _WIDEST * height)
    frames.append(frame.resize((width, height)))
  return frames


def _strip(frames: Sequence[Image.Image], caption: str, height: int) -> Image.Image:
  font = still_images.font(12)
  # A caption of characters that the font lacks is still drawn, with boxes in their place.
  width = max(sum(f.width + 2 for f in frames), int(font.getlength(caption)) + 8)
  strip = Image.new('RGB', (width, height + _CAPTION + 4), 'white')
  ImageDraw.Draw(strip).text((4, 2), caption, font=font, fill='black')
  left = 0
  for frame in frames:
    strip.paste(frame, (left, _CAPTION))
    left += frame.width + 2
  return strip


def _caption(source: Source, example: int) -> str:
  name = str(example) if source.ids is None else source.ids[example].decode('utf-8', 'replace')
  told = [
    source.name,
    name,
    _labels(source, example),
    f'{source.width[example]} x {source.height[example]}',
  ]
  if source.modality == 'video':
    told.append(
      f'{source.num_frames[example]} frames' + ('' if source.fps is None else f' at {source.fps[example]:g}/s')
    )
  # In one line: file names have line breaks, and the names of other people's classes may be surrogates.
  shown = (name.encode('utf-8', 'replace').decode()[:_LONGEST_NAME] for name in told)
  return ''.join(c if c.isprintable() else ' ' for c in ' | '.join(shown))


def _labels(source: Source, example: int) -> str:
  if not source.labelled_N[example]:
    return 'no label'
  labels = source.label[[example]] if source.labels is None else label_sets.of(source.labels, example)
  return ', '.join(source.class_names[label] for label in labels) or 'none of the classes'


def _report(found: dict[str, tuple[int, list[str]]]) -> int:
  """Prints what `verify` found; the exit code."""
  for split, (whole, damage) in found.items():
    print(f'{split}: {whole:,} examples are whole, {len(damage):,} places are damaged')
    print(
      '\n'.join(f'  {place}' for place in damage[:_DAMAGED] + ['...'] * (len(damage) > _DAMAGED)),
      end='\n' * bool(damage),
    )
  if any(damage for _, damage in found.values()):
    print('Fetch these files again, or build the dataset again.')
    return 1
  return 0


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('data_pipelines.inspect', __doc__)
  to.add_argument('dataset', help='as TFDS names it: name/config:version')
  to.add_argument('--data_dir', type=flags.path, help='where it was prepared; TFDS has a default')
  to.add_argument('--frames_key', help='feature with the frames, where there are several')
  to.add_argument('--label_key', help='feature with the label, where there are several')
  to.add_argument('--out', type=flags.path, help='PNG of the contact sheet')
  to.add_argument('--rows', type=int, default=6, help='examples of each split on the sheet')
  to.add_argument('--columns', type=int, default=6, help='frames of an example on the sheet')
  to.add_argument('--verify', action='store_true', help='compare every record with its checksum, and no more')
  to.add_argument('--classes', action='store_true', help='all classes, not only the largest and smallest')
  return to


def main(argv: Sequence[str] | None = None) -> int:
  """The command line."""
  try:
    options = flags.parse(parser(), argv)
    if min(options.rows, options.columns) < 1:
      raise UserError(f'--rows={options.rows} --columns={options.columns}; expected at least 1 of each.')
    installed.need_train('Looking at a data set')
    if options.verify:
      return _report(verify(options.dataset, options.data_dir))
    keys = {k: v for k in ('frames_key', 'label_key') if (v := getattr(options, k)) is not None}
    splits = open_splits(options.dataset, options.data_dir, **keys)
    for source in splits.values():
      print('\n'.join(describe(source, options.classes)))
    if options.out:
      try:
        faults = contact_sheet(list(splits.values()), options.out, options.rows, options.columns)
      except (OSError, ValueError) as e:  # Pillow: no such directory, no such format
        raise UserError(f'--out={options.out} cannot be written ({e}); expected the path of a .png file.') from None
      print(f'Contact sheet: {options.out}')
      print('\n'.join(faults), end='\n' * bool(faults), file=sys.stderr)
      return 1 if faults else 0
  except UserError as error:
    print(f'Error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
