"""The planner against closed formulas, against what a run really takes, and what compiled programs must not hold."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workloads import CONFIG, POLICY, RUNNERS, STAGES, batch_of, policy_params, prompts

from rlhf_jax import chips, cli, compiled, config, planner, remedies
from rlhf_jax.errors import ConfigError, ShardingError
from rlhf_jax.generate import generate
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model import config as model_config
from rlhf_jax.model.config import ModelConfig
from rlhf_jax.model.heads import LanguageModel, initial_params
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.step import init_state, make_train_step

generate_module = importlib.import_module('rlhf_jax.generate')                    # the package has its function by that name
# Wide enough that products with weights are nearly all of its operations.
WIDE = ModelConfig(vocab_size=640, width=256, layers=3, query_heads=8, kv_heads=4, head_width=32, feedforward_width=768,
                   context_length=64)
SETTINGS = {'preset': 'wide', 'mesh.runner': 'sharded', 'mesh.fsdp': 2, 'mesh.tensor': 2, 'data.limits.prompt_tokens': 24,
            'data.limits.response_tokens': 8, 'sft.batch_size': 16, 'sft.microbatches': 2, 'reward.batch_size': 8,
            'ppo.batch_size': 16, 'ppo.epochs': 2, 'ppo.minibatches': 2}


@pytest.fixture(scope='module', autouse=True)
def wide():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(model_config.PRESETS, 'wide', WIDE)
    patch.setitem(model_config.PRESETS, 'flat', dataclasses.replace(CONFIG, layers=1, context_length=64))
    yield


def experiment(**settings):
  return config.override(config.Experiment(), SETTINGS | {name.replace('__', '.'): x for name, x in settings.items()})


def programs(**settings):
  run = cli.prepare_shapes(experiment(**settings), jax.devices())
  return {program.name: program for program in planner.programs(run)}


@pytest.fixture(scope='module')
def of_the_run():
  return programs()


# ---- operations

def per_token(c, queries=True, keys=True):
  """Operations of one block for one token, forward, without attention: those on the way to its output, and to its keys."""
  after = 2 * (2 * c.width * c.query_heads * c.head_width + 3 * c.width * c.feedforward_width)
  return queries * after + keys * 2 * 2 * c.width * c.kv_heads * c.head_width


def forward(c, sequences, length, wanted, unembedded):
  """Operations of a forward pass whose last block answers for `wanted` tokens a sequence."""
  blocks = (c.layers - 1) * length * per_token(c) + length * per_token(c, queries=False) + wanted * per_token(c, keys=False)
  attention = 4 * c.query_heads * c.head_width * length * ((c.layers - 1) * length + wanted)
  return sequences * (blocks + attention + unembedded * 2 * c.width * c.vocab_size)


def counted(program):
  return compiled.flops(program.traced.jaxpr.jaxpr, program.trips)


class TestOperations:
  def test_of_an_sft_step_are_three_forward_passes(self, of_the_run):
    every, repeated = counted(of_the_run['SFT step'])
    once = forward(WIDE, 16, 32, 32, 32)
    assert every - repeated == pytest.approx(3 * once, rel=0.05)

  def test_what_remat_repeats_is_counted_apart(self):
    every, repeated = counted(programs(remat=True, scan_layers=True)['SFT step'])
    assert every - repeated == pytest.approx(3 * forward(WIDE, 16, 32, 32, 32), rel=0.05)
    not_needed = 3 * 16 * 32 * 2 * WIDE.width * WIDE.feedforward_width          # no gradient needs what a block ends in
    assert repeated == pytest.approx(forward(WIDE, 16, 32, 32, 0) - not_needed, rel=0.05)

  def test_of_the_update_in_all_epochs(self, of_the_run):
    every, repeated = counted(of_the_run['PPO update'])
    once = forward(WIDE, 16, 32, 9, 8) + forward(WIDE, 16, 32, 9, 0)
    assert every - repeated == pytest.approx(2 * 3 * once, rel=0.05)

  def test_of_the_experience_of_four_models(self, of_the_run):
    three = 2 * forward(WIDE, 16, 32, 9, 8) + forward(WIDE, 16, 32, 9, 0)
    assert counted(of_the_run['experience'])[0] == pytest.approx(three + forward(WIDE, 16, 32, 1, 0), rel=0.05)

  @pytest.mark.parametrize('slots', [None, 8])
  def test_of_answers_that_all_run_to_the_limit(self, slots):
    program = programs(ppo__slots=slots)['generate'] if slots else programs()['generate']
    c = WIDE
    token = c.layers * per_token(c) + 4 * c.query_heads * c.head_width * c.layers * 32 + 2 * c.width * c.vocab_size
    assert counted(program)[0] == pytest.approx(forward(c, 16, 24, 1, 1) + 16 * 7 * token, rel=0.05)


@pytest.mark.parametrize('slots', [None, 8])
def test_a_decode_loop_runs_as_often_as_is_planned(slots, monkeypatch):
  decoded, decode = [], generate_module._Queue._decode
  monkeypatch.setattr(generate_module._Queue, '_decode',
                      lambda queue, state: jax.debug.callback(lambda: decoded.append(1)) or decode(queue, state))
  params = policy_params(jax.random.key(0))
  sampling = Sampling(new_tokens=17)                                             # a cache of two sizes, one after another
  jax.jit(functools.partial(generate, POLICY, sampling=sampling, slots=slots))(params, prompts(width=5), jax.random.key(1))
  jax.effects_barrier()
  loops = 1 if slots else 2
  assert len(decoded) == pytest.approx(loops * math.prod(generate_module.loop_trips(POLICY.config, 16, 5, 17, slots)))


# ---- bytes

REAL = """
import ctypes, json, re, sys, time
import jax
from rlhf_jax import cli, config, planner
from rlhf_jax.stages import descent, sft
from rlhf_jax.step import init_state
from rlhf_jax.model.heads import LanguageModel, initial_params

