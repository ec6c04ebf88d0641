"""Examples to rows within limits. Every byte is one token here, so lengths can be counted by eye."""

import pytest

from rlhf_jax.data import encode
from rlhf_jax.data.encode import Limits
from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.text import train_tokenizer
from rlhf_jax.errors import DataError


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer([], 261)


def example(prompt, *responses, ranks=()):
  return Example((Turn('user', prompt),), responses, ranks or tuple(range(len(responses))))


def decoded(tokenizer, row):
  """(the whole text, what its mask marks)."""
  assert len(row.ids) == len(row.mask)
  return tokenizer.decode(row.ids), tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m])


# '<|user|>abc<|assistant|>' has 5 tokens, 'xy<|end|>' has 3.
@pytest.mark.parametrize('limits, kept', [
  (Limits(5, 3), True), (Limits(4, 3), False), (Limits(5, 2), False), (Limits(100, 100), True),
])
def test_what_fits_to_the_token_is_kept(tokenizer, limits, kept):
  short = example('a', 'x')
  rows, skipped = encode.demonstrations([example('abc', 'xy'), short] if kept else [short, example('abc', 'xy')],
                                        tokenizer, limits)
  assert (len(rows), skipped) == ((2, 0) if kept else (1, 1))
  assert decoded(tokenizer, rows[0]) == (('<|user|>abc<|assistant|>xy<|end|>', 'xy<|end|>') if kept else
                                         ('<|user|>a<|assistant|>x<|end|>', 'x<|end|>'))


def test_truncation_keeps_the_end_of_a_prompt_and_the_start_of_a_response(tokenizer):
  rows, skipped = encode.demonstrations([example('abc', 'xyz'), example('a', 'x')], tokenizer, Limits(3, 2, 'truncate'))
  assert skipped == 0
  assert decoded(tokenizer, rows[0]) == ('bc<|assistant|>xy', 'xy')
  assert decoded(tokenizer, rows[1]) == ('<|user|>a<|assistant|>x<|end|>', 'x<|end|>')


def test_truncation_keeps_the_mask_of_earlier_turns(tokenizer):
  turns = (Turn('user', 'ab'), Turn('assistant', 'cd'), Turn('user', 'e'))
  (row,), _ = encode.demonstrations([Example(turns, ('xy',))], tokenizer, Limits(5, 9, 'truncate'))
  assert decoded(tokenizer, row) == ('d<|end|><|user|>e<|assistant|>xy<|end|>', 'd<|end|>xy<|end|>')
  assert Limits(5, 9).tokens == 14


def test_a_demonstration_is_the_first_response(tokenizer):
  (row,), _ = encode.demonstrations([example('q', 'one', 'two')], tokenizer, Limits())
  assert decoded(tokenizer, row)[1] == 'one<|end|>'


def test_a_comparison_is_skipped_with_any_of_its_responses(tokenizer):
  examples = [example('q', 'yes', 'no', ranks=(1, 0)), example('q', 'a', 'much too long'), example('r', 'c', 'd', 'e')]
  ranked, skipped = encode.comparisons(examples, tokenizer, Limits(10, 5))
  assert skipped == 1
  assert [row.ranks for row in ranked] == [[1, 0], [0, 1, 2]]
  assert [decoded(tokenizer, row)[1] for row in ranked[0].rows] == ['yes<|end|>', 'no<|end|>']
  assert [decoded(tokenizer, row)[1] for row in ranked[1].rows] == ['c<|end|>', 'd<|end|>', 'e<|end|>']
  ranked, skipped = encode.comparisons(examples, tokenizer, Limits(10, 5, 'truncate'))
  assert (len(ranked), skipped) == (3, 0)
  assert decoded(tokenizer, ranked[1].rows[1])[1] == 'much '


def test_prompts_stand_alone(tokenizer):
  rows, skipped = encode.prompts([example('abc'), example('toolong'), example('d', 'answered')], tokenizer, Limits(5, 1))
  assert skipped == 1
  assert [decoded(tokenizer, row) for row in rows] == [('<|user|>abc<|assistant|>', ''), ('<|user|>d<|assistant|>', '')]
  (row,), _ = encode.prompts([example('toolong')], tokenizer, Limits(4, 1, 'truncate'))
  assert decoded(tokenizer, row)[0] == 'ong<|assistant|>'


@pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons, encode.prompts])
def test_nothing_left_is_an_error(tokenizer, read):
  with pytest.raises(DataError, match=r'none of 2 examples fits into 2 prompt and 2 response tokens. Raise --data.limits'):
    read([example('abc', 'x', 'y')] * 2, tokenizer, Limits(2, 2))
  with pytest.raises(DataError, match=r'there are no examples. Check the data path'):
    read([], tokenizer, Limits())
