"""How a model runs, as the flags of the benchmarks say it: attention, rematerialisation, scan."""

from typing import Literal

from rlhf_jax.model import running
from rlhf_jax.model.config import ModelConfig

AttentionName = Literal['auto', 'xla', 'cudnn', 'splash']
Remat = Literal['auto', 'none', 'dots', 'block']
Scan = Literal['auto', 'yes', 'no']


def changes(attention: AttentionName = 'auto', remat: Remat = 'auto', scan: Scan = 'auto') -> dict:
  """Fields of ModelConfig for these flags."""
  return {'attention': attention, 'remat': remat,
          'scan_layers': {'auto': None, 'yes': True, 'no': False}[scan]}


def chosen(config: ModelConfig, tokens: int) -> dict[str, str]:
  """How a model of a ModelConfig runs on its device, by flag; an update is of so many tokens."""
  return {'attention': running.attention_kernel(config),
          'remat': running.remat_policy(config, tokens),
          'scan': 'yes' if running.scans_layers(config) else 'no'}
