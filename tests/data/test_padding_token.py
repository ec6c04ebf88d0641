"""A pad token that ends nothing: which one it is, and that transformers then scores as we do.

No other id may move and no text may get other tokens, in memory and through the files.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from families import FAMILIES
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from rlhf_jax.data.padding_token import PAD_TOKEN, with_pad_token
from rlhf_jax.data.text import pad_right, train_tokenizer
from rlhf_jax.errors import ConfigError
from rlhf_jax.model import forward, huggingface
from rlhf_jax.model.heads import ScalarModel, initial_params

CORPUS = ['the cat sat on the mat. the dog sat on the cat.',
          'what is the answer? it is 42.\n\nthank you!',
          'naïve ÿ façade 雨 <|pad|> <unk> padding'] * 5
END = '<|endoftext|>'
BYTES_OF_FALLBACK = [f'<0x{byte:02X}>' for byte in range(256)]
RESERVED = ['<|begin|>', '<|end|>', '<|image_pad|>', '<|reserved_special_token_0|>',
            '<|reserved_special_token_1|>']


# ---------------------------------------------------------------------------------- the tokenizers

def _trained(pre_tokenizer, special=(), alphabet=()):
  """(vocabulary, merges) of a BPE trained on the corpus, special tokens first."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizer
  bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
    vocab_size=len(special) + len(alphabet) + 60, special_tokens=list(special),
    initial_alphabet=list(alphabet), show_progress=False))
  model = json.loads(bpe.to_str())['model']
  return model['vocab'], [tuple(merge) for merge in model['merges']]


def _byte_level(special=()):
  pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return _trained(pre_tokenizer, special, pre_tokenizers.ByteLevel.alphabet())


def gpt2():
  """As GPT-2: the end token is the last of the vocabulary, and begin and unknown token too."""
  vocab, merges = _byte_level()
  return transformers.GPT2Tokenizer(vocab=vocab | {END: len(vocab)}, merges=merges)


def gpt2_generic():
  """The same as a class that reads tokenizer.json as it is."""
  return transformers.PreTrainedTokenizerFast(tokenizer_object=gpt2().backend_tokenizer,
                                              eos_token=END, bos_token=END)


def pythia(**changes):
  """As Pythia: the end token comes first, and runs of spaces were added behind the vocabulary."""
  vocab, merges = _byte_level([END])
  changes = {'pad_token': None} | changes
  tokenizer = transformers.GPTNeoXTokenizer(vocab=vocab, merges=merges, **changes)
  tokenizer.add_tokens([AddedToken(' ' * count, normalized=True, special=False)
                        for count in range(6, 2, -1)])
  return tokenizer


def llama2():
  """As Llama 2: SentencePiece with a space in front, bytes to fall back to, no pad token."""
  special = ['<unk>', '<s>', '</s>', *BYTES_OF_FALLBACK]
  vocab, merges = _trained(pre_tokenizers.Metaspace(), special)
  return transformers.LlamaTokenizer(vocab=vocab, merges=merges)


def unigram(fallback=True):
  """The same with pieces that have scores, as SentencePiece's own models."""
  pieces = ['<unk>', '<s>', '</s>', '▁', '▁the', '▁cat', *'catdoghes.']
  pieces += BYTES_OF_FALLBACK if fallback else []
  scored = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
  backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=fallback))
  backend.normalizer = normalizers.NFKC()
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>',
                                              bos_token='<s>', eos_token='</s>')


def llama3(special=RESERVED):
  """As Llama 3: a byte-level BPE that takes whole words first, and special tokens behind it."""
  vocab, merges = _byte_level()
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(r'\s?\w+|[^\w\s]+|\s+'), behavior='isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(special)
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<|begin|>',
                                              eos_token='<|end|>')


def pythia_with_padding():
  """As Pythia's tokenizer is read by transformers 5, whose class has a pad token."""
  return pythia(pad_token='<|padding|>')


def unigram_without_bytes():
  return unigram(fallback=False)


def llama31():
  return llama3([*RESERVED, '<|finetune_right_pad_id|>'])


def trained():
  """One of ours, which has a pad token."""
  return train_tokenizer(CORPUS, 290)


