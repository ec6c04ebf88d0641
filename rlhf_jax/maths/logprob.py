"""What a language model says of tokens: their log-probability, and the entropy of the choice, in nats and float32.

`token_logprobs` and `entropy` read logits that exist already. `chunked_logprobs` goes from hidden states straight to
both and never holds the logits of a whole batch: for 64 x 1024 tokens and a vocabulary of 128k that is 33.6 GB. It
recomputes them chunk by chunk in the backward pass. The probability of the target is read with a comparison and a sum,
not a gather: its gradient needs no scatter, and each device can do its own part of a sharded vocabulary.
Read next: kl.py.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes


def token_logprobs(logits_BTV, target_BT):
  """Natural log of softmax(logits) at the target token, [B, T] float32; other leading axes do as well.

  A target outside [0, V) gives 0 with gradient 0, so mark padding with a mask rather than with such a number.

  >>> import jax.numpy as jnp
  >>> logprob_BT = token_logprobs(jnp.log(jnp.array([[[0.2, 0.8]]])), jnp.array([[1]]))
  >>> f'{logprob_BT[0, 0]:.4f}'                                      # log 0.8
  '-0.2231'
  """
  return _read(logits_BTV, target_BT)[0]


def entropy(logits_BTV):
  """-sum_v p_v log p_v of p = softmax(logits), nats, [B, T] float32. Tokens excluded by a logit of -inf count 0.

  >>> import jax.numpy as jnp
  >>> f'{entropy(jnp.zeros((1, 1, 4)))[0, 0]:.4f}'                   # log 4
  '1.3863'
  """
  return _read(logits_BTV, jnp.zeros(logits_BTV.shape[:-1], jnp.int32))[1]


def chunked_logprobs(hidden_BTD, unembed_DV, target_BT, *, temperature=1.0, tokens_per_chunk=1024):
  """(logprob_BT, entropy_BT) of softmax(hidden @ unembed / temperature), float32, differentiable.

  At most about max(B, tokens_per_chunk) rows of logits exist at a time, forward and backward. The chunks cut T, so a
  sharded B stays sharded. The product is computed in the dtype of `hidden` and accumulated in float32; pass `unembed`
  in float32 to have its gradient summed over the chunks in float32 too. `temperature` > 0.

  >>> import jax.numpy as jnp
  >>> logprob_BT, entropy_BT = chunked_logprobs(jnp.zeros((2, 3, 5)), jnp.zeros((5, 4)), jnp.zeros((2, 3), int),
  ...                                           tokens_per_chunk=4)
  >>> logprob_BT.shape, f'{logprob_BT[0, 0]:.4f}', f'{entropy_BT[0, 0]:.4f}'
  ((2, 3), '-1.3863', '1.3863')
  """
  check_axes(hidden_BTD=hidden_BTD, unembed_DV=unembed_DV, target_BT=target_BT)
  B, T, _ = hidden_BTD.shape
  read = functools.partial(_read_chunk, unembed_DV, temperature)
  length = max(1, tokens_per_chunk // max(B, 1))
  if length >= T:
    return read((hidden_BTD, target_BT))
  count = -(-T // length)
  padding_T = 0, count * length - T

  def cut(x):                                                        # [B, T, ...] -> [count, B, length, ...]
    padded = jnp.pad(x, ((0, 0), padding_T) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, count, length, *x.shape[2:]), 1, 0)

  # prevent_cse guards against a merge that cannot happen across the iterations of a map, and hinders fusion.
  chunks = jax.lax.map(jax.checkpoint(read, prevent_cse=False), (cut(hidden_BTD), cut(target_BT)))
  logprob_BT, entropy_BT = (jnp.moveaxis(chunk, 0, 1).reshape(B, -1)[:, :T] for chunk in chunks)
  return logprob_BT, entropy_BT


def whole_logprobs(hidden_BTD, unembed_DV, target_BT, *, temperature=1.0):
  """`chunked_logprobs` in one piece, whose logits stay until the backward pass instead of being made again.

  They take 4 * B * T * V bytes.

  >>> import jax.numpy as jnp
  >>> logprob_BT, _ = whole_logprobs(jnp.zeros((2, 3, 5)), jnp.zeros((5, 4)), jnp.zeros((2, 3), int))
  >>> logprob_BT.shape, f'{logprob_BT[0, 0]:.4f}'
  ((2, 3), '-1.3863')
  """
  check_axes(hidden_BTD=hidden_BTD, unembed_DV=unembed_DV, target_BT=target_BT)
  hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  logprob_T, entropy_T = _unembedded(temperature, hidden_TD, unembed_DV, target_BT.reshape(-1))
  return logprob_T.reshape(target_BT.shape), entropy_T.reshape(target_BT.shape)


def _read_chunk(unembed_DV, temperature, chunk):
  """chunked_logprobs of one chunk (hidden_BTD, target_BT)."""
  hidden_BTD, target_BT = chunk
  hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])  # one axis: its gradient is faster on CPU
  target_T = target_BT.reshape(-1)
  if hidden_TD.dtype == jnp.float32:
    logprob_T, entropy_T = _read(_logits(hidden_TD, unembed_DV) / temperature, target_T)
  else:
    logprob_T, entropy_T = _unembedded(temperature, hidden_TD, unembed_DV, target_T)
  return logprob_T.reshape(target_BT.shape), entropy_T.reshape(target_BT.shape)


def _logits(hidden_TD, unembed_DV):
  """float32, of a product in the dtype of the stream."""
  return jnp.matmul(hidden_TD, unembed_DV.astype(hidden_TD.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unembedded(temperature, hidden_TD, unembed_DV, target_T):
  """(logprob_T, entropy_T). The products of its gradient are in the dtype of the stream too.

  Left to automatic differentiation they would be in float32, for the gradient of the logits is.
  With p = softmax(z), the gradient by the logits z is e_target - p of the log-probability, and
  -p * (log p + entropy) of the entropy.
  """
  return _read(_logits(hidden_TD, unembed_DV) / temperature, target_T)


def _unembedded_forward(temperature, hidden_TD, unembed_DV, target_T):
  logits_TV = _logits(hidden_TD, unembed_DV)
  logprob_T, entropy_T, log_total_T = _read_all(logits_TV / temperature, target_T)
  kept = hidden_TD, unembed_DV, target_T, logits_TV, entropy_T, log_total_T
  return (logprob_T, entropy_T), kept


def _unembedded_backward(temperature, kept, gradients):
  hidden_TD, unembed_DV, target_T, logits_TV, entropy_T, log_total_T = kept
  by_logprob_T, by_entropy_T = gradients
  by_logprob_T = jnp.where(_exists(target_T, logits_TV), by_logprob_T, 0)
  logprob_TV = logits_TV / temperature - log_total_T[:, None]
  p_TV = jnp.exp(logprob_TV)
  finite_TV = jnp.where(logprob_TV > -jnp.inf, logprob_TV, 0)
  by_logits_TV = by_logprob_T[:, None] * (_is_target(target_T, logits_TV) - p_TV)
  by_logits_TV -= by_entropy_T[:, None] * p_TV * (finite_TV + entropy_T[:, None])
  by_logits_TV = (by_logits_TV / temperature).astype(hidden_TD.dtype)
  product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  by_hidden_TD = product(by_logits_TV, unembed_DV.astype(hidden_TD.dtype).T)
  by_unembed_DV = product(hidden_TD.T, by_logits_TV)
  return by_hidden_TD.astype(hidden_TD.dtype), by_unembed_DV.astype(unembed_DV.dtype), None


_unembedded.defvjp(_unembedded_forward, _unembedded_backward)


def _is_target(target_BT, logits_BTV):
  token_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
  return token_BTV == target_BT[..., None]


def _exists(target_BT, logits_BTV):
  return (target_BT >= 0) & (target_BT < logits_BTV.shape[-1])


def _read(logits_BTV, target_BT):
  """(log-probability of the target, entropy) of softmax(logits)."""
  logprob_BT, entropy_BT, _ = _read_all(logits_BTV, target_BT)
  return logprob_BT, entropy_BT


def _read_all(logits_BTV, target_BT):
  """(log-probability of the target, entropy, log of the sum of exp(logits)).

  They share no exponential: one that both use is compiled otherwise than one that is used alone, so a log-probability
  would depend in its last bit on whether the entropy is asked for, and the KL of equal models would not be 0.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  largest_BT1 = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
  shifted_BTV = logits_BTV - largest_BT1
  log_total_BT = jnp.log(jnp.sum(jnp.exp(shifted_BTV), axis=-1))
  at_target_BT = jnp.sum(jnp.where(_is_target(target_BT, logits_BTV), shifted_BTV, 0), axis=-1)
  logprob_BTV = shifted_BTV - log_total_BT[..., None]
  finite_BTV = jnp.where(logprob_BTV > -jnp.inf, logprob_BTV, 0)     # 0 * -inf is NaN; its limit is 0
  target_logprob_BT = jnp.where(_exists(target_BT, logits_BTV), at_target_BT - log_total_BT, 0)
  entropy_BT = -jnp.sum(jnp.exp(logprob_BTV) * finite_BTV, axis=-1)
  return target_logprob_BT, entropy_BT, largest_BT1[..., 0] + log_total_BT
