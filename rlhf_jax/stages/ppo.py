"""Stage 3, PPO: the policy answers, the reward model scores, the policy learns, held near the SFT model by a KL leash."""

import dataclasses
import functools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import handoff, processes
from rlhf_jax.checkpoint import Checkpoints, restore_part
from rlhf_jax.data import batches, encode
from rlhf_jax.data.examples import Prompt
from rlhf_jax.errors import ConfigError, PreemptedError
from rlhf_jax.experience import experience
from rlhf_jax.losses.ppo import ppo
from rlhf_jax.maths.kl import adaptive_kl_weight
from rlhf_jax.metrics import Progress, append_samples, values
from rlhf_jax.model.heads import Models, initial_params
from rlhf_jax.optimizer import decays, make_optimizer
from rlhf_jax.rewards import score_texts
from rlhf_jax.stages import reward, sft
from rlhf_jax.stages.answers import compile_answer, rollouts, texts
from rlhf_jax.stages.descent import check_finite
from rlhf_jax.stages.task import PARTS
from rlhf_jax.step import init_state, make_train_step
from rlhf_jax.update import make_update

NAME = 'ppo'


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled parts of an iteration."""
  answer: object  # (policy parameters, Prompts, key) -> Rollout
  look_back: object  # (parameters, frozen, Rollout, kl_weight, {'score_B'}) -> (Experience, metrics)
  learn: object  # (state, Experience, key) -> (state, metrics of every minibatch)


def compile_programs(run, optimizer):
  """The three programs of an iteration, for this run's devices."""
  config, runner = run.experiment.ppo, run.runner
  models = Models(run.policy, run.value, run.reward)

  def look_back(params, frozen, rollout, kl_weight, extra):
    return experience(models, params, frozen, rollout, config.experience, temperature=config.temperature,
                      kl_weight=kl_weight, extra_score_B=extra['score_B'], model_score_weight=config.reward_model_weight,
                      axis_name=runner.axis_name)

  step = make_train_step(ppo(run.policy, run.value, config.loss, temperature=config.temperature), optimizer,
                         axis_name=runner.axis_name, microbatches=config.microbatches)
  update = make_update(step, epochs=config.epochs, minibatches=config.minibatches, axis_name=runner.axis_name)
  return Programs(
    compile_answer(run, config.slots),
    runner.compile(look_back, inputs=('params', 'params', 'batch', 'same', 'batch'), outputs=('batch', 'same')),
    runner.compile(update, inputs=('params', 'batch', 'same'), outputs=('params', 'same'), donate=(0,)))


def optimizer_of(run):
  """What turns this stage's gradients into updates; its schedule counts iterations."""
  config = run.experiment.ppo
  total_steps = config.optimizer.total_steps or config.iterations
  return make_optimizer(dataclasses.replace(config.optimizer, total_steps=total_steps),
                        updates_per_step=config.epochs * config.minibatches)


