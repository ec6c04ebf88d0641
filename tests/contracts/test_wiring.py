"""Every setting of every config reaches the number that it is for.

The stages run with settings that are not the defaults, and are compared with a second
implementation (`plain_ppo.py`, `plain_descent.py`) that reads the same settings. Then each setting
is switched back there, and the two must no longer agree. What is no number of training is compared
with what is written in each test. A new setting needs a line in WIRED.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import types

import jax
import numpy as np
import plain_descent
import plain_ppo
import pytest
import torch
from plain_model import flat
from small import copy, experiment, prepare, presets, task  # noqa: F401  presets: a fixture
from tiny import equations

from experiments import hh, quickstart, tldr
from rlhf_jax import cli, planner
from rlhf_jax import config as configs
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Experiment, MeshConfig
from rlhf_jax.data import encode, simulated
from rlhf_jax.errors import ConfigError, DataError, ShardingError
from rlhf_jax.metrics import read_metrics, read_samples
from rlhf_jax.model import config as model_config
from rlhf_jax.model import running
from rlhf_jax.model.device import Device
from rlhf_jax.model.heads import initial_params
from rlhf_jax.optimizer import decays
from rlhf_jax.stages import answers, descent, ppo, reward, sft

# ---- settings, by run

FIRST = {
  'seed': 5, 'ppo.temperature': 0.7, 'ppo.slots': 4, 'ppo.batch_size': 8, 'tensorboard': True,
  'sft.steps': 7, 'sft.batch_size': 6, 'sft.microbatches': 3, 'sft.packed': True,
  'sft.evaluate_every': 3, 'sft.checkpoint_every': 2, 'sft.optimizer.learning_rate': 0.03,
  'sft.optimizer.schedule': 'linear', 'sft.optimizer.warmup_steps': 2,
  'sft.optimizer.final_share': 0.3, 'sft.optimizer.total_steps': 6, 'sft.optimizer.clip_norm': 0.5,
  'sft.optimizer.beta1': 0.8, 'sft.optimizer.beta2': 0.95, 'sft.optimizer.epsilon': 1e-3,
  'sft.optimizer.weight_decay': 0.3, 'sft.optimizer.form': 'tensorflow',
  'sft.optimizer.value_rate': 9.0, 'reward.steps': 5, 'reward.batch_size': 4,
  'reward.microbatches': 2, 'reward.centring_weight': 0.3, 'reward.evaluate_every': 2,
  'reward.checkpoint_every': 3, 'reward.optimizer.learning_rate': 0.02,
  'reward.optimizer.schedule': 'linear', 'reward.optimizer.warmup_steps': 1,
  'reward.optimizer.final_share': 0.4, 'reward.optimizer.total_steps': 4,
  'reward.optimizer.clip_norm': 0.3, 'reward.optimizer.beta1': 0.7, 'reward.optimizer.beta2': 0.9,
  'reward.optimizer.epsilon': 1e-3, 'reward.optimizer.weight_decay': 0.4,
  'reward.optimizer.form': 'tensorflow', 'reward.optimizer.value_rate': 9.0,
}
# Other sizes, and the other value of what has two. Its reward model has the size of FIRST.
SECOND = {
  'seed': 3, 'preset': 'smaller', 'reward_preset': 'pico', 'data.limits.prompt_tokens': 12,
  'data.limits.response_tokens': 8, 'sft.steps': 5, 'sft.batch_size': 8,
  'sft.optimizer.learning_rate': 0.02, 'sft.optimizer.epsilon': 1e-4, 'reward.steps': 3,
  'reward.batch_size': 4, 'reward.normalise': False, 'reward.optimizer.learning_rate': 0.01,
  'reward.optimizer.epsilon': 1e-4,
}
PPO = {
  'leash': {
    'ppo.iterations': 4, 'ppo.epochs': 2, 'ppo.minibatches': 2, 'ppo.kl_weight': 0.3,
    'ppo.kl_target_nats_per_sequence': 0.02, 'ppo.kl_horizon_episodes': 40,
    'ppo.reward_model_weight': 0.6, 'ppo.samples_every': 3, 'ppo.checkpoint_every': 3,
    'ppo.loss.clip': 0.05, 'ppo.loss.value_clip': 0.03,
    'ppo.loss.value_weight': 0.4, 'ppo.loss.entropy_weight': 0.05, 'ppo.experience.discount': 0.9,
    'ppo.experience.trace': 0.7, 'ppo.experience.missing_end': 'replace',
    'ppo.experience.missing_end_score': 0.6, 'ppo.experience.score_limit': 0.8,
    'ppo.experience.whiten_rewards': True, 'ppo.experience.bessel': False,
    'ppo.optimizer.learning_rate': 0.01, 'ppo.optimizer.schedule': 'cosine',
    'ppo.optimizer.warmup_steps': 1, 'ppo.optimizer.final_share': 0.25,
    'ppo.optimizer.epsilon': 1e-3,
  },
  'others': {
    'ppo.iterations': 2, 'ppo.epochs': 2, 'ppo.minibatches': 2, 'ppo.microbatches': 2,
    'ppo.held_out_answers': 16, 'ppo.value_from': 'policy', 'ppo.kl_weight': 0.5,
    'ppo.loss.value_clip': None,
    'ppo.loss.dual_clip': 1.02, 'ppo.loss.log_ratio_limit': 0.1,
    'ppo.experience.kl_estimator': 'k3', 'ppo.experience.kl_limit': 0.01,
    'ppo.experience.score_slot': 'after_end', 'ppo.experience.missing_end': 'subtract',
    'ppo.experience.truncation': 'bootstrap', 'ppo.experience.whiten_advantages': False,
    'ppo.optimizer.learning_rate': 0.02, 'ppo.optimizer.total_steps': 4,
    'ppo.optimizer.clip_norm': 0.05, 'ppo.optimizer.beta1': 0.7, 'ppo.optimizer.beta2': 0.9,
    'ppo.optimizer.epsilon': 1e-3, 'ppo.optimizer.weight_decay': 0.2,
    'ppo.optimizer.form': 'tensorflow', 'ppo.optimizer.value_rate': 3.0,
  },
  'shared': {
    'ppo.iterations': 6, 'ppo.epochs': 1, 'ppo.minibatches': 1, 'ppo.shared_trunk': True,
    'ppo.kl_stop_nats_per_sequence': 1.0, 'ppo.experience.kl_estimator': 'k2', 'ppo.kl_weight': 1.0,
    'ppo.optimizer.learning_rate': 0.01, 'ppo.optimizer.epsilon': 1e-3,
  },
}
FUNCTIONS = {  # of the run 'others'; every score that it learns from is finite and no two are equal
  'lengths': (lambda prompts, responses: [len(response) / 9 for response in responses], 0.25),
  'vowels': (
    lambda prompts, responses: [sum(map('aeiou'.count, response)) / 7 for response in responses],
    -2.0,
  ),
}


def fetched(tree):
  return jax.tree.map(np.asarray, jax.device_get(tree))


def encoded(run, kind, examples):
  """The token rows of examples; kind: demonstrations, comparisons or prompts."""
  return getattr(encode, kind)(examples, run.chat, run.experiment.data.limits)[0]


@pytest.fixture(scope='module', autouse=True)
def one_thread():
  """PyTorch on one thread: arrays are small, and two threads wait for each other on busy cores."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


