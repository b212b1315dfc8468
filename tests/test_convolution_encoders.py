"""R3D, MC3, R(2+1)D and S3D against torchvision's numbers (tests/data/make_torchvision_video.py); C3D and variants."""

import functools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models import encoder as encoders
from cover_jax.models.c3d import C3D
from cover_jax.models.resnet3d import ResNet3D
from cover_jax.models.s3d import S3D
from cover_jax.weights import convolution_layouts as layouts
from cover_jax.weights.common import convert, detect
from cover_jax.weights.huggingface import nest
from tests import encoder_parity as parity
from tests.torchvision_formula import GEOMETRY, array_of, clip_of, probe

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'data' / 'torchvision_video.json').read_text())['networks']
NETWORKS = {
  'r3d_18': (ResNet3D(kind='r3d'), layouts.R3D),
  'mc3_18': (ResNet3D(kind='mc3'), layouts.R3D),
  'r2plus1d_18': (ResNet3D(kind='r2plus1d'), layouts.R2PLUS1D),
  's3d': (S3D(), layouts.S3D),
}
# S3D takes a clip of 16 frames of 224, R3D has the most products.
EACH = [pytest.param(name, marks=pytest.mark.slow if name in ('s3d', 'r3d_18') else ()) for name in NETWORKS]


@functools.cache
def loaded(name):
  """(module, {'params', 'batch_stats', 'head'}) with the golden weights, read by our layout."""
  module, layout = NETWORKS[name]
  arrays = {k: array_of(k, tuple(shape)) for k, shape in GOLDEN[name]['shapes'].items()}
  assert detect('file', arrays) is layout
  weights = convert('file', arrays, layout)
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *GEOMETRY[name][1:2], 32, 32, 3)))
  shapes = nn.meta.unbox(variables)
  ours = nest({key: jnp.asarray(found.array) for key, found in weights.encoder.items()})
  trees = encoders.variables(ours)
  assert jax.tree.map(jnp.shape, trees) == jax.tree.map(jnp.shape, dict(shapes))
  (head,) = weights.heads.values()
  trees['head'] = {'kernel': head['kernel'].array, 'bias': head['bias'].array}
  return module, trees


def logits_of(module, params, head, batch_stats, x, train):
  encoded, moved = module.apply({'params': params, 'batch_stats': batch_stats}, x, train=train, mutable=['batch_stats'])
  return encoded.feature_BxD @ head['kernel'] + head['bias'], moved['batch_stats']


@pytest.mark.parametrize('name', EACH)
def test_logits_in_evaluation_are_torchvisions(name):
  module, trees = loaded(name)
  x = clip_of(GEOMETRY[name])
  with jax.default_matmul_precision('highest'):
    logits, stats = jax.jit(functools.partial(logits_of, module, train=False))(
      trees['params'], trees['head'], trees['batch_stats'], x
    )
  theirs = np.array(GOLDEN[name]['eval'])
  np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
  jax.tree.map(np.testing.assert_array_equal, stats, trees['batch_stats'])


def check_probes(name, found, golden, tolerance):
  """Compares arrays by two numbers each, in the order of torchvision's arrays."""
  for rule in NETWORKS[name][1].rules:
    if rule.theirs in golden:
      ours = np.asarray(parity.get(found, rule.ours.removeprefix('statistics/')))
      ours = ours if rule.axes is None else ours.transpose(np.argsort(rule.axes))
      norm, product = golden[rule.theirs]
      np.testing.assert_allclose(probe(ours), [norm, product], rtol=0, atol=tolerance * norm, err_msg=rule.theirs)


