"""One classifier per labelled source; the loss and rank of a sample within its source's classes.

A batch mixes samples of several sources. All heads score every sample, side by side in one matrix of logits,
and each sample is then judged within the columns of its own source only: arithmetic on static shapes, no
branch on data, and the gradient of the other heads is exactly zero.

What a sample is judged by stands in the batch, an entry for each kind of head: 'label' for a softmax over the classes,
'labels' for several labels a clip. A sample of another kind of source is unlabelled there (-1) and gives exactly 0. A
further kind of head is a further entry and a further such loss; `classification` adds them up.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cover_jax.models.encoder import Count, Encoded
from cover_jax.models.pooling import AttentiveBlock, AttentivePooling
from data_pipelines import declared
from data_pipelines.contract import UserError
from data_pipelines.declared import one_of, whole

# A finite stand-in for minus infinity: exp of it is exactly 0, and differences of two of them are not NaN.
_MASKED = -1e30


class HeadColumns(NamedTuple):
  """Which columns of the logits belong to each source of the run.

  Attributes:
    start: int32 [number of sources], the first column of the source's head.
    count: int32 [number of sources], its number of classes; 0 where the source has no head here.
  """

  start: np.ndarray
  count: np.ndarray


def head_columns(class_counts: Sequence[tuple[str, int]], sources: Sequence[str]) -> HeadColumns:
  """Where each source of the run finds its own classes in the logits of `Heads(class_counts)`.

  Args:
    class_counts: the field of `Heads`.
    sources: names of the run's sources; a batch's 'source' indexes this list. They need not all have a head.
  """
  ends = np.cumsum([count for _, count in class_counts], dtype=np.int32)
  columns = {name: (end - count, count) for (name, count), end in zip(class_counts, ends, strict=True)}
  start, count = np.array([columns.get(name, (0, 0)) for name in sources], np.int32).reshape(-1, 2).T
  return HeadColumns(start, count)


def linear(dtype: Any) -> None:
  """A linear layer on the encoder's own feature."""


def attentive(dtype: Any, num_heads: Count = 12) -> nn.Module:
  """A learned query looks at all tokens, then a linear layer: VideoPrism's frozen classifiers.

  Args:
    dtype: of the computation.
    num_heads: of its attention; must divide D. 12 in VideoPrism's B, 16 in L.
  """
  return AttentivePooling(num_heads, dtype, name='pooling')


def attentive_blocks(
  dtype: Any, depth: Annotated[int, whole(0)] = 3, num_heads: Count = 16, mlp_dim: Count = 4096
) -> nn.Module:
  """Layers of self-attention over the tokens, a query that looks at them, a linear layer: V-JEPA 2's classifiers.

  Args:
    dtype: of the computation.
    depth: layers of self-attention; 3 in V-JEPA 2's, 0 for none.
    num_heads: of all attention; must divide D.
    mlp_dim: hidden size of the MLPs.
  """
  return AttentiveBlock(depth, num_heads, mlp_dim, dtype=dtype, name='pooling')


# What makes a feature of what the encoder gives, before a linear classifier: {config.heads.all.name: function}.
KINDS = {'linear': linear, 'attentive': attentive, 'attentive_blocks': attentive_blocks}


def check(options: Mapping[str, Any], where: str) -> None:
  """Raises UserError if there is no head of that name, or it does not take the options."""
  if not isinstance(options, Mapping):
    raise UserError(f"{where} is {options!r}: expected a dict such as {{'name': 'attentive', 'num_heads': 12}}.")
  known = {'name': declared.Key('linear', one_of(*KINDS))}
  declared.check({key: value for key, value in options.items() if key == 'name'}, known, where)
  if 'name' not in options:
    raise UserError(f'{where} has no name: expected one of {", ".join(KINDS)}.')
  declared.check(options, known | declared.options_of(KINDS[options['name']]), where)


