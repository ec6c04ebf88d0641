"""Supervised fine-tuning: cross entropy on the tokens that an assistant wrote, and on no others."""

from rlhf_jax.axes import check_axes
from rlhf_jax.maths.masked import masked_sum
from rlhf_jax.model import forward
from rlhf_jax.records import Mean


def cross_entropy(model):
  """-log p of each response token given all before it, nats per token. Batch: Demonstrations. Weight: one per token.

  Ouyang et al. 2022 (2203.02155), section 3.5: supervised fine-tuning. The first token of a row, or of a packed segment,
  has nothing before it and is never counted.
  """
  def loss_fn(params, batch, key):
    del key                                                                     # there is no dropout
    check_axes(tokens_BT=batch.tokens_BT, valid_BT=batch.valid_BT, mask_BT=batch.mask_BT, segment_BT=batch.segment_BT)
    logprob_BT, entropy_BT = forward.next_logprobs(model, params, batch.tokens_BT, batch.valid_BT,
                                                   segment_BT=batch.segment_BT)
    counted_BT = batch.mask_BT[:, 1:] & batch.valid_BT[:, 1:] & batch.valid_BT[:, :-1]
    if batch.segment_BT is not None:
      counted_BT &= batch.segment_BT[:, 1:] == batch.segment_BT[:, :-1]
    mean = lambda x_BT: Mean(masked_sum(x_BT, counted_BT), counted_BT.sum(dtype='float32'))
    return mean(-logprob_BT), {'entropy': mean(entropy_BT)}
  return loss_fn
