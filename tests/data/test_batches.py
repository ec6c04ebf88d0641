"""Batches as a function of (seed, step): which rows, how they are padded, and how several are packed into one."""

import collections

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches as b
from rlhf_jax.data.encode import RankedRows, Row
from rlhf_jax.errors import DataError

LENGTH = 12


def rows(count=23, longest=LENGTH, seed=0):
  """Rows of 2 to `longest` ids; row i begins with the id 100 + i, so that it can be recognised."""
  rng = np.random.default_rng(seed)
  made = []
  for i in range(count):
    ids = [100 + i, *rng.integers(1, 50, rng.integers(1, longest)).tolist()]
    made.append(Row(ids, [False] + (rng.random(len(ids) - 1) < 0.6).tolist()))
  return made


def demonstrations(batch_size=4, seed=3, **more):
  return b.demonstration_batches(rows(), batch_size=batch_size, length=LENGTH, seed=seed, **more)


def firsts(batch):
  """The row numbers of a batch."""
  return (np.asarray(batch.tokens_BT)[:, 0] - 100).tolist()


def same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_a_batch_depends_on_seed_and_step_alone():
  one, other = demonstrations(), demonstrations()
  other[17]                                                                     # what was asked for before is forgotten
  for step in (9, 0, 6):
    same(one[step], other[step])
  assert [firsts(one[step]) for step in range(5)] != [firsts(demonstrations(seed=4)[step]) for step in range(5)]


def of_lengths(lengths, batch_size, buckets=(8, 16, 24, 32), seed=0):
  """Batches of rows that are nothing but so long."""
  return b.Batches(
    range(len(lengths)), lengths, lambda chosen, length: chosen, batch_size, buckets, seed)


RNG = np.random.default_rng(0)
SOURCES = {
  'a batch of more than half of the rows': lambda: of_lengths([5] * 200, 128),
  'few long rows, which fill no batch': lambda: of_lengths([30] * 8 + [5] * 992, 32),
  'one long row': lambda: of_lengths([5] * 22 + [32], 4),
  'several buckets': lambda: of_lengths(RNG.integers(1, 33, 151).tolist(), 8),
  'as many rows as a batch': lambda: of_lengths([5] * 16, 16),
  'demonstrations': lambda: demonstrations(),
  'packed': lambda: b.demonstration_batches(
    rows(90), batch_size=16, length=LENGTH, seed=3, packed=True),
  'prompts': lambda: b.prompt_batches(rows(50), batch_size=8, length=LENGTH, seed=1, lengths=3),
}


@pytest.mark.parametrize('make', SOURCES.values(), ids=SOURCES)
def test_after_any_number_of_epochs_rows_have_been_seen_equally_often_within_one(make):
  source = make()
  seen = np.zeros(len(source.rows), int)
  for epoch in range(500 if len(source.rows) <= 200 else 40):
    for step in range(epoch * source.per_epoch, (epoch + 1) * source.per_epoch):
      np.add.at(seen, source.chosen(step), 1)
    assert seen.sum() == (epoch + 1) * source.per_epoch * source.batch_size
    assert seen.max() - seen.min() <= 1, epoch
  assert seen.min() > 0


def test_the_next_epoch_is_in_another_order():
  source = demonstrations()
  assert source.per_epoch == 23 // 4 == 5
  epochs = [[row for step in range(start, start + 5) for row in firsts(source[step])] for start in (0, 5, 10)]
  assert len(set(epochs[0])) == len(epochs[0]) == 20
  assert epochs[0] != epochs[1] != epochs[2]
  assert {*epochs[0], *epochs[1][:20]} == set(range(23))  # those left over take their turn


def test_batches_of_an_epoch_come_in_random_order():
  source = of_lengths([5] * 64 + [15] * 64, 8)
  lengths = [source._batch(step)[0] for step in range(16)]
  assert sorted(lengths) == [8] * 8 + [16] * 8 != lengths != sorted(lengths)[::-1]


def test_what_a_bucket_cannot_fill_goes_to_the_next_longer():
  source = of_lengths([5] * 6 + [15] * 2 + [30] * 4, 4)
  assert sorted(source._batch(step)[0] for step in range(3)) == [8, 16, 32]
  for step in range(3):
    length, chosen = source._batch(step)
    assert max(source.lengths[i] for i in chosen) <= length
  assert sorted(i for step in range(3) for i in source.chosen(step)) == list(range(12))


