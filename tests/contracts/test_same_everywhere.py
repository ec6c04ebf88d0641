"""One CPU, pmap, sharded jit and gradient accumulation are the same update, and sample the same tokens.

Sums travel and division happens once; if someone averages an average, ragged masks make these tests fail.
"""

import functools
import re

import jax
import numpy as np
import pytest
import tiny
from workloads import CONFIG, POLICY, RUNNERS, STAGES, batch_of, policy_and_value_params, policy_params, prompts

from rlhf_jax.generate import generate
from rlhf_jax.losses.language import cross_entropy
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model import decode_kernel
from rlhf_jax.model.heads import LanguageModel
from rlhf_jax.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.runners import single
from rlhf_jax.step import init_state, make_train_step

STEPS = 3
# The epsilon of the published PPO recipes. With 1e-8, Adam turns the rounding of a gradient of 1e-8 into a step of lr / 2.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, epsilon=1e-5)


def _train(runner, stage, microbatches=1, loss_fn=None):
  """(parameters, losses) after three steps, and the state before them, its compiled program's text."""
  usual, make_params, _ = STAGES[stage]
  loss_fn = loss_fn or usual
  optimizer = make_optimizer(OPTIMIZER)
  state = runner.initialise(lambda key: init_state(make_params(key), optimizer), jax.random.key(3))
  step = runner.compile(make_train_step(loss_fn, optimizer, axis_name=runner.axis_name, microbatches=microbatches),
                        inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))
  losses, batch, key = [], runner.place(batch_of(stage), 'batch'), jax.random.key(11)
  program = step.lower(state, batch, key).compile().as_text()
  for _ in range(STEPS):
    state, metrics = step(state, batch, key)
    losses.append(float(metrics['loss'].value()))
  return runner.fetch(state.params), np.array(losses), state, program


@functools.cache
def _alone(stage):
  return _train(single(), stage)[:2]


def _agree(stage, params, losses):
  expected_params, expected_losses = _alone(stage)
  assert np.ptp(expected_losses) > 1e-3                                         # the steps do move the parameters
  np.testing.assert_allclose(losses, expected_losses, atol=1e-6, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), params, expected_params)


