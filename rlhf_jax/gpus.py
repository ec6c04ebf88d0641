"""NVIDIA GPUs that are not here, described so that XLA compiles for them.

XLA chooses kernels by the figures of a device: cores, caches, registers, memory. On a machine with
the device it asks CUDA for them; elsewhere they are data, a `Target`. What cannot be done without
the device is to time kernels against each other, so XLA takes those that it thinks the fastest.
Peak speeds, which XLA does not need, are in `chips.py`.
"""

import dataclasses
import importlib.util

import jax
from jax.experimental import topologies

from rlhf_jax.errors import ConfigError

GPUS_A_HOST = 8  # on one board, where every GPU reaches every other over NVLink
_PLUGINS = 'jax_cuda13_plugin', 'jax_cuda12_plugin'
# What JAX allocates of a GPU's memory where XLA_PYTHON_CLIENT_MEM_FRACTION says so. The rest is for
# CUDA's context, loaded kernels, the workspaces of libraries, and the buffers of NCCL.
MEMORY_FRACTION = 0.9


@dataclasses.dataclass(frozen=True)
class Target:
  """What CUDA reports of a device, and what JAX calls it."""
  name: str
  capability: tuple[int, int]
  memory: int  # bytes that CUDA reports: less than the sum of the chips on the board
  memory_speed: int  # bytes a second
  l2_cache: int  # bytes
  cores: int  # streaming multiprocessors
  units_a_core: int  # float32
  clock_ghz: float
  shared_memory: int  # bytes of a core
  shared_memory_of_a_block: int  # bytes that a kernel may ask for

  def text(self):
    """The text form of XLA's GpuTargetConfigProto."""
    major, minor = self.capability
    return f"""
      gpu_device_info {{
        threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
        registers_per_core_limit: 65536  registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        core_count: {self.cores}  fpus_per_core: {self.units_a_core}
        clock_rate_ghz: {self.clock_ghz}
        device_memory_size: {self.memory}  memory_bandwidth: {self.memory_speed}
        l2_cache_size: {self.l2_cache}
        shared_memory_per_core: {self.shared_memory}  shared_memory_per_block: 49152
        shared_memory_per_block_optin: {self.shared_memory_of_a_block}
        cuda_compute_capability {{ major: {major}  minor: {minor} }}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9  minor: 10 }}
      device_description_str: "{self.name}"
    """


def _hopper(name, memory, memory_speed):
  return Target(name, (9, 0), memory, memory_speed, l2_cache=50 * 2**20, cores=132,
                units_a_core=128, clock_ghz=1.98, shared_memory=228 * 2**10,
                shared_memory_of_a_block=227 * 2**10)


# CUDA C++ Programming Guide, table of compute capabilities; NVIDIA's datasheets.
TARGETS = {
  'h100': _hopper('NVIDIA H100 80GB HBM3', 84_942_979_072, 3_352_320_000_000),
  'h200': _hopper('NVIDIA H200', 150_121_545_728, 4_800_000_000_000),
  'a100': Target('NVIDIA A100-SXM4-80GB', (8, 0), 85_100_068_864, 2_039_040_000_000,
                 l2_cache=40 * 2**20, cores=108, units_a_core=64, clock_ghz=1.41,
                 shared_memory=164 * 2**10, shared_memory_of_a_block=163 * 2**10),
}


def usable(kind):
  """Bytes of one GPU that a program may use, when JAX is told to allocate MEMORY_FRACTION."""
  return MEMORY_FRACTION * TARGETS[kind].memory


def devices(kind, gpus, hosts=1):
  """GPUs of so many hosts, `gpus` on each; their `process_index` is the number of their host."""
  topology = f'{kind}:{gpus}' + (f'x{hosts}' if hosts > 1 else '')
  if not 0 < gpus <= GPUS_A_HOST:
    raise ConfigError(f'{topology} has {gpus} GPUs a host, of which there are 1 to {GPUS_A_HOST}: '
                      f'pass GPUs x hosts, {kind}:8x4 for 4 hosts.')
  if not any(importlib.util.find_spec(name) for name in _PLUGINS):
    raise ConfigError(f'a plan for {topology} needs the GPU compiler, which is not installed; it '
                      "needs no GPU. Run pip install -e '.[cuda]', on any Linux machine with an "
                      'x86-64 processor; or plan for cpu:N.')
  try:
    return topologies.get_topology_desc(
      platform='cuda', topology_name='', topology=f'1x{hosts}x{gpus}',
      target_config=TARGETS[kind].text()).devices
  except jax.errors.JaxRuntimeError as error:
    said = str(error).splitlines()[0]
    raise ConfigError(f'the GPU compiler knows no {topology} ({said}). Install the packages that '
                      "belong to this jaxlib: pip install -e '.[cuda]'.") from error
