"""Bradley-Terry against OpenRLHF, InstructGPT's formula and a plain loop; the ranking loss against numpy.

If a golden test fails after a change, the change is wrong, or needs a named switch: do not touch the numbers.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.errors import AxesError
from rlhf_jax.losses.preference import beats, bradley_terry, candidate_scores, ranking
from rlhf_jax.records import Comparisons

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
KEY = jax.random.key(0)
T = 8
# Six prompts of four candidates: ordered, tied, missing at the end and in the middle, one alone, two that tie, none.
RANK_BC = np.array([[0, 1, 2, 3], [1, 0, 0, 2], [2, -1, 0, 1], [-1, 0, -1, -1], [0, 0, -1, -1], [-1, -1, -1, -1]])


def golden(name):
  with np.load(GOLDEN / name) as file:
    return dict(file)


def by_loop(score_BC, rank_BC, margin_BCC=None):
  """[(mean nats, pairs, correct)] of every prompt, in Python floats."""
  found = []
  for b, (scores, ranks) in enumerate(zip(score_BC.astype(float), rank_BC)):
    nats, correct = [], 0
    for i, rank_i in enumerate(ranks):
      for j, rank_j in enumerate(ranks):
        if 0 <= rank_i < rank_j:
          gap = scores[i] - scores[j]
          nats.append(math.log1p(math.exp(-(gap - (0 if margin_BCC is None else margin_BCC[b, i, j])))))
          correct += gap > 0
    found.append((sum(nats) / max(len(nats), 1), len(nats), correct))
  return np.array(found)


@pytest.mark.parametrize('suffix', ['', '_margin'])
def test_pairs_as_openrlhf_has_them(suffix):
  recorded = golden('pairwise_openrlhf.npz')
  score_BC = np.stack([recorded['in_chosen'], recorded['in_rejected']], axis=1)
  margin_BCC = np.zeros((12, 2, 2), np.float32)
  margin_BCC[:, 0, 1], margin_BCC[:, 1, 0] = recorded['in_margin'], 9.0      # the 9 belongs to no pair
  loss = lambda score_BC: bradley_terry(score_BC, jnp.tile(jnp.array([0, 1]), (12, 1)),
                                        margin_BCC if suffix else None)[0].mean()
  value, gradient_BC = jax.value_and_grad(loss)(score_BC)
  np.testing.assert_allclose(value, recorded[f'out_loss{suffix}'], rtol=1e-6)
  for c, name in enumerate(['chosen', 'rejected']):
    np.testing.assert_allclose(gradient_BC[:, c], recorded[f'out_grad_{name}{suffix}'], rtol=1e-5, atol=1e-8)


def test_rankings_as_instructgpt_has_them():
  recorded = golden('kwise_plain.npz')
  nats_B, pairs_B, _ = bradley_terry(jnp.float32(recorded['in_score']), recorded['in_rank'])
  np.testing.assert_allclose(nats_B, recorded['out_loss_per_prompt'], rtol=1e-5)
  np.testing.assert_array_equal(pairs_B, recorded['out_pairs'])


@pytest.mark.parametrize('with_margin', [False, True])
def test_loop_over_pairs_with_ties_and_missing_candidates(with_margin):
  rng = np.random.default_rng(4)
  score_BC = rng.normal(0, 2, (40, 5)).astype(np.float32)
  score_BC[:, 4] = score_BC[:, 3]                                    # equal scores order nothing rightly
  rank_BC = rng.integers(-1, 4, (40, 5))
  margin_BCC = rng.normal(0, 1, (40, 5, 5)).astype(np.float32) if with_margin else None
  got = bradley_terry(score_BC, rank_BC, margin_BCC)
  np.testing.assert_allclose(np.stack(got, axis=1), by_loop(score_BC, rank_BC, margin_BCC), rtol=1e-5, atol=1e-6)
  assert all(x_B.dtype == jnp.float32 for x_B in got)


def test_which_candidate_beats_which():
  expected = [[0, 0, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
  np.testing.assert_array_equal(beats(jnp.array([[2, 0, -1], [1, 1, 3]])), np.array(expected, bool))


def test_order_and_numbering_of_the_candidates_do_not_matter():
  rng = np.random.default_rng(5)
  score_BC, order_C = jnp.float32(rng.normal(size=RANK_BC.shape)), np.array([2, 0, 3, 1])
  base = bradley_terry(score_BC, RANK_BC)
  moved = bradley_terry(score_BC[:, order_C], 10 * RANK_BC[:, order_C])    # ten times a rank is in the same order
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, base)


def test_scores_ten_thousand_apart_are_finite():
  score_BC, rank_BC = jnp.array([[-5e3, 5e3], [5e3, -5e3]]), jnp.array([[0, 1], [0, 1]])
  nats_B, pullback = jax.vjp(lambda score_BC: bradley_terry(score_BC, rank_BC)[0], score_BC)
  np.testing.assert_array_equal(nats_B, [1e4, 0])                    # -log sigmoid(-x) is x, far out
  np.testing.assert_array_equal(pullback(jnp.ones(2))[0], [[-1, 1], [0, 0]])


def test_margins_of_another_shape_are_refused():
  with pytest.raises(AxesError, match='margin_BCC has C=3, but score_BC has C=4'):
    bradley_terry(jnp.zeros((2, 4)), jnp.zeros((2, 4), int), jnp.zeros((2, 3, 3)))


def rows_of(rank_BC, seed=0):
  """Token rows [B][C] of unequal length, empty where the candidate is missing."""
  rng = np.random.default_rng(seed)
  return [[rng.integers(0, 19, rng.integers(1, T + 1) if rank >= 0 else 0) for rank in ranks] for ranks in rank_BC]


def comparisons(rows, rank_BC, sides, margin_BCC=None):
  padded = [tiny.pad(candidates, sides, T) for candidates in rows]
  tokens_BCT, valid_BCT = (jnp.stack(arrays) for arrays in zip(*padded))
  return Comparisons(tokens_BCT=tokens_BCT, valid_BCT=valid_BCT, rank_BC=jnp.array(rank_BC), margin_BCC=margin_BCC)


def scores_alone(model, params, rows):
  """float64 [B, C]: the scalar after the last token of each candidate, 0 for an empty one."""
  flat = [row for candidates in rows for row in candidates]
  return np.array([value[-1] if len(value) else 0. for value in tiny.values_of(model, params, flat, T)]).reshape(-1, 4)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, centring_weight, params, batch):
  """(Mean, metrics, gradient of the total)."""
  def total(params):
    loss, metrics = ranking(model, centring_weight)(params, batch, KEY)
    return loss.total, (loss, metrics)
  gradient, (loss, metrics) = jax.grad(total, has_aux=True)(params)
  return loss, metrics, gradient


@pytest.fixture(scope='module')
def setting():
  """(model, its parameters, token rows)."""
  _, model = tiny.models()
  return model, tiny.params(model, 1), rows_of(RANK_BC)


def test_a_score_is_read_after_the_last_token_whatever_the_padding(setting):
  model, params, rows = setting
  expected_BC = scores_alone(model, params, rows)
  read = jax.jit(candidate_scores, static_argnums=0)
  for sides in (['right'] * 4, ['left'] * 4, ['left', 'right', 'right', 'left']):
    got_BC = read(model, params, comparisons(rows, RANK_BC, sides))
    assert got_BC.dtype == jnp.float32
    np.testing.assert_allclose(got_BC, expected_BC, rtol=1e-4, atol=1e-5)
  assert not np.any(np.array(got_BC)[RANK_BC < 0])


@pytest.mark.parametrize('with_margin', [False, True])
def test_loss_and_metrics_from_the_scores(setting, with_margin):
  model, params, rows = setting
  margin_BCC = np.random.default_rng(2).normal(size=(6, 4, 4)).astype(np.float32) if with_margin else None
  score_BC = scores_alone(model, params, rows)
  loss, metrics, _ = loss_and_gradient(model, 0.0, params, comparisons(rows, RANK_BC, ['right'] * 4, margin_BCC))
  nats_B, pairs_B, correct_B = by_loop(score_BC, RANK_BC, margin_BCC).T
  assert loss.weight == metrics['nats'].weight == 3                  # of six prompts three have a pair
  np.testing.assert_allclose(loss.total, nats_B.sum(), rtol=1e-4)
  np.testing.assert_allclose(metrics['nats'].total, nats_B.sum(), rtol=1e-4)
  assert (metrics['accuracy'].total, metrics['accuracy'].weight) == (correct_B.sum(), pairs_B.sum())
  assert 0 < metrics['accuracy'].value() < 1
  assert metrics['score'].weight == (RANK_BC >= 0).sum()
  np.testing.assert_allclose(metrics['score'].total, score_BC[RANK_BC >= 0].sum(), rtol=1e-4, atol=1e-4)


def test_centring_adds_the_square_of_twice_the_mean_of_the_candidates_that_are_there(setting):
  model, params, rows = setting
  batch = comparisons(rows, RANK_BC, ['right'] * 4)
  score_BC = scores_alone(model, params, rows)
  square_B = [(2 * np.mean(score_BC[b, RANK_BC[b] >= 0])) ** 2 for b in range(3)]      # of prompts with a pair only
  loss, metrics, _ = loss_and_gradient(model, 0.25, params, batch)
  np.testing.assert_allclose(loss.total - metrics['nats'].total, 0.25 * np.sum(square_B), rtol=1e-4)


@pytest.mark.parametrize('centring_weight', [0.0, 0.25])
def test_the_bias_takes_part_but_is_not_moved(setting, centring_weight):
  model, params, rows = setting
  batch = comparisons(rows, RANK_BC, ['right'] * 4)
  _, metrics, gradient = loss_and_gradient(model, centring_weight, params, batch)
  assert gradient['scalar']['bias'] == 0
  assert np.any(gradient['scalar']['scalar_D']) and np.any(gradient['backbone']['embedding_VD'])
  raised = params | {'scalar': params['scalar'] | {'bias': params['scalar']['bias'] + 2}}
  _, raised_metrics, _ = loss_and_gradient(model, centring_weight, raised, batch)
  np.testing.assert_allclose(raised_metrics['score'].value(), metrics['score'].value() + 2, rtol=1e-5)
  np.testing.assert_allclose(raised_metrics['nats'].value(), metrics['nats'].value(), rtol=1e-5)


def test_prompts_without_a_pair_change_nothing(setting):
  model, params, rows = setting
  batch = comparisons(rows, RANK_BC, ['right'] * 4)
  loss, _, gradient = loss_and_gradient(model, 0.25, params, batch)
  scrambled = jnp.concatenate([batch.tokens_BCT[:3], (batch.tokens_BCT[3:] + 1) % 19])
  other, _, other_gradient = loss_and_gradient(model, 0.25, params, dataclasses.replace(batch, tokens_BCT=scrambled))
  assert (other.total, other.weight) == (loss.total, loss.weight)
  jax.tree.map(np.testing.assert_array_equal, other_gradient, gradient)


def test_nothing_to_compare_gives_no_loss_and_no_gradient(setting):
  model, params, _ = setting
  missing_BC = np.full_like(RANK_BC, -1)
  batch = comparisons(rows_of(missing_BC), missing_BC, ['right'] * 4)
  loss, metrics, gradient = loss_and_gradient(model, 0.25, params, batch)
  assert loss.total == loss.weight == 0
  assert all(metric.value() == 0 for metric in metrics.values())
  for leaf in jax.tree.leaves(gradient):
    assert np.array_equal(leaf, np.zeros_like(leaf))                 # NaN would not be equal


def test_gradient_is_the_slope_along_a_random_direction(setting):
  model, params, rows = setting
  batch = comparisons(rows, RANK_BC, ['left'] * 4)
  _, _, gradient = loss_and_gradient(model, 0.25, params, batch)
  rng = np.random.default_rng(7)
  direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  direction['scalar']['bias'] = np.float32(0)
  step = 1e-3
  totals = [loss_and_gradient(model, 0.25, jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), batch)[0].total
            for s in (step, -step)]
  slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
  np.testing.assert_allclose((totals[0] - totals[1]) / (2 * step), slope, rtol=0.02)


def test_nan_in_what_does_not_count_reaches_no_gradient():
  score_BC, margin_BCC = jnp.array([[0.3, jnp.nan, -0.4]]), jnp.full((1, 3, 3), jnp.nan).at[0, 0, 2].set(0.5)
  rank_BC = jnp.array([[0, -1, 1]])
  gradient_BC = jax.grad(lambda s: bradley_terry(s, rank_BC, margin_BCC)[0].sum())(score_BC)
  slope = 1 / (1 + np.exp(0.3 + 0.4 - 0.5))
  np.testing.assert_allclose(gradient_BC, [[-slope, 0, slope]], rtol=1e-5)
