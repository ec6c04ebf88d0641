"""Conversations to tokens and back. For each family of models: tests/contracts/test_tokens.py."""

import copy
import dataclasses
import datetime
import itertools
import json
import random
import types

import pytest
import tokenizers
import transformers

from rlhf_jax.data import text
from rlhf_jax.data.chat import dated, open_chat
from rlhf_jax.data.examples import Turn
from rlhf_jax.errors import ConfigError, DataError
from tests.chat_families import FAMILIES, Family

CORPUS = [
  'the cat sat on the mat. the dog sat on the cat.',
  'what is the answer? the answer is 42.\n\nthank you!',
] * 5
# Marks of what the assistant wrote are absent, and a line break follows every end token.
CHATML = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# A header that counts the messages: the prompt reads differently once a response follows.
COUNTING = '{{ messages | length }}' + text.TURN_TEMPLATE
TEMPLATES = {'turn': text.TURN_TEMPLATE, 'transcript': text.TRANSCRIPT_TEMPLATE, 'chatml': CHATML}
WORDS = ['cat', 'the', 'mat?', 'is', '42', 'naïve', '\n', 'on.', '雨', '  two']


@pytest.fixture(scope='module')
def tokenizer():
  return text.train_tokenizer(CORPUS, 280)


@pytest.fixture(params=TEMPLATES)
def chat(request, tokenizer):
  return open_chat(with_template(tokenizer, TEMPLATES[request.param]))


def with_template(tokenizer, template):
  other = copy.deepcopy(tokenizer)
  other.chat_template = template
  return other


def user(said):
  return Turn('user', said)


def assistant(said):
  return Turn('assistant', said)


def one(found):
  """The only element, raised where it is an error."""
  (found,) = found
  if isinstance(found, DataError):
    raise found
  return found


def dialogues(count=20):
  """[(turns, response)] of one to three rounds, some with a system turn."""
  rng = random.Random(4)
  say = lambda: ' '.join(rng.choices(WORDS, k=rng.randint(1, 6))).strip() or 'cat'
  for _ in range(count):
    turns = [Turn('system', say())] if rng.random() < 0.5 else []
    for _ in range(rng.randint(0, 2)):
      turns += [user(say()), assistant(say())]
    yield [*turns, user(say())], say()


def test_a_dialogue_begins_with_its_prompt_and_ends_with_the_end(chat):
  for turns, response in dialogues():
    prompt = one(chat.prompts([turns]))
    ids, mask, start, apart = dataclasses.astuple(
      one(chat.conversations([[*turns, assistant(response)]]))
    )
    end = chat.tokenizer.eos_token_id
    assert ids[:start] == prompt
    assert len(ids) == len(mask)
    assert mask[start:] == [True] * (len(ids) - start)
    assert ids[-1] == end
    assert end not in ids[start:-1]
    assert chat.answer_text(ids[start:]) == response
    assert apart == ()


def test_the_mask_is_what_the_assistant_wrote(chat):
  for turns, response in dialogues():
    row = one(chat.conversations([[*turns, assistant(response)]]))
    written = chat.tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m]).split('<|end|>')
    expected = [turn.text for turn in turns if turn.role == 'assistant'] + [response, '']
    assert [
      said.strip(' ') for said in written
    ] == expected  # the transcript has a blank before each


def test_of_earlier_turns_nothing_is_trained_where_only_the_last_counts(chat):
  for turns, response in dialogues():
    spoken = [[*turns, assistant(response)]]
    row, last = one(chat.conversations(spoken)), one(chat.conversations(spoken, earlier=False))
    assert (last.ids, last.start) == (row.ids, row.start)
    assert last.mask == [False] * row.start + row.mask[row.start :]


def test_ids_of_one_dialogue():
  """Written out: 256 bytes follow five special tokens, in the order of the byte-level alphabet."""
  chat = open_chat(text.train_tokenizer([], 261))
  byte = lambda said: [5 + ord(c) - ord('!') for c in said]
  row = one(chat.conversations([[user('abc'), assistant('de'), user('f'), assistant('xy')]]))
  assert row.ids == [3, *byte('abc'), 4, *byte('de'), 1, 3, *byte('f'), 4, *byte('xy'), 1]
  assert [i for i, m in zip(row.ids, row.mask) if m] == [*byte('de'), 1, *byte('xy'), 1]
  assert row.start == 11


