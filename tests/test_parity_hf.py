"""The same function and the same gradients as Hugging Face's TimeSformer in PyTorch, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cover_jax.models import Heads, TimeSformer
from cover_jax.weights.huggingface import from_hf_timesformer
from data_pipelines.contract import UserError

torch = pytest.importorskip('torch', reason='needs the extra [torch]')
transformers = pytest.importorskip('transformers', reason='needs the extra [torch]')

HF_ATTENTION = {'divided': 'divided_space_time', 'joint': 'joint_space_time', 'space': 'space_only'}
CLASSES = 7

# (attention, frames, image size, patch size, width, heads, depth)
REDUCED = [
  ('divided', 4, 32, 8, 48, 4, 2),
  ('divided', 3, 48, 16, 32, 2, 2),
  ('divided', 1, 32, 8, 48, 3, 2),
  ('divided', 5, 16, 16, 24, 2, 2),  # one patch a frame
  ('joint', 4, 32, 8, 48, 4, 2),
  ('space', 4, 32, 8, 48, 4, 2),
  ('space', 1, 32, 16, 32, 2, 3),
]


@pytest.fixture(autouse=True)
def few_threads():
  torch.set_num_threads(2)


def make_hf(attention, frames, size, patch, width, heads, depth, classes=CLASSES):
  """A model whose parameters are all random: as released, some would be zero and hide mistakes."""
  config = transformers.TimesformerConfig(
    image_size=size,
    patch_size=patch,
    num_frames=frames,
    hidden_size=width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    intermediate_size=4 * width,
    attention_type=HF_ATTENTION[attention],
    num_labels=classes,
  )
  with torch.device('meta'):  # skips an initialisation that takes ten seconds at full size
    model = transformers.TimesformerForVideoClassification(config)
  model = model.to_empty(device='cpu').eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      is_scale = 'layernorm' in name and name.endswith('weight')
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.2 * noise if is_scale else noise * fan_in**-0.5)
  return model


def hf_logits(model, clip):
  """Logits [B, K] of a clip [B, T, H, W, 3]."""
  pixels = torch.from_numpy(clip).permute(0, 1, 4, 2, 3)
  if model.config.attention_type != 'space_only':
    return model(pixels).logits
  # Hugging Face gives the logits of each frame; the released TimeSformer, as we do, averages the frames before the
  # final LayerNorm.
  frame_tokens = model.timesformer(pixels, output_hidden_states=True).hidden_states[-1]
  class_token = frame_tokens[:, 0].reshape(*clip.shape[:2], -1).mean(1)
  return model.classifier(model.timesformer.layernorm(class_token))


def convert(model, values):
  state = {name: value.detach().numpy() for name, value in values}
  return from_hf_timesformer(state, num_heads=model.config.num_attention_heads, head='source')


def our_model(model):
  config = model.config
  return TimeSformer(
    patch_size=config.patch_size,
    width=config.hidden_size,
    depth=config.num_hidden_layers,
    num_heads=config.num_attention_heads,
    mlp_dim=config.intermediate_size,
    num_frames=config.num_frames,
    image_size=config.image_size,
    attention={hf: ours for ours, hf in HF_ATTENTION.items()}[config.attention_type],
  )


def our_logits(encoder, params, clip, classes=CLASSES):
  encoded = encoder.apply({'params': params['encoder']}, clip)
  return Heads((('source', classes),)).apply({'params': params['heads']}, encoded)


def relative_error(ours, theirs):
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize('config', REDUCED, ids=lambda config: '-'.join(map(str, config)))
def test_logits_and_every_gradient(config):
  model = make_hf(*config)
  rng = np.random.default_rng(0)
  clip = rng.normal(size=(2, config[1], config[2], config[2], 3)).astype(np.float32)
  label = rng.integers(CLASSES, size=2)
  theirs = hf_logits(model, clip)
  torch.nn.functional.cross_entropy(theirs, torch.from_numpy(label)).backward()
  params = convert(model, model.named_parameters())
  their_grads = convert(model, [(name, p.grad) for name, p in model.named_parameters()])

  def loss(params):
    logits = our_logits(our_model(model), params, clip)
    return -jax.nn.log_softmax(logits)[jnp.arange(2), label].mean(), logits

  (_, ours), our_grads = jax.jit(
    jax.value_and_grad(loss, has_aux=True), compiler_options={'xla_backend_optimization_level': 0}
  )(params)
  logit_error = relative_error(ours, theirs.detach().numpy())

  assert jax.tree.structure(our_grads) == jax.tree.structure(their_grads)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(their_grads))
  grad_errors = {}
  for (path, mine), want in zip(jax.tree.leaves_with_path(our_grads), jax.tree.leaves(their_grads), strict=True):
    name = '/'.join(key.key for key in path)
    # In exact arithmetic a key's bias has no gradient, nor have query and key where there is one key to attend to:
    # what PyTorch has there is rounding.
    one_key = config[1] == 1 and ('attention_time/query' in name or 'attention_time/key' in name)
    if name.endswith('key/bias') or one_key:
      assert max(np.abs(mine).max(), np.abs(want).max()) < 1e-5 * largest, name
    else:
      assert np.abs(want).max() > 0, name
      grad_errors[name] = relative_error(mine, want)
  worst = max(grad_errors, key=grad_errors.get)
  print(f'\n{config!s:42} logits {logit_error:.1e}   gradients {grad_errors[worst]:.1e} ({worst})')
  assert logit_error < 1e-5
  assert grad_errors[worst] < 1e-4


@pytest.mark.slow
def test_base_model_at_full_size():
  model = make_hf('divided', 8, 224, 16, 768, 12, 12, classes=400)
  clip = np.random.default_rng(0).normal(size=(1, 8, 224, 224, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = hf_logits(model, clip).numpy()
  params = convert(model, model.named_parameters())
  ours = jax.jit(lambda params: our_logits(our_model(model), params, clip, 400))(params)
  error = relative_error(ours, theirs)
  print(f'\nB/8x224{"":35} logits {error:.1e}')
  assert error < 1e-5


def test_conversion_loses_nothing_silently():
  model = make_hf(*REDUCED[0])
  state = {name: value.detach().numpy() for name, value in model.named_parameters()}
  with pytest.raises(UserError, match=r'embeddings\.cls_token'):
    from_hf_timesformer({k: v for k, v in state.items() if 'cls' not in k}, num_heads=4)
  with pytest.raises(UserError, match=r'extra\.weight'):
    from_hf_timesformer({**state, 'extra.weight': np.zeros(1)}, num_heads=4)
  with pytest.raises(UserError, match='does not divide'):
    from_hf_timesformer(state, num_heads=5)
  params = from_hf_timesformer({k: v for k, v in state.items() if 'classifier' not in k}, num_heads=4)
  assert params['heads'] == {}
