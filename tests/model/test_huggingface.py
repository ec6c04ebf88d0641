"""Our models and those of transformers are the same function, and the way there and back changes nothing.

Every parameter is random, biases and norm scales too: with transformers' own zeros and ones a dropped bias would not
show.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from families import FAMILIES

from rlhf_jax.errors import CheckpointError, ConfigError
from rlhf_jax.model import forward
from rlhf_jax.model.config import PRESETS, ModelConfig, RopeScaling
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.model.huggingface import load, read_config, read_generation_ids, save
from rlhf_jax.model.huggingface_config import RUNTIME_FIELDS, config_from_huggingface, config_to_huggingface

CONFIGS = FAMILIES | {
  'gpt2-untied': dataclasses.replace(FAMILIES['gpt2'], tied=False),
  'gpt_neox-llama3': dataclasses.replace(FAMILIES['gpt_neox'], rope_base=700.0,
                                         rope_scaling=FAMILIES['llama3'].rope_scaling),
  'llama-biased': dataclasses.replace(FAMILIES['llama'], qkv_bias=True, output_bias=True, feedforward_bias=True,
                                      activation='gelu_tanh'),
  'qwen2-window': dataclasses.replace(FAMILIES['qwen2'], window=4, tied=True),
  'qwen3-biased': dataclasses.replace(FAMILIES['qwen3'], qkv_bias=True, output_bias=True),
}
PAD = 7


def _randomised(model, seed=3):
  """A torch model whose every parameter is random, large enough to make a difference."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if 'norm' in name or 'ln_' in name else 0.0))
  return model.eval()


def _torch_model(config, kind):
  written = config_to_huggingface(config, kind=kind, end_token=2, pad_token=PAD)
  made = transformers.AutoConfig.for_model(**written)
  auto = transformers.AutoModelForCausalLM if kind == 'language' else transformers.AutoModelForSequenceClassification
  return _randomised(auto.from_config(made))


def _random_params(config, kind, seed=5):
  """Our parameters, every one random, the scalar's bias too."""
  model = LanguageModel(config) if kind == 'language' else ScalarModel(config)
  shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
  numbers = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.asarray(numbers.normal(0.1, 0.3, x.shape), np.float32), shapes)


def _load(path, kind='language', **changes):
  """(ModelConfig, parameters) of what is stored there."""
  config = read_config(path, **changes)
  return config, load(path, config, kind=kind)


def _batch(side, vocab_size=61):
  """(tokens, valid): two sequences, of 11 and of 7 tokens, padded on that side; PAD is no token of theirs."""
  numbers = np.random.default_rng(1)
  tokens_BT = numbers.integers(PAD + 1, vocab_size, (2, 11)).astype(np.int32)
  valid_BT = np.ones((2, 11), bool)
  if side is not None:
    valid_BT[1, slice(None, 4) if side == 'left' else slice(7, None)] = False
  return np.where(valid_BT, tokens_BT, PAD), valid_BT


def _theirs(model, tokens_BT, valid_BT):
  """Logits of a torch model, with the positions that padding leaves."""
  position_BT = np.maximum(np.cumsum(valid_BT, axis=1) - 1, 0)
  with torch.no_grad():
    return model(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(valid_BT).long(),
                 position_ids=torch.tensor(position_BT)).logits.numpy()


def _ours(config, params, side):
  tokens_BT, valid_BT = _batch(side)
  return np.asarray(forward.logits(LanguageModel(config), params, tokens_BT, valid_BT))


