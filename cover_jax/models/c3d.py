"""C3D (Tran et al. 2015, arXiv 1412.0767) with batch normalisation, as self-supervised work trains it (VCOP).

Eight convolutions of 3 x 3 x 3; the mean of the last map stands for the two fully connected layers.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cover_jax.models.convolutions import Unit, lengths_after, max_pool, shortest
from cover_jax.models.encoder import Encoded, Encoder, check_levels
from data_pipelines.declared import flag, several, whole

_STAGE = several(whole(1), least=1)


class C3D(Encoder):
  """Encodes clips of at least 8 frames; an image is too short for its poolings in time.

  Attributes:
    widths: channels of the convolutions of each stage. All stages but the last end with a pooling.
    freeze_statistics: normalise by the running statistics in training, too, and leave them as they are.
    dtype: of the computation. Parameters and statistics are float32.
  """

  widths: Annotated[tuple[tuple[int, ...], ...], several(_STAGE, least=1)] = (
    (64,),
    (128,),
    (256, 256),
    (512, 512),
    (512, 512),
  )
  freeze_statistics: Annotated[bool, flag] = False
  dtype: Any = jnp.float32

  DEBUG: ClassVar[Mapping[str, Any]] = {'widths': ((8,), (16,))}

  @property
  def width(self) -> int:
    return self.widths[-1][-1]

  @property
  def level_names(self) -> tuple[str, ...]:
    return tuple(f'stage{i + 1}' for i in range(len(self.widths)))

  @property
  def num_layers(self) -> int:
    return len(self.widths)

  def layer(self, name: str) -> int:
    return int(name.split('_')[0].removeprefix('stage')) - 1

  def limits(self, frames: int, size: tuple[int, int]) -> str:
    in_space, in_time = (_steps(len(self.widths), skip) for skip in (0, 1))
    if not lengths_after(frames, in_time):
      return f'a clip must have at least {shortest(in_time)} frames, since time is pooled; an image has one'
    if not all(lengths_after(side, in_space) for side in size):
      return f'the height and width of a clip must be at least {shortest(in_space)}'
    return ''

  @nn.compact
  def __call__(self, clip_BxTxHxWx3: jax.Array, *, train: bool = False, levels: Sequence[str] = ()) -> Encoded:
    """Encodes clips.

    Args:
      clip_BxTxHxWx3: float, normalised.
      train: normalise by the statistics of the batch and move the running ones: 'batch_stats' must be mutable.
      levels: of `level_names`; the map after the convolutions of that stage.

    Returns:
      `Encoded`; tokens are the last map, the feature is its mean.
    """
    check_levels(self, levels)
    use_running = self.freeze_statistics or not train
    x, kept = clip_BxTxHxWx3.astype(self.dtype), {}
    for i, stage in enumerate(self.widths):
      if i:
        window = (1 if i == 1 else 2, 2, 2)
        x = max_pool(x, window, window)
      for j, features in enumerate(stage):
        x = Unit(features, (3, 3, 3), use_bias=True, dtype=self.dtype, name=f'stage{i + 1}_{j}')(x, use_running)
      kept[f'stage{i + 1}'] = x
    return Encoded(x.mean(axis=(1, 2, 3)), x, {name: kept[name] for name in levels})


def _steps(stages: int, skip: int) -> list[tuple[int, int, int]]:
  """The poolings along an axis; the first leaves time alone."""
  return [(2, 2, 0)] * max(stages - 1 - skip, 0)
