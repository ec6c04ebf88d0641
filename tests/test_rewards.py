"""Python reward functions: weights, order, dtype, and what a function may not return."""

import numpy as np
import pytest

from rlhf_jax.errors import DataError
from rlhf_jax.rewards import score_texts

PROMPTS, RESPONSES = ['a', 'bb', 'c'], ['x', 'yyy', 'zz']


def length(prompts, responses):
  return [len(response) for response in responses]


def longer_than_prompt(prompts, responses):
  return np.array([len(r) > len(p) for p, r in zip(prompts, responses)])


def test_weighted_sum_and_scores_by_name():
  total_B, by_name = score_texts({'length': (length, 0.7), 'longer': (longer_than_prompt, -2)}, PROMPTS, RESPONSES)
  np.testing.assert_allclose(total_B, [0.7, 2.1 - 2, 1.4 - 2], rtol=1e-5)        # integer scores are not truncated
  np.testing.assert_array_equal(by_name['length'], [1, 3, 2])
  np.testing.assert_array_equal(by_name['longer'], [0, 1, 1])
  assert list(by_name) == ['length', 'longer']
  assert total_B.dtype == np.float32 and all(score_B.dtype == np.float32 for score_B in by_name.values())


def test_a_function_is_called_once_with_all_texts():
  calls = []

  def remember(*texts):
    calls.append(texts)
    return [0.5] * 3
  score_texts({'remember': (remember, 1.0)}, PROMPTS, RESPONSES)
  assert calls == [(PROMPTS, RESPONSES)]


def test_a_weight_of_zero_reports_and_adds_nothing():
  total_B, by_name = score_texts({'length': (length, 0.0)}, PROMPTS, RESPONSES)
  assert not total_B.any() and by_name['length'].any()


def test_no_functions_and_no_responses():
  total_B, by_name = score_texts({}, PROMPTS, RESPONSES)
  assert total_B.shape == (3,) and not total_B.any() and by_name == {}
  total_B, by_name = score_texts({'length': (length, 1.0)}, [], [])
  assert total_B.shape == by_name['length'].shape == (0,)


@pytest.mark.parametrize('scores, match', [
  ([1.0, 2.0], r"'bad' returned shape \(2,\) for 3 responses"),
  (1.0, r"'bad' returned shape \(\) for 3 responses"),
  ([[1.0], [2.0], [3.0]], r"'bad' returned shape \(3, 1\) for 3 responses"),
  ([1.0, np.nan, np.inf], "'bad' returned nan for response 1: 'yyy'. Return finite numbers"),
  ([1.0, 2.0, -np.inf], "'bad' returned -inf for response 2: 'zz'"),
  ([None, 2.0, 3.0], "'bad' returned nan for response 0: 'x'"),
])
def test_what_is_not_one_finite_number_a_response_is_refused(scores, match):
  with pytest.raises(DataError, match=match):
    score_texts({'length': (length, 1.0), 'bad': (lambda prompts, responses: scores, 1.0)}, PROMPTS, RESPONSES)


def test_a_long_response_is_shortened_in_the_message():
  with pytest.raises(DataError) as caught:
    score_texts({'bad': (lambda prompts, responses: [np.nan], 1.0)}, ['a'], ['y' * 500])
  assert 'y' * 80 in str(caught.value) and 'y' * 81 not in str(caught.value)


def test_what_is_not_numbers_is_a_data_error():
  with pytest.raises(DataError, match="reward function 'words' returned what is not a list of numbers"):
    score_texts({'words': (lambda prompts, responses: ['good', 'bad'], 1.0)}, ['p', 'q'], ['r', 's'])
