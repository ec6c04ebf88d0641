"""Attention in pieces against a loop over queries, and the last block on some tokens against the same on all."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import FAMILIES
from jax._src.cudnn import fused_attention_stablehlo

from rlhf_jax import runners
from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.model import attention, forward, kernels
from rlhf_jax.model.attention import Causal, Seen, attend
from rlhf_jax.model.device import Device
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.model.kernels import cudnn_attention

B, T, N, K, H = 3, 300, 4, 2, 6                                      # three pieces of at most 128 queries
RNG = np.random.default_rng(4)
# Padding left, on both sides with a hole, and three segments of which one lies across two pieces.
SEGMENT_BT = np.array([np.where(np.arange(T) < 140, 0, 1),
                       np.where((np.arange(T) < 5) | (np.arange(T) > 250) | (np.arange(T) == 129), 0, 1),
                       np.repeat([1, 2, 3], [60, 100, 140])])


def arrays():
  draw = lambda *shape: jnp.array(RNG.normal(size=shape), jnp.float32)
  return draw(B, T, N, H), draw(B, K, T, H), draw(B, K, T, H)


def by_loop(q_BTNH, k_BKSH, v_BKSH, window, segment_BT=SEGMENT_BT):
  """One query at a time, over the keys that it sees, in double precision; 0 where there are none."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BKSH, v_BKSH))
  out = np.zeros_like(q)
  for b in range(B):
    for t in range(q.shape[1]):
      seen = [s for s in range(max(0, t - window + 1), t + 1) if segment_BT[b, s] == segment_BT[b, t] > 0]
      for n in range(N if seen else 0):
        score = k[b, n // 2, seen] @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight / weight.sum() @ v[b, n // 2, seen]
  return out


@pytest.mark.parametrize('window', [None, 7, 200])
def test_pieces_are_softmax_attention(window):
  given = arrays()
  got = jax.jit(attend)(*given, Causal(jnp.array(SEGMENT_BT), window))
  np.testing.assert_allclose(got, by_loop(*given, T if window is None else window), atol=2e-6)
  assert not got[0, :140].any() and not got[1, 129].any()           # padding sees nothing
  from_200 = jax.jit(attend)(given[0][:, 200:], *given[1:], Causal(jnp.array(SEGMENT_BT), window, start=200))
  np.testing.assert_allclose(from_200, got[:, 200:], atol=2e-6)


def plain(q_BTNH, k_BKSH, v_BKSH, causal):
  """Softmax over all keys at once."""
  T = q_BTNH.shape[1]
  k, v = (jnp.repeat(x, N // x.shape[1], 1) for x in (k_BKSH, v_BKSH))
  score, seen = jnp.einsum('BTNH,BNSH->BNTS', q_BTNH, k) / q_BTNH.shape[-1] ** 0.5, causal.seen(slice(T), slice(T))[:, None]
  return jnp.einsum('BNTS,BNSH->BTNH', jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, -1e9)), 0), v)


def assert_gradient_of_plain(fn, causal, length=T):
  given = [x[:, :length] if i == 0 else x[:, :, :length] for i, x in enumerate(arrays())]
  weight_BTNH = jnp.array(RNG.normal(size=(B, length, N, H)), jnp.float32)
  gradient = lambda fn: jax.jit(jax.grad(lambda *xs: (fn(*xs, causal) * weight_BTNH).sum(), (0, 1, 2)))(*given)
  for got, expected in zip(gradient(fn), gradient(plain), strict=True):
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_gradient_is_that_of_plain_softmax():
  assert_gradient_of_plain(attend, Causal(jnp.array(SEGMENT_BT)))


@pytest.mark.parametrize('window, start', [(None, 0), (7, 0), (200, 170)])
def test_pieces_in_a_loop_are_softmax_attention(window, start, monkeypatch):
  """Of 128 queries: three for 300, of which the last has most in common with the one before; two for 130."""
  monkeypatch.setattr(attention, '_QUERIES_A_TURN', 128)
  given, causal = arrays(), Causal(jnp.array(SEGMENT_BT), window, start)
  run = jax.jit(lambda q, k, v: attend(q[:, start:], k, v, causal, 'xla_loop'))
  np.testing.assert_allclose(run(*given), by_loop(*given, T if window is None else window)[:, start:], atol=2e-6)


