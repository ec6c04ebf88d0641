"""PPO as a stage: what it scores, how it holds the KL, when it stops, and that every way of running it works."""

import dataclasses
import itertools
import warnings

import jax
import numpy as np
import pytest
from small import assert_same_bits, copy, prepare, prompt, timeless

from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.errors import CheckpointError, ConfigError, DataError, DivergedError
from rlhf_jax.maths.kl import adaptive_kl_weight
from rlhf_jax.metrics import read_samples
from rlhf_jax.records import Rollout
from rlhf_jax.stages import ppo, reward, sft

# At a constant rate the number of iterations is no part of the compiled programs, so most tests here share them.
QUICK = {'ppo__epochs': 1, 'ppo__minibatches': 1, 'ppo__iterations': 2, 'ppo__optimizer__schedule': 'constant'}


def trained(finished, target, parts=('tokenizer', 'sft', 'reward'), settings=None, **task):
  """The Run of a PPO stage that has run in a copy of the finished directory."""
  run = prepare(copy(finished, target, *parts), settings=settings, **task)
  ppo.train(run)
  return run


def lengths(prompts, responses):
  return [float(len(response)) for response in responses]


def vowels(prompts, responses):
  return [sum(letter in 'aeiou' for letter in response) / 7 for response in responses]


@pytest.fixture(scope='module')
def plain(finished, tmp_path_factory):
  """The stage with nothing but the reward model, two epochs of two minibatches."""
  return trained(finished, tmp_path_factory.mktemp('plain'))


# ---- what holds of every run

def test_before_the_first_update_the_policy_is_the_sft_model(plain):
  first = timeless(plain.stage('ppo'))[0]
  assert first['kl_nats_per_sequence'] == 0 and first['first_ratio'] == pytest.approx(1, abs=1e-5)
  assert first['first_kl_k2'] < 1e-9


def test_every_iteration_has_its_numbers(plain):
  rows = timeless(plain.stage('ppo'))
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  for row in rows:
    assert {'score', 'score_std', 'kl_nats_per_sequence', 'entropy', 'clip_fraction', 'explained_variance', 'ended',
            'response_length', 'logprob_gap', 'gradient_norm', 'kl_weight', 'reward'} <= set(row)
    assert 0 <= row['ended'] <= 1 <= row['response_length'] <= 10 and row['logprob_gap'] < 1e-4
  assert [row['step'] for row in read_samples(plain.stage('ppo'))] == [2] * 8 + [4] * 8
  assert all(row['prompt'].startswith('Want ') for row in read_samples(plain.stage('ppo')))


def test_policy_and_value_move_and_the_sft_model_stays(plain):
  params, start = ppo.restore(plain), sft.restore(plain)
  moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), params['policy'], start)
  assert max(jax.tree.leaves(moved)) > 1e-5
  assert float(abs(params['value']['scalar']['scalar_D'] - reward.restore(plain)['scalar']['scalar_D']).max()) > 1e-5


def test_the_table_compares_the_two_on_prompts_that_are_held_out(plain):
  table, said = ppo.compare(plain)
  assert set(table) == set(said) == {'SFT', 'PPO'}
  assert table['SFT']['KL, nats per answer'] == 0 != table['PPO']['KL, nats per answer']
  assert set(said['SFT'][0]) == {'Want tar?', 'Want tin?'} and said['SFT'][0] == said['PPO'][0]
  words = [len(response.split()) for response in said['PPO'][1]]
  assert table['PPO']['words'] == pytest.approx(np.mean(words)) and len(words) == plain.experiment.ppo.batch_size


def test_answers_from_a_queue_are_the_same(finished, plain, tmp_path):
  queued = trained(finished, tmp_path, settings=QUICK | {'ppo__slots': 3, 'ppo__iterations': 1})
  first, together = timeless(queued.stage('ppo'))[0], timeless(plain.stage('ppo'))[0]
  assert first['response_length'] == together['response_length']
  assert first['score'] == pytest.approx(together['score'], abs=1e-5)


@pytest.mark.parametrize(
  'done, broken', [(1, {'kl_nats_per_sequence': 0.01}), (3, {'first_ratio': 1.01})])
