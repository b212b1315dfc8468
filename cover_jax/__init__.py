"""cover_jax: one action-recognition model, trained on many video and image datasets at once.

    import cover_jax
    model = cover_jax.load('run_or_export')
    model.predict('clip.mp4')

Importing this package imports neither JAX nor TensorFlow; `data_pipelines` holds all of TensorFlow.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from cover_jax.api import Model

__version__ = '0.1.0'
# A clip of the embedded test data, for the model that comes with the package, `load('demo')`.
DEMO_CLIP = os.path.join(os.path.dirname(__file__), 'demo', 'clip.mp4')


def load(path: str | os.PathLike[str], params: str = 'raw', heads: Sequence[str] = ()) -> 'Model':
  """Loads a trained model; see `cover_jax.api.load`."""
  from cover_jax import api

  return api.load(path, params, heads)
