"""Batches as a function of (seed, step): shuffled anew in every epoch, bucketed by length, or packed.

A stage that resumes at step k asks for batch k and gets what it would have got. Rows are taken from
an endless stream of permutations, so that after any number of epochs every row has been seen as
often as any other, within one. Rows of a batch have about one length: it is padded to the smallest
of a few bucket lengths, so that a run compiles few programs. Grain reads ahead.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from rlhf_jax.data.text import pad_left, pad_right
from rlhf_jax.errors import DataError
from rlhf_jax.records import Comparisons, Demonstrations, Prompts


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Endless batches of `rows`: `batches[step]`, or `batches.read(start, stop)` to iterate with read-ahead.

  `collate(rows, length)` makes a record of rows padded to a length; `lengths[i]` is what row i needs. `part` is (number,
  count): the process makes that of so many equal parts of every batch.
  """
  rows: Sequence[Any]
  lengths: Sequence[int]
  collate: Callable[[list, int], Any]
  batch_size: int
  buckets: tuple[int, ...]
  seed: int
  part: tuple[int, int] = (0, 1)

  def __post_init__(self):
    if len(self.rows) < self.batch_size:
      raise DataError(f'{len(self.rows)} examples do not fill one batch of {self.batch_size}. '
                      'Use more data or a smaller batch size.')
    if max(self.lengths) > self.buckets[-1]:
      raise DataError(f'a row of {max(self.lengths)} tokens, but batches are {self.buckets[-1]} long. '
                      'Encode the data within limits of that length.')
    if self.batch_size % self.part[1]:
      raise DataError(f'a batch of {self.batch_size} does not divide over {self.part[1]} processes. '
                      'Choose a batch size that is a multiple.')

  @property
  def per_epoch(self) -> int:
    """Batches in one epoch: as many as the rows fill. Rows left over begin the next epoch."""
    return len(self.rows) // self.batch_size

  def __getitem__(self, step):
    length, chosen = self._batch(step)
    return self.collate([self.rows[i] for i in share(chosen, self.part)], length)

  def chosen(self, step: int) -> list[int]:
    """Numbers, in `rows`, of the rows of the whole batch `step`, not of this process's part."""
    _, chosen = self._batch(step)
    return list(chosen)

  def of_each_length(self):
    """A batch of each length that the first epoch has, in the order in which they come."""
    first = {}
    for step in range(self.per_epoch):
      first.setdefault(self._batch(step)[0], step)
    return [self[step] for step in first.values()]

  def read(self, start, stop):
    """Batches start .. stop - 1, in order, prepared ahead by one thread."""
    source = grain.MapDataset.range(start, stop).map(self.__getitem__)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

  def _batch(self, step):
    """(padded length, row numbers) of a batch."""
    epoch, number = divmod(step, self.per_epoch)
    return self._epoch(epoch)[number]

  @functools.lru_cache(maxsize=2)  # noqa: B019  a stage has one or two of these objects, and they live as long as it does
  def _epoch(self, epoch):
    """The batches of an epoch, (length, row numbers) each, in random order.

    What does not fill a batch of its bucket goes to the next longer bucket. The rows of an epoch
    fill its batches, so the longest bucket leaves none. A row may come twice in an epoch, even in a
    batch, where one permutation ends and the next begins.
    """
    count = self.per_epoch * self.batch_size
    order = self._stream(epoch * count, (epoch + 1) * count)
    bucket = np.searchsorted(self.buckets, np.asarray(self.lengths)[order])
    batches, waiting = [], order[:0]
    for number, length in enumerate(self.buckets):
      waiting = np.concatenate([waiting, order[bucket == number]])
      full = len(waiting) // self.batch_size * self.batch_size
      filled = waiting[:full].reshape(-1, self.batch_size)
      batches += [(length, chosen.tolist()) for chosen in filled]
      waiting = waiting[full:]
    batch_order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(batches))
    return [batches[i] for i in batch_order]

  def _stream(self, start, stop):
    """Row numbers start .. stop - 1 of the endless stream, permutation after permutation."""
    count = len(self.rows)
    first, last = start // count, (stop - 1) // count
    permutations = [np.random.default_rng((self.seed, number)).permutation(count)
                    for number in range(first, last + 1)]
    return np.concatenate(permutations)[start - first * count:stop - first * count]


