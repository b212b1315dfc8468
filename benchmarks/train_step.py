"""Clips a second of our TimeSformer against Hugging Face's in PyTorch, on the same device in the same process.

    python -m benchmarks.train_step --models=B8 --batch=2 --depth=12 --rounds=5                # CPU: float32
    python -m benchmarks.train_step --models=B8,B16,L16 --batch=8 --dtype=bfloat16             # GPU
    python -m benchmarks.train_step --compare=mixed,heads --batch=2 --depth=1                  # ours against ours
    [--modes=inference,train] [--peers=eager,compile,sdpa] [--threads=2] [--json=FILE]

Needs the extra [torch] for the peers and no TensorFlow. Programs take turns, one call each a round, so that a machine
whose speed drifts is the same for all; the table has medians with the fastest and slowest round, and the ratio of our
time to each peer's as the median of the rounds' ratios. A training step is cross-entropy, gradients and SGD with
momentum. FLOPs are those of the matrix products of the model (a training step: three times a forward pass);
recomputation does not count. Memory is the compiler's for JAX, the allocator's peak for PyTorch on a GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from data_pipelines import flags
from data_pipelines.contract import UserError

_OPTIONS = argparse.Namespace()  # the flags, once they are parsed

CLASSES = 400
MODELS = {  # fields of TimeSformer
  'B8': {},
  'B16': {'num_frames': 16},
  'L16': {'width': 1024, 'depth': 24, 'num_heads': 16, 'mlp_dim': 4096, 'num_frames': 16, 'image_size': 448},
}
# Dense bfloat16 FLOP/s by a word of the device's name, from the vendors' data sheets.
PEAKS = {
  'H100': 989e12,
  'H200': 989e12,
  'A100': 312e12,
  'v4': 275e12,
  'v5 lite': 197e12,
  'v5p': 459e12,
  'v6 lite': 918e12,
}
PEERS = ('eager', 'compile', 'sdpa')


Run = Callable[[], None]  # one call, finished when it returns


def forward_flops(fields: dict[str, Any], depth: int) -> float:
  """Matrix-product FLOPs of one clip's forward pass, 2 for a multiplication with its addition."""
  width, mlp, frames = fields['width'], fields['mlp_dim'], fields['num_frames']
  places = (fields['image_size'] // fields['patch_size']) ** 2
  patches, in_frames = places * frames, frames * (places + 1)
  time = patches * (5 * width**2 + 2 * frames * width)  # query, key, value, out, temporal_fc; logits and values
  space = in_frames * (4 * width**2 + 2 * (places + 1) * width)
  mlps = (patches + 1) * 2 * width * mlp
  return 2 * (depth * (time + space + mlps) + patches * fields['patch_size'] ** 2 * 3 * width)


def jax_programs(
  fields: dict[str, Any], streams: dict[str, tuple[int, int]], heads: int, modes: Sequence[str]
) -> dict[str, tuple[Run, float]]:
  """{mode: (run, GiB)} of our model on streams {name: (clips, frames)}, whose losses are summed."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np

  from cover_jax.models import Heads, TimeSformer
  from cover_jax.models.heads import cross_entropy, head_columns

  names = [f'source{i}' for i in range(heads)]
  encoder = TimeSformer(**fields, dtype=jnp.dtype(_OPTIONS.dtype), remat=_OPTIONS.remat)
  classify = Heads(tuple((name, CLASSES) for name in names))
  columns = head_columns(classify.class_counts, names)
  rng = np.random.default_rng(0)
  size = fields['image_size']
  batches = {
    name: {
      'clip': jax.device_put(rng.normal(size=(clips, frames, size, size, 3)).astype(np.float32)),
      'label': jnp.asarray(rng.integers(CLASSES, size=clips), jnp.int32),
      'source': jnp.arange(clips, dtype=jnp.int32) % heads,
    }
    for name, (clips, frames) in streams.items()
  }
  clip = next(iter(batches.values()))['clip'][:1]
  boxed = jax.jit(
    lambda key: {
      'encoder': encoder.init(key, clip)['params'],
      'heads': classify.init(key, encoder.init_with_output(key, clip)[0])['params'],
    }
  )(jax.random.key(0))
  params = nn.meta.unbox(boxed)

  def logits(params, clip):
    encoded = encoder.apply({'params': params['encoder']}, clip)
    return classify.apply({'params': params['heads']}, encoded)

  def step(params, momentum, batches):
    def loss(params):
      return sum(
        cross_entropy(logits(params, b['clip']), b['label'], b['source'], columns).mean() for b in batches.values()
      )

    value, gradients = jax.value_and_grad(loss)(params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    return jax.tree.map(lambda p, m: p - 1e-4 * m, params, momentum), momentum, value

  def gib(compiled):
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return (used - memory.alias_size_in_bytes) / 2**30

  programs = {}
  if 'inference' in modes:
    infer = jax.jit(lambda params, batches: [logits(params, b['clip']) for b in batches.values()])
    infer = infer.lower(params, batches).compile()
    programs['inference'] = lambda: jax.block_until_ready(infer(params, batches)), gib(infer)
  if 'train' in modes:
    train = jax.jit(step, donate_argnums=(0, 1)).lower(params, params, batches).compile()
    state = [jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)]

    def run_train():
      state[0], state[1], value = train(*state, batches)
      value.block_until_ready()

    programs['train'] = run_train, gib(train)
  return programs


def patch_attention(model: Any) -> None:
  """Replaces the attention of a Hugging Face TimeSformer by `F.scaled_dot_product_attention`, in place."""
  import torch
  from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention

  def forward(self, hidden_states, output_attentions=False):
    rows, length, width = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    context = torch.nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
    return (context.transpose(1, 2).reshape(rows, length, width),)

  for module in model.modules():
    if isinstance(module, TimesformerSelfAttention):
      module.forward = forward.__get__(module)


def make_torch_model(fields: dict[str, Any], variant: str) -> Any:
  """Hugging Face's classifier of the same shape; variant 'eager', 'compile', or 'sdpa' (patched and compiled)."""
  import torch
  import transformers

  config = transformers.TimesformerConfig(
    image_size=fields['image_size'],
    patch_size=fields['patch_size'],
    num_frames=fields['num_frames'],
    hidden_size=fields['width'],
    num_hidden_layers=fields['depth'],
    num_attention_heads=fields['num_heads'],
    intermediate_size=fields['mlp_dim'],
    num_labels=CLASSES,
  )
  model = transformers.TimesformerForVideoClassification(config)
  model.to('cuda' if torch.cuda.is_available() else 'cpu')
  if variant == 'sdpa':
    patch_attention(model)
  return model if variant == 'eager' else torch.compile(model)


def torch_programs(
  fields: dict[str, Any], clips: int, variant: str, modes: Sequence[str]
) -> dict[str, tuple[Run, Callable[[], float]]]:
  """{mode: (run, function that gives the peak GiB since it was last asked)}."""
  import torch

  cuda = torch.cuda.is_available()
  device = 'cuda' if cuda else 'cpu'
  model = make_torch_model(fields, variant)
  size, frames = fields['image_size'], fields['num_frames']
  pixels = torch.randn(clips, frames, 3, size, size, device=device)
  label = torch.randint(CLASSES, (clips,), device=device)
  optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
  low = _OPTIONS.dtype == 'bfloat16'
  autocast = partial(torch.autocast, device, torch.bfloat16, enabled=low)

  def finish():
    if cuda:
      torch.cuda.synchronize()

  def inference():
    model.eval()
    with torch.no_grad(), autocast():
      model(pixels)
    finish()

  def train():
    model.train()
    with autocast():
      loss = torch.nn.functional.cross_entropy(model(pixels).logits.float(), label)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    finish()

  def peak():
    if not cuda:
      return None  # PyTorch counts only a GPU's
    gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return gib

  return {mode: ({'inference': inference, 'train': train}[mode], peak) for mode in modes}


def interleave(programs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
  """Seconds of each call by program; one untimed call each comes first, and the first of a round rotates."""
  for run in programs.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  names = list(programs)
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      start = time.perf_counter()
      programs[name]()
      seconds[name].append(time.perf_counter() - start)
  return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
  """Median, smallest and largest ratio of the rounds."""
  ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
  return f'{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})'


def device_name() -> tuple[str, float | None]:
  """The device and its peak bfloat16 FLOP/s (None where it is not known, as on a CPU)."""
  import jax

  kind = jax.devices()[0].device_kind
  return kind, next((peak for word, peak in PEAKS.items() if word in kind), None)


def model_fields(name: str) -> dict[str, Any]:
  """The fields of a model of `MODELS`, with the depth that was asked for."""
  from cover_jax.models import TimeSformer

  model = TimeSformer(**MODELS[name])
  names = ('patch_size', 'width', 'depth', 'num_heads', 'mlp_dim', 'num_frames', 'image_size')
  fields = {field: getattr(model, field) for field in names}
  return fields | ({'depth': _OPTIONS.depth} if _OPTIONS.depth else {})


def against_peers(name: str, results: dict[str, Any]) -> None:
  """Prints and stores the rows of one model: ours and the peers', inference and training."""
  fields = model_fields(name)
  clips = _OPTIONS.batch
  ours = jax_programs(fields, {'video': (clips, fields['num_frames'])}, 1, _OPTIONS.modes)
  theirs = {peer: torch_programs(fields, clips, peer, _OPTIONS.modes) for peer in _OPTIONS.peers}
  for mode in _OPTIONS.modes:
    programs = {'cover_jax': ours[mode][0]} | {peer: made[mode][0] for peer, made in theirs.items()}
    for made in theirs.values():
      made[mode][1]()  # what was allocated before does not count
    memory = {'cover_jax': ours[mode][1]}
    seconds = interleave(programs, _OPTIONS.rounds)
    memory |= {peer: made[mode][1]() for peer, made in theirs.items()}
    flops = clips * forward_flops(fields, fields['depth']) * (3 if mode == 'train' else 1)
    for program, times in seconds.items():
      middle = median(times)
      peak, gib = device_name()[1], memory[program]
      share = '' if peak is None else f'{flops / middle / peak:8.1%} MFU'
      space = '' if gib is None else f'{gib:8.2f} GiB'
      against = '' if program == 'cover_jax' else f'ours/theirs {ratio(seconds["cover_jax"], times)}'
      print(
        f'{name:<5}{mode:<11}{program:<11}{middle * 1e3:9.1f} ms ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f})'
        f'{clips / middle:9.2f} clips/s{flops / middle / 1e12:9.3f} TFLOP/s'
        f'{share}{space}  {against}',
        flush=True,
      )
      results[f'{name} {mode} {program}'] = {'seconds': times, 'gib': gib, 'flops': flops}


def ours_against_ours(what: str, results: dict[str, Any]) -> None:
  """Two streams in one step against the sum of each alone; eight heads against one."""
  fields = model_fields('B8')
  clips = _OPTIONS.batch
  video, image = {'video': (clips, 8)}, {'image': (2 * clips, 1)}
  cases = {
    'mixed': {'video': (video, 1), 'image': (image, 1), 'both': (video | image, 1)},
    'heads': {'1 head': (video, 1), '8 heads': (video, 8)},
  }[what]
  programs = {
    name: jax_programs(fields, streams, heads, ['train'])['train'][0] for name, (streams, heads) in cases.items()
  }
  seconds = interleave(programs, _OPTIONS.rounds)
  for name, times in seconds.items():
    print(f'{what:<7}{name:<9}{median(times) * 1e3:9.1f} ms ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f})')
  if what == 'mixed':
    parts = [a + b for a, b in zip(seconds['video'], seconds['image'], strict=True)]
    print('mixed  both / sum of the parts', ratio(seconds['both'], parts), flush=True)
  else:
    print('heads  8 / 1', ratio(seconds['8 heads'], seconds['1 head']), flush=True)
  results[what] = seconds


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('benchmarks.train_step', __doc__)
  to.add_argument('--models', type=flags.words, default=['B8'], help=f'which of {", ".join(MODELS)}')
  to.add_argument(
    '--modes', type=flags.words, default=['inference', 'train'], help="what to time: 'inference', 'train'"
  )
  to.add_argument(
    '--peers',
    type=flags.words,
    default=['eager'],
    help=f'PyTorch variants: {", ".join(PEERS)} (attention patched + compile)',
  )
  to.add_argument(
    '--compare',
    type=flags.words,
    default=[],
    help="instead: 'mixed' (two streams against each alone), 'heads' (8 against 1)",
  )
  to.add_argument('--batch', type=int, default=2, help='clips a step')
  to.add_argument('--depth', type=int, default=0, help="blocks; 0 for the model's own")
  to.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the computation; parameters are float32'
  )
  to.add_argument('--remat', default='none', help='rematerialisation of ours')
  to.add_argument('--rounds', type=int, default=5, help='timed calls of each program, after one that is not')
  to.add_argument('--threads', type=int, default=0, help='cPU cores for both; 0 for all')
  to.add_argument('--json', default='', help='file for the figures; none if empty')
  return to


def main(argv: Sequence[str] | None = None) -> None:
  flags.parse(parser(), argv, _OPTIONS)
  for flag, known in (
    ('models', MODELS),
    ('modes', ('inference', 'train')),
    ('peers', PEERS),
    ('compare', ('mixed', 'heads')),
  ):
    if unknown := sorted(set(getattr(_OPTIONS, flag)) - set(known)):
      raise UserError(f'--{flag} names {", ".join(unknown)}; expected of {", ".join(known)}.')
  if _OPTIONS.threads:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _OPTIONS.threads])
  # PyTorch shares the GPU.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if _OPTIONS.peers and not _OPTIONS.compare:
    try:
      import torch
      import transformers  # noqa: F401
    except ImportError as error:
      raise UserError(f'The peers need the extra [torch]: {error}. Or give --peers= for none.') from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  print(
    f'{device_name()[0]}, {len(os.sched_getaffinity(0))} cores, {_OPTIONS.dtype}, batch {_OPTIONS.batch}, depth '
    f'{_OPTIONS.depth or "full"}, {_OPTIONS.rounds} rounds, load {os.getloadavg()[0]:.1f}',
    flush=True,
  )
  results: dict[str, Any] = {}
  for what in _OPTIONS.compare:
    ours_against_ours(what, results)
  if not _OPTIONS.compare:
    for name in _OPTIONS.models:
      against_peers(name, results)
  if _OPTIONS.json:
    with open(_OPTIONS.json, 'w', encoding='utf-8') as f:
      json.dump(
        {
          'device': device_name()[0],
          'batch': _OPTIONS.batch,
          'depth': _OPTIONS.depth,
          'dtype': _OPTIONS.dtype,
          'rows': results,
        },
        f,
        indent=2,
      )


if __name__ == '__main__':
  sys.exit(flags.run(main))
