"""Weights of every layout in: the same function as their own code, nothing lost silently, clear refusals."""

import functools
import importlib.util
import json
import os
import sys
import tracemalloc
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cover_jax import checkpoints
from cover_jax.models import TimeSformer
from cover_jax.training import loop as training
from cover_jax.training import step as stepping
from cover_jax.weights import common, files, initialise
from data_pipelines.contract import UserError
from tests import tiny

DEPTH, WIDTH, HEADS, MLP, PATCH, SIDE = 2, 32, 4, 48, 8, 3  # a grid of SIDE x SIDE patches
SIZE = PATCH * SIDE


def encoder(**changes):
  sizes = {'patch_size': PATCH, 'width': WIDTH, 'depth': DEPTH, 'num_heads': HEADS, 'mlp_dim': MLP}
  return TimeSformer(**{**sizes, 'num_frames': 4, 'image_size': SIZE, **changes})


@functools.cache
def fresh(**changes):
  """Random parameters of a model with one head."""
  model = encoder(**changes)
  clip = jnp.zeros((1, 1, PATCH, PATCH, 3))
  params = jax.jit(lambda rng: nn.meta.unbox(model.init(rng, clip)))(jax.random.key(1))['params']
  head = {'kernel': np.zeros((WIDTH, 3), np.float32), 'bias': np.zeros(3, np.float32)}
  return {'encoder': jax.device_get(params), 'heads': {'source': head}, 'objectives': {}}


CLASSES = {'source': ('cat', 'dog', 'owl')}


def seed(path, which='raw', model=None, **options):
  return initialise.seed(fresh(**(model or {})), files.read(str(path), which), class_names=CLASSES, **options)


@functools.cache
def class_feature(gelu_approximate):
  return jax.jit(
    lambda params, clip: encoder(gelu_approximate=gelu_approximate).apply({'params': params}, clip).feature_BxD
  )


def google_vit(depth=DEPTH, width=WIDTH, heads=HEADS, mlp=MLP, patch=PATCH, side=SIDE, seed=0):
  """A ViT's weights as google-research's files have them, all random: as initialised, some would hide mistakes."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape, scale=0.3: (scale * rng.normal(size=shape)).astype(np.float32)
  k = width // heads
  arrays = {
    'cls': normal(1, 1, width),
    'embedding/kernel': normal(patch, patch, 3, width, scale=0.1),
    'embedding/bias': normal(width),
    'Transformer/posembed_input/pos_embedding': normal(1, 1 + side**2, width),
    'head/kernel': normal(width, 5),
    'head/bias': normal(5),
  }

  def norm(name):
    arrays[f'{name}/scale'], arrays[f'{name}/bias'] = 1 + normal(width), normal(width)

  norm('Transformer/encoder_norm')
  for i in range(depth):
    block = f'Transformer/encoderblock_{i}'
    norm(f'{block}/LayerNorm_0')
    norm(f'{block}/LayerNorm_2')
    attention = f'{block}/MultiHeadDotProductAttention_1'
    for which in ('query', 'key', 'value'):
      arrays[f'{attention}/{which}/kernel'] = normal(width, heads, k)
      arrays[f'{attention}/{which}/bias'] = normal(heads, k)
    arrays[f'{attention}/out/kernel'], arrays[f'{attention}/out/bias'] = normal(heads, k, width), normal(width)
    for j, (n, m) in enumerate(((width, mlp), (mlp, width))):
      arrays[f'{block}/MlpBlock_3/Dense_{j}/kernel'] = normal(n, m)
      arrays[f'{block}/MlpBlock_3/Dense_{j}/bias'] = normal(m)
  return arrays


def big_vision(arrays, scan=False):
  """The same function in big_vision's names: the position of the class token is part of the token."""
  arrays = dict(arrays)
  position = arrays.pop('Transformer/posembed_input/pos_embedding')
  arrays['pos_embedding'] = position[:, 1:]
  arrays['cls'] = arrays['cls'] + position[:, :1]
  new = {'LayerNorm_2': 'LayerNorm_1', 'MultiHeadDotProductAttention_1': 'MultiHeadDotProductAttention_0'}
  new['MlpBlock_3'] = 'MlpBlock_0'
  for name in list(arrays):
    for a, b in new.items():
      if f'/{a}/' in name:
        arrays[name.replace(a, b)] = arrays.pop(name)
  if scan:
    for name in [n for n in arrays if 'encoderblock_0/' in n]:
      stacked = np.stack([arrays.pop(name.replace('block_0/', f'block_{i}/')) for i in range(DEPTH)])
      arrays[name.replace('encoderblock_0/', 'encoderblock/')] = stacked
  return arrays


