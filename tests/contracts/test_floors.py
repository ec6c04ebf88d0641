"""Imports point downward only, and devices are known to one file."""

import ast
import pathlib

import pytest

import rlhf_jax

ROOT = pathlib.Path(rlhf_jax.__file__).parent
FLOORS = [
  ('errors', 'axes', 'records'),
  ('maths',),
  ('model',),
  ('losses',),
  ('optimizer', 'step', 'update', 'generate', 'experience', 'rewards', 'compiled'),
  ('ahead', 'runners', 'gpus', 'chips'),
  ('data', 'checkpoint', 'metrics', 'processes', 'roll_call', 'startup'),
  ('config', 'handoff', 'stages', 'planner', 'remedies', 'report', 'cli'),
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {'utils', 'util', 'common', 'helpers', 'helper', 'base', 'misc', 'registry', 'trainer'}
DEVICES = {'pmap', 'make_mesh', 'Mesh', 'set_mesh', 'shard_map', 'NamedSharding'}
# A kernel that XLA cannot cut is mapped over the mesh by the file that says how arrays are cut.
ALLOWED = {'runners.py': DEVICES, 'partition.py': {'shard_map'}}
FILES = sorted(path for path in ROOT.rglob('*.py') if path != ROOT / '__init__.py')


def _part(path):
  return path.relative_to(ROOT).parts[0].removesuffix('.py')


def _imported(path):
  """Names of the package's parts that a file imports, at the top or anywhere else in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'rlhf_jax':
      inner = node.module.split('.')[1:]
      yield from inner[:1] or [alias.name for alias in node.names]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split('.')[1] for alias in node.names if alias.name.startswith('rlhf_jax.'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
  here = FLOOR[_part(path)]
  for name in _imported(path):
    assert FLOOR[name] <= here, f'{path.relative_to(ROOT)} (floor {here}) imports {name} (floor {FLOOR[name]})'


def _names(source):
  """All names that a program uses: attributes, variables, and what it imports, under its own name or another."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
      yield from (alias.name.split('.')[-1] for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_devices_are_known_to_the_runners_alone(path):
  assert path.stem not in FORBIDDEN
  assert DEVICES & set(_names(path.read_text())) <= ALLOWED.get(path.name, set())


@pytest.mark.parametrize('source, found', [
  ('import jax\njax.pmap(f)', {'pmap'}),
  ('from jax import pmap as parallel', {'pmap'}),
  ('from jax.sharding import Mesh, NamedSharding', {'Mesh', 'NamedSharding'}),
  ('from jax.sharding import *\nm = Mesh(devices)', {'Mesh'}),
  ('def f():\n  import jax.experimental.shard_map', {'shard_map'}),
  ('with jax.set_mesh(m): pass', {'set_mesh'}),
  ("from jax.sharding import PartitionSpec\nmap('Mesh', x_BT)  # pmap", set()),
])
def test_devices_are_found_however_they_are_named(source, found):
  assert DEVICES & set(_names(source)) == found
