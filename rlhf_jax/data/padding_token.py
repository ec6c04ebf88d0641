"""A pad token that is no end token, for tokenizers without one: GPT-2, Pythia, Llama's base models.

`...ForSequenceClassification` of transformers scores the last token of a row that is not the pad
token. Where rows are padded with the end token, as is common, that is the token before the end, and
an exported reward model gives other scores than the one that was trained. Ids must stay as they
are, since each is a row of the model, so the pad token is one that the vocabulary can spare.
Training needs none of this: it masks padding by position.
"""

import copy
import json
import re
from collections.abc import Collection
from itertools import chain
from typing import TYPE_CHECKING

import tokenizers

from rlhf_jax.errors import ConfigError

if TYPE_CHECKING:  # it takes seconds to import
  from transformers import PreTrainedTokenizerFast

# The name of a new pad token. A special token is recognised in text too, so no text should have it.
PAD_TOKEN = '<|rlhf-jax-pad|>'

# Names of special tokens that a vocabulary holds in reserve; those for padding first.
_RESERVED_NAMES = (r'(finetune_)?(right_)?pad(ding)?(_id|_token)?',
                   r'(reserved|unused)(_special)?(_token)?_?\d+')
_RESERVED = [re.compile(rf'<\|?{name}\|?>|\[{name}\]', re.IGNORECASE) for name in _RESERVED_NAMES]

# Bytes that no UTF-8 text contains, as the characters that a byte-level BPE writes for them.
_BYTES_OF_NO_TEXT = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]


def with_pad_token(tokenizer: 'PreTrainedTokenizerFast', vocab_size: int,
                   end_tokens: Collection[int]) -> 'PreTrainedTokenizerFast':
  """A tokenizer whose pad token is no end token and has a row in a model of `vocab_size` rows.

  The pad token is the first of these that there is:

  - its own pad token;
  - its unknown token, if every byte has a token, so that no text needs it (Llama 2);
  - a special token that it holds in reserve (Llama 3);
  - PAD_TOKEN as a new token, if the model has a row to spare (Pythia);
  - PAD_TOKEN as a new name for the entry of a byte that no UTF-8 text contains (GPT-2);
  - any other special token that ends nothing, has no other role and is not in the template: text
    that people write never becomes one (SmolLM2).

  All other tokens keep their ids, and every text without PAD_TOKEN its tokens; saving and loading
  changes neither. The tokenizer itself is returned where its own pad token will do, else a changed
  copy. Raises ConfigError where nothing of the above is possible.
  """
  own = tokenizer.special_tokens_map.get('pad_token')
  usable = {token for token, i in tokenizer.get_vocab().items()
            if i < vocab_size and i not in end_tokens}
  if own in usable:
    return tokenizer
  padded = None
  if tokenizer.is_fast:
    padded = (_with_spared_token(tokenizer, usable, _spared_tokens(tokenizer))
              or _with_new_token(tokenizer, vocab_size)
              or _with_renamed_byte(tokenizer, usable)
              or _with_spared_token(tokenizer, usable - {tokenizer.unk_token},
                                    _special_tokens(tokenizer)))
  if padded is None:
    raise ConfigError(
      f'the tokenizer has the pad token {own!r}, which is none, an end token, or outside the '
      f'vocabulary of {vocab_size}, and no token to spare. transformers scores the last token that '
      'is not the pad token, so it has to differ from the end token. Set pad_token in its '
      'tokenizer_config.json to a token of the vocabulary that no text needs.')
  _pad_alike(padded.backend_tokenizer, padded.pad_token, padded.pad_token_id)
  return padded


def _with_spared_token(tokenizer, usable, candidates):
  """A copy padded with the first of the candidates that has no other use."""
  named = tokenizer.special_tokens_map
  used = {token for role, token in named.items() if role not in ('unk_token', 'pad_token')}
  template = str(tokenizer.chat_template)
  for token in candidates:
    if token in usable and token not in used and token not in template:
      padded = copy.deepcopy(tokenizer)
      padded.pad_token = token
      return padded
  return None


def _spared_tokens(tokenizer):
  """Tokens that no text needs, as far as the vocabulary and their names tell, best first."""
  if _every_byte_has_a_token(_state(tokenizer)):
    yield tokenizer.special_tokens_map.get('unk_token')
  for name in _RESERVED:
    yield from filter(name.fullmatch, _special_tokens(tokenizer))


def _special_tokens(tokenizer):
  """Its special tokens, in the order of their ids."""
  added = sorted(tokenizer.added_tokens_decoder.items())
  return [token.content for _, token in added if token.special]


def _with_new_token(tokenizer, vocab_size):
  """A copy with PAD_TOKEN as one token more, if its id was free and has a row.

  The tokenizers library chooses the id, now and whenever it reads the file: past the added tokens,
  and not below the count of all others. In a vocabulary with gaps another token may have that id.
  """
  ids = tokenizer.get_vocab()
  padded = _with_special_token(copy.deepcopy(tokenizer))
  new = padded.pad_token_id
  return padded if new < vocab_size and new not in ids.values() else None


def _with_renamed_byte(tokenizer, usable):
  """A copy with PAD_TOKEN for the entry of a byte that is in no text, if it has such an entry."""
  state = _state(tokenizer)
  model = state['model']
  if model['type'] != 'BPE' or not _is_byte_level(state) or PAD_TOKEN in tokenizer.get_vocab():
    return None
  needed = set(chain.from_iterable(chain.from_iterable(model['merges'])))
  needed.update(tokenizer.added_tokens_encoder)
  free = [entry for entry in _BYTES_OF_NO_TEXT
          if entry in model['vocab'] and entry in usable and entry not in needed]
  if not free:
    return None
  model['vocab'][PAD_TOKEN] = model['vocab'].pop(free[-1])
  padded = copy.deepcopy(tokenizer)
  padded.backend_tokenizer.model = tokenizers.Tokenizer.from_str(json.dumps(state)).model
  return _with_special_token(padded)


def _with_special_token(tokenizer):
  """The same tokenizer, padded with PAD_TOKEN: the entry of that name, or a new one."""
  token = tokenizers.AddedToken(PAD_TOKEN, special=True, normalized=False)
  tokenizer.add_special_tokens({'pad_token': token})
  return tokenizer


def _pad_alike(backend, token, token_id):
  """Makes the tokenizers library pad by that token where tokenizer.json asks it to pad."""
  if backend.padding is not None:
    backend.enable_padding(**backend.padding | {'pad_token': token, 'pad_id': token_id})


def _state(tokenizer):
  """The contents of tokenizer.json."""
  return json.loads(tokenizer.backend_tokenizer.to_str())


def _is_byte_level(state):
  return any('"ByteLevel"' in json.dumps(state[part]) for part in ('normalizer', 'pre_tokenizer'))


def _every_byte_has_a_token(state):
  """Whether the vocabulary covers every text, so that the unknown token is never used."""
  vocab = state['model']['vocab']
  tokens = set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}  # with scores
  if _is_byte_level(state):
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return tokens >= alphabet - set(_BYTES_OF_NO_TEXT)
  bytes_of_fallback = {f'<0x{byte:02X}>' for byte in range(256)}
  return state['model'].get('byte_fallback', False) and tokens >= bytes_of_fallback
