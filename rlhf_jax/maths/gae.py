"""Generalised advantage estimation over responses of unequal length, as one reverse scan.

Only the recursion: whitening is whiten() in masked.py, applied by the caller *after* returns are taken, and where the
score lands in the reward is the caller's choice too. Read next: sampling.py.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes


def gae(reward_BR, value_BR, mask_BR, *, discount, trace, bootstrap_B=None):
  """(advantage_BR, return_BR), float32, 0 where the mask is False; returns are unwhitened advantages plus values.

      delta_t = r_t + discount * V_{t+1} - V_t         advantage_t = delta_t + discount * trace * advantage_{t+1}

  Schulman et al. 2016 (1506.02438), eq. 16; `discount` is its gamma, `trace` its lambda. V after the last True slot of
  a row is 0 (the response ended), or `bootstrap_B` (the length limit cut it). Slots whose mask is False are passed over
  and may hold anything, NaN included. Rewards of any dtype are read as float32. No gradient is stopped.

  >>> import jax.numpy as jnp
  >>> advantage_BR, return_BR = gae(jnp.array([[0, 0, 1]]), jnp.array([[0.1, 0.2, 0.3]]), jnp.array([[True] * 3]),
  ...                               discount=1.0, trace=0.95)
  >>> [f'{x:.5f}' for x in advantage_BR[0]], f'{return_BR[0, 0]:.5f}'
  (['0.82675', '0.76500', '0.70000'], '0.92675')
  """
  check_axes(reward_BR=reward_BR, value_BR=value_BR, mask_BR=mask_BR, bootstrap_B=bootstrap_B)
  reward_BR, value_BR = jnp.asarray(reward_BR, jnp.float32), jnp.asarray(value_BR, jnp.float32)

  def backwards(after, slot):
    (advantage_after_B, value_after_B), (reward_B, value_B, mask_B) = after, slot
    delta_B = reward_B + discount * value_after_B - value_B
    advantage_B = jnp.where(mask_B, delta_B + discount * trace * advantage_after_B, advantage_after_B)
    return (advantage_B, jnp.where(mask_B, value_B, value_after_B)), advantage_B

  zero_B = jnp.zeros_like(value_BR[:, 0])
  start = zero_B, zero_B if bootstrap_B is None else jnp.asarray(bootstrap_B, jnp.float32)
  slots = reward_BR.T, value_BR.T, jnp.asarray(mask_BR, bool).T
  _, advantage_RB = jax.lax.scan(backwards, start, slots, reverse=True)
  advantage_BR = jnp.where(mask_BR, advantage_RB.T, 0)
  return advantage_BR, jnp.where(mask_BR, advantage_BR + value_BR, 0)
