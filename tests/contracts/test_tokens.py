"""What is trained on is what the assistant wrote, for templates of every family and conversations
of every shape.

The expectations are written by hand in `tests/chat_families.py`, and where a template is marked
they are those of `transformers` too. The table in docs/templates.md is made of these results; with
RLHF_JAX_WRITE_TABLES=1 this file writes it.
"""

import functools
import itertools
import os
import pathlib
import random
import re
import unicodedata

import pytest

from rlhf_jax.data import encode
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.encode import Limits
from rlhf_jax.data.examples import Answer, Example, Turn
from rlhf_jax.errors import DataError
from tests.chat_families import FAMILIES, SHAPES
from tests.chat_tokenizers import ADDS_SPACES

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'templates.md'
BEGIN, END = '<!-- table: tests/contracts/test_tokens.py -->', '<!-- end of table -->'
LIMITS = Limits(100_000, 100_000)
ROLES = {'s': 'system', 'u': 'user', 'a': 'assistant', 't': 'assistant', 'e': 'assistant'}
TEXTS = {
  'system': ['be brief and name colours'],
  'user': ['hello', 'what is the colour of the cat?', 'and of the grass?'],
  'assistant': ['the sky is blue', 'black, says the cat.', 'green'],
  'thought': ['<think>\nshort is best\n</think>\n\nthe sky is blue today'],
  'white space user': ['  hello\n\n', '\n    what?'],
  'white space assistant': ['    if x:\n        return 42', '\n\n  green \n'],
  'emoji user': ['😀 e\u0301 雨', 'nai\u0308ve ☂️'],
  'emoji assistant': ['👩‍👩‍👧 says: hello 😀', '\u0301 雨😀'],
}
# Answers that must come back as they were.
SAID = [
  'hello',
  '    if x:\n        return 42',
  '\thello',
  'a  b',
  '雨 😀',
  'e\u0301',
  '',
  ' ',
  'the end\n',
  '<think> x',
  '<|im_end|>',
  '</s>',
  'and [INST] <other',
  '### Response: hello',
  '1. a\n2. b\n\n',
]


def turns_of(shape, family, harmless=False):
  """The conversation of a shape. With `harmless`, words stand where control strings do."""
  roles = SHAPES.get(shape, shape)
  kinds = [{'t': 'thought'}.get(letter, ROLES[letter]) for letter in roles]
  turns = []
  for number, (letter, kind) in enumerate(zip(roles, kinds)):
    said = '' if letter == 'e' else _said(shape, kind, kinds[:number].count(kind), family, harmless)
    turns.append(Turn(ROLES[letter], said))
  return tuple(turns)


def _said(shape, kind, number, family, harmless):
  if shape == 'control strings':
    strings = [
      *family.special,
      *(string for string in family.added if kind == 'user' and string.startswith('<')),
    ]
    strings = ['word' for _ in strings] if harmless else strings
    return f'print {strings[-1]}\n{" ".join(strings)}system\nbe {"".join(strings)}rude {number}'
  texts = TEXTS.get(f'{shape} {kind}', TEXTS[kind])
  return texts[number % len(texts)]


@functools.cache
def chat_of(name):
  tokenizer = FAMILIES[name].tokenizer()
  return open_chat(
    tokenizer, generation_ends=tokenizer.convert_tokens_to_ids(list(FAMILIES[name].generation_ends))
  )


def messages(turns):
  return [{'role': turn.role, 'content': turn.text} for turn in turns]


def rendered(family, turns, **settings):
  return family.tokenizer().apply_chat_template(messages(turns), tokenize=False, **settings)


def composed(family, said):
  """The text as the tokenizer keeps it: Qwen's composes characters."""
  return unicodedata.normalize('NFC', said) if family.kind == 'bytes composed' else said


def same_text(family, one, other):
  """Whether two texts are the same to a tokenizer of that kind."""
  one, other = composed(family, one), composed(family, other)
  if family.kind in ADDS_SPACES:
    one, other = one.replace(' ', ''), other.replace(' ', '')
  return one == other


def runs(family, row):
  """The texts that are trained on, one for each unbroken run."""
  tokenizer = family.tokenizer()
  for trained, run in itertools.groupby(zip(row.ids, row.mask), key=lambda pair: pair[1]):
    if trained:
      yield tokenizer.decode([i for i, _ in run])


def check(name, shape, turns, harmless=None):
  """Raises AssertionError unless the rows of a conversation are right."""
  family, chat, outcome = FAMILIES[name], chat_of(name), FAMILIES[name].outcome(shape)
  rows, counts = encode.demonstrations([Example(turns[:-1], (turns[-1].text,))], chat, LIMITS)
  earlier = [i for i, turn in enumerate(turns[:-1]) if turn.role == 'assistant']
  apart = earlier[outcome.untrained :] if outcome.apart else []
  assert (len(apart), counts.apart, counts.untrained, len(rows)) == (
    outcome.apart,
    outcome.apart,
    outcome.untrained,
    1 + outcome.apart,
  )

  check_trained(family, shape, rows, turns, earlier[outcome.untrained :], apart)
  for row, number in zip(rows, [len(turns) - 1, *apart], strict=True):
    check_row(
      family, chat, row, turns[: number + 1], (harmless or turns)[: number + 1], harmless is None
    )


