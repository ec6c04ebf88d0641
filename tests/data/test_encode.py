"""Examples to rows within limits. Every byte is a token here: lengths can be counted by eye."""

import dataclasses

import pytest

from rlhf_jax.data import encode
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.encode import Counts, Limits, RankedRows, Row
from rlhf_jax.data.examples import Answer, Example, Turn
from rlhf_jax.data.text import TURN_TEMPLATE, train_tokenizer
from rlhf_jax.errors import DataError

# Our own with a begin token; with two user turns refused; with earlier answers in capitals.
BEGINS = '{{ bos_token }}' + TURN_TEMPLATE
NO_TWO_USERS = (
  "{% for m in messages %}"
  "{% if not loop.first and m.role == 'user' and messages[loop.index0 - 1].role == 'user' %}"
  "{{ raise_exception('two user turns') }}{% endif %}{% endfor %}" + TURN_TEMPLATE
)
REWRITES = (
  "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
  "{% if m.role == 'assistant' and not loop.last %}"
  "{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRIMS = TURN_TEMPLATE.replace("m['content'] + '<|end|>'", "m['content'] | trim + '<|end|>'")


def chat_with(template=None, **special):
  tokenizer = train_tokenizer([], 261)
  tokenizer.chat_template = template or tokenizer.chat_template
  tokenizer.add_special_tokens(special)
  return open_chat(tokenizer)


@pytest.fixture(scope='module')
def chat():
  return chat_with()


def turns_of(*texts):
  """Turns of user and assistant, the user's first."""
  return tuple(Turn(('user', 'assistant')[i % 2], said) for i, said in enumerate(texts))


def example(prompt, *responses, ranks=()):
  return Example(turns_of(prompt), responses, ranks or tuple(range(len(responses))))


def decoded(chat, row):
  """(the whole text, what its mask marks)."""
  assert len(row.ids) == len(row.mask)
  decode = chat.tokenizer.decode
  return decode(row.ids), decode([i for i, m in zip(row.ids, row.mask) if m])


def counted(counts):
  """The counts that are not 0, without the number of examples and the message."""
  numbers = dataclasses.asdict(counts)
  return {
    name: count
    for name, count in numbers.items()
    if count and name not in ('examples', 'first_refusal')
  }


# '<|user|>abc<|assistant|>' has 5 tokens, 'xy<|end|>' has 3.
@pytest.mark.parametrize(
  'limits, kept',
  [
    (Limits(5, 3), True),
    (Limits(4, 3), False),
    (Limits(5, 2), False),
    (Limits(100, 100), True),
  ],
)
def test_what_fits_to_the_token_is_kept(chat, limits, kept):
  short = example('a', 'x')
  rows, counts = encode.demonstrations(
    [example('abc', 'xy'), short] if kept else [short, example('abc', 'xy')], chat, limits
  )
  assert (len(rows), counts) == ((2, Counts(2)) if kept else (1, Counts(2, too_long=1)))
  assert [row.example for row in rows] == [0, 1][: len(rows)]
  assert decoded(chat, rows[0]) == (
    ('<|user|>abc<|assistant|>xy<|end|>', 'xy<|end|>')
    if kept
    else ('<|user|>a<|assistant|>x<|end|>', 'x<|end|>')
  )


def test_truncation_keeps_the_end_of_a_prompt_and_the_start_of_a_response(chat):
  examples = [example('abc', 'xyz'), example('a', 'x'), example('a', 'xyz')]
  rows, counts = encode.demonstrations(examples, chat, Limits(3, 2, 'truncate'))
  assert counts == Counts(3, truncated=2)
  assert [decoded(chat, row) for row in rows] == [
    ('bc<|assistant|>xy', 'xy'),
    ('<|user|>a<|assistant|>x<|end|>', 'x<|end|>'),
    ('<|user|>a<|assistant|>xy', 'xy'),
  ]


class TestTruncatedPrompts:
  @pytest.mark.parametrize(
    'most, text, trained',
    [
      (10, '<|user|>ab<|assistant|>cd<|end|><|user|>e<|assistant|>xy<|end|>', 'xy<|end|>'),
      (9, '<|user|>e<|assistant|>xy<|end|>', 'xy<|end|>'),
      (3, '<|user|>e<|assistant|>xy<|end|>', 'xy<|end|>'),
      (2, 'e<|assistant|>xy<|end|>', 'xy<|end|>'),
    ],
  )
  def test_the_earliest_turns_go_first(self, chat, most, text, trained):
    """Whole rounds, as long as one is left; then the beginning of the last turn."""
    examples = [Example(turns_of('ab', 'cd', 'e'), ('xy', 'z'), (0, 1))]
    (ranked,), counts = encode.comparisons(examples, chat, Limits(most, 9, 'truncate'))
    assert decoded(chat, ranked.rows[0]) == (text, trained)
    assert counts == Counts(1, truncated=int(most < 10))
    (prompt,), _ = encode.prompts(examples, chat, Limits(most, 9, 'truncate'))
    assert prompt.ids == ranked.rows[0].ids[:-3]

  def test_the_mask_of_earlier_turns_that_are_left_stays(self, chat):
    examples = [Example(turns_of('ab', 'cd', 'e', 'f', 'g'), ('xy',))]
    (row,), _ = encode.demonstrations(examples, chat, Limits(8, 9, 'truncate'))
    assert decoded(chat, row) == (
      '<|user|>e<|assistant|>f<|end|><|user|>g<|assistant|>xy<|end|>',
      'f<|end|>xy<|end|>',
    )
    assert Limits(5, 9).tokens == 14

  @pytest.mark.parametrize(
    'most, text',
    [
      (12, '<|system|>s<|user|>ab<|assistant|>cd<|end|><|user|>e<|assistant|>'),
      (10, '<|system|>s<|user|>e<|assistant|>'),
      (5, '<|system|>s<|user|>e<|assistant|>'),
      (4, '<|user|>e<|assistant|>'),
      (2, 'e<|assistant|>'),
    ],
  )
  def test_the_system_turn_stays_while_it_fits(self, chat, most, text):
    turns = (Turn('system', 's'), *turns_of('ab', 'cd', 'e'))
    (row,), _ = encode.prompts([Example(turns)], chat, Limits(most, 9, 'truncate'))
    assert decoded(chat, row)[0] == text

  @pytest.mark.parametrize(
    'most, text',
    [
      (11, '<|begin|><|user|>abcdef<|assistant|>'),
      (5, '<|begin|>def<|assistant|>'),
      (2, '<|begin|><|assistant|>'),
    ],
  )
  def test_the_begin_token_stays(self, most, text):
    chat = chat_with(BEGINS, bos_token='<|begin|>')
    (prompt,), _ = encode.prompts([example('abcdef')], chat, Limits(most, 9, 'truncate'))
    assert decoded(chat, prompt)[0] == text
    (row,), _ = encode.demonstrations([example('abcdef', 'xy')], chat, Limits(most, 9, 'truncate'))
    assert decoded(chat, row) == (f'{text}xy<|end|>', 'xy<|end|>')

  def test_every_stage_sees_the_same_prompt(self, chat):
    examples = [
      Example(turns_of('ab' * i, 'c' * i, 'd' * i), ('x', 'y'), (0, 1)) for i in range(1, 9)
    ]
    limits = Limits(12, 4, 'truncate')
    prompts, _ = encode.prompts(examples, chat, limits)
    assert max(len(row.ids) for row in prompts) <= 12
    demonstrations, _ = encode.demonstrations(examples, chat, limits)
    ranked, _ = encode.comparisons(examples, chat, limits)
    assert [row.ids[:-2] for row in demonstrations] == [row.ids for row in prompts]
    assert [[row.ids[:-2] for row in each.rows] for each in ranked] == [
      [row.ids] * 2 for row in prompts
    ]

  def test_what_the_template_refuses_is_left_out_for_something_shorter(self):
    """The turns from the second user turn on would do, but the template wants another beginning."""
    chat = chat_with(
      "{% if messages[0].content == 'cd' %}{{ raise_exception('not cd') }}{% endif %}"
      + TURN_TEMPLATE
    )
    turns = turns_of('ab', 'x', 'cd', 'x', 'ef')
    (row,), _ = encode.prompts([Example(turns)], chat, Limits(9, 1, 'truncate'))
    assert decoded(chat, row)[0] == '<|user|>ef<|assistant|>'


def test_a_demonstration_is_the_first_response(chat):
  (row,), _ = encode.demonstrations([example('q', 'one', 'two')], chat, Limits())
  assert decoded(chat, row)[1] == 'one<|end|>'


def test_a_comparison_is_skipped_with_any_of_its_responses(chat):
  examples = [
    example('q', 'yes', 'no', ranks=(1, 0)),
    example('q', 'a', 'much too long'),
    example('r', 'c', 'd', 'e'),
  ]
  ranked, counts = encode.comparisons(examples, chat, Limits(10, 5))
  assert counts == Counts(3, too_long=1)
  assert [row.ranks for row in ranked] == [[1, 0], [0, 1, 2]]
  assert [row.example for row in ranked] == [0, 2]
  assert [decoded(chat, row)[1] for row in ranked[0].rows] == ['yes<|end|>', 'no<|end|>']
  assert [decoded(chat, row)[1] for row in ranked[1].rows] == ['c<|end|>', 'd<|end|>', 'e<|end|>']
  ranked, counts = encode.comparisons(examples, chat, Limits(10, 5, 'truncate'))
  assert (len(ranked), counts) == (3, Counts(3, truncated=1))
  assert decoded(chat, ranked[1].rows[1])[1] == 'much '


def test_an_example_is_counted_once(chat):
  """However many of its responses are too long."""
  examples = [example('q', 'much too long', 'far too long'), example('r', 'c', 'd')]
  assert encode.comparisons(examples, chat, Limits(10, 5)).counts == Counts(2, too_long=1)
  examples[0] = example('a long question', 'much too long', 'far too long')
  assert encode.comparisons(examples, chat, Limits(10, 5, 'truncate')).counts == Counts(
    2, truncated=1
  )


def test_prompts_stand_alone(chat):
  rows, counts = encode.prompts(
    [example('abc'), example('toolong'), example('d', 'answered')], chat, Limits(5, 1)
  )
  assert counts == Counts(3, too_long=1)
  assert [decoded(chat, row) for row in rows] == [
    ('<|user|>abc<|assistant|>', ''),
    ('<|user|>d<|assistant|>', ''),
  ]
  assert [row.example for row in rows] == [0, 2]
  (row,), _ = encode.prompts([example('toolong')], chat, Limits(4, 1, 'truncate'))
  assert decoded(chat, row)[0] == 'ong<|assistant|>'


@pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons, encode.prompts])
def test_nothing_left_is_an_error(chat, read):
  with pytest.raises(
    DataError,
    match=r'none of 2 examples fits into 2 prompt and 2 response tokens. Raise --data.limits',
  ):
    read([example('abc', 'x', 'y')] * 2, chat, Limits(2, 2))
  with pytest.raises(DataError, match=r'there are no examples. Check the data path'):
    read([], chat, Limits())


