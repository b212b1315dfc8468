"""How the released video transformers name and lay out their arrays: one table each.

Arrays come out with our axes but for those of attention heads, which a reshape gives them: rows of a projection are
head after head. Sources: google-deepmind/videoprism (Apache-2.0), transformers' modeling_videomae.py and
modeling_vjepa2.py (Apache-2.0). VideoPrism's weights are CC-BY 4.0, V-JEPA 2's MIT or Apache-2.0, VideoMAE's
CC-BY-NC 4.0: not for commercial use.
"""

from collections.abc import Iterator

from cover_jax.weights.layouts import Layout, Rule


def _videoprism_norm(ours: str, theirs: str) -> Iterator[Rule]:
  yield Rule(f'{ours}/scale', f'{theirs}/scale', add=1.0)
  yield Rule(f'{ours}/bias', f'{theirs}/bias')


def _videoprism_stack(name: str) -> Iterator[Rule]:
  ours, theirs = f'{name}/layers', f'{name}_encoder/transformers_stack/x_layers'
  yield from _videoprism_norm(f'{ours}/norm_attention', f'{theirs}/layer_norm')
  for which in ('query', 'key', 'value'):
    yield Rule(f'{ours}/attention/{which}/kernel', f'{theirs}/self_attention/{which}/w')
    yield Rule(f'{ours}/attention/{which}/bias', f'{theirs}/self_attention/{which}/b')
  yield Rule(f'{ours}/attention/out/kernel', f'{theirs}/self_attention/post/w', (0, 2, 3, 1))
  yield Rule(f'{ours}/attention/out/bias', f'{theirs}/self_attention/post/b')
  yield from _videoprism_norm(f'{ours}/norm_mlp', f'{theirs}/ff_layer/layer_norm')
  for part, layer in (('hidden', 'ffn_layer1'), ('out', 'ffn_layer2')):
    yield Rule(f'{ours}/mlp/{part}/kernel', f'{theirs}/ff_layer/{layer}/linear/kernel')
    yield Rule(f'{ours}/mlp/{part}/bias', f'{theirs}/ff_layer/{layer}/linear/bias')


VIDEOPRISM = Layout(
  name='VideoPrism',
  encoder='videoprism',
  signature='spatial_encoder/transformers_stack/x_layers/layer_norm/scale',
  prefixes=('params/encoder/', 'params/vision_encoder/', 'params/', 'encoder/', 'vision_encoder/', ''),
  rules=(
    Rule('patch_embedding/kernel', 'patch_projection/linear/kernel'),
    Rule('patch_embedding/bias', 'patch_projection/linear/bias'),
    Rule('spatial_position', 'spatial_pos_emb/emb_var'),
    *_videoprism_stack('spatial'),
    *_videoprism_norm('spatial_norm', 'spatial_ln'),
    Rule('temporal_position', 'temporal_pos_emb/emb_var'),
    *_videoprism_stack('temporal'),
    *_videoprism_norm('temporal_norm', 'temporal_ln'),
  ),
  head_name='head',
  head=(),
  skippable=(
    (r'(params/)?(atten_pooler|projection)/', 'classifier'),
    (r'(params/)?(auxiliary_encoder|contrastive_vision_pooler|text_encoder)/', 'text tower and its pooling'),
  ),
)


def _linear(ours: str, theirs: str, bias: bool = True) -> Iterator[Rule]:
  yield Rule(f'{ours}/kernel', f'{theirs}.weight', (1, 0))
  if bias:
    yield Rule(f'{ours}/bias', f'{theirs}.bias')


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
  yield Rule(f'{ours}/scale', f'{theirs}.weight')
  yield Rule(f'{ours}/bias', f'{theirs}.bias')


def _tubelets(theirs: str) -> Iterator[Rule]:
  yield Rule('patch_embedding/projection/kernel', f'{theirs}.weight', (2, 3, 4, 1, 0))
  yield Rule('patch_embedding/projection/bias', f'{theirs}.bias')


def _videomae_blocks(attention: Iterator[Rule]) -> Iterator[Rule]:
  ours, theirs = 'blocks/layers', 'encoder.layer.{}'
  yield from _norm(f'{ours}/norm_attention', f'{theirs}.layernorm_before')
  yield from attention
  yield from _linear(f'{ours}/attention/out', f'{theirs}.attention.output.dense')
  yield from _norm(f'{ours}/norm_mlp', f'{theirs}.layernorm_after')
  yield from _linear(f'{ours}/mlp/hidden', f'{theirs}.intermediate.dense')
  yield from _linear(f'{ours}/mlp/out', f'{theirs}.output.dense')


