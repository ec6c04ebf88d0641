"""What every source of data becomes: one prompt, its responses if it has any, and how people ranked them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side said: role is 'system', 'user' or 'assistant'."""
  role: str
  text: str


class Prompt(str):
  """What the user said last, with all `turns` of the conversation up to there: what judges and
  reward functions get.
  """
  turns: tuple[Turn, ...]

  def __new__(cls, turns: tuple[Turn, ...]):
    self = super().__new__(cls, turns[-1].text)
    self.turns = tuple(turns)
    return self

  def __getnewargs__(self):
    return (self.turns,)


class Answer(str):
  """What a policy said, with the `ids` that were sampled, the end token included where it came.

  An answer is compared, scored and rewarded as these ids: its text may be tokenized otherwise.
  """
  ids: tuple[int, ...]

  def __new__(cls, text: str, ids: tuple[int, ...]):
    self = super().__new__(cls, text)
    self.ids = tuple(int(i) for i in ids)
    return self

  def __getnewargs__(self):
    return str(self), self.ids


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt (turns, the last one not the assistant's) and C responses with ranks: 0 is best, equal ranks are ties.

  One response is a demonstration, two or more are a comparison, none is a prompt to answer. Those
  that a policy wrote may be an `Answer` each. `place` says where it came from ('train.jsonl row
  17'), for messages.
  """
  prompt: tuple[Turn, ...]
  responses: tuple[str, ...] = ()
  ranks: tuple[int, ...] = ()
  place: str = ''


def fingerprint(examples: Iterable[Example]) -> str:
  """SHA-256 of all turns, responses and ranks, in their order; not of places, for files may move.

  Of an `Answer` its ids count too. The same in every process. It tells whether a run that goes on
  has the data that it began with.
  """
  digest = hashlib.sha256()
  for example in examples:
    turns = [(turn.role, turn.text) for turn in example.prompt]
    ranks = [int(rank) for rank in example.ranks]
    sampled = [getattr(response, 'ids', None) for response in example.responses]
    parts = [turns, example.responses, ranks, *([sampled] if any(sampled) else [])]
    digest.update(json.dumps(parts).encode())
  return digest.hexdigest()
