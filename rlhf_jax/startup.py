"""What a process does once, before its first computation: where compiled programs are kept, how
memory is, and whether a GPU that is there is used.
"""

import ctypes
import glob
import importlib.util
import os
import pathlib
import re
import sys

import jax

from rlhf_jax import gpus
from rlhf_jax.errors import ConfigError

_NVIDIA = '/dev/nvidia[0-9]*'
_CUDA_12_DRIVER, _CUDA_13_DRIVER = 525, 580  # the oldest of each, on Linux
_ACCELERATORS = _NVIDIA, '/dev/accel[0-9]*', '/dev/vfio/[0-9]*'  # and TPUs, older and newer
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8                            # of <malloc.h>


def prepare_process(cpu_devices=None):
  """Call it before anything is computed. `cpu_devices` says how many devices share the cores; None leaves that as it is."""
  if cpu_devices is not None:
    divide_cpu(cpu_devices)
  # Of a GPU, what plans count with; JAX alone takes 75 %.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(gpus.MEMORY_FRACTION))
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')               # that PyTorch is absent; it is not needed
  _keep_compiled_programs()
  _keep_freed_memory()


def divide_cpu(count):
  """Makes so many devices of the CPU, which share its cores.

  ConfigError where JAX has begun with another number, and the CPU is what computes.
  """
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:                                                          # it has begun, and keeps what it has
    if jax.default_backend() == 'cpu' and (found := jax.local_device_count()) != count:
      raise ConfigError(f'{count} CPU devices are asked for, but this process has {found}, made when it began. Set '
                        f'XLA_FLAGS=--xla_force_host_platform_device_count={count}.') from None


def _has_accelerator():
  return any(map(glob.glob, _ACCELERATORS))


def _keep_compiled_programs():
  """Compiled programs outlive the process, in ~/.cache/rlhf_jax or where JAX_COMPILATION_CACHE_DIR says.

  JAX keeps there what it measured of GPU kernels, too. For a GPU the many small programs of a run
  take 0.1 to 0.4 s each to compile, so that all of them are kept; for a CPU, 0.02 to 0.1 s.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path.home() / '.cache' / 'rlhf_jax'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    least_s = 0.0 if _has_accelerator() else 0.3
    jax.config.update('jax_persistent_cache_min_compile_time_secs', least_s)


def say_unused_gpu():
  """Says on stderr why JAX computes on the CPU, where there is an NVIDIA GPU that it may use.

  ConfigError where JAX was told to use it and cannot.
  """
  hidden = jax.config.jax_platforms == 'cpu' or os.environ.get('CUDA_VISIBLE_DEVICES') == ''
  if hidden or not glob.glob(_NVIDIA):
    return
  driver, installed = _driver_version(), _cuda_plugins()
  try:
    platform = jax.default_backend()
  except RuntimeError as error:
    first_line = str(error).splitlines()[0]
    raise ConfigError(f'{why_unused("cpu", driver, installed)} JAX says: {first_line}') from error
  said = why_unused(platform, driver, installed)
  if said:
    print(said, file=sys.stderr, flush=True)


def why_unused(platform, driver, installed):
  """Why JAX computes on that platform where there is an NVIDIA GPU, and what helps; '' if it is used.

  `driver` is the version of the GPU's driver, '' where it is not known; `installed` has the CUDA
  versions for which there are JAX packages.
  """
  if platform != 'cpu':
    return ''
  major = int(driver.partition('.')[0] or _CUDA_13_DRIVER)
  extra = 'cuda' if major >= _CUDA_13_DRIVER else 'cuda12'
  seen = f'There is an NVIDIA GPU (driver {driver or "unknown"}), but JAX computes on the CPU'
  install = f"pip install -e '.[{extra}]'"
  if major < _CUDA_12_DRIVER:
    return (f'{seen}: the driver is too old. CUDA 12 needs {_CUDA_12_DRIVER}, CUDA 13 '
            f'{_CUDA_13_DRIVER}. Update it.')
  if not installed:
    return f'{seen}: its CUDA packages are not installed. Run {install}.'
  if installed == {13} and major < _CUDA_13_DRIVER:
    return (f'{seen}: the driver is too old for CUDA 13, which needs {_CUDA_13_DRIVER}. Update it, '
            f'or run pip uninstall jax-cuda13-plugin jax-cuda13-pjrt, then {install}.')
  return f'{seen}. Run with JAX_PLATFORMS=cuda to see why.'


def _driver_version(path='/proc/driver/nvidia/version'):
  """Version of the NVIDIA driver, as '580.65.06'; '' where the kernel does not say it."""
  try:
    text = pathlib.Path(path).read_text()
  except OSError:
    return ''
  found = re.search(r'Module\b.*?\s(\d+\.\d[\d.]*)\s', text)
  return found.group(1) if found else ''


def _cuda_plugins():
  """The CUDA versions for which JAX packages are installed."""
  return {version for version in (12, 13)
          if importlib.util.find_spec(f'jax_cuda{version}_plugin') is not None}


def _keep_freed_memory():
  """On a CPU, XLA allocates and frees the buffers of a step anew each time, and glibc by default hands the large ones
  back to the kernel, so that every step pays for the same page faults again: a quarter of the quickstart's CPU time.

  With one arena that is never trimmed they stay. Not where there is an accelerator: its host has large weights to let
  go of, and many threads. GLIBC_TUNABLES or any MALLOC_ variable in the environment takes precedence.
  """
  chosen = any(name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_') for name in os.environ)
  if chosen or not sys.platform.startswith('linux') or _has_accelerator():
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda option, value: 0)     # other C libraries have none
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, -1)                                                 # never
  mallopt(_ARENA_MAX, 1)
