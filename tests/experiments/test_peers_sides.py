"""Sides in processes of their own: their limits, what is said of one that fails, and the whole."""

import dataclasses
import json
import os
import pathlib
import sys
import time

import pytest
import torch

from experiments import bench_peers
from experiments.bench import BatchConfig
from experiments.peers import gpus, side, sides, work
from rlhf_jax.errors import ConfigError

BATCH = BatchConfig(sft_rows=4, reward_pairs=2, tokens=9, generate_prompts=3, ppo_prompts=4,
                    prompt_tokens=5, new_tokens=6, epochs=2, minibatches=2)


def a_work(workload='sft', who='PyTorch', **changes):
  return work.Work(who, workload, 'nano', BATCH, device='cpu', compiled=False, **changes)


def script(text):
  """A command in place of a side's; its last two arguments are the Work and the file of results."""
  return sys.executable, '-c', 'import json, os, pathlib, subprocess, sys, time\n' + text


def ended(pid):
  """Whether a process is gone, or is a zombie that nobody has waited for."""
  path = pathlib.Path(f'/proc/{pid}/stat')
  return not path.exists() or path.read_text().rpartition(')')[2].split()[0] == 'Z'


# ---- a process and its limit

def test_a_side_over_its_limit_is_killed_with_all_that_it_started(tmp_path):
  command = script('''
other = subprocess.Popen(['sleep', '600'])
pathlib.Path(sys.argv[2] + '.pids').write_text(f'{os.getpid()} {other.pid}')
sys.stdin.readline()
time.sleep(600)''')
  process = sides.SideProcess(a_work(), tmp_path, command)
  deadline = time.monotonic() + 60
  pids = tmp_path / 'result.json.pids'
  while not (pids.exists() and len(pids.read_text().split()) == 2):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert process.run(0.5) == {'error': 'over 0.5 s'}
  while not all(ended(pid) for pid in pids.read_text().split()):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_a_side_waits_for_its_turn_and_hears_its_limit(tmp_path):
  command = script('''
pathlib.Path(sys.argv[2]).write_text(json.dumps({'limit': float(sys.stdin.readline()),
                                                 'work': json.loads(sys.argv[1])}))''')
  process = sides.SideProcess(a_work(), tmp_path, command)
  time.sleep(0.5)
  assert not (tmp_path / 'result.json').exists()
  found = process.run(60)
  assert found['limit'] == 60 and found['work']['workload'] == 'sft'
  assert work.from_json(json.dumps(found['work'])) == a_work()


@pytest.mark.parametrize('text, match', [
  ("raise ValueError('no such thing')", 'ended with status 1: ValueError: no such thing'),
  ('print("half way", flush=True); os.kill(os.getpid(), 11)', 'ended with SIGSEGV: half way'),
  ('pass', 'ended without a result')])
def test_a_side_that_dies_is_shown_with_its_last_words(text, match, tmp_path):
  found = sides.SideProcess(a_work(), tmp_path, script(text)).run(60)
  assert found == {'error': match}


def test_what_a_side_measured_before_it_failed_is_kept(tmp_path):
  command = script('''
pathlib.Path(sys.argv[2]).write_text(json.dumps({'rounds': 2}))
sys.exit('CUDA error')''')
  assert sides.SideProcess(a_work(), tmp_path, command).run(60) == {
    'rounds': 2, 'error': 'ended with status 1: CUDA error'}


