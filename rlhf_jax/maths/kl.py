"""How far the policy has moved from the reference, estimated from sampled tokens, and the weight that holds it there.

Each estimator maps the log-probabilities (nats) of a token *sampled from the policy* to an estimate of
KL(policy, reference) at that position, elementwise. With d = log policy - log reference: k1 = d is unbiased and may be
negative; k2 = d^2 / 2 is biased and low in variance; k3 = exp(-d) - 1 + d is unbiased and never negative. Source: John
Schulman, 'Approximating KL divergence', 2020 (joschu.net/blog/kl-approx.html), where r = reference / policy. Use k1 in
a reward or k2 in a loss: k3 in a reward gives a biased gradient. Nothing is clamped or masked here. Read next: gae.py.
"""

import jax.numpy as jnp


def kl_k1(logprob, reference_logprob):
  """d = log policy - log reference, nats: unbiased, of either sign.

  >>> kl_k1(-1.0, -1.5)
  0.5
  """
  return logprob - reference_logprob


def kl_k2(logprob, reference_logprob):
  """d^2 / 2, nats: biased, low variance; its gradient in a loss is that of the true KL, on policy.

  >>> kl_k2(-1.0, -1.5)
  0.125
  """
  return (logprob - reference_logprob) ** 2 / 2


def kl_k3(logprob, reference_logprob):
  """exp(-d) - 1 + d, nats: unbiased, >= 0. Overflows to inf in float32 when d < -88.

  >>> f'{kl_k3(-1.0, -1.5):.4f}'
  '0.1065'
  """
  difference = logprob - reference_logprob
  return jnp.maximum(jnp.expm1(-difference) + difference, 0)         # rounding alone can make it negative


ESTIMATORS = {'k1': kl_k1, 'k2': kl_k2, 'k3': kl_k3}


def adaptive_kl_weight(kl_weight, kl_nats_per_sequence, *, target_nats_per_sequence, horizon_episodes, episodes):
  """The next KL weight: weight * (1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon).

  KL is *summed* over the tokens of a response and averaged over responses, as the target is (6 nats for texts of 24
  tokens); systems that feed a token mean need a target smaller by the response length. `episodes` is the number of
  responses since the last call; the horizon is about how many it takes to change the weight by a factor e^0.2 at most.
  Source: Ziegler et al. 2019 (1909.08593), section 2.2, with the horizon of their code.

  >>> weight = adaptive_kl_weight(0.15, 7.5, target_nats_per_sequence=6.0, horizon_episodes=10_000, episodes=500)
  >>> f'{weight:.4f}'                                                # 0.15 * (1 + 0.2 * 500 / 10_000)
  '0.1515'
  """
  error = jnp.clip(kl_nats_per_sequence / target_nats_per_sequence - 1, -0.2, 0.2)
  return kl_weight * (1 + error * episodes / horizon_episodes)
