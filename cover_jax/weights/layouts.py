"""How other codebases name and lay out a ViT's or a TimeSformer's arrays: one table each, no code.

Sources: google-research/vision_transformer models_vit.py and big_vision vit.py (flax names), timm
vision_transformer.py, transformers' modeling_vit.py and modeling_timesformer.py, and the key list of the released
TimeSformer checkpoints, which is timm's with temporal parts.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Rule(NamedTuple):
  """One of our parameters, or a part of a head, and the array that it comes from.

  Attributes:
    ours: name below 'encoder/' (in one head, 'kernel' or 'bias').
    theirs: name in the file; '{}' stands for the number of the block, and our array stacks them. Without it, an
      array of our 'blocks/' is stacked in the file already.
    axes: the transposition of one array of the file that makes it ours.
    third: 0, 1 or 2 where the file's array holds query, key and value one after the other on its first axis.
    add: what the file's values lack to be ours: 1 where a LayerNorm multiplies by 1 + scale.
  """

  ours: str
  theirs: str
  axes: tuple[int, ...] | None = None
  third: int | None = None
  add: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a kind of file looks like.

  Attributes:
    name: for people.
    signature: an array that files of this kind, and of no kind listed later, have.
    prefixes: that the names may all carry.
    rules: of the encoder.
    head_name: what the one classifier is called.
    head: its rules.
    skippable: (regex, why) of arrays that may be left unused.
    class_row: the position embedding has a row for the class token; where it has none, the file's model may pool
      its patches and have no class token either.
    gelu_approximate: the form of GELU that such weights were trained with, where the kind of file tells.
    encoder: `config.model.name` of what such files hold.
  """

  name: str
  signature: str
  prefixes: tuple[str, ...]
  rules: tuple[Rule, ...]
  head_name: str
  head: tuple[Rule, ...]
  skippable: tuple[tuple[str, str], ...] = ()
  class_row: bool = True
  gelu_approximate: bool = False
  encoder: str = 'timesformer'

  def block_pattern(self) -> re.Pattern[str]:
    """Matches the name of an array of a numbered block; its group is the number."""
    stem = next((r.theirs.split('{}')[0] for r in self.rules if '{}' in r.theirs), None)
    return re.compile(f'{re.escape(stem)}(\\d+)' if stem else r'(?!)')


_TOKENS = ('class_token', 'position_embedding', 'time_embedding')


def _torch_rules(modules: Mapping[str, str]) -> Iterator[Rule]:
  """Rules of {our module: theirs}: a Linear's weight is [out, in] there, a convolution's [out, in, rows, columns]."""
  for ours, theirs in modules.items():
    stem, _, leaf = ours.rpartition('/')
    if leaf in _TOKENS:
      yield Rule(ours, theirs)
    elif leaf.startswith('norm'):
      yield Rule(f'{ours}/scale', f'{theirs}.weight')
      yield Rule(f'{ours}/bias', f'{theirs}.bias')
    elif leaf == 'qkv':
      for third, which in enumerate(('query', 'key', 'value')):
        yield Rule(f'{stem}/{which}/kernel', f'{theirs}.weight', (1, 0), third)
        yield Rule(f'{stem}/{which}/bias', f'{theirs}.bias', None, third)
    else:
      yield Rule(f'{ours}/kernel', f'{theirs}.weight', (2, 3, 1, 0) if ours == 'patch_embedding' else (1, 0))
      yield Rule(f'{ours}/bias', f'{theirs}.bias')


def _flax_rules(modules: Mapping[str, str]) -> Iterator[Rule]:
  """Rules of {our module: theirs} where the file's arrays are flax's and have our axes."""
  for ours, theirs in modules.items():
    leaf = ours.split('/')[-1]
    if leaf in _TOKENS:
      yield Rule(ours, theirs)
    else:
      for part in ('scale', 'bias') if leaf.startswith('norm') else ('kernel', 'bias'):
        yield Rule(f'{ours}/{part}', f'{theirs}/{part}')


def _torch_head(module: str) -> tuple[Rule, ...]:
  return Rule('kernel', f'{module}.weight', (1, 0)), Rule('bias', f'{module}.bias')


_QKV = ('query', 'key', 'value')
_HF_EMBEDDINGS = {
  'patch_embedding': 'embeddings.patch_embeddings.projection',
  'class_token': 'embeddings.cls_token',
  'position_embedding': 'embeddings.position_embeddings',
}
_HF_BLOCKS = {
  'blocks/norm_space': 'encoder.layer.{}.layernorm_before',
  'blocks/attention_space/out': 'encoder.layer.{}.attention.output.dense',
  'blocks/norm_mlp': 'encoder.layer.{}.layernorm_after',
  'blocks/mlp/hidden': 'encoder.layer.{}.intermediate.dense',
  'blocks/mlp/out': 'encoder.layer.{}.output.dense',
  'norm': 'layernorm',
}

