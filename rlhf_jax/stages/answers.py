"""Answers of a policy to any number of prompts, in batches of one shape."""

import functools

import jax

from rlhf_jax import processes
from rlhf_jax.data import batches, encode
from rlhf_jax.data.examples import Answer
from rlhf_jax.errors import DataError, PreemptedError
from rlhf_jax.generate import generate
from rlhf_jax.maths.sampling import Sampling

_WAVES = 8  # prompts to a slot when there are many to answer: slots idle only while the last answers of a queue end


def sampling(run):
  """How this run's policies answer: at PPO's temperature, from the whole vocabulary, up to an end
  token or the limit.
  """
  return Sampling(temperature=run.experiment.ppo.temperature, new_tokens=run.experiment.data.limits.response_tokens,
                  end_tokens=run.chat.end_tokens, pad_token=run.chat.pad_token)


def compile_answer(run, slots=None):
  """answer(policy parameters, Prompts, key) -> Rollout, on this run's devices, writing `slots` answers at a time or all."""
  if slots is not None and run.runner.axis_name is not None:                    # there each device has a queue of its own
    slots //= run.runner.mesh.size
  return run.runner.compile(functools.partial(generate, run.policy, sampling=sampling(run), slots=slots,
                                              gather=run.experiment.ppo.gather),
                            inputs=('params', 'batch', 'same'), outputs='batch')


def rollouts(run, answer, params, rows, key, batch_size, lengths=1):
  """Rollouts of an answer to each encoded prompt, each with the numbers of its prompts; the last is filled up.

  Prompts of about one length go together, padded to one of so many `lengths`. A prompt's number is its sample number, so
  the order changes no answer. Between batches it stops where the run is asked to: all before the answers is saved by then.
  """
  order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
  buckets = batches.bucket_lengths(run.experiment.data.limits.prompt_tokens, lengths)
  for start in range(0, len(order), batch_size):
    if processes.stop_asked():
      raise PreemptedError('the answers that were being written will be written again')
    chosen = order[start:start + batch_size]
    filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
    mine = batches.share(filled, run.runner.part)
    length = next(length for length in buckets if length >= len(rows[chosen[-1]].ids))
    yield answer(params, batches.collate_prompts([rows[i] for i in mine], length, mine), key), chosen


def texts(run, rollout):
  """The responses of a rollout, an Answer each."""
  fetched = run.runner.fetch(rollout)
  P = fetched.tokens_BT.shape[1] - fetched.mask_BR.shape[1]
  sampled = [tokens[P:][mask].tolist() for tokens, mask in zip(fetched.tokens_BT, fetched.mask_BR)]
  return [Answer(run.chat.answer_text(ids), tuple(ids)) for ids in sampled]


def compile_ask(run):
  """ask(policy parameters, examples, seed, samples): `samples` Answers to the prompt of every
  example, a list of lists.
  """
  slots = run.experiment.ppo.slots or run.experiment.ppo.batch_size
  answer = compile_answer(run, slots)

  def ask(params, examples, seed, samples=1):
    rows, counts = encode.prompts(
      examples, run.chat, run.experiment.data.limits, skip_bad_rows=True)
    if counts.refused:
      raise DataError(f'{counts.refused} of {len(examples)} prompts that the policy was asked to '
                      f'answer cannot be encoded; the first: {counts.first_refusal}')
    if counts.too_long:
      raise DataError(f'{counts.too_long} of {len(examples)} prompts have more than '
                      f'{run.experiment.data.limits.prompt_tokens} tokens. Raise '
                      '--data.limits.prompt-tokens, or pass --data.limits.too-long truncate.')
    rows = [row for row in rows for _ in range(samples)]
    at_once, said = slots * min(_WAVES, -(-len(rows) // slots)), [''] * len(rows)
    for rollout, chosen in rollouts(run, answer, params, rows, jax.random.key(seed), at_once, run.experiment.ppo.lengths):
      for i, text in zip(chosen, texts(run, rollout)):
        said[i] = text
    return [said[i:i + samples] for i in range(0, len(said), samples)]
  return ask
