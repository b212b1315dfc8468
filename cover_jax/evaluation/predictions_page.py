"""One page of what a model says of video and image files: HTML that needs no server, no network and no script.

Names of files and classes stand in it as text, whatever they hold; a policy forbids scripts and requests.
"""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence

from cover_jax.evaluation import page


@dataclasses.dataclass
class Shown:
  """What the page shows of one file.

  Attributes:
    path: of the file.
    seconds: that were covered; 0 for an image.
    predictions: {head: [(class, probability), ...]}, best first.
    windows: {head: number of windows}.
    clips: (title, moving WebP) of the windows that heads are surest of.
    timeline, attention: PNGs; b'' where there is none.
    trouble: the sentence that says why the file failed or broke off; '' if it did not.
  """

  path: str
  seconds: float = 0.0
  predictions: Mapping[str, Sequence[tuple[str, float]]] = dataclasses.field(default_factory=dict)
  windows: Mapping[str, int] = dataclasses.field(default_factory=dict)
  clips: Sequence[tuple[str, bytes]] = ()
  timeline: bytes = b''
  attention: bytes = b''
  trouble: str = ''


def of_files(about: str, files: Sequence[Shown]) -> str:
  """The page, at most 15 MB: pictures that do not go into it are counted, and left out.

  Args:
    about: which model it is, in a sentence.
    files: in their order.
  """
  without = _rendered(about, files, _Room(0))
  return _rendered(about, files, _Room(page.MOST_BYTES - len(without.encode())))


def _rendered(about: str, files: Sequence[Shown], room: '_Room') -> str:
  sections = ''.join(_file(i, shown, room) for i, shown in enumerate(files))
  left = f'<p class="note">{room.left_out:,} pictures have no room in this page.</p>' if room.left_out else ''
  count = f'{len(files):,} file' + ('s' if len(files) != 1 else '')
  style = page.asset('page.css') + page.asset('predictions.css')
  parts = {
    'title': html.escape(count),
    'about': html.escape(about),
    'table': _overview(files),
    'left': left,
    'files': sections,
    'style': style,
    'policy': html.escape(f"default-src 'none'; img-src data:; style-src '{page.hash_of(style)}'"),
  }
  return page.filled(page.asset('predictions.html'), parts)


class _Room:
  """How many bytes of pictures still go into the page, and how many pictures did not."""

  def __init__(self, size: int):
    self._size, self.left_out = size, 0

  def image(self, data: bytes, kind: str, said: str) -> str:
    """An <img>, or '' where it has no room."""
    tag = f'<img alt="{_text(said)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    if len(tag) > self._size:
      self.left_out += 1
      return ''
    self._size -= len(tag)
    return tag


def _overview(files: Sequence[Shown]) -> str:
  """A line a file: the best class of each head."""
  heads = list(dict.fromkeys(head for shown in files for head in shown.predictions))
  header = ''.join(f'<th scope="col">{_text(word)}</th>' for word in ('file', *heads))
  lines = []
  for i, shown in enumerate(files):
    cells = []
    for head in heads:
      best = shown.predictions.get(head)
      cells.append(f'<td>{_text(best[0][0])} {best[0][1]:.0%}</td>' if best else '<td>-</td>')
    name = f'<a href="#file-{i}">{_text(_short(shown.path))}</a>'
    lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
  return f'<table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _file(number: int, shown: Shown, room: _Room) -> str:
  """The section of a file."""
  time = f' ({shown.seconds:.1f} s)' if shown.seconds else ''
  parts = [f'<section class="file" id="file-{number}"><h2>{_text(_short(shown.path))}{time}</h2>']
  parts.append(f'<p class="name">{_text(shown.path)}</p>')
  if shown.trouble:
    parts.append(f'<p class="wrong">{_text(shown.trouble)}</p>')
  parts.append('<div class="seen">')
  for title, clip in shown.clips:
    parts.append(f'<figure>{room.image(clip, "webp", title)}<figcaption>{_text(title)}</figcaption></figure>')
  parts += [_head(head, ranking, shown.windows[head]) for head, ranking in shown.predictions.items()]
  parts.append('</div>')
  if shown.timeline:
    parts.append(f'<p class="wide">{room.image(shown.timeline, "png", "Best class of each head over time")}</p>')
  if shown.attention:
    image = room.image(shown.attention, 'png', 'Attention over the frames')
    parts.append(f'<details><summary>Where the model looked</summary><p class="wide">{image}</p></details>')
  return ''.join([*parts, '</section>'])


def _head(head: str, ranking: Sequence[tuple[str, float]], windows: int) -> str:
  bars = ''.join(
    f'<li><span>{_text(name)}</span><meter min="0" max="1" value="{p:.4f}"></meter><span>{p:.1%}</span></li>'
    for name, p in ranking
  )
  count = f'{windows:,} window' + ('s' if windows != 1 else '')
  return f'<div class="head"><h3>{_text(head)} <small>{count}</small></h3><ol>{bars}</ol></div>'


def _short(path: str) -> str:
  return path.rstrip('/').rpartition('/')[2] or path


def _text(name: str) -> str:
  # A file name may be any bytes.
  return html.escape(name.encode('utf-8', 'replace').decode())
