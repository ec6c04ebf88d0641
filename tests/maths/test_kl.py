"""KL estimators against exact divergences of small distributions, and the controller against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.maths.kl import ESTIMATORS, adaptive_kl_weight, kl_k1, kl_k2, kl_k3

POLICY_LOGITS = jnp.array([.3, -1.2, 2., .05])
REFERENCE = jax.nn.log_softmax(jnp.array([-.4, .7, 1.1, .6]))


def test_formulae():
  logprob, reference = np.float32([-.7, -2.3, -1.1]), np.float32([-1.9, -.4, -1.1])
  d = (logprob - reference).astype(np.float64)
  for name, expected in {'k1': d, 'k2': d ** 2 / 2, 'k3': np.exp(-d) - 1 + d}.items():
    np.testing.assert_allclose(ESTIMATORS[name](logprob, reference), expected, rtol=1e-5, atol=1e-7)
  assert list(ESTIMATORS.values()) == [kl_k1, kl_k2, kl_k3]


@pytest.mark.parametrize('estimator', [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator):
  policy = jax.nn.log_softmax(POLICY_LOGITS)
  exact = np.sum(np.exp(policy) * (policy - REFERENCE))
  np.testing.assert_allclose(jnp.sum(jnp.exp(policy) * estimator(policy, REFERENCE)), exact, rtol=1e-5)


def test_the_gradient_of_k2_is_that_of_the_divergence_and_the_gradient_of_k1_is_nothing():
  sampled_from = jax.nn.softmax(POLICY_LOGITS)                       # held fixed, as samples are
  through = lambda estimator: jax.grad(
    lambda logits: jnp.sum(sampled_from * estimator(jax.nn.log_softmax(logits), REFERENCE)))(POLICY_LOGITS)
  exact = jax.grad(lambda logits: jnp.sum(jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - REFERENCE)))
  np.testing.assert_allclose(through(kl_k2), exact(POLICY_LOGITS), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(through(kl_k1), 0, atol=1e-6)
  assert np.abs(exact(POLICY_LOGITS)).max() > .1


def test_k3_is_exact_near_zero_and_never_negative():
  d = np.float32([1e-4, -3e-4, 2e-3])
  np.testing.assert_allclose(kl_k3(d, 0 * d), d.astype(np.float64) ** 2 / 2, rtol=2e-3)
  many = np.random.default_rng(0).normal(0, 1e-4, 4096).astype(np.float32)
  assert np.min(kl_k3(many, 0 * many)) >= 0
  assert kl_k3(jnp.float32(-1.3), jnp.float32(-1.3)) == 0


def test_equal_log_probabilities_are_no_divergence():
  x = jnp.array([-.1, -20., -1e4])
  for estimator in ESTIMATORS.values():
    np.testing.assert_array_equal(estimator(x, x), np.zeros(3))


@pytest.mark.parametrize('kl, factor', [
  (6., 1), (6.6, 1 + .1 * 500 / 10_000), (5.1, 1 - .15 * 500 / 10_000),
  (1e9, 1 + .2 * 500 / 10_000), (0., 1 - .2 * 500 / 10_000), (-3., 1 - .2 * 500 / 10_000)])
def test_weight_moves_with_the_error_by_a_fifth_at_most(kl, factor):
  options = {'target_nats_per_sequence': 6., 'horizon_episodes': 10_000, 'episodes': 500}
  np.testing.assert_allclose(adaptive_kl_weight(.15, kl, **options), .15 * factor, rtol=1e-6)
  jitted = jax.jit(lambda weight, kl: adaptive_kl_weight(weight, kl, **options))
  np.testing.assert_allclose(jitted(jnp.float32(.15), jnp.float32(kl)), .15 * factor, rtol=1e-6)