class Head(nn.Module):
  """One classifier; its linear layer starts at zero as ViT's does.

  Attributes:
    classes: K.
    kind: (name, value) of its options, of which 'name' is one of `KINDS`.
    first_bias: what the bias of every class starts at; see `Heads.first_bias`.
  """

  classes: int
  kind: tuple[tuple[str, Any], ...]
  first_bias: float = 0.0

  @nn.compact
  def __call__(self, encoded: Encoded) -> jax.Array:
    """What the encoder makes of B clips to float32 logits [B, K]."""
    options = dict(self.kind)
    feature_BxD, tokens_BxTxHxWxD = encoded.feature_BxD, encoded.tokens_BxTxHxWxD
    pooling = KINDS[options.pop('name')](tokens_BxTxHxWxD.dtype, **options)
    if pooling is not None:
      feature_BxD = pooling(tokens_BxTxHxWxD.reshape(len(feature_BxD), -1, tokens_BxTxHxWxD.shape[-1]))
    zeros = nn.initializers.zeros
    kernel_init = nn.with_logical_partitioning(zeros, ('embed', 'classes'))
    kernel_DxK = self.param('kernel', kernel_init, (feature_BxD.shape[-1], self.classes))
    bias_init = nn.with_logical_partitioning(nn.initializers.constant(self.first_bias), ('classes',))
    bias_K = self.param('bias', bias_init, (self.classes,))
    return feature_BxD.astype(jnp.float32) @ kernel_DxK + bias_K


class Heads(nn.Module):
  """One classifier per (name, number of classes).

  The parameters are {name: {'kernel': [D, K], 'bias': [K]}}, with 'pooling' beside them where a head looks at tokens;
  those of heads that are not in `class_counts` may be there and are left alone, so that a stream can use some of the
  run's heads.

  Attributes:
    class_counts: (name, K) of each head.
    kinds: (name, kind) of heads that are not linear; see `Head`.
    several_labels: names of heads whose sources have several labels an example: each class is asked for itself.
  """

  class_counts: tuple[tuple[str, int], ...]
  kinds: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
  several_labels: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, encoded: Encoded) -> jax.Array:
    """What the encoder makes of B clips to float32 logits [B, K], K the sum of the numbers of classes, in order."""
    if not self.class_counts:
      return jnp.zeros((len(encoded.feature_BxD), 0))
    kinds = dict(self.kinds)
    logits = [
      Head(count, kinds.get(name, (('name', 'linear'),)), self.first_bias(name), name=name)(encoded)
      for name, count in self.class_counts
    ]
    return jnp.concatenate(logits, axis=-1)

  def first_bias(self, name: str) -> float:
    """What the biases of a head start at: 0; of several labels such that each class has the probability 1 / K.

    So its loss begins where that of a softmax does, near log K, and not at K log 2 (ours; a prior in the bias is of Lin
    et al. 2017, "Focal Loss", section 4.1).
    """
    return -float(np.log(max(dict(self.class_counts)[name] - 1, 1))) if name in self.several_labels else 0.0

  def only(self, *names: str) -> 'Heads':
    """Those of the heads that have these names, in this order."""
    counts = dict(self.class_counts)
    return self.clone(class_counts=tuple((name, counts[name]) for name in names if name in counts))


def is_labelled(label_B: jax.Array, source_B: jax.Array, columns: HeadColumns) -> jax.Array:
  """Bool [B]: the sample has a label (>= 0) and its source has a head here.

  Of labels [B, M] in a sub-batch ('labels'): whether anything is known of them.
  """
  known_B = label_B >= 0 if label_B.ndim == 1 else (label_B >= 0).any(axis=-1)
  return known_B & (_of_source(columns.count, source_B) > 0)


def masked_logits(logits_BxK: jax.Array, source_B: jax.Array, columns: HeadColumns) -> jax.Array:
  """Float32 logits [B, K] with the columns of other sources' heads at -1e30: a softmax makes them exactly 0."""
  return jnp.where(_own_columns(logits_BxK, source_B, columns), logits_BxK.astype(jnp.float32), _MASKED)


