"""Experience against a loop over tokens in double precision, against verl's rewards, and against closed forms.

If a golden test fails after a change, the change is wrong, or needs a named switch: do not touch the numbers.
"""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.config import Experiment, PPOConfig
from rlhf_jax.errors import AxesError, ConfigError
from rlhf_jax.experience import ExperienceConfig, experience, shaped_rewards
from rlhf_jax.generate import generate
from rlhf_jax.losses.ppo import PPOLossConfig, policy_loss
from rlhf_jax.maths.gae import gae
from rlhf_jax.maths.kl import kl_k1
from rlhf_jax.maths.masked import masked_mean, whiten
from rlhf_jax.maths.sampling import Sampling
from rlhf_jax.model.heads import Models
from rlhf_jax.records import Prompts, Rollout
from rlhf_jax.stages.ppo import as_frozen

GOLDEN = pathlib.Path(__file__).parent / 'golden'
P, R = 3, 6
T = P + R
TEMPERATURE, KL_WEIGHT = 0.7, 0.3
# (prompt tokens, response tokens, ended): cut by length, ended in the last slot, ended earlier, at once, empty, cut.
SHAPES = [(3, 6, False), (2, 6, True), (1, 4, True), (3, 1, True), (2, 0, False), (1, 6, False)]
B = len(SHAPES)
EXTRA_B = np.array([0.7, -1.3, 0.4, 2.5, 0.1, -0.6], np.float32)


@pytest.fixture(scope='module')
def setting():
  """(models, what PPO trains, what is frozen): four parameter trees, all different."""
  policy, value = tiny.models()
  models = Models(policy, value, value)
  return (models, {'policy': tiny.params(policy, 1), 'value': tiny.params(value, 2)},
          {'reference': tiny.params(policy, 3), 'reward': tiny.params(value, 4)})


def texts():
  """[(prompt, response)] of SHAPES."""
  rng = np.random.default_rng(0)
  return [(rng.integers(0, 19, p), rng.integers(0, 19, r)) for p, r, _ in SHAPES]


def rollout():
  """The texts as a Rollout: padding is made of real tokens, and sampling log-probabilities are of no special form."""
  rng = np.random.default_rng(1)
  tokens_BT, valid_BT = rng.integers(0, 19, (B, T)).astype(np.int32), np.zeros((B, T), bool)
  for b, (prompt, response) in enumerate(texts()):
    slots = slice(P - len(prompt), P + len(response))
    tokens_BT[b, slots], valid_BT[b, slots] = np.concatenate([prompt, response]), True
  return Rollout(tokens_BT=jnp.array(tokens_BT), valid_BT=jnp.array(valid_BT), mask_BR=jnp.array(valid_BT[:, P:]),
                 logprob_BR=jnp.float32(rng.normal(-2, 1, (B, R))), sample_B=jnp.arange(B),
                 ended_B=jnp.array([ended for *_, ended in SHAPES]))


def whitened(rows, config, keep_mean=False):
  """Lists of numbers with mean 0 (or their own) and deviation 1 over all of them."""
  flat = np.concatenate(rows)
  deviation = np.sqrt(flat.var(ddof=int(config.bessel)) + 1e-8)
  return [(np.array(row) - flat.mean()) / deviation + keep_mean * flat.mean() for row in rows]


def penalty(d, config):
  kl = {'k1': d, 'k2': d * d / 2, 'k3': np.exp(-d) - 1 + d}[config.kl_estimator]
  return kl if config.kl_limit is None else min(max(kl, -config.kl_limit), config.kl_limit)


def learned_score(score, ended, config):
  if config.score_limit is not None:
    score = min(max(score, -config.score_limit), config.score_limit)
  if ended or config.missing_end == 'keep':
    return score
  return -config.missing_end_score if config.missing_end == 'replace' else score - config.missing_end_score


