"""Truncation against brute force, draws against their probabilities, and what chance depends on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import ConfigError
from rlhf_jax.maths import sampling as module
from rlhf_jax.maths.sampling import Sampling, sample_tokens, truncate, uniforms

KEY = jax.random.key(17)


@functools.partial(jax.jit, static_argnames='sampling')
def draw(logits_BV, key, sample_B, position_B, sampling):
  """What samples get at positions."""
  return sample_tokens(logits_BV, uniforms(key, sample_B, position_B), sampling)


def softmax_by_numpy(logits):
  weight = np.exp(np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True))
  return weight / weight.sum(-1, keepdims=True)


def kept_by_brute_force(logits, top_k, top_p):
  """Ids in order of logit, then id; cut to k; then the shortest beginning whose renormalised probability reaches p."""
  order = sorted((token for token in range(len(logits)) if logits[token] > -np.inf), key=lambda i: (-logits[i], i))
  order = order[:top_k] if top_k else order
  probability = softmax_by_numpy(logits[order])
  count = next((n for n in range(1, len(order)) if probability[:n].sum() >= top_p), len(order))
  return set(order[:count]) if top_p < 1 else set(order)


def draws(logits_V, sampling, count=20_000):
  """What `count` samples get from the same logits."""
  return draw(jnp.tile(logits_V, (count, 1)), KEY, jnp.arange(count), 3, sampling)


def misfit(token_B, probability_V):
  """Pearson's chi-square in standard deviations above its mean; tokens of probability 0 must not occur."""
  seen_V = np.bincount(token_B, minlength=len(probability_V))
  possible_V = probability_V > 0
  assert not seen_V[~possible_V].any()
  expected_V = len(token_B) * probability_V[possible_V]
  freedom = possible_V.sum() - 1
  return (np.sum((seen_V[possible_V] - expected_V) ** 2 / expected_V) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize('top_k, top_p', [(0, 1.), (1, 1.), (3, 1.), (12, 1.), (99, 1.), (0, .37), (0, .913), (5, .61),
                                          (1, .2), (0, 1e-6), (99, .999)])
def test_truncation_equals_brute_force(top_k, top_p):
  rng = np.random.default_rng(0)
  smooth_BV = rng.normal(0, 1.5, (20, 12))
  tied_BV = rng.integers(-2, 3, (20, 12))                            # ties everywhere, at every cut
  logits_BV = np.concatenate([smooth_BV, tied_BV, np.where(rng.random((20, 12)) < .5, -np.inf, smooth_BV)])
  logits_BV[:, 5] = .25
  logits_BV = logits_BV.astype(np.float32)
  got_BV = np.array(truncate(logits_BV, top_k, top_p))
  for logits_V, got_V in zip(logits_BV, got_BV, strict=True):
    kept = kept_by_brute_force(logits_V, top_k, top_p)
    assert set(np.flatnonzero(got_V > -np.inf)) == kept
    np.testing.assert_array_equal(got_V[sorted(kept)], logits_V[sorted(kept)])


def test_of_equal_logits_the_lower_id_stays():
  kept = lambda logits, *cut: np.flatnonzero(np.array(truncate(jnp.array([logits]), *cut))[0] > -np.inf).tolist()
  assert kept([1., 2., 2., 2.], 2, 1.) == [1, 2]
  assert kept([0.] * 8, 0, .5) == [0, 1, 2, 3]
  assert kept([0., -0., 0., -0.], 2, 1.) == [0, 1]
  assert kept([-0., 0., -1.], 1, 1.) == [0]
  assert kept([-1e4, 1e4, 0.], 2, .9) == [1]


@pytest.mark.parametrize('V', [1, 2, 3, 37, 64, 65])
def test_frequencies_equal_probabilities(V):
  logits_V = np.random.default_rng(V).normal(0, 1.2, V).astype(np.float32)
  logits_V[1::5] = -np.inf
  token_B, logprob_B = draws(logits_V, Sampling(temperature=.7))
  probability_V = softmax_by_numpy(logits_V / .7)
  assert token_B.dtype == jnp.int32 and logprob_B.dtype == jnp.float32
  np.testing.assert_allclose(logprob_B, np.log(probability_V[np.array(token_B)]), rtol=1e-4, atol=1e-6)
  if (probability_V > 0).sum() > 1:
    assert abs(misfit(token_B, probability_V)) < 4
    wrong_V = probability_V * np.linspace(.8, 1.2, V)
    assert V < 37 or misfit(token_B, wrong_V / wrong_V.sum()) > 4    # the measure would see an error of a fifth


@pytest.mark.parametrize('top_k, top_p', [(4, 1.), (0, .8), (9, .7)])
def test_truncated_draws_come_from_the_renormalised_rest(top_k, top_p):
  logits_V = np.random.default_rng(5).normal(0, 1, 23).astype(np.float32)
  token_B, logprob_B = draws(logits_V, Sampling(temperature=1.3, top_k=top_k, top_p=top_p))
  kept = sorted(kept_by_brute_force(logits_V / np.float32(1.3), top_k, top_p))
  probability_V = np.zeros(23)
  probability_V[kept] = softmax_by_numpy(logits_V[kept] / 1.3)
  assert len(kept) > 1 and abs(misfit(token_B, probability_V)) < 4
  np.testing.assert_allclose(logprob_B, np.log(probability_V[np.array(token_B)]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('V', [5, 100, 1031])
def test_two_levels_find_what_one_would(V):
  rng = np.random.default_rng(V)
  logits_BV = rng.normal(0, 2, (4000, V)).astype(np.float32)
  sample_B, position_B = rng.integers(0, 2 ** 31, 4000), rng.integers(0, 500, 4000)
  token_B, _ = draw(logits_BV, KEY, sample_B, position_B, Sampling())
  number = lambda sample, position: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, sample), position))
  uniform_B = np.array(jax.vmap(number)(sample_B, position_B), np.float64)
  sum_BV = np.cumsum(softmax_by_numpy(logits_BV), axis=-1)
  direct_B = np.sum(sum_BV <= uniform_B[:, None], axis=-1)
  distance_B = np.abs(np.array(token_B) - direct_B)
  assert distance_B.max() <= 1 and np.mean(distance_B > 0) < 1e-3    # rounding, at the border of two tokens