def cross_entropy(
  logits_BxK: jax.Array,
  label_B: jax.Array,
  source_B: jax.Array,
  columns: HeadColumns,
  *,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Cross-entropy of each sample under the softmax of its own source's head.

  Args:
    logits_BxK: float, as `Heads` gives them.
    label_B: int32, the class within the sample's own source; -1 if unlabelled.
    source_B: int32, index into the run's list of sources.
    columns: of `head_columns`.
    label_smoothing: the share of the target that is spread evenly over all classes of the head.

  Returns:
    Float32 [B]; exactly 0, with zero gradient, for a sample without a label or without a head here, and NaN
    for a label that its head does not have: a dataset other than the one the head was made for must not train
    silently.
  """
  own_BxK = _own_columns(logits_BxK, source_B, columns)
  logits_BxK = masked_logits(logits_BxK, source_B, columns)
  count_B = _of_source(columns.count, source_B)
  true_B = jnp.sum(jnp.where(_label_column(logits_BxK, label_B, source_B, columns), logits_BxK, 0), axis=-1)
  mean_B = jnp.sum(jnp.where(own_BxK, logits_BxK, 0), axis=-1) / jnp.maximum(count_B, 1)
  target_B = (1 - label_smoothing) * true_B + label_smoothing * mean_B
  loss_B = jnp.where(label_B < count_B, jax.nn.logsumexp(logits_BxK, axis=-1) - target_B, jnp.nan)
  return jnp.where(is_labelled(label_B, source_B, columns), loss_B, 0)


def sigmoid_cross_entropy(
  logits_BxK: jax.Array,
  labels_BxM: jax.Array,
  source_B: jax.Array,
  columns: HeadColumns,
  *,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Binary cross-entropy of each sample, summed over the classes of its own source's head.

  A sum, so that a logit's gradient is (probability - target), as it is under a softmax, however many classes there are.

  Args:
    logits_BxK: float, as `Heads` gives them.
    labels_BxM: int8, a sub-batch's 'labels': 1, 0 or, where nobody knows, -1.
    source_B: int32, index into the run's list of sources.
    columns: of `head_columns`.
    label_smoothing: the share s of the target that is spread evenly over all classes: (1 - s) * label + s / classes.

  Returns:
    Float32 [B]; exactly 0, with zero gradient, for a sample of which no class is known (an unlabelled one, one of a
    source with one label an example) or without a head here, and NaN for a label that its head does not have.
  """
  known_BxK, label_BxK = _in_columns(logits_BxK, labels_BxM, source_B, columns)
  count_B = _of_source(columns.count, source_B)
  target_BxK = (1 - label_smoothing) * label_BxK + label_smoothing / jnp.maximum(count_B, 1)[:, None]
  logits_BxK = jnp.where(known_BxK, logits_BxK.astype(jnp.float32), 0)
  entropy_BxK = optax.sigmoid_binary_cross_entropy(logits_BxK, target_BxK)
  loss_B = jnp.sum(entropy_BxK, axis=-1, where=known_BxK)
  strange_BxM = (labels_BxM >= 0) & (jnp.arange(labels_BxM.shape[-1]) >= count_B[:, None])
  loss_B = jnp.where(strange_BxM.any(axis=-1), jnp.nan, loss_B)
  return jnp.where(is_labelled(labels_BxM, source_B, columns), loss_B, 0)


def rank_of_best_label(
  logits_BxK: jax.Array, labels_BxM: jax.Array, source_B: jax.Array, columns: HeadColumns
) -> jax.Array:
  """`rank_of_label` of that one of a sample's labels which its head scores highest; the arguments as above.

  Returns:
    Int32 [B]; the largest int32 for a sample without a label, or of whose labels a logit is NaN.
  """
  known_BxK, label_BxK = _in_columns(logits_BxK, labels_BxM, source_B, columns)
  is_label_BxK = known_BxK & (label_BxK > 0)
  # Of equal logits the lower class is first.
  best_B = jnp.argmax(jnp.where(is_label_BxK, logits_BxK.astype(jnp.float32), -jnp.inf), axis=-1)
  label_B = best_B - _of_source(columns.start, source_B)
  return rank_of_label(logits_BxK, jnp.where(is_label_BxK.any(axis=-1), label_B, -1), source_B, columns)


def rank_of_label(logits_BxK: jax.Array, label_B: jax.Array, source_B: jax.Array, columns: HeadColumns) -> jax.Array:
  """Rank of the true class among the classes of the sample's own head: 0 is best, so top-k means rank < k.

  Of equal logits the lower class is first, as in `jax.lax.top_k`: a head that scores all classes alike is
  right for class 0 only.

  Returns:
    Int32 [B]; the largest int32, which is in no top-k, for a sample without a label that its head has, or
    whose true logit is NaN.
  """
  is_label_BxK = _label_column(logits_BxK, label_B, source_B, columns)
  true_Bx1 = jnp.sum(jnp.where(is_label_BxK, logits_BxK, 0), axis=-1, keepdims=True)
  column_K = jnp.arange(logits_BxK.shape[-1])
  label_column_Bx1 = (_of_source(columns.start, source_B) + label_B)[:, None]
  # Written with <=, so that a NaN logit counts as greater.
  ahead_BxK = ~(logits_BxK <= true_Bx1) | ((logits_BxK == true_Bx1) & (column_K < label_column_Bx1))
  rank_B = jnp.sum(ahead_BxK & _own_columns(logits_BxK, source_B, columns), axis=-1, dtype=jnp.int32)
  ranked_B = is_label_BxK.any(axis=-1) & ~jnp.isnan(true_Bx1[:, 0])
  return jnp.where(ranked_B, rank_B, jnp.iinfo(jnp.int32).max)


def _of_source(per_source: np.ndarray, source_B: jax.Array) -> jax.Array:
  """The entry of each sample's source; 0 for a source that the run does not have."""
  return jnp.asarray(per_source).at[source_B].get(mode='fill', fill_value=0)


def _own_columns(logits_BxK: jax.Array, source_B: jax.Array, columns: HeadColumns) -> jax.Array:
  """Bool [B, K]: the columns of the head of the sample's own source."""
  start_Bx1 = _of_source(columns.start, source_B)[:, None]
  count_Bx1 = _of_source(columns.count, source_B)[:, None]
  column_K = jnp.arange(logits_BxK.shape[-1])
  return (column_K >= start_Bx1) & (column_K < start_Bx1 + count_Bx1)


def _in_columns(
  logits_BxK: jax.Array, labels_BxM: jax.Array, source_B: jax.Array, columns: HeadColumns
) -> tuple[jax.Array, jax.Array]:
  """A sub-batch's 'labels' as the logits lie: (bool [B, K], what is known; float32 [B, K], 1 where it is a label)."""
  class_BxK = jnp.arange(logits_BxK.shape[-1]) - _of_source(columns.start, source_B)[:, None]
  of_class = {'mode': 'fill', 'fill_value': -1}
  label_BxK = jnp.take_along_axis(labels_BxM, jnp.maximum(class_BxK, 0), axis=-1, **of_class)
  known_BxK = (label_BxK >= 0) & _own_columns(logits_BxK, source_B, columns)
  return known_BxK, (label_BxK > 0).astype(jnp.float32)


def _label_column(logits_BxK: jax.Array, label_B: jax.Array, source_B: jax.Array, columns: HeadColumns) -> jax.Array:
  """Bool [B, K]: True at the true class, nowhere if the sample's head does not have its label."""
  label_column_B = _of_source(columns.start, source_B) + label_B
  is_label_BxK = jnp.arange(logits_BxK.shape[-1]) == label_column_B[:, None]
  return is_label_BxK & _own_columns(logits_BxK, source_B, columns)