def by_loop(setting, config, extra_B, model_score_weight):
  """The fields of an Experience as lists of unequal rows, and the metrics that come with it, in double precision."""
  models, params, frozen = setting
  whole = [np.concatenate(text) for text in texts()]
  policy, reference = (tiny.next_token_tables(models.policy, p, whole, T, TEMPERATURE)
                       for p in (params['policy'], frozen['reference']))
  values = tiny.values_of(models.value, params['value'], whole, T)
  scores = extra_B.astype(float)
  if 'reward' in frozen:
    scores = scores + [model_score_weight * v[-1] for v in tiny.values_of(models.reward, frozen['reward'], whole, T)]
  rows = {name: [] for name in ('logprob', 'kl', 'entropy', 'reward', 'value', 'advantage', 'return')}
  for b, (prompt, response) in enumerate(texts()):
    before = [len(prompt) + i - 1 for i in range(len(response))]
    logprob = [policy[b][i, token] for i, token in zip(before, response)]
    kl = [policy[b][i, token] - reference[b][i, token] for i, token in zip(before, response)]
    rewards = [-KL_WEIGHT * penalty(d, config) for d in kl]
    if len(response) and config.score_slot == 'after_end' and len(response) < R:
      rewards.append(0.)
    if len(response):
      rewards[-1] += learned_score(scores[b], SHAPES[b][2], config)
    rows['logprob'].append(logprob)
    rows['kl'].append(kl)
    rows['entropy'].append([-(np.exp(policy[b][i]) * policy[b][i]).sum() for i in before])
    rows['reward'].append(np.array(rewards))
    rows['value'].append([values[b][len(prompt) + i - 1] for i in range(len(rewards))])
  if config.whiten_rewards:
    rows['reward'] = whitened(rows['reward'], config, keep_mean=True)
  for b, (rewards, value) in enumerate(zip(rows['reward'], rows['value'])):
    bootstraps = config.truncation == 'bootstrap' and not SHAPES[b][2]
    after = [*value[1:], values[b][-1] if bootstraps else 0.]
    delta = [r + config.discount * v_after - v for r, v_after, v in zip(rewards, after, value)]
    decay = config.discount * config.trace
    advantage = [sum(decay ** k * d for k, d in enumerate(delta[i:])) for i in range(len(delta))]
    rows['return'].append([a + v for a, v in zip(advantage, value)])
    rows['advantage'].append(advantage[:len(rows['logprob'][b])])
  if config.whiten_advantages:
    rows['advantage'] = whitened(rows['advantage'], config)
  mean = lambda name: np.concatenate(rows[name]).mean()
  error = np.concatenate(rows['return']) - np.concatenate(rows['value'])
  gap = [np.abs(x - np.array(rollout().logprob_BR[b, :len(x)])).max() for b, x in enumerate(rows['logprob']) if len(x)]
  return rows, {
    'score': scores.mean(), 'score_squared': (scores ** 2).mean(), 'reward': sum(map(sum, rows['reward'])) / B,
    'kl_nats_per_sequence': sum(map(sum, rows['kl'])) / B, 'ended': 3 / B, 'response_length': 23 / B,
    'entropy': mean('entropy'), 'value': mean('value'), 'return': mean('return'),
    'return_squared': (np.concatenate(rows['return']) ** 2).mean(), 'value_error': error.mean(),
    'value_error_squared': (error ** 2).mean(), 'logprob_gap': max(gap)}


def padded(rows):
  """[B, R] with zeros after each row."""
  return np.array([np.pad(np.array(row, float), (0, R - len(row))) for row in rows])


def switched(config):
  """The switches that differ from the defaults."""
  default = vars(ExperienceConfig())
  return ' '.join(f'{name}={value}' for name, value in vars(config).items() if value != default[name]) or 'defaults'


