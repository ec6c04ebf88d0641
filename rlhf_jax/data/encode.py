"""Examples to token rows, within length limits; what is left out or cut is counted, and why.

All of a source is encoded at once, many texts at a time, so that the tokenizer uses all cores;
`kept_rows.py` keeps the result. A prompt that is too long loses its earliest turns before it is cut
within one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rlhf_jax.data.chat import Chat, Conversation
from rlhf_jax.data.examples import Answer, Example, Turn
from rlhf_jax.errors import DataError

_AT_ONCE = 1024  # examples between two signs of progress
ADVICE = 'Mend or drop the row, or pass --data.skip-bad-rows.'


@dataclasses.dataclass(frozen=True)
class Limits:
  """How many tokens a sequence may have, and what becomes of longer ones."""
  prompt_tokens: int = 128  # most tokens of a prompt, P
  response_tokens: int = 128  # most tokens of a response, R, the end token included
  # truncate: drops a prompt's earliest turns, keeps a response's start
  too_long: Literal['skip', 'truncate'] = 'skip'

  @property
  def tokens(self) -> int:
    """Most tokens of prompt and response together, T."""
    return self.prompt_tokens + self.response_tokens


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence: ids, which of them the assistant wrote, and the number of its example."""
  ids: Sequence[int]
  mask: Sequence[bool]
  example: int = -1


@dataclasses.dataclass(frozen=True)
class RankedRows:
  """C sequences of one prompt, and their ranks."""
  rows: list[Row]
  ranks: list[int]
  example: int = -1


@dataclasses.dataclass
class Counts:
  """What became of the examples. `first_refusal` says why the first could not be encoded."""
  examples: int = 0
  too_long: int = 0  # left out
  truncated: int = 0  # prompt or response cut to the limits
  refused: int = 0  # left out: the template or the tokenizer cannot say them
  equal: int = 0  # comparisons left out: their responses became the same tokens
  # responses left out of the other comparisons: the same tokens as one of a better rank
  equal_responses: int = 0
  apart: int = 0  # earlier turns trained in a row of their own
  untrained: int = 0  # earlier turns that could not be
  first_refusal: str = ''

  def sentences(self) -> list[str]:
    """What there is to say, a sentence each."""
    of = f'of {self.examples:,} examples'
    said = [
      (self.too_long,
       f'{self.too_long:,} {of} are longer than --data.limits allow, and are skipped'),
      (self.truncated,
       f'{self.truncated:,} {of} are longer than --data.limits allow, and are truncated'),
      (self.refused, f'{self.refused:,} {of} cannot be encoded, and are skipped; the first: '
                     f'{self.first_refusal}'),
      (self.equal,
       f'{self.equal:,} {of} have responses that became the same tokens, and are skipped'),
      (self.equal_responses, f'{self.equal_responses:,} responses became the same tokens as a '
                             'better ranked one to the same prompt, and are left out'),
      (self.apart, f'{self.apart:,} earlier turns of the assistant are trained in rows of their '
                   'own, since the chat template renders them differently once others follow'),
      (self.untrained, f'{self.untrained:,} earlier turns of the assistant are not trained: the '
                       'chat template renders them differently once others follow, and alone it '
                       'refuses them or they are longer than the limits'),
    ]
    return [sentence for count, sentence in said if count]


class Encoded(NamedTuple):
  """Rows in the order of their examples, and what became of all."""
  rows: list
  counts: Counts


Progress = Callable[[int], None]  # is told how many examples are done


def demonstrations(examples: Sequence[Example], chat: Chat, limits: Limits, *,
                   skip_bad_rows: bool = False, progress: Progress | None = None,
                   as_arrays: bool = False) -> Encoded:
  """Rows of the first response of each example; more than one where earlier turns need rows of
  their own.

  Raises DataError for an example that cannot be encoded, unless `skip_bad_rows`, and where no row
  is left. `as_arrays` gives rows of numpy arrays, which take a tenth of the memory of lists.
  """
  return _encoded(examples, chat, limits, skip_bad_rows, progress, as_arrays, _demonstration_rows)


def comparisons(examples: Sequence[Example], chat: Chat, limits: Limits, *,
                skip_bad_rows: bool = False, progress: Progress | None = None,
                as_arrays: bool = False) -> Encoded:
  """RankedRows; an example is left out with any of its responses. An `Answer` keeps the ids that
  were sampled.

  Of responses that become the same tokens those of the best rank stay. Raises as `demonstrations`
  does.
  """
  return _encoded(examples, chat, limits, skip_bad_rows, progress, as_arrays, _comparison_rows)


def prompts(examples: Sequence[Example], chat: Chat, limits: Limits, *, skip_bad_rows: bool = False,
            progress: Progress | None = None, as_arrays: bool = False) -> Encoded:
  """Rows of prompts alone. Raises as `demonstrations` does."""
  return _encoded(examples, chat, limits, skip_bad_rows, progress, as_arrays, _prompt_rows)