@pytest.mark.parametrize(
  'response', ['', 'so<|end|>and more', '<|end|>', '<|user|>hm<|assistant|>']
)
def test_a_control_string_in_a_response_is_text(response):
  """Spelled in the bytes of its characters, of which each is a token here."""
  chat = open_chat(text.train_tokenizer([], 261))
  row = one(chat.conversations([[user('hm'), assistant(response)]]))
  assert row.ids[row.start :] == [
    *(5 + ord(c) - ord('!') if c != ' ' else 225 for c in response),
    1,
  ]
  assert chat.answer_text(row.ids[row.start :]) == response


def test_a_template_that_rewrites_history_is_refused(tokenizer):
  chat = open_chat(with_template(tokenizer, COUNTING))
  with pytest.raises(
    DataError,
    match=r"renders what is before the response 'there' differently once it follows.*only "
    'appends',
  ):
    one(chat.conversations([[user('where to'), assistant('there')]]))


def test_what_is_refused_keeps_its_place_among_the_others():
  chat = open_chat(FAMILIES['Gemma'].tokenizer())
  talks = [
    (user('a'), assistant('b')),
    (user('a'), user('b'), assistant('c')),
    (user('c'), assistant('d')),
    (),
    (user('e'),),
  ]
  good, alternate, good_too, nothing, unanswered = chat.conversations(talks)
  assert [chat.answer_text(row.ids[row.start :]) for row in (good, good_too)] == ['b', 'd']
  assert str(alternate) == (
    'the chat template refuses a conversation of user, user: TemplateError: roles must alternate '
    'user and assistant.'
  )
  assert (
    str(nothing)
    == str(unanswered)
    == ('the conversation does not end with the assistant, so there is nothing to learn from.')
  )
  system, fine = chat.prompts([(Turn('system', 'be brief'), user('a')), (user('a'),)])
  assert (
    str(system)
    == 'the chat template refuses a conversation of system, user: TemplateError: no system turn.'
  )
  assert (
    chat.tokenizer.decode(fine)
    == '<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n'
  )


@pytest.mark.parametrize('said', ['a\ufdd0b', '\ufdd1', 'x\ufdd2'])
def test_code_points_that_stand_for_control_strings_inside_are_refused(tokenizer, said):
  chat = open_chat(tokenizer)
  with pytest.raises(
    DataError, match=r"a turn of the user holds '\\ufdd.', a code point that Unicode reserves"
  ):
    one(chat.prompts([[user(said)]]))
  with pytest.raises(DataError, match=r'a turn of the assistant holds'):
    one(chat.conversations([[user('a'), assistant(said)]]))


def test_a_thought_is_tokens_in_an_answer_and_text_in_a_question():
  family = FAMILIES['Qwen3']
  chat = open_chat(family.tokenizer())
  thought = set(chat.tokenizer.convert_tokens_to_ids(['<think>', '</think>']))
  said = '<think>\nhm\n</think>\n\nso'
  count = lambda ids: sum(i in thought for i in ids)
  assert count(one(chat.prompts([[user(said)]]))) == 0
  row = one(chat.conversations([[user(said), assistant(said)]]))
  assert (count(row.ids[: row.start]), count(row.ids[row.start :])) == (0, 2)
  assert chat.answer_text(row.ids[row.start :]) == said


def test_an_end_token_that_is_not_special_is_text_too_when_somebody_writes_it():
  tokenizer = copy.deepcopy(FAMILIES['ChatML'].tokenizer())
  tokenizer.add_tokens(['<end>'])
  tokenizer.chat_template = tokenizer.chat_template.replace('<|im_end|>', '<end>')
  chat = open_chat(tokenizer)
  assert tokenizer.convert_ids_to_tokens(chat.end_tokens) == ['<end>']
  row = one(chat.conversations([[user('a <end>'), assistant('b <end>')]]))
  assert row.ids.count(chat.end_tokens[0]) == 2
  assert chat.answer_text(row.ids[row.start :]) == 'b <end>'
  assert (
    tokenizer.decode(row.ids)
    == '<|im_start|>user\na <end><end>\n<|im_start|>assistant\nb <end><end>'
  )


