"""Tokens of texts in pieces are those of the whole text."""

import random

import pytest
import tokenizers

from rlhf_jax.data.pieces import PieceTokenizer, any_of, safe_starts
from tests.chat_families import FAMILIES

WORDS = ['the', 'cat', ' ', '  ', '\n', '\n\n', '雨', '😀', 'e\u0301', '<', '|>', '\t', '.']


def texts(family, count=40):
  rng = random.Random(7)
  return [
    ''.join(rng.choices([*WORDS, *family.special, *family.added], k=rng.randint(0, 20)))
    for _ in range(count)
  ]


@pytest.mark.parametrize('name', FAMILIES)
def test_tokens_of_pieces_are_those_of_the_text(name):
  family, tokenizer = FAMILIES[name], FAMILIES[name].tokenizer()
  starts = safe_starts(family.special, tokenizer.added_tokens_decoder.values())
  assert starts == list(family.special)
  some = texts(family)
  for text, tokens in zip(some, PieceTokenizer(tokenizer.backend_tokenizer, starts)(some)):
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert tokens.ids == whole.ids
    assert sum(piece.length for piece in tokens.pieces) == len(text)
    if family.kind != 'bytes trimmed':  # whose offsets leave out white space
      for place in range(len(text) + 1):
        assert tokens.ending_by(place) == sum(end <= place for _, end in whole.offsets)
      for spans in ([(0, len(text))], [(3, 9)], [(2, 3), (8, 30)], []):
        assert tokens.overlap(spans) == [
          any(a < last and first < b for a, b in spans) for first, last in whole.offsets
        ]


def test_one_piece_where_nothing_may_begin_one():
  inner = FAMILIES['ChatML'].tokenizer().backend_tokenizer
  (tokens,) = PieceTokenizer(inner, [])(['the cat<|im_end|> sat'])
  assert len(tokens.pieces) == 1
  assert tokens.ids == inner.encode('the cat<|im_end|> sat').ids


@pytest.mark.parametrize(
  'other, safe',
  [
    ({'content': 'x'}, True),
    ({'content': '|>'}, True),
    ({'content': 'x<|e'}, False),
    ({'content': '\n<|end|>'}, False),
    ({'content': 'a<|end|>b'}, False),
    ({'content': '<|end|>b'}, True),
    ({'content': 'x', 'single_word': True}, False),
  ],
)
def test_what_another_token_may_reach_into_begins_nothing(other, safe):
  added = [tokenizers.AddedToken('<|end|>', normalized=False), tokenizers.AddedToken(**other)]
  assert safe_starts(['<|end|>'], added) == (['<|end|>'] if safe else [])


@pytest.mark.parametrize('settings', [{'lstrip': True}, {'normalized': True}])
def test_a_token_that_takes_what_is_before_it_begins_nothing(settings):
  added = [
    tokenizers.AddedToken('<a>', **{'normalized': False} | settings),
    tokenizers.AddedToken('<b>', normalized=False),
  ]
  assert safe_starts(['<a>', '<b>'], added) == ['<b>']


def test_a_pattern_of_strings_takes_the_longest():
  assert any_of(['<a', '<a>', '.']).findall('<a>.<ab') == ['<a>', '.', '<a']
  assert not any_of([]).search('abc')


def test_thousands_of_special_tokens():
  """Tekken has a thousand. One of these reaches into two others, one into none."""
  added = [tokenizers.AddedToken(f'<|r{i}|>', normalized=False) for i in range(3000)]
  added += [tokenizers.AddedToken(content, normalized=False)
            for content in ('x<|r7|>', 'y<|r9', '<|r')]
  starts = safe_starts([token.content for token in added], added)
  missing = {token.content for token in added} - set(starts)
  assert missing == {'<|r7|>', '<|r9|>', '<|r'} | {f'<|r9{more}|>' for more in range(10)} | {
    f'<|r9{more:02}|>' for more in range(100)
  }