class TestSampledAnswers:
  @pytest.mark.parametrize(
    'ids',
    [[100, 101, 1], [100, 101, 102, 103], [1], [100, 3, 101, 1]],
    ids=['ended', 'exactly R tokens without an end', 'only the end', 'a control token'],
  )
  def test_they_are_compared_as_the_ids_that_were_sampled(self, chat, ids):
    answers = (Answer('this text does not matter', ids), Answer('', [104, 1]))
    (ranked,), counts = encode.comparisons([example('q', *answers)], chat, Limits(5, 4))
    (prompt,) = chat.prompts([turns_of('q')])
    assert ranked.rows[0] == Row([*prompt, *ids], [False] * len(prompt) + [True] * len(ids), 0)
    assert ranked.rows[1].ids == [*prompt, 104, 1]
    assert counts == Counts(1)

  def test_they_stand_behind_the_prompt_that_the_policy_saw(self, chat):
    answers = (Answer('', [100, 101, 1]), Answer('', [102, 1]))
    examples = [Example(turns_of('ab', 'cd', 'efgh'), answers, (0, 1))]
    limits = Limits(4, 3, 'truncate')
    (prompt,), _ = encode.prompts(examples, chat, limits)
    (ranked,), counts = encode.comparisons(examples, chat, limits)
    assert [row.ids for row in ranked.rows] == [[*prompt.ids, 100, 101, 1], [*prompt.ids, 102, 1]]
    assert counts == Counts(1, truncated=1)

  def test_one_that_is_longer_than_the_limit_is_treated_as_other_responses_are(self, chat):
    examples = [example('q', Answer('', [100, 101, 102, 1]), 'x'), example('q', 'x', 'y')]
    ranked, counts = encode.comparisons(examples, chat, Limits(5, 3))
    assert ([each.example for each in ranked], counts) == ([1], Counts(2, too_long=1))
    ranked, counts = encode.comparisons(examples, chat, Limits(5, 3, 'truncate'))
    assert ranked[0].rows[0].ids[-3:] == [100, 101, 102]
    assert counts == Counts(2, truncated=1)

  def test_beside_a_response_that_people_wrote(self, chat):
    (ranked,), _ = encode.comparisons([example('q', 'xy', Answer('', [100, 1]))], chat, Limits())
    assert decoded(chat, ranked.rows[0])[1] == 'xy<|end|>'
    assert ranked.rows[1].ids[-2:] == [100, 1]


