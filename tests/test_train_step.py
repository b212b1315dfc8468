"""The benchmark against PyTorch: its FLOPs, its patch of the peer, and the turns it lets programs take."""

import numpy as np
import pytest

from benchmarks import train_step


def fields(**changes):
  base = {
    'patch_size': 16,
    'width': 768,
    'depth': 12,
    'num_heads': 12,
    'mlp_dim': 3072,
    'num_frames': 8,
    'image_size': 224,
  }
  return base | changes


def test_flops_are_the_papers():
  """TimeSformer, Table 5: 0.59 and 5.11 TFLOPs for 3 views of the base and HR model; a multiply-add counts as one."""
  assert 3 * train_step.forward_flops(fields(), 12) / 2 == pytest.approx(0.59e12, rel=0.02)
  high = fields(num_frames=16, image_size=448)
  assert 3 * train_step.forward_flops(high, 12) / 2 == pytest.approx(5.11e12, rel=0.02)


def test_programs_take_turns():
  calls = []
  programs = {name: lambda name=name: calls.append(name) for name in 'abc'}
  seconds = train_step.interleave(programs, 3)
  assert ''.join(calls) == 'abc' + 'abc' + 'bca' + 'cab'
  assert {name: len(times) for name, times in seconds.items()} == {'a': 3, 'b': 3, 'c': 3}


def test_ratio_is_by_round():
  """A machine that slows down for both does not change it."""
  assert train_step.ratio([1.0, 10.0, 3.0], [2.0, 20.0, 2.0]) == '0.50 (0.50-1.50)'


def test_patched_attention_is_the_same_function():
  torch = pytest.importorskip('torch', reason='needs the extra [torch]')
  pytest.importorskip('transformers', reason='needs the extra [torch]')
  small = fields(width=32, depth=2, num_heads=4, mlp_dim=64, num_frames=3, image_size=32)
  model = train_step.make_torch_model(small, 'eager').eval()
  with torch.no_grad():
    for parameter in model.parameters():  # as made, temporal_dense is zero and hides temporal attention
      parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.randn(2, 3, 3, 32, 32, device=next(model.parameters()).device)
    want = model(pixels).logits.cpu().numpy()
    train_step.patch_attention(model)
    got = model(pixels).logits.cpu().numpy()
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert not np.array_equal(got, want)  # another program