def _encoded(examples, chat, limits, skip_bad_rows, progress, as_arrays, make_rows):
  rows, counts = [], Counts(len(examples))
  for first in range(0, len(examples), _AT_ONCE):
    some = range(first, min(first + _AT_ONCE, len(examples)))
    batch = _Batch(examples, some, chat, limits, skip_bad_rows, counts)
    made = make_rows(batch, batch.asked())
    rows += map(_with_arrays, made) if as_arrays else made
    if progress is not None:
      progress(some.stop)
  if not examples:
    raise DataError('there are no examples. Check the data path.')
  if not rows:
    raise DataError(_none_left(counts, limits))
  return Encoded(rows, counts)


def _none_left(counts, limits):
  """Why no row is left, and what to do."""
  others = '; '.join(sentence for sentence in counts.sentences() if 'longer than' not in sentence)
  if not counts.too_long:
    return (f'none of {counts.examples} examples is left: {others}. Mend the data, or take another '
            'tokenizer or template.')
  return (f'none of {counts.examples} examples fits into {limits.prompt_tokens} prompt and '
          f'{limits.response_tokens} response tokens. Raise --data.limits.prompt-tokens and '
          '--data.limits.response-tokens, or pass --data.limits.too-long truncate.'
          f'{f" Besides, {others}." if others else ""}')


def _with_arrays(row):
  """The row with numpy arrays in place of lists."""
  if isinstance(row, RankedRows):
    return dataclasses.replace(row, rows=[_with_arrays(each) for each in row.rows])
  return Row(np.array(row.ids, np.int32), np.array(row.mask, bool), row.example)


# ---- what a stage takes of a batch whose prompts fit

def _demonstration_rows(batch, asked):
  spoken = {number: (*turns, Turn('assistant', batch.examples[number].responses[0]))
            for number, (turns, _) in asked.items()}
  rows, alone = {}, []
  for number, found in batch.conversations(spoken, earlier=True):
    row = batch.row(number, asked[number][1], found)
    if row is not None:
      rows[number] = [row]
      alone += [(number, spoken[number][:turn + 1]) for turn in found.apart]
  for number, row in batch.rows_apart(alone):
    rows[number].append(row)
  return [row for number in sorted(rows) for row in rows[number]]


def _comparison_rows(batch, asked):
  spoken = {(number, which): (*turns, Turn('assistant', response))
            for number, (turns, _) in asked.items()
            for which, response in enumerate(batch.examples[number].responses)
            if not isinstance(response, Answer)}
  found = {key: batch.row(key[0], asked[key[0]][1], conversation)
           for key, conversation in batch.conversations(spoken, earlier=False)}
  ranked = []
  for number, (_, prompt) in asked.items():
    example = batch.examples[number]
    rows = [batch.answered(number, prompt, response) if isinstance(response, Answer)
            else found.get((number, which))
            for which, response in enumerate(example.responses)]
    consistent = (None if None in rows
                  else _consistent(RankedRows(rows, list(example.ranks), number)))
    if consistent is not None:
      ranked.append(consistent)
      batch.counts.equal_responses += len(rows) - len(consistent.rows)
    elif None not in rows:
      batch.counts.equal += 1
  return ranked


def _consistent(ranked):
  """Without responses that are the same tokens as one of a better rank; None where no two
  ranks are left.
  """
  best = {}
  for row, rank in zip(ranked.rows, ranked.ranks):
    best[tuple(row.ids)] = min(rank, best.get(tuple(row.ids), rank))
  kept = [(row, rank) for row, rank in zip(ranked.rows, ranked.ranks)
          if rank == best[tuple(row.ids)]]
  if len({rank for _, rank in kept}) < 2:
    return None
  return RankedRows([row for row, _ in kept], [rank for _, rank in kept], ranked.example)


def _prompt_rows(batch, asked):
  return [Row(ids, [False] * len(ids), number) for number, (_, ids) in asked.items()]


