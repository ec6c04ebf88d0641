"""The one transformer: every family is this module under another `ModelConfig`.

A weight's name is its shape, its place in the checkpoint and its sharding. Blocks are stored stacked (`q_LDNH`) and run
either unrolled, split once into layers (`q_DNH`), or as one scanned block; the numbers are the same. Heads are in
`heads.py`, positions in `forward.py`, what a token sees in `attention.py`. Absent on purpose: dropout, which RLHF turns off.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.axes import axes_of
from rlhf_jax.model import running
from rlhf_jax.model.attention import PRODUCT, Causal, Seen, attend, frequencies, layer_norm, project, rms_norm, rotate
from rlhf_jax.model.cache import write
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.partition import batch_parts, constrain, cuts_parameters, for_lookup, gathered


def _gelu(x):
  """x times the normal distribution function of x. Hendrycks and Gimpel 2016 (1606.08415).

  In float32, whatever x is: in bfloat16 JAX's own rounds the root of 1/2, and is two kernels on GPUs.
  """
  if x.dtype == jnp.float32:
    return jax.nn.gelu(x, approximate=False)
  x32 = x.astype(jnp.float32)
  return (0.5 * x32 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


_ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': _gelu,
                'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}


def _weight(module, name):
  """The parameter of that name, its sizes read off the suffix, cast to the compute dtype and then gathered."""
  return gathered(_stored(module, name).astype(module.config.dtype), name)


def _row(module, name, index):
  """Rows of a table in the compute dtype; looked up before the cast, so that their gradients are summed in float32."""
  return for_lookup(_stored(module, name), name, index.size)[index].astype(module.config.dtype)


def _stored(module, name):
  c = module.config
  return module.param(name, _initial(name, c), c.shape(name), jnp.float32)


def _initial(name, config):
  """Norm scales 1, biases 0, other weights normal with variance 1 / fan-in, less where they add to the stream."""
  if 'bias' in name:
    return nn.initializers.zeros
  if 'norm' in name:
    return nn.initializers.ones
  letters = axes_of(name)
  into_stream = name in ('o_NHD', 'down_FD')
  fan_in = math.prod(map(config.size, letters[:-1])) if into_stream else config.width
  return nn.initializers.normal((fan_in * (2 * config.layers if into_stream else 1)) ** -0.5)


def _norm(module, name, x_BTD):
  """The stream normalised, all T of it on every chip: what products with weights that `tensor` cuts read."""
  c = module.config
  scale_D = _weight(module, f'{name}_D')
  if c.norm == 'rms':
    y_BTD = rms_norm(x_BTD, scale_D, c.norm_epsilon)
  else:
    y_BTD = layer_norm(x_BTD, scale_D, _weight(module, f'{name}_bias_D'), c.norm_epsilon)
  return constrain(y_BTD, 'BTD')


def _stream(x_BTD):
  """The stream between two such products, of which a chip keeps its part of T: what they add to it is scattered."""
  return constrain(x_BTD, 'BTD', T='tensor')


class Block(nn.Module):
  """Attention and a feed-forward, each read from a normalised stream and added back to it.

  Returns the stream and the layer's cache (None without one). With a cache, the T tokens go to its slots from `slot` on.
  All tokens are seen, but only those that are `wanted` ask and go on: see `Transformer`.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, position_BT, sees, cache=None, slot=0, wanted=None):
    c = self.config
    y_BTD = _norm(self, 'attention_norm', x_BTD)
    attended_BTD, cache = self._attention(y_BTD, position_BT, sees, cache, slot, wanted)
    x_BTD = _chosen(x_BTD, wanted)
    if c.parallel_residual:
      return x_BTD + attended_BTD + self._feedforward(_norm(self, 'feedforward_norm', x_BTD)), cache
    x_BTD = _stream(x_BTD + attended_BTD)
    return x_BTD + self._feedforward(_norm(self, 'feedforward_norm', x_BTD)), cache

  def _attention(self, y_BTD, position_BT, sees, cache, slot, wanted):
    c, weight = self.config, functools.partial(_weight, self)
    q_BTNH = _product(_chosen(y_BTD, wanted), weight('q_DNH'))
    k_BTKH, v_BTKH = _product(y_BTD, weight('k_DKH')), _product(y_BTD, weight('v_DKH'))
    if c.qkv_bias:
      q_BTNH, k_BTKH, v_BTKH = q_BTNH + weight('q_bias_NH'), k_BTKH + weight('k_bias_KH'), v_BTKH + weight('v_bias_KH')
    if c.qk_norm:
      q_BTNH = rms_norm(q_BTNH, weight('q_norm_H'), c.norm_epsilon)
      k_BTKH = rms_norm(k_BTKH, weight('k_norm_H'), c.norm_epsilon)
    if c.position == 'rope':
      radians = frequencies(c)
      q_BTNH, k_BTKH = rotate(q_BTNH, _chosen(position_BT, wanted), radians), rotate(k_BTKH, position_BT, radians)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    if cache is not None:
      cache = write(cache, k_BKTH, v_BKTH, slot)
    k_BKSH, v_BKSH = cache if isinstance(sees, Seen) and cache is not None else (k_BKTH, v_BKTH)
    kernel = running.attention_kernel(c)
    chosen = _of_chosen(sees, wanted)
    if isinstance(chosen, Seen) and cache is None:
      kernel = 'xla'  # of one token a row, to be differentiated: the kernel of decoding cannot be
    attended_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, chosen, kernel)
    out_BTD = _product(attended_BTNH, weight('o_NHD'), contracted=2)
    return (out_BTD + weight('o_bias_D') if c.output_bias else out_BTD), cache

  def _feedforward(self, y_BTD):
    c, weight = self.config, functools.partial(_weight, self)
    def branch(name):
      x_BTF = constrain(_product(y_BTD, weight(f'{name}_DF')), 'BTF', F='tensor')
      return x_BTF + weight(f'{name}_bias_F') if c.feedforward_bias else x_BTF
    activation = _ACTIVATIONS[c.activation]
    inner_BTF = activation(branch('gate')) * branch('up') if c.gated else activation(branch('up'))
    out_BTD = _product(inner_BTF, weight('down_FD'))
    return out_BTD + weight('down_bias_D') if c.feedforward_bias else out_BTD


