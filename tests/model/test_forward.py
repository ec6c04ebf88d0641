"""Positions, masks and scores against loops that follow their definitions, and gradients that stay exact in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax import runners
from rlhf_jax.errors import AxesError, ConfigError
from rlhf_jax.model import forward
from rlhf_jax.model.device import Device
from rlhf_jax.model.heads import LanguageModel, Models, ScalarModel, initial_params

T = 9
RNG = np.random.default_rng(8)
# Full, padded left, right, on both sides, with holes, with a hole at each end, and empty.
VALID_BT = np.array([[c == 'x' for c in row] for row in (
  'xxxxxxxxx', '..xxxxxxx', 'xxxxx....', '.xxxx....', 'xx.x..xxx', '.x.x.x.x.', '.........')])
B = len(VALID_BT)
# Segments of a packed row are numbered from 1 and stand together; 0 is padding.
SEGMENT_BT = np.array([[int(c) for c in row] for row in (
  '112223333', '001122222', '111120000', '012340000', '110200333', '010101010', '000000000')])


def test_a_position_is_how_many_stand_before():
  expected = [[int(row[:t].sum()) for t in range(T)] for row in VALID_BT]
  got = forward.positions(jnp.array(VALID_BT))
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, expected)


def test_positions_begin_anew_in_every_segment():
  valid_BT = SEGMENT_BT > 0
  got = np.asarray(forward.positions(jnp.array(valid_BT), jnp.array(SEGMENT_BT)))
  for b in range(B - 2):                                             # in the next, segment 1 comes back: not packed so
    for t in range(T):
      if valid_BT[b, t]:
        assert got[b, t] == sum(SEGMENT_BT[b, s] == SEGMENT_BT[b, t] for s in range(t))
  assert (got >= 0).all()


@pytest.mark.parametrize('window', [None, 1, 3, 20])
@pytest.mark.parametrize('packed', [False, True])
def test_a_query_sees_what_is_real_and_near_and_of_its_own(window, packed):
  segment_BT = jnp.array(SEGMENT_BT) if packed else None
  causal = forward.causal(tiny.config(window=window), jnp.array(VALID_BT), segment_BT)
  got, at_BT = causal.seen(slice(0, T), slice(0, T)), np.array([causal.at(jnp.full(B, t)).seen_BTS[:, 0] for t in range(T)])
  assert got.shape == (B, T, T)
  for b in range(B):
    for t in range(T):
      for s in range(T):
        sees = s <= t and VALID_BT[b, s] and VALID_BT[b, t] and (window is None or t - s < window)
        sees = sees and (not packed or SEGMENT_BT[b, s] == SEGMENT_BT[b, t] > 0)
        assert got[b, t, s] == at_BT[t, b, s] == sees, (b, t, s)
  np.testing.assert_array_equal(causal.seen(slice(1, 7), slice(3, 8)), got[:, 3:8, 1:7])


@pytest.mark.parametrize('method', [forward.logits, forward.hidden, forward.next_logprobs])
def test_a_sequence_longer_than_the_context_is_refused(method):
  model, _ = tiny.models(context_length=8)
  weights, tokens_BT = tiny.params(model, 0), jnp.zeros((1, T), jnp.int32)
  with pytest.raises(ConfigError, match=r'sequences of 9 tokens, but the model has context_length=8\. Shorten prompts'):
    method(model, weights, tokens_BT, tokens_BT == 0)
  forward.check_length(model.config, 8)


def test_a_mask_of_another_shape_is_refused():
  model, _ = tiny.models()
  with pytest.raises(AxesError, match='valid_BT has T=8, but tokens_BT has T=9'):
    forward.hidden(model, {}, jnp.zeros((1, 9), jnp.int32), jnp.ones((1, 8), bool))


def test_a_score_is_the_value_of_the_last_valid_token():
  _, model = tiny.models()
  weights, tokens_BT, valid_BT = tiny.params(model, 3), jnp.array(RNG.integers(0, 19, (B, T))), jnp.array(VALID_BT)
  value_BT = tiny._values(model, weights, tokens_BT, valid_BT)
  score_B = jax.jit(forward.scores, static_argnums=0)(model, weights, tokens_BT, valid_BT)
  expected = [value_T[np.flatnonzero(valid)[-1]] if valid.any() else 0 for value_T, valid in zip(value_BT, VALID_BT)]
  np.testing.assert_allclose(score_B, np.float32(expected), atol=2e-6)           # the last block computes that token alone
  assert score_B[-1] == 0 and len(set(score_B.tolist())) == B


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_a_score_does_not_depend_on_the_side_of_the_padding(family):
  _, model = tiny.models(family)
  weights, rows = tiny.params(model, 3), [RNG.integers(0, 19, n) for n in (1, 4, 7)]
  score = jax.jit(forward.scores, static_argnums=0)
  left, right = (score(model, weights, *tiny.pad(rows, [side] * 3, T)) for side in ('left', 'right'))
  np.testing.assert_allclose(left, right, atol=1e-5)
  np.testing.assert_allclose(right, [v[-1] for v in tiny.values_of(model, weights, rows, T)], atol=1e-5)


@pytest.mark.parametrize('family', ['gpt2', 'mistral'])
def test_packed_segments_do_not_see_each_other(family):
  model, _ = tiny.models(family)
  weights, rows = tiny.params(model, 5), [RNG.integers(0, 19, n) for n in (2, 3, 4)]
  tokens_BT, segment_BT = jnp.array(np.concatenate(rows))[None], jnp.array([[1] * 2 + [2] * 3 + [3] * 4])
  run = jax.jit(lambda *args: forward.hidden(model, weights, *args))
  together = run(tokens_BT, segment_BT > 0, segment_BT)[0]
  apart = run(*tiny.pad(rows, ['right'] * 3, T), None)
  np.testing.assert_allclose(together, np.concatenate([x[:len(row)] for x, row in zip(apart, rows)]), atol=1e-5)


def test_next_logprobs_begin_where_asked():
  model, _ = tiny.models()
  weights, tokens_BT = tiny.params(model, 1), jnp.array(RNG.integers(0, 19, (2, T)))
  valid_BT = jnp.ones((2, T), bool)
  table = tiny.log_softmax(np.asarray(tiny._logits(model, weights, tokens_BT, valid_BT)) / 0.7)
  for start in (1, 4):
    run = jax.jit(lambda p, start=start: forward.next_logprobs(model, p, tokens_BT, valid_BT, start=start, temperature=0.7))
    logprob, entropy = run(weights)
    before = table[:, start - 1:-1]
    np.testing.assert_allclose(logprob, np.take_along_axis(before, np.asarray(tokens_BT)[:, start:, None], 2)[..., 0],
                               atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(before) * before).sum(-1), atol=1e-5)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
  """Half of 16 x 48 tokens are the same: a sum of 384 terms in bfloat16 would stop growing on the way."""
  exact, _ = tiny.models('llama', vocab_size=61)
  rounded = LanguageModel(dataclasses.replace(exact.config, dtype='bfloat16'))
  weights = jax.jit(initial_params, static_argnums=0)(exact, jax.random.key(0))
  tokens_BT = RNG.integers(0, 61, (16, 48))
  tokens_BT[RNG.random((16, 48)) < 0.5] = 7
  tokens_BT = jnp.array(tokens_BT)

  def gradient(model):
    """Of a sum to which every token adds about the same, with respect to the row of the frequent token."""
    def total(embedding_VD):
      changed = weights | {'backbone': weights['backbone'] | {'embedding_VD': embedding_VD}}
      hidden_BTD = forward.hidden(model, changed, tokens_BT, tokens_BT >= 0)
      return jnp.sum(hidden_BTD.astype(jnp.float32) * jnp.arange(1., 25.))
    return np.asarray(jax.jit(jax.grad(total))(weights['backbone']['embedding_VD'])[7])
  expected, got = gradient(exact), gradient(rounded)
  assert np.linalg.norm(expected) > 100                                         # it is a long sum, not a small difference
  assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


def test_models_of_one_run_share_a_vocabulary():
  small, large = tiny.config(), tiny.config(vocab_size=23)
  with pytest.raises(ConfigError, match=r"must share a vocabulary, but have {'policy': 19, 'value': 19, 'reward': 23}"):
    Models(LanguageModel(small), ScalarModel(small), ScalarModel(large))
  assert Models(LanguageModel(small), ScalarModel(small)).reward is None
  Models(LanguageModel(small), ScalarModel(small), ScalarModel(tiny.config('llama', layers=2)))


def test_derivatives_forwards_and_backwards_agree():
  """<J u, v> = <u, J' v> for the Jacobian of the log-probabilities: any derivative can be taken where nothing is cut."""
  model, _ = tiny.models()
  weights, tokens_BT = tiny.params(model, 1), jnp.array(RNG.integers(0, 19, (2, 5)))
  run = lambda params: forward.next_logprobs(model, params, tokens_BT, jnp.ones((2, 5), bool))[0]
  direction = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape).astype(np.float32)), weights)
  _, moved_BT = jax.jit(lambda p, d: jax.jvp(run, (p,), (d,)))(weights, direction)
  weight_BT = jnp.asarray(RNG.normal(size=moved_BT.shape).astype(np.float32))
  pulled, = jax.jit(lambda p, w: jax.vjp(run, p)[1](w))(weights, weight_BT)
  there = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(direction), jax.tree.leaves(pulled), strict=True))
  np.testing.assert_allclose(there, float(jnp.vdot(moved_BT, weight_BT)), rtol=1e-4)


