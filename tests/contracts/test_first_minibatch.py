"""Before its first update a policy is the one that answered: every ratio is 1, and the KL to its own copy is exactly 0."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from workloads import CONFIG, RUNNERS, prompts

from rlhf_jax.experience import ExperienceConfig, experience
from rlhf_jax.generate import generate
from rlhf_jax.losses.ppo import PPOLossConfig, policy_loss, ppo
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model import forward
from rlhf_jax.model.heads import LanguageModel, Models, ScalarModel, initial_params

POLICY, SCALAR = (kind(dataclasses.replace(CONFIG, layers=1)) for kind in (LanguageModel, ScalarModel))
MODELS, LOSS = Models(POLICY, SCALAR), PPOLossConfig()


@functools.cache
def _start(where):
  """(runner, params, what is frozen): the reference is another copy of the policy, in buffers of its own."""
  runner = RUNNERS[where]()

  def noisy(key):
    leaves, tree = jax.tree.flatten({'policy': initial_params(POLICY, key), 'value': initial_params(SCALAR, key)})
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
  params = runner.initialise(noisy, jax.random.key(3))
  return runner, params, runner.copy({'reference': params['policy']})


def _measured(temperature, params, batch):
  """(ratio of every token, the metrics of the loss), as the first train step computes them."""
  start = batch.tokens_BT.shape[1] - batch.mask_BR.shape[1]
  logprob_BR, *_ = forward.policy_and_value(POLICY, SCALAR, params, batch.tokens_BT, batch.valid_BT, start=start,
                                              temperature=temperature)
  _, ratio_BR, _ = policy_loss(logprob_BR, batch.logprob_BR, batch.advantage_BR, LOSS)
  return {'ratio_BR': ratio_BR}, ppo(POLICY, SCALAR, LOSS, temperature=temperature)(params, batch, None)[1]


@pytest.mark.parametrize('temperature', [0.3, 1.0, 1.7])
@pytest.mark.parametrize('where', ['single', 'fsdp x tensor'])
def test_the_first_minibatch_is_on_policy(where, temperature):
  runner, params, frozen = _start(where)
  sampling = Sampling(temperature=temperature, new_tokens=6, end_tokens=(3, 5, 8, 60))
  answer = runner.compile(functools.partial(generate, POLICY, sampling=sampling), inputs=('params', 'batch', 'same'),
                          outputs='batch')
  look_back = runner.compile(
    functools.partial(experience, MODELS, config=ExperienceConfig(), temperature=temperature, kl_weight=0.05),
    inputs=('params', 'params', 'batch'), outputs=('batch', 'same'))
  measure = runner.compile(functools.partial(_measured, temperature), inputs=('params', 'batch'),
                           outputs=('batch', 'same'))
  rollout = answer(params['policy'], prompts(), jax.random.key(1))
  lessons, rollout_metrics = look_back(params, frozen, rollout)
  ratios, metrics = runner.fetch(measure(params, lessons))
  mask_BR, rollout_metrics = np.asarray(lessons.mask_BR), runner.fetch(rollout_metrics)
  assert mask_BR.sum() > 40 and not mask_BR.all()                               # ragged, and with something to measure
  assert np.abs(ratios['ratio_BR'] - 1)[mask_BR].max() < 1e-5
  assert rollout_metrics['kl_nats_per_sequence'].value() == 0
  assert rollout_metrics['logprob_gap'].value() < 5e-5                          # what was sampled is what is trained
  assert abs(metrics['ratio'].value() - 1) < 1e-6
  assert metrics['kl_k2'].value() < 1e-10
  assert metrics['clip_fraction'].value() == 0
