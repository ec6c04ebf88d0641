"""Log-probabilities and entropies against float64 numpy; the chunked form against the direct one."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.errors import AxesError
from rlhf_jax.maths.logprob import chunked_logprobs, entropy, token_logprobs, whole_logprobs


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


# ---- logits that stay, and their gradient

def gradient_of(function, *given, temperature=1., shape=(3, 7)):
  """((gradient by hidden, by unembedding), (log-probabilities, entropies)) of a sum of both with uneven weights."""
  hidden_BTD, unembed_DV, target_BT = given
  weight_BT = jnp.asarray(np.random.default_rng(3).normal(0, 1, (2, *shape)), jnp.float32)

  def mixed(hidden_BTD, unembed_DV):
    out = function(hidden_BTD, unembed_DV, target_BT, temperature=temperature)
    return jnp.sum(jnp.stack(out) * weight_BT), out
  return jax.jit(jax.grad(mixed, (0, 1), has_aux=True))(hidden_BTD, unembed_DV)


@pytest.mark.parametrize('temperature', [1., .7])
def test_the_gradient_of_whole_logits_is_that_of_automatic_differentiation(temperature):
  """Also by the entropy, and of targets outside the vocabulary."""
  hidden_BTD, unembed_DV, target_BT = problem()
  given = hidden_BTD, unembed_DV, target_BT.at[0, :2].set(jnp.array([-100, 11]))
  (gradient, out), (expected_gradient, expected) = (
    gradient_of(f, *given, temperature=temperature) for f in (whole_logprobs, direct))
  assert not out[0][0, :2].any() and out[1][0, :2].all()
  for a, b in zip((*gradient, *out), (*expected_gradient, *expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_a_target_outside_has_no_gradient_of_its_own():
  hidden_BTD, unembed_DV, target_BT = problem()
  total = lambda h, target: whole_logprobs(h, unembed_DV, target)[0].sum()
  gradient_BTD = jax.grad(total)(hidden_BTD, target_BT.at[1, 3].set(11))
  assert not gradient_BTD[1, 3].any() and gradient_BTD[1, 2].any()


def test_logits_too_far_apart_for_float32_have_a_finite_gradient():
  """Their difference is infinite, so one token has no probability at all."""
  hidden_BTD, unembed_DV = jnp.ones((1, 1, 1)), jnp.array([[2e38, -2e38, 0.]])
  total = lambda h: sum(x.sum() for x in whole_logprobs(h, unembed_DV, jnp.array([[0]])))
  assert jnp.isfinite(jax.grad(total)(hidden_BTD)).all()


@pytest.mark.parametrize('function', [whole_logprobs, lambda *a, **k: chunked_logprobs(*a, tokens_per_chunk=6, **k)])
def test_in_bfloat16_products_are_rounded_and_sums_are_not(function):
  """The gradient of the logits is rounded by 2^-9, as the stream is; the unembedding's is summed in float32."""
  hidden_BTD, unembed_DV, target_BT = problem(D=64, V=50, dtype=jnp.bfloat16)
  unembed_DV = unembed_DV.astype(jnp.float32)
  gradient, out = gradient_of(function, hidden_BTD, unembed_DV, target_BT)
  exact, expected = gradient_of(direct, hidden_BTD.astype(jnp.float32), unembed_DV, target_BT)
  assert [x.dtype for x in (*gradient, *out)] == ['bfloat16', 'float32', 'float32', 'float32']
  for a, b in zip(out, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  for a, b in zip(gradient, exact, strict=True):
    apart = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
    assert 1e-5 < apart < 2 ** -7


def products(function, dtype):
  """Types of the operands of every product in a gradient by hidden and unembedding."""
  hidden_BTD, unembed_DV, target_BT = problem(dtype=dtype)
  total = lambda h, u: sum(x.sum() for x in function(h, u, target_BT))
  program = jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden_BTD, unembed_DV.astype(jnp.float32))
  return [{x.aval.dtype.name for x in e.invars} for e in tiny.equations(program.jaxpr) if e.primitive.name == 'dot_general']


def test_logits_that_stay_are_made_once():
  """Of chunks they are made once more for the gradient."""
  chunked = lambda *a: chunked_logprobs(*a, tokens_per_chunk=6)
  for dtype in ('float32', 'bfloat16'):
    assert products(whole_logprobs, dtype) == [{dtype}] * 3
    assert products(chunked, dtype) == [{dtype}] * 4


def test_whole_logits_must_agree_with_the_unembedding():
  with pytest.raises(AxesError, match='unembed_DV has D=4, but hidden_BTD has D=5'):
    whole_logprobs(jnp.zeros((1, 2, 5)), jnp.zeros((4, 3)), jnp.zeros((1, 2), int))
