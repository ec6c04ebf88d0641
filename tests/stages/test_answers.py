"""Answers to many prompts are those that each gets alone, in the order of the prompts."""

import os
import signal

import jax
import pytest
from small import prepare, prompt

from rlhf_jax import processes
from rlhf_jax.data import batches, encode
from rlhf_jax.errors import PreemptedError
from rlhf_jax.stages.answers import compile_answer, compile_ask, texts
from rlhf_jax.stages.sft import restore

# Longest first, so that sorting by length turns the order around; one of 7 to a batch of 2 is left over.
THINGS = ('a a a a a', 'a a a a', 'tea tea', 'a a', 'tea', 'jam', 'a')


@pytest.mark.parametrize('lengths', [1, 3])
def test_each_prompt_gets_what_it_gets_alone(finished, lengths):
  run = prepare(finished, settings={'ppo__lengths': lengths, 'ppo__batch_size': 2})
  examples, params = [prompt(thing) for thing in THINGS], restore(run)
  rows, counts = encode.prompts(examples, run.chat, run.experiment.data.limits)
  assert not counts.too_long and len({len(row.ids) for row in rows}) > 3
  rows = [row for row in rows for _ in range(2)]
  answer = compile_answer(run)
  alone = [texts(run, answer(params, batches.collate_prompts([row], 14, [i]), jax.random.key(5)))[0]
           for i, row in enumerate(rows)]
  assert len(set(alone)) > 4
  assert compile_ask(run)(params, examples, 5, samples=2) == [alone[i:i + 2] for i in range(0, len(alone), 2)]


def test_a_run_that_is_asked_to_stop_answers_no_more(finished):
  run = prepare(finished)
  with processes.joined(processes.ProcessesConfig()):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(PreemptedError, match='answers that were being written'):
      compile_ask(run)(restore(run), [prompt('tea')], 5)
