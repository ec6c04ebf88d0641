"""The pytrees that travel between functions. Plain data: no parameters are hidden in them and no method computes a loss.

Fields are named by the alphabet of `axes.py`, so the partition rules that shard parameters shard these too.
`valid` marks real tokens (as opposed to padding), `mask` marks the tokens that a loss or an average counts.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
  """A weighted mean that is not divided yet: `total` over `weight`, both float32.

  Sums travel and division happens once, so adding the Means of microbatches, devices or steps is exact.
  """
  total: jax.Array
  weight: jax.Array

  def __add__(self, other):
    return Mean(self.total + other.total, self.weight + other.weight)

  def value(self):
    """total / weight, and 0 where nothing was counted."""
    return jnp.where(self.weight == 0, 0.0, self.total / jnp.where(self.weight == 0, 1, self.weight))


@flax.struct.dataclass
class Max:
  """A running maximum, for metrics whose worst case matters more than their mean."""
  largest: jax.Array

  def __add__(self, other):
    return Max(jnp.maximum(self.largest, other.largest))

  def value(self):
    """The largest value seen."""
    return self.largest


@flax.struct.dataclass
class TrainState:
  """All that an optimisation carries from step to step. `step` counts updates, int32."""
  step: jax.Array
  params: dict
  opt_state: tuple


@flax.struct.dataclass
class Demonstrations:
  """Sequences to imitate. `mask_BT` marks the tokens to be predicted (the assistant's); padding may be on either side.

  `segment_BT` numbers several demonstrations packed in one row from 1 (0 is padding); None means one a row.
  """
  tokens_BT: jax.Array
  valid_BT: jax.Array
  mask_BT: jax.Array
  segment_BT: jax.Array | None = None


@flax.struct.dataclass
class Comparisons:
  """C responses of one prompt (each with the prompt before it), ranked: 0 is best, equal ranks are ties, -1 is missing.

  `margin_BCC[b, i, j]` is by how many nats response i should beat response j (Llama 2, 2307.09288, section 3.2.2).
  """
  tokens_BCT: jax.Array
  valid_BCT: jax.Array
  rank_BC: jax.Array
  margin_BCC: jax.Array | None = None


@flax.struct.dataclass
class Prompts:
  """Left-padded prompts. `sample_B` numbers the answers wanted: the only thing besides the key that chance depends on."""
  tokens_BP: jax.Array
  valid_BP: jax.Array
  sample_B: jax.Array


@flax.struct.dataclass
class Rollout:
  """Prompts with their responses: T = P + R slots, prompt left-padded in the first P, response from slot P on.

  `mask_BR` marks response tokens, the end token included. `logprob_BR` are the nats with which each was sampled.
  `ended_B` is False where the length limit cut the response.
  """
  tokens_BT: jax.Array
  valid_BT: jax.Array
  logprob_BR: jax.Array
  mask_BR: jax.Array
  ended_B: jax.Array
  sample_B: jax.Array


@flax.struct.dataclass
class Experience:
  """What PPO learns from. `mask_BR` counts in the policy loss, `value_mask_BR` in the value loss.

  `logprob_BR` and `value_BR` are those of the policy before the update, `return_BR` is from before whitening.
  """
  tokens_BT: jax.Array
  valid_BT: jax.Array
  mask_BR: jax.Array
  value_mask_BR: jax.Array
  logprob_BR: jax.Array
  value_BR: jax.Array
  advantage_BR: jax.Array
  return_BR: jax.Array


def add_across(tree, axis_name):
  """The same tree with Means and other arrays summed, and Maxes maximised, over a mapped axis; unchanged for None."""
  if axis_name is None:
    return tree
  one = lambda x: Max(jax.lax.pmax(x.largest, axis_name)) if isinstance(x, Max) else jax.lax.psum(x, axis_name)
  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, (Mean, Max)))
