"""Each room uses those below it: the table of docs/architecture.md is the order."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ('cover_jax', 'data_pipelines')


def rooms():
  """The rooms of the table, top floor first."""
  return re.findall(r'^\| `((?:cover_jax|data_pipelines)/\w+)/` \|', (ROOT / 'docs/architecture.md').read_text(), re.M)


def module_of(file):
  return '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports(file, modules):
  """The modules of ours that a file imports, wherever it does."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] in PACKAGES:
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        yield name if name in modules else node.module
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in modules)


def floor(module, files, order):
  """(package, room): a lower package or room has a higher number; files beside the rooms: commands -1, bottom 1000."""
  package, *rest = module.split('.')
  room = f'{package}/{rest[0]}' if rest else ''
  if room in order:
    return PACKAGES.index(package), order.index(room)
  bottom = package == 'data_pipelines' and rest and rest[0] in ('contract', 'declared', 'durable', 'paths', 'philox')
  return PACKAGES.index(package), 1000 if bottom else -1


def test_every_folder_is_a_room_of_the_table():
  folders = [f'{p}/{d.name}' for p in PACKAGES for d in (ROOT / p).iterdir() if (d / '__init__.py').exists()]
  assert sorted(folders) == sorted(rooms())


def test_arrows_run_down():
  files = {module_of(f): f for p in PACKAGES for f in (ROOT / p).rglob('*.py')}
  order, up = rooms(), []
  for module, file in files.items():
    for used in imports(file, files):
      if floor(used, files, order) < floor(module, files, order) and used not in PACKAGES:
        up.append(f'{module} -> {used}')
  assert len(files) > 90 and not up


def test_files_stay_short():
  long = {str(f.relative_to(ROOT)): n for p in PACKAGES for f in (ROOT / p).rglob('*.py') if (n := lines(f)) > 450}
  assert not long


def lines(file):
  return len(file.read_text().splitlines())
