"""`config.json` of Hugging Face, both ways: one record of names and facts a family, read from and written with.

Reading accepts what transformers 4 writes (`rope_theta`, `rope_scaling`, `torch_dtype`) and what 5 writes
(`rope_parameters`, `dtype`); writing gives both, so old and new readers understand it. An option that changes the
numbers and that `ModelConfig` cannot say is a ConfigError. Dropout is ignored, since no model here has any, and so is
the dtype of the files, since the compute dtype is the caller's choice. Read next: `huggingface.py`, for the tensors.
"""

import dataclasses
from typing import Any, NamedTuple

from rlhf_jax.errors import ConfigError
from rlhf_jax.model.config import ModelConfig, RopeScaling

KINDS = ('language', 'scalar')
# Of ModelConfig: how it runs, not what it is.
RUNTIME_FIELDS = ('dtype', 'attention', 'remat', 'scan_layers', 'tokens_per_chunk', 'device')
DTYPES = ('float32', 'bfloat16')


class _Family(NamedTuple):
  """What the format of one family calls our fields, and what it leaves unsaid."""
  classes: tuple[str, str]  # in transformers: the language model, the model of one score
  fields: dict[str, str]  # our field -> their key, for values that carry over; two of ours may share a key
  fixed: dict[str, Any]  # our fields that every model of the family shares
  absent: dict[str, Any]  # their key -> what transformers takes it to be where config.json lacks it
  refused: dict[str, Any] = {}  # their key -> the one value of it that we compute
  rope: tuple[str, str | None] | None = ('rope_theta', None)  # their keys of base and share; None: no rotary positions
  windowed: bool = False  # may have a sliding window
  window_switch: bool = False  # the window needs `use_sliding_window`, and `max_window_layers` do without it
  written: dict[str, Any] = {}  # more keys, written and never read


_SIZES = {'vocab_size': 'vocab_size', 'width': 'hidden_size', 'layers': 'num_hidden_layers',
          'query_heads': 'num_attention_heads', 'feedforward_width': 'intermediate_size',
          'context_length': 'max_position_embeddings', 'activation': 'hidden_act', 'tied': 'tie_word_embeddings'}
_MODERN = _SIZES | {'kv_heads': 'num_key_value_heads', 'head_width': 'head_dim', 'norm_epsilon': 'rms_norm_eps'}
_MODERN_FIXED = {'norm': 'rms', 'position': 'rope', 'gated': True, 'parallel_residual': False}
_NO_BIAS = {'qkv_bias': False, 'output_bias': False, 'feedforward_bias': False}
_ALL_BIAS = dict.fromkeys(_NO_BIAS, True)
_OLD_FIXED = {'norm': 'layer', 'gated': False, 'qk_norm': False}
_ATTENTION_BIAS = {'qkv_bias': 'attention_bias', 'output_bias': 'attention_bias'}
_ABSENT = {'num_key_value_heads': None, 'head_dim': None, 'hidden_act': 'silu', 'tie_word_embeddings': False,
           'rms_norm_eps': 1e-6, 'attention_bias': False, 'mlp_bias': False}

