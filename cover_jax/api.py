"""A trained model in three lines, for a notebook or a script; no TensorFlow.

import cover_jax
model = cover_jax.load('run_or_export')
model.predict('clip.mp4')
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cover_jax import checkpoints
from cover_jax.experiment import build as experiments
from cover_jax.experiment import state
from cover_jax.experiment.build import Experiment
from cover_jax.models import encoder as encoders
from cover_jax.models.encoder import Encoded, Encoder
from cover_jax.training import finite
from data_pipelines import paths
from data_pipelines.clips import sampling
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.media import video_files
from data_pipelines.media.video_files import Cut, Window

# Clips that go through the model at once. One size, padded, so that a long video is compiled once.
BATCH = 8
DEMO = os.path.join(os.path.dirname(__file__), 'demo', 'model.flax')

Ranking = list[tuple[str, float]]  # (class name, probability), best first
Predictions = dict[str, Ranking]  # by head


class View(NamedTuple):
  """Sources whose clips are cut alike, so that their heads share one pass of the encoder.

  Attributes:
    cut: the geometry.
    sources: names, in the order of the run.
  """

  cut: Cut
  sources: tuple[str, ...]


class Seen(NamedTuple):
  """What the model makes of one window of a file.

  Attributes:
    view: where its clip comes from.
    window: the clip and its time.
    probabilities: {head: float32 [K]} of the view's heads.
    feature_D: float32, the class token.
  """

  view: View
  window: Window
  probabilities: Mapping[str, np.ndarray]
  feature_D: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A trained model, ready to look at pictures. Made by `load`.

  Pictures are uint8 in [0, 255], RGB, of any size: an image [H, W, 3], a clip [T, H, W, 3] or a batch of clips
  [B, T, H, W, 3]. Each head gets the number of frames it was trained with, taken evenly from the clip, cropped to the
  centre and resized as evaluation does; a clip of just that many frames, or of just that size, is not cut again.

  Attributes:
    experiment: the run that the model is from, without its data.
    params: {'encoder': ..., 'heads': {source: ...}}, on the device.
    path: of the checkpoint.
    step: of training.
    only: the heads that are asked; () for all.
  """

  experiment: Experiment
  params: Mapping[str, Any]
  path: str
  step: int
  only: tuple[str, ...] = ()

  @property
  def model(self) -> Encoder:
    """The encoder, a Linen module: `model.model.apply(variables(model.params['encoder']), normalised_clip)`."""
    return self.experiment.model

  @property
  def heads(self) -> dict[str, tuple[str, ...]]:
    """{head: class names in the order of its outputs}, of the heads that are asked."""
    return {name: classes for name, classes in self._all_heads.items() if name in (self.only or self._all_heads)}

  @functools.cached_property
  def views(self) -> tuple[View, ...]:
    """The different ways in which the sources' clips are cut."""
    by_cut: dict[Cut, list[str]] = {}
    for source in self.experiment.sources:
      if self.only and source.name not in self.only:
        continue
      by_cut.setdefault(_cut_of(self.experiment, source), []).append(source.name)
    return tuple(View(cut, tuple(names)) for cut, names in by_cut.items())

  def predict(self, pictures: np.ndarray | str | os.PathLike[str], top: int = 5) -> Predictions | list[Predictions]:
    """Classifies an image, a clip, a batch of clips or a file with every head.

    Args:
      pictures: uint8 array (see `Model`), or the path of any video or image; a video is covered by windows
        (`data_pipelines.media.video_files.windows`) and their probabilities are averaged.
      top: classes to give for each head; all of a head that has fewer.

    Returns:
      {head: [(class name, probability), ...]}, best first; a list of them for a batch. The probabilities of a head add
      up to 1, or each is for itself where its source has several labels a clip. A file of which only the first part
      can be decoded is judged by that part, with a warning.

    Raises:
      UserError: if the array is not as described, the file cannot be read, or the model has no heads.
    """
    if top < 1:
      raise UserError(f'top is {top}: ask for at least 1 class.')
    if not self.heads:
      raise UserError(f'{self.path} has no heads, so it predicts no classes: use encode, or train heads on it.')
    if isinstance(pictures, str | os.PathLike):
      return self._predict_file(os.fspath(pictures), top)
    clip_BxTxHxWx3, single = _as_batch(pictures)
    rankings: list[Predictions] = [{} for _ in clip_BxTxHxWx3]
    for view in self.views:
      outputs = self.run_clips(_cut_evenly(clip_BxTxHxWx3, view.cut))
      for name in self.view_heads(view):
        for ranking, p_K in zip(rankings, outputs['probabilities'][name], strict=True):
          ranking[name] = self.rank(name, p_K, top)
    rankings = [{name: ranking[name] for name in self.heads} for ranking in rankings]
    return rankings[0] if single else rankings

  def encode(self, pictures: np.ndarray, source: str | None = None) -> Encoded:
    """Encodes an image, a clip or a batch of clips.

    Args:
      pictures: uint8 array; see `Model`.
      source: whose clip geometry to use; by default one of most frames, or one of fewest for an image.

    Returns:
      `Encoded`, float32: `feature_BxD` [D], what heads see (a class token, or a pooled map), and `tokens_BxTxHxWxD`
      [T', H', W', D] on the encoder's own grid; [B, ...] for a batch.
    """
    clip_BxTxHxWx3, single = _as_batch(pictures)
    encoded = _in_batches(
      self._encode, self.params['encoder'], _cut_evenly(clip_BxTxHxWx3, self._cut(clip_BxTxHxWx3, source))
    )
    return jax.tree.map(lambda x: x[0], encoded) if single else encoded

  def attention(self, pictures: np.ndarray, source: str | None = None) -> np.ndarray:
    """Where the class token looked: attention rollout (`cover_jax.models.attention_rollout`).

    Args:
      pictures: uint8 array; see `Model`.
      source: whose clip geometry to use; by default one of most frames, or one of fewest for an image.

    Returns:
      float32 [T, rows, columns] of patches, or [B, T, rows, columns] for a batch; sums to 1 over each clip.

    Raises:
      UserError: if the encoder has no attention to show.
    """
    self.check_attention()
    clip_BxTxHxWx3, single = _as_batch(pictures)
    clip_BxTxHxWx3 = _cut_evenly(clip_BxTxHxWx3, self._cut(clip_BxTxHxWx3, source))
    # One by one: the attention of all blocks is large.
    maps = [_in_batches(self._attention, self.params['encoder'], clip[None])[0] for clip in clip_BxTxHxWx3]
    return maps[0] if single else np.stack(maps)

  def check_attention(self) -> None:
    """Raises UserError if the encoder has no attention to show."""
    if not self.model.SHOWS_ATTENTION:
      name = encoders.name_of(self.experiment.config.model)
      raise UserError(f'{self.path} has the encoder {name!r}, which has no attention to show.')

  def watch(self, path: str, hop: int | None = None, length: int = video_files.SEGMENT_WINDOW) -> Iterator[Seen]:
    """Covers a file with windows and yields what the model makes of each, in memory that does not grow.

    Args:
      path: of a video or image, on a disk or in a bucket.
      hop: frames from one window to the next; see `data_pipelines.media.video_files.windows`.
      length: frames that heads which sample segments see as one video.

    Raises:
      UserError: if the file cannot be read.
      data_pipelines.media.video_files.BrokenOff: if it breaks off; what was decoded has been yielded.
    """
    waiting: list[list[Window]] = [[] for _ in self.views]
    broken = None

    def flush(i: int, pad: bool) -> Iterator[Seen]:
      view, found = self.views[i], waiting[i]
      outputs = self.run_clips(np.stack([w.clip for w in found]), pad=pad)
      for row, window in enumerate(found):
        probabilities = {name: outputs['probabilities'][name][row] for name in self.view_heads(view)}
        yield Seen(view, window, probabilities, outputs['feature'][row])
      found.clear()

    with paths.local(path) as file:
      source = video_files.windows(file, [view.cut for view in self.views], hop, length)
      while True:
        try:
          window = next(source, None)
        except video_files.BrokenOff as error:
          broken, window = error, None
        if window is None:
          break
        waiting[window.cut].append(window)
        if len(waiting[window.cut]) == BATCH:
          yield from flush(window.cut, pad=True)
      for i, found in enumerate(waiting):
        if found:
          yield from flush(i, pad=len(found) > 1)
      if broken:
        raise broken

  def run_clips(self, clip_BxTxHxWx3: np.ndarray, pad: bool = False) -> dict[str, Any]:
    """Runs clips of one geometry; `pad` fills the last batch up to `BATCH`.

    Returns:
      {'feature': float32 [B, D], 'probabilities': {head: float32 [B, K]}}.
    """
    return _in_batches(self._forward, self.params, clip_BxTxHxWx3, pad=pad)

  def view_heads(self, view: View) -> tuple[str, ...]:
    """The heads of a view's sources."""
    return tuple(name for name in view.sources if name in self.heads)

  def rank(self, head: str, p_K: np.ndarray, top: int) -> Ranking:
    """The best classes of a head; of equal probabilities the lower class first."""
    return [(self.heads[head][k], float(p_K[k])) for k in np.argsort(-p_K, kind='stable')[:top]]

  def _predict_file(self, path: str, top: int) -> Predictions:
    total: dict[str, Any] = dict.fromkeys(self.heads, 0.0)
    count = dict.fromkeys(self.heads, 0)
    try:
      for seen in self.watch(path):
        for name, p_K in seen.probabilities.items():
          total[name], count[name] = total[name] + p_K, count[name] + 1
    except video_files.BrokenOff as error:
      warnings.warn(str(error), stacklevel=3)
    return {name: self.rank(name, total[name] / count[name], top) for name in self.heads}

  def __repr__(self) -> str:
    count = sum(int(np.size(x)) for x in jax.tree.leaves(self.params))
    heads = ', '.join(f'{name} ({len(classes)})' for name, classes in self.heads.items())
    return f'<cover_jax model of {self.path}: {count:,} parameters; heads: {heads or "none"}>'

  @property
  def _all_heads(self) -> dict[str, tuple[str, ...]]:
    return {s.name: s.class_names for s in self.experiment.sources if s.class_names}

  def _cut(self, clip_BxTxHxWx3: np.ndarray, source: str | None) -> Cut:
    names = [name for view in self.views for name in view.sources]
    if source is not None and source not in names:
      raise UserError(f'There is no source {source!r} in {self.path}: expected one of {names}.')
    if source is not None:
      return next(view.cut for view in self.views if source in view.sources)
    choose = max if clip_BxTxHxWx3.shape[1] > 1 else min
    return choose((view.cut for view in self.views), key=lambda cut: cut.num_frames)

  @functools.cached_property
  def _encode(self) -> Callable[[Any, Any], Encoded]:
    as_float = lambda x: x.astype(jnp.float32)
    return jax.jit(lambda params, clip: jax.tree.map(as_float, self.experiment.encode(params, clip)))

  @functools.cached_property
  def _forward(self) -> Callable[[Any, Any], dict[str, Any]]:
    counts = {name: len(class_names) for name, class_names in self._all_heads.items()}
    ends = np.cumsum(list(counts.values()))

    @jax.jit
    def forward(params, clip_BxTxHxWx3):
      encoded = self.experiment.encode(params['encoder'], clip_BxTxHxWx3)
      probabilities = {}
      if counts:
        logits_BxK = self.experiment.heads.apply({'params': params['heads']}, encoded)
        split = jnp.split(logits_BxK, ends[:-1], axis=1)
        by_name = zip(counts, split, strict=True)
        several = self.experiment.heads.several_labels
        kind = lambda name: jax.nn.sigmoid if name in several else jax.nn.softmax
        probabilities = {name: kind(name)(logits) for name, logits in by_name if name in self.heads}
      return {'feature': encoded.feature_BxD.astype(jnp.float32), 'probabilities': probabilities}

    return forward

  @functools.cached_property
  def _attention(self) -> Callable[[Any, Any], jax.Array]:
    @jax.jit
    def attention(params, clip_BxTxHxWx3):
      normal = experiments.normalise(self.experiment.config, clip_BxTxHxWx3, self.model.dtype)
      return self.model.attention_map(encoders.variables(params), normal)

    return attention


