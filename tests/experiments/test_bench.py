"""The benchmark: that the work it counts is the work that is done, that its numbers belong together, and its errors."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import bench
from experiments.benchmarks import ceilings, measuring, running
from rlhf_jax import runners
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.model.config import PRESETS, preset
from rlhf_jax.model.device import Device
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.records import Demonstrations

SIZES = bench.BatchConfig(sft_rows=8, reward_pairs=8, tokens=12, generate_prompts=4, ppo_prompts=8, prompt_tokens=5,
                          new_tokens=6, epochs=2, minibatches=2, queue_prompts=24, slots=8, queue_new_tokens=9,
                          queue_mean_tokens=4, memory_rows=8, memory_tokens=1024, memory_vocabulary=16384)
FLAGS = ('--preset', 'nano', *(word for name, size in vars(SIZES).items()
                               for word in (f'--batch.{name.replace("_", "-")}', str(size))))
FACTS = ('memory', 'rounding')
UNITS = {'sft': ('tokens', 8 * 12), 'reward': ('pairs', 8), 'generate': ('tokens', 4 * 6), 'ppo': ('prompts', 8)}
PARTS = {'sft': ['update'], 'reward': ['update'], 'generate': ['generate'], 'ppo': ['generate', 'score', 'update'],
         'queue': ['queue'], 'waves': ['waves']}


def a_turn(name):
  """(results by program, state after it, workload) of the first turn of a workload with a small model."""
  workload, done = bench.WORKLOADS[name](bench.Setting(runners.single(), *tiny.models('llama'), SIZES)), {}

  def call(program, *args):
    done[program] = workload.programs[program].call(*args)
    return done[program]
  return done, workload.turn(call, workload.state), workload


def check_donated(workload, state):
  """The state after one more turn; the two before it have been given away."""
  again = workload.turn(lambda program, *args: workload.programs[program].call(*args), state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((workload.state.params, state.params)))
  return again


# ---- what is counted is what is done

def test_an_sft_turn_reads_every_token_and_predicts_all_but_the_first_of_a_row():
  done, state, workload = a_turn('sft')
  _, metrics = done['update']
  assert metrics['loss'].weight == 8 * 11 and state.step == 1 and workload.units == 8 * 12
  assert check_donated(workload, state).step == 2


def test_a_reward_turn_learns_from_every_pair():
  done, state, workload = a_turn('reward')
  _, metrics = done['update']
  assert metrics['accuracy'].weight == 8 and metrics['score'].weight == 16 and state.step == 1 and workload.units == 8


def test_queue_and_waves_say_the_same_in_answers_of_uneven_length():
  (queued, _, workload), (waved, _, _) = a_turn('queue'), a_turn('waves')
  length_B = queued['queue'].mask_BR.sum(1)
  assert workload.units == length_B.sum() and len(set(length_B.tolist())) > 4
  np.testing.assert_array_equal(queued['queue'].tokens_BT[-8:], waved['waves'].tokens_BT)       # the last of three waves


def test_no_answer_stops_early():
  done, _, workload = a_turn('generate')
  rollout = done['generate']
  assert rollout.mask_BR.sum() == workload.units == 4 * 6 and not rollout.ended_B.any()


def test_a_ppo_turn_answers_scores_and_does_all_epochs_and_minibatches():
  done, state, workload = a_turn('ppo')
  rollout, (_, looked), (_, learned) = done.values()
  assert list(done) == PARTS['ppo'] and workload.units == 8
  assert rollout.mask_BR.sum() == 8 * 6 and looked['score'].weight == 8
  assert state.step == 2 * 2 and learned['loss'].weight.shape == (2, 2)
  assert check_donated(workload, state).step == 2 * 2 * 2


# ---- measuring

def test_the_round_that_warms_up_does_not_count(monkeypatch):
  clock = iter([0, 100, 100, 103, 103, 104, 104, 106])                          # four rounds: 100 s, 3 s, 1 s, 2 s
  monkeypatch.setattr(measuring.time, 'perf_counter', lambda: next(clock))
  program = measuring.Program(lambda x: x + 1, 0.5, 7)
  found = bench.measure(bench.Workload('count', 'laps', 6, {'lap': program}, lambda call, n: call('lap', n), 0), 3)
  assert found['seconds'] == {'median': 2, 'min': 1, 'max': 3}
  assert found['units_per_second'] == {'median': 3, 'min': 2, 'max': 6}
  assert found['parts'] == {'lap': {'seconds': found['seconds'], 'compile_seconds': 0.5, 'memory_bytes': 7}}


def test_memory_counts_a_donated_argument_once():
  add = lambda state_D: state_D + 1
  sizes = {}
  for donate in ((), (0,)):
    fn = runners.single().compile(add, inputs=('same',), outputs='same', donate=donate)
    sizes[donate] = bench.compiled(fn, jnp.zeros(1024)).memory_bytes
  assert sizes == {(): 8192, (0,): 4096}


def test_flops_are_six_a_weight_and_token_and_those_of_attention():
  block = 4 * 256 * 256 + 3 * 256 * 688
  assert bench.sft_flops(preset('small'), 16, 256) == 16 * 256 * (6 * (4 * block + 256 * 4096) + 12 * 4 * 256 * 256)
  tied = 12 * 12 * 768 * 768 + 50257 * 768                                       # no biases, norms or positions
  assert bench.sft_flops(preset('gpt2'), 2, 64) == 2 * 64 * (6 * tied + 12 * 12 * 768 * 64)


def test_bytes_are_those_of_weights_and_of_the_cache_so_far():
  block = 4 * 256 * 256 + 3 * 256 * 688
  weights, cache = 4 * block + 256 * 4096, 2 * 4 * 4 * 64 * 3 * (10 + 11)        # two tokens of 3 sequences after 10
  assert bench.decode_bytes(preset('small'), 3, 10, 2) == 4 * (2 * weights + cache)
  assert bench.decode_bytes(preset('small', dtype='bfloat16'), 3, 10, 2) == 2 * (2 * weights + cache)


def test_lengths_of_reward_and_ppo_are_their_own():
  own = dataclasses.replace(SIZES, reward_tokens=7, ppo_prompt_tokens=3, ppo_new_tokens=4)
  setting = bench.Setting(runners.single(), *tiny.models('llama'), own)
  reward, ppo = (bench.WORKLOADS[name](setting) for name in ('reward', 'ppo'))
  assert reward.title == 'reward 8 pairs x 7'
  assert ppo.title.startswith('PPO 8 x (3 + 4)')
  done = {}
  def call(program, *args):
    done[program] = ppo.programs[program].call(*args)
    return done[program]
  ppo.turn(call, ppo.state)
  assert done['generate'].tokens_BT.shape == (8, 7) and done['generate'].mask_BR.shape == (8, 4)


# ---- ceilings

@pytest.fixture
def two_devices():
  return jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ('data',))


def test_every_form_of_reading_counts_the_bytes_of_all_passes(two_devices):
  forms = {form: make() for form, make in ceilings._accelerator_forms(two_devices, 2 ** 16, 3).items()}
  assert {form: workload.units for form, workload in forms.items()} == {
    'sums of 1024': 2 * 3 * 65536 / 1e9, 'sums of 16384': 2 * 3 * 65536 / 1e9,
    'in place': 2 * 2 * 3 * 65536 / 1e9}                         # it also writes


def test_every_pass_of_row_sums_reads_the_array():
  """Of ones, each pass multiplies by the length of a row, so none can be left out of the loop."""
  x, carry_N = jnp.ones((4, 8)), jnp.ones(4)
  np.testing.assert_array_equal(ceilings.row_sums(x, carry_N, 3), np.full(4, 8.0 ** 3))


def test_signs_change_in_place():
  x = jnp.ones(1024)
  fn = jax.jit(ceilings.negated, static_argnums=1, donate_argnums=0)
  assert measuring.compiled(fn, x, 3).memory_bytes < 2 * x.nbytes
  np.testing.assert_array_equal(fn(x, 3), -np.ones(1024))


def test_the_fastest_form_is_the_ceiling(two_devices):
  found = ceilings.reading(two_devices, 1)
  assert found['form'] == 'sum' and found['gigabytes']['min'] > 0


# ---- how the model runs

def test_flags_become_fields_and_auto_leaves_the_choice_to_the_device():
  assert preset('nano', **running.changes()) == preset('nano')
  config = preset('nano', dtype='bfloat16', **running.changes('cudnn', 'block', 'yes'))
  assert (config.attention, config.remat, config.scan_layers) == ('cudnn', 'block', True)
  assert running.chosen(config, 64) == {'attention': 'cudnn_by_xla', 'remat': 'block', 'scan': 'yes'}
  config = preset('nano', **running.changes('xla', 'dots', 'no'))
  assert running.chosen(config, 64) == {'attention': 'xla', 'remat': 'dots', 'scan': 'no'}


def test_what_auto_took_is_said_for_the_tokens_of_an_update():
  """nano, in float32: 2 layers of (2 * 4 + 2 * 2) heads of 16, twice 128, and twice 64 numbers a token."""
  a_token = 2 * (192 + 256 + 128) * 4
  on_gpu = preset('nano', device=Device('gpu', 5 * 100 * a_token, 9.0))
  assert running.chosen(on_gpu, 100) == {'attention': 'xla_loop', 'remat': 'dots', 'scan': 'yes'}
  assert running.chosen(on_gpu, 101)['remat'] == 'block'
  assert running.chosen(preset('nano'), 101) == {'attention': 'xla', 'remat': 'none', 'scan': 'no'}


def test_chunks_of_logits_take_under_a_third_of_the_memory(capsys):
  found = bench.memory(bench.Setting(runners.single(), *tiny.models('llama'), SIZES))
  assert found['at once'] > 2 * 4 * 8 * 1024 * 16384                                # the logits, several times over
  assert found['in chunks'] < found['at once'] / 3


def test_bfloat16_moves_log_probabilities_a_little():
  found = bench.rounding(bench.Setting(runners.single(), *tiny.models('llama', layers=2), SIZES))
  assert 1e-4 < found['mean'] < found['max'] < 0.2


def test_flops_agree_with_the_compiler():
  """XLA also counts what is no product: a little more."""
  config = preset('nano')
  model, full_BT = LanguageModel(config), jnp.ones((4, 128), bool)
  batch = Demonstrations(tokens_BT=jnp.zeros((4, 128), jnp.int32), valid_BT=full_BT, mask_BT=full_BT)
  gradient = jax.jit(jax.grad(lambda params: cross_entropy(model)(params, batch, None)[0].total))
  params = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
  assert 1 < gradient.lower(params).cost_analysis()['flops'] / bench.sft_flops(config, 4, 128) < 1.2


# ---- whole runs

@pytest.mark.parametrize('runner, only', [
  ('single', ('sft', 'generate', 'queue', 'waves', *FACTS)), ('sharded', ('sft', 'ppo')), ('pmap', ('reward',))])
def test_a_run_from_the_command_line(runner, only, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(PRESETS, 'nano', preset('nano', layers=1))                 # half the time to compile
  mesh = {'single': {'data': 1}, 'sharded': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'pmap': {'data': 8}}[runner]
  flags = [word for axis in ('fsdp', 'tensor') if axis in mesh for word in (f'--mesh.{axis}', '2')]
  runs = ('--remat', 'block', '--scan', 'yes', '--mesh.runner', runner)
  results = bench.main([*FLAGS, '--repeats', '2', *runs, *flags, '--only', *only,
                        '--json', str(tmp_path / 'bench.json')])
  assert json.loads((tmp_path / 'bench.json').read_text()) == results
  check_context(results, runner, mesh)
  check_numbers(results, only)
  check_table(results, only, capsys.readouterr().out)


def check_context(results, runner, mesh):
  assert [name for name in results if name not in FACTS] == [
    'versions', 'machine', 'model', 'running', 'mesh', 'batch', 'repeats', 'ceiling', 'workloads', 'peak_memory']
  assert set(results['versions']) == {'python', 'jax', 'jaxlib'} and results['versions']['jax'] == jax.__version__
  assert results['mesh'] == {'runner': runner, **mesh}
  assert set(results['machine']) == {'platform', 'device_kind', 'devices', 'cores'} and results['machine']['cores'] > 0
  assert results['machine']['devices'] == math.prod(mesh.values())
  assert (results['model']['preset'], results['model']['dtype'], results['repeats']) == ('nano', 'float32', 2)
  assert results['batch'] == vars(SIZES)
  assert (results['running']['remat'], results['running']['scan']) == ('block', 'yes')
  assert results['peak_memory']['process_bytes'] > 2 ** 26


def check_numbers(results, only):
  said = {name: (found['unit'], found['units']) for name, found in results['workloads'].items()}
  assert {name: units for name, units in said.items() if name in UNITS} == {
    name: UNITS[name] for name in only if name in UNITS}
  assert said.get('queue') == said.get('waves') and list(said) == [name for name in only if name not in FACTS]
  assert [name for name in FACTS if name in results] == [name for name in FACTS if name in only]
  for name, found in results['workloads'].items():
    seconds, rate = found['seconds'], found['units_per_second']
    assert 0 < seconds['min'] <= seconds['median'] <= seconds['max']
    assert rate['max'] == pytest.approx(found['units'] / seconds['min'])
    assert list(found['parts']) == PARTS[name]
    assert all(part['compile_seconds'] > 0 and part['memory_bytes'] > 0 for part in found['parts'].values())
    assert sum(part['seconds']['median'] for part in found['parts'].values()) == pytest.approx(seconds['median'])
  top, found = results['ceiling'], results['workloads'].get('sft')
  assert top['gflops']['min'] > 0 and top['side'] % 128 == 0
  assert top['gigabytes']['min'] > 0 and top['form'] == 'sum'
  written = results['workloads'].get('generate')
  if written:
    moved = bench.decode_bytes(preset('nano'), 4, 5, 6)
    assert written['gigabytes'] == pytest.approx(moved / written['seconds']['median'] / 1e9)
  if found:
    assert found['gflops'] == pytest.approx(bench.sft_flops(preset('nano'), 8, 12) / found['seconds']['median'] / 1e9)
    assert found['ceiling_share'] == pytest.approx(found['gflops'] / top['gflops']['median'])


def check_table(results, only, said):
  titles = {'sft': 'SFT 8 x 12', 'reward': 'reward 8 pairs x 12', 'generate': 'generate 4 x (5 + 6)',
            'ppo': 'PPO 8 x (5 + 6)', 'queue': 'queue 24 x (5 + up to 9) on 8', 'waves': 'waves 24 x (5 + up to 9) on 8'}
  assert 'remat block, scan yes' in ' '.join(said.split())
  assert 'nano' in said and 'peak memory: process' in said and ('  score' in said) == ('ppo' in only)
  for name, found in results['workloads'].items():
    median = found['units_per_second']['median']
    assert titles[name] in said and (f'{median:.3g} (' in said or f'{median:.0f} (' in said)


# ---- what cannot be measured

@pytest.mark.parametrize('flags, match', [
  (('--preset', 'smal'), "ConfigError: there is no model preset 'smal'. Choose one of: nano"),
  (('--mesh.runner', 'pmap', '--batch.sft-rows', '12'), '--batch.sft-rows is 12, which does not divide over 8 parts of the '
   'mesh. Pass a multiple of 8.'),
  (('--mesh.runner', 'sharded', '--mesh.tensor', '2', '--only', 'reward', '--batch.reward-pairs', '6'),
   '--batch.reward-pairs is 6, which does not divide over 4 parts'),
  (('--only', 'ppo', '--batch.minibatches', '3'),
   '--batch.ppo-prompts is 8, which does not divide over 1 parts of the mesh, each cut into 3 minibatches'),
  (('--mesh.runner', 'sharded', '--mesh.fsdp', '3'), 'ShardingError: a mesh of data=2 x fsdp=3'),
  (('--mesh.runner', 'sharded', '--mesh.tensor', '4', '--only', 'sft'), 'ShardingError: '),      # nano has 2 kv heads
  (('--batch.new-tokens', '0'), '--batch.new-tokens is 0. It must be at least 1.'),
  (('--only', 'reward', '--batch.reward-tokens', '513'), 'sequences of 513 tokens'),
  (('--only', 'ppo', '--batch.ppo-new-tokens', '0'), '--batch.ppo-new-tokens is 0. It must be'),
  (('--only', 'ppo', '--batch.ppo-prompt-tokens', '510'), 'sequences of 516 tokens'),
  (('--repeats', '0'), '--repeats is 0. It must be at least 1.'),
  (('--only', 'waves', '--batch.slots', '7'), '--batch.queue-prompts is 24, which does not divide over waves of 7'),
  (('--only', 'queue', '--batch.queue-new-tokens', '510'), 'sequences of 515 tokens'),
  (('--only',), '--only names no workload'),
  (('--only', 'sft', '--batch.tokens', '1'), '--batch.tokens is 1: a single token'),
  (('--only', 'sft', '--batch.tokens', '513'), 'sequences of 513 tokens, but the model has context_length=512'),
  (('--only', 'ppo', '--batch.prompt-tokens', '510'), 'sequences of 516 tokens'),
  (('--json', '/no/such/folder/bench.json'), '--json /no/such/folder/bench.json: No such file or directory'),
  (('--only', 'stf'), "invalid choice 'stf'"),
])
def test_it_is_said_and_exits_with_2(flags, match, capsys):
  with pytest.raises(SystemExit, match='2'):
    bench.main([*FLAGS, *flags])
  assert match in capsys.readouterr().err


def test_a_run_that_is_refused_leaves_no_file(tmp_path):
  for flags in (('--repeats', '0'), ('--mesh.runner', 'sharded', '--mesh.tensor', '4')):
    with pytest.raises(SystemExit, match='2'):
      bench.main([*FLAGS, *flags, '--json', str(tmp_path / 'bench.json')])
  assert not list(tmp_path.iterdir())
