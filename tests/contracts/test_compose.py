"""The three stages composed from public names, as the README shows it: an SFT step, a reward step, a PPO iteration."""

import functools

import jax
import numpy as np
import pytest
from workloads import RUNNERS

import rlhf_jax as rj


def compose(runner):
  """The README's example; the tests below run it."""
  rng, key = np.random.default_rng(0), jax.random.key(0)
  config = rj.preset('nano')
  policy, scalar = rj.LanguageModel(config), rj.ScalarModel(config)
  optimizer = rj.make_optimizer(rj.OptimizerConfig(learning_rate=3e-4))
  tokens = lambda *shape: rng.integers(1, config.vocab_size, shape).astype('int32')

  def compiled_step(loss):
    step = rj.make_train_step(loss, optimizer, axis_name=runner.axis_name)
    return runner.compile(step, inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))

  # 1. SFT: imitate the second half of every row.
  demonstrations = rj.Demonstrations(tokens(8, 24), np.ones((8, 24), bool), np.arange(24) >= np.full((8, 1), 12))
  sft = runner.initialise(lambda k: rj.init_state(rj.initial_params(policy, k), optimizer), key)
  sft, sft_metrics = compiled_step(rj.cross_entropy(policy))(sft, demonstrations, key)

  # 2. Reward model: three ranked responses a prompt, on the backbone that SFT trained.
  comparisons = rj.Comparisons(tokens(8, 3, 24), np.ones((8, 3, 24), bool), np.tile([0, 1, 2], (8, 1)))
  start = rj.initial_params(scalar, key) | runner.copy({'backbone': sft.params['backbone']})
  reward = runner.place(rj.init_state(start, optimizer), 'params')
  reward, reward_metrics = compiled_step(rj.ranking(scalar))(reward, comparisons, key)

  # 3. PPO: answer, score, learn. The value network starts as the reward model.
  models, sampling = rj.Models(policy, scalar, scalar), rj.Sampling(temperature=0.7, new_tokens=12, end_tokens=(0,))
  frozen = {'reference': sft.params, 'reward': reward.params}
  trained = runner.copy({'policy': sft.params, 'value': reward.params})
  state = runner.place(rj.init_state(trained, optimizer), 'params')
  prompts = rj.Prompts(tokens(8, 12), np.ones((8, 12), bool), np.arange(8))
  answer = runner.compile(functools.partial(rj.generate, policy, sampling=sampling),
                          inputs=('params', 'batch', 'same'), outputs='batch')
  look_back = runner.compile(functools.partial(rj.experience, models, config=rj.ExperienceConfig(), temperature=0.7,
                                               kl_weight=0.05, axis_name=runner.axis_name),
                             inputs=('params', 'params', 'batch'), outputs=('batch', 'same'))
  step = rj.make_train_step(rj.ppo(policy, scalar, rj.PPOLossConfig(), temperature=0.7), optimizer,
                            axis_name=runner.axis_name)
  learn = runner.compile(rj.make_update(step, epochs=2, minibatches=1, axis_name=runner.axis_name),
                         inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,))
  rollout = answer(state.params['policy'], prompts, jax.random.key(1))
  lessons, rollout_metrics = look_back(state.params, frozen, rollout)
  state, ppo_metrics = learn(state, lessons, jax.random.key(2))
  return sft_metrics, reward_metrics, rollout_metrics, ppo_metrics


@pytest.mark.parametrize('where', ['single', 'pmap', 'fsdp x tensor'])
def test_the_three_steps_compose(where):
  sft, reward, rollout, ppo = jax.device_get(compose(RUNNERS[where]()))
  assert abs(sft['loss'].value() - np.log(640)) < 1.5                           # fresh parameters know about nothing
  assert abs(reward['nats'].value() - np.log(2)) < 0.7
  assert rollout['kl_nats_per_sequence'].value() == 0                           # the policy is the reference
  assert rollout['logprob_gap'].value() < 2e-5
  assert abs(ppo['ratio'].value()[0, 0] - 1) < 1e-5
  assert ppo['ratio'].value()[1, 0] != ppo['ratio'].value()[0, 0]               # and the first epoch moved the policy
