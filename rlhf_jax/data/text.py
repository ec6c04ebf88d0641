"""Tokenizers, from a directory, a hub id or trained on the spot; the chat templates that we bring;
padding.

Next: `chat.py`, which makes tokens of conversations.
"""

import copy
import pathlib
import re

import numpy as np

from rlhf_jax.data.templates import plain_jinja
from rlhf_jax.errors import ConfigError, DataError

# The transcript form of Anthropic's HH data, for tokenizers that bring no template of their own.
TRANSCRIPT_TEMPLATE = (
  "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '\n\nAssistant:' }}"
  "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
  "{% else %}{{ '\n\n' + ('Human' if m['role'] == 'user' else 'System') + ': ' + m['content'] }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")

# Prompts as they are and a space before each response, for tasks whose prompts say all (TL;DR).
PLAIN_TEMPLATE = (
  "{% for m in messages %}{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
  "{% else %}{{ m['content'] }}{% endif %}{% endfor %}")

# One token a side, for tokenizers that we train.
TURN_TEMPLATE = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
  "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
  "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

_TOKENIZER_FILES = ('tokenizer*.json', 'tokenizer*.model', 'vocab.*', '*.gguf')
_SPECIAL = ('<|pad|>', '<|end|>', '<|system|>', '<|user|>', '<|assistant|>')


def train_tokenizer(texts, vocab_size):
  """A byte-level BPE of `vocab_size` tokens trained on texts, with pad, end and one token a role; a fast tokenizer."""
  import tokenizers
  import transformers
  if vocab_size < 256 + len(_SPECIAL):
    raise ConfigError(f'a byte-level tokenizer of {vocab_size} tokens. It needs at least {256 + len(_SPECIAL)}: '
                      f'256 bytes and {len(_SPECIAL)} special tokens. Raise the vocabulary size of the model.')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(_SPECIAL), show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token='<|pad|>', eos_token='<|end|>',
                                              chat_template=TURN_TEMPLATE, padding_side='left')


def load_tokenizer(path):
  """The tokenizer of a local directory or hub id; one without a chat template gets the transcript template.

  Raises DataError where there is none, ConfigError where it has no end token.
  """
  import transformers
  here = pathlib.Path(path)
  if here.is_dir() and not any(any(here.glob(pattern)) for pattern in _TOKENIZER_FILES):
    raise DataError(f'no tokenizer at {str(path)!r}: none of its files is one. Pass a directory '
                    'that holds tokenizer.json and tokenizer_config.json, or a hub id.')
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  except (OSError, ValueError) as error:
    raise DataError(f'no tokenizer at {str(path)!r}: {_first_line(error)} Pass a directory that holds tokenizer.json '
                    'and tokenizer_config.json, or a hub id.') from error
  if tokenizer.eos_token_id is None:
    raise ConfigError(f'the tokenizer of {str(path)!r} has no end token, so no response could end. Set eos_token in its '
                      'tokenizer_config.json.')
  if tokenizer.chat_template is None:
    tokenizer.chat_template = with_begin(TRANSCRIPT_TEMPLATE, tokenizer)
  return tokenizer


def with_begin(template, tokenizer):
  """A template that is not the tokenizer's own, with the begin token in front where the tokenizer
  puts it before a text.

  Models of such tokenizers (Llama, Mistral) have never seen a text without it.
  """
  ids = tokenizer('a')['input_ids']
  begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
  return '{{ bos_token }}' + template if begins and 'bos_token' not in template else template


def check_vocabulary(tokenizer, **configs):
  """Raises ConfigError where a model's vocabulary cannot hold the tokenizer's ids, or where two models' differ."""
  largest = max(tokenizer.get_vocab().values()) + 1
  sizes = {name: config.vocab_size for name, config in configs.items()}
  for name, size in sizes.items():
    if size < largest:
      raise ConfigError(f'the {name} model has a vocabulary of {size}, but the tokenizer has ids up to {largest - 1}. '
                        f'Use a model with vocab_size >= {largest}, or the tokenizer that belongs to it.')
  if len(set(sizes.values())) > 1:
    raise ConfigError(f'models of one run must share a vocabulary, but {sizes}. They read and score the same token ids.')


def check_tokens(tokens, vocab_size, what='tokens'):
  """Raises DataError where an id lies outside the vocabulary; JAX would clamp it without a word."""
  tokens = np.asarray(tokens)
  bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
  if bad.size:
    raise DataError(f'{what} hold the id {bad[0]}, outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1}). '
                    'The tokenizer does not belong to this model.')


def pad_right(rows, length, value):
  """Rows of different length as an array [len(rows), length], and which slots are real."""
  return _padded(rows, length, value, left=False)


def pad_left(rows, length, value):
  """The same with the padding in front."""
  return _padded(rows, length, value, left=True)


def _padded(rows, length, value, left):
  array, valid = np.full((len(rows), length), value), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    where = slice(length - len(row), length) if left else slice(0, len(row))
    array[i, where], valid[i, where] = row, True
  return array, valid


def _first_line(error):
  return re.split(r'\n|(?<=\.)\s', str(error).strip())[0]


def save_tokenizer(tokenizer, directory):
  """The tokenizer's files, as `load_tokenizer` reads them."""
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  tokenizer.save_pretrained(directory)


def export_tokenizer(tokenizer, directory, padding_side):
  """The tokenizer's files beside an exported model: its template without the marks that only
  transformers reads.

  Rows to be scored are padded on the right: transformers counts the positions of a padded row from
  its first slot.
  """
  exported = copy.deepcopy(tokenizer)
  exported.chat_template = plain_jinja(tokenizer.get_chat_template())
  # Only what is in init_kwargs is always saved.
  exported.padding_side = exported.init_kwargs['padding_side'] = padding_side
  save_tokenizer(exported, directory)