def train(run):
  """Trains and checkpoints policy and value; returns the metrics of the last iteration."""
  experiment, config = run.experiment, run.experiment.ppo
  limits = experiment.data.limits
  optimizer = optimizer_of(run)
  programs, frozen = compile_programs(run, optimizer), frozen_models(run)
  if 'reward' not in frozen and not run.task.reward_functions:
    raise ConfigError(f'PPO has nothing to score answers: no reward model in {run.stage("reward")} and no reward function. '
                      'Run the stage reward first, or give the task reward functions.')
  if 'reward' not in frozen and run.value.config != run.policy.config:
    raise ConfigError(f'a value function of the size of {experiment.reward_preset}, but no reward model to start it from. '
                      'Run the stage reward first, drop --reward-preset, or pass --ppo.value-from policy.')
  rows, asked = _prompts(run, 0)
  source = batches.prompt_batches(rows, batch_size=config.batch_size, length=limits.prompt_tokens, seed=experiment.seed,
                                  lengths=config.lengths, part=run.runner.part)
  make = lambda: run.runner.initialise(lambda params: init_state(params, optimizer), _start(run))
  with Checkpoints(run.checkpoints(NAME)) as checkpoints, run.log(NAME) as log:
    start = checkpoints.latest()
    if start is None:
      state, start, kl_weight, known = make(), 0, config.kl_weight, {}
    else:
      state, meta = checkpoints.restore(run.runner.abstract(functools.partial(abstract_state, run, optimizer)))
      start, kl_weight, known = meta['iteration'], meta['kl_weight'], meta['evaluation']
    log.truncate_after(start if start else -1)
    began, done = time.monotonic(), start
    with Progress(NAME, total=config.iterations, start=start) as progress:
      for iteration, prompts in enumerate(source.read(start, config.iterations), start):
        key = jax.random.fold_in(jax.random.key(experiment.seed), iteration)
        those_asked = [asked[i] for i in source.chosen(iteration)]
        state, known, rollout = _iterate(
          run, programs, state, frozen, prompts, those_asked, key, kl_weight)
        done = iteration + 1
        check_finite(run.runner, run.stage(NAME), done, known, rollout)
        _check_facts(done, known)
        log.write(done, known | {'kl_weight': kl_weight}, wall_s=time.monotonic() - began)
        progress.update(done, {'score': known['score'], 'KL': known['kl_nats_per_sequence'], 'entropy': known['entropy'],
                               'ended': known['ended'], 'length': known['response_length']},
                        rate=(known['response_tokens_per_second'], 'tokens/s'))
        kl_weight = _next_kl_weight(config, kl_weight, known['kl_nats_per_sequence'])
        if done % config.samples_every == 0 or done == config.iterations:
          _write_samples(run, done, those_asked, rollout, progress)
        if _too_far(config, known):
          progress.note(f'stopped before the update of iteration {done}: KL {known["kl_nats_per_sequence"]:.3g} nats per '
                        f'sequence is over kl_stop_nats_per_sequence={config.kl_stop_nats_per_sequence:g}')
          break
        stops = processes.stop_asked()
        if (stops or done % config.checkpoint_every == 0) and done < config.iterations:
          checkpoints.save(done, state, _meta(done, kl_weight, known, finished=False))
          if stops:
            raise PreemptedError(f'{NAME} iteration {done} is saved')
    checkpoints.save(done, state, _meta(done, kl_weight, known, finished=True))
  return known


def _meta(iteration, kl_weight, known, finished):
  return {'iteration': iteration, 'kl_weight': kl_weight, 'evaluation': known, 'finished': finished}


def _too_far(config, known):
  limit = config.kl_stop_nats_per_sequence
  return limit is not None and known['kl_nats_per_sequence'] > limit


def _prompts(run, side):
  """(rows, the Prompt of each row) of one side of the task's prompts."""
  examples = run.task.prompts[side]
  rows = run.rows(NAME, encode.prompts, examples, PARTS[side]).rows
  return rows, [Prompt(examples[row.example].prompt) for row in rows]


def _iterate(run, programs, state, frozen, prompts, asked, key, kl_weight):
  """One iteration: (state, metrics, rollout); `asked` has the Prompt of each row of the whole
  batch.

  Seconds are measured with the devices drained in between. Where the answers lie beyond the KL
  limit nothing is learned from them, and the metrics of the updates are absent.
  """
  began = time.monotonic()
  answer_key, learn_key = jax.random.split(key)
  rollout = jax.block_until_ready(programs.answer(state.params['policy'], prompts, answer_key))
  rollout = _trimmed(rollout, run.experiment.ppo.lengths)
  answered = time.monotonic()
  extra_score_B, by_name = _extra_scores(run, asked, rollout)
  lessons, looked = jax.block_until_ready(
    programs.look_back(state.params, frozen, rollout, jnp.float32(kl_weight), {'score_B': extra_score_B}))
  known = _looked(values(run.runner.fetch(looked))) | by_name
  scored = time.monotonic()
  if not _too_far(run.experiment.ppo, known):
    state, learned = programs.learn(state, lessons, learn_key)
    known |= _learned(run.runner.fetch(learned))
  finished = time.monotonic()
  tokens = known['response_length'] * run.experiment.ppo.batch_size
  known |= {'seconds_generate': answered - began, 'seconds_score': scored - answered,
            'seconds_update': finished - scored, 'response_tokens_per_second': tokens / (finished - began)}
  return state, known, rollout


