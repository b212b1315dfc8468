"""Weights out: transformers computes the same logits, a `.flax` file loads without TensorFlow, refusals are clear."""

import json
import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import cover_jax
from cover_jax import checkpoints, export
from cover_jax.experiment.state import init_params
from cover_jax.models import Heads
from cover_jax.weights import huggingface
from data_pipelines import durable
from data_pipelines.contract import UserError
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


def make_checkpoint(path, **changes):
  """A single-file checkpoint with random parameters, none of them zero."""
  experiment, *_ = tiny.build(tiny.config(**changes))
  params = jax.jit(lambda rng: nn.meta.unbox(init_params(experiment, rng)))(jax.random.key(0))
  rng = np.random.default_rng(0)
  noise = lambda x: (np.asarray(x) + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
  params, ema = jax.tree.map(noise, params), jax.tree.map(noise, params) if experiment.config.ema_decay else {}
  about = checkpoints.about(experiment.config.to_dict(), experiment.sources, 3)
  state = {'params': params, 'ema': ema, 'step': np.int32(3)}
  path.write_bytes(flax.serialization.msgpack_serialize({'about': about, 'state': state, 'interval': {}}))
  return experiment, params, str(path)


def our_logits(experiment, params, head, clip):
  heads = Heads(((head, params['heads'][head]['bias'].size),))
  encoded = experiment.encode(params['encoder'], clip)
  return np.asarray(heads.apply({'params': params['heads']}, encoded))


CASES = {
  'video head': ('acts', {}),
  'image head': ('things', {}),
  'embeddings of other sizes': ('acts', {'model__image_size': 24, 'model__num_frames': 6}),
  'joint attention, tanh GELU': ('moves', {'model__attention': 'joint', 'model__gelu_approximate': True}),
  'space attention on images': ('things', {'model__attention': 'space'}),
}


@pytest.mark.parametrize(
  'case', ['video head', *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != 'video head')]
)
def test_transformers_gives_the_same_logits(case, tmp_path):
  torch = pytest.importorskip('torch', reason='needs the extra [torch]')
  transformers = pytest.importorskip('transformers', reason='needs the extra [torch]')
  head, changes = CASES[case]
  experiment, params, path = make_checkpoint(tmp_path / 'c.flax', pixel_mean=(0.4, 0.5, 0.6), **changes)
  export.export(path, str(tmp_path / 'hf'), 'huggingface', head)
  model, info = transformers.TimesformerForVideoClassification.from_pretrained(
    tmp_path / 'hf', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  source = experiment.sources[experiment.source_id(head)]
  assert tuple(model.config.id2label[k] for k in range(len(source.class_names))) == source.class_names
  assert model.config.label2id[source.class_names[-1]] == len(source.class_names) - 1

  frames = experiment.stream_of(head).num_frames
  clip = np.random.default_rng(1).integers(0, 256, (2, frames, 16, 16, 3), np.uint8)
  processor = json.loads((tmp_path / 'hf' / 'preprocessor_config.json').read_text())
  pixels = clip * processor['rescale_factor'] - np.array(processor['image_mean'])
  pixels = (pixels / np.array(processor['image_std'])).transpose(0, 1, 4, 2, 3).astype(np.float32)
  with torch.no_grad():
    theirs = model.eval()(torch.from_numpy(pixels)).logits.numpy()
  ours = our_logits(experiment, params, head, clip)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()

  image_processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'hf')
  processed = image_processor(list(clip[0]), return_tensors='np')['pixel_values']
  np.testing.assert_allclose(processed[0], pixels[0], atol=1e-5)


def test_hugging_face_and_back(tmp_path):
  experiment, params, path = make_checkpoint(tmp_path / 'c.flax')
  export.export(path, str(tmp_path / 'hf'), 'huggingface', 'moves')
  arrays = load_file(tmp_path / 'hf' / 'model.safetensors')
  back = huggingface.from_hf_timesformer(arrays, num_heads=experiment.model.num_heads, head='moves')
  encoder = dict(params['encoder'])
  side = experiment.streams['video'].size[0] // experiment.model.patch_size
  assert encoder['position_embedding'].shape[1] == 1 + side**2  # else the trees below would differ
  jax.tree.map(np.testing.assert_array_equal, back['encoder'], encoder)
  jax.tree.map(np.testing.assert_array_equal, back['heads'], {'moves': params['heads']['moves']})


