"""Programs that are compiled ahead: the run finds them, waits for those that are not finished, and ends without them."""

import collections
import dataclasses
import functools
import logging
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import experiment, prepare, presets, prompt, task  # noqa: F401  presets: a fixture

from rlhf_jax import ahead, cli, planner
from rlhf_jax.ahead import Ahead
from rlhf_jax.stages import ppo, reward, sft

# Rows of the full length, so that the longest programs are those that run.
WHOLE = {
  'sft.packed': True, 'data.limits.prompt_tokens': 8, 'data.limits.response_tokens': 3,
  'data.limits.too_long': 'truncate',
}
ITERATION = 'generate', 'look_back', 'update'


@pytest.fixture
def asked(caplog):
  """{function: keys} of what JAX has looked for in its compilation cache since the last call."""
  caplog.set_level(logging.DEBUG, 'jax._src.compiler')

  def keys():
    found = collections.defaultdict(set)
    for key in re.findall(r"(?i)cache (?:hit|miss) for '\S+' with key '(\S+)'", caplog.text):
      found[key.rpartition('-')[0].removeprefix('jit_')].add(key)
    caplog.clear()
    return found
  return keys


def test_stages_find_what_was_compiled_ahead(tmp_path, asked):
  mesh = {'mesh.fsdp': 2, 'mesh.data': 4}
  run = prepare(tmp_path / 'run', settings=WHOLE | mesh, labelled=3)
  for program in planner.programs(run):
    program.traced.lower().compile()
  compiled = asked()
  for stage in (sft, reward, ppo):
    stage.train(run)
  needed = asked()
  for name, count in {'step': 2, 'generate': 1, 'look_back': 1, 'update': 1}.items():
    assert len(compiled[name]) == count
    assert needed[name] == compiled[name], name


def test_a_run_asks_for_each_program_under_one_key(tmp_path, asked):
  """Those of all lengths of SFT and reward model too, beside those of which only the planner thinks."""
  small = functools.partial(task, labelled=3)
  cli.run_stages(experiment(), small, tmp_path / 'without', cli.Command(export=False))
  needed = asked()
  cli.run_stages(experiment(), small, tmp_path / 'with',
                 cli.Command(export=False, compile_ahead=True))
  found = asked()
  assert [len(needed[name]) for name in ('step', 'look_back', 'update')] == [2, 1, 1]
  assert {name: found[name] for name in ITERATION} == {name: needed[name] for name in ITERATION}
  assert needed['step'] < found['step'] and len(found['step']) == 4


# ---- the queue

def program(size, do=lambda: None):
  """(arguments [size], a function that traces a program of them, and does something first)."""
  args = (np.zeros(size, np.float32),)

  def trace():
    do()
    return jax.jit(jnp.sin).trace(*args)
  return args, trace


def queue(at_once=1):
  made = Ahead()
  made.begin(lambda: (), at_once)
  return made


def until_idle():
  while ahead.is_busy():
    time.sleep(0.01)


def test_a_call_waits_for_a_program_that_is_being_compiled():
  order, begun = [], threading.Event()

  def slowly():
    begun.set()
    time.sleep(0.3)
    order.append('compiled')
  made, (args, trace) = queue(), program(5, slowly)
  made.add('five', args, trace)
  begun.wait()
  made.wait(program(6)[0])  # another
  assert order == []
  made.wait(args)
  assert order == ['compiled']


def test_a_call_takes_a_program_that_nobody_has_begun():
  goes_on, traced = threading.Event(), []
  made, (args, trace) = queue(), program(5, goes_on.wait)
  made.add('five', args, trace)
  made.add('six', *program(6, lambda: traced.append(6)))
  made.add('seven', *program(7, lambda: traced.append(7)))
  made.add('eight', *program(8, lambda: traced.append(8)), first=True)
  made.add('eight', *program(8, lambda: traced.append('again')))
  made.wait(program(6)[0])
  made.add('six', *program(6, lambda: traced.append('again')))
  goes_on.set()
  until_idle()
  assert traced == [8, 7]  # six was taken


