"""A model directory as people start from: a random Llama whose tokenizer and template are those of
a Qwen2.5 base model.

Turns end with <|im_end|>, while the tokenizer's end and pad token is <|endoftext|>, which the
generation config names too; a conversation without a system turn gets one.
"""

import json

import jax
import numpy as np
import tokenizers
import transformers

from rlhf_jax.data import text
from rlhf_jax.model import huggingface
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.heads import LanguageModel, initial_params

SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TEMPLATE = (
  "{% if messages[0].role != 'system' %}"
  "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
  "{% for m in messages %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SIZES = ModelConfig(vocab_size=400, width=16, layers=1, query_heads=2, kv_heads=1, head_width=8,
                    feedforward_width=24, context_length=256)


def make_tokenizer(texts, vocab_size=SIZES.vocab_size - 8):
  """A byte-level BPE trained on the texts; the model has a few rows more."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token=SPECIAL[0], pad_token=SPECIAL[0], chat_template=TEMPLATE)


def make_directory(path, texts):
  """(path, parameters): the model written there."""
  params = jax.tree.map(np.asarray, initial_params(LanguageModel(SIZES), jax.random.key(5)))
  huggingface.save(path, SIZES, params, kind='language', end_token=0, pad_token=0)
  assert json.loads((path / 'generation_config.json').read_text())['eos_token_id'] == 0
  text.save_tokenizer(make_tokenizer(texts), path)
  return path, params