def _same_trees(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _without_runtime(config):
  return {name: value for name, value in dataclasses.asdict(config).items() if name not in RUNTIME_FIELDS}


@pytest.fixture(scope='module', params=CONFIGS)
def language(request, tmp_path_factory):
  """(config, torch model, the directory that transformers saved it to), one of every family."""
  config = CONFIGS[request.param]
  directory = tmp_path_factory.mktemp(request.param)
  model = _torch_model(config, 'language')
  model.save_pretrained(directory)
  return config, model, directory


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(config, parameters, directory) of a small model that this package saved, to be copied and damaged."""
  config, directory = FAMILIES['llama'], tmp_path_factory.mktemp('saved')
  params = _random_params(config, 'language')
  save(directory, config, params, kind='language', end_token=2)
  return config, params, directory


def _damaged(source, target, config_changes=None, **tensor_changes):
  """A copy of a saved model with keys of config.json and tensors replaced, added, or (None) dropped."""
  config_json = json.loads((source / 'config.json').read_text()) | (config_changes or {})
  tensors = safetensors.numpy.load_file(source / 'model.safetensors') | tensor_changes
  (target / 'config.json').write_text(json.dumps(config_json))
  safetensors.numpy.save_file({name: x for name, x in tensors.items() if x is not None}, target / 'model.safetensors')
  return target


# ------------------------------------------------------------------------------------------------- the same function

@pytest.mark.parametrize('side', [None, 'left'])
def test_logits_equal_transformers(language, side):
  config, model, directory = language
  found, params = _load(directory)
  assert _without_runtime(found) == _without_runtime(config)
  tokens_BT, valid_BT = _batch(side)
  theirs_BTV, ours_BTV = _theirs(model, tokens_BT, valid_BT), _ours(found, params, side)
  assert np.std(theirs_BTV[valid_BT]) > 0.1
  np.testing.assert_allclose(ours_BTV[valid_BT], theirs_BTV[valid_BT], atol=1e-4, rtol=0)


def test_transformers_loads_what_we_save(language, tmp_path):
  config, _, _ = language
  params = _random_params(config, 'language')
  save(tmp_path, config, params, kind='language', end_token=[2, 3], pad_token=PAD)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info[what] for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  assert model.config.eos_token_id == [2, 3] and model.config.pad_token_id == PAD and model.config.bos_token_id is None
  tokens_BT, valid_BT = _batch('left')
  theirs_BTV, ours_BTV = _theirs(model.eval(), tokens_BT, valid_BT), _ours(config, params, 'left')
  np.testing.assert_allclose(ours_BTV[valid_BT], theirs_BTV[valid_BT], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['gpt2', 'gpt_neox', 'llama-tied', 'mistral', 'qwen2', 'qwen3'])
def test_scores_equal_transformers_both_ways(name, tmp_path):
  config = FAMILIES[name]
  tokens_BT, valid_BT = _batch('right')
  model = _torch_model(config, 'scalar')
  model.save_pretrained(tmp_path / 'theirs')
  found, params = _load(tmp_path / 'theirs', kind='scalar')
  assert params['scalar']['bias'] == 0
  scores_B = np.asarray(forward.scores(ScalarModel(found), params, tokens_BT, valid_BT))
  np.testing.assert_allclose(scores_B, _theirs(model, tokens_BT, valid_BT)[:, 0], atol=1e-4, rtol=0)

  params['scalar']['bias'] = np.float32(-1.37)
  save(tmp_path / 'ours', config, params, kind='scalar', end_token=2, pad_token=PAD)
  auto = transformers.AutoModelForSequenceClassification
  model, info = auto.from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not any(info[what] for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  assert model.config.num_labels == 1 and type(model).__name__.endswith('ForSequenceClassification')
  theirs_B = _theirs(model.eval(), tokens_BT, valid_BT)[:, 0] + model.config.score_bias
  scores_B = np.asarray(forward.scores(ScalarModel(config), params, tokens_BT, valid_BT))
  np.testing.assert_allclose(scores_B, theirs_B, atol=1e-4, rtol=0)
  _same_trees(_load(tmp_path / 'ours', kind='scalar')[1], params)


# ------------------------------------------------------------------------------------ where it ends

@pytest.mark.parametrize('end_token', [2, [2, 3]])
def test_transformers_reads_begin_end_and_pad_token(end_token, tmp_path):
  config = FAMILIES['llama']
  save(tmp_path, config, _random_params(config, 'language'), kind='language', begin_token=1,
       end_token=end_token, pad_token=PAD)
  for theirs in (transformers.GenerationConfig.from_pretrained(tmp_path),
                 transformers.AutoConfig.from_pretrained(tmp_path),
                 transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config):
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, end_token, PAD)


@pytest.mark.parametrize('place', [0, 1])
def test_transformers_stops_at_each_end_token(place, tmp_path):
  config, params = FAMILIES['llama'], _random_params(FAMILIES['llama'], 'language')
  save(tmp_path / 'endless', config, params, kind='language', pad_token=PAD)
  endless = _sampled(tmp_path / 'endless')
  end = endless[5]
  unseen = next(token for token in range(config.vocab_size) if token not in endless)
  save(tmp_path / 'ends', config, params, kind='language', pad_token=PAD,
       end_token=[end, unseen] if place == 0 else [unseen, end])
  assert _sampled(tmp_path / 'ends') == endless[:endless.index(end) + 1]


def _sampled(directory):
  """The ids that transformers' model samples after a prompt, 16 of them unless it stops before."""
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  prompt_BT = torch.tensor([[11, 12, 13]])
  torch.manual_seed(4)
  tokens_BT = model.generate(prompt_BT, do_sample=True, temperature=3.0, max_new_tokens=16)
  return tokens_BT[0, 3:].tolist()


@pytest.mark.parametrize('end_token, ids', [(2, (2,)), ([2, 3], (2, 3)), (None, ())])
def test_end_tokens_are_read_from_either_file(end_token, ids, tmp_path):
  config = FAMILIES['llama']
  save(tmp_path, config, _random_params(config, 'language'), kind='language', end_token=end_token)
  config_json = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config_json | {'eos_token_id': 9}))
  assert read_generation_ids(tmp_path) == (ids or (9,))
  (tmp_path / 'config.json').write_text(json.dumps(config_json))
  (tmp_path / 'generation_config.json').unlink()
  assert read_generation_ids(tmp_path) == ids