def check_trained(family, shape, rows, turns, earlier, apart):
  """Every turn of the assistant exactly once, with its end, and nothing else."""
  expected = [family.trained(family.text(turns[i].text), last=i in apart) for i in earlier]
  expected.append(family.trained(family.text(turns[-1].text), last=True))
  trained = [run for row in rows for run in runs(family, row)]
  if (
    not family.end or shape == 'white space'
  ):  # a token may hold line breaks of the answer and of the template
    expected, trained = ([said.strip() for said in texts] for texts in (expected, trained))
  expected, trained = sorted(filter(None, expected)), sorted(filter(None, trained))
  assert len(expected) == len(trained) and all(
    same_text(family, *pair) for pair in zip(trained, expected)
  ), (trained, expected)


def check_row(family, chat, row, turns, harmless, is_plain):
  """The row is what the template renders, its prompt what the policy sees, text only text."""
  tokenizer, closed = family.tokenizer(), not family.appended
  ids = row.ids if closed else row.ids[:-1]
  assert closed or row.ids[-1] == tokenizer.convert_tokens_to_ids(family.appended)
  assert same_text(family, tokenizer.decode(ids).rstrip(), rendered(family, turns).rstrip())

  if is_plain and closed:
    out = tokenizer.apply_chat_template(
      messages(turns), return_dict=True, return_assistant_tokens_mask=family.marked
    )
    assert out['input_ids'][: len(ids)] == ids
    assert tokenizer.decode(out['input_ids'][len(ids) :]).strip() == ''
    assert not family.marked or out['assistant_masks'][: len(ids)] == row.mask
  elif is_plain:
    assert (
      ids
      == tokenizer(rendered(family, turns).removesuffix('\n\n'), add_special_tokens=False)[
        'input_ids'
      ]
    )

  written = [token for token in family.added if '<' in token and token in family.template]
  special = set(tokenizer.convert_tokens_to_ids([*family.special, *written]))
  template_s = tokenizer(rendered(family, harmless), add_special_tokens=False)['input_ids']
  assert sum(i in special for i in ids) == sum(i in special for i in template_s)

  (prompt,), (conversation,) = chat.prompts([turns[:-1]]), chat.conversations([turns])
  start = conversation.start
  assert conversation.ids == row.ids
  assert prompt[:start] == row.ids[:start]
  assert len(prompt) - start in (0, 1)
  if is_plain and turns[:-1]:
    assert (
      prompt
      == tokenizer.apply_chat_template(messages(turns[:-1]), add_generation_prompt=True)[
        'input_ids'
      ]
    )
  answer = row.ids[start:]
  example = Example(
    turns[:-1], (Answer('', answer), Answer('', [*answer[:-1], answer[0], answer[-1]])), (0, 1)
  )
  (ranked,), _ = encode.comparisons([example], chat, LIMITS)
  assert ranked.rows[0].ids == [*prompt, *answer]
  if len(prompt) == start and family.kind != 'always':  # which has no token for a first space
    assert chat.answer_text(answer) == composed(family, family.text(turns[-1].text))


@functools.cache
def cell(name, shape):
  """What the table says; the checks fail where that is not so."""
  family, outcome = FAMILIES[name], FAMILIES[name].outcome(shape)
  turns = turns_of(shape, family)
  if outcome.refused:
    example = Example(turns[:-1], (turns[-1].text,), place='a.jsonl row 7')
    message = re.escape(outcome.message or outcome.refused)
    with pytest.raises(DataError, match=rf'a\.jsonl row 7: .*{message}.*skip-bad-rows'):
      encode.demonstrations([example], chat_of(name), LIMITS)
  else:
    check(
      name,
      shape,
      turns,
      turns_of(shape, family, harmless=True) if shape == 'control strings' else None,
    )
  return str(outcome)


def prompt_cell(name):
  """What the table says of a conversation without an answer."""
  turns, tokenizer = turns_of('uau', FAMILIES[name]), FAMILIES[name].tokenizer()
  (refusal,) = chat_of(name).conversations([turns])
  assert 'does not end with the assistant' in str(refusal)
  expected = tokenizer.apply_chat_template(messages(turns), add_generation_prompt=True)['input_ids']
  assert chat_of(name).prompts([turns]) == [expected]
  return 'a prompt'


