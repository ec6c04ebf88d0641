"""From a Rollout to what PPO learns: log-probabilities, values, KL-shaped rewards, advantages, returns.

The same transformer that trains recomputes the log-probabilities, at the sampling temperature, for policy and reference:
so the first minibatch has ratio 1 and the KL is exactly 0 while the two share parameters.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError, check_choices, check_fields
from rlhf_jax.maths import gae as advantages
from rlhf_jax.maths import kl
from rlhf_jax.maths.masked import masked_sum, whiten
from rlhf_jax.model import forward
from rlhf_jax.records import Experience, Max, Mean, add_across


@dataclasses.dataclass(frozen=True)
class ExperienceConfig:
  """The switches between a score and an advantage; what published systems chose is in each comment."""
  kl_estimator: Literal['k1', 'k2', 'k3'] = 'k1'  # of the KL in the reward; k1 is unbiased there
  kl_limit: float | None = None  # clamp each token's KL to +- this (OpenRLHF: 10)
  discount: float = 1.0  # gamma
  trace: float = 0.95  # lambda of generalised advantage estimation
  score_slot: Literal['end', 'after_end'] = 'end'  # last response token (verl, OpenRLHF), or one past it (TRL)
  score_limit: float | None = None  # clamp scores to +- this
  missing_end: Literal['keep', 'replace', 'subtract'] = 'keep'  # what becomes of the score of a response cut by length
  missing_end_score: float = 1.0  # replace: its score is -this (OpenAI 2019: 1); subtract: its score falls by this
  truncation: Literal['terminal', 'bootstrap'] = 'terminal'  # value after a cut: 0 (all systems), or the value there
  whiten_rewards: bool = False  # divide rewards by their standard deviation, keep the mean (OpenAI 2019)
  whiten_advantages: bool = True  # over the response tokens of the global batch
  bessel: bool = True  # divide variances by count - 1 (verl, TRL) or by count (OpenAI 2019, OpenRLHF)

  def __post_init__(self):
    check_choices(self)
    for name in ('kl_limit', 'score_limit'):
      limit = getattr(self, name)
      check_fields('experience', self, (
        name, limit is None or 0 < limit < math.inf, 'positive, or None for no limit',
        'Pass None, or for example 10'))
    check_fields('experience', self, (
      'missing_end_score', abs(self.missing_end_score) < math.inf, 'finite',
      'Pass for example 1'))
    for name in ('discount', 'trace'):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f'{name}={getattr(self, name)}. It must be between 0 and 1.')


def shaped_rewards(score_B, kl_BR, mask_BR, kl_weight, score_slot='end'):
  """(reward_BR, value_mask_BR): -kl_weight * kl on response tokens, the score added in its slot; the slots with a value."""
  R = mask_BR.shape[1]
  slot_R = jnp.arange(R)
  last_B = mask_BR.sum(1) - 1
  at_B = last_B if score_slot == 'end' else jnp.minimum(last_B + 1, R - 1)
  at_B = jnp.where(last_B < 0, -1, at_B)                                        # an empty response has no slot
  reward_BR = jnp.where(mask_BR, -kl_weight * kl_BR, 0.0)
  reward_BR += jnp.where(slot_R == at_B[:, None], score_B.astype(jnp.float32)[:, None], 0.0)
  return reward_BR, slot_R <= at_B[:, None]


def experience(models, params, frozen, rollout, config, *, temperature, kl_weight, extra_score_B=None,
               model_score_weight=1.0, axis_name=None):
  """(Experience, metrics) of a Rollout.

  `models` has policy, value and reward; `params` is what PPO trains, {'policy', 'value'}; `frozen` is {'reference'} and,
  unless None, {'reward'}. The score is model_score_weight * reward model + `extra_score_B` (Python rewards, weighted).
  """
  check_axes(tokens_BT=rollout.tokens_BT, valid_BT=rollout.valid_BT, mask_BR=rollout.mask_BR,
             logprob_BR=rollout.logprob_BR, ended_B=rollout.ended_B, extra_score_B=extra_score_B)
  if isinstance(temperature, (int, float)) and temperature <= 0:                # a traced one is not known here
    raise ConfigError(f'experience at temperature={temperature}. It must be positive: greedy answers have no probability.')
  tokens_BT, valid_BT, mask_BR = rollout.tokens_BT, rollout.valid_BT, rollout.mask_BR
  start = tokens_BT.shape[1] - mask_BR.shape[1]
  logprob_BR, entropy_BR, value_BR, after_B = forward.policy_and_value(
    models.policy, models.value, params, tokens_BT, valid_BT, start=start, temperature=temperature)
  reference_BR, _ = forward.next_logprobs(models.policy, frozen['reference'], tokens_BT, valid_BT,
                                          start=start, temperature=temperature)
  score_B = _raw_score(models, frozen, rollout, extra_score_B, model_score_weight)
  learned_B = _judged(score_B, rollout.ended_B, config)

  kl_BR = jnp.where(mask_BR, kl.kl_k1(logprob_BR, reference_BR), 0.0)
  penalty_BR = kl.ESTIMATORS[config.kl_estimator](logprob_BR, reference_BR)
  if config.kl_limit is not None:
    penalty_BR = jnp.clip(penalty_BR, -config.kl_limit, config.kl_limit)
  reward_BR, value_mask_BR = shaped_rewards(learned_B, penalty_BR, mask_BR, kl_weight, config.score_slot)
  if config.whiten_rewards:
    reward_BR = whiten(reward_BR, value_mask_BR, bessel=config.bessel, keep_mean=True, axis_name=axis_name)
  value_BR = jnp.where(value_mask_BR, value_BR, 0.0)
  after_B = jnp.where(rollout.ended_B, 0.0, after_B) if config.truncation == 'bootstrap' else None
  advantage_BR, return_BR = advantages.gae(reward_BR, value_BR, value_mask_BR, discount=config.discount,
                                           trace=config.trace, bootstrap_B=after_B)
  if config.whiten_advantages:
    learned_advantage_BR = whiten(advantage_BR, mask_BR, bessel=config.bessel, axis_name=axis_name)
  else:
    learned_advantage_BR = jnp.where(mask_BR, advantage_BR, 0.0)
  made = Experience(tokens_BT=tokens_BT, valid_BT=valid_BT, mask_BR=mask_BR, value_mask_BR=value_mask_BR,
                    logprob_BR=logprob_BR, value_BR=value_BR, advantage_BR=learned_advantage_BR, return_BR=return_BR)

  gap_BR = jnp.where(mask_BR, jnp.abs(logprob_BR - rollout.logprob_BR), 0.0)
  per_sequence = lambda x_B: Mean(x_B.sum(dtype=jnp.float32), jnp.float32(x_B.shape[0]))
  per_token = lambda x_BR, mask: Mean(masked_sum(x_BR, mask), mask.sum(dtype=jnp.float32))
  error_BR = return_BR - value_BR
  metrics = {
    'score': per_sequence(score_B), 'score_squared': per_sequence(jnp.square(score_B)),
    'reward': per_sequence(reward_BR.sum(1)), 'kl_nats_per_sequence': per_sequence(kl_BR.sum(1)),
    'ended': per_sequence(rollout.ended_B), 'response_length': per_sequence(mask_BR.sum(1)),
    'entropy': per_token(entropy_BR, mask_BR),
    'value': per_token(value_BR, value_mask_BR),
    'return': per_token(return_BR, value_mask_BR), 'return_squared': per_token(jnp.square(return_BR), value_mask_BR),
    'value_error': per_token(error_BR, value_mask_BR),
    'value_error_squared': per_token(jnp.square(error_BR), value_mask_BR),
    'logprob_gap': Max(gap_BR.max()),
  }
  return jax.lax.stop_gradient((made, add_across(metrics, axis_name)))


def _raw_score(models, frozen, rollout, extra_score_B, model_score_weight):
  """The score of each response, float32 [B]: the reward model's, on the tokens up to the end token, and the extra."""
  score_B = jnp.zeros(rollout.ended_B.shape, jnp.float32)
  if frozen.get('reward') is not None:
    score_B += model_score_weight * forward.scores(models.reward, frozen['reward'], rollout.tokens_BT, rollout.valid_BT)
  return score_B if extra_score_B is None else score_B + extra_score_B.astype(jnp.float32)


def _judged(score_B, ended_B, config):
  """The score that is learned from: clamped, and changed where no end token came."""
  if config.score_limit is not None:
    score_B = jnp.clip(score_B, -config.score_limit, config.score_limit)
  cut_B = {'keep': score_B, 'replace': jnp.full_like(score_B, -config.missing_end_score),
           'subtract': score_B - config.missing_end_score}[config.missing_end]
  return jnp.where(ended_B, score_B, cut_B)
