"""Masked sums and whitening against float64 numpy, on one device and on many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.maths.masked import masked_mean, masked_sum, whiten


def ragged(shape=(8, 3, 7), seed=0):
  """Values of no special form and a mask whose rows, and whose first-axis slices, count very different numbers."""
  rng = np.random.default_rng(seed)
  x = rng.normal(1.7, 2.3, shape).astype(np.float32)
  length = rng.integers(0, shape[-1] + 1, shape[:-1])
  length[0] = 0                                                      # a device that counts nothing at all
  return x, np.arange(shape[-1]) < length[..., None]


def whitened_by_numpy(x, mask, bessel=True, keep_mean=False, epsilon=1e-8):
  counted = x[mask].astype(np.float64)
  out = np.zeros(x.shape)
  out[mask] = (counted - counted.mean()) / np.sqrt(counted.var(ddof=int(bessel)) + epsilon)
  out[mask] += counted.mean() if keep_mean else 0
  return out


def test_sum_and_mean_count_only_the_mask():
  x, mask = ragged()
  np.testing.assert_allclose(masked_sum(x, mask), x[mask].sum(), rtol=1e-5)
  np.testing.assert_allclose(masked_sum(x, mask, axis=-1), np.where(mask, x, 0).sum(-1), rtol=1e-5)
  np.testing.assert_allclose(masked_mean(x, mask), x[mask].mean(), rtol=1e-5)


def test_means_of_bools_and_ints_are_float32():
  mean = masked_mean(jnp.array([True, False, True, True]), jnp.array([True, True, True, False]))
  assert mean.dtype == jnp.float32
  np.testing.assert_allclose(mean, 2 / 3, rtol=1e-6)
  assert masked_mean(jnp.array([1, 2]), jnp.array([True, True])) == 1.5
  assert float(masked_sum(jnp.ones(1001, jnp.bfloat16), jnp.ones(1001, bool))) == 1001  # bfloat16 would say 1000


def test_a_mask_broadcasts_and_is_counted_in_full():
  x = jnp.array([[1., 2., 4.], [8., 16., 32.]])
  np.testing.assert_allclose(masked_mean(x, jnp.array([True, False, True])), (1 + 4 + 8 + 32) / 4)
  np.testing.assert_allclose(masked_mean(x, jnp.array([[True], [False]])), 7 / 3, rtol=1e-6)
  whitened = whiten(x, jnp.array([[True], [False]]), epsilon=0.)
  np.testing.assert_allclose(whitened, whitened_by_numpy(np.array(x), np.array([[True] * 3, [False] * 3]), epsilon=0),
                             rtol=1e-5)


def test_an_empty_mask_gives_zero():
  x, mask = jnp.array([jnp.nan, 3.]), jnp.zeros(2, bool)
  assert masked_sum(x, mask) == 0 and masked_mean(x, mask) == 0
  np.testing.assert_array_equal(whiten(x, mask), [0, 0])
  np.testing.assert_array_equal(whiten(x, mask, keep_mean=True), [0, 0])


@pytest.mark.parametrize('bessel', [True, False])
@pytest.mark.parametrize('keep_mean', [True, False])
def test_whiten_equals_numpy(bessel, keep_mean):
  x, mask = ragged((3, 4))
  mask[0, :2] = True
  expected = whitened_by_numpy(x, mask, bessel, keep_mean)
  np.testing.assert_allclose(whiten(x, mask, bessel=bessel, keep_mean=keep_mean), expected, rtol=1e-5, atol=1e-5)


def test_epsilon_is_added_to_the_variance():
  x = jnp.array([-1., 1.])
  np.testing.assert_allclose(whiten(x, jnp.ones(2, bool), bessel=False, epsilon=3.), x / 2, rtol=1e-6)


def test_kept_mean_is_not_scaled():
  x, mask = ragged()
  kept = np.array(whiten(10 * x, mask, keep_mean=True))
  np.testing.assert_allclose(kept[mask].mean(), 10 * x[mask].mean(), rtol=1e-4)
  np.testing.assert_allclose(kept[mask].std(ddof=1), 1, rtol=1e-4)


def test_a_mean_far_from_zero_does_not_cancel():
  x = (1e4 + np.random.default_rng(1).normal(0, .05, 500)).astype(np.float32)
  mask = np.ones(500, bool)
  np.testing.assert_allclose(whiten(x, mask), whitened_by_numpy(x, mask), atol=2e-2)   # x itself is rounded to 1e-3


@pytest.mark.parametrize('value', [2.5, -1e15])
def test_one_element_and_equal_elements_have_no_deviation(value):
  one, equal = jnp.array([[value, jnp.nan]]), jnp.full((1, 2), value)
  for x, mask in [(one, jnp.array([[True, False]])), (equal, jnp.ones((1, 2), bool))]:
    np.testing.assert_array_equal(whiten(x, mask), [[0, 0]])
  np.testing.assert_array_equal(whiten(one, jnp.array([[True, False]]), keep_mean=True), np.float32([[value, 0]]))


def test_huge_values_whiten_to_unit_scale():
  x = np.float32([1e15, -3e15, 2e15])
  np.testing.assert_allclose(whiten(x, np.ones(3, bool)), whitened_by_numpy(x, np.ones(3, bool)), rtol=1e-5)


@pytest.mark.parametrize('poison', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('keep_mean', [True, False])
def test_what_is_masked_out_reaches_neither_value_nor_gradient(poison, keep_mean):
  x, mask = ragged()
  f = lambda x: (whiten(x, mask, keep_mean=keep_mean) ** 3).sum() + masked_mean(x, mask)
  clean, dirty = (jax.value_and_grad(f)(jnp.where(mask, x, filler)) for filler in (0., poison))
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.any(np.array(dirty[1])[~mask])


@pytest.mark.parametrize('devices', [4, 8])
@pytest.mark.parametrize('keep_mean', [True, False])
def test_whitening_over_devices_equals_whitening_the_whole(devices, keep_mean):
  x, mask = ragged((devices, 3, 7), seed=devices)
  mapped = lambda x, mask: (whiten(x, mask, keep_mean=keep_mean, axis_name='data'), masked_mean(x, mask, 'data'))
  whitened, mean = jax.pmap(mapped, axis_name='data')(x, mask)
  np.testing.assert_allclose(whitened, whitened_by_numpy(x, mask, keep_mean=keep_mean), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(mean, np.full(devices, x[mask].mean()), rtol=1e-5)