def _trimmed(rollout, lengths):
  """The rollout without the response slots that no answer reaches, cut to one of so many lengths."""
  R = rollout.mask_BR.shape[1]
  longest = int(rollout.mask_BR.sum(1).max()) if lengths > 1 else R
  cut = R - next(length for length in batches.bucket_lengths(R, lengths) if length >= longest)
  names = ('tokens_BT', 'valid_BT', 'logprob_BR', 'mask_BR') if cut else ()
  return rollout.replace(**{name: getattr(rollout, name)[:, :-cut] for name in names})


def _looked(looked):
  """Metrics of an experience, with variances made of moments."""
  variance = lambda name: max(looked.pop(f'{name}_squared') - looked[name] ** 2, 0.0)
  looked['score_std'] = variance('score') ** 0.5
  spread, missed = variance('return'), variance('value_error')
  del looked['value_error']
  return looked | {'explained_variance': 1 - missed / spread if spread > 0 else 0.0}


def _learned(learned):
  """Metrics of an iteration's updates, averaged, and of the first of them."""
  every = {name: np.asarray(mean.value()) for name, mean in learned.items()}
  updates = {name: float(value.mean()) for name, value in every.items() if name not in ('entropy', 'ratio')}
  return updates | {'first_ratio': float(every['ratio'][0, 0]), 'first_kl_k2': float(every['kl_k2'][0, 0])}