def load(path: str | os.PathLike[str], params: str = 'raw', heads: Sequence[str] = ()) -> Model:
  """Loads a model from a workdir, a checkpoint or an export.

  Args:
    path: a workdir (its newest checkpoint), or a file; on a disk or in a bucket (`gs://`). 'demo', where nothing has
      that name: the model that comes with the package, trained by `make demo` on the embedded data (docs/demo.md).
    params: 'raw', or 'ema' for the moving average.
    heads: those to ask, so that clips are cut for no others; () for all.

  Returns:
    The model, with its class names.

  Raises:
    UserError: if there is no such checkpoint, it cannot be read or does not fit its own config, holds no average, has
      no such head, or numbers that are not finite.
  """
  if params not in ('raw', 'ema'):
    raise UserError(f"params is {params!r}: expected 'raw' or 'ema' (the moving average).")
  path = os.fspath(path)
  loaded = checkpoints.load(DEMO if path == 'demo' and not os.path.exists(path) else path)
  experiment = experiments.of_checkpoint(loaded)
  have = [s.name for s in experiment.sources if s.class_names]
  if unknown := [name for name in heads if name not in have]:
    raise UserError(f'{loaded["path"]} has no head {unknown[0]!r}: its heads are {", ".join(have) or "none"}.')
  chosen = loaded['state'].get({'raw': 'params', 'ema': 'ema'}[params])
  if not chosen:
    raise UserError(f"{loaded['path']} holds no moving average of the parameters: load it with params='raw'.")
  template = nn.meta.unbox(jax.eval_shape(lambda: state.init_params(experiment, jax.random.key(0))))
  used = ('encoder', 'heads')
  fitted = checkpoints.fit(loaded, {k: chosen.get(k, {}) for k in used}, {k: template[k] for k in used})
  fitted = jax.device_put(fitted)
  finite.check(fitted, loaded['path'])
  return Model(experiment, fitted, loaded['path'], loaded['about']['step'], tuple(heads))


