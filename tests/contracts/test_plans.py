"""Models of 8 billion parameters on a laptop: every array of their training has a sharding, and nothing is allocated."""

import math
import re

import jax
import pytest
from jax.sharding import PartitionSpec

from experiments import llama3_8b, pythia_tldr
from rlhf_jax import chips, config, gpus
from rlhf_jax.model import partition
from rlhf_jax.model.config import PRESETS, preset
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.step import init_state

MESH = {'data': 1, 'fsdp': 16, 'tensor': 4}
PARAMETERS = {'llama3-8b': 8.03e9, 'llama3.1-8b': 8.03e9, 'llama3.1-70b': 70.55e9, 'qwen3-8b': 8.19e9,
              'mistral-7b': 7.24e9, 'llama2-7b': 6.74e9, 'pythia-6.9b': 6.86e9, 'pythia-1b': 1.01e9, 'gpt2': 124.4e6,
              'gpt2-xl': 1.558e9, 'llama3.2-1b': 1.236e9, 'qwen2-0.5b': 0.494e9, 'qwen2-7b': 7.62e9,
              'qwen3-0.6b': 0.596e9, 'pythia-70m': 70.4e6}


def _shapes(name, model_class=LanguageModel):
  model, optimizer = model_class(preset(name)), make_optimizer(OptimizerConfig())
  return jax.eval_shape(lambda key: init_state(initial_params(model, key), optimizer), jax.random.key(0))


def _bytes(leaf, spec):
  parts = [MESH[axis] for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
  return math.prod(leaf.shape) * leaf.dtype.itemsize / math.prod(parts)


@pytest.mark.parametrize('name', PARAMETERS)
def test_presets_have_the_published_sizes(name):
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(name).params))
  assert count == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_presets_span_five_orders_of_magnitude():
  assert len(PRESETS) >= 20
  assert 1e5 < sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes('nano').params)) < 2e5


@pytest.mark.parametrize('model_class', [LanguageModel, ScalarModel])
@pytest.mark.parametrize('name', ['llama3-8b', 'llama3.1-8b', 'qwen3-8b', 'mistral-7b'])
def test_every_leaf_of_an_8b_state_has_a_sharding(name, model_class, capsys):
  state = _shapes(name, model_class)
  specs = partition.specs(state, MESH)
  pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
                   strict=True))
  whole = sum(_bytes(leaf, ()) for leaf, _ in pairs)
  per_device = sum(_bytes(leaf, spec) for leaf, spec in pairs)
  with capsys.disabled():
    print(f'\n{name} {model_class.__name__}: {whole / 2**30:.1f} GiB of float32 parameters and Adam moments, '
          f'{per_device / 2**30:.2f} GiB on each of {math.prod(MESH.values())} devices', end='')
  assert per_device < 1.02 * whole / math.prod(MESH.values())                   # only norms and scalars are not cut fully


def _sizes():
  for module in (llama3_8b, pythia_tldr):
    for name, topologies in module.SIZES.items():
      for topology, settings in topologies.items():
        yield pytest.param(module.EXPERIMENT, name, topology, settings, id=f'{name} on {topology}')


@pytest.mark.parametrize('default, name, topology, settings', _sizes())
def test_settings_for_devices_use_all_of_them(default, name, topology, settings):
  experiment = config.override(default, settings | {'preset': name})
  kind, shape = topology.split(':')
  count = math.prod(map(int, re.findall(r'\d+', shape))) * (2 if kind == 'tpu7x' else 1)
  mesh = experiment.mesh
  assert (mesh.data or 1) * (mesh.fsdp or 1) * mesh.tensor == count
  assert kind in chips.CHIPS
  if kind in gpus.TARGETS:
    assert experiment.attention != 'splash'
    assert mesh.tensor <= gpus.GPUS_A_HOST                                      # what it sends at each layer stays on a host
