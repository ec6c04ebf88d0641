"""Killed in every stage and started again with the same command, the quickstart ends in the table of a run left alone."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
# Long enough that a signal sent in the first quarter of a stage arrives in it; checkpoints lie both before and after.
SETTINGS = {
  'preset': 'nano', 'data.limits.too-long': 'truncate', 'data.limits.prompt-tokens': 48,
  'world.demonstrations': 300, 'world.ranked-prompts': 80, 'world.answers-per-prompt': 2,
  'sft.steps': 120, 'sft.batch-size': 16, 'sft.evaluate-every': 60, 'sft.checkpoint-every': 25,
  'reward.steps': 100, 'reward.batch-size': 8, 'reward.evaluate-every': 50, 'reward.checkpoint-every': 10,
  'ppo.iterations': 20, 'ppo.batch-size': 16, 'ppo.epochs': 2, 'ppo.held-out-answers': 1, 'ppo.checkpoint-every': 3,
  'ppo.kl-target-nats-per-sequence': 6, 'ppo.kl-horizon-episodes': 100,
}
FLAGS = ['--no-tensorboard', '--no-export', *(f'--{name}={value}' for name, value in SETTINGS.items())]
# `python -m experiments.quickstart`, with Ctrl-C heard even where the tests run in the background, which turns it off.
COMMAND = ('import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
           'runpy.run_module("experiments.quickstart", run_name="__main__", alter_sys=True)')


def start(directory):
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  return subprocess.Popen([sys.executable, '-c', COMMAND, *FLAGS, '--run-dir', str(directory)], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(directory, stage):
  """How many lines the metrics of a stage have."""
  path = directory / stage / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def run_to_the_end(directory):
  with start(directory) as process:
    said, _ = process.communicate(timeout=600)
  assert process.returncode == 0, said
  return said, json.loads((directory / 'results.json').read_text())


def stopped_in(directory, stage, count, how):
  """Starts the command, sends it a signal when the stage has `count` lines of metrics; returns what it printed."""
  with start(directory) as process:
    try:
      deadline = time.monotonic() + 300
      while rows(directory, stage) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f'{stage} has {rows(directory, stage)} lines after five minutes'
        time.sleep(0.005)
      process.send_signal(how)
      said, _ = process.communicate(timeout=120)
    finally:
      process.kill()
  assert not (directory / 'results.json').exists(), f'the signal came too late: {said}'
  return process.returncode, said


def test_killed_in_each_stage_it_ends_in_the_same_table(tmp_path):
  _, expected = run_to_the_end(tmp_path / 'whole')
  broken = tmp_path / 'broken'
  assert stopped_in(broken, 'sft', 30, signal.SIGKILL)[0] == -signal.SIGKILL
  assert not (broken / 'reward').exists()
  status, said = stopped_in(broken, 'reward', 3, signal.SIGINT)                 # before its first checkpoint
  assert status == 130
  assert f'Stopped. The same command goes on from the last checkpoint in {broken}.' in said and 'Traceback' not in said
  assert 'sft: finished before' not in said and not (broken / 'ppo').exists()
  assert stopped_in(broken, 'reward', 25, signal.SIGKILL)[0] == -signal.SIGKILL
  status, said = stopped_in(broken, 'ppo', 5, signal.SIGTERM)                   # asked to stop: it saves, and says so
  assert status == 75 and re.search(r'Stopped as asked: ppo iteration \d+ is saved\. The same command goes on', said), said

  said, results = run_to_the_end(broken)
  assert 'sft: finished before, skipped' in said and 'reward: finished before, skipped' in said
  assert results['table'] == expected['table']
  assert results['sft'] == expected['sft'] and results['reward'] == expected['reward']
  for stage in ('sft', 'reward', 'ppo'):
    assert rows(broken, stage) == rows(tmp_path / 'whole', stage)
  assert (broken / 'answers.jsonl').read_bytes() == (tmp_path / 'whole' / 'answers.jsonl').read_bytes()
