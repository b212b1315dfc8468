"""The encoder: size, invariants at initialisation, options that must not change it, any clip geometry."""

import functools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cover_jax.models import LOGICAL_AXES, Heads, TimeSformer
from cover_jax.models.attention import attend, attention_probabilities, rows_together
from cover_jax.models.pointwise import gelu
from cover_jax.models.timesformer import resize_position_embedding, resize_time_embedding
from cover_jax.models.transformer import drop_path
from tests.encoder_parity import sequence

ATTENTIONS = ('divided', 'joint', 'space')
SMALL = TimeSformer(patch_size=8, width=32, depth=2, num_heads=4, mlp_dim=64, num_frames=4, image_size=32)


def random_clip(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


# Half the time to compile, the same program.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
key = partial(jax.random.key, impl='rbg')  # cheaper to compile than the default


def abstract_params(model, frames=4):
  return nn.meta.unbox(jax.eval_shape(model.init, key(0), jnp.zeros((1, frames, 32, 32, 3))))['params']


@functools.cache
def encoder(model, **kwargs):
  return jit(partial(model.apply, **kwargs))


def encode(model, params, clip, **kwargs):
  return sequence(encoder(model, **kwargs)({'params': params}, clip))


@pytest.fixture(scope='module')
def initial():
  """Parameters of a new divided model; a space model finds its own among them."""
  return nn.meta.unbox(jit(SMALL.init)(key(0), jnp.zeros((1, 4, 32, 32, 3))))['params']


@pytest.fixture(scope='module')
def trained():
  """Parameters of which none is zero, as after training, by attention type."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    noise = 0.2 * rng.normal(size=x.shape).astype(np.float32)
    return noise + (path[-1].key == 'scale')

  return {a: jax.tree.map_with_path(draw, abstract_params(SMALL.clone(attention=a))) for a in ATTENTIONS}


def count_parameters(classes, **fields):
  encoder = TimeSformer(**fields)
  clip = jax.ShapeDtypeStruct((1, encoder.num_frames, encoder.image_size, encoder.image_size, 3), jnp.float32)
  encoded, made = jax.eval_shape(encoder.init_with_output, key(0), clip)
  shapes = [made, jax.eval_shape(Heads((('source', classes),)).init, key(0), encoded)]
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  ('millions', 'count', 'classes', 'fields'),
  [
    # CoVeR's figures count a 400-way head, those of the TimeSformer paper's Table 1 (121.4 M, 85.9 M) the 174 of SSv2.
    (121.57, 121_566_352, 400, {}),
    (121.39, 121_392_558, 174, {}),
    (85.94, 85_938_606, 174, {'attention': 'joint'}),
    (85.93, 85_932_462, 174, {'attention': 'space'}),
    (
      430.33,
      430_331_280,
      400,
      {'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096, 'num_frames': 16, 'image_size': 448},
    ),
  ],
)
def test_parameter_counts_are_the_published_ones(millions, count, classes, fields):
  assert count_parameters(classes, **fields) == count
  assert round(count / 1e6, 2) == millions


def test_parameter_names_and_initial_values(initial):
  flat = {'/'.join(k.key for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(initial)}
  attention = {f'{p}/{leaf}' for p in ('query', 'key', 'value', 'out') for leaf in ('kernel', 'bias')}
  norms = {f'{name}/{leaf}' for name in ('norm_time', 'norm_space', 'norm_mlp') for leaf in ('scale', 'bias')}
  dense = {f'{name}/{leaf}' for name in ('temporal_fc', 'mlp/hidden', 'mlp/out') for leaf in ('kernel', 'bias')}
  blocks = {f'attention_{a}/{leaf}' for a in ('time', 'space') for leaf in attention} | norms | dense
  other = {'patch_embedding/kernel', 'patch_embedding/bias', 'class_token', 'position_embedding', 'time_embedding'}
  assert set(flat) == {f'blocks/{name}' for name in blocks} | other | {'norm/scale', 'norm/bias'}
  assert all(x.dtype == jnp.float32 for x in flat.values())
  assert all(x.shape[0] == SMALL.depth for name, x in flat.items() if name.startswith('blocks/'))
  assert flat['blocks/attention_time/query/kernel'].shape == (2, 32, 4, 8)
  assert flat['blocks/attention_time/out/kernel'].shape == (2, 4, 8, 32)
  for name, x in flat.items():
    if name.endswith('bias') or name == 'time_embedding' or 'temporal_fc' in name:
      assert not x.any(), name
    elif name.endswith('scale'):
      assert (x == 1).all(), name
    elif name != 'patch_embedding/kernel':
      assert 0.012 < x.std() < 0.024, name
      assert abs(x).max() <= 0.041, name
  kernel = flat['blocks/attention_space/query/kernel']
  assert not np.array_equal(kernel[0], kernel[1])  # each block draws its own
  assert 'time_embedding' not in abstract_params(SMALL.clone(attention='space'))
  assert 'temporal_fc' not in abstract_params(SMALL.clone(attention='joint'))['blocks']


def test_every_parameter_names_its_axes():
  used = set()
  for attention in ATTENTIONS:
    model, clip = SMALL.clone(attention=attention), jnp.zeros((1, 4, 32, 32, 3))
    encoded, encoder = jax.eval_shape(model.init_with_output, key(0), clip)
    heads = jax.eval_shape(Heads((('a', 3),)).init, key(0), encoded)
    for tree in (encoder, heads):
      is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
      for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_box):
        assert is_box(leaf), path
        assert len(leaf.names) == leaf.value.ndim, path
        assert (leaf.names[0] == 'layers') == (getattr(path[1], 'key', None) == 'blocks'), path
        used |= set(leaf.names) - {None}
  assert used | {'batch'} == LOGICAL_AXES


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices, real or fake')
def test_eight_devices(trained):
  """Parameters and activations are split as the rules say, and the function stays the same."""
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'tensor'), (jax.sharding.AxisType.Auto,) * 3)
  rules = dict.fromkeys(sorted(LOGICAL_AXES)) | {
    'batch': ('data', 'fsdp'),
    'embed': 'fsdp',
    'heads': 'tensor',
    'mlp': 'tensor',
  }
  rules = list(rules.items())
  clip = random_clip(4, 4, 32, 32)
  boxed = jax.eval_shape(SMALL.init, key(0), clip)['params']
  shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
  assert shardings['blocks']['attention_time']['query']['kernel'].spec == P(None, 'fsdp', 'tensor', None)
  assert shardings['blocks']['mlp']['out']['kernel'].spec == P(None, 'tensor', 'fsdp')
  params = jax.device_put(trained['divided'], shardings)
  sharded_clip = jax.device_put(clip, jax.NamedSharding(mesh, P(('data', 'fsdp'))))

  def lower():  # a new function each time: traces are cached, and not by the rules
    return jit(lambda params, clip: SMALL.apply({'params': params}, clip)).lower(params, sharded_clip)

  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    # The initialisers work under a mesh too.
    jax.eval_shape(SMALL.init, key(0), clip)
    lowered = lower()
  constraints = [line for line in lowered.as_text().splitlines() if 'sharding_constraint' in line]
  # In the block, and after the last one.
  assert sum('[{"data", "fsdp"}, {}, {}]> : tensor<4x65x32xf32>' in line for line in constraints) == 2
  encoded = lowered.compile()(params, sharded_clip)
  assert encoded.feature_BxD.sharding.spec == P(('data', 'fsdp'))
  np.testing.assert_allclose(sequence(encoded), encode(SMALL, trained['divided'], clip), atol=1e-5)
  # Without a mesh and rules there is no trace of them.
  assert 'sharding_constraint' not in lower().as_text()


@pytest.mark.parametrize('attention', ['divided', 'space'])
def test_repeated_frame_is_the_frame_at_initialisation(attention, initial):
  model, params = SMALL.clone(attention=attention), initial
  frame = random_clip(2, 1, 32, 32)
  image = encode(model, params, frame)
  clip = encode(model, params, np.repeat(frame, 4, axis=1))
  assert image.shape == (2, 1 + 16, 32)
  assert clip.shape == (2, 1 + 16 * 4, 32)
  np.testing.assert_allclose(clip[:, 0], image[:, 0], atol=1e-5)
  np.testing.assert_allclose(clip[:, 1:], np.repeat(image[:, 1:], 4, axis=1), atol=1e-5)
  # Not because it ignores its input.
  assert np.abs(np.asarray(encode(model, params, random_clip(2, 1, 32, 32, seed=9)) - image)).max() > 0.01


def test_divided_is_the_space_model_of_an_image_at_initialisation(initial):
  image = random_clip(2, 1, 32, 32)
  want = encode(SMALL.clone(attention='space'), initial, image)
  np.testing.assert_allclose(encode(SMALL, initial, image), want, atol=1e-5)


def test_token_order_is_place_then_frame(initial):
  """Where no block mixes tokens, a change in one patch of one frame shows in one token."""
  params = {**initial, 'blocks': jax.tree.map(jnp.zeros_like, initial['blocks'])}
  clip = random_clip(1, 4, 32, 32)
  changed = clip.copy()
  changed[0, 2, 8:16, 16:24] += 1  # frame 2, row 1, column 2 of a 4 x 4 grid
  difference = np.abs(encode(SMALL, params, changed) - encode(SMALL, params, clip)).max(-1)[0]
  assert np.flatnonzero(difference).tolist() == [1 + (1 * 4 + 2) * 4 + 2]


def test_order_of_frames_matters_only_to_models_of_time(trained):
  clip = random_clip(1, 4, 32, 32)
  shuffled = clip[:, [2, 0, 3, 1]]
  for attention in ATTENTIONS:
    model = SMALL.clone(attention=attention)
    difference = encode(model, trained[attention], clip)[:, 0] - encode(model, trained[attention], shuffled)[:, 0]
    assert (np.abs(difference).max() > 1e-3) == (attention != 'space'), attention
  # Without a time embedding no attention knows the order.
  timeless = {**trained['divided'], 'time_embedding': np.zeros((1, 4, 32), np.float32)}
  difference = encode(SMALL, timeless, clip)[:, 0] - encode(SMALL, timeless, shuffled)[:, 0]
  assert np.abs(difference).max() < 1e-4


def test_clips_of_a_batch_do_not_meet(trained):
  clip = random_clip(3, 4, 32, 32)
  for attention in ATTENTIONS:
    model = SMALL.clone(attention=attention)
    together = encode(model, trained[attention], clip)
    np.testing.assert_allclose(together[1:2], encode(model, trained[attention], clip[1:2]), atol=1e-5)


@pytest.fixture(scope='module')
def dropping_gradients(trained):
  """A function of options: value and gradients of a loss under stochastic depth."""
  clip = random_clip(8, 2, 16, 16)

  def value_and_grad(**options):
    model = SMALL.clone(drop_path=0.3, **options)
    apply = partial(model.apply, train=True, rngs={'drop_path': key(5)})
    loss = lambda params: jnp.sum(apply({'params': params}, clip).feature_BxD ** 3)
    return jit(jax.value_and_grad(loss))(trained['divided'])

  return functools.cache(value_and_grad)


@pytest.mark.parametrize(
  'options',
  [
    pytest.param({'scan_unroll': 2}, marks=pytest.mark.slow),
    {'tokens_together': 0},
    {'remat': 'dots'},
    {'remat': 'full', 'scan_unroll': 2},
  ],
  ids=str,
)
def test_unrolling_and_rematerialisation_change_nothing(options, dropping_gradients):
  (value, grads), (other_value, other_grads) = dropping_gradients(), dropping_gradients(**options)
  np.testing.assert_allclose(other_value, value, rtol=1e-5)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), other_grads, grads)


def test_every_parameter_of_every_block_gets_gradient(dropping_gradients):
  _, grads = dropping_gradients()
  for path, g in jax.tree.leaves_with_path(grads):
    assert np.isfinite(g).all(), path
    assert all(layer.any() for layer in (g if path[0].key == 'blocks' else g[None])), path


def test_image_runs_or_skips_temporal_attention(trained):
  params, image = trained['divided'], random_clip(2, 1, 32, 32)
  skip = SMALL.clone(image_temporal='skip')
  loss = lambda params: jnp.sum(sequence(SMALL.apply({'params': params}, image)) ** 3)
  grads = jit(jax.grad(loss))(params)['blocks']
  for name in ('query', 'key'):
    for g in jax.tree.leaves(grads['attention_time'][name]):
      np.testing.assert_array_equal(g, 0)
  assert all(np.any(g) for n in ('value', 'out') for g in jax.tree.leaves(grads['attention_time'][n]))
  assert np.any(grads['temporal_fc']['kernel'])

  # Skipping is what a model whose temporal_fc is zero does; running is not.
  silent = {
    **params,
    'blocks': {**params['blocks'], 'temporal_fc': jax.tree.map(jnp.zeros_like, params['blocks']['temporal_fc'])},
  }
  want = encode(SMALL, silent, image)
  np.testing.assert_allclose(encode(skip, params, image), want, atol=1e-5)
  assert np.abs(encode(SMALL, params, image) - want).max() > 1e-2
  # It concerns images only.
  clip = random_clip(1, 2, 32, 32)
  np.testing.assert_array_equal(encode(skip, params, clip), encode(SMALL, params, clip))
  assert jax.tree.structure(abstract_params(skip, frames=1)) == jax.tree.structure(params)


def test_query_and_key_of_an_image_cost_nothing():
  def flops(model):
    shapes = jax.eval_shape(model.init, key(0), jnp.zeros((1, 1, 32, 32, 3)))
    clip = jax.ShapeDtypeStruct((8, 1, 32, 32, 3), jnp.float32)
    return jit(model.apply).lower(nn.meta.unbox(shapes), clip).compile().cost_analysis()['flops']

  # Value, output and temporal_fc, not five projections (the cost of a loop counts its body once).
  projection = 2 * 8 * 16 * 32 * 32
  extra = (flops(SMALL) - flops(SMALL.clone(image_temporal='skip'))) / projection
  assert 3 <= extra < 3.9


def test_bfloat16_is_close_to_float32(trained):
  clip, params = random_clip(2, 4, 32, 32), trained['divided']
  want = np.asarray(encode(SMALL, params, clip))
  got = encode(SMALL.clone(dtype=jnp.bfloat16), params, clip)
  assert got.dtype == jnp.bfloat16
  error = np.abs(np.asarray(got, np.float32) - want)
  assert 0 < error.mean() < 0.03 * np.abs(want).mean()


def dense_attention(q, k, v, part):
  """Attention within parts of `part` tokens as one masked softmax, in the dtype of the arguments."""
  index = np.arange(q.shape[2]) // part
  logits = jnp.einsum('rhlk,rhmk->rhlm', q, k) / np.sqrt(q.shape[-1])
  probs = jax.nn.softmax(jnp.where(index[:, None] == index, logits, -jnp.inf))
  return jnp.einsum('rhlm,rhmk->rhlk', probs, v), probs


def test_softmax_is_float32_and_exact():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 3, 300, 8)).astype(np.float32) * 2
  want, want_probs = dense_attention(q, k, v, 300)
  context, probs = jit(partial(attend, part=300))(q, k, v), attention_probabilities(q, k)
  np.testing.assert_allclose(context, want, atol=1e-5)
  np.testing.assert_allclose(probs, want_probs, atol=1e-6)
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  context, probs = attend(*low, 300), attention_probabilities(*low[:2])
  assert (context.dtype, probs.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)  # bfloat16 sums of 300 terms would miss by 1e-2
  want, _ = dense_attention(*(x.astype(np.float32) for x in low), 300)
  assert np.abs(context.astype(np.float32) - want).max() < 2**-7 * np.abs(want).max()
  # Logits that overflow exp.
  assert np.isfinite(attend(q * 1e4, k * 1e4, v, 300)).all()


@pytest.mark.parametrize(('length', 'part'), [(24, 24), (24, 8), (21, 17), (5, 1), (9, 4)])
def test_attention_within_parts_and_its_written_gradient(length, part):
  """The gradient is written out, not derived: it is that of a masked softmax."""
  rng = np.random.default_rng(0)
  q, k, v, ct = rng.normal(size=(4, 2, 3, length, 8)).astype(np.float32) * 2
  want, pullback = jax.vjp(lambda *x: dense_attention(*x, part)[0], q, k, v)
  got, own_pullback = jax.vjp(partial(attend, part=part), q, k, v)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for mine, derived in zip(own_pullback(ct), pullback(ct), strict=True):
    np.testing.assert_allclose(mine, derived, atol=2e-5)


def test_logits_are_computed_twice_on_tpus_only():
  """There it is cheaper than memory; on other platforms the second product would be waste."""
  x = jax.ShapeDtypeStruct((2, 3, 16, 8), jnp.float32)
  traced = jax.jit(partial(attend, part=16)).trace(x, x, x)
  count = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count('optimization_barrier')
  assert count('tpu') == 3  # before and after the maximum, and after the product with the values
  assert count('cpu') == count('cuda') == 0
  products = traced.lower().compile().as_text().count(' dot(')
  assert products == 2


def test_rows_together():
  assert rows_together(196, 8) == 14  # 112 tokens
  assert rows_together(196, 16) == 7
  assert rows_together(784, 16) == 8  # 448 pixels, 128 tokens
  assert rows_together(197, 8) == 1  # a prime
  assert rows_together(196, 96) == 1
  assert rows_together(196, 200) == 1
  assert rows_together(4, 1) == 4


@pytest.mark.parametrize('attention', ['divided', 'space'])
def test_padded_rows_change_nothing(attention):
  """Frames of 144 patches and a class token are padded to 152 tokens, and these to no token of the result."""
  model = TimeSformer(
    patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=16, num_frames=2, image_size=48, attention=attention
  )
  rng = np.random.default_rng(0)
  shapes = nn.meta.unbox(jax.eval_shape(model.init, key(0), jnp.zeros((1, 2, 48, 48, 3))))['params']
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
  clip = random_clip(1, 2, 48, 48)
  loss = lambda params, clip: jnp.sum(model.apply({'params': params}, clip).feature_BxD ** 3)
  value, grads = jit(jax.value_and_grad(loss))(params, clip)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('cover_jax.models.attention._LANES', 10**6)  # no padding, and all places together
    want, want_grads = jit(jax.value_and_grad(lambda *x: loss(*x)))(params, clip)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(want_grads))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * largest), grads, want_grads)


def test_gelu_is_exact():
  x = np.linspace(-9, 9, 2001)
  want = x / 2 * (1 + np.vectorize(math.erf)(x / 2**0.5))
  np.testing.assert_allclose(gelu(x.astype(np.float32)), want, rtol=1e-6, atol=1e-6)
  low = x.astype(jnp.bfloat16)  # numpy's
  rounded = low.astype(np.float64)
  want = rounded / 2 * (1 + np.vectorize(math.erf)(rounded / 2**0.5))
  np.testing.assert_allclose(np.asarray(gelu(low), np.float32), want, rtol=2**-8, atol=1e-6)  # one rounding


def test_drop_path_statistics():
  x = jnp.ones((4000, 3, 2))
  y = np.asarray(drop_path(x, 0.25, key(0)))
  kept = y[:, 0, 0] != 0
  assert abs(kept.mean() - 0.75) < 0.03
  np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)  # whole rows
  np.testing.assert_array_equal(y[~kept], 0)
  np.testing.assert_array_equal(drop_path(x, 0.0, key(0)), x)
  assert drop_path(x.astype(jnp.bfloat16), jnp.float32(0.1), key(0)).dtype == jnp.bfloat16


def test_drop_path_in_the_model(trained):
  model, params, clip = SMALL.clone(drop_path=0.5), trained['divided'], random_clip(2, 4, 32, 32)
  apply = jit(lambda params, key: sequence(model.apply({'params': params}, clip, train=True, rngs={'drop_path': key})))
  train = lambda seed: apply(params, key(seed))
  first = train(0)
  np.testing.assert_array_equal(train(0), first)
  assert np.abs(train(1) - first).max() > 0
  # Evaluation neither drops nor needs a key.
  np.testing.assert_array_equal(encode(model, params, clip), encode(SMALL, params, clip))
  np.testing.assert_array_equal(encode(SMALL, params, clip, train=True), encode(SMALL, params, clip))
  # The first block drops nothing.
  still = {**params, 'blocks': jax.tree.map(lambda x: np.stack([x[0], 0 * x[1]]), params['blocks'])}
  np.testing.assert_allclose(apply(still, key(0)), encode(SMALL, still, clip), atol=1e-5)


def test_dropped_temporal_path_still_passes_the_bias_of_temporal_fc(trained):
  """As released: the path is dropped before temporal_fc."""
  params = jax.tree.map(jnp.zeros_like, trained['divided'])
  params['blocks']['temporal_fc']['bias'] = jnp.zeros((2, 32)).at[1].set((-1.0) ** jnp.arange(32))
  params['norm']['scale'] = jnp.ones(32)
  apply = partial(SMALL.clone(drop_path=0.9).apply, train=True, rngs={'drop_path': key(0)})
  encoded = jit(apply)({'params': params}, random_clip(1, 4, 32, 32))
  np.testing.assert_allclose(np.abs(encoded.tokens_BxTxHxWxD), 1, atol=1e-4)
  np.testing.assert_array_equal(encoded.feature_BxD, 0)


def test_embeddings_resize():
  rng = np.random.default_rng(0)
  position, time = rng.normal(size=(1, 1 + 16, 3)), rng.normal(size=(1, 8, 3))
  assert resize_position_embedding(position, (4, 4)) is position
  assert resize_time_embedding(time, 8) is time
  np.testing.assert_allclose(resize_time_embedding(time, 1), (time[:, 3:4] + time[:, 4:5]) / 2, rtol=1e-5)
  np.testing.assert_allclose(resize_time_embedding(time[:, :1], 5), np.repeat(time[:, :1], 5, axis=1), rtol=1e-6)
  # A linear ramp stays one, rows apart from columns, and the class token stays what it was.
  row, column = np.mgrid[:4, :4]
  ramp = np.concatenate([[[9.0, 9.0]], np.stack([row.ravel(), column.ravel()], -1)])[None]
  resized = np.asarray(resize_position_embedding(ramp, (8, 2)))
  assert resized.shape == (1, 1 + 16, 2)
  np.testing.assert_array_equal(resized[0, 0], [9, 9])
  grid = resized[0, 1:].reshape(8, 2, 2)
  np.testing.assert_allclose(grid[:, 0, 0], np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3), atol=1e-6)
  np.testing.assert_allclose(grid[0, :, 1], [0.5, 2.5], atol=1e-6)


@pytest.mark.parametrize(
  ('attention', 'shape'),
  [('divided', (1, 4, 64, 32)), ('divided', (2, 1, 8, 8)), *((a, (1, 7, 16, 24)) for a in ATTENTIONS)],
)
def test_any_geometry(attention, shape, trained):
  tokens = encode(SMALL.clone(attention=attention), trained[attention], random_clip(*shape))
  assert tokens.shape == (shape[0], 1 + shape[1] * (shape[2] // 8) * (shape[3] // 8), 32)
  assert np.isfinite(tokens).all()


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_attention_is_kept_on_request_and_free_otherwise(attention, trained):
  model, clip = SMALL.clone(attention=attention), random_clip(2, 4, 32, 32)
  variables = {'params': trained[attention]}
  plain = jit(model.apply).lower(variables, clip).compile()
  keep = jit(partial(model.apply, mutable=['attention'])).lower(variables, clip).compile()
  encoded, kept = keep(variables, clip)
  probs = kept['attention']['blocks']
  shapes = {
    'divided': {'time': (2, 2, 16, 4, 4, 4), 'space': (2, 2, 4, 4, 17, 17)},
    'joint': {'space': (2, 2, 1, 4, 65, 65)},
    'space': {'space': (2, 2, 4, 4, 17, 17)},
  }[attention]
  assert {name: x.shape for name, x in probs.items()} == shapes
  for x in probs.values():
    np.testing.assert_allclose(x.sum(-1), 1, atol=1e-5)
    assert x.std() > 1e-3
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), encoded, plain(variables, clip))
  # One division a probability less in the body of the loop.
  entries = sum(int(np.prod(shape[1:])) for shape in shapes.values())
  assert plain.cost_analysis()['flops'] <= keep.cost_analysis()['flops'] - entries
  # And a table of two addresses.
  assert plain.memory_analysis().output_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(encoded)) + 16


def test_kept_attention_survives_rematerialisation(trained):
  variables, clip = {'params': trained['divided']}, random_clip(1, 4, 32, 32)
  want, got = (
    jit(partial(model.apply, mutable=['attention']))(variables, clip)[1] for model in (SMALL, SMALL.clone(remat='full'))
  )
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), got, want)
  assert set(jax.eval_shape(SMALL.init, key(0), clip)) == {'params'}


@pytest.mark.parametrize(
  ('fields', 'shape', 'message'),
  [
    ({}, (1, 4, 33, 32, 3), 'multiples of patch_size 8; this one is 33 x 32'),
    ({}, (1, 4, 32, 30, 3), 'this one is 32 x 30'),
    ({}, (4, 32, 32, 3), r'shape \[B, T, H, W, 3\]'),
    ({}, (1, 4, 32, 32, 1), r'shape \[B, T, H, W, 3\]'),
    ({}, (1, 0, 32, 32, 3), 'at least 1'),
    ({'attention': 'axial'}, (1, 4, 32, 32, 3), "attention is 'axial'; expected 'divided', 'joint' or 'space'"),
    ({'remat': 'some'}, (1, 4, 32, 32, 3), "remat is 'some'"),
    ({'image_temporal': 'no'}, (1, 4, 32, 32, 3), "image_temporal is 'no'"),
    ({'num_heads': 5}, (1, 4, 32, 32, 3), 'not a multiple of num_heads 5'),
    ({'image_size': 36}, (1, 4, 32, 32, 3), 'image_size 36 is not a multiple'),
    ({'drop_path': 1.0}, (1, 4, 32, 32, 3), 'drop_path is 1.0; expected a number of at least 0 and below 1'),
  ],
)
def test_mistakes_are_named(fields, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(SMALL.clone(**fields).init, key(0), jnp.zeros(shape))


def test_pixels_must_be_normalised_first():
  with pytest.raises(ValueError, match='this one is uint8: normalise it first'):
    jax.eval_shape(SMALL.init, key(0), jnp.zeros((1, 4, 32, 32, 3), jnp.uint8))
