"""Draws docs/overview.png, the picture of README: streams, encoder, heads.

python docs/lab/overview.py
"""

import pathlib

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, VIDEO, IMAGE, ENCODER, OWN = '#222222', '#cfe3f5', '#dcefd5', '#f6e3c5', '#e9dcf2'

figure, axes = plt.subplots(figsize=(11, 4.6), dpi=110)
axes.set(xlim=(0, 110), ylim=(0, 46))
axes.axis('off')


def box(x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 9) -> None:
  """A rounded box with its text in the middle."""
  shape = FancyBboxPatch((x, y), width, height, boxstyle='round,pad=0.3,rounding_size=1', fc=colour, ec=INK, lw=0.8)
  axes.add_patch(shape)
  axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=size, color=INK)


def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
  axes.add_patch(
    FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=11, lw=1, color=INK, shrinkA=0, shrinkB=0)
  )


def title(x: float, text: str) -> None:
  axes.text(x, 44, text, ha='center', va='center', fontsize=11, weight='bold', color=INK)


title(11, 'sources')
title(38, 'streams')
title(64, 'one encoder')
title(94, 'heads and objectives')

SOURCES = (
  (34, 'kinetics\n240,000 videos', VIDEO),
  (25, 'ssv2\n169,000 videos', VIDEO),
  (16, 'imagenet\n1,281,000 images', IMAGE),
  (4, 'ucf101\nno labels', OWN),
)
for y, text, colour in SOURCES:
  box(1, y, 20, 6, text, colour)
box(29, 29, 18, 7, 'video\nclips of 16 frames', VIDEO)
box(29, 16, 18, 6, 'image\nclips of 1 frame', IMAGE)
box(29, 4, 18, 6, 'unlabelled\nits own views', OWN)
arrow((21.6, 37), (28.4, 33.5))
arrow((21.6, 28), (28.4, 31.5))
arrow((21.6, 19), (28.4, 19))
arrow((21.6, 7), (28.4, 7))
axes.text(38, 38.5, 'drawn in proportion to size', ha='center', fontsize=8, style='italic', color=INK)

box(55, 7, 18, 26, 'TimeSformer\nVideoPrism\nVideoMAE\nV-JEPA 2\nR(2+1)D, S3D, C3D\n\nshared by\nall streams', ENCODER)
arrow((47.6, 32), (54.4, 26))
arrow((47.6, 19), (54.4, 20))
arrow((47.6, 7), (54.4, 13))

HEADS = (
  (34, 'kinetics: 400 classes', VIDEO),
  (25, 'ssv2: 174 classes', VIDEO),
  (16, 'imagenet: 1,000 classes', IMAGE),
  (4, 'VTDL, HDC, statistics,\norder, V3S, MoDist', OWN),
)
for y, text, colour in HEADS:
  box(82, y, 25, 6, text, colour)
  arrow((73.6, 20 + (y - 16) / 3), (81.4, y + 3))
axes.text(
  64, 1.5, 'one step: every example trains its own head, all train the encoder', ha='center', fontsize=8, style='italic'
)

figure.savefig(pathlib.Path(__file__).parent.parent / 'overview.png', bbox_inches='tight', pad_inches=0.1)
