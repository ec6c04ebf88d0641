"""Models with cuDNN's attention, whose rows are moved to slot 0 on, against plain attention.

On a CPU it is the same call by XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.model import forward, running
from rlhf_jax.model.cache import empty_cache
from rlhf_jax.model.heads import LanguageModel, ScalarModel

RNG = np.random.default_rng(12)
# Full, padded left, right, on both sides, and empty; then with holes, which only a window measures.
VALID_BT = np.array(
  [
    [c == 'x' for c in row]
    for row in (
      'xxxxxxxxx',
      '..xxxxxxx',
      'xxxxx....',
      '.xxxx....',
      '.........',
      'xx.x..xxx',
      '.x.x.x.x.',
    )
  ]
)
HOLES = 5  # rows from here on have them
TOKENS_BT = RNG.integers(0, 19, VALID_BT.shape)


def both(config, seed=3):
  """(LanguageModel, ScalarModel, parameters) of a configuration."""
  models = LanguageModel(config), ScalarModel(config)
  return *models, [tiny.params(model, seed + i) for i, model in enumerate(models)]


@functools.cache
def measured(config, length, rows, whole=True):
  """What losses read, or log-probabilities alone, and the gradient of a sum with uneven weights.

  Of rows that are padded to `length` slots on the right.
  """
  policy, scalar, params = both(config)
  more = (0, 0), (0, length - VALID_BT.shape[1])
  tokens_BT, valid_BT = (jnp.array(np.pad(x[:rows], more)) for x in (TOKENS_BT, VALID_BT))

  def numbers(params):
    of_policy, of_scalar = params
    logprob_BR, entropy_BR = forward.next_logprobs(
      policy, of_policy, tokens_BT, valid_BT, start=3, temperature=0.8
    )
    found = {'logprob': logprob_BR[:, :6], 'entropy': entropy_BR[:, :6]}
    if whole:
      found['value'] = forward.values(scalar, of_scalar, tokens_BT, valid_BT)[:, :9]
      found['score'] = forward.scores(scalar, of_scalar, tokens_BT, valid_BT)
    total = sum(
      jnp.sum(x * jnp.sin(1.3 * jnp.arange(x.size).reshape(x.shape))) for x in found.values()
    )
    return total, found

  gradient, found = jax.jit(jax.grad(numbers, has_aux=True))(params)
  return jax.device_get((found, gradient))


def assert_alike(got, expected):
  (found, gradient), (other, other_gradient) = got, expected
  for name in other:
    np.testing.assert_allclose(found[name], other[name], atol=3e-5, err_msg=name)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(other_gradient), strict=True
  ):
    scale, name = np.abs(y).max(), path[-1].key
    assert (
      scale > 1e-3 or name == 'k_bias_LKH' or not y.any()
    )  # softmax takes no notice of that bias
    np.testing.assert_allclose(x, y, atol=1e-4 * scale + 2e-5, err_msg=name)


@pytest.mark.parametrize('length, changes', [(9, {'scan_layers': False}), (10, {'remat': 'dots'})])
def test_rows_padded_anywhere_are_those_of_plain_attention(length, changes):
  """Of padding too. Positions are learned, so that a wrong one changes every number."""
  plain = tiny.config('gpt2', layers=2, kv_heads=1, head_width=16, scan_layers=True)
  expected = measured(plain, 9, len(VALID_BT))
  assert not expected[0]['score'][4] and expected[0]['score'][:4].all()
  assert_alike(
    measured(tiny.by_cudnn(dataclasses.replace(plain, **changes)), length, len(VALID_BT)), expected
  )


def test_windows_are_those_of_plain_attention():
  """Where a row has no holes: a window counts slots there, and tokens here."""
  plain = tiny.config('mistral', window=3, scan_layers=True)
  assert_alike(
    *(measured(config, 9, HOLES, whole=False) for config in (tiny.by_cudnn(plain), plain))
  )


def program(*args, segment_BT=None, wanted=None):
  """The text of `hidden` in the form for cuDNN, with arrays named by their shapes alone."""
  model = LanguageModel(tiny.by_cudnn(tiny.config('llama')))
  params = tiny.params(model, 1)
  return str(
    jax.make_jaxpr(
      lambda *xs: forward.hidden(model, params, *xs, segment_BT=segment_BT, wanted=wanted)
    )(*args)
  )


def test_rows_are_moved_unless_they_are_packed():
  given = jnp.array(TOKENS_BT), jnp.array(VALID_BT)
  assert ' sort[' in program(*given)
  assert ' sort[' not in program(*given, segment_BT=jnp.ones(VALID_BT.shape, jnp.int32))


def test_dense_rows_keep_the_order_of_their_tokens():
  got = forward.dense_rows(jnp.array(TOKENS_BT), jnp.array(VALID_BT))
  for row, tokens, valid in zip(np.asarray(got), TOKENS_BT, VALID_BT, strict=True):
    np.testing.assert_array_equal(row, [*tokens[valid], *tokens[~valid]])


def test_in_bfloat16_it_is_the_float32_model_up_to_rounding():
  """Products round by 2^-9 of numbers around 1, a score of times: 0.03 is a few roundings."""
  exact = tiny.config('llama', layers=2)
  params = jax.tree.map(lambda x: x / 2, tiny.params(LanguageModel(exact), 1))
  logprobs = lambda config: jax.jit(
    lambda p: forward.next_logprobs(
      LanguageModel(config), p, jnp.array(TOKENS_BT), jnp.array(VALID_BT)
    )[0]
  )(params)
  rounded = logprobs(dataclasses.replace(exact, dtype='bfloat16', attention='cudnn'))
  counted_BT = VALID_BT[:, 1:] & VALID_BT[:, :-1]
  apart = np.abs(rounded - logprobs(exact))[counted_BT]
  assert rounded.dtype == jnp.float32 and 0 < apart.max() < 0.03


# ---- prompts into a cache


def prefilled(config, slots, params=None, apply=None):
  model = LanguageModel(config)
  params = tiny.params(model, 7) if params is None else params
  apply = functools.partial(model.apply, {'params': params})
  cache = empty_cache(config, len(VALID_BT), slots)
  cache = jax.tree.map(
    lambda x: x.at[:, :, VALID_BT.shape[1] :].set(5.0), cache
  )  # what stands behind stays
  fill = jax.jit(lambda *xs: forward.prefill(apply, config, *xs))
  return jax.device_get(fill(jnp.array(TOKENS_BT), jnp.array(VALID_BT), cache))


@functools.cache
def plain_cache():
  return prefilled(tiny.config('llama', layers=2), 13)


@pytest.mark.parametrize('scanned, by_cudnn', [(True, False), (False, True), (True, True)])
def test_a_cache_is_filled_alike(scanned, by_cudnn):
  """Scanned, moved to slot 0 and back, or both: every key stands where its token stands."""
  config = tiny.config('llama', layers=2, scan_layers=scanned)
  (got_BTD, cache), (expected_BTD, expected) = (
    prefilled(tiny.by_cudnn(config) if by_cudnn else config, 13),
    plain_cache(),
  )
  assert got_BTD.shape == expected_BTD.shape == (len(VALID_BT), 1, config.width)
  np.testing.assert_allclose(got_BTD, expected_BTD, atol=2e-5)
  assert len(cache) == len(expected) == 2
  for layer, other in zip(cache, expected, strict=True):
    for x_BKSH, y_BKSH in zip(layer, other, strict=True):
      assert x_BKSH.shape == y_BKSH.shape == (len(VALID_BT), 2, 13, 8)
      np.testing.assert_allclose(x_BKSH, y_BKSH, atol=2e-5)
      assert (x_BKSH[:, :, 9:] == 5).all()


# ---- which form a model takes


def test_who_takes_dense_rows():
  plain = tiny.config('llama', dtype='bfloat16')
  takes = {
    name: running.takes_dense_rows(dataclasses.replace(plain, attention=name))
    for name in ('xla', 'cudnn', 'splash')
  }
  assert takes == {'xla': False, 'cudnn': True, 'splash': False}