# ---- recording: what the stages' programs were given and gave, and what was saved when


@pytest.fixture(scope='module')
def recorded():
  """What happens while the tests of this module run, newest last; `clear` forgets it."""

  class Seen:
    def clear(self):
      self.steps, self.answers, self.learned, self.saved = [], [], [], []

  seen = Seen()
  seen.clear()
  with pytest.MonkeyPatch.context() as patch:
    compile_step, compile_answer, compile_programs = (
      descent.compile_step,
      answers.compile_answer,
      ppo.compile_programs,
    )

    def watched_step(runner, loss_fn, config):
      optimizer, step = compile_step(runner, loss_fn, config)

      def recording(state, batch, key):
        seen.steps.append(batch)
        return step(state, batch, key)

      recording.trace = step.trace
      return optimizer, recording

    def watched_answer(*args, **more):
      answer = compile_answer(*args, **more)

      def recording(params, prompts, key):
        rollout = answer(params, prompts, key)
        seen.answers.append((fetched(params), fetched(rollout)))
        return rollout

      recording.trace = answer.trace
      return recording

    def watched_programs(run, optimizer):
      programs = compile_programs(run, optimizer)

      def recording(state, lessons, key):
        state, metrics = programs.learn(state, lessons, key)
        seen.learned.append(fetched(state.params))
        return state, metrics

      recording.trace = programs.learn.trace
      return dataclasses.replace(programs, learn=recording)

    save = Checkpoints.save
    patch.setattr(descent, 'compile_step', watched_step)
    patch.setattr(answers, 'compile_answer', watched_answer)
    patch.setattr(ppo, 'compile_answer', watched_answer)
    patch.setattr(ppo, 'compile_programs', watched_programs)
    patch.setattr(
      Checkpoints,
      'save',
      lambda self, step, *args: seen.saved.append(step) or save(self, step, *args),
    )
    yield seen


def take(recorded):
  """What was recorded since the last `take`."""
  taken = types.SimpleNamespace(**vars(recorded))
  recorded.clear()
  return taken


# ---- the runs


@dataclasses.dataclass
class Made:
  """A stage that has run, and what was recorded of it."""

  run: object
  seen: object
  asked: list | None = (
    None  # of the reward stage: the examples that the labellers asked about, and the texts they got
  )


def trained(stage, run, recorded, **more):
  recorded.clear()
  stage.train(run)
  return Made(run, take(recorded), **more)


@pytest.fixture(scope='module')
def first(tmp_path_factory, recorded):
  """SFT and reward model of FIRST; its labellers ask the policy for two answers to some prompts."""
  directory, asked = tmp_path_factory.mktemp('first'), []
  sft_made = trained(sft, prepare(directory, settings=FIRST), recorded)

  def comparisons(ask):
    some = sft_made.run.task.prompts[0][:5]
    asked.append((some, ask(some, 2)))
    return sft_made.run.task.comparisons(ask)

  reward_made = trained(
    reward, prepare(directory, settings=FIRST, comparisons=comparisons), recorded, asked=asked
  )
  return {'sft': sft_made, 'reward': reward_made}


@pytest.fixture(scope='module')
def second(tmp_path_factory, recorded):
  """SFT and reward model of SECOND."""
  run = prepare(tmp_path_factory.mktemp('second'), settings=SECOND)
  return {'sft': trained(sft, run, recorded), 'reward': trained(reward, run, recorded)}


@pytest.fixture(scope='module')
def ppo_runs(first, tmp_path_factory, recorded):
  """The PPO stage of that name on the models of FIRST; run when it is first asked for."""

  @functools.cache
  def made(name):
    directory = copy(
      first['sft'].run.directory, tmp_path_factory.mktemp(name), 'tokenizer', 'sft', 'reward'
    )
    functions = FUNCTIONS if name == 'others' else {}
    return trained(
      ppo, prepare(directory, settings=FIRST | PPO[name], reward_functions=functions), recorded
    )

  return made


# ---- the comparison


def tolerances(got, expected):
  """By how many tolerances two lists of (parameters, metrics) differ at most.

  The tolerance is 1e-5 for a parameter, and 1e-4 of 1 and a metric for the metric.
  """
  apart = [0.0 if len(got) == len(expected) else np.inf]
  for (params, metrics), (other_params, other_metrics) in zip(got, expected):
    if params.keys() != other_params.keys() or not other_metrics.keys() <= metrics.keys():
      return np.inf
    apart += [
      float(np.abs(np.asarray(params[path]) - np.asarray(other_params[path])).max()) / 1e-5
      for path in params
    ]
    apart += [abs(metrics[name] - x) / (1 + abs(x)) / 1e-4 for name, x in other_metrics.items()]
  return max(apart)


INSTEAD = {  # of defaults that these small runs cannot have
  'sft.optimizer.warmup_steps': 0,
  'reward.optimizer.warmup_steps': 0,
  'reward.batch_size': 8,
  'sft.steps': 9,
  'reward.steps': 9,
}


def switched_back(experiment, name):
  """The experiment with one setting at its default."""
  default = functools.reduce(getattr, name.split('.'), Experiment())
  return configs.override(experiment, {name: INSTEAD.get(name, default)})


