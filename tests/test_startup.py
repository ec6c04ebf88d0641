"""What a process sets before it computes: read in a fresh one, and refused where the user has chosen."""

import os
import pathlib
import subprocess
import sys
import tomllib

import jax
import pytest

from rlhf_jax import startup
from rlhf_jax.errors import ConfigError


def test_compiled_programs_are_kept_where_the_docs_say(tmp_path):
  code = ('import jax; from rlhf_jax.startup import prepare_process; prepare_process(); '
          'print(jax.config.jax_compilation_cache_dir)')
  bare = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'} | {'HOME': str(tmp_path)}
  said = [subprocess.run([sys.executable, '-c', code], env=bare | more, capture_output=True, text=True, check=True).stdout
          for more in ({}, {'JAX_COMPILATION_CACHE_DIR': '/elsewhere'})]
  assert said == [f'{tmp_path}/.cache/rlhf_jax\n', '/elsewhere\n']


def test_a_run_takes_of_a_gpu_what_plans_count_with():
  name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
  code = ('import os; from rlhf_jax.startup import prepare_process; prepare_process(); '
          f'print(os.environ["{name}"])')
  bare = {key: value for key, value in os.environ.items() if key != name}
  said = [subprocess.run([sys.executable, '-c', code], env=bare | more, capture_output=True,
                         text=True, check=True).stdout for more in ({}, {name: '.5'})]
  assert said == ['0.9\n', '.5\n']


@pytest.mark.parametrize('devices, variable, expected', [
  ([], None, 0.3), (['/dev/nvidia0'], None, 0.0), (['/dev/nvidia0'], '7', 0.0), ([], '0', 0.0)])
def test_small_programs_are_kept_for_an_accelerator(devices, variable, expected, monkeypatch):
  before = jax.config.jax_persistent_cache_min_compile_time_secs
  monkeypatch.delenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', raising=False)
  if variable is not None:
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', variable)
  monkeypatch.setattr(startup.glob, 'glob', lambda pattern: devices)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)  # as the variable did
  try:
    startup._keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == expected
  finally:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)


class CountedLibrary:
  """In place of the C library."""
  def __init__(self, calls):
    self.mallopt = lambda option, value: calls.append((option, value))


@pytest.mark.parametrize('variable, devices, kept', [
  (None, [], [(-4, 0), (-1, -1), (-8, 1)]),                                     # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
  ('MALLOC_TRIM_THRESHOLD_', [], []), ('GLIBC_TUNABLES', [], []), (None, ['/dev/nvidia0'], [])])
@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere nothing is set')
def test_freed_memory_is_kept_on_a_cpu_unless_the_user_chose(variable, devices, kept, monkeypatch):
  calls = []
  for name in [name for name in os.environ if name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_')]:
    monkeypatch.delenv(name)
  if variable:
    monkeypatch.setenv(variable, '1')
  monkeypatch.setattr(startup.ctypes, 'CDLL', lambda name: CountedLibrary(calls))
  monkeypatch.setattr(startup.glob, 'glob', lambda pattern: devices)
  startup._keep_freed_memory()
  assert calls == kept


def test_a_cpu_is_divided_into_devices_before_it_is_used():
  code = ('import sys; from rlhf_jax.startup import prepare_process; prepare_process(int(sys.argv[1])); import jax; '
          'print(jax.device_count())')
  bare = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  said = subprocess.run([sys.executable, '-c', code, '3'], env=bare, capture_output=True, text=True, check=True).stdout
  assert said == '3\n'
  assert jax.local_device_count() == 8
  startup.divide_cpu(8)
  with pytest.raises(ConfigError, match=r'3 CPU devices are asked for, but this process has 8.*device_count=3'):
    startup.divide_cpu(3)


# ---- a GPU that is not used

PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@u22)
GCC version:  gcc version 13.3.0
"""


@pytest.mark.parametrize('text, version', [
  (PROPRIETARY, '535.104.05'), (OPEN, '580.65.06'), ('NVRM version: none\n', ''), (None, '')])
def test_the_version_of_a_driver_is_read_from_what_the_kernel_says(tmp_path, text, version):
  if text is not None:
    (tmp_path / 'version').write_text(text)
  assert startup._driver_version(tmp_path / 'version') == version


@pytest.mark.parametrize('platform, driver, installed, says, does', [
  ('cpu', '580.65.06', set(), 'its CUDA packages are not installed', "Run pip install -e '.[cuda]'"),
  ('cpu', '', set(), '(driver unknown), but JAX computes on the CPU: its CUDA', "'.[cuda]'"),
  ('cpu', '535.104.05', set(), 'its CUDA packages are not installed', "Run pip install -e '.[cuda12]'"),
  ('cpu', '535.104.05', {13}, 'too old for CUDA 13, which needs 580',
   "pip uninstall jax-cuda13-plugin jax-cuda13-pjrt, then pip install -e '.[cuda12]'"),
  ('cpu', '470.82', {13}, 'the driver is too old. CUDA 12 needs 525, CUDA 13 580', 'Update it'),
  ('cpu', '535.104.05', {12}, '(driver 535.104.05)', 'Run with JAX_PLATFORMS=cuda to see why'),
  ('cpu', '580.65.06', {13}, '(driver 580.65.06)', 'Run with JAX_PLATFORMS=cuda to see why'),
])
def test_why_a_gpu_is_not_used_and_what_helps(platform, driver, installed, says, does):
  said = startup.why_unused(platform, driver, installed)
  assert said.startswith('There is an NVIDIA GPU') and says in said and does in said
  assert '\n' not in said and startup.why_unused('gpu', driver, installed) == ''


def extras():
  """{extra: what it installs} of the project."""
  path = pathlib.Path(__file__).parent.parent / 'pyproject.toml'
  return tomllib.loads(path.read_text())['project']['optional-dependencies']


def test_the_extras_that_are_named_are_there():
  assert extras()['cuda'] == ['jax[cuda13]>=0.10,<0.12']
  assert extras()['cuda12'] == ['jax[cuda12]>=0.10,<0.12']


@pytest.mark.parametrize('devices, platforms, visible, expected', [
  (['/dev/nvidia0'], None, None, 'There is an NVIDIA GPU (driver '),
  (['/dev/nvidia0'], 'cpu', None, ''), (['/dev/nvidia0'], None, '', ''), ([], None, None, '')])
def test_it_is_said_where_a_gpu_is_there_and_may_be_used(
    devices, platforms, visible, expected, monkeypatch, capsys):
  monkeypatch.setattr(startup.glob, 'glob', lambda pattern: devices)
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  if visible is not None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', platforms)
  try:
    startup.say_unused_gpu()
  finally:
    jax.config.update('jax_platforms', before)
  said = capsys.readouterr().err
  assert said.startswith(expected) if expected else said == ''