def test_in_tests_a_broken_fact_is_an_error(done, broken):
  """A run only warns. Here pyproject.toml makes errors of two warnings, by their texts."""
  facts = {'kl_nats_per_sequence': 0.0, 'first_ratio': 1.0, 'ended': 0.5}
  ppo._check_facts(done, facts)
  with pytest.raises(UserWarning, match='it should be'):
    ppo._check_facts(done, facts | broken)


# ---- what is scored

def test_python_rewards_are_added_to_the_reward_model_by_weight(finished, plain, tmp_path):
  """The first answers of a seed are the same in all these runs, so their scores are sums that can be checked."""
  functions = {'lengths': (lengths, 0.25), 'vowels': (vowels, -2.0)}
  mixed = trained(finished, tmp_path / 'mixed', settings=QUICK | {'ppo__reward_model_weight': 0.5},
                  reward_functions=functions)
  first, alone = timeless(mixed.stage('ppo'))[0], timeless(plain.stage('ppo'))[0]
  assert first['reward/lengths'] > 0 and first['reward/vowels'] > 0
  expected = 0.5 * alone['score'] + 0.25 * first['reward/lengths'] - 2 * first['reward/vowels']
  assert first['score'] == pytest.approx(expected, abs=1e-4)


def test_python_rewards_need_no_reward_model(finished, tmp_path):
  run = trained(finished, tmp_path, ('tokenizer', 'sft'), QUICK, reward_functions={'lengths': (lengths, 0.5)})
  rows = timeless(run.stage('ppo'))
  assert [row['score'] for row in rows] == pytest.approx([0.5 * row['reward/lengths'] for row in rows])
  assert rows[0]['value'] == 0                                                  # the value starts as a head of zeros
  table, _ = ppo.compare(run)
  assert np.isfinite(table['PPO']['score'])


def test_a_python_reward_that_is_not_a_number_names_the_function(finished, tmp_path):
  with pytest.raises(DataError, match="reward function 'broken' returned nan for response 0"):
    trained(finished, tmp_path, ('tokenizer', 'sft'), reward_functions={
      'broken': (lambda prompts, responses: [float('nan')] * len(responses), 1.0)})


def test_nothing_that_scores(finished, tmp_path):
  with pytest.raises(ConfigError, match=r'PPO has nothing to score answers: no reward model in .* and no reward function'):
    trained(finished, tmp_path, ('tokenizer', 'sft'))


def test_no_sft_model(finished, tmp_path):
  with pytest.raises(CheckpointError, match=r'the stage sft is not finished in .* add sft to --stages'):
    trained(finished, tmp_path, ('tokenizer',), reward_functions={'lengths': (lengths, 1.0)})