@pytest.mark.parametrize('a_turn, queries, loops', [(128, 129, True), (128, 256, True), (128, 128, False), (300, 40, False)])
def test_a_loop_has_every_query_once(a_turn, queries, loops, monkeypatch):
  """One more than a turn, two turns to the last query, one turn, and less than one, which need no loop."""
  monkeypatch.setattr(attention, '_QUERIES_A_TURN', a_turn)
  given, causal = arrays(), Causal(jnp.array(SEGMENT_BT), start=T - queries)
  run = lambda q, k, v: attend(q[:, -queries:], k, v, causal, 'xla_loop')
  assert ('scan' in str(jax.make_jaxpr(run)(*given))) == loops
  whole = jax.jit(attend)(*given, Causal(causal.segment_BT))
  np.testing.assert_allclose(jax.jit(run)(*given), whole[:, -queries:], atol=2e-6)


def test_the_gradient_through_the_loop_is_that_of_plain_softmax(monkeypatch):
  monkeypatch.setattr(attention, '_QUERIES_A_TURN', 128)
  assert_gradient_of_plain(functools.partial(attend, kernel='xla_loop'), Causal(jnp.array(SEGMENT_BT), 150))


def test_a_loop_keeps_no_scores_for_the_gradient(monkeypatch):
  """Of 512 queries and keys, 64 at a time: those of a turn, for all heads, and not eight times as many."""
  monkeypatch.setattr(attention, '_QUERIES_A_TURN', 64)
  shapes = ((1, 512, N, 8), (1, N, 512, 8), (1, N, 512, 8))
  given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  causal = Causal(jnp.ones((1, 512), jnp.int32))
  gradient = jax.grad(lambda *xs: jnp.square(attend(*xs, causal, 'xla_loop')).sum(), (0, 1, 2))
  sizes = [math.prod(x.aval.shape) for e in tiny.equations(jax.make_jaxpr(gradient)(*given).jaxpr) for x in e.outvars]
  assert N * 64 * 512 <= max(sizes) < 2 * N * 64 * 512


