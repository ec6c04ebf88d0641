"""PPO a second time, in PyTorch and float64, in loops over responses, to compare the stage with.

It reads the same settings and starts from the same parameters and answers as the stage. Chance is
only the order of the minibatches, from the documented key. Formulae: Huang et al. 2024, 2403.17031.
"""

import dataclasses
import math

import jax
import numpy as np
import plain_model
import torch
from plain_model import Adam, logprobs, of, rate, scalars, scores, stream


@dataclasses.dataclass
class Lesson:
  """What is learned from one answer: numbers for every slot of the response."""

  count: int  # tokens that were said
  slots: int  # with a value: one more where the score comes after the end
  old_logprob: list
  old_value: list
  advantage: list
  returns: list


def train(config, seed, start, frozen, answers, extra_scores):
  """[(parameters, metrics)] of the iterations of a PPOConfig.

  `start` is what is trained, under 'policy/' and 'value/'; `frozen` has the parameters of
  'reference' and 'reward'; `answers` the rollout of each iteration; `extra_scores` what Python
  functions add to the score of each answer.
  """
  params, adam, kl_weight, rows = (
    plain_model.trained(start),
    Adam(config.optimizer),
    config.kl_weight,
    [],
  )
  for iteration, (rollout, extra) in enumerate(zip(answers, extra_scores)):
    lessons, metrics = look_back(config, params, frozen, rollout, extra, kl_weight)
    metrics['kl_weight'] = kl_weight
    kl = metrics['kl_nats_per_sequence']
    stops = config.kl_stop_nats_per_sequence is not None and kl > config.kl_stop_nats_per_sequence
    if not stops:
      learning_rate = rate(
        config.optimizer, iteration, config.optimizer.total_steps or config.iterations
      )
      key = jax.random.split(jax.random.fold_in(jax.random.key(seed), iteration))[1]
      params, learned = learn(config, params, adam, learning_rate, rollout, lessons, key)
      metrics |= learned
    rows.append(({path: p.detach().numpy() for path, p in params.items()}, metrics))
    if stops:
      break
    if config.kl_target_nats_per_sequence is not None:
      error = min(max(kl / config.kl_target_nats_per_sequence - 1, -0.2), 0.2)
      kl_weight *= 1 + error * config.batch_size / config.kl_horizon_episodes
  return rows


def policy_and_value(params, rollout, temperature):
  """Of every token of the responses: (logprob, entropy, value of the text before), [B, R] each.

  The fourth is the value of the whole text, [B].
  """
  tokens, valid = np.asarray(rollout.tokens_BT), np.asarray(rollout.valid_BT)
  P = tokens.shape[1] - rollout.mask_BR.shape[1]
  hidden = stream(of(params, 'policy'), tokens, valid)
  every = logprobs(of(params, 'policy'), hidden[:, P - 1 : -1], temperature)
  said = torch.as_tensor(tokens[:, P:].astype(np.int64))
  if 'value/backbone/embedding_VD' in params:
    hidden = stream(of(params, 'value'), tokens, valid)
  value = scalars(of(params, 'value'), hidden[:, P - 1 :])
  return (
    every.gather(2, said[:, :, None])[:, :, 0],
    -(every.exp() * every).sum(-1),
    value[:, :-1],
    value[:, -1],
  )