def _videomae_attention() -> Iterator[Rule]:
  for which in ('query', 'key', 'value'):
    theirs = f'encoder.layer.{{}}.attention.attention.{which}'
    yield from _linear(f'blocks/layers/attention/{which}', theirs, bias=which != 'key')


def _videomae_released_attention() -> Iterator[Rule]:
  """Of files that transformers wrote before version 5: biases of their own names."""
  for which in ('query', 'key', 'value'):
    yield Rule(
      f'blocks/layers/attention/{which}/kernel', f'encoder.layer.{{}}.attention.attention.{which}.weight', (1, 0)
    )
  for which, theirs in (('query', 'q_bias'), ('value', 'v_bias')):
    yield Rule(f'blocks/layers/attention/{which}/bias', f'encoder.layer.{{}}.attention.attention.{theirs}')


def _videomae(name: str, signature: str, prefixes: tuple[str, ...], attention: Iterator[Rule]) -> Layout:
  return Layout(
    name=name,
    encoder='videomae',
    signature=signature,
    prefixes=prefixes,
    rules=(
      *_tubelets('embeddings.patch_embeddings.projection'),
      *_videomae_blocks(attention),
      *_norm('norm', 'fc_norm'),
    ),
    head_name='classifier',
    head=(Rule('kernel', 'classifier.weight', (1, 0)), Rule('bias', 'classifier.bias')),
    skippable=((r'(decoder\.|encoder_to_decoder|mask_token)', 'decoder of the pre-training'),),
  )


VIDEOMAE_RELEASED = _videomae(
  'VideoMAE (q_bias, v_bias)',
  'encoder.layer.0.attention.attention.q_bias',
  ('videomae.', ''),
  _videomae_released_attention(),
)
# Without their prefix these names would be those of a ViT.
VIDEOMAE = _videomae(
  'VideoMAE', 'encoder.layer.0.attention.attention.query.weight', ('videomae.',), _videomae_attention()
)


def _vjepa2_blocks(ours: str, theirs: str, attention: str, out: str, norms: tuple[str, str]) -> Iterator[Rule]:
  yield from _norm(f'{ours}/norm_attention', f'{theirs}.{norms[0]}')
  for which in ('query', 'key', 'value'):
    yield from _linear(f'{ours}/attention/{which}', f'{theirs}.{attention.format(which, which[0])}')
  yield from _linear(f'{ours}/attention/out', f'{theirs}.{out}')
  yield from _norm(f'{ours}/norm_mlp', f'{theirs}.{norms[1]}')
  yield from _linear(f'{ours}/mlp/hidden', f'{theirs}.mlp.fc1')
  yield from _linear(f'{ours}/mlp/out', f'{theirs}.mlp.fc2')


VJEPA2 = Layout(
  name='V-JEPA 2',
  encoder='vjepa2',
  signature='encoder.embeddings.patch_embeddings.proj.weight',
  prefixes=('vjepa2.', ''),
  rules=(
    *_tubelets('encoder.embeddings.patch_embeddings.proj'),
    *_vjepa2_blocks('blocks/layers', 'encoder.layer.{}', 'attention.{0}', 'attention.proj', ('norm1', 'norm2')),
    *_norm('norm', 'encoder.layernorm'),
  ),
  head_name='classifier',
  head=(),
  skippable=((r'predictor\.', 'predictor of the pre-training'), (r'(pooler|classifier)\.', 'classifier')),
)

# In the order in which signatures are looked for.
VIDEO_LAYOUTS: tuple[Layout, ...] = (VIDEOPRISM, VIDEOMAE_RELEASED, VIDEOMAE, VJEPA2)

# The parts of its classifiers, as an attentive head has them (`cover_jax.models.pooling.AttentiveBlock`).
VJEPA2_POOLER: tuple[Rule, ...] = (
  *_vjepa2_blocks(
    'layers/layers',
    'pooler.self_attention_layers.{}',
    'self_attn.{1}_proj',
    'self_attn.out_proj',
    ('layer_norm1', 'layer_norm2'),
  ),
  Rule('query_token', 'pooler.query_tokens'),
  *_norm('norm_tokens', 'pooler.cross_attention_layer.layer_norm1'),
  *(
    rule
    for which in ('query', 'key', 'value')
    for rule in _linear(which, f'pooler.cross_attention_layer.cross_attn.{which[0]}_proj')
  ),
  *_norm('norm_mlp', 'pooler.cross_attention_layer.layer_norm2'),
  *_linear('mlp/hidden', 'pooler.cross_attention_layer.mlp.fc1'),
  *_linear('mlp/out', 'pooler.cross_attention_layer.mlp.fc2'),
)
