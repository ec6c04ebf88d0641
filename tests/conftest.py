"""Eight CPU devices for every test, set before JAX is imported.

NPROC sizes XLA's thread pool: with the default on a small machine, eight fake devices that wait for each other deadlock.
"""

import os

# Most of the tests' time is compiling, most of that LLVM's; test_kill compiles as users do.
_FLAGS = ('--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
          '--xla_llvm_disable_expensive_passes=true')
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), *_FLAGS))
os.environ.setdefault('NPROC', '32')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Reading a program's text and running it compile it twice; the cache makes that once.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(os.path.dirname(__file__), '..', '.pytest_cache', 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
