"""What a model needs to know of the device that it is compiled for, which need not be here."""

import dataclasses
import functools
import re

import jax

_GRAIN = 4 * 2**30  # bytes to which memory is rounded down, so that all processes of a run find the same
_PLATFORMS = {'cuda': 'gpu', 'rocm': 'gpu'}  # a platform has one name where it is present, another where not


@dataclasses.dataclass(frozen=True)
class Device:
  """Platform, memory and, of an NVIDIA GPU, compute capability."""
  platform: str  # 'cpu', 'gpu' or 'tpu'
  memory_bytes: int | None = None  # that programs may use; None: unknown, or shared with others
  compute_capability: float | None = None  # 9.0 of an H100

  @property
  def is_accelerator(self) -> bool:
    """Whether it computes beside the CPU, which then has time to spare."""
    return self.platform != 'cpu'


def describe(device: jax.Device, memory_bytes: int | None = None) -> Device:
  """The Device of one of JAX's devices. `memory_bytes` is to be passed where it is not here.

  Of several processes each asks a device of its own: all have to compile the same programs.
  """
  platform = _PLATFORMS.get(device.platform, device.platform)
  if platform == 'cpu':
    return Device('cpu')
  if memory_bytes is None:
    memory_bytes = _memory_of(device)
  if memory_bytes is not None:
    memory_bytes = max(_GRAIN, memory_bytes // _GRAIN * _GRAIN)
  capability = str(getattr(device, 'compute_capability', ''))  # gfx942 of an AMD GPU
  numbered = re.fullmatch(r'\d+\.\d+', capability)
  return Device(platform, memory_bytes, float(capability) if numbered else None)


def _memory_of(device: jax.Device) -> int | None:
  here = [each for each in jax.local_devices() if each.platform == device.platform]
  if here and device.process_index != jax.process_index():
    device = here[0]
  try:
    stats = device.memory_stats()
  except jax.errors.JaxRuntimeError:  # of a device that is not here
    return None
  return stats and stats.get('bytes_limit')


@functools.cache
def first_device() -> Device:
  """The first of this process."""
  return describe(jax.local_devices()[0])
