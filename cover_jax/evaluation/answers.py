"""What a head answers to every test example, kept beside the report with some of the clips that were judged.

`predictions_<source>.csv` has a line for each example, `clips/<source>/<example>.webp` one of its test views, moving.
The page of `cover_jax.report` is made of them, with neither the model nor the data set at hand.
"""

import collections
import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines import durable, paths
from data_pipelines.contract import TestSet

BEST = 5  # answers that are kept of each example
MOST_CLIPS = 400  # over all heads
MOST_BYTES = 9_000_000  # of these clips; three quarters of what they take within a page of text
FOLDER, INDEX = 'clips', 'index.json'
_SIDE = 112  # pixels of the short side of a kept clip, at most
_QUALITY, _MILLISECONDS = 60, 180  # of WebP; of a frame


class Answers(NamedTuple):
  """One head's answers to the labelled examples of its source's test split.

  Attributes:
    example_N: int32, ascending, numbers of the examples in the split.
    label_N: int32, true classes.
    best_NxM: int32, the M most probable classes, best first; M is at most `BEST`.
    probability_NxM: float32, of these classes, averaged over the test views.
  """

  example_N: np.ndarray
  label_N: np.ndarray
  best_NxM: np.ndarray
  probability_NxM: np.ndarray

  @property
  def right_N(self) -> np.ndarray:
    return self.best_NxM[:, 0] == self.label_N


def collect(batches: Sequence[Mapping[str, np.ndarray]]) -> Answers:
  """Joins batches of 'example', 'label', 'counted' [B], 'best' and 'probability' [B, M]; leaves out the uncounted."""
  joined = {k: np.concatenate([np.asarray(batch[k]) for batch in batches]) for k in batches[0]}
  rows = np.flatnonzero(joined['counted'])
  rows = rows[np.argsort(joined['example'][rows], kind='stable')]
  return Answers(*(joined[k][rows] for k in ('example', 'label', 'best', 'probability')))


def write_csv(answers: Answers, class_names: Sequence[str], names: Sequence[str], path: str) -> None:
  """Writes a line for each example: its number and name, the true class, the best answers with their probabilities.

  Args:
    answers: of a head.
    class_names: of the head.
    names: of the examples of the split, by number; empty where the data set gives none.
    path: of the CSV.
  """
  count = answers.best_NxM.shape[1]
  with durable.replacing(path, 'w') as f:
    rows = csv.writer(f)
    rows.writerow(['example', 'name', 'true', *(w for i in range(1, count + 1) for w in _columns(i))])
    for example, label, best, probability in zip(*(a.tolist() for a in answers), strict=True):
      said = (w for k, p in zip(best, probability, strict=True) for w in (class_names[k], f'{p:.4f}'))
      rows.writerow([example, names[example] if len(names) else '', class_names[label], *said])


def _columns(rank: int) -> tuple[str, str]:
  return f'answer {rank}', f'probability {rank}'


