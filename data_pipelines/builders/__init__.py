"""TFDS builders for datasets that TFDS lacks. Importing this package registers them with `tfds.builder`.

Where TFDS is absent, `digits_rendering` still draws the embedded datasets.
"""

import importlib.util

if importlib.util.find_spec('tensorflow_datasets'):
  from data_pipelines.builders import charades as charades
  from data_pipelines.builders import digit_crowds as digit_crowds
  from data_pipelines.builders import digits as digits
  from data_pipelines.builders import hmdb51 as hmdb51
  from data_pipelines.builders import image_folder as image_folder
  from data_pipelines.builders import kinetics as kinetics
  from data_pipelines.builders import moments_in_time as moments_in_time
  from data_pipelines.builders import moving_digits as moving_digits
  from data_pipelines.builders import multi_moments_in_time as multi_moments_in_time
  from data_pipelines.builders import something_something_v2 as something_something_v2
  from data_pipelines.builders import ucf101_videos as ucf101_videos
  from data_pipelines.builders import video_folder as video_folder
