"""The reward model: how its accuracy is measured, and scores that are normalised once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import assert_same_bits, copy, prepare, prompt

from rlhf_jax.checkpoint import read_meta
from rlhf_jax.data import encode
from rlhf_jax.data.batches import collate_demonstrations
from rlhf_jax.errors import DataError
from rlhf_jax.model import forward
from rlhf_jax.stages import ppo, reward

# ---- accuracy

def pairs_of(score_BC, rank_BC):
  """(prompt, score of the preferred, score of the other) of every ordered pair, in a plain loop."""
  for b in range(len(rank_BC)):
    for i in range(rank_BC.shape[1]):
      for j in range(rank_BC.shape[1]):
        if 0 <= rank_BC[b, i] < rank_BC[b, j]:
          yield b, score_BC[b, i], score_BC[b, j]


@pytest.mark.parametrize('seed', range(5))
def test_accuracy_and_calibration_are_those_of_a_plain_loop(seed):
  rng = np.random.default_rng(seed)
  score_BC = rng.normal(size=(40, 4)).astype(np.float32).round(1)               # rounded, so that some scores are equal
  rank_BC = rng.integers(-1, 4, (40, 4))                                        # ties, missing, and prompts without a pair
  found = reward.accuracy(score_BC, rank_BC)

  pairs = list(pairs_of(score_BC, rank_BC))
  right = sum(better > worse for _, better, worse in pairs)
  assert found['pairs'] == len(pairs) and found['accuracy'] == pytest.approx(right / len(pairs))
  assert found['accuracy_low'] < found['accuracy'] < found['accuracy_high']

  bins = {}
  for _, better, worse in pairs:
    sure = 1 / (1 + np.exp(-abs(np.float64(better - worse))))
    bins.setdefault(min(int((sure - 0.5) / 0.05), 9), []).append((sure, better > worse))
  error = sum(abs(np.mean([sure for sure, _ in found]) - np.mean([hit for _, hit in found])) * len(found)
              for found in bins.values()) / len(pairs)
  assert found['calibration_error'] == pytest.approx(error, abs=2 / len(pairs))  # a pair on an edge may fall on either side


def test_the_interval_is_as_wide_as_chance_makes_it():
  """Of 400 prompts with one pair each and 70 % right: 1.96 standard errors of a binomial share, within a fifth of that."""
  right = np.arange(400) % 10 < 7
  found = reward.accuracy(np.where(right[:, None], [1.0, 0.0], [0.0, 1.0]), np.tile([0, 1], (400, 1)))
  width = 1.96 * np.sqrt(0.7 * 0.3 / 400)
  assert found['accuracy'] == pytest.approx(0.7)
  assert (found['accuracy_low'], found['accuracy_high']) == pytest.approx((0.7 - width, 0.7 + width), abs=width / 5)


def test_pairs_of_one_prompt_are_not_independent():
  """Ten times the pairs of the same prompts do not make the interval narrower."""
  right = np.arange(50) % 10 < 7
  wide = reward.accuracy(np.where(right[:, None], [1.0, 0.0], [0.0, 1.0]), np.tile([0, 1], (50, 1)))
  score_BC = np.where(right[:, None], [1.0] + [0.0] * 10, [0.0] + [1.0] * 10)
  more = reward.accuracy(score_BC, np.tile([0] + [1] * 10, (50, 1)))
  assert more['pairs'] == 500
  assert (more['accuracy_low'], more['accuracy_high']) == pytest.approx((wide['accuracy_low'], wide['accuracy_high']))


def test_scores_that_say_how_sure_they_are_have_no_calibration_error():
  rng = np.random.default_rng(3)
  gap_B = rng.normal(size=20_000) * 2
  first_wins_B = rng.random(20_000) < 1 / (1 + np.exp(-gap_B))
  score_BC, rank_BC = np.stack([gap_B, 0 * gap_B], 1), np.stack([~first_wins_B, first_wins_B], 1).astype(int)
  assert reward.accuracy(score_BC, rank_BC)['calibration_error'] < 0.015
  assert reward.accuracy(5 * score_BC, rank_BC)['calibration_error'] > 0.1


def test_nothing_to_order():
  with pytest.raises(DataError, match='no held-out prompt has one response ranked above another'):
    reward.accuracy(np.zeros((3, 2)), np.zeros((3, 2), int))


# ---- the stage

def training_scores(run):
  """The finished model's score of every training response, each encoded alone and unpadded to a common batch."""
  ranked, _ = encode.comparisons(
    run.task.comparisons(None)[0], run.chat, run.experiment.data.limits)
  rows = [row for prompt in ranked for row in prompt.rows]
  batch = collate_demonstrations(rows, run.experiment.data.limits.tokens)
  score = jax.jit(functools.partial(forward.scores, run.reward))
  return np.asarray(score(reward.restore(run), jnp.asarray(batch.tokens_BT), jnp.asarray(batch.valid_BT)))


