"""Python reward functions: whatever maps (prompts, responses) to one number each, instead of a reward model or with it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf_jax.errors import DataError

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def score_texts(functions: Mapping[str, tuple[RewardFunction, float]], prompts, responses):
  """(weighted sum of the scores, scores by name), each float32 [B]; `functions` maps a name to (function, weight).

  Raises DataError where a function returns another count of numbers than there are responses, or one that is not finite.
  """
  by_name = {name: _checked(name, function(prompts, responses), responses) for name, (function, _) in functions.items()}
  total_B = np.zeros(len(responses), np.float32)
  for name, (_, weight) in functions.items():
    total_B += np.float32(weight) * by_name[name]
  return total_B, by_name


def _checked(name, scores, responses):
  try:
    with np.errstate(over='ignore'):
      score_B = np.asarray(scores, dtype=np.float64).astype(np.float32)
  except (TypeError, ValueError) as error:
    raise DataError(f'reward function {name!r} returned what is not a list of numbers ({error}). '
                    'Return one number a response, in their order.') from error
  if score_B.shape != (len(responses),):
    raise DataError(f'reward function {name!r} returned shape {score_B.shape} for {len(responses)} responses. '
                    'Return one number a response, in their order.')
  bad = np.flatnonzero(~np.isfinite(score_B))
  if bad.size:
    raise DataError(f'reward function {name!r} returned {score_B[bad[0]]} for response {bad[0]}: '
                    f'{responses[bad[0]][:80]!r}. Return finite numbers.')
  return score_B