class Transformer(nn.Module):
  """Token ids to the normalised stream after the last block, [B, T, D] in the compute dtype, and the cache.

  `sees` is a Causal, of these tokens alone, or a Seen whose keys are the slots of the cache. `wanted` says of which tokens
  the stream is wanted: None for all, a number for the slots from there on, an array slot_B for one a row. The last block
  computes no others, unless blocks are scanned. `blocks` among the parameters may also be what `split_layers` makes of it,
  which spares a decode loop the splitting at every token, and is never scanned.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BT, position_BT, sees, cache=None, slot=0, wanted=None):
    c = self.config
    x_BTD = _row(self, 'embedding_VD', tokens_BT)
    if c.position == 'learned':
      x_BTD = x_BTD + _row(self, 'position_TD', position_BT)
    x_BTD = _stream(constrain(x_BTD, 'BTD'))                                    # first whole: the table is cut along V
    blocks = self.param('blocks', _initial_blocks, c) if self.is_initializing() else self.get_variable('params', 'blocks')
    if running.scans_layers(c) and not isinstance(blocks, tuple):
      x_BTD, cache = _scanned(c, blocks, x_BTD, position_BT, sees, cache)
      x_BTD = _chosen(x_BTD, wanted)
    else:
      x_BTD, cache = _unrolled(c, blocks, x_BTD, position_BT, sees, cache, slot, wanted)
    return _norm(self, 'final_norm', x_BTD), cache


def _chosen(x_BT, wanted):
  """Of x [B, T, ...] the tokens that are wanted."""
  if wanted is None:
    return x_BT
  if isinstance(wanted, int):
    return x_BT[:, wanted:]
  here_BT = (jnp.arange(x_BT.shape[1]) == wanted[:, None]).reshape(*x_BT.shape[:2], *[1] * (x_BT.ndim - 2))
  return jnp.sum(jnp.where(here_BT, x_BT, 0), axis=1, keepdims=True, dtype=x_BT.dtype)   # no gather: its gradient scatters


def _of_chosen(sees, wanted):
  """What the tokens that are wanted see."""
  if wanted is None:
    return sees
  return sees.replace(start=wanted) if isinstance(wanted, int) else sees.at(wanted)


def split_layers(blocks, layers):
  """Stacked blocks {'q_LDNH': ...} as a tuple of layers {'q_DNH': ...}; `lax.split` so that gradients are concatenated."""
  if isinstance(blocks, tuple):
    return blocks
  pieces = {name: jax.lax.split(stacked, [1] * layers) for name, stacked in blocks.items()}
  return tuple({_without_L(name): piece[i][0] for name, piece in pieces.items()} for i in range(layers))


def _with_L(name):
  letters = axes_of(name)
  return f'{name[:-len(letters)]}L{letters}'


def _without_L(name):
  letters = axes_of(name)
  return f'{name[:-len(letters)]}{letters[1:]}'


def _initial_blocks(key, config):
  """Stacked parameters of all blocks, each layer drawn from a key of its own."""
  x_BTD, position_BT = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), jnp.int32)
  plain = dataclasses.replace(config, attention='xla')  # no kernel has to do with what is stored
  one = lambda k: Block(plain).init(k, x_BTD, position_BT, Causal(jnp.ones((1, 1), jnp.int32)))['params']
  return {_with_L(name): stacked for name, stacked in jax.vmap(one)(jax.random.split(key, config.layers)).items()}


def _apply_block(config, wanted, layer, *args):
  x_BTD, cache = Block(config).apply({'params': layer}, *args, wanted=wanted)
  return _stream(x_BTD), cache


# Layers of which a scan stacks the cache, beside that which is stored layer by layer.
_LAYERS_CACHED = 8
# What a weight goes through before it is multiplied with: done again rather than kept, or all layers are kept gathered.
_BEFORE_PRODUCTS = 'convert_element_type', 'sharding_constraint', 'reshape', 'transpose'
_FUSED_ATTENTION = 'dot_product_attention_fwd_wrapper'  # cuDNN's: its output and the sums of its softmax


def _product(x, weight, contracted=1):
  """`project`, whose result may be kept for the backward pass."""
  return checkpoint_name(project(x, weight, contracted), PRODUCT)


def _keeps_products(primitive, *_, **params):
  if primitive.name == 'name':
    return params['name'] == PRODUCT
  return primitive.name == _FUSED_ATTENTION


def _keeps_all_but_weights(primitive, *_, **__):
  return primitive.name not in _BEFORE_PRODUCTS


def _remat(config, x_BTD, wanted=None):
  """A block that keeps for its backward pass what the policy says; with 'none' all of it, but for
  weights that have to be gathered.
  """
  apply = functools.partial(_apply_block, config, wanted)
  B, T, _ = x_BTD.shape
  name = running.remat_policy(config, B * T // batch_parts())
  if name == 'none' and not cuts_parameters():
    return apply
  policy = {'none': _keeps_all_but_weights, 'dots': _keeps_products, 'block': None}[name]
  return jax.checkpoint(apply, prevent_cse=not running.scans_layers(config), policy=policy)


def _unrolled(config, blocks, x_BTD, position_BT, sees, cache, slot, wanted):
  if cache is None:
    every, last = _remat(config, x_BTD), _remat(config, x_BTD, wanted)
  else:
    every, last = (functools.partial(_apply_block, config, each) for each in (None, wanted))
  written = []
  for i, layer in enumerate(split_layers(blocks, config.layers)):
    apply = last if i == config.layers - 1 else every
    x_BTD, layer_cache = apply(layer, x_BTD, position_BT, sees, None if cache is None else cache[i], slot)
    if cache is not None and isinstance(sees, Causal):                          # laid in its place before the next is made
      x_BTD, layer_cache = jax.lax.optimization_barrier((x_BTD, layer_cache))
    written.append(layer_cache)
  return x_BTD, None if cache is None else tuple(written)


def _scanned(config, blocks, x_BTD, position_BT, sees, cache):
  apply = _remat(config, x_BTD)

  def body(x_BTD, layer_and_cache):
    layer, layer_cache = layer_and_cache
    return apply(layer, x_BTD, position_BT, sees, layer_cache)

  def scan(x_BTD, first, last, stacked_cache):
    # Layers in the compute dtype before the loop: one that casts its slices does so in both passes.
    layers = {_without_L(name): stacked[first:last].astype(config.dtype)
              for name, stacked in blocks.items()}
    return jax.lax.scan(body, x_BTD, (layers, stacked_cache))

  if cache is None:
    return scan(x_BTD, 0, config.layers, None)
  written = []
  for first in range(0, config.layers, _LAYERS_CACHED):
    some = cache[first:first + _LAYERS_CACHED]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *some)
    x_BTD, stacked = scan(x_BTD, first, first + len(some), stacked)
    some = tuple(tuple(x[i] for x in stacked) for i in range(len(some)))
    x_BTD, some = jax.lax.optimization_barrier((x_BTD, some))  # the stack goes before the next comes
    written += some
  return x_BTD, tuple(written)