def numpy(params):
  return {path: x.detach().numpy() for path, x in params.items()}


def plain_sft(made, experiment):
  """What SFT of an experiment comes to, on the demonstrations of a recorded run."""
  run, config = made.run, experiment.sft
  start = plain_descent.trained_but_bias(
    flat(fetched(initial_params(run.policy, jax.random.key(experiment.seed))))
  )
  if run.experiment.sft.packed:
    batches = [plain_descent.segments(batch) for batch in made.seen.steps]
  else:
    rows = encoded(run, 'demonstrations', run.task.demonstrations[0])
    batches = plain_descent.batches(
      [(row.ids, row.mask) for row in rows],
      [len(row.ids) for row in rows],
      config.batch_size,
      experiment.data.limits.tokens,
      experiment.seed,
      config.steps,
    )
  held_out = [
    (row.ids, row.mask) for row in encoded(run, 'demonstrations', run.task.demonstrations[1])
  ]
  params, rows = plain_descent.descend(config, start, batches, plain_descent.cross_entropy)
  with torch.no_grad():
    last = {'held_out/loss': plain_descent.cross_entropy(params, held_out)[0].item()}
  return [({}, row) for row in rows] + [(numpy(params), last)]


def plain_reward(made, sft_params, experiment):
  """What the reward stage of an experiment comes to, from the backbone of an SFT model, if any."""
  run, config, longest = made.run, experiment.reward, experiment.data.limits.tokens
  start = flat(
    fetched(initial_params(run.reward, jax.random.fold_in(jax.random.key(experiment.seed), 1)))
  )
  start |= {path: x for path, x in flat(sft_params).items() if path.startswith('backbone/')}
  of_texts = lambda examples: [
    ([text.ids for text in row.rows], row.ranks) for row in encoded(run, 'comparisons', examples)
  ]
  prompts, held_out = map(of_texts, run.task.comparisons(lambda *asked: []))
  batches = plain_descent.batches(
    prompts,
    [max(map(len, texts)) for texts, _ in prompts],
    config.batch_size,
    longest,
    experiment.seed,
    config.steps,
  )
  loss = lambda params, batch: plain_descent.bradley_terry(params, batch, config.centring_weight)
  params, rows = plain_descent.descend(config, plain_descent.trained_but_bias(start), batches, loss)
  with torch.no_grad():
    last = {f'held_out/{name}': x for name, x in loss(params, held_out)[1].items()}
    last['held_out/loss'] = loss(params, held_out)[0].item()
    params = dict(params)
    if config.normalise:
      score = plain_descent.scores(
        params, *plain_descent.padded([ids for texts, _ in prompts for ids in texts])
      )
      params['scalar/scalar_D'] = params['scalar/scalar_D'] / score.std(correction=0)
      params['scalar/bias'] = (params['scalar/bias'] - score.mean()) / score.std(correction=0)
  return [({}, row) for row in rows] + [(numpy(params), last)]


def of_descent(made, stage):
  """What a recorded stage came to, in the same form."""
  rows = read_metrics(made.run.stage(stage.NAME))
  updates = [({}, row) for row in rows if 'loss' in row]
  return updates + [(numpy(flat(fetched(stage.restore(made.run)))), rows[-1])]


def said_in(run, rollout):
  """The texts of a rollout's answers, by the tokenizer alone."""
  rollout, P = fetched(rollout), rollout.tokens_BT.shape[1] - rollout.mask_BR.shape[1]
  return [
    run.chat.tokenizer.decode(tokens[P:][mask], skip_special_tokens=True)
    for tokens, mask in zip(rollout.tokens_BT, rollout.mask_BR)
  ]


def asked_in(run, rollout):
  """The texts of a rollout's prompts: every special token of them belongs to the template."""
  rollout, P = fetched(rollout), rollout.tokens_BT.shape[1] - rollout.mask_BR.shape[1]
  return [
    run.chat.tokenizer.decode(tokens[:P][valid[:P]], skip_special_tokens=True)
    for tokens, valid in zip(rollout.tokens_BT, rollout.valid_BT)
  ]


def plain_ppo_of(made, experiment):
  """What PPO of an experiment comes to on the answers of a recorded run."""
  run, config = made.run, experiment.ppo
  policy, scorer = (flat(fetched(stage.restore(run))) for stage in (sft, reward))
  value = dict(scorer)
  if config.value_from == 'policy' or config.shared_trunk:
    value = (
      {path: x for path, x in policy.items() if path.startswith('backbone/')}
      if not config.shared_trunk
      else {}
    )
    value |= {
      'scalar/scalar_D': 0 * scorer['scalar/scalar_D'],
      'scalar/bias': 0 * scorer['scalar/bias'],
    }
  start = {f'policy/{path}': x for path, x in policy.items()} | {
    f'value/{path}': x for path, x in value.items()
  }
  extra = [extra_scores(run, rollout) for _, rollout in made.seen.answers]
  return plain_ppo.train(
    config,
    experiment.seed,
    start,
    {'reference': policy, 'reward': scorer},
    [rollout for _, rollout in made.seen.answers],
    extra,
  )


def extra_scores(run, rollout):
  """The weighted sum of what the reward functions say of each answer."""
  prompts, responses = asked_in(run, rollout), said_in(run, rollout)
  total = np.zeros(len(prompts))
  for function, weight in run.task.reward_functions.values():
    total += weight * np.array(function(prompts, responses))
  return total


def of_ppo(made):
  """What a recorded PPO stage came to: after every iteration its parameters and metrics."""
  rows = read_metrics(made.run.stage(ppo.NAME))
  params = [numpy(flat(tree)) for tree in made.seen.learned]
  params += [params[-1]] * (len(rows) - len(params))  # it may have stopped before an update
  params[-1] = numpy(flat(fetched(ppo.restore(made.run))))
  return list(zip(params, rows, strict=True))


@pytest.fixture(scope='module')
def compared(first, second, ppo_runs):
  """By name of a run: what it came to, what an experiment should come to, and its experiment."""

  @functools.cache
  def of(name):
    if name in PPO:
      made = ppo_runs(name)
      return of_ppo(made), functools.partial(plain_ppo_of, made), made.run.experiment
    base, stage = {'first': first, 'second': second}[name.split()[0]], name.split()[1]
    made, same_size = base[stage], base is first
    if stage == 'sft':
      return of_descent(made, sft), functools.partial(plain_sft, made), made.run.experiment
    backbone = fetched(sft.restore(made.run)) if same_size else {}
    return (
      of_descent(made, reward),
      functools.partial(plain_reward, made, backbone),
      made.run.experiment,
    )

  return of


