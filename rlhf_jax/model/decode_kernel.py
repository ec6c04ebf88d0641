"""Attention of one query a sequence over a cache, as one kernel for NVIDIA GPUs (Pallas, by Triton).

XLA makes four kernels of it, or five: scores, softmax, weighted sum, and what joins their parts. At
every token and layer these cost more than reading the cache. Here a program has one sequence and
one key/value head, with all the query heads that it serves. It goes through the keys block by
block, from the first that is seen to the last, and keeps a running softmax (Milakov and Gimelshein
2018, 1805.02867). Where there is no GPU it runs in an interpreter: slow, and for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rlhf_jax.model.partition import by_device

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX 0.11 says that it will go: then XLA does the same in more kernels
  plgpu = None

NAME = 'decode_attention'  # of the kernel in a program
_LEAST_ROWS = 16  # of a matrix product of Triton
_BLOCK_BYTES = 8 * 2**10  # of the keys of a block, and of its values
_WARPS, _STAGES = 4, 3  # of a program, and of its loads ahead
_MASKED = -1e30


def allows(head_width: int) -> bool:
  """Whether Triton is there, and heads are of a width that it loads: a power of 2."""
  return plgpu is not None and head_width >= 16 and head_width & (head_width - 1) == 0


def decode_attention(q_BNH, k_BKSH, v_BKSH, seen_BS):
  """Softmax attention of one query a sequence over the keys that it sees, [B, N, H]; 0 where it sees none."""
  run = by_device(_of_device, ('BNH', 'BKSH', 'BKSH', 'BS'), 'BNH')
  return run(q_BNH, k_BKSH, v_BKSH, seen_BS)


def _of_device(q_BNH, k_BKSH, v_BKSH, seen_BS):
  B, N, H = q_BNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  q_BKGH = (q_BNH * H ** -0.5).reshape(B, K, G, H)
  slot_S = jnp.arange(S, dtype=jnp.int32)
  bounds_B2 = jnp.stack([jnp.where(seen_BS, slot_S, S).min(1), jnp.where(seen_BS, slot_S + 1, 0).max(1)], 1)
  bias_BS = jnp.where(seen_BS, 0.0, _MASKED).astype(jnp.float32)
  of_pair = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, k: (b, k, 0, 0))
  of_sequence = lambda size: pl.BlockSpec((None, size), lambda b, k: (b, 0))

  def call(interpret, *args):
    kernel = functools.partial(_kernel, _block(S, H, k_BKSH.dtype.itemsize))
    return pl.pallas_call(
      kernel, grid=(B, K), out_shape=jax.ShapeDtypeStruct((B, K, G, H), q_BNH.dtype),
      in_specs=[of_sequence(2), of_pair(G, H), of_pair(S, H), of_pair(S, H), of_sequence(S)],
      out_specs=of_pair(G, H), interpret=interpret, name=NAME,
      compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES))(*args)
  out_BKGH = jax.lax.platform_dependent(
    bounds_B2, q_BKGH, k_BKSH, v_BKSH, bias_BS, cuda=functools.partial(call, False),
    default=functools.partial(call, True))
  return out_BKGH.reshape(B, N, H)


def _block(S, H, itemsize):
  """Keys of a block."""
  return min(pl.next_power_of_2(S), max(16, _BLOCK_BYTES // (H * itemsize)))


def _kernel(block, bounds_ref, q_ref, k_ref, v_ref, bias_ref, out_ref):
  (G, H), S = q_ref.shape, k_ref.shape[0]
  rows = max(_LEAST_ROWS, pl.next_power_of_2(G))
  heads, real_G1 = pl.ds(0, rows), (jnp.arange(rows) < G)[:, None]
  q_GH = plgpu.load(q_ref.at[heads, :], mask=real_G1, other=0.0)
  first, last = bounds_ref[0], bounds_ref[1]

  def turn(i, carry):
    sum_GH, largest_G, total_G = carry
    keys = pl.ds(i * block, block)
    inside_S = i * block + jnp.arange(block) < S
    k_SH = plgpu.load(k_ref.at[keys, :], mask=inside_S[:, None], other=0.0)
    bias_S = plgpu.load(bias_ref.at[keys], mask=inside_S, other=_MASKED)
    score_GS = _product(q_GH, k_SH, over=(1, 1)) + bias_S[None, :]
    now_G = jnp.maximum(largest_G, score_GS.max(1))
    weight_GS = jnp.exp(score_GS - now_G[:, None])
    fades_G = jnp.exp(largest_G - now_G)
    v_SH = plgpu.load(v_ref.at[keys, :], mask=inside_S[:, None], other=0.0)
    sum_GH = sum_GH * fades_G[:, None] + _product(weight_GS.astype(v_SH.dtype), v_SH, over=(1, 0))
    return sum_GH, now_G, total_G * fades_G + weight_GS.sum(1)

  # The largest score begins above what is masked, so that masked keys weigh nothing, not as much as
  # each other.
  start = (jnp.zeros((rows, H), jnp.float32), jnp.full(rows, 0.1 * _MASKED),
           jnp.zeros(rows, jnp.float32))
  sum_GH, _, total_G = jax.lax.fori_loop(first // block, pl.cdiv(last, block), turn, start)
  total_G = jnp.where(total_G == 0, 1.0, total_G)
  out_GH = (sum_GH / total_G[:, None]).astype(out_ref.dtype)
  plgpu.store(out_ref.at[heads, :], out_GH, mask=real_G1)


def _product(left, right, over):
  """Matrix product over an axis of each, accumulated in float32."""
  left_axis, right_axis = over
  return jax.lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())),
                             preferred_element_type=jnp.float32)