@pytest.mark.parametrize('which', ['raw', 'ema'])
def test_flax_file_loads_without_tensorflow(which, tmp_path):
  *_, path = make_checkpoint(tmp_path / 'c.flax')
  output = tmp_path / 'new' / 'model.flax'
  export.export(path, str(output), 'flax', params=which)
  loaded, before = checkpoints.load(str(output)), checkpoints.load(path)
  assert set(loaded['state']) == {'params'} and 'interval' not in loaded
  jax.tree.map(
    np.testing.assert_array_equal, loaded['state']['params'], before['state'][{'raw': 'params'}.get(which, which)]
  )
  assert loaded['about']['sources'] == before['about']['sources']
  assert loaded['about']['config']['eval_params'] == 'raw'
  with pytest.raises(UserError, match='no moving average'):
    export.export(str(output), str(output), 'flax', params='ema')


def test_half_precision_is_half_the_size_and_loads_as_float32(tmp_path):
  _, params, path = make_checkpoint(tmp_path / 'c.flax')
  whole, half = tmp_path / 'whole.flax', tmp_path / 'half.flax'
  export.export(path, str(whole), 'flax')
  export.export(path, str(half), 'flax', half=True)
  arrays = sum(x.nbytes for x in jax.tree.leaves(params))
  assert os.path.getsize(whole) - os.path.getsize(half) == pytest.approx(arrays / 2, rel=0.01)
  kept = checkpoints.load(str(half))['state']['params']
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)), kept, params)
  assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(np.float32)}
  assert cover_jax.load(str(half)).heads == cover_jax.load(str(whole)).heads
  again = tmp_path / 'again.flax'
  export.export(str(half), str(again), 'flax')  # in full precision, what was lost stays lost
  assert os.path.getsize(again) == pytest.approx(os.path.getsize(whole), abs=100)
  jax.tree.map(np.testing.assert_array_equal, checkpoints.load(str(again))['state']['params'], kept)
  assert (
    refused(path, tmp_path / 'hf', 'huggingface', 'acts', 'raw', True) == '--half is for --format=flax: leave it out.'
  )
  params['heads']['acts']['bias'][0] = 1e5
  loaded = checkpoints.load(path)
  loaded['state']['params'] = params
  with pytest.raises(UserError, match='beyond 65,504'):
    export.to_flax(loaded, half=True)


def refused(path, output, *args):
  with pytest.raises(UserError) as error:
    export.export(str(path), str(output), *args)
  assert not os.path.exists(output) and '\n' not in str(error.value)
  return str(error.value)


def test_refusals_write_nothing(tmp_path):
  _, _, path = make_checkpoint(tmp_path / 'c.flax', ema_decay=0.0)
  output = tmp_path / 'out'
  assert "choose one with --head, of ['acts', 'moves', 'things']" in refused(path, output, 'huggingface')
  assert "no head 'cats'" in refused(path, output, 'huggingface', 'cats')
  assert 'no moving average' in refused(path, output, 'huggingface', 'acts', 'ema')
  assert 'holds all heads' in refused(path, output, 'flax', 'acts')
  assert 'No checkpoint in' in refused(tmp_path / 'nowhere', output, 'flax')
  _, _, path = make_checkpoint(tmp_path / 'c.flax', model__attention='space')
  assert 'scores each frame' in refused(path, output, 'huggingface', 'acts')
  _, _, path = make_checkpoint(tmp_path / 'c.flax', model__image_temporal='skip')
  assert 'image_temporal="skip"' in refused(path, output, 'huggingface', 'things')
  _, _, path = make_checkpoint(tmp_path / 'c.flax', streams__video__size=(16, 24))
  assert '16 x 24' in refused(path, output, 'huggingface', 'acts')


def test_command_line(tmp_path):
  _, _, path = make_checkpoint(tmp_path / 'c.flax')

  def command(*args):
    done = subprocess.run(
      [sys.executable, '-X', 'importtime', '-m', 'cover_jax.export', *args], cwd=ROOT, capture_output=True, text=True
    )
    assert '| jax' in done.stderr.replace('  ', '') and not re.search(r'\|\s+tensorflow\b', done.stderr)
    return done

  done = command(path, '--format=huggingface', f'--output={tmp_path / "hf"}', '--head=acts')
  assert done.returncode == 0 and 'model.safetensors' in done.stdout
  assert sorted(os.listdir(tmp_path / 'hf')) == ['config.json', 'model.safetensors', 'preprocessor_config.json']
  (tmp_path / 'file').write_text('')
  done = command(path, f'--output={tmp_path / "file" / "model.flax"}')
  assert done.returncode == 2
  assert 'Error: --output=' in done.stderr and 'Traceback' not in done.stderr


