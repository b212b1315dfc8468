"""What annotation files list, and how such files are read: text, tables, JSON and the folder they lie in."""

import collections
import csv
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.contract import UserError

# What PyAV reads, by the ending: containers, raw streams and animated pictures.
VIDEO_EXTENSIONS = frozenset([
  '.mp4', '.m4v', '.mov', '.qt', '.3gp', '.3g2', '.f4v', '.mkv', '.webm', '.avi', '.divx', '.flv', '.wmv', '.asf',
  '.ogv', '.ogm', '.ts', '.mts', '.m2ts', '.m2t', '.tod', '.mpg', '.mpeg', '.mpe', '.mpv', '.m1v', '.m2v', '.vob',
  '.mod', '.dv', '.mxf', '.rm', '.rmvb', '.nut', '.ivf', '.y4m', '.h264', '.264', '.avc', '.h265', '.265', '.hevc',
  '.h263', '.263', '.h266', '.266', '.vvc', '.vc1', '.obu', '.mjpg', '.mjpeg', '.gif', '.apng', '.m2p', '.mp2v',
  '.mpv2', '.tp', '.trp', '.evo', '.mk3d', '.lrv', '.insv', '.ismv', '.3gpp', '.3gpp2', '.gxf', '.wtv', '.dvr-ms',
  '.swf', '.amv', '.roq', '.nsv', '.bik', '.smk', '.fli', '.flc', '.viv',
])  # fmt: skip
# What Pillow reads without another program or plugin.
IMAGE_EXTENSIONS = frozenset([
  '.jpg', '.jpeg', '.jpe', '.jfif', '.jif', '.mpo', '.png', '.apng', '.webp', '.avif', '.bmp', '.dib', '.gif', '.tif',
  '.tiff', '.ppm', '.pgm', '.pbm', '.pnm', '.pfm', '.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx', '.tga', '.icb',
  '.vda', '.vst', '.sgi', '.rgb', '.rgba', '.bw', '.ras', '.pcx', '.dcx', '.qoi', '.dds', '.ico', '.icns', '.psd',
  '.xbm', '.xpm', '.im', '.msp',
])  # fmt: skip
LARGEST_TEXT = 1 << 29  # bytes of an annotation file; the largest official one (Kinetics-700) has 30 MB
_LABELS = Path(__file__).parent / 'labels'


class Clip(NamedTuple):
  """One example that the annotations list.

  Attributes:
    id: unique within the split.
    video_id: the original video that the clip was cut from: the YouTube id, the group of UCF101; of one's own files
      the path.
    path: of the file; None where the annotations list the clip and no file is there.
    label: index into the class names; -1 if unlabelled. Where clips have several (`media.MediaConfig.labels`), those,
      ascending, each once: () if it has none of the classes, (-1,) if unlabelled.
    line: where the annotations list it, 'trainlist01.txt:12'; '' where a folder is the annotation.
  """

  id: str
  video_id: str
  path: str | None
  label: int | tuple[int, ...]
  line: str


class Listing(NamedTuple):
  """All that the annotations of a dataset say.

  Attributes:
    class_names: in label order.
    splits: {split: its clips, in the order of the annotations}.
    left_over: paths of files in class folders that are of no kind that is read.
    empty: folders among those of classes that hold nothing, and links to others of them.
    unlisted: paths of files that could be examples and that no list names.
    notes: what else is to be said of the annotations, a line each.
  """

  class_names: tuple[str, ...]
  splits: dict[str, list[Clip]]
  left_over: tuple[str, ...] = ()
  unlisted: tuple[str, ...] = ()
  empty: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