def _collectives(program):
  return set(re.findall(r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(', program))


def _replicated(state):
  """Paths of the matrices of which every device holds the whole."""
  found = jax.tree_util.tree_leaves_with_path(state)
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path, x in found
          if x.ndim >= 2 and x.sharding.is_fully_replicated]


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('where', [name for name in RUNNERS if name != 'single'])
def test_devices(stage, where):
  params, losses, state, program = _train(RUNNERS[where](), stage)
  _agree(stage, params, losses)
  expected = {'pmap': {'all-reduce'}, 'tensor': {'all-reduce'}}.get(where, {'all-gather', 'all-reduce'})
  assert expected <= _collectives(program)
  replicated = _replicated(state)
  if where == 'pmap':
    assert replicated                                                           # it means to hold the whole everywhere
  elif where == 'tensor':
    assert all('norm' in path for path in replicated), replicated               # [L, D] norm scales have no tensor axis
  else:
    assert not replicated


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches(stage, microbatches):
  _agree(stage, *_train(single(), stage, microbatches)[:2])


def test_microbatches_on_a_mesh():
  _agree('sft', *_train(RUNNERS['fsdp x tensor'](), 'sft', microbatches=4)[:2])


GPU_POLICY = LanguageModel(tiny.by_cudnn(CONFIG))


def test_the_attention_of_gpus():
  """Rows moved to slot 0 on, on every device its own; heads cut over `tensor`."""
  _agree('sft', *_train(RUNNERS['fsdp x tensor'](), 'sft', loss_fn=cross_entropy(GPU_POLICY))[:2])


def test_a_mean_of_means_would_differ():
  """The batches are ragged enough that averaging microbatches' losses is another number: the contract has teeth."""
  loss_fn, params, batch = jax.jit(STAGES['sft'][0]), policy_params(jax.random.key(3)), batch_of('sft')
  halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
  mean_of_means = np.mean([loss_fn(params, half, None)[0].value() for half in halves])
  assert abs(mean_of_means - loss_fn(params, batch, None)[0].value()) > 1e-3


SAMPLING = Sampling(temperature=0.7, new_tokens=6, end_tokens=(3, 5, 8, 60))
_generate = jax.jit(functools.partial(generate, POLICY, sampling=SAMPLING))


@functools.cache
def _answers_alone():
  return jax.device_get(_generate(policy_params(jax.random.key(3)), prompts(), jax.random.key(1)))


@pytest.mark.parametrize('where', RUNNERS)
@pytest.mark.parametrize('slots', [None, 8])
def test_generate(where, slots):
  """Also from a queue, where 16 prompts share 8 slots: under pmap each device has 2 prompts and 1 slot."""
  runner = RUNNERS[where]()
  run = runner.compile(functools.partial(generate, POLICY, sampling=SAMPLING,
                                         slots=1 if slots and where == 'pmap' else slots),
                       inputs=('params', 'batch', 'same'), outputs='batch')
  rollout, alone = runner.fetch(run(policy_params(jax.random.key(3)), prompts(), jax.random.key(1))), _answers_alone()
  np.testing.assert_array_equal(rollout.tokens_BT, alone.tokens_BT)
  np.testing.assert_array_equal(rollout.mask_BR, alone.mask_BR)
  np.testing.assert_allclose(rollout.logprob_BR, alone.logprob_BR, atol=1e-5)
  assert 0 < rollout.ended_B.sum() < len(rollout.ended_B)                       # some end early, some are cut


@pytest.mark.parametrize('where, slots', [('pmap', 1), ('fsdp x tensor', 8)])
def test_generate_with_the_kernels_of_gpus(where, slots, monkeypatch):
  """Prompts moved to slot 0 and back, and decoding by one kernel, in its interpreter, which takes heads of any width."""
  monkeypatch.setattr(decode_kernel, 'allows', lambda head_width: True)
  runner = RUNNERS[where]()
  run = runner.compile(functools.partial(generate, GPU_POLICY, sampling=SAMPLING, slots=slots),
                       inputs=('params', 'batch', 'same'), outputs='batch')
  rollout, alone = runner.fetch(run(policy_params(jax.random.key(3)), prompts(), jax.random.key(1))), _answers_alone()
  np.testing.assert_array_equal(rollout.tokens_BT, alone.tokens_BT)
  np.testing.assert_array_equal(rollout.mask_BR, alone.mask_BR)
  np.testing.assert_allclose(rollout.logprob_BR, alone.logprob_BR, atol=1e-5)


def test_generate_does_not_depend_on_the_batch():
  few, whole = np.array([2, 9, 4]), _answers_alone()
  apart = _generate(policy_params(jax.random.key(3)), jax.tree.map(lambda x: x[few], prompts()), jax.random.key(1))
  np.testing.assert_array_equal(apart.tokens_BT, whole.tokens_BT[few])


@pytest.mark.parametrize('where', RUNNERS)
def test_no_second_copy_of_the_state(where):
  """A step's donated state is gone, and its buffers are the new state's: the program aliases all of them."""
  runner, (loss_fn, _, _) = RUNNERS[where](), STAGES['ppo']
  optimizer = make_optimizer(OPTIMIZER)
  state = runner.initialise(lambda key: init_state(policy_and_value_params(key), optimizer), jax.random.key(3))
  step = runner.compile(make_train_step(loss_fn, optimizer, axis_name=runner.axis_name),
                        inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))
  batch, key = batch_of('ppo'), jax.random.key(11)
  bytes_per_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  memory = step.lower(state, batch, key).compile().memory_analysis()
  step(state, batch, key)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes >= bytes_per_device