def test_a_reward_model_takes_the_place_of_a_language_model_and_its_generation_config(tmp_path):
  config = FAMILIES['llama']
  save(tmp_path, config, _random_params(config, 'language'), kind='language', end_token=2)
  params = _random_params(config, 'scalar')
  save(tmp_path, config, params, kind='scalar', end_token=2, pad_token=PAD)
  assert sorted(x.name for x in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
  assert read_generation_ids(tmp_path) == (2,)


@pytest.mark.parametrize('file', ['config.json', 'generation_config.json'])
def test_end_tokens_that_cannot_be_read_are_named(file, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  for content, message in [('{"eos_token_id": "</s>"}', 'has eos_token_id="</s>". It has to be'),
                           ('{"eos_token_id": [2, null]}', r'has eos_token_id=\[2, null\]'),
                           ('{"eos_token_id": true}', 'has eos_token_id=true'),
                           ('{"eos_token_id": ', 'cannot be read as JSON'),
                           ('[2]', 'is not a JSON object')]:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=f'/{file} {message}'):
      read_generation_ids(tmp_path)
  with pytest.raises(CheckpointError, match='nobody/no-such-model is not a directory'):
    read_generation_ids('nobody/no-such-model')


# ------------------------------------------------------------------------------------------------ there and back again

@pytest.mark.parametrize('name', [*CONFIGS, *PRESETS])
def test_config_round_trip_is_identity(name):
  config = (CONFIGS | PRESETS)[name]
  assert _without_runtime(config_from_huggingface(config_to_huggingface(config))) == _without_runtime(config)


@pytest.mark.parametrize('kind', ['language', 'scalar'])
@pytest.mark.parametrize('name', ['gpt2', 'gpt_neox', 'llama-biased', 'qwen3'])
def test_save_then_load_is_identity(name, kind, tmp_path):
  params = _random_params(CONFIGS[name], kind)
  save(tmp_path, CONFIGS[name], params, kind=kind, pad_token=PAD)
  found, back = _load(tmp_path, kind=kind, dtype='bfloat16')
  assert found.dtype == 'bfloat16'
  _same_trees(back, params)
  assert all(leaf.dtype == np.float32 and leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(back))


def test_bfloat16_files_hold_the_rounded_parameters(tmp_path):
  config, params = FAMILIES['gpt_neox'], _random_params(FAMILIES['gpt_neox'], 'language')
  save(tmp_path, config, params, kind='language', dtype='bfloat16')
  _same_trees(_load(tmp_path)[1], jax.tree.map(lambda x: x.astype('bfloat16').astype(np.float32), params))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  assert model.dtype == torch.bfloat16


def test_shards_hold_every_tensor_once_and_stale_ones_go(tmp_path):
  config, params = FAMILIES['llama'], _random_params(FAMILIES['llama'], 'language')
  save(tmp_path, config, _random_params(config, 'language', seed=8), kind='language')
  save(tmp_path, config, params, kind='language', shard_bytes=20_000)
  shards = sorted(tmp_path.glob('*.safetensors'))
  assert len(shards) > 3 and shards[0].name == f'model-00001-of-{len(shards):05d}.safetensors'
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  sizes = {x: sum(t.nbytes for t in safetensors.numpy.load_file(x).values()) for x in shards}
  assert max(sizes.values()) <= 20_000 and sum(sizes.values()) == index['metadata']['total_size']
  assert sorted(set(index['weight_map'].values())) == [x.name for x in shards]
  _same_trees(_load(tmp_path)[1], params)
  _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  save(tmp_path, config, params, kind='language')
  files = ['config.json', 'generation_config.json', 'model.safetensors']
  assert sorted(x.name for x in tmp_path.iterdir()) == files


@pytest.mark.parametrize('name, prefix', [('gpt2', 'transformer.'), ('gpt_neox', 'gpt_neox.'),
                                          ('llama-tied', 'model.')])
def test_names_without_the_prefix_old_heads_and_buffers_are_understood(name, prefix, tmp_path):
  config, params = FAMILIES[name], _random_params(FAMILIES[name], 'language')
  save(tmp_path, config, params, kind='language')
  tensors = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  tensors = {key.removeprefix(prefix): x for key, x in tensors.items()}
  if name == 'gpt_neox':
    tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
  else:
    tensors['lm_head.weight'] = params['backbone']['embedding_VD']
  for buffer in ('h.0.attn.bias', 'layers.1.attention.masked_bias', 'layers.0.self_attn.rotary_emb.inv_freq'):
    tensors[buffer] = np.ones((2, 2), np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  _same_trees(_load(tmp_path)[1], params)


# ------------------------------------------------------------------------------------------------------------- configs

@pytest.mark.parametrize('name', ['gpt_neox', 'gpt_neox-llama3', 'llama-linear', 'llama3', 'qwen2', 'qwen2-window'])
@pytest.mark.parametrize('left_out', [
  ['rope_parameters', 'dtype', 'layer_types'],
  ['rope_scaling', 'rope_theta', 'rotary_emb_base', 'rotary_pct', 'max_window_layers', 'torch_dtype'],
])
def test_either_style_that_is_written_says_all(name, left_out):
  written = config_to_huggingface(CONFIGS[name])
  config = config_from_huggingface({key: value for key, value in written.items() if key not in left_out})
  assert _without_runtime(config) == _without_runtime(CONFIGS[name])


def test_config_json_of_transformers_4_is_read():
  config_json = {'model_type': 'llama', 'hidden_size': 24, 'intermediate_size': 44, 'num_attention_heads': 3,
                 'num_hidden_layers': 2, 'vocab_size': 61, 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5,
                 'rope_theta': 500, 'rope_scaling': {'type': 'linear', 'factor': 2.5}, 'torch_dtype': 'float16',
                 'attention_dropout': 0.1}
  config = config_from_huggingface(config_json)
  assert config == ModelConfig(vocab_size=61, width=24, layers=2, query_heads=3, kv_heads=3, head_width=8,
                               feedforward_width=44, context_length=64, norm_epsilon=1e-5, rope_base=500.0,
                               rope_scaling=RopeScaling('linear', 2.5))


def test_config_json_of_transformers_5_is_read():
  rope = {'rope_theta': 700.0, 'rope_type': 'llama3', 'factor': 2.5, 'low_freq_factor': 1.5, 'high_freq_factor': 5.0,
          'original_max_position_embeddings': 32}
  written = config_to_huggingface(FAMILIES['qwen3']) | {'rope_parameters': rope}
  for key in ('rope_theta', 'rope_scaling', 'torch_dtype'):
    del written[key]
  config = config_from_huggingface(written, remat=True)
  assert (config.rope_base, config.rope_scaling) == (700.0, RopeScaling('llama3', 2.5, 1.5, 5.0, 32))
  assert config.remat


def test_what_a_config_json_leaves_out_is_what_transformers_takes_it_to_be():
  for family in ('gpt2', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'qwen3'):
    theirs = transformers.AutoConfig.for_model(family)
    needed = ('vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions') if family == 'gpt2' else (
      'vocab_size', 'hidden_size', 'num_hidden_layers', 'intermediate_size', 'num_attention_heads',
      'max_position_embeddings')
    sizes = {key: getattr(theirs, key) for key in needed}
    assert config_from_huggingface({'model_type': family} | sizes) == config_from_huggingface(theirs.to_dict())


@pytest.mark.parametrize('name, changes, message', [
  ('llama', {'model_type': 'bert'}, "model_type 'bert' is not supported. Supported are: gpt2, gpt_neox, llama"),
  ('llama', {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}},
   "rope type 'yarn' is not supported. Supported are: default, linear, llama3"),
  ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, "rope type 'llama3' .* has no 'low_freq_factor'"),
  ('llama', {'rope_parameters': {'full_attention': {'rope_theta': 3.0}}}, "rotary parameter 'full_attention'"),
  ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 of a llama'),
  ('llama', {'hidden_act': 'relu2'}, "activation 'relu2' is not supported. Supported are: silu"),
  ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config='),
  ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True.*Only False'),
  ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights=False.*Only True'),
  ('gpt2', {'add_cross_attention': True}, 'add_cross_attention=True'),
  ('mistral', {'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention']}, 'full_attention, sliding'),
  ('qwen2', {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1, 'layer_types': None},
   'full_attention, sliding_attention, with a window of 8'),
  ('qwen3', {'layer_types': ['linear_attention'] * 3}, 'attend as linear_attention'),
])
def test_a_config_that_we_do_not_compute_is_named(name, changes, message):
  with pytest.raises(ConfigError, match=message):
    config_from_huggingface(config_to_huggingface(FAMILIES[name]) | changes)


