"""Cross entropy against a loop over the tokens of each row alone, whatever the padding and the packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.errors import AxesError
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.model import forward
from rlhf_jax.records import Demonstrations

T = 12
KEY = jax.random.key(0)
FAMILIES = ['gpt2', 'mistral']  # absolute positions; a window of 5 tokens


def demonstrations(seed=0, lengths=(12, 7, 5, 2, 1)):
  """[(tokens, mask)] of unequal length. Masks have holes, and mark the first token, which must not count."""
  rng = np.random.default_rng(seed)
  rows = [(rng.integers(0, 19, n), rng.random(n) < 0.6) for n in lengths]
  for _, mask in rows:
    mask[[0, -1]] = True
  return rows


def batch_of(rows, sides):
  tokens_BT, valid_BT = tiny.pad([tokens for tokens, _ in rows], sides, T)
  mask_BT, _ = tiny.pad([mask for _, mask in rows], sides, T)
  return Demonstrations(tokens_BT=tokens_BT, valid_BT=valid_BT, mask_BT=mask_BT.astype(bool))  # padding is 1: marked


def packed(rows, left=0):
  """All rows in one, after `left` slots of padding and before the rest."""
  tokens, mask = (np.concatenate(parts) for parts in zip(*rows))
  segment = np.repeat(np.arange(1, len(rows) + 1), [len(row) for row, _ in rows])
  put = lambda x: jnp.array(np.pad(x.astype(np.int32), (left, 24 - left - len(x))))[None]
  return Demonstrations(tokens_BT=put(tokens), valid_BT=put(segment) > 0, mask_BT=put(mask) > 0,
                        segment_BT=put(segment))


def by_loop(model, params, rows):
  """(summed nats, summed entropy, count) of the marked tokens that have something before them."""
  nats = entropy = count = 0
  for (tokens, mask), table in zip(rows, tiny.next_token_tables(model, params, [r for r, _ in rows], T)):
    for i in range(1, len(tokens)):
      if mask[i]:
        nats -= table[i - 1, tokens[i]]
        entropy -= (np.exp(table[i - 1]) * table[i - 1]).sum()
        count += 1
  return nats, entropy, count


@functools.partial(jax.jit, static_argnums=0)                         # one compilation a model and shape, for all tests
def loss_and_gradient(model, params, batch):
  """(Mean, metrics, gradient of the total)."""
  def total(params):
    loss, metrics = cross_entropy(model)(params, batch, KEY)
    return loss.total, (loss, metrics)
  gradient, (loss, metrics) = jax.grad(total, has_aux=True)(params)
  return loss, metrics, gradient


@pytest.mark.parametrize('family', FAMILIES)
def test_loop_over_tokens_with_padding_on_either_side(family):
  model, _ = tiny.models(family)
  params, rows = tiny.params(model, 1), demonstrations()
  nats, entropy, count = by_loop(model, params, rows)
  for sides in (['right'] * 5, ['left'] * 5, ['left', 'left', 'right', 'left', 'right']):
    loss, metrics, _ = loss_and_gradient(model, params, batch_of(rows, sides))
    assert loss.weight == metrics['entropy'].weight == count
    np.testing.assert_allclose(loss.total, nats, rtol=1e-5)
    np.testing.assert_allclose(metrics['entropy'].total, entropy, rtol=1e-5)


def test_chunks_of_the_unembedding_do_not_show():
  model, _ = tiny.models()
  chunked, _ = tiny.models(tokens_per_chunk=15)                      # three columns of five rows: 11 is no multiple
  params, batch = tiny.params(model, 1), batch_of(demonstrations(), ['right'] * 5)
  whole, in_chunks = (loss_and_gradient(m, params, batch) for m in (model, chunked))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), in_chunks, whole)


def test_the_first_token_and_tokens_not_marked_do_not_count():
  model, _ = tiny.models()
  params, rows = tiny.params(model, 1), demonstrations()
  base, *_ = loss_and_gradient(model, params, batch_of(rows, ['left'] * 5))
  without_first = [(tokens, mask & (np.arange(len(mask)) > 0)) for tokens, mask in rows]
  loss, *_ = loss_and_gradient(model, params, batch_of(without_first, ['left'] * 5))
  assert (loss.total, loss.weight) == (base.total, base.weight)
  only_first = [(tokens, np.arange(len(mask)) == 0) for tokens, mask in rows]
  loss, *_ = loss_and_gradient(model, params, batch_of(only_first, ['left'] * 5))
  assert (loss.total, loss.weight) == (0, 0)
  tokens, mask = rows[0]
  end_unmarked = (tokens, mask & (np.arange(T) < 8))                 # what follows the last marked token cannot matter
  changed = (np.where(np.arange(T) < 8, tokens, 3), end_unmarked[1])
  losses = [loss_and_gradient(model, params, batch_of([row, *rows[1:]], ['left'] * 5))[0]
            for row in (end_unmarked, changed)]
  assert losses[0].total == losses[1].total != base.total


@pytest.mark.parametrize('left', [0, 3])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_packed_row_is_the_sum_of_its_rows(family, left):
  model, _ = tiny.models(family)
  params, rows = tiny.params(model, 2), demonstrations(3, (6, 1, 8, 4, 2))
  together, metrics, gradient = loss_and_gradient(model, params, packed(rows, left))
  alone, alone_metrics, alone_gradient = loss_and_gradient(model, params, batch_of(rows, ['right'] * 5))
  assert together.weight == alone.weight > 5
  np.testing.assert_allclose(together.total, alone.total, rtol=1e-6)
  np.testing.assert_allclose(metrics['entropy'].total, alone_metrics['entropy'].total, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, alone_gradient)


def test_packing_without_segments_is_another_loss():
  model, _ = tiny.models()
  params, batch = tiny.params(model, 2), packed(demonstrations(3, (6, 1, 8, 4, 2)))
  with_segments, *_ = loss_and_gradient(model, params, batch)
  without, *_ = loss_and_gradient(model, params, dataclasses.replace(batch, segment_BT=None))
  assert without.weight == with_segments.weight + 4                  # the first tokens of four segments count now
  assert abs(without.value() - with_segments.value()) > 1e-2


@pytest.mark.parametrize('window', [None, 3])
def test_positions_and_masks_of_a_packed_row_are_those_of_its_rows(window):
  lengths, left = (6, 1, 8, 4, 2), 3
  batch = packed(demonstrations(3, lengths), left)
  position_T = np.array(forward.positions(batch.valid_BT, batch.segment_BT))[0]
  causal = forward.causal(tiny.config(window=window), batch.valid_BT, batch.segment_BT)
  seen_TS = np.array(causal.seen(slice(24), slice(24)))[0]
  expected_T, expected_TS, start = np.zeros(24, int), np.zeros((24, 24), bool), left
  for n in lengths:
    one = slice(start, start + n)
    age = np.arange(n)[:, None] - np.arange(n)
    expected_T[one], expected_TS[one, one], start = np.arange(n), (age >= 0) & (age < (window or n)), start + n
  real_T = np.array(batch.valid_BT)[0]
  assert np.array_equal(position_T[real_T], expected_T[real_T])
  assert np.array_equal(seen_TS[real_T], expected_TS[real_T])


def test_nothing_marked_gives_no_loss_and_no_gradient():
  model, _ = tiny.models()
  params, batch = tiny.params(model, 1), batch_of(demonstrations(), ['left'] * 5)
  *_, some = loss_and_gradient(model, params, batch)
  assert any(np.any(g) for g in jax.tree.leaves(some))
  nothing = dataclasses.replace(batch, mask_BT=jnp.zeros_like(batch.mask_BT))
  loss, metrics, gradient = loss_and_gradient(model, params, nothing)
  assert loss.total == loss.weight == loss.value() == metrics['entropy'].value() == 0
  for leaf in jax.tree.leaves(gradient):
    assert np.array_equal(leaf, np.zeros_like(leaf))                 # NaN would not be equal


def test_parts_of_a_batch_add_up_to_it():
  model, _ = tiny.models()
  params, batch = tiny.params(model, 1), batch_of(demonstrations(), ['left'] * 5)
  first_B1 = np.array([True, False, True, False, False])[:, None]
  parts = [dataclasses.replace(batch, mask_BT=batch.mask_BT & rows_B1) for rows_B1 in (first_B1, ~first_B1)]
  losses = [loss_and_gradient(model, params, part)[0] for part in parts]
  whole, *_ = loss_and_gradient(model, params, batch)
  assert losses[0].weight > 0 < losses[1].weight
  assert (losses[0] + losses[1]).weight == whole.weight
  np.testing.assert_allclose((losses[0] + losses[1]).value(), whole.value(), rtol=1e-6)


def test_arrays_that_disagree_are_refused():
  model, _ = tiny.models()
  batch = batch_of(demonstrations(), ['left'] * 5)
  short = dataclasses.replace(batch, mask_BT=batch.mask_BT[:, 1:])
  with pytest.raises(AxesError, match='mask_BT has T=11, but tokens_BT has T=12'):
    cross_entropy(model)(tiny.params(model, 1), short, KEY)
