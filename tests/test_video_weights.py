"""Files of released video encoders seed a run: every parameter from its array, nothing lost, nothing silently left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cover_jax import checkpoints
from cover_jax.models import encoder as encoders
from cover_jax.weights import convolution_layouts, files, initialise, video_layouts
from data_pipelines.contract import UserError

SMALL = {
  'videoprism': {},
  'videomae': {},
  'vjepa2': {},
  'resnet3d': {'depths': (2, 2, 2, 2), 'widths': (4, 4, 8, 8)},
  's3d': {},
}
LAYOUTS = {
  'VideoPrism': (video_layouts.VIDEOPRISM, {}),
  'VideoMAE': (video_layouts.VIDEOMAE, {}),
  'VideoMAE with q_bias': (video_layouts.VIDEOMAE_RELEASED, {}),
  'V-JEPA 2': (video_layouts.VJEPA2, {}),
  'R(2+1)D': (convolution_layouts.R2PLUS1D, {'kind': 'r2plus1d'}),
  'MC3': (convolution_layouts.R3D, {'kind': 'mc3'}),
  'S3D': (convolution_layouts.S3D, {}),
}


def own_params(layout, fields):
  """(encoder, its parameters and statistics, none of them alike) of a small model of a layout's kind."""
  name = layout.encoder
  options = {'name': name, **encoders.encoder_class({'name': name}).DEBUG, **SMALL[name], **fields}
  encoder = encoders.make(options, 'float32')
  made = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 64, 64, 3)))
  made = dict(nn.meta.unbox(made))
  shapes = made['params'] | ({encoders.STATISTICS: made['batch_stats']} if 'batch_stats' in made else {})
  rng = np.random.default_rng(0)
  return encoder, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def arrays_of(layout, params, prefix):
  """What a file of that layout holds for these parameters."""
  flat, arrays = checkpoints.flatten(params), {}
  for rule in layout.rules:
    array = flat[rule.ours]
    if '/attention/' in rule.ours and layout.encoder != 'videoprism':
      kernel = rule.ours.endswith('kernel')
      array = array.reshape(len(array), *(2 * (int(np.sqrt(array[0].size)),) if kernel else (-1,)))
    if rule.ours == 'patch_embedding/projection/kernel':
      array = array.reshape(2, 8, 8, 3, -1)  # a tubelet of two frames of 8 x 8
    axes = None if rule.axes is None else np.argsort(rule.axes)
    back = lambda x, axes=axes, add=rule.add: np.ascontiguousarray((x if axes is None else x.transpose(axes)) - add)
    if '{}' in rule.theirs:
      arrays |= {prefix + rule.theirs.format(i): back(x) for i, x in enumerate(array)}
    else:
      arrays[prefix + rule.theirs] = back(array)
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def written(path, layout, arrays):
  if layout.encoder == 'videoprism':
    np.savez(path.with_suffix('.npz'), **arrays)
    return str(path.with_suffix('.npz'))
  save_file(arrays, path.with_suffix('.safetensors'))
  return str(path.with_suffix('.safetensors'))


def seeded(path, params):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  weights = files.read(path, 'raw')
  return weights, initialise.seed({'encoder': shapes, 'heads': {}, 'objectives': {}}, weights, class_names={})


@pytest.mark.parametrize('case', LAYOUTS)
@pytest.mark.parametrize('which', [0, -1])
def test_every_parameter_comes_from_its_array(tmp_path, case, which):
  layout, fields = LAYOUTS[case]
  _, params = own_params(layout, fields)
  file = arrays_of(layout, params, layout.prefixes[which])
  weights, (made, rows) = seeded(written(tmp_path / 'file', layout, file), params)
  assert (weights.model, weights.layout) == (layout.encoder, layout.name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made['encoder'], params)
  assert {row.action for row in rows} == {'loaded'} and len(rows) == len(checkpoints.flatten(params))


@pytest.mark.parametrize('case', LAYOUTS)
def test_a_file_that_lacks_an_array_or_has_one_more_is_refused(tmp_path, case):
  layout, fields = LAYOUTS[case]
  _, params = own_params(layout, fields)
  arrays = arrays_of(layout, params, layout.prefixes[0])
  signature = layout.prefixes[0] + layout.signature
  lost = max(name for name in arrays if name != signature)
  short = {name: array for name, array in arrays.items() if name != lost}
  with pytest.raises(UserError, match=r'has no array|incomplete'):
    seeded(written(tmp_path / 'short', layout, short), params)
  longer = arrays | {layout.prefixes[0] + 'another': np.zeros(3, np.float32)}
  with pytest.raises(UserError, match='has no place for'):
    seeded(written(tmp_path / 'longer', layout, longer), params)


def test_weights_of_another_encoder_are_refused_by_name(tmp_path):
  layout, fields = LAYOUTS['V-JEPA 2']
  _, params = own_params(layout, fields)
  weights = files.read(written(tmp_path / 'file', layout, arrays_of(layout, params, '')), 'raw')
  with pytest.raises(UserError, match=r"encoder 'vjepa2', but config\.model\.name is 'timesformer'"):
    initialise.check_encoder(weights, 'timesformer', {})
  with pytest.raises(UserError, match='has tubelet_size 2, patch_size 8, the model tubelet_size 8, patch_size 4'):
    initialise.check_encoder(weights, 'vjepa2', {'tubelet_size': 8, 'patch_size': 4, 'num_heads': 2})


def test_another_width_is_refused(tmp_path):
  layout, fields = LAYOUTS['VideoMAE']
  _, params = own_params(layout, fields)
  _, wide = own_params(layout, {'width': 32})
  with pytest.raises(UserError, match='the file has width 16, the model width 32'):
    seeded(written(tmp_path / 'file', layout, arrays_of(layout, params, 'videomae.')), wide)
