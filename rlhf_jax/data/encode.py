"""Examples to token rows, within length limits; what is too long is skipped or truncated, and counted."""

import dataclasses
from typing import Literal

from rlhf_jax.data.text import dialogue_tokens, prompt_text, prompt_tokens
from rlhf_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Limits:
  """How many tokens a sequence may have, and what becomes of longer ones."""
  prompt_tokens: int = 128  # most tokens of a prompt, P
  response_tokens: int = 128  # most tokens of a response, R, the end token included
  too_long: Literal['skip', 'truncate'] = 'skip'  # truncate: keeps the end of a prompt and the start of a response

  @property
  def tokens(self):
    """Most tokens of prompt and response together, T."""
    return self.prompt_tokens + self.response_tokens


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence: ids, and which of them the assistant wrote."""
  ids: list[int]
  mask: list[bool]
  asked: str = ''  # of a prompt alone: its whole text, also where the ids are cut


@dataclasses.dataclass(frozen=True)
class RankedRows:
  """C sequences of one prompt, and their ranks."""
  rows: list[Row]
  ranks: list[int]


def demonstrations(examples, tokenizer, limits):
  """(Rows of the first response of each example, how many were too long and skipped)."""
  return _encoded(examples, limits, lambda example: _row(example, example.responses[0], tokenizer, limits))


def comparisons(examples, tokenizer, limits):
  """(RankedRows, how many were too long and skipped): an example is skipped if any of its responses is too long."""
  def ranked(example):
    rows = [_row(example, response, tokenizer, limits) for response in example.responses]
    return None if None in rows else RankedRows(rows, list(example.ranks))
  return _encoded(examples, limits, ranked)


def prompts(examples, tokenizer, limits):
  """(Rows of prompts alone, how many were too long and skipped)."""
  def row(example):
    whole = prompt_tokens(tokenizer, example.prompt)
    ids = _cut_prompt(whole, limits)
    return None if ids is None else Row(ids, [False] * len(ids), prompt_text(tokenizer, whole))
  return _encoded(examples, limits, row)


def _encoded(examples, limits, encode):
  found = [encode(example) for example in examples]
  kept = [row for row in found if row is not None]
  if not kept:
    raise DataError(f'none of {len(found)} examples fits into {limits.prompt_tokens} prompt and {limits.response_tokens} '
                    'response tokens. Raise --data.limits.prompt-tokens and --data.limits.response-tokens, or pass '
                    '--data.limits.too-long truncate.' if found else 'there are no examples. Check the data path.')
  return kept, len(found) - len(kept)


def _row(example, response, tokenizer, limits):
  ids, mask = dialogue_tokens(tokenizer, example.prompt, response)
  start = len(ids) - _trailing(mask)
  prompt = _cut_prompt(ids[:start], limits)
  if prompt is None or (limits.too_long == 'skip' and len(ids) - start > limits.response_tokens):
    return None
  return Row(prompt + ids[start:start + limits.response_tokens],
             mask[start - len(prompt):start] + mask[start:start + limits.response_tokens])


def _trailing(mask):
  """How many True a mask ends with: the tokens of the last response."""
  return next((i for i, written in enumerate(reversed(mask)) if not written), len(mask))


def _cut_prompt(ids, limits):
  if len(ids) <= limits.prompt_tokens:
    return ids
  return ids[-limits.prompt_tokens:] if limits.too_long == 'truncate' else None
