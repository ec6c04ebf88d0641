"""What happens between the weights of a block: products with weights, norms, rotary positions, attention.

Pure functions of arrays. Attention works in [B, K, T, H], the cache too: on CPU the layout [B, T, K, H] costs twice.
What a query may see is `Causal`, for whole sequences, or `Seen`, for queries against a cache.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.model import decode_kernel
from rlhf_jax.model.kernels import PRODUCT, cudnn_attention, splash_attention

_MASKED = -1e30
_LOWEST = -1e29  # largest score of a query that sees nothing: above _MASKED, so that all its weights are 0, not NaN
KERNELS = {'cudnn': cudnn_attention, 'splash': splash_attention,
           'cudnn_by_xla': functools.partial(cudnn_attention, implementation='xla')}
_OF_GPUS = 'cudnn', 'cudnn_by_xla'  # beside them, queries against a cache have a kernel of their own
# Queries whose scores exist at a time; keys after the last of them are never read. Long sequences have longer pieces, for
# each is compiled.
_QUERIES_A_PIECE, _MOST_PIECES = 128, 16
_QUERIES_A_TURN = 256  # of the loop


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
  angle = position_BT[:, :, None, None, None].astype(jnp.float32) * radians
  half = radians.shape[0]
  pairs, rest = x_BTNH[..., :2 * half], x_BTNH[..., 2 * half:]
  pairs = pairs.astype(jnp.float32).reshape(*x_BTNH.shape[:3], 2, half)
  # Halves change places by a reversal: on CPU that is a change of index, where a concatenation branches at every number.
  sign = jnp.array([-1.0, 1.0])[:, None]
  turned = pairs * jnp.cos(angle) + jnp.flip(pairs, 3) * (jnp.sin(angle) * sign)
  turned = turned.reshape(*x_BTNH.shape[:3], 2 * half).astype(x_BTNH.dtype)
  return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


@flax.struct.dataclass
class Causal:
  """A token sees itself and those before it of its segment, the nearest `window` of them; segment 0 is padding.

  Padding sees nothing and is seen by nothing. Queries are the slots from `start` on, keys all slots.
  `dense`: every row is one segment, without padding before or in it, so that its length says all.
  """
  segment_BT: jax.Array
  window: int | None = flax.struct.field(pytree_node=False, default=None)
  start: int = flax.struct.field(pytree_node=False, default=0)
  dense: bool = flax.struct.field(pytree_node=False, default=False)

  def seen(self, keys, queries):
    """bool [B, T, S] for the slots of two slices: which keys each query sees."""
    slot = jnp.arange(self.segment_BT.shape[1])
    return self._seen(slot[queries], self.segment_BT[:, queries], slot[keys], self.segment_BT[:, keys])

  def seen_from(self, first, count):
    """bool [B, count, S]: which of all keys see `count` queries from the slot `first` on, which may be traced."""
    query_BT = jax.lax.dynamic_slice_in_dim(self.segment_BT, first, count, axis=1)
    slot = jnp.arange(self.segment_BT.shape[1])
    return self._seen(first + jnp.arange(count), query_BT, slot, self.segment_BT)

  def _seen(self, slot_T, query_BT, slot_S, key_BS):
    age_TS = slot_T[:, None] - slot_S[None, :]
    near_TS = (age_TS >= 0) if self.window is None else (age_TS >= 0) & (age_TS < self.window)
    return near_TS & (query_BT[:, :, None] == key_BS[:, None, :]) & (key_BS[:, None, :] > 0)

  def at(self, slot_B):
    """The Seen of one query a row, the token at that slot."""
    slot_T = jnp.arange(self.segment_BT.shape[1])
    age_BT = slot_B[:, None] - slot_T
    near_BT = (age_BT >= 0) if self.window is None else (age_BT >= 0) & (age_BT < self.window)
    own_B = jnp.sum(jnp.where(slot_T == slot_B[:, None], self.segment_BT, 0), 1)
    return Seen((near_BT & (self.segment_BT == own_B[:, None]) & (self.segment_BT > 0))[:, None])


@flax.struct.dataclass
class Seen:
  """Which keys each query sees, said one by one."""
  seen_BTS: jax.Array


def attend(q_BTNH, k_BKSH, v_BKSH, sees, kernel='xla'):
  """Softmax attention, N/K query heads to a key/value head; scores and softmax in float32; [B, T, N, H].

  A query that sees nothing gets 0. `Causal` attention goes through the queries piece by piece: its
  scores are made again in the backward pass instead of being kept, where there are several pieces.
  'xla' unrolls the pieces, each of which reads only the keys up to its last query; 'xla_loop' has
  one in a loop, which reads all keys. Or `kernel` names one of `KERNELS`, which does the same for
  an accelerator.
  """
  if isinstance(sees, Seen):
    if kernel in _OF_GPUS and q_BTNH.shape[1] == 1 and decode_kernel.allows(q_BTNH.shape[-1]):
      out_BNH = decode_kernel.decode_attention(q_BTNH[:, 0], k_BKSH, v_BKSH, sees.seen_BTS[:, 0])
      return out_BNH[:, None]
    return _weighted(q_BTNH, k_BKSH, v_BKSH, sees.seen_BTS)
  if kernel in KERNELS:
    return KERNELS[kernel](q_BTNH, k_BKSH, v_BKSH, sees)
  by_xla = _looped if kernel == 'xla_loop' else _unrolled
  return checkpoint_name(by_xla(q_BTNH, k_BKSH, v_BKSH, sees), PRODUCT)


def _unrolled(q_BTNH, k_BKSH, v_BKSH, sees):
  pieces, T = [], q_BTNH.shape[1]
  count = min(_MOST_PIECES, -(-T // _QUERIES_A_PIECE))
  weighted, length = jax.checkpoint(_weighted) if count > 1 else _weighted, -(-T // count)
  for first in range(0, T, length):
    last = min(first + length, T)
    queries = slice(sees.start + first, sees.start + last)
    keys = slice(0 if sees.window is None else max(0, queries.start - sees.window + 1), queries.stop)
    pieces.append(weighted(q_BTNH[:, first:last], k_BKSH[:, :, keys], v_BKSH[:, :, keys], sees.seen(keys, queries)))
  return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _looped(q_BTNH, k_BKSH, v_BKSH, sees):
  B, T, N, H = q_BTNH.shape
  length = min(T, _QUERIES_A_TURN)
  count = -(-T // length)
  if count == 1:
    return _weighted(q_BTNH, k_BKSH, v_BKSH, sees.seen_from(sees.start, T))
  # The last piece begins earlier rather than be shorter: what it has in common with the one before
  # is computed twice, and the queries need no padding.
  first_C = jnp.minimum(jnp.arange(count) * length, T - length)

  def turn(first):
    piece_BTNH = jax.lax.dynamic_slice_in_dim(q_BTNH, first, length, axis=1)
    seen_BTS = sees.seen_from(sees.start + first, length)
    return _weighted(piece_BTNH, k_BKSH, v_BKSH, seen_BTS)
  pieces = jax.lax.map(jax.checkpoint(turn, prevent_cse=False), first_C)  # [count, B, length, N, H]
  whole = jnp.moveaxis(pieces[:-1], 0, 1).reshape(B, (count - 1) * length, N, H)
  rest = T - (count - 1) * length
  return jnp.concatenate([whole, pieces[-1][:, length - rest:]], axis=1)


def _weighted(q_BTNH, k_BKSH, v_BKSH, seen_BTS):
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  G = N // K
  q = (q_BTNH * H ** -0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  score = jnp.einsum('BKQH,BKSH->BKQS', q, k_BKSH, preferred_element_type=jnp.float32).reshape(B, K, G, T, -1)
  score = jnp.where(seen_BTS[:, None, None], score, _MASKED)
  largest = jax.lax.stop_gradient(jnp.maximum(score.max(-1, keepdims=True), _LOWEST))
  weight = jnp.exp(score - largest)
  total = weight.sum(-1).reshape(B, K, G * T, 1)
  total = jnp.where(total == 0, 1, total)                                       # of a query that sees nothing
  out = jnp.einsum('BKQS,BKSH->BKQH', weight.astype(v_BKSH.dtype).reshape(B, K, G * T, -1), v_BKSH,
                   preferred_element_type=jnp.float32) / total
  return out.astype(v_BKSH.dtype).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