def _extra_scores(run, asked, rollout):
  """What the Python reward functions say of the answers to the Prompts `asked`: (weighted sum [B],
  means by name).

  Zeros where there are none.

  Each process asks them about its own part of the rollout, and returns that part of the sum. Where `tensor` spans several
  processes, these have the same part: what the functions say of a text must not depend on chance.
  """
  part = run.runner.part
  if not run.task.reward_functions:
    return np.zeros(rollout.ended_B.shape[0] // part[1], np.float32), {}
  prompts, responses = (
    batches.share(all_texts, part) for all_texts in (asked, texts(run, rollout)))
  total_B, by_name = score_texts(run.task.reward_functions, prompts, responses)
  whole = run.runner.fetch(run.runner.place({f'{name}_B': score_B for name, score_B in by_name.items()}, 'batch'))
  return total_B, {f'reward/{name}': float(whole[f'{name}_B'].mean()) for name in by_name}


def _check_facts(done, known):
  """Warns where a run breaks what must hold: no KL before the first update, ratio 1 in the first minibatch, some ends."""
  if done == 1 and known['kl_nats_per_sequence'] != 0:
    warnings.warn(f'KL to the reference is {known["kl_nats_per_sequence"]:.3g} before the first update; it should be 0: '
                  'the policy does not start as the SFT model.', stacklevel=2)
  if abs(known.get('first_ratio', 1) - 1) > 1e-3:
    warnings.warn(f'the first minibatch of iteration {done} has ratio {known["first_ratio"]:.5f}; it should be 1: the '
                  'update does not see the log-probabilities that the experience holds.', stacklevel=2)
  if known['ended'] == 0:
    warnings.warn(f'no answer of iteration {done} ended with the end token: all were cut by the length limit. The '
                  'model never learned to end, or --data.limits.response-tokens is too small; scores are of cut texts.',
                  stacklevel=2)


def _next_kl_weight(config, kl_weight, kl_nats):
  if config.kl_target_nats_per_sequence is None:
    return kl_weight
  return float(adaptive_kl_weight(kl_weight, kl_nats, target_nats_per_sequence=config.kl_target_nats_per_sequence,
                                  horizon_episodes=config.kl_horizon_episodes, episodes=config.batch_size))


def _write_samples(run, iteration, asked, rollout, progress):
  rows = [said_row(prompt, {'response': response})
          for prompt, response in zip(asked[:8], texts(run, rollout)[:8])]
  append_samples(run.stage(NAME), iteration, rows)
  progress.note(f'  {rows[0]["prompt"][-70:]!r} -> {rows[0]["response"][:90]!r}')


def said_row(prompt, answers):
  """{'prompt': what the user said last, name: answer}, and all 'turns' up to there if several."""
  turns = ({'turns': [[turn.role, turn.text] for turn in prompt.turns]}
           if len(prompt.turns) > 1 else {})
  return {'prompt': str(prompt)} | turns | {name: str(answer) for name, answer in answers.items()}


def _start(run):
  """Parameters that PPO trains: the SFT policy, and the value function that the reward model or that policy hands over."""
  policy, scorer = sft.restore(run), reward.restore(run) if run.experiment.ppo.value_from == 'reward' else None
  value = handoff.value_params(policy, scorer, run.experiment.ppo.shared_trunk)
  return {'policy': policy, 'value': jax.tree.map(jnp.copy, value)}


def abstract_state(run, optimizer):
  """The state of the stage made of fresh parameters: for its shapes only."""
  key = jax.random.key(0)
  policy = initial_params(run.policy, key)
  value = handoff.value_params(policy, initial_params(run.value, key), run.experiment.ppo.shared_trunk)
  return init_state({'policy': policy, 'value': value}, optimizer)


def frozen_models(run):
  """The reference policy and, where there is one, the reward model: buffers of their own, never donated."""
  scorer = reward.restore(run)
  reference = as_frozen(run, sft.restore(run))
  return {'reference': reference} | ({} if scorer is None else {'reward': as_frozen(run, scorer)})


def as_frozen(run, params):
  """Parameters of a model that is not trained, in the dtype in which it is to be kept.

  Only matrices are kept in less than float32, for they are multiplied in the compute dtype anyhow.
  XLA may add norms, biases and rows of tables without rounding them first, and a reference that is
  rounded would be another model.
  """
  dtype = run.experiment.ppo.frozen_dtype
  return jax.tree.map(lambda x, is_matrix: x.astype(dtype) if is_matrix else x, params,
                      decays(params))


def restore(run):
  """{'policy', 'value'} of the finished stage."""
  run.require(NAME)
  abstract = run.runner.abstract(lambda: abstract_state(run, make_optimizer(dataclasses.replace(
    run.experiment.ppo.optimizer, schedule='constant'))).params)
  return restore_part(run.checkpoints(NAME), {'params': abstract})['params']


def compare(run):
  """Held-out answers of the SFT and the PPO policy, measured alike: {'SFT': {...}, 'PPO': {...}}, and the texts of both."""
  optimizer = make_optimizer(dataclasses.replace(run.experiment.ppo.optimizer, schedule='constant'))
  programs, frozen, trained = compile_programs(run, optimizer), frozen_models(run), restore(run)
  rows, asked = (each * run.experiment.ppo.held_out_answers for each in _prompts(run, 1))
  B = run.experiment.ppo.batch_size
  whole = len(rows) // B * B or B  # whole batches; where rows do not fill one, some come again
  rows, prompts = ([each[i % len(each)] for i in range(whole)] for each in (rows, asked))
  table, said = {}, {}
  for name, params in (('SFT', trained | {'policy': frozen['reference']}), ('PPO', trained)):
    responses, sums = [''] * len(rows), None
    key = jax.random.key(run.experiment.seed + 2)
    for rollout, chosen in rollouts(run, programs.answer, params['policy'], rows, key, B,
                                    run.experiment.ppo.lengths):
      for i, text in zip(chosen, texts(run, rollout)):
        responses[i] = text
      extra_score_B, _ = _extra_scores(run, [prompts[i] for i in chosen], rollout)
      _, metrics = programs.look_back(params, frozen, rollout, jnp.float32(0), {'score_B': extra_score_B})
      metrics = run.runner.fetch(metrics)
      sums = metrics if sums is None else {key: sums[key] + metrics[key] for key in sums}
    known = values(sums)
    judged = {} if run.task.judge is None else run.task.judge(prompts, responses)
    table[name] = judged | {'score': known['score'], 'KL, nats per answer': known['kl_nats_per_sequence'],
                            'tokens per answer': known['response_length'], 'ended': known['ended']}
    said[name] = (prompts, responses)
  return table, said