def keeps_logits(memory_bytes, mesh=None, **changes):
  """Whether the program of 8 x 9 log-probabilities has logits that stay, in a vocabulary of 19."""
  device = memory_bytes and Device('gpu', memory_bytes, 9.0)
  model, _ = tiny.models(device=device, **changes)
  weights, hidden_BTD, target_BT = tiny.params(model, 1), jnp.ones((8, T, 24)), jnp.zeros((8, T), jnp.int32)
  traced = jax.make_jaxpr(lambda p: forward.logprobs_from_hidden(model, p, hidden_BTD, target_BT))
  if mesh is None:
    return '_unembedded' in str(traced(weights))
  with jax.set_mesh(mesh):
    return '_unembedded' in str(traced(weights))


def test_logits_stay_where_the_memory_of_a_device_holds_them():
  """72 tokens of 4 * 19 bytes, in an eighth of it; 9 tokens on each of eight devices."""
  whole = 8 * 72 * 4 * 19
  assert keeps_logits(whole) and not keeps_logits(whole - 8)
  assert not keeps_logits(None)                                                 # on a CPU
  assert not keeps_logits(whole, tokens_per_chunk=1000)
  mesh = runners.sharded(data=4, fsdp=2).mesh
  assert keeps_logits(whole / 8, mesh) and not keeps_logits(whole / 8 - 8, mesh)


@pytest.mark.parametrize('parts', [1, 8])
def test_a_device_unembeds_so_many_tokens_at_once(parts):
  """Three slots of 8 sequences at a time, or of one a device."""
  model, _ = tiny.models(tokens_per_chunk=24 // parts)
  weights, hidden_BTD, target_BT = tiny.params(model, 1), jnp.ones((8, T, 24)), jnp.zeros((8, T), jnp.int32)
  with jax.set_mesh(runners.sharded(data=parts, devices=jax.devices()[:parts]).mesh):
    program = jax.make_jaxpr(lambda p: forward.logprobs_from_hidden(model, p, hidden_BTD, target_BT))(weights)
  [loop] = [e for e in tiny.equations(program.jaxpr) if e.primitive.name == 'scan']
  assert loop.params['length'] == 3
