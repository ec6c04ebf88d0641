"""Tokenizers of the kinds that chat models have, trained on a few sentences."""

import functools
import json

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
  'the sky is blue and the grass is green',
  'what is the colour of the cat? black, says the user.',
  'be brief',
  'hello! print this, and say it now:\n    if x:\n        return 42\n\n',
  '### Instruction: answer ### Response: hello',
  'User: hello\n\nAssistant: the cat sat on the mat.\n',
  'system user assistant model think short is best',
] * 3
# The pattern by which Llama 3 and Qwen split texts into words.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@functools.cache
def tokenizer_of(template, kind, special, bos, added):
  """A fast tokenizer with these special tokens, of which the first is the end token."""
  inner = tokenizers.Tokenizer.from_str(_vocabulary(kind))
  unknown = [token for token in ('<unk>',) if inner.token_to_id(token) is not None]
  for number, token in enumerate(special):  # others stand between, so numbers of tokens have gaps
    inner.add_tokens([tokenizers.AddedToken(f'<other{number}>', special=False, normalized=False)])
    inner.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
  inner.add_tokens(
    [tokenizers.AddedToken(token, special=False, normalized=False) for token in added]
  )
  if kind == 'bytes trimmed':
    inner.post_processor = processors.Sequence(
      [
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(
          single=f'{bos} $A', special_tokens=[(bos, inner.token_to_id(bos))]
        ),
      ]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    chat_template=template,
    eos_token=special[0],
    bos_token=bos,
    extra_special_tokens=list(special),
    **({'unk_token': '<unk>'} if unknown else {}),
  )


@functools.cache
def _vocabulary(kind):
  """A trained tokenizer of a kind, as JSON, without special tokens."""
  if kind.startswith('bytes'):
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == 'bytes trimmed'))
    inner.decoder = decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind != 'bytes':
      inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
          pre_tokenizers.Split(tokenizers.Regex(_WORDS), 'isolated'),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
      )
    if kind == 'bytes composed':
      inner.normalizer = normalizers.NFC()
    inner.train_from_iterator(
      CORPUS,
      trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
      ),
    )
    return inner.to_str()
  return _SENTENCE_PIECES[kind]()


def _with_bytes(inner):
  """The JSON of a BPE or Unigram: special tokens, 256 bytes, then the pieces that it learned."""
  settings = json.loads(inner.to_str())
  model, control = settings['model'], ['<unk>', '<s>', '</s>']
  first = [*control, *(f'<0x{byte:02X}>' for byte in range(256))]
  if model['type'] == 'Unigram':
    pieces = [piece for piece in model['vocab'] if piece[0] not in control]
    lowest = min(score for _, score in pieces)
    model['vocab'] = [[name, lowest - 10] for name in first] + pieces
    model['unk_id'] = 0
  else:
    pieces = sorted((name for name in model['vocab'] if name not in control),
                    key=model['vocab'].get)
    model['vocab'] = {name: number for number, name in enumerate([*first, *pieces])}
    model |= {'unk_token': '<unk>', 'fuse_unk': True}
  model['byte_fallback'] = True
  settings['added_tokens'] = []
  return json.dumps(settings)


def _llama():
  """As Llama 2: a space before every piece of text, also behind a special token."""
  inner = tokenizers.Tokenizer(models.BPE())
  inner.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  inner.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  words = tokenizers.Regex('(?<=[^▁\n])(?=[▁\n])')
  inner.pre_tokenizer = pre_tokenizers.Split(words, 'isolated')  # to learn words, then taken out
  inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
  settings = json.loads(_with_bytes(inner))
  return json.dumps(settings | {'pre_tokenizer': None})


def _first():
  """As Mistral v0.3: a space before the text, not behind a special token."""
  settings = json.loads(_llama())
  inner = tokenizers.Tokenizer.from_str(json.dumps(settings | {'normalizer': None}))
  inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  return inner.to_str()


def _always():
  """As T5: a Unigram, a space before every piece of text that has none."""
  inner = tokenizers.Tokenizer(models.Unigram())
  inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  inner.train_from_iterator(
    CORPUS,
    trainers.UnigramTrainer(
      vocab_size=120, show_progress=False, unk_token='<unk>', special_tokens=['<unk>']
    ),
  )
  inner.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme='always')]
  )
  return _with_bytes(inner)


def _gemma():
  """As Gemma: spaces are pieces, none is added."""
  settings = json.loads(_llama())
  inner = tokenizers.Tokenizer.from_str(json.dumps(settings | {'normalizer': None}))
  inner.normalizer = normalizers.Replace(' ', '▁')
  inner.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return inner.to_str()


_SENTENCE_PIECES = {'llama': _llama, 'first': _first, 'always': _always, 'gemma': _gemma}
# Kinds whose decoded text may have other spaces beside special tokens.
ADDS_SPACES = ('llama', 'first', 'always')