# Unknown to the second implementation, with which the runs agree: so these change no number.
ELSEWHERE = (
  'sft.microbatches',
  'reward.microbatches',
  'ppo.microbatches',
  'sft.optimizer.value_rate',
  'reward.optimizer.value_rate',
  'sft.packed',
  'sft.evaluate_every',
  'sft.checkpoint_every',
  'reward.evaluate_every',
  'reward.checkpoint_every',
  'ppo.samples_every',
  'ppo.checkpoint_every',
  'ppo.held_out_answers',
  'ppo.slots',
  'ppo.batch_size',
)
SWITCHED = [
  *(
    (f'{name} {stage}', setting)
    for name, settings in (('first', FIRST), ('second', SECOND))
    for stage in ('sft', 'reward')
    for setting in settings
    if setting.startswith(f'{stage}.')
  ),
  *((name, setting) for name, settings in PPO.items() for setting in settings),
  ('first sft', 'seed'),
  ('second sft', 'seed'),
  ('first reward', 'seed'),
  ('leash', 'seed'),
  ('leash', 'ppo.temperature'),
  ('others', 'ppo.temperature'),
]
# What a run cannot show: lengths where total_steps is set, batches that are taken as recorded.
HIDDEN = (
  ('others', 'ppo.iterations'),
  ('first sft', 'sft.steps'),
  ('first sft', 'sft.batch_size'),
  ('first reward', 'reward.steps'),
  ('shared', 'ppo.minibatches'),
)
SWITCHED = [pair for pair in SWITCHED if pair[1] not in ELSEWHERE and pair not in HIDDEN]
RUNS = ('first sft', 'first reward', 'second sft', 'second reward', *PPO)


@pytest.mark.parametrize('run', RUNS)
def test_a_stage_is_the_second_implementation(compared, run):
  got, plain, experiment = compared(run)
  assert tolerances(got, plain(experiment)) < 1


@pytest.mark.parametrize('run', RUNS)
def test_a_setting_that_is_switched_back_shows(compared, run):
  """One test a run, so that processes that share the tests do not all make the same runs."""
  got, plain, experiment = compared(run)
  settings = [setting for name, setting in SWITCHED if name == run]
  apart = {name: tolerances(got, plain(switched_back(experiment, name))) for name in settings}
  assert settings and not {name: x for name, x in apart.items() if x < 20}


# ---- chance: what is drawn, from which key, at which temperature, of which prompts


def end_tokens(run):
  return answers.sampling(run).end_tokens


@pytest.mark.parametrize('name', PPO)
def test_answers_are_drawn_by_seed_and_iteration_at_the_temperature(ppo_runs, name):
  made = ppo_runs(name)
  asked = encoded(made.run, 'prompts', made.run.task.prompts[0])
  prompts = plain_descent.batches(
    [row.ids for row in asked],
    [len(row.ids) for row in asked],
    8,
    14,
    5,
    len(made.seen.answers),
    buckets=1,
  )
  for iteration, (params, rollout) in enumerate(made.seen.answers):
    assert rollout.tokens_BT.shape == (8, 14 + 10) and rollout.mask_BR.shape == (8, 10)
    assert [
      tokens[:14][valid[:14]].tolist() for tokens, valid in zip(rollout.tokens_BT, rollout.valid_BT)
    ] == prompts[iteration]
    np.testing.assert_array_equal(rollout.sample_B, np.arange(8))
    odd = functools.partial(plain_ppo.odd_tokens, flat(params), rollout, ends=end_tokens(made.run))
    keys = [
      jax.random.split(jax.random.fold_in(jax.random.key(5), i))[0]
      for i in (iteration, iteration + 1)
    ]
    assert odd(key=keys[0], temperature=0.7) == 0
    assert odd(key=keys[0], temperature=1.0) > 3 and odd(key=keys[1], temperature=0.7) > 8


def test_labellers_are_given_answers_of_the_sft_policy_at_the_temperature(first):
  made = first['reward']
  (examples, said), run = made.asked[0], made.run
  policy, key = flat(fetched(sft.restore(run))), jax.random.key(5 + 1)
  heard = {}
  for params, rollout in made.seen.answers:
    assert_equal(flat(params), policy)
    odd = functools.partial(plain_ppo.odd_tokens, policy, rollout, ends=end_tokens(run))
    assert odd(key=key, temperature=0.7) == 0
    assert odd(key=key, temperature=1.0) > 3 and odd(key=jax.random.key(5), temperature=0.7) > 8
    heard |= {
      int(sample): texts
      for sample, *texts in zip(rollout.sample_B, asked_in(run, rollout), said_in(run, rollout))
    }
  assert [heard[2 * i + j] for i in range(5) for j in range(2)] == [
    [example.prompt[-1].text, text] for example, texts in zip(examples, said) for text in texts
  ]


def assert_equal(params, others):
  assert params.keys() == others.keys()
  assert all(torch.equal(params[path], others[path]) for path in params)


def test_the_table_is_measured_on_answers_to_held_out_prompts(ppo_runs, recorded):
  """Of each policy 16 answers to each of 2 prompts, 8 at a time."""
  run = ppo_runs('others').run
  recorded.clear()
  table, said = ppo.compare(run)
  rollouts, policies = take(recorded).answers, (sft.restore(run), ppo.restore(run)['policy'])
  reference, scorer = (flat(fetched(stage.restore(run))) for stage in (sft, reward))
  assert len(rollouts) == 8
  for name, policy, answered in zip(('SFT', 'PPO'), policies, (rollouts[:4], rollouts[4:])):
    policy = flat(fetched(policy))
    params = {f'policy/{path}': x for path, x in policy.items()}
    params |= {f'value/{path}': x for path, x in scorer.items()}
    look_back = functools.partial(
      plain_ppo.look_back, run.experiment.ppo, params, {'reference': reference, 'reward': scorer}
    )
    rows = []
    for used, rollout in answered:
      assert_equal(flat(used), policy)
      assert plain_ppo.odd_tokens(policy, rollout, jax.random.key(5 + 2), 0.7, end_tokens(run)) == 0
      rows.append(look_back(rollout, extra_scores(run, rollout), kl_weight=0)[1])
    for shown, known in (
      ('score', 'score'),
      ('KL, nats per answer', 'kl_nats_per_sequence'),
      ('ended', 'ended'),
      ('tokens per answer', 'response_length'),
    ):
      assert table[name][shown] == pytest.approx(np.mean([row[known] for row in rows]), abs=1e-4)
    assert sorted(said[name][0]) == ['Want tar?'] * 16 + ['Want tin?'] * 16
    assert len(said[name][1]) == 32