def choose(answers: Answers, most: int) -> np.ndarray:
  """Which examples to show: errors of every kind, the most confident first, and right answers of every class.

  Half of the places are for errors, one of each confusion (true and predicted class) in turn; half for right answers,
  one of each class in turn, beginning with the one in the middle by confidence. What the one half leaves the other has.

  Args:
    answers: of a head.
    most: examples to choose.

  Returns:
    int64 [at most `most`], rows of `answers`, ascending.
  """
  confidence_N, right_N = answers.probability_NxM[:, 0], answers.right_N
  wrong = np.flatnonzero(~right_N)
  wrong = wrong[np.argsort(-confidence_N[wrong], kind='stable')]
  wrong = _in_turn(wrong, list(zip(answers.label_N[wrong].tolist(), answers.best_NxM[wrong, 0].tolist(), strict=True)))
  right = np.flatnonzero(right_N)
  distance_N = np.zeros(len(right_N))
  for label in np.unique(answers.label_N[right]):
    of_class = right[answers.label_N[right] == label]
    distance_N[of_class] = np.abs(confidence_N[of_class] - np.median(confidence_N[of_class]))
  right = right[np.argsort(distance_N[right], kind='stable')]
  right = _in_turn(right, answers.label_N[right].tolist())
  errors = min(len(wrong), max(most - most // 2, most - len(right)))
  return np.sort(np.concatenate([wrong[:errors], right[: most - errors]]))


def samples(
  name: str, answers: Answers, class_names: Sequence[str], test_set: TestSet, most: int
) -> list[dict[str, Any]]:
  """Examples of `choose` with their clips and answers, as `visualise.predictions` draws them.

  Args:
    name: of the source.
    answers: of its head.
    class_names: of the head.
    test_set: the data.
    most: examples to show.
  """
  rows = choose(answers, most)
  shown = []
  for row, views in zip(rows.tolist(), views_of(test_set, answers.example_N[rows]), strict=True):
    best = zip(answers.best_NxM[row].tolist(), answers.probability_NxM[row].tolist(), strict=True)
    predicted = [(class_names[k], p) for k, p in best]
    label = class_names[answers.label_N[row]]
    shown.append({'clip': views[len(views) // 2], 'source': name, 'label': label, 'predicted': predicted})
  return shown


def _in_turn(rows: np.ndarray, kinds: Sequence[Any]) -> np.ndarray:
  """The rows with the first of each kind ahead, then the second of each, in the order that they come in."""
  seen: collections.Counter = collections.Counter()
  turns = []
  for kind in kinds:
    turns.append(seen[kind])
    seen[kind] += 1
  return rows[np.argsort(np.array(turns, int), kind='stable')]


def write_clips(answers: Mapping[str, Answers], test_sets: Mapping[str, TestSet], folder: str) -> None:
  """Writes `clips/` into a folder: for some examples of each head the middle one of its test views, as moving WebP.

  The folder is replaced at once; see `durable.replacing_folder`. Beside the clips of a head, `index.json` says of which
  test examples they are (their hash), how many views were judged, and which one is kept.

  Args:
    answers: {source: what its head answered}.
    test_sets: the data.
    folder: of the report.

  Raises:
    UserError: a clip cannot be read.
    OSError: the clips cannot be written.
  """
  most, room = max(MOST_CLIPS // max(len(answers), 1), 1), MOST_BYTES // max(len(answers), 1)
  with durable.replacing_folder(os.path.join(folder, FOLDER)) as new:
    for name, given in answers.items():
      os.mkdir(os.path.join(new, name))
      left, about = room, {'data_sha256': test_sets[name].fingerprint, 'protocol': test_sets[name].protocol}
      chosen = given.example_N[choose(given, most)]
      for example, views in zip(chosen.tolist(), views_of(test_sets[name], chosen), strict=False):
        about |= {'views': len(views), 'shown': len(views) // 2 + 1}
        encoded = moving(views[len(views) // 2])
        left -= len(encoded)
        if left < 0:
          break
        _write(os.path.join(new, name, f'{example}.webp'), encoded)
      _write(os.path.join(new, name, INDEX), (json.dumps(about, sort_keys=True) + '\n').encode())


def _write(path: str, data: bytes) -> None:
  with open(path, 'wb') as f:  # the folder is made whole, and flushed, at once
    f.write(data)


def views_of(test_set: TestSet, examples: np.ndarray) -> Iterator[np.ndarray]:
  """The test views, uint8 [V, T, H, W, 3], of some examples."""
  if not len(examples):
    return
  for batch in test_set.some(examples):
    yield from batch['views']['clip'][np.asarray(batch['mask'])]


def moving(clip_TxHxWx3: np.ndarray) -> bytes:
  """A uint8 clip as a WebP that moves, again and again, of at most 112 pixels on its short side; T = 1 stands still."""
  height, width = clip_TxHxWx3.shape[1:3]
  scale = min(1.0, _SIDE / min(height, width))
  size = max(round(width * scale), 1), max(round(height * scale), 1)
  frames = [Image.fromarray(frame) for frame in clip_TxHxWx3]
  frames = [frame.resize(size, Image.Resampling.LANCZOS) if size != frame.size else frame for frame in frames]
  encoded = io.BytesIO()
  # Small pictures are looked at enlarged.
  how: dict[str, Any] = {'format': 'WEBP', 'quality': _QUALITY if min(size) > _SIDE // 2 else 90, 'method': 4}
  if len(frames) > 1:
    how |= {'save_all': True, 'append_images': frames[1:], 'duration': _MILLISECONDS, 'loop': 0}
  frames[0].save(encoded, **how)
  return encoded.getvalue()


class Row(NamedTuple):
  """A line of `predictions_<source>.csv`.

  Attributes:
    example: its number in the test split.
    name: its own name; '' where the data set gives none.
    label: its true class, an index.
    best: (class, probability) of the best answers, best first.
  """

  example: int
  name: str
  label: int
  best: tuple[tuple[int, float], ...]

  @property
  def right(self) -> bool:
    return self.best[0][0] == self.label


def read_csv(path: str, class_names: Sequence[str]) -> list[Row]:
  """Reads what `write_csv` wrote.

  Raises:
    OSError, ValueError, KeyError: if it is not there, or is no such file.
  """
  index, found = {name: k for k, name in enumerate(class_names)}, []
  lines = csv.reader(io.StringIO(paths.read(path).decode(), newline=''))
  count = (len(next(lines, ())) - 3) // 2
  if count < 1:
    raise ValueError('it has no line with the names of columns')
  for line in lines:
    example, name, label, *said = line
    best = tuple((index[said[2 * i]], float(said[2 * i + 1])) for i in range(count))
    if not all(math.isfinite(p) for _, p in best):
      raise ValueError(f'a probability of example {example} is no number')
    found.append(Row(int(example), name, index[label], best))
  return found


def clips_of(folder: str, name: str, data_sha256: str) -> tuple[dict[int, str], dict[str, Any]]:
  """The kept clips of a head, {example: path}, and what `index.json` says of them.

  Both are empty where there is none, or the clips are of other examples than the report: of one that was cut short.
  """
  folder = os.path.join(folder, FOLDER, name)
  try:
    about = json.loads(paths.read(os.path.join(folder, INDEX)))
    if about['data_sha256'] != data_sha256:
      return {}, {}
    stems = [os.path.splitext(file) for file in paths.names(folder)]
  except (OSError, ValueError, KeyError, TypeError):
    return {}, {}
  return {int(s): os.path.join(folder, s + end) for s, end in stems if end == '.webp' and s.isdigit()}, about
