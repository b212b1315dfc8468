"""Writes torchvision_video.json: what torchvision's video networks compute in float64, weights and clips by formula.

pip install --no-deps --target DIR torchvision==0.28.0      # beside torch 2.13.0, CPU
PYTHONPATH=DIR:. python tests/data/make_torchvision_video.py
"""

import json
import pathlib

import torch

library = torch.library.Library('torchvision', 'DEF')  # torchvision's wheels want CUDA operators; its models do not
for operator in ('nms', 'qnms', 'roi_align', 'roi_pool', 'ps_roi_align', 'ps_roi_pool', 'deform_conv2d'):
  library.define(operator + '(Tensor a) -> Tensor')
library.define('_roi_align_backward(Tensor a) -> Tensor')

import torchvision  # noqa: E402

from tests.torchvision_formula import GEOMETRY, array_of, clip_of, probe  # noqa: E402

CLASSES = 5


def filled(name: str) -> torch.nn.Module:
  options = {'dropout': 0.0} if name == 's3d' else {}
  model = getattr(torchvision.models.video, name)(num_classes=CLASSES, **options)
  with torch.no_grad():
    for key, value in model.state_dict().items():
      if not key.endswith('num_batches_tracked'):
        value.copy_(torch.from_numpy(array_of(key, tuple(value.shape))))
  return model.double()


def main() -> None:
  result = {'torch': torch.__version__, 'torchvision': torchvision.__version__, 'networks': {}}
  for name, geometry in GEOMETRY.items():
    model = filled(name)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    x = torch.from_numpy(clip_of(geometry)).double().permute(0, 4, 1, 2, 3)
    evaluated = model.eval()(x).tolist()
    logits = model.train()(x)
    weights = torch.arange(1.0, logits.numel() + 1).reshape(logits.shape) / logits.numel()
    (logits * weights).sum().backward()
    running = {k: probe(v.numpy()) for k, v in model.state_dict().items() if 'running' in k}
    gradients = {k: probe(p.grad.numpy()) for k, p in model.named_parameters()}
    result['networks'][name] = {
      'shapes': shapes, 'eval': evaluated, 'train': logits.tolist(), 'running': running, 'gradients': gradients,
    }  # fmt: skip
  path = pathlib.Path(__file__).parent / 'torchvision_video.json'
  path.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