# ---- what is written when


def test_evaluations_checkpoints_and_event_files(first):
  def measured(stage):
    rows = read_metrics(first[stage].run.stage(stage))
    return [row['step'] for row in rows if 'held_out/loss' in row]

  assert measured('sft') == [0, 3, 6, 7] and measured('reward') == [0, 2, 4, 5]
  assert first['sft'].seen.saved == [2, 4, 6, 7] and first['reward'].seen.saved == [3, 5]
  assert list((first['sft'].run.stage('sft') / 'tensorboard').glob('events*'))


def test_checkpoints_and_samples_of_ppo(ppo_runs):
  leash = ppo_runs('leash')
  assert leash.seen.saved == [3, 4]
  assert [row['step'] for row in read_samples(leash.run.stage('ppo'))] == [3] * 8 + [4] * 8
  assert [row['step'] for row in read_metrics(leash.run.stage('ppo'))] == [1, 2, 3, 4]


def test_packed_demonstrations_share_rows_and_each_is_seen_as_often(first):
  """Rows of at most 24 tokens, several of the 40 demonstrations to a row."""
  batches = first['sft'].seen.steps
  assert all(batch.tokens_BT.shape == (6, 24) for batch in batches)
  assert max(batch.segment_BT.max() for batch in batches) > 1
  seen = [tuple(ids) for batch in batches for ids, _ in plain_descent.segments(batch)]
  rows = encoded(first['sft'].run, 'demonstrations', first['sft'].run.task.demonstrations[0])
  wanted = {tuple(row.ids) for row in rows}
  assert set(seen) <= wanted
  assert max(map(seen.count, wanted)) <= 3  # 7 batches of 6 rows are 2 to 3 epochs


def test_nothing_is_written_for_tensorboard_and_the_project_goes_to_wandb(tmp_path, monkeypatch):
  projects = []
  theirs = types.SimpleNamespace(log=lambda *args, **more: None, finish=lambda: None)
  init = lambda project, **more: projects.append(project) or theirs
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for settings, expected in (({}, []), ({'wandb': 'mine'}, ['mine'])):
    run = prepare(tmp_path, settings=settings)
    with run.log('sft') as log:
      log.write(1, {'loss': 0.5}, wall_s=1.0)
    assert projects == expected
  assert not (run.stage('sft') / 'tensorboard').exists()


# ---- devices


@pytest.mark.parametrize(
  'settings, devices, shard',
  [
    ({'mesh.runner': 'single'}, 1, (1, 16, 4, 4)),
    ({'mesh.runner': 'pmap'}, 8, (1, 16, 4, 4)),
    ({}, 1, (1, 16, 4, 4)),
    ({'mesh.runner': 'sharded'}, 8, (1, 2, 4, 4)),
    ({'mesh.runner': 'sharded', 'mesh.fsdp': 4}, 8, (1, 4, 4, 4)),
    ({'mesh.runner': 'sharded', 'mesh.tensor': 2}, 8, (1, 4, 2, 4)),
    ({'mesh.runner': 'sharded', 'mesh.data': 4}, 8, (1, 8, 4, 4)),
    ({'mesh.fsdp': 2}, 8, (1, 8, 4, 4)),
    ({'mesh.data': 8}, 8, (1, 16, 4, 4)),
    ({'mesh.tensor': 2, 'mesh.fsdp': 1}, 8, (1, 16, 2, 4)),
    ({'mesh.runner': 'sharded', 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}, 8, (1, 8, 2, 4)),
  ],
)
def test_a_mesh_has_the_devices_that_are_asked_for_and_cuts_parameters_over_them(
  tmp_path, settings, devices, shard
):
  run = prepare(tmp_path, settings=settings | {'ppo.batch_size': 16})
  q = run.runner.place({'q_LDNH': np.zeros((1, 16, 4, 4), np.float32)}, 'params')['q_LDNH']
  assert (len(q.sharding.device_set), q.addressable_shards[0].data.shape) == (devices, shard)


@pytest.mark.parametrize(
  'mesh, kind, count, chosen',
  [
    ({}, 'gpu', 8, 'sharded'),
    ({}, 'tpu', 4, 'sharded'),
    ({}, 'gpu', 1, 'single'),
    ({}, 'cpu', 8, 'single'),
    ({'fsdp': 4}, 'cpu', 8, 'sharded'),
    ({'tensor': 2}, 'gpu', 2, 'sharded'),
    ({'runner': 'single'}, 'gpu', 8, 'single'),
    ({'runner': 'pmap'}, 'gpu', 8, 'pmap'),
  ],
)
def test_the_runner_follows_from_the_devices_and_the_sizes(mesh, kind, count, chosen):
  devices = [types.SimpleNamespace(platform=kind)] * count
  assert cli.runner_name(MeshConfig(**mesh), devices) == chosen


@pytest.mark.parametrize(
  'settings, said',
  [
    ({'mesh.runner': 'sharded'}, 'chosen is --mesh.runner sharded --mesh.data 1 --mesh.fsdp 8 --mesh.tensor 1'),
    ({'mesh.tensor': 2}, 'chosen is --mesh.runner sharded --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2'),
    ({'preset': 'smaller', 'mesh.tensor': 2}, '--mesh.data 1 --mesh.fsdp 4 --mesh.tensor 2'),
    ({'preset': 'odd', 'mesh.runner': 'sharded'}, '--mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1'),
    ({}, ''),
    ({'mesh.runner': 'sharded', 'mesh.fsdp': 4}, ''),
    ({'mesh.runner': 'single'}, ''),
  ],
)
def test_what_is_chosen_of_a_mesh_is_said(tmp_path, capsys, monkeypatch, settings, said):
  odd = dataclasses.replace(model_config.PRESETS['pico'], width=12)  # which 8 does not divide
  monkeypatch.setitem(model_config.PRESETS, 'odd', odd)
  prepare(tmp_path, settings=settings)
  out = capsys.readouterr().out
  assert said in out if said else 'chosen is' not in out


