"""The fingerprint of examples: what it depends on and what not, and that no process has another."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.data.examples import Example, Turn, fingerprint

TALK = Example((Turn('system', 'Be brief.'), Turn('user', 'Größe?')), ('a', 'b'), (0, 1), 'x row 1')
PROMPT = Example((Turn('user', 'Hi?'),), place='x row 2')
EXAMPLES = [TALK, PROMPT]

OTHERS = {
  'text of a turn': [
    dataclasses.replace(TALK, prompt=(Turn('system', 'Be brief!'), TALK.prompt[1])), PROMPT],
  'role of a turn': [
    dataclasses.replace(TALK, prompt=(Turn('user', 'Be brief.'), TALK.prompt[1])), PROMPT],
  'a response': [dataclasses.replace(TALK, responses=('a', 'b ')), PROMPT],
  'ranks': [dataclasses.replace(TALK, ranks=(1, 0)), PROMPT],
  'order': [PROMPT, TALK],
  'one fewer': [TALK],
  'one twice': [TALK, PROMPT, PROMPT],
  'a turn cut in two': [
    dataclasses.replace(
      TALK, prompt=(*TALK.prompt[:1], Turn('user', 'Größe'), Turn('user', '?'))),
    PROMPT],
  'responses joined': [dataclasses.replace(TALK, responses=('a", "b',), ranks=(0, 1)), PROMPT],
  'none': [],
}


@pytest.mark.parametrize('others', OTHERS.values(), ids=OTHERS)
def test_every_part_of_an_example_counts(others):
  assert fingerprint(others) != fingerprint(EXAMPLES)


def test_where_examples_come_from_does_not_count():
  moved = [dataclasses.replace(example, place='y row 9') for example in EXAMPLES]
  assert fingerprint(moved) == fingerprint(iter(EXAMPLES)) == fingerprint(EXAMPLES)
  assert fingerprint([dataclasses.replace(TALK, ranks=tuple(np.arange(2)))]) == fingerprint([TALK])


def test_it_is_the_same_in_every_process():
  """If this fails, every run that was begun before the change takes its own data for other data."""
  expected = '2d173fc5b9fdbea77ffd4f5ec34a7207e6fba1dcdad2c0aa5f8a6f313a7913e4'
  assert fingerprint(EXAMPLES) == expected
  program = ('from rlhf_jax.data.examples import Example, Turn, fingerprint; '
             f'print(fingerprint({EXAMPLES!r}))')
  found = subprocess.run([sys.executable, '-c', program], env=os.environ | {'PYTHONHASHSEED': '7'},
                         capture_output=True, text=True, check=True)
  assert found.stdout.strip() == expected