def test_what_cannot_be_compiled_is_said_and_stops_nothing(capfd):
  def fails():
    raise RuntimeError('no memory to try kernels\nat all')
  made = queue()
  made.add('five', *program(5, fails))
  made.wait(program(5)[0])
  done = threading.Event()
  made.add('six', *program(6, done.set))
  assert done.wait(60)
  said = 'five: not compiled ahead (RuntimeError: no memory to try kernels); it will be when'
  assert said in capfd.readouterr().err


def test_programs_that_cannot_be_traced_are_said(capfd):
  def programs():
    raise RuntimeError('no shapes')
    yield
  made = Ahead()
  made.begin(programs, 1)
  until_idle()
  assert 'the programs of later stages: not compiled ahead (RuntimeError: no shapes)' in capfd.readouterr().err


def test_nothing_is_compiled_before_it_begins_nor_after_it_stops():
  made, traced = Ahead(), []
  made.add('five', *program(5, lambda: traced.append(5)))
  made.begin(lambda: (), 1)
  made.stop()
  made.add('six', *program(6, lambda: traced.append(6)))
  made.wait(program(6)[0])
  assert not traced and not ahead.is_busy()


@pytest.mark.parametrize('platform, asked, cores, expected', [
  ('gpu', None, 16, 4), ('gpu', None, 4, 2), ('gpu', None, 1, 0), ('gpu', False, 16, 0),
  ('tpu', None, 96, 4), ('cpu', None, 16, 0), ('cpu', True, 16, 4), ('cpu', True, 1, 1),
])
def test_so_many_threads_are_idle(platform, asked, cores, expected):
  assert ahead.idle_threads(platform, asked, cores) == expected


def test_without_a_cache_nothing_is_compiled_ahead():
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    assert ahead.idle_threads('gpu', True, 16) == 0
  finally:
    jax.config.update('jax_enable_compilation_cache', True)


@pytest.mark.parametrize('ends, status', [
  ('raise KeyboardInterrupt', 130), ("raise ConfigError('no')", 2), ("raise PreemptedError('no')", 75),
  ("raise RuntimeError('no')", 1), ('pass', 0)])
def test_a_process_ends_in_the_midst_of_compiling(ends, status):
  """Without an abort; and where it ends early, without waiting for what has 10,000 operations."""
  code = f"""
import threading
import jax, jax.numpy as jnp
from rlhf_jax import cli
from rlhf_jax.ahead import Ahead
from rlhf_jax.errors import ConfigError, PreemptedError
jax.config.update('jax_enable_compilation_cache', False)
begun, made = threading.Event(), Ahead()

def long(x):
  for number in range({400 if status == 0 else 10_000}):
    x = jnp.sin(x @ x) + number
  return x

def trace():
  traced = jax.jit(long).trace(jnp.ones((8, 8)))
  begun.set()
  return traced
made.begin(lambda: (), 1)
made.add('long', (jnp.ones((8, 8)),), trace)
begun.wait()
with cli.clear_exits('runs/it'):
  {ends}
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == status, done.stderr
  assert 'FATAL' not in done.stderr and 'terminate' not in done.stderr


def test_a_run_without_a_reward_model_has_none_among_its_frozen_models(tmp_path):
  run = prepare(tmp_path)
  frozen = {stages: next(program for program in planner.programs(run, stages) if program.name == 'experience').args[1]
            for stages in (('sft', 'ppo'), ('reward', 'ppo'))}
  assert set(frozen['sft', 'ppo']) == {'reference'}
  assert set(frozen['reward', 'ppo']) == {'reference', 'reward'}
  run.checkpoints('reward').mkdir(parents=True)
  assert set(next(program for program in planner.programs(run, ('ppo',)) if program.name == 'experience').args[1]) == {
    'reference', 'reward'}


def test_recorded_comparisons_have_as_many_candidates_as_the_most():
  ranked = [prompt('tea', responses=('Yes.',) * count, ranks=tuple(range(count))) for count in (2, 4, 3)]
  recorded = dataclasses.replace(task(None), comparisons=(ranked[:1], ranked[1:]))
  assert (recorded.candidates, task(None).candidates, task(None, labelled=5).candidates) == (4, 2, 5)