def test_a_config_json_without_a_size_and_an_unknown_field_are_named():
  written = config_to_huggingface(FAMILIES['llama'])
  with pytest.raises(ConfigError, match="there is no model field 'widht'"):
    config_from_huggingface(written, widht=3)
  written['hidden_size'] = None
  with pytest.raises(ConfigError, match="this llama has no 'hidden_size'"):
    config_from_huggingface(written)


@pytest.mark.parametrize('name, changes, message', [
  ('llama', {'window': 5}, 'a llama with window=5 cannot be written'),
  ('llama', {'qkv_bias': True}, 'a llama with qkv_bias=True cannot be written'),
  ('mistral', {'feedforward_bias': True}, 'a mistral with feedforward_bias=True'),
  ('qwen3', {'qk_norm': False}, 'a qwen3 with qk_norm=False'),
  ('gpt2', {'head_width': 4}, 'a gpt2 with head_width=4'),
  ('gpt_neox', {'kv_heads': 1}, 'a gpt_neox with kv_heads=1'),
  ('llama', {'norm': 'layer'}, "a llama with norm='layer'"),
])
def test_a_config_without_a_place_in_the_format_is_named(name, changes, message, tmp_path):
  config = dataclasses.replace(FAMILIES[name], **changes)
  with pytest.raises(ConfigError, match=message):
    save(tmp_path, config, {}, kind='language')
  assert not list(tmp_path.iterdir())


