"""Answers of a policy to any number of prompts, in batches of one shape."""

import functools

import jax
import numpy as np

from rlhf_jax.data import batches, encode
from rlhf_jax.data.text import pad_token, response_text
from rlhf_jax.errors import DataError
from rlhf_jax.generate import generate
from rlhf_jax.maths.sampling import Sampling


def sampling(run):
  """How this run's policies answer: at PPO's temperature, from the whole vocabulary, up to the end token or the limit."""
  return Sampling(temperature=run.experiment.ppo.temperature, new_tokens=run.experiment.data.limits.response_tokens,
                  end_tokens=(run.tokenizer.eos_token_id,), pad_token=pad_token(run.tokenizer))


def compile_answer(run):
  """answer(policy parameters, Prompts, key) -> Rollout, on this run's devices."""
  return run.runner.compile(functools.partial(generate, run.policy, sampling=sampling(run)),
                            inputs=('params', 'batch', 'same'), outputs='batch')


def rollouts(run, answer, params, rows, key, samples=1):
  """Rollouts of `samples` answers to each encoded prompt, each with how many of its rows count: the last is filled up."""
  B, limits = run.experiment.ppo.batch_size, run.experiment.data.limits
  wanted = [row for row in rows for _ in range(samples)]
  for start in range(0, len(wanted), B):
    some = wanted[start:start + B]
    filled = some + [some[-1]] * (B - len(some))
    prompts = batches.collate_prompts(filled, limits.prompt_tokens, first_sample=start)
    yield answer(params, prompts, key), len(some)


def texts(run, rollout):
  """The responses of a rollout as texts."""
  fetched = run.runner.fetch(rollout)
  P = fetched.tokens_BT.shape[1] - fetched.mask_BR.shape[1]
  return [response_text(run.tokenizer, tokens[P:][mask]) for tokens, mask in zip(fetched.tokens_BT, fetched.mask_BR)]


def answer_texts(run, answer, params, examples, seed, samples=1):
  """`samples` texts for the prompt of every example, as a list of lists."""
  rows, skipped = encode.prompts(examples, run.tokenizer, run.experiment.data.limits)
  if skipped:
    raise DataError(f'{skipped} of {len(examples)} prompts have more than {run.experiment.data.limits.prompt_tokens} '
                    'tokens. Raise --data.limits.prompt-tokens, or pass --data.limits.too-long truncate.')
  said = []
  for rollout, count in rollouts(run, answer, params, rows, jax.random.key(seed), samples):
    said += texts(run, rollout)[:count]
  return [list(said[i:i + samples]) for i in np.arange(0, len(said), samples)]
