"""What a transformer is made of, as data: one frozen dataclass for every family, and presets by name.

A family is a choice of fields, not a class. `huggingface.py` translates these fields from and to `config.json`.
"""

import dataclasses
from typing import Literal

from rlhf_jax.axes import axes_of
from rlhf_jax.errors import ConfigError, check_choices
from rlhf_jax.model.device import Device


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched to a longer context: 'linear' (all by `factor`) or 'llama3' (the slow ones)."""
  kind: Literal['linear', 'llama3'] = 'linear'
  factor: float = 1.0  # by how much the context grows
  low_frequency_factor: float = 1.0  # llama3: below original_context / this many turns, divide by the whole factor
  high_frequency_factor: float = 4.0  # llama3: above original_context / this many turns, leave alone
  original_context: int = 8192  # llama3: tokens of context before the stretch

  def __post_init__(self):
    check_choices(self)
    if self.factor <= 0 or not 0 < self.low_frequency_factor < self.high_frequency_factor:
      raise ConfigError(f'rope scaling factor={self.factor}, low_frequency_factor={self.low_frequency_factor}, '
                        f'high_frequency_factor={self.high_frequency_factor}. Factors must be positive, low below high.')


REMAT_SWITCH = {True: 'block', False: 'none'}  # what remat=True means, and the flag --remat alone


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of one transformer. Sizes are named by the letters that `size` gives for them."""
  family: Literal['gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3'] = 'llama'  # names its Hugging Face format
  vocab_size: int = 512  # V
  width: int = 64  # D, of the residual stream
  layers: int = 2  # L
  query_heads: int = 4  # N
  kv_heads: int = 4  # K, divides N
  head_width: int = 16  # H
  feedforward_width: int = 192  # F
  context_length: int = 1024  # most tokens of a sequence
  norm: Literal['rms', 'layer'] = 'rms'  # layer: mean removed, with a bias
  norm_epsilon: float = 1e-5  # added to the variance
  position: Literal['rope', 'learned'] = 'rope'  # how the model knows where a token stands
  rope_base: float = 10000.0  # slowest wavelength is about 2 pi times this
  rope_share: float = 1.0  # of the head width that is rotated
  rope_scaling: RopeScaling | None = None  # stretch to a longer context
  activation: Literal['silu', 'gelu', 'gelu_tanh'] = 'silu'  # of the feed-forward
  gated: bool = True  # feed-forward is activation(gate) * up
  qkv_bias: bool = False  # biases on queries, keys and values
  output_bias: bool = False  # bias after attention
  feedforward_bias: bool = False  # biases in the feed-forward
  parallel_residual: bool = False  # attention and feed-forward read the same stream
  qk_norm: bool = False  # RMS norm on every query and key head
  tied: bool = False  # the unembedding is the embedding
  window: int | None = None  # tokens that a query sees, itself included; None is all before it
  # How it is run. None of these changes what is computed, up to rounding: `running.py` has what
  # 'auto' and None become on a device.
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and products; parameters are always float32
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'  # the kernel
  remat: Literal['auto', 'none', 'dots', 'block'] = 'auto'  # what the backward pass computes again
  scan_layers: bool | None = None  # one compiled block for all layers; None: where that pays
  tokens_per_chunk: int | None = None  # tokens that a device unembeds at once; None: by its memory
  device: Device | None = None  # that it is compiled for; None: the first of this process

  def __post_init__(self):
    object.__setattr__(self, 'remat', REMAT_SWITCH.get(self.remat, self.remat))
    check_choices(self)
    for name in ('vocab_size', 'width', 'layers', 'query_heads', 'kv_heads', 'head_width', 'feedforward_width',
                 'context_length', 'tokens_per_chunk'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ConfigError(f'model {name}={getattr(self, name)}. It must be at least 1.')
    if self.attention == 'cudnn' and self.dtype != 'bfloat16':
      raise ConfigError(f"model attention='cudnn' with dtype={self.dtype!r}. The kernel needs dtype 'bfloat16'.")
    if self.query_heads % self.kv_heads:
      raise ConfigError(f'model query_heads={self.query_heads} is not a multiple of kv_heads={self.kv_heads}. '
                        'Each key/value head serves the same number of query heads.')
    if self.position == 'rope' and (self.rotated_width % 2 or not 0 < self.rope_share <= 1):
      raise ConfigError(f'rope_share={self.rope_share} of head_width={self.head_width} rotates {self.rotated_width} '
                        'numbers. It must be an even count, and a share between 0 and 1.')
    if self.window is not None and self.window < 1:
      raise ConfigError(f'model window={self.window}. It must be at least 1 token, or None for no window.')

  @property
  def rotated_width(self):
    """How many of the H numbers of a head are rotated."""
    return int(self.head_width * self.rope_share)

  def size(self, letter):
    """How long an axis of a weight is."""
    return {'V': self.vocab_size, 'D': self.width, 'L': self.layers, 'N': self.query_heads, 'K': self.kv_heads,
            'H': self.head_width, 'F': self.feedforward_width, 'T': self.context_length}[letter]

  def shape(self, name):
    """The shape that the suffix of a weight's name says, e.g. (D, N, H) for 'q_DNH'."""
    return tuple(self.size(letter) for letter in axes_of(name))


def _llama(vocab_size, width, layers, query_heads, kv_heads, feedforward_width, context_length, **more):
  return ModelConfig(vocab_size=vocab_size, width=width, layers=layers, query_heads=query_heads, kv_heads=kv_heads,
                     head_width=more.pop('head_width', width // query_heads), feedforward_width=feedforward_width,
                     context_length=context_length, **more)


def _gpt2(width, layers, heads, vocab_size=50257, context_length=1024):
  return ModelConfig(family='gpt2', vocab_size=vocab_size, width=width, layers=layers, query_heads=heads,
                     kv_heads=heads, head_width=width // heads, feedforward_width=4 * width,
                     context_length=context_length, norm='layer', position='learned', activation='gelu_tanh',
                     gated=False, qkv_bias=True, output_bias=True, feedforward_bias=True, tied=True)


def _pythia(width, layers, heads, vocab_size=50304):
  return ModelConfig(family='gpt_neox', vocab_size=vocab_size, width=width, layers=layers, query_heads=heads,
                     kv_heads=heads, head_width=width // heads, feedforward_width=4 * width, context_length=2048,
                     norm='layer', rope_share=0.25, activation='gelu', gated=False, qkv_bias=True, output_bias=True,
                     feedforward_bias=True, parallel_residual=True)


_LLAMA3 = {'rope_base': 500000.0, 'norm_epsilon': 1e-5}
_LLAMA31 = RopeScaling('llama3', factor=8.0)
_LLAMA32 = RopeScaling('llama3', factor=32.0)
_QWEN2 = {'family': 'qwen2', 'qkv_bias': True, 'rope_base': 1e6, 'norm_epsilon': 1e-6}
_QWEN3 = {'family': 'qwen3', 'qk_norm': True, 'rope_base': 1e6, 'norm_epsilon': 1e-6, 'head_width': 128}

PRESETS = {
  'nano': _llama(640, 64, 2, 4, 2, 128, 512),
  'micro': _llama(1024, 64, 3, 4, 2, 192, 512),
  'tiny': _llama(2048, 128, 3, 4, 2, 352, 1024),
  'small': _llama(4096, 256, 4, 4, 4, 688, 1024),
  'medium': _llama(16384, 512, 8, 8, 4, 1376, 2048),
  'gpt2': _gpt2(768, 12, 12),
  'gpt2-medium': _gpt2(1024, 24, 16),
  'gpt2-large': _gpt2(1280, 36, 20),
  'gpt2-xl': _gpt2(1600, 48, 25),
  'pythia-70m': _pythia(512, 6, 8),
  'pythia-160m': _pythia(768, 12, 12),
  'pythia-410m': _pythia(1024, 24, 16),
  'pythia-1b': _pythia(2048, 16, 8),
  'pythia-1.4b': _pythia(2048, 24, 16),
  'pythia-2.8b': _pythia(2560, 32, 32),
  'pythia-6.9b': _pythia(4096, 32, 32, vocab_size=50432),
  'llama2-7b': _llama(32000, 4096, 32, 32, 32, 11008, 4096),
  'llama3-8b': _llama(128256, 4096, 32, 32, 8, 14336, 8192, **_LLAMA3),
  'llama3.1-8b': _llama(128256, 4096, 32, 32, 8, 14336, 131072, rope_scaling=_LLAMA31, **_LLAMA3),
  'llama3.1-70b': _llama(128256, 8192, 80, 64, 8, 28672, 131072, rope_scaling=_LLAMA31, **_LLAMA3),
  'llama3.2-1b': _llama(128256, 2048, 16, 32, 8, 8192, 131072, rope_scaling=_LLAMA32, tied=True, **_LLAMA3),
  'llama3.2-3b': _llama(128256, 3072, 28, 24, 8, 8192, 131072, rope_scaling=_LLAMA32, tied=True, **_LLAMA3),
  'mistral-7b': _llama(32000, 4096, 32, 32, 8, 14336, 32768, family='mistral', window=4096),
  'qwen2-0.5b': _llama(151936, 896, 24, 14, 2, 4864, 131072, tied=True, **_QWEN2),
  'qwen2-7b': _llama(152064, 3584, 28, 28, 4, 18944, 131072, **_QWEN2),
  'qwen3-0.6b': _llama(151936, 1024, 28, 16, 8, 3072, 40960, tied=True, **_QWEN3),
  'qwen3-8b': _llama(151936, 4096, 36, 32, 8, 12288, 40960, **_QWEN3),
}


def preset(name, **changes):
  """The ModelConfig of that name, with fields replaced; raises ConfigError that lists the names."""
  if name not in PRESETS:
    raise ConfigError(f'there is no model preset {name!r}. Choose one of: {", ".join(PRESETS)}.')
  return dataclasses.replace(PRESETS[name], **changes)
