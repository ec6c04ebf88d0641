"""Counts the bytes that are read out of safetensors files. As a program: one of two processes that share a model."""

import functools
import json
import sys

import jax
import safetensors

from rlhf_jax import runners
from rlhf_jax.model import huggingface
from rlhf_jax.model.heads import LanguageModel, initial_params

reads = []  # bytes, one entry a read
_safe_open = safetensors.safe_open


class CountedFile:
  """In place of `safetensors.safe_open`: the same file, which can be read by slices alone."""

  def __init__(self, *args, **options):
    self._file = _safe_open(*args, **options)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._file.__exit__(*error)

  def keys(self):
    return self._file.keys()

  def get_slice(self, name):
    return _CountedSlice(self._file.get_slice(name))


class _CountedSlice:
  def __init__(self, tensor):
    self._tensor, self.get_shape, self.get_dtype = tensor, tensor.get_shape, tensor.get_dtype

  def __getitem__(self, index):
    found = self._tensor[index]
    reads.append(found.nbytes)
    return found


def shardings(runner, config):
  """Where the parameters of a model lie."""
  shapes = jax.eval_shape(functools.partial(initial_params, LanguageModel(config)), jax.random.key(0))
  return runner.shardings(shapes, 'params')


def main(process, port, source, target):
  """Reads the model onto the devices of both processes, writes it again, and prints the bytes that this one read."""
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(process))
  from jax.experimental.multihost_utils import process_allgather
  safetensors.safe_open = CountedFile
  config, runner = huggingface.read_config(source), runners.sharded(fsdp=jax.device_count())
  params = huggingface.load(source, config, shardings=shardings(runner, config))
  huggingface.save(target, config, params, kind='language', shard_bytes=20_000,
                   fetch=functools.partial(process_allgather, tiled=True))
  print(json.dumps({'read': sum(reads), 'devices': [jax.local_device_count(), jax.device_count()]}))


if __name__ == '__main__':
  main(*sys.argv[1:])