_FAMILIES = {
  'gpt2': _Family(
    ('GPT2LMHeadModel', 'GPT2ForSequenceClassification'),
    {'vocab_size': 'vocab_size', 'width': 'n_embd', 'layers': 'n_layer', 'query_heads': 'n_head',
     'feedforward_width': 'n_inner', 'context_length': 'n_positions', 'activation': 'activation_function',
     'tied': 'tie_word_embeddings', 'norm_epsilon': 'layer_norm_epsilon'},
    _OLD_FIXED | _ALL_BIAS | {'position': 'learned', 'parallel_residual': False},
    {'n_inner': None, 'activation_function': 'gelu_new', 'tie_word_embeddings': True, 'layer_norm_epsilon': 1e-5},
    {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    rope=None, written={'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}),
  'gpt_neox': _Family(
    ('GPTNeoXForCausalLM', 'GPTNeoXForSequenceClassification'),
    _SIZES | _ATTENTION_BIAS | {'norm_epsilon': 'layer_norm_eps', 'parallel_residual': 'use_parallel_residual'},
    _OLD_FIXED | {'position': 'rope', 'feedforward_bias': True},
    {'hidden_act': 'gelu', 'tie_word_embeddings': False, 'layer_norm_eps': 1e-5, 'use_parallel_residual': True,
     'attention_bias': True, 'rotary_pct': 0.25},
    rope=('rotary_emb_base', 'rotary_pct')),
  'llama': _Family(
    ('LlamaForCausalLM', 'LlamaForSequenceClassification'),
    _MODERN | _ATTENTION_BIAS | {'feedforward_bias': 'mlp_bias'}, _MODERN_FIXED | {'qk_norm': False}, _ABSENT),
  'mistral': _Family(
    ('MistralForCausalLM', 'MistralForSequenceClassification'),
    _MODERN, _MODERN_FIXED | _NO_BIAS | {'qk_norm': False},
    _ABSENT | {'num_key_value_heads': 8, 'sliding_window': 4096}, windowed=True),
  'qwen2': _Family(
    ('Qwen2ForCausalLM', 'Qwen2ForSequenceClassification'),
    _MODERN, _MODERN_FIXED | _NO_BIAS | {'qkv_bias': True, 'qk_norm': False},
    _ABSENT | {'num_key_value_heads': 32, 'sliding_window': 4096, 'max_window_layers': 28}, windowed=True,
    window_switch=True),
  'qwen3': _Family(
    ('Qwen3ForCausalLM', 'Qwen3ForSequenceClassification'),
    _MODERN | _ATTENTION_BIAS, _MODERN_FIXED | _NO_BIAS | {'qk_norm': True},
    _ABSENT | {'num_key_value_heads': 32, 'head_dim': 128, 'sliding_window': 4096, 'max_window_layers': 28},
    windowed=True, window_switch=True),
}

_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
                'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_python_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh'}
_WRITTEN_ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}
_SCALING = {'factor': 'factor', 'low_frequency_factor': 'low_freq_factor', 'high_frequency_factor': 'high_freq_factor',
            'original_context': 'original_max_position_embeddings'}  # RopeScaling field -> their key
_SCALING_FIELDS = {'linear': ('factor',), 'llama3': tuple(_SCALING)}
_ROPE_KEYS = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', *_SCALING.values()}


def check_kind(kind):
  """Raises ConfigError unless the kind of model is one of KINDS."""
  if kind not in KINDS:
    raise ConfigError(f'kind={kind!r} of a Hugging Face model. Use one of: {", ".join(KINDS)}.')


def config_from_huggingface(config_json, **changes):
  """The ModelConfig that a parsed `config.json` says, with fields replaced; raises ConfigError for what we lack."""
  family, name = _family(config_json.get('model_type')), config_json['model_type']
  for key, needed in (family.refused | {'quantization_config': None}).items():
    if config_json.get(key, needed) != needed:
      raise ConfigError(f'config.json of this {name} has {key}={config_json[key]!r}, which changes the numbers. Only '
                        f'{needed!r} is supported.')
  values = family.fixed | {ours: _read(config_json, family, theirs) for ours, theirs in family.fields.items()}
  values['activation'] = _activation(values['activation'])
  values['kv_heads'] = values.get('kv_heads') or values['query_heads']
  values['head_width'] = values.get('head_width') or values['width'] // values['query_heads']
  values['feedforward_width'] = values['feedforward_width'] or 4 * values['width']
  values |= _rope_from(config_json, family) | {'window': _window_from(config_json, family, values['layers'])}
  unknown = set(changes) - {field.name for field in dataclasses.fields(ModelConfig)}
  if unknown:
    raise ConfigError(f'there is no model field {sorted(unknown)[0]!r}. Replace only fields of ModelConfig.')
  return ModelConfig(**({'family': name} | values | changes))


def config_to_huggingface(config, *, kind='language', dtype='float32', begin_token=None,
                          end_token=None, pad_token=None):
  """The contents of `config.json` for a model of that kind, whose files hold `dtype`.

  `begin_token` is the id that a text starts with, if any; `end_token` is an id or a list of ids at
  which generation stops. transformers scores the last token that is not
  `pad_token`, so kind 'scalar' needs it, and it should not be the end token, or the score is read a token early. Raises
  ConfigError where the family's format has no place for a field of the config.
  """
  check_kind(kind)
  family = _family(config.family)
  _check_tokens(config, kind, begin_token, end_token, pad_token)
  if dtype not in DTYPES:
    raise ConfigError(f'dtype={dtype!r} of a Hugging Face file. Use one of: {", ".join(DTYPES)}.')
  written = {'architectures': [family.classes[KINDS.index(kind)]], 'model_type': config.family}
  written |= {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
  written[family.fields['activation']] = _WRITTEN_ACTIVATIONS[config.activation]
  written |= _rope_to(config, family) | _window_to(config, family) | family.written
  written |= {'bos_token_id': begin_token, 'eos_token_id': end_token, 'pad_token_id': pad_token}
  written |= {'dtype': dtype, 'torch_dtype': dtype}
  if kind == 'scalar':  # 'regression' tells servers to pass the score on without a sigmoid
    written |= {'num_labels': 1, 'id2label': {'0': 'score'}, 'label2id': {'score': 0}, 'problem_type': 'regression'}
  _check_expressible(config, config_from_huggingface(written))
  return written


def _family(model_type):
  if model_type not in _FAMILIES:
    raise ConfigError(f'model_type {model_type!r} is not supported. Supported are: {", ".join(_FAMILIES)}.')
  return _FAMILIES[model_type]


def _read(config_json, family, key):
  if config_json.get(key) is not None or (key in config_json and key in family.absent):
    return config_json[key]
  if key not in family.absent:
    raise ConfigError(f'config.json of this {config_json["model_type"]} has no {key!r}, which has no default. Add it.')
  return family.absent[key]


def _activation(theirs):
  if theirs not in _ACTIVATIONS:
    raise ConfigError(f'activation {theirs!r} is not supported. Supported are: {", ".join(_ACTIVATIONS)}.')
  return _ACTIVATIONS[theirs]


def _rope_from(config_json, family):
  """{'rope_base', 'rope_share', 'rope_scaling'}, {} without rotary positions."""
  if family.rope is None:
    return {}
  base_key, share_key = family.rope
  parameters = config_json.get('rope_parameters') or {}
  rope = config_json.get('rope_scaling') or parameters
  strange = sorted(key for key, value in rope.items() if key not in _ROPE_KEYS and value is not None)
  if strange:
    raise ConfigError(f'rotary parameter {strange[0]!r} in config.json is not supported. Supported are: '
                      f'{", ".join(sorted(_ROPE_KEYS))}.')
  in_order = [rope.get('rope_theta'), parameters.get('rope_theta'), config_json.get(base_key),
              config_json.get('rope_theta')]
  base = next((value for value in in_order if value is not None), 10000.0)
  in_order = [rope.get('partial_rotary_factor'), parameters.get('partial_rotary_factor'),
              config_json.get(share_key or 'partial_rotary_factor'), family.absent.get(share_key)]
  share = next((value for value in in_order if value is not None), 1.0)
  if share_key is None and share != 1:
    raise ConfigError(f'partial_rotary_factor={share} of a {config_json["model_type"]} is not supported. Its heads are '
                      'rotated whole: use 1, or leave it out.')
  return {'rope_base': float(base), 'rope_share': float(share), 'rope_scaling': _scaling_from(rope, config_json)}


def _scaling_from(rope, config_json):
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in _SCALING_FIELDS:
    raise ConfigError(f'rope type {kind!r} is not supported. Supported are: default, {", ".join(_SCALING_FIELDS)}.')
  rope = {'original_max_position_embeddings': config_json['max_position_embeddings']} | rope
  missing = [_SCALING[ours] for ours in _SCALING_FIELDS[kind] if _SCALING[ours] not in rope]
  if missing:
    raise ConfigError(f'rope type {kind!r} in config.json has no {missing[0]!r}. Add it.')
  return RopeScaling(kind, **{ours: rope[_SCALING[ours]] for ours in _SCALING_FIELDS[kind]})


def _rope_to(config, family):
  if family.rope is None:
    return {}
  base_key, share_key = family.rope
  scaling, scaled = config.rope_scaling, None
  if scaling is not None:
    scaled = {'rope_type': scaling.kind} | {_SCALING[ours]: getattr(scaling, ours)
                                           for ours in _SCALING_FIELDS.get(scaling.kind, ())}
  parameters = (scaled or {'rope_type': 'default'}) | {'rope_theta': config.rope_base}
  written = {'rope_theta': config.rope_base, base_key: config.rope_base,
             'rope_scaling': scaled and scaled | {'type': scaling.kind}}
  if share_key is not None:
    parameters |= {'partial_rotary_factor': config.rope_share}
    written |= {share_key: config.rope_share}
  return written | {'rope_parameters': parameters}


def _window_from(config_json, family, layers):
  """Tokens that a query sees, or None; the window must be the same in all layers."""
  size = _read(config_json, family, 'sliding_window') if family.windowed else None
  first = 0
  if family.window_switch:
    size = size if config_json.get('use_sliding_window', False) else None
    first = _read(config_json, family, 'max_window_layers')
  derived = ['sliding_attention' if size is not None and i >= first else 'full_attention' for i in range(layers)]
  kinds = set(config_json.get('layer_types') or derived)
  if kinds == {'full_attention'} and (size is None or family.window_switch):
    return None
  if kinds == {'sliding_attention'} and size is not None:
    return size
  raise ConfigError(f'layers of this {config_json["model_type"]} attend as {", ".join(sorted(kinds))}, with a window '
                    f'of {size} tokens. Supported is one and the same window, or none, in all layers: see layer_types, '
                    'sliding_window, use_sliding_window and max_window_layers in config.json.')


def _window_to(config, family):
  if not family.windowed:
    return {}
  written = {'sliding_window': config.window}
  if family.window_switch:
    on = config.window is not None
    written |= {'use_sliding_window': on, 'max_window_layers': 0 if on else config.layers,
                'layer_types': ['sliding_attention' if on else 'full_attention'] * config.layers}
  return written


def _check_tokens(config, kind, begin_token, end_token, pad_token):
  given = {'begin_token': begin_token, 'end_token': end_token, 'pad_token': pad_token}
  for name, ids in given.items():
    for token in ids if isinstance(ids, (list, tuple)) else [ids]:
      if token is not None and not 0 <= token < config.vocab_size:
        raise ConfigError(f'{name}={token} is outside the vocabulary of {config.vocab_size} tokens. Use the id that '
                          'the tokenizer gives.')
  if kind == 'scalar' and pad_token is None:
    raise ConfigError("a model of kind 'scalar' has pad_token=None, and transformers finds the token to score by it. "
                      'Pass the id with which its batches are padded.')


def _check_expressible(config, read_back):
  for field in dataclasses.fields(ModelConfig):
    ours, theirs = getattr(config, field.name), getattr(read_back, field.name)
    if field.name not in RUNTIME_FIELDS and ours != theirs:
      raise ConfigError(f'a {config.family} with {field.name}={ours!r} cannot be written in the Hugging Face format, '
                        f'which would say {theirs!r}. Use another family, or change the field.')