class Folder(NamedTuple):
  """The files below a directory, walked once: a stat for each of 600,000 rows would take minutes on a network disk.

  Attributes:
    root: the directory.
    videos: {key of the file: its path or, where several files have that key, all their paths}.
    texts: {file name: paths of the annotation files of that name, the least deep first}.
  """

  root: Path
  videos: dict[str, str | list[str]]
  texts: dict[str, list[str]]

  def video(self, key: str, *folders: str) -> str | None:
    """The file of that key, or None; of several, the one in a folder of the earliest given name, else the first."""
    found = self.videos.get(key)
    if found is None or isinstance(found, str):
      return found
    names = [plain(f) for f in folders]

    def rank(path: str) -> tuple[int, str]:
      parts = {plain(p) for p in os.path.relpath(path, self.root).split(os.sep)[:-1]}
      return next((i for i, n in enumerate(names) if n in parts), len(names)), path

    return min(found, key=rank)

  def text(self, *patterns: str) -> Path | None:
    """The annotation file whose whole name the earliest of some regular expressions matches, or None.

    Raises:
      UserError: several files match the same expression at the same depth.
    """
    for pattern in patterns:
      paths = [Path(p) for name, ps in self.texts.items() if re.fullmatch(pattern, name) for p in ps]
      if paths:
        depth = min(len(p.parts) for p in paths)
        top = sorted(p for p in paths if len(p.parts) == depth)
        if len(top) > 1:
          raise UserError(
            f'{self.root} has {len(top)} files for the same annotations ({", ".join(map(str, top))}); expected '
            f'one: point --manual_dir at a folder with one dataset, or remove the others.'
          )
        return top[0]
    return None


def plain(name: str) -> str:
  """A class or folder name without what people change in them: case, and underscores for spaces."""
  return ' '.join(composed(name).replace('_', ' ').split()).casefold()


def composed(name: str) -> str:
  """A name with its accents as one character each (NFC), as most systems write them; macOS writes two (NFD)."""
  return unicodedata.normalize('NFC', name)


def scan(manual_dir: str | os.PathLike, key: Callable[[str, str], str]) -> Folder:
  """Walks a directory and finds its videos and annotation files; hidden files are left out, links are followed.

  Args:
    manual_dir: the directory.
    key: (name of the folder, file name without extension) -> name under which the video is looked up.

  Raises:
    UserError: there is no such directory, or a part of it cannot be read.
  """
  root = Path(manual_dir).absolute()
  if not root.is_dir():
    raise UserError(f'{root} is not a directory; expected the dataset there: correct --manual_dir.')

  def refuse(error: OSError):
    raise UserError(f'{error.filename} below --manual_dir cannot be read ({error.strerror}): correct its permissions.')

  videos: dict[str, str | list[str]] = {}
  texts: dict[str, list[str]] = {}
  seen = set()
  for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
    place = os.stat(where)
    if (place.st_dev, place.st_ino) in seen:  # a link back up
      folders.clear()
      continue
    seen.add((place.st_dev, place.st_ino))
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    for name in sorted(names):
      stem, extension = os.path.splitext(name)
      if name.startswith('.'):  # '._x.mp4' are the notes of macOS about x.mp4
        continue
      if extension.lower() in VIDEO_EXTENSIONS:
        path = os.path.join(where, name)
        name = key(os.path.basename(where), stem)
        other = videos.setdefault(name, path)
        if other is not path:
          videos[name] = [path, *([other] if isinstance(other, str) else other)]
      elif extension in ('.csv', '.json', '.txt'):
        texts.setdefault(name, []).append(os.path.join(where, name))
  return Folder(root, videos, texts)


def official_names(name: str) -> tuple[str, ...]:
  """The class names of a dataset in label order; labels/README.md says where they come from."""
  return tuple((_LABELS / f'{name}.txt').read_text(encoding='utf-8').splitlines())


def shown(value: Any) -> str:
  """A value in quotes for a message, cut short: a broken file may hold a cell of megabytes."""
  text = str(value)
  return repr(text if len(text) <= 80 else f'{text[:77]}...')


def bad_line(path: Path, line: int | str, what: str, remedy: str = 'Correct the file, or fetch it again.') -> UserError:
  """The error of one line (or entry) of an annotation file."""
  return UserError(f'{path}:{line}: {what}. {remedy}')