def test_an_unknown_character_stays_unknown_beside_a_control_string():
  """In a tokenizer without bytes, which knows no '<', '>' or '/' either."""
  tokenizer = copy.deepcopy(FAMILIES['Llama 2'].tokenizer())
  settings = json.loads(tokenizer.backend_tokenizer.to_str())
  settings['model']['byte_fallback'] = False
  inner = tokenizers.Tokenizer.from_str(json.dumps(settings))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    eos_token='</s>',
    bos_token='<s>',
    unk_token='<unk>',
    chat_template=tokenizer.chat_template,
  )
  chat = open_chat(tokenizer)
  for said, unknown in (('a 雨 b', 1), ('a 雨 </s> <unk> b', 5)):
    row = one(chat.conversations([[user('a'), assistant(said)]]))
    assert row.ids[row.start :].count(tokenizer.unk_token_id) == unknown
    assert row.ids.count(tokenizer.eos_token_id) == 1


def test_an_added_token_of_white_space_is_no_control_string():
  """Gemma has tokens of line breaks; its template writes them too."""
  tokenizer = copy.deepcopy(FAMILIES['ChatML'].tokenizer())
  tokenizer.add_tokens(['\n'])
  talk = (user('a\nb'), assistant('c\nd'))
  messages = [{'role': turn.role, 'content': turn.text} for turn in talk]
  row = one(open_chat(tokenizer).conversations([talk]))
  assert row.ids == tokenizer.apply_chat_template(messages)['input_ids'][:-1]
  assert row.ids.count(tokenizer.convert_tokens_to_ids('\n')) == 5


@pytest.mark.parametrize('said', ['hello', 'hello \n\n', '\n', '  '])
def test_white_space_at_the_end_of_an_answer_is_trained(said):
  """Tokenizers of GPT-2's kind say that a token stands where its white space ends."""
  family = dataclasses.replace(
    FAMILIES['ChatML, marks without the end'], kind='bytes trimmed', bos='<|endoftext|>'
  )
  chat = open_chat(family.tokenizer())
  row = one(chat.conversations([[user('x'), assistant(said)]]))
  trained = chat.tokenizer.decode([i for i, m in zip(row.ids, row.mask) if m])
  assert trained in (said, '\n' + said)  # the line break of the prompt may be in its first token


def test_a_row_is_shown_with_what_is_trained_in_brackets(tokenizer):
  chat = open_chat(tokenizer)
  row = one(chat.conversations([[user('the cat?'), assistant('雨'), user('so'), assistant('no')]]))
  assert (
    chat.shown(row.ids, row.mask)
    == '<|user|>the cat?<|assistant|>[[雨<|end|>]]<|user|>so<|assistant|>[[no<|end|>]]'
  )


def test_tokens_do_not_depend_on_what_was_asked_before_or_on_the_order(tokenizer):
  """Pieces are tokenized once and kept; control strings go another way."""
  talks = [(*turns, assistant(response)) for turns, response in dialogues()]
  talks += [(user('<|end|>'), assistant(f'{said}<|user|>')) for said in ('a', 'b')] + talks[:3]
  alone = [one(open_chat(tokenizer).conversations([talk])) for talk in talks]
  chat = open_chat(tokenizer)
  assert chat.conversations(talks) == alone
  assert chat.conversations(talks[::-1]) == alone[::-1]


