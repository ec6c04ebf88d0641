"""What every source of data becomes: one prompt, its responses if it has any, and how people ranked them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side said: role is 'system', 'user' or 'assistant'."""
  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt (turns, the last one not the assistant's) and C responses with ranks: 0 is best, equal ranks are ties.

  One response is a demonstration, two or more are a comparison, none is a prompt to answer. `place` says where it came
  from ('train.jsonl row 17'), for messages.
  """
  prompt: tuple[Turn, ...]
  responses: tuple[str, ...] = ()
  ranks: tuple[int, ...] = ()
  place: str = ''