def exported(folder):
  """(names of the classes, sum of the weights) of an export."""
  config = json.loads((folder / 'config.json').read_text())
  return sorted(config['label2id']), sum(float(a.sum()) for a in load_file(folder / 'model.safetensors').values())


class Killed(BaseException):
  pass


@pytest.mark.parametrize('exchange', [True, False])
def test_a_folder_is_the_old_export_or_the_new_one_wherever_it_is_stopped(tmp_path, monkeypatch, exchange):
  _, _, path = make_checkpoint(tmp_path / 'c.flax')
  output = tmp_path / 'out' / 'hf'
  output.parent.mkdir()
  loaded = checkpoints.load(path)
  of_head = {head: export.to_huggingface(loaded, head) for head in ('acts', 'moves')}
  publish = lambda head: export._write_folder(str(output), *of_head[head])
  both = {}
  for head in of_head:
    publish(head)
    both[head] = exported(output)
  assert both['acts'] != both['moves']
  if not exchange:
    monkeypatch.setattr(durable, '_exchange', lambda a, b: False)
  seen = []
  for last in range(100):
    publish('acts')
    calls = 0

    def step(real, last=last):
      def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == last + 1:
          raise Killed
        return real(*args, **kwargs)

      return call

    with monkeypatch.context() as patched:
      for module, name in ((os, 'mkdir'), (os, 'fsync'), (os, 'replace'), (os, 'rename'), (durable, '_exchange')):
        patched.setattr(module, name, step(getattr(module, name)))
      try:
        publish('moves')
        done = True
      except Killed:
        done = False
    found = exported(output)
    assert found in both.values()
    seen.append(found == both['moves'])
    assert os.listdir(tmp_path / 'out') == ['hf']
    if done:
      break
  assert seen[-1] and not seen[0] and sorted(seen) == seen and len(seen) > 8


def test_a_folder_that_holds_anything_else_is_refused_and_kept(tmp_path):
  _, _, path = make_checkpoint(tmp_path / 'c.flax')
  output = tmp_path / 'out'
  export.export(path, str(output), 'huggingface', 'acts')
  before = {p.name: p.read_bytes() for p in output.iterdir()}
  (output / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match=r"holds 'notes\.txt', which is not part of an export"):
    export.export(path, str(output), 'huggingface', 'moves')
  assert {p.name: p.read_bytes() for p in output.iterdir()} == before | {'notes.txt': b'mine'}
  with pytest.raises(UserError, match=r'is a folder: name the \.flax file'):
    export.export(path, str(output), 'flax')
  with pytest.raises(UserError, match='is a file: name a folder'):
    export.export(path, str(output / 'notes.txt'), 'huggingface', 'moves')
  (output / 'notes.txt').unlink()
  export.export(path, f'{output}/', 'huggingface', 'moves')
  assert exported(output)[0] != sorted(json.loads(before['config.json'])['label2id'])


def test_a_flipped_bit_of_an_export_is_noticed(tmp_path):
  _, _, path = make_checkpoint(tmp_path / 'c.flax')
  output = tmp_path / 'deep' / 'er' / 'model.flax'
  export.export(path, str(output), 'flax')
  whole = output.read_bytes()
  for at in range(0, len(whole), len(whole) // 50):
    output.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    with pytest.raises(UserError, match='not a readable checkpoint'):
      checkpoints.load(str(output))


@pytest.mark.parametrize('config', [{}, {'model': 3}, {'sources': []}])
def test_a_config_that_cannot_be_built_is_one_sentence(tmp_path, config):
  path = str(tmp_path / 'c.flax')
  about = json.dumps({'step': 3, 'config': config, 'sources': []})
  checkpoints.write(path, {'about': about, 'state': {'params': {'encoder': {'w': np.zeros(2, np.float32)}}}})
  with pytest.raises(UserError, match='holds a config that this version cannot build') as error:
    cover_jax.load(path)
  assert '\n' not in str(error.value)
  assert 'cannot build' in refused(path, tmp_path / 'hf', 'huggingface')