class TestEnds:
  @pytest.mark.parametrize(
    'name', [name for name, family in FAMILIES.items() if family.end and not family.appended]
  )
  def test_an_answer_ends_where_the_template_closes_a_turn(self, name):
    tokenizer = FAMILIES[name].tokenizer()
    assert tokenizer.convert_ids_to_tokens(open_chat(tokenizer).end_tokens) == [FAMILIES[name].end]

  @pytest.mark.parametrize(
    'name',
    ['Alpaca', 'Alpaca, Unigram', 'Alpaca, marks', "GLM-like, a turn ends where the user's begins"],
  )
  def test_or_at_the_end_token_of_the_tokenizer(self, name):
    tokenizer = FAMILIES[name].tokenizer()
    assert open_chat(tokenizer).end_tokens == (tokenizer.eos_token_id,)

  def test_the_end_tokens_of_the_model_are_added(self):
    tokenizer = FAMILIES['Llama 3'].tokenizer()
    text_end, turn_end = tokenizer.convert_tokens_to_ids(['<|end_of_text|>', '<|eot_id|>'])
    assert open_chat(tokenizer, generation_ends=[text_end]).end_tokens == (turn_end, text_end)
    assert open_chat(tokenizer, generation_ends=[text_end, turn_end]).end_tokens == (
      turn_end,
      text_end,
    )

  def test_a_template_without_an_end_uses_those_of_the_model(self):
    tokenizer = copy.deepcopy(FAMILIES['Alpaca'].tokenizer())
    tokenizer.add_special_tokens({'extra_special_tokens': ['<stop>']})
    stop = tokenizer.convert_tokens_to_ids('<stop>')
    assert open_chat(tokenizer, generation_ends=[stop]).end_tokens == (stop,)
    assert open_chat(tokenizer, generation_ends=[stop, tokenizer.eos_token_id]).end_tokens == (
      tokenizer.eos_token_id,
      stop,
    )

  def test_ids_of_ordinary_text_end_nothing(self):
    tokenizer = FAMILIES['ChatML'].tokenizer()
    ordinary = tokenizer('the', add_special_tokens=False)['input_ids']
    assert open_chat(tokenizer, generation_ends=[*ordinary, 10**6]).end_tokens == (
      tokenizer.eos_token_id,
    )

  def test_a_row_stops_at_the_first_of_them_that_the_template_writes(self):
    """Behind the end of a turn some templates write the end of the text too."""
    family = FAMILIES['ChatML']
    both = family.template.replace(
      '{% if add_gen',
      "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}{% if add_gen",
    )
    chat = open_chat(dataclasses.replace(family, template=both).tokenizer())
    row = one(chat.conversations([[user('a'), assistant('b')]]))
    assert chat.tokenizer.decode(row.ids).endswith('assistant\nb<|im_end|>')


  def test_of_a_template_that_wants_a_system_turn(self):
    family = FAMILIES['Qwen3']
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chat = open_chat(dataclasses.replace(family, template=wants + family.template).tokenizer())
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_tokens) == ['<|im_end|>']
    row = one(chat.conversations([[Turn('system', 's'), user('a'), assistant(' b')]]))
    assert chat.answer_text(row.ids[row.start :]) == ' b'


class TestAnswerText:
  @pytest.mark.parametrize('name', FAMILIES)
  def test_without_the_end_and_cut(self, name):
    """A policy may stop at any of the ends, or at none."""
    chat = open_chat(FAMILIES[name].tokenizer())
    ids = chat.tokenizer('the cat', add_special_tokens=False)['input_ids']
    for end in ([], [chat.end_tokens[0]]):
      assert chat.answer_text([*ids, *end]).strip(' ') == 'the cat'
    assert chat.answer_text([]) == chat.answer_text([chat.end_tokens[0]]) == ''

  def test_an_empty_thought_that_the_template_writes_is_no_answer(self):
    chat = open_chat(FAMILIES['Qwen3'].tokenizer())
    row = one(chat.conversations([[user('a'), assistant('    if x:')]]))
    assert (
      chat.tokenizer.decode(row.ids[row.start :]) == '<think>\n\n</think>\n\n    if x:<|im_end|>'
    )
    assert chat.answer_text(row.ids[row.start :]) == '    if x:'

  def test_numbers_of_numpy_and_other_special_tokens(self, tokenizer):
    import numpy as np

    chat = open_chat(tokenizer)
    ids = np.array(
      [*tokenizer('the')['input_ids'], 0, *tokenizer(' cat')['input_ids'], 1], np.int32
    )
    assert chat.answer_text(ids) == 'the cat'


