"""Drawing the next token so that what a sample gets depends on its number and position, not on the rest of its batch.

One uniform a row, from fold_in(fold_in(key, sample), position): a sample's text survives another batch size, another
order and another device count. The draw inverts the cumulative distribution in two levels (about sqrt(V) blocks, then
the slots of one block): no Gumbel noise over the vocabulary, and no sort unless top-k or top-p asks for one.
Log-probabilities are those of the distribution that was sampled from. For PPO leave top_k and top_p off: training
computes probabilities over the whole vocabulary. The uniform has 23 bits, so tokens less likely than about 1e-7 are
right only as a group.
Read next: logprob.py, whose probabilities at the same temperature these are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.errors import ConfigError
from rlhf_jax.maths.logprob import token_logprobs


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the vocabulary whole.

  `end_tokens` end a response and belong to it; what follows is `pad_token`. Hashable, so it can be a static argument.

  >>> Sampling(temperature=0.7, end_tokens=(2,)).new_tokens
  64
  """
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  new_tokens: int = 64
  end_tokens: tuple[int, ...] = ()
  pad_token: int = 0

  def __post_init__(self):
    _require(0 <= self.temperature < math.inf, f'temperature is {self.temperature}', 'a finite number >= 0',
             'Pass 1.0 to sample from the model as it is, or 0 for greedy decoding')
    _require(self.top_k >= 0, f'top_k is {self.top_k}', 'a count >= 0', 'Pass 0 to keep every token')
    _require(0 < self.top_p <= 1, f'top_p is {self.top_p}', 'a probability in (0, 1]', 'Pass 1.0 to keep every token')
    _require(self.new_tokens >= 1, f'new_tokens is {self.new_tokens}', 'a count >= 1',
             'Pass the longest response wanted')
    _require(isinstance(self.end_tokens, tuple), f'end_tokens is {self.end_tokens!r}', 'a tuple of token ids',
             'Pass (id,) for one end token, or () for none')
    _require(all(token >= 0 for token in self.end_tokens), f'end_tokens is {self.end_tokens}', 'ids >= 0',
             'Take them from the tokenizer, or pass () if it has no end token')
    _require(self.pad_token >= 0, f'pad_token is {self.pad_token}', 'an id >= 0', 'Take it from the tokenizer')


def _require(holds, got, needed, remedy):
  if not holds:
    raise ConfigError(f'Sampling: {got}; it must be {needed}. {remedy}.')


def truncate(logits_BV, top_k, top_p):
  """The logits, float32, with every token outside the top k, and then outside the top p of those, at -inf.

  Top-k (Fan et al. 2018, 1805.04833) keeps the k largest. Top-p (Holtzman et al. 2020, 1904.09751) keeps the smallest
  set whose probability, among what top-k left, reaches p; the best token always stays. Of equal logits the lower id
  goes first, so exactly k tokens stay (fewer if the rest were -inf already). 0 and 1.0 switch them off; both static.
  Temperature is applied before, by the caller.

  >>> import jax.numpy as jnp
  >>> logits_BV = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
  >>> print(truncate(logits_BV, top_k=3, top_p=0.7) > -jnp.inf)      # of .4 + .3 + .2, the first two reach .7
  [[False  True False  True]]
  """
  logits_BV = logits_BV.astype(jnp.float32)
  V = logits_BV.shape[-1]
  if not 0 < top_k < V and top_p >= 1:
    return logits_BV
  logits_BV = jnp.where(logits_BV == 0, 0, logits_BV)                # top_k would rank 0.0 above -0.0
  best_BV, token_BV = jax.lax.top_k(logits_BV, min(top_k or V, V))   # descending; of equals the lower id first
  last_B = jnp.full(best_BV.shape[:1], best_BV.shape[1] - 1)
  if top_p < 1:
    probability_BV = jax.nn.softmax(best_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    last_B = jnp.sum(before_BV < top_p, axis=-1) - 1
  worst_BV, worst_token_BV = (jnp.take_along_axis(x_BV, last_B[:, None], axis=-1) for x_BV in (best_BV, token_BV))
  keep_BV = (logits_BV > worst_BV) | (logits_BV == worst_BV) & (jnp.arange(V) <= worst_token_BV)
  return jnp.where(keep_BV, logits_BV, -jnp.inf)


def uniforms(key, sample, position):
  """Numbers in [0, 1), float32, each of which depends on the key, its sample and its position only; shapes broadcast.

  >>> import jax, jax.numpy as jnp
  >>> uniform_BR = uniforms(jax.random.key(0), jnp.array([[7], [8]]), jnp.arange(3))
  >>> uniform_BR.shape, bool(uniform_BR[1, 2] == uniforms(jax.random.key(0), 8, 2))
  ((2, 3), True)
  """
  sample, position = jnp.broadcast_arrays(sample, position)
  one = lambda sample, position: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), position))
  return jax.vmap(one)(sample.ravel(), position.ravel()).reshape(sample.shape)


