"""Attention of one query a sequence, in the kernel's interpreter, against softmax in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import runners
from rlhf_jax.model import decode_kernel
from rlhf_jax.model.attention import Seen, attend
from rlhf_jax.model.decode_kernel import decode_attention

H = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Of 16 keys in float32."""
  monkeypatch.setattr(decode_kernel, '_BLOCK_BYTES', 16 * 4 * H)


def arrays(B, N, K, S, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(0, 1.3, shape), dtype)
  return draw(B, N, H), draw(B, K, S, H), draw(B, K, S, H)


def by_numpy(q_BNH, k_BKSH, v_BKSH, seen_BS):
  """0 where a row sees nothing."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_BNH, k_BKSH, v_BKSH))
  (B, N, _), K = q.shape, k.shape[1]
  out = np.zeros(q.shape)
  for b, n in np.ndindex(B, N):
    seen, head = np.flatnonzero(seen_BS[b]), n // (N // K)
    if seen.size:
      score = k[b, head, seen] @ q[b, n] / np.sqrt(H)
      weight = np.exp(score - score.max())
      out[b, n] = weight / weight.sum() @ v[b, head, seen]
  return out


def sights(S):
  """Nothing, all, the first, the last, a piece in the middle, some, and both ends of a ring."""
  slot = np.arange(S)
  rng = np.random.default_rng(S)
  return np.array(
    [
      slot < 0,
      slot >= 0,
      slot == 0,
      slot == S - 1,
      (slot >= S // 3) & (slot < S // 2 + 1),
      rng.random(S) < 0.3,
      (slot < S // 5) | (slot > S - S // 4),
    ]
  )


@pytest.mark.parametrize(
  'N, K, S',
  [
    (3, 3, 41),  # a query head to a key/value head; three blocks of which the last is short
    (8, 2, 32),  # four; two whole blocks
    (6, 2, 9),  # three; fewer keys than a block has
    (20, 1, 80),  # more than the rows of a small product; five blocks
  ],
)
def test_it_is_softmax_attention(N, K, S):
  seen_BS = sights(S)
  given = arrays(len(seen_BS), N, K, S)
  got = jax.jit(decode_attention)(*given, jnp.array(seen_BS))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, by_numpy(*given, seen_BS), atol=2e-6)
  assert not got[0].any()  # sees nothing


def test_scores_of_any_size_neither_overflow_nor_vanish():
  """The largest comes in the first block, in the last, and all are far below 0."""
  q_BNH, k_BKSH, v_BKSH = arrays(3, 2, 1, 40)
  k_BKSH = k_BKSH.at[0, 0, 3].set(40 * q_BNH[0, 0]).at[1, 0, 38].set(40 * q_BNH[1, 0])
  k_BKSH = k_BKSH.at[2].set(-60 * q_BNH[2, :1, None] * (1 + jnp.arange(40)[:, None] / 400))
  seen_BS = np.ones((3, 40), bool)
  got = decode_attention(q_BNH, k_BKSH, v_BKSH, jnp.array(seen_BS))
  np.testing.assert_allclose(got, by_numpy(q_BNH, k_BKSH, v_BKSH, seen_BS), atol=3e-5)


def test_blocks_before_the_first_key_and_after_the_last_are_not_read():
  q_BNH, k_BKSH, v_BKSH = arrays(2, 2, 1, 80)
  seen_BS = np.zeros((2, 80), bool)
  seen_BS[0, [34, 47]] = seen_BS[1, [16, 63]] = True  # block 2; blocks 1 to 3, their ends
  for b, unread in ((0, [*range(32), *range(48, 80)]), (1, [*range(16), *range(64, 80)])):
    k_BKSH, v_BKSH = (x.at[b, :, jnp.array(unread)].set(jnp.nan) for x in (k_BKSH, v_BKSH))
  got = decode_attention(q_BNH, k_BKSH, v_BKSH, jnp.array(seen_BS))
  np.testing.assert_allclose(got, by_numpy(q_BNH, k_BKSH, v_BKSH, seen_BS), atol=2e-6)


def test_bfloat16_is_rounded_where_it_is_stored_and_summed_in_float32():
  seen_BS = sights(41)
  given = arrays(len(seen_BS), 6, 2, 41, dtype=jnp.bfloat16)
  got = decode_attention(*given, jnp.array(seen_BS))
  assert got.dtype == jnp.bfloat16
  # Queries are scaled, weights and the result rounded: each by 2^-9 of values up to 4.
  np.testing.assert_allclose(np.asarray(got, np.float32), by_numpy(*given, seen_BS), atol=0.03)
  one = np.zeros((2, 41), bool)
  one[:, 30] = True
  exact = decode_attention(*(x[:2] for x in given), jnp.array(one))
  np.testing.assert_array_equal(exact[:, 3], given[2][:2, 1, 30])  # the only value, to the bit


def test_a_block_holds_so_many_bytes(monkeypatch):
  monkeypatch.setattr(decode_kernel, '_BLOCK_BYTES', 16 * 2**10)
  assert decode_kernel._block(4096, 64, 2) == 128
  assert decode_kernel._block(4096, 128, 2) == 64
  assert decode_kernel._block(4096, 4096, 4) == 16  # no fewer keys than a product has
  assert decode_kernel._block(40, 64, 2) == 64  # no more than there are


def test_widths_that_are_a_power_of_2_are_allowed():
  assert [
    width for width in (8, 16, 24, 48, 64, 80, 96, 128, 256) if decode_kernel.allows(width)
  ] == [16, 64, 128, 256]


def primitives(kernel, width, queries=1):
  q_BTNH, k_BKSH = jnp.zeros((2, queries, 4, width)), jnp.zeros((2, 2, 24, width))
  seen = Seen(jnp.ones((2, queries, 24), bool))
  return str(jax.make_jaxpr(lambda *xs: attend(*xs, kernel))(q_BTNH, k_BKSH, k_BKSH, seen))


def test_one_query_against_a_cache_is_for_it_beside_the_kernel_of_gpus_alone():
  assert 'pallas_call' in primitives('cudnn', 16)
  assert 'pallas_call' in primitives('cudnn_by_xla', 16)
  for kernel, width, queries in (
    ('xla', 16, 1),
    ('xla_loop', 16, 1),
    ('splash', 16, 1),
    ('cudnn', 24, 1),
    ('cudnn', 16, 2),
  ):
    assert 'pallas_call' not in primitives(kernel, width, queries)


def test_attend_hands_it_every_row():
  seen_BS = sights(41)
  q_BNH, k_BKSH, v_BKSH = arrays(len(seen_BS), 4, 2, 41)
  got = attend(q_BNH[:, None], k_BKSH, v_BKSH, Seen(jnp.array(seen_BS)[:, None]), 'cudnn_by_xla')
  np.testing.assert_allclose(got[:, 0], by_numpy(q_BNH, k_BKSH, v_BKSH, seen_BS), atol=2e-6)


def test_every_device_of_a_mesh_does_its_sequences_and_heads():
  seen_BS = np.concatenate([sights(41), sights(41)[5:6]])  # eight rows
  given = arrays(8, 4, 2, 41)
  runner = runners.sharded(data=2, fsdp=2, tensor=2)
  run = runner.compile(
    lambda q, k, v, seen: {
      'out_BNH': decode_attention(q['q_BNH'], k['k_BKSH'], v['v_BKSH'], seen['seen_BS'])
    },
    inputs=('batch',) * 4,
    outputs='batch',
  )
  names = 'q_BNH', 'k_BKSH', 'v_BKSH', 'seen_BS'
  got = run(*({name: x} for name, x in zip(names, (*given, jnp.array(seen_BS)), strict=True)))
  np.testing.assert_allclose(runner.fetch(got['out_BNH']), by_numpy(*given, seen_BS), atol=2e-6)
