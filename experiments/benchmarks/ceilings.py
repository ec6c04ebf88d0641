"""What the devices of a mesh do at best: square matrix products, and reading memory.

An accelerator reads 256 MiB in less time than it takes to start a program and to hear that it is
done, so there the array is 2 GiB and one program goes over it several times: every pass needs the
result of the one before, so the compiler cannot leave it out. Which form of reading is compiled
best depends on the device and on the compiler; the ceiling is the fastest of three, each of which
XLA compiles for an H100 to one kernel a pass: sums of short rows, sums of long rows, and a change
of sign in place, which reads and writes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.measuring import Workload, compiled, measure

_PRODUCTS = 8  # in the chain of products: enough that starting it does not count
_CPU_BYTES = 2 ** 28  # of the array of a device that is a CPU: more than its caches hold
_BYTES = 2 ** 31  # of that of an accelerator
_PASSES = 16  # over the array of an accelerator, in one program
_SHORT_ROW, _LONG_ROW = 1024, 16384  # numbers


def products(setting, repeats):
  """{'side', 'gflops'} of a chain of square products, each device its own rows, in the compute dtype."""
  config, mesh = setting.policy.config, setting.runner.mesh
  rows = setting.batch.sft_rows * setting.batch.tokens / mesh.size
  side = 128 * max(1, round(math.cbrt(rows * config.width * config.feedforward_width) / 128))

  def make(count, spec):
    values = np.random.default_rng(0).normal(0, side ** -0.5, (count, side))
    return jax.device_put(values.astype(config.dtype), NamedSharding(mesh, spec))

  x, weight = make(side * mesh.size, PartitionSpec(mesh.axis_names)), make(side, PartitionSpec())
  chain = jax.jit(
    lambda x, weight: functools.reduce(lambda y, _: y @ weight, range(_PRODUCTS), x))
  workload = Workload(
    'matrix product', 'GFLOP', _PRODUCTS * 2 * mesh.size * side ** 3 / 1e9,
    {'product': compiled(chain, x, weight)}, lambda call, state: call('product', x, weight))
  return {'side': side, 'gflops': measure(workload, repeats)['units_per_second']}


def reading(mesh, repeats):
  """{'gigabytes', 'form'}: GB/s at which the devices together read memory, in the fastest form."""
  is_cpu = mesh.devices.flat[0].platform == 'cpu'
  forms = _cpu_forms(mesh) if is_cpu else _accelerator_forms(mesh, _BYTES, _PASSES)
  found = {form: measure(make(), repeats)['units_per_second'] for form, make in forms.items()}
  form = max(found, key=lambda form: found[form]['median'])
  return {'gigabytes': found[form], 'form': form}


def _cpu_forms(mesh):
  """One sum of one row a device, which its cores share."""
  def one_sum():
    x = _ones(mesh, (mesh.size, _CPU_BYTES // 4), 1.0)
    program = compiled(jax.jit(lambda x: x.sum(1)), x)
    return Workload('reading', 'GB', mesh.size * _CPU_BYTES / 1e9, {'sum': program},
                    lambda call, state: call('sum', x))
  return {'sum': one_sum}


def _accelerator_forms(mesh, size, passes):
  """{name: function that makes the Workload}, for arrays of `size` bytes a device."""
  return {f'sums of {_SHORT_ROW}': lambda: _row_sums(mesh, size, passes, _SHORT_ROW),
          f'sums of {_LONG_ROW}': lambda: _row_sums(mesh, size, passes, _LONG_ROW),
          'in place': lambda: _in_place(mesh, size, passes)}


def row_sums(x, carry_N, passes):
  """`passes` times the sum of every row of x, weighted by what the pass before found of that row."""
  one_pass = lambda i, carry_N: (x * carry_N[:, None]).sum(1)
  return jax.lax.fori_loop(0, passes, one_pass, carry_N)


def negated(x, passes):
  """x with its sign changed `passes` times."""
  return jax.lax.fori_loop(0, passes, lambda i, x: -x, x)


def _row_sums(mesh, size, passes, columns):
  rows = mesh.size * (size // 4 // columns)
  x, carry_N = _ones(mesh, (rows, columns), 1 / columns), _ones(mesh, (rows,), 1.0)
  program = compiled(jax.jit(row_sums, static_argnums=2), x, carry_N, passes)
  return Workload('reading', 'GB', passes * x.nbytes / 1e9, {'sums': program},
                  lambda call, carry_N: call('sums', x, carry_N, passes), carry_N)


def _in_place(mesh, size, passes):
  x = _ones(mesh, (mesh.size * (size // 4),), 1.0)
  program = compiled(jax.jit(negated, static_argnums=1, donate_argnums=0), x, passes)
  return Workload('reading', 'GB', 2 * passes * x.nbytes / 1e9, {'negated': program},
                  lambda call, x: call('negated', x, passes), x)


def _ones(mesh, shape, value):
  """An array full of one value, its first axis cut over all devices."""
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  return jax.jit(lambda: jnp.full(shape, value), out_shardings=sharding)()
