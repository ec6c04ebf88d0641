"""The key/value cache of decoding: an explicit pytree, one pair of [B, K, S, H] arrays a layer, that goes in and comes out.

A list of layers and not one stacked array: a cache that is scanned over layers is copied at every token.
"""

import jax
import jax.numpy as jnp


def empty_cache(config, B, S):
  """Zeros for B sequences of S slots, in the compute dtype: a tuple of (k_BKSH, v_BKSH), one a layer."""
  shape = (B, config.kv_heads, S, config.head_width)
  return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.layers))


def write(layer_cache, k_BKTH, v_BKTH, slot):
  """The cache of one layer with keys and values written to the T slots from `slot` on, the same for all rows."""
  one = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=2)
  return one(layer_cache[0], k_BKTH), one(layer_cache[1], v_BKTH)