@dataclasses.dataclass
class _Batch:
  """Some of the examples, by their numbers, on the way to rows."""
  examples: Sequence[Example]
  numbers: range
  chat: Chat
  limits: Limits
  skip_bad_rows: bool
  counts: Counts
  cut: set[int] = dataclasses.field(default_factory=set)  # numbers of those that are truncated
  left_out: set[int] = dataclasses.field(default_factory=set)

  def asked(self):
    """{number: (turns, ids) of a prompt within the limits}; what has none is counted."""
    found = self.chat.prompts([self.examples[number].prompt for number in self.numbers])
    asked, too_long = {}, {}
    for number, ids in zip(self.numbers, found):
      turns = self.examples[number].prompt
      if isinstance(ids, DataError):
        self._refuse(number, ids)
      elif len(ids) <= self.limits.prompt_tokens:
        asked[number] = turns, ids
      elif self.limits.too_long == 'truncate':
        too_long[number] = turns, ids
        self._truncate(number)
      else:
        self._leave_out(number)
    asked |= self._shortened(too_long)
    return {number: asked[number] for number in self.numbers if number in asked}

  def _shortened(self, asked):
    """{number: (turns, ids)} of prompts with their earliest turns left out, all of `asked` at once.

    The system turn stays as long as it fits beside the last one. A prompt is cut within its last
    turn where that is not enough; the begin token stays before what is left.
    """
    asked, limit = dict(asked), self.limits.prompt_tokens
    shorter = {number: _without_beginnings(turns) for number, (turns, _) in asked.items()}
    while shorter:
      next_turns = {number: next(rest, None) for number, rest in shorter.items()}
      tried = {number: turns for number, turns in next_turns.items() if turns}
      for number, ids in zip(tried, self.chat.prompts(tried.values())):
        if not isinstance(ids, DataError):
          asked[number] = tried[number], ids
      shorter = {number: shorter[number] for number in tried if len(asked[number][1]) > limit}
    begin = self.chat.begin_token
    return {number: (turns, _cut(ids, limit, begin)) for number, (turns, ids) in asked.items()}

  def conversations(self, spoken, earlier):
    """(key, Conversation) of what can be one; a key is a number, or starts with one."""
    for key, found in zip(spoken, self.chat.conversations(spoken.values(), earlier=earlier)):
      if isinstance(found, DataError):
        self._refuse(key if isinstance(key, int) else key[0], found)
      else:
        yield key, found

  def row(self, number, prompt, conversation):
    """The Row of a conversation whose prompt is cut to the ids `prompt`; None where its response is
    too long.
    """
    start, length = conversation.start, len(conversation.ids)
    if self._is_too_long(number, length - start):
      return None
    stop = min(length, start + self.limits.response_tokens)
    ids, mask = conversation.ids, conversation.mask
    if not any(mask[start:stop]):  # what the template marks is cut off
      self._leave_out(number)
      return None
    if start <= self.limits.prompt_tokens:
      return Row(ids[:stop], mask[:stop], number)
    behind = len(prompt) - (prompt[:1] == [self.chat.begin_token])  # where the cut prompt goes on
    first = start - behind
    return Row([*prompt[:len(prompt) - behind], *ids[first:stop]],
               [*mask[:len(prompt) - behind], *mask[first:stop]], number)

  def rows_apart(self, alone):
    """(number, Row) of earlier turns, each behind its own history; counts what cannot be one."""
    limits, truncates = self.limits, self.limits.too_long == 'truncate'
    histories = [turns[:-1] for _, turns in alone]
    asked = {i: (turns, ids)
             for i, (turns, ids) in enumerate(zip(histories, self.chat.prompts(histories)))
             if not isinstance(ids, DataError)}
    too_long = {i: prompt for i, prompt in asked.items() if len(prompt[1]) > limits.prompt_tokens}
    if truncates:
      asked |= self._shortened(too_long)
    else:
      asked = {i: prompt for i, prompt in asked.items() if i not in too_long}
    spoken = {i: (*turns, alone[i][1][-1]) for i, (turns, _) in asked.items()}
    found = zip(spoken, self.chat.conversations(spoken.values(), earlier=False))
    trained = {i: each for i, each in found if isinstance(each, Conversation) and (
      truncates or len(each.ids) - each.start <= limits.response_tokens)}
    self.counts.apart += len(trained)
    self.counts.untrained += len(alone) - len(trained)
    for i, conversation in trained.items():
      yield alone[i][0], self.row(alone[i][0], asked[i][1], conversation)

  def answered(self, number, prompt, answer):
    """The Row of an answer that a policy gave to that prompt, as sampled; None if too long."""
    if self._is_too_long(number, len(answer.ids)):
      return None
    ids = list(answer.ids[:self.limits.response_tokens])
    return Row([*prompt, *ids], [False] * len(prompt) + [True] * len(ids), number)

  def _refuse(self, number, error):
    message = f'{self.examples[number].place or f"example {number + 1}"}: {error} {ADVICE}'
    if not self.skip_bad_rows:
      raise DataError(message) from error
    self.counts.refused += number not in self.left_out
    self.left_out.add(number)
    self.counts.first_refusal = self.counts.first_refusal or message

  def _is_too_long(self, number, response_tokens):
    """Whether an example is left out for a response of that length; counts it, and if it is cut."""
    if response_tokens <= self.limits.response_tokens:
      return False
    if self.limits.too_long == 'skip':
      self._leave_out(number)
      return True
    self._truncate(number)
    return False

  def _truncate(self, number):
    self.counts.truncated += number not in self.cut
    self.cut.add(number)

  def _leave_out(self, number):
    self.counts.too_long += number not in self.left_out
    self.left_out.add(number)


def _without_beginnings(turns):
  """The turns without their earliest ones, fewer and fewer, each time beginning with a user's; the
  last time without the system turn too."""
  system = turns[:1] if turns and turns[0].role == 'system' else ()
  starts = [i for i, turn in enumerate(turns) if turn.role == 'user' and i > len(system)]
  yield from ((*system, *turns[start:]) for start in starts)
  if system:
    yield turns[starts[-1] if starts else 1:]


def _cut(ids, limit, begin):
  """The last `limit` ids, of which the first is the begin token where there was one."""
  if len(ids) <= limit:
    return ids
  return [begin, *ids[len(ids) - limit + 1:]] if ids[0] == begin and limit > 1 else ids[-limit:]
