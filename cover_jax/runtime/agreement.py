"""Several processes are one run only if they were told the same: what differs is named before anything is computed.

A host that was started with another flag, another version of the code or other data trains something else, without a
word: its gradients are averaged with the others'.
"""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import cover_jax
import data_pipelines
from cover_jax.runtime import processes
from data_pipelines.contract import UserError
from data_pipelines.sources import Source, content

# Those whose versions may change what is computed. TensorFlow only reads.
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'numpy', 'av', 'pillow')
_SHOWN = 8  # differences


def check(what: str, facts: Mapping[str, str]) -> None:
  """Compares facts of this process with those of the others. Every process must call it.

  Args:
    what: they are of, to begin the sentence with: 'The command'.
    facts: {what it is: its value}.

  Raises:
    UserError: in every process, if they differ; names each fact that does, and who says what.
  """
  told = [json.loads(text) for text in processes.gather_texts(json.dumps(facts, sort_keys=True))]
  differing = [
    key for key in dict.fromkeys(key for one in told for key in one) if len({one.get(key) for one in told}) > 1
  ]
  if differing:
    more = f', and {len(differing) - _SHOWN} more' if len(differing) > _SHOWN else ''
    listed = '; '.join(f'{key} is {_who_says_what(key, told)}' for key in differing[:_SHOWN])
    raise UserError(
      f'{what} is not the same in the processes of this run: {listed}{more}. Start every process with the same '
      'command, code and data.'
    )


def _who_says_what(key: str, told: list[Mapping[str, str]]) -> str:
  saying: dict[str, list[int]] = {}
  for number, one in enumerate(told):
    saying.setdefault(one.get(key, 'missing'), []).append(number)
  return ' and '.join(f'{value} in process {", ".join(map(str, who))}' for value, who in saying.items())


def of_command(mode: str, resume_from: int | None, config: Mapping[str, Any]) -> dict[str, str]:
  """The facts of a command: flags, each entry of the config, versions, the code. Not the workdir: mounts may differ."""
  facts = {'--mode': mode, '--resume_from': str(resume_from)}
  facts |= {f'config{key}': value for key, value in _entries('', config)}
  for package in PACKAGES:
    try:
      facts[f'the version of {package}'] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      facts[f'the version of {package}'] = 'none'
  return {**facts, 'the code of cover_jax (SHA-256)': _code([cover_jax.__path__[0], data_pipelines.__path__[0]])}


def of_data(sources: Iterable[Source]) -> dict[str, str]:
  """The facts of data sets: how many examples, and the hash of what the index knows of each frame."""
  return {f'source {s.name!r}': f'{s.num_examples:,} examples (SHA-256 {content(s)[:12]})' for s in sources}


def _entries(path: str, value: Any) -> list[tuple[str, str]]:
  if isinstance(value, Mapping) and value:
    return [entry for key, inner in value.items() for entry in _entries(f'{path}.{key}', inner)]
  return [(path, repr(value))]


def _code(folders: Iterable[str]) -> str:
  """The first digits of a hash of all Python files below folders."""
  digest = hashlib.sha256()
  for folder in map(pathlib.Path, folders):
    for file in sorted(folder.rglob('*.py')):
      digest.update(f'{file.relative_to(folder)}\n'.encode() + file.read_bytes())
  return digest.hexdigest()[:12]
