"""Text to tokens and back: what is a prompt, what the assistant wrote, and what cannot work."""

import random

import pytest
import transformers

from rlhf_jax.data import text
from rlhf_jax.data.examples import Turn
from rlhf_jax.errors import ConfigError, DataError
from rlhf_jax.model.config import ModelConfig

CORPUS = ['the cat sat on the mat. the dog sat on the cat.', 'what is the answer? the answer is 42.\n\nthank you!'] * 5
# Markers of what the assistant wrote are absent, and a line break follows every end token.
CHATML = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
# A header that counts the messages: the prompt reads differently once a response follows.
COUNTING = "{{ messages | length }}" + text.TURN_TEMPLATE
TEMPLATES = {'turn': text.TURN_TEMPLATE, 'transcript': text.TRANSCRIPT_TEMPLATE, 'chatml': CHATML}
WORDS = ['cat', 'the', 'mat?', 'is', '42', 'naïve', '\n', 'on.', '雨', '  two']


@pytest.fixture(scope='module')
def tokenizer():
  return text.train_tokenizer(CORPUS, 280)


@pytest.fixture(params=TEMPLATES)
def templated(request, tokenizer, monkeypatch):
  monkeypatch.setattr(tokenizer, 'chat_template', TEMPLATES[request.param])
  return tokenizer


def user(said):
  return Turn('user', said)


def assistant(said):
  return Turn('assistant', said)


def _bare(tokenizer, **special):
  """The same vocabulary with no special tokens but these, and no template."""
  return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)


def dialogues(count=20):
  """[(turns, response)] of one to three rounds, with and without a system turn; words that need several tokens each."""
  rng = random.Random(4)
  say = lambda: ' '.join(rng.choices(WORDS, k=rng.randint(1, 6))).strip() or 'cat'
  for _ in range(count):
    turns = [Turn('system', say())] if rng.random() < 0.5 else []
    for _ in range(rng.randint(0, 2)):
      turns += [user(say()), assistant(say())]
    yield [*turns, user(say())], say()


def test_a_trained_tokenizer_has_the_size_asked_for_and_loses_nothing(tokenizer):
  assert len(tokenizer) == 280
  assert (tokenizer.pad_token, tokenizer.eos_token) == ('<|pad|>', '<|end|>')
  assert len(tokenizer('the cat')['input_ids']) < len('the cat')                # it learned words
  for said in ('the cat', ' two  spaces \n', '雨 naïve ☂', '\x00\t'):
    assert tokenizer.decode(tokenizer(said)['input_ids']) == said
  assert [len(tokenizer(f'<|{role}|>')['input_ids']) for role in ('system', 'user', 'assistant', 'end')] == [1] * 4


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
  assert len(text.train_tokenizer([], 261)) == 261
  with pytest.raises(ConfigError, match=r'a byte-level tokenizer of 260 tokens. It needs at least 261: 256 bytes and 5'):
    text.train_tokenizer(CORPUS, 260)


def test_a_dialogue_begins_with_its_prompt_and_ends_with_the_end(templated):
  for turns, response in dialogues():
    prompt = text.prompt_tokens(templated, turns)
    ids, mask = text.dialogue_tokens(templated, turns, response)
    assert ids[:len(prompt)] == prompt
    assert len(ids) == len(mask)
    assert mask[len(prompt):] == [True] * (len(ids) - len(prompt))
    assert ids[-1] == templated.eos_token_id
    assert templated.eos_token_id not in ids[len(prompt):-1]
    assert text.response_text(templated, ids[len(prompt):]) == response


def test_the_mask_is_what_the_assistant_wrote(templated):
  for turns, response in dialogues():
    ids, mask = text.dialogue_tokens(templated, turns, response)
    written = templated.decode([i for i, m in zip(ids, mask) if m]).split('<|end|>')
    expected = [turn.text for turn in turns if turn.role == 'assistant'] + [response, '']
    assert [said.strip(' ') for said in written] == expected                    # the transcript has a blank before each


def test_ids_of_one_dialogue():
  """Written out: 256 bytes follow five special tokens, in the order of the byte-level alphabet."""
  tokenizer = text.train_tokenizer([], 261)
  byte = lambda said: [5 + ord(c) - ord('!') for c in said]
  ids, mask = text.dialogue_tokens(tokenizer, [user('abc'), assistant('de'), user('f')], 'xy')
  assert ids == [3, *byte('abc'), 4, *byte('de'), 1, 3, *byte('f'), 4, *byte('xy'), 1]
  assert [i for i, m in zip(ids, mask) if m] == [*byte('de'), 1, *byte('xy'), 1]


@pytest.mark.parametrize('response, kept', [('', ''), ('so<|end|>and more', 'so'), ('<|end|>', '')])
def test_a_response_ends_at_its_first_end_token(tokenizer, response, kept):
  prompt = text.prompt_tokens(tokenizer, [user('hm')])
  ids, _ = text.dialogue_tokens(tokenizer, [user('hm')], response)
  assert ids[len(prompt):] == tokenizer(kept)['input_ids'] + [tokenizer.eos_token_id]