class TestOpen:
  def test_padding_falls_back_to_the_end_token(self, tokenizer):
    assert open_chat(tokenizer).pad_token == 1
    assert open_chat(tokenizer, pad_token=0).pad_token == 0

  def test_begin_token(self, tokenizer):
    assert open_chat(tokenizer).begin_token is None
    llama = FAMILIES['Llama 2'].tokenizer()
    assert open_chat(llama).begin_token == llama.convert_tokens_to_ids('<s>')

  def test_a_tokenizer_without_a_template_is_refused(self, tokenizer):
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer.backend_tokenizer, eos_token='<|end|>'
    )
    with pytest.raises(
      ConfigError, match=r'no chat template that is used by default: .*Set chat_template in its'
    ):
      open_chat(bare)

  def test_a_template_that_is_not_jinja_is_refused(self, tokenizer):
    with pytest.raises(
      ConfigError,
      match=r"not jinja, line 2: Encountered unknown tag 'fro'.*Mend chat_template.jinja",
    ):
      open_chat(with_template(tokenizer, '{{ bos_token }}\n{% fro m in messages %}{% endfor %}'))

  def test_a_tokenizer_that_knows_no_places_is_refused(self):
    with pytest.raises(
      ConfigError,
      match=r'the tokenizer is a SimpleNamespace, which does not say where .*tokenizer.json',
    ):
      open_chat(types.SimpleNamespace(is_fast=False))

  def test_the_date_is_that_of_the_run(self):
    family = FAMILIES['Llama 3']
    tokenizer = copy.deepcopy(family.tokenizer())
    tokenizer.chat_template = family.template
    chat = open_chat(tokenizer, began=datetime.datetime(2024, 7, 26))
    assert 'Today Date: 26 Jul 2024\n' in tokenizer.decode(one(chat.prompts([[user('a')]])))
    assert chat.identity == open_chat(tokenizer, began=datetime.datetime(2024, 7, 26, 12)).identity
    assert chat.identity != open_chat(tokenizer, began=datetime.datetime(2024, 7, 27)).identity

  def test_a_time_that_cannot_be_kept_is_refused(self, tokenizer):
    with pytest.raises(
      ConfigError,
      match=r'calls strftime_now with what is no string, so its text changes with the clock',
    ):
      open_chat(with_template(tokenizer, "{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML))

  def test_dated(self):
    now = datetime.datetime(2024, 7, 26, 8, 5)
    assert (
      dated('{{ strftime_now( "%H:%M" ) ~ strftime_now(\'%Y\') }}', now) == "{{ '08:05' ~ '2024' }}"
    )
    assert dated('{% if strftime_now is defined %}', now) == '{% if strftime_now is defined %}'


class TestIdentity:
  def test_it_is_that_of_equal_tokenizers(self, tokenizer):
    assert open_chat(tokenizer).identity == open_chat(copy.deepcopy(tokenizer)).identity

  def test_it_changes_with_all_that_tokens_depend_on(self, tokenizer):
    bigger = copy.deepcopy(tokenizer)
    bigger.add_special_tokens({'bos_token': '<|begin|>'})
    chats = [
      open_chat(tokenizer),
      open_chat(with_template(tokenizer, CHATML)),
      open_chat(bigger),
      open_chat(text.train_tokenizer(CORPUS, 281)),
      open_chat(tokenizer, generation_ends=[0]),
    ]
    for a, b in itertools.combinations(chats, 2):
      assert a.identity != b.identity

  def test_nor_it_nor_tokens_change_with_what_the_tokenizer_was_used_for(self, tokenizer):
    used = copy.deepcopy(tokenizer)
    used(['the cat sat'] * 2, truncation=True, max_length=2, padding='max_length')
    talk = [(user('the cat sat on the mat'), assistant('the dog sat'))]
    assert open_chat(used).conversations(talk) == open_chat(tokenizer).conversations(talk)
    assert open_chat(used).identity == open_chat(tokenizer).identity


def test_a_turn_that_is_closed_only_once_others_follow_has_its_end():
  """The last one gets the end token too, though the template writes none there."""
  between = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><|im_start|>assistant\n' }}{% endif %}"
  )
  chat = open_chat(Family(between, 'bytes', FAMILIES['ChatML'].special, '<|im_end|>').tokenizer())
  row = one(chat.conversations([[user('a'), assistant('b '), user('c'), assistant('d')]]))
  assert chat.shown(row.ids, row.mask) == (
    '<|im_start|>user\na<|im_end|><|im_start|>assistant\n[[b <|im_end|>]]'
    '<|im_start|>user\nc<|im_end|><|im_start|>assistant\n'
    '[[d<|im_end|>]]'
  )


@pytest.mark.parametrize(
  'joined, refused',
  [('\nyes', False), (':\nyes', True), ('se:\nyes', True), ('Response:\nyes', True)]
)
def test_where_more_than_one_token_would_change_the_row_is_refused(joined, refused):
  """A tokenizer has a token for the prompt's end and the answer together.

  Of the prompt's tokens ':\\nyes' takes two; 'se:\\nyes' takes one, but also splits another.
  """
  tokenizer = copy.deepcopy(FAMILIES['Alpaca'].tokenizer())
  tokenizer.add_tokens([joined])
  chat = open_chat(tokenizer)
  assert one(chat.conversations([[user('a'), assistant('no')]])).ids
  if refused:
    message = "joins the prompt and the response 'yes': no token ends where the prompt does"
    with pytest.raises(DataError, match=message):
      one(chat.conversations([[user('a'), assistant('yes')]]))
  else:
    row = one(chat.conversations([[user('a'), assistant('yes')]]))
    (prompt,) = chat.prompts([[user('a')]])
    assert row.start == len(prompt) - 1
    assert chat.shown(row.ids, row.mask).endswith('### Response:[[\nyes<|endoftext|>]]')


def test_what_is_kept_is_bounded(tokenizer, monkeypatch):
  talks = [(user(f'{said} {i}'), assistant('so')) for i, said in enumerate(WORDS * 3)]
  expected = open_chat(tokenizer).conversations(talks)
  monkeypatch.setattr('rlhf_jax.data.chat._MOST_KEPT', 4)
  monkeypatch.setattr('rlhf_jax.data.pieces._MOST_KEPT', 4)
  chat = open_chat(tokenizer)
  assert [one(chat.conversations([talk])) for talk in talks] == expected
  assert chat.conversations(talks) == expected
  assert [one(chat.conversations([talk])) for talk in talks] == expected
  assert len(chat._prompts_kept) <= 5


UNINVITED = (
  "{% for m in messages %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}")
UNINVITED_MARKED = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
  "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}")
