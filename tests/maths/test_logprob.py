"""Log-probabilities and entropies against float64 numpy; the chunked form against the direct one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import AxesError
from rlhf_jax.maths.logprob import chunked_logprobs, entropy, token_logprobs


def log_softmax_by_numpy(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def problem(B=3, T=7, D=5, V=11, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  hidden_BTD, unembed_DV = rng.normal(0, 1.3, (B, T, D)), rng.normal(0, .9, (D, V))
  return jnp.asarray(hidden_BTD, dtype), jnp.asarray(unembed_DV, dtype), jnp.asarray(rng.integers(0, V, (B, T)))


def direct(hidden_BTD, unembed_DV, target_BT, temperature=1.):
  logits_BTV = jnp.einsum('BTD,DV->BTV', hidden_BTD, unembed_DV, preferred_element_type=jnp.float32) / temperature
  return token_logprobs(logits_BTV, target_BT), entropy(logits_BTV)


def test_equals_numpy():
  rng = np.random.default_rng(0)
  logits_BTV, target_BT = rng.normal(.2, 3, (2, 3, 13)).astype(np.float32), rng.integers(0, 13, (2, 3))
  target_BT[0, :2] = 0, 12
  logprob_BTV = log_softmax_by_numpy(logits_BTV)
  expected_BT = [[logprob_BTV[b, t, target_BT[b, t]] for t in range(3)] for b in range(2)]
  np.testing.assert_allclose(token_logprobs(logits_BTV, target_BT), expected_BT, rtol=1e-5)
  np.testing.assert_allclose(entropy(logits_BTV), -(np.exp(logprob_BTV) * logprob_BTV).sum(-1), rtol=1e-5)


def test_gradient_is_target_minus_softmax():
  rng = np.random.default_rng(1)
  logits_BTV, target_BT = jnp.asarray(rng.normal(0, 2, (2, 3, 5)), jnp.float32), rng.integers(0, 5, (2, 3))
  gradient = jax.grad(lambda logits: token_logprobs(logits, target_BT).sum())(logits_BTV)
  np.testing.assert_allclose(gradient, np.eye(5)[target_BT] - np.exp(log_softmax_by_numpy(logits_BTV)), atol=1e-6)


def test_neither_direction_gathers_or_scatters():
  f = jax.grad(lambda logits, target: token_logprobs(logits, target).sum())
  assert not re.search('gather|scatter', str(jax.make_jaxpr(f)(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), int))))


def test_logits_far_apart_do_not_cancel_or_overflow():
  logits_BTV = jnp.array([[[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4], [3e38, 0, 0]]])
  logprob_BT = token_logprobs(logits_BTV, jnp.array([[1, 2, 0]]))
  np.testing.assert_allclose(logprob_BT, [[-1 - math.log1p(math.exp(-1)), -math.log(3), 0]], rtol=1e-6)
  p = 1 / (1 + math.exp(-1))
  np.testing.assert_allclose(entropy(logits_BTV), [[-p * math.log(p) - (1 - p) * math.log(1 - p), math.log(3), 0]],
                             rtol=1e-5, atol=1e-7)
  least_BT = token_logprobs(logits_BTV, jnp.array([[2, 0, 1]]))
  np.testing.assert_allclose(least_BT[0, 0], -2e4 - math.log1p(math.exp(-1)), rtol=1e-6)


def test_excluded_tokens_have_no_probability_and_finite_gradients():
  logits_BTV = jnp.array([[[-jnp.inf, .5, 1.2], [-jnp.inf, 0, -jnp.inf]]])
  assert token_logprobs(logits_BTV, jnp.array([[0, 1]])).tolist() == [[-math.inf, 0]]
  p = 1 / (1 + math.exp(-.7))
  np.testing.assert_allclose(entropy(logits_BTV)[0], [-p * math.log(p) - (1 - p) * math.log(1 - p), 0], rtol=1e-5)
  f = lambda logits: (entropy(logits) + token_logprobs(logits, jnp.array([[1, 1]]))).sum()
  assert np.isfinite(jax.grad(f)(logits_BTV)).all()


def test_one_word_vocabulary_and_outside_targets():
  assert token_logprobs(jnp.array([[[3.3]]]), jnp.array([[0]])) == 0 and entropy(jnp.array([[[3.3]]])) == 0
  assert token_logprobs(jnp.array([[[3.3, 1.]]]), jnp.array([[-100]])) == 0


def test_bfloat16_logits_are_normalised_in_float32():
  logits_BTV = jnp.asarray(np.random.default_rng(2).normal(0, 2, (1, 4, 50)), jnp.bfloat16)
  target_BT = jnp.array([[0, 7, 7, 49]])
  got = token_logprobs(logits_BTV, target_BT)
  assert got.dtype == jnp.float32 and entropy(logits_BTV).dtype == jnp.float32
  expected_TV = log_softmax_by_numpy(logits_BTV[0].astype(jnp.float32))
  np.testing.assert_allclose(got[0], expected_TV[np.arange(4), target_BT[0]], rtol=1e-5)


@pytest.mark.parametrize('tokens_per_chunk', [1, 3, 6, 9, 20, 21, 1024])   # 1 1 2 3 6 7 7 slots a chunk
@pytest.mark.parametrize('temperature', [1., .7])
def test_chunks_equal_the_whole(tokens_per_chunk, temperature):
  hidden_BTD, unembed_DV, target_BT = problem()
  weight_BT = jnp.asarray(np.random.default_rng(3).normal(0, 1, (2, 3, 7)), jnp.float32)

  def mixed(function, hidden_BTD, unembed_DV):
    out = jnp.stack(function(hidden_BTD, unembed_DV, target_BT, temperature=temperature))
    return jnp.sum(out * weight_BT), out

  chunked = lambda *a, **k: chunked_logprobs(*a, tokens_per_chunk=tokens_per_chunk, **k)
  (gradient, out), (expected_gradient, expected) = (
    jax.jit(jax.grad(lambda h, u, f=f: mixed(f, h, u), (0, 1), has_aux=True))(hidden_BTD, unembed_DV)
    for f in (chunked, direct))
  assert out.shape == (2, 3, 7) and out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  for a, b in zip(gradient, expected_gradient, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_chunk_needs_no_loop():
  program = lambda count: str(jax.make_jaxpr(lambda *a: chunked_logprobs(*a, tokens_per_chunk=count))(*problem()))
  assert 'scan' in program(20) and 'scan' not in program(21)


def test_temperature_divides_the_logits():
  hidden_BTD, unembed_DV, target_BT = problem()
  logits_BTV = np.einsum('BTD,DV->BTV', *(np.asarray(x, np.float64) for x in (hidden_BTD, unembed_DV)))
  logprob_BTV = log_softmax_by_numpy(logits_BTV / .7)
  logprob_BT, entropy_BT = chunked_logprobs(hidden_BTD, unembed_DV, target_BT, temperature=.7, tokens_per_chunk=6)
  np.testing.assert_allclose(logprob_BT, np.take_along_axis(logprob_BTV, np.array(target_BT)[..., None], -1)[..., 0],
                             rtol=1e-4)
  np.testing.assert_allclose(entropy_BT, -(np.exp(logprob_BTV) * logprob_BTV).sum(-1), rtol=1e-4)


@pytest.mark.parametrize('tokens_per_chunk', [6, 1024])
def test_bfloat16_products_are_accumulated_in_float32(tokens_per_chunk):
  hidden_BTD, unembed_DV, target_BT = problem(D=64, dtype=jnp.bfloat16)
  got = chunked_logprobs(hidden_BTD, unembed_DV.astype(jnp.float32), target_BT, tokens_per_chunk=tokens_per_chunk)
  expected = direct(hidden_BTD.astype(jnp.float32), unembed_DV.astype(jnp.float32), target_BT)
  for a, b in zip(got, expected, strict=True):                       # rounding the logits to bfloat16 would cost 1e-2
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def largest_float32(function, *arrays):
  """Elements of the largest float32 array anywhere in the compiled program."""
  text = jax.jit(function).lower(*arrays).compile().as_text()
  return max(math.prod(map(int, shape.split(','))) for shape in re.findall(r'f32\[(\d[\d,]*)\]', text))


def test_the_gradient_never_holds_the_logits_of_the_batch():
  B, T, D, V, tokens_per_chunk = 2, 64, 8, 512, 16
  hidden_BTD, unembed_DV, target_BT = problem(B, T, D, V)
  gradient = lambda f: jax.grad(lambda h, u: sum(x.sum() for x in f(h, u, target_BT)), (0, 1))
  chunked = lambda *a: chunked_logprobs(*a, tokens_per_chunk=tokens_per_chunk)
  assert largest_float32(gradient(direct), hidden_BTD, unembed_DV) >= B * T * V       # the probe sees what it is for
  assert largest_float32(gradient(chunked), hidden_BTD, unembed_DV) <= tokens_per_chunk * V
  temporary = [jax.jit(gradient(f)).lower(hidden_BTD, unembed_DV).compile().memory_analysis().temp_size_in_bytes
               for f in (chunked, direct)]
  assert temporary[0] < temporary[1] / 2


def test_hidden_and_unembedding_must_agree():
  with pytest.raises(AxesError, match='unembed_DV has D=4, but hidden_BTD has D=5'):
    chunked_logprobs(jnp.zeros((1, 2, 5)), jnp.zeros((4, 3)), jnp.zeros((1, 2), int))
