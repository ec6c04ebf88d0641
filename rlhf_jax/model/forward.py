"""From parameters and tokens to what the losses need: hidden stream, log-probabilities, values, scores.

Positions, and what each token sees, follow from `valid`: padding may stand on either side and takes no position.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError
from rlhf_jax.maths.logprob import chunked_logprobs, whole_logprobs
from rlhf_jax.model import running
from rlhf_jax.model.attention import Causal, project
from rlhf_jax.model.heads import unembed_DV
from rlhf_jax.model.partition import batch_parts, gathered


def positions(valid_BT, segment_BT=None):
  """Position of every token in its sequence, int32: how many valid tokens stand before it (in its segment, if packed)."""
  count_BT = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - valid_BT
  if segment_BT is None:
    return count_BT
  starts_BT = jnp.diff(segment_BT, axis=1, prepend=-1) != 0
  return count_BT - jax.lax.cummax(jnp.where(starts_BT, count_BT, 0), axis=1)


def causal(config, valid_BT, segment_BT=None):
  """What each token of whole sequences sees: valid ones of its segment, not later, within the model's window."""
  own_BT = valid_BT.astype(jnp.int32) if segment_BT is None else jnp.where(valid_BT, segment_BT, 0)
  return Causal(own_BT, window=config.window)


def check_length(config, length):
  """Raises ConfigError where a sequence is longer than the model's context."""
  if length > config.context_length:
    raise ConfigError(f'sequences of {length} tokens, but the model has context_length={config.context_length}. '
                      'Shorten prompts or responses, or use a model with a longer context.')


def hidden(model, params, tokens_BT, valid_BT, segment_BT=None, wanted=None):
  """The normalised stream after the last block, [B, T, D], of the backbone in `params` (of either model).

  `wanted` None is all tokens; a number the slots from there on, [B, T - wanted, D]; an array slot_B one a row, [B, 1, D].
  """
  check_axes(tokens_BT=tokens_BT, valid_BT=valid_BT, segment_BT=segment_BT)
  check_length(model.config, tokens_BT.shape[1])
  if segment_BT is None and running.takes_dense_rows(model.config):
    return _hidden_of_dense(model, params, tokens_BT, valid_BT, wanted)
  sees = causal(model.config, valid_BT, segment_BT)
  return _stream(model, params, tokens_BT, positions(valid_BT, segment_BT), sees, wanted)


def _stream(model, params, tokens_BT, position_BT, sees, wanted):
  return model.apply({'params': params}, tokens_BT, position_BT, sees,
                     method=lambda m, *args: m.backbone(*args, wanted=wanted)[0])


def _hidden_of_dense(model, params, tokens_BT, valid_BT, wanted):
  """`hidden` of rows whose padding is moved behind their tokens, for a kernel that takes lengths.

  Tokens are moved before the first block, and the stream is moved back after the last. A window
  counts the tokens of a row, not its slots, where a row has padding between its tokens.
  """
  odd = tokens_BT.shape[1] % 2  # the kernel takes even lengths: once here, or in every block
  tokens_BT, valid_BT = (jnp.pad(x_BT, ((0, 0), (0, odd))) for x_BT in (tokens_BT, valid_BT))
  slot_BT = _dense_slots(valid_BT)
  dense = _dense(model.config, tokens_BT, valid_BT)
  if wanted is None or isinstance(wanted, int):
    hidden_BTD = _stream(model, params, *dense, None)
    return _at(hidden_BTD, slot_BT[:, wanted:slot_BT.shape[1] - odd])
  wanted_B = jnp.take_along_axis(slot_BT, wanted[:, None], axis=1)[:, 0]
  return _stream(model, params, *dense, wanted_B)


def prefill(apply, config, tokens_BP, valid_BP, cache):
  """(stream of the last slot [B, 1, D], cache with keys and values in the slots of their tokens).

  `apply` is that of a LanguageModel with its parameters.
  """
  P = tokens_BP.shape[1]
  if not running.takes_dense_rows(config):
    return apply(tokens_BP, positions(valid_BP), causal(config, valid_BP), cache, 0, wanted=P - 1)
  slot_BP = _dense_slots(valid_BP)
  hidden_B1D, cache = apply(*_dense(config, tokens_BP, valid_BP), cache, 0, wanted=slot_BP[:, -1])

  def moved(x_BKSH):
    at_BKPH = slot_BP[:, None, :, None]
    prompt_BKPH = jnp.take_along_axis(x_BKSH[:, :, :P], at_BKPH, axis=2, mode='clip')
    return x_BKSH.at[:, :, :P].set(prompt_BKPH)
  return hidden_B1D, jax.tree.map(moved, cache)


