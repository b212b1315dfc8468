"""VideoPrism against numbers of the released code; tests/data/videoprism_small.json says how they were made."""

import json
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cover_jax.models.pooling import AttentivePooling
from cover_jax.models.videoprism import VideoPrism
from cover_jax.weights.common import convert
from cover_jax.weights.layouts import Rule
from cover_jax.weights.video_layouts import VIDEOPRISM
from tests import encoder_parity as parity

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'data' / 'videoprism_small.json').read_text())
CASES = GOLDEN['cases']
MODEL = VideoPrism(
  patch_size=6, width=24, spatial_depth=2, temporal_depth=2, num_heads=3, mlp_dim=48, num_frames=4, image_size=30
)
POOLER = (
  Rule('query_token', 'atten_pooler/pooling_attention_query'),
  Rule('scale', 'atten_pooler/pooling_attention/per_dim_scale/per_dim_scale'),
  *(
    Rule(f'{which}/{ours}', f'atten_pooler/pooling_attention/{which}/{theirs}')
    for which in ('query', 'key', 'value')
    for ours, theirs in (('kernel', 'w'), ('bias', 'b'))
  ),
  Rule('out/kernel', 'atten_pooler/pooling_attention/post/w', (1, 2, 0)),
  Rule('out/bias', 'atten_pooler/pooling_attention/post/b'),
  Rule('norm/scale', 'atten_pooler/pooling_attention_layer_norm/scale', add=1.0),
  Rule('norm/bias', 'atten_pooler/pooling_attention_layer_norm/bias'),
)


def file_arrays() -> dict[str, np.ndarray]:
  def values(name, shape):
    n = np.arange(math.prod(shape))
    array = 0.7 * np.sin(0.37 * n + zlib.crc32(name.encode()) % 1000)
    plain = max(shape) == n.size or name.endswith(('/b', 'bias'))  # the query of [1, 24] counts as one-dimensional
    return (array / (1 if plain else math.sqrt(24))).reshape(shape).astype(np.float32)

  return {name: values(name, shape) for name, shape in GOLDEN['shapes'].items()}


def clip_of(case) -> jnp.ndarray:
  shape = (2, case['frames'], case['pixels'], case['pixels'], 3)
  i = np.arange(math.prod(shape), dtype=np.float64)
  return jnp.asarray((0.5 + 0.5 * np.sin(0.011 * i * (1 + i % 7))).reshape(shape), jnp.float32)


@pytest.fixture(scope='module')
def params():
  arrays = file_arrays()
  weights = convert('golden', arrays, VIDEOPRISM)
  encoder = parity.fill(MODEL, weights.encoder, jnp.zeros((1, 1, 6, 6, 3)))
  pooler = parity.fill(
    AttentivePooling(3), {r.ours: parity.Array(parity.ours(r, arrays[r.theirs])) for r in POOLER}, jnp.zeros((1, 2, 24))
  )
  head = {'kernel': arrays['projection/linear/kernel'], 'bias': arrays['projection/linear/bias']}
  return {'encoder': encoder, 'pooler': pooler, 'head': head}


def forward(params, clip):
  encoded = MODEL.apply({'params': params['encoder']}, clip)
  b, t, h, w, d = encoded.tokens_BxTxHxWxD.shape
  tokens = encoded.tokens_BxTxHxWxD.reshape(b, t * h * w, d)
  pooled = AttentivePooling(3).apply({'params': params['pooler']}, tokens)
  return tokens, pooled, pooled @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('case', CASES)
def test_tokens_pooled_features_and_logits_are_the_released_ones(params, case):
  golden = CASES[case]
  with jax.default_matmul_precision('highest'):
    tokens, pooled, logits = jax.jit(forward)(params, clip_of(golden))
  assert list(tokens.shape) == golden['tokens_shape']

  def close(ours, theirs):  # 1e-5 of the largest value
    np.testing.assert_allclose(ours, np.array(theirs), rtol=0, atol=1e-5 * np.abs(theirs).max())

  close(tokens[:, 0], golden['token_0_of_each'])
  close(tokens[:, -1], golden['token_last_of_each'])
  close(pooled, golden['pooled'])
  close(logits, golden['logits'])


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_the_released_ones(params, case):
  golden = CASES[case]
  labels = jnp.array([1, 3])
  loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(
    forward(params, clip_of(golden))[2], labels
  ).mean()
  with jax.default_matmul_precision('highest'):
    gradients = jax.jit(jax.grad(loss))(params)
  norms = {
    **{r.theirs: parity.norm(gradients['pooler'], r.ours) for r in POOLER},
    **{'encoder/' + r.theirs: parity.norm(gradients['encoder'], r.ours) for r in VIDEOPRISM.rules},
    'projection/linear/kernel': parity.norm(gradients['head'], 'kernel'),
    'projection/linear/bias': parity.norm(gradients['head'], 'bias'),
  }
  assert set(norms) == set(golden['gradient_norms'])
  # Sums that cancel to about nothing have no relative precision: the gradient of a key's bias is zero in theory.
  for name, norm in golden['gradient_norms'].items():
    assert norms[name] == pytest.approx(norm, rel=1e-4, abs=1e-8), name


def test_levels_are_the_tokens_after_a_layer_and_leave_the_rest_alone(params):
  clip = clip_of(CASES['same'])
  plain = MODEL.apply({'params': params['encoder']}, clip)
  levels = ('spatial2', 'temporal1')
  encoded = MODEL.apply({'params': params['encoder']}, clip, levels=levels)
  np.testing.assert_array_equal(encoded.feature_BxD, plain.feature_BxD)
  assert {k: v.shape for k, v in encoded.levels.items()} == dict.fromkeys(levels, (2, 4, 5, 5, 24))
  assert not np.allclose(encoded.levels['spatial2'], encoded.levels['temporal1'])


@pytest.mark.parametrize(
  ('fields', 'millions'),
  [
    ({}, 114),
    ({'width': 1024, 'spatial_depth': 24, 'num_heads': 16, 'mlp_dim': 4096, 'num_frames': 8}, 354),
  ],
)
def test_the_published_number_of_parameters(fields, millions):
  assert parity.count(VideoPrism(**fields), (1, 1, 18, 18, 3)) / 1e6 == pytest.approx(millions, abs=0.5)