def torch_vit(arrays, names):
  """Weights in PyTorch's axes; `names` has the modules' names, with {} for the block and perhaps a joint 'qkv'."""
  width = arrays['cls'].shape[-1]
  state = {
    names['class']: arrays['cls'],
    names['position']: arrays['Transformer/posembed_input/pos_embedding'],
    f'{names["patch"]}.weight': arrays['embedding/kernel'].transpose(3, 2, 0, 1),
    f'{names["patch"]}.bias': arrays['embedding/bias'],
    f'{names["head"]}.weight': arrays['head/kernel'].T,
    f'{names["head"]}.bias': arrays['head/bias'],
  }

  def put(name, theirs):
    state[f'{name}.weight'] = arrays[f'{theirs}/scale']
    state[f'{name}.bias'] = arrays[f'{theirs}/bias']

  put(names['norm'], 'Transformer/encoder_norm')
  for i in range(DEPTH):
    block = f'Transformer/encoderblock_{i}'
    put(names['norm1'].format(i), f'{block}/LayerNorm_0')
    put(names['norm2'].format(i), f'{block}/LayerNorm_2')
    linear = {}
    for which in ('query', 'key', 'value', 'out'):
      theirs = f'{block}/MultiHeadDotProductAttention_1/{which}'
      linear[which] = arrays[f'{theirs}/kernel'].reshape(width, width).T, arrays[f'{theirs}/bias'].reshape(width)
    if 'qkv' in names:
      parts = [linear.pop(w) for w in ('query', 'key', 'value')]
      linear['qkv'] = tuple(np.concatenate(p) for p in zip(*parts, strict=True))
    for j, layer in enumerate(('fc1', 'fc2')):
      dense = f'{block}/MlpBlock_3/Dense_{j}'
      linear[layer] = arrays[f'{dense}/kernel'].T, arrays[f'{dense}/bias']
    for which, (weight, bias) in linear.items():
      name = names[which].format(i)
      state[f'{name}.weight'], state[f'{name}.bias'] = weight, bias
  return {name: np.ascontiguousarray(x) for name, x in state.items()}


TIMM_NAMES = {
  'class': 'cls_token',
  'position': 'pos_embed',
  'patch': 'patch_embed.proj',
  'head': 'head',
  'norm': 'norm',
  'norm1': 'blocks.{}.norm1',
  'norm2': 'blocks.{}.norm2',
  'qkv': 'blocks.{}.attn.qkv',
  'out': 'blocks.{}.attn.proj',
  'fc1': 'blocks.{}.mlp.fc1',
  'fc2': 'blocks.{}.mlp.fc2',
}
HF_NAMES = {
  'class': 'vit.embeddings.cls_token',
  'position': 'vit.embeddings.position_embeddings',
  'patch': 'vit.embeddings.patch_embeddings.projection',
  'head': 'classifier',
  'norm': 'vit.layernorm',
  'norm1': 'vit.encoder.layer.{}.layernorm_before',
  'norm2': 'vit.encoder.layer.{}.layernorm_after',
  'query': 'vit.encoder.layer.{}.attention.attention.query',
  'key': 'vit.encoder.layer.{}.attention.attention.key',
  'value': 'vit.encoder.layer.{}.attention.attention.value',
  'out': 'vit.encoder.layer.{}.attention.output.dense',
  'fc1': 'vit.encoder.layer.{}.intermediate.dense',
  'fc2': 'vit.encoder.layer.{}.output.dense',
}


def prefixed(prefix, arrays):
  return {prefix + name: x for name, x in arrays.items()}


def pre_logits():
  return {'pre_logits/kernel': np.zeros((WIDTH, WIDTH), np.float32), 'pre_logits/bias': np.zeros(WIDTH, np.float32)}


def text_tower():
  map_head = {'params/img/MAPHead_0/probe': np.zeros((1, 1, WIDTH)), 'params/txt/pos_embedding': np.zeros((1, 4, 8))}
  return map_head | {'params/t': np.zeros(1), 'params/b': np.zeros(1), 'opt/count': np.zeros((), np.int32)}


