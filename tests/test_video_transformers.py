"""VideoMAE and V-JEPA 2 against transformers' models with random weights, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models.pooling import AttentiveBlock
from cover_jax.models.videomae import VideoMAE, sine_positions
from cover_jax.models.vjepa2 import VJEPA2
from cover_jax.weights import video_layouts as layouts
from cover_jax.weights.common import convert, detect
from tests import encoder_parity as parity

FIELDS = {'patch_size': 8, 'width': 48, 'depth': 3, 'num_heads': 4, 'mlp_dim': 96}


@pytest.fixture(scope='module')
def torch():
  return pytest.importorskip('torch')


def scramble(torch, model):
  """Random values in every parameter, so that no zero hides a fault."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (p.ndim == 1) * 0.5)
  return model.eval()


def arrays_of(model) -> dict[str, np.ndarray]:
  return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def video_mae(torch, frames=8, pixels=32):
  transformers = pytest.importorskip('transformers')
  config = transformers.VideoMAEConfig(
    image_size=pixels, patch_size=8, num_frames=frames, tubelet_size=2, hidden_size=48, num_hidden_layers=3,
    num_attention_heads=4, intermediate_size=96, use_mean_pooling=True, num_labels=5,
  )  # fmt: skip
  return scramble(torch, transformers.VideoMAEForVideoClassification(config))


def vjepa2(torch, frames=8, pixels=32):
  transformers = pytest.importorskip('transformers')
  config = transformers.VJEPA2Config(
    crop_size=pixels, patch_size=8, frames_per_clip=frames, tubelet_size=2, hidden_size=48, num_hidden_layers=3,
    num_attention_heads=4, mlp_ratio=2.0, num_pooler_layers=2, pred_hidden_size=24, pred_num_attention_heads=2,
    pred_num_hidden_layers=1, num_labels=5,
  )  # fmt: skip
  return scramble(torch, transformers.VJEPA2ForVideoClassification(config))


def clip(frames: int, pixels: int) -> np.ndarray:
  return np.random.default_rng(0).standard_normal((2, frames, pixels, pixels, 3)).astype(np.float32)


def torch_side(torch, model, x, key):
  """(logits, {name: gradient}) of transformers' model, for the loss sum(logits * (1 2 3 ...))."""
  logits = model(**{key: torch.from_numpy(x).permute(0, 1, 4, 2, 3)}).logits
  weights = torch.arange(1.0, logits.numel() + 1).reshape(logits.shape) / logits.numel()
  (logits * weights).sum().backward()
  return logits.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def compare(forward, params, x, logits, gradients, rules, which):
  """Logits to 1e-5 and every gradient to 1e-4, relative to its largest value."""
  weights = jnp.arange(1.0, logits.size + 1).reshape(logits.shape) / logits.size
  with jax.default_matmul_precision('highest'):
    ours = jax.jit(forward)(params, x)
    grads = jax.jit(jax.grad(lambda p: (forward(p, x) * weights).sum()))(params)
  np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
  for rule in rules:
    names = [rule.theirs.format(i) for i in range(FIELDS['depth'])] if '{}' in rule.theirs else [rule.theirs]
    found = [which + n for n in names if which + n in gradients]
    theirs = [parity.ours(rule, gradients[n]) for n in found]
    ours = np.asarray(parity.get(grads, rule.ours))
    theirs = np.stack(theirs) if '{}' in rule.theirs else theirs[0]
    # The gradient of a key's bias is zero but for rounding.
    floor = 1e-6 if rule.ours.endswith('key/bias') else 1e-4 * np.abs(theirs).max()
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=floor, err_msg=rule.ours)