UNINVITED_PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize('template, asked, answered', [
  (UNINVITED, '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n', 'yo<|im_end|>'),
  (UNINVITED_MARKED, '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n', 'yo<|im_end|>'),
  (UNINVITED_PLAIN, 'user: hi<|im_end|>assistant:', ' yo<|im_end|>'),
  (UNINVITED_PLAIN.replace(": '", ":'"), 'user:hi<|im_end|>assistant:', 'yo<|im_end|>'),
])
def test_a_template_that_invites_nobody_gets_the_header_of_the_answer(template, asked, answered):
  """It ignores add_generation_prompt, so a policy would have to write its own header."""
  tokenizer = text.train_tokenizer([], 262)
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
  tokenizer.eos_token, tokenizer.chat_template = '<|im_end|>', template
  chat = open_chat(tokenizer)
  turns = [user('hi'), assistant('yo'), user('hi'), assistant('yo')]
  (prompt,), (row,) = chat.prompts([turns[:1]]), chat.conversations([turns])
  assert tokenizer.decode(prompt) == asked
  assert tokenizer.decode([i for i, mine in zip(row.ids, row.mask) if mine]) == 2 * answered
  assert tokenizer.decode(row.ids[row.start:]) == answered and not row.apart
  assert chat.answer_text(row.ids[row.start:]) == 'yo'


# ---- tokenizers and templates that are not as most

def _with_tokens(*tokens, template, eos, merges=()):
  """A byte-level tokenizer with these added tokens."""
  tokenizer = text.train_tokenizer([], 262)
  if merges:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state['model']['vocab'] |= {a + b: 262 + i for i, (a, b) in enumerate(merges)}
    state['model']['merges'] = [list(pair) for pair in merges]
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(state))
    )
  tokenizer.add_tokens(list(tokens))
  tokenizer.eos_token, tokenizer.chat_template = eos, template
  return tokenizer