@pytest.mark.parametrize('part', [(0, 1), (0, 2), (1, 2)])
def test_the_row_numbers_of_a_batch_are_those_of_all_processes(part):
  source = demonstrations(part=part)
  for step in (0, 7, 3):
    chosen = source.chosen(step)
    assert b.share(chosen, part) == firsts(source[step])
    assert chosen == demonstrations().chosen(step) and all(type(i) is int for i in chosen)
    chosen.clear()  # a list of the caller's own
    assert len(source.chosen(step)) == 4


def test_rows_arrive_whole():
  for step in range(5):
    batch = demonstrations()[step]
    for number, ids, valid, mask in zip(firsts(batch), batch.tokens_BT, batch.valid_BT, batch.mask_BT):
      row = rows()[number]
      assert (ids[valid].tolist(), mask[valid].tolist()) == (row.ids, row.mask)
      assert valid.tolist() == [True] * len(row.ids) + [False] * (len(valid) - len(row.ids))
      assert not ids[~valid].any() and not mask[~valid].any()


def test_reading_ahead_equals_indexing():
  source = demonstrations()
  read = list(source.read(3, 12))
  assert len(read) == 9
  for step, batch in enumerate(read, 3):
    same(batch, source[step])


def test_a_batch_is_padded_to_the_smallest_bucket_that_holds_it():
  source, used = demonstrations(batch_size=2), collections.Counter()
  assert source.buckets == (3, 6, 9, 12)
  for step in range(source.per_epoch):
    batch = source[step]
    longest = batch.valid_BT.sum(1).max()
    assert batch.tokens_BT.shape[1] == min(size for size in source.buckets if size >= longest)
    used[batch.tokens_BT.shape[1]] += 1
  assert set(used) == {3, 6, 9, 12}


def test_bucket_lengths():
  assert b.bucket_lengths(128) == (32, 64, 96, 128)
  assert b.bucket_lengths(7) == (2, 4, 6, 7)
  assert b.bucket_lengths(1) == (1,)
  assert b.bucket_lengths(9, count=1) == (9,)


def concatenated(make, processes, step):
  parts = [make(part=(i, processes))[step] for i in range(processes)]
  return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


@pytest.mark.parametrize('kind', ['demonstrations', 'packed', 'comparisons', 'prompts'])
def test_the_parts_of_all_processes_are_the_batch(kind):
  ranked = [RankedRows(rows(2, seed=i), [0, 1]) for i in range(9)]
  make = {
    'demonstrations': demonstrations,
    'packed': lambda **part: demonstrations(packed=True, **part),
    'comparisons': lambda **part: b.comparison_batches(ranked, batch_size=4, length=LENGTH, seed=1, **part),
    'prompts': lambda **part: b.prompt_batches(rows(), batch_size=4, length=LENGTH, seed=1, **part),
  }[kind]
  for step in range(3):
    same(concatenated(make, 2, step), make()[step])


def test_what_does_not_fill_a_batch_is_refused():
  with pytest.raises(DataError, match=r'23 examples do not fill one batch of 24. Use more data or a smaller batch'):
    demonstrations(batch_size=24)
  with pytest.raises(DataError, match=r'a batch of 4 does not divide over 3 processes. Choose a batch size'):
    demonstrations(part=(0, 3))
  assert demonstrations(batch_size=23).per_epoch == 1
  assert sorted(firsts(demonstrations(batch_size=23)[0])) == list(range(23))


def test_comparisons_have_as_many_candidates_as_the_most():
  ranked = [RankedRows(rows(2), [1, 0]), RankedRows(rows(3, seed=1), [0, 0, 2])]
  batch = b.comparison_batches(ranked, batch_size=2, length=LENGTH, seed=0)[0]
  order = np.argsort((batch.rank_BC == -1).sum(1))
  assert batch.rank_BC[order].tolist() == [[0, 0, 2], [1, 0, -1]]
  assert batch.valid_BCT.any(2)[order].tolist() == [[True] * 3, [True, True, False]]
  for row, tokens_CT, valid_CT in zip((ranked[1], ranked[0]), batch.tokens_BCT[order], batch.valid_BCT[order]):
    for candidate, ids, valid in zip(row.rows, tokens_CT, valid_CT):
      assert ids[valid].tolist() == candidate.ids


