"""What a process does once, before its first computation: where compiled programs are kept, and how memory is."""

import ctypes
import glob
import os
import pathlib
import sys

import jax

from rlhf_jax.errors import ConfigError

_ACCELERATORS = '/dev/nvidia[0-9]*', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*'    # an NVIDIA GPU, a TPU, a newer TPU
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8                            # of <malloc.h>


def prepare_process(cpu_devices=None):
  """Call it before anything is computed. `cpu_devices` says how many devices share the cores; None leaves that as it is."""
  if cpu_devices is not None:
    divide_cpu(cpu_devices)
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


def _keep_compiled_programs():
  """Compiled programs outlive the process, in ~/.cache/rlhf_jax or where JAX_COMPILATION_CACHE_DIR says."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path.home() / '.cache' / 'rlhf_jax'))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def _keep_freed_memory():
  """On a CPU, XLA allocates and frees the buffers of a step anew each time, and glibc by default hands the large ones
  back to the kernel, so that every step pays for the same page faults again: a quarter of the quickstart's CPU time.

  With one arena that is never trimmed they stay. Not where there is an accelerator: its host has large weights to let
  go of, and many threads. GLIBC_TUNABLES or any MALLOC_ variable in the environment takes precedence.
  """
  chosen = any(name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_') for name in os.environ)
  if chosen or not sys.platform.startswith('linux') or any(map(glob.glob, _ACCELERATORS)):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda option, value: 0)     # other C libraries have none
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, -1)                                                 # never
  mallopt(_ARENA_MAX, 1)
