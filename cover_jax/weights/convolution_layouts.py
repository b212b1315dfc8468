"""How torchvision names and lays out the arrays of its video networks (BSD-3): one table each."""

from collections.abc import Iterator

from cover_jax.models.encoder import STATISTICS
from cover_jax.weights.layouts import Layout, Rule

_CONVOLUTION = (2, 3, 4, 1, 0)
_SKIPPABLE = ((r'.*num_batches_tracked$', 'counter of batches'),)


def _conv(ours: str, theirs: str) -> Rule:
  return Rule(f'{ours}/conv/kernel', f'{theirs}.weight', _CONVOLUTION)


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
  for name, part in (('scale', 'weight'), ('bias', 'bias')):
    yield Rule(f'{ours}/{name}', f'{theirs}.{part}')
  for name in ('mean', 'var'):
    yield Rule(f'{STATISTICS}/{ours}/{name}', f'{theirs}.running_{name}')


def _unit(ours: str, conv: str, norm: str) -> Iterator[Rule]:
  yield _conv(f'{ours}/convolution', conv)
  yield from _norm(f'{ours}/norm', norm)


def _factored(ours: str, theirs: str) -> Iterator[Rule]:
  yield from _unit(f'{ours}/space', f'{theirs}.0', f'{theirs}.1')
  yield _conv(f'{ours}/time', f'{theirs}.3')


def _resnet(factored: bool) -> Iterator[Rule]:
  if factored:
    yield from _factored('stem', 'stem')
    yield from _norm('stem_norm', 'stem.4')
  else:
    yield from _unit('stem', 'stem.0', 'stem.1')
  for layer in range(1, 5):
    for block in range(2):
      ours, theirs = f'layer{layer}_{block}', f'layer{layer}.{block}'
      for i in (1, 2):
        conv = f'{theirs}.conv{i}.0'
        yield from _factored(f'{ours}/conv{i}', conv) if factored else (_conv(f'{ours}/conv{i}', conv),)
        yield from _norm(f'{ours}/norm{i}', f'{theirs}.conv{i}.1')
      if layer > 1 and not block:
        yield _conv(f'{ours}/shortcut', f'{theirs}.downsample.0')
        yield from _norm(f'{ours}/shortcut_norm', f'{theirs}.downsample.1')


def _resnet_layout(name: str, signature: str, factored: bool) -> Layout:
  return Layout(
    name=name,
    encoder='resnet3d',
    signature=signature,
    prefixes=('module.', ''),
    rules=tuple(_resnet(factored)),
    head_name='fc',
    head=(Rule('kernel', 'fc.weight', (1, 0)), Rule('bias', 'fc.bias')),
    skippable=_SKIPPABLE,
  )


def _s3d() -> Iterator[Rule]:
  factored = lambda ours, theirs: (
    rule
    for i, part in enumerate(('space', 'time'))
    for rule in _unit(f'{ours}_{part}', f'{theirs}.{i}.0', f'{theirs}.{i}.1')
  )
  yield from factored('stem', 'features.0')
  yield from _unit('stage1_0', 'features.2.0', 'features.2.1')
  yield from factored('stage1_1', 'features.3')
  for stage, numbers in ((2, (5, 6)), (3, (8, 9, 10, 11, 12)), (4, (14, 15))):
    for j, number in enumerate(numbers):
      ours, theirs = f'stage{stage}_{j}', f'features.{number}'
      yield from _unit(f'{ours}_0', f'{theirs}.branch0.0', f'{theirs}.branch0.1')
      for branch in (1, 2):
        yield from _unit(f'{ours}_{branch}_in', f'{theirs}.branch{branch}.0.0', f'{theirs}.branch{branch}.0.1')
        yield from factored(f'{ours}_{branch}', f'{theirs}.branch{branch}.1')
      yield from _unit(f'{ours}_3', f'{theirs}.branch3.1.0', f'{theirs}.branch3.1.1')


R2PLUS1D = _resnet_layout('torchvision R(2+1)D', 'stem.3.weight', factored=True)
R3D = _resnet_layout('torchvision R3D or MC3', 'layer1.0.conv1.0.weight', factored=False)
S3D = Layout(
  name='torchvision S3D',
  encoder='s3d',
  signature='features.0.0.0.weight',
  prefixes=('module.', ''),
  rules=tuple(_s3d()),
  head_name='classifier',
  # A convolution of 1 x 1 x 1 there.
  head=(Rule('kernel', 'classifier.1.weight', (2, 3, 4, 1, 0)), Rule('bias', 'classifier.1.bias')),
  skippable=_SKIPPABLE,
)
# In the order in which signatures are looked for.
CONVOLUTION_LAYOUTS: tuple[Layout, ...] = (R2PLUS1D, R3D, S3D)
