"""Memory that runs out: what is said in place of XLA's page, of programs that ask for too much."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from small import (
  PRESETS,
  copy,
  experiment,
  finished,  # noqa: F401  a fixture
  prepare,
  presets,  # noqa: F401  a fixture
  task,
)

from rlhf_jax import cli
from rlhf_jax.errors import DeviceMemoryError
from rlhf_jax.model import config as model_config


def sorted_square(x_D):
  """The sum of the first row of a sorted [D, D] array: temporaries of 4 D^2 bytes at least."""
  square_DD = jnp.sin(x_D[:, None] * x_D)
  return jnp.sort(square_DD, axis=0)[0].sum()


def out_of_memory(run, stage, name):
  """The error of a stage that calls a program of that name with a petabyte of temporaries."""
  def program(state, key):
    return {'x_D': state['x_D'] + sorted_square(state['x_D'])}
  program.__name__ = name
  with pytest.raises(DeviceMemoryError) as raised, cli._clear_memory_errors(run, stage):
    call = run.runner.compile(program, inputs=('params', 'same'), outputs='params')
    run.runner.fetch(call({'x_D': jnp.ones(2**24)}, jax.random.key(0)))
  return str(raised.value)


# Over the eight devices, of which one is used.
CUT = '--mesh.runner sharded --mesh.data 1 --mesh.fsdp 8'
HALVED = '--sft.optimizer.moment-dtype bfloat16'


@pytest.mark.parametrize('settings, stage, program, says, helps', [
  ({}, 'sft', 'step', 'SFT step', f'{CUT} --remat block --sft.microbatches 2 {HALVED}'),
  ({'remat': True, 'sft.batch_size': 64, 'sft.microbatches': 4}, 'sft', 'step', 'SFT step',
   f'{CUT} --sft.microbatches 8 {HALVED}'),
  ({'remat': True, 'sft.batch_size': 64, 'sft.microbatches': 4, 'mesh.fsdp': 8}, 'sft', 'step',
   'SFT step', f'--sft.microbatches 8 {HALVED}'),
  ({}, 'ppo', 'update', 'PPO update', f'{CUT} --remat block --ppo.optimizer.moment-dtype bfloat16'),
  ({}, 'ppo', 'generate', 'generate', f'{CUT} --ppo.slots 8 --ppo.no-gather'),
  ({'dtype': 'bfloat16'}, 'ppo', 'generate', 'generate',
   f'{CUT} --ppo.frozen-dtype bfloat16 --ppo.slots 8 --ppo.no-gather'),
  ({}, 'reward', 'generate', 'generate', f'{CUT} --ppo.slots 8 --ppo.no-gather'),
  ({'mesh.fsdp': 8}, 'ppo', 'look_back', 'experience', ''),
  ({'mesh.fsdp': 8}, 'sft', 'eval_step', 'evaluation', ''),
])
def test_a_program_that_does_not_fit(tmp_path, settings, stage, program, says, helps):
  """2^24 numbers as arguments, 64 MiB, or an eighth of it; 2^48 beside them, 2^20 GiB."""
  said = out_of_memory(prepare(tmp_path, settings=settings), stage, program)
  arguments = '0.00781' if 'mesh.fsdp' in settings else '0.0625'
  needs = (r'which needs ([\d.e+]+) GiB of a device: ([\d.]+) for its arguments '
           r'and ([\d.e+]+) beside them')
  assert said.startswith(f'{stage}: out of memory in {says}, which needs ')
  whole, of_arguments, beside = re.search(needs, said).groups()
  assert of_arguments == arguments and float(whole) >= float(beside) >= 2**20 / 8
  of = 'ppo' if says == 'generate' else stage
  smaller = f'a smaller --{of}.batch-size or shorter sequences (--data.limits). The last checkpoint'
  listed = f'Pass, in this order, until it fits: {helps}; or'
  passes = f'{listed} {smaller}' if helps else f'. Pass {smaller}'
  assert passes in said and 'XLA says: Out of memory allocating ' in said and '\n' not in said


def test_other_errors_of_jax_are_left_as_they_are(tmp_path):
  run = prepare(tmp_path)
  with pytest.raises(jax.errors.JaxRuntimeError), cli._clear_memory_errors(run, 'sft'):
    raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: no')


def test_parameters_that_do_not_fit_end_the_command_and_leave_the_stage_before(
    finished, tmp_path, capsys, monkeypatch):  # noqa: F811
  vast = dataclasses.replace(PRESETS['pico'], feedforward_width=2**42)
  monkeypatch.setitem(model_config.PRESETS, 'vast', vast)
  directory = copy(finished, tmp_path)
  shutil.rmtree(directory / 'reward')
  before = {path: path.stat().st_mtime_ns for path in (directory / 'sft').rglob('*')}
  with pytest.raises(SystemExit) as ended:
    cli.main(experiment(reward_preset='vast'), task, 'A test.',
             args=['--run-dir', str(directory), '--stages', 'reward', '--no-export'])
  said = capsys.readouterr().err
  assert ended.value.code == 2
  assert 'DeviceMemoryError: reward: out of memory before its first program: parameters and' in said
  assert f'{CUT} --reward.optimizer.moment-dtype bfloat16; or a smaller model.' in said
  assert {path: path.stat().st_mtime_ns for path in (directory / 'sft').rglob('*')} == before