@pytest.mark.parametrize('config', [
  ExperienceConfig(),
  ExperienceConfig(discount=0.9, trace=0.8, bessel=False),
  ExperienceConfig(score_slot='after_end'),
  ExperienceConfig(score_slot='after_end', whiten_rewards=True, truncation='bootstrap', missing_end='replace'),
  ExperienceConfig(whiten_rewards=True, bessel=False, whiten_advantages=False),
  ExperienceConfig(missing_end='subtract', missing_end_score=0.5, truncation='bootstrap', trace=1.0),
  ExperienceConfig(missing_end='replace', missing_end_score=0.5, score_limit=0.3, discount=0.95),
  ExperienceConfig(kl_estimator='k3', kl_limit=0.4, score_limit=1.0, whiten_advantages=False),
  ExperienceConfig(kl_estimator='k2', score_slot='after_end', whiten_advantages=False),
  ExperienceConfig(kl_limit=0.2),
], ids=switched)
def test_loop_over_tokens(setting, config):
  rows, expected = by_loop(setting, config, EXTRA_B, 0.5)
  made, metrics = experience(*setting, rollout(), config, temperature=TEMPERATURE, kl_weight=KL_WEIGHT,
                             extra_score_B=jnp.array(EXTRA_B), model_score_weight=0.5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
  for name in ('value', 'advantage', 'return'):
    close(getattr(made, f'{name}_BR'), padded(rows[name]), err_msg=name)
  close(np.where(made.mask_BR, made.logprob_BR, 0), padded(rows['logprob']))
  np.testing.assert_array_equal(made.mask_BR, rollout().mask_BR)
  np.testing.assert_array_equal(made.value_mask_BR, [np.arange(R) < len(row) for row in rows['reward']])
  np.testing.assert_array_equal(made.tokens_BT, rollout().tokens_BT)
  np.testing.assert_array_equal(made.valid_BT, rollout().valid_BT)
  assert metrics.keys() == expected.keys()
  for name, metric in metrics.items():
    close(metric.value(), expected[name], err_msg=name)


@pytest.fixture(params=[0, 1, 2])
def verl(request):
  with np.load(GOLDEN / f'ppo_verl_{request.param}.npz') as file:
    recorded = dict(file)
  return recorded, json.loads(str(recorded['config']))


def test_rewards_as_verl_has_them(verl):
  recorded, config = verl
  kl_BR = kl_k1(recorded['in_old_logprob'], recorded['in_ref_logprob'])
  reward_BR, value_mask_BR = shaped_rewards(recorded['in_score'], kl_BR, recorded['in_mask'], config['kl_weight'])
  np.testing.assert_allclose(reward_BR, recorded['out_reward'], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(value_mask_BR, recorded['in_mask'])


def test_from_scores_to_the_policy_loss_as_verl_has_it(verl):
  recorded, config = verl
  mask_BR, old_BR = recorded['in_mask'], recorded['in_old_logprob']
  reward_BR, value_mask_BR = shaped_rewards(recorded['in_score'], kl_k1(old_BR, recorded['in_ref_logprob']), mask_BR,
                                            config['kl_weight'])
  advantage_BR, return_BR = gae(reward_BR, recorded['in_value'] * mask_BR, value_mask_BR,
                                discount=config['discount'], trace=config['trace'])
  np.testing.assert_allclose(return_BR, recorded['out_return'], rtol=1e-5, atol=1e-5)
  switches = PPOLossConfig(clip=config['clip'], dual_clip=config['dual_clip'], log_ratio_limit=20.0)
  loss_BR, *_ = policy_loss(recorded['in_new_logprob'], old_BR, whiten(advantage_BR, mask_BR), switches)
  np.testing.assert_allclose(masked_mean(loss_BR, mask_BR), recorded['out_policy_loss'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('score_slot, slots, counted', [('end', [5, 1, 0, None], [6, 2, 1, 0]),
                                                        ('after_end', [5, 2, 1, None], [6, 3, 2, 0])])
def test_the_slot_of_the_score(score_slot, slots, counted):
  mask_BR = jnp.arange(R) < jnp.array([6, 2, 1, 0])[:, None]
  score_B, kl_BR = jnp.array([1., 2., 3., 4.]), jnp.full((4, R), 0.5)
  reward_BR, value_mask_BR = shaped_rewards(score_B, kl_BR, mask_BR, 0.2, score_slot)
  expected_BR = -0.1 * np.array(mask_BR)
  for b, slot in enumerate(slots):
    if slot is not None:
      expected_BR[b, slot] += score_B[b]
  np.testing.assert_allclose(reward_BR, expected_BR, rtol=1e-6)
  np.testing.assert_array_equal(value_mask_BR.sum(1), counted)
  np.testing.assert_array_equal(value_mask_BR, np.arange(R) < np.array(counted)[:, None])


def test_rubbish_after_the_end_reaches_no_reward():
  mask_BR = jnp.arange(R) < jnp.array([6, 2])[:, None]
  kl_BR = jnp.where(mask_BR, 0.5, jnp.nan)
  reward_BR, _ = shaped_rewards(jnp.zeros(2), kl_BR, mask_BR, 0.2)
  np.testing.assert_allclose(reward_BR, -0.1 * mask_BR, rtol=1e-6)


@pytest.mark.parametrize('truncation', ['terminal', 'bootstrap'])
def test_returns_are_rewards_to_go_and_the_value_after_a_cut(setting, truncation):
  models, params, frozen = setting
  config = ExperienceConfig(trace=1.0, discount=1.0, truncation=truncation)
  made, _ = experience(models, params, {'reference': frozen['reference']}, rollout(), config, temperature=TEMPERATURE,
                       kl_weight=0.0, extra_score_B=jnp.array(EXTRA_B))
  whole = [np.concatenate(text) for text in texts()]
  after_B = [value[-1] for value in tiny.values_of(models.value, params['value'], whole, T)]
  bootstrap_B = np.where(rollout().ended_B, 0, after_B) if truncation == 'bootstrap' else np.zeros(B)
  expected_BR = np.where(rollout().mask_BR, (EXTRA_B + bootstrap_B)[:, None], 0)    # the score is the only reward
  np.testing.assert_allclose(made.return_BR, expected_BR, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def sampled():
  """sample(temperature, read_at) -> (rollout, experience, metrics) of a policy that is its own reference, compiled."""
  policy, value = tiny.models()
  params = {'policy': tiny.params(policy, 1), 'value': tiny.params(value, 2)}
  prompts = Prompts(*tiny.pad([prompt for prompt, _ in texts()], ['left'] * B, P), sample_B=jnp.arange(B))
  read = jax.jit(lambda rollout, temperature: experience(
    Models(policy, value), params, {'reference': params['policy']}, rollout, ExperienceConfig(),
    temperature=temperature, kl_weight=KL_WEIGHT, extra_score_B=jnp.array(EXTRA_B)))

  @functools.cache
  def rollout_at(temperature):
    sampling = Sampling(temperature=temperature, new_tokens=R, end_tokens=tuple(range(0, 19, 4)))
    run = jax.jit(functools.partial(generate, policy, sampling=sampling))
    return run(params['policy'], prompts, jax.random.key(5))

  def sample(temperature, read_at):
    return rollout_at(temperature), *read(rollout_at(temperature), read_at)
  return sample


@pytest.mark.parametrize('temperature', [0.3, 1.0, 1.7])
def test_a_policy_that_is_its_reference_has_no_kl(sampled, temperature):
  rollout, made, metrics = sampled(temperature, temperature)
  lengths_B = np.array(rollout.mask_BR).sum(1)
  assert len(set(lengths_B)) > 1                                     # or the test would not see padding after the end
  assert metrics['kl_nats_per_sequence'].value() == 0.0
  assert metrics['logprob_gap'].value() < 2e-5
  ratio_BR = np.where(rollout.mask_BR, np.exp(made.logprob_BR - rollout.logprob_BR), 1)
  np.testing.assert_allclose(ratio_BR, 1, atol=2e-5)
  np.testing.assert_allclose(metrics['reward'].total, EXTRA_B.sum(), rtol=1e-6)    # no penalty: the scores alone
  assert metrics['ended'].total == np.sum(rollout.ended_B) > 0
  assert metrics['response_length'].total == lengths_B.sum()


def test_reading_at_another_temperature_shows_as_a_gap(sampled):
  *_, metrics = sampled(1.0, 0.7)
  assert metrics['logprob_gap'].value() > 0.1


def of_extras(setting, extra_B, config=None, reward=False, **switches):
  """(experience, metrics) with no whitening, and no penalty unless asked for: a return is what a row learns from."""
  models, params, frozen = setting
  config = config or ExperienceConfig(whiten_advantages=False, trace=1.0)
  return experience(models, params, frozen if reward else {'reference': frozen['reference']}, rollout(), config,
                    temperature=TEMPERATURE, extra_score_B=extra_B, **{'kl_weight': 0.0} | switches)


def first_returns(made):
  """What each row that has a response learns from, by its first token."""
  return np.delete(np.array(made.return_BR[:, 0]), 4)


def test_slots_that_no_answer_reaches_change_nothing(setting):
  """What a stage may cut off: three more of them give the same lessons, with nothing in their place."""
  models, params, frozen = setting
  more = lambda x: jnp.pad(x, ((0, 0), (0, 3)))
  made = rollout()
  longer = made.replace(**{name: more(getattr(made, name)) for name in ('tokens_BT', 'valid_BT', 'logprob_BR', 'mask_BR')})
  look_back = lambda r: experience(models, params, frozen, r, ExperienceConfig(), temperature=TEMPERATURE,
                                   kl_weight=KL_WEIGHT)
  (short, short_metrics), (long, long_metrics) = jax.jit(look_back)(made), jax.jit(look_back)(longer)
  for name in ('logprob_BR', 'value_BR', 'advantage_BR', 'return_BR'):
    counts = np.asarray(short.value_mask_BR if name != 'logprob_BR' else short.mask_BR)
    np.testing.assert_allclose(getattr(long, name)[:, :R][counts], getattr(short, name)[counts], atol=1e-5, err_msg=name)
  assert not long.mask_BR[:, R:].any() and not long.value_mask_BR[:, R:].any()
  for name, metric in short_metrics.items():
    np.testing.assert_allclose(long_metrics[name].value(), metric.value(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_scores_are_never_rounded_to_integers(setting):
  made, metrics = of_extras(setting, jnp.full(B, 0.7))
  np.testing.assert_allclose(first_returns(made), 0.7, atol=1e-6)
  np.testing.assert_allclose(metrics['score'].value(), 0.7, rtol=1e-6)
  for limit, ended_score in ((None, 2), (1.5, 1.5)):
    halved = ExperienceConfig(missing_end='replace', missing_end_score=0.5, score_limit=limit, trace=1.0)
    made, metrics = of_extras(setting, jnp.full(B, 2, jnp.int32), halved)
    np.testing.assert_allclose(first_returns(made), [-0.5, ended_score, ended_score, ended_score, -0.5], atol=1e-6)
    assert metrics['score'].value() == 2                             # the raw score: not clamped, not replaced
  made, metrics = of_extras(setting, jnp.full(B, 2, jnp.int32), kl_weight=KL_WEIGHT)
  penalised_B = 2 - KL_WEIGHT * metrics['kl_nats_per_sequence'].value()
  mean = np.array(made.return_BR[:, 0]).sum() / B + 2 / B            # the empty row has no token to carry its score
  np.testing.assert_allclose(mean, penalised_B, rtol=1e-5)
  assert abs(penalised_B - round(float(penalised_B))) > 0.01         # the comparison would see an integer


def test_without_a_reward_model_and_without_extras_nothing_is_scored(setting):
  made, metrics = of_extras(setting, None)
  assert metrics['score'].value() == metrics['score_squared'].value() == metrics['reward'].value() == 0
  np.testing.assert_allclose(made.return_BR, 0, atol=1e-6)


def test_reward_model_and_extras_add_up_as_weighted(setting):
  models, _, frozen = setting
  whole = [np.concatenate(text) for text in texts()]
  model_B = np.array([value[-1] for value in tiny.values_of(models.reward, frozen['reward'], whole, T)])
  for extra_B, weight in ((None, 1.0), (EXTRA_B, 0.25), (np.arange(B), 0.25), (EXTRA_B, 0.0)):
    expected_B = weight * model_B + (0 if extra_B is None else extra_B)
    made, metrics = of_extras(setting, extra_B, reward=True, model_score_weight=weight)
    np.testing.assert_allclose(first_returns(made), np.delete(expected_B, 4), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics['score'].value(), expected_B.mean(), rtol=1e-4, atol=1e-5)


def test_an_empty_response_is_in_no_mask_and_changes_no_other_row(setting):
  made, _ = of_extras(setting, jnp.array(EXTRA_B))
  other, _ = of_extras(setting, jnp.array(EXTRA_B).at[4].set(1e6))
  for mine in (made, other):
    for name in ('mask_BR', 'value_mask_BR', 'value_BR', 'advantage_BR', 'return_BR'):
      assert not np.any(np.array(getattr(mine, name))[4])
  jax.tree.map(np.testing.assert_array_equal, other, made)


def test_no_gradient_passes_through(setting):
  models, params, frozen = setting

  def total(params):
    made, metrics = experience(models, params, frozen, rollout(), ExperienceConfig(), temperature=TEMPERATURE,
                               kl_weight=KL_WEIGHT)
    return jnp.sum(made.advantage_BR ** 2 + made.logprob_BR + made.value_BR) + metrics['entropy'].total
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)))


def test_whitening_is_over_all_devices(setting):
  config = ExperienceConfig(whiten_rewards=True)
  models, params, frozen = setting
  run = lambda rollout, extra_B, axis_name=None: experience(
    models, params, frozen, rollout, config, temperature=TEMPERATURE, kl_weight=KL_WEIGHT, extra_score_B=extra_B,
    axis_name=axis_name)
  made, metrics = run(rollout(), jnp.array(EXTRA_B))
  split = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), (rollout(), jnp.array(EXTRA_B)))
  shared, shared_metrics = jax.pmap(functools.partial(run, axis_name='data'), axis_name='data')(*split)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
  jax.tree.map(lambda a, b: close(a.reshape(b.shape), b), shared, made)
  for device in (0, 1):
    jax.tree.map(lambda a, b, d=device: close(a[d], b), shared_metrics, metrics)


@pytest.mark.parametrize('name', ['discount', 'trace'])
@pytest.mark.parametrize('value', [-0.1, 1.1])
def test_decays_outside_zero_to_one_are_refused(name, value):
  with pytest.raises(ConfigError, match=f'{name}={value}. It must be between 0 and 1'):
    ExperienceConfig(**{name: value})


def test_extras_of_another_length_are_refused(setting):
  with pytest.raises(AxesError, match='extra_score_B has B=5'):
    of_extras(setting, jnp.zeros(5))


@pytest.mark.parametrize('changes, message', [
  ({'score_slot': 'last'}, "score_slot='last'. Choose one of: 'end', 'after_end'"),
  ({'truncation': 'x'}, "truncation='x'"), ({'kl_estimator': 'k4'}, "kl_estimator='k4'"),
  ({'kl_limit': -1.0}, 'kl_limit=-1.0. It must be positive'), ({'discount': 1.5}, 'discount=1.5')])
def test_a_misspelt_switch_is_named(changes, message):
  with pytest.raises(ConfigError, match=message):
    ExperienceConfig(**changes)


# ---- frozen models in bfloat16

def frozen_in(dtype, params):
  run = types.SimpleNamespace(experiment=Experiment(dtype='bfloat16', ppo=PPOConfig(frozen_dtype=dtype)))
  return {name: as_frozen(run, each) for name, each in params.items()}


def test_frozen_models_in_bfloat16_change_no_number():
  """Of models that compute in it: an Experience to the bit, and a KL of 0 to a reference that is the policy."""
  policy, value = tiny.models(dtype='bfloat16', layers=3, width=64)
  models = Models(policy, value, value)
  params = {'policy': tiny.params(policy, 1), 'value': {'scalar': tiny.params(value, 2)['scalar']}}  # on its trunk
  kept = {'reference': params['policy'], 'reward': tiny.params(value, 4)}
  look_back = jax.jit(lambda params, frozen: experience(
    models, params, frozen, rollout(), ExperienceConfig(), temperature=TEMPERATURE, kl_weight=KL_WEIGHT))
  (lessons, metrics), (expected, expected_metrics) = (
    look_back(params, frozen_in(dtype, kept)) for dtype in ('bfloat16', 'float32'))
  assert metrics['kl_nats_per_sequence'].value() == 0 != metrics['score'].value()
  for x, y in zip(jax.tree.leaves((lessons, metrics)), jax.tree.leaves((expected, expected_metrics)), strict=True):
    np.testing.assert_array_equal(x, y)


def test_what_a_frozen_model_keeps_in_bfloat16():
  """Matrices: not the tables that rows are taken from, norms, biases and the scalar head, which may be added unrounded."""
  policy, value = tiny.models()
  params = {'reference': tiny.params(policy, 1), 'reward': tiny.params(value, 2)}
  kept = frozen_in('bfloat16', params)
  dtypes = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  matrices = {'q_LDNH', 'k_LDKH', 'v_LDKH', 'o_LNHD', 'up_LDF', 'down_LFD'}
  for backbone in (kept['reference']['backbone'], kept['reward']['backbone']):
    assert {name for name, x in backbone['blocks'].items() if x.dtype == 'bfloat16'} == matrices
    assert dtypes({name: x for name, x in backbone.items() if name != 'blocks'}) == {'float32'}
  assert dtypes(kept['reward']['scalar']) == dtypes(params) == dtypes(frozen_in('float32', params)) == {'float32'}
  assert jax.tree.structure(kept) == jax.tree.structure(params)