def test_a_template_that_rewrites_history_is_refused(tokenizer, monkeypatch):
  monkeypatch.setattr(tokenizer, 'chat_template', COUNTING)
  with pytest.raises(DataError, match=r"renders the prompt 'where to' differently once a response follows.*only appends"):
    text.dialogue_tokens(tokenizer, [user('where to')], 'there')


def test_padding_falls_back_to_the_end_token(tokenizer):
  assert text.pad_token(tokenizer) == 0
  assert text.pad_token(_bare(tokenizer, eos_token='<|end|>')) == 1


def test_a_model_must_hold_the_ids_of_the_tokenizer(tokenizer):
  text.check_vocabulary(tokenizer, policy=ModelConfig(vocab_size=280), reward=ModelConfig(vocab_size=280, layers=1))
  with pytest.raises(ConfigError, match=r'the reward model has a vocabulary of 279, but the tokenizer has ids up to 279. '
                                        r'Use a model with vocab_size >= 280'):
    text.check_vocabulary(tokenizer, policy=ModelConfig(vocab_size=280), reward=ModelConfig(vocab_size=279))
  with pytest.raises(ConfigError, match=r"must share a vocabulary, but {'policy': 304, 'reward': 280}"):
    text.check_vocabulary(tokenizer, policy=ModelConfig(vocab_size=304), reward=ModelConfig(vocab_size=280))


def test_ids_outside_the_vocabulary_are_refused():
  text.check_tokens([[0, 279]], 280)
  with pytest.raises(DataError, match=r'tokens hold the id 280, outside the vocabulary of 280 \(ids 0 to 279\)'):
    text.check_tokens([[0, 280]], 280)
  with pytest.raises(DataError, match=r'prompts of a.jsonl hold the id -1'):
    text.check_tokens([5, -1], 280, 'prompts of a.jsonl')


def test_rows_are_padded_on_either_side():
  array, valid = text.pad_left([[7, 8], [], [9, 9, 9]], 3, 1)
  assert array.tolist() == [[1, 7, 8], [1, 1, 1], [9, 9, 9]]
  assert valid.tolist() == [[False, True, True], [False] * 3, [True] * 3]
  array, valid = text.pad_right([[7, 8], []], 3, 1)
  assert array.tolist() == [[7, 8, 1], [1, 1, 1]]
  assert valid.tolist() == [[True, True, False], [False] * 3]


class TestLoad:
  def test_a_saved_tokenizer_comes_back(self, tokenizer, tmp_path):
    text.save_tokenizer(tokenizer, tmp_path / 'a' / 'b')
    loaded = text.load_tokenizer(tmp_path / 'a' / 'b')
    turns = [user('the cat?'), assistant('sat'), user('雨')]
    assert loaded.chat_template == text.TURN_TEMPLATE
    assert text.dialogue_tokens(loaded, turns, 'on 42') == text.dialogue_tokens(tokenizer, turns, 'on 42')

  def test_without_a_template_it_writes_transcripts(self, tokenizer, tmp_path):
    text.save_tokenizer(_bare(tokenizer, eos_token='<|end|>'), tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    turns = [Turn('system', 'be kind'), user('hi'), assistant('yo'), user('why')]
    assert loaded.decode(text.prompt_tokens(loaded, turns)) == (
      '\n\nSystem: be kind\n\nHuman: hi\n\nAssistant: yo<|end|>\n\nHuman: why\n\nAssistant:')
    assert loaded.decode(text.dialogue_tokens(loaded, turns, 'so')[0]).endswith('\n\nAssistant: so<|end|>')

  def test_without_an_end_token_no_response_could_end(self, tokenizer, tmp_path):
    text.save_tokenizer(_bare(tokenizer), tmp_path)
    with pytest.raises(ConfigError, match=r'has no end token, so no response could end. Set eos_token'):
      text.load_tokenizer(tmp_path)

  @pytest.mark.parametrize('make', [lambda path: path / 'absent', lambda path: path], ids=['missing', 'empty'])
  def test_a_directory_without_one_says_so(self, tmp_path, make):
    with pytest.raises(DataError, match=r"no tokenizer at '.*'.* Pass a directory that holds tokenizer.json"):
      text.load_tokenizer(make(tmp_path))


def test_a_prompt_reads_as_its_turns_a_line_each(tmp_path):
  tokenizer = text.train_tokenizer(['how are you', 'fine, thanks'], 300)
  text.save_tokenizer(tokenizer, tmp_path)
  turns = [Turn('user', 'how are you?'), Turn('assistant', 'fine'), Turn('user', 'and now?')]
  for one in (tokenizer, text.load_tokenizer(tmp_path)):
    assert text.prompt_text(one, text.prompt_tokens(one, turns)) == 'how are you?\nfine\nand now?'