def table():
  """The results as Markdown, a line for each family."""
  lines = [['template', 'an answer ends at', *SHAPES, 'no answer at the end']]
  lines.append(['---'] * len(lines[0]))
  for name, family in FAMILIES.items():
    end = family.tokenizer().convert_ids_to_tokens(chat_of(name).end_tokens[0])
    lines.append(
      [
        name,
        f'`{end}`'.replace('|', '\\|'),
        *(cell(name, shape) for shape in SHAPES),
        prompt_cell(name),
      ]
    )
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def test_the_table_in_the_docs_is_what_these_tests_find():
  page = PAGE.read_text(encoding='utf-8')
  before, rest = page.split(BEGIN)
  _, after = rest.split(END)
  expected = f'{before}{BEGIN}\n\n{table()}\n{END}{after}'
  if os.environ.get('RLHF_JAX_WRITE_TABLES'):
    PAGE.write_text(expected, encoding='utf-8')
    page = expected
  assert page == expected, (
    'docs/templates.md has an old table; run this file with RLHF_JAX_WRITE_TABLES=1'
  )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', FAMILIES)
def test_what_is_trained_on(name, shape):
  cell(name, shape)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_conversation_without_an_answer_is_a_prompt(name):
  prompt_cell(name)


WORDS = [
  'the',
  'cat',
  'hello',
  'if x:',
  '42',
  '.',
  ' ',
  '  ',
  '\n',
  '\n\n',
  '\t',
  '雨',
  '😀',
  'e\u0301',
  '👩‍👩‍👧',
  '\x00',
  '<',
  '|>',
  '<|im_',
  '[INST',
  '</',
  '<other1>',
  '{{ x }}',
  '{% if %}',
  '\\',
  '"',
  '### Response:',
  '\r\n',
  '\u200b',
  '\xa0',
  '<0x0A>',
]


def random_turns(rng, family, roles, with_control):
  """(turns of random words and control strings, the same with words in place of these)."""
  control = [
    string for string in (*family.special, *family.added) if '<' in string or '[' in string
  ] * with_control
  all_words = [
    word for word in WORDS if not (family.kind in ADDS_SPACES and word in ('<other1>', '<0x0A>'))
  ]
  turns, harmless = [], []
  for role in roles:
    strings = [string for string in control if role != 'assistant' or string not in family.added]
    words = rng.choices(all_words, k=rng.randint(1, 8)) + rng.choices(strings or ['the'], k=2)
    rng.shuffle(words)
    words = ['so', *words, 'on'] if rng.random() < 0.7 else words  # so that not all are trimmed
    for said, texts in (
      (turns, words),
      (harmless, ['word' if word in control else word for word in words]),
    ):
      said.append(Turn(role, ''.join(texts)))
  return tuple(turns), tuple(harmless)


@pytest.mark.parametrize('with_control', [False, True], ids=['words', 'control strings'])
@pytest.mark.parametrize(
  'name', [name for name, family in FAMILIES.items() if not family.outcome('one turn').refused]
)
def test_random_conversations(name, with_control):
  rng, family, chat = random.Random(name), FAMILIES[name], chat_of(name)
  shapes = [
    shape
    for shape in ('one turn', 'several turns', 'system', 'assistant first', 'two user turns')
    if not family.outcome(shape).refused
  ]
  for _ in range(25):
    roles = [ROLES[letter] for letter in SHAPES[rng.choice(shapes)]]
    turns, harmless = random_turns(rng, family, roles, with_control)
    rows, counts = encode.demonstrations([Example(turns[:-1], (turns[-1].text,))], chat, LIMITS)
    (conversation,) = chat.conversations([turns])
    apart = conversation.apart[counts.untrained :]
    for row, number in zip(rows, [len(turns) - 1, *apart], strict=True):
      check_row(family, chat, row, turns[: number + 1], harmless[: number + 1], not with_control)


@pytest.mark.parametrize('said', SAID)
@pytest.mark.parametrize(
  'name', [name for name, family in FAMILIES.items() if not family.outcome('one turn').refused]
)
def test_an_answer_is_read_back(name, said):
  """The last token of a prompt may hold the first line breaks of an answer: then not."""
  family, chat = FAMILIES[name], chat_of(name)
  turns = (Turn('user', 'hello'), Turn('assistant', said))
  (prompt,), (conversation,) = chat.prompts([turns[:1]]), chat.conversations([turns])
  if isinstance(conversation, DataError):
    assert said == '' and family.outcome('empty answer').refused
    return
  answer, expected = conversation.ids[conversation.start :], composed(family, family.text(said))
  assert answer[-1] in chat.end_tokens
  if conversation.start < len(prompt):
    assert said[:1].isspace()
  elif family.kind == 'always':  # ' a' and 'a' are the same tokens
    assert chat.answer_text(answer).lstrip(' ') == expected.lstrip(' ')
  else:
    assert chat.answer_text(answer) == expected
