"""LayerNorm and GELU: the function of Flax's and of the definition, gradients against JAX's own and float64."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models import pointwise

DTYPES = pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])


def draw(*shape, seed=0, scale=1.0):
  return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(np.float32)


def norms(dtype):
  """(ours, Flax's, parameters, input far from zero, cotangent)."""
  ours, flaxs = pointwise.layer_norm('norm', dtype), nn.LayerNorm(epsilon=1e-6, dtype=dtype)
  params = {'scale': 1 + draw(48, seed=1, scale=0.3), 'bias': draw(48, seed=2)}
  x = jnp.asarray(2 + 3 * draw(5, 7, 48), dtype)
  return ours, flaxs, params, x, jnp.asarray(draw(5, 7, 48, seed=3), dtype)


@DTYPES
def test_layer_norm_is_flaxs(dtype):
  ours, flaxs, params, x, _ = norms(dtype)
  apply = lambda module: np.asarray(jax.jit(module.apply)({'params': params}, x), np.float32)
  assert ours.apply({'params': params}, x).dtype == dtype
  np.testing.assert_array_equal(apply(ours), apply(flaxs))
  made = nn.meta.unbox(ours.init(jax.random.key(0), x)['params'])
  assert {k: (v.shape, v.dtype, float(v.sum())) for k, v in made.items()} == {
    'scale': ((48,), jnp.float32, 48.0),
    'bias': ((48,), jnp.float32, 0.0),
  }


@DTYPES
def test_gradient_of_layer_norm(dtype):
  ours, flaxs, params, x, d_y = norms(dtype)
  gradient = lambda module: jax.vjp(lambda p, x: module.apply({'params': p}, x), params, x)[1](d_y)
  (d_params, d_x), (expected, expected_x) = gradient(ours), gradient(flaxs)
  assert d_x.dtype == dtype and d_params['scale'].dtype == jnp.float32
  rounding = 2e-6 if dtype == jnp.float32 else 0.02
  np.testing.assert_allclose(d_x.astype(jnp.float32), expected_x.astype(jnp.float32), rtol=rounding, atol=rounding)
  for name in ('scale', 'bias'):
    np.testing.assert_allclose(d_params[name], expected[name], rtol=1e-5, atol=1e-5)
  # In float64, by the chain rule and by hand.
  x64, g = np.asarray(x, np.float64), np.asarray(d_y, np.float64) * params['scale'].astype(np.float64)
  centred = x64 - x64.mean(-1, keepdims=True)
  spread = np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
  by_hand = (g - g.mean(-1, keepdims=True)) / spread - centred * (g * centred).mean(-1, keepdims=True) / spread**3
  np.testing.assert_allclose(d_x.astype(jnp.float32), by_hand, rtol=rounding, atol=rounding)


def test_rows_that_are_constant_are_finite():
  ours, _, params, _, _ = norms(jnp.float32)
  value, gradient = jax.value_and_grad(lambda x: ours.apply({'params': params}, x).sum())(jnp.full((2, 48), 3.0))
  assert np.isfinite(value) and np.isfinite(gradient).all()


@DTYPES
def test_gradient_of_gelu(dtype):
  x = jnp.asarray(np.linspace(-12, 12, 4001), dtype)
  found = jax.vmap(jax.grad(pointwise.gelu))(x)
  x64 = np.asarray(x, np.float64)
  below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x64])
  expected = below + x64 * np.exp(-(x64**2) / 2) / math.sqrt(2 * math.pi)
  np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=5e-7 if dtype == jnp.float32 else 4e-3)
  assert found.dtype == dtype


def test_what_is_kept_has_the_dtype_of_the_computation():
  """In a loop over blocks, whatever is kept is written to memory and read again."""
  x = jax.ShapeDtypeStruct((4, 48), jnp.bfloat16)
  params = {'scale': jnp.ones(48), 'bias': jnp.zeros(48)}
  of_norm = lambda x: pointwise.layer_norm('norm', jnp.bfloat16).apply({'params': params}, x)
  for function in (of_norm, pointwise.gelu):
    kept = jax.tree.leaves(jax.eval_shape(lambda x, f=function: jax.vjp(f, x)[1], x))
    assert [k.dtype for k in kept if k.shape == x.shape] == [jnp.bfloat16]