def hf_config(**changes):
  config = {'model_type': 'vit', 'hidden_size': WIDTH, 'num_hidden_layers': DEPTH, 'num_attention_heads': HEADS}
  config |= {'intermediate_size': MLP, 'image_size': SIZE, 'patch_size': PATCH, 'layer_norm_eps': 1e-6}
  return json.dumps(config | changes)


def write_hf_vit(folder, arrays, **changes):
  folder.mkdir(exist_ok=True)
  save_file(torch_vit(arrays, HF_NAMES), folder / 'model.safetensors', metadata={'format': 'pt'})
  (folder / 'config.json').write_text(hf_config(**changes))
  return folder


def write_npz(path, arrays):
  np.savez(path, **arrays)
  return path


def write_safetensors(path, arrays):
  save_file(arrays, path)
  return path


LAYOUTS = {
  'google': lambda d, a: write_npz(d / 'w.npz', a),
  'google with opt/target and pre_logits': lambda d, a: write_npz(
    d / 'w.npz', prefixed('opt/target/', a | pre_logits())
  ),
  'big_vision': lambda d, a: write_npz(d / 'w.npz', big_vision(a)),
  'big_vision with params': lambda d, a: write_npz(d / 'w.npz', prefixed('params/', big_vision(a))),
  'big_vision scanned, two towers': lambda d, a: write_npz(
    d / 'w.npz', prefixed('params/img/', big_vision(a, scan=True)) | text_tower()
  ),
  'timm': lambda d, a: write_safetensors(d / 'w.safetensors', torch_vit(a, TIMM_NAMES)),
  'Hugging Face': lambda d, a: write_hf_vit(d, a),
}


