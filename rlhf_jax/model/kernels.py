"""Attention kernels of accelerators, which hold no scores of all heads: cuDNN's on NVIDIA GPUs, splash on TPUs.

Both answer what `attention.attend` answers for a `Causal`, and are chosen by `ModelConfig.attention`. Decoding, one query
against a cache, needs neither. cuDNN's has run on an H100, splash on no TPU: without one it runs in an interpreter, slowly,
for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from rlhf_jax.errors import ConfigError
from rlhf_jax.model.partition import by_device

PRODUCT = 'product'  # the name of what rematerialisation may keep: products with weights, attention
_LANES = 128  # splash works in blocks of a multiple of so many tokens
_LONGEST_BLOCK = 512  # MaxText's default for all of its blocks; that of JAX, 128, is there to be replaced


def cudnn_attention(q_BTNH, k_BKSH, v_BKSH, causal, implementation='cudnn'):
  """cuDNN's fused attention, in bfloat16; raises ConfigError where there is no cuDNN, or JAX refuses.

  Dense rows are told by their lengths, and nothing after the diagonal is computed. Others (packed,
  or with padding before them) are told by an array [B, 1, T, S] of who sees whom, and computed in
  full. `implementation` 'xla' makes the same call without the kernel.
  """
  T, S = q_BTNH.shape[1], k_BKSH.shape[2]
  q_BTNH = _longer(q_BTNH, T % 2, 1)  # its gradient needs even lengths
  k_BSKH, v_BSKH = (_longer(x.swapaxes(1, 2), S % 2, 1) for x in (k_BKSH, v_BKSH))
  if causal.dense and causal.start == 0:
    length_B = (causal.segment_BT > 0).sum(1, dtype=jnp.int32)
    window = None if causal.window is None else (causal.window - 1, 0)
    told = {'is_causal': True, 'query_seq_lengths': length_B, 'key_value_seq_lengths': length_B,
            'local_window_size': window}
  else:
    seen_BTS = causal.seen(slice(0, S), slice(causal.start, causal.start + T))
    told = {'mask': _longer(_longer(seen_BTS, T % 2, 1), S % 2, 2)[:, None]}
  try:
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, implementation=implementation,
                                            **told)
  except jax.errors.JaxRuntimeError:  # of running it, such as memory that is not enough
    raise
  except (NotImplementedError, RuntimeError) as error:  # the version, or a limit not known here
    raise ConfigError(f"cuDNN's attention cannot be had: {error} Pass --attention xla.") from error
  return _of_tokens(out_BTNH[:, :T], causal)


def splash_attention(q_BTNH, k_BKSH, v_BKSH, causal):
  """The TPU's splash attention. On a data x fsdp x tensor mesh each device does its own sequences and heads."""
  T, S = q_BTNH.shape[1], k_BKSH.shape[2]
  more_T = -T % _LANES
  after = causal.start + T + more_T                                  # queries end here, and each must see its own key
  more_S = after + -after % _LANES - S
  q_BNTH = _longer((q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2), more_T, 2)
  k_BKSH, v_BKSH = _longer(k_BKSH, more_S, 2), _longer(v_BKSH, more_S, 2)
  segment_BT = _longer(causal.segment_BT, more_S, 1)                  # what is added is padding, which sees padding
  run = by_device(functools.partial(_splash, causal.window, causal.start), ('BNTH', 'BKSH', 'BKSH', 'BT', 'BS'), 'BNTH')
  out_BNTH = run(q_BNTH, k_BKSH, v_BKSH, segment_BT[:, causal.start:after], segment_BT)
  return _of_tokens(out_BNTH.swapaxes(1, 2)[:, :T], causal)


def _splash(window, start, q_BNTH, k_BKSH, v_BKSH, query_segment_BT, key_segment_BS):
  N, T, S = q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
  if window is None:
    mask = splash.CausalMask((T, S), offset=start)
  else:
    mask = splash.LocalMask((T, S), (window - 1, 0), offset=start)
  segments, block_T, block_S = splash.SegmentIds(query_segment_BT, key_segment_BS), _block(T), _block(S)
  sizes = splash.BlockSizes(block_q=block_T, block_kv=block_S, block_q_dkv=block_T, block_kv_dkv=block_S,
                            block_q_dq=block_T, block_kv_dq=block_S)

  def attention(interpret, *args):
    kernel = splash.make_splash_mha(splash.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                    residual_checkpoint_name=PRODUCT, interpret=interpret)
    return jax.vmap(kernel)(*args)
  return jax.lax.platform_dependent(q_BNTH, k_BKSH, v_BKSH, segments, tpu=functools.partial(attention, False),
                                    default=functools.partial(attention, True))


def _block(length):
  """Tokens of the longest block that divides a length, itself a multiple of _LANES: of 1536 512, of 640 only 128."""
  return next(block for block in range(_LONGEST_BLOCK, 0, -_LANES) if length % block == 0)


def _longer(x, more, axis):
  """x with so many zeros after it along an axis."""
  return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _of_tokens(out_BTNH, causal):
  """The output with 0 for padding, to which these kernels give something else."""
  T = out_BTNH.shape[1]
  return jnp.where(causal.segment_BT[:, causal.start:causal.start + T, None, None] > 0, out_BTNH, 0)
