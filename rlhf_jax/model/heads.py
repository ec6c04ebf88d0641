"""The two models that RLHF needs, on one backbone: a language model and a model of one number.

`LanguageModel` is policy and reference, `ScalarModel` value and reward model. Their parameters are the plain dicts
{'backbone', 'unembed'} (no 'unembed' where it is tied to the embedding) and {'backbone', 'scalar'}, so what one stage
hands to the next is dict arithmetic. Use them through `forward.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.errors import ConfigError
from rlhf_jax.model.attention import Causal
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.partition import gathered
from rlhf_jax.model.transformer import Transformer, split_layers


class _Unembed(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self):
    shape = self.config.shape('unembed_DV')
    return self.param('unembed_DV', nn.initializers.normal(self.config.width ** -0.5), shape, jnp.float32)


class _Scalar(nn.Module):
  """One number a position: hidden . scalar + bias. The bias is where a reward model's mean is stored."""
  config: ModelConfig

  @nn.compact
  def __call__(self, hidden_BTD):
    scalar_D = self.param('scalar_D', nn.initializers.normal((self.config.width + 1) ** -0.5),
                          self.config.shape('scalar_D'), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, (), jnp.float32)
    return jnp.einsum('BTD,D->BT', hidden_BTD.astype(jnp.float32), scalar_D) + bias


class LanguageModel(nn.Module):
  """Backbone and unembedding. `apply` gives the hidden stream [B, T, D] and the cache; `forward.py` unembeds it."""
  config: ModelConfig

  def setup(self):
    self.backbone = Transformer(self.config)
    if not self.config.tied:
      self.unembed = _Unembed(self.config)

  def __call__(self, tokens_BT, position_BT, sees, cache=None, slot=0, wanted=None):
    if self.is_initializing() and not self.config.tied:
      self.unembed()
    return self.backbone(tokens_BT, position_BT, sees, cache, slot, wanted)


class ScalarModel(nn.Module):
  """Backbone and scalar head: float32 [B, T]. `head` applies the head alone, to the stream of a shared trunk."""
  config: ModelConfig

  def setup(self):
    self.backbone = Transformer(self.config)
    self.scalar = _Scalar(self.config)

  def __call__(self, tokens_BT, position_BT, sees):
    return self.scalar(self.backbone(tokens_BT, position_BT, sees)[0])

  def head(self, hidden_BTD):
    return self.scalar(hidden_BTD)


def initial_params(model, key):
  """Fresh float32 parameters of a LanguageModel or ScalarModel, a plain nested dict. Works under jit and eval_shape."""
  tokens_BT = jnp.zeros((1, 1), jnp.int32)
  return model.init(key, tokens_BT, tokens_BT, Causal(tokens_BT))['params']


def unembed_DV(params):
  """The unembedding of a LanguageModel's parameters, tied or not."""
  return params['unembed']['unembed_DV'] if 'unembed' in params else params['backbone']['embedding_VD'].T


def prepare_to_decode(model, params, gather=True):
  """Parameters in the compute dtype, blocks split into layers: made once, outside a decode loop.

  With `gather` they are whole along the mesh axis fsdp, which would else be gathered at every token.
  """
  cast = lambda tree: jax.tree.map(lambda x: x.astype(model.config.dtype), tree)
  backbone = params['backbone'] | {'blocks': split_layers(params['backbone']['blocks'], model.config.layers)}
  params = cast(params | {'backbone': backbone})
  name = lambda path: path[-1].key
  return jax.tree_util.tree_map_with_path(lambda path, x: gathered(x, name(path)), params) if gather else params


@dataclasses.dataclass(frozen=True)
class Models:
  """The models of a PPO run: what each parameter tree is applied with. The reference is another policy's parameters."""
  policy: LanguageModel
  value: ScalarModel
  reward: ScalarModel | None = None  # None where Python functions score

  def __post_init__(self):
    sizes = {name: model.config.vocab_size for name, model in vars(self).items() if model is not None}
    if len(set(sizes.values())) > 1:
      raise ConfigError(f'models of one run must share a vocabulary, but have {sizes}. They read the same token ids.')
