"""Reward-model training: Bradley-Terry on ranked responses. A pair (C = 2) is the smallest ranking.

All ordered pairs of one prompt count together as one element: InstructGPT found that shuffling the pairs of a prompt into
the batch one by one overfits (Ouyang et al. 2022, 2203.02155, section 3.5).
"""

import jax
import jax.numpy as jnp

from rlhf_jax.axes import check_axes
from rlhf_jax.model import forward
from rlhf_jax.records import Mean


def beats(rank_BC):
  """Which response i was ranked above which j, bool [B, C, C]: both present (rank not -1) and rank_i < rank_j."""
  present_BC = rank_BC >= 0
  return (rank_BC[:, :, None] < rank_BC[:, None, :]) & present_BC[:, :, None] & present_BC[:, None, :]


def bradley_terry(score_BC, rank_BC, margin_BCC=None):
  """Nats of surprise at a ranking: for each prompt the mean over its ordered pairs of -log sigmoid(s_i - s_j - margin_ij).

  Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (2307.09288), eq. 2. Returns (nats_B, pairs_B, correct_B): the
  mean (0 for a prompt without a pair), the number of pairs, and of those the number that the scores order rightly.
  """
  check_axes(score_BC=score_BC, rank_BC=rank_BC, margin_BCC=margin_BCC)
  score_BC = jnp.where(rank_BC >= 0, score_BC, 0.0)
  beats_BCC = beats(rank_BC)
  gap_BCC = score_BC[:, :, None] - score_BC[:, None, :]
  shifted_BCC = gap_BCC if margin_BCC is None else gap_BCC - margin_BCC
  pairs_B = beats_BCC.sum((1, 2), dtype=jnp.float32)
  shifted_BCC = jnp.where(beats_BCC, shifted_BCC, 0.0)                          # what does not count leaves no NaN
  nats_B = jnp.where(beats_BCC, -jax.nn.log_sigmoid(shifted_BCC), 0.0).sum((1, 2)) / jnp.maximum(pairs_B, 1)
  correct_B = ((gap_BCC > 0) & beats_BCC).sum((1, 2), dtype=jnp.float32)
  return nats_B, pairs_B, correct_B


def candidate_scores(model, params, batch):
  """Score of every candidate of a Comparisons batch, float32 [B, C]; of a missing one it means nothing."""
  B, C, T = batch.tokens_BCT.shape
  score_B = forward.scores(model, params, batch.tokens_BCT.reshape(B * C, T), batch.valid_BCT.reshape(B * C, T))
  return score_B.reshape(B, C)


def ranking(model, centring_weight=0.0):
  """Bradley-Terry loss of a ScalarModel on ranked responses. Batch: Comparisons. Weight: one per prompt with a pair.

  `centring_weight` times the square of twice the mean score of a prompt's candidates, (r_chosen + r_rejected)^2 for a
  pair, keeps scores near 0 (Eisenstein et al. 2023, 2312.09244). The head's bias is left alone: no ranking depends on
  it, normalisation sets it.
  """
  def loss_fn(params, batch, key):
    del key                                                                     # there is no dropout
    check_axes(tokens_BCT=batch.tokens_BCT, valid_BCT=batch.valid_BCT, rank_BC=batch.rank_BC)
    scalar = params['scalar'] | {'bias': jax.lax.stop_gradient(params['scalar']['bias'])}
    score_BC = candidate_scores(model, params | {'scalar': scalar}, batch)
    nats_B, pairs_B, correct_B = bradley_terry(score_BC, batch.rank_BC, batch.margin_BCC)
    present_BC = batch.rank_BC >= 0
    mean_B = jnp.where(present_BC, score_BC, 0).sum(1) / jnp.maximum(present_BC.sum(1), 1)
    counted_B = pairs_B > 0
    total = jnp.where(counted_B, nats_B + centring_weight * jnp.square(2 * mean_B), 0).sum()
    weight = counted_B.sum(dtype=jnp.float32)
    return Mean(total, weight), {
      'nats': Mean(nats_B.sum(), weight),
      'accuracy': Mean(correct_B.sum(), pairs_B.sum()),
      'score': Mean(jnp.where(present_BC, score_BC, 0).sum(), present_BC.sum(dtype=jnp.float32)),
    }
  return loss_fn