# name: (tokenizer, rows of the model beyond its tokens, the pad token, the family of the model)
CASES = {
  'gpt2': (gpt2, 0, PAD_TOKEN, 'gpt2'),
  'gpt2, generic class': (gpt2_generic, 0, PAD_TOKEN, 'gpt2'),
  'gpt2, spare rows': (gpt2, 5, PAD_TOKEN, 'gpt2'),
  'pythia': (pythia, 3, PAD_TOKEN, 'gpt_neox'),
  'pythia, no spare row': (pythia, 0, PAD_TOKEN, 'gpt_neox'),
  'pythia, its own pad token': (pythia_with_padding, 0, '<|padding|>', 'gpt_neox'),
  'llama 2': (llama2, 0, '<unk>', 'llama'),
  'unigram': (unigram, 0, '<unk>', 'llama'),
  'unigram without bytes': (unigram_without_bytes, 1, PAD_TOKEN, 'llama'),
  'llama 3': (llama3, 0, '<|reserved_special_token_0|>', 'llama3'),
  'llama 3.1': (llama31, 7, '<|finetune_right_pad_id|>', 'llama3'),
  'trained': (trained, 0, '<|pad|>', 'qwen3'),
}


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(tokenizer read from its files, rows of the model, end tokens, the pad token to be, family)."""
  make, spare, pad, family = CASES[request.param]
  directory = tmp_path_factory.mktemp('tokenizer')
  make().save_pretrained(directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  return tokenizer, len(tokenizer) + spare, (tokenizer.eos_token_id,), pad, family


# ---------------------------------------------------------------------------- what it must not do

def _texts():
  """Texts that people write and that they do not, the names of special tokens among them."""
  rng = random.Random(7)
  random_bytes = [rng.randbytes(rng.randint(1, 40)) for _ in range(60)]
  characters = [chr(point) for point in range(0x3000) if not chr(point).isspace()]
  return [
    *CORPUS[:3], '', ' ', '  two   three    four     five      six\n\n\t', 'ÿ', 'ÿÿ ÿ',
    'ÀÁõö÷øùúûüýþÿ', 'À la carte', 'e\u0301 \u00e9', '雨 ☂ 👩‍👩‍👧 🏳️‍🌈', '\x00\x7f\ufffd\uffff',
    '<|pad|>', 'a<|pad|>b <pad> [PAD]', '<|padding|>', '<unk>', 'a<unk>b', '<s>x</s>', f'x{END}y',
    '<|end|><|reserved_special_token_0|> <|reserved_special_token_1|>', '<0xFF>', '▁',
    ''.join(map(chr, range(0x80, 0x100))),
    *(sample.decode('latin-1') for sample in random_bytes),
    *(sample.decode(errors='replace') for sample in random_bytes),
    *(''.join(rng.choices(characters, k=12)) for _ in range(60))]


def _ids(tokenizer):
  """The ids of every text, with and without what the tokenizer puts around it."""
  return [tokenizer(text, add_special_tokens=whole)['input_ids']
          for text in _texts() for whole in (True, False)]


def _settings(tokenizer):
  return (tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template,
          tokenizer.padding_side, tokenizer.backend_tokenizer.to_str())


def test_no_id_moves_and_files_say_the_same(case, tmp_path):
  tokenizer, rows, end_tokens, pad, _ = case
  before, ids = _settings(tokenizer), _ids(tokenizer)
  padded = with_pad_token(tokenizer, rows, end_tokens)
  assert _settings(tokenizer) == before  # the caller's is as it was
  padded.save_pretrained(tmp_path)
  read = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert type(read) is type(padded) is type(tokenizer)
  for after in (padded, read):
    assert after.pad_token == pad
    assert after.pad_token_id not in end_tokens and 0 <= after.pad_token_id < rows
    assert _ids(after) == ids
    changed = {after.pad_token, tokenizer.convert_ids_to_tokens(after.pad_token_id)}
    kept = {token: i for token, i in before[0].items() if token not in changed}
    assert kept.items() <= after.get_vocab().items()
    named = dict(after.special_tokens_map, pad_token=None)
    assert named == dict(tokenizer.special_tokens_map, pad_token=None)
    assert after.pad_token_id in after.all_special_ids
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert after.decode([after.pad_token_id, *ids[0]], skip_special_tokens=True) == text
  assert read.pad_token_id == padded.pad_token_id and read.get_vocab() == padded.get_vocab()
  assert with_pad_token(read, rows, end_tokens) is read


def test_a_tokenizer_that_has_one_is_returned_as_it_is():
  tokenizer = trained()
  assert with_pad_token(tokenizer, 290, (tokenizer.eos_token_id,)) is tokenizer


# --------------------------------------------------------------------------------- which one it is

def test_a_spare_row_is_taken_before_an_entry_is_renamed():
  tokenizer = gpt2()
  count = len(tokenizer)
  assert with_pad_token(tokenizer, count + 1, [tokenizer.eos_token_id]).pad_token_id == count
  renamed = with_pad_token(tokenizer, count, [tokenizer.eos_token_id])
  assert renamed.pad_token_id == tokenizer.get_vocab()['ÿ'] and len(renamed) == count
  assert renamed.decode(renamed('ÿ')['input_ids']) == 'ÿ'


def _gpt2_with_merges_of(letters):
  """(tokenizer, vocabulary) of a GPT-2 with a merge for each of these characters."""
  vocab, merges = _byte_level()
  for letter in letters:
    merges.append(('Ã', letter))
    vocab['Ã' + letter] = len(vocab)
  return transformers.GPT2Tokenizer(vocab=vocab | {END: len(vocab)}, merges=merges), vocab


def test_only_a_byte_that_is_in_no_text_and_no_merge_is_renamed():
  every_text = ''.join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
  free = [chr(byte) for byte in sorted(set(range(256)) - set(every_text.encode()))]
  assert len(free) == 13
  for kept in free:
    tokenizer, vocab = _gpt2_with_merges_of(letter for letter in free if letter != kept)
    padded = with_pad_token(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    assert padded.pad_token_id == vocab[kept]
  tokenizer, _ = _gpt2_with_merges_of(free)
  with pytest.raises(ConfigError, match=rf'vocabulary of {len(tokenizer)}, and no token to spare'):
    with_pad_token(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def test_a_pad_token_that_also_ends_is_not_taken():
  tokenizer = llama3()
  tokenizer.pad_token = '<|reserved_special_token_0|>'
  end_tokens = tokenizer.convert_tokens_to_ids(['<|end|>', '<|reserved_special_token_0|>'])
  padded = with_pad_token(tokenizer, len(tokenizer), end_tokens)
  assert padded.pad_token == '<|reserved_special_token_1|>'


def test_a_pad_token_beyond_the_vocabulary_is_not_taken():
  tokenizer = llama2()
  rows = len(tokenizer)
  tokenizer.add_special_tokens({'pad_token': '[PAD]'})
  assert tokenizer.pad_token_id == rows
  assert with_pad_token(tokenizer, rows, [2]).pad_token == '<unk>'
  assert with_pad_token(tokenizer, rows + 1, [2]) is tokenizer


def test_a_reserved_token_that_the_template_uses_is_not_taken():
  tokenizer = llama3()
  tokenizer.chat_template = "{{ '<|reserved_special_token_0|>' + messages[0].content }}"
  assert with_pad_token(tokenizer, len(tokenizer), [1]).pad_token == '<|reserved_special_token_1|>'
  tokenizer.bos_token = '<|reserved_special_token_1|>'
  assert with_pad_token(tokenizer, len(tokenizer), [1]).pad_token == PAD_TOKEN


def test_the_last_resort_is_a_special_token_without_a_use():
  """As SmolLM2's: padded with its end token, no row to spare, and every unused byte in a merge."""
  tokenizer, _ = _gpt2_with_merges_of(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))
  tokenizer.add_special_tokens(
    {'additional_special_tokens': ['<turn>', '<repo>'], 'pad_token': END})
  tokenizer.chat_template = "{{ '<turn>' + messages[0].content + eos_token }}"
  padded = with_pad_token(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
  assert (padded.pad_token == '<repo>'
          and padded.pad_token_id == tokenizer.convert_tokens_to_ids('<repo>'))
  assert tokenizer.pad_token == END


def test_an_unknown_token_that_text_needs_is_not_taken():
  tokenizer = unigram_without_bytes()
  assert 0 in tokenizer('雨')['input_ids']
  message = r'pad token None, which is none, .* Set pad_token in its tokenizer_config\.json'
  with pytest.raises(ConfigError, match=message):
    with_pad_token(tokenizer, len(tokenizer), [2])


def test_an_id_that_is_in_use_is_not_given_again():
  vocab, merges = _byte_level()
  last = next(reversed(vocab))
  vocab[END] = len(vocab)
  vocab[last], vocab['gap'] = len(vocab), len(vocab) + 1
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
  assert backend.get_vocab_size() in vocab.values()  # where the library would put a token
  padded = with_pad_token(tokenizer, 1000, [tokenizer.eos_token_id])
  assert padded.pad_token_id == vocab['ÿ'] and len(set(padded.get_vocab().values())) == len(padded)


def test_padding_that_the_file_asks_for_is_by_the_same_token(tmp_path):
  tokenizer = gpt2()
  tokenizer.backend_tokenizer.enable_padding(pad_id=tokenizer.eos_token_id, pad_token=END,
                                             direction='left')
  padded = with_pad_token(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
  padded.save_pretrained(tmp_path)
  padding = json.loads((tmp_path / 'tokenizer.json').read_text())['padding']
  assert (padding['pad_id'], padding['pad_token']) == (padded.pad_token_id, PAD_TOKEN)
  assert padding['direction'] == 'Left'


# --------------------------------------------------------------------------------- the same scores

def _random_params(model, seed=5):
  shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
  numbers = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.asarray(numbers.normal(0.05, 0.2, x.shape), np.float32), shapes)


def _their_scores(directory, tokens_BT, valid_BT):
  """Scores of the exported model as transformers computes them, the bias that it lacks added."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
  tokens_BT, valid_BT = torch.as_tensor(tokens_BT).long(), torch.as_tensor(valid_BT).long()
  with torch.no_grad():
    logits_B1 = model(tokens_BT, attention_mask=valid_BT).logits
  return logits_B1[:, 0].numpy() + model.config.score_bias


def test_transformers_scores_what_we_score(case, tmp_path):
  tokenizer, rows, end_tokens, _, family = case
  config = dataclasses.replace(FAMILIES[family], vocab_size=rows)
  model = ScalarModel(config)
  params = _random_params(model)
  padded = with_pad_token(tokenizer, rows, end_tokens)
  huggingface.save(tmp_path, config, params, kind='scalar', end_token=end_tokens,
                   pad_token=padded.pad_token_id)
  padded.save_pretrained(tmp_path)

  answers = ['the cat sat', 'it is 42.', 'thank you!\n\nthe dog sat on the mat', 'ÿ', '']
  ids = [tokenizer(answer)['input_ids'] + [tokenizer.eos_token_id] for answer in answers]
  tokens_BT, valid_BT = pad_right(ids, max(map(len, ids)), padded.pad_token_id)
  scores_B = np.asarray(forward.scores(model, params, tokens_BT, valid_BT))
  assert np.ptp(scores_B) > 0.01
  their_scores_B = _their_scores(tmp_path, tokens_BT, valid_BT)
  np.testing.assert_allclose(their_scores_B, scores_B, atol=1e-5, rtol=0)
  exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
  batch = exported.pad({'input_ids': ids}, padding_side='right', return_tensors='pt')
  np.testing.assert_array_equal(batch['input_ids'], tokens_BT)
  their_scores_B = _their_scores(tmp_path, batch['input_ids'], batch['attention_mask'])
  np.testing.assert_allclose(their_scores_B, scores_B, atol=1e-5, rtol=0)


def test_padding_with_the_end_token_would_score_a_token_early(tmp_path):
  tokenizer = gpt2()
  config = dataclasses.replace(FAMILIES['gpt2'], vocab_size=len(tokenizer))
  model = ScalarModel(config)
  params = _random_params(model)
  end = tokenizer.eos_token_id
  huggingface.save(tmp_path, config, params, kind='scalar', end_token=end, pad_token=end)
  tokens_BT = np.asarray([[*tokenizer('the cat')['input_ids'], end]])
  valid_BT = np.ones(tokens_BT.shape, bool)
  their_scores_B = _their_scores(tmp_path, tokens_BT, valid_BT)
  early_B = np.asarray(forward.scores(model, params, tokens_BT[:, :-1], valid_BT[:, :-1]))
  np.testing.assert_allclose(their_scores_B, early_B, atol=1e-5, rtol=0)
  scores_B = np.asarray(forward.scores(model, params, tokens_BT, valid_BT))
  assert abs(their_scores_B[0] - scores_B[0]) > 0.01
