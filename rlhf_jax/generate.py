"""Sampling from a policy: prefill and decode in one compiled call, with no host round trip.

Chance depends on the key, the sample's number and the place in the response, never on who shares the batch, so one CPU,
eight devices and another batch size give a prompt the same answer.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError
from rlhf_jax.maths.sampling import sample_tokens
from rlhf_jax.model.cache import empty_cache
from rlhf_jax.model.forward import attends, check_length, positions
from rlhf_jax.model.heads import prepare_to_decode, unembed_DV
from rlhf_jax.model.partition import constrain
from rlhf_jax.records import Rollout


def generate(model, params, prompts, key, sampling):
  """Answers of a LanguageModel to left-padded prompts, as a Rollout of R = sampling.new_tokens slots.

  Stops when every response has sampled one of `sampling.end_tokens`. `logprob_BR` are the nats of the distribution that
  was sampled from: at the temperature, after top-k and top-p. At temperature 0 they are those of temperature 1.
  """
  P = check_axes(tokens_BP=prompts.tokens_BP, valid_BP=prompts.valid_BP, sample_B=prompts.sample_B)['P']
  R, config = sampling.new_tokens, model.config
  check_length(config, P + R)
  _check_ids(config, sampling)
  params = prepare_to_decode(model, params)
  run = functools.partial(model.apply, {'params': params})
  unembed = unembed_DV(params)

  def sample(hidden_BD, t):
    logits_BV = jnp.matmul(hidden_BD, unembed, preferred_element_type=jnp.float32)
    logits_BV = constrain(logits_BV, 'BV')                                      # gathered once, then sampled locally
    return sample_tokens(logits_BV, key, prompts.sample_B, t, sampling)

  def note(answer, t, token_B, logprob_B, alive_B):
    """The three [B, R] arrays with column t filled in, and who goes on."""
    token_B = jnp.where(alive_B, token_B, sampling.pad_token)
    columns = token_B, jnp.where(alive_B, logprob_B, 0.0), alive_B
    put = lambda array, column: jax.lax.dynamic_update_slice_in_dim(array, column[:, None], t, axis=1)
    ends_B = jnp.isin(token_B, jnp.array(sampling.end_tokens, jnp.int32))
    return jax.tree.map(put, answer, columns), token_B, alive_B & ~ends_B

  def decode(carry):
    t, token_B, alive_B, cache, answer = carry                                  # token_B is answer number t
    seen_BTS = _seen(prompts.valid_BP, R, t, config.window)
    position_BT = (prompts.valid_BP.sum(1, dtype=jnp.int32) + t)[:, None]
    hidden_BTD, cache = run(token_B[:, None], position_BT, seen_BTS, cache, P + t)
    token_B, logprob_B = sample(hidden_BTD[:, 0], t + 1)
    answer, token_B, alive_B = note(answer, t + 1, token_B, logprob_B, alive_B)
    return t + 1, token_B, alive_B, cache, answer

  hidden_BD, cache = _prefill(run, config, prompts, R)
  B = hidden_BD.shape[0]
  answer = jnp.zeros((B, R), jnp.int32) + sampling.pad_token, jnp.zeros((B, R)), jnp.zeros((B, R), bool)
  answer, token_B, alive_B = note(answer, 0, *sample(hidden_BD, 0), jnp.ones(B, bool))
  carry = jnp.int32(0), token_B, alive_B, cache, answer
  goes_on = lambda carry: (carry[0] + 1 < R) & carry[2].any()
  _, _, alive_B, _, (tokens_BR, logprob_BR, mask_BR) = jax.lax.while_loop(goes_on, decode, carry)
  return Rollout(tokens_BT=jnp.concatenate([prompts.tokens_BP, tokens_BR], 1),
                 valid_BT=jnp.concatenate([prompts.valid_BP, mask_BR], 1),
                 logprob_BR=logprob_BR, mask_BR=mask_BR, ended_B=~alive_B, sample_B=prompts.sample_B)


def _check_ids(config, sampling):
  for name, ids in (('end_tokens', sampling.end_tokens), ('pad_token', (sampling.pad_token,))):
    outside = [i for i in ids if i >= config.vocab_size]
    if outside:
      raise ConfigError(f'sampling {name} has the id {outside[0]}, but the model has a vocabulary of {config.vocab_size}. '
                        'Take the ids from the tokenizer that belongs to the model.')


def _prefill(run, config, prompts, R):
  """The stream after the last prompt token, [B, D], and a cache that holds the prompts and has R slots free."""
  B, P = prompts.tokens_BP.shape
  hidden_BTD, cache = run(prompts.tokens_BP, positions(prompts.valid_BP),
                          attends(prompts.valid_BP, window=config.window), empty_cache(config, B, P), 0)
  return hidden_BTD[:, -1], jax.tree.map(lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, R), (0, 0))), cache)


def _seen(valid_BP, R, t, window):
  """Which of the P + R slots the token in slot P + t sees, bool [B, 1, S]: real prompt tokens, and answers up to its own."""
  P = valid_BP.shape[1]
  slot = jnp.arange(P + R)
  seen_BS = jnp.pad(valid_BP, ((0, 0), (0, R)), constant_values=True) & (slot <= P + t)
  return (seen_BS if window is None else seen_BS & (P + t - slot < window))[:, None]
