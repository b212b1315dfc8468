"""Weights of other codebases as our parameters and back, in numpy only. Nothing that is read can run code."""

from cover_jax.weights.common import Found, Weights
from cover_jax.weights.files import is_own, read
from cover_jax.weights.huggingface import from_hf_timesformer, to_hf_timesformer

__all__ = ['Found', 'Weights', 'from_hf_timesformer', 'is_own', 'read', 'to_hf_timesformer']
