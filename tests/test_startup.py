"""What a process sets before it computes: read in a fresh one, and refused where the user has chosen."""

import os
import subprocess
import sys

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