def read_text(path: Path) -> str:
  """A file of UTF-8 text, with or without a byte order mark.

  Raises:
    UserError: it is no regular file, larger than `LARGEST_TEXT`, cannot be read, is not UTF-8, or is empty.
  """
  try:
    # Without O_NONBLOCK, a pipe would be waited for.
    with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
      found = os.fstat(f.fileno())
      if not stat.S_ISREG(found.st_mode):
        raise UserError(f'{path} is not a regular file; expected annotations: put the file itself there, or remove it.')
      if found.st_size > LARGEST_TEXT:
        raise UserError(
          f'{path} has {found.st_size:,} bytes; expected annotations of at most {LARGEST_TEXT:,}: is it another file?'
        )
      data = f.read(LARGEST_TEXT)
  except OSError as e:
    raise UserError(f'{path} cannot be read ({e.strerror}): correct its permissions.') from None
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    line = data.count(b'\n', 0, e.start) + 1
    raise bad_line(path, line, f'byte 0x{data[e.start]:02x} is not UTF-8 text') from None
  if not text.strip():
    raise UserError(f'{path} is empty; expected annotations: correct it, or fetch it again.')
  return text


def read_lines(path: Path) -> list[tuple[int, str]]:
  """(line number from 1, stripped text) of the lines that are not blank."""
  # Not splitlines: it also cuts at form feeds and at Unicode's separators, and the numbers would not be an editor's.
  lines = re.split(r'\r\n|\r|\n', read_text(path))
  return [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]


def read_rows(path: Path, delimiter: str = ',') -> Iterator[tuple[int, list[str]]]:
  """(line number from 1, stripped cells) of the rows of a table that are not blank."""
  # Universal newlines, but kept: the reader counts lines, and a quoted cell may hold some.
  lines = io.StringIO(read_text(path).replace('\r\n', '\n').replace('\r', '\n'))
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  line = 1  # where the row begins
  try:
    for row in reader:
      cells = [cell.strip() for cell in row]
      if any(cells):
        yield line, cells
      line = reader.line_num + 1
  except csv.Error as e:
    raise bad_line(path, line, f'not a row of a table ({e})') from None


def read_json(path: Path) -> Any:
  """The value of a JSON file; a key that comes twice in an object is an error."""

  def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      twice = collections.Counter(k for k, _ in pairs).most_common(1)[0][0]
      raise UserError(
        f'{path}: the key {shown(twice)} comes twice; expected it once. Correct the file, or fetch it again.'
      )
    return found

  text = read_text(path)
  try:
    return json.loads(text, object_pairs_hook=unique)
  except json.JSONDecodeError as e:
    raise bad_line(path, e.lineno, f'not JSON ({e.msg})') from None
  except (ValueError, RecursionError) as e:  # a number of thousands of digits, brackets within brackets
    raise UserError(f'{path} is not a JSON file that can be read ({e}). Correct it, or fetch it again.') from None


def check_clips(clips: Sequence[Clip], where: Path) -> None:
  """Raises UserError if a split has no clip, or two of the same id."""
  if not clips:
    raise UserError(f'{where} has a header and no clip; expected some: correct it, or fetch it again.')
  lines: dict[str, str] = {}
  for clip in clips:
    if clip.id in lines:
      raise UserError(
        f'{where} lists the clip {shown(clip.id)} twice ({lines[clip.id]} and {clip.line}); expected each once: remove '
        f'one of them.'
      )
    lines[clip.id] = clip.line


def some(splits: Mapping[str, list[Clip]], folder: Folder, looked_for: str) -> dict[str, list[Clip]]:
  """The splits, of which there must be one at least.

  Args:
    splits: {split: clips}; those without annotation file are not in it.
    folder: where the files were looked for.
    looked_for: their names, for the message.

  Raises:
    UserError: there is none.
  """
  if not splits:
    raise UserError(
      f'{folder.root} has no annotation file; expected {looked_for} in it or in a folder below: put the official '
      f'annotations there, or correct --manual_dir.'
    )
  return dict(splits)
