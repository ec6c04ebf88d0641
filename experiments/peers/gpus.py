"""Whether there is a GPU that both libraries can use, and what is compared on it by default."""

import importlib.util

import torch

from experiments.bench import BatchConfig
from rlhf_jax.errors import ConfigError

PRESETS = {'sft': 'llama3.2-1b', 'reward': 'llama3.2-1b', 'generate': 'llama3.2-1b',
           'ppo': 'pythia-1b'}
BATCH = BatchConfig(
  sft_rows=8, tokens=2048, reward_pairs=16, reward_tokens=512, generate_prompts=64,
  prompt_tokens=128, new_tokens=128, ppo_prompts=64, ppo_prompt_tokens=512, ppo_new_tokens=53,
  epochs=4, minibatches=4)
_PLUGINS = 'jax_cuda13_plugin', 'jax_cuda12_plugin'


def check():
  """Raises ConfigError where one of the two libraries has no GPU; JAX is not started."""
  missing = []
  if torch.version.cuda is None:
    missing.append(f'PyTorch {torch.__version__} is built without CUDA (needed: a CUDA build)')
  elif not torch.cuda.is_available():
    missing.append(f'PyTorch {torch.__version__} sees no GPU (needed: one that nvidia-smi lists, '
                   f'and a driver for CUDA {torch.version.cuda})')
  if not any(map(importlib.util.find_spec, _PLUGINS)):
    missing.append("JAX has no CUDA plugin (needed: pip install -e '.[cuda]')")
  if missing:
    raise ConfigError(f'--device gpu, but {", and ".join(missing)}. Without --device it compares '
                      'on the CPU.')
