"""cover_jax: one action-recognition model, trained on many video and image datasets at once.

Importing this package imports no TensorFlow; `data_pipelines` holds all of it.
"""

__version__ = '0.1.0'
