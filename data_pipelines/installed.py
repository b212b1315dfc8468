"""What a plain install leaves out, asked for in one sentence before anything is done."""

import importlib.util

from data_pipelines.contract import UserError

# Of the extra [train] in setup.py, what is imported by name.
TRAIN = ('tensorflow', 'tensorflow_datasets', 'clu', 'tensorboard', 'sklearn')


def need_train(what: str) -> None:
  """Raises a UserError if data sets and training cannot be had here.

  Args:
    what: asks for it, as the sentence begins: 'Training'.
  """
  if missing := [name for name in TRAIN if importlib.util.find_spec(name) is None]:
    raise UserError(
      f'{what} needs {", ".join(missing)}, which a plain install leaves out (it loads models and predicts): '
      'pip install -e ".[train]" where setup.py is.'
    )