def _dense(config, tokens_BT, valid_BT):
  """(tokens, positions, Causal) of the rows with their padding behind the tokens.

  Padding keeps its position too: where a row has no token before its response, the first is drawn
  from what is said of the padding before it.
  """
  segment_BT = jnp.arange(tokens_BT.shape[1]) < valid_BT.sum(1, keepdims=True)
  return (dense_rows(tokens_BT, valid_BT), dense_rows(positions(valid_BT), valid_BT),
          Causal(segment_BT.astype(jnp.int32), config.window, dense=True))


def _dense_slots(valid_BT):
  """Where `dense_rows` has each slot, int32."""
  padding_BT = valid_BT.sum(1, dtype=jnp.int32, keepdims=True) + positions(~valid_BT)
  return jnp.where(valid_BT, positions(valid_BT), padding_BT)


def dense_rows(x_BT, valid_BT):
  """Rows [B, T, ...] with the valid tokens first and the padding behind them, both in their order."""
  order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)
  return _at(x_BT, order_BT)


def _at(x_BT, slot_BT):
  """Of every row [T, ...] the slots that are named, of which none is named twice."""
  slot_BT = slot_BT.reshape(*slot_BT.shape, *[1] * (x_BT.ndim - 2))
  return jnp.take_along_axis(x_BT, slot_BT, axis=1, mode='clip')


def logits(model, params, tokens_BT, valid_BT):
  """float32 [B, T, V]. For looking at and for tests; the losses never hold so large an array."""
  hidden_BTD = hidden(model, params, tokens_BT, valid_BT)
  return project(hidden_BTD, unembed_DV(params).astype(hidden_BTD.dtype)).astype(jnp.float32)


def logprobs_from_hidden(model, params, hidden_BTD, target_BT, temperature=1.0):
  """Nats and entropy of each target under the stream at its place: (logprob_BT, entropy_BT), float32."""
  weight_DV = gathered(unembed_DV(params), 'unembed_DV')
  B, T = target_BT.shape
  if running.keeps_logits(model.config, B * T // batch_parts()):
    return whole_logprobs(hidden_BTD, weight_DV, target_BT, temperature=temperature)
  tokens_per_chunk = running.tokens_per_chunk(model.config) * batch_parts()
  return chunked_logprobs(hidden_BTD, weight_DV, target_BT, temperature=temperature,
                          tokens_per_chunk=tokens_per_chunk)


def next_logprobs(model, params, tokens_BT, valid_BT, *, segment_BT=None, start=1, temperature=1.0):
  """(logprob, entropy) of the tokens from slot `start` on, each given all before it; float32 [B, T - start]."""
  hidden_BTD = hidden(model, params, tokens_BT, valid_BT, segment_BT, wanted=start - 1)
  return logprobs_from_hidden(model, params, hidden_BTD[:, :-1], tokens_BT[:, start:], temperature)


def values(model, params, tokens_BT, valid_BT):
  """The scalar head at every position, float32 [B, T]. For looking at and for tests: the losses need fewer positions."""
  return values_from_hidden(model, params, hidden(model, params, tokens_BT, valid_BT))


def values_from_hidden(model, params, hidden_BTD):
  """The scalar head of a ScalarModel on a stream, whose backbone may belong to another model; float32 [B, T]."""
  return model.apply({'params': {'scalar': params['scalar']}}, hidden_BTD, method='head')


def scores(model, params, tokens_BT, valid_BT):
  """A reward model's score of each sequence: its scalar at the last valid token, float32 [B]; 0 where none is valid."""
  last_B = jnp.max(jnp.where(valid_BT, jnp.arange(valid_BT.shape[1]), -1), axis=1)
  hidden_BTD = hidden(model, params, tokens_BT, valid_BT, wanted=last_B)
  return jnp.where(last_B < 0, 0.0, values_from_hidden(model, params, hidden_BTD)[:, 0])


def policy_and_value(policy, value, params, tokens_BT, valid_BT, *, start, temperature):
  """(logprob_BR, entropy_BR, value_BR, after_B) of params {'policy', 'value'}, R being the slots from `start` on.

  `value_BR` is of the text before each of those tokens, `after_B` of the whole. One pass where the value is a second head
  on the policy's trunk (`params['value']` has no backbone), else two.
  """
  hidden_BTD = hidden(policy, params['policy'], tokens_BT, valid_BT, wanted=start - 1)
  logprob_BR, entropy_BR = logprobs_from_hidden(policy, params['policy'], hidden_BTD[:, :-1], tokens_BT[:, start:],
                                                temperature)
  if 'backbone' in params['value']:
    hidden_BTD = hidden(value, params['value'], tokens_BT, valid_BT, wanted=start - 1)
  value_BT = values_from_hidden(value, params['value'], hidden_BTD)
  return logprob_BR, entropy_BR, value_BT[:, :-1], value_BT[:, -1]