def test_a_reward_model_that_is_not_finished(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft'), reward_functions={'lengths': (lengths, 1.0)})
  with Checkpoints(run.checkpoints('reward')):
    pass
  with pytest.raises(CheckpointError, match='the stage reward is not finished'):
    ppo.train(run)


# ---- the KL leash

def test_the_kl_weight_adapts_as_ziegler_et_al_say(finished, tmp_path):
  target, horizon = 0.02, 100
  run = trained(finished, tmp_path, settings=QUICK | {
    'ppo__iterations': 4, 'ppo__kl_target_nats_per_sequence': target, 'ppo__kl_horizon_episodes': horizon})
  rows = timeless(run.stage('ppo'))
  assert rows[0]['kl_weight'] == run.experiment.ppo.kl_weight
  for row, following in itertools.pairwise(rows):
    assert following['kl_weight'] == adaptive_kl_weight(
      row['kl_weight'], row['kl_nats_per_sequence'], target_nats_per_sequence=target, horizon_episodes=horizon, episodes=16)
  assert rows[1]['kl_weight'] == pytest.approx(rows[0]['kl_weight'] * (1 - 0.2 * 16 / 100))  # no KL yet: far below


def test_it_stops_before_an_update_that_starts_beyond_the_kl_limit(finished, tmp_path, capsys):
  far = QUICK | {'ppo__iterations': 6, 'ppo__optimizer__learning_rate': 0.05}
  run = trained(finished, tmp_path / 'a', settings=far | {'ppo__kl_stop_nats_per_sequence': 0.5})
  rows = timeless(run.stage('ppo'))
  assert 1 < len(rows) < 6
  assert rows[-1]['kl_nats_per_sequence'] > 0.5 > max(row['kl_nats_per_sequence'] for row in rows[:-1])
  assert 'loss' in rows[-2] and 'loss' not in rows[-1]
  assert f'stopped before the update of iteration {len(rows)}: KL' in capsys.readouterr().out
  assert run.finished('ppo')
  shorter = trained(finished, tmp_path / 'b', settings=far | {'ppo__iterations': len(rows) - 1})
  assert_same_bits(ppo.restore(run), ppo.restore(shorter))


# ---- what goes wrong

def test_an_explosion_stops_at_its_iteration_and_keeps_answers_and_checkpoint(finished, tmp_path):
  settings = QUICK | {'ppo__iterations': 4, 'ppo__checkpoint_every': 1, 'ppo__optimizer__learning_rate': 1e38}
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft', 'reward'), settings=settings)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    with pytest.raises(DivergedError, match=r'^ppo step 2: \w+ is (nan|inf|-inf)\..*bad_batch_2\.npz'):
      ppo.train(run)
  with Checkpoints(run.checkpoints('ppo')) as checkpoints:
    assert checkpoints.latest() == 1
  with np.load(run.stage('ppo') / 'bad_batch_2.npz') as kept:
    assert kept['tokens_BT'].shape == (16, 24) and kept['mask_BR'].shape == (16, 10)
  assert [row['step'] for row in timeless(run.stage('ppo'))] == [1]


def never_ends(run):
  """An SFT model whose end token is as good as impossible, as the finished stage of a run."""
  params = sft.restore(run)
  unembed_DV = 50 * params['unembed']['unembed_DV'].at[:, run.chat.end_tokens[0]].set(0)
  with Checkpoints(run.checkpoints('sft')) as checkpoints:
    checkpoints.save(99, {'params': params | {'unembed': {'unembed_DV': unembed_DV}}}, {'finished': True, 'evaluation': {}})


def test_answers_of_which_none_ends_are_warned_of(finished, tmp_path):
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft', 'reward'), settings=QUICK)
  never_ends(run)
  with pytest.warns(UserWarning, match='no answer of iteration 1 ended with the end token: all were cut by the length '
                                       'limit. The model never learned to end, or --data.limits.response-tokens'):
    ppo.train(run)
  assert timeless(run.stage('ppo'))[0]['ended'] == 0


def test_prompts_over_the_limit_are_skipped_and_counted_or_cut(finished, tmp_path, capsys):
  def task(run):
    train, held_out = run.task.prompts
    return dataclasses.replace(run, task=dataclasses.replace(run.task, prompts=([prompt('this ' * 20), *train], held_out)))
  run = prepare(copy(finished, tmp_path / 'skip', 'tokenizer', 'sft', 'reward'), settings=QUICK)
  ppo.train(task(run))
  assert ('ppo, training: 1 of 17 examples are longer than --data.limits allow, and are skipped'
          in capsys.readouterr().out)
  run = prepare(copy(finished, tmp_path / 'cut', 'tokenizer', 'sft', 'reward'),
                settings=QUICK | {'data__limits__too_long': 'truncate', 'ppo__iterations': 1})
  run = task(run)
  ppo.train(run)
  assert ('ppo, training: 1 of 17 examples are longer than --data.limits allow, and are truncated'
          in capsys.readouterr().out)
  asked = ppo.compare(dataclasses.replace(run, task=dataclasses.replace(run.task, prompts=run.task.prompts[::-1])))[1]
  assert f"Want {'this ' * 20}?" in asked['PPO'][0]                               # whole, although the policy saw its end


@pytest.mark.parametrize('longest, R', [(1, 2), (2, 2), (3, 4), (6, 6), (0, 2)])
def test_slots_that_no_answer_reaches_are_cut_to_one_of_so_many_lengths(longest, R):
  rng = np.random.default_rng(longest)
  mask_BR = np.arange(6) < np.array([longest, min(longest, 1)])[:, None]
  draw = lambda *shape: rng.integers(0, 9, shape)
  whole = Rollout(tokens_BT=draw(2, 9), valid_BT=np.concatenate([np.ones((2, 3), bool), mask_BR], 1), logprob_BR=draw(2, 6),
                  mask_BR=mask_BR, ended_B=np.ones(2, bool), sample_B=np.arange(2))
  cut = ppo._trimmed(whole, 3)
  for name, x in vars(cut).items():
    np.testing.assert_array_equal(x, getattr(whole, name)[:, :3 + R if name.endswith('T') else R] if x.ndim == 2
                                  else getattr(whole, name))
  assert cut.mask_BR.shape == (2, R)
  assert ppo._trimmed(whole, 1).mask_BR.shape == (2, 6)


def test_a_run_with_several_lengths(finished, tmp_path):
  """Prompts of 14 tokens at most are padded to fewer, and each says what it says in a run of one length."""
  settings, seen = {
    'ppo__lengths': 18, 'ppo__batch_size': 2, 'data__limits__response_tokens': 18}, []
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft', 'reward'), settings=QUICK | settings)
  with pytest.MonkeyPatch.context() as patch:
    trim = ppo._trimmed
    patch.setattr(ppo, '_trimmed', lambda *args: seen.append(trim(*args)) or seen[-1])
    ppo.train(run)
  for rollout in seen:  # the longest of each fills its slots
    assert rollout.valid_BT[:, 0].any() and rollout.mask_BR[:, -1].any()
    assert rollout.tokens_BT.shape[1] - rollout.mask_BR.shape[1] < 14
  assert min(rollout.mask_BR.shape[1] for rollout in seen) < 18
  rows = timeless(run.stage('ppo'))
  assert rows[0]['kl_nats_per_sequence'] == 0 and rows[0]['first_ratio'] == pytest.approx(1, abs=1e-5)


def test_a_run_compiles_each_program_once(finished, tmp_path):
  """Iterations after the first find all their programs compiled."""
  run = prepare(copy(finished, tmp_path, 'tokenizer', 'sft', 'reward'), settings={'ppo__samples_every': 100})
  compiled, at_iteration = [], []
  listen = lambda event, seconds, **more: compiled.append(event) if event.endswith('backend_compile_duration') else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ppo, '_check_facts', lambda *args: at_iteration.append(len(compiled)))  # called once an iteration
    ppo.train(run)
  jax.monitoring.clear_event_listeners()
  assert at_iteration[0] >= 3 and at_iteration == [at_iteration[0]] * 4

