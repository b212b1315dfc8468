"""Linen modules and pure functions of arrays; nothing here knows of datasets, devices or training."""

from cover_jax.models.heads import Heads
from cover_jax.models.timesformer import TimeSformer

__all__ = ['LOGICAL_AXES', 'Heads', 'TimeSformer']

# Every axis name that a parameter or a constraint of the models uses. A mesh's rules must name each of them:
# Flax replicates an axis without a rule, silently.
LOGICAL_AXES = frozenset({'batch', 'layers', 'embed', 'embed_out', 'norm', 'heads', 'head_dim', 'mlp', 'classes'})