def bucket_lengths(longest, count=4):
  """A few lengths up to `longest`, evenly spaced: (32, 64, 96, 128)."""
  return tuple(sorted({-(-longest * i // count) for i in range(1, count + 1)}))


def demonstration_batches(rows, *, batch_size, length, seed, packed=False, part=(0, 1)):
  """Batches of Demonstrations: bucketed by length or, `packed`, several to a row of `length` tokens."""
  if packed:
    groups = pack(rows, length, seed)
    return Batches(groups, [length] * len(groups), _packed, batch_size, (length,), seed, part)
  lengths = [len(row.ids) for row in rows]
  return Batches(rows, lengths, collate_demonstrations, batch_size, bucket_lengths(length), seed, part)


def comparison_batches(rows, *, batch_size, length, seed, part=(0, 1)):
  """Batches of Comparisons; prompts with fewer candidates than the most have missing ones."""
  candidates = max(len(row.rows) for row in rows)
  lengths = [max(len(candidate.ids) for candidate in row.rows) for row in rows]
  collate = functools.partial(collate_comparisons, candidates=candidates)
  return Batches(rows, lengths, collate, batch_size, bucket_lengths(length), seed, part)


def prompt_batches(rows, *, batch_size, length, seed, lengths=1, part=(0, 1)):
  """Batches of left-padded Prompts, bucketed to so many lengths; sample numbers count through the whole batch."""
  collate = lambda rows, length: collate_prompts(rows, length, share(range(batch_size), part))
  needed = [len(row.ids) for row in rows]
  return Batches(rows, needed, collate, batch_size, bucket_lengths(length, lengths), seed, part)


def collate_demonstrations(rows, length):
  """Rows, right-padded to `length`, as Demonstrations."""
  tokens_BT, valid_BT = pad_right([row.ids for row in rows], length, 0)
  mask_BT, _ = pad_right([row.mask for row in rows], length, 0)
  return Demonstrations(tokens_BT.astype(np.int32), valid_BT, mask_BT.astype(bool))


def collate_comparisons(rows, length, candidates):
  """RankedRows, right-padded to `length` and to `candidates`, as Comparisons."""
  B = len(rows)
  tokens_BCT = np.zeros((B, candidates, length), np.int32)
  valid_BCT, rank_BC = np.zeros((B, candidates, length), bool), np.full((B, candidates), -1, np.int32)
  for b, row in enumerate(rows):
    C = len(row.rows)
    tokens_BCT[b, :C], valid_BCT[b, :C] = pad_right([candidate.ids for candidate in row.rows], length, 0)
    rank_BC[b, :C] = row.ranks
  return Comparisons(tokens_BCT, valid_BCT, rank_BC)


def collate_prompts(rows, length, samples):
  """Rows, left-padded to `length`, as Prompts with these sample numbers."""
  tokens_BP, valid_BP = pad_left([row.ids for row in rows], length, 0)
  return Prompts(tokens_BP.astype(np.int32), valid_BP, np.array(samples, np.int32))


def pack(rows, length, seed, open_groups=32):
  """Rows in groups whose ids fit into `length` together: first fit, in a random order that depends on the seed alone."""
  done, groups = [], []
  for i in np.random.default_rng((seed, len(rows))).permutation(len(rows)):
    row = rows[i]
    for group in groups:
      if sum(len(member.ids) for member in group) + len(row.ids) <= length:
        group.append(row)
        break
    else:
      groups.append([row])
      if len(groups) > open_groups:
        done.append(groups.pop(0))
  return done + groups


def _packed(groups, length):
  """Groups of rows end to end, numbered from 1 in `segment_BT`, as Demonstrations."""
  ids = [[i for row in group for i in row.ids] for group in groups]
  numbers = [[n for n, row in enumerate(group, 1) for _ in row.ids] for group in groups]
  tokens_BT, valid_BT = pad_right(ids, length, 0)
  mask_BT, _ = pad_right([[m for row in group for m in row.mask] for group in groups], length, 0)
  segment_BT, _ = pad_right(numbers, length, 0)
  return Demonstrations(tokens_BT.astype(np.int32), valid_BT, mask_BT.astype(bool), segment_BT.astype(np.int32))


def in_order(rows, batch_size, blank, collate, part=(0, 1)):
  """All rows in their order, in batches of one shape; the last is filled up with `blank` rows, which weigh nothing."""
  filled = list(rows) + [blank] * (-len(rows) % batch_size)
  return [collate(share(filled[start:start + batch_size], part)) for start in range(0, len(filled), batch_size)]


def share(rows, part):
  """Of a batch's rows those that one of `part` = (number, count) equal parts has."""
  number, count = part
  each = len(rows) // count
  return rows[number * each:(number + 1) * each]
