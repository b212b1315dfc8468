"""Multi-head classification: each sample is judged by the head of its own source (CoVeR)."""

from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from cover_jax.augment import mixing
from cover_jax.models.heads import (
  Heads,
  cross_entropy,
  head_columns,
  is_labelled,
  rank_of_best_label,
  rank_of_label,
  sigmoid_cross_entropy,
)
from cover_jax.objectives import Encode, LossOutput, Objective, Shown, Stages, mean_over
from cover_jax.objectives.stages import staged
from data_pipelines.contract import SourceInfo, UserError
from data_pipelines.declared import number


def make(
  *,
  encode: Encode,
  heads: Heads,
  sources: Sequence[SourceInfo],
  stream: str = '',
  label_smoothing: Annotated[float, number(0, below=1)] = 0.0,
  mixup: Annotated[float, number(0)] = 0.0,
  cutmix: Annotated[float, number(0)] = 0.0,
) -> Objective:
  """Cross-entropy of the encoder's feature under the sample's own head, averaged over the sub-batch.

  The paper's blog post says "distributed to the corresponding classifier"; softmax cross-entropy with one
  linear layer a source is our choice. Of a source with several labels a clip it is the sum of the cross-entropies of
  its classes under a sigmoid (`heads.sigmoid_cross_entropy`).

  Args:
    encode: the encoder.
    heads: the heads of this stream's labelled sources.
    sources: the run's sources.
    stream: its name, for messages.
    label_smoothing: in [0, 1).
    mixup, cutmix: x of the Beta(x, x) of the shares in which clips of one source are mixed; 0 for none. The loss is
      the mean of both labels' losses in these shares; top-1 and top-5 are of the clip's own label.

  Returns:
    An objective that measures 'loss', 'top1' and 'top5', of several labels whether one of them is best, or among the
    best five. Unlabelled examples count as zero loss.

  Raises:
    UserError: by its loss, if no source of the stream has classes.
  """
  columns = head_columns(heads.class_counts, [s.name for s in sources])

  def show(batch, rng):
    if not heads.class_counts:  # here, not in `make`: an exported model without heads still encodes
      raise UserError(
        f'Stream {stream!r} learns by classification, but none of its sources has classes: look at the data with '
        '`python -m data_pipelines.inspect` (videos need a folder for each class), or give the stream another '
        'objective.'
      )
    clip_BxTxHxWx3, source_B = batch['views']['clip'], batch['source']
    if not (mixup or cutmix):
      return Shown({'clip': clip_BxTxHxWx3}, rng)
    rng, mix_rng = jax.random.split(rng)
    labelled_B = is_labelled(batch['label'], source_B, columns)  # or a label would be mixed with none
    if 'labels' in batch:
      labelled_B |= is_labelled(batch['labels'], source_B, columns)
    size = clip_BxTxHxWx3.shape[2:4]
    mix = mixing.draw(mix_rng, 2 * source_B + labelled_B, *size, mixup=mixup, cutmix=cutmix)
    return Shown({'clip': mixing.mixed_clip(mix, clip_BxTxHxWx3)}, rng, mix)

  def judge(params, state, batch, encoded, mix):
    label_B, labels_BxM, source_B = batch['label'], batch.get('labels'), batch['source']
    logits_BxK = heads.apply({'params': params['heads']}, encoded['clip'])
    smooth = {'label_smoothing': label_smoothing}

    def entropy(of):
      """Under the labels of the clips `of`: exactly 0 of each kind but the clip's own."""
      loss_B = cross_entropy(logits_BxK, label_B[of], source_B, columns, **smooth)
      if labels_BxM is not None:
        loss_B += sigmoid_cross_entropy(logits_BxK, labels_BxM[of], source_B, columns, **smooth)
      return loss_B

    loss_B = entropy(slice(None))
    if mix is not None:
      loss_B = mixing.mixed_loss(mix, loss_B, entropy(mix.partner_B))
    rank_B = rank_of_label(logits_BxK, label_B, source_B, columns)
    if labels_BxM is not None:
      rank_B = jnp.minimum(rank_B, rank_of_best_label(logits_BxK, labels_BxM, source_B, columns))
    measures = {'loss': loss_B, 'top1': rank_B < 1, 'top5': rank_B < 5}
    return LossOutput(mean_over(loss_B, batch['mask']), state, measures)

  return staged('classification', encode, Stages(show, judge))