def test_keys_said_one_by_one():
  q_BTNH, k_BKSH, v_BKSH = arrays()
  seen_BTS = jnp.array(RNG.random((B, 2, T)) < 0.3).at[1, 1].set(False)
  got = attend(q_BTNH[:, :2], k_BKSH, v_BKSH, Seen(seen_BTS))
  for b, t, n in np.ndindex(B, 2, N):
    seen = np.flatnonzero(seen_BTS[b, t])
    weight = np.exp(np.asarray(k_BKSH[b, n // 2, seen] @ q_BTNH[b, t, n], np.float64) / H ** 0.5)
    expected = weight / weight.sum() @ v_BKSH[b, n // 2, seen] if seen.size else np.zeros(H)
    np.testing.assert_allclose(got[b, t, n], expected, atol=2e-6)


def test_a_gradient_needs_less_than_half_of_the_memory_of_plain_softmax():
  shapes = ((1, 2048, N, 8), (1, N, 2048, 8), (1, N, 2048, 8))
  given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  causal = Causal(jax.ShapeDtypeStruct((1, 2048), jnp.int32))

  def temporaries(fn):
    gradient = jax.grad(lambda q, k, v, causal: jnp.square(fn(q, k, v, causal)).sum(), (0, 1, 2))
    return jax.jit(gradient).lower(*given, causal).compile().memory_analysis().temp_size_in_bytes
  assert temporaries(plain) > 3 * 4 * N * 2048 ** 2                             # the scores, several times over
  assert temporaries(attend) < temporaries(plain) / 2


@pytest.mark.parametrize('family, changes', [('llama3', {}), ('gpt_neox', {}), ('mistral', {}), ('gpt2', {}),
                                             ('llama3', {'remat': True}), ('llama3', {'scan_layers': True})])
def test_wanted_tokens_are_those_of_the_whole(family, changes):
  model = LanguageModel(dataclasses.replace(FAMILIES[family], **changes))
  params = jax.jit(initial_params, static_argnums=0)(model, jax.random.key(0))
  tokens_BT, valid_BT = tiny.pad([RNG.integers(0, 19, n) for n in (9, 4, 6)], ['left', 'right', 'left'], 9)
  run = jax.jit(functools.partial(forward.hidden, model), static_argnames='wanted')
  whole = np.asarray(run(params, tokens_BT, valid_BT))
  np.testing.assert_allclose(run(params, tokens_BT, valid_BT, wanted=5)[::2], whole[::2, 5:], atol=2e-6)
  slot_B = np.array([8, 3, 7])
  some = jax.jit(lambda slot_B: forward.hidden(model, params, tokens_BT, valid_BT, wanted=slot_B))(slot_B)
  np.testing.assert_allclose(np.asarray(some)[:, 0], whole[np.arange(3), slot_B], atol=2e-6)


# ---- kernels of accelerators

@pytest.mark.parametrize('window, start, longest', [(None, 0, 128), (150, 0, 128), (None, 170, 128), (150, 170, 128),
                                                    (None, 0, 512), (150, 170, 512)])
def test_the_tpu_kernel_in_its_interpreter_is_attention(window, start, longest, monkeypatch):
  """300 tokens fill neither two blocks of 128 nor three; queries begin in the middle of one."""
  monkeypatch.setattr(kernels, '_LONGEST_BLOCK', longest)
  given, causal = arrays(), Causal(jnp.array(SEGMENT_BT), window, start)
  weight_BTNH = jnp.array(RNG.normal(size=(B, T - start, N, H)), jnp.float32)

  def answer_and_gradient(kernel):
    fn = lambda q, k, v: attend(q[:, start:], k, v, causal, kernel)
    total = lambda *xs: (fn(*xs) * weight_BTNH).sum()
    return jax.jit(fn)(*given), *jax.jit(jax.grad(total, (0, 1, 2)))(*given)
  for got, expected in zip(answer_and_gradient('splash'), answer_and_gradient('xla'), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize('rules', [None, {'K': None}, {'N': None}])
def test_the_tpu_kernel_does_its_part_on_every_device_of_a_mesh(rules):
  given, causal = arrays(), Causal(jnp.array(SEGMENT_BT))
  given, causal = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), (given, causal))  # four rows
  runner = runners.sharded(data=2, fsdp=2, tensor=2, rules=rules)
  run = runner.compile(lambda q, k, v, sees: {'out_BTNH': attend(q['q_BTNH'], k['k_BKSH'], v['v_BKSH'], sees, 'splash')},
                       inputs=('batch',) * 4, outputs='batch')
  got = run({'q_BTNH': given[0]}, {'k_BKSH': given[1]}, {'v_BKSH': given[2]}, causal)['out_BTNH']
  np.testing.assert_allclose(runner.fetch(got), attend(*given, causal), atol=2e-5)


def test_a_model_computes_the_same_with_the_tpu_kernel():
  model = LanguageModel(FAMILIES['mistral'])
  params = jax.jit(initial_params, static_argnums=0)(model, jax.random.key(0))
  tokens_BT, valid_BT = tiny.pad([RNG.integers(0, 19, n) for n in (9, 4)], ['left', 'right'], 12)
  logprobs = lambda m: jax.jit(lambda p: forward.next_logprobs(m, p, tokens_BT, valid_BT, start=4)[0])(params)
  splash = LanguageModel(dataclasses.replace(model.config, attention='splash'))
  counts = np.asarray(valid_BT)[:, 4:] & np.asarray(valid_BT)[:, 3:-1]
  np.testing.assert_allclose(logprobs(splash)[counts], logprobs(model)[counts], atol=1e-5)


# Lengths of dense rows: whole, short, one token, none.
LENGTHS_BT = lambda length: (np.arange(length) < np.array([length, 21, 0])[:, None]).astype(np.int32)


@pytest.mark.parametrize('window, length', [(None, 33), (None, 40), (5, 33), (30, 40), (1, 40)])
def test_the_call_for_gpus_is_attention_of_dense_rows(window, length):
  """By XLA, told by lengths; odd lengths are made even, and padding gets 0."""
  segment_BT = LENGTHS_BT(length)
  given, causal = [x[:, :length] if i == 0 else x[:, :, :length] for i, x in enumerate(arrays())], Causal(
    jnp.array(segment_BT), window, dense=True)
  got = jax.jit(functools.partial(attend, kernel='cudnn_by_xla'))(*given, causal)
  np.testing.assert_allclose(got, by_loop(*given, window or length, segment_BT), atol=2e-6)
  assert not got[1, 21:].any() and not got[2].any()


@pytest.mark.parametrize('window, start', [(None, 0), (150, 0), (None, 175)])
def test_the_call_for_gpus_is_attention_of_other_rows(window, start):
  """Packed, or padded on the left, or queries from a slot on: told by an array."""
  given, causal = arrays(), Causal(jnp.array(SEGMENT_BT), window, start)
  got = jax.jit(lambda q, k, v: attend(q[:, start:], k, v, causal, 'cudnn_by_xla'))(*given)
  np.testing.assert_allclose(got, by_loop(*given, window or T)[:, start:], atol=2e-6)


@pytest.mark.parametrize('dense, window, length', [(True, 5, 33), (False, None, 45)])
def test_the_gradient_through_the_call_for_gpus_is_that_of_plain_softmax(dense, window, length):
  segment_BT = LENGTHS_BT(length) if dense else SEGMENT_BT[:, 100:100 + length]
  causal = Causal(jnp.array(segment_BT), window, dense=dense)
  assert_gradient_of_plain(functools.partial(attend, kernel='cudnn_by_xla'), causal, length)


def calls_of_cudnn(T, packed, monkeypatch):
  """(operands, parameters) of the kernel's calls in the gradient of a model's log-probabilities, which is not run.

  Shapes and types are checked where cuDNN is believed to be there.
  """
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda *args: True)
  h100 = Device('gpu', 80 * 10**9, 9.0)
  model = LanguageModel(tiny.config('llama', dtype='bfloat16', head_width=8, window=7, device=h100))
  params = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
  tokens_BT, valid_BT = jax.ShapeDtypeStruct((2, T), jnp.int32), jax.ShapeDtypeStruct((2, T), jnp.bool_)
  segment_BT = jnp.ones((2, T), jnp.int32) if packed else None
  total = lambda p, *batch: forward.next_logprobs(model, p, *batch, start=5, segment_BT=segment_BT)[0].sum()
  program = jax.make_jaxpr(jax.grad(total))(params, tokens_BT, valid_BT)
  return {e.primitive.name: ([x.aval for x in e.invars], e.params) for e in tiny.equations(program.jaxpr)
          if e.primitive.name.startswith('dot_product_attention')}


@pytest.mark.parametrize('T', [9, 12])
def test_the_gpu_kernel_accepts_what_it_is_given(T, monkeypatch):
  """Of dense rows: no array of who sees whom, but lengths, the causal mask and the window."""
  calls = calls_of_cudnn(T, False, monkeypatch)
  assert set(calls) == {'dot_product_attention_fwd_wrapper', 'dot_product_attention_bwd_wrapper'}
  for (q, k, v, bias, query_length, key_length, *_), params in calls.values():
    even = T + T % 2
    assert [x.shape for x in (q, k, v)] == [(2, even, 6, 8), (2, even, 2, 8), (2, even, 2, 8)]
    assert {x.dtype.name for x in (q, k, v)} == {'bfloat16'}
    assert bias.size == 0 and query_length.shape == key_length.shape == (2,)
    assert params['sliding_window_length'] == 7 and 'CAUSAL' in str(params['mask_type']).upper()


def test_the_gpu_kernel_is_told_of_packed_rows_by_an_array(monkeypatch):
  calls = calls_of_cudnn(9, True, monkeypatch)
  for (q, _, _, bias, *_), params in calls.values():
    assert q.shape[1] == 10 and bias.shape == (2, 1, 10, 10)
    assert not params['sliding_window_length']
  assert 'dot_product_attention_bwd_wrapper' in calls


def test_heads_that_the_mesh_does_not_divide_are_refused():
  runner = runners.sharded(data=2, tensor=4)
  q_BTNH, k_BKSH, v_BKSH = (x[:2] for x in arrays())                 # two key/value heads
  with jax.set_mesh(runner.mesh), pytest.raises(ShardingError, match='an attention kernel on K=2, which 4 parts'):
    jax.eval_shape(functools.partial(attend, kernel='splash'), q_BTNH, k_BKSH, v_BKSH, Causal(jnp.array(SEGMENT_BT[:2])))


def test_a_kernel_that_jax_refuses_is_a_setting_to_change():
  """Here there is no cuDNN; where there is, heads of 20 numbers are refused, no multiple of 8."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            for shape in ((1, 6, 2, 20), (1, 2, 6, 20), (1, 2, 6, 20))]
  causal = Causal(jnp.ones((1, 6), jnp.int32), dense=True)
  with pytest.raises(ConfigError, match=r"cuDNN's attention cannot be had: .* Pass --attention xla"):
    jax.eval_shape(lambda *qkv: cudnn_attention(*qkv, causal), *shapes)