@pytest.mark.parametrize('V', [1, 2, 7, 16, 17, 300, 4099])
def test_no_token_of_zero_probability_is_ever_drawn(V):
  rng = np.random.default_rng(V)
  weight_BV = np.where(rng.random((64, V)) < .2, rng.random((64, V)) ** 8, 0).astype(np.float32)
  weight_BV[np.arange(64), rng.integers(0, V, 64)] = 1
  invert = jax.jit(module._invert)
  for uniform in [0., 2. ** -23, .3, .5, .999, 1 - 2. ** -23, 1., 1.5]:   # 1 and above: as if rounding had lost mass
    token_B = np.array(invert(weight_BV, jnp.full(64, uniform)))
    assert (token_B < V).all() and (weight_BV[np.arange(64), token_B] > 0).all()
    if uniform == 0:
      np.testing.assert_array_equal(token_B, np.argmax(weight_BV > 0, axis=-1))
    if uniform > 1:
      np.testing.assert_array_equal(token_B, V - 1 - np.argmax(weight_BV[:, ::-1] > 0, axis=-1))


def test_a_cumulative_sum_that_is_not_monotone_does_no_harm(monkeypatch):
  """A parallel sum may associate neighbouring slots differently; here it is off by far more than any rounding."""
  exact = jnp.cumsum
  wobble_V = .01 * np.random.default_rng(0).normal(0, 1, 400)
  monkeypatch.setattr(jnp, 'cumsum', lambda x, axis: exact(x, axis=axis) + wobble_V[:x.shape[-1]].astype(np.float32))
  weight_BV = np.tile(np.float32([0, 0, 1, 0, 0, 0, .5, 0]), (50, 5))
  token_B = np.array(module._invert(weight_BV, jnp.linspace(0, 1, 50)))
  assert (weight_BV[np.arange(50), token_B] > 0).all()


def test_logits_far_apart():
  logits_BV = jnp.array([[0., -1e4, 1e4], [-jnp.inf, -1e4, -jnp.inf], [-1e4, -jnp.inf, -1e4], [3e38, -3e38, 0.]])
  for sample in range(20):
    token_B, logprob_B = draw(logits_BV, KEY, jnp.full(4, sample), 0, Sampling(temperature=.5))
    assert token_B[0] == 2 and token_B[1] == 1 and token_B[2] in (0, 2)
    np.testing.assert_allclose(logprob_B[:3], [0, 0, -math.log(2)], rtol=1e-6)
  token_B, logprob_B = draw(logits_BV, KEY, jnp.arange(4), 0, Sampling())
  assert token_B[3] == 0 and logprob_B[3] == 0


def test_a_row_without_a_finite_logit_says_so():
  token_B, logprob_B = draw(jnp.full((1, 5), -jnp.inf), KEY, jnp.array([0]), 0, Sampling())
  assert token_B[0] == 0 and np.isnan(logprob_B[0])


