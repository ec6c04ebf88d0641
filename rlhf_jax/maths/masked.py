"""Sums, means and whitening over the slots where a mask is True, exact across devices.

What lies in a masked-out slot never matters, NaN and infinity included: it is replaced before any arithmetic, so it
reaches neither a value nor a gradient. With `axis_name` (inside pmap, vmap or shard_map) sums are added over that axis
before the division; under jit with sharded arrays the view is global already and None is right. Read next: gae.py.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.records import Mean, add_across


def masked_sum(x, mask, axis=None):
  """Sum of x where mask is True, float32; 0 where nothing is. `mask` and `x` broadcast against each other.

  >>> import jax.numpy as jnp
  >>> print(masked_sum(jnp.array([1.5, 2.0, jnp.nan]), jnp.array([True, True, False])))
  3.5
  """
  return jnp.sum(jnp.where(mask, jnp.asarray(x, jnp.float32), 0), axis=axis)


def masked_mean(x, mask, axis_name=None):
  """Mean of x where mask is True, float32; 0 for an empty mask.

  One division of the sum over all devices by the count over all devices, not a mean of means.

  >>> import jax.numpy as jnp
  >>> print(masked_mean(jnp.array([1.5, 2.0, jnp.nan]), jnp.array([True, True, False])))
  1.75
  """
  return add_across(Mean(masked_sum(x, mask), masked_sum(jnp.ones(jnp.shape(x)), mask)), axis_name).value()


def whiten(x, mask, *, bessel=True, keep_mean=False, epsilon=1e-8, axis_name=None):
  """(x - mean) / sqrt(variance + epsilon) where mask is True, 0 elsewhere; float32, in the shape of x.

  `bessel` divides the squared deviations by count - 1 (verl, SFFD) instead of count (lm-human-preferences, OpenRLHF).
  `keep_mean` adds the mean back, unscaled, after the division, so the mean is the same before and after; that is not
  x / sqrt(variance). It is whiten(shift_mean=False) of lm-human-preferences (utils/core.py), used there for rewards.

  Two passes, because the mean of squares minus the square of the mean cancels in float32 when |mean| >> deviation.
  One counted element, or equal ones, whiten to 0 (to the mean with `keep_mean`). |x| must be below 1e18 (its square is
  taken). Source: the details of Huang et al. 2024 (2403.17031) and the code of the systems named.

  >>> import jax.numpy as jnp
  >>> print(whiten(jnp.array([1.0, 3.0, 5.0, jnp.nan]), jnp.array([True, True, True, False])))
  [-1.  0.  1.  0.]
  """
  x = jnp.asarray(x, jnp.float32)
  mean = masked_mean(x, mask, axis_name)
  deviation = jnp.where(mask, x - mean, 0)
  squares, count = add_across((masked_sum(deviation ** 2, mask), masked_sum(jnp.ones(x.shape), mask)), axis_name)
  variance = squares / jnp.maximum(count - bessel, 1)
  whitened = deviation * jax.lax.rsqrt(variance + epsilon)
  return jnp.where(mask, whitened + mean, 0) if keep_mean else whitened