@torch.no_grad()
def look_back(config, params, frozen, rollout, extra, kl_weight):
  """(a Lesson for each answer, metrics)."""
  c, (B, R) = config.experience, rollout.mask_BR.shape
  logprob, entropy, value, after = (
    x.numpy() for x in policy_and_value(params, rollout, config.temperature)
  )
  reference = {f'policy/{path}': x for path, x in frozen['reference'].items()}
  reference |= {path: x for path, x in params.items() if path.startswith('value/')}
  reference_logprob = policy_and_value(reference, rollout, config.temperature)[0].numpy()
  score = np.array(extra, np.float64)
  if 'reward' in frozen:
    score = (
      score
      + config.reward_model_weight
      * scores(frozen['reward'], rollout.tokens_BT, rollout.valid_BT).numpy()
    )

  lessons, rewards, kl, entropies = [], [], [], []
  for b in range(B):
    count, ended = int(rollout.mask_BR[b].sum()), bool(rollout.ended_B[b])
    learned_score = (
      score[b] if c.score_limit is None else min(max(score[b], -c.score_limit), c.score_limit)
    )
    if not ended and c.missing_end == 'replace':
      learned_score = -c.missing_end_score
    if not ended and c.missing_end == 'subtract':
      learned_score -= c.missing_end_score
    at = count - 1 if c.score_slot == 'end' else min(count, R - 1)
    reward = [0.0] * (at + 1)
    for t in range(count):
      d = logprob[b, t] - reference_logprob[b, t]
      penalty = {'k1': d, 'k2': d * d / 2, 'k3': math.exp(-d) - 1 + d}[c.kl_estimator]
      penalty = penalty if c.kl_limit is None else min(max(penalty, -c.kl_limit), c.kl_limit)
      reward[t] = -kl_weight * penalty
      kl.append(d)
      entropies.append(entropy[b, t])
    reward[at] += learned_score
    rewards.append(reward)
    lessons.append(Lesson(count, at + 1, list(logprob[b]), list(value[b]), [], []))

  if c.whiten_rewards:
    rewards = whitened(rewards, c.bessel, keep_mean=True)
  for b, (lesson, reward) in enumerate(zip(lessons, rewards)):
    bootstraps = c.truncation == 'bootstrap' and not rollout.ended_B[b]
    later_value, later_advantage = float(after[b]) if bootstraps else 0.0, 0.0
    for t in reversed(range(lesson.slots)):
      delta = reward[t] + c.discount * later_value - lesson.old_value[t]
      later_advantage = delta + c.discount * c.trace * later_advantage
      later_value = lesson.old_value[t]
      lesson.advantage.insert(0, later_advantage)
      lesson.returns.insert(0, later_advantage + lesson.old_value[t])
  advantages = [lesson.advantage[: lesson.count] for lesson in lessons]
  if c.whiten_advantages:
    advantages = whitened(advantages, c.bessel)
  for lesson, advantage in zip(lessons, advantages):
    lesson.advantage = advantage

  values, returns = (
    np.concatenate([getattr(x, name)[: x.slots] for x in lessons])
    for name in ('old_value', 'returns')
  )
  return lessons, {
    'score': score.mean(),
    'score_std': score.std(),
    'reward': sum(map(sum, rewards)) / B,
    'kl_nats_per_sequence': sum(kl) / B,
    'ended': np.mean(rollout.ended_B),
    'entropy': np.mean(entropies),
    'response_length': np.mean([lesson.count for lesson in lessons]),
    'value': values.mean(),
    'return': returns.mean(),
    'explained_variance': 1 - (returns - values).var() / returns.var(),
  }


def whitened(rows, bessel, keep_mean=False):
  """Lists of numbers, all of them together with mean 0 (or their own) and deviation 1."""
  every = np.concatenate(rows)
  deviation = math.sqrt(((every - every.mean()) ** 2).sum() / (len(every) - bessel) + 1e-8)
  return [[(x - every.mean()) / deviation + keep_mean * every.mean() for x in row] for row in rows]


def learn(config, params, adam, learning_rate, rollout, lessons, key):
  """(parameters, metrics) after all epochs and minibatches of an iteration."""
  order_key, B, every = jax.random.split(key)[0], len(lessons), []
  for epoch in range(config.epochs):
    order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), B))
    for rows in np.split(order, config.minibatches):
      loss, metrics = loss_of(config, params, rollout, lessons, rows)
      params, norm = adam.update(params, loss, learning_rate)
      every.append(metrics | {'gradient_norm': norm})
  updates = {name: np.mean([row[name] for row in every]) for name in every[0] if name != 'ratio'}
  return params, updates | {'first_ratio': every[0]['ratio'], 'first_kl_k2': every[0]['kl_k2']}


