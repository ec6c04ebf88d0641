"""Devices to plan for that need not be here: TPUs and GPUs, with what is published of them; CPUs."""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from rlhf_jax import gpus
from rlhf_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip, and how it is connected to others."""
  flops: float  # bfloat16, dense, a second
  hbm: float  # bytes that a program may use
  hbm_speed: float  # bytes a second
  link_speed: float  # bytes a second one way: half of the bidirectional figure
  example: str  # a topology
  source: str
  link: str = 'ICI'  # to all neighbours of a TPU together, or from a GPU to those of its host
  network_speed: float | None = None  # bytes a second one way to other hosts, if not over the link
  options: dict = dataclasses.field(default_factory=dict)  # for the TPU compiler, of the topology
  note: str = ''  # what must be so for `hbm` to be usable


def _gpu(kind, flops, hbm_speed, nvlink_speed, network_speed, source):
  note = (f'{gpus.MEMORY_FRACTION:.0%} of the memory that CUDA reports, which a run takes unless '
          'XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise')
  return Chip(flops, gpus.usable(kind), hbm_speed, nvlink_speed, '8', source, 'NVLink',
              network_speed, note=note)


_DOCS = 'https://docs.cloud.google.com/tpu/docs/'
_NVIDIA = 'https://www.nvidia.com/en-us/data-center/'
# `hbm` of a TPU is what its compiler lets a program use, measured with libtpu 0.0.42.
CHIPS = {
  'v4': Chip(275e12, 30.75 * 2**30, 1200e9, 300e9, '2x2x4',
             _DOCS + 'v4; ICI: arXiv 2304.01433, table 4',
             options={'chip_config_name': 'megacore'}),
  'v5e': Chip(197e12, 15.75 * 2**30, 819e9, 200e9, '8x8', _DOCS + 'v5e'),
  'v5p': Chip(459e12, 95.74 * 2**30, 2765e9, 600e9, '4x4x4', _DOCS + 'v5p'),
  'v6e': Chip(918e12, 31.25 * 2**30, 1638e9, 400e9, '8x8', _DOCS + 'v6e'),
  # JAX has two devices on each of these chips: half of each figure.
  'tpu7x': Chip(1153.5e12, 94.75 * 2**30, 3690e9, 300e9, '2x2x4',
                _DOCS + 'tpu7x, halved: two devices a chip'),
  # SXM boards. Network: one adapter a GPU, of 400 Gbit/s in DGX H100 and H200, 200 in DGX A100.
  'h100': _gpu('h100', 989e12, 3350e9, 450e9, 50e9, _NVIDIA + 'h100; network: DGX H100 datasheet'),
  'h200': _gpu('h200', 989e12, 4800e9, 450e9, 50e9, _NVIDIA + 'h200; network: DGX H200 datasheet'),
  'a100': _gpu('a100', 312e12, 2039e9, 300e9, 25e9, _NVIDIA + 'a100; network: DGX A100 datasheet'),
}


def devices(topology):
  """The devices of a topology: 'v5p:4x4x4', 'h100:8x4', or 'cpu:8', which alone has real ones."""
  kind, _, shape = topology.partition(':')
  if kind == 'cpu' and shape.isdigit() and int(shape) > 0:
    return _cpu_devices(int(shape))
  if kind in gpus.TARGETS and (sizes := re.fullmatch(r'(\d+)(?:x([1-9]\d*))?', shape)):
    _take_none()
    return gpus.devices(kind, int(sizes[1]), int(sizes[2] or 1))
  if kind not in CHIPS or kind in gpus.TARGETS or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise ConfigError(f'there is no topology {topology!r}. {_known()}')
  return _tpu_devices(kind, topology)


def _tpu_devices(kind, topology):
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(f"a plan for {topology} needs the TPU compiler, libtpu, which is not installed. Run pip install -e "
                      "'.[tpu]', on any machine; or plan for cpu:N.")
  # Nobody need ask which TPU this machine is, nor take it; so several may plan at once.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  _take_none()
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **CHIPS[kind].options).devices
  except jax.errors.JaxRuntimeError as error:
    said = str(error).splitlines()[0]
    raise ConfigError(f'the TPU compiler knows no topology {topology!r} ({said}). {_known()}') from error


def _take_none():
  """A plan needs no accelerator of this machine, and keeps what it reads itself (planner.py)."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)


def _known():
  return ('Known: ' + ', '.join(f'{kind}:{chip.example}' for kind, chip in CHIPS.items())
          + ', in these and other sizes, h100:8x4 for 4 hosts with 8 GPUs each, and cpu:N.')


def _cpu_devices(count):
  with contextlib.suppress(RuntimeError):                                       # a process that has begun has its devices
    jax.config.update('jax_num_cpu_devices', count)
  found = jax.devices('cpu')
  if len(found) < count:
    raise ConfigError(f'a plan for cpu:{count}, but this process has {len(found)} CPU devices, made when it began. Set '
                      f'XLA_FLAGS=--xla_force_host_platform_device_count={count}.')
  return found[:count]


def memory_of(topology) -> float | None:
  """Bytes that a program may use of a device of a topology; None where nothing is published."""
  chip = chip_of(topology)
  return chip and chip.hbm


def chip_of(topology):
  """The Chip of a topology; None for a CPU, of which nothing is published here."""
  return CHIPS.get(topology.partition(':')[0])
