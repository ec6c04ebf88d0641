"""One small, ragged batch for each of the three losses, for the contracts that run them on every kind of device."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import runners
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.losses.ppo import PPOLossConfig, ppo
from rlhf_jax.losses.preference import ranking
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.records import Comparisons, Demonstrations, Experience, Prompts

# Every size that a mesh axis cuts divides by 4, and no two letters have the same size by accident.
CONFIG = ModelConfig(vocab_size=72, width=32, layers=2, query_heads=8, kv_heads=4, head_width=6, feedforward_width=44,
                     context_length=32)
POLICY, SCALAR = LanguageModel(CONFIG), ScalarModel(CONFIG)
B, T, R, C = 16, 13, 6, 3

RUNNERS = {
  'single': lambda: runners.single(),
  'pmap': lambda: runners.pmapped(),
  'fsdp': lambda: runners.sharded(data=1, fsdp=8),
  'tensor': lambda: runners.sharded(data=2, tensor=4),
  'fsdp x tensor': lambda: runners.sharded(data=2, fsdp=2, tensor=2),
}


def _tokens(rng, *shape):
  return rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def _demonstrations(rng):
  length_B = rng.integers(2, T + 1, B)
  valid_BT = np.arange(T) < length_B[:, None]
  return Demonstrations(tokens_BT=_tokens(rng, B, T), valid_BT=valid_BT, mask_BT=valid_BT & (rng.random((B, T)) < 0.6))


def _comparisons(rng):
  valid_BCT = np.arange(T) < rng.integers(1, T + 1, (B, C))[..., None]
  rank_BC = rng.integers(-1, 3, (B, C)).astype(np.int32)                        # ties, missing, and prompts without a pair
  return Comparisons(tokens_BCT=_tokens(rng, B, C, T), valid_BCT=valid_BCT, rank_BC=rank_BC)


def _experience(rng):
  mask_BR = np.arange(R) < rng.integers(1, R + 1, B)[:, None]
  valid_BP = np.arange(T - R) >= rng.integers(0, T - R, B)[:, None]
  real_BR = lambda scale: (rng.normal(size=(B, R)) * scale).astype(np.float32)
  return Experience(tokens_BT=_tokens(rng, B, T), valid_BT=np.concatenate([valid_BP, mask_BR], 1), mask_BR=mask_BR,
                    value_mask_BR=mask_BR, logprob_BR=-4.2 + real_BR(0.3), value_BR=real_BR(0.7),
                    advantage_BR=real_BR(1.1), return_BR=real_BR(1.3))


def prompts(rows=B, width=T - R, seed=5):
  """Ragged, left-padded prompts."""
  rng = np.random.default_rng(seed)
  valid_BP = np.arange(width) >= rng.integers(0, width, rows)[:, None]
  return Prompts(tokens_BP=_tokens(rng, rows, width), valid_BP=valid_BP, sample_B=np.arange(rows, dtype=np.int32))


@jax.jit
def policy_params(key):
  """Fresh parameters of POLICY."""
  return initial_params(POLICY, key)


@jax.jit
def policy_and_value_params(key):
  """Fresh parameters of the PPO stage: two separate networks."""
  return {'policy': initial_params(POLICY, key), 'value': initial_params(SCALAR, jax.random.fold_in(key, 1))}


STAGES = {
  'sft': (cross_entropy(POLICY), policy_params, _demonstrations),
  'reward': (ranking(SCALAR, centring_weight=0.1), lambda key: initial_params(SCALAR, key), _comparisons),
  'ppo': (ppo(POLICY, SCALAR, PPOLossConfig(entropy_weight=0.01), temperature=0.7), policy_and_value_params, _experience),
}


def batch_of(stage):
  """The batch of that stage, the same at every call."""
  return jax.tree.map(jnp.asarray, STAGES[stage][2](np.random.default_rng(7)))