class TestEqualResponses:
  def test_pairs_that_became_equal_are_left_out(self, chat):
    examples = [example('q', 'abcd', 'abef'), example('q', 'abcd', 'ef')]
    ranked, counts = encode.comparisons(examples, chat, Limits(9, 2, 'truncate'))
    assert [each.example for each in ranked] == [1]
    assert counted(counts) == {'truncated': 2, 'equal': 1}
    assert '1 of 2 examples have responses that became the same tokens' in ' '.join(
      counts.sentences()
    )

  def test_by_rendering(self):
    ranked, counts = encode.comparisons(
      [example('q', 'a', ' a '), example('q', 'a', 'b')], chat_with(TRIMS), Limits()
    )
    assert [each.example for each in ranked] == [1]
    assert counted(counts) == {'equal': 1}

  @pytest.mark.parametrize(
    'responses, ranks, kept',
    [
      (('a', ' a', 'b'), (0, 1, 2), ([0, 2], ['a', 'b'])),
      (('a', 'b', ' a'), (2, 1, 0), ([1, 0], ['b', 'a'])),
      (('a', ' a', 'b', ' b'), (1, 0, 2, 3), ([0, 2], ['a', 'b'])),
      (('a', ' a', 'b'), (0, 0, 0), None),
      (('a', ' a', 'b'), (0, 1, 0), None),
      (('a', 'b', 'c'), (0, 0, 1), ([0, 0, 1], ['a', 'b', 'c'])),
      (('a', ' a', 'b'), (1, 1, 0), ([1, 1, 0], ['a', 'a', 'b'])),
    ],
  )
  def test_of_several_the_best_ranked_stay(self, responses, ranks, kept):
    """None: what is left has one rank, which says nothing."""
    chat = chat_with(TRIMS)
    ranked, counts = encode.comparisons(
      [example('q', *responses, ranks=ranks), example('q', 'a', 'b')], chat, Limits()
    )
    if kept is None:
      assert ([each.example for each in ranked], counted(counts)) == ([1], {'equal': 1})
    else:
      texts = [decoded(chat, row)[1].removesuffix('<|end|>') for row in ranked[0].rows]
      assert (ranked[0].ranks, texts) == kept
      assert counts == Counts(2, equal_responses=len(responses) - len(texts))

  def test_none_left_says_why(self):
    with pytest.raises(
      DataError,
      match=r'none of 1 examples is left: 1 of 1 examples have responses that became',
    ):
      encode.comparisons([example('q', 'a', 'a ')], chat_with(TRIMS), Limits())


