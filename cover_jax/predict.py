"""What a trained model says of video and image files.

    python -m cover_jax.predict CHECKPOINT FILE... [--heads=NAME,NAME] [--output=DIR] [--features] [--attention]
        [--annotate]

CHECKPOINT is a workdir, a file, or `demo`, the model that comes with the package; FILE is a video, an image, or `demo`,
the clip that comes with it.

Prints a table and writes DIR/predictions.json, and predictions.html, a page to look at; for videos of several windows
also a timeline. Exit codes: 0 all files
predicted and drawn; 1 some failed, broke off or could not be drawn (the last line says how many); 2 a mistake in the
command.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import cover_jax
from cover_jax import api
from cover_jax.evaluation import answers, predictions_page
from cover_jax.runtime import compiled
from data_pipelines import durable, flags, paths
from data_pipelines.contract import UserError
from data_pipelines.media import video_files, video_writing

EXIT_FAILED = 1
PAGE = 'predictions.html'
_WIDEST = 3840  # pixels of an annotated picture; encoders end at 4096 or a little more
_LONGEST_NAME = 200  # bytes, of the 255 that file systems have


@dataclasses.dataclass
class Report:
  """What is kept of one file, which is little however long it is.

  Attributes:
    path: of the file.
    seconds: time of the last window's end.
    windows: {head: [{'start', 'end', 'top': [[class, probability], ...]}, ...]}.
    total: {head: sum over windows of probabilities [K]}.
    features: (sources whose clips they are, start, end, feature [D]) of each window.
    surest: {view: (confidence, window, title)} of the window that its heads are surest of.
    trouble: the sentence that says why the file failed or broke off; '' if it did not.
  """

  path: str
  seconds: float = 0.0
  windows: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
  total: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  features: list[tuple[str, float, float, np.ndarray]] = dataclasses.field(default_factory=list)
  surest: dict[api.View, tuple[float, video_files.Window, str]] = dataclasses.field(default_factory=dict)
  trouble: str = ''


def watch(
  model: api.Model,
  path: str,
  *,
  top: int = 5,
  hop: int | None = None,
  length: int = video_files.SEGMENT_WINDOW,
  features: bool = False,
) -> Report:
  """Runs a model over a file; what goes wrong with the file is in the report.

  Args:
    model: of `cover_jax.load`.
    path: of a video or image.
    top: classes to keep of each window.
    hop, length: of the windows; see `data_pipelines.media.video_files.windows`.
    features: keep the class token of each window.
  """
  report = Report(path)
  try:
    for seen in model.watch(path, hop, length):
      start, end = seen.window.start, seen.window.end
      report.seconds = max(report.seconds, end)
      said = []
      for head, p_K in seen.probabilities.items():
        best = model.rank(head, p_K, top)
        report.windows.setdefault(head, []).append({'start': start, 'end': end, 'top': best})
        report.total[head] = report.total.get(head, 0.0) + p_K
        said.append(f'{head}: {best[0][0]} {best[0][1]:.0%}')
      confidence = max((float(p.max()) for p in seen.probabilities.values()), default=0.0)
      if seen.view not in report.surest or confidence > report.surest[seen.view][0]:
        title = f'{start:.1f} s to {end:.1f} s   ' + ',  '.join(said or seen.view.sources)
        report.surest[seen.view] = confidence, seen.window, title
      if features:
        report.features.append(('+'.join(seen.view.sources), start, end, seen.feature_D))
  except UserError as error:
    report.trouble = str(error)
  return report


def average(model: api.Model, report: Report, top: int) -> api.Predictions:
  """Each head's best classes over the whole file: the mean of the windows' probabilities."""
  return {head: model.rank(head, total_K / len(report.windows[head]), top) for head, total_K in report.total.items()}


def table(report: Report, predictions: api.Predictions) -> str:
  """The predictions for one file as text, one head a line."""
  lines = [report.path + (f'  ({report.seconds:.1f} s)' if report.seconds else '')]
  width = max((len(head) for head in predictions), default=0)
  for head, ranking in predictions.items():
    count = len(report.windows[head])
    best = '   '.join(f'{name} {probability:.1%}' for name, probability in ranking)
    lines.append(f'  {head:<{width}}  {count:>4} window{"s" if count > 1 else " "}  {best}')
  return '\n'.join(lines)


def write_features(reports: Sequence[Report], path: str) -> None:
  """Writes one row a window: 'feature' float32 [n, D], 'path', 'start' and 'end' (seconds), 'sources' (whose clips)."""
  rows = [(report.path, *row) for report in reports for row in report.features]
  files, sources, starts, ends, features = zip(*rows, strict=True) if rows else ((),) * 5
  rendered = io.BytesIO()
  np.savez(
    rendered,
    feature=np.array(features, np.float32),
    path=np.array(files, np.str_),
    sources=np.array(sources, np.str_),
    start=np.array(starts, np.float64),
    end=np.array(ends, np.float64),
  )
  durable.write(path, rendered.getvalue())


def write_attention(model: api.Model, report: Report, path: str) -> None:
  """Draws attention rollout over the window of each view that the heads are surest of."""
  from cover_jax.evaluation import visualise

  rows = [
    (title, window.clip, model.attention(window.clip, view.sources[0]))
    for view, (_, window, title) in report.surest.items()
  ]
  visualise.attention_maps(rows, path)


def write_timeline(report: Report, path: str) -> None:
  """Draws every head's best class over time."""
  from cover_jax.evaluation import visualise

  rows = {head: [(w['start'], *w['top'][0]) for w in windows] for head, windows in report.windows.items()}
  visualise.timeline(rows, report.seconds, os.path.basename(report.path), path)


