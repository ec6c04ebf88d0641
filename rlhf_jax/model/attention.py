"""What happens between the weights of a block: products with weights, norms, rotary positions, attention.

Pure functions of arrays. Attention works in [B, K, T, H], the cache too: on CPU the layout [B, T, K, H] costs twice.
"""

import math

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row that attends to nothing gives numbers, not NaN


def project(x, weight, contracted=1):
  """Activation times weight over the last `contracted` axes of x and the first of weight; other axes are kept.

  The leading axes are flattened around the product: with two of them XLA's backward pass on CPU is up to twice as slow.
  """
  kept, inside = x.shape[:x.ndim - contracted], math.prod(weight.shape[:contracted])
  flat = x.reshape(-1, inside) @ weight.reshape(inside, -1)
  return flat.reshape(*kept, *weight.shape[contracted:])


def rms_norm(x, scale, epsilon):
  """x over its root mean square along the last axis, taken in float32, times scale. Zhang and Sennrich 2019."""
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x, scale, bias, epsilon):
  """x with mean 0 and variance 1 along the last axis, taken in float32, times scale, plus bias. Ba et al. 2016."""
  x32 = x.astype(jnp.float32)
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
  return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def frequencies(config):
  """Radians per token of each rotated pair, float32 [rotated_width / 2]. Su et al. 2021 (2104.09864), section 3.2.2."""
  width, scaling = config.rotated_width, config.rope_scaling
  radians = config.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if scaling is None:
    return radians
  slow = radians / scaling.factor
  if scaling.kind == 'linear':
    return slow
  turns = scaling.original_context * radians / (2 * math.pi)                     # in the original context
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  share = jnp.clip((turns - low) / (high - low), 0, 1)                            # 0: stretched whole, 1: left alone
  return (1 - share) * slow + share * radians


def rotate(x_BTNH, position_BT, radians):
  """The first 2 * len(radians) numbers of every head turned by position * radians, as pairs (i, i + half)."""
  angle = position_BT[:, :, None, None].astype(jnp.float32) * radians
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  half = radians.shape[0]
  first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
  return turned.astype(x_BTNH.dtype)


def attend(q_BTNH, k_BKSH, v_BKSH, attends_BTS):
  """Softmax attention, N/K query heads to a key/value head; scores and softmax in float32; [B, T, N, H]."""
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  G = N // K
  q = (q_BTNH * H ** -0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  score = jnp.einsum('BKQH,BKSH->BKQS', q, k_BKSH, preferred_element_type=jnp.float32).reshape(B, K, G, T, -1)
  weight = jax.nn.softmax(jnp.where(attends_BTS[:, None, None], score, _MASKED), axis=-1).astype(v_BKSH.dtype)
  out = jnp.einsum('BKQS,BKSH->BKQH', weight.reshape(B, K, G * T, -1), v_BKSH)
  return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
