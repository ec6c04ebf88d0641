import jax
import numpy as np
import pytest

from rlhf_jax.axes import axes_of, check_axes
from rlhf_jax.errors import AxesError, RlhfJaxError


def test_letters_after_the_last_underscore():
  assert [axes_of(name) for name in ('q_bias_LNH', 'logprob_BR', 'bias', 'step', 'score_B', 'B')] == [
    'LNH', 'BR', '', '', 'B', '']


def test_sizes_are_bound_and_none_is_passed_over():
  assert check_axes(tokens_BT=np.zeros((4, 7)), sample_B=np.zeros(4), extra_B=None) == {'B': 4, 'T': 7}


def test_a_conflict_names_both_arrays():
  with pytest.raises(AxesError, match=r'mask_BR has R=5, but logprob_BR has R=6'):
    check_axes(logprob_BR=np.zeros((2, 6)), mask_BR=np.zeros((2, 5)))


def test_a_wrong_rank_says_the_shape():
  with pytest.raises(AxesError, match=r'score_B has shape \(2, 1\), but its name says 1 axes'):
    check_axes(score_B=np.zeros((2, 1)))


def test_a_letter_twice_must_agree_with_itself():
  with pytest.raises(AxesError, match=r'margin_BCC has C=4, but margin_BCC has C=3'):
    check_axes(margin_BCC=np.zeros((2, 3, 4)))


def test_it_works_on_tracers_and_is_one_of_our_errors():
  with pytest.raises(RlhfJaxError):
    jax.jit(lambda x: check_axes(x_BT=x, y_BT=x.T))(np.zeros((2, 3)))
