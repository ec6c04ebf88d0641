"""GAE against a Python loop over each row and against the closed forms at trace 0 and 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import AxesError
from rlhf_jax.maths.gae import gae


def episodes(B=6, R=9, seed=0):
  """Rewards and values of no special form; the first row is empty, the second has one slot, the last has a hole."""
  rng = np.random.default_rng(seed)
  length_B = rng.integers(1, R + 1, B)
  length_B[:3] = 0, 1, R
  reward_BR, value_BR = rng.normal(.3, 1.1, (2, B, R)).astype(np.float32)
  mask_BR = np.arange(R) < length_B[:, None]
  mask_BR[-1] = True
  mask_BR[-1, R // 3] = False
  return reward_BR, value_BR, mask_BR, rng.normal(0, 2, B).astype(np.float32)


def gae_by_loop(reward_BR, value_BR, mask_BR, discount, trace, bootstrap_B):
  advantage_BR, return_BR = np.zeros((2, *reward_BR.shape))
  for b, row in enumerate(mask_BR):
    slots = np.flatnonzero(row)
    for i, t in enumerate(slots):
      total, value_after = 0., [*value_BR[b, slots[1:]].astype(float), float(bootstrap_B[b])]
      for k, u in enumerate(slots[i:]):                              # the sum of eq. 16 as it stands, not the recursion
        delta = float(reward_BR[b, u]) + discount * value_after[i + k] - float(value_BR[b, u])
        total += (discount * trace) ** k * delta
      advantage_BR[b, t], return_BR[b, t] = total, total + value_BR[b, t]
  return advantage_BR, return_BR


@pytest.mark.parametrize('discount, trace', [(1., .95), (.97, .8), (.9, 0.), (1., 1.)])
@pytest.mark.parametrize('bootstrapped', [False, True])
def test_equals_the_sum_over_slots(discount, trace, bootstrapped):
  reward_BR, value_BR, mask_BR, bootstrap_B = episodes()
  got = gae(reward_BR, value_BR, mask_BR, discount=discount, trace=trace,
            bootstrap_B=bootstrap_B if bootstrapped else None)
  expected = gae_by_loop(reward_BR, value_BR, mask_BR, discount, trace, bootstrap_B * bootstrapped)
  for a, b in zip(got, expected, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.any(np.array(a)[~mask_BR])


def test_trace_one_makes_returns_the_rewards_to_go():
  reward_BR, value_BR, mask_BR, _ = episodes(seed=1)
  _, return_BR = gae(reward_BR, value_BR, mask_BR, discount=1., trace=1.)
  to_go_BR = np.cumsum((reward_BR * mask_BR)[:, ::-1], axis=1)[:, ::-1] * mask_BR
  np.testing.assert_allclose(return_BR, to_go_BR, rtol=1e-4, atol=1e-5)


def test_one_slot():
  mask_BR = jnp.array([[True]])
  advantage_BR, return_BR = gae(jnp.array([[2.5]]), jnp.array([[.75]]), mask_BR, discount=.9, trace=.5)
  assert (advantage_BR, return_BR) == (1.75, 2.5)
  advantage_BR, return_BR = gae(jnp.array([[2.5]]), jnp.array([[.75]]), mask_BR, discount=.5, trace=.5,
                                bootstrap_B=jnp.array([3.]))
  assert (advantage_BR, return_BR) == (3.25, 4.)


def test_rows_without_a_true_slot_are_zero_even_when_bootstrapped():
  got = gae(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros((2, 3), bool), discount=1., trace=1.,
            bootstrap_B=jnp.array([7., jnp.nan]))
  np.testing.assert_array_equal(got, np.zeros((2, 2, 3)))


def test_integer_rewards_and_bfloat16_values_are_computed_in_float32():
  advantage_BR, return_BR = gae(jnp.array([[0, 1]]), jnp.array([[.25, .5]], jnp.bfloat16), jnp.ones((1, 2), bool),
                                discount=.99, trace=.95)
  assert advantage_BR.dtype == return_BR.dtype == jnp.float32
  np.testing.assert_allclose(advantage_BR, [[.99 * .5 - .25 + .99 * .95 * .5, .5]], rtol=1e-6)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_padding_reaches_neither_value_nor_gradient(poison):
  reward_BR, value_BR, mask_BR, bootstrap_B = episodes()
  f = lambda value_BR, reward_BR: sum(
    (x ** 2).sum() for x in gae(reward_BR, value_BR, mask_BR, discount=.9, trace=.7, bootstrap_B=bootstrap_B))
  fill = lambda x, filler: jnp.where(mask_BR, x, filler)
  clean, dirty = (jax.value_and_grad(f, (0, 1))(fill(value_BR, filler), fill(reward_BR, filler))
                  for filler in (0., poison))
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    np.testing.assert_array_equal(a, b)


def test_advantages_look_forward_only():
  reward_BR, value_BR, mask_BR, _ = episodes(B=4, R=5)
  advantage_R = lambda reward_R: gae(reward_R[None], value_BR[2:3], mask_BR[2:3], discount=.9, trace=.5)[0][0]
  jacobian = np.array(jax.jacobian(advantage_R)(reward_BR[2]))
  steps = np.arange(5)[None] - np.arange(5)[:, None]
  np.testing.assert_allclose(jacobian, np.where(steps >= 0, .45 ** np.maximum(steps, 0), 0), rtol=1e-5)


def test_huge_rewards_stay_finite_and_exact():
  advantage_BR, _ = gae(jnp.array([[-1e30, 1e30]]), jnp.zeros((1, 2)), jnp.ones((1, 2), bool), discount=1., trace=.5)
  np.testing.assert_allclose(advantage_BR, [[-.5e30, 1e30]], rtol=1e-6)


@pytest.mark.parametrize('bootstrapped', [False, True])
def test_devices_each_do_their_own_rows(bootstrapped):
  reward_BR, value_BR, mask_BR, bootstrap_B = episodes(B=8)
  f = lambda *a: gae(*a[:3], discount=.97, trace=.9, bootstrap_B=a[3] if bootstrapped else None)
  arrays = reward_BR, value_BR, mask_BR, bootstrap_B
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
  rows = jax.sharding.PartitionSpec('data')
  mapped = jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows)(*arrays)
  pmapped = jax.pmap(f)(*(x.reshape(4, 2, *x.shape[1:]) for x in arrays))
  for whole, a, b in zip(f(*arrays), mapped, pmapped, strict=True):
    np.testing.assert_allclose(a, whole, rtol=1e-6)
    np.testing.assert_allclose(b.reshape(whole.shape), whole, rtol=1e-6)


def test_shapes_must_agree():
  with pytest.raises(AxesError, match='value_BR has R=4, but reward_BR has R=3'):
    gae(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.ones((2, 3), bool), discount=1., trace=1.)