def test_a_mesh_that_does_not_fit_the_devices(tmp_path):
  with pytest.raises(
    ShardingError, match='a mesh of data=3 x fsdp=2 x tensor=1 needs 6 devices, but there are 8'
  ):
    prepare(tmp_path, settings={'mesh.runner': 'sharded', 'mesh.data': 3})


def test_cpu_devices(tmp_path):
  """A process that has begun with 8 says so; tests/test_startup.py divides a fresh one."""
  with pytest.raises(ConfigError, match='3 CPU devices are asked for, but this process has 8'):
    cli.run_stages(experiment(**{'mesh.cpu_devices': 3}), task, tmp_path / 'run')


# ---- programs, traced for the shapes of a run

TRACED = {
  'preset': 'nano', 'data.limits.prompt_tokens': 64, 'data.limits.response_tokens': 64,
  'sft.batch_size': 12, 'reward.batch_size': 12, 'ppo.batch_size': 16,
}
OTHER = {
  'dtype': 'bfloat16', 'remat': True, 'scan_layers': True, 'sft.microbatches': 3,
  'reward.microbatches': 2, 'ppo.microbatches': 4, 'ppo.slots': 5, 'ppo.frozen_dtype': 'bfloat16',
  **{f'{stage}.optimizer.moment_dtype': 'bfloat16' for stage in ('sft', 'reward', 'ppo')},
}


def traced(settings, stages=planner.STAGES):
  """{name: Program} of the stages' programs on eight CPUs."""
  run = cli.prepare_shapes(configs.override(Experiment(), TRACED | settings), jax.devices())
  return {program.name: program for program in planner.programs(run, stages)}


@pytest.fixture(scope='module')
def both():
  """The programs of the default settings, and of the others."""
  return traced({}), traced(OTHER)


def count(program, name, holds=lambda equation: True):
  return sum(
    equation.primitive.name == name and holds(equation)
    for equation in equations(program.traced.jaxpr.jaxpr)
  )


def test_every_program_multiplies_in_the_dtype(both):
  narrow = lambda program: count(
    program, 'dot_general', lambda e: e.invars[0].aval.dtype == 'bfloat16'
  )
  plain, other = both
  assert [narrow(program) for program in plain.values()] == [0] * 5
  assert all(2 * narrow(program) > count(program, 'dot_general') for program in other.values())


def test_what_differentiates_makes_blocks_again(both):
  plain, other = both
  for name in ('reward step', 'PPO update'):  # SFT's chunks of logits always are
    assert count(plain[name], 'remat2') == 0 < count(other[name], 'remat2')


def test_layers_are_scanned(both):
  """The preset has two layers: unrolled, there is a product for each weight of each of them."""
  plain, other = both
  for name in ('SFT step', 'reward step', 'experience', 'PPO update'):
    over_layers = lambda program: count(
      program, 'scan', lambda e: e.params['length'] == 2 and e.params['num_carry'] == 1
    )
    assert over_layers(plain[name]) < over_layers(other[name])
    assert count(plain[name], 'dot_general') > count(other[name], 'dot_general')


def test_batches_are_computed_in_microbatches(both):
  """Each is cut from its batch: the PPO minibatch is the whole batch of 16."""
  plain, other = both

  def cut(program, shape):
    return any(
      x.aval.shape == shape and x.aval.dtype == 'int32'
      for e in equations(program.traced.jaxpr.jaxpr)
      for x in e.outvars
    )

  for name, shape in (
    ('SFT step', (3, 4, 128)),
    ('reward step', (2, 6, 2, 128)),
    ('PPO update', (4, 4, 128)),
  ):
    assert cut(other[name], shape) and not cut(plain[name], shape)


def test_moments_are_stored_in_their_dtype(both):
  dtypes = lambda program: (
    {x.dtype.name for x in jax.tree.leaves(program.holds['optimizer'])} - {'int32'}
  )
  for name in ('SFT step', 'reward step', 'PPO update'):
    assert [dtypes(programs[name]) for programs in both] == [{'float32'}, {'bfloat16', 'float32'}]


def test_frozen_models_are_kept_in_their_dtype(both):
  """Where they are used, and in what a plan counts: half of the matrices, and all else."""
  for name in ('generate', 'experience', 'PPO update'):
    plain, other = (programs[name].holds['frozen'] for programs in both)
    assert {x.dtype.name for x in jax.tree.leaves(plain)} == {'float32'}
    matrices = [x for x, is_matrix in zip(jax.tree.leaves(plain), jax.tree.leaves(decays(plain)))
                if is_matrix]
    assert planner._bytes(other) == planner._bytes(plain) - planner._bytes(matrices) / 2
    assert planner._bytes(matrices) > planner._bytes(plain) / 2
  assert both[1]['experience'].args[1] is both[1]['experience'].holds['frozen']


def test_so_many_answers_are_decoded_at_a_time(both):
  logits = lambda program, rows: count(
    program, 'dot_general', lambda e: e.outvars[0].aval.shape == (rows, 640)
  )
  plain, other = both
  assert logits(plain['generate'], 16) and not logits(plain['generate'], 5)
  assert logits(other['generate'], 5) and not logits(other['generate'], 16)


def test_weights_are_gathered_once_before_decoding():
  """Of two layers nine each, and the embedding, the last norm and the unembedding."""

  def outside(settings):
    program = traced({'mesh.runner': 'sharded', 'mesh.fsdp': 8} | settings, ('ppo',))['generate']
    inside = sum(
      inner.primitive.name == 'sharding_constraint'
      for e in equations(program.traced.jaxpr.jaxpr)
      if e.primitive.name == 'while'
      for inner in equations(e.params['body_jaxpr'].jaxpr)
    )
    return count(program, 'sharding_constraint') - inside

  assert outside({'ppo.gather': True}) - outside({'ppo.gather': False}) == 2 * 9 + 3


@pytest.mark.parametrize('kernel, place', [
  ('splash', Device('tpu', 2**34)), ('cudnn', Device('gpu', 2**34, 9.0))])