@pytest.mark.parametrize('sampling', [Sampling(temperature=.9), Sampling(top_k=20, top_p=.9)])
def test_what_a_sample_gets_does_not_depend_on_its_batch(sampling):
  rng = np.random.default_rng(8)
  logits_BV = rng.normal(0, 2, (16, 97)).astype(np.float32)
  sample_B, position_B = rng.permutation(1000)[:16], np.arange(16)
  together = np.array(draw(logits_BV, KEY, sample_B, position_B, sampling))
  order = rng.permutation(16)
  np.testing.assert_array_equal(draw(logits_BV[order], KEY, sample_B[order], position_B[order], sampling),
                                together[:, order])
  np.testing.assert_array_equal(draw(logits_BV[3:7], KEY, sample_B[3:7], position_B[3:7], sampling), together[:, 3:7])
  alone = functools.partial(draw, logits_BV[5:6], KEY, sample_B[5:6])
  np.testing.assert_array_equal(alone(5, sampling), together[:, 5:6])                  # one position for all rows
  np.testing.assert_array_equal(jax.pmap(lambda *a: draw(a[0], KEY, a[1], a[2], sampling))(
    *(x.reshape(8, 2, *x.shape[1:]) for x in (logits_BV, sample_B, position_B)))[0].reshape(-1), together[0])


def test_key_sample_and_position_each_change_the_draw():
  logits_BV, sample_B = jnp.zeros((200, 50)), jnp.arange(200)
  base = draw(logits_BV, KEY, sample_B, 4, Sampling())[0]
  others = [draw(logits_BV, jax.random.key(18), sample_B, 4, Sampling())[0],
            draw(logits_BV, KEY, sample_B + 200, 4, Sampling())[0],
            draw(logits_BV, KEY, sample_B, 5, Sampling())[0],
            draw(logits_BV, KEY, jnp.full(200, 4), sample_B, Sampling())[0]]           # sample and position exchanged
  for other in others:
    assert np.mean(np.array(base) == np.array(other)) < .1           # one in fifty by chance


def test_greedy_takes_the_best_at_temperature_one():
  logits_BV = jnp.array([[.1, 2.2, -.3], [1.5, 1.5, 0.], [-jnp.inf, -7., -jnp.inf]])
  token_B, logprob_B = draw(logits_BV, KEY, jnp.arange(3), 0, Sampling(temperature=0, top_k=1))
  assert token_B.tolist() == [1, 0, 1] and token_B.dtype == jnp.int32
  np.testing.assert_allclose(logprob_B, np.log(softmax_by_numpy(logits_BV)[range(3), [1, 0, 1]]), rtol=1e-5, atol=1e-7)


def test_bfloat16_logits_are_sampled_in_float32():
  logits_BV = jnp.asarray(np.random.default_rng(3).normal(0, 1, (4, 300)), jnp.bfloat16)
  for sampling in [Sampling(temperature=.7), Sampling(top_p=.9)]:
    for a, b in zip(draw(logits_BV, KEY, jnp.arange(4), 0, sampling),
                    draw(logits_BV.astype(jnp.float32), KEY, jnp.arange(4), 0, sampling), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)


def test_whole_vocabularies_are_not_sorted():
  jaxpr = lambda sampling: str(jax.make_jaxpr(lambda *a: sample_tokens(*a, sampling))(jnp.zeros((2, 64)), jnp.zeros(2)))
  assert 'top_k' in jaxpr(Sampling(top_k=2)) and 'top_k' not in jaxpr(Sampling()) and ' sort' not in jaxpr(Sampling())


@pytest.mark.parametrize('options, message', [
  ({'temperature': -.1}, r'temperature is -0.1; it must be a finite number >= 0. Pass 1.0'),
  ({'temperature': math.nan}, 'temperature is nan'),
  ({'temperature': math.inf}, 'temperature is inf'),
  ({'top_k': -1}, 'top_k is -1; it must be a count >= 0. Pass 0 to keep every token'),
  ({'top_p': 0.}, r'top_p is 0.0; it must be a probability in \(0, 1\]'),
  ({'top_p': 1.01}, 'top_p is 1.01'),
  ({'top_p': math.nan}, 'top_p is nan'),
  ({'new_tokens': 0}, 'new_tokens is 0; it must be a count >= 1'),
  ({'end_tokens': 2}, r'end_tokens is 2; it must be a tuple of token ids. Pass \(id,\)'),
  ({'end_tokens': (2, -1)}, r'end_tokens is \(2, -1\); it must be ids >= 0'),
  ({'pad_token': -100}, 'pad_token is -100; it must be an id >= 0')])
def test_settings_that_cannot_work_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**options)


def test_the_limits_are_allowed_and_settings_are_hashable():
  assert hash(Sampling(temperature=0, top_k=0, top_p=1., new_tokens=1, end_tokens=(0, 5), pad_token=0))