def sample_tokens(logits_BV, uniform_B, sampling):
  """(token_B int32, logprob_B float32): one token a row, drawn from softmax(truncate(logits / temperature)).

  `uniform_B` are the numbers of `uniforms`. `logprob_B` is of that same distribution, nats; at temperature 0 the token is
  the argmax (the lower id of equals), and its log-probability that of the untruncated model at temperature 1. A token
  whose logit is -inf is never drawn. A row without a finite logit gives token 0 with a log-probability of NaN.

  >>> import jax.numpy as jnp
  >>> logits_BV = jnp.array([[-jnp.inf, 2.5, -jnp.inf], [1.0, 1.0, 1.0]])
  >>> token_B, logprob_B = sample_tokens(logits_BV, jnp.array([0.9, 0.5]), Sampling())
  >>> token_B.tolist(), [f'{logprob:.4f}' for logprob in logprob_B]
  ([1, 1], ['0.0000', '-1.0986'])
  """
  check_axes(logits_BV=logits_BV, uniform_B=uniform_B)
  logits_BV = logits_BV.astype(jnp.float32)
  if sampling.temperature == 0:
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  else:
    logits_BV = truncate(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    token_B = _invert(weight_BV, uniform_B)
  return token_B, token_logprobs(logits_BV, token_B)


def _invert(weight_BV, uniform_B):
  """The first token at which the cumulative weight exceeds uniform times the total, in two levels; int32."""
  B, V = weight_BV.shape
  width = math.isqrt(V - 1) + 1                                      # ceil(sqrt(V))
  count = -(-V // width)
  weight_BVV = jnp.pad(weight_BV, ((0, 0), (0, count * width - V))).reshape(B, count, width)
  block_BV = jnp.sum(weight_BVV, axis=-1)
  block_B, rest_B = _first_beyond(block_BV, uniform_B * jnp.cumsum(block_BV, axis=-1)[:, -1])
  slot_B, _ = _first_beyond(jnp.take_along_axis(weight_BVV, block_B[:, None, None], axis=1)[:, 0], rest_B)
  return (block_B * width + slot_B).astype(jnp.int32)


def _first_beyond(weight_BV, target_B):
  """(index_B, rest_B): where the cumulative weight first exceeds the target, and the target less the weight before it.

  Where rounding leaves the whole sum short of the target, the last positive weight. A weight of 0 is never chosen.
  """
  index_V = jnp.arange(weight_BV.shape[-1])
  sum_BV = jnp.cumsum(weight_BV, axis=-1)
  positive_BV = weight_BV > 0
  last_B = jnp.max(jnp.where(positive_BV, index_V, 0), axis=-1)
  # A parallel cumulative sum need not be monotone to the last bit, so zero weights are excluded by name.
  first_B = jnp.min(jnp.where(positive_BV & (sum_BV > target_B[:, None]), index_V, last_B[:, None]), axis=-1)
  before_B = jnp.sum(jnp.where(index_V == first_B[:, None] - 1, sum_BV, 0), axis=-1)
  return first_B, jnp.maximum(target_B - before_B, 0)
