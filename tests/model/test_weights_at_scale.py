"""Weights on many devices: the same bits wherever they lie, and no process reads more than its devices need.

The checkpoints are written by transformers, and are held against its own `state_dict` by formulas written out here.
"""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import counted
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from families import FAMILIES

from rlhf_jax import runners
from rlhf_jax.errors import CheckpointError
from rlhf_jax.model.huggingface import load, save
from rlhf_jax.model.huggingface_config import config_to_huggingface

# Sizes that a mesh of 2 x 2 x 2 divides; GPT-2's vocabulary does not divide by 4, so its table is cut along the width.
_EVEN = {'layers': 4, 'vocab_size': 64, 'query_heads': 4}
_FUSED = _EVEN | {'kv_heads': 4, 'head_width': 6}
CONFIGS = {
  'llama': dataclasses.replace(FAMILIES['llama'], **_EVEN),
  'gpt2': dataclasses.replace(FAMILIES['gpt2'], **_FUSED | {'vocab_size': 62}),
  'gpt_neox': dataclasses.replace(FAMILIES['gpt_neox'], **_FUSED, rope_share=1 / 3),
}
D, N, H = 24, 4, 6  # of the two whose tensors are fused
CUTS = {'usual': None, 'other axes': {'L': 'fsdp', 'D': None, 'H': 'tensor', 'N': None, 'K': None}}


def _stored(directory):
  """All tensors of a directory."""
  files = directory.glob('*.safetensors')
  return {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}


def _by_hand(name, tensors):
  """{our leaf: layer 1 of it}, of leaves whose axes are not theirs."""
  if name == 'gpt2':
    q, k, v = np.split(tensors['transformer.h.1.attn.c_attn.weight'], 3, axis=1)
    bias = np.split(tensors['transformer.h.1.attn.c_attn.bias'], 3)[1]
    return {'q_LDNH': q.reshape(D, N, H), 'k_LDKH': k.reshape(D, N, H), 'v_LDKH': v.reshape(D, N, H),
            'k_bias_LKH': bias.reshape(N, H), 'o_LNHD': tensors['transformer.h.1.attn.c_proj.weight'].reshape(N, H, D)}
  if name == 'gpt_neox':
    layer = 'gpt_neox.layers.1.'
    q, k, v = tensors[layer + 'attention.query_key_value.weight'].reshape(N, 3, H, D).transpose(1, 3, 0, 2)
    bias = tensors[layer + 'attention.query_key_value.bias'].reshape(N, 3, H)[:, 2]
    return {'q_LDNH': q, 'k_LDKH': k, 'v_LDKH': v, 'v_bias_LKH': bias,
            'down_LFD': tensors[layer + 'mlp.dense_4h_to_h.weight'].T}
  layer = 'model.layers.1.self_attn.'
  return {'q_LDNH': tensors[layer + 'q_proj.weight'].T.reshape(D, 4, 8),
          'v_LDKH': tensors[layer + 'v_proj.weight'].T.reshape(D, 2, 8),
          'o_LNHD': tensors[layer + 'o_proj.weight'].T.reshape(4, 8, D)}


@pytest.fixture(scope='module', params=CONFIGS)
def written(request, tmp_path_factory):
  """(name, config, directory, state_dict) of a random model that transformers wrote to several files."""
  directory, config = tmp_path_factory.mktemp(request.param), CONFIGS[request.param]
  sizes = transformers.AutoConfig.for_model(**config_to_huggingface(config))
  model, generator = transformers.AutoModelForCausalLM.from_config(sizes), torch.Generator().manual_seed(3)
  for p in model.parameters():
    p.data.copy_(torch.randn(p.shape, generator=generator))
  model.save_pretrained(directory, max_shard_size='20KB')
  assert len(list(directory.glob('model-*.safetensors'))) > 2
  return request.param, config, directory, {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.fixture
def reads(monkeypatch):
  """The bytes of every read, in order."""
  monkeypatch.setattr(safetensors, 'safe_open', counted.CountedFile)
  monkeypatch.setattr(counted, 'reads', [])
  return counted.reads


@pytest.mark.parametrize('cut', CUTS)
def test_sharded_is_unsharded(written, cut):
  name, config, directory, tensors = written
  where = counted.shardings(runners.sharded(data=2, fsdp=2, tensor=2, rules=CUTS[cut]), config)
  params = load(directory, config, shardings=where)
  assert jax.tree.map(lambda x: x.sharding, params) == where
  jax.tree.map(np.testing.assert_array_equal, params, load(directory, config))
  for leaf, layer in _by_hand(name, tensors).items():
    np.testing.assert_array_equal(params['backbone']['blocks'][leaf][1], layer)


def test_every_byte_is_read_once_and_never_a_whole_matrix(written, reads):
  """Though two devices hold each part. Only where heads interleave q, k and v is the tensor read for each of them."""
  _, config, directory, _ = written
  load(directory, config, shardings=counted.shardings(runners.sharded(data=2, fsdp=2, tensor=2), config))
  stored = _stored(directory)
  interleaved = sum(x.nbytes for name, x in stored.items() if 'query_key_value' in name)
  assert sum(reads) == sum(x.nbytes for x in stored.values()) + 2 * interleaved
  assert max(reads) <= max(x.nbytes for x in stored.values()) / 2


def test_an_export_of_sharded_parameters_is_that_of_whole_ones(written, tmp_path):
  _, config, directory, _ = written
  sharded = load(directory, config, shardings=counted.shardings(runners.sharded(data=2, fsdp=2, tensor=2), config))
  save(tmp_path / 'sharded', config, sharded, kind='language', shard_bytes=20_000)
  save(tmp_path / 'whole', config, jax.device_get(sharded), kind='language', shard_bytes=20_000)
  files = sorted(file.name for file in (tmp_path / 'whole').iterdir())
  assert len(files) > 4
  for file in files:
    assert (tmp_path / 'sharded' / file).read_bytes() == (tmp_path / 'whole' / file).read_bytes()
  found, stored = _stored(tmp_path / 'sharded'), _stored(directory)
  assert found.keys() == stored.keys()
  for name, x in found.items():
    np.testing.assert_array_equal(x, stored[name])


def test_a_shard_that_is_cut_short_is_named_before_anything_is_read(written, tmp_path, reads):
  _, config, directory, _ = written
  for file in directory.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  last = sorted(tmp_path.glob('*.safetensors'))[-1]
  last.write_bytes(last.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=f'{last.name} is damaged'):
    load(tmp_path, config, shardings=counted.shardings(runners.sharded(fsdp=2, tensor=2), config))
  assert not reads


@pytest.mark.parametrize('written', ['llama'], indirect=True)                   # biases would be read by both
def test_each_of_two_processes_reads_its_half_and_the_first_writes(written, tmp_path):
  directory = written[2]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'NPROC': '16',
                      'PYTHONPATH': str(pathlib.Path(runners.__file__).parents[1])}
  processes = [subprocess.Popen([sys.executable, counted.__file__, str(i), port, directory, tmp_path / str(i)], env=env,
                                text=True, stdout=subprocess.PIPE) for i in range(2)]
  try:
    said = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]  # Gloo talks first
  finally:
    for process in processes:
      process.kill()
  stored, found = _stored(directory), _stored(tmp_path / '0')
  assert not (tmp_path / '1').exists()
  assert said == [{'read': sum(x.nbytes for x in stored.values()) // 2, 'devices': [2, 4]}] * 2
  assert found.keys() == stored.keys()
  for name, x in found.items():
    np.testing.assert_array_equal(x, stored[name])