experiment = config.override(config.Experiment(), json.loads(sys.argv[1]))
run = cli.prepare_shapes(experiment, jax.devices())
made = planner.plan(run, 'cpu:8', only=['SFT step'])
[cost] = made.costs
optimizer, step = descent.compile_step(run.runner, sft.loss(run), experiment.sft)
state = run.runner.initialise(lambda key: init_state(initial_params(run.policy, key), optimizer), jax.random.key(0))
batch = run.runner.place(planner._demonstrations(run), 'batch')
jax.block_until_ready((state, batch))
resident = lambda what: int(re.search(rf'{what}:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1)) * 1024
state, _ = jax.block_until_ready(step(state, batch, jax.random.key(0)))          # XLA's own buffers are there from now on
held = sum(shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards if shard.device.id == 3)
time.sleep(2)                                                                    # by then its threads have freed theirs
ctypes.CDLL(None).malloc_trim(0)
open('/proc/self/clear_refs', 'w').write('5')
before = resident('VmRSS')
jax.block_until_ready(step(state, batch, jax.random.key(0)))
print(json.dumps({'held': held, 'grown': resident('VmHWM') - before, **cost.memory}))
"""


def test_bytes_are_those_that_eight_devices_take():
  settings = {'preset': 'tiny', 'mesh.runner': 'sharded', 'mesh.fsdp': 2, 'mesh.tensor': 2, 'sft.batch_size': 64,
              'data.limits.prompt_tokens': 64, 'data.limits.response_tokens': 64}
  found = json.loads(subprocess.run([sys.executable, '-c', REAL, json.dumps(settings)], check=True, capture_output=True,
                                    text=True).stdout.splitlines()[-1])
  assert found['held'] == pytest.approx(found['parameters'] + found['optimizer'] + found['batch'], rel=0.01)
  assert found['grown'] == pytest.approx(8 * found['temporaries'], rel=0.1)


# ---- what compiled programs must not hold

def train_step(runner, loss_fn, make_params):
  """(step, what makes its first state) of a loss on a runner."""
  optimizer = make_optimizer(OptimizerConfig())
  step = runner.compile(make_train_step(loss_fn, optimizer), inputs=('params', 'batch', 'same'), outputs=('params', 'same'),
                        donate=(0,))
  return step, lambda: init_state(make_params(jax.random.key(0)), optimizer)


def compiled_text(stage, loss_fn=None, make_params=None, batch=None):
  """(HLO, state) of a train step of a workload on fsdp x tensor, from shapes; or with another loss, model or batch."""
  runner = RUNNERS['fsdp x tensor']()
  step, make = train_step(runner, loss_fn or STAGES[stage][0], make_params or STAGES[stage][1])
  state = runner.abstract(make)
  return step.lower(state, batch or batch_of(stage), jax.random.key(0)).compile().as_text(), state


def shapes(text):
  """Shapes of all arrays that a program makes, on one device."""
  return {tuple(int(n) for n in shape.split(',') if n)
          for instructions in compiled.read(text)[0].values() for each in instructions
          for _, shape, _ in compiled._ARRAY.findall(each.type)}


class TestNothingIsReplicatedByAccident:
  @pytest.mark.parametrize('stage', ['sft', 'ppo'])
  def test_logits_and_embeddings_are_cut_along_the_vocabulary(self, stage):
    """72 tokens, 36 on each of two devices: nothing of a train step has all 72."""
    text, _ = compiled_text(stage)
    found = shapes(text)
    assert not [shape for shape in found if CONFIG.vocab_size in shape]
    assert [shape for shape in found if CONFIG.vocab_size // 2 in shape]

  def test_a_chip_embeds_its_own_sequences(self):
    """16 sequences, 4 on each of 4 parts of the mesh: no stream has more of them, however large the table."""
    model = LanguageModel(dataclasses.replace(CONFIG, vocab_size=400))
    text, _ = compiled_text('sft', cross_entropy(model), functools.partial(initial_params, model))
    streams = {shape for shape in shapes(text) if len(shape) == 3 and shape[1:] == (13, CONFIG.width)}
    assert streams == {(4, 13, CONFIG.width)}

  def test_between_products_the_sequence_is_cut_over_tensor(self):
    """14 tokens, 7 on each of two devices; the numbers are those of one device, and no table is whole for it."""
    batch = jax.tree.map(lambda x_BT: jnp.pad(x_BT, ((0, 0), (0, 1))), batch_of('sft'))
    text, _ = compiled_text('sft', batch=batch)
    assert (4, 7, CONFIG.width) in shapes(text) and not [shape for shape in shapes(text) if CONFIG.vocab_size in shape]

    def learnt(runner):
      step, make = train_step(runner, *STAGES['sft'][:2])
      _, metrics = step(runner.initialise(make), batch, jax.random.key(0))
      return runner.fetch((metrics['loss'].value(), metrics['gradient_norm'].value()))
    np.testing.assert_allclose(learnt(RUNNERS['fsdp x tensor']()), learnt(RUNNERS['single']()), rtol=2e-5)

  def test_no_layer_is_kept_gathered_for_the_backward_pass(self):
    model = LanguageModel(dataclasses.replace(CONFIG, scan_layers=True, layers=3))
    text, _ = compiled_text('sft', cross_entropy(model), functools.partial(initial_params, model))
    found = shapes(text)
    assert (32, 22) in found and (3, 32, 22) not in found                        # up_DF cut over tensor alone; of all layers

  @pytest.mark.parametrize('stage', ['sft', 'reward', 'ppo'])
  def test_state_comes_in_and_goes_out_in_parts(self, stage):
    text, state = compiled_text(stage)
    computations, entry = compiled.read(text)
    given = sum(compiled.size(each.type) for each in computations[entry] if each.op == 'parameter')
    batch = sum(x.nbytes for x in jax.tree.leaves(batch_of(stage))) / 4
    assert given == pytest.approx(planner._bytes(state) + batch, rel=0.01)
    whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(state))
    assert planner._bytes(state) < 0.3 * whole                                    # cut over fsdp 2 x tensor 2

  def test_a_token_costs_no_weights(self):
    """Per token of decoding, what goes from chip to chip are activations, 4 sequences a chip, and once their logits."""
    text = decoding()
    before, after = (compiled.traffic(text, (tokens,)).sent for tokens in (0, 1))
    per_token = {kind: sent - before[kind] for kind, sent in after.items()}
    stream, logits = 4 * CONFIG.width * 4, 4 * CONFIG.vocab_size // 2 * 4
    assert per_token['all-reduce'] == stream * (1 + 2 * CONFIG.layers)            # the embedding; attention and feed-forward
    assert per_token['all-gather'] == logits
    assert per_token.get('all-to-all', 0) == per_token.get('collective-permute', 0) == 0


def decoding():
  """HLO of generate on fsdp x tensor, whose cache has one size."""
  runner = RUNNERS['fsdp x tensor']()
  answer = runner.compile(functools.partial(generate, POLICY, sampling=Sampling(new_tokens=5, end_tokens=(1,))),
                          inputs=('params', 'batch', 'same'), outputs='batch')
  params = runner.abstract(functools.partial(initial_params, POLICY), jax.random.key(0))
  return answer.lower(params, prompts(), jax.random.key(0)).compile().as_text()


# ---- the command

def show(capsys, *flags, sizes=None, **settings):
  """(exit status, stdout) of an experiment with flags."""
  with pytest.raises(SystemExit) as stopped:
    cli.main(experiment(**settings), None, 'A test.', name='test', args=list(flags), sizes=sizes)
  return stopped.value.code, capsys.readouterr()


SMALL = {'preset': 'flat', 'remat': True, 'data__limits__prompt_tokens': 6, 'data__limits__response_tokens': 2,
         'sft__batch_size': 512, 'sft__microbatches': 1, 'reward__batch_size': 4, 'ppo__batch_size': 4, 'ppo__epochs': 1,
         'ppo__minibatches': 1, 'ppo__shared_trunk': True}


def test_what_does_not_fit_is_said_and_what_helps_is_tried(capsys, monkeypatch):
  run = cli.prepare_shapes(experiment(**SMALL), jax.devices())
  [step] = planner.plan(run, 'cpu:8', only=['SFT step']).costs
  chip = chips.Chip(flops=1e12, hbm=0.8 * step.total, hbm_speed=1e10, link_speed=1e9, example='8', source='this test')
  monkeypatch.setitem(chips.CHIPS, 'cpu', chip)
  status, said = show(capsys, '--plan', 'cpu:8', '--json', **SMALL)
  made = json.loads(said.out)
  assert status == 1 and [row['program'] for row in made['programs'] if not row['fits']] == ['SFT step']
  assert [row['program'] for row in made['programs']] == ['SFT step', 'reward step', 'generate', 'experience', 'PPO update']
  row = made['programs'][0]
  assert row['seconds']['hbm'] == pytest.approx(row['hbm_bytes_per_chip'] / 1e10)
  assert row['mfu'] == pytest.approx((row['flops'] - row['repeated_flops']) / 8e12 / max(row['seconds'].values()))
  assert made['suggestion'] == {'sft.microbatches': 2}

  status, said = show(capsys, '--plan', 'cpu:8', *remedies.flags(made['suggestion']).split(), **SMALL)
  assert status == 0 and 'does not fit' not in said.out
  assert 'GiB a chip' in said.out and len([line for line in said.out.splitlines() if line.startswith('| PPO update')]) == 2


def test_a_plan_of_some_stages(capsys):
  status, said = show(capsys, '--plan', 'cpu:8', '--json', '--stages', 'reward', **SMALL)
  assert status == 0 and [row['program'] for row in json.loads(said.out)['programs']] == ['reward step']


def tried(name, stage, mesh=None, devices=8, **settings):
  """What each remedy changes that the one before it did not, and the last, for a program that does not fit."""
  sized = experiment(**{f'mesh__{axis}': size for axis, size in (mesh or {}).items()}, **settings)
  cost = planner.Cost(name, stage, {}, 0, 0, None, {}, {}, 0, False)
  return list(remedies.remedies(sized, cost, mesh or {'data': 2, 'fsdp': 2, 'tensor': 2}, devices))


FSDP = {'data': 1, 'fsdp': 8, 'tensor': 1}


@pytest.mark.parametrize('found, expected', [
  (lambda: tried('SFT step', 'sft', FSDP, sft__batch_size=32, sft__microbatches=1),
   [{'remat': 'block'}, {'remat': 'block', 'sft.microbatches': 2}, {'remat': 'block', 'sft.microbatches': 4},
    {'remat': 'block', 'sft.microbatches': 4, 'sft.optimizer.moment_dtype': 'bfloat16'}]),
  (lambda: tried('reward step', 'reward', FSDP, remat=True, reward__batch_size=8,
                 reward__optimizer__moment_dtype='bfloat16'), []),              # nothing is left to try
  (lambda: tried('PPO update', 'ppo', FSDP, remat=True, ppo__batch_size=32, ppo__minibatches=2),
   [{'ppo.microbatches': 2}, {'ppo.microbatches': 2, 'ppo.optimizer.moment_dtype': 'bfloat16'}]),
  (lambda: tried('generate', 'ppo', FSDP), [{'ppo.slots': 8}, {'ppo.slots': 8, 'ppo.gather': False}]),
  (lambda: tried('generate', 'ppo', FSDP, ppo__slots=8), [{'ppo.gather': False}]),
  (lambda: tried('experience', 'ppo', {'data': 2, 'fsdp': 4, 'tensor': 1}), [{'mesh.data': 1, 'mesh.fsdp': 8}]),
  (lambda: tried('experience', 'ppo', {'data': 1, 'fsdp': 2, 'tensor': 4}),
   [{'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.tensor': 2}]),
  (lambda: tried('experience', 'ppo', {'data': 8}, mesh__runner='pmap'),
   [{'mesh.runner': 'sharded', 'mesh.data': 1, 'mesh.fsdp': 8}]),
  (lambda: tried('experience', 'ppo', {'data': 1}, devices=1, mesh__runner='single'), []),
])
def test_what_is_tried_is_what_the_program_has(found, expected):
  assert found() == expected


@pytest.mark.parametrize('remat, expected', [('auto', [{'remat': 'block'}]), ('dots', [{'remat': 'block'}]), ('block', [])])
def test_a_policy_of_rematerialisation_gives_way_to_blocks(remat, expected):
  sized = dataclasses.replace(experiment(reward__batch_size=8, reward__optimizer__moment_dtype='bfloat16'), remat=remat)
  cost = planner.Cost('reward step', 'reward', {}, 0, 0, None, {}, {}, 0, False)
  assert list(remedies.remedies(sized, cost, FSDP, 8)) == expected


def test_settings_as_flags():
  settings = {'remat': True, 'ppo.gather': False, 'sft.optimizer.moment_dtype': 'bfloat16', 'ppo.microbatches': 4}
  flags = remedies.flags(settings)
  assert flags == '--remat --ppo.no-gather --sft.optimizer.moment-dtype bfloat16 --ppo.microbatches 4'
  parsed, _ = config.parse(config.Experiment(), cli.Command(), '', flags.split())
  assert parsed == config.override(config.Experiment(), settings)


def test_an_experiment_is_sized_for_devices(capsys):
  sizes = {'wide': {'cpu:8': {'mesh.fsdp': 3}}}
  status, said = show(capsys, '--plan', 'cpu:8', sizes=sizes)
  assert status == 2 and 'fsdp=3 x tensor=2 needs' in said.err
  status, said = show(capsys, '--sized-for', 'v5e:8x8', sizes=sizes)
  assert status == 2 and '--sized-for v5e:8x8, but for wide this experiment has settings for: cpu:8. Choose' in said.err


@pytest.mark.parametrize('topology', ['v9:2x2', 'v5e', 'v5e:8', 'v5e:axb', 'cpu:0', 'cpu:two', ''])
def test_an_unknown_topology(topology):
  with pytest.raises(ConfigError, match=re.escape(f'there is no topology {topology!r}. Known: v4:2x2x4, v5e:8x8')):
    chips.devices(topology)


def test_more_devices_than_the_process_has():
  with pytest.raises(ConfigError, match=r'a plan for cpu:16, but this process has 8 CPU devices.*device_count=16'):
    chips.devices('cpu:16')


def test_meshes_that_do_not_fit_the_devices_or_the_model():
  with pytest.raises(ShardingError, match='data=1 x fsdp=2 x tensor=16 needs 32 devices, but there are 8'):
    programs(mesh__tensor=16)
  with pytest.raises(ShardingError, match=r"K=4, which mesh axis 'tensor' \(8 devices\) does not divide. Use 4 there"):
    programs(mesh__tensor=8, mesh__fsdp=1)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed here')
def test_without_libtpu_the_extra_is_named():
  says = "a plan for v5e:2x2 needs the TPU compiler, libtpu, which is not installed. Run pip install -e '.[tpu]'"
  with pytest.raises(ConfigError, match=re.escape(says)):
    chips.devices('v5e:2x2')


# ---- TPUs

TPU = """
import json
from rlhf_jax import chips, cli, compiled, config, planner
from rlhf_jax.model.config import PRESETS, ModelConfig

PRESETS['thin'] = ModelConfig(vocab_size=1024, width=256, layers=2, query_heads=4, kv_heads=2, head_width=64,
                              feedforward_width=512, context_length=128)
settings = {'preset': 'thin', 'dtype': 'bfloat16', 'attention': 'splash', 'remat': True, 'scan_layers': True,
            'mesh.runner': 'sharded', 'mesh.fsdp': 4, 'data.limits.prompt_tokens': 64,
            'data.limits.response_tokens': 64, 'sft.batch_size': 8, 'reward.batch_size': 8, 'ppo.batch_size': 8}
run = cli.prepare_shapes(config.override(config.Experiment(), settings), chips.devices('v5e:2x2'))
step = next(planner.programs(run))
text = step.traced.lower().compile().as_text()

import jax
from jax.sharding import SingleDeviceSharding
# 128 GiB of scores, all of which the sort needs at once.
large = jax.jit(lambda x: jax.lax.sort(x[:, None] * x, dimension=0).sum(1)).lower(
  jax.ShapeDtypeStruct((1 << 17,), 'float32', sharding=SingleDeviceSharding(chips.devices('v5e:2x2')[0])))
refused = planner._compiled(large, 0, ())
print(json.dumps({'kernels': text.count('tpu_custom_call'), 'refused': refused['refused'], 'needed': refused['own'],
                  **compiled.traffic(text).sent}))
"""
LIBTPU = os.environ.get('RLHF_JAX_LIBTPU')


@pytest.mark.skipif(LIBTPU is None, reason='RLHF_JAX_LIBTPU names no directory with libtpu, as .ci/run makes one')
def test_the_tpu_compiler_takes_splash_attention_scatters_gradients_and_refuses_what_is_too_large():
  """libtpu lies in a directory of its own: beside it, JAX's profiler crashes on a CPU."""
  path = os.pathsep.join([LIBTPU, *sys.path])
  found = json.loads(subprocess.run([sys.executable, '-c', TPU], check=True, capture_output=True, text=True,
                                    env=os.environ | {'PYTHONPATH': path}).stdout.splitlines()[-1])
  assert found['kernels'] >= 4                                                   # forward, forward again, two backward
  assert found['reduce-scatter'] > 5 * found['all-reduce']
  assert 'exceeds available HBM' in found['refused'] and found['needed'] > 60 * 2**30