@pytest.fixture(scope='module')
def arrays():
  return google_vit()


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).normal(size=(2, 1, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def hf_feature(arrays, images, tmp_path_factory):
  """{gelu_approximate: the class feature after the final norm} by transformers' own ViT."""
  torch = pytest.importorskip('torch', reason='needs the extra [torch]')
  transformers = pytest.importorskip('transformers', reason='needs the extra [torch]')
  features = {}
  for approximate, act in ((False, 'gelu'), (True, 'gelu_pytorch_tanh')):
    folder = write_hf_vit(tmp_path_factory.mktemp('vit'), arrays, hidden_act=act)
    model, info = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not info['missing_keys']
    with torch.no_grad():
      output = model.eval()(torch.from_numpy(images[:, 0].transpose(0, 3, 1, 2)))
    features[approximate] = output.last_hidden_state[:, 0].numpy()
  return features


@pytest.mark.parametrize('layout', LAYOUTS)
def test_image_and_still_clip_give_the_vits_own_feature(layout, arrays, images, hf_feature, tmp_path):
  params, rows = seed(LAYOUTS[layout](tmp_path, arrays))
  for approximate in (False, True):
    for frames in (1, 3):
      ours = class_feature(approximate)(params['encoder'], images.repeat(frames, axis=1))
      theirs = hf_feature[approximate]
      assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), (approximate, frames)
  assert np.abs(hf_feature[True] - hf_feature[False]).max() > 1e-4  # the test can tell them apart
  spatial = [r for r in rows if r.parameter.startswith('encoder') and 'time' not in r.parameter]
  assert {r.action for r in spatial if 'temporal_fc' not in r.parameter} == {'loaded'}
  assert [r for r in rows if r.action.startswith('skipped: head')]


def test_timm_vit_itself(images, tmp_path):
  torch = pytest.importorskip('torch', reason='needs the extra [torch]')
  timm = pytest.importorskip('timm', reason='timm and torchvision are not installed', exc_type=ImportError)
  model = timm.models.vision_transformer.VisionTransformer(
    SIZE, PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=MLP / WIDTH, num_classes=3
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs = model.forward_features(torch.from_numpy(images[:, 0].transpose(0, 3, 1, 2)))[:, 0].numpy()
  state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
  params, _ = seed(write_safetensors(tmp_path / 'w.safetensors', state))
  ours = class_feature(False)(params['encoder'], images.repeat(3, axis=1))
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def hf_timesformer(folder):
  pytest.importorskip('torch', reason='needs the extra [torch]')
  pytest.importorskip('transformers', reason='needs the extra [torch]')
  from tests import test_parity_hf as parity

  model = parity.make_hf('divided', 4, SIZE, PATCH, WIDTH, HEADS, DEPTH, classes=3)
  model.config.id2label = {0: 'owl', 1: 'eel', 2: 'cat'}
  model.save_pretrained(folder)
  return model, parity


def test_hf_timesformer_with_a_head_mapped_by_class_name(tmp_path):
  model, parity = hf_timesformer(tmp_path)
  params, rows = seed(tmp_path, model={'mlp_dim': 4 * WIDTH}, heads={'source': 'classifier'})
  clip = np.random.default_rng(2).normal(size=(2, 4, SIZE, SIZE, 3)).astype(np.float32)
  feature = encoder(mlp_dim=4 * WIDTH).apply({'params': params['encoder']}, clip).feature_BxD
  head = params['heads']['source']
  ours, theirs = feature @ head['kernel'] + head['bias'], parity.hf_logits(model, clip).detach().numpy()
  scale = np.abs(theirs).max()
  assert np.abs(ours[:, 0] - theirs[:, 2]).max() < 1e-5 * scale  # cat
  assert np.abs(ours[:, 2] - theirs[:, 0]).max() < 1e-5 * scale  # owl
  assert not np.any(ours[:, 1])  # dog, which the file does not know
  assert {r.action for r in rows} == {'loaded', 'loaded: 2 of 3 classes by name, the others zero'}


def test_released_timesformer(tmp_path):
  model, _ = hf_timesformer(tmp_path)
  import torch

  new = {
    'timesformer.': '',
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.time_embeddings': 'time_embed',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'encoder.layer.': 'blocks.',
    'temporal_attention.attention.qkv': 'temporal_attn.qkv',
    'temporal_attention.output.dense': 'temporal_attn.proj',
    'temporal_layernorm': 'temporal_norm1',
    'temporal_dense': 'temporal_fc',
    'attention.attention.qkv': 'attn.qkv',
    'attention.output.dense': 'attn.proj',
    'layernorm_before': 'norm1',
    'layernorm_after': 'norm2',
    'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2',
    'layernorm.': 'norm.',
    'classifier': 'head',
  }
  state = {}
  for name, x in model.state_dict().items():
    for a, b in new.items():
      name = name.replace(a, b)
    state['model.' + name] = x
  expected, _ = seed(tmp_path, model={'mlp_dim': 4 * WIDTH})
  for wrapper in ('model_state', 'model', 'module', None):
    path = tmp_path / 'released.pyth'
    torch.save({wrapper: state, 'epoch': 3} if wrapper else state, path)
    params, _ = seed(path, model={'mlp_dim': 4 * WIDTH})
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_pytorch_file_without_pytorch(tmp_path, monkeypatch):
  (tmp_path / 'w.pyth').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='PyTorch is not installed'):
    files.read(str(tmp_path / 'w.pyth'))


def test_temporal_options(arrays, tmp_path):
  path = write_npz(tmp_path / 'w.npz', arrays)
  clip = np.random.default_rng(3).normal(size=(2, 4, SIZE, SIZE, 3)).astype(np.float32)

  @jax.jit
  def gradient(params):
    loss = lambda params: encoder().apply({'params': params}, clip).feature_BxD.var()
    return jax.value_and_grad(loss)(params)

  losses = {}
  for option in initialise.TEMPORAL_ATTENTION:
    params, rows = seed(path, temporal_attention=option)
    blocks = params['encoder']['blocks']
    time, space = blocks['attention_time'], blocks['attention_space']
    if option == 'random':
      jax.tree.map(np.testing.assert_array_equal, time, fresh()['encoder']['blocks']['attention_time'])
    else:
      np.testing.assert_array_equal(time['query']['kernel'], space['query']['kernel'])
      np.testing.assert_array_equal(blocks['norm_time']['scale'], blocks['norm_space']['scale'])
      assert np.any(time['out']['kernel']) == (option == 'copy')
    assert not np.any(params['encoder']['time_embedding'])
    losses[option], grads = gradient(params['encoder'])
    # Whatever it is, what time does must be able to grow.
    grads = grads['blocks']
    assert max(np.abs(grads['temporal_fc']['kernel']).max(), np.abs(grads['attention_time']['out']['kernel']).max()) > 0
    assert all(r.action for r in rows)
  np.testing.assert_allclose(losses['random'], losses['copy'], rtol=1e-5)  # at first all are the image model
  np.testing.assert_allclose(losses['zero'], losses['copy'], rtol=1e-5)
  with pytest.raises(UserError, match=r'temporal_attention is .twice.*copy, random, zero'):
    seed(path, temporal_attention='twice')


@pytest.mark.parametrize('attention', ['joint', 'space'])
def test_models_without_temporal_attention(attention, arrays, images, hf_feature, tmp_path):
  params, rows = seed(write_npz(tmp_path / 'w.npz', arrays), model={'attention': attention})
  ours = encoder(attention=attention).apply({'params': params['encoder']}, images).feature_BxD
  assert np.abs(ours - hf_feature[False]).max() < 1e-5 * np.abs(ours).max()
  assert not [r for r in rows if r.action.startswith('derived')]
  assert ('time_embedding' in params['encoder']) == (attention == 'joint')


def test_embeddings_are_resized(arrays, images, tmp_path):
  path = write_npz(tmp_path / 'w.npz', arrays)
  params, rows = seed(path, model={'image_size': 2 * SIZE})
  assert [r.action for r in rows if r.action.startswith('resized')] == ['resized: 3 x 3 to 6 x 6, bilinear']
  row = next(r for r in rows if r.parameter == 'encoder/position_embedding')
  assert (row.file_shape, row.shape) == ((1, 10, WIDTH), (1, 37, WIDTH))
  large = images.repeat(2, axis=2).repeat(2, axis=3)
  at_load = encoder(image_size=2 * SIZE).apply({'params': params['encoder']}, large)
  at_run_time = encoder().apply({'params': seed(path)[0]['encoder']}, large)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), at_load, at_run_time)


