"""Proximal policy optimisation on an Experience: clipped policy loss, clipped value loss, optional entropy bonus.

Schulman et al. 2017 (1707.06347) as used for language models since Ziegler et al. 2019 (1909.08593). Everything is a mean
over the response tokens of the global minibatch: the Means of policy and value share one weight.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError, check_fields
from rlhf_jax.maths.kl import kl_k2
from rlhf_jax.maths.masked import masked_sum
from rlhf_jax.model import forward
from rlhf_jax.records import Mean

_EXPONENT_LIMIT = 80.0  # exp of more overflows float32, and the gradient would be NaN even where the ratio is clipped


@dataclasses.dataclass(frozen=True)
class PPOLossConfig:
  """The switches of the loss. The defaults are those that the published recipes for language models share."""
  clip: float = 0.2  # the ratio is not rewarded for leaving [1 - clip, 1 + clip]
  value_clip: float | None = 0.2  # values are not rewarded for moving further, in units of the score; None: no clip
  value_weight: float = 0.1  # of the value loss, half a mean square included
  entropy_weight: float = 0.0  # of the entropy bonus
  dual_clip: float | None = None  # the loss of a token with a negative advantage is at most this times -advantage
  log_ratio_limit: float | None = None  # log-ratios are clamped to +- this before the exponential; None: not

  def __post_init__(self):
    within = lambda limit, low: limit is None or low < limit < math.inf
    check_fields(
      'PPO', self,
      ('log_ratio_limit', within(self.log_ratio_limit, 0), 'positive, or None for no clamp',
       'Pass None, or for example 10'),
      ('clip', 0 < self.clip < math.inf, 'positive and finite', 'Pass for example 0.2'),
      ('value_clip', within(self.value_clip, 0), 'positive, or None for no clip',
       'Pass None, or for example 0.2'),
      ('dual_clip', within(self.dual_clip, 1), 'above 1, or None for none',
       'Pass 3, as Ye et al. 2020 do'),
      ('value_weight', 0 <= self.value_weight < math.inf, 'finite and not below 0',
       'Pass for example 0.1'),
      ('entropy_weight', abs(self.entropy_weight) < math.inf, 'finite', 'Pass 0 for no bonus'))


def policy_loss(logprob_BR, old_logprob_BR, advantage_BR, config):
  """Per token (loss, ratio, clipped): max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), eq. 7 of 1707.06347.

  With a dual clip c, the loss of a negative advantage is at most -c A (Ye et al. 2020, 1912.09729, eq. 5).
  """
  log_ratio_BR = logprob_BR - old_logprob_BR
  limit = _EXPONENT_LIMIT if config.log_ratio_limit is None else config.log_ratio_limit
  log_ratio_BR = jnp.clip(log_ratio_BR, -limit, limit)
  ratio_BR = jnp.exp(log_ratio_BR)
  free_BR = -advantage_BR * ratio_BR
  held_BR = -advantage_BR * jnp.clip(ratio_BR, 1 - config.clip, 1 + config.clip)
  loss_BR = jnp.maximum(free_BR, held_BR)
  if config.dual_clip is not None:
    loss_BR = jnp.where(advantage_BR < 0, jnp.minimum(loss_BR, -advantage_BR * config.dual_clip), loss_BR)
  return loss_BR, ratio_BR, held_BR > free_BR


def value_loss(value_BR, old_value_BR, return_BR, config):
  """Per token (loss, clipped): half the larger squared error, of the value or of the value held near its old one."""
  free_BR = jnp.square(value_BR - return_BR)
  if config.value_clip is None:
    return 0.5 * free_BR, jnp.zeros_like(free_BR, bool)
  near_BR = jnp.clip(value_BR, old_value_BR - config.value_clip, old_value_BR + config.value_clip)
  held_BR = jnp.square(near_BR - return_BR)
  return 0.5 * jnp.maximum(free_BR, held_BR), held_BR > free_BR


def ppo(policy, value, config, *, temperature=1.0):
  """PPO loss of params {'policy', 'value'}. Batch: Experience. Weight: one per response token.

  `params['value']` without a backbone is a second head on the policy's trunk. `temperature` must be the sampling one. The
  metric 'kl_k2' is of this policy to the one that answered, nats per token.
  """
  if temperature <= 0:
    raise ConfigError(f'PPO at temperature={temperature}. It must be positive: greedy answers have no probability.')
  def loss_fn(params, batch, key):
    del key                                                                     # there is no dropout
    sizes = check_axes(tokens_BT=batch.tokens_BT, valid_BT=batch.valid_BT, mask_BR=batch.mask_BR,
                       logprob_BR=batch.logprob_BR, advantage_BR=batch.advantage_BR, return_BR=batch.return_BR,
                       value_BR=batch.value_BR, value_mask_BR=batch.value_mask_BR)
    start = sizes['T'] - sizes['R']
    logprob_BR, entropy_BR, value_BR, _ = forward.policy_and_value(
      policy, value, params, batch.tokens_BT, batch.valid_BT, start=start, temperature=temperature)
    # Slots that do not count are made harmless before the losses: behind them, an infinity would turn gradients to NaN.
    old_logprob_BR = jnp.where(batch.mask_BR, batch.logprob_BR, jax.lax.stop_gradient(logprob_BR))
    advantage_BR = jnp.where(batch.mask_BR, batch.advantage_BR, 0.0)
    old_value_BR, return_BR = (jnp.where(batch.value_mask_BR, x_BR, 0.0) for x_BR in (batch.value_BR, batch.return_BR))
    policy_BR, ratio_BR, clipped_BR = policy_loss(logprob_BR, old_logprob_BR, advantage_BR, config)
    error_BR, value_clipped_BR = value_loss(value_BR, old_value_BR, return_BR, config)

    weight = batch.mask_BR.sum(dtype=jnp.float32)
    mean = lambda x_BR: Mean(masked_sum(x_BR.astype(jnp.float32), batch.mask_BR), weight)
    policy_mean, entropy = mean(policy_BR), mean(entropy_BR)
    value_mean = Mean(masked_sum(error_BR, batch.value_mask_BR), weight)
    value_clipped = Mean(masked_sum(value_clipped_BR.astype(jnp.float32), batch.value_mask_BR),
                         batch.value_mask_BR.sum(dtype=jnp.float32))
    total = policy_mean.total + config.value_weight * value_mean.total - config.entropy_weight * entropy.total
    metrics = {'policy_loss': policy_mean, 'value_loss': value_mean, 'entropy': entropy, 'ratio': mean(ratio_BR),
               'clip_fraction': mean(clipped_BR), 'value_clip_fraction': value_clipped,
               'kl_k2': mean(kl_k2(logprob_BR, old_logprob_BR))}
    return Mean(total, weight), jax.lax.stop_gradient(metrics)
  return loss_fn
