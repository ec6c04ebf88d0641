"""The PPO loss against verl's numbers, against a loop over tokens, and against what must hold at the first minibatch.

If a golden test fails after a change, the change is wrong, or needs a named switch: do not touch the numbers.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.errors import ConfigError
from rlhf_jax.losses.ppo import PPOLossConfig, policy_loss, ppo, value_loss
from rlhf_jax.maths.kl import kl_k1
from rlhf_jax.maths.masked import masked_mean
from rlhf_jax.model import forward
from rlhf_jax.records import Experience

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
KEY = jax.random.key(0)
B, P, R = 4, 3, 6
T = P + R
TEMPERATURE = 0.7
CONFIG = PPOLossConfig(value_weight=0.3, entropy_weight=0.05, dual_clip=1.3)


@pytest.fixture(params=[0, 1, 2])
def verl(request):
  """(numbers, the same switches as a PPOLossConfig)."""
  with np.load(GOLDEN / f'ppo_verl_{request.param}.npz') as file:
    recorded = dict(file)
  theirs = json.loads(str(recorded['config']))
  dual_clip = theirs['dual_clip'] if theirs['dual_clip'] < 1e6 else None       # a million means off
  return recorded, PPOLossConfig(clip=theirs['clip'], dual_clip=dual_clip, value_clip=theirs['value_clip'],
                                 log_ratio_limit=20.0)


def test_policy_loss_as_verl_has_it(verl):
  recorded, config = verl
  mask_BR, old_BR, advantage_BR = recorded['in_mask'], recorded['in_old_logprob'], recorded['out_advantage_whitened']

  def loss(logprob_BR):
    loss_BR, _, clipped_BR = policy_loss(logprob_BR, old_BR, advantage_BR, config)
    return masked_mean(loss_BR, mask_BR), (loss_BR, masked_mean(clipped_BR, mask_BR))
  (mean, (loss_BR, clip_fraction)), gradient_BR = jax.value_and_grad(loss, has_aux=True)(recorded['in_new_logprob'])
  np.testing.assert_allclose(mean, recorded['out_policy_loss'], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(clip_fraction, recorded['out_policy_clip_fraction'], rtol=1e-6)
  np.testing.assert_allclose(gradient_BR, recorded['out_policy_grad'], rtol=1e-4, atol=1e-6)
  single = dataclasses.replace(config, dual_clip=None)
  without_BR, *_ = policy_loss(recorded['in_new_logprob'], old_BR, advantage_BR, single)
  np.testing.assert_allclose(masked_mean(without_BR > loss_BR, mask_BR), recorded['out_dual_clip_fraction'], rtol=1e-6)


def test_value_loss_as_verl_has_it(verl):
  recorded, config = verl
  mask_BR = recorded['in_mask']

  def loss(value_BR):
    loss_BR, clipped_BR = value_loss(value_BR, recorded['in_value'] * mask_BR, recorded['out_return'], config)
    return masked_mean(loss_BR, mask_BR), masked_mean(clipped_BR, mask_BR)
  (mean, clip_fraction), gradient_BR = jax.value_and_grad(loss, has_aux=True)(recorded['in_new_value'])
  np.testing.assert_allclose(mean, recorded['out_value_loss'], rtol=1e-5)
  np.testing.assert_allclose(clip_fraction, recorded['out_value_clip_fraction'], rtol=1e-6)
  np.testing.assert_allclose(gradient_BR, recorded['out_value_grad'], rtol=1e-4, atol=1e-6)


def test_approximate_kl_as_verl_has_it(verl):
  recorded, _ = verl
  kl = masked_mean(kl_k1(recorded['in_old_logprob'], recorded['in_new_logprob']), recorded['in_mask'])
  np.testing.assert_allclose(kl, recorded['out_approx_kl_k1'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('advantage, log_ratio, loss, slope', [
  (2.0, np.log(1.1), -2.2, -2.2),                                    # inside: -A ratio, and so is its slope
  (2.0, np.log(1.5), -2.4, 0.0),                                     # a good token gains nothing past 1 + clip
  (2.0, np.log(0.5), -1.0, -1.0),                                    # and is pulled back from below
  (-2.0, np.log(0.5), 1.6, 0.0),                                     # a bad one gains nothing past 1 - clip
  (-2.0, np.log(1.5), 3.0, 3.0),                                     # and is pushed down from above
  (-2.0, np.log(9.0), 6.0, 0.0),                                     # at most dual_clip times -A
  (2.0, np.log(0.01), -0.02, -0.02),                                 # dual_clip is not for good tokens
])
def test_policy_loss_in_each_region(advantage, log_ratio, loss, slope):
  config = PPOLossConfig(clip=0.2, dual_clip=3.0)
  one = lambda logprob: policy_loss(logprob, jnp.float32(-3), jnp.float32(advantage), config)[0]
  got = jax.value_and_grad(one)(jnp.float32(-3 + log_ratio))
  np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('value, old, target, loss, slope', [
  (0.3, 0.2, 1.0, 0.5 * 0.7 ** 2, -0.7),                             # near the old value: half a square
  (0.9, 0.2, 1.0, 0.5 * 0.6 ** 2, 0.0),                              # moved too far towards the target: held at 0.4
  (-0.5, 0.2, 1.0, 0.5 * 1.5 ** 2, -1.5),                            # moved away: pulled back
])
def test_value_loss_in_each_region(value, old, target, loss, slope):
  one = lambda value: value_loss(value, jnp.float32(old), jnp.float32(target), PPOLossConfig(value_clip=0.2))[0]
  np.testing.assert_allclose(jax.value_and_grad(one)(jnp.float32(value)), (loss, slope), rtol=1e-5, atol=1e-7)
  unclipped, clipped = value_loss(jnp.float32(value), old, target, PPOLossConfig(value_clip=None))
  np.testing.assert_allclose(unclipped, 0.5 * (value - target) ** 2, rtol=1e-5)
  assert not clipped


def test_log_ratio_limit_keeps_extreme_tokens_finite():
  config = PPOLossConfig(log_ratio_limit=20.0)
  new_R, old_R, advantage_R = jnp.array([-1., -500., -1.]), jnp.array([-200., -1., -200.]), jnp.array([-1., -1., 1.])
  total = lambda new_R: policy_loss(new_R, old_R, advantage_R, config)[0].sum()
  _, ratio_R, clipped_R = policy_loss(new_R, old_R, advantage_R, config)
  np.testing.assert_allclose(ratio_R, np.exp([20., -20., 20.]), rtol=1e-5)
  assert list(clipped_R) == [False, True, True]
  np.testing.assert_array_equal(jax.grad(total)(new_R), np.zeros(3))
  np.testing.assert_allclose(total(new_R), np.exp(20.) + 0.8 - 1.2, rtol=1e-6)
  _, free_R, _ = policy_loss(new_R, old_R, advantage_R, PPOLossConfig())
  np.testing.assert_allclose(free_R[0], np.exp(80.), rtol=1e-5)              # without it, as far as float32 goes


@pytest.mark.parametrize('setting, match', [
  ({'clip': 0.0}, 'clip=0.0. It must be positive'), ({'clip': -0.2}, 'clip=-0.2. It must be positive'),
  ({'value_clip': 0.0}, 'value_clip=0.0. It must be positive, or None'),
  ({'dual_clip': 1.0}, 'dual_clip=1.0. It must be above 1, or None'),
])
def test_switches_that_cannot_work_are_refused(setting, match):
  with pytest.raises(ConfigError, match=match):
    PPOLossConfig(**setting)


def test_switches_at_their_limits_are_taken():
  PPOLossConfig(clip=1e-3, value_clip=None, dual_clip=1.01)
  PPOLossConfig(value_clip=1e-3, dual_clip=None)


@pytest.fixture(scope='module')
def networks():
  """(policy, value, {'policy', 'value'}) with separate backbones."""
  policy, value = tiny.models()
  return policy, value, {'policy': tiny.params(policy, 1), 'value': tiny.params(value, 2)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(policy, value, params, tokens_BT, valid_BT):
  return forward.policy_and_value(policy, value, params, tokens_BT, valid_BT, start=P, temperature=TEMPERATURE)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def loss_and_gradient(policy, value, config, params, batch):
  """(Mean, metrics, gradient of the total)."""
  def total(params):
    loss, metrics = ppo(policy, value, config, temperature=TEMPERATURE)(params, batch, KEY)
    return loss.total, (loss, metrics)
  gradient, (loss, metrics) = jax.grad(total, has_aux=True)(params)
  return loss, metrics, gradient


def rows(seed=0):
  """[(prompt, response)] of unequal length; the last response is empty."""
  rng = np.random.default_rng(seed)
  return [(rng.integers(0, 19, p), rng.integers(0, 19, r)) for p, r in ((3, 6), (1, 4), (2, 1), (3, 0))]


def experience_of(rows, noise=0.4, extra_value_slot=True):
  """Old log-probabilities near those of the policy of `networks`, everything else random; masked slots hold rubbish."""
  rng = np.random.default_rng(3)
  tokens_BT, valid_BT = rng.integers(0, 19, (B, T)).astype(np.int32), np.zeros((B, T), bool)
  for b, (prompt, response) in enumerate(rows):
    slots = slice(P - len(prompt), P + len(response))
    tokens_BT[b, slots], valid_BT[b, slots] = np.concatenate([prompt, response]), True
  policy, _ = tiny.models()
  tables = tiny.next_token_tables(policy, tiny.params(policy, 1), [np.concatenate(row) for row in rows], T, TEMPERATURE)
  random = lambda: rng.normal(0, 1, (B, R)).astype(np.float32)
  logprob_BR = random() * noise
  for b, (prompt, response) in enumerate(rows):
    for i, token in enumerate(response):
      logprob_BR[b, i] += tables[b][len(prompt) + i - 1, token]
  mask_BR = valid_BT[:, P:]
  longer_BR = np.arange(R) < (mask_BR.sum(1) + (mask_BR.sum(1) > 0))[:, None]
  return Experience(tokens_BT=tokens_BT, valid_BT=valid_BT, mask_BR=mask_BR,
                    value_mask_BR=longer_BR if extra_value_slot else mask_BR, logprob_BR=logprob_BR, value_BR=random(),
                    advantage_BR=random(), return_BR=random())


@pytest.mark.parametrize('config', [CONFIG, PPOLossConfig(clip=0.1, value_clip=None)], ids=['all', 'unclipped values'])
def test_loop_over_the_tokens(networks, config):
  policy, value, params = networks
  texts, batch = rows(), experience_of(rows())
  whole = [np.concatenate(text) for text in texts]
  tables = tiny.next_token_tables(policy, params['policy'], whole, T, TEMPERATURE)
  value_by_row = tiny.values_of(value, params['value'], whole, T)
  sums = dict.fromkeys(('policy_loss', 'value_loss', 'entropy', 'ratio', 'clip_fraction', 'kl_k2'), 0.)
  for b, (prompt, response) in enumerate(texts):
    for i, token in enumerate(response):
      table, advantage = tables[b][len(prompt) + i - 1], float(batch.advantage_BR[b, i])
      log_ratio = table[token] - float(batch.logprob_BR[b, i])
      ratio = np.exp(log_ratio)
      free, held = -advantage * ratio, -advantage * min(max(ratio, 1 - config.clip), 1 + config.clip)
      loss = max(free, held)
      sums['policy_loss'] += min(loss, -advantage * config.dual_clip) if config.dual_clip and advantage < 0 else loss
      sums['clip_fraction'] += held > free
      sums['ratio'] += ratio
      sums['entropy'] -= (np.exp(table) * table).sum()
      sums['kl_k2'] += 0.5 * log_ratio ** 2
    for i in np.flatnonzero(batch.value_mask_BR[b]):
      now, old, target = value_by_row[b][len(prompt) + i - 1], float(batch.value_BR[b, i]), float(batch.return_BR[b, i])
      near = now if config.value_clip is None else min(max(now, old - config.value_clip), old + config.value_clip)
      sums['value_loss'] += 0.5 * max((now - target) ** 2, (near - target) ** 2)
  loss, metrics, _ = loss_and_gradient(policy, value, config, params, batch)
  assert loss.weight == 11
  for name, expected in sums.items():
    assert metrics[name].weight == 11
    np.testing.assert_allclose(metrics[name].total, expected, rtol=1e-4, err_msg=name)
  expected = (sums['policy_loss'] + config.value_weight * sums['value_loss'] - config.entropy_weight * sums['entropy'])
  np.testing.assert_allclose(loss.total, expected, rtol=1e-4)


def test_padding_and_masked_slots_do_not_matter(networks):
  policy, value, params = networks
  batch = experience_of(rows(), extra_value_slot=False)
  base, _, gradient = loss_and_gradient(policy, value, CONFIG, params, batch)
  other = lambda x_BR: np.where(batch.mask_BR, x_BR, x_BR + 5)
  changed = dataclasses.replace(batch, tokens_BT=np.where(batch.valid_BT, batch.tokens_BT, 0), **{
    name: other(getattr(batch, name)) for name in ('logprob_BR', 'value_BR', 'advantage_BR', 'return_BR')})
  loss, _, changed_gradient = loss_and_gradient(policy, value, CONFIG, params, changed)
  assert (loss.total, loss.weight) == (base.total, base.weight)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), changed_gradient, gradient)


def test_first_minibatch_has_ratio_one(networks):
  policy, value, params = networks
  batch = experience_of(rows(), extra_value_slot=False)
  logprob_BR, _, value_BR, _ = read(policy, value, params, batch.tokens_BT, batch.valid_BT)
  batch = dataclasses.replace(batch, logprob_BR=logprob_BR, value_BR=value_BR)
  loss, metrics, _ = loss_and_gradient(policy, value, CONFIG, params, batch)
  np.testing.assert_allclose(metrics['ratio'].value(), 1, atol=1e-6)
  np.testing.assert_allclose(metrics['kl_k2'].value(), 0, atol=1e-10)
  assert metrics['clip_fraction'].value() == metrics['value_clip_fraction'].value() == 0
  policy_part = -batch.advantage_BR[batch.mask_BR].mean()
  value_part = 0.5 * np.square(np.array(batch.value_BR) - batch.return_BR)[batch.mask_BR].mean()
  np.testing.assert_allclose(metrics['policy_loss'].value(), policy_part, rtol=1e-5)
  expected = policy_part + 0.3 * value_part - 0.05 * metrics['entropy'].value()
  np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)


def test_nothing_to_learn_from_gives_no_loss_and_no_gradient(networks):
  policy, value, params = networks
  batch = experience_of(rows())
  empty = dataclasses.replace(batch, mask_BR=np.zeros((B, R), bool), value_mask_BR=np.zeros((B, R), bool))
  loss, metrics, gradient = loss_and_gradient(policy, value, CONFIG, params, empty)
  assert loss.total == loss.weight == 0
  assert all(metric.value() == 0 for metric in metrics.values())
  for leaf in jax.tree.leaves(gradient):
    assert np.array_equal(leaf, np.zeros_like(leaf))                 # NaN would not be equal


def test_a_shared_trunk_is_two_equal_backbones(networks):
  policy, value, params = networks
  batch = experience_of(rows())
  head = params['value']['scalar']
  shared = {'policy': params['policy'], 'value': {'scalar': head}}
  separate = {'policy': params['policy'], 'value': {'backbone': params['policy']['backbone'], 'scalar': head}}
  one, two = (read(policy, value, p, batch.tokens_BT, batch.valid_BT) for p in (shared, separate))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
  loss, _, gradient = loss_and_gradient(policy, value, CONFIG, shared, batch)
  loss_of_two, _, gradients_of_two = loss_and_gradient(policy, value, CONFIG, separate, batch)
  np.testing.assert_allclose(loss.total, loss_of_two.total, rtol=1e-5)
  both = jax.tree.map(jnp.add, gradients_of_two['policy']['backbone'], gradients_of_two['value']['backbone'])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, gradient['policy']['backbone'], both)          # the trunk learns from policy and value
  jax.tree.map(close, gradient['value']['scalar'], gradients_of_two['value']['scalar'])


def test_a_ratio_beyond_float32_gives_a_finite_gradient():
  old_BR, advantage_BR = jnp.array([[-200.0, -1.0]]), jnp.array([[1.0, 1.0]])
  loss = lambda new_BR: policy_loss(new_BR, old_BR, advantage_BR, PPOLossConfig())[0].sum()
  gradient_BR = jax.grad(loss)(jnp.array([[-1.0, -1.0]]))
  np.testing.assert_allclose(gradient_BR, [[0, -1]])                            # the first is clipped, the second free


def test_greedy_answers_cannot_be_learned_from():
  with pytest.raises(ConfigError, match='PPO at temperature=0'):
    ppo(None, None, PPOLossConfig(), temperature=0)