def test_scores_of_the_training_responses_have_mean_0_and_deviation_1(finished, tmp_path):
  run = prepare(finished)
  score_B = training_scores(run)
  assert score_B.size == 30
  assert (score_B.mean(), score_B.std()) == pytest.approx((0, 1), abs=1e-4)

  measured = read_meta(run.checkpoints('reward'))['evaluation']
  raw = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'), settings={'reward__normalise': False})
  found = reward.train(raw)
  raw_B = training_scores(raw)
  assert (raw_B.mean(), raw_B.std()) == pytest.approx((measured['raw_score_mean'], measured['raw_score_std']), rel=1e-4)
  np.testing.assert_allclose((raw_B - raw_B.mean()) / raw_B.std(), score_B, atol=1e-3)
  assert 'raw_score_mean' not in found
  assert found['calibration_error'] == pytest.approx(measured['calibration_error'])  # measured before the scale changes


def test_ppo_reads_the_normalised_scores(finished):
  run = prepare(finished)
  assert_same_bits(ppo.frozen_models(run)['reward'], reward.restore(run))


def test_prompts_with_fewer_responses_than_others(finished, tmp_path):
  def comparisons(ask):
    del ask
    pairs = [prompt(f'no {i}', responses=('Yes.', 'No!'), ranks=(0, 1)) for i in range(6)]
    triples = [prompt(f'so {i}', responses=('Yes.', 'No!', 'Why?'), ranks=(0, 1, 1)) for i in range(6)]
    return pairs + triples, pairs[:2]
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'), comparisons=comparisons)
  assert reward.train(run)['pairs'] == 2


def test_recorded_rankings_give_the_same_as_a_function_that_returns_them(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'))
  recorded = run.task.comparisons(None)
  measured = reward.train(
    dataclasses.replace(run, task=dataclasses.replace(run.task, comparisons=recorded)))
  assert_same_bits(reward.restore(run), reward.restore(prepare(finished)))
  assert (measured['accuracy']
          == read_meta(prepare(finished).checkpoints('reward'))['evaluation']['accuracy'])
  assert not (run.stage('reward') / 'comparisons.jsonl').exists()               # nobody was asked


def test_data_without_rankings_is_refused(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'), comparisons=([], []))
  with pytest.raises(DataError, match='there are no comparisons: none of the examples has two or '
                                      'more ranked responses'):
    reward.train(run)


def test_the_share_that_noise_allows_is_reported(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'), ceiling=len)
  assert reward.train(run)['ceiling'] == 2


def test_rankings_that_are_too_long_are_left_out_and_counted(finished, tmp_path, capsys):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'))
  train, held_out = run.task.comparisons(None)
  long = dataclasses.replace(train[0], responses=('Yes.', 'No!', 'Well, well. ' * 9))
  task = dataclasses.replace(run.task, comparisons=lambda ask: ([*train, long], held_out))
  reward.train(dataclasses.replace(run, task=task))
  assert 'reward, training: 1 of 11 examples are longer' in capsys.readouterr().out