def test_tokens_kind_and_dtype_are_checked_before_anything_is_written(tmp_path):
  config = FAMILIES['llama']
  for changes, message in [({'dtype': 'float16'}, "dtype='float16' .* Use one of: float32, bfloat16"),
                           ({'kind': 'value'}, "kind='value' .* language, scalar"),
                           ({'kind': 'scalar'}, 'pad_token=None'),
                           ({'end_token': [2, 61]}, 'end_token=61 is outside the vocabulary of 61'),
                           ({'begin_token': 99}, 'begin_token=99 is outside the vocabulary of 61'),
                           ({'pad_token': -1}, 'pad_token=-1 is outside')]:
    with pytest.raises(ConfigError, match=message):
      save(tmp_path, config, {}, **({'kind': 'language'} | changes))
  params = _random_params(config, 'language')
  with pytest.raises(CheckpointError, match=r'parameter scalar/bias has shape none, .* scalar model asks for \(\)'):
    save(tmp_path, config, {'backbone': params['backbone']}, kind='scalar', pad_token=PAD)
  with pytest.raises(CheckpointError, match='parameter backbone/blocks/down_LFD has shape'):
    save(tmp_path, dataclasses.replace(config, feedforward_width=45), params, kind='language')
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- damage

_NORM, _Q = 'model.layers.1.input_layernorm.weight', 'model.layers.2.self_attn.q_proj.weight'