def write_annotated(report: Report, path: str, top: int) -> str:
  """Writes the file again with the classes of the window at hand on every frame; an image becomes a PNG.

  Returns:
    The path with its ending.
  """
  with paths.local(report.path) as file, paths.filling(path) as to:
    written = _write_annotated(report, file, to, top)
  return os.path.join(os.path.dirname(path), os.path.basename(written))


def _write_annotated(report: Report, file: str, path: str, top: int) -> str:
  from PIL import Image

  pictures = _annotated(report, file, top)
  first, second = next(pictures), next(pictures, None)
  if second is None:
    Image.fromarray(first).save(f'{path}.png')
    return f'{path}.png'
  fps = video_files.header(file).fps or 25.0
  return video_writing.write_video(path, itertools.chain([first, second], pictures), fps)


def _annotated(report: Report, file: str, top: int) -> Iterator[np.ndarray]:
  from PIL import Image

  from cover_jax.evaluation import visualise

  at = dict.fromkeys(report.windows, 0)
  size = None
  frames = video_files.frames(file)
  while True:
    try:
      frame = next(frames, None)
    except video_files.BrokenOff:
      frame = None
    if frame is None:
      return
    lines = []
    for head, windows in report.windows.items():
      while at[head] + 1 < len(windows) and windows[at[head] + 1]['start'] <= frame.seconds:
        at[head] += 1
      lines.append(head)
      lines += [f'  {probability:.0%} {name}' for name, probability in windows[at[head]]['top'][:top]]
    picture = Image.fromarray(frame.pixels())
    if size is None:  # of the first frame; text needs some room, and nobody needs more than 720 lines
      scale = min(np.clip(picture.height, 240, 720) / picture.height, _WIDEST / picture.width)
      size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    canvas = Image.new('RGB', (max(size[0], 240), max(size[1], 240)))  # a strip has its text beside it
    canvas.paste(picture.resize(size))
    yield visualise.annotate(np.asarray(canvas), lines)


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('cover_jax.predict', __doc__)
  to.add_argument('checkpoint', type=flags.path, help='workdir of a run, checkpoint or export')
  to.add_argument(
    'files',
    nargs='+',
    type=flags.path,
    metavar='file',
    help='any video or image; demo: a clip that comes with the package',
  )
  to.add_argument('--params', choices=('raw', 'ema'), default='raw', help='ema: the moving average')
  to.add_argument('--heads', type=flags.words, default=[], help='the heads to ask, with commas between (default: all)')
  what = 'folder for what is written (default: predictions)'
  to.add_argument('--output', default='predictions', type=flags.path, help=what)
  to.add_argument('--top', type=int, default=5, help='classes to show of each head (default: 5)')
  to.add_argument('--stride', type=int, help='frames between windows (default: a window, or a second for images)')
  to.add_argument(
    '--window',
    type=int,
    default=video_files.SEGMENT_WINDOW,
    help='frames that heads which sample segments see as one video (default: %(default)s)',
  )
  to.add_argument('--features', action='store_true', help='write features.npz, a row a window')
  to.add_argument('--attention', action='store_true', help='draw attention rollout over the frames')
  compiled.add_flag(to)
  to.add_argument('--annotate', action='store_true', help='write the video with its classes on it')
  return to