# ---- other ways to run it

def test_the_value_as_a_second_head_on_the_policys_trunk(finished, tmp_path):
  run = trained(finished, tmp_path, settings=QUICK | {'ppo__shared_trunk': True})
  assert set(ppo.restore(run)['value']) == {'scalar'}
  rows = timeless(run.stage('ppo'))
  assert rows[0]['value'] == 0 != rows[1]['value']


def test_a_reward_model_of_another_size(finished, tmp_path):
  """The value function has the size of the model that it starts from; from the SFT model, it starts at 0."""
  settings = QUICK | {'reward_preset': 'smaller'}
  reward.train(prepare(copy(finished, tmp_path / 'ranked', 'tokenizer', 'sft'), settings=settings))
  for value_from, width in (('reward', 8), ('policy', 16)):
    run = prepare(copy(tmp_path / 'ranked', tmp_path / value_from), settings=settings | {'ppo__value_from': value_from})
    ppo.train(run)
    assert ppo.restore(run)['value']['backbone']['final_norm_D'].shape == (width,)
    assert ppo.restore(run)['policy']['backbone']['final_norm_D'].shape == (16,)
    assert (timeless(run.stage('ppo'))[0]['value'] == 0) == (value_from == 'policy')
    assert run.reward.config.vocab_size == run.policy.config.vocab_size         # they read the same tokens


def test_a_value_of_another_size_needs_a_reward_model(finished, tmp_path):
  with pytest.raises(ConfigError, match='a value function of the size of smaller, but no reward model to start it from'):
    trained(finished, tmp_path, ('tokenizer', 'sft'), QUICK | {'reward_preset': 'smaller'},
            reward_functions={'lengths': (lengths, 1.0)})


def test_a_shared_trunk_has_the_size_of_the_policy(tmp_path):
  with pytest.raises(ConfigError, match=r"a value head on the policy's trunk, but a reward model of another size"):
    prepare(tmp_path, settings={'reward_preset': 'smaller', 'ppo__shared_trunk': True})


def test_mapped_over_eight_devices_as_on_one(finished, plain, tmp_path):
  run = trained(finished, tmp_path, settings={'mesh__runner': 'pmap'})
  for row, expected in zip(timeless(run.stage('ppo')), timeless(plain.stage('ppo')), strict=True):
    for name in ('score', 'kl_nats_per_sequence', 'entropy', 'loss', 'response_length', 'value', 'gradient_norm'):
      assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-4), (row['step'], name)
