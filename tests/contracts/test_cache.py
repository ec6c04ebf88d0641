"""What is sampled is what is trained: decoding with a cache gives the numbers of one pass over the whole sequence."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import FAMILIES

from rlhf_jax.generate import generate
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model import forward
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.records import Prompts

B, P, R = 5, 9, 12


def _random_params(model, seed=0):
  """Fresh parameters with noise on all of them, so that a bias or a norm scale that is skipped shows."""
  params = initial_params(model, jax.random.key(seed))
  leaves, shape = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(shape, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def _prompts(config):
  rng = np.random.default_rng(1)
  valid_BP = np.arange(P) >= np.array([0, 3, P, 5, 1])[:, None]             # one has no token at all
  tokens_BP = rng.integers(0, config.vocab_size, (B, P)).astype(np.int32)
  return Prompts(tokens_BP=tokens_BP, valid_BP=valid_BP, sample_B=np.arange(B, dtype=np.int32))


# With the kernels of GPUs, of which that for decoding takes heads of 16 numbers, 32 and so on.
ON_GPUS = {'mistral on GPUs': tiny.by_cudnn(
  dataclasses.replace(FAMILIES['mistral'], layers=1, head_width=16, scan_layers=True))}


@pytest.mark.parametrize('family', [*FAMILIES, *ON_GPUS])
def test_decoding_equals_teacher_forcing(family, monkeypatch):
  """With a cache that grows on the way."""
  monkeypatch.setattr(importlib.import_module('rlhf_jax.generate'), '_RING_TOKENS', 6)
  model = LanguageModel((FAMILIES | ON_GPUS)[family])
  params, prompts = _random_params(model), _prompts(model.config)
  sampling = Sampling(temperature=0.9, new_tokens=R, end_tokens=(7,))
  rollout = jax.jit(lambda p: generate(model, p, prompts, jax.random.key(4), sampling))(params)
  forced_BR, _ = forward.next_logprobs(model, params, rollout.tokens_BT, rollout.valid_BT, start=P, temperature=0.9)
  np.testing.assert_allclose(rollout.logprob_BR, np.where(rollout.mask_BR, forced_BR, 0), atol=2e-5, rtol=0)
  assert rollout.mask_BR.sum() >= 2 * R


def test_the_window_is_shorter_than_the_sequence_and_matters():
  config = FAMILIES['mistral']
  assert config.window < R
  model, wide = LanguageModel(config), LanguageModel(FAMILIES['llama'])
  params, tokens_BT = _random_params(model), jnp.arange(20)[None] % 61
  valid_BT = jnp.ones((1, 20), bool)
  a, b = forward.logits(model, params, tokens_BT, valid_BT), forward.logits(wide, params, tokens_BT, valid_BT)
  np.testing.assert_allclose(a[:, :config.window], b[:, :config.window], atol=1e-5)
  assert np.abs(a - b)[:, -1].max() > 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_left_padding_changes_nothing(family):
  model = LanguageModel(FAMILIES[family])
  params, tokens_BT = _random_params(model), np.arange(3, 14)[None] % 61
  valid_BT = np.zeros((1, 17), bool)
  valid_BT[:, 4:15] = True
  bare = forward.logits(model, params, tokens_BT, np.ones((1, 11), bool))
  padded = forward.logits(model, params, np.pad(tokens_BT, ((0, 0), (4, 2))), valid_BT)
  np.testing.assert_allclose(padded[:, 4:15], bare, atol=2e-5)


@pytest.mark.parametrize('family', ['gpt2', 'gpt_neox', 'llama3', 'mistral', 'qwen3'])
def test_causality_by_gradient(family):
  """The logits at a place move with the embeddings of the tokens up to it (within the window), and of no other."""
  model = LanguageModel(FAMILIES[family])
  config, params, at = model.config, _random_params(model), 8
  tokens_BT, valid_BT = jnp.arange(14)[None] + 2, jnp.ones((1, 14), bool)       # every token once, so its row is its place

  def at_place(embedding_VD):
    changed = params | {'backbone': params['backbone'] | {'embedding_VD': embedding_VD}}
    hidden_BTD = forward.hidden(model, changed, tokens_BT, valid_BT)
    return jnp.square(hidden_BTD[0, at]).sum() + hidden_BTD[0, at, 0]

  gradient_VD = jax.grad(at_place)(params['backbone']['embedding_VD'])
  moves_T = np.abs(gradient_VD[tokens_BT[0]]).max(1) > 0
  reach = at if config.window is None else config.layers * (config.window - 1)
  np.testing.assert_array_equal(moves_T, (np.arange(14) <= at) & (np.arange(14) >= at - reach))


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_scanned_and_rematerialised_blocks_are_the_same_function(family):
  model = LanguageModel(FAMILIES[family])
  params, tokens_BT, valid_BT = _random_params(model), jnp.arange(22).reshape(2, 11), jnp.ones((2, 11), bool)
  loss = lambda m: jax.value_and_grad(lambda p: forward.next_logprobs(m, p, tokens_BT, valid_BT)[0].sum())(params)
  expected = loss(model)
  for changes in ({'remat': 'block'}, {'remat': 'dots'}, {'scan_layers': True}, {'remat': 'block', 'scan_layers': True}):
    got = loss(LanguageModel(dataclasses.replace(model.config, **changes)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, expected)


def test_bfloat16_compute_keeps_float32_where_it_matters():
  config = dataclasses.replace(FAMILIES['llama'], dtype='bfloat16')
  model, exact = LanguageModel(config), LanguageModel(FAMILIES['llama'])
  params = initial_params(model, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  tokens_BT, valid_BT = jnp.arange(22).reshape(2, 11), jnp.ones((2, 11), bool)
  rounded_BT, entropy_BT = forward.next_logprobs(model, params, tokens_BT, valid_BT)
  exact_BT, _ = forward.next_logprobs(exact, params, tokens_BT, valid_BT)
  assert rounded_BT.dtype == entropy_BT.dtype == jnp.float32
  assert 0 < np.abs(rounded_BT - exact_BT).max() < 0.1