def loss_of(config, params, rollout, lessons, rows):
  """(the loss to be differentiated, metrics) of a minibatch: a loop over its answers."""
  c, chosen = config.loss, [lessons[b] for b in rows]
  part = type(
    'Part',
    (),
    {
      name: np.asarray(getattr(rollout, name))[rows]
      for name in ('tokens_BT', 'valid_BT', 'mask_BR')
    },
  )
  logprob, entropy, value, _ = policy_and_value(params, part, config.temperature)
  sums = dict.fromkeys(
    ('policy_loss', 'value_loss', 'entropy', 'ratio', 'kl_k2'), torch.zeros((), dtype=torch.float64)
  )
  clipped = value_clipped = 0
  for b, lesson in enumerate(chosen):
    count, slots = lesson.count, lesson.slots
    old, advantage, old_value, returns = (
      torch.tensor(x, dtype=torch.float64)
      for x in (
        lesson.old_logprob[:count],
        lesson.advantage,
        lesson.old_value[:slots],
        lesson.returns,
      )
    )
    moved = logprob[b, :count] - old
    limit = math.inf if c.log_ratio_limit is None else c.log_ratio_limit
    ratio = moved.clamp(-limit, limit).exp()
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - c.clip, 1 + c.clip)
    worst = torch.maximum(free, held)
    if c.dual_clip is not None:
      worst = torch.where(advantage < 0, torch.minimum(worst, -advantage * c.dual_clip), worst)
    error = (value[b, :slots] - returns) ** 2
    if c.value_clip is not None:
      near = torch.minimum(
        torch.maximum(value[b, :slots], old_value - c.value_clip), old_value + c.value_clip
      )
      value_clipped += int(((near - returns) ** 2 > error).sum())
      error = torch.maximum(error, (near - returns) ** 2)
    clipped += int((held > free).sum())
    for name, x in (
      ('policy_loss', worst),
      ('value_loss', error / 2),
      ('entropy', entropy[b, :count]),
      ('ratio', ratio),
      ('kl_k2', moved**2 / 2),
    ):
      sums[name] = sums[name] + x.sum()
  said = sum(lesson.count for lesson in chosen)
  mean = {name: x / said for name, x in sums.items()}
  loss = (
    mean['policy_loss'] + c.value_weight * mean['value_loss'] - c.entropy_weight * mean['entropy']
  )
  metrics = {name: mean[name].item() for name in ('policy_loss', 'value_loss', 'ratio', 'kl_k2')}
  return loss, metrics | {
    'loss': loss.item(),
    'clip_fraction': clipped / said,
    'value_clip_fraction': value_clipped / sum(lesson.slots for lesson in chosen),
  }


def odd_tokens(policy, rollout, key, temperature, ends):
  """How many tokens of a rollout its policy does not draw at a temperature, and wrong ends.

  The uniform of a sample and a place in its response is that of fold_in(fold_in(key, sample),
  place); the token is the first at which the cumulative probability exceeds it. An answer ends with
  its first end token, or is full.
  """
  P, (B, R) = rollout.tokens_BT.shape[1] - rollout.mask_BR.shape[1], rollout.mask_BR.shape
  hidden = stream(policy, rollout.tokens_BT, rollout.valid_BT)[:, P - 1 : -1]
  sums = logprobs(policy, hidden, temperature).exp().cumsum(-1).numpy()
  draw = jax.vmap(
    jax.vmap(
      lambda b, r: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, b), r)), (None, 0)
    ),
    (0, None),
  )
  uniform, odd = np.asarray(draw(np.asarray(rollout.sample_B), np.arange(R))), 0
  for b in range(B):
    said = rollout.tokens_BT[b, P:][rollout.mask_BR[b]].tolist()
    odd += any(token in ends for token in said[:-1]) or (len(said) < R and said[-1] not in ends)
    odd += bool(rollout.ended_B[b]) != (said[-1] in ends)
    for r, token in enumerate(said):
      below = sums[b, r, token - 1] if token else 0.0
      odd += not below - 1e-5 <= uniform[b, r] <= sums[b, r, token] + 1e-5
  return odd
