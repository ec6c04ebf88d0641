"""What it takes to read a model's weights onto sharded devices and to write them again: memory of the host, and time.

    python -m experiments.weights
    python -m experiments.weights --preset pythia-410m --devices 8 --folder /mnt/disk

Writes a random checkpoint of the preset, then a fresh process reads it, cut along the width over that many CPU devices
(fsdp), and exports it again. The exported files must be those that were read, byte for byte.

Memory is the process's peak of resident memory (VmHWM, set back before each half; so Linux only) less what was resident
before. CPU devices live in host memory, so from reading the float32 parameters themselves are taken off too; on an
accelerator they would not be there. Mapped pages of the files count as long as a file is open. The checkpoint was
written just before, so reading it is mostly from the page cache.
"""

import concurrent.futures
import dataclasses
import filecmp
import functools
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import tyro

from rlhf_jax import report, runners
from rlhf_jax.errors import RlhfJaxError
from rlhf_jax.model import huggingface
from rlhf_jax.model.config import preset
from rlhf_jax.model.heads import LanguageModel, initial_params


@dataclasses.dataclass(frozen=True)
class Weights:
  """What is read and written, and on how many devices."""
  preset: str = 'llama3.2-1b'  # model, by name (rlhf_jax.model.config.PRESETS)
  devices: int = 8  # CPU devices that the parameters are cut over
  dtype: str = 'bfloat16'  # of the files: float32 or bfloat16
  folder: str = ''  # where the two checkpoints lie meanwhile; empty: the system's folder for temporary files


def _shapes(config):
  return jax.eval_shape(functools.partial(initial_params, LanguageModel(config)), jax.random.key(0))


def write_random(directory, config, dtype):
  """A checkpoint of random numbers, which are drawn as they are written."""
  numbers = np.random.default_rng(0)
  huggingface.save(directory, config, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), _shapes(config)),
                   kind='language', dtype=dtype, fetch=lambda x: numbers.standard_normal(x.shape, np.float32) / 50)


def read_and_write(source, target, dtype):
  """{'read': {...}, 'written': {...}}, measured in this process: seconds, and GB of host memory."""
  runner, config = runners.sharded(fsdp=jax.device_count()), huggingface.read_config(source)
  shardings = runner.shardings(_shapes(config), 'params')
  params, read = _measured(lambda: huggingface.load(source, config, shardings=shardings))
  _, written = _measured(lambda: huggingface.save(target, config, params, kind='language', dtype=dtype, fetch=runner.fetch))
  size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
  return {'read': read | {_MEMORY: read[_MEMORY] - size, 'parameters, GB': size}, 'written': written}


_MEMORY = 'host memory beyond the parameters, GB'


def _measured(do):
  """(do(), its seconds and by how many GB resident memory rose at the most)."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')                         # VmHWM := VmRSS
  before, began = _resident_peak(), time.monotonic()
  result = do()
  return result, {'seconds': time.monotonic() - began, _MEMORY: _resident_peak() - before}


def _resident_peak():
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e9


def main(wanted):
  """Prints the table."""
  config = preset(wanted.preset)
  with tempfile.TemporaryDirectory(dir=wanted.folder or None) as folder:
    source, target = pathlib.Path(folder) / 'source', pathlib.Path(folder) / 'target'
    write_random(source, config, wanted.dtype)
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={wanted.devices}'
    os.environ |= {'NPROC': '32', 'JAX_PLATFORMS': 'cpu'}                       # what a fresh process finds
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
      found = fresh.submit(read_and_write, source, target, wanted.dtype).result()
    files = sorted(file.name for file in source.iterdir())
    if sorted(file.name for file in target.iterdir()) != files or filecmp.cmpfiles(source, target, files, False)[0] != files:
      sys.exit('The exported files differ from those that were read.')
    on_disk = sum(file.stat().st_size for file in source.iterdir()) / 1e9
  largest = max(np.prod(config.shape(name)) for name in ('embedding_VD', 'up_DF')) * 4 / 1e9
  for half in found.values():
    half |= {'files, GB': on_disk, 'largest tensor in float32, GB': largest}
  report.print_table(found, f'{wanted.preset}, {wanted.dtype} files, {wanted.devices} CPU devices')


if __name__ == '__main__':
  try:
    main(tyro.cli(Weights, description=__doc__))
  except RlhfJaxError as error:
    sys.exit(f'{type(error).__name__}: {error}')