@pytest.mark.parametrize('name', EACH)
def test_training_mode_gives_torchvisions_logits_and_running_statistics(name):
  """In float32, where statistics of few clips let an error of S3D's first layers grow; gradients are in float64."""
  module, trees = loaded(name)
  with jax.default_matmul_precision('highest'):
    logits, stats = jax.jit(functools.partial(logits_of, module, train=True))(
      trees['params'], trees['head'], trees['batch_stats'], clip_of(GEOMETRY[name])
    )
  theirs = np.array(GOLDEN[name]['train'])
  np.testing.assert_allclose(logits, theirs, rtol=0, atol=(5e-5 if name == 's3d' else 1e-5) * np.abs(theirs).max())
  check_probes(name, stats, GOLDEN[name]['running'], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_gradients_in_training_mode_are_torchvisions(name):
  """In float64: float32 moves some activations to the other side of a ReLU, and gradients by some 1e-4 with them."""
  module, trees = loaded(name)
  shape = np.shape(GOLDEN[name]['train'])
  weights = np.arange(1.0, math.prod(shape) + 1).reshape(shape) / math.prod(shape)
  with jax.enable_x64(True):
    params, head, batch_stats = (
      jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), trees[k]) for k in ('params', 'head', 'batch_stats')
    )
    module, x = module.clone(dtype=jnp.float64), clip_of(GEOMETRY[name]).astype(np.float64)
    loss = lambda params: (logits_of(module, params, head, batch_stats, x, True)[0] * weights).sum()
    gradients = jax.device_get(jax.jit(jax.grad(loss))(params))
  check_probes(name, gradients, GOLDEN[name]['gradients'], 1e-6)


def test_frozen_statistics_are_used_in_training_and_stay():
  module = ResNet3D(**ResNet3D.DEBUG, freeze_statistics=True)
  x = clip_of((2, 4, 32))
  variables = nn.meta.unbox(module.init(jax.random.key(0), x))
  variables['batch_stats'] = jax.tree.map(lambda v: v + 0.5, variables['batch_stats'])
  run = lambda train: module.apply(variables, x, train=train, mutable=['batch_stats'])
  (trained, stats), (evaluated, _) = run(True), run(False)
  np.testing.assert_array_equal(trained.feature_BxD, evaluated.feature_BxD)
  jax.tree.map(np.testing.assert_array_equal, stats['batch_stats'], variables['batch_stats'])


@pytest.mark.parametrize(
  ('module', 'count'),
  [
    # torchvision's `num_params` without the classifier.
    (ResNet3D(kind='r3d'), 33_166_272),
    (ResNet3D(kind='mc3'), 11_490_240),
    (ResNet3D(kind='r2plus1d'), 31_300_125),
    (S3D(), 7_910_048),
    # VCOP's networks.
    (ResNet3D(kind='r3d', depths=(1, 1, 1, 1)), 14_361_792),
    (ResNet3D(kind='r2plus1d', depths=(1, 1, 1, 1), factoring='convolution'), 14_365_303),
    (C3D(), 27_661_440),
  ],
)
def test_numbers_of_parameters(module, count):
  assert parity.count(module, (1, 16, 32, 32, 3)) == count


@pytest.mark.parametrize(('kind', 'gflops'), [('r3d', 40.697), ('mc3', 43.343), ('r2plus1d', 40.519)])
def test_products_are_torchvisions_operations(kind, gflops):
  # Published for 16 frames of 112 with the classifier of 400 classes.
  operations = ResNet3D(kind=kind).products(16, (112, 112)) + 512 * 400
  assert operations / 1e9 == pytest.approx(gflops, abs=1e-3)


@pytest.mark.parametrize(('module', 'frames', 'side'), [(S3D(divide=16), 5, 17), (C3D(), 8, 16)])
def test_limits_are_where_nothing_is_left_of_a_clip(module, frames, side):
  shape = lambda t, s: jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((1, t, s, s, 3)))[0]
  assert not module.limits(frames, (side, side))
  assert math.prod(shape(frames, side).tokens_BxTxHxWxD.shape) > 0
  assert 'frames' in module.limits(frames - 1, (side, side))
  assert 'height' in module.limits(frames, (side, side - 1))