def test_time_embedding_is_interpolated():
  ramp = np.arange(4, dtype=np.float32)[None, :, None] * np.ones((1, 1, WIDTH), np.float32)
  encoder_arrays = {
    name: common.Found(np.asarray(x), name, x.shape) for name, x in checkpoints.flatten(fresh()['encoder']).items()
  }
  encoder_arrays['time_embedding'] = common.Found(ramp, 'time', ramp.shape)
  weights = common.Weights('w', 'a video model', encoder_arrays, {}, {})
  params, rows = initialise.seed(fresh(num_frames=8), weights, class_names=CLASSES)
  np.testing.assert_allclose(params['encoder']['time_embedding'][0, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
  assert 'resized: 4 to 8 frames, linear' in {r.action for r in rows}


def test_bfloat16_and_missing_class_token(arrays, tmp_path):
  pooled = {name: x for name, x in big_vision(arrays).items() if name != 'cls'}
  half = {name: x.astype(ml_dtypes.bfloat16) for name, x in pooled.items()}
  params, rows = seed(write_npz(tmp_path / 'half.npz', half))  # NumPy stores it as two bytes without a type
  kernel = params['encoder']['blocks']['mlp']['hidden']['kernel']
  assert kernel.dtype == np.float32
  np.testing.assert_allclose(kernel[1], pooled['Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel'], rtol=1e-2)
  assert next(r for r in rows if r.parameter == 'encoder/class_token').action.startswith('fresh')
  np.testing.assert_array_equal(params['encoder']['class_token'], fresh()['encoder']['class_token'])


def test_table_and_notes(arrays, tmp_path):
  path = LAYOUTS['timm'](tmp_path, arrays)
  weights = files.read(str(path))
  _, rows = seed(path)
  text = initialise.table(rows, weights)
  assert text.splitlines()[-1] == '22 loaded, 0 resized, 12 derived, 3 fresh, 2 skipped'
  assert 'blocks.*.attn.qkv.weight' in text and '96x32' in text and '2x32x4x8' in text
  assert 'copy of encoder/blocks/attention_space/out/kernel' in text
  assert 'num_heads = 4' in initialise.notes(weights, encoder())[0]
  google = files.read(str(LAYOUTS['google'](tmp_path, arrays)))
  assert 'gelu_approximate=True' in initialise.notes(google, encoder())[0]
  assert initialise.notes(google, encoder(gelu_approximate=True)) == []


class Payload:
  """Unpickling it would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_file_that_would_grow_far_beyond_the_model_is_refused_before_it_does(arrays, tmp_path):
  """A bomb of zeros, and a header that promises more than the file has: nothing of either is allocated."""
  path = tmp_path / 'w.npz'
  write_npz(path, arrays)
  size = sum(a.size for a in arrays.values())
  assert files.read(str(path), model_size=size).encoder.keys() == files.read(str(path)).encoder.keys()
  with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as file, file.open('bomb.npy', 'w') as f:
    np.lib.format.write_array_header_1_0(f, {'descr': '<f4', 'fortran_order': False, 'shape': (1 << 27,)})
    for _ in range(1 << 9):
      f.write(bytes(1 << 20))
  assert os.path.getsize(path) < 3 << 20
  tracemalloc.start()
  with pytest.raises(UserError, match=rf'w\.npz holds 134,\d+,\d+ numbers; the model has {size:,} parameters'):
    files.read(str(path), model_size=size)
  write_npz(path, arrays)
  with zipfile.ZipFile(path, 'a') as file, file.open('huge.npy', 'w') as f:
    np.lib.format.write_array_header_1_0(f, {'descr': '<f4', 'fortran_order': False, 'shape': (1 << 45,)})
  for model_size in (size, None):
    with pytest.raises(UserError, match=r"w\.npz cannot be read as weights \('huge\.npy' is said to be of shape"):
      files.read(str(path), model_size=model_size)
  assert tracemalloc.get_traced_memory()[1] < 64 << 20
  tracemalloc.stop()
  torch = pytest.importorskip('torch')
  torch.save({'w': torch.zeros(1).expand(1 << 40)}, tmp_path / 'w.pth')
  with pytest.raises(UserError, match=r'w\.pth holds 1,099,511,627,776 numbers'):
    files.read(str(tmp_path / 'w.pth'), model_size=size)


def test_no_file_runs_code(arrays, tmp_path):
  proof = tmp_path / 'it ran'
  write_npz(tmp_path / 'w.npz', arrays | {'cls': np.array([Payload(proof)], object)})
  with pytest.raises(UserError, match=r'w\.npz cannot be read as weights .*allow_pickle'):
    files.read(str(tmp_path / 'w.npz'))
  if importlib.util.find_spec('torch'):
    import torch

    torch.save({'model_state': Payload(proof)}, tmp_path / 'w.pyth')
    with pytest.raises(UserError, match=r'w\.pyth cannot be read as weights'):
      files.read(str(tmp_path / 'w.pyth'))
  assert not proof.exists()


def without(arrays, part):
  return {name: x for name, x in arrays.items() if part not in name}


BROKEN = {
  'depth': (lambda a: google_vit(depth=3), 'the file has depth 3, the model depth 2'),
  'width': (lambda a: google_vit(width=48), 'the file has width 48, the model width 32'),
  'patch and mlp': (lambda a: google_vit(patch=4, mlp=64), 'has mlp_dim 64, patch_size 4, the model mlp_dim 48, patch'),
  'heads': (lambda a: google_vit(heads=2), 'the file has num_heads 2, the model num_heads 4'),
  'unknown layout': (lambda a: {'conv1': np.zeros(3)}, r'unknown layout \(its arrays are conv1.*Hugging Face'),
  'another model': (lambda a: a | {'Transformer/rel_pos': np.zeros(3)}, 'no place for .*Transformer/rel_pos'),
  'array lost in one block': (lambda a: without(a, 'block_1/LayerNorm_2/bias'), 'no array .*block_1/LayerNorm_2/bias'),
  'array lost in all': (lambda a: without(a, 'Dense_1/bias'), r"no array '.*Dense_1/bias' for .*mlp/out/bias"),
  'no norm': (lambda a: without(a, 'encoder_norm'), "no array 'Transformer/encoder_norm/"),
  'not square': (
    lambda a: a | {'Transformer/posembed_input/pos_embedding': np.zeros((1, 9, WIDTH))},
    'has 8 positions .* not a square',
  ),
  'shape': (lambda a: a | {'cls': np.zeros((1, WIDTH))}, r"'cls' gives encoder/class_token the shape \(1, 32\)"),
  'attention': (
    lambda a: a | {name: np.zeros(3) for name in a if name.endswith('_1/out/kernel')},
    r'attention_space/out/kernel the shape \(2, 3\)',
  ),
  'ragged': (lambda a: a | {'Transformer/encoderblock_1/LayerNorm_0/bias': np.zeros(3)}, 'are not those of a google'),
  'text': (lambda a: a | {'cls': np.array(['x'])}, 'not a number'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_does_not_fit_is_one_sentence(case, arrays, tmp_path):
  change, message = BROKEN[case]
  with pytest.raises(UserError, match=message) as error:
    seed(write_npz(tmp_path / 'w.npz', change(arrays)))
  assert 'w.npz' in str(error.value) and '\n' not in str(error.value)


def test_damaged_files(arrays, tmp_path):
  paths = [LAYOUTS['google'](tmp_path, arrays), LAYOUTS['timm'](tmp_path, arrays), tmp_path / 'w.flax']
  paths[2].write_bytes(b'\x83\xa5about\xa2{}')
  for path in paths:
    whole = path.read_bytes()
    middle = whole[: len(whole) // 2] + b'junk' + whole[len(whole) // 2 + 4 :]
    for content in (b'', b'junk', whole[: len(whole) // 2], whole[:-20], middle if path.suffix == '.npz' else b'\x80'):
      path.write_bytes(content)
      with pytest.raises(UserError) as error:
        files.read(str(path))
      assert str(path) in str(error.value) and '\n' not in str(error.value), content[:10]
  np.save(tmp_path / 'one.npy', np.zeros(3))
  os.rename(tmp_path / 'one.npy', tmp_path / 'one.npz')
  with pytest.raises(UserError, match='one array, not an archive'):
    files.read(str(tmp_path / 'one.npz'))
  with pytest.raises(UserError, match=r'nowhere\.npz do not exist'):
    files.read(str(tmp_path / 'nowhere.npz'))
  (tmp_path / 'w.onnx').write_bytes(b'x')
  with pytest.raises(UserError, match=r'of no kind that is known: .*\.npz'):
    files.read(str(tmp_path / 'w.onnx'))
  with pytest.raises(UserError, match='No checkpoint in'):
    files.read(str(tmp_path))


def test_hugging_face_config_beside(arrays, tmp_path):
  with pytest.raises(UserError, match='num_heads 2, the model num_heads 4'):
    seed(write_hf_vit(tmp_path, arrays, num_attention_heads=2))
  with pytest.raises(UserError, match=r"hidden_act = 'relu'"):
    seed(write_hf_vit(tmp_path, arrays, hidden_act='relu'))
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config\.json is not a Hugging Face config'):
    seed(tmp_path)


def test_heads_that_cannot_be_mapped(arrays, tmp_path):
  path = write_npz(tmp_path / 'w.npz', arrays)
  with pytest.raises(UserError, match=r"heads\.source = 'head': .*does not name its classes"):
    seed(path, heads={'source': 'head'})
  with pytest.raises(UserError, match=r"no head 'sauce'; it has \['source'\]"):
    seed(path, heads={'sauce': 'head'})
  labels = {str(k): f'class {k}' for k in range(5)}
  folder = write_hf_vit(tmp_path, arrays, id2label=labels)
  with pytest.raises(UserError, match=r"no class of that head has the name of one of ours, .* 'cat'"):
    seed(folder, heads={'source': 'classifier'})
  with pytest.raises(UserError, match=r"no such head; it has \['classifier'\]"):
    seed(folder, heads={'source': 'head'})
  folder = write_hf_vit(tmp_path, arrays, id2label={'0': 'cat', '1': 'dog'})
  with pytest.raises(UserError, match='has 5 classes, but 2 names'):
    seed(folder, heads={'source': 'classifier'})


# A run of this project as the file.


def start(workdir, **changes):
  experiment, mesh, *_ = tiny.build(tiny.config(**changes))
  optimizer, _ = stepping.make_optimizer(experiment)
  return training.start_state(experiment, optimizer, mesh, str(workdir))[0]


def pretend_to_train(workdir, **changes):
  """Leaves a checkpoint of step 2 in a workdir, with noise for what was learnt. Returns the workdir."""
  experiment, mesh, *_ = tiny.build(tiny.config(**changes))
  optimizer, _ = stepping.make_optimizer(experiment)
  state, interval, _ = training.start_state(experiment, optimizer, mesh, str(workdir))
  rng = np.random.default_rng(0)
  noise = lambda x: (x + rng.normal(size=x.shape)).astype(np.float32)
  state = jax.device_get(state)
  state = state.replace(step=np.int32(2), params=jax.tree.map(noise, state.params), ema=jax.tree.map(noise, state.ema))
  about = checkpoints.about(experiment.config.to_dict(), experiment.sources, 2)
  saver = checkpoints.Saver(str(workdir), 1)
  saver.save({'about': about, 'state': state, 'interval': jax.device_get(interval)})
  return str(workdir)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return pretend_to_train(tmp_path_factory.mktemp('trained'))


@pytest.mark.parametrize('which', ['ema', pytest.param('raw', marks=pytest.mark.slow)])
def test_own_checkpoint(trained, tmp_path, which):
  state = start(tmp_path, init_from__path=trained, init_from__params=which, seed=5)
  saved = checkpoints.load(trained)['state']
  jax.tree.map(np.testing.assert_array_equal, dict(state.params), saved['params' if which == 'raw' else 'ema'])
  jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)  # the average starts from the seed, too
  assert int(state.step) == 0
  assert np.any(state.params['heads']['acts']['kernel'])
  assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
  kernel = state.params['encoder']['blocks']['mlp']['hidden']['kernel']
  assert len(kernel.sharding.device_set) == jax.device_count()


def test_a_seeded_encoder_can_be_frozen(trained, tmp_path):
  rules = (('^encoder/', 0.0), ('.*', 1.0))
  seeded = start(tmp_path, init_from__path=trained, optimizer__learning_rate_rules=rules)
  fresh = start(tmp_path, optimizer__learning_rate_rules=rules)
  assert jax.tree.structure(seeded) == jax.tree.structure(fresh)
  moments = jax.tree_util.tree_leaves_with_path(seeded.opt_state)
  assert moments and not any('encoder' in jax.tree_util.keystr(path) for path, _ in moments)


@pytest.mark.slow
def test_own_checkpoint_without_average_or_with_other_attention(trained, tmp_path):
  pretend_to_train(tmp_path, ema_decay=0.0, model__attention='space')
  with pytest.raises(UserError, match='holds no ema parameters'):
    start(tmp_path / 'new', init_from__path=str(tmp_path), init_from__params='ema')
  state = start(tmp_path / 'new', init_from__path=str(tmp_path))  # the first stage of CoVeR
  blocks = state.params['encoder']['blocks']
  jax.tree.map(np.testing.assert_array_equal, blocks['attention_time'], blocks['attention_space'])
  saved = checkpoints.load(str(tmp_path))['state']['params']
  np.testing.assert_array_equal(blocks['mlp']['out']['kernel'], saved['encoder']['blocks']['mlp']['out']['kernel'])
  with pytest.raises(UserError, match=r'no place for: set config\.model\.attention'):
    start(tmp_path / 'new', init_from__path=trained, model__attention='space')


def test_own_heads_are_kept_by_class_names(trained):
  weights = files.read(trained)
  names = {s.name: s.class_names for s in tiny.sources()}
  params = checkpoints.load(trained)['state']['params']
  empty = jax.tree.map(np.zeros_like, params)
  other = names | {'acts': tuple(reversed(names['acts']))}
  seeded, rows = initialise.seed(empty, weights, class_names=other)
  assert not np.any(seeded['heads']['acts']['kernel']) and np.any(seeded['heads']['moves']['kernel'])
  assert 'skipped: its classes are not ours' in {r.action for r in rows}
  seeded, _ = initialise.seed(empty, weights, class_names=other, heads={'acts': 'acts'})
  np.testing.assert_array_equal(seeded['heads']['acts']['kernel'], params['heads']['acts']['kernel'][:, ::-1])


def test_resuming_ignores_init_from(trained, tmp_path):
  state = start(trained, total_steps=2, init_from__path=str(tmp_path / 'nowhere.npz'))
  assert int(state.step) == 2
  with pytest.raises(UserError, match='do not exist'):
    start(tmp_path, init_from__path=str(tmp_path / 'nowhere.npz'))


@pytest.mark.parametrize('ending', ['npz', 'safetensors', 'flax'])
def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path, ending):
  os.mkfifo(tmp_path / f'w.{ending}')
  with pytest.raises(UserError, match='is not a regular file'):
    files.read(str(tmp_path / f'w.{ending}'))
