"""Multi-head classification: each sample is judged by the head of its own source (CoVeR)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cover_jax.models.heads import Heads, cross_entropy, head_columns, rank_of_label
from cover_jax.objectives import Encode, LossOutput, Objective
from data_pipelines.contract import SourceInfo


def make(*, encode: Encode, heads: Heads, sources: Sequence[SourceInfo], label_smoothing: float = 0.0) -> Objective:
  """Softmax cross-entropy of the class token under the sample's own head, averaged over the sub-batch.

  The paper's blog post says "distributed to the corresponding classifier"; softmax cross-entropy with one
  linear layer a source is our choice.

  Args:
    encode: the encoder.
    heads: the heads of this stream's labelled sources.
    sources: the run's sources.
    label_smoothing: in [0, 1).

  Returns:
    An objective that measures 'loss', 'top1' and 'top5'. Unlabelled examples count as zero loss.
  """
  columns = head_columns(heads.class_counts, [s.name for s in sources])

  def loss(params, state, batch, rng):
    tokens_BxSxD = encode(params['encoder'], batch['clip'], rng=rng)
    logits_BxK = heads.apply({'params': params['heads']}, tokens_BxSxD[:, 0])
    label_B, source_B = batch['label'], batch['source']
    loss_B = cross_entropy(logits_BxK, label_B, source_B, columns, label_smoothing=label_smoothing)
    rank_B = rank_of_label(logits_BxK, label_B, source_B, columns)
    measures = {'loss': loss_B, 'top1': rank_B < 1, 'top5': rank_B < 5}
    return LossOutput(jnp.mean(loss_B, where=batch['mask']), state, measures)

  return Objective(loss=jax.named_call(loss, name='classification'))
