"""A random-sized tiny model of every family, with sizes that differ from each other so that a swapped axis shows."""

from rlhf_jax.model.config import ModelConfig, RopeScaling

_SIZES = {'vocab_size': 61, 'width': 24, 'layers': 3, 'query_heads': 6, 'kv_heads': 2, 'head_width': 8,
          'feedforward_width': 44, 'context_length': 64}
_OLD = _SIZES | {'query_heads': 3, 'kv_heads': 3, 'norm': 'layer', 'gated': False, 'qkv_bias': True, 'output_bias': True,
                 'feedforward_bias': True}

FAMILIES = {
  'gpt2': ModelConfig(**_OLD, family='gpt2', position='learned', activation='gelu_tanh', tied=True),
  'gpt_neox': ModelConfig(**_OLD, family='gpt_neox', activation='gelu', rope_share=0.5, parallel_residual=True),
  'gpt_neox-sequential': ModelConfig(**_OLD, family='gpt_neox', activation='gelu', rope_share=0.25),
  'llama': ModelConfig(**_SIZES, family='llama'),
  'llama-tied': ModelConfig(**_SIZES, family='llama', tied=True),
  'llama-linear': ModelConfig(**_SIZES, family='llama', rope_scaling=RopeScaling('linear', factor=3.0)),
  'llama3': ModelConfig(**_SIZES, family='llama', rope_base=5e5,
                        rope_scaling=RopeScaling('llama3', factor=8.0, original_context=16)),
  'mistral': ModelConfig(**_SIZES, family='mistral', window=5),
  'qwen2': ModelConfig(**_SIZES, family='qwen2', qkv_bias=True, norm_epsilon=1e-6, rope_base=1e6),
  'qwen3': ModelConfig(**_SIZES, family='qwen3', qk_norm=True, norm_epsilon=1e-6, rope_base=1e6),
}