class TestBadRows:
  TWO_USERS = Example(
    (Turn('user', 'a'), Turn('user', 'b')), ('x', 'y'), (0, 1), place='train.jsonl row 17'
  )

  @pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons, encode.prompts])
  def test_one_is_an_error_with_its_place(self, read):
    with pytest.raises(
      DataError,
      match=r'^train.jsonl row 17: the chat template refuses a conversation of user, user: '
      r'TemplateError: two user turns. Mend or drop the row, or pass --data.skip-bad-rows',
    ):
      read([example('q', 'a', 'b'), self.TWO_USERS], chat_with(NO_TWO_USERS), Limits())
    nameless = dataclasses.replace(self.TWO_USERS, place='')
    with pytest.raises(DataError, match=r'^example 2: the chat template'):
      read([example('q', 'a', 'b'), nameless], chat_with(NO_TWO_USERS), Limits())

  @pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons, encode.prompts])
  def test_or_is_skipped_and_counted(self, read):
    examples = [
      self.TWO_USERS,
      example('q', 'a', 'b'),
      dataclasses.replace(self.TWO_USERS, place='another row'),
    ]
    rows, counts = read(examples, chat_with(NO_TWO_USERS), Limits(), skip_bad_rows=True)
    assert [row.example for row in rows] == [1]
    assert counted(counts) == {'refused': 2}
    assert counts.first_refusal.startswith('train.jsonl row 17: the chat template refuses')
    (sentence,) = counts.sentences()
    assert sentence.startswith(
      '2 of 3 examples cannot be encoded, and are skipped; the first: train.jsonl row 17: '
    )

  @pytest.mark.parametrize('read', [encode.demonstrations, encode.comparisons])
  def test_a_response_that_cannot_be_encoded(self, chat, read):
    bad = example('q', 'a\ufdd0', 'b\ufdd0')
    with pytest.raises(DataError, match='example 1: a turn of the assistant holds'):
      read([bad, example('q', 'a', 'b')], chat, Limits())
    rows, counts = read([bad, example('q', 'a', 'b')], chat, Limits(), skip_bad_rows=True)
    assert [row.example for row in rows] == [1]
    assert counted(counts) == {'refused': 1}

  def test_all_of_them(self):
    with pytest.raises(
      DataError, match=r'none of 1 examples is left: 1 of 1 .* the first: train.jsonl row 17'
    ):
      encode.prompts([self.TWO_USERS], chat_with(NO_TWO_USERS), Limits(), skip_bad_rows=True)


