"""SFT and the reward model a second time, in PyTorch and float64, to compare the stages with."""

import dataclasses
import itertools

import numpy as np
import torch
from plain_model import Adam, logprobs, rate, scores, stream


def descend(config, start, batches, loss_of):
  """(last parameters, [metrics of every update]) of an SFTConfig or RewardConfig.

  `loss_of(params, batch)` gives what is descended, and metrics.
  """
  warmup = min(config.optimizer.warmup_steps, config.steps // 2)
  optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup)
  params, adam, rows = start, Adam(optimizer), []
  for step, batch in enumerate(batches[: config.steps]):
    loss, metrics = loss_of(params, batch)
    params, norm = adam.update(
      params, loss, rate(optimizer, step, optimizer.total_steps or config.steps)
    )
    rows.append(metrics | {'loss': loss.item(), 'gradient_norm': norm})
  return params, rows


def cross_entropy(params, texts):
  """Mean surprise at the marked tokens of texts, (ids, mask) each, and no metrics."""
  tokens, valid = padded([ids for ids, _ in texts])
  every = logprobs(params, stream(params, tokens, valid))
  surprise = [
    -every[b, t - 1, ids[t]]
    for b, (ids, mask) in enumerate(texts)
    for t in range(1, len(ids))
    if mask[t]
  ]
  return sum(surprise) / len(surprise), {}


def padded(texts):
  """(tokens, valid) of lists of ids, padded on the right."""
  valid = np.arange(max(map(len, texts))) < np.array([[len(ids)] for ids in texts])
  tokens = np.zeros(valid.shape, int)
  tokens[valid] = np.concatenate(texts)
  return tokens, valid


def bradley_terry(params, prompts, centring_weight):
  """Mean over prompts, (texts, ranks) each, of the mean surprise at their pairs, with its metrics.

  `centring_weight` is of the square of twice the mean score of a prompt's texts.
  """
  total, every, right, pairs = 0.0, [], 0, 0
  score_of_all = scores(params, *padded([ids for texts, _ in prompts for ids in texts]))
  for score, (_, ranks) in zip(score_of_all.split([len(texts) for texts, _ in prompts]), prompts):
    gaps = [score[i] - score[j] for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
    nats = sum(torch.log(1 + torch.exp(-gap)) for gap in gaps) / len(gaps)
    total = total + nats + centring_weight * (2 * score.mean()) ** 2
    every += score.detach().tolist()
    right, pairs = right + sum(gap.item() > 0 for gap in gaps), pairs + len(gaps)
  return total / len(prompts), {'accuracy': right / pairs, 'score': float(np.mean(every))}


def batches(rows, lengths, batch_size, longest, seed, count, buckets=4):
  """The first so many batches of rows, epoch after epoch.

  Rows come from an endless stream, one permutation of them after another. An epoch takes as many as
  fill whole batches, the short ones together; what does not fill a batch goes to those a little
  longer. Then the batches are shuffled.
  """
  permutation = lambda number: np.random.default_rng((seed, number)).permutation(len(rows)).tolist()
  stream = itertools.chain.from_iterable(map(permutation, itertools.count()))
  edges, chosen, epoch = [-(-longest * i // buckets) for i in range(buckets + 1)], [], 0
  while len(chosen) < count:
    taken = list(itertools.islice(stream, len(rows) // batch_size * batch_size))
    made, waiting = [], []
    for low, high in itertools.pairwise(edges):
      waiting += [row for row in taken if low < lengths[row] <= high]
      while len(waiting) >= batch_size:
        made.append(waiting[:batch_size])
        waiting = waiting[batch_size:]
    assert made and not waiting
    chosen += [made[i] for i in np.random.default_rng((seed, epoch, 1)).permutation(len(made))]
    epoch += 1
  return [[rows[i] for i in batch] for batch in chosen[:count]]


def segments(batch):
  """The (ids, mask) of every demonstration in a packed batch."""
  texts = []
  for tokens, mask, segment in zip(batch.tokens_BT, batch.mask_BT, batch.segment_BT):
    for number in range(1, segment.max() + 1):
      texts.append((tokens[segment == number].tolist(), mask[segment == number].tolist()))
  return texts


def trained_but_bias(params):
  """The same parameters, to be differentiated; not the bias, on which no ranking depends."""
  return {path: x.clone().requires_grad_(path != 'scalar/bias') for path, x in params.items()}