def test_attention_is_the_kernel_that_is_asked_for(kernel, place, monkeypatch, tmp_path):
  settings = {'attention': kernel, 'dtype': 'bfloat16', 'preset': 'nano'}
  needed = f'--attention {kernel}: it is for {place.platform.upper()}s, and the device here is a CPU'
  with pytest.raises(ConfigError, match=needed):
    prepare(tmp_path / 'here', settings=settings)
  monkeypatch.setattr(cli, 'describe', lambda device, memory_bytes: place)
  for name, expected in ((kernel, kernel), ('auto', kernel), ('xla', 'xla_loop')):
    run = prepare(tmp_path / name, settings=settings | {'attention': name})
    assert run.policy.config.device == run.reward.config.device == place
    assert [running.attention_kernel(model.config) for model in (run.policy, run.reward)] == [expected] * 2


def test_models_have_the_sizes_of_their_presets(tmp_path, second):
  shapes = lambda run, model: {path: x.shape for path, x in flat(fetched(model)).items()}
  run = second['sft'].run
  policy, scorer = (shapes(run, stage.restore(run)) for stage in (sft, reward))
  names = 'backbone/embedding_VD', 'backbone/blocks/q_LDNH'
  assert [policy[name] for name in names] == [(290, 8), (1, 8, 2, 6)]
  assert [scorer[name] for name in names] == [(290, 16), (1, 16, 4, 4)]


# ---- data


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return path


def test_data_of_a_path(tmp_path):
  rows = [{'prompt': f'How is {i}?', 'chosen': f'Fine, {i}.', 'rejected': 'No.'} for i in range(40)]
  path = write(
    tmp_path / 'all.jsonl',
    [*rows[:30], {'prompt': 'Same?', 'chosen': 'A.', 'rejected': 'A.'}, *rows[30:]],
  )
  make = lambda **data: hh.make_task(configs.override(hh.EXPERIMENT, {'data.path': path} | data))
  texts = lambda examples: {example.prompt[-1].text for example in examples}
  whole = make(**{'data.held_out_share': 0.3})
  assert texts(whole.prompts[0]) | texts(whole.prompts[1]) == {f'How is {i}?' for i in range(40)}
  for share in (0.2, 0.5):
    tasks = [make(**{'data.held_out_share': share, 'seed': seed}) for seed in range(12)]
    held_out = np.mean([len(task.prompts[1]) / 40 for task in tasks])
    assert held_out == pytest.approx(share, abs=0.06)
  assert len({str(task.prompts[1]) for task in tasks}) == 12
  few = make(**{'data.max_examples': 7, 'data.held_out_share': 0.5})
  assert texts(few.prompts[0]) | texts(few.prompts[1]) == {f'How is {i}?' for i in range(7)}
  with pytest.raises(DataError, match=r"all\.jsonl row 31: 'chosen' equals 'rejected'"):
    make(**{'data.skip_bad_rows': False})


def test_data_of_splits(tmp_path):
  """Files of four splits; each question says which it is of."""
  for split in ('train', 'train_sft', 'test_sft', 'other'):
    write(
      tmp_path / f'{split}.jsonl',
      [{'prompt': f'{split} {i}', 'chosen': 'Yes.', 'rejected': 'No.'} for i in range(9)],
    )
  make = lambda **data: hh.make_task(
    configs.override(hh.EXPERIMENT, {'data.path': tmp_path} | data)
  )
  of = lambda task: [{example.prompt[-1].text.split()[0] for example in p} for p in task.prompts]
  # There is no split named test.
  assert of(make(**{'data.held_out_share': 0.4})) == [{'train'}, {'train'}]
  assert of(make(**{'data.split': 'train_sft'})) == [{'train_sft'}, {'test_sft'}]
  named = make(**{'data.split': 'other', 'data.held_out_split': 'train'})
  assert of(named) == [{'other'}, {'train'}]


def test_the_world_of_the_quickstart():
  """A labeller without noise ranks by the gold score, one of much noise by chance."""

  def made(**world):
    asked = []

    def answer(examples, samples):
      asked.append((len(examples), samples))
      return [
        [f'It is {i}.', 'The capital of Peru is Lima.', 'No.', 'Well, well, well.'][:samples]
        for i in range(len(examples))
      ]

    task = quickstart.make_task(
      configs.override(quickstart.EXPERIMENT, {f'world.{k}': x for k, x in world.items()})
    )
    return task, task.comparisons(answer), asked

  task, (ranked, _), asked = made(
    demonstrations=70,
    held_out_demonstrations=13,
    ranked_prompts=60,
    held_out_rankings=3,
    answers_per_prompt=2,
    noise=1e-6,
  )
  assert [len(part) for part in task.demonstrations] == [70, 13]
  assert asked == [(60, 2), (3 * len(task.prompts[1]), 2)]
  *_, asked = made(demonstrations=70, ranked_prompts=50, held_out_rankings=1, answers_per_prompt=4)
  assert asked == [(50, 4), (len(task.prompts[1]), 4)]

  def agree(examples):
    scores = [simulated.gold_scores(example, example.responses) for example in examples]
    return np.mean(
      [
        (a > b) == (example.ranks[0] < example.ranks[1])
        for (a, b), example in zip(scores, examples)
        if a != b
      ]
    )

  _, (by_chance, _), _ = made(
    demonstrations=70, ranked_prompts=200, answers_per_prompt=2, noise=1e6
  )
  assert agree(ranked) == 1 and 0.3 < agree(by_chance) < 0.7


def test_the_world_follows_from_the_seed():
  small_world = {'world.demonstrations': 30}
  tasks = [
    quickstart.make_task(configs.override(quickstart.EXPERIMENT, small_world | {'seed': seed}))
    for seed in (0, 3)
  ]
  assert [task.prompts for task in tasks] == [simulated.prompts(0), simulated.prompts(3)]
  assert simulated.prompts(0) != simulated.prompts(3)
  assert tasks[1].demonstrations[0] == simulated.demonstrations(3, 30)


