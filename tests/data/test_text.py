"""Tokenizers that are trained, loaded, saved and exported; templates that we bring; padding."""

import copy

import jinja2
import pytest
import tokenizers
import transformers

from rlhf_jax.data import text
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.examples import Turn
from rlhf_jax.errors import ConfigError, DataError
from rlhf_jax.model.config import ModelConfig
from tests.chat_families import FAMILIES

CORPUS = ['the cat sat on the mat. the dog sat on the cat.', 'what is the answer? the answer is 42.\n\nthank you!'] * 5


@pytest.fixture(scope='module')
def tokenizer():
  return text.train_tokenizer(CORPUS, 280)


def user(said):
  return Turn('user', said)


def assistant(said):
  return Turn('assistant', said)


def _bare(tokenizer, **special):
  """The same vocabulary with no special tokens but these, and no template."""
  return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)


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
    talk = [(*turns, assistant('on 42'))]
    assert open_chat(loaded).conversations(talk) == open_chat(tokenizer).conversations(talk)

  def test_without_a_template_it_writes_transcripts(self, tokenizer, tmp_path):
    text.save_tokenizer(_bare(tokenizer, eos_token='<|end|>'), tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    turns = [Turn('system', 'be kind'), user('hi'), assistant('yo'), user('why')]
    (prompt,), (row,) = (open_chat(loaded).prompts([turns]),
                         open_chat(loaded).conversations([[*turns, assistant('so')]]))
    assert loaded.decode(prompt) == (
      '\n\nSystem: be kind\n\nHuman: hi\n\nAssistant: yo<|end|>\n\nHuman: why\n\nAssistant:')
    assert loaded.decode(row.ids).endswith('\n\nAssistant: so<|end|>')

  def test_without_an_end_token_no_response_could_end(self, tokenizer, tmp_path):
    text.save_tokenizer(_bare(tokenizer), tmp_path)
    with pytest.raises(ConfigError, match=r'has no end token, so no response could end. Set eos_token'):
      text.load_tokenizer(tmp_path)

  @pytest.mark.parametrize('make', [lambda path: path / 'absent', lambda path: path], ids=['missing', 'empty'])
  def test_a_directory_without_one_says_so(self, tmp_path, make):
    with pytest.raises(DataError, match=r"no tokenizer at '.*'.* Pass a directory that holds tokenizer.json"):
      text.load_tokenizer(make(tmp_path))

  def test_without_a_template_a_text_begins_as_the_tokenizer_has_it(self, tmp_path):
    llama = copy.deepcopy(FAMILIES['Llama 2'].tokenizer())
    llama.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', llama.convert_tokens_to_ids('<s>'))])
    llama.chat_template = None
    text.save_tokenizer(llama, tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    assert loaded.chat_template == '{{ bos_token }}' + text.TRANSCRIPT_TEMPLATE
    (row,) = open_chat(loaded).conversations([[user('hi'), assistant('yo')]])
    assert loaded.convert_ids_to_tokens(row.ids)[0] == '<s>'
    assert row.ids.count(loaded.bos_token_id) == 1


class TestBegin:
  def test_it_is_written_where_the_tokenizer_writes_it(self, tokenizer):
    assert text.with_begin('x', tokenizer) == 'x'                                 # it has none
    llama = FAMILIES['Llama 3'].tokenizer()
    assert text.with_begin('x', llama) == '{{ bos_token }}x'
    assert text.with_begin('{{ bos_token }}x', llama) == '{{ bos_token }}x'       # once
    # It has a begin token, and does not write it.
    assert text.with_begin('x', FAMILIES['Llama 2'].tokenizer()) == 'x'


class TestPlainJinja:
  @pytest.mark.parametrize('name', FAMILIES)
  def test_every_jinja_reads_it_and_renders_the_same(self, name):
    family = FAMILIES[name]
    tokenizer = copy.deepcopy(family.tokenizer())
    settings = dict(
      messages=[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b\n'}],
      **tokenizer.special_tokens_map)
    expected = tokenizer.apply_chat_template(settings['messages'], tokenize=False)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(
      text.plain_jinja(tokenizer.chat_template)).render(**settings) == expected
    assert text.plain_jinja(tokenizer.chat_template) == tokenizer.chat_template or family.marked

  @pytest.mark.parametrize('template', [
    'a  {%- generation -%}\n b {%- endgeneration %}\nc',
    'a\n  {%generation%}\nb{%  endgeneration  -%}  c',
    'a {%+ generation %} b {% endgeneration +%}\n c'])
  def test_it_keeps_the_white_space(self, tokenizer, template):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = template
    expected = marked.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(text.plain_jinja(template)).render() == expected


@pytest.mark.parametrize('side', ['left', 'right'])
def test_an_exported_tokenizer_has_the_template_without_marks(tokenizer, tmp_path, side):
  text.export_tokenizer(tokenizer, tmp_path, side)
  exported = text.load_tokenizer(tmp_path)
  assert exported.padding_side == side and tokenizer.padding_side == 'left'
  assert tokenizer.chat_template == text.TURN_TEMPLATE  # this one keeps them
  assert 'generation %}' not in exported.chat_template
  jinja2.Environment().parse(exported.chat_template)
  talk = [(user('the cat?'), assistant('sat'), user('雨'), assistant('on 42'))]
  (row,), (original,) = (open_chat(exported).conversations(talk),
                         open_chat(tokenizer).conversations(talk))
  assert row == original