def test_prompts_are_padded_in_front_and_numbered():
  source = b.prompt_batches(rows(), batch_size=4, length=LENGTH, seed=1)
  batch = source[2]
  assert batch.tokens_BP.shape == (4, LENGTH)
  assert batch.sample_B.tolist() == [0, 1, 2, 3]
  assert batch.valid_BP[:, -1].all()
  for ids, valid in zip(batch.tokens_BP, batch.valid_BP):
    assert ids[valid].tolist() == rows()[ids[valid][0] - 100].ids
    assert (np.diff(valid.astype(int)) >= 0).all()


def test_packing_loses_no_row_and_fills_no_row_twice():
  groups = b.pack(rows(200), LENGTH, seed=5)
  assert sorted(row.ids[0] for group in groups for row in group) == list(range(100, 300))
  assert all(sum(len(row.ids) for row in group) <= LENGTH for group in groups)
  needed = sum(len(row.ids) for row in rows(200)) / LENGTH
  assert len(groups) < 1.2 * needed                                             # and it leaves few slots empty
  identical = lambda x, y: [[row.ids for row in group] for group in x] == [[row.ids for row in group] for group in y]
  assert identical(groups, b.pack(rows(200), LENGTH, seed=5))
  assert not identical(groups, b.pack(rows(200), LENGTH, seed=6))


def test_packed_rows_can_be_told_apart():
  source, seen = demonstrations(packed=True, batch_size=1), 0
  for step in range(source.per_epoch):
    batch = source[step]
    assert batch.tokens_BT.shape == batch.segment_BT.shape == (1, LENGTH)
    np.testing.assert_array_equal(batch.valid_BT, batch.segment_BT > 0)
    for ids, mask, segment in zip(batch.tokens_BT, batch.mask_BT, batch.segment_BT):
      count = segment.max()
      assert [int(n) for n in dict.fromkeys(segment[segment > 0])] == list(range(1, count + 1))
      for n in range(1, count + 1):
        row = rows()[ids[segment == n][0] - 100]
        assert (ids[segment == n].tolist(), mask[segment == n].tolist()) == (row.ids, row.mask)
        seen += 1
      assert not mask[segment == 0].any()
  assert seen == 23


def test_in_order_fills_the_last_batch_with_blanks_that_weigh_nothing():
  collate = lambda chosen: b.collate_demonstrations(chosen, LENGTH)
  made = b.in_order(rows(7), 3, Row([], []), collate)
  assert [batch.tokens_BT.shape for batch in made] == [(3, LENGTH)] * 3
  assert [n for batch in made for n in firsts(batch)][:7] == list(range(7))
  assert not made[-1].valid_BT[1:].any() and not made[-1].mask_BT[1:].any()
  assert sum(batch.mask_BT.sum() for batch in made) == sum(sum(row.mask) for row in rows(7))
  assert len(b.in_order(rows(6), 3, Row([], []), collate)) == 2
  assert b.in_order([], 3, Row([], []), collate) == []


def test_a_row_longer_than_the_longest_bucket_is_refused():
  rows = [Row([5] * n, [True] * n) for n in (3, 13, 4)]
  with pytest.raises(DataError, match='a row of 13 tokens, but batches are 12 long'):
    b.demonstration_batches(rows, batch_size=1, length=12, seed=0)


def test_prompts_of_a_batch_are_padded_to_one_of_so_many_lengths():
  source = b.prompt_batches(rows(), batch_size=4, length=LENGTH, seed=1, lengths=3)
  seen = [source[step] for step in range(source.per_epoch)]
  assert len({batch.tokens_BP.shape[1] for batch in seen}) > 1
  for batch in seen:
    P = batch.tokens_BP.shape[1]
    assert P in b.bucket_lengths(LENGTH, 3)
    assert batch.valid_BP.sum(1).max() <= P


def test_of_each_length_there_is_one_batch_in_the_order_in_which_they_come():
  rows = [Row([1] * length, [True] * length) for length in (3,) * 8 + (8,) * 4 + (5,) * 4]
  source = b.demonstration_batches(rows, batch_size=4, length=8, seed=1)
  came = [source[step].tokens_BT.shape for step in range(4)]
  assert sorted(came) == [(4, 4), (4, 4), (4, 6), (4, 8)]
  found = [batch.tokens_BT.shape for batch in source.of_each_length()]
  assert found == list(dict.fromkeys(came))