def run(options: argparse.Namespace) -> int:
  """Predicts all files; returns the number that failed."""
  for name in ('top', 'stride', 'window'):
    value = getattr(options, name)
    if value is not None and value < 1:
      raise UserError(f'--{name}={value}: expected a whole number, at least 1.')
  try:
    paths.make_folder(options.output)
  except OSError as error:
    raise UserError(f'--output={options.output} cannot be made ({error.strerror}): choose another folder.') from error
  if not paths.is_remote(options.output) and not os.access(options.output, os.W_OK):
    raise UserError(f'--output={options.output} cannot be written: choose another folder.')
  compiled.keep(options.compilation_cache)
  model = api.load(options.checkpoint, options.params, options.heads)
  if not model.heads and not (options.features or options.attention):
    raise UserError(f'{model.path} has no heads, so it predicts no classes: ask for --features or --attention.')
  if options.attention:
    model.check_attention()

  reports, entries, shown, taken = [], [], [], set()
  try:
    for path in map(_file, options.files):
      report = watch(model, path, top=options.top, hop=options.stride, length=options.window, features=options.features)
      reports.append(report)
      if report.trouble:
        _complain(report.trouble)
      entry: dict[str, Any] = {'file': path, 'trouble': report.trouble}
      entries.append(entry)
      shown.append(predictions_page.Shown(path, trouble=report.trouble))
      if not report.surest:  # nothing could be decoded
        continue
      predictions = average(model, report, options.top)
      print(_text(table(report, predictions)), flush=True)
      entry |= {'seconds': report.seconds, 'top': predictions, 'windows': report.windows, 'written': []}
      base = os.path.join(options.output, _free_name(os.path.basename(path), taken))
      entry['written'] += _draw(model, report, base, options)
      entry['trouble'] = report.trouble
      shown[-1] = _shown(report, predictions, entry['written'])
      report.surest.clear()
  finally:  # what was predicted is kept, whatever happens to a picture
    about = {'checkpoint': model.path, 'step': model.step, 'params': options.params, 'files': entries}
    durable.write(os.path.join(options.output, 'predictions.json'), json.dumps(about) + '\n')
    said = f'{model.path}, step {model.step}, {options.params} parameters.'
    page = os.path.join(options.output, PAGE)
    durable.write(page, predictions_page.of_files(said, shown))
    if options.features:
      write_features(reports, os.path.join(options.output, 'features.npz'))
  failed = sum(bool(report.trouble) for report in reports)
  files = 'file' if len(reports) == 1 else 'files'
  print(f'\n{len(reports)} {files}, {failed} failed. Written to {_text(options.output)}; look at {_text(page)}')
  return failed


def _file(path: str) -> str:
  """A file of the command's; 'demo', where nothing has that name, is the clip that comes with the package."""
  return cover_jax.DEMO_CLIP if path == 'demo' and not os.path.exists(path) else path


def _draw(model: api.Model, report: Report, base: str, options: argparse.Namespace) -> list[str]:
  """Draws the pictures of one file, each even where another fails, which is `report.trouble`; returns their paths."""
  wanted = {}
  if any(len(windows) > 1 for windows in report.windows.values()):
    wanted['timeline'] = lambda path: write_timeline(report, f'{path}.png') or f'{path}.png'
  if options.attention:
    wanted['attention'] = lambda path: write_attention(model, report, f'{path}.png') or f'{path}.png'
  if options.annotate:
    wanted['annotated'] = lambda path: write_annotated(report, path, options.top)
  written = []
  for name, draw in wanted.items():
    try:
      written.append(draw(f'{base}.{name}'))
    except Exception as error:  # matplotlib, Pillow and PyAV raise their own
      reason = (str(error) or type(error).__name__).splitlines()[0]
      trouble = f'{report.path} was predicted; its {name} picture could not be made ({reason}).'
      report.trouble = report.trouble or trouble
      _complain(trouble)
  return written


def _shown(report: Report, predictions: api.Predictions, written: Sequence[str]) -> predictions_page.Shown:
  """What the page shows of a file; pictures that were drawn for it are read again."""
  drawn = {path.split('.')[-2]: pathlib.Path(path).read_bytes() for path in written if path.endswith('.png')}
  return predictions_page.Shown(
    report.path,
    report.seconds,
    predictions,
    {head: len(windows) for head, windows in report.windows.items()},
    [(title, answers.moving(window.clip)) for _, window, title in report.surest.values()],
    drawn.get('timeline', b''),
    drawn.get('attention', b''),
    report.trouble,
  )


def _complain(trouble: str) -> None:
  print(_text(trouble), file=sys.stderr, flush=True)


def _text(name: str) -> str:
  # A file name may be any bytes; what is printed may not.
  return name.encode('utf-8', 'backslashreplace').decode()


def _free_name(name: str, taken: set[str]) -> str:
  """The name, bounded so that endings fit behind it, and with a number where an earlier file of the command had it."""
  name = name.encode('utf-8', 'replace')[:_LONGEST_NAME].decode(errors='ignore')
  free = next(n for n in itertools.chain([name], (f'{name}-{i}' for i in itertools.count(2))) if n not in taken)
  taken.add(free)
  return free


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit code."""
  return flags.run(lambda: EXIT_FAILED if run(flags.parse(parser(), argv)) else 0)


if __name__ == '__main__':
  sys.exit(main())