@pytest.mark.parametrize('tensors, message', [
  ({_NORM: None}, rf'has no tensor {_NORM}, needed with shape \(24,\)'),
  ({'lm_head.weight': None}, r'has no tensor lm_head.weight, needed with shape \(61, 24\)'),
  ({'model.layers.1.extra.weight': np.ones(3)}, 'has a tensor model.layers.1.extra.weight'),
  ({'v_head.weight': np.ones(3)}, 'has a tensor v_head.weight'),
  ({_Q: np.ones((24, 48), np.float32)}, rf'{_Q} has shape \(24, 48\), but config.json asks for \(48, 24\)'),
  ({_Q: np.ones((48, 24), np.int8)}, rf'{_Q} has dtype I8. Supported are BF16'),
])
def test_a_wrong_tensor_is_named(saved, tmp_path, tensors, message):
  with pytest.raises(CheckpointError, match=message):
    _load(_damaged(saved[2], tmp_path, **tensors))


def test_an_unembedding_that_is_not_the_tied_embedding_is_named(saved, tmp_path):
  with pytest.raises(CheckpointError, match=r'lm_head\.weight differs from the embedding'):
    _load(_damaged(saved[2], tmp_path, {'tie_word_embeddings': True}))


def test_a_config_change_that_no_tensor_serves_is_named(saved):
  with pytest.raises(ConfigError, match='format of llama has no tensor for attention_norm_bias_LD'):
    _load(saved[2], norm='layer')


def test_a_model_of_the_other_kind_is_named(saved, tmp_path):
  with pytest.raises(CheckpointError, match=r"a language model: it has no score\.weight\. .*'language'"):
    _load(saved[2], kind='scalar')
  save(tmp_path, saved[0], _random_params(saved[0], 'scalar'), kind='scalar', pad_token=PAD)
  with pytest.raises(CheckpointError, match=r"a reward or value model: it has a score\.weight\. .*'scalar'"):
    _load(tmp_path)


def test_more_than_one_label_is_named(saved, tmp_path):
  changes = {'score.weight': np.ones((2, 24), np.float32), 'lm_head.weight': None}
  with pytest.raises(CheckpointError, match=r'score.weight has shape \(2, 24\), but config.json asks for \(1, 24\)'):
    _load(_damaged(saved[2], tmp_path, **changes), kind='scalar')


def test_damaged_and_absent_files_are_named(saved, tmp_path):
  config, params, _ = saved
  save(tmp_path, config, params, kind='language', shard_bytes=20_000)
  shard = sorted(tmp_path.glob('*.safetensors'))[1]
  whole = shard.read_bytes()
  for kept in (whole[:-100], whole[:30], b''):
    shard.write_bytes(kept)
    with pytest.raises(CheckpointError, match=f'{shard.name} is damaged'):
      _load(tmp_path)
  shard.unlink()
  with pytest.raises(CheckpointError, match=f'{shard.name} is absent'):
    _load(tmp_path)
  (tmp_path / 'model.safetensors.index.json').write_text('{}')
  with pytest.raises(CheckpointError, match=r"index\.json has no 'weight_map'"):
    _load(tmp_path)
  (tmp_path / 'model.safetensors.index.json').unlink()
  with pytest.raises(CheckpointError, match=r'model\.safetensors is absent'):
    _load(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": ')
  with pytest.raises(CheckpointError, match=r'config\.json cannot be read as JSON'):
    _load(tmp_path)
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(CheckpointError, match=r'config\.json is not a JSON object'):
    _load(tmp_path)
  (tmp_path / 'config.json').unlink()
  with pytest.raises(CheckpointError, match=r'config\.json cannot be read'):
    _load(tmp_path)


@pytest.mark.parametrize('name', ['no/such/place', 'nobody/no-such-model'])
def test_what_is_neither_a_directory_nor_on_the_hub_is_named(name):
  with pytest.raises(CheckpointError, match=f'{name} is not a directory, and the Hugging Face Hub gives no model'):
    _load(name)
