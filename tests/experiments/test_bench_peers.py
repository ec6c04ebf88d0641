"""That the peers do the work that is claimed, with the same model; how fast is not tested."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments import bench, bench_peers
from experiments.peers import by_hand, in_turns
from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import ConfigError
from rlhf_jax.model import forward
from rlhf_jax.model.config import preset
from rlhf_jax.model.heads import LanguageModel, initial_params

CONFIG = preset('nano')
TWO_CORES = bench_peers.BenchPeers().mesh
BATCH = bench.BatchConfig(sft_rows=4, reward_pairs=2, tokens=9, generate_prompts=3, ppo_prompts=4, prompt_tokens=5,
                          new_tokens=6, epochs=2, minibatches=2)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
  monkeypatch.setattr(torch, 'compile', lambda fn: fn)


def ours_in_torch(params):
  """The hand-written model with our parameters."""
  model = by_hand.Model(CONFIG, CONFIG.vocab_size)
  flat = lambda x, inputs: torch.tensor(np.asarray(x)).reshape(inputs, -1).T
  names = {'attention_norm_LD': 'before.weight', 'feedforward_norm_LD': 'between.weight', 'q_LDNH': 'attention.query.weight',
           'k_LDKH': 'attention.key.weight', 'v_LDKH': 'attention.value.weight', 'o_LNHD': 'attention.out.weight',
           'gate_LDF': 'gate.weight', 'up_LDF': 'up.weight', 'down_LFD': 'down.weight'}
  backbone, state = params['backbone'], model.state_dict()
  state['backbone.embedding.weight'] = torch.tensor(np.asarray(backbone['embedding_VD']))
  state['backbone.final.weight'] = torch.tensor(np.asarray(backbone['final_norm_D']))
  state['head.weight'] = torch.tensor(np.asarray(forward.unembed_DV(params))).T
  for ours, theirs in names.items():
    for i, layer in enumerate(backbone['blocks'][ours]):
      key = f'backbone.blocks.{i}.{theirs}'
      state[key] = torch.tensor(np.asarray(layer)) if layer.ndim == 1 else flat(layer, state[key].shape[1])
  model.load_state_dict(state)
  return model


def test_the_model_by_hand_is_ours():
  params = initial_params(LanguageModel(CONFIG), jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 7))
  with torch.no_grad():
    got = ours_in_torch(params)(torch.tensor(tokens)).numpy()
  want = forward.logits(LanguageModel(CONFIG), params, jnp.asarray(tokens), jnp.ones((3, 7), bool))
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_cache_by_hand_continues_what_the_whole_model_says():
  """Each token that was drawn is likely, and the last step sees the whole sequence: greedy steps agree with one pass."""
  side = by_hand.Torch(CONFIG, BATCH)
  side._step = lambda tokens, place, caches, mask: side.policy.head(
    side.policy.backbone(tokens, place, caches, mask)[:, -1]).argmax(-1, keepdim=True)
  side.step = side._step
  said = side.generate()
  with torch.no_grad():
    whole = side.policy(said)[:, BATCH.prompt_tokens - 1:-1].argmax(-1)
  assert said.shape == (3, 11) and torch.equal(whole, said[:, BATCH.prompt_tokens:])


def test_all_sides_do_all_rounds(monkeypatch):
  monkeypatch.setenv('TORCH_COMPILE_DISABLE', '1')                              # in the processes of the sides
  found = in_turns.compare(CONFIG, dataclasses.replace(BATCH, generate_prompts=4), TWO_CORES, ('generate',), 1)
  assert {name: set(seconds) for name, seconds in found.items()} == {'generate': {'rlhf_jax', 'PyTorch', 'transformers'}}
  assert all(seconds > 0 for times in found.values() for seconds in times.values())


def test_prompts_that_do_not_divide_over_the_devices_are_named():
  side = in_turns.Ours(CONFIG, BATCH, MeshConfig(runner='pmap'))
  with pytest.raises(ConfigError, match=r'--batch\.generate-prompts is 3, which does not divide over 8 parts of the mesh'):
    side.generate()


def test_a_ppo_round_moves_policy_and_value_and_nothing_else():
  side = by_hand.Torch(CONFIG, BATCH)
  before = {name: getattr(side, name).head.weight.clone() for name in ('policy', 'value', 'reference', 'judge')}
  side.ppo()
  moved = {name for name, weight in before.items() if not torch.equal(weight, getattr(side, name).head.weight)}
  assert moved == {'policy', 'value'}


def test_what_cannot_be_compared(capsys):
  with pytest.raises(SystemExit):
    bench_peers.main(['--preset', 'gpt2'])
  assert '--preset gpt2 is of the family gpt2; on CPUs the peers are written for llama. Take' in capsys.readouterr().err