class TestRowsApart:
  """With earlier answers in capitals: each is trained as it was written, behind its history."""

  def rows(self, limits, turns=('ab', 'cd', 'e', 'f', 'g'), response='xy'):
    chat = chat_with(REWRITES)
    examples = [Example(turns_of(*turns), (response,)), example('q', 'r')]
    rows, counts = encode.demonstrations(examples, chat, limits)
    return [(row.example, *decoded(chat, row)) for row in rows], counted(counts)

  FIRST = '<|user|>ab<|end|><|assistant|>'
  SECOND = FIRST + 'CD<|end|><|user|>e<|end|><|assistant|>'
  LAST = SECOND + 'F<|end|><|user|>g<|end|><|assistant|>'
  OTHER = (1, '<|user|>q<|end|><|assistant|>r<|end|>', 'r<|end|>')

  def test_each_behind_its_own_history(self):
    rows, counts = self.rows(Limits())
    assert rows == [
      (0, self.LAST + 'xy<|end|>', 'xy<|end|>'),
      (0, self.FIRST + 'cd<|end|>', 'cd<|end|>'),
      (0, self.SECOND + 'f<|end|>', 'f<|end|>'),
      self.OTHER,
    ]
    assert counts == {'apart': 2}

  def test_one_that_is_too_long_is_untrained(self):
    rows, counts = self.rows(Limits(30, 4), turns=('ab', 'much too long', 'e', 'f', 'g'))
    assert [trained for _, _, trained in rows] == ['xy<|end|>', 'f<|end|>', 'r<|end|>']
    assert counts == {'apart': 1, 'untrained': 1}

  def test_or_truncated(self):
    rows, counts = self.rows(Limits(8, 3, 'truncate'), turns=('ab', 'long', 'e', 'f', 'g'))
    assert rows == [(0, '<|user|>g<|end|><|assistant|>xy<|end|>', 'xy<|end|>'), self.OTHER]
    rows, counts = self.rows(Limits(10, 3, 'truncate'), turns=('ab', 'long', 'e', 'f', 'g'))
    assert rows == [
      (
        0,
        '<|user|>e<|end|><|assistant|>F<|end|><|user|>g<|end|><|assistant|>xy<|end|>',
        'xy<|end|>',
      ),
      (0, '<|user|>e<|end|><|assistant|>f<|end|>', 'f<|end|>'),
      self.OTHER,
    ]
    assert counts == {'apart': 1, 'truncated': 1}

  def test_an_example_that_is_skipped_has_none(self):
    rows, counts = self.rows(Limits(30, 4), response='much too long')
    assert rows == [self.OTHER]
    assert counts == {'too_long': 1}

  def test_a_turn_whose_history_the_template_refuses_is_untrained(self):
    """It begins the conversation, and a prompt needs a first message."""
    chat = chat_with("{% if messages[0].role == 'x' %}{% endif %}" + REWRITES)
    turns = (Turn('assistant', 'hi'), Turn('user', 'a'))
    (row,), counts = encode.demonstrations([Example(turns, ('x',))], chat, Limits())
    assert decoded(chat, row) == (
      '<|assistant|>HI<|end|><|user|>a<|end|><|assistant|>x<|end|>',
      'x<|end|>',
    )
    assert counted(counts) == {'untrained': 1}
    assert counts.sentences() == [
      '1 earlier turns of the assistant are not trained: the chat template renders them '
      'differently once others follow, and alone it refuses them or they are longer than the limits'
    ]

  def test_comparisons_have_none(self):
    chat = chat_with(REWRITES)
    examples = [Example(turns_of('ab', 'cd', 'e'), ('x', 'y'), (0, 1))]
    (ranked,), counts = encode.comparisons(examples, chat, Limits())
    assert [decoded(chat, row)[1] for row in ranked.rows] == ['x<|end|>', 'y<|end|>']
    assert counts == Counts(1)