def test_caches_of_a_side_are_its_own_and_what_the_user_set_stays(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
  monkeypatch.setenv('TRITON_CACHE_DIR', '/elsewhere')
  environment = sides._environment(a_work(), tmp_path)
  assert environment['TRITON_CACHE_DIR'] == str(tmp_path / 'triton')
  assert environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.5'
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION')
  assert sides._environment(a_work(), tmp_path)['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.92'


def test_jax_takes_the_gpu_in_our_process_alone(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  of = lambda who, device: sides._environment(
    dataclasses.replace(a_work(who=who), device=device), tmp_path).get('JAX_PLATFORMS')
  assert of('rlhf_jax', 'gpu') is None
  assert {of('PyTorch', 'gpu'), of('transformers', 'gpu'), of('rlhf_jax', 'cpu')} == {'cpu'}


# ---- rounds within the limit

class Rounds:
  """A side on a clock of its own: making it and its first round take long."""
  def __init__(self, seconds):
    self.now, self.seconds = 0.0, iter(seconds)

  def clock(self):
    return self.now

  def round(self):
    seconds = next(self.seconds)
    self.now += seconds
    return {'answer': seconds / 4, 'learn': seconds * 3 / 4}

  def peak_bytes(self):
    return 7

  def device_name(self):
    return 'a clock'


@pytest.mark.parametrize('seconds, limit_s, rounds', [
  ((50, 1, 3, 2, 9, 9), 100, 3),                                 # as many as are asked for
  ((50, 5, 5, 5), 63, 2),                                        # a third would end at 65
  ((50, 30, 1), 60, 1),                                          # one in any case
  ((50, 7, 6, 6), 1000, 2)])                                     # enough has been measured
def test_rounds_end_before_the_limit(seconds, limit_s, rounds):
  clock, written = Rounds(seconds), []
  side.measure(a_work(repeats=3), lambda: clock, limit_s, written.append, clock.clock)
  assert [found['rounds'] for found in written] == list(range(1, rounds + 1))
  counted = seconds[1:rounds + 1]
  found = written[-1]
  assert (found['seconds']['min'], found['seconds']['max']) == (min(counted), max(counted))
  assert found['first_s'] == 50
  assert found['parts']['answer'] * 3 == found['parts']['learn']
  assert found['tokens_per_second'] == 4 * 9 / found['seconds']['median']
  assert found['tflops'] > 0


def test_a_round_of_ppo_has_no_flops_of_sft():
  clock, written = Rounds((1, 2)), []
  side.measure(a_work('ppo', repeats=1), lambda: clock, 100, written.append, clock.clock)
  assert 'tflops' not in written[-1] and written[-1]['tokens_per_second'] == 4 * 6 / 2


# ---- all sides

def test_works_are_in_the_order_of_importance_with_presets_of_their_own():
  asked = bench_peers.BenchPeers(device='gpu', batch=gpus.BATCH, only=('generate', 'ppo', 'sft'))
  found = [(each.workload, each.side, each.preset) for each in bench_peers.works(asked)]
  assert found == [
    ('sft', 'rlhf_jax', 'llama3.2-1b'), ('sft', 'PyTorch', 'llama3.2-1b'),
    ('ppo', 'rlhf_jax', 'pythia-1b'), ('ppo', 'PyTorch', 'pythia-1b'),
    ('generate', 'rlhf_jax', 'llama3.2-1b'), ('generate', 'PyTorch', 'llama3.2-1b'),
    ('generate', 'transformers', 'llama3.2-1b')]
  titles = {each.workload: each.title for each in bench_peers.works(asked)}
  assert titles['sft'] == 'llama3.2-1b: SFT 8 x 2048'
  assert titles['ppo'] == 'pythia-1b: PPO 64 x (512 + 53), 4 x 4'


def test_all_sides_are_measured_and_one_that_fails_stops_no_other(tmp_path, capsys):
  """The code of --device gpu, on the CPU; 4 prompts do not divide into 3 minibatches of ours."""
  path = tmp_path / 'peers.json'
  asked = bench_peers.BenchPeers(
    device='gpu', preset='nano', batch=BatchConfig(**vars(BATCH) | {'minibatches': 3}),
    only=('ppo', 'reward'), compiled=(), repeats=2, json=str(path), limit_s=300, budget_s=900)
  found = bench_peers.on_gpu(asked, 'cpu', 'bfloat16')
  assert json.loads(path.read_text()) == found and found['finished']
  rows = {(row['workload'], row['side']): row for row in found['results']}
  assert '--batch.ppo-prompts is 4' in rows.pop(('ppo', 'rlhf_jax'))['error']
  assert list(rows) == [('ppo', 'PyTorch'), ('reward', 'rlhf_jax'), ('reward', 'PyTorch')]
  for row in rows.values():
    assert row['rounds'] == 2 and row['dtype'] == 'bfloat16'
    assert 0 < row['seconds']['min'] <= row['seconds']['median']
    assert row['tokens_per_second'] == pytest.approx(row['tokens'] / row['seconds']['median'])
    assert row['first_s'] > 0 and sum(row['parts'].values()) > 0
  said = capsys.readouterr().out.splitlines()
  assert said[1].startswith('nano: PPO 4 x (5 + 6), 2 x 3 | rlhf_jax | ConfigError: --batch.ppo')
  assert said[2].startswith('nano: PPO 4 x (5 + 6), 2 x 3 | PyTorch, eager | ')
  assert len([line for line in said if 'times as fast as' in line]) == 1


def test_a_side_for_which_no_time_is_left_is_not_begun(capsys):
  rows = []
  sides.compare([a_work(), a_work('ppo')], 100, 3, rows.append)
  assert [row.work.workload for row in rows] == ['sft', 'ppo']
  for row in rows:
    assert 'of --budget-s 3 are left. Pass a larger one' in row.found['error']
    assert row.found['error'].startswith('skipped: ')


def test_a_line_says_all_that_was_measured():
  found = {'rounds': 3, 'seconds': {'median': 5.5, 'min': 5.25, 'max': 6.0},
           'parts': {'generate': 1.0, 'update': 4.5}, 'tokens_per_second': 12345.6,
           'tflops': 470.4, 'peak_bytes': 3 * 2 ** 30, 'first_s': 21.25}
  assert bench_peers.line(sides.Row(a_work(), found)) == (
    'nano: SFT 4 x 9 | PyTorch, eager | 5.5 s (5.25 to 6, 3 rounds) | 12,346 tokens/s | '
    '470 TFLOP/s | generate 1, update 4.5 | 3.0 GiB | first result after 21.2 s')
  assert bench_peers.line(sides.Row(a_work(), {'error': 'over 75 s'})).endswith('| over 75 s')


def test_ratios_are_of_workloads_that_both_sides_measured():
  row = lambda workload, who, seconds: sides.Row(
    a_work(workload, who), {'seconds': {'median': seconds}} if seconds else {'error': 'over 5 s'})
  rows = [row('sft', 'rlhf_jax', 2.0), row('sft', 'PyTorch', 3.0), row('ppo', 'rlhf_jax', None),
          row('ppo', 'PyTorch', 3.0), row('reward', 'rlhf_jax', 1.0), row('reward', 'PyTorch', None)]
  assert list(bench_peers.ratios(rows)) == [
    'nano: SFT 4 x 9: rlhf_jax is 1.50 times as fast as PyTorch']


# ---- what cannot be compared

@pytest.mark.parametrize('flags, match', [
  (('--limit-s', '0'), '--limit-s 0. It must be above 0 seconds'),
  (('--repeats', '0'), 'nothing is measured: --repeats must be at least 1'),
  (('--preset', 'pythia-1b', '--only', 'sft', '--batch.tokens', '2049'),
   'sequences of 2049 tokens, but the model has context_length=2048'),
  (('--preset', 'pythia-2b'), "there is no model preset 'pythia-2b'"),
  (('--only', 'sft', '--json', '/no/such/folder/peers.json'), '--json /no/such/folder/peers.json: No')])
def test_it_is_said_before_any_side_begins(flags, match, capsys):
  with pytest.raises(SystemExit, match='2'):
    bench_peers.main(['--device', 'gpu', *flags])
  assert match in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_is_said_what_is_there_and_what_is_needed():
  with pytest.raises(ConfigError, match=r'--device gpu, but PyTorch \S+ .*\(needed: .*CUDA'):
    gpus.check()


def test_our_side_says_where_jax_computes():
  from experiments.peers.ours import Ours
  from rlhf_jax.model.config import preset
  with pytest.raises(ConfigError, match='JAX computes on cpu here, not on gpu'):
    Ours('sft', preset('nano'), BATCH, 'gpu')


def test_a_side_whose_starter_has_gone_ends(tmp_path):
  process = sides.SideProcess(a_work(), tmp_path)
  process.process.stdin.close()
  assert process.process.wait(120) == 0
  assert not (tmp_path / 'result.json').exists()
  assert os.path.exists(tmp_path / 'log.txt')