HF_TIMESFORMER = Layout(
  name='Hugging Face TimeSformer',
  signature='encoder.layer.0.attention.attention.qkv.weight',
  prefixes=('timesformer.', ''),
  rules=tuple(
    _torch_rules(
      {
        **_HF_EMBEDDINGS,
        'time_embedding': 'embeddings.time_embeddings',
        'blocks/norm_time': 'encoder.layer.{}.temporal_layernorm',
        'blocks/attention_time/qkv': 'encoder.layer.{}.temporal_attention.attention.qkv',
        'blocks/attention_time/out': 'encoder.layer.{}.temporal_attention.output.dense',
        'blocks/temporal_fc': 'encoder.layer.{}.temporal_dense',
        'blocks/attention_space/qkv': 'encoder.layer.{}.attention.attention.qkv',
        **_HF_BLOCKS,
      }
    )
  ),
  head_name='classifier',
  head=_torch_head('classifier'),
)

HF_VIT = Layout(
  name='Hugging Face ViT',
  signature='encoder.layer.0.attention.attention.query.weight',
  prefixes=('vit.', ''),
  rules=tuple(
    _torch_rules(
      {
        **_HF_EMBEDDINGS,
        **{f'blocks/attention_space/{w}': f'encoder.layer.{{}}.attention.attention.{w}' for w in _QKV},
        **_HF_BLOCKS,
      }
    )
  ),
  head_name='classifier',
  head=_torch_head('classifier'),
  skippable=((r'pooler\.', 'pooler'),),
)

TIMM = Layout(
  name='timm ViT or released TimeSformer',
  signature='blocks.0.attn.qkv.weight',
  prefixes=('module.model.', 'module.', 'model.', ''),
  rules=tuple(
    _torch_rules(
      {
        'patch_embedding': 'patch_embed.proj',
        'class_token': 'cls_token',
        'position_embedding': 'pos_embed',
        'time_embedding': 'time_embed',
        'blocks/norm_time': 'blocks.{}.temporal_norm1',
        'blocks/attention_time/qkv': 'blocks.{}.temporal_attn.qkv',
        'blocks/attention_time/out': 'blocks.{}.temporal_attn.proj',
        'blocks/temporal_fc': 'blocks.{}.temporal_fc',
        'blocks/norm_space': 'blocks.{}.norm1',
        'blocks/attention_space/qkv': 'blocks.{}.attn.qkv',
        'blocks/attention_space/out': 'blocks.{}.attn.proj',
        'blocks/norm_mlp': 'blocks.{}.norm2',
        'blocks/mlp/hidden': 'blocks.{}.mlp.fc1',
        'blocks/mlp/out': 'blocks.{}.mlp.fc2',
        'norm': 'norm',
      }
    )
  ),
  head_name='head',
  head=_torch_head('head'),
  skippable=((r'pre_logits\.', 'pre_logits'),),
)


def _npz(name: str, signature: str, position: str, block: str, parts: tuple[str, str, str], class_row: bool) -> Layout:
  norm_mlp, attention, mlp = (f'Transformer/{block}/{part}' for part in parts)
  return Layout(
    name=name,
    signature=signature,
    prefixes=('opt/target/', 'params/img/', 'params/', 'img/', ''),
    rules=tuple(
      _flax_rules(
        {
          'patch_embedding': 'embedding',
          'class_token': 'cls',
          'position_embedding': position,
          'blocks/norm_space': f'Transformer/{block}/LayerNorm_0',
          **{f'blocks/attention_space/{w}': f'{attention}/{w}' for w in (*_QKV, 'out')},
          'blocks/norm_mlp': norm_mlp,
          'blocks/mlp/hidden': f'{mlp}/Dense_0',
          'blocks/mlp/out': f'{mlp}/Dense_1',
          'norm': 'Transformer/encoder_norm',
        }
      )
    ),
    head_name='head',
    head=(Rule('kernel', 'head/kernel'), Rule('bias', 'head/bias')),
    skippable=(
      (r'pre_logits/', 'pre_logits'),
      (r'MAPHead_0/', 'pooling head'),
      (r'(params/)?(txt/|t$|b$)', 'text tower'),
      (r'opt/', 'optimizer state'),
    ),
    class_row=class_row,
    gelu_approximate=True,
  )


_BIG_VISION_PARTS = ('LayerNorm_1', 'MultiHeadDotProductAttention_0', 'MlpBlock_0')

# In the order in which signatures are looked for.
LAYOUTS: tuple[Layout, ...] = (
  HF_TIMESFORMER,
  HF_VIT,
  TIMM,
  _npz(
    'google-research ViT',
    'Transformer/posembed_input/pos_embedding',
    'Transformer/posembed_input/pos_embedding',
    'encoderblock_{}',
    ('LayerNorm_2', 'MultiHeadDotProductAttention_1', 'MlpBlock_3'),
    class_row=True,
  ),
  _npz(
    'big_vision ViT',
    'Transformer/encoderblock_0/LayerNorm_1/scale',
    'pos_embedding',
    'encoderblock_{}',
    _BIG_VISION_PARTS,
    class_row=False,
  ),
  _npz(
    'big_vision ViT (scanned)',
    'Transformer/encoderblock/LayerNorm_1/scale',
    'pos_embedding',
    'encoderblock',
    _BIG_VISION_PARTS,
    class_row=False,
  ),
)
