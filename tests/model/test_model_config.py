"""What a model is made of: sizes by letter, and settings that cannot work."""

import dataclasses

import pytest
from families import FAMILIES

from rlhf_jax.errors import ConfigError
from rlhf_jax.model.config import PRESETS, ModelConfig, RopeScaling, preset


@pytest.mark.parametrize('changes, says', [
  ({'vocab_size': 0}, 'model vocab_size=0. It must be at least 1'),
  ({'width': -4}, 'model width=-4'),
  ({'layers': 0}, 'model layers=0'),
  ({'query_heads': 0}, 'model query_heads=0'),
  ({'kv_heads': 0}, 'model kv_heads=0'),
  ({'head_width': 0}, 'model head_width=0'),
  ({'feedforward_width': 0}, 'model feedforward_width=0'),
  ({'context_length': 0}, 'model context_length=0'),
  ({'tokens_per_chunk': 0}, 'model tokens_per_chunk=0'),
  ({'query_heads': 6, 'kv_heads': 4}, 'query_heads=6 is not a multiple of kv_heads=4. Each key/value head'),
  ({'head_width': 6, 'rope_share': 0.5}, 'rope_share=0.5 of head_width=6 rotates 3 numbers. It must be an even'),
  ({'rope_share': 0.0}, 'rope_share=0.0 of head_width=16'),
  ({'rope_share': 1.5}, 'rope_share=1.5 of head_width=16'),
  ({'window': 0}, 'model window=0. It must be at least 1 token, or None'),
  ({'norm': 'batch'}, "ModelConfig norm='batch'. Choose one of: 'rms', 'layer'"),
  ({'family': 'bert'}, "ModelConfig family='bert'. Choose one of: 'gpt2'"),
  ({'position': 'alibi'}, "ModelConfig position='alibi'"),
  ({'activation': 'relu'}, "ModelConfig activation='relu'"),
  ({'dtype': 'float16'}, "ModelConfig dtype='float16'. Choose one of: 'float32', 'bfloat16'"),
])
def test_what_cannot_work_is_refused(changes, says):
  with pytest.raises(ConfigError, match=says):
    ModelConfig(**changes)


def test_learned_positions_rotate_nothing():
  assert ModelConfig(position='learned', head_width=7, rope_share=0.0).shape('position_TD') == (1024, 64)


@pytest.mark.parametrize('changes, says', [
  ({'kind': 'yarn'}, "RopeScaling kind='yarn'. Choose one of: 'linear', 'llama3'"),
  ({'factor': 0.0}, 'rope scaling factor=0.0'),
  ({'low_frequency_factor': 0.0}, 'low_frequency_factor=0.0'),
  ({'low_frequency_factor': 4.0}, 'high_frequency_factor=4.0. Factors must be positive, low below'),
])
def test_a_stretch_that_cannot_work_is_refused(changes, says):
  with pytest.raises(ConfigError, match=says):
    RopeScaling(**changes)


def test_every_letter_of_a_weight_has_its_size():
  config = FAMILIES['qwen2']
  assert [config.size(letter) for letter in 'VDLNKHFT'] == [61, 24, 3, 6, 2, 8, 44, 64]
  assert config.shape('q_LDNH') == (3, 24, 6, 8)
  assert config.shape('k_bias_LKH') == (3, 2, 8)
  assert config.shape('down_FD') == (44, 24)
  assert config.shape('bias') == ()
  with pytest.raises(KeyError):
    config.size('B')                                                            # no weight has a batch axis


def test_the_rotated_width_is_a_share_of_the_head():
  assert [ModelConfig(head_width=64, rope_share=share).rotated_width for share in (0.25, 0.5, 1.0)] == [16, 32, 64]


def test_a_preset_by_name_with_changes():
  assert preset('gpt2') == PRESETS['gpt2']
  assert preset('nano', dtype='bfloat16') == dataclasses.replace(PRESETS['nano'], dtype='bfloat16')
  assert PRESETS['nano'].dtype == 'float32'
  with pytest.raises(ConfigError, match=r"there is no model preset 'gpt-2'. Choose one of: nano, .*qwen3-8b"):
    preset('gpt-2')
  with pytest.raises(ConfigError, match='model layers=0'):
    preset('nano', layers=0)


def test_presets_can_be_told_apart_and_hashed():
  assert len(set(PRESETS.values())) == len(PRESETS)