def _as_batch(pictures: Any) -> tuple[np.ndarray, bool]:
  """(uint8 [B, T, H, W, 3], whether it was a single clip or image)."""
  pictures = np.asarray(pictures)
  if pictures.dtype != np.uint8 or not 3 <= pictures.ndim <= 5 or pictures.shape[-1] != 3 or 0 in pictures.shape:
    raise UserError(
      f'Pictures are {pictures.dtype} {list(pictures.shape)}: expected uint8 [H, W, 3], [T, H, W, 3] or '
      '[B, T, H, W, 3] with values from 0 to 255.'
    )
  missing = 5 - pictures.ndim
  return pictures.reshape((1,) * missing + pictures.shape), missing > 0


def _cut_of(experiment: Experiment, source: SourceInfo) -> Cut:
  """How the test clips of a source are cut; what has no influence on them is left out, so that heads share a pass."""
  stream = experiment.stream_of(source.name)
  # Configs of older checkpoints lack some of the keys.
  options = {'fps': 0.0, 'loop': False, 'test_crop_fraction': 1.0} | experiment.config.sources[source.name].to_dict()
  cut = Cut(stream.num_frames, stream.size, options['sampler'], options['stride'])
  if stream.num_frames == 1:
    cut = cut._replace(sampler='dense', stride=1)
  elif cut.sampler == 'dense':
    cut = cut._replace(fps=options['fps'] or source.fps, loop=options['loop'])
  else:
    cut = cut._replace(stride=1)
  return cut._replace(crop_fraction=options['test_crop_fraction'])


def _cut_evenly(clip_BxTxHxWx3: np.ndarray, cut: Cut) -> np.ndarray:
  numbers = sampling.segments(clip_BxTxHxWx3.shape[1], cut.num_frames)
  fitted = clip_BxTxHxWx3.shape[2:4] == cut.size
  fit = (lambda frame: frame) if fitted else lambda frame: video_files.fit(frame, cut.size, cut.crop_fraction)
  return np.stack([[fit(clip[i]) for i in numbers] for clip in clip_BxTxHxWx3])


def _in_batches(run: Callable[[Any, Any], Any], params: Any, clip_BxTxHxWx3: np.ndarray, *, pad: bool = False) -> Any:
  """Runs up to `BATCH` clips at once and joins the outputs; numpy in, numpy out."""
  count = len(clip_BxTxHxWx3)
  if pad or count > BATCH:
    clip_BxTxHxWx3 = np.concatenate([clip_BxTxHxWx3, clip_BxTxHxWx3[-1:].repeat(-count % BATCH, axis=0)])
  parts = [jax.device_get(run(params, clip_BxTxHxWx3[i : i + BATCH])) for i in range(0, len(clip_BxTxHxWx3), BATCH)]
  return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
