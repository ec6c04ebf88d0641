"""What the backward pass computes again, counted in its program; the numbers stay the same."""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.cudnn import fused_attention_stablehlo

from rlhf_jax import runners
from rlhf_jax.errors import ConfigError
from rlhf_jax.model import forward
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.device import Device
from rlhf_jax.model.heads import LanguageModel, initial_params

LAYERS, B, T = 3, 8, 6
TOKENS_BT = jnp.array(np.random.default_rng(3).integers(0, 19, (B, T)))
# Of a block: q, k, v, scores, weighted sum, o, gate, up, down. The unembedding has 3 in all.
FORWARD = 9


def config(**changes):
  return tiny.config('llama', **{'layers': LAYERS, 'scan_layers': False} | changes)


def gradient(config, mesh=None):
  """The equations of the gradient of a model's log-probabilities."""
  model = LanguageModel(config)
  params = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
  total = lambda p: forward.next_logprobs(model, p, TOKENS_BT, TOKENS_BT >= 0)[0].sum()
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    program = jax.make_jaxpr(jax.grad(total))(params)
  return list(tiny.equations(program.jaxpr))


def primitives(config, mesh=None):
  """How often each primitive is in it."""
  return collections.Counter(equation.primitive.name for equation in gradient(config, mesh))


def products(config, mesh=None):
  return primitives(config, mesh)['dot_general']


PLAIN = LAYERS * 3 * FORWARD + 3  # two more of each for its gradient


@pytest.mark.parametrize(
  'remat, again',
  [
    ('none', 0),
    ('dots', 2),  # both of plain attention, whose gradient needs more than its output
    ('block', 8),  # all but the last, on which no gradient depends
  ],
)
def test_products_that_are_made_again(remat, again):
  assert products(config(remat=remat)) == PLAIN + LAYERS * again
  assert products(config(remat=remat, scan_layers=True)) == 3 * FORWARD + 3 + again


def test_attention_in_a_loop_over_queries_is_made_again_alone():
  """On an accelerator without a fused kernel."""
  here = {'attention': 'xla', 'device': Device('gpu', 2**30, 7.5)}
  assert products(config(remat='dots', **here)) == PLAIN + LAYERS * 2


@pytest.mark.parametrize('remat, calls', [('none', 1), ('dots', 1), ('block', 2)])
def test_the_fused_kernel_runs_once_where_its_output_is_kept(remat, calls, monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda *args: True)
  count = primitives(
    config(remat=remat, dtype='bfloat16', device=Device('gpu', 2**30, 9.0), scan_layers=True)
  )
  assert count['dot_product_attention_fwd_wrapper'] == calls
  assert count['dot_product_attention_bwd_wrapper'] == 1


@pytest.mark.parametrize('remat, keeps', [('none', True), ('dots', True), ('block', False)])
def test_what_the_backward_pass_of_splash_needs_is_kept(remat, keeps):
  """Its output, and the sums of its softmax: of every layer, sequence, head and query."""
  on = config(remat=remat, device=Device('tpu', 2**30), scan_layers=True)
  shapes = {x.aval.shape for e in gradient(on) if e.primitive.name == 'scan' for x in e.outvars}
  assert ((LAYERS, B, 6, 128) in shapes) == ((LAYERS, B, 6, 128, 8) in shapes) == keeps


def test_gathered_weights_are_not_kept_and_products_are():
  """On a mesh that cuts parameters there is a policy even for 'none'."""
  mesh = runners.sharded(data=2, fsdp=4).mesh
  assert products(config(remat='none'), mesh) == PLAIN
  assert (
    primitives(config(remat='none'), mesh)['remat2']
    and not primitives(config(remat='none'))['remat2']
  )


def test_the_choice_is_by_the_tokens_of_one_device():
  """A token keeps 3 * 264 numbers of 4 bytes: 48 tokens on one device, 6 on each of eight."""
  a_token = 3 * 264 * 4
  on = lambda tokens: config(attention='xla', device=Device('gpu', 5 * tokens * a_token, 7.5))
  assert products(on(48)) == PLAIN + LAYERS * 2 and products(on(47.99)) == PLAIN + LAYERS * 8
  mesh = runners.sharded(data=8).mesh
  assert (
    products(on(6), mesh) == PLAIN + LAYERS * 2 and products(on(5.99), mesh) == PLAIN + LAYERS * 8
  )


@functools.cache
def measured(**changes):
  model = LanguageModel(config(layers=2, **changes))
  total = lambda p: (
    forward.next_logprobs(model, p, TOKENS_BT, TOKENS_BT >= 0, start=2)[0] * jnp.arange(1.0, T - 1)
  ).sum()
  return jax.device_get(jax.jit(jax.value_and_grad(total))(tiny.params(model, 2)))


@pytest.mark.parametrize(
  'changes',
  [
    {'remat': 'dots', 'scan_layers': True},
    {'remat': 'block', 'scan_layers': True},
  ],
)
def test_nothing_changes_but_what_is_kept(changes):
  (value, gradient), (expected, expected_gradient) = measured(**changes), measured(remat='none')
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
    gradient,
    expected_gradient,
  )


def test_the_switch_that_it_was_means_whole_blocks():
  assert [ModelConfig(remat=said).remat for said in (True, False)] == ['block', 'none']
  with pytest.raises(ConfigError, match="remat='all'"):
    dataclasses.replace(ModelConfig(), remat='all')
