"""The front door says what is true: its commands, flags, links, Python and the map of the package."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.cli import Command

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'experiments' / 'README.md', ROOT / 'tpu_setup' / 'README.md']
TEXT = {page: page.read_text() for page in PAGES}
README = TEXT[ROOT / 'README.md']


def blocks(text, language):
  """The fenced blocks of a language."""
  return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def commands():
  """Every command line that a page shows, in a block or in a table's cell."""
  for text in TEXT.values():
    for block in blocks(text, 'sh'):
      joined = block.replace('\\\n', ' ')
      yield from (line for line in joined.splitlines() if line.strip() and not line.startswith('#'))
    yield from re.findall(r'`(python -m [^`]+)`', re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL))


def experiment_calls():
  """(module, flags) of every experiment that a page starts."""
  for line in commands():
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
      if re.fullmatch(r'experiments\.[a-z_]+', word):                            # experiments.NAME stands for any
        rest = words[i + 1:]
        yield word, tuple(rest[:rest.index('&&')] if '&&' in rest else rest)


CALLS = sorted(set(experiment_calls()))
MODULES = sorted({module for module, _ in CALLS})
HERE = [module for module in MODULES if (ROOT / f'{module.replace(".", "/")}.py').exists()]


# ---- commands

def test_the_test_command_is_the_one_that_ci_runs():
  ci = (ROOT / '.ci' / 'run').read_text()
  install, tests = (re.search(rf'^{name}="(.*)"$', ci, re.MULTILINE).group(1) for name in ('install', 'tests'))
  assert f'{install} && {tests}' in README.splitlines()
  assert 'bash -c "$install && $tests"' in ci


def test_the_first_command_installs_and_runs_the_quickstart():
  assert blocks(README, 'sh')[0].strip() == 'pip install -e . && python -m experiments.quickstart'


def test_every_experiment_that_a_page_names_exists():
  assert MODULES == HERE


def test_every_experiment_has_a_row():
  rows = TEXT[ROOT / 'experiments' / 'README.md']
  names = [path.stem for path in (ROOT / 'experiments').glob('[!_]*.py')]
  assert not [name for name in names if f'`python -m experiments.{name}' not in rows]


@pytest.mark.parametrize('module', HERE)
def test_its_help_is_there(module):
  said = subprocess.run([sys.executable, '-m', module, '--help'], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert said.returncode == 0, said.stderr
  assert 'usage:' in said.stdout


@pytest.mark.parametrize('module, flags', [call for call in CALLS if call[0] in HERE],
                         ids=lambda part: part if isinstance(part, str) else ' '.join(part))
def test_its_flags_are_known(module, flags):
  experiment = getattr(importlib.import_module(module), 'EXPERIMENT', None)
  if experiment is not None:                                                      # sweep and bench have flags of their own
    configs.parse(experiment, Command(), '', flags)


@pytest.mark.parametrize('line', [line for line in commands() if line.startswith('tpu_setup/')])
def test_the_tpu_scripts_take_these_flags(line):
  script, *flags = shlex.split(line, comments=True)
  said = subprocess.run([ROOT / script, '--dry-run', *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert said.returncode == 0, said.stderr
  assert 'gcloud compute tpus ' in said.stdout


# ---- links and the map

@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
  linked = re.findall(r'\]\(([^)#\s]+)', TEXT[page])
  assert not [path for path in linked if '://' not in path and not (page.parent / path).exists()]


def test_the_map_names_every_file_of_the_package_and_no_other():
  drawn = next(block for block in blocks(README, 'text') if 'rlhf_jax/axes.py' in block)
  named = re.findall(r'^\S+\.py', drawn, re.MULTILINE)
  there = [str(path.relative_to(ROOT)) for path in (ROOT / 'rlhf_jax').rglob('*.py') if path.stem != '__init__']
  assert sorted(named) == sorted(there)


# ---- Python

@pytest.mark.parametrize('number', range(len(blocks(README, 'python'))))
def test_its_python_runs(number, capsys):
  names = {'__name__': 'readme'}
  exec(compile(blocks(README, 'python')[number], f'README.md, Python block {number}', 'exec'), names)
  if 'ppo_metrics' in names:                                                      # the three stages composed
    assert abs(names['sft_metrics']['loss'].value() - np.log(640)) < 1.5          # fresh parameters know about nothing
    assert names['rollout_metrics']['kl_nats_per_sequence'].value() == 0
    assert abs(names['ppo_metrics']['ratio'].value()[0, 0] - 1) < 1e-5
    assert capsys.readouterr().out.strip().endswith(' 0.0')


def test_the_readme_composes_the_stages():
  assert any('rj.make_update' in block for block in blocks(README, 'python'))