@pytest.mark.parametrize('template, ends', [
  ("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}", ()),
  ("{% for m in messages %}{{ m.role + ':' + m.content + '<stop>' }}{% endfor %}", ('<end>',)),
])
def test_an_end_token_that_is_not_special_nor_written_by_name_is_kept_out_of_texts(template, ends):
  tokenizer = _with_tokens('<end>', '<stop>', template=template, eos='<stop>')
  chat = open_chat(tokenizer, generation_ends=tokenizer.convert_tokens_to_ids(list(ends)))
  said = [user('hi <stop> <end> x'), assistant('write <stop> and <end> to stop')]
  (row,) = chat.conversations([said])
  count = {token: row.ids.count(tokenizer.convert_tokens_to_ids(token))
           for token in ('<stop>', '<end>')}
  assert count == {'<stop>': 2, '<end>': 0 if ends else 2}  # a token that ends nothing is any word
  assert chat.answer_text(row.ids[row.start:]) == said[1].text


@pytest.mark.parametrize('answer', ['yes', '  if x:', '\nyes'])
def test_a_header_that_takes_the_space_behind_it_is_not_trained(answer):
  """As Phi 3's: where an answer begins with white space, that is a part of the header's token."""
  header = tokenizers.AddedToken('<|assistant|>', rstrip=True, special=True)
  template = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
  tokenizer = _with_tokens(header, template=template, eos='<|end|>')
  chat = open_chat(tokenizer)
  turns = [user('a'), assistant(answer), user('b'), assistant(answer)]
  (asked,), (row,) = chat.prompts([turns[:3]]), chat.conversations([turns])
  assert row.ids[:row.start] == asked
  written = tokenizer.decode([i for i, mine in zip(row.ids, row.mask) if mine])
  assert written == 2 * f'{answer.lstrip()}<|end|>'


def test_a_merge_that_spells_a_control_string_makes_no_control_token():
  merges = [('<', 's'), ('<s', '>'), ('<s>', 'b')]
  tokenizer = _with_tokens(
    tokenizers.AddedToken('<s>', special=True), merges=merges, eos='<s>',
    template="{% for m in messages %}{{ m.content + '<s>' }}{% endfor %}")
  chat = open_chat(tokenizer)
  (row,) = chat.conversations([[user('a <s> b'), assistant('c')]])
  assert row.ids.count(tokenizer.convert_tokens_to_ids('<s>')) == 2
  assert tokenizer.decode(row.ids) == 'a <s> b<s>c<s>'


@pytest.mark.parametrize('written, ends, found', [
  ("'<|END_RESPONSE|><|END_TURN|>'", ['<|END_TURN|>'], '<|END_TURN|>'),           # as Command R7B
  ("'<|END_TURN|>\n'", [], '<|END_TURN|>'),
  ("('<|END_TURN|>' if loop.last else '')", ['<|END_TURN|>'], '<|END_TURN|>'),
])
def test_the_closing_token_is_the_one_that_is_known_to_end(written, ends, found):
  special = ['<|END_RESPONSE|>', '<|END_TURN|>', '<|START|>']
  tokenizer = _with_tokens(
    *(tokenizers.AddedToken(each, special=True) for each in special), eos='<|end|>',
    template="{% for m in messages %}{{ '<|START|>' + m.role + ':' + m.content }}"
             "{% if m.role == 'assistant' %}{{ " + written + " }}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|START|>assistant:' }}{% endif %}")
  chat = open_chat(tokenizer, generation_ends=tokenizer.convert_tokens_to_ids(ends))
  assert tokenizer.convert_ids_to_tokens(list(chat.end_tokens)) == [found]


@pytest.mark.parametrize('template', [
  "{% for m in messages %}{{ '<|START|>' + m.role + ':' + m.content }}{% endfor %}"
  "{{ '<|START|>assistant:' }}",
  "{% for m in messages %}{{ '<|START|>' + m.role + ':' + m.content | upper }}{% endfor %}",
])
def test_a_header_is_no_closing_token(template):
  tokenizer = _with_tokens(
    tokenizers.AddedToken('<|START|>', special=True), template=template, eos='<|end|>')
  assert open_chat(tokenizer).end_tokens == (tokenizer.convert_tokens_to_ids('<|end|>'),)
