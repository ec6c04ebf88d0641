"""Sampling from a policy: prefill and decode in one compiled call, with no host round trip.

B prompts wait for Q slots. A slot whose answer has ended is given the next prompt, several slots at a time: one prefill,
then a token a step until as many are free again. The cache is a ring whose write place all slots share, so that a token
is written as one slice although answers start at different times. Chance depends on the key, the sample's number and the
place in the response, never on who shares the batch: one CPU, eight devices and another Q give a prompt the same answer.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.maths.sampling import Sampling, sample_tokens, uniforms
from rlhf_jax.model.attention import Seen
from rlhf_jax.model.cache import empty_cache
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.forward import check_length, prefill
from rlhf_jax.model.heads import prepare_to_decode, unembed_DV
from rlhf_jax.model.partition import batch_parts, constrain
from rlhf_jax.model.running import reads_written_cache, scans_layers
from rlhf_jax.records import Prompts, Rollout

# The cache grows in so many steps to the length limit, of about this many tokens at least: less is read while answers are
# short, but more is compiled, and on a TPU a part of the shorter cache is still there when the longer one is. So it must
# spare this share of what is read at least.
_RINGS, _RING_TOKENS, _LEAST_SPARED = 4, 16, 0.1
_REFILLS = 4  # a refill waits until one slot in so many is free: fewer prefills, against slots that idle


def generate(model, params, prompts, key, sampling, slots=None, gather=True):
  """Answers of a LanguageModel to left-padded prompts, as a Rollout of R = sampling.new_tokens response slots.

  `slots` sequences are decoded at a time (None: all of them at once); where a mesh cuts the batch, each part drains a
  queue of its own. `gather` is that of `prepare_to_decode`. Stops when every response has sampled one of
  `sampling.end_tokens` or is full. `logprob_BR` are the nats of the distribution that was sampled from: at the
  temperature, after top-k and top-p. At temperature 0 they are those of temperature 1.
  """
  sizes = check_axes(tokens_BP=prompts.tokens_BP, valid_BP=prompts.valid_BP, sample_B=prompts.sample_B)
  check_length(model.config, sizes['P'] + sampling.new_tokens)
  _check_ids(model.config, sampling)
  parts = batch_parts()
  slots = _check_slots(sizes['B'], slots, parts)
  prepared = prepare_to_decode(model, params, gather)
  # Where blocks are scanned, prompts are read by the parameters as they are stored.
  read, run = (functools.partial(model.apply, {'params': each})
               for each in (params if scans_layers(model.config) else prepared, prepared))
  # All chance is drawn at once: in the decode loop it would be a hundred small operations a token.
  uniform_BR = uniforms(key, prompts.sample_B[:, None], jnp.arange(sampling.new_tokens))
  queue = _Queue(read, run, unembed_DV(prepared), jax.tree.map(jnp.asarray, prompts), uniform_BR,
                 sampling, model.config, parts, slots)
  answers = queue.drain()
  mask_BR = jnp.arange(sampling.new_tokens) < answers.length_B[:, None]
  return Rollout(tokens_BT=jnp.concatenate([prompts.tokens_BP, answers.tokens_BR], 1),
                 valid_BT=jnp.concatenate([prompts.valid_BP, mask_BR], 1),
                 logprob_BR=answers.logprob_BR, mask_BR=mask_BR, ended_B=answers.ended_B, sample_B=prompts.sample_B)


def _check_ids(config, sampling):
  for name, ids in (('end_tokens', sampling.end_tokens), ('pad_token', (sampling.pad_token,))):
    outside = [i for i in ids if i >= config.vocab_size]
    if outside:
      raise ConfigError(f'sampling {name} has the id {outside[0]}, but the model has a vocabulary of {config.vocab_size}. '
                        'Take the ids from the tokenizer that belongs to the model.')


def _check_slots(B, slots, parts):
  """How many of B prompts are decoded at a time."""
  if slots is not None and slots < 1:
    raise ConfigError(f'slots is {slots}. Pass how many sequences to decode at a time, or None for all at once.')
  slots = B if slots is None else min(slots, B)
  if B % parts or slots % parts:
    raise ShardingError(f'{B} prompts on {slots} slots, which the {parts} parts into which the mesh cuts a batch do not '
                        f'divide. Make both multiples of {parts}.')
  return slots


@flax.struct.dataclass
class _Answers:
  """What is said so far."""
  tokens_BR: jax.Array
  logprob_BR: jax.Array
  length_B: jax.Array
  ended_B: jax.Array


@flax.struct.dataclass
class _Decoding:
  """What goes from token to token. `prompt_Q` is the number of a slot's prompt in its part of the batch."""
  clock: jax.Array  # where the next token is written, before it is taken modulo the ring
  taken: jax.Array  # how many prompts of each part have left the queue
  prompt_Q: jax.Array
  token_Q: jax.Array  # the last that was drawn
  slot_Q: jax.Array  # its place in the response
  position_Q: jax.Array  # its position in the sequence
  alive_Q: jax.Array
  seen_QS: jax.Array  # which places of the ring belong to the sequence
  cache: tuple
  answers: _Answers


