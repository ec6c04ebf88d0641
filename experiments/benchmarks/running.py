"""How a model runs, as the flags of the benchmarks say it: attention, rematerialisation, scan."""

from typing import Literal

from rlhf_jax.errors import ConfigError
from rlhf_jax.model.config import ModelConfig

AttentionName = Literal['auto', 'xla', 'cudnn', 'splash']
Remat = Literal['auto', 'none', 'dots', 'block']
Scan = Literal['auto', 'yes', 'no']


def changes(attention='auto', remat='auto', scan='auto'):
  """Fields of ModelConfig for these flags; what is 'auto' stays as the model has it by default."""
  fields = {}
  if attention != 'auto':
    fields['attention'] = attention
  if remat != 'auto':
    fields['remat'] = _remat(remat)
  if scan != 'auto':
    fields['scan_layers'] = scan == 'yes'
  return fields


def _remat(policy):
  if not isinstance(ModelConfig.remat, bool):
    return policy
  if policy == 'dots':
    raise ConfigError("--remat dots, but this model recomputes all of a block or nothing. Pass block or none.")
  return policy == 'block'


def chosen(config):
  """What a ModelConfig says of how it runs, by flag."""
  remat = {True: 'block', False: 'none'}.get(config.remat, config.remat)
  scan = {True: 'yes', False: 'no', None: 'auto'}[config.scan_layers]
  return {'attention': config.attention, 'remat': remat, 'scan': scan}
