"""Devices to plan for that need not be here: TPU topologies by name, with what their makers publish of a chip; CPUs."""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from rlhf_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip; `hbm` is what its compiler lets a program use, measured with libtpu 0.0.42."""
  flops: float  # bfloat16, a second
  hbm: float  # bytes
  hbm_speed: float  # bytes a second
  ici_speed: float  # bytes a second to all neighbours together, one way: half of the bidirectional figure
  example: str  # a topology
  source: str
  options: dict = dataclasses.field(default_factory=dict)  # what the compiler must be told of the topology


_DOCS = 'https://docs.cloud.google.com/tpu/docs/'
CHIPS = {
  'v4': Chip(275e12, 30.75 * 2**30, 1200e9, 300e9, '2x2x4', _DOCS + 'v4; ICI: arXiv 2304.01433, table 4',
             {'chip_config_name': 'megacore'}),
  'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 200e9, '8x8', _DOCS + 'v5e'),
  'v5p': Chip(459e12, 95.74 * 2**30, 2765e9, 600e9, '4x4x4', _DOCS + 'v5p'),
  'v6e': Chip(918e12, 31.25 * 2**30, 1638e9, 400e9, '8x8', _DOCS + 'v6e'),
  # JAX has two devices on each of these chips: half of each figure.
  'tpu7x': Chip(1153.5e12, 94.75 * 2**30, 3690e9, 300e9, '2x2x4', _DOCS + 'tpu7x, halved: two devices a chip'),
}


def devices(topology):
  """The devices of a topology such as 'v5p:4x4x4' or 'cpu:8', of which only those of a CPU are real."""
  kind, _, shape = topology.partition(':')
  if kind == 'cpu' and shape.isdigit() and int(shape) > 0:
    return _cpu_devices(int(shape))
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise ConfigError(f'there is no topology {topology!r}. {_known()}')
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(f"a plan for {topology} needs the TPU compiler, libtpu, which is not installed. Run pip install -e "
                      "'.[tpu]', on any machine; or plan for cpu:N.")
  # Nobody need ask which TPU this machine is, nor take it; so several may plan at once.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)                      # planner.py keeps what it reads instead
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **CHIPS[kind].options).devices
  except jax.errors.JaxRuntimeError as error:
    said = str(error).splitlines()[0]
    raise ConfigError(f'the TPU compiler knows no topology {topology!r} ({said}). {_known()}') from error


def _known():
  return ('Known: ' + ', '.join(f'{kind}:{chip.example}' for kind, chip in CHIPS.items())
          + ', in these and other sizes, and cpu:N.')


def _cpu_devices(count):
  with contextlib.suppress(RuntimeError):                                       # a process that has begun has its devices
    jax.config.update('jax_num_cpu_devices', count)
  found = jax.devices('cpu')
  if len(found) < count:
    raise ConfigError(f'a plan for cpu:{count}, but this process has {len(found)} CPU devices, made when it began. Set '
                      f'XLA_FLAGS=--xla_force_host_platform_device_count={count}.')
  return found[:count]


def chip_of(topology):
  """The Chip of a topology; None for a CPU, of which nothing is published here."""
  return CHIPS.get(topology.partition(':')[0])
