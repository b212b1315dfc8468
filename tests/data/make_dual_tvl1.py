"""Writes dual_tvl1.npz: the flows that OpenCV's DualTVL1 finds, with its defaults, in the clips of motion_clips.py.

python -m venv DIR && DIR/bin/pip install opencv-contrib-python-headless==5.0.0.93 numpy av
PYTHONPATH=. DIR/bin/python tests/data/make_dual_tvl1.py $COVER_JAX_TEST_MEDIA

Every second pixel of every second row is kept, rounded to 1/64 pixel. Frames are not stored: they belong to others.
"""

import itertools
import pathlib
import sys

import cv2
import numpy as np

from tests.motion_clips import golden_clips

solver = cv2.optflow.DualTVL1OpticalFlow_create()
flows = {}
for name, clip in golden_clips(sys.argv[1]).items():
  grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
  flow = np.stack([solver.calc(a, b, None) for a, b in itertools.pairwise(grey)])
  flows[name] = (np.round(flow[:, ::2, ::2] * 64) / 64).astype(np.float16)
  print(name, flow.shape, 'moving', float((np.hypot(*np.moveaxis(flow, -1, 0)) > 0.5).mean()))
np.savez_compressed(pathlib.Path(__file__).with_name('dual_tvl1.npz'), **flows)