def test_the_sources_of_tldr(tmp_path):
  row = lambda name, i: {'prompt': f'{name} {i}', 'chosen': f'Fine, {i}.', 'rejected': 'No.'}
  for name in ('posts', 'pairs'):
    (tmp_path / name).mkdir()
    for split, rows in (('train', 6), ('validation', 5)):
      write(tmp_path / name / f'{split}.jsonl', [row(f'{name} {split}', i) for i in range(rows)])
  task = tldr.make_task(
    configs.override(
      tldr.EXPERIMENT,
      {
        'sft_data': tmp_path / 'posts',
        'comparison_data': tmp_path / 'pairs',
        'held_out_examples': 3,
      },
    )
  )
  asked = lambda split: [[example.prompt[-1].text for example in examples] for examples in split]
  expected = lambda name: [
    [f'{name} train {i}' for i in range(6)],
    [f'{name} validation {i}' for i in range(3)],
  ]
  assert asked(task.demonstrations) == asked(task.prompts) == expected('posts')
  assert asked(task.comparisons) == expected('pairs')


# ---- the table


def _elsewhere(path, name):
  """A test of another file, which is there."""
  text = (pathlib.Path(__file__).parent.parent / path).read_text()
  assert f'\ndef {name}(' in text, f'{path} has no {name}, which WIRED says checks a setting'
  return name


WIRED = (
  dict.fromkeys((setting for _, setting in SWITCHED), test_a_setting_that_is_switched_back_shows)
  | {
    'seed': test_answers_are_drawn_by_seed_and_iteration_at_the_temperature,
    'preset': test_models_have_the_sizes_of_their_presets,
    'pretrained': _elsewhere('test_cli.py', 'test_an_exported_directory_is_a_model_to_start_from'),
    'reward_preset': test_models_have_the_sizes_of_their_presets,
    'dtype': test_every_program_multiplies_in_the_dtype,
    'attention': test_attention_is_the_kernel_that_is_asked_for,
    'remat': test_what_differentiates_makes_blocks_again,
    'scan_layers': test_layers_are_scanned,
    'mesh.runner': test_a_mesh_has_the_devices_that_are_asked_for_and_cuts_parameters_over_them,
    'mesh.data': test_a_mesh_that_does_not_fit_the_devices,
    'mesh.fsdp': test_a_mesh_has_the_devices_that_are_asked_for_and_cuts_parameters_over_them,
    'mesh.tensor': test_a_mesh_has_the_devices_that_are_asked_for_and_cuts_parameters_over_them,
    'mesh.cpu_devices': test_cpu_devices,
    'data.path': test_data_of_a_path,
    'data.skip_bad_rows': test_data_of_a_path,
    'data.held_out_share': test_data_of_a_path,
    'data.split': test_data_of_splits,
    'data.held_out_split': test_data_of_splits,
    'data.max_examples': test_data_of_a_path,
    'data.limits.prompt_tokens': test_answers_are_drawn_by_seed_and_iteration_at_the_temperature,
    'data.limits.response_tokens': test_answers_are_drawn_by_seed_and_iteration_at_the_temperature,
    'data.limits.too_long': _elsewhere(
      'stages/test_ppo_stage.py', 'test_prompts_over_the_limit_are_skipped_and_counted_or_cut'
    ),
    'sft.microbatches': test_batches_are_computed_in_microbatches,
    'sft.packed': test_packed_demonstrations_share_rows_and_each_is_seen_as_often,
    'sft.optimizer.moment_dtype': test_moments_are_stored_in_their_dtype,
    # These two have no value function: nothing must change.
    'sft.optimizer.value_rate': test_a_stage_is_the_second_implementation,
    'sft.evaluate_every': test_evaluations_checkpoints_and_event_files,
    'sft.checkpoint_every': test_evaluations_checkpoints_and_event_files,
    'reward.microbatches': test_batches_are_computed_in_microbatches,
    'reward.optimizer.moment_dtype': test_moments_are_stored_in_their_dtype,
    'reward.optimizer.value_rate': test_a_stage_is_the_second_implementation,
    'reward.evaluate_every': test_evaluations_checkpoints_and_event_files,
    'reward.checkpoint_every': test_evaluations_checkpoints_and_event_files,
    'ppo.batch_size': test_answers_are_drawn_by_seed_and_iteration_at_the_temperature,
    'ppo.frozen_dtype': test_frozen_models_are_kept_in_their_dtype,
    'ppo.slots': test_so_many_answers_are_decoded_at_a_time,
    'ppo.gather': test_weights_are_gathered_once_before_decoding,
    'ppo.lengths': _elsewhere('stages/test_ppo_stage.py', 'test_a_run_with_several_lengths'),
    'ppo.microbatches': test_batches_are_computed_in_microbatches,
    'ppo.optimizer.moment_dtype': test_moments_are_stored_in_their_dtype,
    'ppo.held_out_answers': test_the_table_is_measured_on_answers_to_held_out_prompts,
    'ppo.samples_every': test_checkpoints_and_samples_of_ppo,
    'ppo.checkpoint_every': test_checkpoints_and_samples_of_ppo,
    'tensorboard': test_nothing_is_written_for_tensorboard_and_the_project_goes_to_wandb,
    'wandb': test_nothing_is_written_for_tensorboard_and_the_project_goes_to_wandb,
    **dict.fromkeys(
      (
        f'world.{name}'
        for name in (
          'demonstrations',
          'ranked_prompts',
          'held_out_rankings',
          'answers_per_prompt',
          'held_out_demonstrations',
          'noise',
        )
      ),
      test_the_world_of_the_quickstart,
    ),
    **dict.fromkeys(('sft_data', 'comparison_data', 'held_out_examples'), test_the_sources_of_tldr),
  }
)


def test_every_setting_has_a_check():
  settings = {
    name
    for experiment in (Experiment(), quickstart.EXPERIMENT, tldr.EXPERIMENT, hh.EXPERIMENT)
    for name in configs.fields(experiment)
  }
  unchecked, unknown = sorted(settings - set(WIRED)), sorted(set(WIRED) - settings)
  assert not unchecked, (
    f'no check in WIRED for {", ".join(unchecked)}. Give one of the runs above another value '
    'than the default, and teach the second implementation what the setting means; or write a test '
    'that sets it and compares what it is for with an expectation of your own. Then break the '
    'wiring, see the test fail, and name it in WIRED.'
  )
  assert not unknown, f'WIRED names {", ".join(unknown)}, which no config has. Remove the line.'
