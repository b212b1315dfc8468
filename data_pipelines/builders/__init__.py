"""TFDS builders for datasets that TFDS lacks. Importing this package registers them with `tfds.builder`.

Where TFDS is absent, `digits_rendering` still draws the embedded datasets.
"""

import importlib.util

if importlib.util.find_spec('tensorflow_datasets'):
  from data_pipelines.builders import digits as digits
  from data_pipelines.builders import moving_digits as moving_digits