@dataclasses.dataclass(frozen=True, eq=False)
class _Queue:
  """B prompts on Q slots, in `parts` that never look at each other."""
  read: Callable  # the model that reads prompts
  run: Callable  # the model that decodes, with parameters prepared for that
  unembed_DV: jax.Array
  prompts: Prompts
  uniform_BR: jax.Array  # what chance decides of every token
  sampling: Sampling
  config: ModelConfig
  parts: int
  slots: int

  @property
  def _prompts_a_part(self):
    return self.prompts.sample_B.shape[0] // self.parts

  @property
  def _all_at_once(self):
    return self.slots == self.prompts.sample_B.shape[0]

  @property
  def _refill(self):
    """How many slots of a part are filled at a time."""
    slots = self.slots // self.parts
    return slots if self._all_at_once else -(-slots // _REFILLS)

  @property
  def _longest(self):
    """Tokens of the longest sequence."""
    return self.prompts.tokens_BP.shape[1] + self.sampling.new_tokens

  def drain(self):
    """The _Answers to all prompts."""
    turn = lambda state: jax.lax.while_loop(self._decodes_on, self._decode, self._fill(state))
    if not self._all_at_once:
      goes_on = lambda state: (state.taken < self._prompts_a_part).any() | state.alive_Q.any()
      return jax.lax.while_loop(goes_on, turn, self._start(self._longest)).answers
    state = None
    for ring in self._rings():
      state = self._fill(self._start(ring)) if state is None else self._grown(state, ring)
      goes_on = lambda state, ring=ring: state.alive_Q.any() & (state.clock < ring)
      state = jax.lax.while_loop(goes_on, self._decode, state)
    return state.answers

  def _rings(self):
    """Sizes of the cache, one after another, where no slot is ever filled again: what is not written is not read."""
    P, R = self.prompts.tokens_BP.shape[1], self.sampling.new_tokens
    growth = (R,) if reads_written_cache(self.config) else ring_growth(P, R)
    return [P + length for length in growth]

  def _grown(self, state, ring):
    """The same state with a longer ring, of which the new places are empty."""
    more = ring - state.seen_QS.shape[1]
    pad = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
    return state.replace(seen_QS=pad(state.seen_QS, 1), cache=jax.tree.map(lambda x: pad(x, 2), state.cache))

  def _start(self, ring):
    (B, P), Q, R = self.prompts.tokens_BP.shape, self.slots, self.sampling.new_tokens
    zero_Q, dead_Q = jnp.zeros(Q, jnp.int32), jnp.zeros(Q, bool)
    answers = _Answers(tokens_BR=jnp.full((B, R), self.sampling.pad_token, jnp.int32), logprob_BR=jnp.zeros((B, R)),
                       length_B=jnp.zeros(B, jnp.int32), ended_B=jnp.zeros(B, bool))
    return _Decoding(clock=jnp.int32(P), taken=jnp.zeros(self.parts, jnp.int32), prompt_Q=zero_Q, token_Q=zero_Q,
                     slot_Q=zero_Q, position_Q=zero_Q, alive_Q=dead_Q, seen_QS=jnp.zeros((Q, ring), bool),
                     cache=empty_cache(self.config, Q, ring), answers=answers)

  def _decodes_on(self, state):
    """Whether some answer goes on, and not so many slots are free that it is time to fill them."""
    waits = state.taken < self._prompts_a_part
    free = (~state.alive_Q).reshape(self.parts, -1).sum(1)
    need = jnp.minimum(self._refill, self._prompts_a_part - state.taken)
    due = waits.any() & (jnp.where(waits, free, 0).sum() >= need.sum())
    return state.alive_Q.any() & ~due

  def _fill(self, state):
    """Free slots get the next prompts, and the first token of each answer is drawn."""
    row, prompt, taken = self._each_part(self._choose, state.alive_Q, state.taken)
    ask = lambda x: self._each_part(lambda x, prompt: x.at[prompt].get(mode='clip'), x, prompt)
    tokens = ask(self.prompts.tokens_BP)
    used, P, ring = prompt < self._prompts_a_part, tokens.shape[1], state.seen_QS.shape[1]
    valid = ask(self.prompts.valid_BP) & used[:, None]
    empty = empty_cache(self.config, len(row), ring if self._all_at_once else P)  # all at once: laid where they will stay
    hidden, cache = prefill(self.read, self.config, tokens, valid, empty)
    token, answers, alive = self._draw(hidden[:, 0], state.answers, prompt, jnp.zeros_like(row), used)
    new = {'prompt_Q': prompt, 'token_Q': token, 'slot_Q': jnp.zeros_like(row),
           'position_Q': valid.sum(1, dtype=jnp.int32), 'alive_Q': alive}
    if self._all_at_once:
      new |= {'seen_QS': jnp.pad(valid, [(0, 0), (0, ring - P)]), 'cache': cache}
    else:
      new |= {'seen_QS': _around(valid, 1, ring, state.clock),
              'cache': jax.tree.map(lambda x: _around(x, 2, ring, state.clock), cache)}
      put = lambda old, new: self._each_part(lambda old, row, new: old.at[row].set(new, mode='drop'), old, row, new)
      new = {name: jax.tree.map(put, getattr(state, name), value) for name, value in new.items()}
    return state.replace(taken=taken, answers=answers, **new)

  def _choose(self, alive, taken):
    """Of one part: the slots to fill, the prompts for them, and how many prompts have now left the queue.

    Where there are fewer free slots or prompts than a refill has places, slot and prompt are numbers too high to be real.
    """
    row = jnp.argsort(alive, stable=True)[:self._refill]                        # free ones first
    prompt = taken + jnp.arange(len(row))
    used = ~alive[row] & (prompt < self._prompts_a_part)
    return (jnp.where(used, row, len(alive)), jnp.where(used, prompt, self._prompts_a_part),
            taken + used.sum(dtype=jnp.int32))

  def _decode(self, state):
    """One more token for every slot; what the free ones say is dropped."""
    ring, window = state.seen_QS.shape[1], self.config.window
    place = state.clock % ring
    seen_QS = jax.lax.dynamic_update_slice_in_dim(state.seen_QS, jnp.ones((self.slots, 1), bool), place, axis=1)
    age_S = (place - jnp.arange(ring)) % ring
    sees_QS = seen_QS if window is None else seen_QS & (age_S < window)
    hidden_QTD, cache = self.run(state.token_Q[:, None], state.position_Q[:, None], Seen(sees_QS[:, None]), state.cache,
                                  place)
    token_Q, answers, alive_Q = self._draw(hidden_QTD[:, 0], state.answers, state.prompt_Q, state.slot_Q + 1, state.alive_Q)
    return state.replace(clock=state.clock + 1, token_Q=token_Q, slot_Q=state.slot_Q + 1, position_Q=state.position_Q + 1,
                         alive_Q=alive_Q, seen_QS=seen_QS, cache=cache, answers=answers)

  def _draw(self, hidden_QD, answers, prompt_Q, slot_Q, alive_Q):
    """The next token of each sequence, the answers with it where it is alive, and which sequences go on after it."""
    logits_QV = jnp.matmul(hidden_QD, self.unembed_DV, preferred_element_type=jnp.float32)
    # Each chip makes its part of the logits; they are gathered once, then sampled locally. Without the first line it is
    # the unembedding that is gathered, and every chip makes all.
    logits_QV = constrain(constrain(logits_QV, 'BV', V='tensor'), 'BV')
    uniform_Q = self._each_part(lambda x, *at: x.at[at].get(mode='clip'), self.uniform_BR, prompt_Q, slot_Q)
    token_Q, logprob_Q = sample_tokens(logits_QV, uniform_Q, self.sampling)
    ends_Q = jnp.isin(token_Q, jnp.array(self.sampling.end_tokens, jnp.int32))
    prompt_Q = jnp.where(alive_Q, prompt_Q, self._prompts_a_part)                # of a free slot: none
    place = lambda array, value, *at: self._each_part(
      lambda array, value, *at: array.at[at].set(value, mode='drop'), array, value, prompt_Q, *at)
    answers = _Answers(place(answers.tokens_BR, token_Q, slot_Q), place(answers.logprob_BR, logprob_Q, slot_Q),
                       place(answers.length_B, slot_Q + 1), place(answers.ended_B, ends_Q))
    return token_Q, answers, alive_Q & ~ends_Q & (slot_Q + 1 < self.sampling.new_tokens)

  def _each_part(self, fn, *arrays):
    """fn of each part of the arrays, which are cut along their first axis, and what it returns joined again."""
    if self.parts == 1:
      return fn(*arrays)
    cut = [x.reshape(self.parts, x.shape[0] // self.parts, *x.shape[1:]) for x in arrays]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(fn)(*cut))


def ring_growth(prompt_tokens, new_tokens):
  """After how many tokens of a response the cache ends, one size after another."""
  count = min(_RINGS, -(-new_tokens // _RING_TOKENS))
  spared = (count - 1) / (2 * count) * new_tokens / (prompt_tokens + new_tokens)
  count = count if spared >= _LEAST_SPARED else 1
  return [-(-new_tokens * i // count) for i in range(1, count + 1)]


def _around(x, axis, ring, clock):
  """Prompts laid into a ring so that their last token stands before the next place to be written."""
  widths = [(0, ring - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
  return jnp.roll(jnp.pad(x, widths), clock - x.shape[axis], axis)


def loop_trips(config, prompts, prompt_tokens, new_tokens, slots=None, parts=1):
  """How often the loops of `generate` run, the outer before the inner, where every answer runs to its limit."""
  decoded = new_tokens - 1                                                      # the first comes with the prefill
  if slots is None or slots >= prompts:
    rings = 1 if reads_written_cache(config) else len(ring_growth(prompt_tokens, new_tokens))
    return (decoded / rings,)
  fills = prompts / parts / -(-slots // parts // _REFILLS)
  return fills, decoded * prompts / slots / fills