def test_many_examples_are_encoded_like_one_and_progress_is_told(chat):
  examples = [example('abcdefg'[: i % 7 + 1], f'x{i}', f'y{i}') for i in range(2500)]
  told = []
  ranked, counts = encode.comparisons(
    examples, chat, Limits(8, 9), progress=told.append
  )
  assert counts == Counts(2500, too_long=2500 // 7)
  assert told == [1024, 2048, 2500]
  for each in ranked[::97]:
    (alone,), _ = encode.comparisons([examples[each.example]], chat, Limits(8, 9))
    assert [row.ids for row in each.rows] == [row.ids for row in alone.rows]
    assert isinstance(each, RankedRows)
    assert {row.example for row in each.rows} == {each.example}


def test_each_count_is_said_in_a_sentence_of_its_own():
  counts = Counts(29, 1, 2, 3, 4, 7, 5, 6, 'row 1')
  said = counts.sentences()
  assert [sentence.split()[0] for sentence in said] == list('1234756')
  assert said[2].endswith('the first: row 1') and len(set(said)) == 7
  assert Counts(9).sentences() == []


def test_rows_of_arrays_hold_the_same(chat):
  examples = [example('q', 'yes', 'no', ranks=(1, 0)), example('abc', 'd', 'e')]
  for read in (encode.demonstrations, encode.comparisons, encode.prompts):
    lists, arrays = (read(examples, chat, Limits(), as_arrays=arrays).rows
                     for arrays in (False, True))
    flat = lambda rows: [row for each in rows for row in getattr(each, 'rows', [each])]
    assert [(row.ids.tolist(), row.mask.tolist(), row.example) for row in flat(arrays)] == [
      (row.ids, row.mask, row.example) for row in flat(lists)
    ]
    assert [getattr(each, 'ranks', None) for each in arrays] == [
      getattr(each, 'ranks', None) for each in lists
    ]


def test_a_row_without_a_token_to_learn_is_left_out():
  """The template marks an answer from its fifth character on; a limit of four cuts that off."""
  chat = chat_with(
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ 'says' }}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
  examples = [example('a', 'bc'), example('a', 'd')]
  rows, _ = encode.demonstrations(examples, chat, Limits(60, 5, 'truncate'))
  assert [decoded(chat, row)[1] for row in rows] == ['b', 'd']
  with pytest.raises(DataError,
                     match=r'none of 2 examples fits into 60 prompt and 4 response tokens'):
    encode.demonstrations(examples, chat, Limits(60, 4, 'truncate'))


def test_one_that_is_refused_does_not_hide_behind_one_that_is_too_long(chat):
  bad = dataclasses.replace(example('a', 'b'), prompt=(Turn('user', '\ufdd0'),), place='x row 9')
  with pytest.raises(DataError,
                     match=r'none of 2 examples fits .* Besides, 1 of 2 examples .* x row 9'):
    encode.demonstrations([bad, example('much too long', 'b')], chat, Limits(4, 4),
                          skip_bad_rows=True)


def test_a_prompt_without_turns_is_cut_like_any_other():
  chat = chat_with("{{ 'Answer well: ' }}" + TURN_TEMPLATE)
  rows, counts = encode.prompts([Example(()), example('a')], chat, Limits(6, 1, 'truncate'))
  assert [len(row.ids) for row in rows] == [6, 6] and counts.truncated == 2
