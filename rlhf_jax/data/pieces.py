"""Texts to tokens, piece by piece: conversations share their turns, and a turn is tokenized once.

A tokenizer takes its added tokens out of a text before it looks at what is between them. So the
tokens of a text are those of its pieces, put together, where each piece begins with an added token.
Where that is not certain (`safe_starts`), a text is one piece. Next: `chat.py`, which renders the
texts.
"""

import bisect
import collections
import dataclasses
import itertools
import operator
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_MOST_KEPT = 2**15  # pieces


class _Piece:
  """The length of a piece in characters, its ids and, on demand, where in it they stand."""

  __slots__ = ('_encoding', '_offsets', 'ids', 'length')

  def __init__(self, text, encoding):
    self.length, self.ids, self._encoding, self._offsets = len(text), encoding.ids, encoding, None

  @property
  def offsets(self):
    if self._offsets is None:
      self._offsets = self._encoding.offsets
    return self._offsets


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The tokens of a text, piece after piece."""

  pieces: list[_Piece]

  @property
  def ids(self) -> list[int]:
    return list(itertools.chain.from_iterable([piece.ids for piece in self.pieces]))

  def ending_by(self, place: int) -> int:
    """How many tokens there are before the first that ends behind the character `place`."""
    first, count = 0, 0
    for piece in self.pieces:
      if first + piece.length > place:
        return count + (_ending_by(piece.offsets, place - first) if first < place else 0)
      first += piece.length
      count += len(piece.ids)
    return count

  def overlap(
    self, spans: Sequence[tuple[int, int]], never_begun_before: Collection[int] = ()
  ) -> list[bool]:
    """Which tokens have a character in one of the spans, as `transformers` has it.

    Those of the ids `never_begun_before` count only where they begin within the span.
    """
    mask, first = [], 0
    for piece in self.pieces:
      within = [
        (start - first, stop - first)
        for start, stop in spans
        if start < first + piece.length and stop > first
      ]
      is_whole = bool(within) and within[0][0] <= 0 and within[0][1] >= piece.length
      here = [is_whole] * len(piece.ids)
      for start, stop in within if not is_whole else ():
        begin, end = _ending_by(piece.offsets, start), _beginning_before(piece.offsets, stop)
        reaches_in = begin < end and piece.offsets[begin][0] < start
        if reaches_in and piece.ids[begin] in never_begun_before:
          begin += 1
        here[begin:end] = [True] * len(here[begin:end])
      mask += here
      first += piece.length
    return mask


class PieceTokenizer:
  """Tokens of texts by a `tokenizers.Tokenizer`; pieces begin at the strings `starts`.

  Pieces are kept, so the same text is not tokenized twice.
  """

  def __init__(self, backend: Any, starts: Iterable[str]):
    self._backend = backend
    self._starts = any_of(starts)
    self._kept = {}

  def __call__(self, texts: Sequence[str]) -> list[Tokens]:
    """The Tokens of each text; together they are faster, since the tokenizer uses all cores."""
    if len(self._kept) > _MOST_KEPT:
      self._kept = {}
    kept, in_pieces = self._kept, [self._split(text) for text in texts]
    new = list(
      dict.fromkeys(piece for pieces in in_pieces for piece in pieces if piece not in kept)
    )
    encodings = self._backend.encode_batch(new, add_special_tokens=False)
    kept.update(zip(new, map(_Piece, new, encodings)))
    return [Tokens([kept[piece] for piece in pieces]) for pieces in in_pieces]

  def _split(self, text):
    places = [match.start() for match in self._starts.finditer(text)]
    if not places or places[0] != 0:
      places.insert(0, 0)
    return [text[first:last] for first, last in zip(places, [*places[1:], len(text)])]


def safe_starts(strings: Iterable[str], added: Sequence[Any]) -> list[str]:
  """Which of the strings always begin a piece; `added` are all added tokens, with those strings.

  Not one that takes white space before it, that is looked for in normalized text, or into which
  another may reach.
  """
  if any(token.single_word for token in added):
    return []
  plain = {token.content for token in added if not (token.lstrip or token.normalized)}
  candidates = [string for string in strings if string in plain]
  reached = _reached_into(candidates, [token.content for token in added])
  return [string for string in candidates if string not in reached]


def _reached_into(strings, others):
  """Those of the strings over whose beginning another one can stand."""
  by_beginning, strings, reached = collections.defaultdict(set), set(strings), set()
  for string in strings:
    for length in range(1, len(string) + 1):
      by_beginning[string[:length]].add(string)
  for other in others:
    for start in range(1, len(other)):
      within = [other[start:end] for end in range(start + 1, len(other) + 1)]
      reached.update(strings.intersection(within))
      reached.update(by_beginning.get(other[start:], ()))  # it goes on where `other` ends
  return reached


def any_of(strings: Iterable[str]) -> re.Pattern:
  """A pattern that matches any of the strings, the longest first; nothing if there are none."""
  return re.compile('|'.join(map(re.escape, sorted(strings, key=len, reverse=True))) or '(?!)')


def _ending_by(offsets, place):
  """How many of the tokens end by there; tokens are in the order of their text."""
  return bisect.bisect_right(offsets, place, key=operator.itemgetter(1))


def _beginning_before(offsets, place):
  return bisect.bisect_left(offsets, place, key=operator.itemgetter(0))