@pytest.mark.parametrize(('frames', 'pixels'), [(8, 32), (2, 16)])
def test_videomae_has_the_logits_and_gradients_of_transformers(torch, frames, pixels):
  model, x = video_mae(torch, frames, pixels), clip(frames, pixels)
  logits, gradients = torch_side(torch, model, x, 'pixel_values')
  module = VideoMAE(**FIELDS, num_frames=frames, image_size=pixels)
  arrays = arrays_of(model)
  weights = convert('file', arrays, layouts.VIDEOMAE)
  params = {'encoder': parity.fill(module, weights.encoder, jnp.zeros((1, 2, 8, 8, 3)))}
  params['head'] = {part: found.array for part, found in weights.heads['classifier'].items()}

  def forward(params, x):
    feature = module.apply({'params': params['encoder']}, x).feature_BxD
    return feature @ params['head']['kernel'] + params['head']['bias']

  rules = [r._replace(ours=f'encoder/{r.ours}') for r in layouts.VIDEOMAE.rules if not r.theirs.startswith('fc_norm')]
  compare(forward, params, x, logits, gradients, rules, 'videomae.')
  compare(forward, params, x, logits, gradients, [r._replace(ours=f'head/{r.ours}') for r in layouts.VIDEOMAE.head], '')


def test_videomae_files_with_biases_of_their_own_names_give_the_same_weights(torch):
  new = arrays_of(video_mae(torch))
  old = {}
  for name, array in new.items():
    for which, theirs in (('query', 'q_bias'), ('value', 'v_bias')):
      name = name.replace(f'attention.attention.{which}.bias', f'attention.attention.{theirs}')
    old[name] = array
  assert detect('file', old) is layouts.VIDEOMAE_RELEASED
  assert detect('file', new) is layouts.VIDEOMAE
  a, b = convert('file', new, layouts.VIDEOMAE).encoder, convert('file', old, layouts.VIDEOMAE_RELEASED).encoder
  assert set(a) == set(b)
  for name in a:
    np.testing.assert_array_equal(a[name].array, b[name].array)


def test_sine_positions_are_those_of_transformers(torch):
  modeling = pytest.importorskip('transformers.models.videomae.modeling_videomae')
  theirs = modeling.get_sinusoid_encoding_table(20, 48)[0].numpy()
  np.testing.assert_allclose(sine_positions(20, 48), theirs, atol=1e-6)


@pytest.mark.parametrize(('frames', 'pixels'), [(8, 32), (2, 16), (1, 16)])
def test_vjepa2_has_the_logits_and_gradients_of_transformers(torch, frames, pixels):
  model, x = vjepa2(torch, frames, pixels), clip(frames, pixels)
  logits, gradients = torch_side(torch, model, x, 'pixel_values_videos')
  module, pooler = VJEPA2(**FIELDS), AttentiveBlock(2, 4, 192)
  arrays = arrays_of(model)
  pooler_arrays = {
    r.ours: parity.Array(
      np.stack([parity.ours(r, arrays[r.theirs.format(i)]) for i in range(2)])
      if '{}' in r.theirs
      else parity.ours(r, arrays[r.theirs])
    )
    for r in layouts.VJEPA2_POOLER
  }
  params = {
    'encoder': parity.fill(module, convert('file', arrays, layouts.VJEPA2).encoder, jnp.zeros((1, 2, 8, 8, 3))),
    'pooler': parity.fill(pooler, pooler_arrays, jnp.zeros((1, 2, 48))),
    'head': {'kernel': arrays['classifier.weight'].T, 'bias': arrays['classifier.bias']},
  }

  def forward(params, x):
    encoded = module.apply({'params': params['encoder']}, x)
    tokens = encoded.tokens_BxTxHxWxD.reshape(len(x), -1, 48)
    return pooler.apply({'params': params['pooler']}, tokens) @ params['head']['kernel'] + params['head']['bias']

  rules = [r._replace(ours=f'encoder/{r.ours}') for r in layouts.VJEPA2.rules]
  compare(forward, params, x, logits, gradients, rules, 'vjepa2.')
  rules = [r._replace(ours=f'pooler/{r.ours}') for r in layouts.VJEPA2_POOLER]
  compare(forward, params, x, logits, gradients, rules, '')


@pytest.mark.parametrize(
  ('module', 'count'),
  [
    # Of transformers' default configs, without classifier.
    (VideoMAE(), 86_227_200),
    (VideoMAE(width=1024, depth=24, num_heads=16, mlp_dim=4096), 303_860_736),
    (VJEPA2(), 303_885_312),
  ],
)
def test_numbers_of_parameters(module, count):
  assert parity.count(module, (1, 2, 16, 16, 3)) == count
